"""Paths in a run directory, atomic writes, and the lock that one job holds."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import IO, Optional

from hvd_vgg.errors import CONFIGURATION, Failure
from hvd_vgg.streams import write_line


def find_flag_file(folder: Path) -> Optional[Path]:
    """Returns the flag file in what a run left, or None."""
    path = folder / "flags.txt"
    return path if path.is_file() else None


def nonfinite_folder(run_dir: Path, step: int) -> Path:
    """Returns where a run keeps a step that was not finite; step -1: the latest that there is, or else no folder's name."""
    place = run_dir / "nonfinite"
    if step >= 0:
        return place / f"step-{step:08d}"
    return max(place.glob("step-????????"), default=place / "step-none")


def lock_run_dir(run_dir: Path) -> IO[str]:
    """Returns the open file `RUN_DIR/lock`, locked until it is closed or this process ends, however it does.

    Raises Failure(CONFIGURATION) naming who holds it, or why it cannot be opened; where the file is, locking takes no room
    on the disk. Where the file system has no locks (NFS and Lustre may be mounted so), it says so and goes on.
    """
    path = run_dir / "lock"
    try:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (it stays open)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                told = f"hvd-vgg: {run_dir} cannot be locked ({error.strerror}): see to it that one job uses it"
                write_line(told, sys.stdout)
                return file
            if not isinstance(error, BlockingIOError):
                raise
            file.seek(0)
            held = file.read().strip() or "nobody has signed it"
            file.close()
            raise Failure(
                CONFIGURATION,
                f"--run_dir={run_dir} is in use by another job ({held}). Wait for it, stop it, or give another --run_dir",
            ) from error
        signature = json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": time.ctime()})
        with contextlib.suppress(OSError):  # on a full disk it is locked all the same
            file.truncate(0)
            os.write(file.fileno(), f"{signature}\n".encode())
    except OSError as error:
        raise Failure(CONFIGURATION, f"{path} cannot be locked: {write_error(path, error)}") from error
    return file


# No room, or no more of it for this user: a quota's free bytes are not the file system's.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def atomic_write_text(path: Path, text: str) -> None:
    """Writes `text` under another name, puts it on disk, then renames it to `path`; for owner and group. Raises OSError."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o640), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()  # where the disk is full, half a file is in the way of others
        raise


def write_error(path: Path, error: OSError) -> str:
    """Returns why `path` cannot be written, and on a full disk how much is free and what to do."""
    told = f"{path} cannot be written: {error.strerror or error}"
    if error.errno not in DISK_FULL:
        return told
    place = next(parent for parent in path.resolve().parents if parent.exists())
    return f"{told} ({shutil.disk_usage(place).free / 1e6:.1f} MB are free in {place}): make room, then start again"
