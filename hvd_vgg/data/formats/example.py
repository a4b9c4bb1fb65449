"""tf.train.Example on the wire: the image and the label that are read, and the records that are written."""

import functools
import itertools
from typing import Dict, Iterator, List, Mapping, NamedTuple, Tuple, Union

from hvd_vgg.config import MOST_FEATURE_BYTES

_LABEL_LIMIT = 2**31  # the index holds int32
_SHORT_BYTES = 2**12  # parts that are written are joined below this length; longer ones are not copied
Span = Tuple[int, int]  # start and stop within the bytes of a record


class Features(NamedTuple):
    """The names of the two features that are used, and of that which holds the file's name, where there is one."""

    image: bytes = b"image/encoded"
    label: bytes = b"image/class/label"
    filename: bytes = b"image/filename"

    @property
    def expected(self) -> str:
        """What a message says of the records that are expected."""
        image, label = (name.decode("utf-8", "replace") for name in self[:2])
        expected = f"Expected a tf.train.Example with {image} (one JPEG or PNG) and {label} (one integer)"
        return f"{expected}; --image_feature and --label_feature name others"


STANDARD = Features()


# The wire format of protocol buffers: https://protobuf.dev/programming-guides/encoding/. An Example holds Features (field
# 1), a map (field 1) whose entries are a name (field 1) and a Feature (field 2), which holds a BytesList (field 1), a
# FloatList (2) or an Int64List (3), each with `value` (field 1). protobuf's own parser needs TensorFlow, copies the image
# once more, and takes a hundred times a malicious record's size of memory.
_FIELD_1, _FIELD_2, _FIELD_3 = 0x0A, 0x12, 0x1A  # tags of length-delimited fields: number << 3 | 2
_INTEGER_1 = 0x08  # the tag of field 1 where it holds one integer
_FIXED_BYTES = {1: 8, 5: 4}  # by wire type


def parse_features(data: bytes, length: int, features: Features = STANDARD) -> Tuple[bytes, int]:
    """Returns (encoded image, label) of the Example data[:length]; raises ValueError saying what is wrong with it."""
    image, label = _find_features(data, length, features.image, features.label)
    values = list(itertools.islice(_nested_fields(data, *image, _FIELD_1, _FIELD_1), 2))  # there may be millions
    if len(values) != 1 or values[0][0] == values[0][1]:
        raise ValueError(f"feature {features.image.decode()} must hold one byte string that is not empty")
    return data[slice(*values[0])], _parse_label(data, label, features)


def parse_label(data: bytes, features: Features = STANDARD) -> int:
    """Returns the label of an Example, which need not have an image; raises ValueError saying what is wrong with it."""
    return _parse_label(data, _find_features(data, len(data), features.label)[0], features)


def parse_text(data: bytes, length: int, name: bytes) -> bytes:
    """Returns the first byte string of the feature `name` of the Example data[:length]; b"" where there is none."""
    try:
        (feature,) = _find_features(data, length, name)
        return next((data[slice(*value)] for value in _nested_fields(data, *feature, _FIELD_1, _FIELD_1)), b"")
    except ValueError:
        return b""


def _parse_label(data: bytes, feature: Span, features: Features) -> int:
    name = features.label.decode()
    values = list(itertools.islice(_integers(data, feature), 2))
    if len(values) != 1:
        raise ValueError(f"feature {name} holds {'several integers' if values else 'no integer'}; expected one")
    if not -_LABEL_LIMIT <= values[0] < _LABEL_LIMIT:
        raise ValueError(f"feature {name} is {values[0]}")
    return values[0]


def _find_features(data: bytes, length: int, *names: bytes) -> List[Span]:
    """Returns the spans of the Features called `names` in the Example data[:length]; of equal names the first counts.

    Raises ValueError saying which is missing, or why this is no Example.
    """
    spans: Dict[bytes, Span] = {}
    others: List[str] = []
    for start, stop in _nested_fields(data, 0, length, _FIELD_1, _FIELD_1):
        name, value = b"", (0, 0)
        for tag, first, last in _fields(data, start, stop):
            if tag == _FIELD_1:
                name = data[first : min(last, first + MOST_FEATURE_BYTES + 1)]
                if name not in names:
                    break  # writers put the name first: the values of most features are not even looked at
            elif tag == _FIELD_2:
                value = (first, last)
        if name in names and value[0]:
            spans.setdefault(name, value)
        if len(spans) == len(names):
            return [spans[name] for name in names]
        if len(others) < 20:  # there may be millions
            others.append(repr(name.decode("utf-8", "replace"))[1:-1])  # printable, whatever it holds
    missing = next(name for name in names if name not in spans)
    raise ValueError(f"feature {missing.decode()} is missing; it has {', '.join(others) or 'none'}")


def _integers(data: bytes, feature: Span) -> Iterator[int]:
    for start, stop in _nested_fields(data, *feature, _FIELD_3):
        for tag, first, last in _fields(data, start, stop):
            while tag in (_FIELD_1, _INTEGER_1) and first < last:  # several in one field (packed), or one
                value, first = _varint(data, first, last)
                yield value - 2**64 if value >= 2**63 else value


def _nested_fields(data: bytes, start: int, stop: int, *tags: int) -> Iterator[Span]:
    """Yields the spans of the fields with the last of `tags` in those with the one before it, from the outermost message."""
    for tag, first, last in _fields(data, start, stop):
        if tag == tags[0]:
            if len(tags) == 1:
                yield first, last
            else:
                yield from _nested_fields(data, first, last, *tags[1:])


def _fields(data: bytes, start: int, stop: int) -> Iterator[Tuple[int, int, int]]:
    """Yields the tag of each field of the message at [start, stop), and the start and stop of its value."""
    while start < stop:
        tag, start = _varint(data, start, stop)
        wire_type = tag & 7
        if wire_type == 2:
            length, start = _varint(data, start, stop)
            end = start + length
        elif wire_type == 0:
            end = _varint(data, start, stop)[1]
        elif wire_type in _FIXED_BYTES:
            end = start + _FIXED_BYTES[wire_type]
        else:
            raise ValueError(f"not a tf.train.Example (wire type {wire_type})")
        if end > stop:
            raise ValueError("not a tf.train.Example (a field is longer than the message that holds it)")
        yield tag, start, end
        start = end


def _varint(data: bytes, start: int, stop: int) -> Tuple[int, int]:
    """Returns (value, offset after it) of the variable-length integer at `start`."""
    value = shift = 0
    while start < stop and shift < 70:
        byte = data[start]
        start += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, start
        shift += 7
    raise ValueError("not a tf.train.Example (an integer is cut off or too long)")


def encode_example(features: Mapping[str, Union[int, bytes]]) -> bytes:
    """Returns a tf.train.Example of one integer or one byte string a feature, in order of their names.

    The same bytes as TensorFlow's SerializeToString(deterministic=True) of it.
    """
    return b"".join(example_parts(features))


def example_parts(features: Mapping[str, Union[int, bytes]]) -> List[bytes]:
    """Returns the bytes of `encode_example` in parts, of which the encoded image is one: it is not copied."""
    entries = (_field(_FIELD_1, _entry(name.encode(), features[name])) for name in sorted(features))
    parts: List[bytes] = []
    short: List[bytes] = []
    for part in _field(_FIELD_1, list(itertools.chain.from_iterable(entries))):
        if len(part) < _SHORT_BYTES:
            short.append(part)
        else:
            parts += b"".join(short), part
            short = []
    return [*parts, b"".join(short)]


def _entry(name: bytes, value: Union[int, bytes]) -> List[bytes]:
    if isinstance(value, bytes):
        feature = _field(_FIELD_1, _field(_FIELD_1, [value]))
    else:
        feature = _field(_FIELD_3, _field(_FIELD_1, [_encode_varint(value % 2**64)]))
    return [*_field(_FIELD_1, [name]), *_field(_FIELD_2, feature)]


def _field(tag: int, value: List[bytes]) -> List[bytes]:
    return [_field_header(tag, sum(map(len, value))), *value]


@functools.lru_cache(maxsize=1024)
def _field_header(tag: int, length: int) -> bytes:
    return bytes([tag]) + _encode_varint(length)


def _encode_varint(value: int) -> bytes:
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)
