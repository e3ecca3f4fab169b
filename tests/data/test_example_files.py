"""TFRecords of tf.train.Example without TensorFlow, against TensorFlow."""

import io

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.data.example_files import decode_example, encode_example, read_records, restore, shape_of, write_record

INTEGERS = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20)
VALUES = st.one_of(
    INTEGERS.map(lambda values: np.array(values, np.int64)),
    st.lists(st.integers(0, 151_850), max_size=20).map(lambda values: np.array(values, np.int32)),
    st.lists(st.floats(width=32, allow_nan=False), max_size=9).map(lambda values: np.array(values, np.float32)),
    st.binary(max_size=300),
    st.lists(st.binary(max_size=9), max_size=4).map(lambda values: np.array([*values, b""], object)[:-1]),
)


def protobuf(example) -> tf.train.Example:
    """What SeqIO makes of it."""
    features = {}
    for name, value in example.items():
        if isinstance(value, bytes):
            feature = tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
        elif value.dtype == object:
            feature = tf.train.Feature(bytes_list=tf.train.BytesList(value=value.tolist()))
        elif value.dtype == np.float32:
            feature = tf.train.Feature(float_list=tf.train.FloatList(value=value.tolist()))
        else:
            feature = tf.train.Feature(int64_list=tf.train.Int64List(value=value.tolist()))
        features[name] = feature
    return tf.train.Example(features=tf.train.Features(feature=features))


@given(st.dictionaries(st.text(max_size=5), VALUES, min_size=1, max_size=4))
def test_examples_are_those_of_protobuf(example):
    encoded = encode_example(example)
    assert tf.train.Example.FromString(encoded) == protobuf(example)
    restored = restore(decode_example(encoded), {name: shape_of(value) for name, value in example.items()})
    assert restored.keys() == example.keys()
    for name, value in example.items():
        np.testing.assert_array_equal(restored[name], value)
        assert isinstance(value, bytes) or restored[name].dtype == value.dtype


def test_numbers_that_are_not_packed_are_read():
    """Version 2 of protocol buffers writes them one by one."""
    feature = b"\x1a\x05\x08\x01\x08\xac\x02"
    entry = b"\x0a\x01a\x12" + bytes([len(feature)]) + feature
    features = b"\x0a" + bytes([len(entry)]) + entry
    record = b"\x0a" + bytes([len(features)]) + features
    assert tf.train.Example.FromString(record).features.feature["a"].int64_list.value == [1, 300]
    assert decode_example(record)["a"].tolist() == [1, 300]


def test_tensorflow_reads_what_is_written(tmp_path):
    records = [b"", b"one", bytes(range(256)) * 500]
    path = tmp_path / "file.tfrecord"
    with path.open("wb") as file:
        for record in records:
            write_record(file, record)
    assert list(tf.data.TFRecordDataset(str(path)).as_numpy_iterator()) == records
    with tf.io.TFRecordWriter(str(tmp_path / "theirs")) as writer:
        for record in records:
            writer.write(record)
    assert (tmp_path / "theirs").read_bytes() == path.read_bytes()
    with path.open("rb") as file:
        assert list(read_records(file)) == records


@pytest.mark.parametrize("place", [0, 9, 13, 17, -1])
def test_each_damaged_byte_is_found(place):
    file = io.BytesIO()
    for _ in range(2):
        write_record(file, b"record")
    damaged = bytearray(file.getvalue())
    damaged[place] ^= 1
    with pytest.raises(ValueError, match="damaged"):
        list(read_records(io.BytesIO(damaged)))
    with pytest.raises(ValueError, match="record at byte 22 is damaged or cut off"):
        list(read_records(io.BytesIO(file.getvalue()[:-1])))


@pytest.mark.parametrize("record", [b"\x0a\x05abc", b"\x0b", b"\x0a\x80", b"\x0a\x02\x0a\x09"])
def test_other_bytes_are_no_example(record):
    with pytest.raises(ValueError, match="not a serialized tf.train.Example"):
        decode_example(record)


def test_values_without_a_type_in_the_format_are_named():
    with pytest.raises(ValueError, match="feature 'a' is ndarray of complex"):
        encode_example({"a": np.zeros(2, complex)})
