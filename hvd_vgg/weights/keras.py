"""The weights of Keras' VGG networks: what its layers are here, and the legacy file that all its versions load."""

import re
from pathlib import Path
from typing import Dict, List, Mapping, Sequence, Tuple

import numpy as np

from hvd_vgg.config import BLOCKS, DENSE
from hvd_vgg.errors import CONFIGURATION, Failure
from hvd_vgg.weights.pieces import KERAS_IMAGES, Piece, Plan, Shape, convolution_names, same
from hvd_vgg.weights.source import network_flags

_CONVOLUTION = re.compile(r"block[1-5]_conv[1-4](?!\d)")


def plan(shapes: Mapping[str, Shape], layers: Sequence[Tuple[str, Sequence[str]]]) -> Plan:
    """Returns what of tensors of these names and shapes makes which weight.

    layers: of `Contents`, in order; what is no convolution of 3 by 3, and no dense layer of such a network, is unused.
    Convolutions go by their names where all have those of keras.applications, else by their order. Raises ValueError with
    what is wrong.
    """
    convolutions: List[Tuple[str, Sequence[str]]] = []
    dense: List[Sequence[str]] = []
    for label, names in layers:
        ranks = [len(shapes[name]) for name in names]
        is_convolution = ranks[:1] == [4] and shapes[names[0]][:2] == (3, 3)
        if ranks[:4] == [1] * 4 or (is_convolution and len(names) > 2):
            raise ValueError(f"{names[-1]} is a weight of BatchNorm or of something else that Keras' VGG does not have")
        if (is_convolution or ranks[:1] == [2]) and ranks[1:] != [1]:
            raise ValueError(f"{names[0]} has no bias beside it")
        if is_convolution:
            convolutions.append((label, names))
        elif ranks[:1] == [2]:
            dense.append(names)
    expected = convolution_names(len(convolutions))
    found = [match.group() if match else "" for match in (_CONVOLUTION.search(label) for label, _ in convolutions)]
    ours: Dict[str, Sequence[str]] = {
        layer: names for layer, (_, names) in zip(found if sorted(found) == sorted(expected) else expected, convolutions)
    }
    channels = shapes[ours[expected[-1]][0]][-1]
    if len(dense) == len(DENSE):
        ours.update(zip(DENSE, dense))
    elif len(dense) == 1 and shapes[dense[0][0]][0] == channels:
        ours[DENSE[-1]] = dense[0]
    pieces: Dict[str, Piece] = {}
    for layer in [*expected, *DENSE]:
        for part, name in zip(("kernel", "bias"), ours.get(layer, ())):
            pieces[f"{layer}/{part}"] = same(name, shapes[name], f"{layer}/{part}" == "block1_conv1/kernel")
    used = {piece.name for piece in pieces.values()}
    unused = [name for name in shapes if name not in used]
    left = [name for name in unused for part in name.split("/") if part in DENSE]
    if len({part for name in left for part in name.split("/") if part in DENSE}) == len(DENSE):
        raise ValueError(f"{left[0]} and the other dense layers have shapes that they have in no VGG network: it is damaged")
    return Plan("Keras' network", pieces, KERAS_IMAGES, unused)


def to_keras_h5(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Writes weights as the legacy .h5 that keras.applications' VGG16 and VGG19 of Keras 2 and 3 load: `weights=path`.

    tensors: by this package's names, without BatchNorm (`models.batch_norm.fold`), of RGB images; the first convolution is
    written for BGR, as Keras has it. Raises ValueError where they are those of no such network, Failure(CONFIGURATION)
    without h5py, and OSError.
    """
    try:
        import h5py
    except ImportError as error:
        raise Failure(CONFIGURATION, f"HDF5 is written by h5py, which cannot be imported ({error}): install h5py") from error
    model = network_flags({name: tensor.shape for name, tensor in tensors.items()})["model"]
    if model.endswith("_bn"):
        raise ValueError("Keras' networks have no BatchNorm: it must be folded into the convolutions")
    with h5py.File(path, "w") as file:
        layers = _all_layers(model, [name for name in DENSE if f"{name}/kernel" in tensors])
        file.attrs["layer_names"] = [layer.encode() for layer in layers]
        file.attrs["backend"], file.attrs["keras_version"] = b"tensorflow", b"2.16.0"
        for layer in layers:
            group = file.create_group(layer)
            parts = [part for part in ("kernel", "bias") if f"{layer}/{part}" in tensors]
            group.attrs["weight_names"] = [f"{layer}/{part}:0".encode() for part in parts]
            for part in parts:
                tensor = np.asarray(tensors[f"{layer}/{part}"], np.float32)
                flipped = tensor[:, :, ::-1] if (layer, part) == ("block1_conv1", "kernel") else tensor
                group.create_dataset(f"{layer}/{part}:0", data=np.ascontiguousarray(flipped))


def _all_layers(model: str, dense: Sequence[str]) -> List[str]:
    """Returns the names of all layers of Keras' network, those without weights too, in order."""
    layers: List[str] = ["input_1"]
    for block, convs in enumerate(BLOCKS[model], 1):
        layers += [f"block{block}_conv{conv}" for conv in range(1, convs + 1)] + [f"block{block}_pool"]
    return [*layers, *(["flatten"] if dense else []), *dense]
