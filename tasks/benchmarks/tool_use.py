"""Tool use (report Table 6): the right tool and its input, and questions that need no tool.

Files of the publisher: `exam_plugin_v20231206_react_positive.jsonl` and `…_negative.jsonl`, or those of another version
alone, with `prompt`, the question behind descriptions of tools in the ReAct form, and `response`, a right trace.
`tools/make_tool_use.py` writes files of the same layout. The publisher's own are on its object store alone.

Two benchmarks, as these are two sets. `tool_use`: the share of right tools, and mean/rouge_l of the inputs.
`tool_use_none`: the share of questions that are answered without a call; the report's "false positive error" is 100
less it, and mean/false_positive as a share. Greedy, without stop words, as eval/evaluate_plugin.py; `released` reads
a reply as that script does, `parsed` as agents here (`qwen_jax.evaluation.tool_use`). A base model goes on from the
prompt.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from qwen_jax.evaluation import tool_use
from qwen_jax.evaluation.benchmark import Benchmark, Example, Generation
from qwen_jax.evaluation.benchmark_tasks import add_benchmark
from qwen_jax.evaluation.rows import Row, json_rows
from tasks.data_dir import benchmark_files

NAMES = "exam_plugin_v20231206_react_{}.jsonl"
WAYS = {"released": tool_use.released, "parsed": tool_use.parsed}


def exam_file(folder: Path, kind: str) -> Path:
    """The file of a kind, positive or negative; the published name where there is none.

    Raises:
        ValueError: there are several.
    """
    found = sorted(folder.glob(f"exam_plugin_*_{kind}.jsonl"))
    if len(found) > 1:
        raise ValueError(f"{folder}: {', '.join(one.name for one in found)}: keep one {kind} file in a folder")
    return found[0] if found else folder / NAMES.format(kind)


def example(row: Row, kind: str, index: int, target: dict) -> Example:
    """The example of a row; its subject is the language where the row has one."""
    prompt = row.text("prompt")
    subject = row.text("language") if "language" in row.fields else ""
    return Example(id=f"{kind}/{index}", prompt=f"{prompt}\n", chat=prompt, target=target, subject=subject)


def read_positive(folder: Path) -> Iterator[Example]:
    """Questions that need a tool."""
    for index, row in enumerate(json_rows(exam_file(folder, "positive"))):
        gold = tool_use.released(row.text("response"))
        if not gold.called:
            raise row.error("a call ('\\nAction: ') in 'response'")
        yield example(row, "positive", index, dataclasses.asdict(gold))


def read_negative(folder: Path) -> Iterator[Example]:
    """Questions that need no tool."""
    for index, row in enumerate(json_rows(exam_file(folder, "negative"))):
        yield example(row, "negative", index, {"called": False})


def extract(way: Callable[[str], tool_use.ToolCall]) -> Callable[[str, Example], dict]:
    """An extraction whose answer is of JSON types; it always finds one, if only that nothing is called."""
    return lambda text, _: dataclasses.asdict(way(text))


def right_tool(answer: dict, example: Example) -> bool:
    """Whether a reply calls the right tool."""
    return answer["called"] and tool_use.same_tool(answer["action"], example.target["action"])


EXTRACT = {name: extract(way) for name, way in WAYS.items()}
SOURCE = "QwenLM/Qwen eval/evaluate_plugin.py; tools/make_tool_use.py"
TOOL_USE = Benchmark(
    name="tool_use",
    title="Tool selection",
    folder="tool_use",
    files=f"{NAMES.format('positive')} or another exam_plugin_*_positive.jsonl",
    shots=0,
    read=read_positive,
    answers=Generation(
        max_new_tokens=512,
        stop=("Observation:",),
        extract=EXTRACT,
        judge=right_tool,
        figures={"rouge_l": lambda answer, example: tool_use.rouge_l(example.target["input"], answer["input"])},
    ),
    table="Table 6",
    report={"Qwen-1.8B-Chat": 92, "Qwen-7B-Chat": 98, "Qwen-14B-Chat": 98},
    source=SOURCE,
)
TOOL_USE_NONE = Benchmark(
    name="tool_use_none",
    title="No tool needed",
    folder="tool_use",
    files=f"{NAMES.format('negative')} or another exam_plugin_*_negative.jsonl",
    shots=0,
    read=read_negative,
    answers=Generation(
        max_new_tokens=512,
        stop=("Observation:",),
        extract=EXTRACT,
        judge=lambda answer, _: not answer["called"],
        figures={"false_positive": lambda answer, _: float(answer["called"])},
    ),
    table="Table 6",
    report={"Qwen-1.8B-Chat": 80.7, "Qwen-7B-Chat": 92.7, "Qwen-14B-Chat": 97.6},
    source=SOURCE,
)
for one in (TOOL_USE, TOOL_USE_NONE):
    add_benchmark(one, benchmark_files)
