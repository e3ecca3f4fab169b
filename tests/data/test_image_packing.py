"""Packing of documents with pictures: none is cut or lost, and a batch has those of its rows in order."""

import dataclasses
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qwen_jax.data import packing
from qwen_jax.data.images import pixels
from qwen_jax.data.loader import ExampleLoader
from qwen_jax.data.pack_cache import _from_bytes, _to_bytes, document_of
from qwen_jax.data.packers import Document, fit, padded, whole
from qwen_jax.models.vision.config import PIXEL_DEVIATION, PIXEL_MEAN

EOS, BEGIN, END, PAD = 9, 10, 11, 12
LENGTH, QUERIES, MOST = 24, 3, 3


def document(*pieces: int | bytes, loss: bool = True, ends: bool = False) -> Document:
    """So many tokens of text, and pictures; with `ends` it may be cut before and after each text."""
    tokens, weights, spans, images, cuts = [], [], [], [], []
    for piece in pieces:
        if isinstance(piece, int):
            tokens, weights = tokens + [len(images) + 1] * piece, weights + [int(loss)] * piece
            cuts.append(len(tokens))
            continue
        spans.append([len(tokens), len(tokens) + QUERIES + 2])
        tokens, weights = [*tokens, BEGIN, *[PAD] * QUERIES, END], weights + [0] * (QUERIES + 2)
        images.append(piece)
    return Document(
        np.array(tokens, np.int32),
        np.array(weights, np.uint8),
        ends=np.array(cuts) if ends else None,
        images=tuple(images),
        image_spans=np.array(spans, np.int32) if spans else None,
    )


@st.composite
def _documents(draw) -> list[Document]:
    pieces = st.lists(st.one_of(st.integers(1, 6), st.binary(min_size=1, max_size=9)), min_size=1, max_size=7)
    return [document(*draw(pieces), ends=draw(st.booleans())) for _ in range(draw(st.integers(0, 10)))]


@given(documents=_documents(), packer=st.sampled_from([whole, padded]))
def test_every_picture_is_in_one_row_with_all_its_places_or_counted(documents, packer):
    fitted = fit(documents, LENGTH, MOST)
    rows = list(packer(fitted.documents, sequence_length=LENGTH, eos_id=EOS, images_per_row=MOST))
    for row in rows:
        tokens, images = row["tokens"], row.get("images", [])
        starts = np.flatnonzero(tokens == BEGIN)
        assert len(starts) == (tokens == END).sum() == len(images) <= MOST
        for start in starts:
            assert (tokens[start + 1 : start + 1 + QUERIES] == PAD).all() and tokens[start + 1 + QUERIES] == END
            assert len(set(row["segment_ids"][start : start + QUERIES + 2])) == 1
            assert not row["loss_weights"][start : start + QUERIES + 2].any()
    # In the order of the text, within each document.
    placed = sorted(_runs_of_images(row) for row in rows)
    assert sorted(sum(placed, [])) == sorted([one.images for one in fitted.documents if one.images])
    kept = iter(fitted.documents)
    for one in documents:
        ends = [] if one.ends is None else [end for end in one.ends if end <= LENGTH and one.may_end(end)]
        if len(one.images) > MOST or (len(one.tokens) > LENGTH and not ends):
            continue
        here = next(kept)
        assert here.images == one.images[: (here.tokens == BEGIN).sum()]
        np.testing.assert_array_equal(here.tokens, one.tokens[: len(here.tokens)])
    assert next(kept, None) is None
    counted = sum(entry["documents"] for entry in fitted.left_out.values())
    assert len(fitted.documents) + counted == len(documents)


def _runs_of_images(row) -> list[tuple[bytes, ...]]:
    """The pictures of each segment of a row that has any, the row's pictures being in the order of its text."""
    images, found = iter(row.get("images", [])), []
    for segment in range(1, row["segment_ids"].max() + 1):
        count = ((row["tokens"] == BEGIN) & (row["segment_ids"] == segment)).sum()
        if count:
            found.append(tuple(next(images) for _ in range(count)))
    return found


def test_a_row_is_closed_when_its_pictures_are_as_many_as_it_may_have():
    documents = [document(b"a", 1), document(b"b", 1), document(b"c", 1), document(1), document(b"d", b"e", 1)]
    rows = list(whole(documents, sequence_length=64, eos_id=EOS, images_per_row=2))
    assert sorted(len(row.get("images", [])) for row in rows) == [1, 2, 2]
    assert sorted(image for row in rows for image in row["images"]) == [b"a", b"b", b"c", b"d", b"e"]
    # Without a limit on pictures there is one row.
    (row,) = whole(documents, sequence_length=64, eos_id=EOS, images_per_row=5)
    assert len(row["images"]) == 5


def test_too_many_pictures_are_counted_by_reason_and_a_cut_takes_its_pictures_along():
    fitted = fit([document(b"a", b"b", 2), document(b"a", 2), document(2)], LENGTH, 1)
    assert fitted.left_out == {"more than 1 images (IMAGES_PER_ROW)": {"documents": 1, "tokens": 12}}
    assert [one.images for one in fitted.documents] == [(b"a",), ()]
    (cut,) = fit([document(b"a", 3, b"b", 6, b"c", 6, ends=True)], LENGTH, 3).documents
    assert cut.images == (b"a", b"b") and cut.image_spans.tolist() == [[0, 5], [8, 13]] and len(cut.tokens) == 19
    # An end inside of a picture is none.
    inside = dataclasses.replace(document(b"a", 3, b"b", 20), ends=np.array([8, 10]))
    (cut,) = fit([inside], LENGTH, 3).documents
    assert cut.images == (b"a",) and len(cut.tokens) == 8


def test_text_is_packed_as_it_was_without_pictures():
    random = np.random.default_rng(0)
    texts = [Document(random.integers(0, 8, size)) for size in random.integers(1, LENGTH, 60)]
    without = list(whole(texts, sequence_length=LENGTH, eos_id=EOS))
    beside = list(whole(texts, sequence_length=LENGTH, eos_id=EOS, images_per_row=4))
    for one, other in zip(without, beside, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    for method in ("concat", "best_fit"):
        with pytest.raises(ValueError, match=f"documents with pictures cannot be packed by '{method}'"):
            packing._terminate_all([document(b"a", 3)], method, EOS)


@given(images=st.lists(st.binary(max_size=40), max_size=5))
def test_encoded_pictures_come_back_from_a_record(images):
    assert packing.split_images(packing.join_images(images)) == images
    made = document(3, *images, 2)
    again = _from_bytes(*_to_bytes(made))
    assert again.images == made.images and packing.document_key(again, 0) == packing.document_key(made, 0)
    if images and images[0]:
        other = dataclasses.replace(made, images=(images[0] + b"x", *made.images[1:]))
        assert packing.document_key(other, 0) != packing.document_key(made, 0)
    damaged = packing.join_images(images) + b"x"
    with pytest.raises(ValueError, match="another size than they say"):
        packing.split_images(damaged)


def example(tokens, images=(), weights=None):
    weights = np.zeros(len(tokens), np.int32) if weights is None else np.array(weights)
    return {"targets": np.array(tokens, np.int32), "images": np.array(images, object), "loss_weights": weights}


@pytest.mark.parametrize(
    ("tokens", "images", "message"),
    [
        ([1, BEGIN, PAD, END], [], "0 picture.s., 1 times <img> and 1 times </img>"),
        ([1, BEGIN, PAD, END], [b"a", b"b"], "2 picture.s., 1 times <img>"),
        ([BEGIN, PAD, PAD], [b"a"], "1 times <img> and 0 times </img>"),
        ([END, PAD, BEGIN], [b"a"], "in the order of the text"),
        ([BEGIN, BEGIN, PAD, END, END], [b"a", b"b"], "in the order of the text"),
    ],
)
def test_tokens_and_pictures_that_do_not_fit_are_refused_by_name(tokens, images, message):
    with pytest.raises(ValueError, match=f"task paired yields an example with .*{message}"):
        document_of(example(tokens, images), "paired", (BEGIN, END))


def test_pictures_carry_no_loss_and_have_equally_many_places():
    good = document_of(example([1, BEGIN, PAD, END, 2], [b"a"], [0, 0, 0, 0, 1]), "paired", (BEGIN, END))
    assert good.image_spans.tolist() == [[1, 4]] and good.images == (b"a",)
    with pytest.raises(ValueError, match="'loss_weights' must be 0 from <img> to </img>"):
        document_of(example([1, BEGIN, PAD, END, 2], [b"a"], [0, 0, 0, 1, 1]), "paired", (BEGIN, END))
    with pytest.raises(ValueError, match="pictures have 1 and 3 places for features"):
        packing._image_tokens([good, document(b"b")])


def png(color, size=(5, 4)) -> bytes:
    """A picture of one color, with a dot."""
    image = Image.new("RGB", size, color)
    image.putpixel((1, 1), (255, 255, 255))
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return encoded.getvalue()


def write_packed(folder, documents: list[Document], method="whole", split="train", task="pictured", most=MOST) -> None:
    """Packed examples without SeqIO: a manifest and one shard."""
    target = packing.packed_folder(folder, task, LENGTH, split, method, most)
    columns = packing.columns_for(600, LENGTH, method, most)
    shard = packing.write_shard(
        target / "part-0",
        [(packing.document_key(one, 0), one) for one in documents],
        sequence_length=LENGTH,
        eos_id=EOS,
        columns=columns,
        token_bytes=np.array([3] * 9 + [0] * 600),
        method=method,
        images_per_row=most,
    )
    shape = (LENGTH, 600, "f00d", 0, columns, (shard,), {})
    packing.Manifest(task, split, *shape, method=method, images_per_row=most or None).save(target)


def test_a_batch_has_the_pictures_of_its_rows_decoded_and_zeros_elsewhere(tmp_path):
    colors = [(20 * n, 255 - 20 * n, 7) for n in range(9)]
    documents = [document(2, png(color), 3) for color in colors] + [
        document(7),
        document(png((0, 0, 9)), png((9, 0, 0))),
    ]
    write_packed(tmp_path, documents)
    where = dict(cache_dir=tmp_path, sequence_length=LENGTH, packing="whole", images_per_row=MOST, image_size=8)
    loader = ExampleLoader("pictured", **where)
    manifest = loader.manifests["pictured"]
    assert (manifest.images, manifest.image_tokens, loader.image_tokens) == (11, QUERIES, QUERIES)
    assert manifest.text_tokens == manifest.tokens - 11 * (QUERIES + 2) == 9 * 5 + 7
    assert loader.bytes_per_token == 3.0
    batch = loader.read(0, len(loader))
    column = loader.columns[-1]
    assert (column.name, column.dtype, column.shape) == ("images", "uint8", (MOST, 8, 8, 3))
    assert batch["images"].shape == (len(loader), *column.shape) and batch["images"].dtype == np.uint8
    held = [(batch["tokens"][row] == BEGIN).sum() for row in range(len(loader))]
    assert sum(held) == 11 and max(held) > 1
    wanted = sorted(pixels(Image.open(io.BytesIO(image)), 8).tobytes() for one in documents for image in one.images)
    found = []
    for row, count in enumerate(held):
        floats = (batch["images"][row, :count].astype(np.float32) / 255 - np.float32(PIXEL_MEAN)) / np.float32(
            PIXEL_DEVIATION
        )
        found += [image.tobytes() for image in floats]
        assert not batch["images"][row, count:].any()
    assert sorted(found) == wanted
    part = loader.read(1, 3)
    for name, array in part.items():
        np.testing.assert_array_equal(array, batch[name][1:3])
    by_workers = ExampleLoader("pictured", **where, image_workers=2).read(0, len(loader))
    np.testing.assert_array_equal(by_workers["images"], batch["images"])
    with pytest.raises(FileNotFoundError, match="--packing=whole --images_per_row=2`"):
        ExampleLoader("local_files", **{**where, "images_per_row": 2})


def test_text_alone_has_no_column_and_may_lie_beside_pictures(tmp_path):
    texts = [document(5), document(9)]
    write_packed(tmp_path, texts)
    where = dict(cache_dir=tmp_path, sequence_length=LENGTH, packing="whole")
    beside = ExampleLoader("pictured", **where, images_per_row=MOST, image_size=8).read(0, 2)
    assert not beside["images"].any()
    write_packed(tmp_path, texts, most=0)
    alone = ExampleLoader("pictured", **where)
    assert "images" not in alone.read(0, 2) and [column.name for column in alone.columns][-1] == "positions"
    assert alone.manifests["pictured"].images_per_row is None


def test_a_damaged_picture_is_named(tmp_path):
    write_packed(tmp_path, [document(2, png((1, 2, 3))[:40], 3)])
    loader = ExampleLoader(
        "pictured", cache_dir=tmp_path, sequence_length=LENGTH, packing="whole", images_per_row=MOST, image_size=8
    )
    with pytest.raises(OSError, match="a picture of pictured train .* is damaged .*: leave it out of the files"):
        loader.read(0, 1)
