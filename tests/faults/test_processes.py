"""Ranks that raise, die, leave, freeze, or are asked to stop (F01 to F13): who is blamed, how fast all end, what is lost.

Each fault is put into one rank from outside (tests/worker.py). Every wait has a limit and fails when a process is left
(tests/support.py). The bounds in seconds are three times those of the matrix in README.md beside this, for slow machines.
"""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from oracles import FLAGS, STEPS, assert_exact, assert_goes_on, assert_true, blamed, events, newest, start
from support import ROOT, Started, command_line, wait_for


def seconds_since(out, step):
    """Returns how long ago a run's log was at `step`."""
    rows = [json.loads(line[5:]) for line in (out / "run" / "dllogger.json").read_text().splitlines()]
    return time.time() - max(float(row["timestamp"]) for row in rows if row.get("step", "")[1:] == [step])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.fault("F01", "F02")
def test_a_rank_that_raises_is_blamed_and_ends_all(tmp_path, data, undisturbed, rank):
    """F01, F02: 70, one message of the program, one traceback."""
    ended = start(tmp_path, data, 2, f"raise@{rank}:3").wait()
    assert ended.code == 70, ended.out + ended.err
    assert seconds_since(tmp_path, 2) < 30
    assert blamed(tmp_path) == (rank, 3, "update", 70)
    assert ended.err.count("Traceback") == 1
    assert "a fault of the test" in ended.err
    if rank == 1:
        assert_goes_on(tmp_path, data, undisturbed)


@pytest.mark.fault("F02")
def test_a_rank_that_raises_before_it_joined_is_blamed(tmp_path, data):
    """F02: TensorFlow cannot be imported on rank 1, while rank 0 waits for it."""
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow" / "tensorflow.py").write_text("raise RuntimeError('a broken installation')\n")
    out = tmp_path / "out"
    out.mkdir()
    flags = [f"--data_dir={data}", f"--run_dir={out / 'run'}", *FLAGS]
    line = command_line(1, ["train", *flags])
    shadowed = f"PYTHONPATH={tmp_path / 'shadow'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    second = ["-np", "1", "env", shadowed, sys.executable, "-m", "hvd_vgg", "train", *flags]
    started = Started([*line, ":", *second], out)
    ended = started.wait()
    assert ended.code == 70, ended.out + ended.err
    assert "a broken installation" in ended.err
    assert blamed(out) == (1, None, "start", 70)


@pytest.mark.fault("F03")
def test_a_rank_that_is_killed_ends_all_and_nothing_is_lost(tmp_path, data, undisturbed):
    """F03: 137, and the run goes on to the same end."""
    ended = start(tmp_path, data, 2, "kill@1:5").wait()
    assert ended.code == 137, ended.err
    assert seconds_since(tmp_path, 4) < 45
    assert not list((tmp_path / "run" / "faults").glob("fatal.*"))  # a killed rank cannot speak, and no other is to blame
    assert newest(tmp_path).meta["step"] in (3, 4, 5)
    assert_goes_on(tmp_path, data, undisturbed)


@pytest.mark.fault("F05")
def test_a_segmentation_fault_leaves_its_stack(tmp_path, data):
    """F05."""
    ended = start(tmp_path, data, 2, "segv@1:3").wait()
    assert ended.code == 139, ended.err
    stack = (tmp_path / "run" / "faults" / "stacks.rank1.txt").read_text()
    assert "Segmentation fault" in stack
    assert "beat_and_fail" in stack


@pytest.mark.fault("F06")
def test_a_rank_that_leaves_early_with_success_is_blamed(tmp_path, data):
    """F06: 70, and not rank 0, which Horovod would shut down."""
    ended = start(tmp_path, data, 2, "leave@1:3").wait()
    assert ended.code == 70, ended.out + ended.err
    assert seconds_since(tmp_path, 2) < 30
    assert blamed(tmp_path) == (1, 3, "update", 70)


@pytest.mark.fault("F07")
def test_a_record_that_breaks_preprocessing_is_named(tmp_path, data):
    """F07: 70, the rank is blamed, and the traceback names the record."""
    ended = start(tmp_path, data, 2, "preprocess@1:0").wait()
    assert ended.code == 70, ended.out + ended.err
    assert blamed(tmp_path)[::3] == (1, 70)
    assert "a fault of the test" in ended.err
    assert re.search(r"train-0000\d-of-00003, record \d+, offset \d+", ended.err)


@pytest.mark.fault("F32")
def test_ranks_with_different_software_are_told_apart(tmp_path, data):
    """F32: 78 before the first step, both values in one line."""
    ended = start(tmp_path, data, 2, "version@1:0").wait()
    assert ended.code == 78, ended.out + ended.err
    assert re.search(r"^ +tensorflow +'\d+\.\d+\.\d+' +'2\.15\.1'$", ended.err, re.M)
    assert "steps 0 to" not in ended.out


def last_words(out, rank):
    """Returns what a stalled rank left."""
    (line,) = (out / "run" / "faults" / f"hang.rank{rank}.jsonl").read_text().splitlines()
    return json.loads(line)


@pytest.mark.parametrize(
    "fault",
    ["stop", pytest.param("sleep", marks=pytest.mark.fault(tier=3)), pytest.param("hold", marks=pytest.mark.fault(tier=3))],
)
@pytest.mark.fault("F08", "F09", "F10")
def test_a_stuck_rank_ends_all_with_last_words(tmp_path, data, undisturbed, fault):
    """F08 asleep in Python, F09 frozen, F10 holding Python's lock: 75, not before its time, and who it was can be read."""
    started = start(tmp_path, data, 2, f"{fault}@1:5:600", "--hang_seconds=6", HOROVOD_STALL_CHECK_TIME_SECONDS="3")
    ended = started.wait()
    assert ended.code == 75, ended.out + ended.err
    assert 6 <= seconds_since(tmp_path, 4) < 45
    waiting = last_words(tmp_path, 0)
    assert (waiting["step"], waiting["phase"], waiting["limit_seconds"]) == (5, "update", 6)
    assert waiting["last_collective"] == "sum_over_ranks"
    assert isinstance(waiting["batches_ready"], int)
    assert any("train_step" in line or "loop.py" in line for line in waiting["stacks"])
    assert f"hvd-vgg: rank 0 ({waiting['host']}): no progress for " in ended.err
    if fault == "sleep":
        assert any("beat_and_fail" in line for line in last_words(tmp_path, 1)["stacks"])
        # Horovod's own inspector names who is missing, and what for.
        assert "Missing ranks:" in ended.err and "1: [" in ended.err
    if fault == "hold":  # written from C: no Python runs
        assert "hold_the_lock" in (tmp_path / "run" / "faults" / "stacks.rank1.txt").read_text()
    assert_goes_on(tmp_path, data, undisturbed)


@pytest.mark.fault("F10")
def test_one_rank_that_holds_pythons_lock_for_ever_is_ended(tmp_path, data):
    """F10 with nobody else to notice: SIGALRM needs no lock."""
    ended = start(tmp_path, data, 0, "hold@0:3:600", "--hang_seconds=2").wait()
    assert ended.code == -signal.SIGALRM
    assert "hold_the_lock" in (tmp_path / "run" / "faults" / "stacks.rank0.txt").read_text()


@pytest.mark.fault("F09")
def test_a_rank_that_is_stuck_when_all_leave_is_waited_for_by_no_one_for_ever(tmp_path):
    """F09 without a watch before, as in doctor: MPI's end waits for all ranks. How long it may is shortened here."""
    program = (
        "import os, signal\n"
        "from hvd_vgg.parallel import comm\n"
        "from hvd_vgg.run import watch\n"
        "watch.LEAST_SECONDS = 0.3\n"
        "comm.start(hang_seconds=60)\n"
        "comm.barrier()\n"
        "if comm.rank() == 1:\n"
        "    os.kill(os.getpid(), signal.SIGSTOP)\n"
        "comm.leave()\n"
    )
    ended = Started(command_line(2, ["-c", program], [sys.executable]), tmp_path, PYTHONPATH=str(ROOT)).wait()
    assert ended.code == 75, ended.out + ended.err
    assert "no progress for 3 s after leaving" in ended.err and "in shutdown" in ended.err


@pytest.mark.fault("F08", tier=3)
def test_a_rank_that_has_left_and_does_not_end_is_ended(tmp_path, data):
    """F08 after the end of MPI: everything is written, but mpirun waits for the process."""
    ended = start(tmp_path, data, 2, "linger@1:0:600", "--hang_seconds=3").wait()
    assert ended.code == 128 + signal.SIGALRM, ended.out + ended.err
    assert re.search(r"Timeout .*!\nThread 0x", ended.err), ended.err  # where it hung
    assert newest(tmp_path).meta["step"] == STEPS
    assert_true(tmp_path / "run")


@pytest.mark.fault("F08")
def test_a_slow_evaluation_or_save_is_no_hang(tmp_path, data):
    """A watchdog that ends healthy runs is a fault too: each batch here takes as long as an update may."""
    program = (
        "import runpy, sys, time\n"
        "from hvd_vgg.train import step\n"
        "make = step.make_eval_step\n"
        "def slowly(*arguments):\n"
        "    evaluate = make(*arguments)\n"
        "    return lambda *batch: (time.sleep(3), evaluate(*batch))[1]\n"
        "step.make_eval_step = slowly\n"
        "sys.argv[0] = 'hvd-vgg'\n"
        "runpy.run_module('hvd_vgg', run_name='__main__')\n"
    )
    flags = [f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *FLAGS, "--hang_seconds=2", "--steps=3"]
    ended = Started(command_line(2, ["-c", program, "train", *flags], [sys.executable]), tmp_path).wait()
    assert ended.code == 0, ended.out + ended.err


@pytest.mark.parametrize(("fault", "rank"), [("term", 1), pytest.param("usr1", 0, marks=pytest.mark.fault(tier=3))])
@pytest.mark.fault("F13")
def test_a_request_to_any_rank_stops_all_after_the_same_step(tmp_path, data, undisturbed, fault, rank):
    """F13: 80, a checkpoint of the step agreed on, which the run goes on from."""
    ended = start(tmp_path, data, 2, f"{fault}@{rank}:4").wait()
    assert ended.code == 80, ended.out + ended.err
    assert seconds_since(tmp_path, 4) < 60
    assert ended.err.count("hvd-vgg: stopped on request after step 4 of 12") == 1
    assert events(tmp_path)[-1] == {"event": "stopped", "step": 4}
    assert_goes_on(tmp_path, data, undisturbed, step=4)


@pytest.mark.fault("F13", tier=3)
def test_a_request_while_updates_are_slow_or_far_from_a_log_line_is_heard(tmp_path, data):
    """The ranks listen between log lines too: 12 updates of a second, a line at the end only."""
    faults = [f"sleep@{rank}:{at}:1" for rank in (0, 1) for at in range(1, STEPS)]
    started = start(tmp_path, data, 2, *faults, "--log_every_steps=100", "--save_every_steps=0", "--steps=60")
    wait_for(lambda: (tmp_path / "ids.rank0").exists() and len((tmp_path / "ids.rank0").read_text().splitlines()) > 6)
    ranks = [pid for pid in started.alive() if b"worker.py" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[1]]
    os.kill(ranks[0], signal.SIGTERM)
    ended = started.wait()
    assert ended.code == 80, ended.out + ended.err
    assert newest(tmp_path).meta["step"] < STEPS


@pytest.mark.fault("F13", tier=3)
def test_a_request_during_an_evaluation_leaves_it_to_the_next_start(tmp_path, data, undisturbed):
    """The weights are saved, and what was not scored to the end is scored first when the run goes on."""
    flags = ["--eval_every_epochs=2.5", "--device_batch=4"]  # after 6 updates; 10 batches
    whole = tmp_path / "whole"
    assert start(whole, data, 2, *flags).wait().code == 0
    out = tmp_path / "stopped"
    ended = start(out, data, 2, "usr1@1:6", *flags).wait()
    assert ended.code == 80, ended.out + ended.err
    assert newest(out).meta["step"] == 6
    assert newest(out).meta["evaluated"] == 0
    ended = start(out, data, 2, *flags).wait()
    assert ended.code == 0, ended.out + ended.err
    assert ended.out.index("step 6  epoch 2.56  evaluation") < ended.out.index("step 7/12")
    for name in ("top1_hits", "top5_hits"):
        assert len({json.loads((each / "run" / "result.json").read_text())[name] for each in (whole, out)}) == 1
    assert_exact(out, 2, whole)


@pytest.mark.fault("F13", tier=3)
def test_a_request_during_the_last_evaluation_leaves_the_result_to_the_next_start(tmp_path, data):
    """Then no update is left, and the result is written all the same."""
    flags = ["--steps=6", "--device_batch=4"]
    ended = start(tmp_path, data, 1, "usr1@0:6", *flags).wait()
    assert ended.code == 80, ended.out + ended.err
    assert not (tmp_path / "run" / "result.json").exists()
    assert not (tmp_path / "run" / "faults").exists()  # nothing was wrong
    ended = start(tmp_path, data, 1, *flags).wait()
    assert ended.code == 0, ended.out + ended.err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["steps"], result["records_evaluated"], result["fps"]) == (6, 37, None)
