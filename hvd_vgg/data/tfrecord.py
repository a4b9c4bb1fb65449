"""TFRecord framing, and the two features of a tf.train.Example that are read."""

import itertools
import os
import stat
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Tuple, Union

import crc32c

from hvd_vgg.errors import DATA, Failure

HEADER_BYTES, FOOTER_BYTES = 12, 4
IMAGE, LABEL = b"image/encoded", b"image/class/label"
# Labels of any honest file fit far within; what does not would not fit the index.
_LABEL_LIMIT = 2**31
# Reads `count` bytes at an offset of a record's data; fewer at its end.
ReadAt = Callable[[int, int], bytes]


def masked_crc(data: Union[bytes, memoryview]) -> int:
    """Returns the checksum as TFRecord files hold it: CRC-32C, rotated and shifted (tensorflow/core/lib/hash/crc32c.h)."""
    plain = crc32c.crc32c(data)
    return ((plain >> 15 | plain << 17) + 0xA282EAD8) & 0xFFFFFFFF


def regular_file_size(path: Path, status: os.stat_result) -> int:
    """Returns a regular file's size in bytes; Failure(DATA) for all else, of which some would keep a reader waiting."""
    if not stat.S_ISREG(status.st_mode):
        kinds = {"d": "a directory", "p": "a FIFO", "s": "a socket", "c": "a device", "b": "a device"}
        kind = kinds.get(stat.filemode(status.st_mode)[0], "something else")
        raise Failure(DATA, f"data: {path} is {kind}; expected a regular file, or a link to one: move it away")
    return status.st_size


def unreadable_file(path: Path, error: OSError) -> Failure:
    return Failure(DATA, f"data: {path} cannot be read: {error.strerror}. Expected a file that this user may read")


class OpenShard:
    """A file open for reading, closed when nobody holds it any more.

    A reader holds it while it reads: another thread may drop it from the cache, or may have opened the same file at the
    same moment and be the one whose file is kept.
    """

    def __init__(self, path: Path) -> None:
        self.handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # or a FIFO would wait for who writes it
        regular_file_size(path, os.fstat(self.handle))

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            os.close(self.handle)


# The wire format of protocol buffers: https://protobuf.dev/programming-guides/encoding/. An Example holds Features (field
# 1), which holds a map (field 1) of name (field 1) to Feature (field 2), which holds one of BytesList (field 1), FloatList
# (2) and Int64List (3), each with `value` (field 1). Walking it costs a few short reads a record and never touches the
# image; protobuf's own parser would need all of the data, and TensorFlow.

_MAP_HEADER_BYTES = 64  # more than tags, lengths and a name that we look for take


def read_label(read_at: ReadAt, length: int) -> int:
    """Returns the single integer of `image/class/label`; raises ValueError saying what is wrong."""
    return parse_label(read_at, find_features(read_at, length, (LABEL,))[0])


def parse_label(read_at: ReadAt, span: Tuple[int, int]) -> int:
    values = _int64_values(read_at(span[0], min(span[1] - span[0], 256)))
    if len(values) != 1:
        raise ValueError(f"feature {LABEL.decode()} has {len(values)} integers")
    if not -_LABEL_LIMIT <= values[0] < _LABEL_LIMIT:
        raise ValueError(f"feature {LABEL.decode()} is {values[0]}")
    return values[0]


def parse_image(read_at: ReadAt, span: Tuple[int, int]) -> bytes:
    """Returns the single byte string of the Feature at `span`; raises ValueError saying what is wrong."""
    start, stop = span
    each = (
        part
        for kind in _fields(read_at, start, stop)
        if kind[0] == 1
        for part in _fields(read_at, kind[1], kind[2])
        if part[0] == 1
    )
    values = list(itertools.islice(each, 2))  # no more: there may be millions
    if len(values) != 1 or values[0][1] == values[0][2]:
        raise ValueError(f"feature {IMAGE.decode()} has not one byte string, or an empty one")
    return read_at(values[0][1], values[0][2] - values[0][1])


def find_features(read_at: ReadAt, length: int, names: Tuple[bytes, ...]) -> List[Tuple[int, int]]:
    """Returns [start, stop) of the Features called `names`, each the first of its name; ValueError when one is missing."""
    spans: Dict[bytes, Tuple[int, int]] = {}
    seen: List[str] = []  # a few, printable
    for number, features, features_end in _fields(read_at, 0, length):
        if number != 1:
            continue
        for entry_number, entry, entry_end in _fields(read_at, features, features_end):
            if entry_number != 1:
                continue
            # What comes first in an entry is its name: an entry of another name need not be looked at further.
            head = read_at(entry, _MAP_HEADER_BYTES)
            if len(head) > 1 and head[0] == 0x0A and head[1] < _MAP_HEADER_BYTES - 2 and entry + 2 + head[1] < entry_end:
                key = head[2 : 2 + head[1]]
                if key not in names:
                    _note(seen, key)
                    continue
            found = {n: (a, b) for n, a, b in _fields(read_at, entry, entry_end) if n in (1, 2)}
            key = read_at(found[1][0], min(found[1][1] - found[1][0], _MAP_HEADER_BYTES)) if 1 in found else b""
            if key in names and 2 in found:
                spans.setdefault(key, found[2])
                if len(spans) == len(names):
                    return [spans[name] for name in names]
            _note(seen, key)
    missing = next(name for name in names if name not in spans)
    raise ValueError(f"feature {missing.decode()} is missing; it has {', '.join(seen) or 'none'}")


def _note(seen: List[str], key: bytes) -> None:
    if len(seen) < 20:  # there may be millions
        seen.append(repr(key.decode("utf-8", "replace"))[1:-1])


def _fields(read_at: ReadAt, start: int, stop: int) -> Iterator[Tuple[int, int, int]]:
    """Yields (number, start, stop) of each length-delimited field of the message at [start, stop); skips others."""
    while start < stop:
        head = read_at(start, 20)
        if len(head) > 1 and head[0] < 0x80 and head[1] < 0x80:  # nearly always: 3 times as fast
            tag, length, used = head[0], head[1], 2
        else:
            tag, used = _varint(head, 0)
            length, used = _varint(head, used) if tag & 7 in (0, 2) else (0, used)
        kind = tag & 7
        if kind == 2:
            start += used
            if length > stop - start:
                raise ValueError("not a tf.train.Example (a field is longer than what holds it)")
            yield tag >> 3, start, start + length
            start += length
        elif kind == 0:
            start += used
        elif kind in (1, 5):
            start += _varint(head, 0)[1] + (8 if kind == 1 else 4)
        else:
            raise ValueError(f"not a tf.train.Example (wire type {kind})")


def _varint(data: bytes, at: int) -> Tuple[int, int]:
    """Returns (value, offset after it) of the variable-length integer at `at`."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("not a tf.train.Example (it ends inside a number)")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("not a tf.train.Example (a number is too long)")


def _int64_values(feature: bytes) -> List[int]:
    """Returns the integers of a Feature, packed or not; ValueError when it holds another kind."""
    values: List[int] = []

    def read_at(at: int, count: int) -> bytes:
        return feature[at : at + count]

    for number, start, stop in _fields(read_at, 0, len(feature)):
        if number != 3:
            raise ValueError(f"feature {LABEL.decode()} holds no integers")
        at = start
        while at < stop:
            tag, at = _varint(feature, at)
            if tag == 0x0A:  # packed
                end, at = _varint(feature, at)
                end += at
            elif tag == 0x08:  # one value
                end = at + 1
            else:
                raise ValueError(f"feature {LABEL.decode()} is no list of integers")
            while at < min(end, stop):
                value, at = _varint(feature, at)
                values.append(value - 2**64 if value >= 2**63 else value)
    return values
