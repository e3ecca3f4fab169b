"""What a benchmark is: examples read from its publisher's files, how a model answers them, and how answers are judged.

A file of `tasks/benchmarks/` declares one `Benchmark`. `add_benchmark` registers it as a SeqIO task whose metric
functions are its scores; `qwen_jax.evaluate` lets a model answer the examples and calls SeqIO's evaluator. This module
knows no model and no JAX.
"""

import collections
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

NORMALIZATIONS = ("sum", "tokens", "characters", "bytes", "text")
AVERAGES = ("examples", "subjects")
WAY_OF_CHOICES = "choice"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One question.

    Attributes:
        id: unique within the benchmark and equal in every reading, such as "anatomy/12".
        prompt: what a base model continues, with its shots.
        target: the right answer, of JSON types: for choices the index of the right one, else what `judge` takes.
        choices: continuations of the prompt, of which the most likely one is the answer. Empty: the model writes one.
        subject: part of the benchmark that is also scored alone, or "".
        chat: what the user says to a chat model, or "" where the benchmark defines no such prompt.
        extra: further fields of the publisher's row that `extract` and `judge` need, of JSON types.
        weight: points that the question is worth.
        parts: the prompt with pictures, in the JSON layout of `qwen_jax.data.content.parse_parts` with paths of image
            files; `prompt` is then what a person reads. Empty: the prompt is text.
        chat_parts: the same of `chat`.
    """

    id: str
    prompt: str
    target: Any
    choices: tuple[str, ...] = ()
    subject: str = ""
    chat: str = ""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    weight: float = 1.0
    parts: tuple[Mapping[str, Any], ...] = ()
    chat_parts: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> str:
        """The example as one line of JSON."""
        fields = dataclasses.asdict(self)
        # Benchmarks of text keep the fingerprints that they had before there were pictures.
        fields = {name: value for name, value in fields.items() if value or name not in _PARTS}
        return json.dumps(fields, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Example":
        """The example of `to_json`."""
        fields = json.loads(text)
        lists = {name: tuple(fields[name]) for name in ("choices", *_PARTS) if name in fields}
        return cls(**fields | lists)


_PARTS = ("parts", "chat_parts")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A row that is no question on purpose, or a file of a whole set that is not there; readers yield it.

    Attributes:
        where: file and row.
        reason: why, in the same words for all rows of a kind, so that they are counted together.
    """

    where: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
    """The model ranks the choices by their log-likelihood after the prompt.

    Attributes:
        normalization: what the log-likelihood of a choice is divided by: "sum" by nothing, "tokens" by its number of
            tokens, "characters" or "bytes" by its length without the blank that separates it from the prompt. "text"
            compares whole texts, prompt and choice, by their mean log-likelihood of a token (OpenCompass'
            PPLInferencer, but that the first token counts too, after the token that begins a text).
        apart: whether prompt and choice are encoded apart, as the released C-Eval script does ("：" and "A" are two
            tokens). Otherwise both are encoded as one text, and what follows the tokens of the prompt is the choice.
    """

    normalization: str = "sum"
    apart: bool = False

    def __post_init__(self):
        if self.normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization is {self.normalization!r}, expected one of {', '.join(NORMALIZATIONS)}")

    def pairs(self, example: Example) -> list[tuple[str, str]]:
        """(context, continuation) of each choice: `answer` compares the log-likelihoods of these continuations.

        The context is the prompt; with the normalization "text" it is empty, and the continuation is the whole text.
        """
        if self.normalization == "text":
            return [("", example.prompt + choice) for choice in example.choices]
        return [(example.prompt, choice) for choice in example.choices]

    def answer(self, output: Mapping[str, Sequence[float]], choices: Sequence[str]) -> int:
        """Index of the choice that the model takes; the first one of equal ones.

        Args:
            output: `log_likelihoods` (nats) and `tokens` (counts) of the continuations of `pairs`.
            choices: their texts.
        """
        scores = []
        for text, total, tokens in zip(choices, output["log_likelihoods"], output["tokens"], strict=True):
            text = text.removeprefix(" ")
            by = {"sum": 1, "characters": len(text), "bytes": len(text.encode())}.get(self.normalization, tokens)
            scores.append(total / max(by, 1))
        return max(range(len(scores)), key=scores.__getitem__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """The model continues the prompt greedily, and an answer is extracted from its text.

    Attributes:
        max_new_tokens: largest number of tokens of the continuation.
        stop: strings that end it; they are no part of the text. `<|endoftext|>` and `<|im_end|>` always end it.
        extract: ways to find the answer in the text, by name; the first one counts, the others are reported beside it.
            None is "no answer found".
        judge: whether an extracted answer (never None) is right, or its share of the points, 0 to 1. It may run code in
            the sandbox or other processes: it is called from several threads.
        chat_extract: the same as `extract` for replies of chat models; empty: as `extract`.
        figures: further figures of the publisher, by name, of the first extracted answer (None: none was found), such
            as its relative error; their means are reported as they are, not in percent.
    """

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    extract: Mapping[str, Callable[[str, Example], Any]]
    judge: Callable[[Any, Example], bool | float]
    chat_extract: Mapping[str, Callable[[str, Example], Any]] = dataclasses.field(default_factory=dict)
    figures: Mapping[str, Callable[[Any, Example], float]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfdsSet:
    """The TFDS dataset of the same name.

    Attributes:
        name: with its version, such as "gsm8k:1.0.0".
        read: the examples from a function that returns the rows of a split as dicts of Python values.
    """

    name: str
    read: Callable[[Callable[[str], Iterator[dict]]], Iterator[Example | LeftOut]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark.

    Attributes:
        name: of its SeqIO task and on the command line, such as "arc_challenge".
        title: in tables, such as "ARC-c".
        folder: its folder under the data directory.
        files: what the folder must hold, for the message that says what is missing.
        shots: number of solved examples before the question.
        read: the examples of the publisher's files in a folder, and the rows that it leaves out.
        answers: how a model answers.
        written: where `answers` ranks: how texts are read, of a chat model that answers `Example.chat`, and of a model
            that continues the prompt of an example without choices. Its first way of extraction is named "choice".
            None: there are no such texts.
        tfds: the TFDS dataset of the same name, if there is one.
        groups: names of groups of subjects with their subjects, each scored alone.
        average: "examples" weighs every example by its points, "subjects" every subject equally.
        table: table of the report that has it, such as "Table 2", or "".
        report: the report's figures in percent by model, such as {"Qwen-7B": 58.2}.
        source: where prompt, shots and rules come from.
        summary: scores that are not means over examples, from all examples and their outcomes; they take the place of
            means of the same name. See `scores` for names.
        size: number of examples of the whole publication, or 0 where it is not known.
    """

    name: str
    title: str
    folder: str
    files: str
    shots: int
    read: Callable[[Path], Iterator[Example | LeftOut]]
    answers: Choices | Generation
    written: Generation | None = None
    tfds: TfdsSet | None = None
    groups: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    average: str = "examples"
    table: str = ""
    report: Mapping[str, float] = dataclasses.field(default_factory=dict)
    source: str = ""
    summary: "Callable[[Sequence[Example], Sequence[Outcome]], Mapping[str, float]] | None" = None
    size: int = 0

    def __post_init__(self):
        if self.average not in AVERAGES:
            raise ValueError(f"{self.name}: average is {self.average!r}, expected one of {', '.join(AVERAGES)}")
        if self.written and next(iter(self.written.extract)) != WAY_OF_CHOICES:
            raise ValueError(f"{self.name}: the first way of extraction of `written` must be named {WAY_OF_CHOICES!r}")

    def answered_by(self, example: Example, chat: bool = False) -> Choices | Generation:
        """How a model answers an example: `answers`, or `written` for texts where `answers` ranks.

        Args:
            chat: whether the model is a chat model that gets `Example.chat`; without effect where there is none.

        Raises:
            ValueError: the example has no choices to rank, and the benchmark does not say how to read a text.
        """
        if isinstance(self.answers, Generation) or (example.choices and not (chat and example.chat and self.written)):
            return self.answers
        if self.written is None:
            raise ValueError(f"{self.name}: example {example.id} has no choices, and the benchmark has no `written`")
        return self.written


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one example.

    Attributes:
        id, subject: of the example.
        extracted: the answer by each way of extraction; for choices the index under "choice". None: no answer found.
        score: 0 to 1 by each way of extraction, the first one counts.
        weight: points that the example is worth.
        figures: further figures by name; see `Generation.figures`.
    """

    id: str
    subject: str
    extracted: Mapping[str, Any]
    score: Mapping[str, float]
    weight: float = 1.0
    figures: Mapping[str, float] = dataclasses.field(default_factory=dict)


def judged(benchmark: Benchmark, example: Example, output: Any, chat: bool = False) -> Outcome:
    """The outcome of an example.

    Args:
        output: of the model: of choices that it ranks, `log_likelihoods` and `tokens` of each, else the text that it
            wrote.
        chat: whether the output is the reply of a chat model to `Example.chat`.
    """
    answers = benchmark.answered_by(example, chat)
    if isinstance(answers, Choices):
        choice = answers.answer(output, example.choices)
        extracted: dict[str, Any] = {WAY_OF_CHOICES: choice}
        score = {WAY_OF_CHOICES: float(choice == example.target)}
        figures: dict[str, float] = {}
    else:
        ways = (answers.chat_extract if chat else {}) or answers.extract
        extracted = {name: extract(output, example) for name, extract in ways.items()}
        score = {
            name: 0.0 if answer is None else float(answers.judge(answer, example)) for name, answer in extracted.items()
        }
        first = next(iter(extracted.values()))
        figures = {name: float(figure(first, example)) for name, figure in answers.figures.items()}
    return Outcome(
        id=example.id,
        subject=example.subject,
        extracted=extracted,
        score=score,
        weight=example.weight,
        figures=figures,
    )


def scores(benchmark: Benchmark, outcomes: Sequence[Outcome], examples: Sequence[Example] = ()) -> dict[str, float]:
    """Scores of a benchmark in percent.

    Args:
        outcomes: of all examples.
        examples: in the same order; only benchmarks with a `summary` need them.

    Returns:
        `score` and its standard error `score_stderr` by the first way of extraction, `score_WAY` by each further one,
        `group/NAME` and `subject/NAME` by the first one, `mean/NAME` of each further figure (not in percent), and the
        counts `examples` and `no_answer`.
    """
    if not outcomes:
        raise ValueError(f"{benchmark.name}: no example was answered")
    first, *others = outcomes[0].score
    result = dict(zip(("score", "score_stderr"), _average(benchmark, outcomes, first), strict=True))
    result |= {f"score_{way}": _average(benchmark, outcomes, way)[0] for way in others}
    subjects = {outcome.subject for outcome in outcomes} - {""}
    for group, members in benchmark.groups.items():
        part = [outcome for outcome in outcomes if outcome.subject in members]
        if part:
            result[f"group/{group}"] = _average(benchmark, part, first)[0]
    for subject in sorted(subjects):
        result[f"subject/{subject}"] = _mean([one for one in outcomes if one.subject == subject], first)[0]
    for name in outcomes[0].figures:
        result[f"mean/{name}"] = sum(outcome.figures[name] for outcome in outcomes) / len(outcomes)
    if benchmark.summary is not None:
        result |= benchmark.summary(examples, outcomes)
    no_answer = sum(outcome.extracted[first] is None for outcome in outcomes)
    return result | {"examples": float(len(outcomes)), "no_answer": float(no_answer)}


def _average(benchmark: Benchmark, outcomes: Sequence[Outcome], way: str) -> tuple[float, float]:
    """Percent and its standard error."""
    if benchmark.average == "examples":
        return _mean(outcomes, way)
    by_subject = collections.defaultdict(list)
    for outcome in outcomes:
        by_subject[outcome.subject].append(outcome)
    means = [_mean(part, way) for part in by_subject.values()]
    error = math.sqrt(sum(error**2 for _, error in means)) / len(means)
    return sum(mean for mean, _ in means) / len(means), error


def _mean(outcomes: Sequence[Outcome], way: str) -> tuple[float, float]:
    """Weighted mean in percent and its standard error.

    With equal weights the error is the sample standard deviation over the root of the count; 0 for one outcome.
    """
    total = sum(outcome.weight for outcome in outcomes)
    mean = sum(outcome.weight * outcome.score[way] for outcome in outcomes) / total
    spread = sum((outcome.weight * (outcome.score[way] - mean)) ** 2 for outcome in outcomes)
    count = len(outcomes)
    return 100 * mean, 100 * math.sqrt(spread * count / max(count - 1, 1)) / total
