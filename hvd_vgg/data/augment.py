"""What training does to an image after its crop and flip: random operations on bytes, functions of the sample's own draws.

They come in the order of torchvision's classification reference and of GluonCV: TrivialAugment, colour jitter, lighting,
erasing.
"""

import itertools
import math
from typing import Callable, Dict, List, NamedTuple, Sequence, Tuple

import cv2
import numpy as np

from hvd_vgg.config import ImageConfig
from hvd_vgg.data import colour

# Draws of a sample, numbers uniform in [0, 1), behind those of its crop, shift and flip. Each augmentation has its own, used
# or not: switching one on changes nothing about the others. New ones are appended.
_TRIVIAL, _JITTER, _LIGHTING, _ERASING = slice(0, 3), slice(3, 7), slice(7, 11), slice(11, 34)
DRAWS = 34
_BINS = 31  # of TrivialAugment's magnitudes
# Random erasing: area as a part of the image's, ratio of height to width, tries (torchvision.transforms.RandomErasing).
_AREA, _RATIO, _TRIES = (0.02, 0.33), (0.3, 3.3), 10
# ImageNet's mean colour, which normalizing turns into about 0: torchvision erases with 0 after it.
MEAN_COLOUR = (124, 116, 104)
Adjust = Callable[[np.ndarray, float], None]
_ORDERS = tuple(itertools.permutations((colour.adjust_brightness, colour.adjust_contrast, colour.adjust_saturation)))
Affine = Tuple[float, float, float, float, float, float]


def is_augmented(config: ImageConfig) -> bool:
    """Returns whether training images are changed beyond crop, shift and flip."""
    return bool(config.color_jitter or config.pca_lighting or config.random_erasing or config.auto_augment != "none")


def augment_image(image: np.ndarray, draws: Sequence[float], config: ImageConfig) -> None:
    """Changes an image in place, uint8 [n, n, 3]; draws: DRAWS numbers in [0, 1)."""
    if config.auto_augment == "trivial":
        name, magnitude = trivial_choice(draws[_TRIVIAL])
        OPERATIONS[name].apply(image, magnitude)
    if config.color_jitter:
        for adjust, factor in jitter_steps(config.color_jitter, draws[_JITTER]):
            adjust(image, factor)
    if config.pca_lighting:
        colour.add_lighting(image, [config.pca_lighting * each for each in standard_normals(draws[_LIGHTING])[:3]])
    if config.random_erasing and draws[_ERASING.start] < config.random_erasing:
        top, left, height, width = erased_rectangle(len(image), image.shape[1], draws[_ERASING][1:])
        image[top : top + height, left : left + width] = MEAN_COLOUR


def jitter_steps(strength: float, draws: Sequence[float]) -> List[Tuple[Adjust, float]]:
    """Returns changes of brightness, contrast and saturation in random order, and the factor of each.

    Factors are uniform in max(0, 1 - strength) to 1 + strength (torchvision.transforms.ColorJitter, without hue). draws: one
    for the order, one for each factor.
    """
    low, high = max(0.0, 1 - strength), 1 + strength
    return [(adjust, low + draw * (high - low)) for adjust, draw in zip(_ORDERS[int(draws[0] * len(_ORDERS))], draws[1:])]


def standard_normals(draws: Sequence[float]) -> List[float]:
    """Returns as many standard normal numbers as `draws`, an even number of them in [0, 1), by Box and Muller (1958).

    Of each two draws u and v: sqrt(-2 ln(1 - u)) times the cosine, and the sine, of 2 pi v.
    """
    found = []
    for first, second in zip(draws[::2], draws[1::2]):
        radius, angle = math.sqrt(-2 * math.log(1 - first)), 2 * math.pi * second
        found += [radius * math.cos(angle), radius * math.sin(angle)]
    return found


def erased_rectangle(tall: int, wide: int, draws: Sequence[float]) -> Tuple[int, int, int, int]:
    """Returns a random rectangle in an image of tall by wide pixels: top, left, height and width.

    Its area is uniform in 0.02..0.33 of the image's, its ratio of height to width log-uniform in 0.3..3.3 (Zhong et al.,
    arXiv 1708.04896, with torchvision's numbers). The first of ten tries that is smaller than the image both ways counts; if
    none is, the rectangle is empty. draws: 22 numbers in [0, 1).
    """
    low, high = math.log(_RATIO[0]), math.log(_RATIO[1])
    for attempt in range(_TRIES):
        area = tall * wide * (_AREA[0] + draws[attempt] * (_AREA[1] - _AREA[0]))
        ratio = math.exp(low + draws[_TRIES + attempt] * (high - low))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if height < tall and width < wide:
            down, across = draws[2 * _TRIES :]
            return int(down * (tall - height + 1)), int(across * (wide - width + 1)), height, width
    return 0, 0, 0, 0


class Operation(NamedTuple):
    """One of TrivialAugment's: changes an image in place by a magnitude."""

    apply: Adjust
    magnitude: Callable[[int], float]  # of a bin, 0 to 30
    signed: bool  # whether the magnitude is negative half of the time


def trivial_choice(draws: Sequence[float]) -> Tuple[str, float]:
    """Returns one of OPERATIONS and its magnitude at random (TrivialAugment, wide space; arXiv 2103.10158, table 1).

    draws: 3 numbers in [0, 1) for operation, magnitude and sign.
    """
    name = tuple(OPERATIONS)[int(draws[0] * len(OPERATIONS))]
    magnitude = OPERATIONS[name].magnitude(int(draws[1] * _BINS))
    return name, -magnitude if OPERATIONS[name].signed and draws[2] < 0.5 else magnitude


def _rotate(image: np.ndarray, degrees: float) -> None:
    """Rotates an image counterclockwise about its centre, within its bounds (Pillow's Image.rotate)."""
    cosine, sine = (round(part(-math.radians(degrees)), 15) for part in (math.cos, math.sin))
    y, x = (side / 2 for side in image.shape[:2])
    _warp(image, (cosine, sine, x - cosine * x - sine * y, -sine, cosine, y + sine * x - cosine * y))


def _translate(image: np.ndarray, right: int, down: int) -> None:
    """Moves an image by whole pixels, and fills with black."""
    height, width = image.shape[:2]
    moved = np.zeros_like(image)
    moved[max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)] = image[
        max(0, -down) : height - max(0, down), max(0, -right) : width - max(0, right)
    ]
    image[:] = moved


def _warp(image: np.ndarray, matrix: Affine) -> None:
    """Replaces each pixel by that of the point (a x + b y + c, d x + e y + f), bilinear, or by black if it is outside.

    As Pillow's Image.transform, where a pixel's centre is at x + 0.5: a point within half a pixel of the edge takes the
    edge's colour. Unlike there, points are rounded to 1/32 of a pixel, and values to the nearest integer.
    """
    height, width = image.shape[:2]
    a, b, c, d, e, f = matrix
    by_index = np.array([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    warped = cv2.warpAffine(image, by_index, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    low, high = np.stack([_within(a, b * y + c, width), _within(d, e * y + f, height)], 1)
    inside = (x >= low.max(0)[:, np.newaxis]) & (x < high.min(0)[:, np.newaxis])
    image[:] = 0
    cv2.copyTo(warped, inside.view(np.uint8), image)


def _within(slope: float, starts: np.ndarray, side: int) -> np.ndarray:
    """Returns between which x, float64 [2, n], slope * x + start is within 0 and `side`, for each of `starts`, [n]."""
    if slope:
        return np.sort([-starts / slope, (side - starts) / slope], 0)
    return np.where((starts >= 0) & (starts < side), [[-np.inf], [np.inf]], np.inf)


def _linear(limit: float) -> Callable[[int], float]:
    return lambda number: limit * number / (_BINS - 1)


def _no_magnitude(number: int) -> float:
    return 0.0


# torchvision.transforms.TrivialAugmentWide, in its order. Its float32 makes 15 pixels of the 16 of a translation's bin 15.
OPERATIONS: Dict[str, Operation] = {
    "Identity": Operation(lambda image, _: None, _no_magnitude, False),
    "ShearX": Operation(lambda image, shear: _warp(image, (1, shear, 0, 0, 1, 0)), _linear(0.99), True),
    "ShearY": Operation(lambda image, shear: _warp(image, (1, 0, 0, shear, 1, 0)), _linear(0.99), True),
    "TranslateX": Operation(lambda image, pixels: _translate(image, int(pixels), 0), _linear(32), True),
    "TranslateY": Operation(lambda image, pixels: _translate(image, 0, int(pixels)), _linear(32), True),
    "Rotate": Operation(_rotate, _linear(135), True),
    "Brightness": Operation(lambda image, change: colour.adjust_brightness(image, 1 + change), _linear(0.99), True),
    "Color": Operation(lambda image, change: colour.adjust_saturation(image, 1 + change), _linear(0.99), True),
    "Contrast": Operation(lambda image, change: colour.adjust_contrast(image, 1 + change), _linear(0.99), True),
    "Sharpness": Operation(lambda image, change: colour.adjust_sharpness(image, 1 + change), _linear(0.99), True),
    "Posterize": Operation(colour.posterize, lambda number: 8 - round(number / 5), False),
    "Solarize": Operation(colour.solarize, lambda number: 255 - _linear(255)(number), False),
    "AutoContrast": Operation(lambda image, _: colour.autocontrast(image), _no_magnitude, False),
    "Equalize": Operation(lambda image, _: colour.equalize(image), _no_magnitude, False),
}
