import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from support import order_of_writes

from hvd_vgg.errors import CONFIGURATION, NOT_WRITTEN, Failure
from hvd_vgg.reporting import receipt
from hvd_vgg.run_dir import RunDir
from hvd_vgg.training import checkpoint


def tensors(step):
    return {"a/kernel": np.full((30, 40), step, np.float32), "a/bias": np.arange(7, dtype=np.float32) + step}


def save(run_dir, step, keep=3, best=()):
    return checkpoint.save(RunDir(run_dir), tensors(step), {"step": step, "run": {"seed": 1}}, keep, best)


def test_checkpoint_is_read_back_equal(tmp_path):
    """What is saved is what is loaded."""
    path = save(tmp_path, 12)
    found, faults = checkpoint.newest(RunDir(tmp_path))
    assert not faults
    assert path.name == "step-00000012.safetensors"
    assert (found.path, found.meta) == (path, {"step": 12, "run": {"seed": 1}})
    for name, value in tensors(12).items():
        assert (found.tensors[name] == value).all()
        assert found.tensors[name].dtype == value.dtype


def test_checkpoint_prune_keeps_the_newest_and_the_best(tmp_path):
    """All others are removed."""
    for step in (1, 2, 3, 4, 5, 6):
        save(tmp_path, step, keep=2, best=[checkpoint.BEST] * (step == 2))
    assert [path.name[5:13] for path in RunDir(tmp_path).list_checkpoints()] == ["00000006", "00000005", "00000002"]
    assert checkpoint.best(RunDir(tmp_path)).name == "step-00000002.safetensors"


def test_checkpoint_prune_keeps_what_was_just_written(tmp_path):
    """Although later steps, from before a rewind, exist."""
    for step in (40, 60, 80, 100):
        save(tmp_path, step, keep=9)
    save(tmp_path, 50, keep=1)  # after a rewind to 40
    assert [path.name[5:13] for path in RunDir(tmp_path).list_checkpoints()] == [
        "00000100",
        "00000080",
        "00000060",
        "00000050",
    ]


@pytest.mark.fault("F18")
def test_checkpoint_newest_refuses_if_none_is_whole(tmp_path):
    """No files at all are no error."""
    assert checkpoint.newest(RunDir(tmp_path)) == (None, {})
    path = save(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(Failure) as raised:
        checkpoint.newest(RunDir(tmp_path))
    assert raised.value.code == CONFIGURATION
    assert "step-00000001.safetensors:" in raised.value.message
    checkpoint.set_aside(path)
    with pytest.raises(Failure, match="step-00000001.safetensors.bad: set aside as damaged"):
        checkpoint.newest(RunDir(tmp_path))


@pytest.mark.fault("F18")
def test_checkpoint_any_flipped_bit_is_detected(tmp_path):
    """In the tensors, and in the header: step, coverage and what the run is are as good as weights."""
    path = save(tmp_path, 12)
    whole = checkpoint.load(path)
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for at in [*range(header), *range(header, len(data), 97)]:
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        try:
            found = checkpoint.load(path)
        except ValueError:
            continue
        assert found.meta == whole.meta, at  # as capitals in a number's escape
        assert found.tensors.keys() == whole.tensors.keys(), at
        assert all((found.tensors[name] == value).all() for name, value in whole.tensors.items()), at


@pytest.mark.fault("F18")
def test_checkpoint_of_another_step_is_detected(tmp_path):
    """A file renamed to another step."""
    path = save(tmp_path, 12)
    with pytest.raises(ValueError, match="of step 12"):
        checkpoint.load(path.rename(path.with_name("step-00000013.safetensors")))


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "junk", "foreign"])
@pytest.mark.fault("F18")
def test_checkpoint_newest_skips_damaged_files(tmp_path, damage):
    """And says what is wrong with them."""
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    data = bytearray(path.read_bytes())
    if damage == "foreign":
        from safetensors.numpy import save_file

        save_file(tensors(2), path)
    else:
        data[-100] ^= 1
        path.write_bytes({"cut": bytes(data[:-50]), "flip": bytes(data), "empty": b"", "junk": b"x" * 5000}[damage])
    found, faults = checkpoint.newest(RunDir(tmp_path))
    assert found.meta["step"] == 1
    assert list(faults) == [path]
    with pytest.raises(ValueError, match="."):
        checkpoint.load(path)
    aside = checkpoint.set_aside(path)
    assert aside.name == "step-00000002.safetensors.bad"
    assert checkpoint.newest(RunDir(tmp_path))[1] == {}
    save(tmp_path, 3, keep=1)
    assert aside.exists()


@pytest.mark.fault("F18")
def test_checkpoint_best_names_nothing_but_checkpoints(tmp_path):
    """No path leads out of the folder."""
    save(tmp_path, 1, best=[checkpoint.BEST])
    for text in ("../../x", "/etc/passwd", "", "step-1.safetensors", "step-00000001.safetensors/../x"):
        (RunDir(tmp_path).checkpoints / "best").write_text(text)
        assert checkpoint.best(RunDir(tmp_path)) is None


def test_checkpoint_save_reports_an_unwritable_folder(tmp_path):
    """Exit code 74."""
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(Failure) as raised:
        save(tmp_path, 1)
    assert raised.value.code == NOT_WRITTEN


def test_checkpoint_clean_removes_leftovers_alone(tmp_path):
    """Of a save that was killed."""
    save(tmp_path, 1)
    place = RunDir(tmp_path).checkpoints
    (place / "step-00000002.safetensors.tmp").write_bytes(b"half")
    (place / "mine.txt").write_text("keep")
    checkpoint.clean(RunDir(tmp_path))
    assert sorted(path.name for path in place.iterdir()) == ["mine.txt", "step-00000001.safetensors"]


def test_state_sha256_is_of_what_comes_next():
    """Of names, types, shapes and bits, in any order; of the progress without its bookkeeping."""

    def digest(change=(), rename=None, **progress):
        held = {**tensors(3), **dict(change)}
        held = {rename if name == "a/bias" and rename else name: value for name, value in held.items()}
        everything = {"step": 3, "skipped_steps": [], "best_top1": -1, "bad_records": [], **progress}
        found = {
            checkpoint.state_sha256(checkpoint.tensors_sha256(rows), everything)
            for rows in (held.items(), reversed(list(held.items())))
        }
        return found.pop() if len(found) == 1 else found

    bias = tensors(3)["a/bias"]
    other = bias.copy()
    other[-1] = np.nextafter(other[-1], np.float32(0))
    changes = [{"rename": "a/offset"}, *({"change": {"a/bias": each}} for each in (other, bias.view(np.int32), bias[None]))]
    changes += [{"step": 4}, {"skipped_steps": [2]}, {"bad_records": [7]}]
    found = [digest(), *(digest(**change) for change in changes)]
    assert len(set(found)) == len(found)
    assert digest(seconds=3.0, evaluated=3, coverage=[1], best=True, best_top1=7) == digest()
    assert digest(skipped_steps=[2, 3, 25]) == digest(skipped_steps=[2])  # what it will skip is not yet its own
    assert digest(change={"a/kernel": -0.0 * tensors(3)["a/kernel"]}) != digest(
        change={"a/kernel": 0.0 * tensors(3)["a/kernel"]}
    )


def test_state_sha256_is_in_the_header(tmp_path):
    """Of these tensors and this progress, whatever the caller's says."""
    path = checkpoint.save(RunDir(tmp_path), tensors(3), {"step": 3, "best_top1": 5, "state_sha256": "x"}, 3, [])
    expected = checkpoint.state_sha256(checkpoint.tensors_sha256(tensors(3).items()), {"step": 3, "best_top1": 5})
    assert receipt.checkpoint_row(path)["state_sha256"] == expected
    assert "state_sha256" not in checkpoint.load(path).meta


SAVER = """
import sys, numpy as np
from hvd_vgg.run_dir import RunDir
from hvd_vgg.training import checkpoint
for step in range(1, 10**6):
    tensors = {f"w{i}": np.full(1_600_000, step, np.float32) for i in range(5)}
    checkpoint.save(RunDir(sys.argv[1]), tensors, {"step": step}, 2, [checkpoint.BEST] * (step % 3 == 0))
    print(step, flush=True)
"""


@pytest.mark.fault("F16", "F19")
def test_checkpoint_survives_sigkill_at_any_moment(tmp_path):
    """Twenty kills at random moments of saving: the newest whole checkpoint is one that was reported."""
    random = np.random.default_rng(5)
    for attempt in range(20):
        run_dir = tmp_path / str(attempt)
        process = subprocess.Popen([sys.executable, "-c", SAVER, str(run_dir)], stdout=subprocess.PIPE, text=True)
        told = [int(process.stdout.readline()) for _ in range(2)]
        try:
            process.wait(random.uniform(0, 0.3))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        told += [int(line) for line in process.stdout]
        process.wait()
        process.stdout.close()
        checkpoint.clean(RunDir(run_dir))
        found, _ = checkpoint.newest(RunDir(run_dir))
        assert found.meta["step"] >= max(told)
        assert all((value == found.meta["step"]).all() for value in found.tensors.values())
        best = checkpoint.best(RunDir(run_dir))
        assert best is None or checkpoint.load(best).meta["step"] % 3 == 0


@pytest.mark.fault("F20")
def test_checkpoint_bytes_are_synced_before_the_rename(tmp_path, monkeypatch):
    """Write, flush to disk, rename, flush the directory; only then the pointer: the order that survives power loss."""
    events = order_of_writes(monkeypatch)
    save(tmp_path, 1, best=[checkpoint.BEST])
    name = "step-00000001.safetensors"
    assert events == [
        ("fsync", f"{name}.tmp"),
        ("rename", name),
        ("fsync", "checkpoints"),
        ("fsync", "best.tmp"),
        ("rename", "best"),
        ("fsync", "checkpoints"),
    ]


def test_checkpoint_metadata_is_json_in_the_header(tmp_path):
    """Any safetensors reader can show it."""
    data = save(tmp_path, 3).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert json.loads(header["__metadata__"]["hvd_vgg"])["step"] == 3
