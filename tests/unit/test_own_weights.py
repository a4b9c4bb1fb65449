"""Files of this package that are damaged, or made to be: refused in one line, whoever reads them."""

import numpy as np
import pytest

from hvd_vgg.config import ModelConfig, TrainConfig
from hvd_vgg.doctor.given_weights import check_given_weights
from hvd_vgg.errors import CONFIGURATION, Failure
from hvd_vgg.reporting.findings import FAILURE, OK
from hvd_vgg.training import checkpoint
from hvd_vgg.training.weights import read_flags, read_weights
from hvd_vgg.weights.source import expected_shapes

RUN = {"model": "vgg11_bn", "width": 0.0625, "num_classes": 5, "image_size": 32, "head": "pooled"}
RUN.update(pixel_normalization="caffe", resize="pillow", augment="crop")


def write(path, run=RUN, changed=None, **more):
    """Writes a checkpoint of RUN's network; run, more: what its metadata say; changed: tensors in the place of its own."""
    names = ("model", "width", "num_classes", "image_size", "head")
    shapes = expected_shapes(ModelConfig(**{name: RUN[name] for name in names}))
    tensors = {name: np.full(shape, 0.5, np.float32) for name, shape in shapes.items()}
    checkpoint.write(path, {**tensors, **(changed or {})}, {"step": 3, "run": run, **more})
    return path


def test_own_weights_are_read_with_their_flags(tmp_path):
    path = write(tmp_path / "a.safetensors", eval_crop=0.9)
    found = read_weights(path)
    assert found.flags == read_flags(path) == {**RUN, "eval_crop": 0.9} and len(found.tensors) == 8 * 6 + 2


@pytest.mark.parametrize(
    "change",
    [
        *({"model": value} for value in ("foo", [1], None)),
        *({"width": value} for value in (1e9, "x", -1)),
        *({"num_classes": value} for value in (-3, "5", None)),
        *(
            {"head": "x"},
            {"image_size": None},
            {"pixel_normalization": "weird"},
            {"pixel_normalization": []},
            {"augment": 3},
        ),
    ],
    ids=str,
)
def test_own_weights_with_impossible_flags_are_refused(tmp_path, change):
    """By what a command line would be refused for."""
    path = write(tmp_path / "a.safetensors", {**RUN, **change})
    for read in (read_flags, read_weights):
        with pytest.raises(Failure, match=f"--{next(iter(change))}=.*: expected") as raised:
            read(path)
        assert raised.value.code == CONFIGURATION and "\n" not in raised.value.message


@pytest.mark.parametrize(
    ("run", "changed", "message"),
    [
        (RUN, {"block1_conv1/bias": np.zeros(3, np.float32)}, r"block1_conv1/bias is float32 \[3\], expected float32 \[4\]"),
        (RUN, {"block1_conv1/bias": np.zeros(4, np.int32)}, r"block1_conv1/bias is int32 \[4\], expected float32 \[4\]"),
        ({**RUN, "num_classes": 6}, None, r"predictions/kernel is float32 \[32, 5\], expected float32 \[32, 6\]"),
        ({**RUN, "head": "flattened"}, None, "holds no fc1/kernel"),
        (5, None, "does not say run"),
        ({}, None, "does not say model"),
    ],
)
def test_own_weights_that_do_not_fit_are_refused(tmp_path, run, changed, message):
    path = write(tmp_path / "a.safetensors", run, changed)
    with pytest.raises(Failure, match=message) as raised:
        read_weights(path)
    assert raised.value.code == CONFIGURATION and "\n" not in raised.value.message


def test_doctor_compares_given_weights(tmp_path):
    """With the network to train; BatchNorm may be added, not left out."""
    path = write(tmp_path / "a.safetensors")

    def verdict(**flags):
        found = check_given_weights(TrainConfig(**{"init_from": str(path), "width": 0.0625, "model": "vgg11_bn", **flags}))
        return found.verdict, found.text

    assert verdict() == (OK, f"--init_from={path} is of vgg11_bn at width 0.0625")
    for flags in ({"model": "vgg11"}, {"width": 0.125}, {"init_from": str(tmp_path / "none")}):
        assert verdict(**flags)[0] == FAILURE
