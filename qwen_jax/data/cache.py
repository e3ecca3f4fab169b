"""From a SeqIO task to packed examples on disk, on Apache Beam.

Two stages. First each task is cached in SeqIO's own layout, so `get_dataset(use_cached=True)` reads it after
`seqio.add_global_cache_dirs([cache_dir])`. Then its documents are packed (`qwen_jax.data.packing`): a hash of the
document names the shard and its place in it, so the bytes written depend neither on the number of workers nor on the
order in which Beam delivers.

    cache_dir/<task>/{train,validation}.tfrecord-*  info.*.json  stats.*.json  COMPLETED    SeqIO's cache
    cache_dir/<task>/description.json                                                       vocabulary and corpus
    cache_dir/<task>/packed-<length>/<split>/*.array_record  manifest.json                  packed examples
    cache_dir/<task>/packed-<length>-best_fit/<split>/…                               the same, packed by `best_fit`
"""

import contextlib
import dataclasses
import importlib
import logging
import math
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import apache_beam as beam
import gin
import numpy as np
import seqio
import tensorflow as tf
from seqio import beam_utils

from qwen_jax import files
from qwen_jax.beam import check_options, open_pipeline
from qwen_jax.data import mixing, packing
from qwen_jax.data.default_tokenizer import vocabulary_path
from qwen_jax.data.merges import derive_merges
from qwen_jax.data.packing import check_packing
from qwen_jax.data.tokenizer import RELEASED_FINGERPRINT, Tokenizer
from qwen_jax.data.vocabulary import QwenVocabulary

logger = logging.getLogger(__name__)

TOKENS, LOSS_WEIGHTS = "targets", "loss_weights"
DESCRIPTION = "description.json"
# A shard is sorted in the memory of one worker: 32M tokens are about 130 MB.
TOKENS_PER_SHARD = 1 << 25
_MAX_CACHE_FILES = 64
_PROGRESS_SECONDS = 10
_THIS_PROCESS = uuid.uuid4().hex


@dataclasses.dataclass(frozen=True)
class Prepared:
    """One packed split: its folder, and the content of its `manifest.json`."""

    folder: Path
    manifest: packing.Manifest


def prepare(
    mixture_or_task: str,
    *,
    cache_dir: str | os.PathLike,
    sequence_length: int,
    splits: Sequence[str] = ("train", "validation"),
    beam_options: Sequence[str] = (),
    num_shards: int | None = None,
    seed: int = 0,
    packing: str = "concat",
    task_modules: Sequence[str] = ("tasks",),
) -> list[Prepared]:
    """Caches and packs a task, or each task of a mixture; uses complete splits as they are.

    A call after an interrupted one continues with the next split when caching, with the next shard when packing.

    Args:
        mixture_or_task: a registered name (`tasks` is imported first).
        cache_dir: a folder that all Beam workers see.
        sequence_length: tokens of one example.
        splits: splits to cache; a warning names the ones that a task lacks, and `validation` if it has no document.
        beam_options: Beam pipeline options, such as `--runner=FlinkRunner`; the default runner works in this process.
        num_shards: shards of the packed data; None takes one for every 32M tokens.
        seed: seed for the order of documents.
        packing: `concat` merges documents and cuts them; `best_fit` keeps them whole (`qwen_jax.data.packing`).
        task_modules: modules that register tasks, imported here and by Beam workers.

    Returns:
        One `Prepared` for each task and split.

    Raises:
        ValueError: unknown name, packing or Beam option; no documents; a malformed row (the message names file and
            row); an unusable mixing rate; or `cache_dir` holds this task made from another vocabulary, corpus, seed
            or number of shards (the message says which, and what to do).
    """
    check_packing(packing)
    check_options(beam_options)
    for module in task_modules:
        importlib.import_module(module)
    cache_dir, prepared = files.as_path(cache_dir, "cache_dir"), []
    for task in _tasks(mixture_or_task):
        vocabulary = _check_task(task, splits)
        folder = Path(cache_dir, *task.name.split(":"))
        setup = _WorkerSetup(
            tuple(task_modules), gin.config_str(), vocabulary_path(), task.name, vocabulary.fingerprint
        )
        wanted = [split for split in splits if split in task.splits]
        description = _cache_task(task, wanted, folder, beam_options, setup)
        for split in _with_documents(task.name, wanted, description["splits"], folder):
            packer = _Packer(
                task=task.name,
                split=split,
                cache_folder=folder,
                sequence_length=sequence_length,
                method=packing,
                seed=seed,
                num_shards=num_shards or _default_shards(folder, split),
                source=description["source"],
                setup=setup,
            )
            prepared.append(packer.prepare(beam_options, check_shards=num_shards is not None))
    return prepared


def _tasks(name: str) -> list[seqio.Task]:
    known = sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})
    if name not in known:
        raise ValueError(f"{name!r} is neither a task nor a mixture; there are {', '.join(known)}")
    provider = seqio.get_mixture_or_task(name)
    if isinstance(provider, seqio.Mixture):
        return sorted(mixing.used_tasks(provider), key=lambda task: task.name)
    return [provider]


def _with_documents(task: str, wanted: Sequence[str], cached: Sequence[str], folder: Path) -> list[str]:
    """The `wanted` splits that are cached and not empty."""
    found = [split for split in wanted if split in cached and _stats(folder, split)["examples"]]
    if "validation" in wanted and "validation" not in found:
        logger.warning(
            "%s holds out no document: validation_share is 0, the corpus has one document, or the cache was made "
            "without this split",
            task,
        )
    return found


def _check_task(task: seqio.Task, splits: Sequence[str]) -> QwenVocabulary:
    if not task.supports_caching:
        raise ValueError(f"task {task.name} has no seqio.CacheDatasetPlaceholder() among its preprocessors: add it")
    if TOKENS not in task.output_features:
        features = ", ".join(task.output_features)
        raise ValueError(f"task {task.name} has the features {features}: packing needs one called {TOKENS!r}")
    vocabulary = task.output_features[TOKENS].vocabulary
    if not isinstance(vocabulary, QwenVocabulary):
        raise ValueError(f"task {task.name} uses {type(vocabulary).__name__}: packing needs a QwenVocabulary")
    missing = [split for split in splits if split not in task.splits]
    if len(missing) == len(splits):
        there = ", ".join(task.splits)
        raise ValueError(f"task {task.name} has none of the splits {', '.join(splits)}; it has {there}")
    if missing:
        logger.warning("%s has no split %s: left out", task.name, ", ".join(missing))
    return vocabulary


def _check_merges(tokenizer: Tokenizer) -> None:
    """Refuses a vocabulary that no other format can express, before a model is trained with it."""
    if tokenizer.fingerprint != RELEASED_FINGERPRINT:  # known to be good, and large: 6 s
        derive_merges(tokenizer.mergeable_ranks, tokenizer.path)


def _describe(task: seqio.Task, vocabulary: QwenVocabulary) -> dict:
    describe = getattr(task.source, "describe", None)
    return {
        "format_version": packing.FORMAT_VERSION,
        "task": task.name,
        "vocabulary": _identity(vocabulary),
        "source": describe() if describe else {"source": repr(task.source)},
    }


def _identity(vocabulary: QwenVocabulary) -> dict:
    return {"size": vocabulary.vocab_size, "fingerprint": vocabulary.fingerprint}


def _that_can_be_made(task: seqio.Task, missing: list[str], done: Sequence[str]) -> list[str]:
    """`missing`, without `validation` if the task is cached for training and its documents are gone."""
    if done and missing == ["validation"]:
        try:
            task.source.list_shards("validation")
        except FileNotFoundError as error:
            logger.warning("%s: its cache is used as it is, without validation (%s)", task.name, error)
            return []
    return missing


def _cache_task(task, splits, folder: Path, beam_options, setup: "_WorkerSetup") -> dict:
    """Makes SeqIO's cache of the `splits` that it lacks; returns its description."""
    vocabulary = task.output_features[TOKENS].vocabulary
    path = folder / DESCRIPTION
    found = files.read_json(path) if path.exists() else None
    done = found["splits"] if found else []
    missing = [split for split in splits if split not in done]
    try:
        description = _describe(task, vocabulary)
        missing = _that_can_be_made(task, missing, done)
    except ValueError as error:
        # Without a named corpus, the user means the cache. A named corpus must exist.
        if found is None or set(missing) - {"validation"}:
            raise
        logger.warning("%s: no corpus is named, so the cache is used unchecked (%s)", task.name, error)
        description, missing = found | {"vocabulary": _identity(vocabulary)}, []
    if found is not None:
        _check_same(folder, found, description)
        if not missing:
            logger.info("%s: cached already in %s", task.name, folder)
            return found
    _check_merges(vocabulary.tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    for split in missing:
        try:
            # A few documents may all be for training.
            _cache_split(task, split, folder, beam_options, setup, may_be_empty=split == "validation" and bool(done))
        except BaseException:
            if not done:
                # Only empty folders go: other splits, or data of a user, stay.
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise
        done = [*done, split]
        description = description | {"splits": done}
        files.write_json(path, description, sort_keys=True)
    (folder / "COMPLETED").touch()
    return description


def _cache_split(
    task, split: str, folder: Path, beam_options, setup: "_WorkerSetup", *, may_be_empty: bool = False
) -> None:
    logger.info("%s %s: tokenizing", task.name, split)
    started = time.monotonic()
    temporary = folder / f".{split}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        target = str(temporary)
        with open_pipeline(beam_options) as pipeline:
            preprocess = beam_utils.PreprocessTask(task, split, setup_fn=setup)
            num_files = max(1, min(len(preprocess.shards), _MAX_CACHE_FILES))
            examples = (
                pipeline
                | "preprocess" >> preprocess
                | "progress" >> beam.ParDo(_Progress(f"{task.name} {split}"))
                | "spread" >> beam.Reshuffle()
            )
            _ = examples | "write" >> beam_utils.WriteExampleTfRecord(
                seqio.get_cached_tfrecord_prefix(target, split), num_shards=num_files
            )
            for name, transform, destination in (
                ("info", beam_utils.GetInfo(num_files), seqio.get_cached_info_path(target, split)),
                ("stats", beam_utils.GetStats(task.output_features), seqio.get_cached_stats_path(target, split)),
                ("characters", _CountCharacters(task.output_features[TOKENS].vocabulary), temporary / "characters"),
            ):
                _ = examples | name >> transform | f"write_{name}" >> beam_utils.WriteJson(str(destination))
        stats = _stats(temporary, split)
        if not stats["examples"] and not may_be_empty:
            raise ValueError(
                f"task {task.name} yields no document in split {split!r}: check its corpus; if only this split is "
                "empty, hold out another share of the documents or leave the split out (--splits)"
            )
        # Where SeqIO's mixing rate by characters looks; SeqIO itself counts them with SentencePiece vocabularies only.
        stats["text_chars"] = files.read_json(temporary / "characters")
        (temporary / "characters").unlink()
        files.write_json(seqio.get_cached_stats_path(target, split), stats)
        for file in temporary.iterdir():
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    tokens, seconds = stats.get(f"{TOKENS}_tokens", 0), time.monotonic() - started
    logger.info(
        "%s %s: %s documents, %s tokens in %.0f s", task.name, split, f"{stats['examples']:,}", f"{tokens:,}", seconds
    )


def _check_same(folder: Path, found: dict, expected: dict) -> None:
    """Raises ValueError if the cache in `folder` was made from another vocabulary or corpus."""
    differences = []
    if found["vocabulary"] != expected["vocabulary"]:
        old, new = (f"{v['size']} ids, {v['fingerprint'][:12]}" for v in (found["vocabulary"], expected["vocabulary"]))
        differences.append(f"another vocabulary ({old}; now: {new})")
    for key in sorted({*found["source"], *expected["source"]}):
        old, new = found["source"].get(key), expected["source"].get(key)
        if old != new:
            differences.append(f"another corpus ({key} {old}; now: {new})")
    if differences:
        raise ValueError(
            f"{folder} was made with {' and '.join(differences)}: delete that folder to make it anew, or give another "
            "cache_dir"
        )


def _stats(folder: Path, split: str) -> dict:
    return files.read_json(seqio.get_cached_stats_path(str(folder), split))


def _default_shards(folder: Path, split: str) -> int:
    return max(1, math.ceil(_stats(folder, split).get(f"{TOKENS}_tokens", 0) / TOKENS_PER_SHARD))


def _vocabulary(task: str) -> QwenVocabulary:
    """The vocabulary of the tokens of a registered task."""
    vocabulary = seqio.TaskRegistry.get(task).output_features[TOKENS].vocabulary
    assert isinstance(vocabulary, QwenVocabulary)  # `_check_task` refuses others before a worker starts
    return vocabulary


@dataclasses.dataclass(frozen=True)
class _WorkerSetup:
    """Called in each Beam worker before it touches a task: registers tasks and configures them as in the launcher."""

    task_modules: tuple[str, ...]
    gin_config: str
    vocabulary_path: str | None
    task: str
    fingerprint: str
    launcher: str = _THIS_PROCESS

    def __call__(self) -> None:
        if self.launcher == _THIS_PROCESS:
            return
        # See `qwen_jax.beam`; workers have a logging level of their own.
        logging.getLogger("absl").setLevel(logging.WARNING)
        for module in self.task_modules:
            importlib.import_module(module)
        with gin.unlock_config():
            # Configurables of models and training are unknown here. One of them may have computed the path, so the
            # path is bound as a value.
            gin.parse_config(self.gin_config, skip_unknown=True)
            gin.bind_parameter("vocabulary_path.path", self.vocabulary_path)
        vocabulary = _vocabulary(self.task)
        if vocabulary.fingerprint != self.fingerprint:
            raise RuntimeError(
                f"this worker has the vocabulary {vocabulary.tokenizer.path} (fingerprint "
                f"{vocabulary.fingerprint[:12]}), the job was started with {self.fingerprint[:12]}: put the same file "
                "on every worker"
            )


class _CountCharacters(beam.PTransform):
    """The number of characters in all documents, control tokens left out."""

    def __init__(self, vocabulary: QwenVocabulary):
        super().__init__()
        self._vocabulary = vocabulary

    def expand(self, input_or_inputs):
        return input_or_inputs | "count" >> beam.Map(self._count) | "sum" >> beam.CombineGlobally(sum)

    def _count(self, example) -> int:
        tokenizer = self._vocabulary.tokenizer
        # Taken out of the tensor at once: TensorFlow makes a tensor of each element that is asked for.
        ids = np.asarray(example[TOKENS])
        return len(tokenizer.decode(ids[ids < tokenizer.num_ranks].tolist()))


class _Progress(beam.DoFn):
    """Passes documents on and logs how many, now and then."""

    def __init__(self, label: str):
        self._label = label

    def setup(self):
        self._count, self._logged = 0, time.monotonic()

    def process(self, element):
        self._count += 1
        if time.monotonic() - self._logged > _PROGRESS_SECONDS:
            self._logged = time.monotonic()
            logger.info("%s: %s documents so far in this worker", self._label, f"{self._count:,}")
        yield element


@dataclasses.dataclass(frozen=True)
class _Packer:
    """Packs one split of a cached task; sent to Beam workers."""

    task: str
    split: str
    cache_folder: Path
    sequence_length: int
    method: str  # a key of packing.PACKINGS
    seed: int
    num_shards: int
    source: dict
    setup: _WorkerSetup

    @property
    def folder(self) -> Path:
        return packing.packed_folder(self.cache_folder, "", self.sequence_length, self.split, self.method)

    def columns(self, vocabulary: QwenVocabulary) -> tuple[packing.Column, ...]:
        return packing.columns_for(vocabulary.vocab_size, self.sequence_length, self.method)

    def prepare(self, beam_options: Sequence[str], *, check_shards: bool) -> Prepared:
        label = f"{self.task} {self.split}, length {self.sequence_length}"
        label += "" if self.method == "concat" else f", {self.method}"
        if (self.folder / packing.MANIFEST).exists():
            manifest = packing.Manifest.load(self.folder)
            self._check(manifest, check_shards)
            logger.info("%s: packed already in %s", label, self.folder)
            return Prepared(self.folder, manifest)
        self.folder.mkdir(parents=True, exist_ok=True)
        files.remove_unfinished(self.folder)
        done = {index for index in range(self.num_shards) if self._finished(index)}
        logger.info("%s: packing, %d shards (%d done before)", label, self.num_shards, len(done))
        started = time.monotonic()
        cached = sorted(str(path) for path in self.cache_folder.glob(f"{self.split}.tfrecord-*-of-*"))
        with open_pipeline(beam_options) as pipeline:
            _ = (
                pipeline
                | "files" >> beam.Create(cached)
                | "documents" >> beam.FlatMap(self.keyed_documents)
                | "unfinished" >> beam.Filter(lambda item: item[0] not in done)
                | "by_shard" >> beam.GroupByKey()
                | "write" >> beam.Map(self.write)
            )
        manifest = self._manifest()
        manifest.save(self.folder)
        for index in range(self.num_shards):
            self._sidecar(index).unlink(missing_ok=True)
        seconds = time.monotonic() - started
        counts = f"{manifest.records:,} examples, {manifest.tokens:,} tokens, {manifest.documents:,} documents"
        counts += f", {manifest.tokens / (manifest.records * self.sequence_length):.2%} full"
        logger.info("%s: %s in %.0f s, in %s", label, counts, seconds, self.folder)
        return Prepared(self.folder, manifest)

    def keyed_documents(self, file: str) -> Iterator[tuple[int, tuple[bytes, bytes, bytes]]]:
        """(shard, (key, tokens, loss weights)) of the documents in one cache file, after the task's last steps."""
        self.setup()
        task = seqio.TaskRegistry.get(self.task)
        vocabulary = task.output_features[TOKENS].vocabulary
        eos_id, vocab_size = vocabulary.eos_id, vocabulary.vocab_size
        dataset = task.preprocess_postcache(_read_cache(self.cache_folder, self.split, file), sequence_length=None)
        for example in _undamaged(dataset, file):
            tokens = example[TOKENS].astype("<i4")
            if not len(tokens) or (len(tokens) == 1 and tokens[0] == eos_id):
                continue  # a document without text
            if tokens.min() < 0 or tokens.max() >= vocab_size:
                raise ValueError(
                    f"task {self.task} yields ids from {tokens.min()} to {tokens.max()}, outside [0, {vocab_size})"
                )
            weights = _whole_weights(self.task, example.get(LOSS_WEIGHTS), len(tokens))
            key = packing.document_key(packing.Document(tokens, weights), self.seed)
            yield packing.shard_of(key, self.num_shards), (key, tokens.tobytes(), weights.tobytes())

    def write(self, item: tuple[int, Iterable[tuple[bytes, bytes, bytes]]]) -> int:
        """Writes one shard, and beside it its entry of the manifest."""
        self.setup()
        index, raw = item
        vocabulary = _vocabulary(self.task)
        documents = (
            (key, packing.Document(np.frombuffer(tokens, "<i4"), np.frombuffer(weights, np.uint8)))
            for key, tokens, weights in raw
        )
        shard = packing.write_shard(
            self.folder / f"part-{index:05d}-of-{self.num_shards:05d}.array_record",
            documents,
            sequence_length=self.sequence_length,
            eos_id=vocabulary.eos_id,
            columns=self.columns(vocabulary),
            token_bytes=_token_bytes(vocabulary),
        )
        files.write_json(self._sidecar(index), self._settings() | {"shard": dataclasses.asdict(shard)}, sort_keys=True)
        logger.info("%s %s: shard %d of %d done", self.task, self.split, index + 1, self.num_shards)
        return index

    def _sidecar(self, index: int) -> Path:
        return self.folder / f"part-{index:05d}-of-{self.num_shards:05d}.json"

    def _settings(self) -> dict:
        return {"seed": self.seed, "fingerprint": self.setup.fingerprint, "source": self.source}

    def _finished(self, index: int) -> bool:
        path = self._sidecar(index)
        if not path.exists():
            return False
        content = files.read_json(path)
        return {key: content.get(key) for key in self._settings()} == self._settings()

    def _manifest(self) -> packing.Manifest:
        # A shard that got no document has neither file nor entry.
        sidecars = [self._sidecar(index) for index in range(self.num_shards) if self._sidecar(index).exists()]
        shards = [files.read_json(path)["shard"] for path in sidecars]
        if not shards:
            shutil.rmtree(self.folder)
            raise ValueError(f"task {self.task} yields only documents without text in split {self.split!r}")
        vocabulary = _vocabulary(self.task)
        return packing.Manifest(
            task=self.task,
            split=self.split,
            sequence_length=self.sequence_length,
            vocab_size=vocabulary.vocab_size,
            vocabulary_fingerprint=vocabulary.fingerprint,
            seed=self.seed,
            columns=self.columns(vocabulary),
            shards=tuple(packing.Shard(**shard) for shard in shards),
            source=self.source,
        )

    def _check(self, manifest: packing.Manifest, check_shards: bool) -> None:
        differences = []
        if manifest.vocabulary_fingerprint != self.setup.fingerprint:
            differences.append(
                f"vocabulary {manifest.vocabulary_fingerprint[:12]} (now: {self.setup.fingerprint[:12]})"
            )
        if manifest.seed != self.seed:
            differences.append(f"seed {manifest.seed} (now: {self.seed})")
        if dict(manifest.source) != self.source:
            differences.append("another corpus")
        names = [shard.file for shard in manifest.shards]
        if check_shards and not all(name.endswith(f"-of-{self.num_shards:05d}.array_record") for name in names):
            differences.append(f"other shards than {self.num_shards} ({names[0]}, …)")
        if differences:
            raise ValueError(
                f"{self.folder} was packed with {' and '.join(differences)}: delete that folder to pack anew, or give "
                "another cache_dir"
            )


def _undamaged(dataset: tf.data.Dataset, file: str) -> Iterator[dict[str, np.ndarray]]:
    """The examples of a dataset that reads `file`."""
    try:
        yield from dataset.as_numpy_iterator()
    except tf.errors.DataLossError as error:
        folder = Path(file).parent
        raise ValueError(f"{file} is damaged: delete {folder} and cache the task again ({error.message})") from error


def _whole_weights(task: str, weights: np.ndarray | None, length: int) -> np.ndarray:
    if weights is None:
        return np.ones(length, np.uint8)
    if len(weights) != length or not np.isin(weights, (0, 1)).all():
        raise ValueError(
            f"task {task}: {LOSS_WEIGHTS!r} must have one 0 or 1 for each of the {length} tokens of {TOKENS!r}, found "
            f"{len(weights)} values {np.unique(weights)[:5]}"
        )
    return weights.astype(np.uint8)


def _token_bytes(vocabulary: QwenVocabulary) -> np.ndarray:
    """UTF-8 bytes of text that each id stands for, int64 [vocab_size]; 0 for control tokens, which are not text."""
    result = np.zeros(vocabulary.vocab_size, np.int64)
    for token, rank in vocabulary.tokenizer.mergeable_ranks.items():
        result[rank] = len(token)
    return result


def _read_cache(folder: Path, split: str, file: str) -> tf.data.Dataset:
    """Examples of one file of SeqIO's cache, typed as its info file says."""
    features = files.read_json(Path(seqio.get_cached_info_path(str(folder), split)))["features"]
    stored = {}
    for name, feature in features.items():
        dtype = tf.as_dtype(feature["dtype"])
        # The protocol buffer knows no other integers.
        dtype = tf.int64 if dtype.is_integer or dtype.is_bool else dtype
        if feature["shape"]:
            stored[name] = tf.io.FixedLenSequenceFeature(feature["shape"][1:], dtype, allow_missing=True)
        else:
            stored[name] = tf.io.FixedLenFeature([], dtype)

    def parse(record: tf.Tensor) -> dict[str, tf.Tensor]:
        example = tf.io.parse_single_example(record, stored)
        return {
            name: value if value.dtype == tf.string else tf.cast(value, features[name]["dtype"])
            for name, value in example.items()
        }

    return tf.data.TFRecordDataset(file).map(parse)
