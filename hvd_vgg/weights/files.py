"""Files of weights that others have written, read by what is in them. Nothing is unpickled."""

import hashlib
import stat
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np

from hvd_vgg import storage
from hvd_vgg.config import DENSE, ModelConfig
from hvd_vgg.errors import CONFIGURATION, Failure
from hvd_vgg.flags import validate
from hvd_vgg.models.architecture import MOVING_VARIANCE
from hvd_vgg.weights import hdf5, keras, safetensors_file, torch_file, torch_names
from hvd_vgg.weights.contents import Contents, file_reader, read_tensor, types_of
from hvd_vgg.weights.pieces import Plan, require_whole_layers, same, to_ours
from hvd_vgg.weights.source import Source, network_flags

_KNOWN = "expected weights of a VGG network: safetensors or .pth of torchvision or timm, .h5, .weights.h5 or .keras of Keras"
_LFS = b"version https://git-lfs"


def read_file(path: Path) -> Source:
    """Returns the weights in a file. Raises Failure(CONFIGURATION) with what is wrong with it."""
    try:
        contents, plan, flags = _examine(path)
        tensors = {}
        for name, piece in plan.pieces.items():
            tensor = read_tensor(contents, piece.name)
            if not np.isfinite(tensor).all():
                raise ValueError(f"{piece.name} holds NaN or Inf: no network computes anything with it")
            if name.endswith(f"/{MOVING_VARIANCE}") and (tensor < 0).any():
                raise ValueError(f"{piece.name} is negative: expected a variance")
            tensors[name] = to_ours(piece, tensor)
        kind = f"{plan.kind} ({', '.join([contents.form, *types_of(contents, [p.name for p in plan.pieces.values()])])})"
        return Source(path, kind, tensors, flags, plan.unused, storage.retrying(path, lambda: _digest(path)))
    except (ValueError, OSError, MemoryError) as error:
        raise _failure(path, error) from error


def read_file_flags(path: Path) -> Dict[str, Any]:
    """Returns `Source.flags` of what `read_file` reads, from names and shapes alone. Raises Failure(CONFIGURATION)."""
    try:
        return _examine(path)[2]
    except (ValueError, OSError, MemoryError) as error:
        raise _failure(path, error) from error


def _failure(path: Path, error: Exception) -> Failure:
    if isinstance(error, OSError):
        return Failure(CONFIGURATION, f"{path} cannot be read: {error.strerror or error}")
    return Failure(CONFIGURATION, f"{path}: {error or 'there is too little memory for it'}")


def _examine(path: Path) -> Tuple[Contents, Plan, Dict[str, Any]]:
    """Returns what is in a file, which of it is used for what, and the flags. Raises ValueError and OSError."""
    contents = _contents(path)
    shapes = {name: entry.shape for name, entry in contents.entries.items()}
    if contents.layers:
        plan = keras.plan(shapes, contents.layers)
    elif torch_names.is_torch(shapes):
        plan = torch_names.plan(shapes)
        nameless = _without_values(contents, plan)
        if nameless:
            plan = torch_names.without_layers(plan, nameless)
            plan = plan._replace(images={**plan.images, "pixel_normalization": "caffe_rounded"})
    elif any(name.startswith("block1_conv1/") for name in shapes):
        pieces = {name: same(name, shape) for name, shape in shapes.items()}
        require_whole_layers(pieces)
        plan = Plan("weights of hvd_vgg", pieces, {}, [])
    else:
        held = ", ".join(list(shapes)[:3]) or "none"
        raise ValueError(f"no network of it is known; its tensors are {held} ({len(shapes)} in all); {_KNOWN}")
    used = {name: piece.ours for name, piece in plan.pieces.items()}
    try:
        network = network_flags(used)
    except (LookupError, ArithmeticError) as error:
        raise ValueError("its shapes are those of no VGG network") from error
    errors = validate(ModelConfig(**network))
    if errors:
        raise ValueError(f"its network is none that can be built: {errors[0]}")
    if plan.kind.startswith("Keras"):
        plan = plan._replace(kind=f"Keras' {network['model']}")
    return contents, plan, {**network, **plan.images}


def _contents(path: Path) -> Contents:
    """Returns what is in a file, by how it begins. Raises ValueError and OSError."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"it is no file; {_KNOWN}")
    read, size = file_reader(path), path.stat().st_size
    head = read(0, 32)
    if not head:
        raise ValueError(f"it is empty; {_KNOWN}")
    if head.startswith(hdf5.SIGNATURE):
        return hdf5.read_contents(path, 0, size)
    if head.startswith(b"PK"):
        return _archive(path)
    if head.startswith(torch_file.PICKLE):
        return torch_file.read_contents(path)
    if head.startswith(_LFS):
        raise ValueError("it is a pointer of Git LFS, not the file itself: fetch that by `git lfs pull`")
    if safetensors_file.is_safetensors(head[:9], size):
        return safetensors_file.read_contents(read, size)
    raise ValueError(f"it is cut short, damaged, or of another kind; {_KNOWN}")


def _archive(path: Path) -> Contents:
    if any(info.filename.endswith("data.pkl") for info in hdf5.archive_members(path)):
        torch_file.require_checksums(path)
        return torch_file.read_contents(path)
    return hdf5.read_contents(path, *hdf5.member_bounds(path))


def _without_values(contents: Contents, plan: Plan) -> List[str]:
    """Returns the dense layers without values: torchvision's VGG16_Weights.IMAGENET1K_FEATURES has NaN in their place."""
    found = [layer for layer in DENSE if f"{layer}/bias" in plan.pieces]
    return [layer for layer in found if np.isnan(read_tensor(contents, plan.pieces[f"{layer}/bias"].name)).all()]


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(2**24), b""):
            digest.update(block)
    return digest.hexdigest()
