"""Puts what is written in its place: whole or not at all, over nothing that was there."""

import contextlib
import errno
import os
import signal
import tempfile
import threading
from pathlib import Path
from typing import Iterator, List

from hvd_vgg import storage
from hvd_vgg.errors import NOT_WRITTEN, Failure
from hvd_vgg.run_dir import write_error


def require_new(path: Path, flag: str = "--out", directory: bool = False) -> None:
    """Raises Failure(NOT_WRITTEN) unless `path` can be made in a directory that exists.

    directory: that is to become one, for which an empty one is as good.
    """
    parent = path.parent
    if not parent.is_dir():
        raise Failure(NOT_WRITTEN, f"{flag}={path}: there is no directory {parent}: make it, or name another")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise Failure(NOT_WRITTEN, f"{flag}={path} cannot be written: {os.strerror(errno.EACCES)}")
    if directory and path.is_dir() and not path.is_symlink():
        with contextlib.suppress(OSError):
            if not any(path.iterdir()):
                return
    if path.exists() or path.is_symlink():
        raise Failure(NOT_WRITTEN, f"{flag}={path} exists already, and is not overwritten: remove it, or name another")


@contextlib.contextmanager
def interrupted_when_asked() -> Iterator[None]:
    """Within it SIGTERM raises KeyboardInterrupt, as Ctrl-C does, so that nothing is left behind; in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier or signal.SIG_DFL)


@contextlib.contextmanager
def scratch_beside(path: Path) -> Iterator[Path]:
    """Yields a new directory beside `path`, removed with all that is left in it; an OSError inside is a Failure.

    Raises Failure(NOT_WRITTEN).
    """
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name[:100]}.", dir=str(path.parent)) as folder:
            yield Path(folder)
    except OSError as error:
        raise Failure(NOT_WRITTEN, write_error(path, error)) from error


def put(made: List[Path], folder: Path) -> None:
    """Moves files and directories into `folder`, all or none, on disk when this returns; raises OSError.

    Nothing that came there meanwhile is overwritten, but for an empty directory by a directory.
    """
    for path in made:
        for each in [path, *path.rglob("*")] if path.is_dir() else [path]:
            handle = os.open(each, os.O_RDONLY)
            try:
                storage.sync(handle, each)
            finally:
                os.close(handle)
    placed: List[Path] = []
    try:
        for path in made:
            _place(path, folder / path.name)
            placed.append(path)
        storage.sync_directory(folder)
    except BaseException:
        for path in placed:
            with contextlib.suppress(OSError):
                (folder / path.name).replace(path)
        raise


def _place(path: Path, target: Path) -> None:
    """Moves a file or directory; raises OSError where a file, or a directory that is not empty, is there already."""
    if path.is_dir():
        path.replace(target)  # which refuses all but an empty directory
        return
    try:
        os.link(path, target)
    except OSError as error:
        if error.errno not in storage.UNSUPPORTED | {errno.EPERM}:
            raise
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL))  # a file system without hard links
        path.replace(target)
        return
    path.unlink()
