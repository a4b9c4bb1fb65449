"""Storage that hiccups: reads are repeated for some seconds; what a file system does not support is told once.

Network and FUSE mounts answer ESTALE, EIO or ETIMEDOUT for a moment when a server restarts, and all is well after the file
is opened anew. Others have no fsync of directories, no locks, or cannot rename over a file that somebody has open.
"""

import errno
import filecmp
import os
import shutil
import socket
import sys
import threading
import time
from pathlib import Path
from typing import IO, Callable, Dict, Optional, Set, Tuple, TypeVar

from hvd_vgg.colours import YELLOW, prefix
from hvd_vgg.errors import LOST_RANK, Failure
from hvd_vgg.streams import write_line

T = TypeVar("T")

WAITS = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 5.0)  # seconds between one attempt to read and the next
SLOW_SECONDS = 30.0  # a read that takes longer is told
GIVEN_UP_SECONDS = 30.0  # so long after one read was given up, another that fails in the same directory is not repeated


def _numbers(*names: str) -> Set[int]:
    return {getattr(errno, name) for name in names if hasattr(errno, name)}


# Of servers and links that go away and come back, and of a host that is short of files or memory for a moment.
_PASSING = _numbers(
    *("EIO", "ESTALE", "ETIMEDOUT", "EINTR", "EAGAIN", "EBUSY", "EREMOTEIO", "ENOTCONN", "ECONNABORTED", "ECONNREFUSED"),
    *("ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETRESET", "ENETUNREACH", "ENOLINK", "ECOMM", "EPROTO"),
    *("ESHUTDOWN", "EMFILE", "ENFILE", "ENOBUFS", "ENOMEM"),
)
UNSUPPORTED = _numbers("EINVAL", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "ENOTTY", "ENOLCK")
_UNSUPPORTED_RENAME = UNSUPPORTED | _numbers("EBUSY", "ETXTBSY", "EEXIST", "EACCES", "EPERM")
# What the host lacks, rather than the file system.
_SHORTAGES = {
    "EMFILE": "raise this process's limit of open files (ulimit -n)",
    "ENFILE": "raise the host's limit of open files (sysctl fs.file-max), or close some",
    "ENOMEM": "free memory on this host",
    "ENOBUFS": "free memory on this host",
}
_given_up: Dict[Path, Tuple[float, str]] = {}  # by directory: when a read in it was given up, and why
_changed = threading.Condition()
_told: Set[str] = set()
_telling = threading.Lock()


def warn_once(about: str, text: str) -> None:
    """Prints a warning to stderr, on any rank, unless this process has printed one about the same."""
    with _telling:
        known = about in _told
        _told.add(about)
    if not known:
        write_line(f"hvd-vgg: {prefix('warning', YELLOW, sys.stderr)} on {socket.gethostname()}: {text}", sys.stderr)


def retrying(path: Path, read: Callable[[], T], reopen: Callable[[], object] = lambda: None) -> T:
    """Returns `read()`, repeated with growing waits, and after `reopen()`, while it fails as storage does that comes back.

    Other OSErrors are raised at once. Raises Failure(LOST_RANK), for which a run is started again, if it does not come
    back; then whatever else fails in its directory does so at once, in all threads, lest one wait for the other. A file
    whose read was repeated, or took minutes, is told once.
    """
    began = time.monotonic()
    error: Optional[OSError] = None
    for wait in (*WAITS, None):
        try:
            if error is not None:
                reopen()
            value = read()
            break
        except OSError as failed:
            if failed.errno not in _PASSING:
                raise
            if wait is not None:
                reason = _wait_unless_given_up(path.parent, wait)
            else:
                reason = (
                    f"{path} cannot be read: {_reason(failed)}, in {len(WAITS) + 1} attempts over "
                    f"{time.monotonic() - began:.0f} s; {_advice(failed, 'start again when its file system is back')}"
                )
                _give_up(path.parent, reason)
            if reason:
                raise Failure(LOST_RANK, reason) from failed
            error = failed
    seconds = time.monotonic() - began
    look = "look after its file system or server"
    if error is not None:
        text = f"could not be read for {seconds:.1f} s ({_reason(error)}), and was opened and read again"
        warn_once(f"read {path}", f"{path} {text}: the run goes on; {_advice(error, look)}")
    elif seconds > SLOW_SECONDS:
        warn_once(f"slow {path}", f"{path}: one read took {seconds:.0f} s; {look}")
    return value


def _give_up(folder: Path, reason: str) -> None:
    with _changed:
        _given_up[folder] = time.monotonic(), reason
        _changed.notify_all()


def _wait_unless_given_up(folder: Path, seconds: float) -> str:
    """Waits for so long and returns ""; or as soon as a read in `folder` was given up, or if one was lately, returns why."""

    def given_up() -> str:
        at, reason = _given_up.get(folder, (0.0, ""))
        return reason if time.monotonic() - at < GIVEN_UP_SECONDS else ""

    with _changed:
        _changed.wait_for(lambda: bool(given_up()), seconds)
        return given_up()


def _advice(error: OSError, otherwise: str) -> str:
    return _SHORTAGES.get(errno.errorcode.get(error.errno or 0, ""), otherwise)


def _reason(error: OSError) -> str:
    return f"{error.strerror}, {errno.errorcode.get(error.errno or 0, error.errno)}"


def read_bytes(path: Path) -> bytes:
    """Returns the contents of a file; raises OSError, or Failure(LOST_RANK), as `retrying` does."""
    return retrying(path, path.read_bytes)


def require_readable(path: Path) -> None:
    """Reads a file to its end and drops what it reads; raises as `read_bytes`.

    For libraries that map files into memory, where an error of storage is no OSError but the end of the process.
    """

    def read() -> None:
        buffer = bytearray(2**24)
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    retrying(path, read)


def pread_all(handle: int, count: int, offset: int) -> bytes:
    """Returns `count` bytes at `offset`, or fewer at the end of the file; the system may return them in parts.

    Raises OSError, EIO where bytes are missing though the file is long enough.
    """
    found = os.pread(handle, count, offset)
    while len(found) < count:
        more = os.pread(handle, count - len(found), offset + len(found))
        if not more:
            if os.fstat(handle).st_size >= offset + count:
                raise OSError(errno.EIO, f"only {len(found)} of {count} bytes at {offset} are returned")
            break
        found += more
    return found


def sync(handle: int, path: Path) -> None:
    """Puts an open file or directory on disk; where the file system cannot, says so once. Raises OSError."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSUPPORTED | {errno.EBADF, errno.EISDIR}:
            raise
        kind = "directories" if path.is_dir() else "files"
        text = f"the file system of {path} does not sync {kind} ({_reason(error)}): what is saved there is whole now, but a "
        warn_once(f"sync {kind}", f"{text}power cut may undo the newest")


def sync_directory(path: Path) -> None:
    """Puts a directory's names on disk, as `sync` does."""
    handle = os.open(path, os.O_RDONLY)
    try:
        sync(handle, path)
    finally:
        os.close(handle)


def replace(temporary: Path, path: Path) -> None:
    """Renames `temporary` to `path`, over what is there. Raises OSError.

    Where that cannot be renamed over, as some file systems refuse while somebody has it open, it is rewritten in place.
    """
    try:
        temporary.replace(path)
    except OSError as error:
        if error.errno not in _UNSUPPORTED_RENAME or not path.exists():
            raise
        with open(temporary, "rb") as source, open(path, "r+b") as file:
            _reserve(file, os.fstat(source.fileno()).st_size)  # before anything of the old contents is lost
            try:
                shutil.copyfileobj(source, file)
                file.truncate()
                file.flush()
                sync(file.fileno(), path)
                if not filecmp.cmp(temporary, path, shallow=False):
                    raise OSError(errno.EIO, "what was read back is not what was written")
            except OSError as failed:
                whole = path.with_name(f"{path.name}.whole")
                temporary.replace(whole)  # callers remove what has the temporary name
                raise OSError(failed.errno, f"{failed.strerror}; its new contents are in {whole.name}") from failed
        temporary.unlink()
        text = f"{path} cannot be renamed over ({_reason(error)}), and was rewritten in place"
        warn_once("rename", f"{text}: files there are torn if this host crashes meanwhile")


def _reserve(file: IO[bytes], size: int) -> None:
    """Gives an open file the space for `size` bytes, or leaves it as it was and raises OSError."""
    before = os.fstat(file.fileno()).st_size
    try:
        if size > before:
            os.posix_fallocate(file.fileno(), before, size - before)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            file.truncate(before)
            raise
