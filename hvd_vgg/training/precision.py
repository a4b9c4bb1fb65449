"""Whether --precision pays on this device: a small convolution in it, timed beside one in float32.

A processor without instructions for a 16-bit type computes in it correctly and hopelessly slowly: on one with AVX2 alone an
update of VGG16 took 235 s in bfloat16, where float32 took 4. Nothing but a clock shows that.
"""

import os
import socket
import time
from typing import Any, Callable, List, NamedTuple, Optional

import numpy as np
import tensorflow as tf

from hvd_vgg.parallel import comm
from hvd_vgg.parallel.init import cpu_convolves

# Images, height and width, channels: a convolution of a millisecond in float32 on one core, or on a GPU.
_SIZES = {"CPU": (1, 16, 64), "GPU": (32, 56, 64)}
# Processor time, where a CPU computes: on a busy host that of the wall is anything.
_CLOCKS = {"CPU": time.process_time, "GPU": time.perf_counter}
# Each precision is timed so often, but no longer than this together; the best counts, the one that was disturbed least.
_TIMES, _LIMIT_SECONDS = 5, 0.2
# Both vary by less than this from start to start.
_SLOWER = 1.2
_ONEDNN = "TF_ENABLE_ONEDNN_OPTS"


class PrecisionSpeed(NamedTuple):
    """Seconds of the convolution in a precision and in float32, on the rank where the first is slowest beside the second."""

    precision: str
    seconds: float
    float32_seconds: float
    rank: int
    host: str
    kind: str

    def slower(self) -> bool:
        """Returns whether float32 is faster by more than chance."""
        return self.seconds > _SLOWER * self.float32_seconds

    def text(self) -> str:
        """Returns the measurement for people; the same on all ranks."""
        where = f" on rank {self.rank} (host {self.host})" if comm.size() > 1 else ""
        ratio = self.seconds / self.float32_seconds
        return (
            f"--precision={self.precision}: a small convolution, forward and backward, takes {1e3 * self.seconds:.2f} ms, "
            f"{ratio:.{0 if ratio >= 10 else 1}f} times as long as in float32{where}"
        )

    def fix(self) -> str:
        """Returns what to do where it is slower."""
        if self.kind == "CPU" and os.environ.get(_ONEDNN) == "0":
            return f"unset {_ONEDNN}: 0 switches off the convolutions made for 16 bits; or use --precision=float32"
        return "use --precision=float32: this device has no fast instructions for the other"


def measure_precision(precision: str, kind: str, data_format: str) -> Optional[PrecisionSpeed]:
    """Returns the speed of `precision` on the slowest rank; None for float32, or where it cannot be computed. Collective.

    kind, data_format: of this rank's device. Takes less than a second, and changes nothing that is computed later.
    """
    if precision == "float32":
        return None
    everyones = comm.gather_json([*_best_seconds(precision, kind, data_format), socket.gethostname(), kind])
    found = [PrecisionSpeed(precision, row[0], row[1], rank, *row[2:]) for rank, row in enumerate(everyones) if row[0]]
    return max(found, key=lambda each: each.seconds / each.float32_seconds) if found else None


def _best_seconds(precision: str, kind: str, data_format: str) -> List[float]:
    """Returns the best times in `precision` and in float32; zeros where it cannot be computed."""
    if kind == "CPU" and not cpu_convolves(precision):
        return [0.0, 0.0]
    try:
        with tf.device(f"/{kind}:0"):
            timed = [_timed_convolution(each, data_format, kind) for each in (precision, "float32")]
            for once in timed:
                once()  # compiles
            until, best = time.perf_counter() + _LIMIT_SECONDS, [once() for once in timed]
            for _ in range(_TIMES - 1):  # in turn: what disturbs one disturbs the other
                if time.perf_counter() < until:
                    best = [min(seconds, once()) for seconds, once in zip(best, timed)]
    except (tf.errors.OpError, ValueError, TypeError):  # the first update, or doctor, will say so in more words
        return [0.0, 0.0]
    return best


def _timed_convolution(precision: str, data_format: str, kind: str) -> Callable[[], float]:
    """Returns a function that computes a 3x3 convolution and its gradients, and returns the seconds that this took."""
    (images, size, channels), clock = _SIZES[kind], _CLOCKS[kind]
    shape = [images, channels, size, size] if data_format == "NCHW" else [images, size, size, channels]
    x = tf.constant(np.linspace(-1, 1, int(np.prod(shape))).reshape(shape), precision)
    kernel = tf.constant(np.linspace(-1, 1, 9 * channels**2).reshape([3, 3, channels, channels]), precision)

    @tf.function(jit_compile=False, autograph=False)
    def compute(x: Any, kernel: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch([x, kernel])
            y = tf.nn.conv2d(x, kernel, 1, "SAME", data_format=data_format)
        gradients = tape.gradient(y, [x, kernel], output_gradients=y)
        return tf.add_n([tf.reduce_max(tf.cast(each, tf.float32)) for each in gradients])

    def once() -> float:
        began = clock()
        compute(x, kernel).numpy()  # waits for the device
        return clock() - began

    return once
