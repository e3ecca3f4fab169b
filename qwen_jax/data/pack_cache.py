"""Packing of SeqIO's cache on Beam: the second stage of `qwen_jax.data.cache`.

Cached examples go through the task's last steps and become documents (`documents_of`); a hash of each names the shard
and its place in it. Each shard is sorted, packed and written by one worker; the manifest comes last.
"""

import dataclasses
import importlib
import logging
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import apache_beam as beam
import gin
import numpy as np

from qwen_jax import files
from qwen_jax.beam import open_pipeline
from qwen_jax.data import packing
from qwen_jax.data.quick_seqio import seqio, tf
from qwen_jax.data.vocabulary import QwenVocabulary

logger = logging.getLogger(__name__)

TOKENS, LOSS_WEIGHTS, SEGMENT_LENGTHS, TURN_ENDS, LEFT_OUT, IMAGES = (
    "targets",
    "loss_weights",
    "segment_lengths",
    "turn_ends",
    "left_out",
    "images",
)
_THIS_PROCESS = uuid.uuid4().hex
# Key, tokens, loss weights, lengths of segments, ends, reason for leaving out, pictures and their places: a document as
# bytes, for Beam's coders.
_Keyed = tuple[bytes, bytes, bytes, bytes, bytes, bytes, bytes, bytes]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """One packed split: its folder, and the content of its `manifest.json`."""

    folder: Path
    manifest: packing.Manifest


def vocabulary_of(task: str) -> QwenVocabulary:
    """The vocabulary of the tokens of a registered task."""
    vocabulary = seqio.TaskRegistry.get(task).output_features[TOKENS].vocabulary
    assert isinstance(vocabulary, QwenVocabulary)  # `_check_task` refuses others before a worker starts
    return vocabulary


def num_ids(task: str) -> int:
    """Number of ids that a registered task may yield; a task with pictures has those of Qwen-VL."""
    tokenizer = vocabulary_of(task).tokenizer
    with_pictures = IMAGES in seqio.TaskRegistry.get(task).output_features
    return tokenizer.vision_vocab_size if with_pictures else tokenizer.vocab_size


@dataclasses.dataclass(frozen=True)
class WorkerSetup:
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
        vocabulary = vocabulary_of(self.task)
        if vocabulary.fingerprint != self.fingerprint:
            raise RuntimeError(
                f"this worker has the vocabulary {vocabulary.tokenizer.path} (fingerprint "
                f"{vocabulary.fingerprint[:12]}), the job was started with {self.fingerprint[:12]}: put the same file "
                "on every worker"
            )


@dataclasses.dataclass(frozen=True)
class Packer:
    """Packs one split of a cached task; sent to Beam workers."""

    task: str
    split: str
    cache_folder: Path
    sequence_length: int
    method: str  # a key of packing.PACKINGS
    seed: int
    num_shards: int
    source: dict
    setup: WorkerSetup
    images_per_row: int = 0

    @property
    def folder(self) -> Path:
        where = (self.cache_folder, "", self.sequence_length, self.split)
        return packing.packed_folder(*where, self.method, self.images_per_row)

    def columns(self) -> tuple[packing.Column, ...]:
        return packing.columns_for(num_ids(self.task), self.sequence_length, self.method, self.images_per_row)

    def prepare(self, beam_options: Sequence[str], *, check_shards: bool) -> Prepared:
        label = f"{self.task} {self.split}, length {self.sequence_length}"
        label += "" if self.method == "concat" else f", {self.method}"
        label += f", at most {count(self.images_per_row, 'image')}" if self.images_per_row else ""
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
        counts += f", {count(manifest.images, 'image')}" if manifest.images else ""
        counts += f", {manifest.tokens / (manifest.records * self.sequence_length):.2%} full"
        logger.info("%s: %s in %.0f s, in %s", label, counts, seconds, self.folder)
        for line in removed_lines(manifest):
            logger.warning("%s: %s", label, line)
        return Prepared(self.folder, manifest)

    def keyed_documents(self, file: str) -> Iterator[tuple[int, _Keyed]]:
        """(shard, keyed document) of the documents in one cache file, after the task's last steps."""
        self.setup()
        task = seqio.TaskRegistry.get(self.task)
        vocabulary, vocab_size = vocabulary_of(self.task), num_ids(self.task)
        eos_id, tags = vocabulary.eos_id, _image_tags(vocabulary)
        dataset = task.preprocess_postcache(_read_cache(self.cache_folder, self.split, file), sequence_length=None)
        for example in _undamaged(dataset, file):
            document = document_of(example, self.task, tags)
            tokens = document.tokens
            if not document.left_out:
                if not len(tokens) or (len(tokens) == 1 and tokens[0] == eos_id):
                    continue  # a document without text
                if tokens.min() < 0 or tokens.max() >= vocab_size:
                    raise ValueError(
                        f"task {self.task} yields ids from {tokens.min()} to {tokens.max()}, outside [0, {vocab_size})"
                    )
            key = packing.document_key(document, self.seed)
            yield packing.shard_of(key, self.num_shards), (key, *_to_bytes(document))

    def write(self, item: tuple[int, Iterable[_Keyed]]) -> int:
        """Writes one shard, and beside it its entry of the manifest."""
        self.setup()
        index, raw = item
        vocabulary = vocabulary_of(self.task)
        documents = ((key, _from_bytes(*parts)) for key, *parts in raw)
        shard = packing.write_shard(
            self.folder / f"part-{index:05d}-of-{self.num_shards:05d}.array_record",
            documents,
            sequence_length=self.sequence_length,
            eos_id=vocabulary.eos_id,
            columns=self.columns(),
            token_bytes=_token_bytes(vocabulary),
            method=self.method,
            images_per_row=self.images_per_row,
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
        vocabulary = vocabulary_of(self.task)
        manifest = packing.Manifest(
            task=self.task,
            split=self.split,
            sequence_length=self.sequence_length,
            vocab_size=num_ids(self.task),
            vocabulary_fingerprint=vocabulary.fingerprint,
            seed=self.seed,
            columns=self.columns(),
            shards=tuple(packing.Shard(**shard) for shard in shards),
            source=self.source,
            method=self.method if packing.keeps_documents(self.method) else None,
            images_per_row=self.images_per_row or None,
        )
        if not manifest.records:
            shutil.rmtree(self.folder)
            reasons = "; ".join(removed_lines(manifest))
            raise ValueError(
                f"no document of task {self.task} is left in split {self.split!r}: {reasons}; give longer examples, "
                "correct the documents, or hold out another share of them"
            )
        return manifest

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


def _to_bytes(document: packing.Document) -> tuple[bytes, bytes, bytes, bytes, bytes, bytes, bytes]:
    numbers = (document.segment_lengths, document.ends, document.image_spans)
    segments, ends, spans = (b"" if one is None else np.asarray(one, "<i4").tobytes() for one in numbers)
    images = packing.join_images(document.images) if document.images else b""
    left_out = document.left_out.encode()
    return document.tokens.tobytes(), document.weights().tobytes(), segments, ends, left_out, images, spans


def _from_bytes(
    tokens: bytes, weights: bytes, segments: bytes, ends: bytes, left_out: bytes, images: bytes, spans: bytes
) -> packing.Document:
    lengths, cuts, places = (np.frombuffer(one, "<i4") if one else None for one in (segments, ends, spans))
    return packing.Document(
        np.frombuffer(tokens, "<i4"),
        np.frombuffer(weights, np.uint8),
        lengths,
        cuts,
        left_out.decode(),
        tuple(packing.split_images(images)) if images else (),
        None if places is None else places.reshape(-1, 2),
    )


def document_of(
    example: Mapping[str, np.ndarray], task: str, image_tags: tuple[int, int] | None = None
) -> packing.Document:
    """The document of one example of a task.

    Args:
        example: `targets`, int [length]; optionally `loss_weights` (0 or 1, [length]), `segment_lengths` and
            `turn_ends` (int, see `packing.Document`; empty means None), `left_out`, the reason for which the task
            gives no tokens, and `images`, encoded files in the order of the text.
        task: its name, for errors.
        image_tags: ids of `<img>` and `</img>`, between which a picture has its places.

    Raises:
        ValueError: loss weights that are not 0 or 1, or are misaligned; pictures that are not those of the tokens, or
            that carry loss.
    """
    tokens = example[TOKENS].astype("<i4")
    optional = (example.get(name) for name in (SEGMENT_LENGTHS, TURN_ENDS))
    segments, ends = (one if one is not None and len(one) else None for one in optional)
    left_out = bytes(example.get(LEFT_OUT, b"")).decode()
    weights = _whole_weights(task, example.get(LOSS_WEIGHTS), len(tokens))
    images = () if left_out else tuple(map(bytes, example.get(IMAGES, ())))
    spans = None if image_tags is None else _image_spans(task, tokens, weights, len(images), image_tags)
    return packing.Document(tokens, weights, segments, ends, left_out, images, spans)


def _image_spans(
    task: str, tokens: np.ndarray, weights: np.ndarray, count: int, tags: tuple[int, int]
) -> np.ndarray | None:
    """The positions of `<img>` and after `</img>` of each picture, int32 [count, 2]; None without pictures."""
    starts, ends = (np.flatnonzero(tokens == tag) for tag in tags)
    edges = np.stack([starts, ends], axis=1).ravel() if len(starts) == len(ends) else np.zeros(2)
    if len(starts) != count or (count and (np.diff(edges) <= 0).any()):
        raise ValueError(
            f"task {task} yields an example with {count} picture(s), {len(starts)} times <img> and {len(ends)} times "
            "</img>: each picture must have one of each, in the order of the text"
        )
    if not count:
        return None
    spans = np.stack([starts, ends + 1], axis=1).astype("<i4")
    if any(weights[start:end].any() for start, end in spans):
        raise ValueError(
            f"task {task}: {LOSS_WEIGHTS!r} must be 0 from <img> to </img>: a model predicts text, not pictures"
        )
    return spans


def _image_tags(vocabulary: QwenVocabulary) -> tuple[int, int]:
    tokens = vocabulary.tokenizer.vision_tokens
    return tokens["<img>"], tokens["</img>"]


def removed_lines(manifest: packing.Manifest) -> list[str]:
    """What was cut off and left out, one line a reason."""
    return [
        f"{what} {count(entry['documents'], 'document')}, {count(entry['tokens'], 'token')}: {reason}"
        for what, removed in (("truncated", manifest.truncated), ("left out", manifest.left_out))
        for reason, entry in removed.items()
    ]


def count(number: int, noun: str) -> str:
    """A number with its noun, such as "1 token" or "1,200 tokens"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


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
    """UTF-8 bytes of text that each id stands for, int64 [ids]; 0 for control tokens, which are not text."""
    result = np.zeros(vocabulary.tokenizer.vision_vocab_size, np.int64)
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
