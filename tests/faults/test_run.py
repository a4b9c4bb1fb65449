"""What a run leaves behind and says, as its users read it."""

import json
import os
import re
import socket
import sys
from datetime import datetime
from pathlib import Path

import pytest
import tensorflow as tf
from support import ROOT, TINY

from hvd_vgg.doctor.system import processor_name
from hvd_vgg.reporting.log import METRICS


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    """A run of two epochs on two ranks, and what it printed."""
    from support import Started, command_line

    folder = tmp_path_factory.mktemp("finished")
    flags = [f"--data_dir={data}", f"--run_dir={folder / 'run'}", *TINY, "--steps=0", "--epochs=2", "--eval_every_epochs=1"]
    flags.append("--device_tflops=0.5")
    ended = Started(command_line(2, ["train", *flags]), folder).wait()
    assert ended.code == 0, ended.err
    return folder / "run", ended


def rows(run_dir):
    return [json.loads(line[5:]) for line in (run_dir / "dllogger.json").read_text().splitlines()]


def test_result_json_holds_the_result(finished):
    result = json.loads((finished[0] / "result.json").read_text())
    assert {"acc@1", "acc@5", "records_evaluated", "fps", "steps", "epochs", "ranks", "global_batch", "seconds"} <= set(
        result
    )
    assert (result["records_evaluated"], result["steps"], result["ranks"], result["global_batch"]) == (37, 5, 2, 32)
    assert result["acc@1"] == result["top1_hits"] / 37
    assert result["epochs"] == 5 * 32 / 75
    assert result["fps_updates"] + result["warm_up_updates"] == 5
    assert 0 < result["fps_wall"] < result["fps"]
    assert result["share_of_peak"] == pytest.approx(result["tflops_per_rank"] / 0.5)
    assert [(row["ranks"], row["fps"]) for row in result["by_host"]] == [(2, sum(row["fps"] for row in result["by_rank"]))]
    assert [row["rank"] for row in result["by_rank"]] == [0, 1]
    for row in result["by_rank"]:
        assert row["input"] + row["compute"] + row["network"] + row["straggler_wait"] == pytest.approx(1)
        assert min(row["input"], row["compute"], row["network"], row["straggler_wait"]) >= 0
    assert sum(row["fps"] for row in result["by_rank"]) == pytest.approx(result["fps"], rel=0.05)
    assert min(row["straggler_wait"] for row in result["by_rank"]) == 0


def test_the_summary_and_every_line_can_be_read(finished):
    out = finished[1].out
    result = json.loads((finished[0] / "result.json").read_text())
    for part in (
        f"acc@1              {result['acc@1']:.4f}",
        "records evaluated  37",
        "labels from 1 (0 is background",
        "held back by       ",
        str(finished[0]),
    ):
        assert part in out
    assert (
        len(
            re.findall(r"^step \d/5  epoch \d\.\d\d  loss \d\.\d{4}  acc@1 \d\.\d{3}  lr 0\.05  \d+\.\d images/s", out, re.M)
        )
        == 5
    )
    assert len(re.findall(r"^step \d  epoch \d\.\d\d  evaluation: acc@1 ", out, re.M)) == 2
    assert out.count("finished in") == 1
    assert "\r" not in out.replace("\r\n", "\n")  # mpirun's pseudo-terminal ends lines so
    assert finished[1].err == ""


def test_the_log_has_every_metric_at_its_steps(finished):
    logged = [row for row in rows(finished[0]) if row["type"] == "LOG"]
    assert logged[0]["step"] == "PARAMETER"
    assert {"lr", "seed", "tensorflow", "horovod", "ranks"} <= set(logged[0]["data"])
    train = [row for row in logged if "train.loss" in row["data"]]
    evaluated = [row for row in logged if "eval.acc@1" in row["data"]][:-1]  # the last is the run's summary
    assert logged[-1]["step"] == [] and {"fps", "fps_wall", "bottleneck"} <= set(logged[-1]["data"])
    assert [row["step"] for row in train] == [[0, 1], [0, 2], [1, 3], [1, 4], [2, 5]]
    assert [row["step"] for row in evaluated] == [[1, 3], [2, 5]]
    float16 = {"train.loss_scale", "train.skipped_updates"}
    assert set(train[0]["data"]) | set(evaluated[0]["data"]) | float16 == set(METRICS)


def test_tensorboard_has_the_same_numbers(finished):
    (path,) = (finished[0] / "tensorboard").iterdir()
    seen = {}
    for record in tf.data.TFRecordDataset(str(path)):
        event = tf.compat.v1.Event.FromString(record.numpy())
        for value in event.summary.value:
            seen[value.tag, event.step] = float(tf.make_ndarray(value.tensor))
    logged = [row for row in rows(finished[0]) if row["type"] == "LOG" and "train.loss" in row["data"]]
    for row in logged:
        assert seen["train/loss", row["step"][1]] == pytest.approx(row["data"]["train.loss"], rel=1e-6)
    assert ("eval/acc@1", 5) in seen


def test_a_finished_run_started_again_trains_nothing_and_evaluates_the_same(finished, launch, data):
    before = json.loads((finished[0] / "result.json").read_text())
    ended = launch(1, "train", f"--flagfile={finished[0] / 'flags.txt'}")
    assert ended.code == 0, ended.err
    assert f"going on from step 5: {finished[0]}/checkpoints/step-00000005.safetensors" in ended.out
    assert f"acc@1              {before['acc@1']:.4f}" in ended.out
    assert json.loads((finished[0] / "result.json").read_text()) == before
    (finished[0] / "result.json").unlink()  # as if the run had been killed between its checkpoint and its result
    assert launch(2, "train", f"--flagfile={finished[0] / 'flags.txt'}").code == 0
    again = json.loads((finished[0] / "result.json").read_text())
    assert (again["steps"], again["top1_hits"], again["fps"]) == (before["steps"], before["top1_hits"], None)


@pytest.mark.fault(tier=3)
def test_a_run_stops_at_the_accuracy_asked_for_and_keeps_the_best(launch, tmp_path, data):
    run_dir = tmp_path / "run"
    flags = [f"--data_dir={data}", f"--run_dir={run_dir}", *TINY, "--steps=0", "--epochs=60", "--eval_every_epochs=2"]
    ended = launch(2, "train", *flags, "--stop_at_top1=0.3", "--save_every_steps=1", "--keep_checkpoints=1")
    assert ended.code == 0, ended.err
    assert "acc@1 has reached --stop_at_top1=0.3" in ended.out
    result = json.loads((run_dir / "result.json").read_text())
    assert result["acc@1"] >= 0.3
    assert result["steps"] < 141
    ended = launch(2, "train", f"--flagfile={run_dir / 'flags.txt'}")
    assert ended.code == 0, ended.err
    assert f"steps              {result['steps']}" in ended.out
    assert json.loads((run_dir / "result.json").read_text()) == result
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == ["best", f"step-{result['steps']:08d}.safetensors"]


@pytest.mark.fault(tier=3)
def test_dlloggers_lines_on_stdout_when_asked_for(launch, tmp_path, data):
    ended = launch(
        2, "train", f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *TINY, "--steps=2", "--console=dllogger"
    )
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert all(line.startswith("DLL ") for line in lines)
    assert sum("train.loss : " in line for line in lines) == 2
    assert sum("eval.acc@1 : " in line for line in lines) == 2  # the evaluation, and the summary
    ended = launch(2, "evaluate", f"--run_dir={tmp_path / 'run'}")
    assert ended.code == 0, ended.err
    assert "of 37 records, each once" in ended.out


def test_a_bar_on_a_terminal(launch, tmp_path, data):
    ended = launch(2, "train", f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *TINY, "--steps=60", "--console=bar")
    assert ended.code == 0, ended.err
    assert re.search(r"training \[#+\.+\] \d+/60 steps .* left \d+ s", ended.out)


def test_demo_data_is_the_same_on_any_number_of_ranks_and_is_never_overwritten(launch, tmp_path):
    flags = ["--train_images=30", "--validation_images=10", "--shards=3"]
    for ranks in (0, 2):
        assert launch(ranks, "make-demo-data", f"--data_dir={tmp_path / str(ranks)}", *flags).code == 0
    names = sorted(path.name for path in (tmp_path / "0").iterdir())
    assert names == [*(f"train-0000{i}-of-00003" for i in range(3)), *(f"validation-0000{i}-of-00002" for i in range(2))]
    for name in names:
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    ended = launch(2, "make-demo-data", f"--data_dir={tmp_path / '0'}", *flags)
    assert ended.code == 65
    assert ended.err.count("never overwritten") == 1


@pytest.mark.parametrize(
    ("script", "ranks", "flags"),
    [("run_train_vgg16_imagenet.sh", 1, []), ("run_train_vgg16_multigpu_imagenet.sh", 2, ["--ranks=2"])],
)
def test_the_scripts_of_the_published_recipe_train_the_same_thing(launch, tmp_path, data, script, ranks, flags):
    """At a small width, by flags passed on."""
    flags = [*flags, *(flag for flag in TINY if "device_batch" not in flag), "--model=vgg16", "--steps=2"]
    ended = launch(
        0,
        *flags,
        program=["bash", str(ROOT / "launch" / script)],
        DATA_DIR=str(data),
        BATCH_SIZE="5",
        PYTHONPATH=str(ROOT),
    )
    assert ended.code == 0, ended.out + ended.err
    assert f"mpirun -np {ranks} " in ended.out
    assert "at most 5 at once" in ended.out
    result = json.loads((tmp_path / "runs" / "vgg16_imagenet" / "result.json").read_text())
    assert (result["ranks"], result["global_batch"], result["steps"]) == (ranks, 32, 2)


@pytest.mark.parametrize("cause", ["input", pytest.param("compute", marks=pytest.mark.fault(tier=3))])
@pytest.mark.fault("F35")
def test_a_slow_rank_is_named_with_its_cause(launch, tmp_path, data, cause):
    flags = [f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *TINY, "--steps=16", "--log_every_steps=4"]
    program = [sys.executable, str(ROOT / "tests" / "slow.py"), cause, "1"]
    ended = launch(2, "train", *flags, program=program)
    assert ended.code == 0, ended.err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["bottleneck"], result["slow_rank"], result["slow_ranks"]) == (cause, 1, [1])
    assert result["slowest_rank"] == 1
    fast, slow = result["by_rank"]
    assert slow[cause] > fast[cause] and fast["straggler_wait"] > slow["straggler_wait"]
    assert f"slow: rank 1 ({cause})" in ended.out
    assert re.search(rf"held back by       rank 1 on \S+: its {cause}\s", ended.out)
    assert re.search(rf"slowest rank       rank 1 on \S+: \d+\.\d images/s alone, limited by its {cause} \(", ended.out)


def test_what_one_rank_saves_is_no_part_of_anothers_updates(launch, tmp_path, data):
    flags = [f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *TINY, "--steps=12", "--save_every_steps=1"]
    program = [sys.executable, str(ROOT / "tests" / "slow.py"), "saving", "0"]
    ended = launch(2, "train", *flags, program=program)
    assert ended.code == 0, ended.err
    writes, waits = json.loads((tmp_path / "run" / "result.json").read_text())["by_rank"]
    assert waits["saving_seconds"] > 0.9 * writes["saving_seconds"] > 0
    # Half a second of each save would be most of an update of some hundredths.
    assert waits["straggler_wait"] < 0.5


@pytest.mark.fault(tier=3)
def test_the_steps_asked_for_are_profiled_on_the_ranks_asked_for(launch, tmp_path, data):
    flags = [f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *TINY, "--steps=8", "--profile_ranks=1"]
    ended = launch(2, "train", *flags, "--profile_steps=3:4")
    assert ended.code == 0, ended.err
    assert sorted(path.name for path in (tmp_path / "run" / "profile").iterdir()) == ["horovod_timeline.json", "rank1"]
    (trace,) = (tmp_path / "run" / "profile" / "rank1").rglob("*.xplane.pb")
    assert trace.stat().st_size > 10_000
    timeline = (tmp_path / "run" / "profile" / "horovod_timeline.json").read_text()
    assert "gradient_block1" in timeline
    assert timeline.count("MPI_ALLREDUCE") > 0


@pytest.mark.fault(tier=3)
def test_profiled_steps_that_pass_the_end_of_the_run_end_with_it(launch, tmp_path, data):
    flags = [f"--data_dir={data}", *TINY, "--steps=6"]
    ended = launch(2, "train", *flags, f"--run_dir={tmp_path / 'run'}", "--profile_steps=4:90")
    assert ended.code == 0, ended.err
    (trace,) = (tmp_path / "run" / "profile" / "rank0").rglob("*.xplane.pb")
    assert trace.stat().st_size > 10_000
    assert "MPI_ALLREDUCE" in (tmp_path / "run" / "profile" / "horovod_timeline.json").read_text()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 6
    ended = launch(2, "train", *flags, f"--run_dir={tmp_path / 'other'}", "--profile_steps=6:90")
    assert ended.code == 0, ended.err
    assert "--profile_steps=6:90: none of them is between 0 and 5" in ended.out
    assert not (tmp_path / "other" / "profile").exists()


@pytest.mark.fault(tier=3)
def test_the_benchmark_measures_each_input_on_the_ranks_asked_for(launch, tmp_path, data):
    flags = [*TINY, "--steps=6", f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", f"--out={tmp_path / 'out.json'}"]
    ended = launch(3, "benchmark", *flags, "--ranks=1,3", "--device_tflops=0.5")
    assert ended.code == 0, ended.err
    told = json.loads((tmp_path / "out.json").read_text())
    assert {"tensorflow", "horovod", "mpi"} <= set(told["software"]) and datetime.fromisoformat(told["date"])
    (host,) = told["machine"]["hosts"]
    assert (host["host"], host["cores"]) == (socket.gethostname(), os.cpu_count())
    assert host["cpu"] == processor_name(Path("/"))
    rows = told["rows"]
    kinds = [(ranks, kind) for ranks in (1, 3) for kind in ("device", "host", "real")]
    assert [(row["ranks"], row["input"]) for row in rows] == kinds
    for row in rows:
        assert row["fps"] > 0 and len(row["by_rank"]) == row["ranks"]
        first = next(other for other in rows if other["input"] == row["input"])
        assert row["efficiency"] == pytest.approx(row["fps"] / row["ranks"] / first["fps"])
        assert row["share_of_peak"] == pytest.approx(row["tflops_per_rank"] / 0.5)
    printed = re.findall(r"^ +[13]  (?:device|host|real) +\d+\.\d .*% +\S+ +(\d+\.\d%)  [a-z]+", ended.out, re.M)
    assert printed == [f"{row['share_of_peak']:.1%}" for row in rows]
    assert "10 images a rank and update" in ended.out and "6 updates a row, 60 images a rank" in ended.out

    ended = launch(2, "benchmark", *TINY, "--steps=2", f"--data_dir={tmp_path / 'none'}", "--ranks=4")
    assert (ended.code, ended.out) == (64, "")
    assert "--ranks=4: expected at most the 2 ranks started: hvd-vgg launch --ranks=4 benchmark --ranks=4 ..." in ended.err
    ended = launch(0, "benchmark", *TINY, "--steps=4", f"--data_dir={tmp_path / 'none'}")
    assert ended.code == 0, ended.err
    assert f"no real data: --data_dir={tmp_path / 'none'} is not there" in ended.out


def test_a_benchmark_that_could_not_write_its_result_measures_nothing(launch, tmp_path):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out.json"
    ended = launch(2, "benchmark", *TINY, "--steps=4", f"--data_dir={tmp_path / 'none'}", f"--out={out}")
    assert (ended.code, ended.out) == (78, "")
    assert ended.err.count(f"--out={out} cannot be written: Not a directory") == 1


@pytest.mark.fault(tier=3)
def test_ranks_that_wait_for_a_row_of_the_benchmark_are_not_taken_for_lost(launch, tmp_path, data):
    """A row of 60 updates of 16 records, each read 20 ms late: 19 s at the least, of which Horovod allows 10."""
    program = [sys.executable, str(ROOT / "tests" / "slow.py"), "input", "0"]
    flags = [*TINY, "--steps=60", f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", "--ranks=1", "--input_threads=1"]
    limits = {"HOROVOD_STALL_CHECK_TIME_SECONDS": "3", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "10"}
    ended = launch(2, "benchmark", *flags, program=program, **limits)
    assert ended.code == 0, ended.err
    assert re.search(r"^ +1  real +\d+\.\d .*input$", ended.out, re.M)


def test_a_benchmark_of_updates_that_are_not_applied_ends_with_81(launch, tmp_path):
    (tmp_path / "o").write_text("of another day")
    ended = launch(
        2, "benchmark", *TINY, "--lr=1e9", f"--data_dir={tmp_path / 'none'}", "--ranks=1", f"--out={tmp_path / 'o'}"
    )
    assert ended.code == 81
    told = [line for line in ended.err.splitlines() if line.startswith("hvd-vgg: ")]
    assert len(told) == 1 and "on 1 rank, input device: the loss or gradient is not finite" in told[0]
    assert "--lr=1e+09" in told[0] and "Traceback" not in ended.err
    assert (tmp_path / "o").read_text() == "of another day"
