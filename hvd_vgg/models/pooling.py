"""Average pooling to a given size, for images of another size than the network was built for."""

import math
from typing import Any

import numpy as np
import tensorflow as tf


def average_to_inputs(x: Any, inputs: int) -> Any:
    """Returns feature maps [n, height, width, channels] averaged to the square that has `inputs` numbers.

    Maps of that size are returned unchanged. Cell i of m along a side of n is the mean of n cells from
    floor(i n / m) up to ceil((i + 1) n / m) (torch.nn.AdaptiveAvgPool2d, which torchvision's VGG has in this place).
    """
    _, height, width, channels = x.shape
    side = math.isqrt(inputs // channels)
    if (height, width) == (side, side):
        return x
    rows, columns = (tf.constant(_averages(cells, side), x.dtype) for cells in (height, width))
    return tf.einsum("ih,jw,nhwc->nijc", rows, columns, x)


def _averages(cells: int, means: int) -> np.ndarray:
    """Returns the matrix of the means along one side, float64 [means, cells]."""
    matrix = np.zeros((means, cells))
    for mean in range(means):
        low, high = mean * cells // means, -(-(mean + 1) * cells // means)
        matrix[mean, low:high] = 1 / (high - low)
    return matrix
