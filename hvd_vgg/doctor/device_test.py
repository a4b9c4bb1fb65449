"""Whether a device allocates memory and computes correctly: that TensorFlow lists it says little.

On hosts whose driver does not fit their SDK, devices are listed and the first allocation fails.
"""

import contextlib
import functools
import os
from typing import Any, Callable, Dict, Iterator, List, Mapping, Sequence, Tuple

import numpy as np
import tensorflow as tf

from hvd_vgg.config import DoctorConfig
from hvd_vgg.doctor.driver import Accelerators, check_driver
from hvd_vgg.doctor.packages import device_nodes
from hvd_vgg.doctor.report import EXCLUDE_DEVICE, PHASE_SECONDS, Report
from hvd_vgg.doctor.settings import check_flags, check_rank_count, check_visible_devices
from hvd_vgg.environment import DEVICE_MASKS, launched_rank
from hvd_vgg.errors import Failure
from hvd_vgg.models.architecture import count_parameters, layers_of
from hvd_vgg.parallel import comm
from hvd_vgg.parallel.init import cpu_convolves, take_device
from hvd_vgg.reporting.findings import FAILURE, Finding, failure, ok, warning, worst
from hvd_vgg.text import plural
from hvd_vgg.training.precision import measure_precision

# Largest relative error of a product of random matrices in each precision, compared with float64 on the same rounded
# inputs: ten times what accumulation in float32 gives, or for 16 bits what accumulation in those 16 bits gives.
BOUNDS = {"float32": 1e-5, "float16": 2e-2, "bfloat16": 1e-1}
# TF32 keeps 10 bits of each factor.
_TF32 = 3e-3
_MATRIX_SIZE, _IMAGE_SIZE, _CHANNELS = 256, 16, 32


# An operation, to be called on the device under test, and its exact result.
Case = Tuple[Callable[[], Any], np.ndarray]


def check_devices(report: Report, config: DoctorConfig, accelerators: Accelerators) -> Tuple[str, int]:
    """Tries this rank's device, or without a launcher all of this host.

    Returns the name of the device to exchange from, and the number of threads that may decode images.
    """
    alone, masks = launched_rank() is None, [accelerators.host.environ.get(name) for name in DEVICE_MASKS]
    cuda = str(tf.sysconfig.get_build_info().get("cuda_version", ""))
    nodes = device_nodes(accelerators.host, accelerators.vendor)
    with report.time_limit("devices", "the devices did not answer", PHASE_SECONDS * len(nodes) if alone else 0.0):
        gpus = tf.config.list_physical_devices("GPU")
        threads = _take_devices(config, gpus, alone)
        try:
            devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")[:1]
        except (RuntimeError, tf.errors.OpError) as error:
            text = f"TensorFlow lists {plural(len(gpus), 'device')} but cannot initialize them: {error}"
            # Nothing computed, which decides about the driver; without a device this rank cannot exchange findings.
            raise report.finish_alone(failure("devices", text, EXCLUDE_DEVICE), *check_driver(accelerators, cuda)) from error
        parameters = count_parameters(layers_of(config))
        tried = check_computation(devices, config.precision, 4 * parameters)
    computed = bool(gpus) and worst(tried) != FAILURE
    report.findings += [
        *tried,
        *check_driver(accelerators, cuda, computed),
        *check_visible_devices(len(nodes), len(gpus), *masks),
        *check_rank_count(len(gpus), comm.local_size(), alone, *masks),
        *check_flags(config, comm.size(), len(gpus)),
    ]
    return str(devices[0].name), threads


def check_precision(report: Report, config: DoctorConfig, device: str) -> None:
    """Compares the speed of --precision with that of float32 on each rank's device. Collective."""
    kind = "GPU" if "GPU" in device else "CPU"
    with report.time_limit("devices", "a convolution in --precision did not end"):
        speed = measure_precision(config.precision, kind, "NCHW" if kind == "GPU" else "NHWC")
    if speed:
        about = "precision", speed.text()
        report.findings.append(warning(*about, speed.fix()) if speed.slower() else ok(*about))


def _take_devices(config: DoctorConfig, gpus: Sequence[Any], alone: bool) -> int:
    """Takes this rank's device as training does, or all `gpus` if they are to be tried; returns the decoding threads."""
    if gpus and (alone or len(gpus) < comm.local_size()):
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)
        return os.cpu_count() or 1
    try:
        return take_device(config).input_threads
    except Failure:  # a precision that the device does not support, which `check_computation` reports
        return 1


def check_computation(devices: Sequence[Any], precision: str, gradient_bytes: int) -> List[Finding]:
    """Tries each of TensorFlow's logical `devices`; returns at least one finding for each.

    precision: what training will use; gradient_bytes: a GPU must be able to hold this twice, as training holds gradients.
    """
    cases = make_cases()
    found: List[Finding] = []
    for device in devices:
        # Ranks have one device each; a process without a launcher tries all, and numbers them.
        name = _device_name(device) + (f" {device.name.rsplit(':', 1)[1]}" if len(devices) > 1 else "")
        broken = _check_allocation(device.name, name, gradient_bytes) if device.device_type == "GPU" else []
        found += broken or assess_errors(name, device.device_type, *measure_errors(device.name, cases), precision)
    return found


def make_cases() -> Dict[str, Case]:
    """Returns all operations in all precisions and layouts, by names such as `float32 matmul` and `float16 conv2d NCHW`.

    The exact results come from NumPy: not every device supports float64, and the device under test may be broken.
    """
    random = np.random.default_rng(1)
    shapes = [[_MATRIX_SIZE] * 2] * 2 + [[2, _IMAGE_SIZE, _IMAGE_SIZE, _CHANNELS], [3, 3, _CHANNELS, _CHANNELS]]
    values = [random.standard_normal(shape) for shape in shapes]
    cases: Dict[str, Case] = {}
    for dtype in BOUNDS:
        with tf.device("/CPU:0"):
            a, b, image, kernel = (tf.constant(value, dtype) for value in values)
            a64, b64, image64, kernel64 = (np.asarray(tf.cast(each, tf.float64)) for each in (a, b, image, kernel))
        cases[f"{dtype} matmul"] = functools.partial(tf.matmul, a, b), a64 @ b64
        exact = convolve(image64, kernel64)
        for layout in ("NHWC", "NCHW"):
            cases[f"{dtype} conv2d {layout}"] = functools.partial(_conv2d, image, kernel, layout), exact
    return cases


def _conv2d(image: Any, kernel: Any, layout: str) -> Any:
    """Returns what `convolve` does, in TensorFlow, computed in `layout`."""
    if layout == "NHWC":
        return tf.nn.conv2d(image, kernel, 1, "SAME")
    result = tf.nn.conv2d(tf.transpose(image, [0, 3, 1, 2]), kernel, 1, "SAME", "NCHW")
    return tf.transpose(result, [0, 2, 3, 1])


def convolve(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Returns the 3x3 convolution, stride 1, zero padding "SAME", of [n, h, w, c] with [3, 3, c, k], in NumPy."""
    padded = np.pad(image, [(0, 0), (1, 1), (1, 1), (0, 0)])
    height, width = image.shape[1:3]
    parts = (padded[:, y : y + height, x : x + width] @ kernel[y, x] for y in range(3) for x in range(3))
    return np.asarray(sum(parts))


def measure_errors(device: str, cases: Mapping[str, Case]) -> Tuple[Dict[str, float], Dict[str, str]]:
    """Returns the relative error of each case on `device`, and why others failed; both by the case's name."""
    errors: Dict[str, float] = {}
    failed: Dict[str, str] = {}
    for name, (compute, expected) in cases.items():
        if "conv2d" in name and "CPU" in device and not cpu_convolves(name.split()[0]):  # trying could end the process
            failed[name] = f"not on a CPU with TensorFlow {tf.__version__}"
            continue
        try:
            with tf.device(device):
                value = np.asarray(tf.cast(compute(), tf.float32), np.float64)
            errors[name] = float(np.linalg.norm(value - expected) / np.linalg.norm(expected))
        except (tf.errors.OpError, ValueError, TypeError) as error:
            failed[name] = _first_line(error)
    return errors, failed


def assess_errors(
    name: str, kind: str, errors: Mapping[str, float], failed: Mapping[str, str], precision: str
) -> Iterator[Finding]:
    """Yields what `measure_errors` means for training in `precision` on a device called `name` of `kind` GPU or CPU."""
    layout = "NCHW" if kind == "GPU" else "NHWC"
    needed = {f"{dtype} {operation}" for dtype in ("float32", precision) for operation in ("matmul", f"conv2d {layout}")}
    problems, rough, correct = dict(failed), [], []
    for test, error in errors.items():
        dtype = test.split()[0]
        if error <= BOUNDS[dtype]:
            correct.append(test)
        elif dtype == "float32" and error <= _TF32:
            rough.append(test)
        else:  # NaN too
            problems[test] = f"wrong (relative error {error:.1g})"
    for test, problem in problems.items():
        text = f"{name}: {test}: {problem}"
        if test in needed:
            yield failure("devices", text, EXCLUDE_DEVICE)
        elif kind == "GPU" or layout in test:  # CPUs usually convolve in one layout only
            yield warning("devices", text, f"training here needs {', '.join(sorted(needed))}; do not ask for this")
    if rough:
        text = f"{name}: {', '.join(rough)} rounds like TF32 (relative error up to {_TF32:g})"
        yield warning("devices", text, "NVIDIA_TF32_OVERRIDE=0 gives full float32, slower")
    if correct:
        yield ok("devices", f"{name} allocates; correct: {', '.join(correct)}")


def _check_allocation(device: str, name: str, gradient_bytes: int) -> List[Finding]:
    """Writes gradients' worth of memory twice and reads it back."""
    try:
        with tf.device(device):
            ones = tf.ones([gradient_bytes // 4])
            mean = float(tf.reduce_mean(ones + ones))
    except tf.errors.OpError as error:
        text = f"{name} does not allocate {2 * gradient_bytes / 1e6:.0f} MB: {_first_line(error)}"
        return [failure("devices", text, "other processes use its memory, or driver and SDK do not fit (see driver)")]
    if abs(mean - 2.0) <= 1e-3:  # False for NaN
        return []
    return [failure("devices", f"{name} allocates, but reads back {mean} instead of 2", EXCLUDE_DEVICE)]


def _device_name(device: Any) -> str:
    """Returns the product's name, which is equal on all ranks with the same device; `CPU` for a CPU."""
    if device.device_type == "CPU":
        return "CPU"
    with contextlib.suppress(ValueError, IndexError, KeyError, tf.errors.OpError):
        gpu = tf.config.get_visible_devices("GPU")[int(device.name.rsplit(":", 1)[1])]
        return str(tf.config.experimental.get_device_details(gpu)["device_name"])
    return "GPU"


def _first_line(error: Exception) -> str:
    text = str(getattr(error, "message", error))
    return (text.strip().splitlines() or [type(error).__name__])[0][:160]
