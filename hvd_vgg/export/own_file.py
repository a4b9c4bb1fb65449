"""This package's own form: a checkpoint's weights without what continues a run, for --init_from, evaluation and export."""

from pathlib import Path
from typing import Any, Dict

import numpy as np

from hvd_vgg import __version__
from hvd_vgg.errors import NOT_WRITTEN, Failure
from hvd_vgg.export.network import Network
from hvd_vgg.training import checkpoint
from hvd_vgg.training.weights import exported_of, read_weights


def write(network: Network, path: Path) -> None:
    """Writes the file; raises OSError. It says what a checkpoint says of the network, its images and its run."""
    meta, source = network.meta, network.source
    run = {"augment": source.flags.get("augment", "crop"), **meta.get("run", {})}  # others' files name no run
    run.update({name: getattr(network.config, name) for name in ("model", "width", "num_classes", "image_size", "head")})
    run.update(pixel_normalization=network.normalization, resize=network.resize)
    kept: Dict[str, Any] = {name: meta[name] for name in ("format", "data_format", "arithmetic") if name in meta}
    kept.update(step=meta.get("step", 0), run=run, eval_crop=source.flags.get("eval_crop", 0.875))
    kept["exported"] = {
        "by": f"hvd_vgg {__version__}",
        "from_sha256": source.sha256,
        "from_state_sha256": network.state_sha256,
        "of": exported_of(meta).get("of", source.kind),
        "average": network.average,
    }
    if network.class_names:
        kept["class_names"] = network.class_names
    checkpoint.write(path, network.tensors, kept)


def run(path: Path, network: Network) -> Dict[str, np.ndarray]:
    """Returns the tensors in the file; raises Failure(NOT_WRITTEN) where they are not those of `network`, to the bit."""
    found = read_weights(path)
    same = {name: np.array_equal(value, found.tensors.get(name, ())) for name, value in network.tensors.items()}
    if not all(same.values()) or set(found.tensors) != set(same):
        raise Failure(NOT_WRITTEN, f"{path}: what was read back is not what was written")
    return found.tensors
