"""What a run leaves behind and prints, as its users read it."""

import json
import os
import re
import socket
from datetime import datetime
from pathlib import Path

import pytest
import tensorflow as tf
from oracles import INJECT, log_rows, result
from support import ROOT, TINY, Started, command_line, full
from tensorboard.backend.event_processing import data_provider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

from hvd_vgg.provenance import processor_name
from hvd_vgg.reporting.log import METRICS


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    """A run of two epochs on two ranks: (its directory, how it ended)."""
    folder = tmp_path_factory.mktemp("finished")
    flags = [f"--data_dir={data}", f"--run_dir={folder / 'run'}", *TINY, "--steps=0", "--epochs=2", "--eval_every_epochs=1"]
    flags += ["--device_tflops=0.5", "--reference_curve=1:0.9,2:1", "--ema_decay=0.9"]
    ended = Started(command_line(2, ["train", *flags]), folder).wait(code=0)
    return folder / "run", ended


@pytest.fixture
def tiny(launch, tmp_path, data):
    """Runs a command at toy size on `run`, faults first; returns how it ended, which must be with `code`."""

    def start(ranks, command, *arguments, code=0, **environment):
        faults = [argument for argument in arguments if "@" in argument]
        flags = [argument for argument in arguments if "@" not in argument]
        own = TINY if command == "train" else TINY[:7]
        words = [command, f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *own, *flags]
        return launch(ranks, str(tmp_path), *faults, *words, program=INJECT, **environment, code=code)

    return start


def test_result_file_has_the_result(finished):
    found = result(finished[0])
    names = {"acc@1", "acc@5", "records_evaluated", "fps", "steps", "epochs", "ranks", "global_batch", "seconds"}
    assert names <= set(found)
    assert (found["records_evaluated"], found["steps"], found["ranks"], found["global_batch"]) == (37, 5, 2, 32)
    assert found["acc@1"] == found["top1_hits"] / 37
    assert found["epochs"] == 5 * 32 / 75
    assert found["fps_updates"] + found["warm_up_updates"] == 5
    assert 0 < found["fps_wall"] < found["fps"]
    assert found["share_of_peak"] == pytest.approx(found["tflops_per_rank"] / 0.5)
    assert [(row["ranks"], row["fps"]) for row in found["by_host"]] == [(2, sum(row["fps"] for row in found["by_rank"]))]
    assert [row["rank"] for row in found["by_rank"]] == [0, 1]
    for row in found["by_rank"]:
        parts = [row[name] for name in ("input", "compute", "network", "straggler_wait")]
        assert sum(parts) == pytest.approx(1) and min(parts) >= 0
    assert sum(row["fps"] for row in found["by_rank"]) == pytest.approx(found["fps"], rel=0.05)
    assert min(row["straggler_wait"] for row in found["by_rank"]) == 0


def test_console_shows_every_update_and_a_summary(finished):
    run_dir, ended = finished
    for part in (
        f"acc@1              {result(run_dir)['acc@1']:.4f}",
        "labels from 1 (0 is background",
        f"state SHA-256      {result(run_dir)['state_sha256']}",
        f"of 37 records  state {result(run_dir)['state_sha256'][:16]}",
        "images/s; limited by: ",
        f"hvd-vgg verify-run {run_dir}",
    ):
        assert part in ended.out
    summary = ended.out[ended.out.index("finished in ") :].splitlines()
    assert len(summary) <= 9 and "slowest rank" not in ended.out
    update = r"^step \d/5  epoch \d\.\d\d  loss \d\.\d{4}  acc@1 \d\.\d{3}  lr 0\.05  \d+\.\d images/s"
    assert len(re.findall(update, ended.out, re.M)) == 5
    assert len(re.findall(r"^step \d  epoch \d\.\d\d  evaluation: acc@1 ", ended.out, re.M)) == 2
    assert re.search(r"acc@5 \d\.\d{4}  reference 1\.0000 \(-0\.\d{4}\)  loss ", ended.out)
    assert ended.out.count("below --reference_curve at epoch") == ended.out.count("finished in") == 1
    assert "\r" not in ended.out.replace("\r\n", "\n")  # mpirun's pseudo-terminal ends lines so
    assert ended.err == ""


def test_log_has_every_metric_at_its_steps(finished):
    logged = log_rows(finished[0])
    assert logged[0]["step"] == "PARAMETER"
    assert {"lr", "seed", "tensorflow", "horovod", "ranks"} <= set(logged[0]["data"])
    train = [row for row in logged if "train.loss" in row["data"]]
    evaluated = [row for row in logged if "eval.acc@1" in row["data"]][:-1]  # the last is the run's summary
    assert logged[-1]["step"] == [] and {"fps", "fps_wall", "bottleneck"} <= set(logged[-1]["data"])
    assert [row["step"] for row in train] == [[0, 1], [0, 2], [1, 3], [1, 4], [2, 5]]
    assert [row["step"] for row in evaluated] == [[1, 3], [2, 5]]
    float16 = {"train.loss_scale", "train.skipped_updates"}
    assert set(train[0]["data"]) | set(evaluated[0]["data"]) | float16 == set(METRICS)
    accuracies, references = [row["data"]["eval.acc@1"] for row in evaluated], [0.9 + 0.1 * (3 * 32 / 75 - 1), 1.0]
    differences = [row["data"]["eval.reference_difference"] for row in evaluated]
    assert differences == pytest.approx([top1 - wanted for top1, wanted in zip(accuracies, references)])


def test_average_is_evaluated_beside_the_weights(finished, launch):
    """At each evaluation; `best_average` names the checkpoint with its most hits, and `evaluate` counts these again."""
    run_dir, _ = finished
    logged = [row for row in log_rows(run_dir) if "eval.average_top1_hits" in row["data"]][:-1]
    hits = {row["step"][1]: [row["data"][f"eval.average_top{k}_hits"] for k in (1, 5)] for row in logged}
    assert list(hits) == [3, 5] and result(run_dir)["average_top1_hits"] == hits[5][0]
    best = max(hits, key=lambda step: (hits[step][0], -step))
    assert (run_dir / "checkpoints" / "best_average").read_text() == f"step-{best:08d}.safetensors\n"
    ended = launch(0, "evaluate", f"--run_dir={run_dir}", "--average", code=0)
    assert f"average of weights, step {best}: acc@1 " in ended.out
    assert f"({hits[best][0]} and {hits[best][1]} of 37 records, each once, on 1 rank)" in ended.out


def test_tensorboard_has_the_same_numbers(finished):
    (path,) = (finished[0] / "tensorboard").iterdir()
    seen = {}
    for record in tf.data.TFRecordDataset(str(path)):
        event = tf.compat.v1.Event.FromString(record.numpy())
        for value in event.summary.value:
            if value.metadata.plugin_data.plugin_name == "scalars":
                seen[value.tag, event.step] = float(tf.make_ndarray(value.tensor))
    for row in log_rows(finished[0]):
        if "train.loss" in row["data"]:
            assert seen["train/loss", row["step"][1]] == pytest.approx(row["data"]["train.loss"], rel=1e-6)
    assert ("eval/acc@1", 5) in seen


def test_tensorboard_has_flags_result_and_pictures(finished):
    """As TensorBoard's own readers find them: HParams with the final accuracies, the confusion matrix and the sheet."""
    folder = str(finished[0] / "tensorboard")
    runs = EventMultiplexer().AddRunsFromDirectory(folder).Reload()
    provider = data_provider.MultiplexerDataProvider(runs, folder)
    plugin = backend_context.Context(TBContext(logdir=folder, multiplexer=runs, data_provider=provider))
    request = api_pb2.ListSessionGroupsRequest(slice_size=9, allowed_statuses=[api_pb2.STATUS_SUCCESS])
    (group,) = list_session_groups.Handler(RequestContext(), plugin, "", request).run().session_groups
    values = {each.name.tag: (each.value, each.training_step) for each in group.metric_values}
    expected = {f"eval/{name}": (pytest.approx(result(finished[0])[name]), 5) for name in ("acc@1", "acc@5")}
    assert values == expected
    flags = {name: getattr(value, value.WhichOneof("kind")) for name, value in group.hparams.items()}
    assert (flags["lr"], flags["model"], flags["augment"], flags["global_batch"]) == (0.05, "vgg11", "crop", 32)
    assert "mix_batch" not in flags and "run_dir" not in flags
    (session,) = group.sessions
    assert session.status == api_pb2.STATUS_SUCCESS and session.end_time_secs > session.start_time_secs
    images = runs.PluginRunToTagToContent("images")["."]
    assert set(images) == {"training samples", "confusion matrix"}
    for name, step, shape in (
        ("confusion matrix", 5, (668, 682, 3)),
        ("training samples", 0, (18 + 4 * 154, 8 + 6 * 136, 3)),
    ):
        (event,) = runs.Tensors(".", name)
        width, height, png = tf.make_ndarray(event.tensor_proto).tolist()
        assert (event.step, (int(height), int(width), 3)) == (step, shape)
        assert tf.io.decode_png(png).shape == shape


@pytest.mark.parametrize("lost", [True, *full(False)])
def test_finished_run_started_again_trains_nothing(finished, launch, lost):
    """It evaluates the same, and writes a result that is lost, as by a kill between checkpoint and result."""
    run_dir, before = finished[0], result(finished[0])
    text = (run_dir / "result.json").read_text()
    if lost:
        (run_dir / "result.json").unlink()
    ended = launch(0, "train", f"--flagfile={run_dir / 'flags.txt'}", code=0)
    assert f"continuing from step 5: {run_dir}/checkpoints/step-00000005.safetensors" in ended.out
    assert f"acc@1              {before['acc@1']:.4f}" in ended.out
    found = result(run_dir)
    assert (found["steps"], found["top1_hits"]) == (before["steps"], before["top1_hits"])
    assert found["fps"] == (None if lost else before["fps"])
    (run_dir / "result.json").write_text(text)


@pytest.mark.fault(tier=3)
def test_run_stops_at_a_target_and_keeps_the_best(tiny, launch, tmp_path):
    flags = ["--steps=0", "--epochs=60", "--eval_every_epochs=2", "--save_every_steps=1", "--keep_checkpoints=1"]
    ended = tiny(2, "train", *flags, "--stop_at_top1=0.3")
    assert "acc@1 has reached --stop_at_top1=0.3" in ended.out
    run_dir, found = tmp_path / "run", result(tmp_path / "run")
    assert found["acc@1"] >= 0.3
    assert found["steps"] < 141
    ended = launch(2, "train", f"--flagfile={run_dir / 'flags.txt'}", code=0)
    assert f"steps              {found['steps']}" in ended.out
    assert result(run_dir) == found
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == ["best", f"step-{found['steps']:08d}.safetensors"]


@pytest.mark.fault(tier=3)
def test_console_dllogger(tiny, launch, tmp_path):
    """Lines in DLLogger's format, and no others."""
    lines = tiny(2, "train", "--steps=2", "--console=dllogger").out.splitlines()
    assert all(line.startswith("DLL ") for line in lines)
    assert sum("train.loss : " in line for line in lines) == 2
    assert sum("eval.acc@1 : " in line for line in lines) == 2  # the evaluation, and the summary
    ended = launch(2, "evaluate", f"--run_dir={tmp_path / 'run'}", code=0)
    assert "of 37 records, each once" in ended.out


@pytest.mark.fault(tier=3)
def test_console_bar(tiny):
    ended = tiny(2, "train", "--steps=60", "--console=bar")
    bars = re.findall(r"(epoch \d+\.\d\d \[#*\.*\] \d+/60  loss \d\.\d{4}  \d+ images/s  left [^\n\r]*)", ended.out)
    assert bars and max(map(len, bars)) < 80


def test_demo_data_are_the_same_on_ranks_and_never_overwritten(launch, tmp_path):
    flags = ["--train_images=30", "--validation_images=10", "--shards=3"]
    for ranks in (0, 2):
        launch(ranks, "make-demo-data", f"--data_dir={tmp_path / str(ranks)}", *flags, code=0)
    names = sorted(path.name for path in (tmp_path / "0").iterdir())
    assert names == [*(f"train-0000{i}-of-00003" for i in range(3)), *(f"validation-0000{i}-of-00002" for i in range(2))]
    for name in names:
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    ended = launch(0, "make-demo-data", f"--data_dir={tmp_path / '0'}", *flags, code=65)
    assert ended.err.count("never overwritten") == 1


@pytest.mark.parametrize(("script", "ranks"), full(("multigpu_imagenet", 2), ("imagenet", 1)))
def test_scripts_of_the_published_recipe_train(launch, tmp_path, data, script, ranks):
    """At a small width, by flags passed on."""
    flags = [*(flag for flag in TINY if "device_batch" not in flag), "--model=vgg16", "--steps=2"]
    flags += ["--ranks=2"] if ranks == 2 else []
    program = ["bash", str(ROOT / "launch" / f"run_train_vgg16_{script}.sh")]
    ended = launch(0, *flags, program=program, DATA_DIR=str(data), BATCH_SIZE="5", PYTHONPATH=str(ROOT), code=0)
    assert f"mpirun -np {ranks} " in ended.out
    assert "micro-batches of at most 5" in ended.out
    found = result(tmp_path / "runs" / "vgg16_imagenet")
    assert (found["ranks"], found["global_batch"], found["steps"]) == (ranks, 32, 2)


@pytest.mark.parametrize(("cause", "fault"), [("input", "slow_read@1:0:0.02"), *full(("compute", "slow_compute@1:0"))])
@pytest.mark.fault("F35")
def test_slow_rank_is_named_with_its_cause(tiny, tmp_path, cause, fault):
    ended = tiny(2, "train", fault, "--steps=16", "--log_every_steps=4", "--verbose")
    found = result(tmp_path / "run")
    assert (found["bottleneck"], found["slow_rank"], found["slow_ranks"]) == (cause, 1, [1])
    assert found["slowest_rank"] == 1
    fast, slow = found["by_rank"]
    assert slow[cause] > fast[cause] and fast["straggler_wait"] > slow["straggler_wait"]
    assert f"slow: rank 1 ({cause})" in ended.out
    assert re.search(rf"images/s; limited by: rank 1 on \S+: its {cause}\s", ended.out)
    assert "records evaluated  37\n  steps              16\n" in ended.out
    assert re.search(rf"slowest rank       rank 1 on \S+: \d+\.\d images/s alone, limited by its {cause} \(", ended.out)


def test_saving_of_one_rank_is_excluded_on_all(tiny, tmp_path):
    """Rank 0 begins each of 6 checkpoints half a second late; rank 1 counts that as saving, not as an update."""
    tiny(2, "train", "slow_snapshot@0:0:0.5", "--steps=6", "--save_every_steps=1")
    assert all(row["saving_seconds"] >= 5 * 0.5 for row in result(tmp_path / "run")["by_rank"])


@pytest.mark.fault(tier=3)
def test_profile_of_steps_on_chosen_ranks(tiny, tmp_path):
    tiny(2, "train", "--steps=8", "--profile_ranks=1", "--profile_steps=3:4")
    folder = tmp_path / "run" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["horovod_timeline.json", "rank1"]
    (trace,) = (folder / "rank1").rglob("*.xplane.pb")
    assert trace.stat().st_size > 10_000
    timeline = (folder / "horovod_timeline.json").read_text()
    assert "gradient_block1" in timeline
    assert timeline.count("MPI_ALLREDUCE") > 0


@pytest.mark.fault(tier=3)
def test_profile_ends_with_the_run(tiny, tmp_path):
    """Where its steps pass the end of the run; none of them in it is said and profiles nothing."""
    tiny(2, "train", "--steps=6", "--profile_steps=4:90")
    (trace,) = (tmp_path / "run" / "profile" / "rank0").rglob("*.xplane.pb")
    assert trace.stat().st_size > 10_000
    assert "MPI_ALLREDUCE" in (tmp_path / "run" / "profile" / "horovod_timeline.json").read_text()
    assert result(tmp_path / "run")["steps"] == 6
    other = tmp_path / "other"
    ended = tiny(2, "train", "--steps=6", f"--run_dir={other}", "--profile_steps=6:90")
    assert "--profile_steps=6:90: none of them is between 0 and 5" in ended.out
    assert not (other / "profile").exists()


# ---- hvd-vgg benchmark


@pytest.mark.fault(tier=3)
def test_benchmark_measures_each_input_on_chosen_ranks(tiny, tmp_path):
    ended = tiny(3, "benchmark", "--steps=6", f"--out={tmp_path / 'out.json'}", "--ranks=1,3", "--device_tflops=0.5")
    report = json.loads((tmp_path / "out.json").read_text())
    assert {"tensorflow", "horovod", "mpi"} <= set(report["software"]) and datetime.fromisoformat(report["date"])
    (host,) = report["machine"]["hosts"]
    assert (host["host"], host["cores"]) == (socket.gethostname(), os.cpu_count())
    assert host["cpu"] == processor_name(Path("/"))
    rows = report["rows"]
    kinds = [(ranks, kind) for ranks in (1, 3) for kind in ("device", "host", "real", "alone")]
    assert [(row["ranks"], row["input"]) for row in rows] == kinds
    alone, rows = rows[3::4], [row for row in rows if row["input"] != "alone"]
    printed = re.findall(r"^ +[13]  input alone +(\d+\.\d) +\d+\.\d +\d+\.\d%$", ended.out, re.M)
    assert printed == [f"{row['fps']:.1f}" for row in alone]
    for row in rows:
        assert row["fps"] > 0 and len(row["by_rank"]) == row["ranks"]
        first = next(other for other in rows if other["input"] == row["input"])
        assert row["efficiency"] == pytest.approx(row["fps"] / row["ranks"] / first["fps"])
        assert row["share_of_peak"] == pytest.approx(row["tflops_per_rank"] / 0.5)
    printed = re.findall(r"^ +[13]  (?:device|host|real) +\d+\.\d .*% +\S+ +(\d+\.\d%)  [a-z]+", ended.out, re.M)
    assert printed == [f"{row['share_of_peak']:.1%}" for row in rows]
    assert "10 images per rank and update" in ended.out and "6 updates per row, 60 images per rank" in ended.out
    none = f"--data_dir={tmp_path / 'none'}"
    ended = tiny(0, "benchmark", "--steps=4", none)
    assert f"no real data: {none} does not exist" in ended.out
    ended = tiny(2, "benchmark", "--steps=2", none, "--ranks=4", code=64)
    assert "--ranks=4: expected at most the 2 ranks started: hvd-vgg launch --ranks=4 benchmark --ranks=4 ..." in ended.err


@pytest.mark.fault(tier=3)
def test_benchmark_draws_a_page(launch, tmp_path):
    """With the numbers that are printed; one rank has bars, and no curve of efficiency."""
    flags = [*TINY[:7], f"--data_dir={tmp_path / 'none'}", "--steps=4", f"--out={tmp_path / 'out.html'}"]
    ended = launch(0, "benchmark", *flags, code=0)
    page = (tmp_path / "out.html").read_text()
    printed = re.findall(r"^ +1  (?:device|host) +(\d+\.\d) +(\d+\.\d)", ended.out, re.M)
    assert len(printed) == 2 and all(f">{number}</td>" in page for row in printed for number in row)
    assert page.count("<figure") == 1 and socket.gethostname() in page


@pytest.mark.fault(tier=3)
def test_benchmark_without_matplotlib_measures_nothing(tiny, tmp_path):
    """Where a page is asked for; `inject.py` hides it."""
    ended = tiny(0, "benchmark", "--steps=4", f"--out={tmp_path / 'out.html'}", code=78)
    assert (ended.out, ended.err.count("matplotlib, which draws the figures, is not installed")) == ("", 1)


def test_benchmark_that_cannot_write_measures_nothing(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out.json"
    ended = tiny(0, "benchmark", "--steps=4", f"--out={out}", code=78)
    assert ended.out == ""
    assert ended.err.count(f"--out={out} cannot be written: Not a directory") == 1


@pytest.mark.fault(tier=3)
def test_benchmark_ranks_that_wait_are_not_taken_for_lost(tiny):
    """A row of 60 updates of 16 records, each read 20 ms late: 19 s at the least, of which Horovod allows 10."""
    flags = ["--steps=60", "--ranks=1", "--input_threads=1"]
    limits = {"HOROVOD_STALL_CHECK_TIME_SECONDS": "3", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "10"}
    ended = tiny(2, "benchmark", "slow_read@0:0:0.02", *flags, **limits)
    assert re.search(r"^ +1  real +\d+\.\d .*input$", ended.out, re.M)


def test_benchmark_of_updates_not_applied_ends_with_81(tiny, tmp_path):
    (tmp_path / "o.json").write_text("of another day")
    ended = tiny(0, "benchmark", "--lr=1e9", f"--out={tmp_path / 'o.json'}", code=81)
    (message,) = [line for line in ended.err.splitlines() if line.startswith("hvd-vgg: ")]
    assert "on 1 rank, input device: the loss or gradient is not finite" in message
    assert "--lr=1e+09" in message and "Traceback" not in ended.err
    assert (tmp_path / "o.json").read_text() == "of another day"
