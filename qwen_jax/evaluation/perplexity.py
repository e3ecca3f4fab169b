"""Perplexity and compression of texts: log-probabilities of all their tokens by sliding windows, counted by group."""

import collections
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from qwen_jax.inference import Engine

# Tokens of windows that are given to the engine together.
_TOGETHER = 65_536
NO_TEXT = "no text"


def windows(length: int, context_length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, start, end) of windows over a sequence: tokens [start, end) are predicted from [begin, start) and on.

    The first window has the first `context_length` tokens. Each further one ends `stride` tokens later and predicts
    those, so that a token past the first window has at least `context_length - stride` tokens before it. Every token
    but the first of the sequence is predicted exactly once.

    Raises:
        ValueError: `stride` is not in [1, context_length).
    """
    if not 1 <= stride < context_length:
        raise ValueError(
            f"the stride must be from 1 to {context_length - 1}, one less than the context; found {stride}"
        )
    start, end = 1, min(context_length, length)
    while start < length:
        yield max(0, end - context_length), start, end
        start, end = end, min(end + stride, length)


def log_probs(
    engine: Engine, sequences: Sequence[Sequence[int]], stride: int | None = None, context_length: int | None = None
) -> list[np.ndarray]:
    """Log-probability of each token after the first of each sequence, by `windows`; float32 [length - 1], nats.

    Args:
        sequences: token ids of each.
        stride: of the windows; None: half of the context.
        context_length: of the windows; None: the engine's.

    Raises:
        ValueError: ids are not the model's, or the stride is out of range.
    """
    context_length = context_length or engine.context_length
    stride = context_length // 2 if stride is None else stride
    found: list[list[np.ndarray]] = [[] for _ in sequences]
    prompts, continuations, places, tokens = [], [], [], 0

    def flush() -> None:
        for place, score in zip(places, engine.score(prompts, continuations), strict=True):
            found[place].append(score.log_probs)
        for some in (prompts, continuations, places):
            some.clear()

    for place, ids in enumerate(sequences):
        for begin, start, end in windows(len(ids), context_length, stride):
            prompts.append(ids[begin:start])
            continuations.append(ids[start:end])
            places.append(place)
            tokens += end - begin
            if tokens >= _TOGETHER:
                flush()
                tokens = 0
    if places:
        flush()
    return [np.concatenate(parts) if parts else np.zeros(0, np.float32) for parts in found]


@dataclasses.dataclass
class Tally:
    """Sums over texts.

    Attributes:
        documents, size, tokens: numbers of texts, of their bytes in UTF-8, and of their tokens.
        loss: negative log-likelihood of all tokens, in nats.
    """

    documents: int = 0
    size: int = 0
    tokens: int = 0
    loss: float = 0.0

    def add(self, other: "Tally") -> None:
        """Adds the sums of another one."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood of a token."""
        return math.exp(min(self.loss / self.tokens, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Bits that an arithmetic coder with this model needs for a byte of text: comparable between tokenizers."""
        return self.loss / math.log(2) / self.size

    @property
    def bytes_per_token(self) -> float:
        """How much text a token holds."""
        return self.size / self.tokens


@dataclasses.dataclass(frozen=True)
class Text:
    """A text and its group.

    Attributes:
        language, domain: "" where they are not known.
    """

    text: str
    language: str = ""
    domain: str = ""


def measure(
    engine: Engine, texts: Iterable[Text], stride: int | None = None, context_length: int | None = None
) -> tuple[dict[tuple[str, str], Tally], Mapping[str, int]]:
    """Sums over texts by language and domain.

    Every token of a text is predicted: the first one after `<|endoftext|>`, which ends the document before in training.

    Args:
        engine: with its tokenizer.
        stride, context_length: as in `log_probs`.

    Returns:
        (tallies by (language, domain), number of texts that were left out by reason).

    Raises:
        ValueError: as `log_probs`, or the model gives a probability that is no number.
    """
    assert engine.tokenizer is not None
    tallies: dict[tuple[str, str], Tally] = collections.defaultdict(Tally)
    left_out: collections.Counter[str] = collections.Counter()
    waiting: list[tuple[Text, list[int]]] = []
    tokens = 0

    def flush() -> None:
        found = log_probs(engine, [ids for _, ids in waiting], stride, context_length)
        for (one, ids), values in zip(waiting, found, strict=True):
            loss = -float(values.astype(np.float64).sum())
            if not math.isfinite(loss):
                raise ValueError(f"the log-likelihood of {one.text[:40]!r} is {-loss}: is the checkpoint damaged?")
            size = len(one.text.encode("utf-8", "surrogatepass"))
            tallies[one.language, one.domain].add(Tally(1, size, len(ids) - 1, loss))
        waiting.clear()

    for one in texts:
        ids = engine.tokenizer.encode(one.text)
        if not ids:
            left_out[NO_TEXT] += 1
            continue
        waiting.append((one, [engine.tokenizer.endoftext_id, *ids]))
        tokens += len(ids)
        if tokens >= _TOGETHER:
            flush()
            tokens = 0
    flush()
    return dict(tallies), left_out


def table(tallies: Mapping[tuple[str, str], Tally]) -> list[tuple[str, ...]]:
    """Rows of text, the first one a header: every group, then every language of several domains, then all."""
    rows: list[tuple[str, ...]] = [
        ("language", "domain", "documents", "bytes", "tokens", "bytes per token", "perplexity", "bits per byte")
    ]
    rows += [_row(language, domain, tallies[language, domain]) for language, domain in sorted(tallies)]
    languages = collections.Counter(language for language, _ in tallies)
    for language, domains in sorted(languages.items()):
        if domains > 1 and len(languages) > 1:
            rows.append(_row(language, "all", _sum(one for (of, _), one in tallies.items() if of == language)))
    if len(tallies) > 1:
        rows.append(_row("all", "all", _sum(tallies.values())))
    return rows


def _sum(tallies: Iterable[Tally]) -> Tally:
    total = Tally()
    for one in tallies:
        total.add(one)
    return total


def _row(language: str, domain: str, one: Tally) -> tuple[str, ...]:
    counts = (f"{one.documents:,}", f"{one.size:,}", f"{one.tokens:,}", f"{one.bytes_per_token:.3f}")
    return (language or "–", domain or "–", *counts, f"{one.perplexity:,.3f}", f"{one.bits_per_byte:.4f}")
