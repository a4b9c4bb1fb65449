"""BatchNorm over fixed groups of images, so that what is learned does not depend on ranks.

Ioffe and Szegedy (arXiv 1502.03167, algorithm 1), with the conventions of torch.nn.BatchNorm2d. In training the statistics
are those of a group of consecutive positions of the global batch ("ghost" batches: Hoffer et al., arXiv 1705.08741), which
one rank computes whole: no message crosses the network in the forward or backward pass. Other images do not enter.

A convolution's bias cancels in its normalized outputs: it is not added in training, its gradient is exactly 0, and the
moving mean has it.
"""

from typing import Any, Dict, Mapping, NamedTuple, Tuple

import tensorflow as tf

from hvd_vgg.models.architecture import BETA, GAMMA, MOVING_MEAN, MOVING_VARIANCE

# Of torch.nn.BatchNorm2d: what is added to a variance, and the weight of a new statistic in a moving moment.
EPSILON, NEW_WEIGHT = 1e-5, 0.1


class GroupSums(NamedTuple):
    """Sums over some groups: of their means, float32 [C]; of their unbiased variances, float32 [C]; groups: how many."""

    means: Any
    variances: Any
    groups: Any


def normalize_groups(x: Any, gamma: Any, beta: Any, group: int, one_group: bool, data_format: str) -> Tuple[Any, GroupSums]:
    """Returns gamma * (x - mean) / sqrt(variance + EPSILON) + beta by group and channel, in x's type, and the statistics.

    x: [n, H, W, C] for NHWC, [n, C, H, W] for NCHW; n is a multiple of `group`, the images of a group. gamma, beta: float32
    [C]. one_group: n is `group`. The variance that normalizes is that of the group's n H W values (biased), the one that is
    returned divides by one less. Both are computed in float32 whatever the type of x.
    """
    last = data_format == "NHWC"
    channels, shape = gamma.shape[0], tf.shape(x)
    height, width = (x.shape[1], x.shape[2]) if last else (x.shape[2], x.shape[3])
    groups = tf.constant(1) if one_group else shape[0] // group
    values = tf.cast(x, tf.float32)
    if not one_group:
        # Groups stand beside each other as channels do, for the one operation that normalizes each channel fast.
        gamma, beta = tf.tile(gamma, [groups]), tf.tile(beta, [groups])
        rows, rest = (group * height * width, channels) if last else (group, channels * height * width)
        beside = [group, height, width, groups * channels] if last else [group, groups * channels, height, width]
        values = tf.reshape(tf.transpose(tf.reshape(values, [groups, rows, rest]), [1, 0, 2]), beside)
    if last:
        # In 5 dimensions, which oneDNN's kernel does not take: until TensorFlow 2.20 it kept a pass's statistics in itself,
        # so that micro-batches side by side mixed theirs and damaged the heap (tensorflow/tensorflow#99852).
        values, data_format = values[:, tf.newaxis], "NDHWC"
    none = tf.zeros([0])
    normal, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=values, scale=gamma, offset=beta, mean=none, variance=none, epsilon=EPSILON, data_format=data_format
    )
    if not one_group:
        mean, variance = (tf.reduce_sum(tf.reshape(each, [groups, channels]), 0) for each in (mean, variance))
        normal = tf.transpose(tf.reshape(normal, [rows, groups, rest]), [1, 0, 2])
    return tf.cast(tf.reshape(normal, shape), x.dtype), GroupSums(mean, variance, groups)


def normalize_by_moments(network: Mapping[str, Any], layer: str, x: Any, data_format: str) -> Any:
    """Returns the outputs of a frozen layer's BatchNorm, by its moving moments, in x's type.

    x: outputs of its convolution without bias, [n, H, W, C] for NHWC, [n, C, H, W] for NCHW; computed in float32.
    """
    factor, shift = _folded(network, layer)
    if data_format == "NCHW":
        factor, shift = (each[:, tf.newaxis, tf.newaxis] for each in (factor, shift))
    return tf.cast(tf.cast(x, tf.float32) * factor + shift, x.dtype)


def updated_moment(moving: Any, new: Any) -> Any:
    """Returns a moving moment after an update whose groups have the mean statistic `new`."""
    return (1 - NEW_WEIGHT) * moving + NEW_WEIGHT * new


def fold(network: Mapping[str, Any]) -> Dict[str, Any]:
    """Returns the weights of the network without BatchNorm that has the outputs of this one with its moving moments.

    network: weights and moments by name. With k = gamma / sqrt(variance + EPSILON) folded kernels are k * kernel, biases
    beta + k * (bias - mean). Without BatchNorm these are the weights themselves.
    """
    folded = {name: weight for name, weight in network.items() if name.split("/")[1] in ("kernel", "bias")}
    for layer in [name.split("/")[0] for name in network if name.endswith(MOVING_MEAN)]:
        factor, folded[f"{layer}/bias"] = _folded(network, layer)
        folded[f"{layer}/kernel"] = factor * network[f"{layer}/kernel"]
    return folded


def _folded(network: Mapping[str, Any], layer: str) -> Tuple[Any, Any]:
    """Returns k of `fold` and the folded bias of a layer, float32 [C]."""
    gamma, beta, mean, variance, bias = (
        network[f"{layer}/{part}"] for part in (GAMMA, BETA, MOVING_MEAN, MOVING_VARIANCE, "bias")
    )
    factor = gamma * tf.math.rsqrt(variance + EPSILON)
    return factor, beta + factor * (bias - mean)
