"""Rows of pairs in the layout that training reads, made by hand."""

from pathlib import Path

import numpy as np

from qwen_jax.batch_spec import token_columns
from qwen_jax.data import packing
from qwen_jax.data.packers import Document


def random_pairs(count: int, vocab_size: int = 61, longest: int = 9, seed: int = 0) -> list[list[tuple[list, list]]]:
    """Pairs of (prompt, response) with one prompt; every response ends with the id 1."""
    random = np.random.default_rng(seed)

    def ids(least, most):
        return random.integers(2, vocab_size, random.integers(least, most + 1)).tolist()

    pairs = []
    for _ in range(count):
        prompt = ids(2, longest)
        pairs.append([(prompt, [*ids(1, longest), 1]) for _ in range(2)])
    return pairs


def rows_of(rows: list[list], length: int) -> dict[str, np.ndarray]:
    """A batch of packed rows: each row is a list of pairs, each pair two of (prompt, response)."""
    batch = {
        name: np.zeros((len(rows), length), np.float32 if name == "loss_weights" else np.int32)
        for name in ("tokens", "loss_weights", "segment_ids", "positions")
    }
    for row, pairs in enumerate(rows):
        start = 0
        for segment, (prompt, response) in enumerate((side for pair in pairs for side in pair), start=1):
            place = slice(start, start + len(prompt) + len(response))
            batch["tokens"][row, place] = [*prompt, *response]
            batch["loss_weights"][row, start + len(prompt) : place.stop] = 1
            batch["segment_ids"][row, place] = segment
            batch["positions"][row, place] = np.arange(place.stop - start)
            start = place.stop
        assert start <= length
    return batch


class PairExamples:
    """Packed rows of two random pairs each, by index; some rows hold one pair."""

    def __init__(self, count=400, length=80, repeat=True):
        self.count, self.length, self.repeat, self.fingerprint = count, length, repeat, f"pairs-{length}"
        self.columns, self.bytes_per_token = token_columns(length, packed=True), 2.0

    def __len__(self):
        return self.count

    def read(self, start, stop):
        rows = [random_pairs(1 + (index % 3 > 0), seed=index % self.count) for index in range(start, stop)]
        return rows_of(rows, self.length)


def pack_pairs(cache_dir: Path, task: str, split: str, pairs: list, length: int, tokenizer) -> None:
    """Writes pairs as a packed task of the cache, two shards of it, without SeqIO."""
    folder = packing.packed_folder(cache_dir, task, length, split, "whole")
    columns = packing.columns_for(tokenizer.vocab_size, length, "whole")
    shards = []
    for number in range(2):
        documents = []
        for prompt, chosen, rejected in pairs[number::2]:
            weights = np.concatenate([np.arange(len(prompt) + len(side)) >= len(prompt) for side in (chosen, rejected)])
            lengths = np.array([len(prompt) + len(side) for side in (chosen, rejected)])
            tokens = np.array([*prompt, *chosen, *prompt, *rejected], np.int32)
            document = Document(tokens, weights.astype(np.uint8), segment_lengths=lengths)
            documents.append((packing.document_key(document, 0), document))
        shards.append(
            packing.write_shard(
                folder / f"part-{number:05d}-of-00002.array_record",
                documents,
                sequence_length=length,
                eos_id=tokenizer.endoftext_id,
                columns=columns,
                token_bytes=np.ones(tokenizer.vocab_size, np.int64),
                method="whole",
            )
        )
    packing.Manifest(
        task=task,
        split=split,
        sequence_length=length,
        vocab_size=tokenizer.vocab_size,
        vocabulary_fingerprint=tokenizer.fingerprint,
        seed=0,
        columns=columns,
        shards=tuple(shards),
        source={},
        method="whole",
    ).save(folder)
