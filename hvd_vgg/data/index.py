"""The index of a split: its shards, the place and label of every record, and the cache of these on disk."""

import io
import re
import struct
import uuid
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import numpy as np

from hvd_vgg import storage
from hvd_vgg.data.tfrecord import (
    EXPECTED_FEATURES,
    FOOTER_BYTES,
    HEADER_BYTES,
    OpenShard,
    data_failure,
    describe_damage,
    foreign_content,
    masked_crc,
    parse_label,
    regular_file_size,
    unreadable_file,
)
from hvd_vgg.errors import Failure
from hvd_vgg.text import plural
from hvd_vgg.watchdog import watchdog

_SHARD_NAME = re.compile(r"(?P<split>[a-z]+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})")
# A record that claims more is refused before it is read: several times the size of the largest photographs.
MAX_RECORD_BYTES = 64 * 2**20
# A label is searched for in this much of a record's beginning and end before the whole record is read.
_SEARCH_BYTES = 512
# The name and Feature of a label of one byte (0..127) or two, packed or not: what writers of Examples produce. A match is a
# shortcut to what `parse_label` would find; reading the record whole verifies it.
_LABEL_ENTRY = re.compile(
    rb"\n\x11image/class/label\x12(?:(?:\x05\x1a\x03\n\x01|\x04\x1a\x02\x08)([\x00-\x7f])"
    rb"|(?:\x06\x1a\x04\n\x02|\x05\x1a\x03\x08)([\x80-\xff][\x01-\x7f]))"
)


class Shard(NamedTuple):
    """The records of one file: where the data of each begins, its length in bytes, its label as stored."""

    offsets: np.ndarray  # int64 [n]
    lengths: np.ndarray  # uint32 [n]
    labels: np.ndarray  # int32 [n]


class Cached(NamedTuple):
    """A shard as it was when it was indexed, and whether the file is unchanged, by its size and time of modification."""

    shard: Shard
    unchanged: bool


class Index(NamedTuple):
    """All records of a split, in the order of its shards' names: entry i is record id i. 16 bytes a record."""

    paths: Tuple[Path, ...]
    starts: np.ndarray  # int64 [shards + 1]: the first record id of each shard, and the total
    offsets: np.ndarray  # int64 [records]
    lengths: np.ndarray  # uint32 [records]
    labels: np.ndarray  # int32 [records], as stored in the files

    @property
    def records(self) -> int:
        """The number of records of the split."""
        return int(self.starts[-1])

    def where(self, record: int) -> str:
        """Returns a record's place for messages: file, number in the file (from 0), offset of its header in bytes."""
        shard = int(np.searchsorted(self.starts, record, side="right")) - 1
        return _place(self.paths[shard], record - int(self.starts[shard]), int(self.offsets[record]) - HEADER_BYTES)


def _place(path: Path, number: int, offset: int) -> str:
    return f"{path}, record {number}, offset {offset}"


def find_shards(data_dir: str, split: str) -> List[Path]:
    """Returns the shards `split`-?????-of-????? of a complete set, in order of number.

    Raises Failure(DATA) where the directory, the set, or a member of it is missing, or a shard is of another set.
    """
    folder = Path(data_dir)
    try:
        if not storage.retrying(folder, folder.is_dir):
            raise data_failure(
                f"{folder} is not a directory (now in {Path.cwd()}); expected TFRecords {split}-?????-of-????? in it. Name "
                f"another with --data_dir, or draw a data set to try: hvd-vgg make-demo-data"
            )
        names = storage.retrying(folder, lambda: sorted(path.name for path in folder.iterdir()))
    except OSError as error:
        raise unreadable_file(folder, error) from error
    matches = [match for match in map(_SHARD_NAME.fullmatch, names) if match]
    shards = {match[0]: int(match["count"]) for match in matches if match["split"] == split}
    if not shards:
        others = sorted({match["split"] for match in matches}) or list(map(ascii, names))
        raise data_failure(
            f"{folder} has no shard {split}-?????-of-?????; it has {_list(others) or 'nothing'}. Expected ImageNet's "
            f"layout, such as {split}-00000-of-01024"
        )
    ((count, _),) = Counter(shards.values()).most_common(1)
    expected = [f"{split}-{number:05d}-of-{count:05d}" for number in range(count)]
    others, missing = sorted(set(shards).difference(expected)), [name for name in expected if name not in shards]
    if others:
        raise data_failure(
            f"{folder} has shards that are none of its {count} {split} shards: {_list(others)}. Move them away"
        )
    if missing:
        raise data_failure(
            f"{folder} lacks {len(missing)} of its {count} {split} shards: {_list(missing)}. Copy them there, or name a "
            f"directory that has them all"
        )
    return [folder / name for name in expected]


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def shard_bytes(paths: Sequence[Path]) -> Dict[str, int]:
    """Returns each shard's size in bytes, by name; raises Failure(DATA) for one that is missing or not a regular file."""
    try:
        return {path.name: regular_file_size(path, storage.retrying(path, path.stat)) for path in paths}
    except OSError as error:
        raise unreadable_file(Path(str(error.filename)), error) from error


def scan_shard(path: Path) -> Shard:
    """Returns the index of one shard from its records' headers and labels, nearly always without reading the images.

    Raises Failure(DATA) naming the record where the file is empty, cut off or unreadable, a header's checksum is wrong, or
    a record has anything but one label.
    """
    try:
        return _scan(OpenShard(path))
    except OSError as error:
        raise unreadable_file(path, error) from error


def _scan(file: OpenShard) -> Shard:
    path, size = file.path, file.size
    if size == 0:
        raise data_failure(
            f"{path} is empty (0 bytes); expected at least one record. Copy the shard again; if it was written so, since "
            f"there were more shards than records, write fewer shards, or remove it and number the others anew"
        )
    records: List[Tuple[int, int, int]] = []
    start, unpack = 0, struct.Struct("<QI").unpack_from

    def failure(reason: str) -> Failure:
        return data_failure(f"{_place(path, len(records), start)}: {reason}")

    def cut_off(expected: str) -> Failure:
        return failure(
            f"expected {expected}, but the file ends at byte {size} (cut off while copying?). Copy the shard again"
        )

    while start < size:
        if not len(records) % 4096:
            watchdog.heartbeat(phase="start")
        # One read for the header and what follows it. No more of it: records are far apart, and the rest is the image.
        head = file.read(HEADER_BYTES + _SEARCH_BYTES, start)
        if head and not head[:HEADER_BYTES].strip(b"\0"):
            raise failure(
                f"{file.zeros_around(start)} of {size} bytes, where a record was expected (a copy that was cut off after "
                f"its space was reserved, or a hole in it). Copy the shard again"
            )
        if len(head) < HEADER_BYTES:
            raise cut_off(f"a header of {HEADER_BYTES} bytes")
        length, checksum = unpack(head)
        if checksum != masked_crc(head[:8]):
            foreign = None if start else foreign_content(head)
            if foreign:
                raise data_failure(f"{path} is {foreign[0]}; expected a plain TFRecord file. {foreign[1]}")
            raise failure(
                "the checksum of the record's length is wrong (not a TFRecord file, or damaged). Copy the shard again"
            )
        end = start + HEADER_BYTES + length + FOOTER_BYTES
        if end > size:
            raise cut_off(f"{length} bytes of data and a checksum")
        if length > MAX_RECORD_BYTES:
            limit = f"expected at most {MAX_RECORD_BYTES}, one image"
            raise failure(f"it claims {length} bytes of data; {limit}. Leave the record out")
        try:
            label = _find_label(head, file, start + HEADER_BYTES, length)
        except ValueError as error:
            damage = describe_damage(file, start + HEADER_BYTES, file.read(length + FOOTER_BYTES, start + HEADER_BYTES))
            raise failure(f"{damage}. Copy the shard again" if damage else f"{error}. {EXPECTED_FEATURES}") from error
        records.append((start + HEADER_BYTES, length, label))
        start = end
    offsets, lengths, labels = np.array(records, np.int64).T
    return Shard(np.ascontiguousarray(offsets), lengths.astype(np.uint32), labels.astype(np.int32))


def _find_label(head: bytes, file: OpenShard, offset: int, length: int) -> int:
    """Returns the label of the record of `length` bytes at `offset`, whose header and first bytes are `head`."""
    found = _LABEL_ENTRY.search(head, HEADER_BYTES, HEADER_BYTES + length)
    if not found and length > _SEARCH_BYTES:
        found = _LABEL_ENTRY.search(file.read(_SEARCH_BYTES, offset + length - _SEARCH_BYTES))
    if not found:
        return parse_label(file.read(length, offset))
    low, high = found[1] or found[2][:1], found[2] or b"\0\0"
    return low[0] & 0x7F | high[1] << 7


def scan_split(data_dir: str, split: str) -> Index:
    """Returns the index of a split, scanned by this process alone; raises Failure(DATA) as its parts do."""
    paths = find_shards(data_dir, split)
    return join(paths, [scan_shard(path) for path in paths])


def join(paths: Sequence[Path], shards: Sequence[Shard]) -> Index:
    """Returns the index of a split from the indexes of its shards, at least one."""
    starts = np.concatenate([[0], np.cumsum([len(shard.offsets) for shard in shards])]).astype(np.int64)
    return Index(tuple(paths), starts, *(np.concatenate(column) for column in zip(*shards)))


def split_index(index: Index) -> List[Shard]:
    """Returns the shards' parts of an index: the inverse of `join`."""
    bounds = list(zip(index.starts[:-1].tolist(), index.starts[1:].tolist()))
    return [Shard(*(column[low:high] for column in index[2:])) for low, high in bounds]


def find_label_base(labels: np.ndarray, num_classes: int) -> int:
    """Returns the label of the first class, 0 or 1, from all labels of a data set.

    ImageNet's own files count classes from 1 and keep 0 for background, so a data set that never uses 0 counts from 1.
    """
    return 0 if labels.min() == 0 and labels.max() < num_classes else 1


def unseen_labels(train: Index, validation: Index) -> str:
    """Returns what to say of labels in validation that never occur in train, on which a network always fails; or ""."""
    own, seen = np.unique(validation.labels), np.unique(train.labels)
    unseen = np.setdiff1d(own, seen)
    if not len(unseen):
        return ""
    records = int(np.isin(validation.labels, unseen).sum())
    text = f"validation has {plural(len(unseen), 'label')} that train never has: {_list(list(map(str, unseen)))}"
    if unseen.max() < seen.min():
        text = f"the splits begin at different labels, train at {seen[0]} and validation at {own[0]}; {text}"
    return f"{text} ({records} of {validation.records} records)"


def check_labels(index: Index, label_base: int, num_classes: int) -> None:
    """Raises Failure(DATA) naming the first record whose label is outside label_base .. label_base + num_classes - 1."""
    outside = (index.labels < label_base) | (index.labels >= label_base + num_classes)
    if outside.any():
        record = int(np.argmax(outside))
        raise data_failure(
            f"{index.where(record)}: label {index.labels[record]} is outside {label_base}..{label_base + num_classes - 1} "
            f"({int(outside.sum())} of {index.records} records are). Labels found: {index.labels.min()}.."
            f"{index.labels.max()}; expected --num_classes={num_classes} classes from --label_base={label_base}: correct "
            f"the flag that is wrong"
        )


# The index on disk and between ranks is an .npz of its arrays, with the shards' names and stamps, or their numbers.


def cache_places(data_dir: str, split: str, fallback_dir: Path) -> List[Path]:
    """Returns the files that the index of a split may be cached in, in order of preference."""
    name = f".hvd_vgg_index_{split}.npz"
    return [Path(data_dir) / name, fallback_dir / name]


def cached_shards(places: Sequence[Path], paths: Sequence[Path]) -> Dict[int, Cached]:
    """Returns the cached shards by number, each from the first of `places` that has it as the file is now, or at all."""
    found: Dict[int, Cached] = {}
    for place in places:
        for number, cached in load_cache(place, paths).items():
            if number not in found or not found[number].unchanged:
                found[number] = cached
    return found


def load_cache(path: Path, paths: Sequence[Path]) -> Dict[int, Cached]:
    """Returns what the cache `path` has of the shards `paths`, by number: nothing where it is missing or damaged."""
    try:
        with np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False) as cache:
            known = dict(zip(cache["names"].tolist(), zip(_load_shards(cache), cache["stamps"].tolist())))
        found = {number: (*known[each.name], _stamp(each)) for number, each in enumerate(paths) if each.name in known}
        return {number: Cached(_validate(shard, old[0]), old == new) for number, (shard, old, new) in found.items()}
    except Exception:  # damaged bytes make the readers of zip files and of arrays raise a dozen kinds
        return {}


def _validate(shard: Shard, size: int) -> Shard:
    """Returns a cached shard; raises ValueError unless `scan_shard` could have made it of a file of `size` bytes."""
    starts, ends = shard.offsets - HEADER_BYTES, shard.offsets + shard.lengths + FOOTER_BYTES
    if not (
        [column.dtype for column in shard] == [np.int64, np.uint32, np.int32]
        and 0 < len(shard.offsets) == len(shard.lengths) == len(shard.labels)
        and starts[0] == 0
        and (starts[1:] == ends[:-1]).all()
        and ends[-1] == size
        and shard.lengths.max() <= MAX_RECORD_BYTES
    ):
        raise ValueError("not an index")
    return shard


def save_cache(path: Path, index: Index) -> None:
    """Writes `index` for `load_cache`; raises OSError where `path` cannot be written."""
    names, stamps = np.array([each.name for each in index.paths]), np.array([_stamp(each) for each in index.paths], np.int64)
    # Processes of two containers may have one number, and their hosts one name.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, names=names, stamps=stamps, **_arrays(index))
        storage.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _stamp(path: Path) -> List[int]:
    status = storage.retrying(path, path.stat)
    return [status.st_size, status.st_mtime_ns]


def pack_shards(shards: Dict[int, Shard]) -> bytes:
    """Returns shards by number as bytes, to be sent to other ranks."""
    file = io.BytesIO()
    if shards:
        np.savez(file, numbers=np.array(list(shards)), **_arrays(join([], list(shards.values()))))
    return file.getvalue()


def unpack_shards(data: bytes) -> Dict[int, Shard]:
    """Returns the shards that `pack_shards` made `data` of."""
    if not data:
        return {}
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return dict(zip(arrays["numbers"].tolist(), _load_shards(arrays)))


def _arrays(index: Index) -> Dict[str, np.ndarray]:
    return {name: getattr(index, name) for name in Index._fields[1:]}


def _load_shards(arrays: Any) -> List[Shard]:
    return split_index(Index((), *(arrays[name] for name in Index._fields[1:])))
