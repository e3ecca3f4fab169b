"""TFRecord files of `tf.train.Example`, the layout of SeqIO's cache, without TensorFlow.

Importing TensorFlow takes longer than tokenizing ten million tokens, and its Python interface handles examples one
value at a time. The formats are public: https://www.tensorflow.org/tutorials/load_data/tfrecord and
https://protobuf.dev/programming-guides/encoding.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import google_crc32c
import numpy as np

# Feature to its value: an array of numbers, bytes, or an array or list of bytes.
Example = Mapping[str, Any]

_LENGTH, _CHECKSUM = struct.Struct("<Q"), struct.Struct("<I")
_MASK_DELTA, _UINT32 = 0xA282EAD8, 0xFFFFFFFF
# Wire types of protocol buffers.
_VARINT, _SIXTY_FOUR, _BYTES, _THIRTY_TWO = 0, 1, 2, 5
# Fields of tf.train.Feature.
_BYTES_LIST, _FLOAT_LIST, _INT64_LIST = 1, 2, 3


def write_record(file: BinaryIO, record: bytes) -> None:
    """Appends one record to a TFRecord file."""
    length = _LENGTH.pack(len(record))
    file.write(b"".join((length, _masked_checksum(length), record, _masked_checksum(record))))


def read_records(file: BinaryIO) -> Iterator[bytes]:
    """The records of a TFRecord file that is opened for reading.

    Raises:
        ValueError: the file is cut off, or a checksum does not fit.
    """
    place = 0
    while header := file.read(12):
        length = int.from_bytes(header[:8], "little")
        if len(header) < 12 or _masked_checksum(header[:8]) != header[8:]:
            raise ValueError(f"the length of the record at byte {place} is damaged")
        record, checksum = file.read(length), file.read(4)
        if len(record) < length or _masked_checksum(record) != checksum:
            raise ValueError(f"the record at byte {place} is damaged or cut off")
        yield record
        place += 16 + length


def _masked_checksum(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return _CHECKSUM.pack((((crc >> 15) | (crc << 17)) + _MASK_DELTA) & _UINT32)


def encode_example(example: Example) -> bytes:
    """A serialized `tf.train.Example`, its features in the order of their names.

    Raises:
        ValueError: a value is neither numbers nor bytes.
    """
    features = b"".join(_field(1, _entry(name, example[name])) for name in sorted(example))
    return _field(1, features)


def _entry(name: str, value: Any) -> bytes:
    return _field(1, name.encode()) + _field(2, _feature(name, value))


def _feature(name: str, value: Any) -> bytes:
    if isinstance(value, bytes):
        return _field(_BYTES_LIST, _field(1, value))
    array = np.asarray(value)
    if array.dtype.kind in "biu":
        packed = encode_varints(array.ravel())
        return _field(_INT64_LIST, _field(1, packed) if packed else b"")
    if array.dtype.kind == "f":
        packed = array.ravel().astype("<f4").tobytes()
        return _field(_FLOAT_LIST, _field(1, packed) if packed else b"")
    texts = array.ravel().tolist()
    if array.dtype.kind in "SO" and all(isinstance(text, bytes) for text in texts):
        return _field(_BYTES_LIST, b"".join(_field(1, text) for text in texts))
    raise ValueError(f"the feature {name!r} is {type(value).__name__} of {array.dtype}: expected numbers or strings")


def _field(number: int, data: bytes) -> bytes:
    return b"".join((bytes([number << 3 | _BYTES]), _varint(len(data)), data))


def _varint(value: int) -> bytes:
    digits = bytearray()
    while value >= 128:
        digits.append(value & 127 | 128)
        value >>= 7
    digits.append(value)
    return bytes(digits)


def encode_varints(values: np.ndarray) -> bytes:
    """Integers [n] of any dtype as varints of their 64 bits in two's complement, one after the other."""
    if not len(values):
        return b""
    numbers = values.astype(np.int64, copy=False).view(np.uint64)
    largest = int(numbers.max())
    if largest < 1 << 32:
        numbers = numbers.astype(np.uint32)
    width = max(1, -(-largest.bit_length() // 7))
    digits = np.empty((len(numbers), width), np.uint8)
    used = np.empty((len(numbers), width), bool)
    for place in range(width):
        rest = numbers >> numbers.dtype.type(7 * place)
        used[:, place] = rest > 0
        digits[:, place] = rest & numbers.dtype.type(127)
    used[:, 0] = True
    digits[:, :-1] |= used[:, 1:].astype(np.uint8) << 7
    return digits[used].tobytes()


def decode_varints(data: bytes) -> np.ndarray:
    """The integers of varints, int64 [n].

    Raises:
        ValueError: the last one is cut off, or one is too long.
    """
    digits = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(digits < 128)
    if len(digits) and (not len(ends) or ends[-1] != len(digits) - 1):
        raise ValueError("a number is cut off")
    starts = np.empty_like(ends)
    if len(ends):
        starts[0], starts[1:] = 0, ends[:-1] + 1
    lengths = ends - starts
    width = int(lengths.max(initial=-1)) + 1
    if width > 10:
        raise ValueError("a number has more than 10 bytes")
    padded = np.concatenate([digits, np.zeros(width, np.uint8)]) & 127
    numbers = np.zeros(len(ends), np.uint64)
    for place in range(width):
        digit = padded[starts + place]
        digit[lengths < place] = 0
        numbers |= digit.astype(np.uint64) << np.uint64(7 * place)
    return numbers.view(np.int64)


def decode_example(record: bytes) -> dict[str, np.ndarray | list[bytes]]:
    """The features of a serialized `tf.train.Example`: int64 or float32 [n], or a list of bytes.

    Raises:
        ValueError: it is none.
    """
    found: dict[str, np.ndarray | list[bytes]] = {}
    try:
        for features in _messages(record, 1):
            for entry in _messages(features, 1):
                (name,), value = _messages(entry, 1), [*_messages(entry, 2), b""][0]
                found[name.decode()] = _values(value)
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"not a serialized tf.train.Example: {error}") from error
    return found


def _values(feature: bytes) -> np.ndarray | list[bytes]:
    for number, _, content in _fields(feature):
        if number == _BYTES_LIST:
            return _messages(content, 1)
        wire_fields = list(_fields(content))
        if number == _INT64_LIST:
            parts = [_varint(one) if wire == _VARINT else one for _, wire, one in wire_fields]
            return decode_varints(b"".join(parts))
        if number == _FLOAT_LIST:
            return np.frombuffer(b"".join(one for _, _, one in wire_fields), "<f4")
    return np.zeros(0, np.int64)


def _messages(data: bytes, wanted: int) -> list[bytes]:
    return [content for number, wire, content in _fields(data) if number == wanted and wire == _BYTES]


def _fields(data: bytes) -> Iterator[tuple[int, int, Any]]:
    """(number, wire type, content) of the fields of a message: an int for varints, else bytes."""
    place = 0
    while place < len(data):
        tag, place = _read_varint(data, place)
        wire = tag & 7
        if wire == _VARINT:
            content, place = _read_varint(data, place)
        else:
            if wire == _BYTES:
                length, place = _read_varint(data, place)
            elif wire in (_SIXTY_FOUR, _THIRTY_TWO):
                length = 8 if wire == _SIXTY_FOUR else 4
            else:
                raise ValueError(f"not a serialized tf.train.Example: wire type {wire}")
            content, place = data[place : place + length], place + length
            if place > len(data):
                raise ValueError("not a serialized tf.train.Example: it is cut off")
        yield tag >> 3, wire, content


def _read_varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7


def shape_of(value: Any) -> dict[str, Any]:
    """The entry of a feature in SeqIO's info file: its dtype, and its shape with an open first axis."""
    array = np.asarray(value, object) if isinstance(value, bytes) else np.asarray(value)
    shape: Sequence[int | None] = [None, *array.shape[1:]] if array.ndim else []
    return {"dtype": "string" if array.dtype.kind in "SO" else array.dtype.name, "shape": list(shape)}


def restore(example: Mapping[str, np.ndarray | list[bytes]], features: Mapping[str, Mapping[str, Any]]) -> Example:
    """The example that was written.

    Args:
        example: as `decode_example` gives it.
        features: name to dtype and shape, from SeqIO's info file.

    Raises:
        ValueError: a feature is missing, or has not this shape.
    """
    restored = {}
    for name, feature in features.items():
        if name not in example:
            raise ValueError(f"the feature {name!r} is missing")
        value, shape = example[name], [-1, *feature["shape"][1:]] if feature["shape"] else []
        if isinstance(value, list):
            array = np.empty(len(value), object)
            array[:] = value
            restored[name] = array.reshape(shape) if shape else bytes(array.reshape(()).item())
        else:
            restored[name] = value.astype(feature["dtype"], copy=False).reshape(shape)
    return restored
