"""The thread that writes checkpoints, where disks fail in ways that a checkpoint alone cannot know of."""

import errno
import os
import shutil

import numpy as np
import pytest

from hvd_vgg.errors import NOT_WRITTEN, Failure
from hvd_vgg.run_dir import RunDir, checkpoint_step
from hvd_vgg.training import checkpoint
from hvd_vgg.training.checkpoint_writer import CheckpointWriter


def begin(writer, step, best=False):
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
        begin(writer, step, best=step == 2)
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
        begin(writer, step, best=step == 1)
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
