"""Errors a user can cause, those of the data aside: one message, the documented exit code, no traceback, nobody left."""

import os
import re
import signal
import sys
from pathlib import Path

import pytest
from oracles import events, log_rows, losses, result, run, start
from support import ROOT, TINY, Started, wait_for

FLAGS = [*TINY, "--steps=4", "--global_batch=8", "--device_batch=2"]


@pytest.mark.fault("F03", tier=3)
def test_killed_rank_under_gloo_is_reported_by_the_others(tmp_path, data):
    flags = [f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *FLAGS, "--steps=100000"]
    program = ["horovodrun", "--gloo", "-np", "2", sys.executable, "-m", "hvd_vgg"]
    started = Started([*program, "train", *flags], tmp_path, PYTHONPATH=str(ROOT))
    log = tmp_path / "run" / "dllogger.json"
    wait_for(lambda: log.exists() and "train.loss" in log.read_text()[5000:])
    ranks = [pid for pid in started.alive() if b"HOROVOD_RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    ranks = [pid for pid in ranks if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(sys.executable.encode())]
    assert ranks, started.out.read_text() + started.err.read_text()
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
    ended = started.wait()
    assert ended.code == 1
    assert "another rank is gone" in ended.out + ended.err
    assert "an error of the program" not in ended.out + ended.err


@pytest.mark.fault("F22")
def test_resume_with_other_flags_is_refused_or_allowed(launch, tmp_path, data):
    """On ranks; all that may differ is in tests/unit/test_resume.py."""
    base = ["train", f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *FLAGS]
    launch(0, *base, code=0)
    ended = launch(2, *base, "--lr=0.07", "--seed=5")
    assert (ended.code, "Traceback" in ended.err) == (78, False), ended.err
    assert ended.err.count("hvd-vgg: ") == 1
    assert re.search(r"^ +seed +1 +5$", ended.err, re.M) and re.search(r"^ +lr +0\.05 +0\.07$", ended.err, re.M)
    ended = launch(0, *base, "--lr=0.07", "--steps=6", "--allow_config_change=lr", code=0)
    changed = {"event": "config_changed", "flag": "lr", "before": 0.05, "after": 0.07}
    assert events(tmp_path / "run", "config_changed") == [changed]


@pytest.mark.fault("F18", tier=3)
def test_damaged_checkpoints_never_start_over(launch, tmp_path, data):
    """One is set aside for the one before; where all are damaged the run is refused."""
    run_dir = tmp_path / "run"
    base = [f"--data_dir={data}", f"--run_dir={run_dir}", *FLAGS, "--save_every_steps=2"]
    launch(2, "train", *base, code=0)
    paths = sorted((run_dir / "checkpoints").glob("step-*"))
    assert len(paths) == 2
    paths[-1].write_bytes(paths[-1].read_bytes()[:-9])
    ended = launch(2, "train", *base, code=0)
    assert "steps 2 to 4" in ended.out
    assert f"renamed to {paths[-1].name}.bad" in ended.out
    for path in paths:
        path.write_bytes(path.read_bytes()[:-9])
    ended = launch(2, "train", *base, code=78)
    assert all(f"{path.name}:" in ended.err for path in paths)


@pytest.mark.fault("F32")
def test_ranks_with_different_flags_are_refused(launch, tmp_path, data):
    flags = " ".join([f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *FLAGS])
    script = tmp_path / "each.sh"
    script.write_text(f"exec python -m hvd_vgg train {flags} --lr=0.0$((1 + OMPI_COMM_WORLD_RANK))\n")
    ended = launch(2, program=["bash", str(script)], code=78)
    assert re.search(r"^ +rank 0 +rank 1\n +lr +0\.01 +0\.02$", ended.err, re.M)


def test_ranks_that_horovod_does_not_connect_are_refused(launch, data):
    """Two processes of one rank each would both be rank 0 of the same run: those of a launcher that Horovod has not met."""
    of_launcher = {"PMI_RANK": "0", "PMI_SIZE": "2", "PMI_PORT": "localhost:1"}
    ended = launch(
        *(0, "train", f"--data_dir={data}", *TINY),
        **of_launcher,
        HOROVOD_CONTROLLER="gloo",
        HOROVOD_CPU_OPERATIONS="gloo",
        code=78,
    )
    assert "hvd-vgg: the launcher started 2 processes, but Horovod sees 1" in ended.err


@pytest.mark.fault("F23")
def test_run_dir_that_cannot_be_created_is_refused(launch, tmp_path, data):
    """By all ranks, in one message."""
    (tmp_path / "file").write_text("")
    ended = launch(2, "train", f"--data_dir={data}", "--run_dir=file/run", *FLAGS, code=78)
    assert ended.err.count("hvd-vgg: ") == ended.err.count("cannot be created or written") == 1, ended.err


@pytest.mark.fault("F23", tier=3)
def test_two_jobs_on_one_run_directory_are_refused(launch, tmp_path, data):
    """The second is told who holds it, the first goes on."""
    first = start(tmp_path, data, 2, "sleep@0:2:1000")
    try:
        wait_for(lambda: "step 1/" in first.out.read_text())
        ended = launch(1, "train", f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *FLAGS, code=78)
        assert "is in use by another job" in ended.err and '"process": ' in ended.err
        assert first.process.poll() is None
    finally:
        first.process.terminate()
    first.wait()
    run(tmp_path, data, 2)  # a lock dies with its holder


def test_evaluate_of_what_is_no_run_is_refused(launch, tmp_path, data):
    ended = launch(0, "evaluate", f"--data_dir={data}", f"--run_dir={tmp_path}", code=78)
    assert "has no best checkpoint" in ended.err


@pytest.mark.fault(tier=3)
def test_flag_file_of_a_run_is_the_same_run(launch, tmp_path, data):
    first, second = tmp_path / "first", tmp_path / "second"
    launch(2, "train", f"--data_dir={data}", f"--run_dir={first}", *FLAGS, "--lr=0.0123", code=0)
    launch(1, "train", f"--flagfile={first / 'flags.txt'}", f"--run_dir={second}", code=0)
    assert losses(first) == losses(second) and result(first)["state_sha256"] == result(second)["state_sha256"]


@pytest.mark.fault(tier=3)
def test_float16_gives_up_when_no_loss_scale_helps(tmp_path, data):
    ended = run(tmp_path, data, 2, "overflow@0:0", "overflow@1:0", "--steps=40", "--precision=float16", code=81)
    assert len(re.findall(r"step 16: loss \d+\.\d+, gradient norm (nan|inf): not finite", ended.err)) == 1
    rows = [row["data"] for row in log_rows(tmp_path / "run") if "train.loss_scale" in row["data"]]
    seen = [(row["train.loss_scale"], row["train.skipped_updates"]) for row in rows]
    assert seen == [(2.0**power, 1) for power in range(15, -1, -1)]
