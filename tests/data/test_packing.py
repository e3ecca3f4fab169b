"""Merge and cut: nothing is lost or repeated, whatever the documents; the files say what is in them."""

import dataclasses
import json

import numpy as np
import pytest
from array_record.python import array_record_module
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.data import packing
from qwen_jax.data.packing import Column, Document, Manifest, Shard

EOS = 9
TOKENS = st.lists(st.integers(0, 8), max_size=40)


def _document(tokens: list[int], weighted: bool) -> Document:
    weights = np.array(tokens, np.uint8) % 2 if weighted else None
    return Document(np.array(tokens, np.int32), weights)


@given(documents=st.lists(st.tuples(TOKENS, st.booleans()), max_size=20), length=st.integers(2, 17))
def test_no_token_is_lost_or_repeated(documents, length):
    packed = list(packing.pack([_document(*d) for d in documents], sequence_length=length, eos_id=EOS))
    merged = [token for tokens, _ in documents for token in [*tokens, EOS]]
    merged_weights = [w for tokens, weighted in documents for w in [*(t % 2 if weighted else 1 for t in tokens), 1]]
    flat = np.concatenate([example["tokens"] for example in packed] or [[]]).tolist()
    weights = np.concatenate([example["loss_weights"] for example in packed] or [[]]).tolist()
    filling = len(flat) - len(merged)
    assert 0 <= filling < length and len(flat) % length == 0
    assert flat == merged + [EOS] * filling
    assert weights == merged_weights + [0] * filling


def _segments(example: dict[str, np.ndarray]) -> list[tuple[list[int], list[int]]]:
    """(tokens, loss weights) of each segment of an example; checks that positions count up in each."""
    found = []
    for segment in range(1, example["segment_ids"].max() + 1):
        where = np.flatnonzero(example["segment_ids"] == segment)
        assert where.tolist() == list(range(where[0], where[0] + len(where)))
        assert example["positions"][where].tolist() == list(range(len(where)))
        found.append((example["tokens"][where].tolist(), example["loss_weights"][where].tolist()))
    return found


@given(documents=st.lists(st.tuples(TOKENS, st.booleans()), max_size=20), length=st.integers(2, 17))
def test_fitted_documents_are_whole_and_each_is_there_once(documents, length):
    examples = list(packing.best_fit([_document(*d) for d in documents], sequence_length=length, eos_id=EOS))
    expected = []
    for tokens, weighted in documents:
        ended, weights = [*tokens, EOS], [*(t % 2 if weighted else 1 for t in tokens), 1]
        # Only what is longer than a sequence is cut, into full sequences and a rest.
        expected += [(ended[i : i + length], weights[i : i + length]) for i in range(0, len(ended), length)]
    assert sorted(segment for example in examples for segment in _segments(example)) == sorted(expected)
    for example in examples:
        assert all(column.shape == (length,) for column in example.values())
        filling = example["segment_ids"] == 0
        assert (example["tokens"][filling] == EOS).all()
        assert not example["loss_weights"][filling].any() and not example["positions"][filling].any()
    # A sequence is opened only for what fits into no other: no two could be one.
    filled = sorted(int((example["segment_ids"] > 0).sum()) for example in examples)
    assert len(filled) < 2 or filled[0] + filled[1] > length


def test_fitting_keeps_the_order_of_documents_where_it_can():
    documents = [Document(np.full(n, n)) for n in (2, 5, 3, 7, 2)]  # with end-of-text 3, 6, 4, 8, 3
    first, second, third = packing.best_fit(documents, sequence_length=10, eos_id=EOS)
    assert [len(tokens) for tokens, _ in _segments(first)] == [3, 3]
    assert [len(tokens) for tokens, _ in _segments(second)] == [6, 4]
    assert [len(tokens) for tokens, _ in _segments(third)] == [8]


def test_fitting_wastes_less_than_seqio_packs():
    """The same columns as `seqio.trim_and_pack_dataset`, read in the same way, in fewer sequences."""
    import seqio
    import tensorflow as tf

    generator = np.random.default_rng(0)
    rows = [generator.integers(1, 9, min(64, int(n))) for n in generator.lognormal(2.5, 1, 400) + 1]
    dataset = tf.data.Dataset.from_generator(
        lambda: ({"tokens": row} for row in rows), output_signature={"tokens": tf.TensorSpec([None], tf.int32)}
    )
    packed = seqio.utils.trim_and_pack_dataset(dataset, {"tokens": 64}, use_custom_ops=False)
    theirs = [
        {
            "tokens": row["tokens"],
            "segment_ids": row["tokens_segment_ids"],
            "positions": row["tokens_positions"],
            "loss_weights": np.ones(64, np.uint8),
        }
        for row in packed.as_numpy_iterator()
    ]
    whole = [Document(np.append(row[:63], EOS)) for row in rows]
    ours = list(packing.best_fit(whole, sequence_length=64, eos_id=EOS))
    texts = [sorted(tokens for example in examples for tokens, _ in _segments(example)) for examples in (theirs, ours)]
    assert texts[0] == sorted(row.tolist() for row in rows)
    assert texts[1] == sorted(document.tokens.tolist() for document in whole)
    assert len(ours) < len(theirs)
    # Within 1% of what no packing can beat.
    assert len(ours) * 64 <= 1.01 * sum(len(document.tokens) for document in whole) + 64


def test_a_document_that_ends_already_is_not_ended_again():
    (example,) = packing.pack([Document(np.array([1, 2, EOS]))], sequence_length=4, eos_id=EOS)
    assert example["tokens"].tolist() == [1, 2, EOS, EOS]
    assert example["loss_weights"].tolist() == [1, 1, 1, 0]


def test_misaligned_weights_and_senseless_length():
    with pytest.raises(ValueError, match="3 tokens and 2 loss weights"):
        list(packing.pack([Document(np.arange(3), np.ones(2))], sequence_length=4, eos_id=EOS))
    for packer in packing.PACKINGS.values():
        with pytest.raises(ValueError, match="sequence_length is 1"):
            list(packer([], sequence_length=1, eos_id=EOS))
    with pytest.raises(ValueError, match="packing is 'fitted': it must be one of concat, best_fit, whole, padded"):
        packing.columns_for(600, 8, "fitted")


@given(tokens=TOKENS, seed=st.integers(0, 5), shards=st.integers(1, 9))
def test_key_depends_on_content_and_seed_only(tokens, seed, shards):
    key = packing.document_key(_document(tokens, False), seed)
    assert key == packing.document_key(Document(np.array(tokens, np.int64)), seed)
    assert key != packing.document_key(_document(tokens, False), seed + 1)
    assert key != packing.document_key(_document([*tokens, 1], False), seed)
    assert 0 <= packing.shard_of(key, shards) < shards


def test_shards_are_even():
    keys = [packing.document_key(Document(np.array([i])), 0) for i in range(4000)]
    counts = np.bincount([packing.shard_of(key, 4) for key in keys])
    assert counts.min() > 900


@given(data=st.data(), vocab_size=st.sampled_from([600, 1 << 16, (1 << 16) + 1, 151_851]), length=st.integers(2, 9))
def test_records_round_trip(data, vocab_size, length):
    columns = packing.columns_for(vocab_size, length)
    tokens = data.draw(st.lists(st.lists(st.integers(0, vocab_size - 1), min_size=length, max_size=length), max_size=3))
    examples = [{"tokens": np.array(t, np.int32), "loss_weights": np.array(t, np.int32) % 2} for t in tokens]
    records = [packing.encode_record(example, columns) for example in examples]
    assert all(len(record) == packing.record_bytes(columns, length) for record in records)
    decoded = packing.decode_records(records, columns, length)
    assert decoded["tokens"].tolist() == tokens
    assert decoded["loss_weights"].tolist() == [[t % 2 for t in row] for row in tokens]


def test_further_columns_have_room():
    columns = (*packing.columns_for(600, 5), Column("segment_ids", "uint16"), Column("positions", "int32"))
    example = {column.name: np.arange(5) + 1 for column in columns}
    decoded = packing.decode_records([packing.encode_record(example, columns)], columns, 5)
    assert {name: array.tolist() for name, array in decoded.items()} == {c.name: [[1, 2, 3, 4, 5]] for c in columns}


def test_record_of_the_wrong_size():
    with pytest.raises(ValueError, match="record 1 has 5 bytes, expected 6"):
        packing.decode_records([b"123456", b"12345"], packing.columns_for(600, 2), 2)


@pytest.mark.parametrize("method", ["concat", "best_fit"])
@settings(max_examples=20, deadline=None)
@given(documents=st.lists(TOKENS, min_size=1, max_size=9), order=st.randoms())
def test_shard_file_does_not_depend_on_the_order_of_delivery(tmp_path_factory, method, documents, order):
    folder = tmp_path_factory.mktemp("shard")
    keyed = [(packing.document_key(_document(d, False), 0), _document(d, False)) for d in documents]
    written = []
    for name in ("one", "two"):
        order.shuffle(keyed)
        shard = packing.write_shard(
            folder / name,
            keyed,
            sequence_length=8,
            eos_id=EOS,
            columns=packing.columns_for(10, 8, method),
            token_bytes=np.array([1, 2, 3, 4, 1, 2, 3, 4, 1, 0]),
            method=method,
        )
        written.append((folder / name).read_bytes())
    assert written[0] == written[1]
    assert sorted(path.name for path in folder.iterdir()) == ["one", "one.index", "two", "two.index"]
    assert (shard.documents, shard.tokens) == (len(documents), sum(len(d) + 1 for d in documents))
    assert shard.text_bytes == sum((1, 2, 3, 4, 1, 2, 3, 4, 1)[t] for d in documents for t in d)
    assert shard.records == array_record_module.ArrayRecordReader(str(folder / "two")).num_records()


def test_copies_of_a_document_are_spread_over_the_shard():
    """Up-sampled copies side by side would teach a model to repeat itself."""
    documents = [Document(np.array([number, 7], "<i4")) for number in [*range(60), *[99] * 6]]
    keyed = [(packing.document_key(document, 0), document) for document in documents]
    for delivered in (keyed, keyed[::-1]):
        spread = sorted(packing.spread_copies(delivered), key=lambda item: item[0])
        order = [int(document.tokens[0]) for _, document in spread]
        places = [place for place, number in enumerate(order) if number == 99]
        assert sorted(order) == sorted(int(document.tokens[0]) for document in documents)
        assert len(places) == 6 and min(np.diff(places)) > 1
    assert len({key for key, _ in spread}) == len(documents)


def test_a_failing_shard_leaves_nothing(tmp_path):
    def documents():
        yield b"k", Document(np.array([1, 2]))
        yield b"l", Document(np.array([1, 2]), np.ones(1, np.uint8))

    with pytest.raises(ValueError, match="aligned"):
        packing.write_shard(
            tmp_path / "x",
            documents(),
            sequence_length=4,
            eos_id=EOS,
            columns=packing.columns_for(10, 8),
            token_bytes=np.ones(10, int),
            method="concat",
        )
    assert not list(tmp_path.iterdir())


@pytest.fixture
def manifest() -> Manifest:
    shards = (Shard("a", 2, 10, 9, 3, 40, 100), Shard("b", 1, 5, 5, 1, 11, 90))
    return Manifest("task", "train", 8, 600, "f00d", 0, packing.columns_for(600, 8), shards, {"files": 1})


def test_manifest_round_trip(manifest, tmp_path):
    path = manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert json.loads(path.read_text())["totals"] == {
        "records": 3,
        "tokens": 15,
        "loss_tokens": 14,
        "documents": 4,
        "text_bytes": 51,
    }
    assert [file.name for file in tmp_path.iterdir()] == ["manifest.json"]
    assert dataclasses.replace(manifest, seed=1).fingerprint != manifest.fingerprint


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format_version": 99}'])
def test_no_manifest(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match="is not a manifest of packed examples.*delete its folder and cache the task"):
        Manifest.load(tmp_path)
