"""Packages that a run can do without are missing: what is lost is said once, and the run goes on."""

import pytest
import tensorflow as tf
from oracles import assert_exact, blamed, losses, run
from support import ROOT, full

OPTIONAL = ("dllogger", "mpi4py", "tensorboard")


def without(*packages):
    """Returns the environment of ranks on which `packages` are not installed."""
    hide = ROOT / "tests" / "programs" / "hide_packages"
    return {"PYTHONPATH": f"{hide}:{ROOT}", "HIDDEN_PACKAGES": ",".join(packages)}


def shown(run_dir):
    """Returns (tag, plugin, step) of all values in TensorBoard's events."""
    (path,) = (run_dir / "tensorboard").iterdir()
    events = [tf.compat.v1.Event.FromString(bytes(record.numpy())) for record in tf.data.TFRecordDataset(str(path))]
    values = [(event.step, value) for event in events for value in event.summary.value]
    return {(value.tag, value.metadata.plugin_data.plugin_name, step) for step, value in values}


@pytest.mark.fault("F37")
def test_run_without_optional_packages_is_the_same(tmp_path, data, undisturbed):
    """What is lost is said once; losses and TensorBoard's numbers are those of a run with all packages."""
    ended = run(tmp_path, data, 2, **without(*OPTIONAL))
    for package in OPTIONAL:
        assert (ended.out + ended.err).count(f"{package} is not installed: ") == 1
    # TensorFlow's own warning, up to 2.15, which each rank would give.
    assert "missing TensorBoard" not in ended.out + ended.err
    assert_exact(tmp_path, 2, undisturbed)
    assert losses(tmp_path / "run") == losses(undisturbed / "run")
    with_package = shown(undisturbed / "run")
    assert ("train/loss", "scalars", 4) in shown(tmp_path / "run")
    assert shown(tmp_path / "run") == {each for each in with_package if each[1] == "scalars"}
    assert {each[1] for each in with_package} == {"scalars", "hparams", "images"}


@pytest.mark.parametrize("rank", [1, *full(0)])
@pytest.mark.fault("F37")
def test_rank_that_fails_without_mpi4py_ends_all(tmp_path, data, rank):
    """With its exit code, as with mpi4py."""
    ended = run(tmp_path, data, 2, f"raise@{rank}:3", code=70, **without("mpi4py"))
    assert blamed(tmp_path) == (rank, 3, "update", 70)
    assert (ended.out + ended.err).count("mpi4py is not installed: ") == 1
