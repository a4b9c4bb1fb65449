"""Running for weeks: goodput over restarts, a clock that is set meanwhile, saving by the clock, metrics, slow precisions."""

import json
import math
import re
import sys

import pytest
from oracles import FLAGS, INJECT, STEPS, assert_same_run, assert_true, events, log_rows, measured_goodput, result, run
from prometheus_text import parse
from support import ROOT, TINY, Started, clock_library, full, wait_for

LAUNCH_PROGRAM = [sys.executable, str(ROOT / "tests" / "programs" / "launch_program.py")]


@pytest.mark.fault("F39", "F03")
@pytest.mark.parametrize("seconds", full(-3600, 86400))
def test_goodput_is_right_though_the_clock_is_set(tmp_path, data, undisturbed, seconds):
    """F39: an hour back in the first start, before a rank is killed: 2 % from times that the test took itself.

    No claim of the run is false, and no duration negative.
    """
    (tmp_path / "ahead").write_text("0")
    words = [*LAUNCH_PROGRAM, *INJECT, str(tmp_path), "kill@1:8", "slow_read@0:0:0.02", "--", "--ranks=2", "train"]
    flags = [f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *FLAGS, "--save_every_steps=3"]
    clock = {"LD_PRELOAD": str(clock_library(tmp_path)), "CLOCK_AHEAD_FILE": str(tmp_path / "ahead")}
    started = Started([*words, *flags], tmp_path, PYTHONPATH=str(ROOT), **clock)
    wait_for(lambda: "step 4/" in started.out.read_text())
    (tmp_path / "ahead").write_text(str(seconds))
    ended = started.wait(code=0)

    training, wall = measured_goodput(tmp_path)
    found = result(tmp_path / "run")
    parts = found["goodput_seconds"]
    assert parts["training"] == pytest.approx(training, rel=0.02)
    assert sum(parts.values()) == pytest.approx(wall, rel=0.02)
    assert found["goodput"] == pytest.approx(training / wall, rel=0.02)
    assert min(parts.values()) >= 0 and parts["restarting"] > 1 and parts["recomputed"] > 0
    assert f"goodput            {found['goodput']:.1%} of " in ended.out
    assert re.search(r"Restarting, 1 of at most 3; goodput so far \d+\.\d%", ended.err)

    assert_same_run(tmp_path, undisturbed)
    for row in log_rows(tmp_path / "run"):
        assert float(row["elapsedtime"]) >= 0
        assert all(value >= 0 for name, value in row["data"].items() if name in ("train.fps", "seconds"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "restarts.jsonl").read_text().splitlines()]
    assert abs(lines[-1]["time"] - lines[0]["time"] - seconds) < 600  # the shim was there
    assert 0 < lines[-1]["lost_seconds"] < wall
    left = re.findall(r"left (?:(\d+) min )?(\d+) s", ended.out)
    assert left and all(int(minutes or 0) * 60 + int(rest) < 600 for minutes, rest in left)


@pytest.mark.fault("F39", tier=3)
def test_verify_passes_though_the_clock_is_set_at_the_start(tmp_path, data):
    """Back after the launcher has noted the start and before the ranks do, as by NTP at boot; and right again later."""
    (tmp_path / "ahead").write_text("0")
    clock = {"LD_PRELOAD": str(clock_library(tmp_path)), "CLOCK_AHEAD_FILE": str(tmp_path / "ahead")}
    flags = [f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *FLAGS]
    words = [sys.executable, "-m", "hvd_vgg", "launch", "--ranks=2", "train"]
    started = Started([*words, *flags], tmp_path, PYTHONPATH=str(ROOT), **clock)
    # The watchdogs of ranks make it; mpirun itself loops for an hour if that hour comes again while it starts.
    wait_for(lambda: (tmp_path / "run" / "faults").exists())
    (tmp_path / "ahead").write_text("-3600")
    wait_for(lambda: "step 2/" in started.out.read_text())
    (tmp_path / "ahead").write_text("0")
    started.wait(code=0)
    launched = [json.loads(line) for line in (tmp_path / "run" / "restarts.jsonl").read_text().splitlines()]
    (logged,) = [row for row in log_rows(tmp_path / "run") if row["data"].get("event") == "start"]
    assert float(logged["timestamp"]) < launched[0]["time"] - 3000  # the shim was there
    assert_true(tmp_path / "run")


@pytest.mark.fault(tier=3)
def test_saving_by_the_clock_changes_nothing(tmp_path, data, undisturbed):
    """A checkpoint whenever 1.2 s have passed, at log lines alone, on 2 ranks; and the metrics of each line in a file."""
    flags = ["--save_every_steps=0", "--save_every_minutes=0.02", f"--metrics_file={tmp_path / 'a.prom'}"]
    ended = run(tmp_path, data, 2, "slow_read@1:0:0.03", *flags)
    assert_same_run(tmp_path, undisturbed)
    steps = [event["step"] for event in events(tmp_path / "run", "checkpoint")]
    assert len(steps) > 2 and steps[-1] == STEPS
    samples = parse((tmp_path / "a.prom").read_text())
    run_label = ("run", str((tmp_path / "run").resolve()))
    assert samples["hvd_vgg_step", (run_label,)] == STEPS
    assert samples["hvd_vgg_checkpoint_step", (run_label,)] in steps
    assert samples["hvd_vgg_goodput_ratio", (run_label,)] == pytest.approx(result(tmp_path / "run")["goodput"], abs=0.05)
    for rank in "01":
        shares = [samples[f"hvd_vgg_{part}_ratio", (run_label, ("rank", rank))] for part in ("input", "compute", "exchange")]
        assert math.isclose(sum(shares), 1.0) and min(shares) >= 0
    assert "--metrics_file" not in ended.out + ended.err


@pytest.mark.parametrize(("command", "ranks"), [("train", 2), *full(("doctor", 2), ("train", 0), ("doctor", 0))])
@pytest.mark.parametrize("precision", ["bfloat16", *full("float16")])
def test_precision_that_is_slower_is_a_warning(tmp_path, data, launch, command, ranks, precision):
    """Without oneDNN no CPU is fast in 16 bits; the rank is named where there are several. A run is warned, and goes on."""
    flags = [f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *TINY, "--steps=2", f"--precision={precision}"]
    ended = launch(ranks, command, *flags, TF_ENABLE_ONEDNN_OPTS="0", code=0)
    where = r" on rank [01] \(host \S+\)" if ranks else ""
    slow = (
        rf"--precision={precision}: a small convolution, forward and backward, takes [\d.]+ ms, [\d.]+ times as long as in "
    )
    slow += "float32"
    fix = "unset TF_ENABLE_ONEDNN_OPTS: 0 switches off the convolutions made for 16 bits; or use --precision=float32"
    if command == "train":
        assert len(re.findall(rf"^warning: {slow}{where}: {fix}$", ended.out, re.M)) == 1
        assert_true(tmp_path / "run")
    else:
        assert len(re.findall(rf"^warning  precision    {slow}{where}\n +fix: {fix}$", ended.out, re.M)) == 1
        assert "warning  environment  TF_ENABLE_ONEDNN_OPTS=0 switches off the fastest convolutions" in ended.out
