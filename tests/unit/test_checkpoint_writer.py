"""The thread that writes checkpoints, where disks fail in ways that a checkpoint alone cannot know of."""

import errno
import fcntl
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from hvd_vgg import storage
from hvd_vgg.config import TrainConfig
from hvd_vgg.errors import CONFIGURATION, LOST_RANK, NOT_WRITTEN, Failure
from hvd_vgg.reporting.console import Console
from hvd_vgg.run_dir import RunDir, checkpoint_step
from hvd_vgg.training import checkpoint
from hvd_vgg.training.checkpoint_copy import open_copy_dir
from hvd_vgg.training.checkpoint_writer import CheckpointWriter
from hvd_vgg.training.reporter import Reporter
from hvd_vgg.training.resume import require_checkpoints


def begin(writer, step, best=()):
    writer.begin({"a/kernel": np.full((30, 40), step, np.float32)}, {"step": step, "run": {}}, best)


def steps(run_dir):
    return [checkpoint_step(path) for path in RunDir(run_dir).list_checkpoints()]


@pytest.fixture(params=["disk", "quota"])
def room(monkeypatch, request):
    """Lets no file be written where `room["files"]` checkpoints are; of a quota disk_usage says nothing, the write does."""
    limit, write, usage = {"files": 100, "told": "0 MB are free"}, checkpoint._write_safetensors, shutil.disk_usage

    def is_full(place):
        return len(list(place.glob("step-*.safetensors"))) >= limit["files"]

    def limited(path, *more):
        if is_full(path.parent):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        write(path, *more)

    if request.param == "quota":
        limit["told"] = os.strerror(errno.EDQUOT)
        monkeypatch.setattr(checkpoint, "_write_safetensors", limited)
    else:
        monkeypatch.setattr(
            shutil, "disk_usage", lambda place: usage(place)._replace(free=0) if is_full(place) else usage(place)
        )
    return limit


@pytest.mark.fault("F17")
def test_writer_full_disk_removes_older_checkpoints(tmp_path, room):
    """All but the newest whole one and the best make room."""
    events = []
    writer = CheckpointWriter(RunDir(tmp_path), 4, lambda name, **data: events.append((name, data["step"])))
    for step in (1, 2, 3, 4):
        begin(writer, step, best=[checkpoint.BEST] * (step == 2))
        assert writer.wait() is None
    newest = RunDir(tmp_path).list_checkpoints()[0]
    newest.write_bytes(newest.read_bytes()[:-9])
    room["files"] = 4
    begin(writer, 5)
    assert writer.wait() is None
    assert steps(tmp_path) == [5, 4, 3, 2]  # 4 is damaged, 3 the newest whole, 2 the best
    assert events[-1] == ("checkpoint", 5)
    assert checkpoint.newest(RunDir(tmp_path))[0].meta["step"] == 5


@pytest.mark.fault("F17")
def test_writer_full_disk_keeps_the_last_checkpoint(tmp_path, room):
    """If nothing may be removed the save fails and the last one stays."""
    writer = CheckpointWriter(RunDir(tmp_path), 4, lambda name, **data: None)
    begin(writer, 1)
    assert writer.wait() is None
    room["files"] = 1
    begin(writer, 2)
    failure = writer.wait()
    assert (failure.code, room["told"] in failure.message) == (NOT_WRITTEN, True)
    assert steps(tmp_path) == [1]


def test_writer_unreadable_checkpoint_is_a_failed_save(tmp_path, monkeypatch):
    """One that was written and cannot be read."""
    save = checkpoint.save

    def save_and_lose(*arguments):
        path = save(*arguments)
        path.unlink()
        return path

    monkeypatch.setattr(checkpoint, "save", save_and_lose)
    writer = CheckpointWriter(RunDir(tmp_path), 3, lambda name, **data: None)
    begin(writer, 1)
    failure = writer.wait()
    assert (failure.code, "was written but cannot be read" in failure.message) == (NOT_WRITTEN, True)
    assert writer.written == 0


@pytest.mark.fault("F42")
def test_writer_writes_a_second_copy_of_each(tmp_path):
    """Pruned alike, with its own pointer to the best; a failure of either does not touch the other."""
    run, copy, events, said = RunDir(tmp_path / "run"), RunDir(tmp_path / "copy"), [], []
    writer = CheckpointWriter(run, 2, lambda name, **data: events.append((name, data["step"])), copy, said.append)
    for step in (1, 2, 3, 4):
        begin(writer, step, best=[checkpoint.BEST] * (step == 1))
        assert writer.wait() is None
    assert steps(run.path) == steps(copy.path) == [4, 3, 1]
    assert checkpoint.best(copy) == copy.checkpoint(1)
    assert events[:2] == [("checkpoint", 1), ("checkpoint_copy", 1)] and not said

    shutil.rmtree(copy.checkpoints)
    copy.checkpoints.write_text("in the way")
    begin(writer, 5)
    assert writer.wait() is None
    assert steps(run.path) == [5, 4, 1]
    assert events[-2:] == [("checkpoint", 5), ("copy_failed", 5)]
    assert said[0].startswith(f"warning: no copy of the checkpoint of step 5 in {copy.checkpoints}: ") and len(said) == 1

    copy.checkpoints.unlink()
    shutil.rmtree(run.checkpoints)
    run.checkpoints.write_text("in the way")
    begin(writer, 6)
    assert writer.wait().code == NOT_WRITTEN
    assert steps(copy.path) == [6]


@pytest.mark.fault("F42")
def test_newest_checkpoint_of_a_run_and_its_copies(tmp_path):
    """The newest whole one; of one step the run's own."""
    run, copy = RunDir(tmp_path / "run"), RunDir(tmp_path / "copy")
    writer = CheckpointWriter(run, 2, lambda name, **data: None, copy)
    for step in (1, 2):
        begin(writer, step)
        assert writer.wait() is None
    assert checkpoint.newest(run, copy)[0].path == run.checkpoint(2)
    run.checkpoint(2).write_bytes(run.checkpoint(2).read_bytes()[:-9])
    found, faults = checkpoint.newest(run, copy)
    assert (found.path, list(faults)) == (copy.checkpoint(2), [run.checkpoint(2)])
    copy.checkpoint(2).unlink()
    assert checkpoint.newest(run, copy)[0].path == run.checkpoint(1)
    shutil.rmtree(run.path)
    assert checkpoint.newest(run, copy)[0].path == copy.checkpoint(1)
    assert checkpoint.newest(run) == (None, {})
    (tmp_path / "file").write_text("in the way")
    assert checkpoint.newest(copy, RunDir(tmp_path / "file"))[0].path == copy.checkpoint(1)
    copy.checkpoint(1).write_bytes(b"")
    with pytest.raises(Failure, match="is whole"):
        checkpoint.newest(run, copy)


@pytest.mark.fault("F42")
def test_writer_copy_that_blocks_keeps_nobody_waiting(tmp_path):
    """Checkpoints are written, and the newest is copied as soon as that is possible again."""
    run, copy, events, said = RunDir(tmp_path / "run"), RunDir(tmp_path / "copy"), [], []
    writer = CheckpointWriter(run, 3, lambda name, **data: events.append((name, data["step"])), copy, said.append)
    copy.checkpoints.mkdir(parents=True)
    pipe = copy.checkpoint(1).with_suffix(".safetensors.tmp")
    os.mkfifo(pipe)  # opening it waits for a reader
    for step in (1, 2, 3):
        begin(writer, step)
        assert writer.wait(0.01) is None
    assert steps(run.path) == [3, 2, 1] and steps(copy.path) == []
    assert events == [("checkpoint", 1), ("checkpoint", 2), ("checkpoint", 3), ("copy_failed", 2)]
    assert said == [
        f"warning: {copy.checkpoints} is slow or blocks: its last copy is still being written",
        f"warning: no copy of the checkpoint of step 2 in {copy.checkpoints}: the one before is still being written",
    ]
    writer.wait_for_last(0.01)
    assert said[2:] == [f"warning: {copy.checkpoints} blocks: the copy that is being written there is given up"]
    with open(pipe.rename(tmp_path / "pipe"), "rb") as reader:  # renamed first: reading it back by its name would block
        reader.read()  # what is behind the pipe is lost: the copy of step 1 fails
    writer.wait_for_last(60)
    assert steps(copy.path) == [3] and len(said) == 4
    assert events[4:] == [("copy_failed", 1), ("checkpoint_copy", 3)]


@pytest.mark.fault("F42")
def test_writer_copy_without_a_thread_is_a_failed_copy(tmp_path, monkeypatch):
    run, copy, said = RunDir(tmp_path / "run"), RunDir(tmp_path / "copy"), []
    writer = CheckpointWriter(run, 3, lambda name, **data: None, copy, said.append)
    begin(writer, 1)
    assert writer.wait() is None
    start = threading.Thread.start

    def limited(thread):
        if thread.name == "copy":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", limited)
        begin(writer, 2)
        assert writer.wait() is None
    begin(writer, 3)
    assert writer.wait() is None
    assert (steps(run.path), steps(copy.path)) == ([3, 2, 1], [3, 1])
    assert said == [f"warning: no copy of the checkpoint of step 2 in {copy.checkpoints}: can't start new thread"]


def unlisted(run_dir):
    """Has a directory's names not be read; returns the code of the failure."""
    shutil.rmtree(run_dir.checkpoints)
    run_dir.checkpoints.symlink_to(run_dir.checkpoints.name)
    return CONFIGURATION


def unanswered(run_dir, monkeypatch, what, when):
    """Has storage answer EIO for a directory, or a file in it."""
    real = open if what == ("builtins.open",) else getattr(*what)

    def answer(path, *more, **named):
        if when(Path(path)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *more, **named)

    monkeypatch.setattr(*what, answer)
    return LOST_RANK


HARMS = {
    "loop of links": lambda copy, patch: unlisted(copy),
    "names": lambda copy, patch: unanswered(copy, patch, (Path, "iterdir"), lambda path: path == copy.checkpoints),
    "files": lambda copy, patch: unanswered(copy, patch, ("builtins.open",), lambda path: path.parent == copy.checkpoints),
}


@pytest.mark.fault("F42")
@pytest.mark.parametrize("harm", HARMS)
def test_copies_that_cannot_be_read_end_no_run(tmp_path, monkeypatch, capsys, harm):
    """That has a whole checkpoint of its own, if an older one; one that has none does not start over."""
    monkeypatch.setattr(storage, "WAITS", (0.001,))
    monkeypatch.setattr(storage, "_told", set())
    monkeypatch.setattr(storage, "_given_up", {})
    run, copy = RunDir(tmp_path / "run"), RunDir(tmp_path / "copy")
    writer = CheckpointWriter(run, 2, lambda name, **data: None, copy)
    for step in (1, 2):
        begin(writer, step)
        assert writer.wait() is None
    run.checkpoint(2).unlink()
    code = HARMS[harm](copy, monkeypatch)
    checkpoint.clean(copy)
    for _ in range(2):
        assert checkpoint.newest(run, copy)[0].path == run.checkpoint(1)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"the copies of checkpoints cannot be used: {copy.checkpoints}" in line and "cannot be read: " in line
    assert line.endswith(f". The run continues from {run.checkpoint(1)}")
    require_checkpoints(TrainConfig(run_dir=str(run.path), resume="required"), copy)
    for harmed in (lambda: run.checkpoint(1).write_bytes(b""), lambda: shutil.rmtree(run.path)):
        harmed()
        require_checkpoints(TrainConfig(run_dir=str(run.path)), copy)
        with pytest.raises(Failure, match="start without --checkpoint_copy_dir if it holds no checkpoint of this") as raised:
            checkpoint.newest(run, copy)
        assert raised.value.code == code
        assert f"{run.checkpoints} holds no whole checkpoint, and {copy.checkpoints}" in raised.value.message


@pytest.mark.fault("F42")
def test_own_checkpoint_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    """Its copy is taken; where that is damaged or not there, no older one of either is."""
    monkeypatch.setattr(storage, "WAITS", (0.001,))
    monkeypatch.setattr(storage, "_given_up", {})
    run, copy = RunDir(tmp_path / "run"), RunDir(tmp_path / "copy")
    writer = CheckpointWriter(run, 2, lambda name, **data: None, copy)
    for step in (1, 2):
        begin(writer, step)
        assert writer.wait() is None
    unanswered(run, monkeypatch, ("builtins.open",), lambda path: path == run.checkpoint(2))
    assert checkpoint.newest(run, copy)[0].path == copy.checkpoint(2)
    for harm in (lambda: copy.checkpoint(2).write_bytes(b""), copy.checkpoint(2).unlink):
        harm()
        with pytest.raises(Failure, match="cannot be read: Input/output error") as raised:
            checkpoint.newest(run, copy)
        assert raised.value.code == LOST_RANK


@pytest.mark.fault("F42")
def test_checkpoint_is_saved_where_names_cannot_be_read(tmp_path, monkeypatch):
    """What cannot be pruned stays: the file is whole and in place."""
    monkeypatch.setattr(storage, "WAITS", (0.001,))
    monkeypatch.setattr(storage, "_given_up", {})
    run, events = RunDir(tmp_path), []
    writer = CheckpointWriter(run, 1, lambda name, **data: events.append((name, data["step"])))
    with monkeypatch.context() as patch:
        unanswered(run, patch, (Path, "iterdir"), lambda path: path == run.checkpoints)
        for step in (1, 2):
            begin(writer, step, best=[checkpoint.BEST])
            assert writer.wait() is None
    assert steps(tmp_path) == [2, 1] and checkpoint.best(run) == run.checkpoint(2)
    assert events == [("checkpoint", 1), ("checkpoint", 2)]


@pytest.mark.fault("F42")
@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_directory_of_copies_that_cannot_be_locked_is_a_warning(tmp_path, monkeypatch, capsys, number):
    """Unless another job holds it."""
    reporter = Reporter(None, Console("lines", True))

    def refused(*arguments):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refused)
        assert open_copy_dir(str(tmp_path), reporter).path == tmp_path
    assert "warning: no copies of checkpoints at present: " in capsys.readouterr().out
    held = open_copy_dir(str(tmp_path), reporter)
    with held.held, pytest.raises(Failure, match="is in use by another job") as raised:
        open_copy_dir(str(tmp_path), reporter)
    assert raised.value.code == CONFIGURATION
