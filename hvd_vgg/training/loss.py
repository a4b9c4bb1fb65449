"""Top-k accuracy of a batch."""

from typing import Any

import tensorflow as tf


def top_k_correct(logits: Any, labels: Any, k: int) -> Any:
    """Returns how many labels, int64 scalar, are among the k largest logits.

    logits: float32 [n, classes]; labels: int32 [n], negative for padding, which never counts. A tie counts against the
    label, and so does NaN: a network whose outputs are all equal scores 0, not 1 as with tf.math.in_top_k.
    """
    own = tf.gather(logits, tf.maximum(labels, 0), axis=1, batch_dims=1)[:, tf.newaxis]
    lower = tf.reduce_sum(tf.cast(logits < own, tf.int32), axis=1)
    correct = (logits.shape[1] - 1 - lower < k) & (labels >= 0)
    return tf.reduce_sum(tf.cast(correct, tf.int64))
