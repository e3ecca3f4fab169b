"""Packing of SeqIO's cache: the second stage of `qwen_jax.data.cache`.

Cached examples go through the task's last steps and become documents (`document_of`); a hash of each names the shard
and its place in it. Where there are several shards, the documents of each file of the cache are first dealt to them
(`pack_spill`). Then each shard is sorted, packed and written by one worker; the manifest comes last.
"""

import contextlib
import dataclasses
import fnmatch
import functools
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from qwen_jax import files
from qwen_jax.data import pack_spill, packing
from qwen_jax.data.row_steps import LastSteps
from qwen_jax.data.token_cache import read_examples
from qwen_jax.data.tokenizer import PinnedTokenizer, Tokenizer
from qwen_jax.workers import Workers

logger = logging.getLogger(__name__)

TOKENS, LOSS_WEIGHTS, SEGMENT_LENGTHS, TURN_ENDS, LEFT_OUT, IMAGES = (
    "targets",
    "loss_weights",
    "segment_lengths",
    "turn_ends",
    "left_out",
    "images",
)
# Key, tokens, loss weights, lengths of segments, ends, reason for leaving out, pictures and their places: a document as
# bytes.
_Keyed = tuple[bytes, bytes, bytes, bytes, bytes, bytes, bytes, bytes]
_PARTS = 8


class Turn(contextlib.ExitStack):
    """The lock under which things are made in the cache of a task: taken by who makes the first, and kept to the end.

    Args:
      lock: a context that waits for other processes.
    """

    def __init__(self, lock: contextlib.AbstractContextManager[None]):
        super().__init__()
        self._lock: contextlib.AbstractContextManager[None] | None = lock

    def take(self) -> bool:
        """Returns when this process holds the lock: True unless it held it before, so that no other has worked."""
        lock, self._lock = self._lock, None
        if lock is not None:
            self.enter_context(lock)
        return lock is not None


@dataclasses.dataclass(frozen=True)
class Prepared:
    """One packed split: its folder, and the content of its `manifest.json`."""

    folder: Path
    manifest: packing.Manifest


@dataclasses.dataclass(frozen=True)
class Packer:
    """Packs one split of a cached task; sent to workers.

    Attributes:
        task, split: names.
        cache_folder: folder of the task in the cache.
        cached: names of the files of the split there.
        features: of the cached examples, from SeqIO's info file.
        last_steps: steps of the task after the cache.
        tokenizer: of the tokens.
        num_ids: number of ids that the task may yield.
        sequence_length, method, seed, num_shards, images_per_row: see `cache.prepare`; `method` is its `packing`.
        source: identity of the corpus.
    """

    task: str
    split: str
    cache_folder: Path
    cached: tuple[str, ...]
    features: Mapping[str, Mapping]
    last_steps: LastSteps
    tokenizer: PinnedTokenizer
    num_ids: int
    sequence_length: int
    method: str  # a key of packing.PACKINGS
    seed: int
    num_shards: int
    source: dict
    images_per_row: int = 0

    @property
    def folder(self) -> Path:
        """Folder of the packed split."""
        where = (self.cache_folder, "", self.sequence_length, self.split)
        return packing.packed_folder(*where, self.method, self.images_per_row)

    @property
    def label(self) -> str:
        """Task, split and packing, for the log."""
        label = f"{self.task} {self.split}, length {self.sequence_length}"
        label += "" if self.method == "concat" else f", {self.method}"
        return label + (f", at most {count(self.images_per_row, 'image')}" if self.images_per_row else "")

    @property
    def spill(self) -> Path:
        """Folder of documents dealt to shards, named by what they are made of."""
        identity = json.dumps([self._settings(), self.num_shards, self.cached], sort_keys=True)
        return self.folder / f".documents-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"

    def columns(self) -> tuple[packing.Column, ...]:
        """Columns of the packed examples."""
        return packing.columns_for(self.num_ids, self.sequence_length, self.method, self.images_per_row)

    def found(self, check_shards: bool) -> Prepared | None:
        """What is packed already, if it is.

        Raises:
            ValueError: it is made of something else; with `check_shards`, also where it has another number of shards.
        """
        if not (self.folder / packing.MANIFEST).is_file():
            return None
        manifest = packing.Manifest.load(self.folder)
        self._check(manifest, check_shards)
        logger.info("%s: packed already in %s", self.label, self.folder)
        return Prepared(self.folder, manifest)

    def unfinished(self) -> list[int]:
        """Shards that are still to be written; what an interrupted run left unfinished is removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        files.remove_unfinished(self.folder)
        found = set(self.folder.iterdir())
        for path in found:
            is_part = fnmatch.fnmatchcase(path.name, "part-*-of-*")
            of_others = path.name.startswith(".documents-") and path != self.spill
            if of_others or (is_part and f"-of-{self.num_shards:05d}." not in path.name):
                files.remove_tree(path)
        written = [index for index in range(self.num_shards) if self.sidecar(index) in found]
        done = dict(zip(written, files.in_parallel(self.made_of_same, written), strict=True))
        files.remove_files([self.sidecar(index) for index in written if not done[index]])
        left = [index for index in range(self.num_shards) if not done.get(index)]
        logger.info("%s: packing, %d shards (%d done before)", self.label, self.num_shards, self.num_shards - len(left))
        return left

    def keyed_documents(self, path: Path, file: BinaryIO) -> Iterator[_Keyed]:
        """The documents in one file of the cache, opened for reading, after the task's last steps."""
        tokenizer = self.tokenizer.load()
        tags = _image_tags(tokenizer)
        examples = read_examples(path, file, self.features)
        for example in self.last_steps(examples, self.features):
            document = document_of(example, self.task, tags)
            tokens = document.tokens
            if not document.left_out:
                if not len(tokens) or (len(tokens) == 1 and tokens[0] == tokenizer.endoftext_id):
                    continue  # a document without text
                if tokens.min() < 0 or tokens.max() >= self.num_ids:
                    raise ValueError(
                        f"task {self.task} yields ids from {tokens.min()} to {tokens.max()}, outside [0, "
                        f"{self.num_ids})"
                    )
            yield packing.document_key(document, self.seed), *_to_bytes(document)

    def deal(self, number: int) -> None:
        """Deals the documents of the cached file of this number to the shards."""
        path = self.cache_folder / self.cached[number]
        with path.open("rb") as file:
            keyed = self.keyed_documents(path, file)
            dealt = ((packing.shard_of(parts[0], self.num_shards), parts) for parts in keyed)
            pack_spill.write(self.spill, number, self.num_shards, dealt)

    def _documents_of(self, index: int) -> Iterator[tuple[bytes, packing.Document]]:
        if self.num_shards == 1:
            opened = files.opened_in_turn([self.cache_folder / file for file in self.cached])
            found = (parts for path, file in opened for parts in self.keyed_documents(path, file))
        else:
            found = pack_spill.read(self.spill, len(self.cached), index, self.num_shards, _PARTS)
        for key, *parts in found:
            yield key, _from_bytes(*parts)

    def write(self, index: int) -> None:
        """Writes one shard, and beside it its entry of the manifest; the entry of a shard without documents is None."""
        tokenizer = self.tokenizer.load()
        documents = list(self._documents_of(index))
        if not documents:
            files.write_json(self.sidecar(index), self._settings() | {"shard": None}, sort_keys=True)
            return
        shard = packing.write_shard(
            self.folder / f"part-{index:05d}-of-{self.num_shards:05d}.array_record",
            documents,
            sequence_length=self.sequence_length,
            eos_id=tokenizer.endoftext_id,
            columns=self.columns(),
            token_bytes=_token_bytes(tokenizer),
            method=self.method,
            images_per_row=self.images_per_row,
        )
        files.write_json(self.sidecar(index), self._settings() | {"shard": dataclasses.asdict(shard)}, sort_keys=True)

    def sidecar(self, index: int) -> Path:
        """The entry of a written shard."""
        return self.folder / f"part-{index:05d}-of-{self.num_shards:05d}.json"

    def _settings(self) -> dict:
        return {"seed": self.seed, "fingerprint": self.tokenizer.fingerprint, "source": self.source}

    def made_of_same(self, index: int) -> bool:
        """Whether a shard that is written was made from the same."""
        content = files.read_json(self.sidecar(index))
        return {key: content.get(key) for key in self._settings()} == self._settings()

    def finish(self) -> Prepared:
        """Writes the manifest and removes what only an interrupted run needs.

        Raises:
            ValueError: no shard has an example.
        """
        sidecars = [self.sidecar(index) for index in range(self.num_shards)]
        entries = files.in_parallel(files.read_json, sidecars)
        shards = [shard for entry in entries if (shard := entry["shard"]) is not None]
        if not shards:
            files.remove_tree(self.folder)
            raise ValueError(f"task {self.task} yields only documents without text in split {self.split!r}")
        manifest = packing.Manifest(
            task=self.task,
            split=self.split,
            sequence_length=self.sequence_length,
            vocab_size=self.num_ids,
            vocabulary_fingerprint=self.tokenizer.fingerprint,
            seed=self.seed,
            columns=self.columns(),
            shards=tuple(packing.Shard(**shard) for shard in shards),
            source=self.source,
            method=self.method if packing.keeps_documents(self.method) else None,
            images_per_row=self.images_per_row or None,
        )
        if not manifest.records:
            files.remove_tree(self.folder)
            reasons = "; ".join(removed_lines(manifest))
            raise ValueError(
                f"no document of task {self.task} is left in split {self.split!r}: {reasons}; give longer examples, "
                "correct the documents, or hold out another share of them"
            )
        manifest.save(self.folder)
        files.remove_files(sidecars)
        if self.num_shards > 1:
            files.remove_tree(self.spill)
        return Prepared(self.folder, manifest)

    def _check(self, manifest: packing.Manifest, check_shards: bool) -> None:
        differences = []
        if manifest.vocabulary_fingerprint != self.tokenizer.fingerprint:
            differences.append(
                f"vocabulary {manifest.vocabulary_fingerprint[:12]} (now: {self.tokenizer.fingerprint[:12]})"
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


def pack(packers: Sequence[Packer], workers: Workers, turn: Turn, *, check_shards: bool) -> list[Prepared]:
    """Packs splits of one task, and uses those that are packed already as they are.

    Args:
        turn: taken before something is packed, so that no two processes do.

    Raises:
        ValueError: see `Packer`.
    """
    found, new = _found(packers, check_shards)
    if new:
        if turn.take():
            # Another process may have packed them while this one waited.
            found, new = _found(packers, check_shards)
        if new:
            found |= _pack(new, workers)
    return [found[packer.folder] for packer in packers]


def _found(packers: Sequence[Packer], check_shards: bool) -> tuple[dict[Path, Prepared], list[Packer]]:
    """(what is packed already, by folder; the packers of the rest)."""
    found = {packer.folder: one for packer in packers if (one := packer.found(check_shards)) is not None}
    return found, [packer for packer in packers if packer.folder not in found]


def _pack(new: Sequence[Packer], workers: Workers) -> dict[Path, Prepared]:
    """Packs splits of which nothing, or a part, is there."""
    started = time.monotonic()
    left = {packer.folder: packer.unfinished() for packer in new}
    dealing = [number for number, packer in enumerate(new) if packer.num_shards > 1 and left[packer.folder]]
    deals = [(number, file) for number in dealing for file in range(len(new[number].cached))]
    are_dealt, are_written = functools.partial(_are_dealt, new), functools.partial(_are_written, new)
    deals = [piece for piece, done in zip(deals, are_dealt(deals), strict=True) if not done]
    workers(f"{new[0].task}: dealing out", functools.partial(_deal, new), deals, are_dealt)
    shards = [(number, index) for number, packer in enumerate(new) for index in left[packer.folder]]
    workers(f"{new[0].task}: packing", functools.partial(_write, new), shards, are_written)
    packed = {}
    for packer in new:
        packed[packer.folder] = packer.finish()
        _say_packed(packer, packed[packer.folder].manifest, time.monotonic() - started)
    return packed


def _deal(packers: Sequence[Packer], number: int, file: int) -> None:
    packers[number].deal(file)


def _are_dealt(packers: Sequence[Packer], pieces: Sequence[tuple[int, int]]) -> list[bool]:
    return pack_spill.are_written([(packers[number].spill, file) for number, file in pieces])


def _write(packers: Sequence[Packer], number: int, index: int) -> None:
    packers[number].write(index)


def _are_written(packers: Sequence[Packer], pieces: Sequence[tuple[int, int]]) -> list[bool]:
    # `Packer.unfinished` has removed those made of something else.
    return files.are_files([packers[number].sidecar(index) for number, index in pieces])


def _say_packed(packer: Packer, manifest: packing.Manifest, seconds: float) -> None:
    counts = f"{manifest.records:,} examples, {manifest.tokens:,} tokens, {manifest.documents:,} documents"
    counts += f", {count(manifest.images, 'image')}" if manifest.images else ""
    counts += f", {manifest.tokens / (manifest.records * manifest.sequence_length):.2%} full"
    logger.info("%s: %s in %.0f s, in %s", packer.label, counts, seconds, packer.folder)
    for line in removed_lines(manifest):
        logger.warning("%s: %s", packer.label, line)


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


def _image_tags(tokenizer: Tokenizer) -> tuple[int, int]:
    return tokenizer.vision_tokens["<img>"], tokenizer.vision_tokens["</img>"]


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


def _token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """UTF-8 bytes of text that each id stands for, int64 [ids]; 0 for control tokens, which are not text."""
    result = np.zeros(tokenizer.vision_vocab_size, np.int64)
    for token, rank in tokenizer.mergeable_ranks.items():
        result[rank] = len(token)
    return result
