"""VGG-11/13/16/19 as tables, with the layer names and shapes of Keras' VGG16. Needs no TensorFlow.

Source: Simonyan and Zisserman, Very Deep Convolutional Networks (arXiv 1409.1556), table 1, columns A, B, D and E. The
variants ending in _bn normalize the outputs of each convolution before its ReLU, as torchvision's do.
"""

import math
from typing import List, NamedTuple, Tuple

from hvd_vgg.config import BLOCKS, DENSE, FLATTENED, POOLED, ExchangeConfig, ModelConfig, fits_any, has_batch_norm

# Weights of BatchNorm, and its moving moments, which are state without a gradient.
GAMMA, BETA, MOVING_MEAN, MOVING_VARIANCE = "gamma", "beta", "moving_mean", "moving_variance"
_CHANNELS = (64, 128, 256, 512, 512)
_HIDDEN = 4096
_FLATTENED = 7 * 7 * 512  # inputs of fc1 at width 1 and 224 pixels


class Layer(NamedTuple):
    """A layer with weights: the shape of its kernel (HWIO, or [inputs, outputs]); all else that it has is [outputs]."""

    name: str
    kernel: Tuple[int, ...]
    deviation: float  # of the initial kernel
    normalized: bool = False  # by BatchNorm
    trained: bool = True  # or frozen, by --train_only

    @property
    def weights(self) -> List[str]:
        """The names of the layer's weights."""
        return [f"{self.name}/{part}" for part in ("kernel", "bias", *([GAMMA, BETA] if self.normalized else []))]

    @property
    def moments(self) -> List[str]:
        """The names of its moving moments, which are no weights."""
        return [f"{self.name}/{part}" for part in (MOVING_MEAN, MOVING_VARIANCE) if self.normalized]

    @property
    def parameters(self) -> int:
        """The number of trainable parameters of the layer."""
        return math.prod(self.kernel) + (len(self.weights) - 1) * self.kernel[-1]


def layers_of(config: ModelConfig) -> List[Layer]:
    """Returns the layers of a configuration's network, in forward order."""
    return vgg_layers(config.model, config.width, config.image_size, config.num_classes, config.head)


def layers_to_train(config: ExchangeConfig) -> List[Layer]:
    """Returns `layers_of` a configuration, each of which says whether it is trained."""
    chosen = config.train_only
    return [layer._replace(trained=not chosen or fits_any(layer.name, chosen)) for layer in layers_of(config)]


def vgg_layers(model: str, width: float, image_size: int, num_classes: int, head: str = FLATTENED) -> List[Layer]:
    """Returns the layers of `model` in forward order; width multiplies the width of each, image_size is in pixels.

    head: of `ModelConfig`; POOLED has `predictions` alone behind the convolutions, whose inputs are the means of the last
    feature map.

    Initial kernels are normal: He et al.'s fan-out for convolutions (arXiv 1502.01852, equation 14), N(0, 0.01) for dense
    layers, as in torchvision. The deviation of a dense layer with fewer inputs is larger, so that its outputs vary as much
    as those of the full layer; at width 1 and 224 pixels it is 0.01.
    """
    layers, inputs = [], 3
    for block, (count, channels) in enumerate(zip(BLOCKS[model], _CHANNELS), start=1):
        outputs = scale_width(channels, width)
        for conv in range(1, count + 1):
            deviation = (2 / (3 * 3 * outputs)) ** 0.5
            kernel = (3, 3, inputs, outputs)
            layers.append(Layer(f"block{block}_conv{conv}", kernel, deviation, has_batch_norm(model)))
            inputs = outputs
    if head == POOLED:
        return [*layers, Layer(DENSE[-1], (inputs, num_classes), 0.01 * (_HIDDEN / inputs) ** 0.5)]
    inputs *= (image_size // 32) ** 2
    hidden = scale_width(_HIDDEN, width)
    for name, outputs, full in zip(DENSE, (hidden, hidden, num_classes), (_FLATTENED, _HIDDEN, _HIDDEN)):
        layers.append(Layer(name, (inputs, outputs), 0.01 * (full / inputs) ** 0.5))
        inputs = outputs
    return layers


def scale_width(units: int, width: float) -> int:
    """Returns `units` times `width`, to the nearest multiple of 4 and at least 4."""
    return max(4, 4 * round(units * width / 4))


def count_parameters(layers: List[Layer]) -> int:
    """Returns the number of trainable parameters of the layers."""
    return sum(layer.parameters for layer in layers)


def macs_per_image(layer: Layer, image_size: int) -> int:
    """Returns the multiply-accumulates of a layer's forward pass for one image of image_size pixels a side."""
    if layer.name in DENSE:
        return math.prod(layer.kernel)
    side = image_size >> (int(layer.name[len("block")]) - 1)
    return math.prod(layer.kernel) * side * side


def first_trained(layers: List[Layer]) -> int:
    """Returns the number of the first layer that is trained, behind which gradients by inputs are needed."""
    return next((number for number, layer in enumerate(layers) if layer.trained), len(layers))


def training_flops(layers: List[Layer], image_size: int) -> int:
    """Returns the floating-point operations of training on one image: 92.65e9 for VGG16 at 224 pixels.

    Two for each multiply-accumulate, of the forward pass and of the gradients by a layer's weights, if it is trained, and by
    its inputs, if a layer before it is. Everything else is small beside these and not counted.
    """
    first = first_trained(layers)
    macs = [macs_per_image(layer, image_size) for layer in layers]
    passes = [1 + layer.trained + (number > first) for number, layer in enumerate(layers)]
    return 2 * sum(each * count for each, count in zip(macs, passes))
