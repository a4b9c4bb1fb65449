"""The `export` command: writes a network in the form of another library, runs it by that library, describes it."""

import contextlib
import shlex
import sys
from pathlib import Path
from typing import List

import tensorflow as tf

from hvd_vgg.config import ExportConfig
from hvd_vgg.data.manifest import file_sha256
from hvd_vgg.environment import runs_alone
from hvd_vgg.errors import CONFIGURATION, NOT_WRITTEN, USAGE, Failure
from hvd_vgg.export.card import accuracy_text, model_card
from hvd_vgg.export.check import LIMIT, choose_images
from hvd_vgg.export.forms import FORMS, Checks, Form, Task
from hvd_vgg.export.network import Network, folded, load, reference_logits
from hvd_vgg.export.onnx_graph import require_onnx
from hvd_vgg.export.placing import interrupted_when_asked, put, require_new, scratch_beside
from hvd_vgg.reporting.console import Console

_CARD = "README.md"  # in the directory of a SavedModel; NAME.md beside a file


def export(config: ExportConfig) -> None:
    """Writes --out and its model card, both or neither, after it was run by its own library where that is here.

    Raises Failure: USAGE under a launcher; CONFIGURATION where the weights cannot be read, or have no such form;
    NOT_WRITTEN where the logits of what was written differ, or the disk refuses.
    """
    if not runs_alone():
        raise Failure(USAGE, "export is one process's work, and a launcher has started this one: call it without")
    # On the processor alone: a GPU may round products to 10 bits (TensorFloat-32), and others may train on it.
    with contextlib.suppress(RuntimeError):  # of a program that has used its devices before
        tf.config.set_visible_devices([], "GPU")
    with interrupted_when_asked():
        _export(config)


def _export(config: ExportConfig) -> None:
    console, out, form = Console("lines", True), Path(config.out).absolute(), FORMS[config.to]  # . has a name then
    directory = config.to == "savedmodel"
    require_new(out, directory=directory)
    if not directory:
        require_new(_card_of(out), "the model card of --out")
    if config.to == "onnx":
        require_onnx()
    network = load(Path(config.weights), config.average)
    refusal = form.refusal(network)
    if refusal:
        raise Failure(CONFIGURATION, f"--to={config.to}: {refusal}")
    written = folded(network) if config.fold_batch_norm or form.folds else network
    console.say(
        f"{network.source.path}: {network.source.kind}, {network.config.model} of {network.config.num_classes} classes"
    )
    console.say(f"  {accuracy_text(network)}")
    warning = form.warning(network)
    if warning:
        console.say(f"  warning: {warning}")
    with scratch_beside(out) as folder:
        made, scratch = folder / "made", folder / "scratch"
        made.mkdir()
        scratch.mkdir()
        task = Task(written, made / out.name, scratch, config.check_python)
        _write(form, task, out)
        lines = _check(form, task, network, config, console)
        paths = [path for path in sorted(task.path.rglob("*")) if path.is_file()] if directory else [task.path]
        files = [f"`{path.relative_to(task.path.parent)}`: SHA-256 `{file_sha256(path)}`" for path in paths]
        command = shlex.join(["hvd-vgg", *sys.argv[1:]])
        card = model_card(written, network.config.model, out.name, form.use(written, out.name), lines, command, files)
        path = task.path / _CARD if directory else made / _card_of(out).name
        path.write_text(card, encoding="utf-8")
        put([task.path] if directory else [task.path, path], out.parent)
    console.say(f"written: {out}, and its model card {out / _CARD if directory else _card_of(out)}")


def _card_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.md")


def _write(form: Form, task: Task, out: Path) -> None:
    try:
        form.write(task)
    except tf.errors.OpError as error:
        raise Failure(NOT_WRITTEN, f"{out} cannot be written: {error.message}") from error


def _check(form: Form, task: Task, network: Network, config: ExportConfig, console: Console) -> List[str]:
    """Runs what was written and returns lines about it, which it also prints; Failure(NOT_WRITTEN) where it differs."""
    if not config.check_images:
        lines = ["not checked: --check_images=0"]
    else:
        images = choose_images(network, config.data_dir, config.check_images)
        found = form.check(task, images, reference_logits(network, images.pixels))
        lines = judge(found, images.of, config.out)
    for line in lines:
        console.say(f"  {line}")
    return lines


def judge(found: Checks, images: str, out: str) -> List[str]:
    """Returns lines on how an export ran on `images`; raises Failure(NOT_WRITTEN) where its logits differ too much."""
    lines = []
    for runtime, difference in found.differences:
        if not difference <= LIMIT:
            raise Failure(
                NOT_WRITTEN,
                f"{out} is not written: by {runtime} its logits differ from this package's by {difference:.1e} of an "
                f"image's largest, more than {LIMIT:g}, on {images}",
            )
        lines.append(f"{runtime}: largest relative difference of logits {difference:.1e}, on {images}")
    return lines + found.notes
