"""The network to export: its weights, what it expects of images, and where it comes from."""

import contextlib
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

import numpy as np

from hvd_vgg.config import DENSE, ModelConfig, TrainConfig, has_batch_norm
from hvd_vgg.errors import CONFIGURATION, Failure
from hvd_vgg.flags import parse_flags
from hvd_vgg.models import batch_norm, vgg
from hvd_vgg.reporting import receipt
from hvd_vgg.run_dir import RunDir
from hvd_vgg.training.names import known_names
from hvd_vgg.training.weights import NETWORK_FLAGS, exported_of, own_meta, read_weights
from hvd_vgg.weights.source import Source


class Evaluated(NamedTuple):
    """A run's evaluation of a network: top-1 hits, top-5 hits, records; flags: of its process, {} where unknown."""

    top1: int
    top5: int
    records: int
    flags: Dict[str, Any]


class Network(NamedTuple):
    """A network to export.

    config: its shapes; tensors: float32, by this package's names, with the moving moments of BatchNorm; normalization: of
    its pixels, one of NORMALIZATIONS; resize, crop: of the images that it is evaluated on, as in `transforms.eval_image`;
    class_names: in order of the labels, none where unknown; meta: what a checkpoint of this package says of itself;
    run_dir: the run that it is of, if any; average: whether it is the average of its weights.
    """

    source: Source
    config: ModelConfig
    tensors: Dict[str, np.ndarray]
    normalization: str
    resize: str
    crop: float
    class_names: List[str]
    meta: Dict[str, Any]
    run_dir: Optional[Path]
    average: bool

    @property
    def state_sha256(self) -> Optional[str]:
        """The digest of the state of the run that trained it; of an export, that of the run that was exported, if any."""
        exported = exported_of(self.meta)
        found = exported.get("from_state_sha256") if exported else self.meta.get("state_sha256")
        return found if isinstance(found, str) else None

    def evaluation(self) -> Optional[Evaluated]:
        """Returns the run's evaluation of these weights, if its receipt has one."""
        if self.run_dir is None or self.state_sha256 is None:
            return None
        run = RunDir(self.run_dir)
        names = [f"eval.{'average_' * self.average}{name}" for name in ("top1_hits", "top5_hits")] + ["eval.records"]
        for row in reversed((receipt.read(run) or {}).get("evaluations", [])):
            if row.get("eval.state_sha256") == self.state_sha256 and None not in map(row.get, names):
                return Evaluated(row[names[0]], row[names[1]], row[names[2]], _flags_of_evaluation(run, row))
        return None

    def run_flags(self) -> Optional[TrainConfig]:
        """Returns the flags of the run that the network is of; None where there is none, or it is of another version."""
        path = RunDir(self.run_dir).flags if self.run_dir else None
        if path is None or not path.is_file():
            return None
        with contextlib.suppress(Failure):
            return parse_flags(TrainConfig, [f"--flagfile={path}"])
        return None


def _flags_of_evaluation(run: RunDir, row: Dict[str, Any]) -> Dict[str, Any]:
    """Returns the flags of the process that made an evaluation of the receipt: flags.txt may be a later one's."""
    flags: Dict[str, Any] = {}
    for line in receipt.read_log(run.log):
        if line.number == row.get("line"):
            return flags if line.data.get("eval.state_sha256") == row["eval.state_sha256"] else {}
        if line.kind in ("METADATA", "PARAMETER"):  # the former begin what a process logs
            flags = line.data if line.kind == "PARAMETER" else {}
    return {}


def load(path: Path, average: bool) -> Network:
    """Returns the network in a file of weights, or of the best checkpoint of a run's directory.

    average: the moving average of its weights instead. Raises Failure(CONFIGURATION) where `read_weights` does, and where
    what is there is no whole network.
    """
    source = read_weights(path, average)
    flags, meta = source.flags, own_meta(source.path) or {}
    missing = [name for name in NETWORK_FLAGS if name not in flags]
    if missing or f"{DENSE[-1]}/kernel" not in source.tensors:
        raise Failure(CONFIGURATION, f"{source.path} holds no whole network: expected all layers up to {DENSE[-1]}")
    run_dir = path if path.is_dir() else source.path.parent.parent if source.path.parent.name == "checkpoints" else None
    normalization = flags.get("pixel_normalization", "auto")
    crop = float(flags.get("eval_crop", 0.875)) if flags.get("augment", "crop") == "crop" else 0.0
    config = ModelConfig(**{name: flags[name] for name in NETWORK_FLAGS})
    return Network(
        source,
        config,
        source.tensors,
        "imagenet" if normalization == "auto" else normalization,
        flags.get("resize", "opencv"),
        crop,
        known_names(path, config.num_classes),
        meta,
        run_dir,
        average or exported_of(meta).get("average") is True,
    )


def folded(network: Network) -> Network:
    """Returns the network without BatchNorm that has the same outputs; a network without it is returned as it is."""
    if not has_batch_norm(network.config.model):
        return network
    tensors = {name: np.asarray(value) for name, value in batch_norm.fold(network.tensors).items()}
    model = network.config.model[: -len("_bn")]
    config = ModelConfig(**{name: getattr(network.config, name) for name in NETWORK_FLAGS if name != "model"}, model=model)
    return network._replace(config=config, tensors=tensors)


def reference_logits(network: Network, pixels: np.ndarray) -> np.ndarray:
    """Returns the logits, float32 [n, num_classes], that this package computes for uint8 images [n, height, width, 3]."""
    weights, model = batch_norm.fold(network.tensors), network.config.model
    rows = [vgg.logits(weights, model, pixels[row : row + 1], "NHWC", network.normalization) for row in range(len(pixels))]
    return np.concatenate([np.asarray(row) for row in rows])
