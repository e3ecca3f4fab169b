"""Trains a small byte-level BPE vocabulary with Qwen's split pattern and writes it as a `.tiktoken` file.

    python tools/build_tokenizer.py --size=4096 --output=small.tiktoken
    python tools/build_tokenizer.py --input 'corpus/**/*.jsonl' --size=32000 --output=corpus.tiktoken

`--size` counts all ids, the 208 control tokens included, so a model with `vocab_size = SIZE` fits. Tasks use it with
`vocabulary_path.path = "small.tiktoken"` in a gin file. The same text gives the same file.
"""

import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import task_arguments

from qwen_jax import command_line

logger = logging.getLogger("build_tokenizer")
_PROGRESS_SECONDS = 10
_SAMPLE_BYTES = 2_000_000


def train(texts: Iterable[str], size: int) -> dict[bytes, int]:
    """Ranks of a vocabulary with `size` ids in all.

    Args:
        texts: documents.
        size: number of ids: 256 bytes, merges, 208 control tokens.

    Returns:
        Token bytes to rank, `size` - 208 of them; single bytes come first.

    Raises:
        ValueError: `size` leaves no room for a merge; no text; or too little text for so many merges.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    from qwen_jax.data.tokenizer import CONTROL_TOKENS, PATTERN

    fixed = 256 + len(CONTROL_TOKENS)
    if size <= fixed:
        raise ValueError(
            f"size is {size}: it must be above {fixed}, the 256 single bytes and {len(CONTROL_TOKENS)} control tokens"
        )
    model = tokenizers.Tokenizer(models.BPE())
    model.normalizer = normalizers.NFC()
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(CONTROL_TOKENS), initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    counted = _Counted(texts)
    model.train_from_iterator(counted, trainer)
    if not counted.documents:
        raise ValueError("there is no text to train on")
    vocabulary = sorted(model.get_vocab().items(), key=lambda item: item[1])
    if len(vocabulary) < size - len(CONTROL_TOKENS):
        raise ValueError(
            f"{counted.documents} documents of {counted.characters} characters give {len(vocabulary)} ranks, expected "
            f"{size - len(CONTROL_TOKENS)}: train on more text, or ask for a size of "
            f"{len(vocabulary) + len(CONTROL_TOKENS)}"
        )
    to_byte = _byte_level_alphabet()
    return {bytes(to_byte[char] for char in token): rank for rank, (token, _) in enumerate(vocabulary)}


class _Counted:
    """Passes documents on, counts them and logs how far it is."""

    def __init__(self, texts: Iterable[str]):
        self._texts, self.documents, self.characters = texts, 0, 0

    def __iter__(self) -> Iterator[str]:
        logged = time.monotonic()
        for text in self._texts:
            self.documents += 1
            self.characters += len(text)
            if time.monotonic() - logged > _PROGRESS_SECONDS:
                logged = time.monotonic()
                logger.info("read %s documents, %s characters", f"{self.documents:,}", f"{self.characters:,}")
            yield text
        logger.info("read %s documents, %s characters; merging", f"{self.documents:,}", f"{self.characters:,}")


def _byte_level_alphabet() -> dict[str, int]:
    """Character to byte in the byte-level alphabet: printable bytes stand for themselves, others for U+0100 and up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _texts(patterns: list[str], text_field: str) -> Iterator[str]:
    from qwen_jax.data.sources import documents, read_file

    if patterns:
        yield from (document["text"] for document in documents(patterns, text_field=text_field))
        return
    from tasks.pretrain import python_corpus

    for path in python_corpus().files:
        yield from read_file(path)


def main(argv: list[str] | None = None) -> None:
    """Trains, writes and measures."""
    parser = task_arguments.parser(__doc__)
    parser.add_argument("--input", nargs="+", default=[], help="folders or globs (default: files of python_corpus)")
    parser.add_argument("--text_field", default="text", help="field of JSON lines or Parquet (default: %(default)s)")
    parser.add_argument("--size", type=int, required=True, help="number of ids, control tokens included")
    parser.add_argument("--output", type=Path, required=True, help="the .tiktoken file to write")
    arguments = task_arguments.parse(parser, argv)
    from qwen_jax.data.tokenizer import Tokenizer, write_ranks

    if not arguments.output.absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder {arguments.output.absolute().parent} to write {arguments.output.name} in")
    started = time.monotonic()
    write_ranks(train(_texts(arguments.input, arguments.text_field), arguments.size), arguments.output)
    tokenizer = Tokenizer(arguments.output)
    text_bytes = tokens = 0
    for text in _texts(arguments.input, arguments.text_field):
        ids = tokenizer.encode(text)
        tokens += len(ids)
        text_bytes += len(tokenizer.decode_bytes(ids))
        if text_bytes > _SAMPLE_BYTES:
            break
    print(
        f"{arguments.output}: {tokenizer.vocab_size} ids ({tokenizer.num_ranks} ranks), {text_bytes / tokens:.3f} "
        f"bytes per token on the first {text_bytes:,} bytes, {time.monotonic() - started:.1f} s"
    )


if __name__ == "__main__":
    command_line.run(main)
