"""Packing of whole documents: conversations, pairs and prompts stay together, and what does not fit is counted."""

import dataclasses

import numpy as np
import pytest
from array_record.python import array_record_module
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.data import packing
from qwen_jax.data.packers import Document, fit, padded, whole

EOS = 9
LENGTH = 12


@st.composite
def _documents(draw) -> list[Document]:
    """Conversations (with ends), pairs (two segments), prompts and plain documents, some of them too long."""
    result = []
    for number in range(draw(st.integers(0, 12))):
        kind = draw(st.sampled_from(["conversation", "pair", "prompt", "left out"]))
        size = draw(st.integers(2, 20))
        tokens = np.full(size, number % 8, np.int32)
        weights = np.array(draw(st.lists(st.integers(0, 1), min_size=size, max_size=size)), np.uint8)
        if kind == "left out":
            result.append(Document(tokens[:0], weights[:0], left_out=draw(st.sampled_from(["equal sides", "no turn"]))))
        elif kind == "conversation":
            ends = sorted(draw(st.sets(st.integers(1, size), min_size=1, max_size=4)))
            result.append(Document(tokens, weights, ends=np.array(ends)))
        elif kind == "pair":
            first = draw(st.integers(1, size - 1))
            result.append(Document(tokens, weights, segment_lengths=np.array([first, size - first])))
        else:
            result.append(Document(tokens, weights))
    return result


def _runs(example: dict[str, np.ndarray]) -> list[tuple[list[int], list[int]]]:
    """(tokens, loss weights) of the segments of an example, which stand in order without gaps; positions count up."""
    ids = example["segment_ids"]
    filled = int((ids > 0).sum())
    assert (np.diff(ids[:filled]) >= 0).all() and not ids[filled:].any()
    assert sorted(set(ids[:filled].tolist())) == list(range(1, ids.max() + 1))
    assert (example["tokens"][filled:] == EOS).all()
    assert not example["loss_weights"][filled:].any() and not example["positions"][filled:].any()
    found = []
    for segment in range(1, ids.max() + 1):
        place = ids == segment
        assert example["positions"][place].tolist() == list(range(place.sum()))
        found.append((example["tokens"][place].tolist(), example["loss_weights"][place].tolist()))
    return found


def _parts(document: Document) -> list[tuple[list[int], list[int]]]:
    edges = np.cumsum([0, *document.segments()])
    return [
        (document.tokens[a:b].tolist(), document.weights()[a:b].tolist())
        for a, b in zip(edges, edges[1:], strict=False)
    ]


@given(documents=_documents(), packer=st.sampled_from([whole, padded]))
def test_every_document_is_packed_truncated_or_left_out(documents, packer):
    fitted = fit(documents, LENGTH)
    examples = list(packer(fitted.documents, sequence_length=LENGTH, eos_id=EOS))
    held = sum(len(tokens) for example in examples for tokens, _ in _runs(example))
    cut, out = (
        (sum(entry["documents"] for entry in removed.values()), sum(entry["tokens"] for entry in removed.values()))
        for removed in (fitted.truncated, fitted.left_out)
    )
    assert len(fitted.documents) + out[0] == len(documents) and cut[0] <= len(fitted.documents)
    assert held + cut[1] + out[1] == sum(len(document.tokens) for document in documents)
    if packer is padded:
        assert len(examples) == len(fitted.documents)


@given(documents=_documents())
def test_segments_of_a_document_stay_side_by_side_with_their_loss_weights(documents):
    fitted = fit(documents, LENGTH)
    wanted = sorted(_parts(document) for document in fitted.documents)
    found = []
    for example in whole(fitted.documents, sequence_length=LENGTH, eos_id=EOS):
        runs = _runs(example)
        while runs:
            # Documents of one example differ in their first token or are equal; take the longest that matches.
            match = max((parts for parts in wanted if runs[: len(parts)] == parts), key=len)
            found.append(match)
            runs = runs[len(match) :]
    assert sum(map(len, found)) == sum(map(len, wanted))
    assert sorted(part for parts in found for part in parts) == sorted(part for parts in wanted for part in parts)


@given(documents=_documents())
def test_a_conversation_is_cut_at_the_last_end_that_fits_and_nothing_else_is_cut(documents):
    fitted = fit(documents, LENGTH)
    kept = iter(fitted.documents)
    for document in documents:
        fits = [] if document.ends is None else [end for end in document.ends if end <= LENGTH]
        if document.left_out or (len(document.tokens) > LENGTH and not fits):
            continue
        here = next(kept)
        end = len(document.tokens) if len(document.tokens) <= LENGTH else max(fits)
        assert here.tokens.tolist() == document.tokens[:end].tolist()
        assert here.weights().tolist() == document.weights()[:end].tolist()
    assert next(kept, None) is None


def test_reasons_are_named():
    pair = Document(np.zeros(20), segment_lengths=np.array([10, 10]))
    documents = [
        Document(np.zeros(20), ends=np.array([7, 19])),
        Document(np.zeros(20), ends=np.array([13])),
        pair,
        Document(np.zeros(0), left_out="equal sides"),
        Document(np.zeros(0)),
        Document(np.zeros(15)),
    ]
    fitted = fit(documents, LENGTH)
    assert fitted.truncated == {"cut at the end of a turn": {"documents": 1, "tokens": 13}}
    assert fitted.left_out == {
        "no turn ends within 12 tokens": {"documents": 1, "tokens": 20},
        "longer than 12 tokens": {"documents": 2, "tokens": 35},
        "equal sides": {"documents": 1, "tokens": 0},
        "no tokens": {"documents": 1, "tokens": 0},
    }
    with pytest.raises(ValueError, match="a document of 20 tokens does not fit into 12"):
        list(whole([pair], sequence_length=LENGTH, eos_id=EOS))


def test_a_pair_is_two_segments_and_nothing_is_added_to_it():
    pair = Document(np.array([1, 2, 3, 1, 4]), np.array([0, 1, 1, 0, 1]), np.array([3, 2]))
    (example,) = whole([pair, Document(np.array([5, 6]))], sequence_length=10, eos_id=EOS)
    assert example["tokens"].tolist() == [1, 2, 3, 1, 4, 5, 6, EOS, EOS, EOS]
    assert example["loss_weights"].tolist() == [0, 1, 1, 0, 1, 1, 1, 0, 0, 0]
    assert example["segment_ids"].tolist() == [1, 1, 1, 2, 2, 3, 3, 0, 0, 0]
    assert example["positions"].tolist() == [0, 1, 2, 0, 1, 0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (Document(np.arange(3), np.ones(2)), "3 tokens and 2 loss weights"),
        (Document(np.arange(3), segment_lengths=np.array([1, 1])), r"3 tokens and segments of \[1, 1\]"),
        (Document(np.arange(3), segment_lengths=np.array([3, 0])), r"segments of \[3, 0\]: they must be positive"),
    ],
)
def test_documents_that_do_not_add_up_are_refused(document, message):
    with pytest.raises(ValueError, match=message):
        list(whole([document], sequence_length=4, eos_id=EOS))


def _write(path, documents: list[Document], method: str, length: int = LENGTH) -> packing.Shard:
    return packing.write_shard(
        path,
        [(packing.document_key(document, 0), document) for document in documents],
        sequence_length=length,
        eos_id=EOS,
        columns=packing.columns_for(10, length, method),
        token_bytes=np.ones(10, int),
        method=method,
    )


@given(documents=_documents(), order=st.randoms(), method=st.sampled_from(["whole", "padded"]))
def test_a_shard_does_not_depend_on_the_order_of_delivery(tmp_path_factory, documents, order, method):
    folder = tmp_path_factory.mktemp("shard")
    shuffled = list(documents)
    order.shuffle(shuffled)
    one, two = (_write(folder / name, rows, method) for name, rows in (("one", documents), ("two", shuffled)))
    assert dataclasses.replace(one, file="two") == two
    assert (folder / "one").read_bytes() == (folder / "two").read_bytes()
    fitted = fit(documents, LENGTH)
    assert one.documents == len(fitted.documents)
    assert (one.truncated, one.left_out) == (fitted.truncated, fitted.left_out)
    if one.records:
        assert one.records == array_record_module.ArrayRecordReader(str(folder / "one")).num_records()


def test_conversations_are_never_packed_by_a_packing_that_cuts(tmp_path):
    conversation = Document(np.array([1, 2, 3]), ends=np.array([3]))
    pair = Document(np.array([1, 2, 3]), segment_lengths=np.array([2, 1]))
    for document in (conversation, pair):
        for method in ("concat", "best_fit"):
            with pytest.raises(ValueError, match=f"cannot be packed by '{method}', .*pack them by 'whole'"):
                _write(tmp_path / "x", [document], method)
    assert not list(tmp_path.iterdir())


def test_keys_tell_documents_apart_by_their_parts():
    tokens = np.array([1, 2, 3])
    documents = [
        Document(tokens),
        Document(tokens, segment_lengths=np.array([1, 2])),
        Document(tokens, segment_lengths=np.array([2, 1])),
        Document(tokens, ends=np.array([1, 2])),
        Document(tokens[:0], left_out="equal sides"),
        Document(tokens[:0], left_out="no turn"),
    ]
    assert len({packing.document_key(document, 0) for document in documents}) == len(documents)


def test_the_manifest_counts_what_is_missing_and_old_manifests_stay_as_they_were(tmp_path):
    documents = [
        Document(np.zeros(20, int)),
        Document(np.zeros(20, int), ends=np.array([7])),
        Document(np.zeros(3, int)),
    ]
    shards = tuple(_write(tmp_path / name, documents, "whole") for name in ("a", "b"))
    columns = packing.columns_for(10, LENGTH, "whole")
    manifest = packing.Manifest("task", "train", LENGTH, 10, "f00d", 0, columns, shards, {}, method="whole")
    manifest.save(tmp_path)
    assert packing.Manifest.load(tmp_path) == manifest and manifest.packing == "whole"
    assert manifest.truncated == {"cut at the end of a turn": {"documents": 2, "tokens": 26}}
    assert manifest.left_out == {"longer than 12 tokens": {"documents": 2, "tokens": 40}}
    # The identity of data that was packed before there was anything to count.
    shard = packing.Shard("a", 2, 10, 9, 3, 40, 100)
    columns = packing.columns_for(600, 8)
    old = packing.Manifest("task", "train", 8, 600, "f00d", 0, columns, (shard,), {"files": 1})
    assert old.fingerprint == "e927712953939921d8f234a4411b5e13dbbdc2a7ef8764455a5f1cff9d877b94"
