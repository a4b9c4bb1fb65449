"""Changes of an image's colours, in place, as Pillow defines them (ImageEnhance, ImageOps), by OpenCV in a fraction of its
time.

Images are uint8 [height, width, 3], RGB, contiguous. Results are Pillow's, whose functions torchvision's transforms call,
but for single units of 255: OpenCV computes grey in 15 bits where Pillow has 16, and where Pillow truncates a number less
than 2^-14 below an integer, that integer is the result here.
"""

from typing import Any, Callable, Optional, Sequence

import cv2
import numpy as np

# Pillow truncates (src/libImaging/Blend.c), OpenCV rounds. Less than a half, so that an integer stays itself.
_TRUNCATED = -(0.5 - 2.0**-14)
# ImageFilter.SMOOTH of Pillow.
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
# Eigenvalues and eigenvectors (columns; rows are R, G, B) of the covariance of the pixels of ImageNet's training images, on
# values 0..255: Krizhevsky et al. (NIPS 2012), section 4.1, with the numbers of GluonCV's train_imagenet.py and MXNet.
_EIGENVALUES = np.array([55.46, 4.794, 1.148])
_EIGENVECTORS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])


def adjust_brightness(image: np.ndarray, factor: float) -> None:
    """Blends an image with black: 0 is black, 1 the image, above 1 brighter (ImageEnhance.Brightness)."""
    _blend(image, factor)


def adjust_contrast(image: np.ndarray, factor: float) -> None:
    """Blends an image with its mean grey, rounded (ImageEnhance.Contrast)."""
    _blend(image, factor, shade=int(cv2.mean(_grey(image))[0] + 0.5))


def adjust_saturation(image: np.ndarray, factor: float) -> None:
    """Blends an image with itself in grey (ImageEnhance.Color)."""
    _blend(image, factor, cv2.cvtColor(_grey(image), cv2.COLOR_GRAY2RGB))


def adjust_sharpness(image: np.ndarray, factor: float) -> None:
    """Blends an image with itself smoothed, but for its outermost pixels (ImageEnhance.Sharpness)."""
    smooth = cv2.filter2D(image, -1, _SMOOTH)
    inner = (slice(1, -1), slice(1, -1))
    other = image.copy()
    other[inner] = smooth[inner]
    _blend(image, factor, other)


def posterize(image: np.ndarray, bits: float) -> None:
    """Keeps the upper `bits` of each value (ImageOps.posterize)."""
    np.bitwise_and(image, 256 - (1 << (8 - int(bits))), out=image, casting="unsafe")


def solarize(image: np.ndarray, threshold: float) -> None:
    """Inverts all values from a threshold on (ImageOps.solarize)."""
    values = np.arange(256)
    cv2.LUT(image, np.where(values < threshold, values, 255 - values).astype(np.uint8), dst=image)


def autocontrast(image: np.ndarray) -> None:
    """Stretches each channel to 0..255 (ImageOps.autocontrast)."""

    def stretched(histogram: np.ndarray) -> np.ndarray:
        (present,) = np.nonzero(histogram)
        low, high = int(present[0]), int(present[-1])
        if high == low:
            return np.arange(256)
        scale = 255.0 / (high - low)
        return (np.arange(256) * scale + -low * scale).astype(np.int64)  # truncated, and clipped below

    _map_channels(image, stretched)


def equalize(image: np.ndarray) -> None:
    """Makes the values of each channel about equally frequent (ImageOps.equalize)."""

    def equalized(histogram: np.ndarray) -> np.ndarray:
        present = histogram[histogram > 0]
        step = int(present.sum() - present[-1]) // 255
        if not step:
            return np.arange(256)
        return (step // 2 + np.cumsum(histogram) - histogram) // step

    _map_channels(image, equalized)


def add_lighting(image: np.ndarray, amounts: Sequence[float]) -> None:
    """Adds the principal components of ImageNet's colours times `amounts`, 3 numbers; truncated and clipped, as in MXNet."""
    shift = _EIGENVECTORS @ (_EIGENVALUES * np.asarray(amounts))
    # To an integer: the sum truncated is that with the shift's floor, and saturates.
    add, subtract = (tuple(np.maximum(each, 0).tolist()) + (0,) for each in (np.floor(shift), -np.floor(shift)))
    cv2.subtract(cv2.add(image, add, dst=image), subtract, dst=image)


def _grey(image: np.ndarray) -> np.ndarray:
    """Returns 0.299 R + 0.587 G + 0.114 B, rounded: uint8 [height, width]."""
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))


def _blend(image: np.ndarray, factor: float, other: Optional[np.ndarray] = None, shade: float = 0.0) -> None:
    """Moves from another image, or a shade of grey, to the image and beyond: `factor` of the way, truncated and clipped."""
    if other is None:
        cv2.addWeighted(image, factor, image, 0.0, (1 - factor) * shade + _TRUNCATED, dst=image)
    else:
        cv2.addWeighted(image, factor, other, 1 - factor, _TRUNCATED, dst=image)


def _map_channels(image: np.ndarray, make_table: Callable[[np.ndarray], np.ndarray]) -> None:
    """Replaces the values of each channel by the table, clipped to 0..255, that is made of their histogram, int64 [256]."""
    images: Any = [image]
    histograms = [cv2.calcHist(images, [channel], None, [256], [0, 256]) for channel in range(3)]
    tables = [np.clip(make_table(each[:, 0].astype(np.int64)), 0, 255) for each in histograms]
    cv2.LUT(image, np.stack(tables, -1).astype(np.uint8)[np.newaxis], dst=image)
