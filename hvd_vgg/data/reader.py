"""Reads records by index: checksums, read-ahead, and the error that names a bad record."""

import contextlib
import functools
import os
import resource
import struct
from pathlib import Path
from typing import Sequence, Tuple

import numpy as np

from hvd_vgg.data.index import Index
from hvd_vgg.data.tfrecord import FOOTER_BYTES, IMAGE, LABEL, OpenShard, find_features, masked_crc, parse_image, parse_label
from hvd_vgg.errors import DATA, Failure


class BadRecord(Failure):
    """One record that cannot be used, while others of its file may be whole: `reason` says what is wrong with it."""

    def __init__(self, where: str, reason: str, advice: str) -> None:
        super().__init__(DATA, f"data: {where}: {reason}. {advice}")
        self.reason = reason


def _max_open_shards() -> int:
    """Returns how many shards may be open at once: half of the files that this process may have; ImageNet has 1024."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 4096 if files == resource.RLIM_INFINITY else max(64, min(files // 2, 4096))


_open_shard = functools.lru_cache(maxsize=_max_open_shards())(OpenShard)


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
            os.posix_fadvise(_open_shard(index.paths[shards[first]]).handle, begin, end - begin, os.POSIX_FADV_WILLNEED)


def read_record(index: Index, record: int) -> bytes:
    """Returns the data of one record and, not to copy it, the 4 bytes of checksum behind it; any thread may call.

    Raises BadRecord naming file, record and offset, and Failure(DATA) where the file cannot be read at all.
    """
    shard = int(np.searchsorted(index.starts, record, side="right")) - 1
    length, offset = int(index.lengths[record]), int(index.offsets[record])
    try:
        file = _open_shard(index.paths[shard])
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
    expected = masked_crc(memoryview(found)[:length])
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
            file.write(length + struct.pack("<I", masked_crc(length)) + read_record(index, record))
        file.flush()
        os.fsync(file.fileno())


def parse_example(index: Index, record: int, data: bytes) -> Tuple[bytes, int]:
    """Returns (encoded image, label as written) of what `read_record` returned; BadRecord naming what is missing."""

    def read_at(at: int, count: int) -> bytes:
        return data[at : at + count]

    try:
        image, label = find_features(read_at, int(index.lengths[record]), (IMAGE, LABEL))
        return parse_image(read_at, image), parse_label(read_at, label)
    except ValueError as error:
        raise BadRecord(
            index.where(record),
            str(error),
            f"Expected a tf.train.Example with {IMAGE.decode()} (one JPEG or PNG) and {LABEL.decode()} (one integer)",
        ) from error
