"""Time within compiled functions."""

from typing import Any, List

import numpy as np
import tensorflow as tf

from hvd_vgg.watchdog import watchdog


def time_after(tensors: List[Any]) -> Any:
    """Returns the time in seconds, float64, at which all `tensors` had been computed; for differences alone.

    tf.timestamp is not allowed where TensorFlow is to be deterministic.
    """
    with tf.device("/CPU:0"), tf.control_dependencies(tensors):
        return tf.ensure_shape(tf.numpy_function(lambda: np.float64(watchdog.active_seconds()), [], tf.float64), [])
