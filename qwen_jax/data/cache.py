"""From a SeqIO task to packed examples on disk.

Two stages. First each task is cached in SeqIO's own layout, so `get_dataset(use_cached=True)` reads it after
`seqio.add_global_cache_dirs([cache_dir])`. Then its documents are packed (`qwen_jax.data.packing`): a hash of the
document names the shard and its place in it. Both stages consist of pieces that each write a file (`qwen_jax.workers`),
in this process, in several, or on Beam; the bytes written do not depend on which.

    cache_dir/<task>/{train,validation}.tfrecord-*  info.*.json  stats.*.json  COMPLETED    SeqIO's cache
    cache_dir/<task>/description.json                                                       vocabulary and corpus
    cache_dir/<task>/packed-<length>/<split>/*.array_record  manifest.json                  packed examples
    cache_dir/<task>/packed-<length>-<packing>/<split>/…                        the same, packed not by `concat`
    cache_dir/<task>/packed-<length>-<packing>-images<n>/<split>/…              the same, at most n pictures an example
"""

import contextlib
import fnmatch
import functools
import hashlib
import importlib
import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from qwen_jax import files
from qwen_jax.data import mixing, packing, token_cache
from qwen_jax.data.merges import derive_merges
from qwen_jax.data.pack_cache import IMAGES, TOKENS, Packer, Prepared, Turn, pack
from qwen_jax.data.packing import check_packing
from qwen_jax.data.quick_seqio import seqio
from qwen_jax.data.row_steps import CorpusExamples
from qwen_jax.data.task_examples import WorkerSetup, examples_of, last_steps_of, modules_of
from qwen_jax.data.token_cache import TokenizeShard
from qwen_jax.data.tokenizer import RELEASED_FINGERPRINT, Tokenizer
from qwen_jax.data.vocabulary import QwenVocabulary
from qwen_jax.workers import LostWorkerError, Workers, open_workers

logger = logging.getLogger(__name__)

DESCRIPTION = "description.json"
# What SeqIO takes for the sign of a cache.
COMPLETED = "COMPLETED"
# A shard is sorted in the memory of one worker: 32M tokens are about 130 MB.
TOKENS_PER_SHARD = 1 << 25
# So are its pictures. 32M tokens alone are less.
BYTES_PER_SHARD = 1 << 30


def prepare(
    mixture_or_task: str,
    *,
    cache_dir: str | os.PathLike,
    sequence_length: int,
    splits: Sequence[str] = ("train", "validation"),
    beam_options: Sequence[str] = (),
    num_workers: int = 1,
    num_shards: int | None = None,
    seed: int = 0,
    packing: str = "concat",
    images_per_row: int = 0,
    task_modules: Sequence[str] = ("tasks",),
) -> list[Prepared]:
    """Caches and packs a task, or each task of a mixture; uses complete splits as they are.

    A call after an interrupted one continues with the next shard. Where another process makes the same task in the same
    folder, this one waits for it.

    Args:
        mixture_or_task: a registered name (`tasks` is imported first).
        cache_dir: a folder that all workers see, or one of a bucket (`gs://…`, `s3://…`).
        sequence_length: tokens of one example.
        splits: splits to cache; a warning names the ones that a task lacks, and `validation` if it has no document.
        beam_options: Beam pipeline options, such as `--runner=FlinkRunner`; without any, Beam is not used.
        num_workers: processes of this machine that work where there are no Beam options.
        num_shards: shards of the packed data; None takes one for every 32M tokens, or GiB of pictures.
        seed: seed for the order of documents.
        packing: a key of `PACKINGS` (`qwen_jax.data.packing`): `concat` merges documents and cuts them, `best_fit`
            keeps them apart, `whole` never cuts one into two examples, `padded` takes one an example.
        images_per_row: the most pictures of an example. 0 leaves out, and counts, documents with pictures.
        task_modules: modules that register tasks, imported here and by workers.

    Returns:
        One `Prepared` for each task and split.

    Raises:
        ValueError: unknown name, packing or Beam option; no documents; a malformed row (the message names file and
            row); an unusable mixing rate; or `cache_dir` holds this task made from another vocabulary, corpus, seed
            or number of shards (the message says which, and what to do).
    """
    check_packing(packing)
    for module in task_modules:
        importlib.import_module(module)
    cache_dir, prepared = files.as_path(cache_dir, "cache_dir"), []
    found = _tasks(mixture_or_task)
    with open_workers(num_workers, beam_options, preload=modules_of(found, task_modules)) as workers:
        for task in found:
            folder = cache_dir.joinpath(*task.name.split(":"))
            with Turn(files.locked_in_turn(cache_dir, f".{folder.name}.lock")) as turn:
                packers = _packers(
                    task,
                    splits,
                    folder,
                    workers,
                    turn,
                    setup=WorkerSetup.of(task, _check_task(task, splits), task_modules),
                    sequence_length=sequence_length,
                    method=packing,
                    seed=seed,
                    num_shards=num_shards,
                    images_per_row=images_per_row,
                )
                for one in pack(packers, workers, turn, check_shards=num_shards is not None):
                    prepared.append(one)
                    _check_left_out(task, one.manifest)
    return prepared


def _packers(
    task: seqio.Task,
    splits: Sequence[str],
    folder: Path,
    workers: Workers,
    turn: Turn,
    *,
    setup: WorkerSetup,
    num_shards: int | None,
    **settings,
) -> list[Packer]:
    """Caches a task, and says how each of its splits is packed; `settings` are further attributes of `Packer`."""
    wanted = [split for split in splits if split in task.splits]
    description = _cache_task(task, wanted, folder, workers, setup, turn)
    vocabulary = task.output_features[TOKENS].vocabulary
    assert isinstance(vocabulary, QwenVocabulary)  # see `_check_task`
    sizes, about = _read_about(folder, [split for split in wanted if split in description["splits"]])
    return [
        Packer(
            task=task.name,
            split=split,
            cache_folder=folder,
            cached=tuple(name for name in sizes if _is_cached(name, split)),
            features=about[split][1]["features"],
            last_steps=last_steps_of(task, setup),
            tokenizer=setup.tokenizer,
            num_ids=_num_ids(task, vocabulary.tokenizer),
            num_shards=num_shards or _default_shards(sizes, split, about[split][0]),
            source=description["source"],
            **settings,
        )
        for split in _with_documents(task.name, wanted, {split: stats for split, (stats, _) in about.items()})
    ]


def _num_ids(task: seqio.Task, tokenizer: Tokenizer) -> int:
    """Number of ids that a task may yield; a task with pictures has those of Qwen-VL."""
    return tokenizer.vision_vocab_size if IMAGES in task.output_features else tokenizer.vocab_size


def _check_left_out(task: seqio.Task, manifest: packing.Manifest) -> None:
    """Refuses a split of which more is left out than the corpus allows; what is packed stays."""
    left_out = sum(entry["documents"] for entry in manifest.left_out.values())
    if not left_out:
        return
    try:
        most = getattr(task.source, "max_left_out_share", 1.0)
    except (ValueError, FileNotFoundError):  # no corpus is named, so the cache is meant
        return
    share = left_out / (left_out + manifest.documents)
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


def _with_documents(task: str, wanted: Sequence[str], stats: Mapping[str, dict]) -> list[str]:
    """The `wanted` splits that are cached, as those in `stats` are, and not empty."""
    found = [split for split, one in stats.items() if one["examples"]]
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


def _missing(task: seqio.Task, splits: Sequence[str], folder: Path) -> tuple[dict, list[str]]:
    """(description of SeqIO's cache as far as it is made, those of `splits` that it lacks)."""
    vocabulary = task.output_features[TOKENS].vocabulary
    assert isinstance(vocabulary, QwenVocabulary)  # see `_check_task`
    path = folder / DESCRIPTION
    found = files.read_json(path) if path.is_file() else None
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
    if found is None:
        return description | {"splits": []}, missing
    _check_same(folder, found, description)
    if not missing:
        logger.info("%s: cached already in %s", task.name, folder)
        if not (folder / COMPLETED).is_file():  # a run may have been killed before
            files.write_text(folder / COMPLETED, "")
    return description | {"splits": done}, missing


def _cache_task(
    task: seqio.Task, splits: Sequence[str], folder: Path, workers: Workers, setup: WorkerSetup, turn: Turn
) -> dict:
    """Makes SeqIO's cache of the `splits` that it lacks; returns its description."""
    description, missing = _missing(task, splits, folder)
    if not missing:
        return description
    _check_merges(setup.tokenizer.load())
    shards = _shards(task, missing, folder, setup, description)
    # Another process may have made them while this one waited; without a description, none has made a split.
    if turn.take() and (folder / DESCRIPTION).is_file():
        description, missing = _missing(task, splits, folder)
        shards = {split: shards[split] for split in missing}
    return _tokenize(task, shards, folder, workers, description) if missing else description


def _tokenize(
    task: seqio.Task, shards: dict[str, list[TokenizeShard]], folder: Path, workers: Workers, description: dict
) -> dict:
    """Makes SeqIO's cache of the splits in `shards`; returns its description with them."""
    done, missing = description["splits"], list(shards)
    folder.mkdir(parents=True, exist_ok=True)
    left = [shard for split in missing for shard in token_cache.remove_unfinished(folder, split, shards[split])]
    started = time.monotonic()
    total = sum(map(len, shards.values()))
    names = " and ".join(missing)
    logger.info("%s: tokenizing %s, %d shards (%d done before)", task.name, names, total, total - len(left))
    try:
        token_cache.tokenize(left, workers)
        for split in missing:
            # A few documents may all be for training.
            _finish_split(task, split, folder, shards[split], may_be_empty=split == "validation" and bool(done))
            done = [*done, split]
            description = description | {"splits": done}
            files.write_json(folder / DESCRIPTION, description, sort_keys=True)
            counted = [shard.counted for shard in shards[split]]
            last = [functools.partial(files.write_text, folder / COMPLETED, "")] if split == missing[-1] else []
            files.in_parallel(lambda call: call(), [functools.partial(files.remove_files, counted), *last])
            logger.info("%s %s: tokenized, %.0f s from the start", task.name, split, time.monotonic() - started)
    except LostWorkerError:
        raise  # nothing is wrong with the corpus: the next call goes on from the shards that are there
    except ValueError:
        # Its cause is in the corpus: once that is corrected, the shards are those of another corpus.
        for split in missing:
            if split not in done:
                token_cache.remove_unfinished(folder, split)
        if not done and not files.is_remote(folder):  # a bucket has no empty folders
            # Only empty folders go: other splits, or data of a user, stay.
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    return description


def _shards(
    task: seqio.Task, splits: Sequence[str], folder: Path, setup: WorkerSetup, description: dict
) -> dict[str, list[TokenizeShard]]:
    """The pieces of each split."""
    identity = {key: value for key, value in description.items() if key != "splits"}
    origin = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
    left_out = {name: _ids_not_counted(feature.vocabulary) for name, feature in task.output_features.items()}
    shards = {}
    for split in splits:
        examples = examples_of(task, split, setup)
        shards[split] = [
            TokenizeShard(
                task=task.name,
                split=split,
                index=index,
                count=len(examples),
                folder=folder,
                examples=one,
                left_out=left_out,
                tokens=TOKENS,
                tokenizer=setup.tokenizer,
                origin=origin,
                reads=tuple(one.corpus.files[index : index + 1]) if isinstance(one, CorpusExamples) else (),
            )
            for index, one in enumerate(examples)
        ]
    return shards


def _ids_not_counted(vocabulary: seqio.Vocabulary) -> tuple[int, ...]:
    """As in `seqio.beam_utils.GetStats`."""
    return tuple({one for one in (vocabulary.eos_id, vocabulary.pad_id) if one is not None})


def _finish_split(task, split: str, folder: Path, shards: list[TokenizeShard], *, may_be_empty: bool) -> None:
    """Writes SeqIO's statistics and description of a split, of which all shards are written."""
    stats, features = token_cache.totals_of(shards)
    if not stats["examples"] and not may_be_empty:
        raise ValueError(
            f"task {task.name} yields no document in split {split!r}: check its corpus; if only this split is "
            "empty, hold out another share of the documents or leave the split out (--splits)"
        )
    info = {"num_shards": len(shards), "features": features, "seqio_version": seqio.__version__}
    contents = [(seqio.get_cached_stats_path(str(folder), split), stats)]
    contents += [(seqio.get_cached_info_path(str(folder), split), info)]
    files.in_parallel(lambda one: files.write_json(*one, sort_keys=True), contents)


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


def _read_about(folder: Path, splits: Sequence[str]) -> tuple[dict[str, int], dict[str, list[dict]]]:
    """(names of the files of SeqIO's cache with their bytes; split to its statistics and its description)."""
    paths = [
        path(str(folder), split)
        for split in splits
        for path in (seqio.get_cached_stats_path, seqio.get_cached_info_path)
    ]
    reads = [functools.partial(files.read_json, path) for path in paths]
    sizes, *found = files.in_parallel(lambda read: read(), [functools.partial(files.sizes_in, folder), *reads])
    return sizes, {split: found[2 * number : 2 * number + 2] for number, split in enumerate(splits)}


def _is_cached(name: str, split: str) -> bool:
    """Whether a file of the cache has examples of a split."""
    return fnmatch.fnmatchcase(name, f"{split}.tfrecord-*-of-*")


def _default_shards(sizes: Mapping[str, int], split: str, stats: dict) -> int:
    tokens = stats.get(f"{TOKENS}_tokens", 0)
    size = sum(size for name, size in sizes.items() if _is_cached(name, split))
    return max(1, math.ceil(tokens / TOKENS_PER_SHARD), math.ceil(size / BYTES_PER_SHARD))
