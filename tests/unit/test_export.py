"""Exports: what each form holds, that it computes the same, what is refused, that nothing half written is left."""

import dataclasses
import hashlib
import importlib.util
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from support import picture, small_disk_at, write_data

from hvd_vgg import __main__
from hvd_vgg.commands.export import export, judge
from hvd_vgg.config import ExportConfig, TrainConfig, fingerprint
from hvd_vgg.data.transforms import eval_image
from hvd_vgg.errors import CONFIGURATION, NOT_WRITTEN, STOPPED, USAGE, Failure
from hvd_vgg.export import onnx_graph, own_file, saved_model
from hvd_vgg.export.card import accuracy_text
from hvd_vgg.export.check import choose_images, relative_difference, run_elsewhere
from hvd_vgg.export.forms import FORMS, Checks
from hvd_vgg.export.network import folded, load, reference_logits
from hvd_vgg.export.placing import put, require_new, scratch_beside
from hvd_vgg.flags import parse_flags
from hvd_vgg.models.architecture import layers_of
from hvd_vgg.reporting import receipt
from hvd_vgg.reporting.log import RunLog
from hvd_vgg.run_dir import RunDir
from hvd_vgg.training import checkpoint
from hvd_vgg.training.weights import read_weights

CLASSES = 5
NAMES = ["disc", "ring,  or\ttwo", "*square*", "été", "_"]


def write_run(folder, names=NAMES, **flags):
    """Writes a run's directory with a best checkpoint of random numbers, and of an average, which is 1.5 times as large."""
    small = {"model": "vgg11", "width": 0.0625, "image_size": 32, "num_classes": CLASSES, **flags}
    config = TrainConfig(**small)
    random = np.random.default_rng(len(str(flags)))
    tensors = {}
    for layer in layers_of(config):
        for name in (*layer.weights, *layer.moments):
            shape = layer.kernel if name.endswith("/kernel") else layer.kernel[-1:]
            scale = 0.3 if len(shape) == 1 else (2 / np.prod(shape[:-1])) ** 0.5
            tensors[name] = random.normal(0, scale, shape).astype(np.float32)
            if name.endswith(("/gamma", "/moving_variance")):
                tensors[name] = random.uniform(0.5, 2, shape).astype(np.float32)
    averages = {f"{name}{checkpoint.AVERAGE_SUFFIX}": 1.5 * value for name, value in tensors.items()}
    momentum = {f"{name}/momentum": value for name, value in tensors.items()}
    run = RunDir(folder)
    meta = {"step": 7, "run": fingerprint(config), "eval_crop": config.eval_crop}
    checkpoint.save(run, {**tensors, **averages, **momentum}, meta, 3, [checkpoint.BEST, checkpoint.BEST_AVERAGE])
    if names:
        run.classes.write_text("".join(f"{name}\n" for name in names))
    return folder


def export_of(run, to, out, **more):
    """Exports and returns the card."""
    export(ExportConfig(**{"weights": str(run), "to": to, "out": str(out), "check_images": 2, **more}))
    card = out / "README.md" if to == "savedmodel" else out.with_name(f"{out.name}.md")
    return card.read_text()


def pixels_of(size, count=3):
    return np.random.default_rng(1).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


def closeness(found, run, pixels, average=False):
    return relative_difference(np.asarray(found), reference_logits(load(run, average), pixels))


@pytest.mark.parametrize(
    "flags",
    [{"model": "vgg11_bn"}, {"head": "pooled", "pixel_normalization": "caffe", "image_size": 40}],
    ids=["batch norm", "pooled"],
)
def test_saved_model_computes_the_same(tmp_path, capsys, flags):
    run, out = write_run(tmp_path / "run", **flags), tmp_path / "out"
    card = export_of(run, "savedmodel", out)
    assert "signature pixels: largest relative difference of logits" in capsys.readouterr().out
    size = flags.get("image_size", 32)
    model, pixels = tf.saved_model.load(str(out)), pixels_of(size)
    found = model.signatures["pixels"](pixels=tf.constant(pixels))
    assert closeness(found["logits"], run, pixels) < 1e-5
    np.testing.assert_allclose(found["probabilities"].numpy().sum(axis=1), 1, rtol=1e-5)
    encoded = tf.constant([picture(seed, seed) for seed in range(3)])
    assert {name: value.shape for name, value in model.signatures["serving_default"](encoded=encoded).items()} == {
        "logits": (3, CLASSES),
        "probabilities": (3, CLASSES),
    }
    digest = hashlib.sha256((out / "saved_model.pb").read_bytes()).hexdigest()
    assert f"- `out/saved_model.pb`: SHA-256 `{digest}`\n" in card and "`out/variables/variables.index`" in card
    assert (out / "assets" / saved_model.CLASS_NAMES).read_text() == "disc\nring, or two\n*square*\nété\n_\n"
    assert "1. ring, or two\n2. \\*square\\*\n" in card and checkpoint_digests(run) <= set(card.replace("`", " ").split())


def checkpoint_digests(run):
    """Returns the SHA-256 of the file, and of the run's state, as others compute them."""
    source = read_weights(run)
    header = source.path.read_bytes()
    meta = json.loads(json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]["hvd_vgg"])
    return {source.sha256, meta["state_sha256"]}


def encoded_images():
    """Yields JPEGs and PNGs: of both orientations, smaller and larger than 64 pixels, grey, and with alpha."""
    yield from (picture(1, 2), picture(2, 3, 400, 240), picture(3, 1, 120, 640))
    image = tf.io.decode_jpeg(picture(4, 4, 200, 320))
    yield from (tf.io.encode_png(image).numpy(), tf.io.encode_jpeg(image[:, :, :1]).numpy())
    yield tf.io.encode_png(tf.concat([image, image[:, :, :1]], 2)).numpy()


@pytest.mark.parametrize(("resize", "crop"), [("opencv", 0.875), ("opencv", 0.0), ("pillow", 0.875), ("pillow", 0.0)])
def test_saved_model_decodes_as_evaluation_does(resize, crop):
    """But for rounding: TensorFlow's resize is another."""
    in_graph = tf.function(lambda encoded: saved_model.decode(encoded, 64, crop, resize))
    for encoded in encoded_images():
        expected = np.empty([64, 64, 3], np.uint8)
        eval_image(encoded, crop, resize, expected)
        difference = np.abs(in_graph(tf.constant(encoded)).numpy().astype(int) - expected)
        assert difference.max() <= 1 and difference.mean() < 0.3


def test_export_safetensors_is_read_again(tmp_path):
    """By name, to the bit, with all that is said of it but what continues a run; and exported again it stays so."""
    run, first, second = (
        write_run(tmp_path / "run", model="vgg11_bn"),
        tmp_path / "a.safetensors",
        tmp_path / "b.safetensors",
    )
    export_of(run, "safetensors", first)
    export_of(first, "safetensors", second)
    expected = read_weights(run)
    for path in (first, second):
        found = read_weights(path)
        assert found.flags == {**expected.flags, "pixel_normalization": "imagenet"}  # which auto means
        assert set(found.tensors) == set(expected.tensors)
        assert all((found.tensors[name] == value).all() for name, value in expected.tensors.items())
        assert not [name for name in checkpoint.load(path).tensors if name not in expected.tensors]
        assert load(path, False).class_names[1] == "ring, or two"


def test_card_of_an_export_says_whose_it_is(tmp_path):
    """The run's state, and that it is an average; of weights that nobody trained here, neither state nor training."""
    run, first, second = (write_run(tmp_path / "run"), tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    export_of(run, "safetensors", first, average=True, check_images=0)
    card = export_of(first, "safetensors", second, check_images=0)
    assert f"State of the run: `{load(run, True).meta['state_sha256']}`" in card and "moving average" in card
    assert "(export of checkpoint of step 7, the average of its weights)" in card
    assert read_weights(second).kind == read_weights(first).kind
    torch, other = tmp_path / "t.safetensors", tmp_path / "o.safetensors"
    export_of(write_run(tmp_path / "wide", image_size=64, model="vgg16"), "torch", torch, check_images=0)
    export_of(torch, "safetensors", other, check_images=0)
    card = export_of(other, "safetensors", tmp_path / "p.safetensors", check_images=0)
    assert "export of torchvision's vgg16" in card and "trained with" not in card and "State of the run" not in card


def test_export_is_a_command(tmp_path, capsys):
    run, out = write_run(tmp_path / "run"), tmp_path / "a.safetensors"
    words = ["export", str(run), "--to=safetensors", f"--out={out}", "--check_images=1"]
    assert __main__.run(words) == 0 and out.is_file()
    assert __main__.run(words) == NOT_WRITTEN and "exists already" in capsys.readouterr().err


def test_card_has_the_flags_of_the_evaluation(tmp_path):
    """Not those of a later start, which flags.txt has; none where the log is not the receipt's."""
    path = write_run(tmp_path / "run")
    run, digest = RunDir(path), load(path, False).meta["state_sha256"]
    counts = {"eval.top1_hits": 3, "eval.top5_hits": 5, "eval.records": 10, "eval.loss": 1.0}
    for data, flip in (("first", True), ("second", False)):
        log = RunLog(path, False, None)
        log.log("PARAMETER", {"data_dir": data, "eval_flip": flip, "eval_size": 96 * flip, "precision": "bfloat16"})
        log.log((1, 7), {**counts, "eval.state_sha256": digest if flip else "other"})
        log.close()
    receipt.write(run)
    run.flags.write_text("--data_dir=second\n")
    expected = "3 and 5 of 10 validation records of first, at 96 pixels, with --eval_flip, with --precision=bfloat16, by"
    assert expected in accuracy_text(load(path, False))
    run.log.write_text("\n".join(run.log.read_text().splitlines()[1:]))
    assert "3 and 5 of 10 validation records, by the run itself" in accuracy_text(load(path, False))


def test_export_of_the_average_folded(tmp_path):
    run, out = write_run(tmp_path / "run", model="vgg11_bn"), tmp_path / "a.safetensors"
    card = export_of(run, "safetensors", out, average=True, fold_batch_norm=True)
    assert "moving average" in card
    found, pixels = load(out, False), pixels_of(32)
    assert found.config.model == "vgg11" and not [name for name in found.tensors if "moving" in name or "gamma" in name]
    assert closeness(reference_logits(found, pixels), run, pixels, average=True) < 1e-5
    assert closeness(reference_logits(found, pixels), run, pixels) > 0.01


@pytest.mark.parametrize(
    ("fold", "flags"),
    [(True, {"model": "vgg11_bn", "image_size": 64}), (False, {"head": "pooled"})],
    ids=["folded", "pooled"],
)
def test_onnx_computes_the_same(tmp_path, capsys, fold, flags):
    """By the onnx package's own evaluator; where the package is missing, the message says which one to install."""
    run, out = write_run(tmp_path / "run", **flags), tmp_path / "a.onnx"
    if importlib.util.find_spec("onnx") is None:
        with pytest.raises(Failure, match=r"pip install --no-deps onnx==1\.\d+\.0") as raised:
            export_of(run, "onnx", out)
        assert raised.value.code == CONFIGURATION
        return
    import onnx
    from onnx.reference import ReferenceEvaluator

    export_of(run, "onnx", out, fold_batch_norm=fold)
    if importlib.util.find_spec("onnxruntime") is None:
        assert "not checked: onnxruntime" in capsys.readouterr().out
    pixels = pixels_of(flags.get("image_size", 32), 2)
    logits, probabilities = ReferenceEvaluator(str(out)).run(None, {"images": pixels})
    assert closeness(logits, run, pixels) < 1e-5
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    facts = {each.key: each.value for each in onnx.load(str(out)).metadata_props}
    assert json.loads(facts["class_names"])[3] == "été"


def test_onnx_has_batch_norm_where_it_is_not_folded(tmp_path):
    """Run by onnxruntime in tests/reference/check_exports.py: the package's evaluator takes a batch's own statistics."""
    if importlib.util.find_spec("onnx") is None:
        return
    import onnx

    path = tmp_path / "a.onnx"
    onnx_graph.write(load(write_run(tmp_path / "run", model="vgg11_bn"), False), path)
    graph = onnx.load(str(path)).graph
    assert [node.op_type for node in graph.node].count("BatchNormalization") == 8


def test_torch_state_has_torchvisions_names(tmp_path):
    """And is read again, to the bit, as any file of torchvision's."""
    run, out = write_run(tmp_path / "run", model="vgg16_bn", image_size=64), tmp_path / "a.safetensors"
    export(ExportConfig(weights=str(run), to="torch", out=str(out), check_images=0))
    found, expected = read_weights(out), read_weights(run)
    assert found.kind.startswith("torchvision's vgg16_bn") and not found.unused
    assert all((found.tensors[name] == value).all() for name, value in expected.tensors.items())
    text = out.read_bytes()[8:20_000].decode(errors="replace")
    assert '"features.41.num_batches_tracked"' in text and '"classifier.6.weight"' in text
    assert "not checked: --check_images=0" in (tmp_path / "a.safetensors.md").read_text()


@pytest.mark.fault(tier=3)
def test_keras_loads_its_file(tmp_path, capsys):
    """By VGG16(weights=PATH, classes=N) of this environment's Keras, in a process of its own; all of width 1."""
    run, out = write_run(tmp_path / "run", model="vgg16_bn", width=1.0), tmp_path / "a.h5"
    card = export_of(run, "keras_h5", out)
    printed = capsys.readouterr().out
    assert "keras" in printed and "largest relative difference of logits" in printed
    assert "the file cannot say what its pixels are: normalized as imagenet" in printed
    assert "not** those of `preprocess_input`" in card


@pytest.mark.parametrize(
    ("to", "flags", "message"),
    [
        ("keras_h5", {"model": "vgg13"}, "Keras has VGG16 and VGG19, not vgg13"),
        ("keras_h5", {"model": "vgg16"}, "have width 1, and this network 0.0625"),
        ("torch", {"head": "pooled"}, "have fc1 and fc2, which --head=pooled lacks"),
    ],
)
def test_export_refuses_what_a_form_lacks(tmp_path, to, flags, message):
    run, folder = write_run(tmp_path / "run", **flags), tmp_path / "out"
    folder.mkdir()
    ending = {"keras_h5": "h5", "torch": "safetensors"}[to]
    with pytest.raises(Failure, match=message) as raised:
        export_of(run, to, folder / f"a.{ending}")
    assert raised.value.code == CONFIGURATION and "\n" not in str(raised.value) and not list(folder.iterdir())


def test_onnx_of_more_than_2_gb_is_refused(tmp_path):
    network = load(write_run(tmp_path / "run"), False)
    huge = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), (2**30,), (0,))
    assert "at most 2 GB" in onnx_graph.refusal(network._replace(tensors={"fc1/kernel": huge}))
    assert not onnx_graph.refusal(network)


def test_export_never_overwrites(tmp_path):
    """A file, a directory that holds something, a link; a card; nor does it make a parent. An empty directory is filled."""
    run = write_run(tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a.safetensors").touch()
    (tmp_path / "b.safetensors.md").touch()
    for to, name in (("savedmodel", "full"), ("savedmodel", "link"), ("safetensors", "a.safetensors")):
        refused(run, to, tmp_path / name, "exists already")
    refused(run, "safetensors", tmp_path / "b.safetensors", "the model card of --out")
    refused(run, "savedmodel", tmp_path / "none" / "out", "there is no directory")
    empty = tmp_path / "empty.safetensors"
    empty.mkdir()
    refused(run, "safetensors", empty, "exists already")
    empty.rmdir()
    before = sorted(tmp_path.iterdir())
    empty = tmp_path / "empty"
    empty.mkdir()
    require_new(empty, directory=True)
    with scratch_beside(empty) as scratch:
        (scratch / "empty").mkdir()
        (scratch / "empty" / "a").touch()
        put([scratch / "empty"], tmp_path)
    assert (empty / "a").exists() and sorted([*before, empty]) == sorted(tmp_path.iterdir())


def test_export_into_the_current_directory(tmp_path, monkeypatch):
    """It is filled where it is empty; nothing appears in it otherwise."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run = write_run(tmp_path / "run")
    export(ExportConfig(weights=str(run), out=".", check_images=0))
    assert (tmp_path / "here" / "README.md").exists() and not (tmp_path / "here" / "made").exists()
    monkeypatch.chdir(tmp_path / "here")
    refused(run, "savedmodel", Path(), "exists already")


def test_export_overwrites_nothing_made_meanwhile(tmp_path):
    """Where the card cannot be placed, the file is taken back; a directory takes the place of an empty one alone."""
    made, folder = tmp_path / "made", tmp_path / "out"
    (made / "c").mkdir(parents=True)
    (folder / "c").mkdir(parents=True)
    for name in ("a", "a.md", "c/d"):
        (made / name).write_text("new")
    (folder / "a.md").write_text("theirs")
    (folder / "c" / "e").touch()
    for paths in ([made / "a", made / "a.md"], [made / "c"]):
        with pytest.raises(OSError, match=r"exists|not empty"):
            put(paths, folder)
    assert sorted(path.name for path in folder.rglob("*")) == ["a.md", "c", "e"]
    assert (folder / "a.md").read_text() == "theirs"
    (folder / "a.md").unlink()
    put([made / "a", made / "a.md"], folder)
    assert (folder / "a").read_text() == (folder / "a.md").read_text() == "new" and not (made / "a").exists()


def test_export_that_is_stopped_leaves_nothing(tmp_path, monkeypatch, capsys):
    """By SIGTERM while it writes: exit code 80, and no word of checkpoints, of which it has none."""
    run, folder = write_run(tmp_path / "run"), tmp_path / "out"
    folder.mkdir()
    stopped = FORMS["safetensors"]._replace(write=lambda task: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setitem(FORMS, "safetensors", stopped)
    before = signal.getsignal(signal.SIGTERM)
    words = ["export", str(run), "--to=safetensors", f"--out={folder / 'a.safetensors'}"]
    assert __main__.run(words) == STOPPED and not list(folder.iterdir())
    assert capsys.readouterr().err == "hvd-vgg: interrupted\n" and signal.getsignal(signal.SIGTERM) == before


def refused(run, to, out, message):
    with pytest.raises(Failure, match=message) as raised:
        export_of(run, to, out)
    assert raised.value.code == NOT_WRITTEN


def test_export_to_a_full_disk_leaves_nothing(tmp_path):
    run = write_run(tmp_path / "run", model="vgg16", width=0.25)
    with small_disk_at(tmp_path / "disk", "1m") as disk:
        for to, name in (("safetensors", "a.safetensors"), ("torch", "b.safetensors"), ("savedmodel", "c")):
            refused(run, to, disk / name, "cannot be written")
            assert not list(disk.iterdir())


def test_export_that_computes_something_else_is_a_failure(tmp_path):
    """Of the check itself: numbers that differ, have another shape or are not finite."""
    logits = np.array([[1.0, -100.0], [0.001, 0.002]], np.float32)
    assert relative_difference(logits, logits) == 0
    assert relative_difference(logits + [[0.1, 0], [0, 0]], logits) == pytest.approx(1e-3, rel=1e-3)
    assert relative_difference(logits + [[0, 0], [0, 0.0002]], logits) == pytest.approx(0.1, rel=1e-3)
    assert relative_difference(logits[:1], logits) == relative_difference(logits * np.nan, logits) == np.inf
    assert judge(Checks([("a", 1e-5)], ["note"]), "8 images", "x") == [
        "a: largest relative difference of logits 1.0e-05, on 8 images",
        "note",
    ]
    for difference in (2e-4, np.inf, np.nan):
        with pytest.raises(Failure, match="x is not written: by a its logits differ") as raised:
            judge(Checks([("a", difference)], []), "8 images", "x")
        assert raised.value.code == NOT_WRITTEN
    network = load(write_run(tmp_path / "run"), False)
    own_file.write(network, tmp_path / "other.safetensors")
    changed = {**network.tensors, "fc1/bias": network.tensors["fc1/bias"] + 1}
    with pytest.raises(Failure, match="not what was written"):
        own_file.run(tmp_path / "other.safetensors", network._replace(tensors=changed))


def test_export_is_checked_on_records_where_there_are_any(tmp_path):
    """On those of --data_dir, of the run, or on drawn ones; --data_dir that cannot be read is an error."""
    run, data = write_run(tmp_path / "run"), write_data(tmp_path / "data", 4, 6, 1)
    network = load(run, False)
    assert "2 drawn pictures (there is no run" in choose_images(network, "", 2).of
    found = choose_images(network, str(data), 4)
    assert found.of == f"4 validation records of {data}" and len(found.encoded) == 4
    expected = np.empty([32, 32, 3], np.uint8)
    eval_image(found.encoded[3], 0.875, "opencv", expected)
    assert (found.pixels[3] == expected).all()
    RunDir(run).flags.write_text(f"--data_dir={data}\n")
    assert choose_images(network, "", 9).of == f"6 validation records of {data}"
    (tmp_path / "data").rename(tmp_path / "moved")
    for path in sorted((tmp_path / "moved").glob("validation-*")):
        path.rename(path.with_name(path.name.replace("validation", "val")))
    RunDir(run).flags.write_text("--data_dir=gone\n--train_pattern=train-*\n--validation_pattern=val-*\n")
    assert choose_images(network, str(tmp_path / "moved"), 4).of == f"4 validation records of {tmp_path / 'moved'}"
    RunDir(run).flags.write_text(f"--data_dir={tmp_path / 'gone'}\n")
    assert "2 drawn pictures (data: " in choose_images(network, "", 2).of
    with pytest.raises(Failure):
        choose_images(network, str(tmp_path / "gone"), 2)


def test_export_check_python_that_is_none_is_refused(tmp_path):
    network = load(write_run(tmp_path / "run"), False)
    for python, message in ((str(tmp_path / "python"), "cannot be run: No such file"), ("/bin/false", "exit code 1")):
        with pytest.raises(Failure, match=message):
            run_elsewhere("onnx", network, tmp_path / "a.onnx", tmp_path, python, pixels_of(32))


def test_export_of_convolutions_alone_is_refused(tmp_path):
    run = write_run(tmp_path / "run", head="pooled")
    for path in (tmp_path, tmp_path / "none", run / "classes.txt"):
        with pytest.raises(Failure) as raised:
            load(path, False)
        assert raised.value.code == CONFIGURATION


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--to=onnx"], "--out=./export: expected a name that ends in .onnx"),
        (["--out="], "--out=: expected a path, found nothing"),
        (["--out=a/.."], "--out=a/..: expected the name of what is to be written"),
        (["--out=/"], "--out=/: expected the name of what is to be written"),
        (["--to=onnx", "--out=a.h5"], "expected a name that ends in .onnx"),
        (["--to=torch", "--out=a.onnx"], "ends in .safetensors or .pth or .pt"),
        (["--to=keras_h5", "--out=a.weights.h5"], "another format to Keras 3"),
    ],
)
def test_export_flags_name_a_file_of_the_form(flags, message):
    with pytest.raises(Failure, match=message) as raised:
        parse_flags(ExportConfig, flags)
    assert raised.value.code == USAGE


def test_export_forms_are_those_of_the_flag():
    field = next(field for field in dataclasses.fields(ExportConfig) if field.name == "to")
    assert tuple(FORMS) == field.metadata["choices"]


def test_folded_network_without_batch_norm_is_itself(tmp_path):
    network = load(write_run(tmp_path / "run"), False)
    assert folded(network) is network
