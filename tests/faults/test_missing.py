"""Packages that a run can do without are missing: what is lost is said once, and the run goes on."""

import pytest
import tensorflow as tf
from oracles import blamed, losses, run
from support import ROOT, TINY, full

OPTIONAL = ("dllogger", "mpi4py", "tensorboard")


def without(*packages):
    """Returns the environment of ranks on which `packages` are not installed."""
    hide = ROOT / "tests" / "programs" / "hide_packages"
    return {"PYTHONPATH": f"{hide}:{ROOT}", "HIDDEN_PACKAGES": ",".join(packages)}


@pytest.mark.fault("F37")
def test_run_without_optional_packages_is_the_same(launch, tmp_path, data):
    """What is lost is said once; losses and TensorBoard's events are those of a run with all packages."""
    flags = [f"--data_dir={data}", *TINY, "--steps=4", "--eval_every_epochs=1"]
    said, shown = {}, {}
    for name, environment in (("with", {}), ("without", without(*OPTIONAL))):
        ended = launch(2, "train", *flags, f"--run_dir={tmp_path / name}", **environment)
        assert ended.code == 0, ended.out + ended.err
        said[name] = ended.out + ended.err
        (path,) = (tmp_path / name / "tensorboard").iterdir()
        events = [tf.compat.v1.Event.FromString(bytes(record.numpy())) for record in tf.data.TFRecordDataset(str(path))]
        values = [(event.step, value) for event in events for value in event.summary.value]
        shown[name] = {(value.tag, value.metadata.plugin_data.plugin_name, step) for step, value in values}
    for package in OPTIONAL:
        assert said["without"].count(f"{package} is not installed: ") == 1
    # TensorFlow's own warning, up to 2.15, which each rank would give.
    assert "missing TensorBoard" not in said["without"]
    assert len(losses(tmp_path / "with")) == 4
    assert losses(tmp_path / "without") == pytest.approx(losses(tmp_path / "with"), rel=1e-5)
    assert ("train/loss", "scalars", 4) in shown["without"] and shown["without"] == shown["with"]


@pytest.mark.parametrize("rank", [1, *full(0)])
@pytest.mark.fault("F37")
def test_rank_that_fails_without_mpi4py_ends_all(tmp_path, data, rank):
    """With its exit code, as with mpi4py."""
    ended = run(tmp_path, data, 2, f"raise@{rank}:3", code=70, **without("mpi4py"))
    assert blamed(tmp_path) == (rank, 3, "update", 70)
    assert (ended.out + ended.err).count("mpi4py is not installed: ") == 1
