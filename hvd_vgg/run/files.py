"""Files that are there whole or not at all."""

import contextlib
import errno
import os
import shutil
from pathlib import Path

# No room, or no more of it for this user: a quota's free bytes are not the file system's.
FULL = (errno.ENOSPC, errno.EDQUOT)


def write_whole(path: Path, text: str) -> None:
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


def not_written(path: Path, error: OSError) -> str:
    """Returns why `path` cannot be written, and on a full disk how much is free and what to do."""
    told = f"{path} cannot be written: {error.strerror or error}"
    if error.errno not in FULL:
        return told
    place = next(parent for parent in path.resolve().parents if parent.exists())
    return f"{told} ({shutil.disk_usage(place).free / 1e6:.1f} MB are free in {place}): make room, then start again"
