"""Weights of torchvision, timm and Keras in files that they wrote (tests/reference/make_weights.py); files that are none."""

import hashlib
import importlib.util
import io
import json
import os
import random
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import mutate_weights
import numpy as np
import pytest
import tensorflow as tf
from safetensors.numpy import load_file, save_file
from support import ROOT, full

from hvd_vgg.errors import CONFIGURATION, Failure
from hvd_vgg.models import vgg
from hvd_vgg.models.batch_norm import fold
from hvd_vgg.training.weights import read_flags, read_weights
from hvd_vgg.weights import torch_file
from hvd_vgg.weights.child import run_child
from hvd_vgg.weights.files import read_file, read_file_flags
from hvd_vgg.weights.keras import to_keras_h5
from hvd_vgg.weights.torch_names import to_torchvision

NETWORK = {"width": 0.0625, "num_classes": 5, "image_size": 64, "head": "flattened"}
TORCH = {"pixel_normalization": "imagenet", "resize": "pillow", "augment": "crop", "eval_crop": 0.875}
KERAS = {**TORCH, "pixel_normalization": "caffe", "resize": "opencv"}
# Files, what they are, and the file whose tensors they have.
FILES = {
    "torchvision-vgg11.safetensors": ("torchvision's vgg11 (safetensors)", ""),
    "torchvision-vgg11-float16.safetensors": ("torchvision's vgg11 (safetensors, float16)", "torchvision-vgg11.safetensors"),
    "torchvision-vgg11-bfloat16.safetensors": (
        "torchvision's vgg11 (safetensors, bfloat16)",
        "torchvision-vgg11.safetensors",
    ),
    "torchvision-vgg11-float64.safetensors": ("torchvision's vgg11 (safetensors, float64)", "torchvision-vgg11.safetensors"),
    "torchvision-vgg16_bn.safetensors": ("torchvision's vgg16_bn (safetensors)", ""),
    "timm-vgg11_bn.safetensors": ("timm's vgg11_bn (safetensors)", ""),
    "keras1-vgg16.h5": ("Keras' vgg16 (legacy .h5)", "keras2-vgg16.h5"),
    "keras2-vgg16.h5": ("Keras' vgg16 (legacy .h5)", ""),
    "keras2-vgg16-whole.h5": ("Keras' vgg16 (legacy .h5)", "keras2-vgg16.h5"),
    "keras2-vgg16.weights.h5": ("Keras' vgg16 (.weights.h5)", "keras2-vgg16.h5"),
    "keras2-vgg16.keras": ("Keras' vgg16 (.weights.h5)", "keras2-vgg16.h5"),
    "keras3-vgg16.weights.h5": ("Keras' vgg16 (.weights.h5)", "keras2-vgg16.h5"),
    "keras3-vgg16.keras": ("Keras' vgg16 (.weights.h5)", "keras2-vgg16.h5"),
}
ORIGINALS = {
    "torchvision-vgg11.safetensors": "torchvision-vgg11",
    "torchvision-vgg16_bn.safetensors": "torchvision-vgg16_bn",
    "timm-vgg11_bn.safetensors": "timm-vgg11_bn",
    "keras2-vgg16.h5": "keras2-vgg16",
    "keras3-vgg16.weights.h5": "keras3-vgg16",
}
MUTATED = ("torchvision-vgg16_bn.safetensors", "keras2-vgg16.h5", "keras3-vgg16.weights.h5", "keras3-vgg16.keras")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The files that other libraries wrote."""
    folder = tmp_path_factory.mktemp("weights")
    with zipfile.ZipFile(ROOT / "tests" / "reference" / "weights.zip") as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def sources(reference):
    """What is read from each file, by its name."""
    return {name: read_file(reference / name) for name in FILES}


def refusal(path):
    """Returns why a file is refused, without its name: one line."""
    messages = []
    for read in (read_weights, read_flags):
        with pytest.raises(Failure) as raised:
            read(path)
        assert raised.value.code == CONFIGURATION
        messages.append(raised.value.message)
        assert messages[-1].startswith(str(path)) and messages[-1].isprintable()
    return messages[0][len(str(path)) :]


def assert_same(found, expected):
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == np.float32 and found[name].shape == tensor.shape, name
        assert found[name].tobytes() == tensor.tobytes(), name


# ---- what is read


@pytest.mark.parametrize("name", list(FILES))
def test_read_file_knows_what_others_write(sources, name):
    source, (kind, like) = sources[name], FILES[name]
    model = kind.split()[1]
    assert (source.kind, list(source.unused)) == (kind, list(source.unused) if "whole" in name else [])
    assert source.flags == {"model": model, **NETWORK, **(KERAS if "Keras" in kind else TORCH)}
    if like:
        assert_same(source.tensors, sources[like].tensors)
    assert all(each.startswith("optimizer_weights/") for each in source.unused)


def test_read_file_flags_are_those_of_the_source(reference, sources):
    for name in ("timm-vgg11_bn.safetensors", "keras3-vgg16.keras"):
        assert read_file_flags(reference / name) == sources[name].flags
        assert sources[name].sha256 == hashlib.sha256((reference / name).read_bytes()).hexdigest()


@pytest.mark.parametrize("name", list(ORIGINALS))
def test_read_file_gives_the_logits_of_the_original(reference, sources, name):
    """Torch's were computed in float64, Keras' in float32."""
    source = sources[name]
    with np.load(reference / ("keras.npz" if name.startswith("keras") else "torch.npz"), allow_pickle=False) as arrays:
        images, expected = arrays["images"], arrays[ORIGINALS[name]]
    weights = fold({each: tf.constant(tensor) for each, tensor in source.tensors.items()})
    ours = vgg.logits(weights, source.flags["model"], images, "NHWC", source.flags["pixel_normalization"])
    assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max()


def test_read_file_reads_convolutions_alone(reference):
    source = read_file(reference / "keras2-vgg19-notop.h5")
    assert source.flags == {"model": "vgg19", "width": 0.0625, **KERAS} and len(source.tensors) == 32


def test_read_weights_goes_by_contents_and_not_by_name(reference, sources, tmp_path):
    for name in ("torchvision-vgg11.safetensors", "keras3-vgg16.keras"):
        path = tmp_path / "weights.txt"
        path.write_bytes((reference / name).read_bytes())
        assert_same(read_weights(path).tensors, sources[name].tensors)


@pytest.mark.parametrize("name", ["torchvision-vgg11.pth", "torchvision-vgg11-nested.pth"])
def test_read_file_reads_pickles_by_torch_alone(reference, name):
    if importlib.util.find_spec("torch"):
        source = read_file(reference / name)
        assert source.kind == "torchvision's vgg11 (.pth)"
        assert_same(source.tensors, read_file(reference / "torchvision-vgg11.safetensors").tensors)
    else:
        assert torch_file.CONVERT in refusal(reference / name)


def test_read_file_refuses_archives_of_torch_by_checksums(reference, tmp_path):
    """Before torch sees them: it compares no checksum, and a bit of the pickle makes a tensor another part of the file."""
    data, path = (reference / "torchvision-vgg11.pth").read_bytes(), tmp_path / "changed.pth"
    with zipfile.ZipFile(reference / "torchvision-vgg11.pth") as archive:
        (name,) = [each for each in archive.namelist() if each.endswith("data.pkl")]
        pickled = archive.read(name)
    at = data.index(pickled) + len(pickled) // 2
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    assert f"the checksum of its member '{name}' does not match: the file is damaged" in refusal(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", bytes(10**6))
    assert "its members are compressed, or overlap" in refusal(path)


def test_read_file_takes_a_network_within_another(reference, sources, tmp_path):
    """As `module.` of DistributedDataParallel; what stands beside it is unused."""
    tensors = load_file(reference / "torchvision-vgg11.safetensors")
    more = {f"module.{name}": tensor for name, tensor in tensors.items()}
    save_file({**more, "ema.decay": np.ones(1, np.float32)}, tmp_path / "more.safetensors")
    source = read_file(tmp_path / "more.safetensors")
    assert source.unused == ["ema.decay"]
    assert_same(source.tensors, sources["torchvision-vgg11.safetensors"].tensors)


def test_read_file_leaves_out_layers_without_values(reference, tmp_path):
    """torchvision's IMAGENET1K_FEATURES has NaN in place of its classifier; no other weights expect Caffe's rounded mean."""
    tensors = load_file(reference / "torchvision-vgg11.safetensors")
    nan = {name: np.full_like(each, np.nan) if "classifier" in name else each for name, each in tensors.items()}
    save_file(nan, tmp_path / "features.safetensors")
    source = read_file(tmp_path / "features.safetensors")
    assert source.flags == {"model": "vgg11", "width": 0.0625, **TORCH, "pixel_normalization": "caffe_rounded"}
    assert read_file_flags(tmp_path / "features.safetensors") == source.flags
    assert len(source.tensors) == 16 and len(source.unused) == 6


# ---- there and back


@pytest.mark.parametrize("name", ["torchvision-vgg11.safetensors", "torchvision-vgg16_bn.safetensors"])
def test_to_torchvision_gives_back_what_was_read(reference, sources, name):
    theirs = load_file(reference / name)
    back = to_torchvision(sources[name].tensors)
    counters = [each for each in back if each.endswith("num_batches_tracked")]
    assert all(back[each].dtype == np.int64 and back[each].shape == () for each in counters)
    assert sorted(back) == sorted(theirs)
    assert_same(
        {each: back[each] for each in back if each not in counters}, {e: theirs[e] for e in back if e not in counters}
    )


def test_to_torchvision_orders_as_torchvision_does(sources):
    names = list(to_torchvision(sources["torchvision-vgg16_bn.safetensors"].tensors))
    norm = [f"features.1.{part}" for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
    assert names[:7] == ["features.0.weight", "features.0.bias", *norm] and names[-1] == "classifier.6.bias"


def test_to_keras_h5_gives_back_what_was_read(reference, sources, tmp_path):
    """Everything is as Keras 2 wrote it, but its version and the name of its input."""
    to_keras_h5(sources["keras2-vgg16.h5"].tensors, tmp_path / "back.h5")
    with h5py.File(reference / "keras2-vgg16.h5") as theirs, h5py.File(tmp_path / "back.h5") as back:
        ours, expected = ([*map(_text, file.attrs["layer_names"])] for file in (back, theirs))
        assert ours[1:] == expected[1:] and _text(back.attrs["backend"]) == "tensorflow"
        for layer in expected[1:]:
            names = [*map(_text, theirs[layer].attrs["weight_names"])]
            assert [*map(_text, back[layer].attrs["weight_names"])] == names
            for name in names:
                assert (
                    back[layer][name].dtype == "<f4" and back[layer][name][()].tobytes() == theirs[layer][name][()].tobytes()
                )


def _text(value):
    return value.decode() if isinstance(value, bytes) else str(value)


def test_to_keras_h5_refuses_batch_norm(sources, tmp_path):
    with pytest.raises(ValueError, match="folded"):
        to_keras_h5(sources["timm-vgg11_bn.safetensors"].tensors, tmp_path / "out.h5")


# ---- files that are none: safetensors


def rewritten(path, change, data=None):
    """Writes a safetensors file at `path` whose header is changed by `change(header)`, or is what that returns."""
    source = path.parent / "torchvision-vgg11.safetensors"
    raw = source.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    changed = change(header)
    text = changed if isinstance(changed, bytes) else json.dumps(header if changed is None else changed).encode()
    out = path.with_name("changed.safetensors")
    out.write_bytes(struct.pack("<Q", len(text)) + text + (raw[8 + length :] if data is None else data))
    return out


def set_field(name, **fields):
    return lambda header: header[name].update(fields)


def rename(old, new):
    return lambda header: header.update({new: header.pop(old)})


BIAS, KERNEL = "classifier.6.bias", "features.0.weight"
HEADERS = [
    (set_field(BIAS, data_offsets=[0, 20]), "bytes in common"),
    (set_field(BIAS, data_offsets=[20, 0]), "outside the file"),
    (set_field(BIAS, data_offsets=[0, 10**30]), "outside the file"),
    (set_field(BIAS, data_offsets=[-20, 0]), "negative or no integer"),
    (set_field(BIAS, data_offsets=[0.0, 20.0]), "negative or no integer"),
    (set_field(BIAS, data_offsets=[True, 20]), "negative or no integer"),
    (set_field(BIAS, data_offsets=[0]), "nothing legible"),
    (set_field(BIAS, shape=[6]), "its shape [6] needs 24"),
    (set_field(BIAS, shape=[-5]), "negative or no integer"),
    (set_field(BIAS, shape=[2**40, 2**40]), "needs"),
    (set_field(BIAS, shape=[1] * 400 + [5]), "impossible shape"),
    (set_field(BIAS, shape="5"), "negative or no integer"),
    (set_field(BIAS, shape=[1, 5]), "expected 1 axes"),
    (set_field(BIAS, dtype="I32"), "is of type I32: expected float64"),
    (set_field(BIAS, dtype="../../x"), "no legible type"),
    (set_field(BIAS, dtype=["F32"]), "no legible type"),
    (set_field(KERNEL, shape=[4, 27]), "expected"),
    (set_field("classifier.0.weight", shape=[128, 256]), "square feature map of 32 channels"),
    (rename(KERNEL, "../../etc/passwd"), "no network of it is known"),
    (rename("features.3.bias", "/etc/x"), "it has no features.3.bias"),
    (rename(BIAS, "a\nb\x1b[2J"), "cannot be printed"),
    (rename(BIAS, "a" * 300), "longer than 200 characters"),
    (rename(BIAS, "extra"), "only a part of predictions"),
    (lambda header: [header], "of another kind"),
    (lambda header: {**header, BIAS: 5}, "nothing legible"),
    (lambda header: {}, "follow its header"),
    (lambda header: b"{" + b'"a":{' * 100000, "nested too deeply"),
    (lambda header: b"{\xff}", "not UTF-8"),
    (lambda header: b'{"a"', "not JSON"),
    (lambda header: json.dumps(header).replace("features.3.bias", BIAS).encode(), "a name twice"),
]


@pytest.mark.parametrize(("change", "text"), HEADERS)
def test_read_file_refuses_headers_that_lie(reference, change, text):
    assert text in refusal(rewritten(reference / "x", change))


@pytest.mark.parametrize(
    ("start", "text"),
    [
        (struct.pack("<Q", 2**63) + b"{", "cut short, damaged, or of another kind"),
        (struct.pack("<Q", 99) + b"{" + bytes(50), "cut short, damaged, or of another kind"),
        (b"", "it is empty"),
        (b"\x00", "cut short"),
        (b"<!DOCTYPE html>", "of another kind"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\x80\x02cos\nsystem\n(S'true'\ntR.", "pickle" if not importlib.util.find_spec("torch") else "torch refuses"),
        (b"PK\x03\x04", "ZIP archive"),
        (b"\x89HDF\r\n\x1a\n", "HDF5 says"),
    ],
)
def test_read_file_refuses_other_beginnings(tmp_path, start, text):
    (tmp_path / "file").write_bytes(start)
    assert text in refusal(tmp_path / "file")


def test_read_file_refuses_a_header_of_gigabytes(tmp_path):
    with open(tmp_path / "file", "wb") as file:
        file.write(struct.pack("<Q", 2**32) + b"{")
        file.truncate(2**33)  # takes no room on disk
    assert "its header of 4294967296 bytes" in refusal(tmp_path / "file")


def test_read_file_refuses_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path, text in (
        (tmp_path, "it is no file"),
        (tmp_path / "fifo", "it is no file"),
        (tmp_path / "none", "No such file"),
    ):
        for read in (read_file, read_file_flags):
            with pytest.raises(Failure, match=text):
                read(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_read_file_names_a_tensor_that_is_not_finite(reference, tmp_path, value):
    tensors = load_file(reference / "torchvision-vgg11.safetensors")
    tensors["classifier.3.weight"][3, 5] = value
    save_file(tensors, tmp_path / "nan.safetensors")
    with pytest.raises(Failure, match=r"classifier\.3\.weight holds NaN or Inf"):
        read_file(tmp_path / "nan.safetensors")


def test_read_file_refuses_what_float32_cannot_hold(reference, tmp_path):
    tensors = load_file(reference / "torchvision-vgg11-float64.safetensors")
    tensors["features.0.bias"][0] = 1e200
    save_file(tensors, tmp_path / "large.safetensors")
    with pytest.raises(Failure, match=r"features\.0\.bias holds NaN or Inf"):
        read_file(tmp_path / "large.safetensors")


def test_read_file_refuses_a_negative_variance(reference, tmp_path):
    tensors = load_file(reference / "timm-vgg11_bn.safetensors")
    tensors["features.1.running_var"][0] = -1
    save_file(tensors, tmp_path / "negative.safetensors")
    with pytest.raises(Failure, match=r"running_var is negative"):
        read_file(tmp_path / "negative.safetensors")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda each: {**each, "features.0.weight": np.zeros((4, 3, 5, 5), np.float32)},
            "block1_conv1/kernel has the shape",
        ),
        (
            lambda each: {**each, "features.0.weight": np.zeros((4, 1, 3, 3), np.float32)},
            "block1_conv1/kernel has the shape",
        ),
        (lambda each: {**each, "classifier.0.weight": np.zeros((256, 33), np.float32)}, "square feature map"),
        (lambda each: {**each, "classifier.3.weight": np.zeros((200, 256), np.float32)}, "fc2/kernel has the shape"),
        (lambda each: {name: each[name] for name in each if "features.3." not in name}, "it has 7 convolutions"),
        (lambda each: {**each, "ema.features.0.weight": each["features.0.weight"]}, "it has 2 networks"),
        (
            lambda each: {"conv1.weight": each["features.0.weight"]},
            "no network of it is known; its tensors are conv1.weight",
        ),
        (lambda each: {"features.0.weight": np.zeros((0, 3, 3, 3), np.float32)}, "it has 1 convolutions"),
    ],
)
def test_read_file_refuses_other_networks(reference, tmp_path, change, text):
    save_file(change(load_file(reference / "torchvision-vgg11.safetensors")), tmp_path / "other.safetensors")
    assert text in refusal(tmp_path / "other.safetensors")


# ---- files that are none: HDF5


def soft_link(file):
    del file["fc1/fc1/bias:0"]
    file["fc1/fc1/bias:0"] = h5py.SoftLink("/fc2/fc2/bias:0")


def external_link(file):
    del file["fc1/fc1/bias:0"]
    file["fc1/fc1/bias:0"] = h5py.ExternalLink("/etc/passwd", "/fc2/fc2/bias:0")


def external_storage(file):
    del file["fc1/fc1/bias:0"]
    file["fc1"]["fc1"].create_dataset("bias:0", (256,), "<f4", external=[("/dev/zero", 0, 1024)])


def virtual(file):
    del file["fc1/fc1/bias:0"]
    layout = h5py.VirtualLayout((256,), "<f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", shape=(256,))
    file["fc1"]["fc1"].create_virtual_dataset("bias:0", layout)


def filtered(file):
    data = file["fc1/fc1/bias:0"][()]
    del file["fc1/fc1/bias:0"]
    file["fc1"]["fc1"].create_dataset("bias:0", data=data, compression="gzip")


def bomb(file):
    del file["fc1/fc1/kernel:0"]
    file["fc1"]["fc1"].create_dataset("kernel:0", (2**20, 2**20), "<f4", chunks=(1024, 1024), compression="gzip")


def never_written(file):
    del file["fc1/fc1/kernel:0"]
    file["fc1"]["fc1"].create_dataset("kernel:0", (2**20, 2**20), "<f4")


def cycle(file):
    file["fc1"]["fc1"]["again"] = file["fc1"]


def many(file):
    for number in range(5001):
        file.create_group(f"g/{number}")


def integers(file):
    del file["fc1/fc1/bias:0"]
    file["fc1"]["fc1"].create_dataset("bias:0", data=np.ones(256, np.int32))


def without_bias(file):
    file["fc1"].attrs["weight_names"] = [b"fc1/kernel:0"]


def lying_name(file):
    file["fc1"].attrs["weight_names"] = [b"../../fc2/fc2/kernel:0", b"fc1/bias:0"]


def normalized(file):
    group = file["block1_conv1"]["block1_conv1"]
    for name in ("gamma:0", "beta:0", "moving_mean:0", "moving_variance:0"):
        group.create_dataset(name, data=np.ones(4, np.float32))
    names = [b"kernel:0", b"bias:0", b"gamma:0", b"beta:0", b"moving_mean:0", b"moving_variance:0"]
    file["block1_conv1"].attrs["weight_names"] = [b"block1_conv1/" + name for name in names]


def fewer(file):
    file.attrs["layer_names"] = [name for name in file.attrs["layer_names"] if _text(name) != "block3_conv2"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (soft_link, "a link to something elsewhere"),
        (external_link, "a link to something elsewhere"),
        (external_storage, "in another file"),
        (virtual, "virtual dataset"),
        (filtered, "not stored as plain bytes"),
        (bomb, "shape"),
        (never_written, "shape"),
        (cycle, "nested too deeply"),
        (many, "more than 5000"),
        (integers, "is of type <i4"),
        (without_bias, "has no bias"),
        (lying_name, "which it does not have"),
        (normalized, "BatchNorm"),
        (fewer, "12 convolutions"),
    ],
)
def test_read_file_refuses_hdf5_that_is_not_plain(reference, tmp_path, change, text):
    path = tmp_path / "changed.h5"
    path.write_bytes((reference / "keras2-vgg16.h5").read_bytes())
    with h5py.File(path, "a") as file:
        change(file)
    with pytest.raises(Failure) as raised:
        read_file(path)
    assert text in raised.value.message and raised.value.message.isprintable()


def test_read_file_refuses_compressed_archives(reference, tmp_path):
    """What a ZIP archive unpacks to has no bound."""
    with zipfile.ZipFile(tmp_path / "packed.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(reference / "keras3-vgg16.weights.h5", "model.weights.h5")
    assert "is compressed" in refusal(tmp_path / "packed.keras")
    with zipfile.ZipFile(tmp_path / "other.keras", "w") as archive:
        archive.writestr("../model.weights.h5", b"x")
    assert "0 files model.weights.h5" in refusal(tmp_path / "other.keras")


def test_read_file_says_that_h5py_is_missing(reference):
    path = f"{ROOT / 'tests' / 'programs' / 'hide_packages'}:{ROOT}"
    program = "import sys, pathlib\nfrom hvd_vgg.weights.files import read_file\nread_file(pathlib.Path(sys.argv[1]))"
    ended = subprocess.run(
        [sys.executable, "-c", program, str(reference / "keras2-vgg16.h5")],
        env={**os.environ, "PYTHONPATH": path, "HIDDEN_PACKAGES": "h5py,tensorflow"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "install h5py" in ended.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("program", "text"),
    [
        ("kill -SEGV $$", "ended the process that read it, by signal 11"),
        ("exec sleep 60", "took more than 0 s"),
        ("echo a >&2; echo b >&2; exit 3", "it cannot be read: b"),
        ("exit 3", "exit code 3"),
    ],
)
def test_run_child_says_how_its_process_ended(tmp_path, program, text):
    """Whatever a library does on a file, the process that asked goes on."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{program}\n")
    python.chmod(0o755)
    with pytest.raises(ValueError, match=text):
        run_child("hdf5_child", [], python, 0.4 if "sleep" in program else 60, str(python))


def test_limit_this_process_bounds_memory():
    program = "from hvd_vgg.weights.limits import limit_this_process\nlimit_this_process(2**24, 60)\nbytearray(2**28)"
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.stderr.strip().endswith("MemoryError")


# ---- mutations


@pytest.mark.parametrize(
    ("name", "count", "seed"),
    [
        (MUTATED[0], 25, 1),
        *((name, 6, 1) for name in MUTATED[1:]),
        *full(*((name, 250, seed) for name in MUTATED for seed in (2, 3))),
    ],
)
def test_read_file_refuses_or_reads_mutated_files(reference, sources, tmp_path, name, count, seed):
    """Each is refused in one line, or read with the same tensors, those aside whose own bytes were changed."""
    path, rng = reference / name, random.Random(seed)
    before, original, where = path.read_bytes(), sources[name].tensors, mutate_weights.places(path)
    inside = np.zeros(len(before), bool)
    for first, end in where.values():
        inside[first:end] = True
    structure = np.flatnonzero(~inside).tolist()
    for number in range(count):
        after = mutate_weights.mutate(before, structure, rng)
        text = mutate_weights.outcome(tmp_path / f"mutated{path.suffix}", before, after, original, where)
        assert text.split()[0] in ("refused", "same", "data"), (number, text)


def test_reference_archive_names_no_paths():
    with zipfile.ZipFile(io.BytesIO((ROOT / "tests" / "reference" / "weights.zip").read_bytes())) as archive:
        assert all(Path(name).name == name for name in archive.namelist())
