"""The exponential moving average of a network's weights and moments."""

from typing import Any, Dict, Mapping

import tensorflow as tf

from hvd_vgg.training.checkpoint import AVERAGE_SUFFIX

# How many updates it has seen, int32: state, as the average itself is.
UPDATES = "average/updates"


def make_averages(network: Mapping[str, Any]) -> Dict[str, Any]:
    """Returns the average of each variable of a network, `NAME/average`, equal to it, and UPDATES."""
    averages = {f"{name}{AVERAGE_SUFFIX}": tf.Variable(variable) for name, variable in network.items()}
    with tf.device("/CPU:0"):
        averages[UPDATES] = tf.Variable(0)
    return averages


def update_averages(averages: Mapping[str, Any], network: Mapping[str, Any], decay: float) -> None:
    """Moves each average towards its variable after an update; for use inside a tf.function.

    average = d * average + (1 - d) * variable, d = min(decay, (1 + n) / (10 + n)) after n earlier updates: as
    tf.train.ExponentialMovingAverage with `num_updates`, so that an early average is not of initial weights.
    """
    earlier = tf.cast(averages[UPDATES], tf.float32)
    moves = 1 - tf.minimum(decay, (1 + earlier) / (10 + earlier))
    for name, variable in network.items():
        average = averages[f"{name}{AVERAGE_SUFFIX}"]
        average.assign_sub(moves * (average - variable))
    averages[UPDATES].assign_add(1)
