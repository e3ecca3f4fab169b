"""Builds a byte-level BPE vocabulary with Qwen's split pattern: from nothing, or on top of another one.

    python tools/build_tokenizer.py --size=4096 --output=small.tiktoken
    python tools/build_tokenizer.py --base=cl100k_base.tiktoken --size=151851 --output=new.tiktoken \\
        --input en:corpus/en 'zh:corpus/zh/**/*.jsonl.zst:2.0' th:corpus/th:4

The second is how the released vocabulary was made (report 2.2): the tokens of several digits leave the base, the
others keep their order, and the commonest merges of the corpora follow. An input is PATTERN, LANGUAGE:PATTERN or
LANGUAGE:PATTERN:WEIGHT; each occurrence in it counts WEIGHT times.

`--size` counts all ids, the 208 control tokens included, so a model with `vocab_size = SIZE` fits. NAME.tiktoken is for
this project (`vocabulary_path.path = "NAME.tiktoken"` in a gin file), NAME.tokenizer.json beside it for others; both
give the same ids. The same text gives the same files. 100 MB of text take a few minutes and some gigabytes.
"""

import argparse
import dataclasses
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path

import task_arguments

from qwen_jax import command_line
from qwen_jax.files import as_pattern

RELEASED = "released"
_SAMPLE_BYTES = 2_000_000
_INPUT = re.compile(r"(?:(?P<language>[A-Za-z][\w-]+):)?(?P<pattern>[^:]+)(?::(?P<weight>\d+(?:\.\d+)?))?")


@dataclasses.dataclass(frozen=True)
class Input:
    """Text of one language.

    Attributes:
        language: name of the language, for the table only; several inputs may share one.
        pattern: folder or glob; None is the files of `python_corpus`.
        weight: weight of one occurrence.
        text_field: field of JSON lines and column of Parquet with the text.
    """

    language: str = "text"
    pattern: str | None = None
    weight: Fraction = Fraction(1)
    text_field: str = "text"

    def texts(self) -> Iterator[str]:
        """Documents of the input."""
        from qwen_jax.data.corpora import documents, read_file

        if self.pattern is not None:
            yield from (document["text"] for document in documents(self.pattern, text_field=self.text_field))
            return
        from tasks.pretrain import python_corpus

        for path in python_corpus().files:
            yield from read_file(path)


def parse_input(text: str, text_field: str = "text") -> Input:
    """`PATTERN`, `LANGUAGE:PATTERN` or `LANGUAGE:PATTERN:WEIGHT`; an existing path is a pattern.

    Raises:
        ValueError: `text` has another form, or the weight is 0.
    """
    text = as_pattern(text, "--input")
    if os.path.exists(text):
        return Input(pattern=text, text_field=text_field)
    match = _INPUT.fullmatch(text)
    if match is None:
        raise ValueError(
            f"--input {text!r} is not PATTERN, LANGUAGE:PATTERN or LANGUAGE:PATTERN:WEIGHT, such as zh:corpus/zh:2.5"
        )
    weight = Fraction(match["weight"] or 1)
    if not weight:
        raise ValueError(f"--input {text!r} has the weight 0: leave the input out")
    return Input(match["language"] or "text", match["pattern"], weight, text_field)


def train(
    texts: Iterable[str] | Iterable[Input], size: int, base: Mapping[bytes, int] | None = None
) -> dict[bytes, int]:
    """Ranks of a vocabulary with `size` ids in all.

    Args:
        texts: documents, or `Input`s with their weights.
        size: number of ids: those of the base, merges, 208 control tokens.
        base: token bytes to rank; None is the 256 single bytes. A `size` of just the base and the control tokens gives
            the base itself, and no text is read.

    Returns:
        Token bytes to rank, `size` - 208 of them; those of the base come first.

    Raises:
        ValueError: `size` leaves no room for a merge; no text; or too little text for so many merges.
    """
    from qwen_jax.data.byte_pairs import PieceCounts, byte_ranks, learn_merges
    from qwen_jax.data.tokenizer import CONTROL_TOKENS

    if base is not None and size == len(base) + len(CONTROL_TOKENS):
        return dict(base)
    what = "ranks of the base" if base is not None else "single bytes"
    base = byte_ranks() if base is None else base
    num_merges = size - len(CONTROL_TOKENS) - len(base)
    if num_merges <= 0:
        raise ValueError(
            f"size is {size}: it must be above {len(base) + len(CONTROL_TOKENS)}, the {len(base)} {what} and "
            f"{len(CONTROL_TOKENS)} control tokens"
        )
    counts = PieceCounts()
    for one in texts:
        if isinstance(one, Input):
            counts.add(one.texts(), one.weight)
        else:
            counts.add([one])
    if not counts.documents:
        raise ValueError("there is no text to train on")
    ranks = learn_merges(counts, base, num_merges)
    if len(ranks) < len(base) + num_merges:
        raise ValueError(
            f"{counts.documents} documents of {counts.characters} characters give {len(ranks)} ranks, expected "
            f"{len(base) + num_merges}: train on more text, or ask for a size of {len(ranks) + len(CONTROL_TOKENS)}"
        )
    return ranks


def read_base(path: str, num_ranks: int | None = None) -> dict[bytes, int]:
    """The vocabulary to start from: ranks of a file without its tokens of several digits.

    Args:
        path: a `.tiktoken` file, or `released`.
        num_ranks: number of the file's ranks to take, from the first on; None takes all.

    Raises:
        FileNotFoundError, ValueError: no such file, or not a byte-level vocabulary made by byte-pair encoding.
    """
    from qwen_jax.data.byte_pairs import without_numbers
    from qwen_jax.data.merges import derive_merges
    from qwen_jax.data.tokenizer import read_ranks, released_ranks_path

    file = released_ranks_path() if path == RELEASED else Path(path)
    ranks = read_ranks(file)
    if num_ranks is not None:
        if not 256 <= num_ranks <= len(ranks):
            raise ValueError(f"--base_ranks is {num_ranks}: {file} has {len(ranks)} ranks, and 256 are bytes")
        ranks = {token: rank for token, rank in ranks.items() if rank < num_ranks}
        missing = sum(bytes([byte]) not in ranks for byte in range(256))
        if missing:
            raise ValueError(f"--base_ranks is {num_ranks}: {missing} single bytes of {file} have higher ranks")
    ranks = without_numbers(ranks)
    derive_merges(ranks, file)
    return ranks


def write(ranks: Mapping[bytes, int], path: Path) -> Path:
    """Writes `path` and the tokenizer.json beside it, whose path it returns; each appears only when it is whole."""
    from qwen_jax import files
    from qwen_jax.conversion.tokenizer import tokenizer_json
    from qwen_jax.data.tokenizer import Tokenizer, write_ranks

    write_ranks(dict(ranks), path)
    beside = path.with_name(f"{path.stem}.tokenizer.json")
    files.write_json(beside, tokenizer_json(Tokenizer(path)), indent=None)
    return beside


def _bytes_per_token(tokenizer, texts: Iterable[str]) -> tuple[int, float]:
    """(UTF-8 bytes of the first documents, about two million; bytes per token of them)."""
    text_bytes = tokens = 0
    for text in texts:
        ids = tokenizer.encode(text)
        tokens += len(ids)
        text_bytes += len(tokenizer.decode_bytes(ids))
        if text_bytes > _SAMPLE_BYTES:
            break
    return text_bytes, text_bytes / tokens


def main(argv: list[str] | None = None) -> None:
    """Trains, writes and measures."""
    parser = task_arguments.parser(__doc__)
    parser.add_argument(
        "--input", nargs="+", default=[], help="text to learn from, as above (default: files of python_corpus)"
    )
    parser.add_argument(
        "--text_field", default="text", help="field of JSON lines or Parquet with the text (default: %(default)s)"
    )
    parser.add_argument("--base", help=f"start from this .tiktoken file, or from {RELEASED!r} (default: single bytes)")
    parser.add_argument("--base_ranks", type=int, metavar="N", help="take only the first N ranks of the base")
    parser.add_argument("--size", type=int, required=True, help="number of ids, control tokens included")
    parser.add_argument("--output", type=command_line.path_argument, required=True, help="the .tiktoken file to write")
    arguments = task_arguments.parse(parser, argv)
    inputs = [parse_input(text, arguments.text_field) for text in arguments.input] or [Input()]
    _run(arguments, inputs)


def _run(arguments: argparse.Namespace, inputs: list[Input]) -> None:
    from qwen_jax.data.tokenizer import Tokenizer

    output = arguments.output.absolute()
    if arguments.base_ranks is not None and arguments.base is None:
        raise ValueError("--base_ranks needs --base: which file are the ranks of?")
    started = time.monotonic()
    base = None if arguments.base is None else read_base(arguments.base, arguments.base_ranks)
    ranks = train(inputs, arguments.size, base)
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = write(ranks, output)
    seconds = time.monotonic() - started
    tokenizer = Tokenizer(output)
    for one in inputs:
        size, ratio = _bytes_per_token(tokenizer, one.texts())
        print(
            f"{arguments.output}: {tokenizer.vocab_size} ids ({tokenizer.num_ranks} ranks), {ratio:.3f} bytes per "
            f"token on the first {size:,} bytes of {one.language} (weight {float(one.weight):g})"
        )
    print(f"{beside.name} beside it gives the same ids; {seconds:.1f} s")


if __name__ == "__main__":
    command_line.run(main)
