"""Ranks that raise, die, leave, freeze, or are asked to stop (F01 to F13): who is blamed, that all end, what is lost.

Each fault is put into one rank from outside (tests/programs/inject.py). Every wait has a limit and fails when a process is
left (tests/support.py).
"""

import json
import os
import re
import signal
import sys
import time

import pytest
from oracles import (
    FLAGS,
    STEPS,
    assert_exact,
    assert_goes_on,
    assert_true,
    blamed,
    events,
    injected_ranks,
    log_rows,
    newest,
    result,
    run,
    start,
)
from support import ROOT, Started, command_line, full, wait_for


@pytest.mark.parametrize("rank", [1, *full(0)])
@pytest.mark.fault("F01", "F02")
def test_rank_that_raises_is_blamed_and_ends_all(tmp_path, data, undisturbed, rank):
    """70, one message of the program, one traceback."""
    ended = run(tmp_path, data, 2, f"raise@{rank}:3", code=70)
    assert blamed(tmp_path) == (rank, 3, "update", 70)
    assert ended.err.count("Traceback") == 1
    assert "a fault of the test" in ended.err
    if rank == 1:
        assert_goes_on(tmp_path, data, undisturbed)


@pytest.mark.fault("F02")
def test_rank_that_raises_before_it_joined_is_blamed(tmp_path, data):
    """TensorFlow cannot be imported on rank 1, while rank 0 waits for it."""
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow" / "tensorflow.py").write_text("raise RuntimeError('a broken installation')\n")
    flags = [f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *FLAGS]
    shadowed = f"PYTHONPATH={tmp_path / 'shadow'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    second = ["-np", "1", "env", shadowed, sys.executable, "-m", "hvd_vgg", "train", *flags]
    ended = Started([*command_line(1, ["train", *flags]), ":", *second], tmp_path).wait(code=70)
    assert "a broken installation" in ended.err
    assert blamed(tmp_path) == (1, None, "start", 70)


@pytest.mark.fault("F03", tier=3)
def test_rank_that_is_killed_ends_all(tmp_path, data):
    """137; that the run goes on to the same end is in test_launch.py and test_equality.py."""
    run(tmp_path, data, 2, "kill@1:5", code=137)
    assert not list((tmp_path / "run" / "faults").glob("fatal.*"))  # a killed rank cannot report, and no other is to blame
    assert newest(tmp_path).meta["step"] in (3, 4, 5)


@pytest.mark.fault("F05")
def test_segmentation_fault_leaves_its_stack(tmp_path, data):
    run(tmp_path, data, 2, "segv@1:3", code=139)
    stack = (tmp_path / "run" / "faults" / "stacks.rank1.txt").read_text()
    assert "Segmentation fault" in stack
    assert "beat_and_fail" in stack


@pytest.mark.fault("F06")
def test_rank_that_exits_early_with_success_is_blamed(tmp_path, data):
    """70, and not rank 0, which Horovod would shut down."""
    run(tmp_path, data, 2, "exit@1:3", code=70)
    assert blamed(tmp_path) == (1, 3, "update", 70)


@pytest.mark.fault("F07")
def test_record_that_breaks_preprocessing_is_named(tmp_path, data):
    """70, the rank is blamed, and the traceback names the record."""
    ended = run(tmp_path, data, 2, "preprocess@1:0", code=70)
    assert blamed(tmp_path)[::3] == (1, 70)
    assert "a fault of the test" in ended.err
    assert re.search(r"train-0000\d-of-00003, record \d+, offset \d+", ended.err)


@pytest.mark.fault("F32", tier=3)
def test_ranks_with_different_software_are_refused(tmp_path, data):
    """78 before the first step, both values in one line."""
    ended = run(tmp_path, data, 2, "version@1:0", code=78)
    assert re.search(r"^ +tensorflow +'\d+\.\d+\.\d+' +'2\.15\.1'$", ended.err, re.M)
    assert "steps 0 to" not in ended.out


def hang_report(out, rank):
    """Returns what a hung rank left."""
    (line,) = (out / "run" / "faults" / f"hang.rank{rank}.jsonl").read_text().splitlines()
    return json.loads(line)


@pytest.mark.parametrize("fault", ["stop", *full("sleep", "hold_gil")])
@pytest.mark.fault("F08", "F09", "F10")
def test_hung_rank_ends_all_with_hang_reports(tmp_path, data, undisturbed, fault):
    """F08 asleep in Python, F09 frozen, F10 holding the GIL: 75, with reports that say which rank hung."""
    stall_check = {"HOROVOD_STALL_CHECK_TIME_SECONDS": "3"}
    ended = run(tmp_path, data, 2, f"{fault}@1:5:600", "--hang_seconds=6", code=75, **stall_check)
    waiting = hang_report(tmp_path, 0)
    assert (waiting["step"], waiting["phase"], waiting["limit_seconds"]) == (5, "update", 6)
    assert waiting["last_collective"] == "sum_over_ranks"
    assert isinstance(waiting["batches_ready"], int)
    assert any("train_step" in line or "loop.py" in line for line in waiting["stacks"])
    assert f"hvd-vgg: rank 0 ({waiting['host']}): no progress for " in ended.err
    if fault == "sleep":
        assert any("beat_and_fail" in line for line in hang_report(tmp_path, 1)["stacks"])
        # Horovod's own inspector names who is missing, and what for.
        assert "Missing ranks:" in ended.err and "1: [" in ended.err
        assert_goes_on(tmp_path, data, undisturbed)
    if fault == "hold_gil":  # written from C: no Python runs
        assert "hold_gil" in (tmp_path / "run" / "faults" / "stacks.rank1.txt").read_text()


@pytest.mark.fault("F10", tier=3)
def test_single_rank_that_holds_the_gil_is_ended(tmp_path, data):
    """F10 with nobody else to notice: SIGALRM needs no GIL."""
    run(tmp_path, data, 0, "hold_gil@0:3:600", "--hang_seconds=2", code=-signal.SIGALRM)
    assert "hold_gil" in (tmp_path / "run" / "faults" / "stacks.rank0.txt").read_text()


@pytest.mark.fault("F09")
def test_rank_frozen_when_all_leave_is_not_awaited_for_ever(tmp_path):
    """F09 without a watchdog before, as in doctor: MPI's end waits for all ranks. How long it may is shortened here."""
    program = """
import os, signal
from hvd_vgg import watchdog
from hvd_vgg.parallel import comm, init
watchdog.MIN_HANG_SECONDS = 0.3
init.join(hang_seconds=60)
comm.barrier()
if comm.rank() == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
comm.shutdown()
"""
    ended = Started(command_line(2, ["-c", program], [sys.executable]), tmp_path, PYTHONPATH=str(ROOT)).wait(code=75)
    assert "no progress for 3 s after leaving" in ended.err and "in shutdown" in ended.err


@pytest.mark.fault("F08", tier=3)
def test_rank_that_left_and_does_not_exit_is_ended(tmp_path, data):
    """F08 after the end of MPI: everything is written, but mpirun waits for the process."""
    ended = run(tmp_path, data, 2, "linger@1:0:600", "--hang_seconds=3", code=128 + signal.SIGALRM)
    assert re.search(r"Timeout .*!\nThread 0x", ended.err), ended.err  # where it hung
    assert newest(tmp_path).meta["step"] == STEPS
    assert_true(tmp_path / "run")


@pytest.mark.fault("F08", tier=3)
def test_slow_evaluation_is_no_hang(tmp_path, data):
    """A watchdog that ends healthy runs is a fault too: a batch here takes longer than an update may."""
    run(tmp_path, data, 0, "slow_evaluation@0:0:5", "--hang_seconds=4", "--steps=3", "--device_batch=64")


@pytest.mark.parametrize(("fault", "rank"), [("term", 1), *full(("usr1", 0))])
@pytest.mark.fault("F13")
def test_stop_request_to_any_rank_stops_all_after_one_step(tmp_path, data, undisturbed, fault, rank):
    """80, a checkpoint of the step agreed on, which the run goes on from."""
    ended = run(tmp_path, data, 2, f"{fault}@{rank}:4", code=80)
    assert ended.err.count("hvd-vgg: stopped on request after step 4 of 12") == 1
    assert events(tmp_path / "run")[-1] == {"event": "stopped", "step": 4}
    assert_goes_on(tmp_path, data, undisturbed, step=4)


@pytest.mark.fault("F13", tier=3)
def test_stop_request_far_from_a_log_line_is_noticed(tmp_path, data):
    """The ranks poll between log lines too: 12 updates of a second, a line at the end only."""
    faults = [f"sleep@{rank}:{step}:1" for rank in (0, 1) for step in range(1, STEPS)]
    started = start(tmp_path, data, 2, *faults, "--log_every_steps=100", "--save_every_steps=0", "--steps=60")
    ids = tmp_path / "ids.rank0"
    wait_for(lambda: ids.exists() and len(ids.read_text().splitlines()) > 6)
    os.kill(injected_ranks(started)[0], signal.SIGTERM)
    started.wait(code=80)
    assert newest(tmp_path).meta["step"] < STEPS


@pytest.mark.fault("F13", tier=3)
def test_stop_request_during_an_evaluation_leaves_it_for_later(tmp_path, data, undisturbed):
    """The weights are saved, and what was not scored to the end is scored first when the run goes on."""
    flags = ["--eval_every_epochs=2.5", "--device_batch=4"]  # after 6 updates; 10 batches
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    run(whole, data, 2, *flags)
    run(out, data, 2, "usr1@1:6", *flags, code=80)
    assert (newest(out).meta["step"], newest(out).meta["evaluated"]) == (6, 0)
    ended = run(out, data, 2, *flags)
    assert ended.out.index("step 6  epoch 2.56  evaluation") < ended.out.index("step 7/12")
    for name in ("top1_hits", "top5_hits"):
        assert result(whole / "run")[name] == result(out / "run")[name]
    assert_exact(out, 2, whole)


@pytest.mark.fault("F13", tier=3)
def test_stop_request_during_the_last_evaluation(tmp_path, data):
    """Then no update is left, and the next start writes the result all the same."""
    flags = ["--steps=6", "--device_batch=4"]
    run(tmp_path, data, 1, "usr1@0:6", *flags, code=80)
    assert not (tmp_path / "run" / "result.json").exists()
    assert not (tmp_path / "run" / "faults").exists()  # nothing was wrong
    run(tmp_path, data, 1, *flags)
    found = result(tmp_path / "run")
    assert (found["steps"], found["records_evaluated"], found["fps"]) == (6, 37, None)


def suspend(started, seconds):
    """Stops all processes of a job, launcher included, and continues them; returns for how long all of them were stopped."""
    processes = started.alive()
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in processes:
            os.kill(process, number)
        if number == signal.SIGSTOP:
            stopped = time.monotonic()
            time.sleep(seconds)
            stopped = time.monotonic() - stopped
    return stopped


@pytest.mark.fault("F38", tier=3)
def test_job_that_was_suspended_goes_on(tmp_path, data, undisturbed):
    """F38 for longer than --hang_seconds, and than the alarm behind it takes; no update has that time."""
    started = start(tmp_path, data, 2, "slow_read@1:0:0.05", "--hang_seconds=6")
    wait_for(lambda: "step 4/" in started.out.read_text())
    stopped = suspend(started, 14)
    ended = started.wait(code=0)
    assert ended.err.count("hvd-vgg: this process was stopped for ") == 1
    assert not list((tmp_path / "run" / "faults").glob("*.jsonl"))
    assert_exact(tmp_path, 2, undisturbed)
    (suspended,) = events(tmp_path / "run", "suspended")
    # But for 5 s, which are taken for a busy host; the last look may have been half a second before.
    assert stopped - 5 - 0.5 < suspended["seconds"] < stopped
    assert result(tmp_path / "run")["goodput_seconds"]["suspended"] == pytest.approx(suspended["seconds"])
    rows = log_rows(tmp_path / "run")
    at = next(number for number, row in enumerate(rows) if row["data"].get("event") == "suspended")
    before = [row for row in rows[:at] if "train.loss" in row["data"]][-1]
    after = next(row for row in rows[at:] if "train.loss" in row["data"])
    between = float(after["timestamp"]) - float(before["timestamp"])
    assert sum(after["data"]["train.update_seconds"]) < between - suspended["seconds"] + 1
