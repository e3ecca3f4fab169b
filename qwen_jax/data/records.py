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
from typing import Any, ClassVar, Protocol

import numpy as np

from qwen_jax import files
from qwen_jax.data.chat import Encoded
from qwen_jax.data.conversations import Unusable
from qwen_jax.data.corpora import LINE_SUFFIXES, Corpus, list_files
from qwen_jax.data.quick_seqio import seqio, tf
from qwen_jax.data.sources import DocumentSource
from qwen_jax.data.tokenizer import Tokenizer
from qwen_jax.data.vocabulary import QwenVocabulary

logger = logging.getLogger(__name__)

SUFFIXES = (*LINE_SUFFIXES, ".json")
UNUSABLE = ("stop", "leave_out")
# Places that the log names, for each reason; all are counted, and the cache keeps their places.
_MOST_NAMED = 5
# Features of a task to fields of `Encoded`; only tasks with pictures have the last one.
_FIELDS = {
    "targets": "tokens",
    "loss_weights": "loss_weights",
    "segment_lengths": "segment_lengths",
    "turn_ends": "turn_ends",
    "images": "images",
}


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
        self, example: Mapping[str, Any], tokenizer: Tokenizer, named: collections.Counter[str]
    ) -> tuple[Encoded, str]:
        """The example of a row, and "" or the reason for which it has no tokens.

        Args:
            example: as `examples` gives it.
            tokenizer: vocabulary of the tokens.
            named: reasons to the rows left out so far, of which the log names the first few.

        Raises:
            ValueError: the row has not the layout, or is unusable and `unusable` is "stop". The message has its place.
        """
        where = example["source"].decode("utf-8", "replace")
        try:
            return self.encode_row(example, tokenizer), ""
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

    def encode_row(self, example: Mapping[str, Any], tokenizer: Tokenizer) -> Encoded:
        """The example of a row; raises as `Rows.encode`, and ValueError where the row is no object."""
        row = json.loads(example["text"].decode("utf-8", "surrogatepass"))
        if not isinstance(row, Mapping):
            raise ValueError(f"expected an object, found {type(row).__name__}")
        return self.rows.encode(row, tokenizer)


def _say_left_out(error: Unusable, where: str, named: collections.Counter[str]) -> None:
    named[error.reason] += 1
    if named[error.reason] <= _MOST_NAMED:
        more = "; further ones are only counted" if named[error.reason] == _MOST_NAMED else ""
        logger.warning("%s: left out: %s%s", where, error, more)


def record_files(pattern, task: str, suffixes: tuple[str, ...] = SUFFIXES, beside: tuple[str, ...] = ()) -> list[Path]:
    """Files of a task that `pattern` names; see `corpora.list_files`.

    Raises:
        ValueError: there is no pattern; the message says where to set it.
        FileNotFoundError: nothing matches.
    """
    if not pattern:
        raise ValueError(
            f"{task} does not know which files: set {task}.pattern = 'FOLDER OR GLOB' in a gin file, or give "
            f"--gin.{task}.pattern on the command line"
        )
    return list_files(pattern, suffixes, beside)


def encode_rows(
    dataset: tf.data.Dataset, output_features: Mapping[str, seqio.Feature], *, records: Callable[[], Records]
) -> tf.data.Dataset:
    """Preprocessor: rows of `Records` to the features of `features`.

    Args:
        dataset: `text` and `source`, strings, and what else the corpus has.
        output_features: `targets` has the vocabulary.
        records: called when the dataset is made, so that gin may configure it.

    Returns:
        `targets`, `loss_weights`, `segment_lengths` and `turn_ends`, int32 [..], and if the task has pictures `images`,
        string [..]; `left_out` and `source`, strings. All but these two are empty where `left_out` is a reason.
    """
    vocabulary = output_features["targets"].vocabulary
    assert isinstance(vocabulary, QwenVocabulary)  # a task of this project
    corpus, named = records(), collections.Counter()

    columns = [name for name in _FIELDS if name in output_features]
    given = sorted(dataset.element_spec)

    def encode(*values):
        encoded, reason = corpus.encode(dict(zip(given, values, strict=True)), vocabulary.tokenizer, named)
        return (*(_array(getattr(encoded, _FIELDS[name])) for name in columns), reason.encode())

    def to_features(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        types = [*(output_features[name].dtype for name in columns), tf.string]
        *made, reason = tf.numpy_function(encode, [example[name] for name in given], types, stateful=False)
        for column in made:
            column.set_shape([None])
        reason.set_shape([])
        return dict(zip(columns, made, strict=True)) | {"left_out": reason, "source": example["source"]}

    return dataset.map(to_features)


def _array(values: np.ndarray | tuple[str | bytes, ...]) -> np.ndarray:
    return np.array(values, object) if isinstance(values, tuple) else values


def features(pictures: bool = False) -> dict[str, seqio.Feature]:
    """The output features of a task on `Records`; `images`, encoded image files, where it has `pictures`."""
    numbers = seqio.Feature(seqio.PassThroughVocabulary(2), add_eos=False, dtype=tf.int32, required=False)
    tokens = seqio.Feature(QwenVocabulary(), add_eos=False, dtype=tf.int32)
    columns = {"targets": tokens} | dict.fromkeys(("loss_weights", "segment_lengths", "turn_ends"), numbers)
    if pictures:
        columns["images"] = seqio.Feature(seqio.PassThroughVocabulary(1), add_eos=False, dtype=tf.string)
    return columns


def add_task(name: str, records: Callable[[], Records], pictures: bool = False) -> None:
    """Registers a task of this name on `records`, with splits `train` and `validation`."""
    seqio.TaskRegistry.add(
        name,
        source=DocumentSource(records),  # ty: ignore[invalid-argument-type]  SeqIO says int, its sources return None too
        preprocessors=[functools.partial(encode_rows, records=records), seqio.CacheDatasetPlaceholder()],
        output_features=features(pictures),
    )
