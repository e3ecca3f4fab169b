"""Examples of a SeqIO task before and after its cache: by `row_steps` where it knows all steps, else by tf.data."""

import dataclasses
import functools
import hashlib
import importlib
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gin

from qwen_jax.data.default_tokenizer import vocabulary_path
from qwen_jax.data.quick_seqio import seqio, tf
from qwen_jax.data.row_steps import AppendEos, CorpusExamples, Example, LastSteps, Rekey, RowSteps, Step, Tokenize
from qwen_jax.data.sources import DocumentSource
from qwen_jax.data.tokenizer import PinnedTokenizer
from qwen_jax.data.vocabulary import QwenVocabulary

_THIS_PROCESS = uuid.uuid4().hex
_LARGEST_SEED = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class WorkerSetup:
    """Called in each worker before it touches a task: registers tasks and configures them as in the launcher."""

    task_modules: tuple[str, ...]
    gin_config: str
    vocabulary_path: str | None
    task: str
    tokenizer: PinnedTokenizer
    launcher: str = _THIS_PROCESS

    def __call__(self) -> seqio.Task:
        """The task."""
        if self.launcher != _THIS_PROCESS:
            # See `qwen_jax.beam`; workers have a logging level of their own.
            logging.getLogger("absl").setLevel(logging.WARNING)
            for module in self.task_modules:
                importlib.import_module(module)
            with gin.unlock_config():
                # Configurables of models and training are unknown here. One of them may have computed the path, so the
                # path is bound as a value.
                gin.parse_config(self.gin_config, skip_unknown=True)
                gin.bind_parameter("vocabulary_path.path", self.vocabulary_path)
            self.tokenizer.load()
        return seqio.TaskRegistry.get(self.task)

    @classmethod
    def of(cls, task: seqio.Task, vocabulary: QwenVocabulary, task_modules: Sequence[str]) -> "WorkerSetup":
        """The setup for a task of this process."""
        return cls(tuple(task_modules), gin.config_str(), vocabulary_path(), task.name, vocabulary.pinned())


@dataclasses.dataclass(frozen=True)
class SeqioExamples:
    """Examples of one shard of any task, through tf.data, seeded as `seqio.beam_utils.PreprocessTask` does."""

    setup: WorkerSetup
    split: str
    index: int
    count: int

    def __call__(self) -> Iterator[Example]:
        from qwen_jax.beam import short_errors  # here, because other tasks need no Beam

        task = self.setup()
        digest = hashlib.md5(f"{task.name}shard{self.index}".encode()).digest()
        seed = int.from_bytes(digest, "little")
        if seed > _LARGEST_SEED:
            seed = int.from_bytes(digest[:7], "little")
        shard = seqio.ShardInfo(index=self.index, num_shards=self.count)
        with short_errors():
            dataset = task.source.get_dataset(split=self.split, shard_info=shard, shuffle=False, seed=seed)
            dataset = task.preprocess_precache(dataset, seed=seed).prefetch(tf.data.AUTOTUNE)
            yield from dataset.as_numpy_iterator()


@dataclasses.dataclass(frozen=True)
class SeqioSteps:
    """The steps of any task after its cache, through tf.data."""

    setup: WorkerSetup

    def __call__(self, examples: Iterator[Example], features: Mapping[str, Mapping[str, Any]]) -> Iterator[Example]:
        from qwen_jax.beam import short_errors  # here, because other tasks need no Beam

        task = self.setup()
        signature = {name: tf.TensorSpec(one["shape"], one["dtype"]) for name, one in features.items()}
        with short_errors():
            dataset = tf.data.Dataset.from_generator(lambda: examples, output_signature=signature)
            yield from task.preprocess_postcache(dataset, sequence_length=None).as_numpy_iterator()


def examples_of(task: seqio.Task, split: str, setup: WorkerSetup) -> list[Callable[[], Iterator[Example]]]:
    """For each input shard of a split the call that gives its examples up to the cache; can be sent to workers.

    Raises:
        FileNotFoundError: there are no shards.
    """
    steps = _row_steps(_around_cache(task)[0], task.output_features)
    if isinstance(task.source, DocumentSource) and steps is not None:
        corpus = task.source.corpus()  # once: it lists the files
        count = task.source.count_shards(corpus)
        return [CorpusExamples(corpus, split, index, count, steps) for index in range(count)]
    count = len(task.source.list_shards(split))
    if not count:
        raise FileNotFoundError(f"no shards found for {task.name} {split}")
    return [SeqioExamples(setup, split, index, count) for index in range(count)]


def modules_of(tasks: Sequence[seqio.Task], task_modules: Sequence[str]) -> list[str]:
    """What worker processes import to cache these tasks: no TensorFlow where `row_steps` knows all steps."""
    known = all(
        isinstance(task.source, DocumentSource)
        and all(_row_steps(part, task.output_features) is not None for part in _around_cache(task))
        for task in tasks
        if task.supports_caching
    )
    return ["qwen_jax.data.pack_cache"] if known else ["qwen_jax.data.task_examples", *task_modules]


def last_steps_of(task: seqio.Task, setup: WorkerSetup) -> LastSteps:
    """The steps after the cache; can be sent to workers."""
    steps = _row_steps(_around_cache(task)[1], task.output_features)
    return SeqioSteps(setup) if steps is None else RowSteps(steps)


def _around_cache(task: seqio.Task) -> tuple[list, list]:
    """The preprocessors before and after the placeholder for the cache."""
    kinds = [isinstance(step, seqio.CacheDatasetPlaceholder) for step in task.preprocessors]
    place = kinds.index(True)
    return list(task.preprocessors[:place]), list(task.preprocessors[place + 1 :])


def _row_steps(preprocessors: Sequence[Callable], features: Mapping[str, seqio.Feature]) -> tuple[Step, ...] | None:
    """The same as functions of one example; None where one of them is not known."""
    steps = [_row_step(preprocessor, features) for preprocessor in preprocessors]
    return None if None in steps else tuple(step for step in steps if step is not None)


def _row_step(preprocessor: Callable, features: Mapping[str, seqio.Feature]) -> Step | None:
    settings: dict[str, Any] = {}
    if isinstance(preprocessor, functools.partial):
        if preprocessor.args:
            return None
        preprocessor, settings = preprocessor.func, preprocessor.keywords
    if preprocessor is seqio.preprocessors.rekey and settings.keys() == {"key_map"} and settings["key_map"]:
        return Rekey(tuple((new, old or "") for new, old in settings["key_map"].items()))
    if preprocessor is seqio.preprocessors.tokenize and settings.keys() <= {"copy_pretokenized"}:
        return _tokenize(features, **settings)
    if preprocessor is seqio.preprocessors.append_eos and not settings:
        ended = {name: feature for name, feature in features.items() if feature.add_eos}
        ids = [(name, feature.vocabulary.eos_id) for name, feature in ended.items() if feature.rank == 1]
        known = [(name, eos) for name, eos in ids if eos is not None]
        return AppendEos(tuple(known)) if len(known) == len(ended) else None
    return None


def _tokenize(features: Mapping[str, seqio.Feature], copy_pretokenized: bool = True) -> Tokenize | None:
    # A vocabulary that passes values through leaves them as they are.
    others = {
        name: feature.vocabulary
        for name, feature in features.items()
        if not isinstance(feature.vocabulary, seqio.PassThroughVocabulary)
    }
    tokenizers = {vocabulary.pinned() for vocabulary in others.values() if isinstance(vocabulary, QwenVocabulary)}
    known = all(isinstance(vocabulary, QwenVocabulary) for vocabulary in others.values())
    return Tokenize(tuple(others), tokenizers.pop(), copy_pretokenized) if known and len(tokenizers) == 1 else None
