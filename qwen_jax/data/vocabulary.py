"""The tokenizer of Qwen as a SeqIO vocabulary.

Tasks are registered when `tasks` is imported, before gin files are parsed, so a vocabulary built without a path asks
`vocabulary_path` when it is used: `vocabulary_path.path = "small.tiktoken"` in a gin file gives every task another one.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from qwen_jax.data.default_tokenizer import vocabulary_path
from qwen_jax.data.quick_seqio import seqio, tf
from qwen_jax.data.tokenizer import PinnedTokenizer, Tokenizer

# TensorFlow only prepares text here; it would take all memory of a GPU that JAX is to train on.
tf.config.set_visible_devices([], "GPU")


def _state(path: Path) -> tuple[int, int] | None:
    """Size and time of the last write of a file; None if it does not exist."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns


class QwenVocabulary(seqio.Vocabulary):
    """`Tokenizer` under SeqIO's interface. Text never becomes a control token.

    End-of-text ends a document (`eos_id`) and pads; there is no unknown token, as every byte has an id. A pickled
    vocabulary keeps its fingerprint, so Beam workers use the same one or stop.

    Args:
        path: a `.tiktoken` file; None asks `vocabulary_path` at each use.
    """

    def __init__(self, path: str | os.PathLike | None = None):
        super().__init__(extra_ids=0)
        self._path = None if path is None else str(path)
        self._pinned: str | None = None
        self._kept: tuple | None = None  # path, state of the file and the tokenizer made from them

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer in use now; loaded on first use, then shared.

        Raises:
            FileNotFoundError, ValueError: see `Tokenizer`.
            RuntimeError: the file of an unpickled vocabulary has changed.
        """
        path = self._path if self._path is not None or self._pinned else vocabulary_path()
        if self._kept and self._kept[0] == path and _state(self._kept[2].path) == self._kept[1]:
            return self._kept[2]
        tokenizer = Tokenizer(path)
        if self._pinned and tokenizer.fingerprint != self._pinned:
            raise RuntimeError(
                f"the vocabulary at {tokenizer.path} (fingerprint {tokenizer.fingerprint[:12]}) is not the one that "
                f"this job was started with ({self._pinned[:12]}): put the same file on every worker"
            )
        self._kept = (path, _state(tokenizer.path), tokenizer)
        return tokenizer

    @property
    def fingerprint(self) -> str:
        """See `Tokenizer.fingerprint`."""
        return self.tokenizer.fingerprint

    def pinned(self) -> PinnedTokenizer:
        """The tokenizer, to be sent to other processes."""
        return PinnedTokenizer(self._path or vocabulary_path(), self.fingerprint)

    @property
    def bos_id(self) -> int | None:
        """None: documents have no start token."""
        return None

    @property
    def eos_id(self) -> int:
        """Id of `<|endoftext|>`."""
        return self.tokenizer.endoftext_id

    @property
    def pad_id(self) -> int:
        """Id of `<|endoftext|>`: id 0 is an ordinary token here, so SeqIO's default would be wrong."""
        return self.tokenizer.endoftext_id

    @property
    def unk_id(self) -> int | None:
        """None: every byte has an id."""
        return None

    @property
    def _base_vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def _encode(self, s: str | bytes) -> Sequence[int]:
        return self.tokenizer.encode(s)

    def decode(self, ids: Iterable[int] | tf.Tensor) -> str:
        """Text of all ids, end-of-text included: SeqIO's own `decode` would stop at the first."""
        return self._decode(np.asarray(ids).reshape(-1).tolist())

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        tokenizer = self.tokenizer

        def encode(text) -> np.ndarray:
            # A scalar arrives as bytes from a graph, as an array in eager mode.
            return tokenizer.encode_array(np.asarray(text, object).item())

        ids = tf.numpy_function(encode, [s], tf.int32, stateful=False)
        ids.set_shape([None])
        return ids

    def decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        """Text of ids [..., length], as UTF-8 strings [...]; all ids, as in `decode`."""
        return self._decode_tf(ids)

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        tokenizer = self.tokenizer

        def decode(rows: np.ndarray) -> np.ndarray:
            flat = rows.reshape(-1, rows.shape[-1])
            texts = [tokenizer.decode(row).encode() for row in flat.tolist()]
            return np.array(texts, object).reshape(rows.shape[:-1])

        ids = tf.convert_to_tensor(ids)
        text = tf.numpy_function(decode, [ids], tf.string, stateful=False)
        text.set_shape(ids.shape[:-1])
        return text

    def __getstate__(self) -> dict:
        return {"path": self._path or vocabulary_path(), "fingerprint": self.fingerprint}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["path"])
        self._pinned = state["fingerprint"]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QwenVocabulary) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        path = self._path or vocabulary_path()
        return f"QwenVocabulary({Path(path).name if path else 'released'})"
