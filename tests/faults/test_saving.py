"""Checkpoints and disks that fail (F16 to F23): what is written is whole, and nothing starts over in silence.

What needs no ranks is in tests/unit/test_checkpoint.py: SIGKILL at random moments of saving, the order of writes that
survives a power cut, damaged files, pointers that lead elsewhere. Two jobs on one directory, changed flags, and a directory
that cannot be written are in test_errors.py.
"""

import contextlib
import shutil

import pytest
from oracles import (
    FLAGS,
    INJECT,
    STEPS,
    assert_exact,
    assert_goes_on,
    assert_same_state,
    assert_true,
    events,
    losses,
    newest,
    run,
    start,
)
from support import Started, command_line, full, small_disk_at, wait_for

from hvd_vgg.run_dir import RunDir, checkpoint_step
from hvd_vgg.training import checkpoint


@pytest.fixture
def small_disk(tmp_path):
    """A run directory on a file system of 16 MB: three checkpoints of these tests (4 MB each) fit, and half of another."""
    with small_disk_at(tmp_path / "run", "16m"):
        yield tmp_path


def fill(place):
    """Fills a file system to the last byte; returns the file that does."""
    path = place / "filler"
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 100_000):
            pass
    return path


def paced(*steps):
    """Returns faults that let rank 0 sleep half a second before these steps."""
    return [f"sleep@0:{step}:0.5" for step in steps]


@pytest.mark.fault("F17")
def test_full_disk_stops_no_run_and_loses_no_log_line(small_disk, data):
    """Full from step 4 on, with room again before the end."""
    started = start(small_disk, data, 0, *paced(*range(3, 12)), "--keep_checkpoints=1")  # with more, older ones make room
    wait_for(lambda: "step 4/" in started.out.read_text())
    filler = fill(small_disk / "run")
    wait_for(lambda: "cannot be written" in started.out.read_text())
    filler.unlink()
    started.wait(code=0)
    failed = events(small_disk / "run", "save_failed")
    # The one being written while the disk filled fails in its writing; those after it are not begun.
    assert failed and all("are free" in event["error"] or "No space left" in event["error"] for event in failed)
    assert newest(small_disk).meta["step"] == STEPS
    assert list(losses(small_disk / "run")) == list(range(1, STEPS + 1))


@pytest.mark.fault("F17")
def test_full_disk_to_the_end_ends_the_run_with_74(small_disk, data):
    """The last checkpoint cannot be written; the one before is whole."""
    started = start(small_disk, data, 0, *paced(*range(3, 9)), "--keep_checkpoints=1")
    wait_for(lambda: "step 4/" in started.out.read_text())
    fill(small_disk / "run")
    ended = started.wait(code=74)
    assert "step 12/12" in ended.out
    assert ended.err.count("hvd-vgg: ") == 1 and "step-00000012.safetensors cannot be written: " in ended.err
    assert 2 <= newest(small_disk).meta["step"] <= 5
    assert not list(RunDir(small_disk / "run").checkpoints.glob("*.tmp"))


@pytest.mark.fault("F17", tier=3)
def test_full_disk_at_a_restart(small_disk, data):
    """What an earlier start wrote does for now, also where the flags are others; there is room again before the end."""
    run(small_disk, data, 1, "term@0:4", "--keep_checkpoints=1", code=80)
    run_dir = small_disk / "run"
    shutil.rmtree(run_dir / "tensorboard")
    filler = fill(run_dir)
    flags = ["--keep_checkpoints=1", "--lr=0.004", "--allow_config_change=lr"]
    started = start(small_disk, data, 1, *paced(*range(5, 12)), *flags)
    wait_for(lambda: "step 6/" in started.out.read_text() or started.process.poll() is not None)
    filler.unlink()
    ended = started.wait(code=0)
    said = [line for line in ended.out.splitlines() if "TensorBoard" in line or "an earlier start" in line]
    assert [line.split()[0].split("/")[-1] for line in said] == ["tensorboard", "flags.txt", "receipt.json"], ended.out
    assert "No space left on device" in said[0] and "tensorflow" not in said[0].lower()
    assert "--lr=0.004" in (run_dir / "flags.txt").read_text()
    assert not list(run_dir.glob("*.tmp"))
    assert_true(run_dir)


@pytest.mark.parametrize("damage", ["flip", *full("cut", "pointer")])
@pytest.mark.fault("F18")
def test_damaged_newest_checkpoint_is_passed_over(tmp_path, data, undisturbed, damage):
    """On to the same end from the one before, with one event that names the bad file."""
    run(tmp_path, data, 2, "term@1:6", code=80)
    path = RunDir(tmp_path / "run").list_checkpoints()[0]
    whole = path.read_bytes()
    if damage == "pointer":
        (path.parent / "best").write_text("../../../../etc/passwd\n")
    else:
        path.write_bytes(whole[:-9] if damage == "cut" else whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    run(tmp_path, data, 2)
    damaged = [event["file"] for event in events(tmp_path / "run", "checkpoint_damaged")]
    resumed = [event["from"] for event in events(tmp_path / "run", "resume")]
    assert (damaged, resumed) == (([], [6]) if damage == "pointer" else ([path.name], [5]))
    assert_exact(tmp_path, 2, undisturbed)


@pytest.mark.fault("F14", "F19")
def test_run_killed_while_it_saves_goes_on_and_tidies_up(tmp_path, data, undisturbed):
    """Rank 0 dies with a checkpoint half way."""
    run(tmp_path, data, 2, "slow_save@0:5:0.5", "kill@0:7", code=137)
    (RunDir(tmp_path / "run").checkpoints / "step-00000007.safetensors.tmp").write_bytes(b"half")
    assert_goes_on(tmp_path, data, undisturbed)
    assert not list(RunDir(tmp_path / "run").checkpoints.glob("*.tmp"))


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, data):
    """The loop waits for the copy only: the first save is held until the last update; the next waits its turn."""
    run(tmp_path, data, 0, "hold_save@0:1:12", "--save_every_steps=8")
    assert (tmp_path / "held").exists()
    assert [checkpoint_step(path) for path in RunDir(tmp_path / "run").list_checkpoints()] == [12, 8]
    assert_true(tmp_path / "run")


@pytest.mark.fault("F23", tier=3)
def test_checkpoints_are_read_by_rank_0_alone(tmp_path, data, undisturbed):
    """Another rank's directory has none (a disk of its own host): all start where rank 0 does."""
    run(tmp_path, data, 2, "term@0:4", code=80)
    flags = [f"--data_dir={data}", *FLAGS]
    line = command_line(1, [str(tmp_path), "train", *flags, f"--run_dir={tmp_path / 'run'}"], INJECT)
    other = ["-np", "1", *INJECT, str(tmp_path), "train", *flags, f"--run_dir={tmp_path / 'other'}"]
    ended = Started([*line, ":", *other], tmp_path).wait(code=0)
    assert "steps 4 to 12" in ended.out
    assert_exact(tmp_path, 2, undisturbed)


@pytest.mark.fault("F19", tier=3)
def test_best_checkpoint_is_pointed_to_after_a_kill(tmp_path, data, undisturbed):
    """The run was killed between the last checkpoint and the pointer to it."""
    shutil.copytree(undisturbed / "run", tmp_path / "run")
    (RunDir(tmp_path / "run").checkpoints / "best").unlink()
    run(tmp_path, data, 2)
    assert checkpoint.best(RunDir(tmp_path / "run")).name == "step-00000012.safetensors"


@pytest.mark.fault("F21", tier=3)
def test_one_rank_then_two_then_one_is_the_run_never_stopped(tmp_path, data, undisturbed):
    for ranks, fault, code in ((1, "term@0:3", 80), (2, "term@1:7", 80), (1, "", 0)):
        run(tmp_path, data, ranks, *[fault] * bool(fault), code=code)
    assert [event["ranks"] for event in events(tmp_path / "run", "start")] == [1, 2, 1]
    assert newest(tmp_path).meta["step"] == STEPS
    assert_same_state(newest(tmp_path), newest(undisturbed))
