"""The forward pass of VGG in core TensorFlow, and its weights under Keras' names."""

from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

import tensorflow as tf

from hvd_vgg.config import BLOCKS, DENSE
from hvd_vgg.models.architecture import GAMMA, MOVING_VARIANCE, Layer
from hvd_vgg.models.dropout import apply_dropout
from hvd_vgg.models.pixels import NORMALIZATIONS
from hvd_vgg.models.pooling import average_to_inputs
from hvd_vgg.seeds import weights_seed

Weights = Dict[str, Any]
DenseFunction = Callable[[Weights, Any, str], Any]  # as `dense`
NormFunction = Callable[[Any, str], Any]  # from the outputs of a convolution and its name to what its ReLU is applied to


def initial_weights(layers: List[Layer], seed: int) -> Weights:
    """Returns new float32 variables `LAYER/kernel` and `LAYER/bias`: a function of the seed, the same on every rank.

    A layer with BatchNorm also has `LAYER/gamma`, ones, and `LAYER/beta`, zeros.
    """
    weights: Weights = {}
    for number, layer in enumerate(layers):
        kernel = tf.random.stateless_normal(layer.kernel, weights_seed(seed, number), stddev=layer.deviation)
        weights[f"{layer.name}/kernel"] = tf.Variable(kernel, name=f"{layer.name}/kernel")
        for name in layer.weights[1:]:
            weights[name] = _vector(layer, name, 1.0 if name.endswith(GAMMA) else 0.0)
    return weights


def initial_moments(layers: List[Layer]) -> Weights:
    """Returns new variables `LAYER/moving_mean`, zeros, and `LAYER/moving_variance`, ones, of the layers with BatchNorm."""
    named = [(layer, name) for layer in layers for name in layer.moments]
    return {name: _vector(layer, name, 1.0 if name.endswith(MOVING_VARIANCE) else 0.0) for layer, name in named}


def _vector(layer: Layer, name: str, value: float) -> Any:
    return tf.Variable(tf.fill([layer.kernel[-1]], value), name=name)


def normalized(images: Any, normalization: str, precision: str = "float32") -> Any:
    """Returns uint8 RGB images [n, height, width, 3] in `precision`, normalized as NORMALIZATIONS has it."""
    means, deviations = NORMALIZATIONS[normalization]
    scale = [1 / (255 * deviation) for deviation in deviations]
    shift = [-mean / deviation for mean, deviation in zip(means, deviations)]
    return tf.cast(tf.cast(images, tf.float32) * tf.constant(scale) + tf.constant(shift), precision)


def dense(weights: Weights, x: Any, name: str) -> Any:
    """Returns the outputs [n, N] of dense layer `name` before its ReLU, for inputs [n, K]."""
    return tf.matmul(x, weights[f"{name}/kernel"]) + weights[f"{name}/bias"]


def dense_names(weights: Mapping[str, Any]) -> List[str]:
    """Returns the names of the dense layers that `weights` have, in order: one for --head=pooled."""
    return [name for name in DENSE if f"{name}/kernel" in weights]


def logits(
    weights: Weights,
    model: str,
    images: Any,
    data_format: str,
    normalization: str = "auto",
    precision: str = "float32",
    masks: Sequence[Any] = (),
    dropout: float = 0.0,
    dense_layer: Optional[DenseFunction] = None,
    observe: Optional[Callable[[Any], None]] = None,
    normalize: Optional[NormFunction] = None,
) -> Any:
    """Returns the logits, float32 [n, num_classes], of images [n, height, width, 3], computed in `precision`.

    images: uint8, or normalized float32. Gradients with respect to the weights are float32 whatever the precision.

    data_format: NHWC or NCHW, the layout that the device computes in; weights and logits are the same for both.
    normalization: of uint8 images, as in NORMALIZATIONS.
    masks: of `dropout_mask`, for the outputs of the hidden dense layers; none for no dropout. dropout: their rate.
    dense_layer: computes the dense layers instead of `dense`, for a caller that needs their inputs.
    observe: called with the outputs of each layer before its BatchNorm or ReLU, in forward order.
    normalize: BatchNorm in training; without it the weights are those of `batch_norm.fold`.
    """
    if precision != "float32":
        weights = {name: tf.cast(value, precision) for name, value in weights.items()}
    channels_first = data_format == "NCHW"
    # An array's dtype need not be comparable with TensorFlow's, as that of NumPy 1.19 is not.
    images = tf.convert_to_tensor(images)
    x = normalized(images, normalization, precision) if images.dtype == tf.uint8 else tf.cast(images, precision)
    if channels_first:
        x = tf.transpose(x, [0, 3, 1, 2])
    window = [1, 1, 2, 2] if channels_first else [1, 2, 2, 1]
    for block, count in enumerate(BLOCKS[model], start=1):
        for conv in range(1, count + 1):
            name = f"block{block}_conv{conv}"
            x = tf.nn.conv2d(x, weights[f"{name}/kernel"], 1, "SAME", data_format=data_format)
            if not normalize:
                x = tf.nn.bias_add(x, weights[f"{name}/bias"], data_format=data_format)
            if observe:
                observe(x)
            x = tf.nn.relu(normalize(x, name) if normalize else x)
        x = tf.nn.max_pool2d(x, window, window, "VALID", data_format=data_format)
    if channels_first:  # the rows of fc1's kernel are ordered height, width, channel
        x = tf.transpose(x, [0, 2, 3, 1])
    names = dense_names(weights)
    inputs = weights[f"{names[0]}/kernel"].shape[0]
    x = tf.reshape(average_to_inputs(x, inputs), [-1, inputs])
    for number, name in enumerate(names):
        x = (dense_layer or dense)(weights, x, name)
        if observe:
            observe(x)
        if name != DENSE[-1]:
            x = tf.nn.relu(x)
            x = apply_dropout(x, masks[number], dropout) if masks else x
    return tf.cast(x, tf.float32)
