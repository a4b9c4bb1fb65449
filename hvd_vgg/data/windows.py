"""Which part of an image is shown, from its height and width alone."""

from typing import Tuple

Crop = Tuple[int, int, int, int]  # top, left, height, width


def central_window(height: int, width: int, crop: float) -> Crop:
    """Returns the central square, `crop` times the shorter side: top, left, height and width in pixels."""
    side = round(crop * min(height, width))
    return (height - side) // 2, (width - side) // 2, side, side
