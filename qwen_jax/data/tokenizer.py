"""Byte-level BPE of Qwen on `tiktoken`, without TensorFlow (report section 2.2).

The ids are those of the released tokenizer: first the BPE ranks, then 208 control tokens in the released order. Text
is NFC-normalized first, digits stand alone, and every string has an encoding, so there is no unknown token.
"""

import base64
import binascii
import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import tiktoken

from qwen_jax import files

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English contractions
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # a word, with at most one space or sign before it
    r"|\p{N}"  # one digit: the only change from cl100k, which takes up to three
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # punctuation and the line ends after it
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"  # white space
)
NUM_EXTRA = 205
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(NUM_EXTRA)))
# Qwen-VL appends these, in the order of its released tokenizer.
VISION_TOKENS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>")

_RELEASED_DISTRIBUTION = "dashscope"
_RELEASED_FILE = "dashscope/resources/qwen.tiktoken"
RELEASED_FINGERPRINT = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
# The regular-expression engine of tiktoken backtracks over a run of blanks and panics on a million of them.
_LONGEST_BLANK_RUN = 900_000
_INVALID_BYTES = re.compile("([\udc80-\udcff]+)")
# Without the lookbehind, the search would try every blank of a shorter run as a start: quadratic time.
_BLANK_RUN = re.compile(rf"(?<![^\S\r\n])[^\S\r\n]{{{_LONGEST_BLANK_RUN},}}")


def released_ranks_path() -> Path:
    """Path of the released `qwen.tiktoken`, a data file of the installed distribution `dashscope`.

    The package itself is not imported, so none of its dependencies is needed.

    Raises:
        FileNotFoundError: the distribution is not installed, or has no such file.
    """
    try:
        path = Path(str(importlib.metadata.distribution(_RELEASED_DISTRIBUTION).locate_file(_RELEASED_FILE)))
    except importlib.metadata.PackageNotFoundError as error:
        raise FileNotFoundError(
            f"the released vocabulary comes with the PyPI package {_RELEASED_DISTRIBUTION}, which is not installed: "
            f"`pip install --no-deps {_RELEASED_DISTRIBUTION}`, or name a .tiktoken file"
        ) from error
    if not path.is_file():
        raise FileNotFoundError(
            f"{_RELEASED_DISTRIBUTION} is installed but has no {_RELEASED_FILE} (looked for {path}): install another "
            "version of it, or name a .tiktoken file"
        )
    return path


def read_ranks(path: str | os.PathLike) -> dict[bytes, int]:
    """Reads and checks a `.tiktoken` file: one `base64(token) rank` a line.

    Returns:
        Token bytes to rank; the ranks are 0 to n-1 without gaps and all 256 single bytes are among the tokens.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file breaks one of these rules; the message names file, line and rule.
    """
    path = files.as_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no vocabulary at {path}: name a .tiktoken file (tools/build_tokenizer.py makes one)")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        fields = line.split()
        if len(fields) != 2:
            raise ValueError(f"{path}:{number}: expected 'base64 rank', found {len(fields)} fields: {line[:80]!r}")
        try:
            token = base64.b64decode(fields[0], validate=True)
        except binascii.Error as error:
            raise ValueError(f"{path}:{number}: token {fields[0][:80]!r} is not base64: {error}") from error
        if not fields[1].isdigit():
            raise ValueError(f"{path}:{number}: rank {fields[1][:80]!r} is not a non-negative integer")
        if not token:
            raise ValueError(f"{path}:{number}: empty token")
        if token in ranks:
            raise ValueError(f"{path}:{number}: token {token!r} has already rank {ranks[token]}")
        ranks[token] = int(fields[1])
    check_ranks(ranks, path)
    return ranks


def check_ranks(ranks: Mapping[bytes, int], where: object) -> None:
    """Refuses ranks that do not form a byte-level vocabulary.

    Args:
        ranks: token bytes to rank.
        where: name of the vocabulary in errors.

    Raises:
        ValueError: a single byte has no rank, or the ranks are not 0 to n-1, each once.
    """
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(
            f"{where}: {len(missing)} of the 256 single bytes have no rank (the first is 0x{missing[0]:02x}): a "
            "byte-level vocabulary must hold them all, or some text could not be encoded"
        )
    found = sorted(ranks.values())
    for expected, rank in enumerate(found):
        if rank != expected:
            what = "appears twice" if rank < expected else "is missing"
            rule = f"ranks must be 0 to {len(found) - 1}, each once"
            raise ValueError(f"{where}: rank {min(rank, expected)} {what}: {rule}")


def write_ranks(ranks: dict[bytes, int], path: str | os.PathLike) -> None:
    """Writes a `.tiktoken` file in rank order; it appears under its name only when it is whole."""
    with files.new_file(path) as temporary:
        temporary.write_bytes(_serialize(ranks))


def _serialize(ranks: dict[bytes, int]) -> bytes:
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ordered)


class _Vocabulary:
    """The content of a vocabulary file, shared by all `Tokenizer`s on it."""

    def __init__(self, path: str):
        self.ranks = read_ranks(path)
        names = {name: len(self.ranks) + i for i, name in enumerate((*CONTROL_TOKENS, *VISION_TOKENS))}
        self.control = {name: names[name] for name in CONTROL_TOKENS}
        self.vision = {name: names[name] for name in VISION_TOKENS}
        self.fingerprint = hashlib.sha256(_serialize(self.ranks)).hexdigest()
        self.encoding = tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=self.ranks, special_tokens=names)

    @functools.cached_property
    def characters(self) -> np.ndarray:
        """Characters of each rank, int32 [ranks]; -1 where the bytes are not UTF-8 by themselves."""
        counts = np.empty(len(self.ranks), np.int32)
        for token, rank in self.ranks.items():
            try:
                counts[rank] = len(token.decode())
            except UnicodeDecodeError:
                counts[rank] = -1
        return counts


@functools.lru_cache(maxsize=8)
def _load(path: str, size: int, modified_ns: int) -> _Vocabulary:
    del size, modified_ns  # part of the cache key only: a file that changed is read again
    return _Vocabulary(path)


class Tokenizer:
    """The tokenizer of Qwen: text to ids and back.

    Ids 0 to `num_ranks` - 1 are byte sequences, the next 208 are `CONTROL_TOKENS`, and 9 `VISION_TOKENS` follow, which
    only models with an image encoder have. Building a second `Tokenizer` on the same file costs nothing; pickling keeps
    only the path.

    Args:
        path: a `.tiktoken` file; None is the released one (`released_ranks_path`).
        origin: source of `path`, a file or folder; errors name it instead of `path`.

    Raises:
        FileNotFoundError: no such file, or the released file is not installed.
        ValueError: the file is not a complete byte-level vocabulary (`read_ranks`).
    """

    PATTERN = PATTERN

    def __init__(self, path: str | os.PathLike | None = None, origin: str | os.PathLike | None = None):
        self.path = files.as_path(path).absolute() if path is not None else released_ranks_path()
        self.origin = files.as_path(origin) if origin is not None else self.path
        if not self.path.is_file():
            read_ranks(self.path)
        status = self.path.stat()
        self._vocabulary = _load(str(self.path), status.st_size, status.st_mtime_ns)
        self._encoding = self._vocabulary.encoding

    def __reduce__(self):
        return (Tokenizer, (str(self.path), str(self.origin)))

    def __repr__(self) -> str:
        return f"Tokenizer({str(self.origin)!r}, vocab_size={self.vocab_size})"

    @property
    def mergeable_ranks(self) -> dict[bytes, int]:
        """Token bytes to rank."""
        return self._vocabulary.ranks

    @property
    def control_tokens(self) -> dict[str, int]:
        """Name to id of the 208 control tokens."""
        return self._vocabulary.control

    @property
    def vision_tokens(self) -> dict[str, int]:
        """Name to id of the 9 control tokens of Qwen-VL: pictures, references, boxes (released: 151,851 to 151,859)."""
        return self._vocabulary.vision

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the ranks, in hexadecimal: two vocabularies with the same one give the same ids."""
        return self._vocabulary.fingerprint

    @property
    def num_ranks(self) -> int:
        """Number of BPE ranks, single bytes included (released: 151,643)."""
        return len(self._vocabulary.ranks)

    @property
    def vocab_size(self) -> int:
        """Number of ids: ranks and control tokens (released: 151,851). Embeddings may have more rows."""
        return self.num_ranks + len(CONTROL_TOKENS)

    @property
    def vision_vocab_size(self) -> int:
        """`vocab_size` with the control tokens of Qwen-VL (released: 151,860)."""
        return self.vocab_size + len(VISION_TOKENS)

    @property
    def required_rows(self) -> int:
        """Rows that a model needs: one for each id of text, of ChatML and of `<|endoftext|>` (released: 151,646).

        Models whose vocabulary was cut to the ids of another tokenizer of the family have no rows for the other 205
        control tokens, which nothing here produces.
        """
        return self.num_ranks + len(CONTROL_TOKENS) - NUM_EXTRA

    @property
    def endoftext_id(self) -> int:
        """Id of `<|endoftext|>`: it ends each document and pads."""
        return self.control_tokens["<|endoftext|>"]

    @property
    def im_start_id(self) -> int:
        """Id of `<|im_start|>`, which opens a turn of ChatML."""
        return self.control_tokens["<|im_start|>"]

    @property
    def im_end_id(self) -> int:
        """Id of `<|im_end|>`, which closes a turn of ChatML."""
        return self.control_tokens["<|im_end|>"]

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of untrusted text: the name of a control token is encoded as ordinary characters.

        Args:
            text: bytes are decoded as UTF-8; invalid bytes, and lone surrogates in a `str`, become U+FFFD. A run
                of more than 900,000 blanks, on which tiktoken panics, is encoded in pieces of that length.
        """
        ids: list[int] = []
        for part in _parts(normalize(text)):
            ids.extend(self._encoding.encode_ordinary(part))
        return ids

    def encode_array(self, text: str | bytes) -> np.ndarray:
        """`encode` as int32 [length], without a Python object for each id."""
        # Without special tokens to allow or refuse, this is `encode_ordinary`.
        arrays = [self._encoding.encode_to_numpy(part, disallowed_special=()) for part in _parts(normalize(text))]
        return (arrays[0] if len(arrays) == 1 else np.concatenate(arrays)).astype(np.int32)

    def count_characters(self, ids: np.ndarray) -> int:
        """Characters of the text of ids [length], control tokens left out."""
        ids = ids[ids < self.num_ranks]
        if (counts := self._vocabulary.characters[ids]).min(initial=0) < 0:  # a character is cut in two
            return len(self.decode(ids.tolist()))
        return int(counts.sum())

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of any bytes, which `decode_bytes` gives back exactly.

        Unlike `encode`, nothing is normalized or replaced: valid UTF-8 is encoded as it stands, and each other byte
        becomes the id of that byte.
        """
        ids: list[int] = []
        # Bytes that are not UTF-8 become the surrogates U+DC80 to U+DCFF, which no valid UTF-8 holds.
        for part in _INVALID_BYTES.split(data.decode("utf-8", errors="surrogateescape")):
            if _INVALID_BYTES.match(part):
                ids.extend(self.mergeable_ranks[bytes([ord(char) - 0xDC00])] for char in part)
            else:
                for piece in _parts(part):
                    ids.extend(self._encoding.encode_ordinary(piece))
        return ids

    def encode_batch(self, texts: Sequence[str | bytes], num_threads: int = 2) -> list[list[int]]:
        """`encode` of each text, on `num_threads` threads."""
        normalized = [normalize(text) for text in texts]
        short = [i for i, text in enumerate(normalized) if len(text) < _LONGEST_BLANK_RUN]
        result: list[list[int]] = [[]] * len(normalized)
        encoded = self._encoding.encode_ordinary_batch([normalized[i] for i in short], num_threads=num_threads)
        for i, ids in zip(short, encoded, strict=True):
            result[i] = ids
        for i in set(range(len(normalized))) - set(short):
            result[i] = self.encode(normalized[i])
        return result

    def encode_with_control_tokens(self, text: str) -> list[int]:
        """Ids of a trusted template: names of `CONTROL_TOKENS` become control tokens, those of `VISION_TOKENS` do not.

        Never pass text that a user or a document wrote: it could then open a turn of its own.
        """
        ids: list[int] = []
        for part in _parts(normalize(text)):  # no name of a control token holds a blank
            ids.extend(self._encoding.encode(part, allowed_special=set(CONTROL_TOKENS), disallowed_special=()))
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of ids; a control token gives its name.

        Raises:
            ValueError: an id is outside [0, vision_vocab_size).
        """
        ids, size = [int(i) for i in ids], self.vision_vocab_size
        if ids and not (0 <= min(ids) and max(ids) < size):
            position = next(i for i, token in enumerate(ids) if not 0 <= token < size)
            raise ValueError(
                f"id {ids[position]} at position {position} is outside [0, {size}) of {self.origin}: were "
                "these ids made with another vocabulary, or taken from padded embedding rows?"
            )
        return self._encoding.decode_bytes(ids)

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """Text of ids; `errors` is the treatment of bytes that are not UTF-8, as in `bytes.decode`."""
        return self.decode_bytes(ids).decode("utf-8", errors=errors)


def normalize(text: str | bytes) -> str:
    """Text as `Tokenizer.encode` sees it: NFC, and U+FFFD for invalid Unicode."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", errors="replace")
    if unicodedata.is_normalized("NFC", text):
        normalized = text
    else:
        normalized = unicodedata.normalize("NFC", text)
    try:
        normalized.encode("utf-8")
    except UnicodeEncodeError:
        # Surrogate pairs become the character they stand for, as in tiktoken; lone ones become U+FFFD.
        normalized = normalized.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return normalized


def _parts(text: str) -> list[str]:
    """Cuts `text` inside runs of blanks that the regular-expression engine could not stand; almost always whole."""
    if len(text) < _LONGEST_BLANK_RUN:
        return [text]
    cuts = [0]
    for run in _BLANK_RUN.finditer(text):
        cuts.extend(range(run.start() + _LONGEST_BLANK_RUN, run.end(), _LONGEST_BLANK_RUN))
    return [text[start:stop] for start, stop in zip(cuts, [*cuts[1:], len(text)], strict=True)]


@dataclasses.dataclass(frozen=True)
class PinnedTokenizer:
    """A tokenizer to be sent to other processes, which use the same one or stop.

    `path` is a `.tiktoken` file, None the released one.
    """

    path: str | None
    fingerprint: str

    def load(self) -> Tokenizer:
        """The tokenizer; the file is read once a process.

        Raises:
            FileNotFoundError, ValueError: see `Tokenizer`.
            RuntimeError: the file is another one than where the job was started.
        """
        tokenizer = Tokenizer(self.path)
        if tokenizer.fingerprint != self.fingerprint:
            raise RuntimeError(
                f"this worker has the vocabulary {tokenizer.path} (fingerprint {tokenizer.fingerprint[:12]}), the job "
                f"was started with {self.fingerprint[:12]}: put the same file on every worker"
            )
        return tokenizer
