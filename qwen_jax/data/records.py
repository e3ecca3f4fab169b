"""Files of JSON rows (conversations, pairs, prompts) as SeqIO examples of tokens.

`Records` is the corpus, `encode_rows` the preprocessor of a task. Rows that cannot be trained on stop the reading with
their file and line, or become examples without tokens that carry the reason: packing counts them.
"""

import collections
import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from qwen_jax import files
from qwen_jax.data.chat import Encoded
from qwen_jax.data.conversations import Unusable
from qwen_jax.data.quick_seqio import seqio, tf
from qwen_jax.data.sources import LINE_SUFFIXES, Corpus, DocumentSource, list_files
from qwen_jax.data.tokenizer import Tokenizer
from qwen_jax.data.vocabulary import QwenVocabulary

logger = logging.getLogger(__name__)

SUFFIXES = (*LINE_SUFFIXES, ".json")
UNUSABLE = ("stop", "leave_out")
# Places that the log names, for each reason; all are counted, and the cache keeps their places.
_MOST_NAMED = 5
_COLUMNS = ("targets", "loss_weights", "segment_lengths", "turn_ends")


class Rows(Protocol):
    """How one kind of row becomes an example: `ChatRows`, `PairRows`, `QueryRows`, dataclasses of plain settings."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field]]

    def group(self, row: Mapping) -> str:
        """Text by whose hash the row is held out."""
        ...

    def encode(self, row: Mapping, tokenizer: Tokenizer) -> Encoded:
        """The example; raises `Unusable`, or ValueError where the row has not the layout."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Records(Corpus):
    """Files of rows.

    Attributes:
        rows: how a row becomes an example.
        unusable: what happens to rows that cannot be trained on: "stop" names the first one, "leave_out" counts them.
        task: name of the task, for errors.
    """

    rows: Rows
    unusable: str = "stop"
    task: str = ""

    def __post_init__(self):
        super().__post_init__()
        if self.unusable not in UNUSABLE:
            raise ValueError(
                f"{self.task}.unusable is {self.unusable!r}: it must be 'stop', or 'leave_out' to leave out and count "
                "rows that cannot be trained on"
            )

    def examples(self, path: Path) -> Iterator[tuple[str, dict[str, str | bytes]]]:
        """(group, the row as JSON in `text` and its place in `source`) of the rows of one file."""
        for where, row in files.read_json_rows(path):
            group = self.rows.group(row) if isinstance(row, Mapping) else ""
            yield group, {"text": json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass"), "source": where}

    def settings(self) -> dict:
        """The settings of `rows`, and what happens to unusable ones."""
        return dataclasses.asdict(self.rows) | {"unusable": self.unusable}

    def encode(
        self, text: bytes, where: str, tokenizer: Tokenizer, named: collections.Counter[str]
    ) -> tuple[Encoded, str]:
        """The example of a row, and "" or the reason for which it has no tokens.

        Args:
            text, where: see `examples`.
            tokenizer: vocabulary of the tokens.
            named: reasons to the rows left out so far, of which the log names the first few.

        Raises:
            ValueError: the row has not the layout, or is unusable and `unusable` is "stop". The message has `where`.
        """
        try:
            return self.rows.encode(json.loads(text.decode("utf-8", "surrogatepass")), tokenizer), ""
        except Unusable as error:
            if self.unusable == "stop":
                raise ValueError(
                    f"{where}: {error}: correct the row, or leave such rows out, counted, with {self.task}.unusable = "
                    "'leave_out'"
                ) from error
            _say_left_out(error, where, named)
            nothing = np.zeros(0, np.int32)
            return Encoded(nothing, nothing), error.reason
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def _say_left_out(error: Unusable, where: str, named: collections.Counter[str]) -> None:
    named[error.reason] += 1
    if named[error.reason] <= _MOST_NAMED:
        more = "; further ones are only counted" if named[error.reason] == _MOST_NAMED else ""
        logger.warning("%s: left out: %s%s", where, error, more)


def record_files(pattern, task: str) -> list[Path]:
    """Files of a task that `pattern` names; see `sources.list_files`, of `SUFFIXES`.

    Raises:
        ValueError: there is no pattern; the message says where to set it.
        FileNotFoundError: nothing matches.
    """
    if not pattern:
        raise ValueError(
            f"{task} does not know which files: set {task}.pattern = 'FOLDER OR GLOB' in a gin file, or give "
            f"--gin.{task}.pattern on the command line"
        )
    return list_files(pattern, SUFFIXES)


def encode_rows(
    dataset: tf.data.Dataset, output_features: Mapping[str, seqio.Feature], *, records: Callable[[], Records]
) -> tf.data.Dataset:
    """Preprocessor: rows of `Records` to the features of `features`.

    Args:
        dataset: `text` and `source`, strings.
        output_features: `targets` has the vocabulary.
        records: called when the dataset is made, so that gin may configure it.

    Returns:
        `targets`, `loss_weights`, `segment_lengths` and `turn_ends`, int32 [..]; `left_out` and `source`, strings. The
        first four are empty where `left_out` is a reason.
    """
    vocabulary = output_features["targets"].vocabulary
    assert isinstance(vocabulary, QwenVocabulary)  # a task of this project
    corpus, named = records(), collections.Counter()

    def encode(text: bytes, where: bytes):
        encoded, reason = corpus.encode(text, where.decode("utf-8", "replace"), vocabulary.tokenizer, named)
        return (*(getattr(encoded, name) for name in _FIELDS), reason.encode())

    def to_features(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        types = [tf.int32] * len(_COLUMNS) + [tf.string]
        *columns, reason = tf.numpy_function(encode, [example["text"], example["source"]], types, stateful=False)
        for column in columns:
            column.set_shape([None])
        reason.set_shape([])
        return dict(zip(_COLUMNS, columns, strict=True)) | {"left_out": reason, "source": example["source"]}

    return dataset.map(to_features)


_FIELDS = ("tokens", "loss_weights", "segment_lengths", "turn_ends")


def features() -> dict[str, seqio.Feature]:
    """The output features of a task on `Records`."""
    numbers = seqio.Feature(seqio.PassThroughVocabulary(2), add_eos=False, dtype=tf.int32, required=False)
    tokens = seqio.Feature(QwenVocabulary(), add_eos=False, dtype=tf.int32)
    return {"targets": tokens} | dict.fromkeys(_COLUMNS[1:], numbers)


def add_task(name: str, records: Callable[[], Records]) -> None:
    """Registers a task of this name on `records`, with splits `train` and `validation`."""
    seqio.TaskRegistry.add(
        name,
        source=DocumentSource(records),  # ty: ignore[invalid-argument-type]  SeqIO says int, its sources return None too
        preprocessors=[functools.partial(encode_rows, records=records), seqio.CacheDatasetPlaceholder()],
        output_features=features(),
    )
