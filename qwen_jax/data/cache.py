"""From a SeqIO task to packed examples on disk, on Apache Beam.

Two stages. First each task is cached in SeqIO's own layout, so `get_dataset(use_cached=True)` reads it after
`seqio.add_global_cache_dirs([cache_dir])`. Then its documents are packed (`qwen_jax.data.packing`): a hash of the
document names the shard and its place in it, so the bytes written depend neither on the number of workers nor on the
order in which Beam delivers.

    cache_dir/<task>/{train,validation}.tfrecord-*  info.*.json  stats.*.json  COMPLETED    SeqIO's cache
    cache_dir/<task>/description.json                                                       vocabulary and corpus
    cache_dir/<task>/packed-<length>/<split>/*.array_record  manifest.json                  packed examples
    cache_dir/<task>/packed-<length>-<packing>/<split>/…                        the same, packed not by `concat`
    cache_dir/<task>/packed-<length>-<packing>-images<n>/<split>/…              the same, at most n pictures an example
"""

import contextlib
import importlib
import logging
import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import apache_beam as beam
import gin
import numpy as np

from qwen_jax.data.quick_seqio import seqio

# isort: split
from seqio import beam_utils

from qwen_jax import files
from qwen_jax.beam import check_options, open_pipeline
from qwen_jax.data import mixing, packing
from qwen_jax.data.default_tokenizer import vocabulary_path
from qwen_jax.data.merges import derive_merges
from qwen_jax.data.pack_cache import TOKENS, Packer, Prepared, WorkerSetup
from qwen_jax.data.packing import check_packing
from qwen_jax.data.tokenizer import RELEASED_FINGERPRINT, Tokenizer
from qwen_jax.data.vocabulary import QwenVocabulary

logger = logging.getLogger(__name__)

DESCRIPTION = "description.json"
# A shard is sorted in the memory of one worker: 32M tokens are about 130 MB.
TOKENS_PER_SHARD = 1 << 25
# So are its pictures. 32M tokens alone are less.
BYTES_PER_SHARD = 1 << 30
_MAX_CACHE_FILES = 64
_PROGRESS_SECONDS = 10


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
    images_per_row: int = 0,
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
        num_shards: shards of the packed data; None takes one for every 32M tokens, or GiB of pictures.
        seed: seed for the order of documents.
        packing: a key of `PACKINGS` (`qwen_jax.data.packing`): `concat` merges documents and cuts them, `best_fit`
            keeps them apart, `whole` never cuts one into two examples, `padded` takes one an example.
        images_per_row: the most pictures of an example. 0 leaves out, and counts, documents with pictures.
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
        setup = WorkerSetup(tuple(task_modules), gin.config_str(), vocabulary_path(), task.name, vocabulary.fingerprint)
        wanted = [split for split in splits if split in task.splits]
        description = _cache_task(task, wanted, folder, beam_options, setup)
        for split in _with_documents(task.name, wanted, description["splits"], folder):
            packer = Packer(
                task=task.name,
                split=split,
                cache_folder=folder,
                sequence_length=sequence_length,
                method=packing,
                seed=seed,
                num_shards=num_shards or _default_shards(folder, split),
                source=description["source"],
                setup=setup,
                images_per_row=images_per_row,
            )
            prepared.append(packer.prepare(beam_options, check_shards=num_shards is not None))
            _check_left_out(task, prepared[-1].manifest)
    return prepared


def _check_left_out(task: seqio.Task, manifest: packing.Manifest) -> None:
    """Refuses a split of which more is left out than the corpus allows; what is packed stays."""
    try:
        most = getattr(task.source, "max_left_out_share", 1.0)
    except (ValueError, FileNotFoundError):  # no corpus is named, so the cache is meant
        return
    left_out = sum(entry["documents"] for entry in manifest.left_out.values())
    share = left_out / max(left_out + manifest.documents, 1)
    if share > most:
        reasons = "; ".join(f"{entry['documents']:,}: {reason}" for reason, entry in manifest.left_out.items())
        raise ValueError(
            f"{left_out:,} of {left_out + manifest.documents:,} documents of {task.name} {manifest.split} are left "
            f"out, {share:.1%} ({reasons}); {task.name}.max_left_out_share is {most:.1%}: correct the files, or raise "
            f"it"
        )


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


def _cache_task(task, splits, folder: Path, beam_options, setup: WorkerSetup) -> dict:
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
    task, split: str, folder: Path, beam_options, setup: WorkerSetup, *, may_be_empty: bool = False
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
    tokens = _stats(folder, split).get(f"{TOKENS}_tokens", 0)
    size = sum(path.stat().st_size for path in folder.glob(f"{split}.tfrecord-*-of-*"))
    return max(1, math.ceil(tokens / TOKENS_PER_SHARD), math.ceil(size / BYTES_PER_SHARD))


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
