"""Files of a data set as they are opened and read: by offset, patiently, and with what is wrong with them."""

import os
import shlex
import stat
import zlib
from pathlib import Path
from typing import NamedTuple, Optional, Sequence, Tuple

import numpy as np

from hvd_vgg import storage
from hvd_vgg.errors import DATA, Failure

# A record that claims more is refused before it is read: several times the size of the largest photographs.
MAX_RECORD_BYTES = 64 * 2**20
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")  # of files that are images, in lower case
_STRETCH_BYTES = 2**20  # read at once to find where zeros begin and end
# How files begin that are often put in place of TFRecords, what they are, and what to do.
UNPACK = "Records are read by their offsets. Unpack all such files into a directory of plain shards:"
_INFLATE = "python -c 'import sys, zlib; sys.stdout.buffer.write(zlib.decompress(sys.stdin.buffer.read()))'"
_FOREIGN = (
    (b"\x1f\x8b", "compressed with gzip", f"{UNPACK} gzip -dc < {{path}} > PLAIN/{{name}}"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", f"{UNPACK} zstd -dc < {{path}} > PLAIN/{{name}}"),
    (b"BZh", "compressed with bzip2", f"{UNPACK} bzip2 -dc < {{path}} > PLAIN/{{name}}"),
    (b"\xfd7zXZ", "compressed with xz", f"{UNPACK} xz -dc < {{path}} > PLAIN/{{name}}"),
    (b"\x04\x22\x4d\x18", "compressed with lz4", f"{UNPACK} lz4 -dc < {{path}} > PLAIN/{{name}}"),
    (b"PK\x03\x04", "a ZIP archive", "Unpack it"),
    (b"version https://git-lfs", "a pointer of Git LFS", "Fetch the file itself with git lfs pull"),
    (b"<", "a web page or XML", "Download the shard again"),
)


class Shard(NamedTuple):
    """The records of a shard: where the data of each begins, its length in bytes, its label as stored.

    A shard is a file, or a directory with images as its files. Of a directory `names` are the files' names, each followed
    by a zero byte, and `offsets` say where in them a record's name begins.
    """

    offsets: np.ndarray  # int64 [n]
    lengths: np.ndarray  # uint32 [n]
    labels: np.ndarray  # int32 [n]
    names: np.ndarray = np.zeros(0, np.uint8)  # uint8 [bytes]

    @classmethod
    def of_records(cls, records: Sequence[Tuple[int, int, int]], names: bytes = b"") -> "Shard":
        """Returns the shard of (offset, length, label) of its records, at least one."""
        offsets, lengths, labels = np.array(records, np.int64).T
        columns = np.ascontiguousarray(offsets), lengths.astype(np.uint32), labels.astype(np.int32)
        return cls(*columns, np.frombuffer(names, np.uint8))


def shown(path: Path) -> str:
    """Returns a path for messages: characters that would steer a terminal, and bytes that are no text, as numbers."""
    text = str(path)
    return text if text.isprintable() else ascii(text)[1:-1]


NO_RECORDS = Shard(np.zeros(0, np.int64), np.zeros(0, np.uint32), np.zeros(0, np.int32))


def place(path: Path, number: int, offset: int) -> str:
    """Returns where a record is, for messages: file, number in the file from 0, offset in bytes."""
    return f"{shown(path)}, record {number}, offset {offset}"


def data_failure(message: str) -> Failure:
    """Returns a Failure(DATA); all messages about a data set begin alike."""
    return Failure(DATA, f"data: {message}")


def unreadable_file(path: Path, error: OSError) -> Failure:
    """Returns the Failure(DATA) of a file or directory that the operating system refuses to read."""
    return data_failure(f"{shown(path)} cannot be read: {error.strerror}. Expected a file that this user may read")


def regular_file_size(path: Path, status: os.stat_result) -> int:
    """Returns a regular file's size in bytes. Raises Failure(DATA) for anything else: a FIFO would block its reader."""
    if not stat.S_ISREG(status.st_mode):
        kinds = {"d": "a directory", "p": "a FIFO", "s": "a socket", "c": "a device", "b": "a device"}
        kind = kinds.get(stat.filemode(status.st_mode)[0], "of an unknown kind")
        raise data_failure(f"{shown(path)} is {kind}; expected a regular file or a link to one: move it away")
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


def require_plain(path: Path, head: bytes, expected: str) -> None:
    """Raises Failure(DATA) where a file that begins with `head` is known to be of another kind than `expected`."""
    foreign = _foreign_content(head)
    if foreign:
        what, fix = foreign
        command = fix.format(path=shlex.quote(str(path)), name=shlex.quote(path.name))
        raise data_failure(f"{shown(path)} is {what}; expected {expected}. {command}")


def _foreign_content(head: bytes) -> Optional[Tuple[str, str]]:
    for magic, what, fix in _FOREIGN:
        if head.startswith(magic):
            return what, fix
    if len(head) > 1 and head[0] == 0x78 and (head[0] << 8 | head[1]) % 31 == 0:  # RFC 1950, 2.2
        try:
            zlib.decompressobj().decompress(head)
        except zlib.error:
            return None
        return "compressed with zlib", f"{UNPACK} {_INFLATE} < {{path}} > PLAIN/{{name}}"
    return None
