"""Errors a user can cause, but for those of the data: one message that names the place, the documented exit code, no traceback, nobody left."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
from support import ROOT, TINY, Started

from hvd_vgg.train import checkpoint

FLAGS = [*TINY, "--steps=4", "--global_batch=8"]


def test_a_rank_that_is_killed_under_gloo_is_told_as_such_by_the_others(tmp_path, data):
    flags = [f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *FLAGS, "--steps=100000"]
    program = ["horovodrun", "--gloo", "-np", "2", sys.executable, "-m", "hvd_vgg"]
    started = Started([*program, "train", *flags], tmp_path, PYTHONPATH=str(ROOT))
    log, deadline = tmp_path / "run" / "dllogger.json", time.monotonic() + 60
    while not (log.exists() and "train.loss" in log.read_text()[5000:]) and time.monotonic() < deadline:
        time.sleep(0.1)
    ranks = [pid for pid in started.alive() if b"HOROVOD_RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    ranks = [pid for pid in ranks if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(sys.executable.encode())]
    assert ranks, started.out.read_text() + started.err.read_text()
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
    ended = started.wait()
    assert ended.code == 1
    assert "another rank has gone" in ended.out + ended.err
    assert "an error of the program" not in ended.out + ended.err


def test_a_loss_that_is_not_finite_ends_all_ranks_with_81_and_names_the_step(launch, tmp_path, data):
    run_dir = tmp_path / "run"
    flags = [f"--data_dir={data}", *FLAGS, "--steps=400", "--lr=300"]

    def first_bad(run, *more):
        ended = launch(2, "train", *flags, f"--run_dir={run}", *more)
        assert ended.code == 81, ended.out + ended.err
        (message,) = [line for line in ended.err.splitlines() if line.startswith("hvd-vgg: ")]
        assert "not finite" in message
        return int(message.split("step ")[1].split(":")[0])

    step = first_bad(run_dir, "--log_every_steps=1", "--save_every_steps=1")
    assert first_bad(tmp_path / "rarely", "--log_every_steps=50") == step
    newest = checkpoint.newest(run_dir)
    assert newest.meta["step"] <= step
    assert all(np.isfinite(value).all() for value in newest.tensors.values())


def test_resume_never_required_and_another_run_are_refused_with_78(launch, tmp_path, data):
    base = [f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *FLAGS]
    ended = launch(2, "train", *base, "--resume=required")
    assert (ended.code, "holds no checkpoint" in ended.err) == (78, True)
    assert launch(2, "train", *base).code == 0
    ended = launch(2, "train", *base, "--resume=never")
    assert ended.code == 78
    assert "never overwritten" in ended.err
    ended = launch(2, "train", *base, "--lr=0.07", "--seed=5")
    assert ended.code == 78
    assert "lr: expected 0.05, found 0.07" in ended.err
    assert "seed: expected 1, found 5" in ended.err
    assert "Traceback" not in ended.err


def test_all_checkpoints_damaged_never_starts_over(launch, tmp_path, data):
    run_dir = tmp_path / "run"
    base = [f"--data_dir={data}", f"--run_dir={run_dir}", *FLAGS, "--save_every_steps=2"]
    assert launch(2, "train", *base).code == 0
    paths = sorted((run_dir / "checkpoints").glob("step-*"))
    assert len(paths) == 2
    paths[-1].write_bytes(paths[-1].read_bytes()[:-9])
    ended = launch(2, "train", *base)
    assert ended.code == 0
    assert "steps 2 to 4" in ended.out
    assert f"passed over: {paths[-1].name}" in ended.out
    for path in paths:
        path.write_bytes(path.read_bytes()[:-9])
    ended = launch(2, "train", *base)
    assert ended.code == 78
    assert all(f"{path.name}:" in ended.err for path in paths)


def test_ranks_with_different_flags_are_told_apart(launch, tmp_path, data):
    flags = " ".join([f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *FLAGS])
    script = tmp_path / "each.sh"
    script.write_text(f"exec python -m hvd_vgg train {flags} --lr=0.0$((1 + OMPI_COMM_WORLD_RANK))\n")
    ended = launch(2, program=["bash", str(script)])
    assert ended.code == 78, ended.err
    assert ended.err.count("lr: expected 0.01, found 0.02") == 1


def test_a_run_dir_that_cannot_be_made_is_refused(launch, tmp_path, data):
    (tmp_path / "file").write_text("")
    ended = launch(2, "train", f"--data_dir={data}", f"--run_dir={tmp_path / 'file' / 'run'}", *FLAGS)
    assert ended.code == 78
    assert ended.err.count("cannot be made or written") == 1


def test_evaluating_what_is_no_run_is_refused(launch, tmp_path, data):
    ended = launch(2, "evaluate", f"--data_dir={data}", f"--run_dir={tmp_path}")
    assert ended.code == 78
    assert "names no best checkpoint" in ended.err


def test_the_written_flag_file_is_the_same_run(launch, tmp_path, data):
    first, second = tmp_path / "first", tmp_path / "second"
    assert launch(2, "train", f"--data_dir={data}", f"--run_dir={first}", *FLAGS, "--lr=0.0123").code == 0
    assert launch(1, "train", f"--flagfile={first / 'flags.txt'}", f"--run_dir={second}").code == 0
    rows = []
    for run in (first, second):
        lines = [json.loads(line[5:]) for line in (run / "dllogger.json").read_text().splitlines()]
        rows.append([line["data"]["train.loss"] for line in lines if line["type"] == "LOG" and "train.loss" in line["data"]])
    np.testing.assert_allclose(rows[0], rows[1], rtol=1e-5)
