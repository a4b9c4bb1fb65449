"""Which part of an image is shown, and the filter of Pillow that it is resized by; without TensorFlow."""

from typing import Tuple

BILINEAR = 2  # PIL.Image.BILINEAR, which some versions of Pillow expose under another name only
Crop = Tuple[int, int, int, int]  # top, left, height, width


def central_window(height: int, width: int, crop: float) -> Crop:
    """Returns the central square, `crop` times the shorter side: top, left, height and width in pixels."""
    side = round(crop * min(height, width))
    return (height - side) // 2, (width - side) // 2, side, side
