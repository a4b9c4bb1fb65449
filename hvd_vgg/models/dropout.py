"""Dropout whose masks do not depend on the batch that a row is computed in."""

from typing import Any

import tensorflow as tf

_PHILOX = 1  # tf.random.Algorithm.PHILOX, as an attribute of the raw operation


def dropout_mask(rows: Any, units: int, rate: float, key: Any, position: Any) -> Any:
    """Returns which outputs of a layer dropout keeps, bool [rows, units]: each with probability 1 - rate.

    rows: int32 scalar; key: uint64 scalar; position: int64 scalar, the first row's position in the global batch.
    """
    return uniform_rows(rows, units, key, position) >= rate


def uniform_rows(rows: Any, count: int, key: Any, position: Any) -> Any:
    """Returns numbers uniform in [0, 1), float32 [rows, count].

    Row i is a function of (key, position + i) alone, whatever batch it is computed in: a row takes its own run of Philox
    counters (Salmon et al., SC 2011), four numbers each.
    """
    counters = -(-count // 4)
    with tf.device("/CPU:0"):
        counter = tf.stack([tf.cast(position * counters, tf.uint64), tf.constant(0, tf.uint64)])
    draws = tf.raw_ops.StatelessRandomUniformV2(
        shape=[rows, counters * 4], key=tf.reshape(key, [1]), counter=counter, alg=_PHILOX
    )
    return draws[:, :count]


def apply_dropout(x: Any, mask: Any, rate: float) -> Any:
    """Returns x [n, units] scaled by 1 / (1 - rate) where `mask` (bool [n, units]) is true, and 0 elsewhere."""
    return tf.where(mask, x * (1 / (1 - rate)), tf.zeros_like(x))
