"""Tool use: questions behind descriptions of tools, some of which need none."""

import json
from pathlib import Path

from qwen_jax.evaluation.benchmark import Example
from tests.evaluation.published import Published, write_json_lines

TOOLS = "Answer … APIs:\n\nsearch: Call this tool …\n\nBegin!\n\nQuestion: "


def trace(name: str, arguments: dict) -> str:
    """The right trace of a question, as the publisher has it."""
    written = json.dumps(arguments, ensure_ascii=False)
    return (
        f"Thought: 我应该查。\nAction: {name}\nAction Input: {written}\nObservation: …\nThought: So.\nFinal Answer: 3"
    )


def tool_use(folder: Path) -> None:
    """Three questions that need a tool, and two that need none; one file has languages, as ours do."""
    rows = [("search", {"query": "周杰伦"}), ("draw", {"prompt": "cat", "n": 2}), ("search", {"query": "x"})]
    positive = [{"prompt": f"{TOOLS}{n}?", "response": trace(*row)} for n, row in enumerate(rows)]
    negative = [{"prompt": f"{TOOLS}Hi {n}", "language": language} for n, language in enumerate(("en", "zh"))]
    write_json_lines(folder / "exam_plugin_v20231206_react_positive.jsonl", positive)
    write_json_lines(folder / "exam_plugin_v20231206_react_negative.jsonl", negative)


def _called(example: Example) -> str:
    return f"Thought: a\nAction: {example.target['action']}\nAction Input: {example.target['input']}"


FILES = {
    "tool_use": Published(
        write=tool_use,
        examples=3,
        shot="Question: ",
        file="exam_plugin_v20231206_react_positive.jsonl",
        wrong=('"response"', '"answer"'),
        right=_called,
        false=lambda example: "Thought: a\nAction: draw a line\nAction Input: {}",
    ),
    "tool_use_none": Published(
        write=tool_use,
        examples=2,
        shot="Question: ",
        file="exam_plugin_v20231206_react_negative.jsonl",
        wrong=('"prompt"', '"question"'),
        right=lambda example: "Thought: a\nFinal Answer: Hello!",
        false=lambda example: "Thought: a\nAction: search\nAction Input: {}",
    ),
}
