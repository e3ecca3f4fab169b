"""Training examples by global index (report section 2.4; order and mixing on grain).

The example at index i depends on the data, the seed and i alone: not on hosts, processes, batch size or earlier reads.
The state of the input pipeline is therefore one integer, and a run may continue on another number of hosts and see the
same examples.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Generator, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.batch_spec import image_column, token_columns
from qwen_jax.data import packing
from qwen_jax.data.packing import has_segments
from qwen_jax.data.remote_shards import RemoteShard, ShardCache, shard_cache
from qwen_jax.files import as_path, in_parallel, is_remote

logger = logging.getLogger(__name__)

# Cores that image workers leave to the reading thread and to what drives the devices, and the most workers.
_CORES_OF_TRAINING, _MOST_WORKERS = 2, 16


@dataclasses.dataclass(frozen=True)
class _Source:
    """One packed task of a mixture and its share of the examples."""

    manifest: packing.Manifest
    records: "_Records"
    weight: int


class ExampleLoader:
    """Random access to the packed examples of a task or mixture.

    With `repeat`, examples never end: the loader reads each source epoch after epoch, in a new order each time, and
    sources take turns. With rates in the ratio of whole numbers w, every window of sum(w) examples holds exactly
    w of each source. Without `repeat` (evaluation), indices [0, len) hold every example of every source once, sources
    interleaved evenly, rates disregarded; tasks of a mixture without examples in this split are left out. A task of
    rate 0 contributes nothing.

    Args:
        mixture_or_task: name of a cached task, or of a SeqIO mixture of cached tasks (only then `tasks` is imported).
        cache_dir: folder that `tools/cache_task.py` wrote, on a disk or in a bucket. In a bucket, records are read one
            by one, ahead of their use, with local copies of shards where `shard_cache` is configured
            (`qwen_jax.data.remote_shards`).
        sequence_length: tokens of an example.
        split: `train` or `validation`.
        seed: seed for the order, in [0, 2**32).
        shuffle: False reads in the order of packing (documents are in hashed order already).
        repeat: see above.
        packing: packing of the cached task, a key of `PACKINGS` (`qwen_jax.data.packing`).
        images_per_row: pictures of an example at most, as the task was packed; 0: the examples are text.
        image_size: height and width of the pictures in pixels, where there are any.
        image_workers: processes that decode pictures; None: one for each core but two, at most 16. 0: the reading
            thread decodes them.

    Attributes:
        bytes_per_token: UTF-8 bytes of text per token (end-of-text counted as a token, pictures not); in a repeated
            mixture weighted by the rates. Bits per byte = loss in nats per token / (ln 2 * bytes_per_token).
        vocab_size: number of ids of the vocabulary of the data.
        image_tokens: places between the tags of a picture; 0 without pictures.
        columns: names, shapes and dtypes of the columns that `read` returns.
        vocabulary_fingerprint: fingerprint of that vocabulary (`Tokenizer.fingerprint`).
        fingerprint: fingerprint of data, order and rates; a run must not resume with another one.

    Raises:
        FileNotFoundError: not cached; the message names the command that caches it.
        ValueError: unknown name, empty split, or sources made with different vocabularies.
    """

    def __init__(
        self,
        mixture_or_task: str,
        *,
        cache_dir: str | os.PathLike,
        sequence_length: int,
        split: str = "train",
        seed: int = 0,
        shuffle: bool = True,
        repeat: bool = True,
        packing: str = "concat",
        images_per_row: int = 0,
        image_size: int | None = None,
        image_workers: int | None = None,
    ):
        if images_per_row and not image_size:
            raise ValueError(f"examples with {images_per_row} picture(s) need an image_size, found {image_size}")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed is {seed}: it must be in [0, 2**32)")
        self.name, self.split, self.sequence_length = mixture_or_task, split, sequence_length
        self.seed, self.shuffle, self.repeat, self.packing = seed, shuffle, repeat, packing
        self.cache_dir, self.images_per_row = as_path(cache_dir, "cache_dir"), images_per_row
        self._decode = _decoder(image_size, image_workers) if images_per_row and image_size else None
        where = _Where(self.cache_dir, sequence_length, split, packing, images_per_row)
        rates = _rates(mixture_or_task, where)
        if not repeat:
            rates = _with_examples(mixture_or_task, rates, where)
        folders = {task: where.folder(task) for task in rates}
        manifests = {task: _load_manifest(mixture_or_task, folder, where) for task, folder in folders.items()}
        _check_vocabularies(manifests)
        first = next(iter(manifests.values()))
        self.vocab_size = max(manifest.vocab_size for manifest in manifests.values())
        self.vocabulary_fingerprint, self.image_tokens = first.vocabulary_fingerprint, _image_tokens(manifests)
        self.columns = token_columns(sequence_length, packed=has_segments(first.packing))
        self.columns += (image_column(images_per_row, image_size),) if images_per_row and image_size else ()
        weights = _weights(rates) if repeat else [m.records for m in manifests.values()]
        cache = shard_cache() if is_remote(self.cache_dir) else None
        self._sources = [
            _Source(manifest, _Records(folders[task], manifest, cache), weight)
            for (task, manifest), weight in zip(manifests.items(), weights, strict=True)
        ]
        self._orders = [self._order(source) for source in self._sources]
        self._read_ahead = _ReadAhead(self._ask) if is_remote(self.cache_dir) else None
        self._num_examples = sum(manifest.records for manifest in manifests.values())
        self.bytes_per_token = self._bytes_per_token()
        identity = [[m.fingerprint for m in manifests.values()], weights, seed, shuffle, repeat]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def __len__(self) -> int:
        """Examples in one epoch, summed over all sources."""
        return self._num_examples

    def __repr__(self) -> str:
        return f"ExampleLoader({self.name!r}, split={self.split!r}, {len(self)} examples of {self.sequence_length})"

    @property
    def documents(self) -> int:
        """Documents in one epoch: texts, conversations, or pairs."""
        return sum(manifest.documents for manifest in self.manifests.values())

    @property
    def manifests(self) -> dict[str, packing.Manifest]:
        """Task to the manifest of its packed split."""
        return {source.manifest.task: source.manifest for source in self._sources}

    @property
    def rates(self) -> dict[str, float]:
        """Task to its share of the examples; the shares sum to 1."""
        total = sum(source.weight for source in self._sources)
        return {source.manifest.task: source.weight / total for source in self._sources}

    def read(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Examples with global indices [start, stop). Safe to call from several threads.

        Returns:
            `tokens` int32 and `loss_weights` float32, both [stop - start, sequence_length]; `loss_weights[i, t]` is
            1.0 where token t carries loss as a target, else 0.0. With each packing but `concat` also `segment_ids` and
            `positions`, int32 of the same shape: segments of a row count from 1, positions from 0 in each; both are 0
            in the filling. With pictures also `images`, uint8 [stop - start, images_per_row, image_size, image_size,
            3], zeros where a row has fewer.

        Raises:
            IndexError: the range is not ordered, or goes past the end of a loader that does not repeat.
            OSError: a shard is missing, truncated or damaged, or a picture is; the message names the file.
        """
        if not 0 <= start <= stop or (not self.repeat and stop > len(self)):
            end = "" if self.repeat else f" within the {len(self)} examples of {self.name} {self.split}"
            raise IndexError(f"expected 0 <= start <= stop{end}, got start={start}, stop={stop}")
        text = [column for column in self.columns if column.name != packing.IMAGES.name]
        batch = {column.name: np.empty((stop - start, *column.shape), column.dtype) for column in text}
        pictures: list[list[bytes]] = [[] for _ in range(stop - start)]
        self._ask(start, stop)
        if self._read_ahead is not None:
            self._read_ahead(start, stop)
        for number, rows, records in self.places(start, stop):
            columns = self._sources[number].records.read(records)
            for name, array in batch.items():
                array[rows] = columns[name]
            for row, found in zip(rows, columns.get(packing.IMAGES.name, ()), strict=False):
                pictures[row] = found
        return batch | (self._pixels(pictures) if self.images_per_row else {})

    def _ask(self, start: int, stop: int) -> None:
        """Asks a bucket for these examples, as far as there are any; does nothing for local data."""
        if is_remote(self.cache_dir):
            for number, _, records in self.places(start, stop if self.repeat else min(stop, len(self))):
                self._sources[number].records.ask(records)

    def _pixels(self, pictures: list[list[bytes]]) -> dict[str, np.ndarray]:
        """The column of these pictures of each row."""
        from qwen_jax.data.images import UnusableImageError  # here, because text needs no Pillow

        assert self._decode is not None  # see the constructor
        values = np.zeros((len(pictures), *self.columns[-1].shape), np.uint8)
        places = [(row, index) for row, found in enumerate(pictures) for index in range(len(found))]
        if places:
            rows, indices = np.array(places).T
            try:
                values[rows, indices] = self._decode([image for found in pictures for image in found])
            except UnusableImageError as error:
                raise OSError(
                    f"a picture of {self.name} {self.split} in {self.cache_dir} is damaged ({error}): leave it out of "
                    "the files of the task, delete the folder of the task there and cache it again"
                ) from error
        return {packing.IMAGES.name: values}

    def places(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray, list[int]]]:
        """Sources of the examples [start, stop): (index in `manifests`, places in the range, numbers of records)."""
        indices = np.arange(start, stop, dtype=np.int64)
        chosen, within = split_by_weight(indices, [source.weight for source in self._sources])
        for number, order in enumerate(self._orders):
            rows = np.flatnonzero(chosen == number)
            if len(rows):
                yield number, rows, [order[int(i)] for i in within[rows]]

    def _order(self, source: _Source):
        """A lookup from the index within a source's endless repetition to the record: grain's index shuffle."""
        import grain  # here, because it imports jax

        order = grain.MapDataset.range(source.manifest.records)
        if self.shuffle:
            # Its own seed for each task, or sources of one length would all have the same order.
            text = f"order:{self.seed}:{source.manifest.task}".encode()
            order = order.seed(int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")).shuffle()
        return order.repeat() if self.repeat else order

    def _bytes_per_token(self) -> float:
        if not self.repeat:
            manifests = [source.manifest for source in self._sources]
            return sum(m.text_bytes for m in manifests) / max(sum(m.text_tokens for m in manifests), 1)
        rates, manifests = self.rates, self.manifests
        return sum(rates[task] * m.text_bytes / max(m.text_tokens, 1) for task, m in manifests.items())


def _decoder(size: int, workers: int | None) -> Callable[[list[bytes]], np.ndarray]:
    """Decodes pictures, in so many processes; see `ExampleLoader`. The processes start with the first pictures."""
    from qwen_jax.data import image_workers, images  # here, because text needs no Pillow

    if workers is None:
        workers = min(max(len(os.sched_getaffinity(0)) - _CORES_OF_TRAINING, 0), _MOST_WORKERS)
    if not workers:
        return lambda some: images.decode_images(some, size)
    return image_workers.ImageWorkers(size, workers).decode


def split_by_weight(indices: np.ndarray, weights: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Deals positions of an endless sequence to sources in proportion to whole-number weights.

    Source 0 takes its share of all positions, evenly spread; the others share the rest in the same way. After
    every multiple of `sum(weights)` positions each source has had exactly its share.

    Args:
        indices: int64 [n], positions.
        weights: positive, one a source.

    Returns:
        (source, position within the source), both int64 [n].
    """
    source = np.full(len(indices), len(weights) - 1, np.int64)
    within = indices.copy()
    open_rows = np.arange(len(indices))
    left = sum(weights)
    for number, weight in enumerate(weights[:-1]):
        position = within[open_rows]
        # Positions below p that go to the sources after this one: floor(p * rest / left).
        rest = left - weight
        passed, passed_next = position * rest // left, (position + 1) * rest // left
        takes = passed == passed_next
        source[open_rows[takes]] = number
        within[open_rows] = np.where(takes, position - passed, passed)
        open_rows, left = open_rows[~takes], rest
    return source, within


class _Records:
    """Records of the shards in one folder, by their number; shards are opened when first needed."""

    def __init__(self, folder: Path, manifest: packing.Manifest, cache: ShardCache | None):
        self._folder, self._manifest, self._cache = folder, manifest, cache
        self._ends = np.cumsum([shard.records for shard in manifest.shards])
        self._readers: list = [None] * len(manifest.shards)
        self._locks = [threading.Lock() for _ in manifest.shards]

    def read(self, numbers: list[int]) -> dict[str, Any]:
        """Columns [len(numbers), sequence_length] of the records with these numbers, in this order; and pictures."""
        self.ask(numbers)
        records: list[bytes] = [b""] * len(numbers)
        for shard, rows, positions in self._by_shard(numbers):
            for row, record in zip(rows, self._read_shard(shard, positions), strict=True):
                records[row] = record
        return packing.decode_records(records, self._manifest.columns, self._manifest.sequence_length)

    def ask(self, numbers: list[int]) -> None:
        """Asks a bucket for records that will be read soon; does nothing for local shards."""
        if not is_remote(self._folder):
            return
        wanted = [(shard, positions) for shard, _, positions in self._by_shard(numbers)]
        in_parallel(self._reader, [shard for shard, _ in wanted if self._readers[shard] is None])
        for shard, positions in wanted:
            if isinstance(reader := self._reader(shard), RemoteShard):
                reader.ask(positions.tolist())

    def _by_shard(self, numbers: list[int]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(shard, places in `numbers`, positions in the shard) of each shard that has some of them."""
        indices = np.asarray(numbers, np.int64)
        shards = np.searchsorted(self._ends, indices, side="right")
        for shard in np.unique(shards):
            rows = np.flatnonzero(shards == shard)
            first = int(self._ends[shard]) - self._manifest.shards[shard].records
            yield int(shard), rows, indices[rows] - first

    @contextlib.contextmanager
    def _named(self, shard: int) -> Generator[None]:
        """Names the shard in errors."""
        path = self._folder / self._manifest.shards[shard].file
        try:
            yield
        except Exception as error:
            if is_remote(path) and isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                raise  # of the bucket, with the name of the object: perhaps nothing is wrong with it
            raise OSError(
                f"cannot read packed examples from {path}: {error}; the file is damaged: delete the folder "
                f"{self._folder} and cache the task again"
            ) from error

    def _read_shard(self, shard: int, positions: np.ndarray) -> list[bytes]:
        expected = packing.record_bytes(self._manifest.columns, self._manifest.sequence_length)
        reader = self._reader(shard)
        with self._named(shard):
            records = reader.read(positions.tolist())
            text_only = packing.IMAGES not in self._manifest.columns
            sizes = [len(record) for record in records]
            if len(sizes) != len(positions) or any(n < expected or (text_only and n > expected) for n in sizes):
                raise ValueError(f"a record has not the {expected} bytes that the manifest asks for")
        return records

    def _reader(self, shard: int):
        with self._locks[shard]:
            if self._readers[shard] is None:
                entry = self._manifest.shards[shard]
                with self._named(shard):
                    self._readers[shard] = self._open(shard, self._folder / entry.file, entry)
            return self._readers[shard]

    def _open(self, shard: int, path: Path, entry: packing.Shard):
        if is_remote(path):
            remote = RemoteShard(path, entry.records, entry.file_bytes, entry.index_sha256)
            if self._cache is not None:
                self._cache.keep(remote, functools.partial(self._use_copy, shard))
            return remote
        size = path.stat().st_size
        if size != entry.file_bytes:
            raise ValueError(f"it has {size} bytes, the manifest says {entry.file_bytes}")
        return _local_reader(path)

    def _use_copy(self, shard: int, path: Path) -> None:
        reader = _local_reader(path)
        with self._locks[shard]:
            self._readers[shard] = reader


def _local_reader(path: Path):
    # No read-ahead: the next record wanted is somewhere else.
    return packing.array_record_module.ArrayRecordReader(
        str(path), options="readahead_buffer_size:0", file_reader_buffer_size=1 << 15
    )


class _ReadAhead:
    """Guesses the next ranges from the last two, which are as far apart as the ones to come, and asks for them."""

    # Ranges: those that a prefetcher and the slowest request of a batch leave behind.
    _RANGES = 4

    def __init__(self, ask: Callable[[int, int], None]):
        self._ask, self._last, self._asked = ask, None, 0
        self._lock = threading.Lock()

    def __call__(self, start: int, stop: int) -> None:
        with self._lock:
            step = stop - start if self._last is None or start <= self._last else start - self._last
            self._last = start
            wanted = [start + number * step for number in range(1, self._RANGES + 1)]
            # A range that was asked for before is not asked for again.
            new = [one for one in wanted if one > self._asked or self._asked > wanted[-1]]
            self._asked = wanted[-1]
        for one in new:
            self._ask(one, one + stop - start)


@dataclasses.dataclass(frozen=True)
class _Where:
    """The place of packed examples on disk."""

    cache_dir: Path
    sequence_length: int
    split: str
    packing: str
    images_per_row: int = 0

    def folder(self, task: str) -> Path:
        where = (self.cache_dir, task, self.sequence_length, self.split)
        return packing.packed_folder(*where, self.packing, self.images_per_row)

    def missing(self, name: str) -> str:
        """The message of an error for missing examples, with the command that makes them."""
        ending = self.folder(name).parent.name.removeprefix(f"packed-{self.sequence_length}")
        folder = self.cache_dir.joinpath(*name.split(":"))
        there = (path.name.removeprefix("packed-") for path in folder.glob("packed-*"))
        numbers = (one.removesuffix(ending) for one in there if one.endswith(ending))
        lengths = sorted(int(number) for number in numbers if number.isdigit())
        listed = f" (there are lengths {', '.join(map(str, lengths))})" if lengths else ""
        option = "" if self.packing == "concat" else f" --packing={self.packing}"
        option += f" --images_per_row={self.images_per_row}" if self.images_per_row else ""
        return (
            f"no examples of {name} packed by {self.packing!r} to sequence length {self.sequence_length} in "
            f"{self.cache_dir}{listed}; make them with `python tools/cache_task.py {name} "
            f"--cache_dir={self.cache_dir} --sequence_length={self.sequence_length}{option}`"
        )


def _rates(name: str, where: _Where) -> dict[str, Fraction]:
    """Task name to mixing rate. A name with packed data is a task, and needs no registry."""
    if where.folder(name).is_dir():
        return {name: Fraction(1)}
    try:
        import tasks  # noqa: F401  registers tasks and mixtures
        from qwen_jax.data.quick_seqio import seqio
    except ImportError as error:
        raise FileNotFoundError(
            f"{where.missing(name)}; nor can it be looked up as a mixture here ({error})"
        ) from error
    if name in seqio.MixtureRegistry.names():
        from qwen_jax.data import mixing  # here, because it imports TensorFlow

        return mixing.rates_of(seqio.MixtureRegistry.get(name), where.cache_dir)
    if name in seqio.TaskRegistry.names():
        raise FileNotFoundError(where.missing(name))
    known = sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})
    raise ValueError(f"{name!r} is neither a task nor a mixture; there are {', '.join(known)}")


def _weights(rates: dict[str, Fraction]) -> list[int]:
    if len(rates) == 1:
        return [1]
    from qwen_jax.data import mixing  # only for mixtures, because it imports TensorFlow

    return mixing.whole_weights(list(rates.values()))


def _with_examples(name: str, rates: dict[str, Fraction], where: _Where) -> dict[str, Fraction]:
    """`rates` without the tasks of a mixture that lack examples in this split; unchanged if all do."""
    there = {task: rate for task, rate in rates.items() if where.folder(task).is_dir()}
    if there and len(there) < len(rates):
        logger.warning("%s %s has no examples of %s", name, where.split, ", ".join(sorted(rates.keys() - there.keys())))
    return there or rates


def _load_manifest(name: str, folder: Path, where: _Where) -> packing.Manifest:
    try:
        manifest = packing.Manifest.load(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{where.missing(name)} (looked for {folder / packing.MANIFEST})") from error
    if not manifest.records:
        raise ValueError(f"{folder / packing.MANIFEST} lists no examples: delete {folder} and cache the task again")
    return manifest


def _image_tokens(manifests: dict[str, packing.Manifest]) -> int:
    """Places between the tags of a picture, the same in all tasks that have any.

    Raises:
        ValueError: it is not.
    """
    found = {task: manifest.image_tokens for task, manifest in manifests.items() if manifest.image_tokens}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{task} {count}" for task, count in sorted(found.items()))
        raise ValueError(f"the sources of a mixture must give pictures as many places, found {listed}: cache anew")
    return max(found.values(), default=0)


def _check_vocabularies(manifests: dict[str, packing.Manifest]) -> None:
    seen = {m.vocabulary_fingerprint: task for task, m in manifests.items()}
    if len(seen) > 1:
        listed = "; ".join(f"{task} with {fingerprint[:12]}" for fingerprint, task in sorted(seen.items()))
        raise ValueError(f"the sources of a mixture must share one vocabulary, found {listed}: cache anew with one")
