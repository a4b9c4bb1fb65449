"""How tensors of others become this package's and back, exactly: by reshaping and transposing. Needs no TensorFlow."""

import math
from typing import Any, Dict, Mapping, NamedTuple, Sequence, Tuple

import numpy as np

from hvd_vgg.config import BLOCKS

Shape = Tuple[int, ...]
# What torchvision and timm, and keras.applications, expect of images: how their published figures were measured.
TORCH_IMAGES: Mapping[str, Any] = {
    "pixel_normalization": "imagenet",
    "resize": "pillow",
    "augment": "crop",
    "eval_crop": 0.875,
}
KERAS_IMAGES: Mapping[str, Any] = {**TORCH_IMAGES, "pixel_normalization": "caffe", "resize": "opencv"}


class Piece(NamedTuple):
    """A tensor of others, by its name there.

    split: the shape to which it is reshaped first; axes: the order of its axes here; ours: its shape here; bgr: its input
    axis, the third here, is blue, green, red there.
    """

    name: str
    split: Shape
    axes: Tuple[int, ...]
    ours: Shape
    bgr: bool = False


class Plan(NamedTuple):
    """kind: of network and of file, for people; pieces: by the names of this package; images: flags of what it expects of
    them; unused: names in the file that are nothing of a VGG network's."""

    kind: str
    pieces: Dict[str, Piece]
    images: Mapping[str, Any]
    unused: Sequence[str]


def same(name: str, shape: Shape, bgr: bool = False) -> Piece:
    """Returns the piece of a tensor whose layout is this package's."""
    return Piece(name, shape, tuple(range(len(shape))), shape, bgr)


def convolution(name: str, shape: Shape) -> Piece:
    """Returns the piece of a kernel [outputs, inputs, height, width]. Raises ValueError."""
    outputs, inputs, height, width = of_rank(name, shape, 4)
    return Piece(name, shape, (2, 3, 1, 0), (height, width, inputs, outputs))


def dense(name: str, shape: Shape, channels: int = 0) -> Piece:
    """Returns the piece of a kernel [outputs, inputs], or of a convolution [outputs, channels, height, width] in its place.

    channels: of the feature map whose numbers are the inputs, in order of channel, height, width; 0: they are none. Raises
    ValueError.
    """
    if len(shape) not in (2, 4):
        raise ValueError(f"{name} has the shape {list(shape)}: expected 2 axes, or 4 of a convolution")
    outputs, inputs = shape[0], math.prod(shape[1:])
    if not channels:
        return Piece(name, (outputs, inputs), (1, 0), (inputs, outputs))
    side = math.isqrt(inputs // channels)
    if inputs != channels * side * side:
        raise ValueError(f"{name} has {inputs} inputs: expected those of a square feature map of {channels} channels")
    return Piece(name, (outputs, channels, side, side), (2, 3, 1, 0), (inputs, outputs))


def of_rank(name: str, shape: Shape, rank: int) -> Shape:
    """Returns the shape; raises ValueError where it has not so many axes."""
    if len(shape) != rank:
        raise ValueError(f"{name} has the shape {list(shape)}: expected {rank} axes")
    return shape


def to_ours(piece: Piece, tensor: np.ndarray) -> np.ndarray:
    """Returns a tensor of others as this package has it."""
    found = tensor.reshape(piece.split).transpose(piece.axes).reshape(piece.ours)
    return np.ascontiguousarray(found[:, :, ::-1] if piece.bgr else found)


def to_theirs(piece: Piece, tensor: np.ndarray, shape: Shape) -> np.ndarray:
    """Returns a tensor of this package as others have it, in the shape that it has there: the inverse of `to_ours`."""
    there = tensor[:, :, ::-1] if piece.bgr else tensor
    there = there.reshape([piece.split[axis] for axis in piece.axes])
    return np.ascontiguousarray(there.transpose(np.argsort(piece.axes)).reshape(shape))


def convolution_names(count: int) -> Sequence[str]:
    """Returns the names of the convolutions of the network that has `count` of them. Raises ValueError."""
    for blocks in BLOCKS.values():
        if sum(blocks) == count:
            return [f"block{block}_conv{conv}" for block, convs in enumerate(blocks, 1) for conv in range(1, convs + 1)]
    raise ValueError(f"it has {count} convolutions of 3 by 3: expected the 8, 10, 13 or 16 of a VGG network")


def require_whole_layers(pieces: Mapping[str, Piece]) -> None:
    """Raises ValueError where a layer has a kernel without a bias, or the reverse."""
    for name in (f"{layer}/{part}" for layer in {each.split("/")[0] for each in pieces} for part in ("kernel", "bias")):
        if name not in pieces:
            raise ValueError(f"it has only a part of {name.split('/')[0]}: its {name.split('/')[1]} is missing")
