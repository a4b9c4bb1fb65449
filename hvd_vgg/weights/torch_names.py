"""The names and layouts of torchvision's and timm's VGG networks, from theirs to this package's and back."""

from typing import Dict, List, Mapping, Tuple

import numpy as np

from hvd_vgg.config import BLOCKS, DENSE
from hvd_vgg.models.architecture import BETA, GAMMA, MOVING_MEAN, MOVING_VARIANCE
from hvd_vgg.weights.pieces import (
    TORCH_IMAGES,
    Piece,
    Plan,
    Shape,
    convolution,
    dense,
    of_rank,
    require_whole_layers,
    same,
    to_theirs,
)
from hvd_vgg.weights.source import network_flags

_FIRST = "features.0.weight"
_NORM = (("weight", GAMMA), ("bias", BETA), ("running_mean", MOVING_MEAN), ("running_var", MOVING_VARIANCE))
_COUNTER = "num_batches_tracked"  # of BatchNorm, which only counts
_TORCHVISION = {"classifier.0": DENSE[0], "classifier.3": DENSE[1], "classifier.6": DENSE[2]}
_TIMM = {"pre_logits.fc1": DENSE[0], "pre_logits.fc2": DENSE[1], "head.fc": DENSE[2]}


def is_torch(names: Mapping[str, object]) -> bool:
    """Whether tensors of these names are such a network's, maybe within another, as `module.` of DistributedDataParallel."""
    return any(name == _FIRST or name.endswith(f".{_FIRST}") for name in names)


def plan(shapes: Mapping[str, Shape]) -> Plan:
    """Returns what of tensors of these names and shapes makes which weight. Raises ValueError with what is wrong."""
    firsts = [name for name in shapes if name == _FIRST or name.endswith(f".{_FIRST}")]
    if len(firsts) != 1:
        raise ValueError(f"it has {len(firsts)} networks: {firsts[0]} and {firsts[1]}; expected one")
    prefix = firsts[0][: -len(_FIRST)]
    inner = {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}
    model = _model_of(inner)
    pieces: Dict[str, Piece] = {}
    for name, ours in feature_names(model).items():
        if name not in inner:
            raise ValueError(f"it has no {prefix}{name}, which torchvision's {model} has")
        is_kernel = ours.endswith("/kernel")
        pieces[ours] = convolution(name, inner[name]) if is_kernel else same(name, of_rank(name, inner[name], 1))
    by_timm = any(name.startswith(("pre_logits.", "head.fc.")) for name in inner)
    channels = pieces["block5_conv1/kernel"].ours[-1]
    for layer, ours in (_TIMM if by_timm else _TORCHVISION).items():
        kernel, bias = f"{layer}.weight", f"{layer}.bias"
        if kernel in inner:
            pieces[f"{ours}/kernel"] = dense(kernel, inner[kernel], channels if ours == DENSE[0] else 0)
        if bias in inner:
            pieces[f"{ours}/bias"] = same(bias, of_rank(bias, inner[bias], 1))
    require_whole_layers(pieces)
    used = {prefix + piece.name for piece in pieces.values()}
    unused = [name for name in shapes if name not in used and not name.endswith(f".{_COUNTER}")]
    named = {ours: piece._replace(name=prefix + piece.name) for ours, piece in pieces.items()}
    return Plan(f"{'timm' if by_timm else 'torchvision'}'s {model}", named, TORCH_IMAGES, unused)


def without_layers(found: Plan, layers: List[str]) -> Plan:
    """Returns a plan without some layers, whose tensors it does not use."""
    left = {name: piece for name, piece in found.pieces.items() if name.split("/")[0] not in layers}
    dropped = [piece.name for name, piece in found.pieces.items() if name not in left]
    return found._replace(pieces=left, unused=[*found.unused, *dropped])


def to_torchvision(tensors: Mapping[str, np.ndarray]) -> Dict[str, np.ndarray]:
    """Returns the weights and moments of a network, by this package's names, as torchvision's state dict, in its order.

    float32; num_batches_tracked is int64 0. Dense layers that are not there are left out. Raises ValueError where the
    weights are those of no VGG network, or of one that torchvision does not have (--head=pooled).
    """
    model = network_flags({name: tensor.shape for name, tensor in tensors.items()})["model"]
    kernels = [name for name in DENSE if f"{name}/kernel" in tensors]
    if kernels == [DENSE[-1]]:
        raise ValueError("torchvision's networks have fc1 and fc2 before the last layer: --head=pooled cannot be written so")
    names = dict(feature_names(model))
    for layer, ours in _TORCHVISION.items():
        if ours in kernels:
            names.update({f"{layer}.weight": f"{ours}/kernel", f"{layer}.bias": f"{ours}/bias"})
    channels = tensors["block5_conv1/kernel"].shape[-1]
    found: Dict[str, np.ndarray] = {}
    for name, ours in names.items():
        tensor = tensors[ours]
        piece, shape = _piece_of(name, ours, tensor.shape, channels)
        found[name] = to_theirs(piece, tensor, shape)
        if name.endswith(".running_var"):
            found[name.replace("running_var", _COUNTER)] = np.zeros((), np.int64)
    return found


def feature_names(model: str) -> Dict[str, str]:
    """Returns the names of torchvision's features, in its order, with this package's."""
    names, index = {}, 0
    for block, convs in enumerate(BLOCKS[model], 1):
        for conv in range(1, convs + 1):
            ours = f"block{block}_conv{conv}"
            names.update({f"features.{index}.weight": f"{ours}/kernel", f"features.{index}.bias": f"{ours}/bias"})
            index += 1
            if model.endswith("_bn"):
                names.update({f"features.{index}.{part}": f"{ours}/{our_part}" for part, our_part in _NORM})
                index += 1
            index += 1  # ReLU
        index += 1  # pooling
    return names


def _model_of(shapes: Mapping[str, Shape]) -> str:
    features = {name: shape for name, shape in shapes.items() if name.startswith("features.")}
    kernels = sum(name.endswith(".weight") and len(shape) == 4 for name, shape in features.items())
    normalized = any(name.endswith(".running_mean") for name in features)
    for model, blocks in BLOCKS.items():
        if sum(blocks) == kernels and model.endswith("_bn") == normalized:
            return model
    raise ValueError(f"it has {kernels} convolutions: expected the 8, 10, 13 or 16 of a VGG network")


def _piece_of(name: str, ours: str, shape: Shape, channels: int) -> Tuple[Piece, Shape]:
    """Returns the piece of a tensor that has `shape` here, and its shape in torchvision."""
    if len(shape) == 4:
        height, width, inputs, outputs = shape
        there: Shape = (outputs, inputs, height, width)
        return convolution(name, there), there
    if len(shape) == 2:
        there = (shape[1], shape[0])
        return dense(name, there, channels if ours == f"{DENSE[0]}/kernel" else 0), there
    return same(name, shape), shape
