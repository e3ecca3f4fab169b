"""The metric of Table 6: the tool that a reply calls, and Rouge-L of its input, as eval/evaluate_plugin.py has them.

Released here means: as that script reads a reply, with its quirks. A call is there if "\\nAction: " is, with the blank;
but its fields are found by the first "Action:", "Action Input:" and "Observation:" anywhere, and where one is missing,
the slice is that of Python's -1. Names are compared without blanks around them and in lower case. Inputs are parsed as
JSON5 and written with sorted keys; what is no JSON5 is empty. Rouge-L is F1 over the tokens of the released vocabulary,
each decoded by itself and parted by blanks; a reply with a wrong or missing action counts, too.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence

from qwen_jax.agents import react
from qwen_jax.data.tokenizer import Tokenizer

_CALLED = "\nAction: "


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """What a reply calls.

    Attributes:
        called: whether it calls a tool.
        action: name of the tool.
        input: the action input as JSON with sorted keys; "" where it is no JSON5.
    """

    called: bool
    action: str
    input: str


def released(reply: str) -> ToolCall:
    """Reads a reply as the released script does."""
    text = f"{reply}\n"
    action, given, observation = (text.find(mark) for mark in ("Action:", "Action Input:", "Observation:"))
    name = text[action + len("Action:") : given].strip()
    return ToolCall(_CALLED in reply, name, normalized(text[given + len("Action Input:") : observation].strip()))


def parsed(reply: str) -> ToolCall:
    """Reads a reply as agents here do: the last call counts (`react.parse`)."""
    found = react.parse(react.trim(reply, react.stop_strings()))
    return ToolCall(bool(found.name), found.name, normalized(found.arguments))


def same_tool(one: str, other: str) -> bool:
    """Whether two names are the same."""
    return one.strip().lower() == other.strip().lower()


def normalized(text: str) -> str:
    """An action input as JSON with sorted keys and characters as they are; "" where it is no JSON5."""
    import json5  # in an extra

    try:
        return json.dumps(json5.loads(text), ensure_ascii=False, sort_keys=True)
    except Exception:  # whatever its parser, or sorting keys of two kinds, meets
        return ""


def rouge_l(reference: str, candidate: str) -> float:
    """F1 of Rouge-L over tokens of the released vocabulary; 0 where one of both is empty.

    Raises:
        FileNotFoundError: the released vocabulary is not installed.
    """
    from rouge_score import rouge_scorer  # in an extra

    scorer = rouge_scorer.RougeScorer(["rougeL"], tokenizer=_Blanks())
    return scorer.score(_tokens(reference), _tokens(candidate))["rougeL"].fmeasure


class _Blanks:
    def tokenize(self, text: str) -> Sequence[str]:
        return text.split()


def _tokens(text: str) -> str:
    tokenizer = _vocabulary()
    return " ".join(tokenizer.decode([token]) for token in tokenizer.encode(text))


@functools.cache
def _vocabulary() -> Tokenizer:
    return Tokenizer()
