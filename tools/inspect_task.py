"""Shows decoded documents of a task or mixture, with a mark on tokens that carry loss, and statistics.

    python tools/inspect_task.py python_corpus
    python tools/inspect_task.py python_corpus --cache_dir=cache --sequence_length=2048
    python tools/inspect_task.py chat_messages --gin.chat_messages.pattern=chat.jsonl

Without `--cache_dir` the first documents go through the task's SeqIO pipeline; with it, packed examples are read as
training reads them. On a terminal, text that carries loss is green and control tokens are inverted; elsewhere they
are marked ⟦so⟧ and ⟪so⟫; the places of a picture are shown as `<imgpad>×256`. Invisible characters of the documents
are shown as escapes. Where an example has several segments, such as the two sides of a pair or the conversations of a
packed row, a line before each says its number.
"""

import collections
import dataclasses
import itertools
import sys
from collections.abc import Iterator

import task_arguments

from qwen_jax import command_line
from qwen_jax.command_line import escape

_LOSS, _CONTROL = ("\x1b[32m", "\x1b[0m"), ("\x1b[7m", "\x1b[0m")
_SHOWN_SIZE = 16  # of pictures, which are counted here and not looked at
_PLAIN_LOSS, _PLAIN_CONTROL = ("⟦", "⟧"), ("⟪", "⟫")


def render(ids, loss_weights, tokenizer, *, color: bool) -> str:
    """Decoded text with marks.

    Args:
        ids: int array [length].
        loss_weights: array [length]; not 0 where the token carries loss.
        tokenizer: a `qwen_jax.data.tokenizer.Tokenizer`.
        color: whether to mark with ANSI colors; else with brackets.
    """
    loss, control = (_LOSS, _CONTROL) if color else (_PLAIN_LOSS, _PLAIN_CONTROL)
    parts = []
    for carries, run in itertools.groupby(zip(ids, loss_weights, strict=True), lambda pair: bool(pair[1])):
        text = ""
        kinds = itertools.groupby((int(token) for token, _ in run), lambda token: token >= tokenizer.num_ranks)
        for is_control, tokens in kinds:
            if is_control:
                names = (
                    _control(tokenizer.decode([token]), len(list(same))) for token, same in itertools.groupby(tokens)
                )
                # Inside green text the end of an inversion would end the green too.
                again = loss[0] if color and carries else ""
                text += "".join(f"{control[0]}{name}{control[1]}{again}" for name in names)
            else:
                text += escape(tokenizer.decode(tokens))
        parts.append(f"{loss[0]}{text}{loss[1]}" if carries else text)
    return "".join(parts)


def _control(name: str, count: int) -> str:
    """A control token, with its number where it stands several times, as the places of a picture do."""
    return name if count == 1 else f"{name}×{count}"


@dataclasses.dataclass
class Statistics:
    """Counts over tokenized documents or packed examples."""

    left_out: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    lengths: list[int] = dataclasses.field(default_factory=list)
    loss_tokens: int = 0
    text_bytes: int = 0
    pictures: int = 0

    def add(self, ids, loss_weights, tokenizer) -> None:
        """Counts one sequence; control tokens are no text."""
        self.lengths.append(len(ids))
        self.loss_tokens += sum(bool(weight) for weight in loss_weights)
        self.pictures += sum(token == tokenizer.vision_tokens["<img>"] for token in ids)
        self.text_bytes += len(tokenizer.decode_bytes(token for token in ids if token < tokenizer.num_ranks))

    def lines(self, noun: str) -> Iterator[str]:
        """Lines of the table, one a figure."""
        import numpy as np

        tokens = sum(self.lengths)
        low, middle, high, highest = np.percentile(self.lengths, [5, 50, 95, 99])
        yield f"{noun + 's:':24}{len(self.lengths):,}"
        yield f"{'tokens:':24}{tokens:,}"
        yield f"{'UTF-8 bytes:':24}{self.text_bytes:,}"
        yield f"{'bytes per token:':24}{self.text_bytes / tokens:.3f}"
        yield f"{'tokens per ' + noun + ':':24}5% {low:,.0f}   50% {middle:,.0f}   95% {high:,.0f}   99% {highest:,.0f}"
        yield f"{'longest:':24}{max(self.lengths):,} tokens"
        yield f"{'tokens with loss:':24}{self.loss_tokens / tokens:.1%}"
        if self.pictures:
            yield f"{'pictures:':24}{self.pictures:,}, {self.pictures / len(self.lengths):.2f} per {noun}"
        for reason, count in sorted(self.left_out.items()):
            yield f"{'left out:':24}{count:,}: {reason}"


@dataclasses.dataclass
class Sequence:
    """Tokens, their loss weights and the lengths of segments, which filling may follow.

    `left_out` is the reason for which a document has no tokens, as a rule "".
    """

    ids: list
    loss_weights: list
    segments: list[int]
    left_out: str = ""

    @classmethod
    def of_document(cls, example) -> "Sequence":
        """That of an example of a SeqIO task."""
        ids = example["targets"]
        weights = example.get("loss_weights", [1] * len(ids))
        segments = [int(length) for length in example.get("segment_lengths", [])] or [len(ids)]
        return cls(ids, weights, segments, example.get("left_out", b"").decode())

    @classmethod
    def of_row(cls, batch, row: int) -> "Sequence":
        """That of a row of packed examples."""
        import numpy as np

        segments = [len(batch["tokens"][row])]
        if "segment_ids" in batch:
            segments = np.bincount(batch["segment_ids"][row]).tolist()[1:]
        return cls(batch["tokens"][row], batch["loss_weights"][row], segments)


def _uncached(task, split: str, count: int) -> Iterator[Sequence]:
    """The first `count` documents of a task, through its whole SeqIO pipeline."""
    if split not in task.splits:
        raise ValueError(f"task {task.name} has no split {split!r}; it has {', '.join(task.splits)}")
    with command_line.quiet():
        from qwen_jax.beam import short_errors

    with short_errors():
        dataset = task.get_dataset(sequence_length=None, split=split, shuffle=False, use_cached=False)
        for example in dataset.take(count).as_numpy_iterator():
            yield Sequence.of_document(example)


def _print_sequence(sequence: Sequence, tokenizer, max_tokens: int, *, color: bool) -> None:
    start = 0
    for number, length in enumerate(sequence.segments, start=1):
        if start >= max_tokens:
            break
        if len(sequence.segments) > 1:
            print(f"--- segment {number}: {length:,} tokens")
        shown = slice(start, min(start + length, max_tokens))
        print(render(sequence.ids[shown], sequence.loss_weights[shown], tokenizer, color=color))
        start += length
    content = sum(sequence.segments)
    if content > max_tokens:
        print(f"… {content - max_tokens:,} more tokens (--max_tokens)")
    if content < len(sequence.ids):
        print(f"--- filling: {len(sequence.ids) - content:,} tokens")


def _show(sequences, tokenizer, arguments, noun: str) -> None:
    color = {"always": True, "never": False, "auto": sys.stdout.isatty()}[arguments.color]
    statistics = Statistics()
    for sequence in sequences:
        if sequence.left_out:
            statistics.left_out[sequence.left_out] += 1
            continue
        number = len(statistics.lengths)
        statistics.add(sequence.ids, sequence.loss_weights, tokenizer)
        if number < arguments.num_examples:
            print(f"--- {noun} {number}: {len(sequence.ids):,} tokens")
            _print_sequence(sequence, tokenizer, arguments.max_tokens, color=color)
    if not statistics.lengths:
        reasons = "".join(f"; left out {count}: {reason}" for reason, count in statistics.left_out.items())
        raise ValueError(f"there is no {noun} in split {arguments.split!r}{reasons}")
    print("---")
    print("\n".join(statistics.lines(noun)))


def _inspect_packed(arguments) -> None:
    from qwen_jax.data.loader import ExampleLoader

    if arguments.sequence_length is None:
        raise ValueError("--cache_dir needs --sequence_length: a task may be packed to several lengths")
    loader = ExampleLoader(
        arguments.name,
        cache_dir=arguments.cache_dir,
        sequence_length=arguments.sequence_length,
        split=arguments.split,
        seed=arguments.seed,
        packing=arguments.packing,
        images_per_row=arguments.images_per_row,
        image_size=_SHOWN_SIZE,
    )
    tokenizer = _tokenizer()
    if tokenizer.fingerprint != loader.vocabulary_fingerprint:
        raise ValueError(
            f"the packed data was made with the vocabulary {loader.vocabulary_fingerprint[:12]}, the one configured is "
            f"{tokenizer.fingerprint[:12]} ({tokenizer.path}): set vocabulary_path.path"
        )
    print(f"{loader}, {loader.bytes_per_token:.3f} bytes per token")
    for task, rate in loader.rates.items():
        print(f"    {rate:7.2%} {task}")
    count = min(len(loader), arguments.num_documents)
    batch = loader.read(0, count)
    _show((Sequence.of_row(batch, row) for row in range(count)), tokenizer, arguments, "example")


def _inspect_pipeline(arguments) -> None:
    from qwen_jax.data.quick_seqio import seqio

    known = sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})
    if arguments.name not in known:
        raise ValueError(f"{arguments.name!r} is neither a task nor a mixture; there are {', '.join(known)}")
    provider = seqio.get_mixture_or_task(arguments.name)
    tasks = provider.tasks if isinstance(provider, seqio.Mixture) else [provider]
    total = sum(provider.get_rate(task) for task in tasks) if len(tasks) > 1 else 1
    for task in tasks:
        share = f", {provider.get_rate(task) / total:.2%} of {arguments.name}" if len(tasks) > 1 else ""
        print(f"=== {task.name} {arguments.split}{share}; first {arguments.num_documents} documents")
        _show(_uncached(task, arguments.split, arguments.num_documents), _tokenizer(), arguments, "document")


def _tokenizer():
    from qwen_jax.data.default_tokenizer import default_tokenizer

    return default_tokenizer()


def main(argv: list[str] | None = None) -> None:
    """Prints examples and statistics."""
    parser = task_arguments.parser(__doc__)
    parser.add_argument("name", help="task or mixture")
    parser.add_argument("--split", default="train")
    parser.add_argument(
        "--num_examples", type=int, default=2, help="number of examples to print (default: %(default)s)"
    )
    parser.add_argument(
        "--num_documents",
        type=command_line.positive,
        default=200,
        help="number of documents in the statistics (default: %(default)s)",
    )
    parser.add_argument(
        "--max_tokens", type=int, default=400, help="largest number of tokens to print of each (default: %(default)s)"
    )
    parser.add_argument(
        "--cache_dir",
        type=command_line.path_argument,
        help="folder with packed examples (default: run the pipeline of the task)",
    )
    parser.add_argument("--sequence_length", type=int, help="tokens of a packed example")
    parser.add_argument("--packing", choices=task_arguments.PACKINGS, default="concat", help="packing of the examples")
    parser.add_argument("--images_per_row", type=int, default=0, help="the most pictures of a packed example")
    parser.add_argument("--seed", type=int, default=0, help="seed for the order of packed examples")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    arguments = task_arguments.parse(parser, argv)
    if arguments.cache_dir:
        _inspect_packed(arguments)
    else:
        _inspect_pipeline(arguments)


if __name__ == "__main__":
    command_line.run(main)
