"""What networks expect of pixels, by name. Needs no TensorFlow.

A network's own is kept with its weights, and never folded into its first convolution: that is padded with zeros after
normalization, so that a mean in its bias would be wrong at the borders.
"""

from typing import Dict, NamedTuple, Tuple

_Channels = Tuple[float, float, float]


class Normalization(NamedTuple):
    """(pixel - mean) / deviation, of values from 0 to 1, in the order red, green, blue."""

    mean: _Channels
    deviation: _Channels


# Of torchvision (transforms/_presets.py) and timm (IMAGENET_DEFAULT_MEAN); of the authors' Caffe model, in units of bytes,
# as keras.applications.vgg16.preprocess_input has it; and as torchvision rounds it (VGG16_Weights.IMAGENET1K_FEATURES).
_IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NORMALIZATIONS: Dict[str, Normalization] = {
    "auto": _IMAGENET,
    "imagenet": _IMAGENET,
    "caffe": Normalization((123.68 / 255, 116.779 / 255, 103.939 / 255), (1 / 255, 1 / 255, 1 / 255)),
    "caffe_rounded": Normalization((0.48235, 0.45882, 0.40784), (1 / 255, 1 / 255, 1 / 255)),
}
