"""Runs the released metric of tool use on hand-made transcripts, and writes what it gives.

    python tests/golden/tool_use/record.py PATH/TO/Qwen/eval/evaluate_plugin.py > tests/golden/tool_use/expected.json

Of the script (QwenLM/Qwen at 2df8e8a) only functions are run: as a whole it imports a class that transformers no longer
has. Its tokenizer is the released vocabulary, whose tokens are handed over as bytes, as QWenTokenizer does.
"""

import ast
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import json5
from rouge_score import rouge_scorer

from qwen_jax.data.tokenizer import Tokenizer

FUNCTIONS = (
    *("is_callable", "process_res", "_DummyTokenizer", "_get_tokenized_string"),
    *("eval_action", "eval_action_input"),
)
CALL = 'Thought: I search.\nAction: google_search\nAction Input: {"search_query": "北京 天气", "n": 2}'
GOLD = f"{CALL}\nObservation: 5\nThought: So.\nFinal Answer: 5"
# (name, reply)
REPLIES = [
    ("the same", GOLD),
    ("no observation", CALL),
    ("keys in another order, JSON5", f"{CALL[: CALL.index('{')]}{{n: 2, search_query: '北京 天气',}}"),
    ("another city", CALL.replace("北京", "上海")),
    ("name in capitals with blanks", CALL.replace("google_search", "  Google_Search ")),
    ("another tool, same input", CALL.replace("google_search", "image_gen")),
    ("no blank after Action:", CALL.replace("Action: google", "Action:google")),
    ("Action opens the text", CALL.removeprefix("Thought: I search.\n")),
    ("no input", "Thought: a\nAction: google_search"),
    ("no call", "Thought: a\nFinal Answer: 5"),
    ("plain text", "你好！"),
    ("nothing", ""),
    ("input is not JSON", CALL.replace('{"search_query"', '{"search_query')),
    ("input is a list", 'Thought: a\nAction: google_search\nAction Input: ["北京 天气", 2]'),
    ("two calls: the first is read", CALL + "\nAction: image_gen\nAction Input: {}\nObservation: 5"),
    ("two calls, the second is right", "Thought: a\nAction: image_gen\nAction Input: {}\nObservation: 5\n" + CALL),
    ("Action: in the thought", "Thought: Action: first\nAction: google_search\nAction Input: {}\nObservation: 5"),
    ("Observation: in the thought", "Thought: Observation: 5\n" + CALL.removeprefix("Thought: I search.\n")),
    ("input before action", 'Thought: a\nAction Input: {"n": 2}\nAction: google_search'),
    ("input of several lines", CALL.replace(", ", ",\n  ")),
    ("Observation: in the input", CALL.replace("天气", "Observation: 天气")),
    ("Thai and an emoji", CALL.replace("天气", "กรุงเทพ 🙂")),
]  # fmt: skip


def main() -> None:
    tree = ast.parse(Path(sys.argv[1]).read_text(encoding="utf-8"))
    kept = [node for node in tree.body if getattr(node, "name", None) in FUNCTIONS]
    names = {"json": json, "json5": json5, "rouge_scorer": rouge_scorer}
    exec(compile(ast.Module(kept, []), sys.argv[1], "exec"), names)
    own = Tokenizer()
    tokenizer = SimpleNamespace(
        encode=own.encode, convert_ids_to_tokens=lambda ids: [own.decode_bytes([token]) for token in ids]
    )
    rows = []
    for name, reply in REPLIES:
        job = {"prompt": "", "gen": [reply], "response": GOLD}
        rows.append(
            {
                "name": name,
                "reply": reply,
                "right": names["eval_action"](job),
                "rouge_l": names["eval_action_input"](job, tokenizer),
                "called": "\nAction: " in reply,
            }
        )
    print(json.dumps({"response": GOLD, "rows": rows}, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main()
