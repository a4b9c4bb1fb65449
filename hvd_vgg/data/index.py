"""The index of a split: shards, scan, labels, and the cache of all of it."""

import os
import re
import struct
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence, Tuple

import numpy as np

from hvd_vgg.data.tfrecord import (
    FOOTER_BYTES,
    HEADER_BYTES,
    IMAGE,
    LABEL,
    OpenShard,
    masked_crc,
    read_label,
    regular_file_size,
    unreadable_file,
)
from hvd_vgg.errors import DATA, Failure
from hvd_vgg.watchdog import watchdog

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
        raise unreadable_file(folder, error) from error
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
        return {path.name: regular_file_size(path, path.stat()) for path in paths}
    except OSError as error:
        raise unreadable_file(Path(str(error.filename)), error) from error


def scan_shard(path: Path) -> Shard:
    """Returns the index of one shard from its records' headers and labels, without reading the images.

    Raises Failure(DATA) naming the record when the file is empty, cut off or cannot be read, a header's checksum is wrong,
    or there is not exactly one label.
    """
    try:
        file = OpenShard(path)
        return _scan(path, file.handle, os.fstat(file.handle).st_size)
    except OSError as error:
        raise unreadable_file(path, error) from error


def _scan(path: Path, handle: int, size: int) -> Shard:
    if size == 0:
        raise Failure(DATA, f"data: {path} is empty (0 bytes); expected at least one record. Copy the shard again")
    offsets: List[int] = []
    lengths: List[int] = []
    labels: List[int] = []
    at, pread, unpack, search = 0, os.pread, struct.Struct("<QI").unpack_from, _LABEL_PATTERN.search
    while at < size:
        if not len(offsets) % 4096:
            watchdog.heartbeat(phase="start")
        # One read of the header and what is behind it; records are far apart, so more would be the image.
        head = pread(handle, HEADER_BYTES + _AHEAD_BYTES, at)
        if len(head) < HEADER_BYTES:
            raise _cut_off(path, len(offsets), at, f"a header of {HEADER_BYTES} bytes", size)
        length, crc = unpack(head)
        if crc != masked_crc(head[:8]):
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
        return {
            each: Cached(_validate_shard(shard, stamp[0]), stamp == _stamp(each)) for each, (stamp, shard) in known.items()
        }
    except Exception:  # damaged bytes make the readers of zip files and of arrays raise a dozen kinds
        return {}


def _validate_shard(shard: Shard, size: int) -> Shard:
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
