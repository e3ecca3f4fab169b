"""A page on which people compare answers side by side: one HTML file that needs no server and loads nothing.

A file of answers holds JSON lines, as `tools/answer.py` writes them:

    {"instruction": "17", "model": "sft", "messages": [{"role": "user", "content": "…"}], "answer": "…"}

The page shows no model names, keeps the verdicts in the browser, and gives them as JSON lines for
`qwen_jax.evaluation.preferences`. Prompts and answers are untrusted: they are data in the page, never HTML or script.
"""

import base64
import collections
import dataclasses
import hashlib
import itertools
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from qwen_jax import files

TEMPLATE = Path(__file__).with_suffix(".html")


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model said to an instruction.

    Attributes:
      instruction: id of the instruction.
      model: name of the model.
      messages: the conversation before the answer, each with `role` and `content`.
      answer: the text.
    """

    instruction: str
    model: str
    messages: tuple[tuple[str, str], ...]
    answer: str


def read_answers(paths: Iterable[str | Path]) -> list[Answer]:
    """The answers of files, in their order.

    Raises:
      OSError: no such file.
      ValueError: a line is no answer, a model answers an instruction twice, or two lines have different conversations
        under one id; the message has the file and the line.
    """
    found: list[Answer] = []
    seen: dict[tuple[str, str], str] = {}
    asked: dict[str, tuple] = {}
    for path in paths:
        for where, content in files.read_json_lines(path):
            one = _answer(content, where)
            if (before := seen.setdefault((one.instruction, one.model), where)) != where:
                raise ValueError(f"{where}: {one.model} answers instruction {one.instruction} already in {before}")
            if asked.setdefault(one.instruction, one.messages) != one.messages:
                raise ValueError(f"{where}: instruction {one.instruction} is another conversation than before")
            found.append(one)
    return found


def _answer(content, where: str) -> Answer:
    if not isinstance(content, Mapping):
        raise ValueError(f"{where}: expected an object, found {type(content).__name__}")
    instruction, model, answer = (content.get(field) for field in ("instruction", "model", "answer"))
    if isinstance(instruction, int) and not isinstance(instruction, bool):
        instruction = str(instruction)
    for field, value in (("instruction", instruction), ("model", model), ("answer", answer)):
        if not isinstance(value, str) or (field != "answer" and not value.strip()):
            raise ValueError(f"{where}: {field} must be text, found {value!r}")
    messages = content.get("messages")
    if not isinstance(messages, list) or not all(
        isinstance(one, Mapping) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
        for one in messages
    ):
        raise ValueError(f"{where}: messages must be a list of objects with a text role and a text content")
    return Answer(instruction, model, tuple((one["role"], one["content"]) for one in messages), answer)


@dataclasses.dataclass(frozen=True)
class Page:
    """An annotation page.

    Attributes:
      html: its text.
      items: number of comparisons on it.
      left_out: instructions without a comparison, since fewer than two models (or the reference and another) answered.
      ties: comparisons that the page does not show, because both answers are the same text; they are ties in the
        verdicts of every annotator.
    """

    html: str
    items: int
    left_out: list[str]
    ties: int


def make_page(answers: Sequence[Answer], *, reference: str | None = None, seed: int = 0) -> Page:
    """The page that compares the answers of each two models to each instruction.

    Order of the comparisons, and which model stands on the left, are random, and in the verdicts that the page gives.

    Args:
      answers: as `read_answers` gives them.
      reference: compare every other model with this one only (Figure 4 of the report); None: all pairs.
      seed: for order and sides.

    Raises:
      ValueError: there is nothing to compare.
    """
    groups: dict[str, list[Answer]] = collections.defaultdict(list)
    for one in answers:
        groups[one.instruction].append(one)
    draw, items, ties, left_out = random.Random(seed), [], [], []
    for instruction, group in groups.items():
        pairs = [pair for pair in itertools.combinations(group, 2) if reference in (None, pair[0].model, pair[1].model)]
        left_out += [] if pairs else [instruction]
        for pair in pairs:
            left, right = draw.sample(pair, 2)
            (ties if left.answer == right.answer else items).append(
                {
                    "instruction": instruction,
                    "messages": [{"role": role, "content": content} for role, content in left.messages],
                    "left": {"model": left.model, "answer": left.answer},
                    "right": {"model": right.model, "answer": right.answer},
                }
            )
    if not items:
        models = ", ".join(sorted({one.model for one in answers})) or "none"
        raise ValueError(f"nothing to compare: no instruction has different answers of two models; models: {models}")
    draw.shuffle(items)
    data = {"items": items, "ties": ties}
    fingerprint = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
    return Page(fill(TEMPLATE, {"fingerprint": fingerprint, **data}), len(items), left_out, len(ties))


def fill(template: Path, data: dict) -> str:
    """A template with this data; the browser runs its one script and takes its one style sheet, by their hashes."""
    page = template.read_text(encoding="utf-8")
    for name, element in (("__SCRIPT_HASH__", "<script>"), ("__STYLE_HASH__", "<style>")):
        (text,) = re.findall(f"{element}(.*?)</{element[1:]}", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        page = page.replace(name, f"sha256-{digest}")
    # No character that could end the element, or open another, stands in the data.
    text = json.dumps(data, ensure_ascii=True)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return page.replace("__DATA__", text)
