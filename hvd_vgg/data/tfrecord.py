"""The TFRecord format: framing and checksums, and the two features of a tf.train.Example that are used."""

import itertools
import os
import re
import stat
import struct
import zlib
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple, Union

import crc32c

from hvd_vgg import storage
from hvd_vgg.errors import DATA, Failure

HEADER_BYTES, FOOTER_BYTES = 12, 4  # a record: its length, the length's checksum, the data, the data's checksum
IMAGE, LABEL = b"image/encoded", b"image/class/label"
EXPECTED_FEATURES = "Expected a tf.train.Example with image/encoded (one JPEG or PNG) and image/class/label (one integer)"
_LABEL_LIMIT = 2**31  # the index holds int32
_STRETCH_BYTES = 2**20  # read at once to find where zeros begin and end
# How files begin that are often put in place of TFRecords, what they are, and what to do.
_DECOMPRESS = "Training reads records by their offsets: write it plain, with tf.io.TFRecordWriter(path) without options"
_FOREIGN = (
    (b"\x1f\x8b", "compressed with gzip", f"{_DECOMPRESS}, or by gzip -dc"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", _DECOMPRESS),
    (b"BZh", "compressed with bzip2", _DECOMPRESS),
    (b"\xfd7zXZ", "compressed with xz", _DECOMPRESS),
    (b"\x04\x22\x4d\x18", "compressed with lz4", _DECOMPRESS),
    (b"PK\x03\x04", "a ZIP archive", "Unpack it"),
    (b"version https://git-lfs", "a pointer of Git LFS", "Fetch the file itself with git lfs pull"),
    (b"<", "a web page or XML", "Download the shard again"),
)
Span = Tuple[int, int]  # start and stop within the bytes of a record


def data_failure(message: str) -> Failure:
    """Returns a Failure(DATA); all messages about a data set begin alike."""
    return Failure(DATA, f"data: {message}")


def unreadable_file(path: Path, error: OSError) -> Failure:
    """Returns the Failure(DATA) of a file or directory that the operating system refuses to read."""
    return data_failure(f"{path} cannot be read: {error.strerror}. Expected a file that this user may read")


def regular_file_size(path: Path, status: os.stat_result) -> int:
    """Returns a regular file's size in bytes. Raises Failure(DATA) for anything else: a FIFO would block its reader."""
    if not stat.S_ISREG(status.st_mode):
        kinds = {"d": "a directory", "p": "a FIFO", "s": "a socket", "c": "a device", "b": "a device"}
        kind = kinds.get(stat.filemode(status.st_mode)[0], "of an unknown kind")
        raise data_failure(f"{path} is {kind}; expected a regular file or a link to one: move it away")
    return status.st_size


class OpenShard:
    """A file open for reading, closed with its last reference.

    A reader holds a reference while it reads, since another thread may evict the file from the cache of open shards, or
    open the same file at the same moment and have its own cached instead.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle = storage.retrying(path, self._open)
        status = os.fstat(self.handle)
        self.size, self._modified = regular_file_size(path, status), status.st_mtime_ns

    def _open(self) -> int:
        return os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)  # opening a FIFO would wait for its writer

    def _reopen(self) -> None:
        """Opens the file anew behind the same handle, with which other threads may be reading.

        Raises Failure(DATA) where it has become another. Not by its inode: FUSE file systems may number them anew.
        """
        handle = self._open()
        try:
            status = os.fstat(handle)
            if (status.st_size, status.st_mtime_ns) != (self.size, self._modified):
                raise data_failure(
                    f"{self.path} was replaced, rewritten or cut off while in use: it had {self.size} bytes when it was "
                    f"opened, and has {status.st_size} and another time of modification. Restore it as it was, then start "
                    f"again; other data is another run, in another --run_dir"
                )
            os.dup2(handle, self.handle, inheritable=False)
        finally:
            os.close(handle)

    def read(self, count: int, offset: int) -> bytes:
        """Returns `count` bytes at `offset`, or fewer at the end of the file; repeats and raises as `storage.retrying`."""
        return storage.retrying(self.path, lambda: storage.pread_all(self.handle, count, offset), self._reopen)

    def zeros_around(self, offset: int) -> str:
        """Returns `zeros from offset A to B` for the stretch around the zero at `offset`."""
        first, end = offset, offset
        while first > 0:
            part = self.read(min(first, _STRETCH_BYTES), max(0, first - _STRETCH_BYTES))
            first -= len(part) - len(part.rstrip(b"\0"))
            if part.strip(b"\0"):
                break
        while end < self.size:
            part = self.read(_STRETCH_BYTES, end)
            end += len(part) - len(part.lstrip(b"\0"))
            if part.strip(b"\0") or not part:
                break
        return f"zeros from offset {first} to " + (f"the end at {end}" if end == self.size else f"{end}")

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            os.close(self.handle)


def foreign_content(head: bytes) -> Optional[Tuple[str, str]]:
    """Returns what a file is that begins with `head` and is not a TFRecord file, and what to do; None if unknown."""
    for magic, what, fix in _FOREIGN:
        if head.startswith(magic):
            return what, fix
    if len(head) > 1 and head[0] == 0x78 and (head[0] << 8 | head[1]) % 31 == 0:  # RFC 1950, 2.2
        try:
            zlib.decompressobj().decompress(head)
        except zlib.error:
            return None
        return "compressed with zlib", _DECOMPRESS
    return None


def masked_crc(data: Union[bytes, memoryview]) -> int:
    """Returns the checksum that TFRecord files hold: CRC-32C, rotated and offset (tensorflow/core/lib/hash/crc32c.h)."""
    crc = crc32c.crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def record_header(length: int) -> bytes:
    """Returns the header of a record of `length` bytes of data."""
    header = struct.pack("<Q", length)
    return header + struct.pack("<I", masked_crc(header))


def describe_damage(file: OpenShard, offset: int, found: bytes) -> str:
    """Returns what is wrong with a record's data at `offset`, followed by their checksum; "" where the checksum holds."""
    length = len(found) - FOOTER_BYTES
    computed, (stored,) = masked_crc(memoryview(found)[:length]), struct.unpack_from("<I", found, length)
    if computed == stored:
        return ""
    text = f"the checksum of its {length} bytes of data is {computed:08x}, the file says {stored:08x}: damaged"
    zeros = re.search(rb"\0{64}", found)  # no data of an image have so many
    return f"{text}, with {file.zeros_around(offset + zeros.start())}" if zeros else text


# The wire format of protocol buffers: https://protobuf.dev/programming-guides/encoding/. An Example holds Features (field
# 1), a map (field 1) whose entries are a name (field 1) and a Feature (field 2), which holds a BytesList (field 1), a
# FloatList (2) or an Int64List (3), each with `value` (field 1). protobuf's own parser needs TensorFlow, copies the image
# once more, and takes a hundred times a malicious record's size of memory.
_FIELD_1, _FIELD_2, _FIELD_3 = 0x0A, 0x12, 0x1A  # tags of length-delimited fields: number << 3 | 2
_INTEGER_1 = 0x08  # the tag of field 1 where it holds one integer
_FIXED_BYTES = {1: 8, 5: 4}  # by wire type


def parse_features(data: bytes, length: int) -> Tuple[bytes, int]:
    """Returns (encoded image, label) of the Example data[:length]; raises ValueError saying what is wrong with it."""
    image, label = _find_features(data, length, IMAGE, LABEL)
    values = list(itertools.islice(_nested_fields(data, *image, _FIELD_1, _FIELD_1), 2))  # there may be millions
    if len(values) != 1 or values[0][0] == values[0][1]:
        raise ValueError(f"feature {IMAGE.decode()} must hold one byte string that is not empty")
    return data[slice(*values[0])], _parse_label(data, label)


def parse_label(data: bytes) -> int:
    """Returns the label of an Example, which need not have an image; raises ValueError saying what is wrong with it."""
    return _parse_label(data, _find_features(data, len(data), LABEL)[0])


def _parse_label(data: bytes, feature: Span) -> int:
    values = list(itertools.islice(_integers(data, feature), 2))
    if len(values) != 1:
        raise ValueError(f"feature {LABEL.decode()} holds {'several integers' if values else 'no integer'}; expected one")
    if not -_LABEL_LIMIT <= values[0] < _LABEL_LIMIT:
        raise ValueError(f"feature {LABEL.decode()} is {values[0]}")
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
                name = data[first : min(last, first + 64)]
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
