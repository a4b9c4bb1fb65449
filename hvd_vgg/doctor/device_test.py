"""Whether a device allocates, multiplies and convolves, and right: that TensorFlow lists it says little.

On hosts whose driver does not fit their SDK, devices are listed and the first allocation fails.
"""

from typing import Any, Dict, List, Tuple

import numpy as np
import tensorflow as tf

from hvd_vgg.parallel.init import cpu_convolves
from hvd_vgg.reporting.findings import Finding, failure, ok, warning

# Relative error of a product of random matrices that each precision may have, against float64 of the same rounded inputs:
# ten times what accumulating in float32 gives, or for 16 bits what accumulating in those gives.
BOUNDS = {"float32": 1e-5, "float16": 2e-2, "bfloat16": 1e-1}
# TF32 keeps 10 bits of each factor.
_TF32 = 3e-3
_SIZE, _SIDE, _CHANNELS = 256, 16, 32


def check_devices(devices: List[Any], precision: str, gradient_bytes: int) -> List[Finding]:
    """Tries each of TensorFlow's logical devices; precision: what training will use; one finding or more for each.

    gradient_bytes: how much a GPU must be able to hold twice, as training does of its gradient.
    """
    found = []
    for device in devices:
        # A rank has one; alone, one of several is told by its number.
        number = f" {device.name.rsplit(':', 1)[1]}" if len(devices) > 1 else ""
        found += _check(device.name, device.device_type, number, precision, gradient_bytes)
    return found


def measure_errors(device: str) -> Tuple[Dict[str, float], Dict[str, str]]:
    """Returns the relative error of each operation on a device, and why others could not be done, by name.

    Names: `float32`, `float16`, `bfloat16` (a product), and each with a layout behind it (a convolution).
    """
    found: Dict[str, float] = {}
    failed: Dict[str, str] = {}
    random = np.random.default_rng(1)
    a, b = (random.standard_normal((_SIZE, _SIZE)) for _ in range(2))
    image = random.standard_normal((2, _SIDE, _SIDE, _CHANNELS))
    kernel = random.standard_normal((3, 3, _CHANNELS, _CHANNELS))
    for dtype in BOUNDS:
        # The reference is the CPU's alone: not every device knows float64, and the one that is tried may be broken.
        with tf.device("/CPU:0"):
            rounded = [tf.constant(value, dtype) for value in (a, b, image, kernel)]
            a64, b64, image64, kernel64 = (np.asarray(tf.cast(value, tf.float64)) for value in rounded)
        _try(dtype, lambda r=rounded: _multiply(device, r[0], r[1]), a64 @ b64, found, failed)
        expected = convolve(image64, kernel64)
        for layout in ("NHWC", "NCHW"):
            if "CPU" in device and not cpu_convolves(dtype):  # to try it could end the process
                failed[f"{dtype} {layout}"] = f"not on a CPU with TensorFlow {tf.__version__}"
                continue
            _try(
                f"{dtype} {layout}", lambda r=rounded, to=layout: _convolve(device, r[2], r[3], to), expected, found, failed
            )
    return found, failed


def convolve(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Returns the 3x3 convolution, stride 1, padded with zeros to the same size, [n, h, w, c] by [3, 3, c, k], in NumPy."""
    padded = np.pad(image, [(0, 0), (1, 1), (1, 1), (0, 0)])
    height, width = image.shape[1:3]
    parts = (padded[:, y : y + height, x : x + width] @ kernel[y, x] for y in range(3) for x in range(3))
    return np.asarray(sum(parts))


def assess_errors(name: str, kind: str, found: Dict[str, float], failed: Dict[str, str], precision: str) -> List[Finding]:
    """Returns what `errors` mean for training in `precision` on a device of `kind`, GPU or CPU, called `name`."""
    layout = "NCHW" if kind == "GPU" else "NHWC"
    needed = {"float32", f"float32 {layout}", precision, f"{precision} {layout}"}
    findings = []
    wrong = {test: f"wrong (relative error {error:.1g})" for test, error in found.items() if not error <= _bound(test)}
    for test, why in {**failed, **wrong}.items():
        text = f"{name}: {test}: {why}"
        if test in needed:
            fix = "driver and SDK must fit (see driver); leave this device out by CUDA_VISIBLE_DEVICES till then"
            findings.append(failure("devices", text, fix))
        elif kind == "GPU" or layout in test:  # a CPU that convolves in one layout alone is as they are
            findings.append(
                warning("devices", text, f"training needs {', '.join(sorted(needed))} here; do not ask for this")
            )
    rough = {test for test, error in found.items() if test.startswith("float32") and BOUNDS["float32"] < error <= _TF32}
    if rough:
        text = f"{name}: {', '.join(sorted(rough))} rounds as TF32 does (relative error to {_TF32:g})"
        findings.append(warning("devices", text, "NVIDIA_TF32_OVERRIDE=0 gives all of float32, slower"))
    right = [test for test in found if test not in wrong and test not in rough]
    if right:
        products = ", ".join(test for test in right if " " not in test)
        convolutions = [test.split() for test in right if " " in test]
        layouts = "; ".join(
            f"in {each} in {', '.join(dtype for dtype, at in convolutions if at == each)}"
            for each in sorted({at for _, at in convolutions})
        )
        findings.append(
            ok(
                "devices",
                f"{name} allocates, multiplies right in {products or 'none'}, convolves right {layouts or 'in none'}",
            )
        )
    return findings


def _check(device: str, kind: str, number: str, precision: str, gradient_bytes: int) -> List[Finding]:
    name = _called(device, kind) + number
    if kind == "GPU":
        try:
            with tf.device(device):
                held = tf.ones([gradient_bytes // 4])
                whole = float(tf.reduce_mean(held + held))
        except tf.errors.OpError as error:
            text = f"{name} does not allocate {2 * gradient_bytes / 1e6:.0f} MB: {_first_line(error)}"
            return [failure("devices", text, "other processes hold its memory, or driver and SDK do not fit (see driver)")]
        if not abs(whole - 2.0) <= 1e-3:  # NaN too
            text = f"{name} allocates, but what is written does not come back: {whole} instead of 2"
            return [failure("devices", text, "leave it out by CUDA_VISIBLE_DEVICES; driver and SDK must fit (see driver)")]
    return assess_errors(name, kind, *measure_errors(device), precision)


def _called(device: str, kind: str) -> str:
    """Returns the product's name, equal on all ranks that have one; a CPU is a CPU."""
    if kind == "CPU":
        return "CPU"
    try:
        number = int(device.rsplit(":", 1)[1])
        details = tf.config.experimental.get_device_details(tf.config.get_visible_devices("GPU")[number])
    except (ValueError, IndexError, tf.errors.OpError):
        details = {}
    return str(details.get("device_name", "GPU"))


def _bound(test: str) -> float:
    dtype = test.split()[0]
    return _TF32 if dtype == "float32" else BOUNDS[dtype]


def _try(test: str, compute: Any, expected: np.ndarray, found: Dict[str, float], failed: Dict[str, str]) -> None:
    try:
        value = compute()
    except (tf.errors.OpError, ValueError, TypeError) as error:
        failed[test] = _first_line(error)
        return
    found[test] = float(np.linalg.norm(value - expected) / np.linalg.norm(expected))


def _multiply(device: str, a: Any, b: Any) -> np.ndarray:
    with tf.device(device):
        return np.asarray(tf.cast(tf.matmul(a, b), tf.float32), np.float64)


def _convolve(device: str, image: Any, kernel: Any, layout: str) -> np.ndarray:
    with tf.device(device):
        if layout == "NHWC":
            out = tf.nn.conv2d(image, kernel, 1, "SAME", layout)
        else:
            out = tf.transpose(tf.nn.conv2d(tf.transpose(image, [0, 3, 1, 2]), kernel, 1, "SAME", layout), [0, 2, 3, 1])
        return np.asarray(tf.cast(out, tf.float32), np.float64)


def _first_line(error: Exception) -> str:
    text = str(getattr(error, "message", error))
    return (text.strip().splitlines() or [type(error).__name__])[0][:160]
