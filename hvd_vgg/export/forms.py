"""The forms of export: what each cannot hold, how it is written, run again, and loaded by its users."""

import shlex
from pathlib import Path
from typing import Callable, List, NamedTuple, Tuple

import numpy as np
import tensorflow as tf

from hvd_vgg.export import keras_h5, onnx_graph, own_file, saved_model, torch_state
from hvd_vgg.export.check import Images, relative_difference, run_elsewhere
from hvd_vgg.export.network import Network, reference_logits


class Task(NamedTuple):
    """A network to write as `path`; scratch: a directory for other files; python: of --check_python, or ""."""

    network: Network
    path: Path
    scratch: Path
    python: str


class Checks(NamedTuple):
    """What came of running an export: (runtime, largest relative difference of logits), and what else is to be said."""

    differences: List[Tuple[str, float]]
    notes: List[str]


def _nothing(_: Network) -> str:
    return ""


class Form(NamedTuple):
    """A form of export.

    refusal: why a network cannot have it, "" where it can; write, check: of a task, the latter with images and the logits
    that are expected; use: how the file of that name is loaded, Markdown; folds: whether BatchNorm is folded in any case;
    warning: what its users must know that it cannot say.
    """

    refusal: Callable[[Network], str]
    write: Callable[[Task], None]
    check: Callable[[Task, Images, np.ndarray], Checks]
    use: Callable[[Network, str], str]
    folds: bool = False
    warning: Callable[[Network], str] = _nothing


def _check_saved_model(task: Task, images: Images, expected: np.ndarray) -> Checks:
    of_pixels, of_encoded = saved_model.run(task.path, images.pixels, images.encoded)
    runtime = f"tf.saved_model.load (TensorFlow {tf.__version__}), signature pixels"
    note = f"signature encoded, with TensorFlow's resize: {relative_difference(of_encoded, expected):.1e}"
    return Checks([(runtime, relative_difference(of_pixels, expected))], [note])


def _check_own_file(task: Task, images: Images, expected: np.ndarray) -> Checks:
    tensors = own_file.run(task.path, task.network)
    found = reference_logits(task.network._replace(tensors=tensors), images.pixels)
    return Checks([("hvd_vgg, which reads tensors equal in every bit", relative_difference(found, expected))], [])


def _check_elsewhere(kind: str) -> Callable[[Task, Images, np.ndarray], Checks]:
    def check(task: Task, images: Images, expected: np.ndarray) -> Checks:
        ran = run_elsewhere(kind, task.network, task.path, task.scratch, task.python, images.pixels)
        notes = []
        if not ran.logits:
            notes.append(
                f"not checked: {'; '.join(ran.missing)}; --check_python=PYTHON names another environment's interpreter"
            )
        return Checks([(label, relative_difference(found, expected)) for label, found in ran.logits.items()], notes)

    return check


def _write_torch(task: Task) -> None:
    """Writes the state; .pth by torch, which may be in another environment."""
    if task.path.suffix == ".safetensors":
        torch_state.write(task.network, task.path)
        return
    state = task.scratch / "state.safetensors"
    torch_state.write(task.network, state)
    ran = run_elsewhere("save_torch", task.network, task.path, task.scratch, task.python, None, state=str(state))
    torch_state.require_written(task.path, ran.missing)
    state.unlink()


def _use_saved_model(network: Network, name: str) -> str:
    return (
        "```python\n"
        f'model = tf.saved_model.load("{name}")\n'
        'model.signatures["encoded"](encoded=tf.constant([jpeg_bytes]))["probabilities"]\n'
        'model.signatures["pixels"](pixels=uint8_images)["logits"]  # [n, '
        f"{network.config.image_size}, {network.config.image_size}, 3], RGB\n"
        "```\n\n"
        "`encoded`, which is `serving_default`, decodes JPEG and PNG, crops and resizes as below, by TensorFlow's own "
        "resize: pixels differ from those of the evaluation by rounding. `pixels` is the network itself."
    )


def _use_own_file(_: Network, name: str) -> str:
    file = shlex.quote(name)
    return f"`hvd-vgg evaluate --weights={file}`, `hvd-vgg train --init_from={file}`; or any reader of safetensors."


FORMS = {
    "savedmodel": Form(
        _nothing,
        lambda task: saved_model.write(task.network, task.path, task.scratch),
        _check_saved_model,
        _use_saved_model,
        folds=True,
    ),
    "keras_h5": Form(
        keras_h5.refusal,
        lambda task: keras_h5.write(task.network, task.path),
        _check_elsewhere("keras_h5"),
        keras_h5.use,
        folds=True,
        warning=keras_h5.warning,
    ),
    "onnx": Form(
        onnx_graph.refusal,
        lambda task: onnx_graph.write(task.network, task.path),
        _check_elsewhere("onnx"),
        onnx_graph.use,
    ),
    "torch": Form(torch_state.refusal, _write_torch, _check_elsewhere("torch"), torch_state.use),
    "safetensors": Form(
        _nothing,
        lambda task: own_file.write(task.network, task.path),
        _check_own_file,
        _use_own_file,
    ),
}
