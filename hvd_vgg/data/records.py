"""What the data set is: TFRecord shards, the index of their records, and reading one record.

A TFRecord file is a row of: length (uint64, little-endian), masked CRC-32C of the length (uint32), the data, masked
CRC-32C of the data (uint32). The data is a tf.train.Example; of it only two features are looked at:
`image/encoded` (one byte string) and `image/class/label` (one integer).
"""

import contextlib
import functools
import itertools
import os
import re
import resource
import stat
import struct
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Sequence, Tuple, Union

import crc32c
import numpy as np

from hvd_vgg.run import watch
from hvd_vgg.run.health import DATA, Failure

HEADER_BYTES, FOOTER_BYTES = 12, 4
IMAGE, LABEL = b"image/encoded", b"image/class/label"

# Labels of any honest file fit far within; what does not would not fit the index.
_LABEL_LIMIT = 2**31
_SHARD_NAME = re.compile(r"(?P<split>[a-z]+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})")
# A record that claims more is refused before it is read: several times what the largest photographs take.
MAX_RECORD_BYTES = 64 * 2**20

# How far behind a header, or before the end of a record, the label is looked for before the record is walked through.
_AHEAD_BYTES = 512
# The map entry of a label of one byte or two, as every writer of Examples lays it out; a match is a shortcut to what
# `read_label` would find, and is held against it when the record is read whole.
_LABEL_PATTERN = re.compile(
    rb"\n(?:\x1a\n\x11image/class/label\x12\x05\x1a\x03\n\x01([\x00-\x7f])"
    rb"|\x1b\n\x11image/class/label\x12\x06\x1a\x04\n\x02([\x80-\xff][\x01-\x7f]))"
)

# Reads `count` bytes at an offset of a record's data; fewer at its end.
ReadAt = Callable[[int, int], bytes]


class BadRecord(Failure):
    """One record that cannot be used, while others of its file may be whole: `reason` says what is wrong with it."""

    def __init__(self, where: str, reason: str, advice: str) -> None:
        super().__init__(DATA, f"data: {where}: {reason}. {advice}")
        self.reason = reason


class Shard(NamedTuple):
    """The records of one file: where each one's data begins, its length in bytes, its label as written."""

    offsets: np.ndarray  # int64 [n]
    lengths: np.ndarray  # uint32 [n]
    labels: np.ndarray  # int32 [n]


class Cached(NamedTuple):
    """A shard as it was when it was indexed, and whether the file is the same since: by its size and time."""

    shard: Shard
    unchanged: bool


class Index(NamedTuple):
    """All records of a split in the order of the shards' names: record id i is entry i. 16 bytes a record."""

    paths: Tuple[Path, ...]
    starts: np.ndarray  # int64 [shards + 1]: the first record id of each shard, and the total
    offsets: np.ndarray  # int64 [records]
    lengths: np.ndarray  # uint32 [records]
    labels: np.ndarray  # int32 [records], as written in the files

    @property
    def records(self) -> int:
        """The number of records of the split."""
        return int(self.starts[-1])

    def where(self, record: int) -> str:
        """Returns a record's place as people look for it: file, number in the file (from 0), offset of its header."""
        shard = int(np.searchsorted(self.starts, record, side="right")) - 1
        offset = int(self.offsets[record]) - HEADER_BYTES
        return f"{self.paths[shard]}, record {record - int(self.starts[shard])}, offset {offset}"


def _masked_crc(data: Union[bytes, memoryview]) -> int:
    """Returns the checksum as TFRecord files hold it: CRC-32C, rotated and shifted (tensorflow/core/lib/hash/crc32c.h)."""
    plain = crc32c.crc32c(data)
    return ((plain >> 15 | plain << 17) + 0xA282EAD8) & 0xFFFFFFFF


def find_shards(data_dir: str, split: str) -> List[Path]:
    """Returns the shards `split`-?????-of-????? of a complete set, in order of number.

    Raises Failure(DATA) when the directory, the set, or a member of it is missing.
    """
    folder = Path(data_dir)
    try:
        if not folder.is_dir():
            raise Failure(
                DATA,
                f"data: {folder} is not a directory (now in {Path.cwd()}); expected TFRecords {split}-?????-of-????? in "
                f"it. Give another by --data_dir, or draw some to try: hvd-vgg make-demo-data",
            )
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise _unreadable(folder, error) from error
    matches = [match for match in map(_SHARD_NAME.fullmatch, names) if match]
    mine = [match for match in matches if match["split"] == split]
    if not mine:
        seen = sorted({match["split"] for match in matches}) or [ascii(name) for name in names[:5]]
        raise Failure(
            DATA,
            f"data: {folder} has no shard {split}-?????-of-?????; it has {', '.join(seen) or 'nothing'}. "
            f"Expected ImageNet's layout, such as {split}-00000-of-01024",
        )
    counts = sorted({int(match["count"]) for match in mine})
    if len(counts) > 1:
        raise Failure(DATA, f"data: {folder} mixes {split} sets of {counts} shards; expected one set: move the others away")
    found = {int(match["number"]) for match in mine}
    missing = [f"{split}-{i:05d}-of-{counts[0]:05d}" for i in range(counts[0]) if i not in found]
    if missing:
        raise Failure(
            DATA,
            f"data: {folder} lacks {len(missing)} of the {counts[0]} {split} shards: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}. Copy them there, or name a directory that has all",
        )
    extra = sorted(number for number in found if number >= counts[0])
    if extra:
        raise Failure(DATA, f"data: {folder} has {split} shards {extra[:5]} beyond {counts[0] - 1}, the last of the set")
    return [folder / match[0] for match in mine]


def shard_bytes(paths: Sequence[Path]) -> Dict[str, int]:
    """Returns the size of each shard by name; raises Failure(DATA) where one is no regular file or cannot be looked at."""
    try:
        return {path.name: _size(path, path.stat()) for path in paths}
    except OSError as error:
        raise _unreadable(Path(str(error.filename)), error) from error


def _size(path: Path, status: os.stat_result) -> int:
    """Returns a regular file's size in bytes; Failure(DATA) for all else, of which some would keep a reader waiting."""
    if not stat.S_ISREG(status.st_mode):
        kinds = {"d": "a directory", "p": "a FIFO", "s": "a socket", "c": "a device", "b": "a device"}
        kind = kinds.get(stat.filemode(status.st_mode)[0], "something else")
        raise Failure(DATA, f"data: {path} is {kind}; expected a regular file, or a link to one: move it away")
    return status.st_size


def scan_shard(path: Path) -> Shard:
    """Returns the index of one shard from its records' headers and labels, without reading the images.

    Raises Failure(DATA) naming the record when the file is empty, cut off or cannot be read, a header's checksum is wrong,
    or there is not exactly one label.
    """
    try:
        file = _OpenFile(path)
        return _scan(path, file.handle, os.fstat(file.handle).st_size)
    except OSError as error:
        raise _unreadable(path, error) from error


def _scan(path: Path, handle: int, size: int) -> Shard:
    if size == 0:
        raise Failure(DATA, f"data: {path} is empty (0 bytes); expected at least one record. Copy the shard again")
    offsets: List[int] = []
    lengths: List[int] = []
    labels: List[int] = []
    at, pread, unpack, search = 0, os.pread, struct.Struct("<QI").unpack_from, _LABEL_PATTERN.search
    while at < size:
        if not len(offsets) % 4096:
            watch.beat(phase="start")
        # One read of the header and what is behind it; records are far apart, so more would be the image.
        head = pread(handle, HEADER_BYTES + _AHEAD_BYTES, at)
        if len(head) < HEADER_BYTES:
            raise _cut_off(path, len(offsets), at, f"a header of {HEADER_BYTES} bytes", size)
        length, crc = unpack(head)
        if crc != _masked_crc(head[:8]):
            raise Failure(
                DATA,
                f"data: {path}, record {len(offsets)}, offset {at}: the checksum of the record's length is wrong "
                f"(not a TFRecord file, or damaged). Copy the shard again",
            )
        start, end = at + HEADER_BYTES, at + HEADER_BYTES + length
        if end + FOOTER_BYTES > size:
            raise _cut_off(path, len(offsets), at, f"{length} bytes of data and a checksum", size)
        if length > MAX_RECORD_BYTES:
            raise Failure(
                DATA,
                f"data: {path}, record {len(offsets)}, offset {at}: it claims {length} bytes of data; expected at most "
                f"{MAX_RECORD_BYTES}, one image. Leave the record out",
            )
        found = search(head, HEADER_BYTES, min(len(head), HEADER_BYTES + length))
        if not found and length > _AHEAD_BYTES:
            found = search(pread(handle, min(length, _AHEAD_BYTES), max(start, end - _AHEAD_BYTES)))
        if found:
            low, high = found[1] or found[2][:1], found[2] or b"\0\0"
            labels.append(low[0] & 0x7F | high[1] << 7)
        else:
            labels.append(_scan_label(path, len(offsets), handle, start, length))
        offsets.append(start)
        lengths.append(length)
        at = end + FOOTER_BYTES
    return Shard(np.array(offsets, np.int64), np.array(lengths, np.uint32), np.array(labels, np.int32))


def _scan_label(path: Path, number: int, handle: int, start: int, length: int) -> int:
    try:
        return read_label(_Window(handle, start, length).read_at, length)
    except ValueError as error:
        raise Failure(
            DATA,
            f"data: {path}, record {number}, offset {start - HEADER_BYTES}: {error}. Expected a tf.train.Example with "
            f"{LABEL.decode()} (one integer) and {IMAGE.decode()} (one JPEG or PNG)",
        ) from error


def _cut_off(path: Path, record: int, at: int, expected: str, size: int) -> Failure:
    return Failure(
        DATA,
        f"data: {path}, record {record}, offset {at}: expected {expected}, but the file ends at byte {size} "
        f"(cut off while copying?). Copy the shard again",
    )


def _unreadable(path: Path, error: OSError) -> Failure:
    return Failure(DATA, f"data: {path} cannot be read: {error.strerror}. Expected a file that this user may read")


class _Window:
    """Reads parts of one record's data from its file, some ahead: all but the image often comes with one read."""

    def __init__(self, handle: int, offset: int, length: int) -> None:
        self.handle, self.offset, self.length = handle, offset, length
        self.start, self.held = 0, b""

    def read_at(self, at: int, count: int) -> bytes:
        low, stop = at - self.start, min(at + count, self.length)
        if low < 0 or stop > self.start + len(self.held):
            ahead = min(max(count, _AHEAD_BYTES), self.length - at)
            self.start, self.held, low = at, os.pread(self.handle, ahead, self.offset + at), 0
        return self.held[low : low + count]


def join(paths: Sequence[Path], shards: Sequence[Shard]) -> Index:
    """Returns the index of a split from those of its shards."""
    starts = np.concatenate([[0], np.cumsum([len(shard.offsets) for shard in shards])]).astype(np.int64)
    columns = [np.concatenate(column) for column in zip(*shards)]
    return Index(tuple(paths), starts, columns[0], columns[1], columns[2])


def split_index(index: Index) -> List[Shard]:
    """Returns the shards' parts of an index: the inverse of `join`."""
    bounds = list(zip(index.starts[:-1].tolist(), index.starts[1:].tolist()))
    return [Shard(index.offsets[a:b], index.lengths[a:b], index.labels[a:b]) for a, b in bounds]


def find_label_base(labels: np.ndarray, num_classes: int) -> int:
    """Returns the label of the first class, 0 or 1, from all labels of a data set.

    ImageNet's own files count classes from 1 and keep 0 for background, so a data set that never uses 0 counts from 1.
    """
    return 0 if labels.min() == 0 and labels.max() < num_classes else 1


def check_labels(index: Index, label_base: int, num_classes: int) -> None:
    """Raises Failure(DATA) naming the first record whose label is outside label_base .. label_base + num_classes - 1."""
    outside = (index.labels < label_base) | (index.labels >= label_base + num_classes)
    if outside.any():
        record = int(np.argmax(outside))
        raise Failure(
            DATA,
            f"data: {index.where(record)}: label {index.labels[record]} is outside {label_base}.."
            f"{label_base + num_classes - 1} ({int(outside.sum())} of {index.records} records are). Labels found: "
            f"{index.labels.min()}..{index.labels.max()}; expected --num_classes={num_classes} classes from "
            f"--label_base={label_base}: correct the flag that is wrong",
        )


class _OpenFile:
    """A file open for reading, closed when nobody holds it any more.

    A reader holds it while it reads: another thread may drop it from the cache, or may have opened the same file at the
    same moment and be the one whose file is kept.
    """

    def __init__(self, path: Path) -> None:
        self.handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # or a FIFO would wait for who writes it
        _size(path, os.fstat(self.handle))

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            os.close(self.handle)


def _most_open() -> int:
    """Returns how many shards may be open at once: half of the files that this process may have; ImageNet has 1024."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 4096 if files == resource.RLIM_INFINITY else max(64, min(files // 2, 4096))


_open = functools.lru_cache(maxsize=_most_open())(_OpenFile)


def read_ahead(index: Index, ids: np.ndarray) -> None:
    """Asks the kernel to read the records `ids` into its page cache, in the order of the files, and does not wait for them.

    A hint: where it cannot be given, or the file is gone, reading the record is what will say so.
    """
    ids = np.sort(ids)
    shards = np.searchsorted(index.starts, ids, side="right") - 1
    # Records that follow each other in a file are asked for as one stretch of it.
    cuts = np.flatnonzero((np.diff(ids) > 1) | (np.diff(shards) > 0)) + 1
    for first, last in zip([0, *cuts.tolist()], [*cuts.tolist(), len(ids)]):
        begin = int(index.offsets[ids[first]])
        end = int(index.offsets[ids[last - 1]]) + int(index.lengths[ids[last - 1]]) + FOOTER_BYTES
        with contextlib.suppress(OSError, AttributeError):  # some systems have no posix_fadvise
            os.posix_fadvise(_open(index.paths[shards[first]]).handle, begin, end - begin, os.POSIX_FADV_WILLNEED)


def read_record(index: Index, record: int) -> bytes:
    """Returns the data of one record and, not to copy it, the 4 bytes of checksum behind it; any thread may call.

    Raises BadRecord naming file, record and offset, and Failure(DATA) where the file cannot be read at all.
    """
    shard = int(np.searchsorted(index.starts, record, side="right")) - 1
    length, offset = int(index.lengths[record]), int(index.offsets[record])
    try:
        file = _open(index.paths[shard])
        found = os.pread(file.handle, length + FOOTER_BYTES, offset)
    except OSError as error:
        raise Failure(DATA, f"data: {index.where(record)}: cannot be read: {error.strerror}") from error
    if len(found) < length + FOOTER_BYTES:
        raise BadRecord(
            index.where(record),
            f"expected {length} bytes of data and a checksum, found {len(found)} bytes: the shard became shorter since it "
            f"was indexed",
            "Copy it again",
        )
    expected = _masked_crc(memoryview(found)[:length])
    (written,) = struct.unpack_from("<I", found, length)
    if written != expected:
        raise BadRecord(
            index.where(record),
            f"the checksum of its {length} bytes of data is {expected:08x}, the file says {written:08x}: damaged",
            "Copy the shard again",
        )
    return found


def write_records(path: Path, index: Index, ids: Sequence[int]) -> None:
    """Writes the records `ids` as they lie in their shards, in this order, as one TFRecord file, and puts it on disk.

    Raises OSError, and Failure(DATA) where a record cannot be read.
    """
    with open(path, "wb") as file:
        for record in ids:
            length = struct.pack("<Q", int(index.lengths[record]))
            file.write(length + struct.pack("<I", _masked_crc(length)) + read_record(index, record))
        file.flush()
        os.fsync(file.fileno())


def parse_example(index: Index, record: int, data: bytes) -> Tuple[bytes, int]:
    """Returns (encoded image, label as written) of what `read_record` returned; BadRecord naming what is missing."""

    def read_at(at: int, count: int) -> bytes:
        return data[at : at + count]

    try:
        image, label = _find_features(read_at, int(index.lengths[record]), (IMAGE, LABEL))
        return _image(read_at, image), _label(read_at, label)
    except ValueError as error:
        raise BadRecord(
            index.where(record),
            str(error),
            f"Expected a tf.train.Example with {IMAGE.decode()} (one JPEG or PNG) and {LABEL.decode()} (one integer)",
        ) from error


# The wire format of protocol buffers: https://protobuf.dev/programming-guides/encoding/. An Example holds Features (field
# 1), which holds a map (field 1) of name (field 1) to Feature (field 2), which holds one of BytesList (field 1), FloatList
# (2) and Int64List (3), each with `value` (field 1). Walking it costs a few short reads a record and never touches the
# image; protobuf's own parser would need all of the data, and TensorFlow.

_MAP_HEADER_BYTES = 64  # more than tags, lengths and a name that we look for take


def read_label(read_at: ReadAt, length: int) -> int:
    """Returns the single integer of `image/class/label`; raises ValueError saying what is wrong."""
    return _label(read_at, _find_features(read_at, length, (LABEL,))[0])


def _label(read_at: ReadAt, span: Tuple[int, int]) -> int:
    values = _int64_values(read_at(span[0], min(span[1] - span[0], 256)))
    if len(values) != 1:
        raise ValueError(f"feature {LABEL.decode()} has {len(values)} integers")
    if not -_LABEL_LIMIT <= values[0] < _LABEL_LIMIT:
        raise ValueError(f"feature {LABEL.decode()} is {values[0]}")
    return values[0]


def _image(read_at: ReadAt, span: Tuple[int, int]) -> bytes:
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


def _find_features(read_at: ReadAt, length: int, names: Tuple[bytes, ...]) -> List[Tuple[int, int]]:
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


def load_cache(path: Path, paths: Sequence[Path]) -> Dict[Path, Cached]:
    """Returns what the cache in the file `path` knows of the shards `paths`; a damaged cache is as good as none.

    A shard is unchanged while its size and time of modification are.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as cache:
            names, stamps = cache["names"].tolist(), cache["stamps"].tolist()
            index = Index(tuple(paths), cache["starts"], cache["offsets"], cache["lengths"], cache["labels"])
        shards = {name: (stamp, shard) for name, stamp, shard in zip(names, stamps, split_index(index))}
        known = {each: shards[each.name] for each in paths if each.name in shards}
        return {each: Cached(_checked(shard, stamp[0]), stamp == _stamp(each)) for each, (stamp, shard) in known.items()}
    except Exception:  # damaged bytes make the readers of zip files and of arrays raise a dozen kinds
        return {}


def _checked(shard: Shard, size: int) -> Shard:
    """Returns a shard that was read from a cache; ValueError unless it is one that `scan_shard` can make of `size` bytes."""
    dtypes = [column.dtype for column in shard]
    if dtypes != [np.int64, np.uint32, np.int32] or not 0 < len(shard.offsets) == len(shard.lengths) == len(shard.labels):
        raise ValueError("not an index")
    starts = shard.offsets - HEADER_BYTES
    ends = shard.offsets + shard.lengths + FOOTER_BYTES
    if starts[0] != 0 or (starts[1:] != ends[:-1]).any() or ends[-1] != size or shard.lengths.max() > MAX_RECORD_BYTES:
        raise ValueError("not an index")
    return shard


def save_cache(path: Path, index: Index) -> None:
    """Writes `index` for `load_cache`; raises OSError where the place cannot be written."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(
                file,
                names=np.array([each.name for each in index.paths]),
                stamps=np.array([_stamp(each) for each in index.paths], np.int64),
                starts=index.starts,
                offsets=index.offsets,
                lengths=index.lengths,
                labels=index.labels,
            )
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _stamp(path: Path) -> List[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
