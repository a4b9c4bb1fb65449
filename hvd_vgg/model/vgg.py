"""VGG-11/13/16/19 as tables of widths, in core TensorFlow, with the layer names and shapes of Keras' VGG16.

Source: Simonyan and Zisserman, Very Deep Convolutional Networks (arXiv 1409.1556), table 1, columns A, B, D and E.
"""

from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import tensorflow as tf

from hvd_vgg.data import order

# Convolutions in each of the five blocks; every block ends with a 2x2 maximum.
BLOCKS = {"vgg11": (1, 1, 2, 2, 2), "vgg13": (2, 2, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
_CHANNELS = (64, 128, 256, 512, 512)
_HIDDEN = 4096
_FLATTENED = 7 * 7 * 512  # inputs of fc1 at width 1 and 224 pixels
DENSE = ("fc1", "fc2", "predictions")

# Mean and standard deviation of ImageNet's training images per channel, of values 0..1 (torchvision's recipe).
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Weights = Dict[str, Any]
Dropout = Callable[[Any, int], Any]


class Layer(NamedTuple):
    """A layer with weights: kernel HWIO or [inputs, outputs], bias [outputs], `deviation` of the initial kernel."""

    name: str
    kernel: Tuple[int, ...]
    deviation: float


def layers(model: str, width: float, image_size: int, num_classes: int) -> List[Layer]:
    """Returns the layers of `model` in forward order.

    Initial kernels are normal: He et al.'s fan-out for convolutions (arXiv 1502.01852, equation 14), N(0, 0.01) for dense
    layers, as in torchvision. A narrower dense layer's deviation grows so that its outputs vary as the full one's do;
    at width 1 and 224 pixels it is 0.01.
    """
    found, inputs = [], 3
    for block, (count, channels) in enumerate(zip(BLOCKS[model], _CHANNELS), start=1):
        outputs = scaled(channels, width)
        for conv in range(1, count + 1):
            deviation = (2 / (3 * 3 * outputs)) ** 0.5
            found.append(Layer(f"block{block}_conv{conv}", (3, 3, inputs, outputs), deviation))
            inputs = outputs
    inputs *= (image_size // 32) ** 2
    hidden = scaled(_HIDDEN, width)
    for name, outputs, full in zip(DENSE, (hidden, hidden, num_classes), (_FLATTENED, _HIDDEN, _HIDDEN)):
        found.append(Layer(name, (inputs, outputs), 0.01 * (full / inputs) ** 0.5))
        inputs = outputs
    return found


def scaled(units: int, width: float) -> int:
    """Returns `units` times `width`, to the nearest multiple of 4 and at least 4."""
    return max(4, 4 * round(units * width / 4))


def parameters(of: List[Layer]) -> int:
    """Returns the number of trainable numbers in the layers."""
    return sum(int(np.prod(layer.kernel)) + layer.kernel[-1] for layer in of)


def initial_weights(of: List[Layer], seed: int) -> Weights:
    """Returns new variables `LAYER/kernel` and `LAYER/bias`, float32: a function of the seed, the same on every rank."""
    weights: Weights = {}
    for number, layer in enumerate(of):
        kernel = tf.random.stateless_normal(layer.kernel, order.weights_seed(seed, number), stddev=layer.deviation)
        weights[f"{layer.name}/kernel"] = tf.Variable(kernel, name=f"{layer.name}/kernel")
        weights[f"{layer.name}/bias"] = tf.Variable(tf.zeros([layer.kernel[-1]]), name=f"{layer.name}/bias")
    return weights


def normalized(images: Any) -> Any:
    """Returns uint8 images [n, height, width, 3] as float32 of about mean 0 and deviation 1 a channel."""
    scale = [1 / (255 * deviation) for deviation in _DEVIATION]
    shift = [-mean / deviation for mean, deviation in zip(_MEAN, _DEVIATION)]
    return tf.cast(images, tf.float32) * tf.constant(scale) + tf.constant(shift)


def logits(weights: Weights, model: str, inputs: Any, data_format: str, dropout: Optional[Dropout] = None) -> Any:
    """Returns float32 [n, num_classes] for normalised images [n, height, width, 3].

    data_format: NHWC or NCHW, what the device computes in; the weights and the result are the same for both.
    dropout: applied to the outputs of the hidden dense layers, with the number of the layer (0, 1).
    """
    channels_first = data_format == "NCHW"
    x = tf.transpose(inputs, [0, 3, 1, 2]) if channels_first else inputs
    window = [1, 1, 2, 2] if channels_first else [1, 2, 2, 1]
    for block, count in enumerate(BLOCKS[model], start=1):
        for conv in range(1, count + 1):
            name = f"block{block}_conv{conv}"
            x = tf.nn.conv2d(x, weights[f"{name}/kernel"], 1, "SAME", data_format=data_format)
            x = tf.nn.relu(tf.nn.bias_add(x, weights[f"{name}/bias"], data_format=data_format))
        x = tf.nn.max_pool2d(x, window, window, "VALID", data_format=data_format)
    if channels_first:  # fc1's rows are ordered height, width, channel
        x = tf.transpose(x, [0, 2, 3, 1])
    x = tf.reshape(x, [-1, weights["fc1/kernel"].shape[0]])
    for number, name in enumerate(DENSE):
        x = tf.matmul(x, weights[f"{name}/kernel"]) + weights[f"{name}/bias"]
        if name != DENSE[-1]:
            x = tf.nn.relu(x)
            x = dropout(x, number) if dropout else x
    return x
