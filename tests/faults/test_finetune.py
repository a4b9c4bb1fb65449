"""Runs that begin with given weights: the same bits on any ranks and after a kill; and without the file."""

import json
import shutil

import numpy as np
import pytest
from oracles import assert_same_run, events, newest, run
from support import full

from hvd_vgg.training.checkpoint import AVERAGE_SUFFIX

# A frozen layer between trained ones, BatchNorm, the average of weights, and a head that is not the source's.
NORM = ("--model=vgg11_bn", "--norm_batch=4")
TUNED = [
    *(*NORM, "--head=pooled", "--train_only=block1,block3,block4_conv2,block5,predictions", "--lr_multipliers=block:0.5"),
    *("--ema_decay=0.9", "--steps=10"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory, data):
    """The directory of a run whose weights others begin with."""
    folder = tmp_path_factory.mktemp("source")
    run(folder, data, 0, *NORM, "--steps=4")
    return folder / "run"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data, source):
    folder = tmp_path_factory.mktemp("tuned")
    run(folder, data, 0, *TUNED, f"--init_from={source}")
    return folder


@pytest.mark.parametrize("ranks", [(2, 3), *full(((1, 2),), ((3, 1),), ((4, 4),))], ids=str)
@pytest.mark.fault("F21")
def test_tuned_run_is_the_same_on_any_ranks(tmp_path, data, source, undisturbed, ranks):
    """Killed, and continued when the run that it began with is gone; averages of frozen layers are the layers themselves."""
    copy = tmp_path / "given"
    shutil.copytree(source, copy)
    flags = [*TUNED, f"--init_from={copy}"]
    run(tmp_path, data, ranks[0], f"kill@{ranks[0] - 1}:5", *flags, code=137)
    shutil.rmtree(copy)
    run(tmp_path, data, ranks[1], *flags)
    assert_same_run(tmp_path, undisturbed)
    (given,) = events(undisturbed / "run", "init_from")
    assert json.loads((tmp_path / "run" / "receipt.json").read_text())["init_from"]["sha256"] == given["sha256"]
    tensors, before = newest(undisturbed).tensors, newest(source.parent).tensors
    frozen = [name for name in before if name.startswith(("block2_conv1/", "block3_conv3/", "block4_conv1/"))]
    kept = [name for name in frozen if name in tensors and not name.endswith("momentum")]
    assert len(kept) == 12 and f"{kept[0]}/momentum" not in tensors
    for name in kept:
        assert (tensors[name] == before[name]).all() and (tensors[f"{name}{AVERAGE_SUFFIX}"] == tensors[name]).all()
    assert not np.array_equal(tensors["block5_conv1/kernel"], before["block5_conv1/kernel"])


@pytest.mark.fault(tier=3)
def test_run_without_its_source_needs_a_checkpoint(tmp_path, data, source):
    """Its newest whole one, or a copy in another directory; killed before the first it reads the file again."""
    copy, there = tmp_path / "given", tmp_path / "copies"
    shutil.copytree(source, copy)
    flags = [*TUNED, f"--init_from={copy}", f"--checkpoint_copy_dir={there}", "--steps=6"]
    run(tmp_path, data, 0, *flags, "--steps=3", "--save_every_steps=1")
    (weights,) = [copy / "checkpoints" / (copy / "checkpoints" / "best").read_text().strip()]
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    (tmp_path / "run" / "checkpoints" / "step-00000003.safetensors").write_bytes(b"")
    run(tmp_path, data, 0, *flags, "--steps=5")  # the source is damaged, and so is the newest
    shutil.rmtree(copy)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    run(tmp_path, data, 0, *flags)
    shutil.rmtree(there)
    shutil.rmtree(tmp_path / "run")
    ended = run(tmp_path, data, 0, *flags, code=78)
    assert f"{copy} cannot be read: No such file or directory" in ended.err
