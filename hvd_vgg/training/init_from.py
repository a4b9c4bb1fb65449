"""The first weights of a run: from --init_from, layer by layer, where they fit."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple

import numpy as np

from hvd_vgg.config import DENSE, FLATTENED, TrainConfig, fits_any
from hvd_vgg.data.manifest import file_sha256
from hvd_vgg.errors import CONFIGURATION, Failure
from hvd_vgg.models.architecture import Layer, layers_of, layers_to_train
from hvd_vgg.parallel import comm
from hvd_vgg.parallel.consensus import run_on_root
from hvd_vgg.run_dir import RunDir
from hvd_vgg.training.checkpoint import AVERAGE_SUFFIX
from hvd_vgg.training.reporter import Reporter
from hvd_vgg.training.state import State
from hvd_vgg.training.weights import file_of, read_flags, read_weights, run_of
from hvd_vgg.weights.source import Source, layers_in

INIT_SHA256 = "init_sha256"  # what a run's fingerprint calls the digest of the file


class Taken(NamedTuple):
    """What became of the layers of a file and of the network. tensors: of those that are taken, by name.

    resized: fc1, if its grid was; new: layers that keep their initial weights, each with the reason; unused: of the file.
    """

    tensors: Dict[str, np.ndarray]
    resized: str
    new: List[str]
    unused: List[str]


def resolve_source(config: TrainConfig) -> Tuple[TrainConfig, Dict[str, str]]:
    """Returns the configuration with --pixel_normalization as --init_from has it, and what it adds to a run's fingerprint.

    Collective; raises a collective Failure(CONFIGURATION) where the file cannot be read. A run that is continued does
    without it: if it is gone, what the newest checkpoint says of it counts.
    """
    found = comm.broadcast_json(run_on_root(lambda: _describe(config) if config.init_from else {}))
    normalization = found.pop("pixel_normalization", "imagenet")
    if config.pixel_normalization == "auto":
        config = dataclasses.replace(config, pixel_normalization=normalization)
    return config, found


def _describe(config: TrainConfig) -> Dict[str, str]:
    path, saved = Path(config.init_from), _saved_runs(config)
    # A directory's best checkpoint may be another by now.
    if saved and not path.is_file():
        return {name: saved[0][name] for name in (INIT_SHA256, "pixel_normalization")}
    flags = read_flags(path)
    digest = file_sha256(file_of(path))
    return {INIT_SHA256: digest, "pixel_normalization": flags.get("pixel_normalization", "imagenet")}


def _saved_runs(config: TrainConfig) -> List[Dict[str, Any]]:
    """Returns what checkpoints of a run that began with given weights, and their copies, say of it, newest first."""
    folders = [config.run_dir, *filter(None, [config.checkpoint_copy_dir])]
    paths = [path for folder in folders for path in RunDir(folder).list_checkpoints()]
    runs = [run_of(path) for path in sorted(paths, key=lambda path: path.name, reverse=True)]
    return [run for run in runs if INIT_SHA256 in run and "pixel_normalization" in run]


def init_weights(state: State, config: TrainConfig, digest: str, reporter: Reporter) -> None:
    """Gives `state` on rank 0 the weights of --init_from, says and logs which; the others get them when it is broadcast.

    digest: of the file, as `resolve_source` found it. Raises Failure(CONFIGURATION) where it is another by now, or where its
    weights do not fit the network.
    """
    source = read_weights(Path(config.init_from))
    if source.sha256 != digest:
        raise Failure(CONFIGURATION, f"--init_from={source.path} was replaced since this process began: start again")
    taken = choose_layers(source, config)
    for name, variable in state.network().items():
        if name in taken.tensors:
            variable.assign(taken.tensors[name])
            if state.averages:
                state.averages[f"{name}{AVERAGE_SUFFIX}"].assign(taken.tensors[name])
    layers = layers_in(taken.tensors)
    reporter.say(f"weights of {len(layers)} layers from {source.path} ({source.kind}), SHA-256 {source.sha256[:16]}")
    for text, names in (("resized", [taken.resized]), ("new", taken.new), ("not used", taken.unused)):
        if any(names):
            reporter.say(f"  {text}: {', '.join(names)}")
    if DENSE[-1] in layers:
        others = f"--init_layers={'block,fc' if config.head == FLATTENED else 'block'}"
        reporter.say(f"  {DENSE[-1]} are taken: where the classes are others, leave them out by {others}")
    for name in ("pixel_normalization", "resize"):
        own, theirs = getattr(config, name), source.flags.get(name, getattr(config, name))
        if own != theirs:
            reporter.say(f"  expects other images: --{name}={theirs}, here {own}")
    found: Dict[str, Any] = {"file": str(source.path), "kind": source.kind, "sha256": source.sha256, "layers": layers}
    reporter.event("init_from", **found, resized=taken.resized, new=taken.new, unused=taken.unused)


def choose_layers(source: Source, config: TrainConfig) -> Taken:
    """Returns what of a file begins the network of a configuration; raises Failure(CONFIGURATION) where it does not fit."""
    model = source.flags["model"]
    adds_norm = config.model == f"{model}_bn"
    if model != config.model and not adds_norm:
        raise Failure(CONFIGURATION, f"--init_from={source.path} is of {model}: expected --model={model}")
    frozen = [layer.name for layer in layers_to_train(config) if layer.normalized and not layer.trained]
    if adds_norm and frozen:
        text = f"{model}, without BatchNorm, whose moments {frozen[0]} would keep as they begin"
        raise Failure(CONFIGURATION, f"--init_from={source.path} is of {text}: train it, or expected --model={model}")
    taken, resized, new = {}, "", ["BatchNorm (the file has none)"] if adds_norm else []
    for layer in layers_of(config):
        names = [*layer.weights, *layer.moments][: 2 if adds_norm else None]  # kernel and bias
        found = {name: source.tensors[name] for name in names if name in source.tensors}
        reason = _why_new(layer, found, config)
        if reason:
            new.append(f"{layer.name} ({reason})")
            continue
        kernel = found[f"{layer.name}/kernel"]
        if layer.name == DENSE[0] and kernel.shape != layer.kernel:
            kernel, resized = _resized_fc1(kernel, layer, config)
            found[f"{layer.name}/kernel"] = kernel
        wrong = next((name for name in names if name not in found), "")
        if wrong or kernel.shape != layer.kernel:
            what = f"{wrong} is missing" if wrong else f"{layer.name}/kernel has the shape {list(kernel.shape)}"
            fix = f"expected {list(layer.kernel)}, of --width={config.width:g}; the file's is {source.flags['width']:g}"
            raise Failure(CONFIGURATION, f"--init_from={source.path}: {what}; {fix}")
        taken.update(found)
    if not taken:
        raise Failure(CONFIGURATION, f"--init_from={source.path}: nothing of it is taken: {', '.join(new)}")
    left = layers_in(name for name in source.tensors if name not in taken)
    return Taken(taken, resized, new, [*left, *source.unused])


def _why_new(layer: Layer, found: Dict[str, np.ndarray], config: TrainConfig) -> str:
    """Returns why a layer keeps its initial weights; "" where it is to be taken from the file."""
    if config.init_layers and not fits_any(layer.name, config.init_layers):
        return "not in --init_layers"
    if not found:
        return "the file has none"
    kernel = found.get(f"{layer.name}/kernel")
    if layer.name == DENSE[-1] and kernel is not None and kernel.shape != layer.kernel:
        if kernel.shape[0] != layer.kernel[0]:
            return f"the file's has {kernel.shape[0]} inputs, expected {layer.kernel[0]}"
        return f"{layer.kernel[1]} classes, the file has {kernel.shape[1]}"
    return ""


def _resized_fc1(kernel: np.ndarray, layer: Layer, config: TrainConfig) -> Tuple[np.ndarray, str]:
    """Returns fc1's kernel for the grid of another image size, and what was done; itself where only that does not help."""
    last = layers_of(config)[-len(DENSE) - 1].kernel[-1]
    before, after = (math.isqrt(shape[0] // last) for shape in (kernel.shape, layer.kernel))
    if kernel.shape != (before * before * last, layer.kernel[1]):
        return kernel, ""
    text = f"fc1, from a grid of {before} x {before} ({32 * before} pixels) to {after} x {after} ({32 * after} pixels)"
    return resize_grid(kernel, before, after), text


def resize_grid(kernel: np.ndarray, before: int, after: int) -> np.ndarray:
    """Returns the kernel [before * before * C, N] of a dense layer for a grid of after x after cells, float32.

    A new cell has of each old one's weights the share of its area that it covers, so that sums over the grid, and outputs
    for a feature map that is everywhere the same, stay as they are.
    """
    edges = [np.arange(cells + 1) / cells for cells in (after, before)]
    low = np.maximum(edges[0][:-1, None], edges[1][None, :-1])
    high = np.minimum(edges[0][1:, None], edges[1][None, 1:])
    share = np.maximum(high - low, 0) * before  # of old cell j that is in new cell i
    grid: np.ndarray = kernel.astype(np.float64).reshape(before, before, -1, kernel.shape[1])
    resized = np.einsum("ih,jw,hwcn->ijcn", share, share, grid, optimize=True)
    return resized.reshape(-1, kernel.shape[1]).astype(np.float32)
