"""Files on disks that are full, without ranks; with them: tests/faults/test_saving.py."""

import errno
import os

import pytest

from hvd_vgg.errors import Failure
from hvd_vgg.run_dir import atomic_write_text, lock_run_dir, write_error


def refuse(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.fault("F17")
def test_atomic_write_full_disk_keeps_old_file(tmp_path, monkeypatch):
    """A file that cannot be written whole leaves the old one, and no half of a new one."""
    path = tmp_path / "flags.txt"
    atomic_write_text(path, "old")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space left") as raised:
        atomic_write_text(path, "new")
    assert [each.name for each in tmp_path.iterdir()] == ["flags.txt"]
    assert path.read_text() == "old"
    told = write_error(path, raised.value)
    assert told.startswith(f"{path} cannot be written: No space left on device (")
    assert told.endswith(f" MB are free in {tmp_path}): make room, then start again")


@pytest.mark.fault("F17")
def test_lock_run_dir_on_full_disk(tmp_path, monkeypatch):
    """The lock file exists already, so locking it takes no space."""
    with lock_run_dir(tmp_path):
        pass
    monkeypatch.setattr(os, "write", refuse)
    with lock_run_dir(tmp_path), pytest.raises(Failure, match="is in use by another job"):
        lock_run_dir(tmp_path)
