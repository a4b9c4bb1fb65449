"""Storage that hiccups: errors of the kernel's calls are put in their place; what is read and written is real."""

import errno
import fcntl
import filecmp
import os
import shutil
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from support import failure_of, small_disk_at, write_data

from hvd_vgg import storage
from hvd_vgg.config import ImageConfig
from hvd_vgg.data import reader
from hvd_vgg.data.formats.layout import find_shards, shard_bytes
from hvd_vgg.data.index import load_cache, save_cache, scan_split
from hvd_vgg.data.loader import BatchSpec, Dataset, load_batches
from hvd_vgg.data.reader import read_record
from hvd_vgg.errors import LOST_RANK, Failure
from hvd_vgg.run_dir import RunDir, atomic_write_text, lock_run_dir
from hvd_vgg.training import checkpoint


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Waits for milliseconds, and tells again what other tests have had told."""
    monkeypatch.setattr(storage, "WAITS", (0.001,) * 3)
    monkeypatch.setattr(storage, "_told", set())
    monkeypatch.setattr(storage, "_given_up", {})


def failing(monkeypatch, place, name, number, times=1, when=lambda *arguments: True):
    """Has the function `name` of `place` raise OSError(number) the next `times` that it is called so; returns its calls."""
    call, calls = getattr(place, name), []

    def maybe(*arguments, **named):
        if when(*arguments) and len(calls) < times:
            calls.append(arguments)
            raise OSError(number, os.strerror(number))
        return call(*arguments, **named)

    monkeypatch.setattr(place, name, maybe)
    return calls


@pytest.mark.fault("F40")
@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EINTR, errno.ENOTCONN])
def test_read_record_is_repeated_after_reopening(tmp_path, monkeypatch, capsys, number):
    """Told once for a shard, however often it happens."""
    index = scan_split(str(write_data(tmp_path)), "train")
    expected = [read_record(index, i) for i in range(3)]
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *more, **named: opened.append(path) or real(path, *more, **named))
    for i in range(3):
        failing(monkeypatch, os, "pread", number, times=2)
        assert read_record(index, i) == expected[i]
    assert opened.count(index.paths[0]) >= 6
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{index.paths[0]} could not be read for 0." in line
    assert f"({os.strerror(number)}, {errno.errorcode[number]})" in line


@pytest.mark.fault("F40")
def test_reads_that_stay_failed_are_worth_a_start(tmp_path, monkeypatch):
    """Of records, of shards while they are indexed, of names and sizes, of checkpoints and of other files."""
    data = write_data(tmp_path / "data")
    index, run = scan_split(str(data), "train"), RunDir(tmp_path)
    path = checkpoint.save(run, {"a": np.ones(3, np.float32)}, {"step": 4}, 3, [checkpoint.BEST])
    for place, name, action in (
        (os, "pread", lambda: read_record(index, 0)),
        (os, "pread", lambda: scan_split(str(data), "train")),
        (Path, "iterdir", lambda: find_shards(str(data), "train")),
        (Path, "stat", lambda: shard_bytes(index.paths)),
        (Path, "iterdir", run.list_checkpoints),
        (Path, "read_bytes", lambda: checkpoint.best(run)),
    ):
        with monkeypatch.context() as patch:
            failing(patch, place, name, errno.EIO, times=99, when=lambda *a: name != "stat" or "-of-" in str(a[0]))
            patch.setattr(storage, "_given_up", {})
            with pytest.raises(Failure, match=r"cannot be read: Input/output error, EIO, in 4 attempts over") as raised:
                action()
            assert raised.value.code == LOST_RANK
    assert checkpoint.newest(run)[0].path == path


@pytest.mark.fault("F40")
def test_reads_are_given_up_together(tmp_path, monkeypatch):
    """Those that wait, and those that begin afterwards, where one of the same directory has been given up; not elsewhere."""
    monkeypatch.setattr(storage, "WAITS", (0.01, 1000.0))
    ended, waiting = [], threading.Event()

    def fail():
        waiting.set()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def read(name):
        with pytest.raises(Failure) as raised:
            storage.retrying(tmp_path / name, fail)
        ended.append(raised.value)

    reader_thread = threading.Thread(target=read, args=["a"], daemon=True)
    reader_thread.start()
    assert waiting.wait(60)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "WAITS", (0.001,))
        read("b")
    reader_thread.join(60)
    read("c")  # with its wait of 1000 s
    assert [(failure.code, failure.message) for failure in ended] == [(LOST_RANK, ended[0].message)] * 3
    assert ended[0].message.startswith(f"{tmp_path / 'b'} cannot be read: Input/output error, EIO, in 2 attempts over 0 s")
    monkeypatch.setattr(storage, "WAITS", (0.001,))
    attempts = []

    def fail_once():
        attempts.append(1)
        return fail() if len(attempts) == 1 else b"there"

    assert storage.retrying(tmp_path / "elsewhere" / "d", fail_once) == b"there"
    monkeypatch.setattr(storage, "GIVEN_UP_SECONDS", 0.0)  # later
    attempts.clear()
    assert storage.retrying(tmp_path / "e", fail_once) == b"there"


@pytest.mark.fault("F40")
def test_loader_gives_up_once(tmp_path, monkeypatch):
    """However many reads wait in the pool: each that failed anew would double the time until the run ends."""
    index = scan_split(str(write_data(tmp_path)), "train")
    monkeypatch.setattr(storage, "WAITS", (0.05,) * 7)
    reader._open_shard.cache_clear()
    calls = failing(monkeypatch, os, "pread", errno.EIO, times=10**6, when=lambda handle, count, offset: count != 512)
    ids = np.arange(64)
    specs = [BatchSpec(ids, ids * 0, np.zeros([64, 2], np.int64), ids)] * 3
    with pytest.raises(Failure, match="in 8 attempts over") as raised:
        list(load_batches(Dataset(index, 1, 32, ImageConfig(augment="none"), True), specs, 64, 2))
    assert raised.value.code == LOST_RANK
    attempts = Counter(offset for _, _, offset in calls)
    assert sum(times > len(specs) for times in attempts.values()) <= 2  # one in each thread


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EMFILE, "raise this process's limit of open files (ulimit -n)"),
        (errno.ENFILE, "raise the host's limit of open files"),
        (errno.ENOMEM, "free memory on this host"),
        (errno.EIO, "its file system"),
    ],
)
def test_advice_is_about_what_is_short(tmp_path, monkeypatch, capsys, number, advice):
    (tmp_path / "file").write_bytes(b"x")
    failing(monkeypatch, Path, "read_bytes", number)
    assert storage.read_bytes(tmp_path / "file") == b"x"
    failing(monkeypatch, Path, "read_bytes", number, times=99)
    with pytest.raises(Failure) as raised:
        storage.read_bytes(tmp_path / "file")
    for text in (capsys.readouterr().err, raised.value.message):
        assert advice in text and ("file system" in text) == (number == errno.EIO)


def test_read_record_of_a_replaced_shard_after_reopening(tmp_path, monkeypatch):
    index = scan_split(str(write_data(tmp_path)), "train")
    path = index.paths[0]
    read_record(index, 0)
    other = tmp_path / "other"
    other.write_bytes(path.read_bytes() + b"more")
    other.replace(path)
    failing(monkeypatch, os, "pread", errno.ESTALE)
    message = failure_of(lambda: read_record(index, 1))
    assert f"{path} was replaced, rewritten or cut off while in use: it had {path.stat().st_size - 4} bytes" in message


def test_other_errors_are_not_repeated(tmp_path, monkeypatch):
    calls = failing(monkeypatch, Path, "read_bytes", errno.EACCES, times=9)
    with pytest.raises(PermissionError):
        storage.read_bytes(tmp_path / "file")
    assert len(calls) == 1


@pytest.mark.fault("F40")
def test_reads_in_parts_are_put_together(tmp_path, monkeypatch):
    """And a read that ends early for good is no end of the file."""
    index = scan_split(str(write_data(tmp_path)), "train")
    expected = [read_record(index, i) for i in range(75)]
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda handle, count, offset: pread(handle, min(count, 100), offset))
    assert [read_record(index, i) for i in range(75)] == expected
    again = scan_split(str(tmp_path), "train")
    assert all((a == b).all() for a, b in zip(again[1:6], index[1:6]))
    monkeypatch.setattr(os, "pread", lambda handle, count, offset: pread(handle, 50, offset) if offset < 50 else b"")
    with pytest.raises(Failure, match=r"only 50 of \d+ bytes at 12 are returned|cannot be read") as raised:
        read_record(index, 0)
    assert raised.value.code == LOST_RANK


def test_read_that_takes_long_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(storage, "SLOW_SECONDS", -1.0)
    (tmp_path / "file").write_bytes(b"x")
    assert storage.read_bytes(tmp_path / "file") == storage.read_bytes(tmp_path / "file") == b"x"
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'file'}: one read took 0 s" in line


def test_reads_in_progress_name_the_shard(tmp_path, monkeypatch):
    """What a hang report says of a mount that blocks."""
    index, seen = scan_split(str(write_data(tmp_path)), "train"), []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *arguments: seen.append(reader.reads_in_progress()) or pread(*arguments))
    read_record(index, 0)
    assert [text.split(" for ")[0] for text in seen[0]] == [str(index.paths[0])]
    assert reader.reads_in_progress() == []


@pytest.mark.fault("F40")
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_checkpoint_where_directories_are_not_synced(tmp_path, monkeypatch, capsys, number):
    """Is saved, pruned and pointed to as ever; told once."""
    fsync = os.fsync

    def files_only(handle):
        if Path(f"/proc/self/fd/{handle}").is_dir():
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", files_only)
    run = RunDir(tmp_path)
    for step in range(4):
        checkpoint.save(run, {"a": np.ones(3, np.float32)}, {"step": step}, 2, [checkpoint.BEST] * (step == 1))
    assert [path.name[-13:-12] for path in run.list_checkpoints()] == ["3", "2", "1"]
    assert checkpoint.best(run) == run.checkpoint(1)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"the file system of {run.checkpoints} does not sync directories" in line


@pytest.mark.fault("F40")
def test_files_that_cannot_be_renamed_over_are_rewritten(tmp_path, monkeypatch, capsys):
    """As some file systems refuse where the file is open; other errors of renaming are errors."""
    for place in ("a", "b"):
        atomic_write_text(tmp_path / place, "old")
    failing(monkeypatch, Path, "replace", errno.EBUSY, times=9)
    for place in ("a", "b"):
        atomic_write_text(tmp_path / place, "new, and longer")
        assert (tmp_path / place).read_text() == "new, and longer"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert capsys.readouterr().err.count("cannot be renamed over (Device or resource busy, EBUSY)") == 1
    with pytest.raises(OSError, match="busy"):
        atomic_write_text(tmp_path / "not there yet", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.fault("F40")
@pytest.mark.parametrize("failed", ["posix_fallocate", "copyfileobj", "cmp"])
def test_failed_rewriting_in_place_loses_nothing(tmp_path, monkeypatch, failed):
    """On a full disk the old contents stay; where writing fails later, or reads back other bytes, the new ones are kept."""
    path, temporary = tmp_path / "file", tmp_path / "file.tmp"
    path.write_text("old")
    temporary.write_text("new, and longer")
    failing(monkeypatch, Path, "replace", errno.EBUSY)
    place = {"posix_fallocate": os, "copyfileobj": shutil, "cmp": filecmp}[failed]
    if failed == "cmp":
        monkeypatch.setattr(filecmp, "cmp", lambda *paths, shallow: False)
    else:
        failing(monkeypatch, place, failed, errno.ENOSPC)
    with pytest.raises(OSError, match="No space|read back is not what was written") as raised:
        storage.replace(temporary, path)
    if failed == "posix_fallocate":
        assert (path.read_text(), temporary.read_text()) == ("old", "new, and longer")
    else:
        assert "its new contents are in file.whole" in str(raised.value)
        assert (tmp_path / "file.whole").read_text() == "new, and longer"
        assert not temporary.exists()


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 48 kB."""
    with small_disk_at(tmp_path / "disk", "48k", "--lazy") as disk:
        yield disk


@pytest.mark.fault("F40")
def test_full_disk_where_files_cannot_be_renamed_over(small_disk, monkeypatch):
    """There is room for the temporary file, and none to copy it: what was there before stays."""
    path = small_disk / "result.json"
    path.write_text("old" * 2000)
    failing(monkeypatch, Path, "replace", errno.EBUSY, times=9)
    with pytest.raises(OSError, match="No space"):
        atomic_write_text(path, "new, and longer" * 2000)
    assert path.read_text() == "old" * 2000
    assert [each.name for each in small_disk.iterdir()] == ["result.json"]
    atomic_write_text(path, "shorter")
    assert path.read_text() == "shorter"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_lock_run_dir_where_files_cannot_be_locked(tmp_path, monkeypatch, capsys, number):
    failing(monkeypatch, fcntl, "flock", number)
    lock_run_dir(tmp_path).close()
    assert "cannot be locked" in capsys.readouterr().out


def test_checkpoint_that_cannot_be_read_is_not_damaged(tmp_path, monkeypatch):
    """An older one is not continued from instead."""
    run = RunDir(tmp_path)
    for step in (1, 2):
        checkpoint.save(run, {"a": np.ones(3, np.float32)}, {"step": step}, 3, [])
    with monkeypatch.context() as patch:
        real = open

        def refused(path, *more, **named):
            if str(path).endswith("step-00000002.safetensors"):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(path, *more, **named)

        patch.setattr("builtins.open", refused)
        with pytest.raises(Failure, match="cannot be read") as raised:
            checkpoint.newest(run)
        assert raised.value.code == LOST_RANK
    assert checkpoint.newest(run)[0].meta["step"] == 2


def test_save_cache_of_two_processes_of_one_number(tmp_path, monkeypatch):
    """As containers on one data directory may have: neither writes into the other's file."""
    index = scan_split(str(write_data(tmp_path)), "train")
    written, savez = [], np.savez

    def noted(file, **arrays):
        written.append(file.name)
        if len(written) == 1:
            save_cache(tmp_path / "cache.npz", index)  # the other process, meanwhile
        savez(file, **arrays)

    monkeypatch.setattr(np, "savez", noted)
    save_cache(tmp_path / "cache.npz", index)
    assert len(set(written)) == 2
    assert len(load_cache(tmp_path / "cache.npz", index.paths)) == 3
    assert not list(tmp_path.glob("*.tmp"))
