"""Errors a user can cause, those of the data aside: one message, the documented exit code, no traceback, nobody left."""

import json
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from support import ROOT, TINY, Started, command_line, wait_for, write_data

from hvd_vgg.training import checkpoint

FLAGS = [*TINY, "--steps=4", "--global_batch=8"]


@pytest.mark.fault("F03", tier=3)
def test_a_rank_that_is_killed_under_gloo_is_told_as_such_by_the_others(tmp_path, data):
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
    assert "another rank has gone" in ended.out + ended.err
    assert "an error of the program" not in ended.out + ended.err


@pytest.mark.fault("F29")
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
    newest, _ = checkpoint.newest(run_dir)
    assert newest.meta["step"] <= step
    assert all(np.isfinite(value).all() for value in newest.tensors.values())


@pytest.mark.fault("F22")
def test_resume_never_required_and_another_run_are_refused_with_78(launch, tmp_path, data):
    base = [f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *FLAGS]
    ended = launch(0, "train", *base, "--resume=required")
    assert (ended.code, "holds no checkpoint" in ended.err) == (78, True)
    assert launch(2, "train", *base).code == 0
    ended = launch(0, "train", *base, "--resume=never")
    assert ended.code == 78
    assert "never overwritten" in ended.err
    ended = launch(2, "train", *base, "--lr=0.07", "--seed=5")
    assert ended.code == 78
    assert re.search(r"^ +checkpoint +command$", ended.err, re.M)
    assert re.search(r"^ +lr +0\.05 +0\.07$", ended.err, re.M)
    assert re.search(r"^ +seed +1 +5$", ended.err, re.M)
    assert "--allow_config_change=lr,seed" in ended.err
    assert "Traceback" not in ended.err
    ended = launch(0, "train", *base, "--lr=0.07", "--seed=5", "--allow_config_change=lr")
    assert ended.code == 78
    assert re.search(r"^ +seed +1 +5$", ended.err, re.M) and " lr " not in ended.err
    ended = launch(2, "train", *base, "--lr=0.07", "--steps=6", "--allow_config_change=lr")
    assert ended.code == 0, ended.err
    assert "--lr was 0.05, is 0.07 from here on" in ended.out
    assert (
        '{"event": "config_changed", "flag": "lr", "before": 0.05, "after": 0.07}'
        in (tmp_path / "run" / "dllogger.json").read_text()
    )
    write_data(tmp_path / "other", train=76)
    ended = launch(0, "train", *base, f"--data_dir={tmp_path / 'other'}", "--lr=0.07")
    assert ended.code == 78
    assert re.search(r"^ +train_records +75 +76$", ended.err, re.M)
    assert "Another data set is another run: give another --run_dir" in ended.err
    ended = launch(0, "train", *base, "--model=vgg13", "--lr=0.07")
    assert ended.code == 78
    assert re.search(r"^ +model +.?vgg11.? +.?vgg13.?$", ended.err, re.M)
    assert "Another network is another run: give another --run_dir" in ended.err
    ended = launch(0, "train", *base, "--label_base=0", "--num_classes=11", "--lr=0.07")
    assert ended.code == 78
    assert "--allow_config_change" not in ended.err


@pytest.mark.fault("F18", tier=3)
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
    assert f"set aside as {paths[-1].name}.bad" in ended.out
    for path in paths:
        path.write_bytes(path.read_bytes()[:-9])
    ended = launch(2, "train", *base)
    assert ended.code == 78
    assert all(f"{path.name}:" in ended.err for path in paths)


@pytest.mark.fault("F32")
def test_ranks_with_different_flags_are_told_apart(launch, tmp_path, data):
    flags = " ".join([f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *FLAGS])
    script = tmp_path / "each.sh"
    script.write_text(f"exec python -m hvd_vgg train {flags} --lr=0.0$((1 + OMPI_COMM_WORLD_RANK))\n")
    ended = launch(2, program=["bash", str(script)])
    assert ended.code == 78, ended.err
    assert re.search(r"^ +rank 0 +rank 1\n +lr +0\.01 +0\.02$", ended.err, re.M)


@pytest.mark.fault("F23")
def test_a_run_dir_that_cannot_be_made_is_refused(launch, tmp_path, data):
    (tmp_path / "file").write_text("")
    ended = launch(2, "train", f"--data_dir={data}", f"--run_dir={tmp_path / 'file' / 'run'}", *FLAGS)
    assert ended.code == 78
    assert ended.err.count("cannot be made or written") == 1


@pytest.mark.fault("F23", tier=3)
def test_two_jobs_on_one_run_directory_are_refused(launch, tmp_path, data):
    """F23: the second is told who holds it, the first goes on."""
    flags = [f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *FLAGS]
    worker = [sys.executable, str(ROOT / "tests" / "worker.py"), str(tmp_path)]
    first = Started(command_line(2, ["sleep@0:2:1000", "train", *flags], worker), tmp_path)
    try:
        wait_for(lambda: "step 1/" in first.out.read_text())
        ended = launch(1, "train", *flags)
        assert ended.code == 78, ended.out + ended.err
        assert "is in use by another job" in ended.err and '"process": ' in ended.err
        assert first.process.poll() is None
    finally:
        first.process.terminate()
    first.wait()
    assert launch(2, "train", *flags).code == 0  # a lock dies with its holder


def test_evaluating_what_is_no_run_is_refused(launch, tmp_path, data):
    ended = launch(2, "evaluate", f"--data_dir={data}", f"--run_dir={tmp_path}")
    assert ended.code == 78
    assert "has no best checkpoint" in ended.err


@pytest.mark.fault(tier=3)
def test_the_written_flag_file_is_the_same_run(launch, tmp_path, data):
    first, second = tmp_path / "first", tmp_path / "second"
    assert launch(2, "train", f"--data_dir={data}", f"--run_dir={first}", *FLAGS, "--lr=0.0123").code == 0
    assert launch(1, "train", f"--flagfile={first / 'flags.txt'}", f"--run_dir={second}").code == 0
    rows = []
    for run in (first, second):
        lines = [json.loads(line[5:]) for line in (run / "dllogger.json").read_text().splitlines()]
        rows.append([line["data"]["train.loss"] for line in lines if line["type"] == "LOG" and "train.loss" in line["data"]])
    np.testing.assert_allclose(rows[0], rows[1], rtol=1e-5)


@pytest.mark.fault(tier=3)
def test_float16_gives_up_when_no_loss_scale_helps(launch, tmp_path, data):
    program = [sys.executable, str(ROOT / "tests" / "overflow.py")]
    flags = [f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *FLAGS, "--steps=40", "--precision=float16"]
    ended = launch(2, "train", *flags, program=program)
    assert ended.code == 81, ended.err
    assert len(re.findall(r"step 16: loss \d+\.\d+, gradient norm (nan|inf): not finite", ended.err)) == 1
    lines = [json.loads(line[5:]) for line in (tmp_path / "run" / "dllogger.json").read_text().splitlines()]
    rows = [line["data"] for line in lines if line["type"] == "LOG" and "train.loss_scale" in line["data"]]
    seen = [(row["train.loss_scale"], row["train.skipped_updates"]) for row in rows]
    assert seen == [(2.0**power, 1) for power in range(15, -1, -1)]
