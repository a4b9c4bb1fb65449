"""Weights from a file or from a run, for --init_from, evaluation, prediction and export. Needs no TensorFlow."""

import json
import shlex
import struct
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

import numpy as np

from hvd_vgg.config import FLATTENED, EvaluationImageConfig, ImageConfig, ModelConfig
from hvd_vgg.data.manifest import file_sha256
from hvd_vgg.errors import CONFIGURATION, USAGE, Failure
from hvd_vgg.flags import format_value, validate
from hvd_vgg.models.pixels import NORMALIZATIONS
from hvd_vgg.run_dir import RunDir
from hvd_vgg.training import checkpoint
from hvd_vgg.weights.files import read_file, read_file_flags
from hvd_vgg.weights.source import Source, expected_shapes

NETWORK_FLAGS = ("model", "width", "num_classes", "image_size", "head")
_IMAGE_FLAGS = ("pixel_normalization", "resize", "augment")


def read_weights(path: Path, average: bool = False) -> Source:
    """Returns the weights in a file, or of the best checkpoint of a run's directory; average: their moving average instead.

    Files are this package's checkpoints and exports, or those of `weights.files`. Raises Failure(CONFIGURATION) with what is
    wrong.
    """
    path = file_of(path, average)
    meta = own_meta(path)
    if meta is None and average:
        raise Failure(CONFIGURATION, f"{path} is no checkpoint of a run with --ema_decay: it holds no average of weights")
    if meta is None:
        return read_file(path)
    flags = _flags_of(meta, path)
    names = expected_shapes(ModelConfig(**{name: flags[name] for name in NETWORK_FLAGS}))
    try:
        found = checkpoint.load(path)
        kept = checkpoint.averaged(found.tensors, names) if average else {name: found.tensors[name] for name in names}
    except ValueError as error:
        raise Failure(CONFIGURATION, f"{path}: {error}") from error
    except KeyError as error:
        what = "no average of its weights: the run has no --ema_decay" if average else f"no {error.args[0]}"
        raise Failure(CONFIGURATION, f"{path} holds {what}") from error
    wrong = [name for name, tensor in kept.items() if tensor.dtype != np.float32 or tensor.shape != names[name]]
    if wrong:
        found_as = f"{kept[wrong[0]].dtype} {list(kept[wrong[0]].shape)}"
        raise Failure(CONFIGURATION, f"{path}: {wrong[0]} is {found_as}, expected float32 {list(names[wrong[0]])}")
    return Source(path, _kind_of(meta), kept, flags, [], file_sha256(path))


def _kind_of(meta: Mapping[str, Any]) -> str:
    exported = exported_of(meta)
    if not exported:
        return f"checkpoint of step {meta.get('step')}"
    of = exported.get("of")
    average = ", the average of its weights" if exported.get("average") is True else ""
    return f"export of {' '.join(of.split())[:200]}{average}" if isinstance(of, str) else f"export{average}"


def exported_of(meta: Mapping[str, Any]) -> Dict[str, Any]:
    """Returns what a file that `hvd-vgg export` wrote says of where it is from; {} of other files."""
    found = meta.get("exported")
    return found if isinstance(found, dict) else {}


def read_flags(path: Path) -> Dict[str, Any]:
    """Returns `Source.flags` of what `read_weights` reads, from names and shapes alone. Raises Failure(CONFIGURATION)."""
    path = file_of(path)
    meta = own_meta(path)
    return read_file_flags(path) if meta is None else _flags_of(meta, path)


def file_of(path: Path, average: bool = False) -> Path:
    """Returns the file that is meant: itself, or the best checkpoint of the run in a directory."""
    if not path.is_dir():
        return path
    found = checkpoint.best(RunDir(path), checkpoint.BEST_AVERAGE if average else checkpoint.BEST)
    if found is None:
        which = "best checkpoint of an average" if average else "best checkpoint"
        raise Failure(CONFIGURATION, f"{path} has no {which}: expected a file of weights, or a run that was evaluated")
    return found


def run_of(path: Path) -> Dict[str, Any]:
    """Returns `run` of a checkpoint's metadata; {} where the file is no checkpoint of this package."""
    run = (own_meta(path) or {}).get("run")
    return run if isinstance(run, dict) else {}


def own_meta(path: Path) -> Optional[Dict[str, Any]]:
    """Returns what a file of this package says of itself; None of others. Raises Failure(CONFIGURATION)."""
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            header = file.read(length) if length <= checkpoint.MOST_HEADER_BYTES else b""
        found = json.loads(json.loads(header)["__metadata__"][checkpoint.META_KEY])
    except OSError as error:
        raise Failure(CONFIGURATION, f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _flags_of(meta: Dict[str, Any], path: Path) -> Dict[str, Any]:
    run = meta.get("run")
    names = (*NETWORK_FLAGS, *_IMAGE_FLAGS)
    missing = [name for name in names if name not in run] if isinstance(run, dict) else ["run"]
    if missing:
        raise Failure(CONFIGURATION, f"{path} is of another version of hvd_vgg: it does not say {missing[0]}")
    flags = {**{name: run[name] for name in names}, "eval_crop": meta.get("eval_crop", 0.875)}  # type: ignore[index]
    errors = validate(EvaluationImageConfig(**flags))
    if errors:
        raise Failure(CONFIGURATION, f"{path} is damaged, or not what this package writes: {errors[0]}")
    return flags


def require_classes(found: Mapping[str, Any], path: Path) -> None:
    """Raises Failure(CONFIGURATION) where flags of `read_flags` are of convolutions alone, which score no classes."""
    if "num_classes" not in found:
        raise Failure(
            CONFIGURATION,
            f"{path} holds no layer that scores classes: begin a run with its weights by hvd-vgg train "
            f"--init_from={shlex.quote(str(path))}, and evaluate that",
        )


def require_own_flags(config: ImageConfig, found: Mapping[str, Any], path: Path) -> None:
    """Raises Failure(USAGE) listing the flags of the network, or of its pixels, that are not those of its weights.

    found: of `read_flags`. What resizes and crops an image may be another.
    """
    names = [name for name in NETWORK_FLAGS if name in found and (name != "image_size" or found.get("head") == FLATTENED)]
    wrong = [name for name in names if getattr(config, name) != found[name]]
    own = found.get("pixel_normalization", config.pixel_normalization)
    if NORMALIZATIONS.get(str(own)) != NORMALIZATIONS[config.pixel_normalization]:
        wrong.append("pixel_normalization")
    if wrong:
        lines = [f"  --{name}={format_value(getattr(config, name))}: it has {format_value(found[name])}" for name in wrong]
        size = "\nFor images of another size: --eval_size" if "image_size" in wrong else ""
        raise Failure(USAGE, "\n".join([f"flags that are not those of {path}; leave them out:", *lines]) + size)
