"""Reads records by index: checksums, read-ahead, and the error that names a bad record."""

import contextlib
import functools
import os
import resource
import threading
import time
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np

from hvd_vgg import storage
from hvd_vgg.data.formats import tar
from hvd_vgg.data.formats.example import encode_example, parse_features, parse_text
from hvd_vgg.data.formats.layout import FOLDERS, WEBDATASET
from hvd_vgg.data.formats.shard_file import OpenShard, data_failure
from hvd_vgg.data.formats.tfrecord import FOOTER_BYTES, HEADER_BYTES, describe_damage, frame, record_header
from hvd_vgg.data.index import Index
from hvd_vgg.errors import DATA, Failure

_REINDEX = (
    "Restore it as it was, or if it is meant to be so, remove the .hvd_vgg_index_* beside it or in the run directory; then "
    "start again"
)


class BadRecord(Failure):
    """One record that cannot be used, though others of its shard may be intact."""

    def __init__(self, index: Index, record: int, reason: str, advice: str) -> None:
        super().__init__(DATA, f"data: {index.where(record)}: {reason}. {advice}")
        self.record, self.reason = record, reason


def _max_open_shards() -> int:
    """Returns half of the files that this process may have open, within 64 and 4096; ImageNet has 1024 shards."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 4096 if files == resource.RLIM_INFINITY else max(64, min(files // 2, 4096))


_reading: Dict[int, Tuple[Path, float]] = {}  # by thread: what it is reading, and since when
_open_shard = functools.lru_cache(maxsize=_max_open_shards())(OpenShard)


def read_ahead(index: Index, ids: np.ndarray) -> None:
    """Asks the kernel to read the records `ids`, int64 [n], into its page cache in file order; does not wait for them.

    A hint: where it fails, or the file is gone, reading the record reports it.
    """
    ids = np.sort(ids)
    shards: Any = np.searchsorted(index.starts, ids, side="right") - 1
    if index.layout.kind == FOLDERS:  # opening them is what takes long
        for record in ids.tolist():
            with contextlib.suppress(OSError, AttributeError, Failure):
                file = OpenShard(index.path_of(record))
                os.posix_fadvise(file.handle, 0, file.size, os.POSIX_FADV_WILLNEED)
        return
    # One call for each run of records that follow each other in a file.
    cuts = np.flatnonzero((np.diff(ids) > 1) | (np.diff(shards) > 0)) + 1
    header = tar.HEADER_BYTES if index.layout.kind == WEBDATASET else 0  # a TFRecord's is short, and in the same page
    for first, last in zip([0, *cuts.tolist()], [*(cuts - 1).tolist(), len(ids) - 1]):
        begin = int(index.offsets[ids[first]]) - header
        size = int(index.offsets[ids[last]]) + int(index.lengths[ids[last]]) + FOOTER_BYTES - begin
        with contextlib.suppress(OSError, AttributeError):  # some systems have no posix_fadvise
            os.posix_fadvise(_open_shard(index.paths[shards[first]]).handle, begin, size, os.POSIX_FADV_WILLNEED)


def read_image(index: Index, record: int) -> Tuple[bytes, int]:
    """Returns (encoded image, label as stored) of a record, whatever its layout. May be called on any thread.

    Raises BadRecord naming the record; Failure(DATA) where its file cannot be read at all or was rewritten;
    Failure(LOST_RANK) where storage does not come back.
    """
    kind = index.layout.kind
    if kind == FOLDERS:
        return _read_file(index, record)[1], int(index.labels[record])
    if kind == WEBDATASET:
        return _read_member(index, record)[1], int(index.labels[record])
    return _parse(index, record, read_record(index, record))


def _parse(index: Index, record: int, data: bytes) -> Tuple[bytes, int]:
    features = index.layout.features
    try:
        return parse_features(data, int(index.lengths[record]), features)
    except ValueError as error:
        raise BadRecord(index, record, str(error), features.expected) from error


def read_record(index: Index, record: int) -> bytes:
    """Returns the data of a TFRecord followed by their 4-byte checksum, left on to save a copy; raises as `read_image`."""
    length, offset = int(index.lengths[record]), int(index.offsets[record])
    file, found = _read(index, record, length + FOOTER_BYTES, offset)
    if len(found) < length + FOOTER_BYTES:
        reason = f"expected {length} bytes and a checksum, found {len(found)}: the shard has shrunk since it was indexed"
        raise BadRecord(index, record, reason, "Copy it again")
    damage = describe_damage(file, offset, found)
    if damage:
        _require_not_rewritten(index, index.shard_of(record), file)
        raise BadRecord(index, record, damage, "Copy the shard again")
    return found


def _read(index: Index, record: int, count: int, offset: int) -> Tuple[OpenShard, bytes]:
    """Returns the file of a record, and `count` bytes of it at `offset`, or fewer at its end."""
    path, alone = index.path_of(record), index.layout.kind == FOLDERS
    try:
        _reading[threading.get_ident()] = path, time.monotonic()
        file = OpenShard(path) if alone else _open_shard(path)
        return file, file.read(count, offset)
    except OSError as error:
        if alone:  # the file is this record, and others may be intact
            raise BadRecord(index, record, f"it cannot be read: {error.strerror}", _REINDEX) from error
        raise Failure(DATA, f"data: {index.where(record)}: cannot be read: {error.strerror}") from error
    finally:
        _reading.pop(threading.get_ident(), None)


def _read_file(index: Index, record: int) -> Tuple[Path, bytes]:
    """Returns the file that is a record, and its bytes."""
    length = int(index.lengths[record])
    file, found = _read(index, record, length, 0)
    if file.size != length or len(found) < length:
        raise BadRecord(index, record, f"it has {file.size} bytes, but had {length} when it was indexed", _REINDEX)
    return file.path, found


def _read_member(index: Index, record: int) -> Tuple[str, bytes]:
    """Returns (name, data) of the member of an archive that is a record."""
    length, offset = int(index.lengths[record]), int(index.offsets[record])
    _, found = _read(index, record, tar.HEADER_BYTES + length, offset - tar.HEADER_BYTES)
    # A tar archive has no checksum of its data, only of each header.
    member = tar.read_header(found[: tar.HEADER_BYTES])
    if len(found) < tar.HEADER_BYTES + length or member.size != length:
        raise BadRecord(index, record, f"no member of {length} bytes is there, as when it was indexed", _REINDEX)
    return member.name, found[tar.HEADER_BYTES :]


def reads_in_progress() -> List[str]:
    """Returns the shards that this process is waiting for, longest first, for a hang report."""
    reads, now = sorted(_reading.copy().values(), key=lambda read: read[1]), time.monotonic()
    return [f"{path} for {now - since:.1f} s" for path, since in reads]


def _require_not_rewritten(index: Index, shard: int, file: OpenShard) -> None:
    """Raises Failure(DATA) for a shard whose first record that is not as indexed is intact: another was written there.

    Even if its size and time are those of the index: a copy may keep both.
    """
    low, high = index.starts[shard : shard + 2].tolist()
    for record, offset, length in zip(range(low, high), index.offsets[low:high].tolist(), index.lengths[low:high].tolist()):
        header = file.read(HEADER_BYTES, offset - HEADER_BYTES)
        if header == record_header(length):
            continue
        found = int.from_bytes(header[:8], "little")
        if len(header) == HEADER_BYTES and header == record_header(found):
            raise data_failure(
                f"{index.where(record)}: it has {found} bytes, but had {length} when it was indexed: the shard was replaced "
                f"or rewritten. {_REINDEX}"
            )
        return


def read_named_image(index: Index, record: int) -> Tuple[bytes, str, bytes]:
    """Returns (encoded image, its file's name, its class's name) of a record; "" and b"" where the layout has none.

    The names are for `prepare`, which writes them again. May be called on any thread; raises as `read_image`.
    """
    kind = index.layout.kind
    if kind == FOLDERS:
        path, encoded = _read_file(index, record)
        return encoded, path.name, b""
    if kind == WEBDATASET:
        name, encoded = _read_member(index, record)
        return encoded, name.rpartition("/")[2], b""
    data, length = read_record(index, record), int(index.lengths[record])
    encoded, _ = _parse(index, record, data)
    name = parse_text(data, length, index.layout.features.filename).decode("utf-8", "replace")
    return encoded, name, parse_text(data, length, b"image/class/synset")


def write_records(path: Path, index: Index, ids: Sequence[int]) -> None:
    """Writes the images and labels of the records `ids`, in this order, as one TFRecord file, on disk when it returns.

    Raises OSError, or Failure(DATA) where a record cannot be read.
    """
    with open(path, "wb") as file:
        for record in ids:
            encoded, label = read_image(index, record)
            file.write(frame(encode_example({"image/class/label": label, "image/encoded": encoded})))
        file.flush()
        storage.sync(file.fileno(), path)
