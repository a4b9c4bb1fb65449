"""What a run says of itself can be checked, and whoever changes it is found out (`hvd-vgg verify-run`; LOG in README.md).

One honest run is killed on two ranks and continues on one. Copies of what it left are changed, each in one way. What can be
computed from the lines of the log is found although the receipt was written anew to fit the change.
"""

import json
import shutil
import subprocess
import sys

import pytest
from oracles import SEED, STEPS, assert_true, run, start
from support import ROOT

from hvd_vgg.commands.history import FAIL, PASS
from hvd_vgg.commands.same_run import compare_runs
from hvd_vgg.commands.verify import check
from hvd_vgg.reporting import receipt
from hvd_vgg.run_dir import RunDir
from hvd_vgg.training import checkpoint


@pytest.fixture(scope="module")
def honest(tmp_path_factory, data):
    """A run of five epochs whose rank 1 was killed in the third, and that continued on one rank."""
    out = tmp_path_factory.mktemp("honest")
    # The checkpoint of step 5 is on disk by the time of the kill, and logged.
    run(out, data, 2, "sleep@1:6:2", "kill@1:6", "--eval_every_epochs=1", "--keep_checkpoints=5", code=137)
    assert_true(out / "run")  # as the kill left it
    run(out, data, 1, "--eval_every_epochs=1", "--keep_checkpoints=5")
    return RunDir(out / "run")


@pytest.fixture
def copy(honest, tmp_path):
    """A copy of the honest run."""
    return RunDir(shutil.copytree(honest.path, tmp_path / "copy"))


def faults(run):
    return [f"{each.subject}: {each.text}" for each in check(run.path) if each.verdict == FAIL]


def change_log(run, alter):
    """Rewrites the log: `alter(row)` changes the row of a line in place, and returns True to leave it out."""
    rows = [json.loads(line[5:]) for line in run.log.read_text().splitlines()]
    run.log.write_text("".join(f"DLLL {json.dumps(row)}\n" for row in rows if not alter(row)))


def change_result(run, **changes):
    run.result.write_text(json.dumps({**json.loads(run.result.read_text()), **changes}))


def seal(run):
    """Makes the receipt fit what is there now, as whoever can rewrite the directory may."""
    run.receipt.unlink()
    receipt.write(run)


def is_row(row, step, name):
    """Says whether a row is of `step` and has `name`, or is an event of that name."""
    data = row.get("data", {})
    return (row.get("step", "")[1:] == [step] and name in data) or (data.get("event") == name and data.get("step") == step)


def test_verify_run_accepts_an_honest_run(honest, launch, data):
    """With the data on two ranks, its checkpoints are evaluated again, to the same hits."""
    ended = launch(0, "verify-run", str(honest.path))
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    for part in (
        "log: ",
        "start 1: from step 0 on 2 ranks: no checkpoint",
        "start 2: from step 5 on 1 rank: the checkpoint of line ",
        f"step-{STEPS:08d}.safetensors: whole, as saved (line ",
        "best: ",
        f"result.json: of step {STEPS}, as line ",
        "receipt.json: ",
        "flags.txt: ",
    ):
        assert any(line.startswith(PASS) and part in line for line in lines), part
    assert lines[-1].endswith(" passed, 0 unknown")
    ended = launch(2, "verify-run", f"--run_dir={honest.path}", f"--data_dir={data}")
    assert ended.code == 0, ended.out + ended.err
    assert ended.out.count(f"{PASS}     evaluated again: newest: ") == 1
    assert ended.out.count("receipt.json: ") == 1  # rank 0 alone prints


def test_log_and_receipt_hold_what_is_promised(honest):
    found, log = receipt.read(honest), receipt.read_log(honest.log)
    assert honest.receipt.stat().st_mode & 0o777 == 0o640
    assert [row["ranks"] for row in found["starts"]] == [2, 1]
    assert found["seed"] == SEED and found["configuration"]["global_batch"] == 32
    assert found["data"]["train"]["records"] == 75 and len(found["data"]["validation"]["sha256"]) == 64
    assert {"python", "tensorflow", "horovod", "numpy", "cv2", "mpi"} <= set(found["packages"])
    assert [row["epoch"] for row in found["epochs"]][-1] == 4
    digest = receipt.checkpoint_row(honest.checkpoint(STEPS))["sha256"]
    assert found["evaluations"][-1]["checkpoint_sha256"] == digest
    assert found["files"]["dllogger.json"]["bytes"] == honest.log.stat().st_size
    saved = checkpoint.load(honest.checkpoint(STEPS))
    state = checkpoint.state_sha256(checkpoint.tensors_sha256(saved.tensors.items()), saved.meta)
    evaluation = [line.data for line in log if line.kind == "evaluation"][-1]
    assert state == evaluation["eval.state_sha256"] == found["state_sha256"] == found["checkpoints"][-1]["state_sha256"]
    assert state == json.loads(honest.result.read_text())["state_sha256"]
    assert sum(line.kind == "coverage" for line in log) >= 5
    assert sum(len(line.data.get("train.update_seconds", [])) for line in log) >= STEPS
    assert all(line.data["train.losses"] == [line.data["train.loss"]] for line in log if line.kind == "train")


def test_run_dir_holds_no_other_environment(tmp_path, data):
    ended = start(tmp_path, data, 1, "--steps=1", HVD_VGG_CANARY_SECRET="swordfish").wait()  # noqa: S106
    assert ended.code == 0, ended.err
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.name == "receipt.json" for path in files)
    assert not [path for path in files if b"swordfish" in path.read_bytes()]
    assert "swordfish" not in ended.out + ended.err


# ---- a line of the log changed, left out, or moved


@pytest.mark.parametrize(
    ("step", "name", "value", "fault"),
    [
        (8, "train.loss", 0.1, "train.loss is 0.1, expected "),
        (8, "train.losses", [0.1], "expected 0.1"),
        (9, "train.update_seconds", [1e-4], "train.fps "),
        (9, "train.input_seconds", [1e4], "train.input_seconds "),
        (9, "train.fps", 1e6, "train.fps is 1000000.0, expected "),
        (9, "train.lr", 0.006, "train.lr is 0.006, expected 0.005"),
        (9, "train.acc@1", 0.3, "train.acc@1, acc@5 of 32 images "),
        (10, "eval.top1_hits", 37, "eval.top1_hits, top5_hits, eval.records "),
        (10, "eval.acc@1", 0.99, "eval.acc@1, acc@5 "),
        (10, "eval.records", 36, "eval.top1_hits, top5_hits, eval.records "),
        (10, "eval.state_sha256", "0" * 64, "state_sha256 is "),
    ],
)
def test_verify_finds_a_number_changed(copy, step, name, value, fault):
    """It contradicts the others even under a new receipt."""

    def alter(row):
        if is_row(row, step, name):
            assert row["data"][name] != value
            row["data"][name] = value

    change_log(copy, alter)
    assert any(text.startswith("receipt.json: digest of dllogger.json ") for text in faults(copy))
    seal(copy)
    assert any(fault in text for text in faults(copy)), faults(copy)


def test_verify_finds_faster_updates_throughout(copy):
    """The result and the end of the run were measured from the same seconds."""

    def alter(row):
        if "train.update_seconds" in row.get("data", {}):
            row["data"]["train.update_seconds"] = [seconds / 2 for seconds in row["data"]["train.update_seconds"]]
            row["data"]["train.input_seconds"] = [seconds / 2 for seconds in row["data"]["train.input_seconds"]]
            row["data"]["train.fps"] *= 2

    change_log(copy, alter)
    seal(copy)
    assert {"log", "result.json"} == {text.split(":")[0] for text in faults(copy) if " fps " in text}


def test_verify_finds_a_better_evaluation_by_the_data(copy, launch, data):
    """A lie that holds together: it is the weights that speak against it."""
    better = {"top1_hits": 37, "top5_hits": 37, "acc@1": 1.0, "acc@5": 1.0}

    def alter(row):
        if is_row(row, STEPS, "eval.records") or row.get("step") == []:
            row["data"].update({f"eval.{name}": value for name, value in better.items()})

    change_log(copy, alter)
    seal(copy)
    assert any(text.startswith("result.json: acc@1 ") for text in faults(copy))
    change_result(copy, **better)
    (copy.checkpoints / "best").write_text(f"{copy.checkpoint(STEPS).name}\n")
    seal(copy)
    assert not faults(copy)
    ended = launch(0, "verify-run", str(copy.path), f"--data_dir={data}")
    assert ended.code == 65
    assert f"{FAIL}     evaluated again: newest: " in ended.out


@pytest.mark.parametrize("name", ["train.loss", "eval.records", "coverage", "throughput", "checkpoint"])
def test_verify_misses_a_line_left_out(copy, name):
    length = copy.log.read_bytes().count(b"\n")
    step = STEPS if name == "throughput" else 10
    change_log(copy, lambda row: is_row(row, step, name))
    assert copy.log.read_bytes().count(b"\n") == length - 1
    assert any(text.startswith("receipt.json: digest of dllogger.json ") for text in faults(copy))
    seal(copy)
    # Without the line of a checkpoint the file is whole, but nothing says any more what was in it when it was saved.
    notes = [each for each in check(copy.path) if each.verdict != PASS]
    assert any(each.verdict == FAIL for each in notes) or notes[0].subject == "step-00000010.safetensors"


def test_verify_finds_lines_of_epochs_exchanged(copy):
    lines = copy.log.read_text().splitlines(keepends=True)
    first, second = [number for number, line in enumerate(lines) if '"event": "coverage"' in line][-2:]
    lines[first], lines[second] = lines[second], lines[first]
    copy.log.write_text("".join(lines))
    seal(copy)
    assert any(": epoch is 4, expected 3" in text for text in faults(copy))


def test_verify_finds_a_record_less_in_an_epoch(copy):
    def alter(row):
        if row.get("data", {}).get("event") == "coverage" and row["data"]["epoch"] == 3:
            row["data"]["seen_digest"][1] = "0" * 16

    change_log(copy, alter)
    seal(copy)
    assert any(": seen is [75, " in text for text in faults(copy))


# ---- a start left out, or from elsewhere


def test_verify_finds_two_starts_made_one(copy):
    starts = []

    def alter(row):
        data = row.get("data", {})
        if data.get("event") == "start":
            starts.append(data["step"])
        heading = row["type"] == "METADATA" or row.get("step") == "PARAMETER" or data.get("event") in ("start", "resume")
        return heading and (len(starts) == 2 or (starts and data.get("event") != "start"))

    change_log(copy, alter)
    assert len(starts) == 2
    assert any(text.startswith("receipt.json: digest of dllogger.json ") for text in faults(copy))
    seal(copy)
    assert any("one after start 1 is missing" in text for text in faults(copy))


@pytest.mark.parametrize(
    ("number", "fault"),
    [(1, "start 1: from step 5 on 1 rank: not what had been saved"), (2, "result.json: is of step 12, ")],
)
def test_verify_misses_all_lines_of_a_start(copy, number, fault):
    seen = [0, "LOG"]

    def alter(row):
        seen[0] += row["type"] == "METADATA" and seen[1] != "METADATA"
        seen[1] = row["type"]
        return seen[0] == number

    change_log(copy, alter)
    assert seen[0] == 2
    assert any(text.startswith("receipt.json: ") for text in faults(copy))
    seal(copy)
    assert any(text.startswith(fault) for text in faults(copy)), faults(copy)


def test_verify_finds_a_start_from_another_checkpoint(copy):
    def alter(row):
        data = row.get("data", {})
        if data.get("event") == "start" and data["checkpoint"]:
            data["checkpoint"]["sha256"] = "0" * 64

    change_log(copy, alter)
    seal(copy)
    assert any(text.startswith("start 2: from step 5 on 1 rank: not what had been saved") for text in faults(copy))


# ---- a checkpoint exchanged


def test_verify_finds_an_older_checkpoint_as_the_newest(copy):
    shutil.copy(copy.checkpoint(STEPS - 1), copy.checkpoint(STEPS))
    seal(copy)
    assert any("its contents are of step 11" in text for text in faults(copy))


def test_verify_finds_other_weights(copy, honest):
    """Under the same heading: by the log, and by the receipt."""
    path = copy.checkpoint(STEPS)
    found = checkpoint.load(path)
    tensors = {name: tensor.copy() for name, tensor in found.tensors.items()}
    next(iter(tensors.values()))[...] += 1
    checkpoint.save(copy, tensors, found.meta, 5, [])
    assert list(compare_runs(copy, honest)) == [
        f"weights first differ in {next(iter(tensors))} (checkpoint of step {STEPS})"
    ]
    saved = f"{path.name}: is not what was saved"
    assert sum(saved in text or f"receipt.json: {path.name} is not what it was" in text for text in faults(copy)) == 2
    seal(copy)
    assert [text for text in faults(copy) if text.startswith(saved)] == faults(copy)


# ---- a result or flags edited


@pytest.mark.parametrize(
    "name", ["acc@1", "top1_hits", "fps", "fps_updates", "steps", "epochs", "ranks", "seconds", "state_sha256"]
)
def test_verify_finds_a_result_edited(copy, name):
    """The receipt alone has its wall-clock time, which is in no log."""
    value = json.loads(copy.result.read_text())[name]
    less = name in ("steps", "fps_updates")
    change_result(copy, **{name: "0" * 64 if name == "state_sha256" else value - 1 if less else value * 2 + 1})
    assert any(text.startswith("receipt.json: digest of result.json ") for text in faults(copy))
    seal(copy)
    assert bool(faults(copy)) == (name != "seconds")


@pytest.mark.parametrize("name", ["by_rank", "by_host", "bottleneck", "fps_wall"])
def test_verify_compares_all_ranks_with_the_log(copy, name):
    value = json.loads(copy.result.read_text())[name]
    if name.startswith("by_"):
        value[0]["fps"] *= 0.99
    change_result(copy, **{name: {"bottleneck": "none", "fps_wall": 1.0}.get(name, value)})
    seal(copy)
    (fault,) = faults(copy)
    assert fault.startswith(
        f"result.json: {name}: entry 1 differs: fps is " if name.startswith("by_") else f"result.json: {name} is "
    )


def test_verify_finds_flags_edited(copy):
    copy.flags.write_text(copy.flags.read_text().replace(f"--seed={SEED}", "--seed=7"))
    assert faults(copy) == [f"flags.txt: seed is 7, expected {SEED}"]


def test_verify_run_refuses_what_is_no_run(launch, tmp_path):
    ended = launch(0, "verify-run", str(tmp_path))
    assert ended.code == 78
    assert "has no dllogger.json" in ended.err


def test_verify_run_needs_no_tensorflow(honest):
    words = ["hvd-vgg", "verify-run", str(honest.path), f"--same_as={honest.path}"]
    program = f"import sys; sys.argv = {words}\n"
    program += "from hvd_vgg.__main__ import run\nassert run(sys.argv[1:]) == 0\nassert 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
