"""The loss and the top-k accuracy of a batch."""

from typing import Any

import tensorflow as tf


def cross_entropy(logits: Any, labels: Any, smoothing: float = 0.0) -> Any:
    """Returns the softmax cross-entropy of each image, [n] of the logits' type.

    logits: [n, classes]; labels: int32 [n], not negative. smoothing: with share e of K classes the target is 1 - e + e/K for
    the label and e/K for the others (Szegedy et al., arXiv 1512.00567, section 7; torch's CrossEntropyLoss). For training
    alone: evaluations are compared with others', and have none.
    """
    if not smoothing:
        return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    classes = logits.shape[1]
    targets = tf.one_hot(labels, classes, 1 - smoothing + smoothing / classes, smoothing / classes, dtype=logits.dtype)
    return tf.nn.softmax_cross_entropy_with_logits(targets, logits)


def top_k_correct(logits: Any, labels: Any, k: int) -> Any:
    """Returns how many labels, int64 scalar, are among the k largest logits, by `top_k_hits`."""
    return tf.reduce_sum(tf.cast(top_k_hits(logits, labels, k), tf.int64))


def top_k_hits(logits: Any, labels: Any, k: int) -> Any:
    """Returns whether each label, bool [n], is among the k largest logits.

    logits: float32 [n, classes]; labels: int32 [n], negative for padding, which never counts. A tie counts against the
    label, and so does NaN: a network whose outputs are all equal scores 0, not 1 as with tf.math.in_top_k.
    """
    own = tf.gather(logits, tf.maximum(labels, 0), axis=1, batch_dims=1)[:, tf.newaxis]
    lower = tf.reduce_sum(tf.cast(logits < own, tf.int32), axis=1)
    return (logits.shape[1] - 1 - lower < k) & (labels >= 0)
