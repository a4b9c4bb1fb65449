"""Whether every bit can be promised here: what decides the bits of a micro-batch, and a check of it at the start."""

import functools
import hashlib
import os
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List

import numpy as np
import tensorflow as tf

from hvd_vgg.config import BITS, ROUNDING, TrainConfig
from hvd_vgg.data.transforms import augmentation_params, image_library, train_image
from hvd_vgg.errors import CONFIGURATION, Failure
from hvd_vgg.parallel import comm, fixed_point
from hvd_vgg.parallel.init import Device
from hvd_vgg.provenance import instruction_sets, processor_name
from hvd_vgg.training.backward import step_keys
from hvd_vgg.training.state import State
from hvd_vgg.training.sums import Sums

# Gradients of a mean loss are far below 2^0, and most of them far above a unit of this limit. So are moments and 2^10.
_EXPONENT, _EXPONENT_OF_MOMENTS = 0, 10
# What else makes the same device compute otherwise.
_VARIABLES = ("TF_ENABLE_ONEDNN_OPTS", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "NVIDIA_TF32_OVERRIDE", "XLA_FLAGS")


def describe_arithmetic(device: Device, resize: str) -> Dict[str, str]:
    """Returns what decides, beside the configuration, in which bits this rank computes; for records and comparisons.

    resize: of `ImageConfig`.
    """
    name = ""
    if device.kind == "GPU":
        details = tf.config.experimental.get_device_details(tf.config.get_visible_devices("GPU")[0])
        name = str(details.get("device_name", ""))
    return {
        "device": name or device.kind,
        "processor": processor_name(Path("/")),
        "instructions": instruction_sets(Path("/")),
        "threads": str(device.threads),
        "tensorflow": tf.__version__,
        "numpy": np.__version__,
        "images": image_library(resize),
        **{name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def check_bits(
    local_sums: Callable[..., Sums], eval_step: Callable[..., Any], state: State, config: TrainConfig, device: Device
) -> None:
    """Decodes an image and computes micro-batches of random ones on every rank, alone, together and again. Collective.

    local_sums: of `make_local_sums` for `state`. Raises a collective Failure(CONFIGURATION) unless every bit is the same in
    each way and on all ranks.
    """
    count, random = min(config.device_batch, config.global_batch), np.random.default_rng(config.seed)
    images = random.integers(0, 256, (2 * count, config.image_size, config.image_size, 3), np.uint8)
    labels = random.integers(0, config.num_classes, 2 * count).astype(np.int32)
    (params,) = augmentation_params(np.ones((1, 2), np.int64), config)
    train_image(tf.io.encode_jpeg(images[0]).numpy(), params, config, images[0])
    keys = tf.constant(step_keys(config, 0))
    weights, moments = fixed_point.limits_of(_EXPONENT, len(state.weights)), len(state.moments)
    limits = tf.concat([weights, fixed_point.limits_of(_EXPONENT_OF_MOMENTS, moments)], 0)
    send = tf.constant(False)

    def compute(low: int, high: int) -> List[np.ndarray]:
        part = tf.constant(images[low:high]), tf.constant(labels[low:high])
        sums = local_sums(*part, tf.constant(low, tf.int64), keys, limits, send)
        return [each.numpy() for each in (*sums.totals, sums.losses, *sums.inputs, *sums.output_gradients)]

    def joined(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return first + second if first.dtype.kind == "i" else np.concatenate([first, second])

    # A run of one micro-batch, shorter than others would be, has none beside another.
    bounds = [(0, count), (count, 2 * count)] if count == config.device_batch else [(0, count)]
    alone = _digest(functools.reduce(joined, each) for each in zip(*(compute(*part) for part in bounds)))
    beside, again = (_digest(compute(0, bounds[-1][1])) for _ in range(2))
    varies = ["alone and beside another"] * (alone != beside) + ["each time"] * (again != beside)
    size = config.evaluated_size
    evaluated = images[:count] if size == config.image_size else random.integers(0, 256, (count, size, size, 3), np.uint8)
    scored = eval_step(tf.constant(evaluated), tf.constant(labels[:count]))
    rest = compute(0, config.global_batch % count or count)
    arithmetic = describe_arithmetic(device, config.resize)
    digest = _digest([images, *rest, *(np.asarray(each) for each in scored)]) + beside
    everyones = comm.gather_json([varies, digest])
    for rank, (ways_here, theirs) in enumerate(everyones):
        if ways_here or theirs != everyones[0][1]:
            what = f"not the same {ways_here[0]}" if ways_here else "not those of rank 0"
            raise Failure(
                CONFIGURATION,
                f"--reproducible={BITS} cannot be promised here: the bits that rank {rank} computes for the same images are "
                f"{what} ({arithmetic} on rank 0). Use hosts of one kind, or --reproducible={ROUNDING}",
                collective=True,
            )


def _digest(arrays: Iterable[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:  # one at a time: together they are as large as the network
        digest.update(array.tobytes())
    return digest.hexdigest()
