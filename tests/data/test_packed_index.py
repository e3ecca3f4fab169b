"""Records found and decoded by the index of a packed shard, against the library of the format."""

import hashlib

import pytest
from array_record.python import array_record_module
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.data.packed_index import PackedIndex, decode_record, record_offsets
from qwen_jax.data.packing import WRITER_OPTIONS


def write(path, records, options=WRITER_OPTIONS):
    writer = array_record_module.ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()
    return path


def record(seed: bytes, size: int, repeated: bool) -> bytes:
    """Bytes that compress well or not at all."""
    return (seed or b"a") * size if repeated else hashlib.shake_128(seed).digest(size)


# Some reach over several blocks of 64 KiB.
SIZES = st.integers(1, 3000) | st.integers(60_000, 150_000)
RECORDS = st.lists(st.builds(record, st.binary(max_size=2), SIZES, st.booleans()), min_size=1, max_size=8)


@settings(max_examples=25, deadline=None)
@given(records=RECORDS, options=st.sampled_from([WRITER_OPTIONS, "group_size:1,uncompressed"]))
def test_each_record_is_one_range_of_the_file(tmp_path_factory, records, options):
    path = write(tmp_path_factory.mktemp("index") / "shard", records, options)
    index, data = PackedIndex.of_file(path), path.read_bytes()
    chunks = [data[slice(*index.span(number))] for number in range(len(records))]
    assert [decode_record(chunk, index.span(number)[0]) for number, chunk in enumerate(chunks)] == records
    assert not any(index.is_damaged(number, chunk) for number, chunk in enumerate(chunks))
    assert index.is_damaged(0, chunks[0][:-1] + bytes([chunks[0][-1] ^ 1]))
    saved = index.to_bytes()
    assert PackedIndex.from_bytes(saved, hashlib.sha256(saved).hexdigest()).to_bytes() == saved


def test_what_is_not_the_file_of_an_index_is_refused(tmp_path):
    saved = PackedIndex.of_file(write(tmp_path / "a", [b"a", b"b"])).to_bytes()
    with pytest.raises(ValueError, match="not the checksum of the manifest"):
        PackedIndex.from_bytes(saved[:-1], hashlib.sha256(saved).hexdigest())
    with pytest.raises(ValueError, match="chunks of several records"):
        PackedIndex.of_file(write(tmp_path / "b", [b"a", b"b"], "group_size:2"))
    for content in (b"", b"x" * 70_000, bytes(1 << 16)):
        with pytest.raises(ValueError):
            record_offsets(lambda start, stop, content=content: content[start:stop], len(content))
