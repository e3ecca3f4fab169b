"""A model answers the examples of a benchmark on the engine; answers are judged beside it and recorded as they come."""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from qwen_jax.data import chatml
from qwen_jax.distributed import hosts
from qwen_jax.distributed.watchdog import Activity
from qwen_jax.evaluation import benchmark_tasks, pictures
from qwen_jax.evaluation.benchmark import Benchmark, Choices, Example, Generation, LeftOut, judged
from qwen_jax.evaluation.encoding import (
    CutPrompt,
    chat_prompt,
    cut_left,
    cut_pair,
    encode_continuations,
    encode_prompt,
)
from qwen_jax.evaluation.records import Records
from qwen_jax.evaluation.report_tables import Entry
from qwen_jax.inference import Engine, Request
from qwen_jax.inference.requests import LENGTH

# Ranked examples that are computed and recorded together, at first; see `next_window`.
FIRST_WINDOW = 32
_SMALLEST_WINDOW, _LARGEST_WINDOW = 8, 1024
_SHORT_SECONDS, _LONG_SECONDS = 10.0, 60.0
_PICTURES_AT_A_TIME = 128
# A line of progress so often where there is no terminal, in seconds.
_LOG_SECONDS = 30.0


def first_of_subjects(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """The first `limit` examples of each subject, in their order; all of them without a limit."""
    counts: dict[str, int] = {}
    kept = []
    for example in examples:
        counts[example.subject] = counts.get(example.subject, 0) + 1
        if limit is None or counts[example.subject] <= limit:
            kept.append(example)
    return kept


def fingerprint(examples: Sequence[Example]) -> str:
    """Short hash of the examples: of prompts with their shots, choices, targets and order."""
    found = hashlib.sha256()
    for example in examples:
        found.update(example.to_json().encode("utf-8", "surrogatepass") + b"\n")
    return found.hexdigest()[:16]


def as_chat(benchmark: Benchmark, example: Example, chat: bool) -> bool:
    """Whether a chat model gets the example's prompt for chat models."""
    return chat and bool(example.chat) and isinstance(benchmark.answered_by(example, chat), Generation)


def check_chat(benchmark: Benchmark, examples: Sequence[Example]) -> None:
    """Refuses a benchmark without prompts for chat models.

    Raises:
        ValueError: naming it.
    """
    if not any(as_chat(benchmark, example, True) for example in examples):
        raise ValueError(
            f"{benchmark.name} defines no prompt for chat models: leave it out, or evaluate its base prompt without "
            f"--chat"
        )


def new_tokens(answers: Generation, context_length: int) -> int:
    """The largest number of tokens of an answer: the protocol's, or half of the context where that is less."""
    return min(answers.max_new_tokens, context_length // 2)


def next_window(size: int, seconds: float) -> int:
    """Number of ranked examples to compute together after `size` of them took so long.

    Large windows share more prefixes; a kill loses a window, and the progress bar moves with each.
    """
    if seconds < _SHORT_SECONDS:
        return min(2 * size, _LARGEST_WINDOW)
    return max(size // 2, _SMALLEST_WINDOW) if seconds > _LONG_SECONDS else size


def answer(
    engine: Engine,
    benchmark: Benchmark,
    examples: Sequence[Example],
    records: Records | None,
    *,
    chat: bool = False,
    activity: Activity | None = None,
) -> None:
    """Answers those examples of a benchmark that have no answer yet.

    In a job of several processes all call it with the same arguments, except that process 0 alone has `records`, where
    it judges and writes. A prompt that is too long is cut from the left, so that there is room for the answer.

    Args:
        engine: with its tokenizer.
        records: the answers so far, and where new ones go.
        chat: the model gets the prompts for chat models, in ChatML, of those examples that have one.
        activity: of the watchdog.

    Raises:
        ValueError: the processes read other examples, an answer alone fills the context, or the model gives no numbers.
        OSError: an answer cannot be written.
    """
    activity = activity or Activity()
    left = _unanswered(benchmark, examples, records)
    ranked = [one for one in left if isinstance(benchmark.answered_by(one, chat), Choices)]
    written = [one for one in left if isinstance(benchmark.answered_by(one, chat), Generation)]
    with _Judges(benchmark, records, len(examples), len(examples) - len(left)) as judges:
        for one in itertools.chain(_ranked(engine, benchmark, ranked), _written(engine, benchmark, written, chat)):
            # A process alone waits for no other, and may take long for a text.
            activity.now(f"answering {benchmark.name}", limited=hosts.process_count() > 1)
            judges.take(one)
        activity.now(f"judging answers to {benchmark.name}", limited=False)


def _unanswered(benchmark: Benchmark, examples: Sequence[Example], records: Records | None) -> list[Example]:
    """Examples without an answer, which process 0 tells the others."""
    mine = fingerprint(examples)

    def state() -> dict:
        rows = records.rows if records is not None else {}
        return {"examples": mine, "done": "".join("01"[example.id in rows] for example in examples)}

    of_main = hosts.run_on_main(f"answered/{benchmark.name}", "process 0 to read the answers so far", state)
    if of_main["examples"] != mine:
        raise ValueError(
            f"process {hosts.process_index()} reads other examples of {benchmark.name} than process 0: give all hosts "
            f"the same files in --data_dir"
        )
    return [example for example, done in zip(examples, of_main["done"], strict=True) if done == "0"]


@dataclasses.dataclass(frozen=True)
class _Answer:
    """What the model says to an example.

    Attributes:
        chat: whether it was asked by the prompt for chat models.
        output: as `judged` takes it.
        cut: number of tokens that were cut off the prompt.
        finish_reason: of a text, see `Result`.
    """

    example: Example
    chat: bool
    output: Any
    cut: int
    finish_reason: str | None = None


def _ranked(engine: Engine, benchmark: Benchmark, examples: Sequence[Example]) -> Iterator[_Answer]:
    """Log-likelihoods (nats), numbers of tokens and greediness of the choices of each example."""
    for window in _windows(benchmark.name, examples):
        pairs = [_encoded_pairs(engine, benchmark, example) for example in window]
        found = iter(
            engine.score(
                [prompt.ids for of in pairs for prompt, _ in of],
                [choice for of in pairs for _, choice in of],
                **_shown(engine, benchmark, window, pairs),
            )
        )
        for example, of in zip(window, pairs, strict=True):
            scores = [next(found) for _ in of]
            totals = [float(score.log_probs.astype("float64").sum()) for score in scores]
            if not all(map(math.isfinite, totals)):
                raise ValueError(
                    f"{benchmark.name}, example {example.id}: log-likelihoods {totals} are not finite: is the "
                    f"checkpoint damaged?"
                )
            output = {
                "log_likelihoods": totals,
                "tokens": [len(choice) for _, choice in of],
                "greedy": [bool(score.most_likely.all()) for score in scores],
            }
            yield _Answer(example, False, output, max(prompt.cut for prompt, _ in of))


def _shown(engine: Engine, benchmark: Benchmark, window: Sequence[Example], pairs: Sequence[Sequence]) -> dict:
    """The argument `images` of `Engine.score`, the pictures of each pair; none where no example has any."""
    if not any(example.parts for example in window):
        return {}
    shown = (pictures.read(engine, benchmark.name, example.id, example.parts) for example in window)
    return {"images": [images for images, of in zip(shown, pairs, strict=True) for _ in of]}


def _windows(name: str, examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
    """The examples in parts, whose sizes follow the time that the parts before took in process 0."""
    start, size = 0, FIRST_WINDOW
    while start < len(examples):
        began = time.monotonic()
        yield examples[start : start + size]
        seconds = time.monotonic() - began
        start += size
        size = hosts.run_on_main(
            f"window/{name}/{start}", "process 0 to rank", functools.partial(next_window, size, seconds)
        )


def _encoded_pairs(engine: Engine, benchmark: Benchmark, example: Example) -> list[tuple[CutPrompt, list[int]]]:
    answers = benchmark.answered_by(example)
    assert isinstance(answers, Choices) and engine.tokenizer is not None
    if example.parts:
        if not answers.apart or answers.normalization == "text":
            raise ValueError(
                f"{benchmark.name}: choices after pictures must be encoded apart, and not ranked as whole texts"
            )
        prompt = pictures.prompt(engine, benchmark.name, example.id, example.parts, engine.context_length - 1)
        return [(CutPrompt(prompt, 0), engine.tokenizer.encode(choice)) for choice in example.choices]
    pairs = []
    for context, group in itertools.groupby(answers.pairs(example), key=lambda pair: pair[0]):
        texts = [continuation for _, continuation in group]
        prompt, choices = encode_continuations(engine.tokenizer, context, texts, apart=answers.apart)
        try:
            room, whole_text = engine.context_length + 1, not context.strip()
            pairs += [cut_pair(prompt, choice, room, whole_text=whole_text) for choice in choices]
        except ValueError as error:
            raise ValueError(f"{benchmark.name}, example {example.id}: {error}") from error
    return pairs


def _written(engine: Engine, benchmark: Benchmark, examples: Sequence[Example], chat: bool) -> Iterator[_Answer]:
    """The text that continues the prompt of each example, as they finish."""
    # Pictures are decoded for some examples at a time: those of a whole benchmark are tens of gigabytes.
    shown = any(example.parts for example in examples)
    size = _PICTURES_AT_A_TIME if shown else max(len(examples), 1)
    for start in range(0, len(examples), size):
        window = examples[start : start + size]
        requests = [_request(engine, benchmark, example, chat) for example in window]
        for result in engine.generate([request for request, _ in requests]):
            example = window[result.index]
            talk, cut = as_chat(benchmark, example, chat), requests[result.index][1]
            yield _Answer(example, talk, result.text or "", cut, result.finish_reason)


def _request(engine: Engine, benchmark: Benchmark, example: Example, chat: bool) -> tuple[Request, int]:
    """The request for an answer, and the number of tokens that were cut off its prompt."""
    assert engine.tokenizer is not None
    answers, talk = benchmark.answered_by(example, chat), as_chat(benchmark, example, chat)
    assert isinstance(answers, Generation)
    limit = new_tokens(answers, engine.context_length)
    room = engine.context_length - limit
    # Stop strings separate the shots of base prompts; a chat model ends its turn.
    stop, stop_ids = () if talk else answers.stop, chatml.stop_ids(engine.tokenizer)
    if parts := example.chat_parts if talk else example.parts:
        ids = pictures.prompt(engine, benchmark.name, example.id, parts, room, chat=talk)
        images = pictures.read(engine, benchmark.name, example.id, parts)
        return Request(ids, limit, stop_ids=stop_ids, stop_strings=stop, images=images), 0
    if talk:
        prompt = chat_prompt(engine.tokenizer, example.chat, room)
    else:
        prompt = cut_left(encode_prompt(engine.tokenizer, example.prompt), room)
    return Request(prompt.ids, limit, stop_ids=stop_ids, stop_strings=stop), prompt.cut


class _Judges:
    """Threads that judge answers, which may run programs, and record them, while the model goes on.

    Without records, in the other processes of a job, it does nothing.
    """

    def __init__(self, benchmark: Benchmark, records: Records | None, total: int, done: int):
        self._benchmark, self._records = benchmark, records
        self._pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="judge")
        self._futures: set[concurrent.futures.Future] = set()
        self._bar = tqdm(
            desc=benchmark.name,
            total=total,
            initial=done,
            unit="example",
            mininterval=0.2 if sys.stderr.isatty() else _LOG_SECONDS,
            disable=records is None,
        )

    def __enter__(self) -> "_Judges":
        return self

    def __exit__(self, kind, error, _) -> None:
        try:
            if error is None:
                self._collect(concurrent.futures.wait(self._futures, return_when="FIRST_EXCEPTION").done)
        finally:
            self._pool.shutdown(cancel_futures=True)
            self._bar.close()

    def take(self, one: _Answer) -> None:
        """Hands an answer over.

        Raises:
            Exception: of an earlier answer that could not be judged or written.
        """
        if self._records is not None:
            self._futures.add(self._pool.submit(self._judge, one))
            self._collect({future for future in self._futures if future.done()})

    def _collect(self, done: set[concurrent.futures.Future]) -> None:
        self._futures -= done
        for future in done:
            future.result()
            self._bar.update()

    def _judge(self, one: _Answer) -> None:
        example = one.example
        outcome = judged(self._benchmark, example, one.output, one.chat)
        row = {
            "id": example.id,
            "subject": example.subject,
            "prompt": example.chat if one.chat else example.prompt,
            "output": one.output,
            "extracted": dict(outcome.extracted),
            "target": example.target,
            "score": dict(outcome.score),
            "right": next(iter(outcome.score.values())) == 1,
            "chat": one.chat,
            "cut_tokens": one.cut,
        }
        row |= {"choices": list(example.choices)} if example.choices else {}
        row |= {"finish_reason": one.finish_reason} if one.finish_reason else {}
        assert self._records is not None
        self._records.add(row)


def settings(
    benchmark: Benchmark, examples: Sequence[Example], context_length: int, limit: int | None
) -> dict[str, Any]:
    """What decides the answers to a benchmark, besides the model."""
    found: dict[str, Any] = {"examples": fingerprint(examples), "shots": benchmark.shots, "limit": limit}
    for answers in filter(None, (benchmark.answers, benchmark.written)):
        if isinstance(answers, Choices):
            found |= {"normalization": answers.normalization, "apart": answers.apart}
        else:
            found |= {"max_new_tokens": new_tokens(answers, context_length), "stop": list(answers.stop)}
    return found


def figures(benchmark: Benchmark, example: Example, row: Mapping) -> dict[str, float]:
    """The further figures of a recorded answer, see `Generation.figures`."""
    answers = benchmark.answered_by(example, row["chat"])
    if isinstance(answers, Choices):
        return {}
    extracted = next(iter(row["extracted"].values()))
    return {name: float(figure(extracted, example)) for name, figure in answers.figures.items()}


def entry(
    benchmark: Benchmark,
    examples: Sequence[Example],
    rows: Mapping[str, Mapping],
    *,
    left_out: Sequence[LeftOut] = (),
    limit: int | None = None,
    wrong_answers: int = 20,
) -> Entry:
    """The results of a benchmark, scored by SeqIO's evaluator.

    Args:
        rows: records by id.
        left_out: rows of the publisher that are no examples.
        limit: see `first_of_subjects`.
        wrong_answers: the first so many are kept.

    Raises:
        ValueError: there is not one record for each example.
    """
    missing = [example.id for example in examples if example.id not in rows]
    if missing or len(rows) != len(examples):
        raise ValueError(
            f"{benchmark.name}: {len(rows):,} answers to {len(examples):,} examples; without one: {missing[:3]}"
        )
    in_order = [rows[example.id] for example in examples]
    predictions = [
        {name: row[name] for name in ("id", "subject", "extracted", "score")}
        | {"weight": example.weight, "figures": figures(benchmark, example, row)}
        for example, row in zip(examples, in_order, strict=True)
    ]
    return Entry(
        benchmark=benchmark,
        metrics=benchmark_tasks.evaluate(benchmark.name, predictions, examples=examples),
        examples=len(examples),
        written=sum("finish_reason" in row for row in in_order),
        left_out=collections.Counter(one.reason for one in left_out),
        cut=sum(row["cut_tokens"] > 0 for row in in_order),
        unfinished=sum(row.get("finish_reason") == LENGTH for row in in_order),
        limit=limit,
        wrong=list(itertools.islice((row for row in in_order if not row["right"]), wrong_answers)),
    )
