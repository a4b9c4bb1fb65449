"""Checkpoints and disks that fail (F16 to F23): what is written is whole, and nothing starts over in silence.

More of them needs no ranks and is in tests/unit/test_checkpoint.py: SIGKILL at random moments of saving, the order of
writes that survives a power cut, damaged files, names that lead elsewhere. Two jobs on one directory, changed flags, and a
directory that cannot be written are in test_errors.py; other numbers of ranks in test_equality.py.
"""

import contextlib
import json
import shutil
import subprocess
import time

import pytest
from oracles import STEPS, assert_exact, assert_goes_on, assert_true, events, newest, start
from support import wait_for
from test_equality import assert_same_weights

from hvd_vgg.train import checkpoint


@pytest.fixture
def small_disk(tmp_path):
    """A run directory on a file system of 16 MB: three checkpoints of these tests (4 MB each) fit, and half of another."""
    place = tmp_path / "run"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "hvd_vgg_test", place], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"capability: mounting a tmpfs ({made.stderr.strip()})")
    yield tmp_path
    subprocess.run(["umount", place], check=True)


def fill(place):
    """Fills a file system to the last byte; returns the file that does."""
    path = place / "filler"
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 100_000):
            pass
    return path


@pytest.mark.fault("F17")
def test_a_full_disk_is_no_reason_to_stop_and_what_was_logged_meanwhile_is_not_lost(small_disk, data):
    """F17: full from step 4 on, with room again before the end."""
    pace = [f"sleep@0:{at}:0.5" for at in range(3, 12)]
    started = start(small_disk, data, 2, *pace, "--keep_checkpoints=1")  # with more, older ones make room
    wait_for(lambda: "step 4/" in started.out.read_text())
    filler = fill(small_disk / "run")
    wait_for(lambda: "cannot be written" in started.out.read_text())
    filler.unlink()
    ended = started.wait()
    assert ended.code == 0, ended.out + ended.err
    failed = [event for event in events(small_disk) if event["event"] == "save_failed"]
    # The one being written while the disk filled fails in its writing; those after it are not begun.
    assert failed and all("are free" in event["error"] or "No space left" in event["error"] for event in failed)
    assert newest(small_disk).meta["step"] == 12
    rows = [json.loads(line[5:]) for line in (small_disk / "run" / "dllogger.json").read_text().splitlines()]
    assert [row["step"][1] for row in rows if "train.loss" in row.get("data", {})] == list(range(1, 13))


@pytest.mark.fault("F17")
def test_a_disk_that_stays_full_ends_the_run_with_74_at_its_end(small_disk, data):
    """F17: the last checkpoint cannot be written; the one before is whole."""
    started = start(small_disk, data, 2, *[f"sleep@0:{at}:0.5" for at in range(3, 9)], "--keep_checkpoints=1")
    wait_for(lambda: "step 4/" in started.out.read_text())
    fill(small_disk / "run")
    ended = started.wait()
    assert ended.code == 74, ended.out + ended.err
    assert "step 12/12" in ended.out
    assert ended.err.count("hvd-vgg: ") == 1 and "step-00000012.safetensors cannot be written: " in ended.err
    assert 2 <= newest(small_disk).meta["step"] <= 5
    assert not list(checkpoint.folder(small_disk / "run").glob("*.tmp"))


@pytest.mark.fault("F17", tier=3)
def test_a_run_is_started_again_on_a_full_disk(small_disk, data):
    """F17: what an earlier start wrote does for now, also where the flags are others; there is room again before the end."""
    assert start(small_disk, data, 1, "term@0:4", "--keep_checkpoints=1").wait().code == 80
    run_dir = small_disk / "run"
    shutil.rmtree(run_dir / "tensorboard")
    filler = fill(run_dir)
    pace = [f"sleep@0:{at}:0.5" for at in range(5, 12)]
    started = start(small_disk, data, 1, *pace, "--keep_checkpoints=1", "--lr=0.004", "--allow_config_change=lr")
    wait_for(lambda: "step 6/" in started.out.read_text() or started.process.poll() is not None)
    filler.unlink()
    ended = started.wait()
    assert ended.code == 0, ended.out + ended.err
    told = [line for line in ended.out.splitlines() if "TensorBoard" in line or "an earlier start's" in line]
    assert [line.split()[0].split("/")[-1] for line in told] == ["tensorboard", "flags.txt", "receipt.json"], ended.out
    assert "No space left on device" in told[0] and "tensorflow" not in told[0].lower()
    assert "--lr=0.004" in (run_dir / "flags.txt").read_text()
    assert not list(run_dir.glob("*.tmp"))
    assert_true(run_dir)


@pytest.mark.parametrize(
    "damage",
    [pytest.param("cut", marks=pytest.mark.fault(tier=3)), "flip", pytest.param("pointer", marks=pytest.mark.fault(tier=3))],
)
@pytest.mark.fault("F18")
def test_a_damaged_newest_checkpoint_is_told_and_passed_over(tmp_path, data, undisturbed, damage):
    """F18: on to the same end from the one before, with one event that names the bad file."""
    ended = start(tmp_path, data, 2, "term@1:6").wait()
    assert ended.code == 80, ended.out + ended.err
    path = checkpoint.existing(tmp_path / "run")[0]
    whole = path.read_bytes()
    if damage == "pointer":
        (path.parent / "best").write_text("../../../../etc/passwd\n")
    else:
        path.write_bytes(whole[:-9] if damage == "cut" else whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    ended = start(tmp_path, data, 2).wait()
    assert ended.code == 0, ended.out + ended.err
    told = [event["file"] for event in events(tmp_path) if event["event"] == "checkpoint_damaged"]
    resumed = [event["from"] for event in events(tmp_path) if event["event"] == "resume"]
    assert (told, resumed) == (([], [6]) if damage == "pointer" else ([path.name], [5]))
    assert_exact(tmp_path, 2, undisturbed)


@pytest.mark.fault("F14", "F19")
def test_a_run_killed_while_it_saves_goes_on_and_leaves_no_scraps(tmp_path, data, undisturbed):
    """F14, F19: rank 0 dies with a checkpoint half way."""
    ended = start(tmp_path, data, 2, "saveslowly@0:5:0.5", "kill@0:7").wait()
    assert ended.code == 137, ended.err
    (checkpoint.folder(tmp_path / "run") / "step-00000007.safetensors.tmp").write_bytes(b"half")
    assert_goes_on(tmp_path, data, undisturbed)
    assert not list(checkpoint.folder(tmp_path / "run").glob("*.tmp"))


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, data, undisturbed):
    """The loop waits for the copy only: writing takes 5 s here, and updates pass meanwhile; the next save waits its turn."""
    began = time.time()
    ended = start(tmp_path, data, 2, "saveslowly@0:1:5", "--save_every_steps=8").wait()
    assert ended.code == 0, ended.out + ended.err
    rows = [json.loads(line[5:]) for line in (tmp_path / "run" / "dllogger.json").read_text().splitlines()]
    at = {row["step"][1]: float(row["timestamp"]) for row in rows if "train.loss" in row.get("data", {})}
    written = (checkpoint.folder(tmp_path / "run") / "step-00000008.safetensors").stat().st_mtime
    assert began < at[8] < at[12] < written
    assert newest(tmp_path).meta["step"] == 12
    assert_exact(tmp_path, 2, undisturbed)


@pytest.mark.fault("F23", tier=3)
def test_only_rank_0_looks_at_checkpoints(tmp_path, data, undisturbed):
    """F23: another rank's directory has none (a disk of its own host): all start where rank 0 does."""
    from oracles import FLAGS, WORKER
    from support import Started, command_line

    assert start(tmp_path, data, 2, "term@0:4").wait().code == 80
    flags = [f"--data_dir={data}", *FLAGS]
    line = command_line(1, [str(tmp_path), "train", *flags, f"--run_dir={tmp_path / 'run'}"], WORKER)
    other = ["-np", "1", *WORKER, str(tmp_path), "train", *flags, f"--run_dir={tmp_path / 'other'}"]
    ended = Started([*line, ":", *other], tmp_path).wait()
    assert ended.code == 0, ended.out + ended.err
    assert "steps 4 to 12" in ended.out
    assert_exact(tmp_path, 2, undisturbed)


@pytest.mark.fault("F19")
def test_the_best_checkpoint_is_pointed_to_although_the_run_was_killed_before(tmp_path, data, undisturbed):
    shutil.copytree(undisturbed / "run", tmp_path / "run")
    (checkpoint.folder(tmp_path / "run") / "best").unlink()
    ended = start(tmp_path, data, 2).wait()
    assert ended.code == 0, ended.out + ended.err
    assert checkpoint.best(tmp_path / "run").name == "step-00000012.safetensors"


@pytest.mark.fault("F21", tier=3)
def test_one_rank_then_two_then_one_is_the_run_never_stopped(tmp_path, data, undisturbed):
    """F21: two changes of the number of ranks."""
    for ranks, fault, code in ((1, "term@0:3", 80), (2, "term@1:7", 80), (1, "", 0)):
        ended = start(tmp_path, data, ranks, *[fault] * bool(fault)).wait()
        assert ended.code == code, ended.out + ended.err
    assert [event["ranks"] for event in events(tmp_path) if event["event"] == "start"] == [1, 2, 1]
    assert newest(tmp_path).meta["step"] == STEPS
    assert_same_weights(newest(tmp_path), newest(undisturbed))
