"""Whether an export computes what this package does: images to run it on, its own runtime, the difference of logits."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

import numpy as np
import tensorflow as tf

from hvd_vgg.config import DataConfig
from hvd_vgg.data.formats.layout import find_split
from hvd_vgg.data.index import join, scan_shard
from hvd_vgg.data.reader import BadRecord, read_image
from hvd_vgg.data.transforms import eval_image
from hvd_vgg.environment import environment_of_job
from hvd_vgg.errors import CONFIGURATION, DATA, NOT_WRITTEN, Failure
from hvd_vgg.export.network import Network
from hvd_vgg.models.pixels import NORMALIZATIONS
from hvd_vgg.text import plural

LIMIT = 1e-4  # of the difference of logits, relative to the largest of an image


class Images(NamedTuple):
    """Images to run networks on: uint8 [n, size, size, 3], the encoded images that they are of, and whose they are."""

    pixels: np.ndarray
    encoded: List[bytes]
    of: str


class Ran(NamedTuple):
    """What came of running an export: the logits by library (with its version), and the modules that are missing."""

    logits: Dict[str, np.ndarray]
    missing: List[str]


def relative_difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Returns the largest difference of an image's logits relative to its largest; infinite where one is not finite."""
    if found.shape != expected.shape or not np.isfinite(found).all() or not np.isfinite(expected).all():
        return float("inf")
    scale = np.maximum(np.abs(expected).max(axis=1), np.finfo(np.float32).tiny)
    return float((np.abs(found.astype(np.float64) - expected).max(axis=1) / scale).max())


def choose_images(network: Network, data_dir: str, count: int) -> Images:
    """Returns `count` images: validation records of `data_dir`, or of the network's run, as they are evaluated.

    Those of `data_dir` are read by the run's other flags of data, if any. Where the run's cannot be read, or there are none,
    drawn ones. Raises Failure(DATA) where those of `data_dir` cannot be read.
    """
    flags = network.run_flags()
    fields = [field.name for field in dataclasses.fields(DataConfig)] if flags else []
    own = DataConfig(**{name: getattr(flags, name) for name in fields})
    if data_dir:
        return _records(network, dataclasses.replace(own, data_dir=data_dir), count)
    why = "there is no run whose --data_dir is known"
    if flags is not None:
        try:
            return _records(network, own, count)
        except Failure as failure:
            why = failure.message.splitlines()[0]
    encoded = [_draw(seed) for seed in range(count)]
    return Images(_evaluated(network, encoded), encoded, f"{plural(count, 'drawn picture')} ({why})")


def _records(network: Network, config: DataConfig, count: int) -> Images:
    layout, paths = find_split(config, "validation")
    shards: List[Any] = []
    while len(shards) < len(paths) and sum(len(shard.offsets) for shard in shards) < count:
        shards.append(scan_shard(paths[len(shards)], layout))
    index = join(paths[: len(shards)], shards, layout)
    encoded: List[bytes] = []
    rows: List[np.ndarray] = []
    for record in range(index.records):
        if len(rows) == count:
            break
        try:
            image = read_image(index, record)[0]
            rows.append(_evaluated(network, [image])[0])
        except (BadRecord, ValueError):
            continue
        encoded.append(image)
    if not rows:
        raise Failure(DATA, f"{config.data_dir}: no validation record can be read")
    return Images(np.stack(rows), encoded, f"{plural(len(rows), 'validation record')} of {config.data_dir}")


def _evaluated(network: Network, encoded: List[bytes]) -> np.ndarray:
    size = network.config.image_size
    pixels = np.empty([len(encoded), size, size, 3], np.uint8)
    for each, out in zip(encoded, pixels):
        eval_image(each, network.crop, network.resize, out)
    return pixels


def _draw(seed: int) -> bytes:
    """Returns a JPEG of coloured blocks with noise."""
    random = np.random.Generator(np.random.Philox(seed))
    blocks = np.kron(random.uniform(0, 200, (6, 8, 3)), np.ones((48, 48, 1)))
    return bytes(tf.io.encode_jpeg((blocks + random.uniform(0, 55, blocks.shape)).astype(np.uint8)).numpy())


def run_elsewhere(
    kind: str, network: Network, path: Path, scratch: Path, python: str, pixels: Optional[np.ndarray], **more: str
) -> Ran:
    """Returns what an export's own libraries make of it, in a process of the interpreter `python`, or of this one's.

    kind: as in `runtimes.RUNS`. Raises Failure(CONFIGURATION) where that interpreter cannot be run, and
    Failure(NOT_WRITTEN) where a library refuses the file.
    """
    mean, deviation = NORMALIZATIONS[network.normalization]
    request: Dict[str, Any] = {"kind": kind, "path": str(path), "normalization": network.normalization, **more}
    request.update(dataclasses.asdict(network.config), mean=mean, deviation=deviation)
    if pixels is not None:
        request["images"] = str(scratch / "pixels.npy")
        np.save(request["images"], pixels)
    asked = scratch / f"{kind}.json"
    asked.write_text(json.dumps(request), encoding="utf-8")
    environment = {**environment_of_job(os.environ), "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "2"}
    if python:
        environment = {name: value for name, value in environment.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    command = [python or sys.executable, str(Path(__file__).with_name("runtimes.py")), str(asked)]
    try:
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")  # noqa: S603
    except OSError as error:
        raise Failure(CONFIGURATION, f"--check_python={python} cannot be run: {error.strerror}") from error
    lines = ended.stdout.strip().splitlines()
    if ended.returncode or not lines:
        reason = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
        code = CONFIGURATION if "ModuleNotFoundError" in reason else NOT_WRITTEN
        raise Failure(code, f"the export cannot be run by {command[0]}: {reason}")
    found = json.loads(lines[-1])
    logits = {}
    for label, file in found["done"].items():
        logits[label] = np.load(file, allow_pickle=False) if pixels is not None else np.zeros(0)
    return Ran(logits, found["missing"])
