"""Continuing a run: what differs from the checkpoint is refused, unless allowed by name."""

import dataclasses
import re

import numpy as np
import pytest

from hvd_vgg.config import TrainConfig, fingerprint
from hvd_vgg.errors import CONFIGURATION, Failure
from hvd_vgg.reporting.console import Console
from hvd_vgg.run_dir import RunDir
from hvd_vgg.training import checkpoint
from hvd_vgg.training.average import UPDATES
from hvd_vgg.training.reporter import Reporter
from hvd_vgg.training.resume import _restore_root, require_checkpoints
from hvd_vgg.training.state import CHECKPOINT_FORMAT, TrainProgress, assign_variables, initial_state, reset_state

CONFIG = TrainConfig(model="vgg11", width=0.0625, image_size=32, num_classes=10, lr=0.05)
ARITHMETIC = {"processor": "A", "threads": "1"}
DATA = {"train_records": 75, "train_data_sha256": "a1", "label_base": 1}


@pytest.fixture
def resume(tmp_path):
    """Continues a run that was saved after 4 updates with other flags, data or format; returns (progress, state,
    the tensors that were saved, the factored layers)."""
    run_dir = RunDir(tmp_path)
    tensors = {name: value.numpy() + 1 for name, value in initial_state(CONFIG).variables().items()}
    meta = {**dataclasses.asdict(TrainProgress(step=4)), "format": CHECKPOINT_FORMAT, "arithmetic": ARITHMETIC}
    meta["run"] = {**fingerprint(CONFIG), "exchange": ["fc1"], **DATA}
    checkpoint.save(run_dir, tensors, meta, 3, [])

    def restore(data=(), factored=("fc1",), arithmetic=ARITHMETIC, **flags):
        config = dataclasses.replace(CONFIG, **flags)
        state, run = initial_state(config), {**fingerprint(config), "exchange": [*factored], **DATA, **dict(data)}
        reporter, copy = Reporter(None, Console("lines", True)), RunDir(tmp_path / "copy")
        return _restore_root(state, config, run_dir, run, arithmetic, reporter, copy), state, tensors, run["exchange"]

    return restore


def test_resume_brings_back_progress_and_variables(resume):
    progress, state, tensors, _ = resume()
    assert progress == TrainProgress(step=4)
    assert all((value.numpy() == tensors[name]).all() for name, value in state.variables().items())


def test_average_begins_with_the_weights_it_is_switched_on_for(resume):
    """It is as saved where it was saved, and is left behind where it is switched off."""
    _, state, tensors, _ = resume(ema_decay=0.9, allow_config_change="ema_decay")
    assert state.averages and int(state.averages[UPDATES]) == 0
    averages = state.averaged_network()
    assert averages.keys() == state.network().keys()
    assert all((value.numpy() == tensors[name]).all() for name, value in averages.items())
    config = dataclasses.replace(CONFIG, ema_decay=0.9)
    reset_state(state, config)
    first = initial_state(config).variables()
    assert all((value.numpy() == first[name].numpy()).all() for name, value in state.variables().items())


@pytest.mark.fault("F22")
@pytest.mark.parametrize(
    ("flags", "data", "differs", "fix"),
    [
        ({"lr": 0.07, "seed": 5}, {}, [("lr", "0.05", "0.07"), ("seed", "1", "5")], "--allow_config_change=seed,lr"),
        ({"lr": 0.07, "seed": 5, "allow_config_change": "lr"}, {}, [("seed", "1", "5")], "--allow_config_change=seed"),
        (
            {"lr": 0.07},
            {"train_records": 76, "train_data_sha256": "b2"},
            [("train_records", "75", "76")],
            "Another data set",
        ),
        ({"model": "vgg13"}, {}, [("model", "'vgg11'", "'vgg13'")], "Another network is another run: use another --run_dir"),
        ({"num_classes": 11}, {"label_base": 0}, [("label_base", "1", "0")], "Another network"),
        ({}, {"label_base": 0}, [("label_base", "1", "0")], ", or another --run_dir"),
    ],
)
def test_resume_refuses_another_run(resume, flags, data, differs, fix):
    with pytest.raises(Failure) as raised:
        resume(data, **flags)
    message = raised.value.message
    assert raised.value.code == CONFIGURATION
    assert re.search(r"^ +checkpoint +command$", message, re.M)
    for row in differs:
        assert re.search("^ +" + " +".join(row) + "$", message, re.M), message
    assert len(re.findall(r"^ +lr ", message, re.M)) == int(
        "lr" in flags and "lr" not in flags.get("allow_config_change", ())
    )
    assert fix in message
    assert ("--allow_config_change" in message) == fix.startswith("--allow")


def test_resume_refuses_a_network_with_batch_norm(resume, tmp_path):
    """By its name; and a checkpoint that lacks what it needs, whatever its name says."""
    with pytest.raises(Failure) as raised:
        resume(model="vgg11_bn")
    assert "Another network is another run: use another --run_dir" in raised.value.message
    assert re.search("^ +model +'vgg11' +'vgg11_bn'$", raised.value.message, re.M)
    state = initial_state(dataclasses.replace(CONFIG, model="vgg11_bn"))
    tensors = {name: value.numpy() for name, value in state.variables().items()}
    for name, part in [("block1_conv1/moving_mean", None), ("block1_conv1/gamma", np.ones(5, np.float32))]:
        changed = {
            each: part if each == name else value for each, value in tensors.items() if each != name or part is not None
        }
        found = checkpoint.Checkpoint(tmp_path / "step-00000004.safetensors", changed, {"run": {"reproducible": "bits"}})
        with pytest.raises(Failure) as raised:
            assign_variables(state.network(), found)
        is_now = "missing" if part is None else "(5,)"
        assert raised.value.message == f"{found.path}: {name} is {is_now}, expected (4,): it is of another network"


def test_resume_allows_a_change_by_name(resume, capsys):
    progress, _, _, _ = resume(lr=0.07, allow_config_change="lr")
    assert progress.step == 4
    assert "--lr was 0.05, is 0.07 from here on" in capsys.readouterr().out


def test_resume_keeps_the_exchange_it_began_with(resume):
    """Whatever `auto` would choose now; another is another run, where bits depend on it."""
    assert resume(factored=())[3] == ["fc1"]
    with pytest.raises(Failure, match=r"(?m)^ +exchange +\['fc1'\] +\[\]$"):
        resume(factored=(), exchange="allreduce")
    assert resume(factored=(), exchange="allreduce", allow_config_change="exchange")[3] == []


def test_resume_elsewhere_is_said_and_not_refused(resume, capsys):
    """What decides the bits and has changed, with both values."""
    resume()
    assert "to rounding only" not in capsys.readouterr().out
    assert resume(arithmetic={**ARITHMETIC, "processor": "B"})[0].step == 4
    assert re.search(r"equal to rounding only from here.*\n.*\n? +processor +'A' +'B'", capsys.readouterr().out)


def test_resume_never_or_required(resume, tmp_path):
    with pytest.raises(Failure, match="never overwritten"):
        require_checkpoints(TrainConfig(resume="never", run_dir=str(tmp_path)))
    for path in RunDir(tmp_path).list_checkpoints():
        path.unlink()
    with pytest.raises(Failure, match="--resume=required, but .* holds no checkpoint"):
        require_checkpoints(TrainConfig(resume="required", run_dir=str(tmp_path)))
    progress, state, tensors, _ = resume()
    assert progress == TrainProgress()
    assert all((value.numpy() != tensors[name]).any() or not np.any(value) for name, value in state.weights.items())


def test_resume_refuses_another_format(resume, tmp_path):
    (path,) = RunDir(tmp_path).list_checkpoints()
    found = checkpoint.load(path)
    checkpoint.write(path, found.tensors, {**found.meta, "format": CHECKPOINT_FORMAT - 1})
    with pytest.raises(Failure, match="written by another version"):
        resume()


@pytest.mark.fault("F42")
@pytest.mark.parametrize("harm", ["damaged", "gone"])
def test_resume_brings_back_checkpoints_from_copies(resume, tmp_path, capsys, harm):
    """The newest and the best; what was damaged is kept aside."""
    run, copy = RunDir(tmp_path), RunDir(tmp_path / "copy")
    found = checkpoint.load(run.checkpoint(4))
    for step in (2, 4):
        checkpoint.save(copy, found.tensors, {**found.meta, "step": step}, 3, [checkpoint.BEST] * (step == 2))
    whole = run.checkpoint(4).read_bytes()
    run.checkpoint(4).write_bytes(whole[:-9])
    if harm == "gone":
        run.checkpoint(4).unlink()
    assert resume()[0] == TrainProgress(step=4)
    assert [path.name[5:13] for path in run.list_checkpoints()] == ["00000004", "00000002"]
    assert all(checkpoint.load(path) for path in run.list_checkpoints())
    assert checkpoint.best(run) == run.checkpoint(2)
    assert run.checkpoint(4).read_bytes() == copy.checkpoint(4).read_bytes()  # whose digests are in the log
    assert len(list(run.checkpoints.glob("*.bad"))) == (harm == "damaged")
    out = capsys.readouterr().out
    assert f"{run.checkpoints} holds no whole checkpoint as new as the copy {copy.checkpoint(4)}, which is used" in out
    assert f"continuing from step 4: {run.checkpoint(4)}" in out
