"""What a file of weights holds, under this package's names and in its layouts. Needs no TensorFlow."""

import math
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Sequence, Tuple

import numpy as np

from hvd_vgg.config import BLOCKS, DENSE, FLATTENED, POOLED, ModelConfig
from hvd_vgg.models.architecture import GAMMA, layers_of

Shapes = Mapping[str, Tuple[int, ...]]


class Source(NamedTuple):
    """What a file of weights holds.

    kind: what it is, for people; tensors: float32, of whole layers, by this package's names (kernels of convolutions HWIO,
    of RGB images; rows of fc1's kernel in order of height, width, channel), with the moving moments of BatchNorm; flags: of
    the network that has them (`network_flags`) and of the images that it expects (pixel_normalization, resize, eval_crop);
    unused: names in the file that are nothing of a VGG network's; sha256: of the file.
    """

    path: Path
    kind: str
    tensors: Dict[str, np.ndarray]
    flags: Dict[str, Any]
    unused: Sequence[str]
    sha256: str


def network_flags(shapes: Shapes) -> Dict[str, Any]:
    """Returns the flags of `ModelConfig` of the network whose weights have these shapes, by this package's names.

    Of convolutions alone, or with any of the dense layers; what they leave open is left out. Raises ValueError where they
    are not those of a VGG network.
    """
    kernels = {name.split("/")[0]: shape for name, shape in shapes.items() if name.endswith("/kernel")}
    counts = tuple(sum(name.startswith(f"block{block}_") for name in kernels) for block in range(1, 6))
    normalized = any(name.endswith(f"/{GAMMA}") for name in shapes)
    models = [model for model, blocks in BLOCKS.items() if blocks == counts and model.endswith("_bn") == normalized]
    if not models:
        raise ValueError(f"its blocks have {', '.join(map(str, counts))} convolutions, which no VGG network has")
    flags: Dict[str, Any] = {"model": models[0], "width": kernels["block1_conv1"][-1] / 64}
    channels = kernels["block5_conv1"][-1]
    if DENSE[-1] in kernels:
        flags["num_classes"] = kernels[DENSE[-1]][-1]
        flags["head"] = FLATTENED if "fc1" in kernels else POOLED
    if "fc1" in kernels:
        flags["image_size"] = 32 * math.isqrt(kernels["fc1"][0] // channels)
    problem = find_misfit(shapes, flags)
    if problem:
        raise ValueError(problem)
    return flags


def find_misfit(shapes: Shapes, flags: Mapping[str, Any]) -> str:
    """Returns the first of `shapes` that the network of `flags` has in another shape, or not at all; "" where all fit."""
    expected = expected_shapes(ModelConfig(**flags))
    for name, shape in shapes.items():
        if tuple(shape) != expected.get(name):
            return f"{name} has the shape {list(shape)}, expected {list(expected.get(name, ())) or 'none'}"
    return ""


def expected_shapes(config: ModelConfig) -> Dict[str, Tuple[int, ...]]:
    """Returns the shape of each weight and moving moment of a network, by name."""
    return {
        name: layer.kernel if name.endswith("/kernel") else layer.kernel[-1:]
        for layer in layers_of(config)
        for name in (*layer.weights, *layer.moments)
    }


def layers_in(names: Iterable[str]) -> List[str]:
    """Returns the layers of variables of these names, each once, in their order."""
    return list(dict.fromkeys(name.split("/")[0] for name in names))
