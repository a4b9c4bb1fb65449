"""What a run claims can be checked, and whoever changes it is found out (`hvd-vgg verify-run`; oracle LOG of README.md).

One honest run is killed on two ranks and goes on alone. Copies of what it left are changed, each in one way. What can be
computed from the raw lines is found although the receipt was written anew to fit the change.
"""

import json
import shutil
import subprocess
import sys

import pytest
from oracles import SEED, STEPS, assert_true, start
from support import ROOT

from hvd_vgg.commands.verify import FAIL, PASS, check
from hvd_vgg.reporting import receipt
from hvd_vgg.run_dir import RunDir
from hvd_vgg.training import checkpoint


@pytest.fixture(scope="module")
def honest(tmp_path_factory, data):
    """A run of five epochs whose rank 1 was killed in the third, and that went on on one rank."""
    out = tmp_path_factory.mktemp("honest")
    # The checkpoint of step 5 is on disk by the time of the kill, and logged.
    ended = start(out, data, 2, "sleep@1:6:2", "kill@1:6", "--eval_every_epochs=1", "--keep_checkpoints=5").wait()
    assert ended.code == 137, ended.out + ended.err
    assert_true(out / "run")  # as the kill left it
    ended = start(out, data, 1, "--eval_every_epochs=1", "--keep_checkpoints=5").wait()
    assert ended.code == 0, ended.out + ended.err
    return out / "run"


@pytest.fixture
def run_dir(honest, tmp_path):
    """A copy of the honest run."""
    return shutil.copytree(honest, tmp_path / "copy")


def failed(run_dir):
    """Returns the claims that do not hold, as text."""
    return [f"{claim.what}: {claim.why}" for claim in check(run_dir) if claim.verdict == FAIL]


def change(run_dir, alter):
    """Rewrites the log: `alter(row)` returns a line's row, changed or not, or None to leave it out."""
    path, lines = run_dir / "dllogger.json", []
    for text in path.read_text().splitlines():
        row = alter(json.loads(text[5:]))
        lines += [f"DLLL {json.dumps(row)}\n"] if row is not None else []
    path.write_text("".join(lines))


def seal(run_dir):
    """Makes the receipt fit what is there now, as whoever can rewrite the directory may."""
    (run_dir / "receipt.json").unlink()
    receipt.write(run_dir)


def at(row, step, name):
    """Says whether a log row is of `step` and has `name`."""
    return row.get("step", "")[1:] == [step] and name in row["data"]


def test_the_honest_run_is_accepted_and_evaluates_the_same_again(honest, launch, data):
    ended = launch(0, "verify-run", str(honest))
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert not [line for line in lines if line.startswith(FAIL)]
    for part in (
        "log: ",
        "start 1: from step 0 on 2 ranks",
        "start 2: from step 5 on 1 rank, by the checkpoint saved then",
        "epochs: ",
        "evaluations: ",
        f"step-{STEPS:08d}.safetensors: whole",
        "result.json, accuracy: ",
        "result.json, fps: ",
        "receipt.json, log: ",
        "flags.txt: ",
    ):
        assert any(line.startswith(PASS) and part in line for line in lines), part
    ended = launch(2, "verify-run", f"--run_dir={honest}", f"--data_dir={data}")
    assert ended.code == 0, ended.out + ended.err
    assert ended.out.count("evaluated again, newest: ") == 1
    assert ended.out.count("log: ") == 2  # and the receipt's: rank 0 alone speaks


def test_the_log_and_the_receipt_hold_what_is_promised(honest):
    found = receipt.read(honest)
    log = receipt.read_log(honest / "dllogger.json")
    assert (honest / "receipt.json").stat().st_mode & 0o777 == 0o640
    assert [row["ranks"] for row in found["starts"]] == [2, 1]
    assert found["seed"] == SEED and found["configuration"]["global_batch"] == 32
    assert found["data"]["train"]["records"] == 75 and len(found["data"]["validation"]["sha256"]) == 64
    assert {"python", "tensorflow", "horovod", "numpy", "cv2", "mpi"} <= set(found["packages"])
    assert [row["epoch"] for row in found["epochs"]][-1] == 4
    assert found["evaluations"][-1]["checkpoint_sha256"] == checkpoint_digest(honest)
    assert found["files"]["dllogger.json"]["bytes"] == (honest / "dllogger.json").stat().st_size
    assert sum(line.event == "coverage" for line in log) >= 5
    seconds = [one for line in log for one in line.data.get("train.update_seconds", [])]
    assert len(seconds) >= STEPS


def checkpoint_digest(run_dir):
    return receipt.checkpoint_row(run_dir / "checkpoints" / f"step-{STEPS:08d}.safetensors")["sha256"]


def test_nothing_of_the_environment_is_in_the_run(tmp_path, data):
    ended = start(tmp_path, data, 1, "--steps=1", HVD_VGG_CANARY_SECRET="swordfish").wait()  # noqa: S106
    assert ended.code == 0, ended.err
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.name == "receipt.json" for path in files)
    assert not [path for path in files if b"swordfish" in path.read_bytes()]
    assert "swordfish" not in ended.out + ended.err


# ---- a log line changed


def test_a_loss_changed_breaks_the_receipt(run_dir):
    def alter(row):
        if at(row, 8, "train.loss"):
            row["data"]["train.loss"] *= 0.9
        return row

    change(run_dir, alter)
    assert any("dllogger.json are not what they were" in claim for claim in failed(run_dir))


@pytest.mark.parametrize(
    ("step", "name", "value", "told"),
    [
        (9, "train.update_seconds", [1e-4], "train.fps"),
        (9, "train.fps", 1e6, "train.fps"),
        (9, "train.lr", 0.006, "train.lr 0.006, but the schedule has 0.005"),
        (9, "train.acc@1", 0.3, "are no shares of 32 images"),
        (10, "eval.top1_hits", 37, "evaluations: line "),
        (10, "eval.acc@1", 0.99, "shares that"),
    ],
)
def test_a_number_changed_contradicts_the_others_even_under_a_new_receipt(run_dir, step, name, value, told):
    def alter(row):
        if at(row, step, name):
            assert row["data"][name] != value
            row["data"][name] = value
        return row

    change(run_dir, alter)
    seal(run_dir)
    assert any(told in claim for claim in failed(run_dir)), failed(run_dir)


def test_faster_updates_throughout_contradict_the_result(run_dir):
    def alter(row):
        if "train.update_seconds" in row.get("data", {}):
            row["data"]["train.update_seconds"] = [one / 2 for one in row["data"]["train.update_seconds"]]
            row["data"]["train.fps"] *= 2
        return row

    change(run_dir, alter)
    seal(run_dir)
    assert any(claim.startswith("result.json, fps: fps ") for claim in failed(run_dir))


def test_a_better_last_evaluation_contradicts_result_and_data(run_dir, launch, data):
    def alter(row):
        if at(row, STEPS, "eval.records") or row.get("step") == []:
            row["data"].update({"eval.top1_hits": 37, "eval.top5_hits": 37, "eval.acc@1": 1.0, "eval.acc@5": 1.0})
        return row

    change(run_dir, alter)
    seal(run_dir)
    assert any(claim.startswith("result.json, accuracy: ") for claim in failed(run_dir))
    result = json.loads((run_dir / "result.json").read_text())
    result.update({"top1_hits": 37, "top5_hits": 37, "acc@1": 1.0, "acc@5": 1.0})
    (run_dir / "result.json").write_text(json.dumps(result))
    (run_dir / "checkpoints" / "best").write_text(f"step-{STEPS:08d}.safetensors\n")
    seal(run_dir)
    assert not failed(run_dir)  # a lie that holds together; it is the weights that speak against it
    ended = launch(0, "verify-run", str(run_dir), f"--data_dir={data}")
    assert ended.code == 65
    assert "does not hold      evaluated again, newest: " in ended.out


# ---- lines removed or in another order


@pytest.mark.parametrize("what", ["train.loss", "eval.records", "coverage", "checkpoint"])
def test_a_line_removed_is_missed(run_dir, what):
    def alter(row):
        data = row.get("data", {})
        gone = at(row, 10, what) or (data.get("event") == what and data["step"] == 10)
        return None if gone else row

    before = (run_dir / "dllogger.json").read_bytes()
    change(run_dir, alter)
    assert (run_dir / "dllogger.json").read_bytes().count(b"\n") == before.count(b"\n") - 1
    assert any("dllogger.json are not what they were" in claim for claim in failed(run_dir))
    seal(run_dir)
    told = [claim for claim in check(run_dir) if claim.verdict != PASS]
    if what == "checkpoint":  # the file is whole, but nothing says any more what was in it when it was saved
        assert any("step-00000010.safetensors" in claim.what for claim in told)
    else:
        assert failed(run_dir)


def test_two_epochs_lines_exchanged_are_noticed(run_dir):
    lines = (run_dir / "dllogger.json").read_text().splitlines(keepends=True)
    first, second = [number for number, line in enumerate(lines) if '"event": "coverage"' in line][-2:]
    lines[first], lines[second] = lines[second], lines[first]
    (run_dir / "dllogger.json").write_text("".join(lines))
    seal(run_dir)
    assert any("tells of epochs" in claim for claim in failed(run_dir))


def test_a_record_less_in_an_epoch_is_noticed(run_dir):
    def alter(row):
        if row.get("data", {}).get("event") == "coverage" and row["data"]["epoch"] == 3:
            row["data"]["seen_digest"][1] = "0" * 16
        return row

    change(run_dir, alter)
    seal(run_dir)
    assert any("whose digest is not that of all 75" in claim for claim in failed(run_dir))


# ---- a restart removed


def test_a_restart_made_to_look_like_one_start_is_noticed(run_dir):
    starts = []

    def alter(row):
        data = row.get("data", {})
        if data.get("event") == "start":
            starts.append(data["step"])
        heading = row["type"] == "METADATA" or row.get("step") == "PARAMETER" or data.get("event") in ("start", "resume")
        return None if heading and (len(starts) == 2 or (starts and data.get("event") != "start")) else row

    change(run_dir, alter)
    assert len(starts) == 2
    assert any("dllogger.json are not what they were" in claim for claim in failed(run_dir))
    seal(run_dir)
    assert any("a start between them is missing" in claim for claim in failed(run_dir))


@pytest.mark.parametrize("number", [1, 2])
def test_all_lines_of_a_start_removed_are_missed(run_dir, number):
    seen = [0, "LOG"]

    def alter(row):
        seen[0] += row["type"] == "METADATA" and seen[1] != "METADATA"
        seen[1] = row["type"]
        return None if seen[0] == number else row

    change(run_dir, alter)
    assert seen[0] == 2
    assert any(claim.startswith("receipt.json") for claim in failed(run_dir))
    seal(run_dir)
    told = "but no start before it is in the log" if number == 1 else "result.json: of step 12, at which the log has no"
    assert any(told in claim for claim in failed(run_dir)), failed(run_dir)


# ---- a checkpoint swapped


def test_an_older_checkpoint_in_the_newest_ones_place_is_noticed(run_dir):
    place = run_dir / "checkpoints"
    shutil.copy(place / f"step-{STEPS - 1:08d}.safetensors", place / f"step-{STEPS:08d}.safetensors")
    seal(run_dir)
    assert any("what is in it is of step 11" in claim for claim in failed(run_dir))


def test_other_weights_under_the_same_heading_are_noticed(run_dir):
    path = run_dir / "checkpoints" / f"step-{STEPS:08d}.safetensors"
    found = checkpoint.load(path)
    tensors = {name: tensor.copy() for name, tensor in found.tensors.items()}
    next(iter(tensors.values()))[...] += 1
    checkpoint.save(RunDir(run_dir), tensors, found.meta, 5, False)
    assert sum(path.name in claim for claim in failed(run_dir)) == 2  # by the log, and by the receipt
    seal(run_dir)
    assert any("is not what was saved" in claim for claim in failed(run_dir))


def test_a_start_from_another_checkpoint_than_was_saved_is_noticed(run_dir):
    def alter(row):
        data = row.get("data", {})
        if data.get("event") == "start" and data["checkpoint"]:
            data["checkpoint"]["sha256"] = "0" * 64
        return row

    change(run_dir, alter)
    seal(run_dir)
    assert any("but by another checkpoint than was saved then" in claim for claim in failed(run_dir))


# ---- a result edited


@pytest.mark.parametrize("name", ["acc@1", "top1_hits", "fps", "fps_updates", "steps", "epochs", "ranks", "seconds"])
def test_a_result_edited_is_noticed(run_dir, name):
    result = json.loads((run_dir / "result.json").read_text())
    result[name] = result[name] - 1 if name in ("steps", "fps_updates") else result[name] * 2 + 1
    (run_dir / "result.json").write_text(json.dumps(result))
    assert "receipt.json, result: result.json is not what it was" in failed(run_dir)
    seal(run_dir)
    assert bool(failed(run_dir)) == (name != "seconds")  # the wall's time is in no log: the receipt alone has it


@pytest.mark.parametrize("name", ["by_rank", "by_host", "bottleneck", "fps_wall"])
def test_what_a_result_says_of_all_ranks_is_held_against_the_log(run_dir, name):
    result = json.loads((run_dir / "result.json").read_text())
    if name.startswith("by_"):
        result[name][0]["fps"] *= 0.99
    else:
        result[name] = "network" if name == "bottleneck" else 0.99 * result[name]
    (run_dir / "result.json").write_text(json.dumps(result))
    seal(run_dir)
    assert [claim.split(f": {name} ")[0] for claim in failed(run_dir)] == ["result.json, by_rank, by_host"]


def test_flags_edited_are_noticed(run_dir):
    path = run_dir / "flags.txt"
    path.write_text(path.read_text().replace(f"--seed={SEED}", "--seed=7"))
    assert failed(run_dir) == ["flags.txt: seed: not what start 2 was given"]


def test_what_is_no_run_is_told(launch, tmp_path):
    ended = launch(0, "verify-run", str(tmp_path))
    assert ended.code == 78
    assert "has no dllogger.json" in ended.err


def test_verifying_needs_no_tensorflow(honest):
    program = f"import sys; sys.argv = ['hvd-vgg', 'verify-run', {str(honest)!r}]\n"
    program += "from hvd_vgg.__main__ import run\nassert run(sys.argv[1:]) == 0\nassert 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
