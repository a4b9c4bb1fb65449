"""The index of a split: its shards, the place and label of every record, and the cache of these on disk."""

import hashlib
import io
import time
import uuid
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from hvd_vgg import storage
from hvd_vgg.data.formats import class_folders, tar, tfrecord
from hvd_vgg.data.formats.layout import FOLDERS, IMAGENET, WEBDATASET, Layout, find_shards, shorten
from hvd_vgg.data.formats.shard_file import (
    MAX_RECORD_BYTES,
    NO_RECORDS,
    OpenShard,
    Shard,
    data_failure,
    place,
    shown,
    unreadable_file,
)
from hvd_vgg.text import plural

_PLAIN = Layout(IMAGENET, Path())


class Cached(NamedTuple):
    """A shard as it was when it was indexed, and whether the file is unchanged, by its size and time of modification."""

    shard: Shard
    unchanged: bool


class Index(NamedTuple):
    """All records of a split, in the order of its shards' names: entry i is record id i. 16 bytes a record.

    With class directories a record's file is `names` from its offset to the next zero byte.
    """

    paths: Tuple[Path, ...]
    starts: np.ndarray  # int64 [shards + 1]: the first record id of each shard, and the total
    offsets: np.ndarray  # int64 [records]
    lengths: np.ndarray  # uint32 [records]
    labels: np.ndarray  # int32 [records], as stored in the files
    names: np.ndarray  # uint8 [bytes]
    layout: Layout

    @property
    def records(self) -> int:
        """The number of records of the split."""
        return int(self.starts[-1])

    def shard_of(self, record: int) -> int:
        """Returns the number of the shard that holds a record."""
        return int(np.searchsorted(self.starts, record, side="right")) - 1

    def path_of(self, record: int) -> Path:
        """Returns the file that holds a record."""
        path = self.paths[self.shard_of(record)]
        if self.layout.kind == FOLDERS:
            return path / class_folders.file_name(self.names, int(self.offsets[record]))
        return path

    def where(self, record: int) -> str:
        """Returns a record's place for messages: file, number in the file (from 0), offset in bytes of what precedes it."""
        if self.layout.kind == FOLDERS:
            return shown(self.path_of(record))
        shard, header = self.shard_of(record), _HEADER_BYTES[self.layout.kind == WEBDATASET]
        return place(self.paths[shard], record - int(self.starts[shard]), int(self.offsets[record]) - header)


_HEADER_BYTES = (tfrecord.HEADER_BYTES, tar.HEADER_BYTES)


def scan_shard(path: Path, layout: Layout = _PLAIN) -> Shard:
    """Returns the index of one shard, nearly always without reading the images.

    Raises Failure(DATA) naming the record where the file is empty, cut off, damaged or unreadable, or has anything but one
    label and, as far as that shows, one image.
    """
    try:
        if layout.kind == FOLDERS:
            return class_folders.scan(path, layout.classes.index(path.name))
        file = OpenShard(path)
        if file.size == 0:
            raise data_failure(
                f"{shown(path)} is empty (0 bytes); expected at least one record. Copy the shard again; if it was written "
                f"so, since there were more shards than records, write fewer shards, or remove it and number the others anew"
            )
        shard = tar.scan(file) if layout.kind == WEBDATASET else tfrecord.scan(file, layout.features)
        _require_records(path, len(shard.offsets), layout)
        return shard
    except OSError as error:
        raise unreadable_file(Path(error.filename or path), error) from error


def _require_records(path: Path, found: int, layout: Layout) -> None:
    """Raises Failure(DATA) where a shard has not as many records as the data set says: it reads like an intact file."""
    expected = layout.records.get(layout.key(path), found)
    if found != expected:
        raise data_failure(
            f"{shown(path)}: expected {expected} records, as the data set's description beside it says; found {found} (cut "
            f"off while copying?). Copy the shard again"
        )


def scan_for(seconds: float, numbers: Sequence[int], scan: Callable[[int], Shard]) -> Dict[int, Shard]:
    """Returns the first shards of `numbers` by `scan`, as many as take `seconds` and at least one."""
    stop, found = time.monotonic() + seconds, {}
    for number in numbers:
        found[number] = scan(number)
        if time.monotonic() > stop:
            break
    return found


def scan_split(data_dir: str, split: str) -> Index:
    """Returns the index of a split in ImageNet's layout, scanned by this process alone; raises Failure(DATA)."""
    paths = find_shards(data_dir, split)
    return join(paths, [scan_shard(path) for path in paths])


def join(paths: Sequence[Path], shards: Sequence[Shard], layout: Layout = _PLAIN) -> Index:
    """Returns the index of a split from the indexes of its shards, at least one."""
    starts = np.concatenate([[0], np.cumsum([len(shard.offsets) for shard in shards])]).astype(np.int64)
    named = np.concatenate([[0], np.cumsum([len(shard.names) for shard in shards])]).astype(np.int64)
    offsets = np.concatenate([shard.offsets + start for shard, start in zip(shards, named)])
    lengths, labels, names = (np.concatenate(column) for column in list(zip(*shards))[1:])
    return Index(tuple(paths), starts, offsets, lengths, labels, names, layout)


def split_index(index: Index) -> List[Shard]:
    """Returns the shards' parts of an index: the inverse of `join`."""
    starts = index.starts.tolist()
    named = [int(index.offsets[start]) for start in starts[:-1]] if len(index.names) else [0] * (len(starts) - 1)
    return [
        Shard(index.offsets[low:high] - name, index.lengths[low:high], index.labels[low:high], index.names[name:stop])
        for low, high, name, stop in zip(starts, starts[1:], named, [*named[1:], len(index.names)])
    ]


def data_digest(index: Index) -> str:
    """Returns a SHA-256 over the lengths and labels of a split's records; contents are checked whenever they are read."""
    return hashlib.sha256(index.lengths.tobytes() + index.labels.tobytes()).hexdigest()


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
    text = f"validation has {plural(len(unseen), 'label')} that train never has: {shorten(list(map(str, unseen)))}"
    if unseen.max() < seen.min():
        text = f"the splits begin at different labels, train at {seen[0]} and validation at {own[0]}; {text}"
    return f"{text} ({records} of {validation.records} records)"


def labels_outside(index: Index, label_base: int, num_classes: int) -> np.ndarray:
    """Returns the records whose label is outside label_base .. label_base + num_classes - 1, int64 [n]."""
    return np.flatnonzero((index.labels < label_base) | (index.labels >= label_base + num_classes))


def check_labels(index: Index, label_base: int, num_classes: int) -> None:
    """Raises Failure(DATA) naming the first record whose label is outside label_base .. label_base + num_classes - 1."""
    outside = labels_outside(index, label_base, num_classes)
    if len(outside):
        record = int(outside[0])
        raise data_failure(
            f"{index.where(record)}: label {index.labels[record]} is outside {label_base}..{label_base + num_classes - 1} "
            f"({len(outside)} of {index.records} records are). Labels found: {index.labels.min()}.."
            f"{index.labels.max()}; expected --num_classes={num_classes} classes from --label_base={label_base}: correct "
            f"the flag that is wrong"
        )


_ARRAYS = ("starts", "offsets", "lengths", "labels", "names")

# The index on disk and between ranks is an .npz of its arrays, with the shards' names and stamps, or their numbers.


def cache_places(data_dir: str, split: str, fallback_dir: Path) -> List[Path]:
    """Returns the files that the index of a split may be cached in, in order of preference."""
    name = f".hvd_vgg_index_{split}.npz"
    return [Path(data_dir) / name, fallback_dir / name]


def cached_shards(places: Sequence[Path], paths: Sequence[Path], layout: Layout = _PLAIN) -> Dict[int, Cached]:
    """Returns the cached shards by number, each from the first of `places` that has it as the file is now, or at all."""
    found: Dict[int, Cached] = {}
    for path in places:
        for number, cached in load_cache(path, paths, layout).items():
            if number not in found or not found[number].unchanged:
                found[number] = cached
    return found


def load_cache(path: Path, paths: Sequence[Path], layout: Layout = _PLAIN) -> Dict[int, Cached]:
    """Returns what a cache has of the shards `paths`, by number: nothing if it is missing, damaged or of another layout."""
    try:
        with np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False) as cache:
            if str(cache["layout"]) != _describe(layout):
                return {}
            known = dict(zip(cache["names_of_shards"].tolist(), zip(_load_shards(cache), cache["stamps"].tolist())))
        keys = ((number, layout.key(each)) for number, each in enumerate(paths))
        found = {number: known[key] for number, key in keys if key in known}
        return {
            number: Cached(_validate(shard, old[0], layout), old == _stamp(paths[number], layout, shard))
            for number, (shard, old) in found.items()
        }
    except Exception:  # damaged bytes make the readers of zip files and of arrays raise a dozen kinds
        return {}


def _validate(shard: Shard, size: int, layout: Layout) -> Shard:
    """Returns a cached shard; raises ValueError unless `scan_shard` could have made it of a file of `size` bytes."""
    sound = (
        [column.dtype for column in shard] == [np.int64, np.uint32, np.int32, np.uint8]
        and 0 < len(shard.offsets) == len(shard.lengths) == len(shard.labels)
        and shard.lengths.max() <= MAX_RECORD_BYTES
    )
    if layout.kind == FOLDERS:
        sound = sound and class_folders.could_be_index(shard)
    else:
        sound = sound and not len(shard.names)
        sound = sound and (tar if layout.kind == WEBDATASET else tfrecord).could_be_index(shard, size)
    if not sound:
        raise ValueError("not an index")
    return shard


def _describe(layout: Layout) -> str:
    """Returns what labels and offsets depend on beside the files."""
    return repr((layout.kind, *layout.features, *(layout.classes if layout.kind == FOLDERS else ())))


def take_stamps(paths: Sequence[Path], layout: Layout) -> List[List[int]]:
    """Returns what tells later whether shards have changed; taken before they are scanned. Raises OSError."""
    return [_stamp(path, layout, NO_RECORDS) for path in paths]


def save_cache(path: Path, index: Index, stamps: Optional[Sequence[Sequence[int]]] = None) -> None:
    """Writes `index` for `load_cache`; raises OSError where `path` cannot be written.

    stamps: `take_stamps` before the shards were scanned, so that a file that arrived meanwhile is noticed at the next start;
    None: of now.
    """
    layout, names = np.array(_describe(index.layout)), np.array([index.layout.key(each) for each in index.paths])
    if stamps is None:
        stamps = [_stamp(path, index.layout, shard) for path, shard in zip(index.paths, split_index(index))]
    # Processes of two containers may have one number, and their hosts one name.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, layout=layout, names_of_shards=names, stamps=np.array(stamps, np.int64), **_arrays(index))
        storage.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _stamp(path: Path, layout: Layout, shard: Shard) -> List[int]:
    """Returns what tells whether a shard has changed since it was indexed as `shard`: of a file its size and time."""
    if layout.kind == FOLDERS:
        return list(storage.retrying(path, lambda: class_folders.stamp(path, shard)))
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


def _arrays(index: Index) -> Dict[str, Any]:
    return {name: getattr(index, name) for name in _ARRAYS}


def _load_shards(arrays: Any) -> List[Shard]:
    starts, offsets, lengths, labels, names = (arrays[name] for name in _ARRAYS)
    return split_index(Index((), starts, offsets, lengths, labels, names, _PLAIN))
