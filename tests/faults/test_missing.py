"""Packages that a run can do without are not there: what is lost is said once, and the run goes on."""

import json

import pytest
import tensorflow as tf
from oracles import blamed, start
from support import ROOT, TINY

OPTIONAL = ("dllogger", "mpi4py", "tensorboard")


def without(*packages):
    """Returns the environment of ranks on which `packages` are not installed."""
    return {"PYTHONPATH": f"{ROOT / 'tests' / 'hidden'}:{ROOT}", "HIDDEN_PACKAGES": ",".join(packages)}


@pytest.mark.fault("F37")
def test_a_run_without_optional_packages_says_so_once_and_is_the_same(launch, tmp_path, data):
    flags = [f"--data_dir={data}", *TINY, "--steps=4", "--eval_every_epochs=1"]
    told, losses, shown = {}, {}, {}
    for name, environment in (("as_it_is", {}), ("without", without(*OPTIONAL))):
        ended = launch(2, "train", *flags, f"--run_dir={tmp_path / name}", **environment)
        assert ended.code == 0, ended.out + ended.err
        told[name] = ended.out + ended.err
        lines = (tmp_path / name / "dllogger.json").read_text().splitlines()
        rows = [row["data"] for row in (json.loads(line[len("DLLL ") :]) for line in lines) if row["type"] == "LOG"]
        losses[name] = [row["train.loss"] for row in rows if "train.loss" in row]
        (path,) = (tmp_path / name / "tensorboard").iterdir()
        events = [tf.compat.v1.Event.FromString(bytes(record.numpy())) for record in tf.data.TFRecordDataset(str(path))]
        values = [(event.step, value) for event in events for value in event.summary.value]
        shown[name] = {(value.tag, value.metadata.plugin_data.plugin_name, step) for step, value in values}
    for package in OPTIONAL:
        assert told["without"].count(f"{package} is not installed: ") == 1
    # TensorFlow's own warning, up to 2.15, which each rank would give.
    assert "missing TensorBoard" not in told["without"]
    assert len(losses["as_it_is"]) == 4 and losses["without"] == pytest.approx(losses["as_it_is"], rel=1e-5)
    assert ("train/loss", "scalars", 4) in shown["without"] and shown["without"] == shown["as_it_is"]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.fault("F37")
def test_without_mpi4py_a_rank_that_fails_still_ends_all_with_its_exit_code(tmp_path, data, rank):
    ended = start(tmp_path, data, 2, f"raise@{rank}:3", **without("mpi4py")).wait()
    assert ended.code == 70, ended.out + ended.err
    assert blamed(tmp_path) == (rank, 3, "update", 70)
    assert (ended.out + ended.err).count("mpi4py is not installed: ") == 1
