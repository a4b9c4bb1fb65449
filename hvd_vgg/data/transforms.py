"""One encoded image to one array: `train_image` and `eval_image`, an exact pair.

TensorFlow decodes, since it decodes no more than a window of a JPEG; OpenCV resizes, on bytes, in a fraction of the time of
TensorFlow's resize, which computes in float32. Both let go of Python's lock while they work, so threads run side by side.
"""

import math
import re
import struct
from typing import Any, List, Sequence, Tuple

import cv2
import numpy as np
import tensorflow as tf

from hvd_vgg.seeds import GOLDEN_GAMMA, splitmix64

# What a resized image depends on besides TensorFlow.
IMAGE_LIBRARY = f"OpenCV {cv2.__version__}"
# An image whose header claims more is refused before it is decoded: 269 MB of RGB. The limit at which Pillow warns of a
# decompression bomb; the largest image of ImageNet has about 60 million pixels.
MAX_PIXELS = 1024**3 // 4 // 3
# And a JPEG whose header claims more than its bytes can hold: a block of 8 by 8 takes at least a bit. Some hundred bytes
# would otherwise be decoded into a hundred million grey pixels.
_JPEG_PIXELS_A_BYTE = 8 * 64
# Random-resized crop as the recipe of torchvision's VGG16 has it (torchvision.transforms.RandomResizedCrop).
_AREA, _RATIO, _TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10
# Evaluation sees the middle 224 of a shorter side of 256, at whatever image size (Simonyan and Zisserman, section 3.2).
_CENTRE = 224 / 256
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
# Markers of a JPEG's frame headers (of those that are decoded: baseline, extended, progressive), and of the segments that
# may stand before one: Huffman and quantization tables, restart interval, application data, comment.
_FRAMES = frozenset((0xC0, 0xC1, 0xC2))
_SEGMENTS = frozenset((0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)))
# Whoever calls has threads of its own: OpenCV starts none.
cv2.setNumThreads(0)
Window = Tuple[int, int, int, int]  # top, left, height, width


def train_image(encoded: bytes, draws: Sequence[float], augment: str, out: np.ndarray) -> None:
    """Writes one image as the network trains on it to `out`, uint8 [image_size, image_size, 3].

    encoded: JPEG or PNG; draws: a row of `image_draws`, of which crop and flip are functions. An image that cannot be
    decoded raises ValueError.
    """
    height, width = image_shape(encoded)
    window = random_window(height, width, draws[3:]) if augment == "crop" else (0, 0, height, width)
    flips = augment != "none" and draws[0] < 0.5
    image = np.empty_like(out) if flips or augment == "shift" else out
    _decode_and_resize(encoded, window, image)
    if augment == "shift":
        image_size, margin = len(out), len(out) // 8
        top, left = (int(draw * (2 * margin + 1)) for draw in draws[1:3])
        padded = np.pad(image, [(margin, margin), (margin, margin), (0, 0)])
        image = padded[top : top + image_size, left : left + image_size]
    if flips:
        cv2.flip(image, 1, dst=out)
    elif image is not out:
        out[:] = image


def eval_image(encoded: bytes, augment: str, out: np.ndarray) -> None:
    """Writes one image as it is evaluated to `out`: the whole of it, or its centre if training took crops.

    out: uint8 [image_size, image_size, 3]. An image that cannot be decoded raises ValueError.
    """
    height, width = image_shape(encoded)
    _decode_and_resize(encoded, central_window(height, width) if augment == "crop" else (0, 0, height, width), out)


def random_window(height: int, width: int, draws: Sequence[float]) -> Window:
    """Returns (top, left, height, width) of a random part of an image.

    Area uniform in 0.08..1 of the image, ratio of width to height log-uniform in 3/4..4/3, the first of ten tries that
    fits; else the largest central window whose ratio is within bounds. draws: 30 numbers, uniform in [0, 1).
    """
    low, high = math.log(_RATIO[0]), math.log(_RATIO[1])
    for chance in range(_TRIES):
        area = height * width * (_AREA[0] + draws[chance] * (_AREA[1] - _AREA[0]))
        ratio = math.exp(low + draws[_TRIES + chance] * (high - low))
        box_height, box_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < box_height <= height and 0 < box_width <= width:
            down, across = draws[2 * _TRIES : 2 * _TRIES + 2]
            return int(down * (height - box_height + 1)), int(across * (width - box_width + 1)), box_height, box_width
    box_height, box_width = min(height, round(width / _RATIO[0])), min(width, round(height * _RATIO[1]))
    return (height - box_height + 1) // 2, (width - box_width + 1) // 2, box_height, box_width


def central_window(height: int, width: int) -> Window:
    """Returns (top, left, height, width) of the middle square that is evaluated."""
    side = round(_CENTRE * min(height, width))
    return (height - side) // 2, (width - side) // 2, side, side


def augmentation_params(seeds: np.ndarray) -> List[List[float]]:
    """Returns all that is random of each image: 33 numbers in [0, 1): one for the flip, 2 for the shift, 30 for the crop.

    seeds: int64 [n, 2]. They are the upper 53 bits of each 64 of the SplitMix64 stream (Steele, Lea and Flood, OOPSLA 2014)
    that starts at a hash of a row of seeds: for all rows at once, because a generator made for each would cost more than
    its numbers.
    """
    first, second = seeds.astype(np.uint64).T
    start = splitmix64(first + splitmix64(second + GOLDEN_GAMMA))
    bits = splitmix64(start[:, None] + GOLDEN_GAMMA * np.arange(1, 3 + 3 * _TRIES + 1, dtype=np.uint64))
    return list(((bits >> np.uint64(11)) * 2.0**-53).tolist())


def image_shape(encoded: bytes) -> Tuple[int, int]:
    """Returns (height, width) from the header alone; ValueError where it is absurd."""
    channels, most = 3, MAX_PIXELS
    if encoded.startswith(_JPEG):
        most = min(most, _JPEG_PIXELS_A_BYTE * len(encoded))
        height, width, channels = _jpeg_shape(encoded)
    elif encoded.startswith(_PNG) and encoded[8:16] == b"\0\0\0\rIHDR" and len(encoded) >= 24:
        # Width, then height, big-endian, in the first chunk of every PNG (ISO/IEC 15948, sections 5.6 and 11.2.2).
        width, height = struct.unpack(">II", encoded[16:24])
    else:
        raise ValueError(f"it is neither a JPEG nor a PNG; it begins with {encoded[:8]!r}")
    if not (height > 0 and width > 0 and height * width <= most):
        raise ValueError(f"its header claims this height and width; expected 1 to {most} pixels: {height} by {width}")
    if channels not in (1, 3, 4):
        raise ValueError(f"its header claims {channels} channels; expected 1, 3 or 4")
    return height, width


def _jpeg_shape(encoded: bytes) -> Tuple[int, int, int]:
    """Returns (height, width, channels) from the frame header, which segments of known length precede.

    ITU-T T.81, B.1.1.4 and B.2.2. What begins in any other way is left to TensorFlow, which takes longer, copying the image.
    """
    at = 2
    while at + 10 <= len(encoded) and encoded[at] == 0xFF:
        if encoded[at + 1] in _FRAMES:
            height, width, channels = struct.unpack(">HHB", encoded[at + 5 : at + 10])
            return height, width, channels
        if encoded[at + 1] not in _SEGMENTS:
            break
        at += 2 + (encoded[at + 2] << 8 | encoded[at + 3])
    try:
        height, width, channels = tf.io.extract_jpeg_shape(encoded).numpy().tolist()
    except tf.errors.OpError as error:
        raise _decode_error(error) from error
    return height, width, channels


def _decode_and_resize(encoded: bytes, window: Window, out: np.ndarray) -> None:
    """Writes the bilinear resize, with half-pixel centres, of a window of the image to `out`."""
    top, left, height, width = window
    data = tf.constant(encoded)
    try:
        if encoded.startswith(_JPEG):
            # Only the rows and columns of the window are decoded.
            # Given tensors: the operation itself would take longer to make them.
            part = np.asarray(tf.io.decode_and_crop_jpeg(data, tf.constant(window), channels=3))
        else:
            part = np.asarray(tf.io.decode_png(data, channels=3))[top : top + height, left : left + width]
    except tf.errors.OpError as error:
        raise _decode_error(error) from error
    if part.shape[:2] != (height, width):
        raise ValueError(f"its header claims more than the {part.shape[0]} by {part.shape[1]} pixels of it that there are")
    cv2.resize(part, (len(out), len(out)), dst=out, interpolation=cv2.INTER_LINEAR)


def _decode_error(error: Any) -> ValueError:
    """Returns TensorFlow's reason in one line."""
    lines = re.sub(r"^\{\{.*?\}\}\s*", "", error.message.split("[Op:")[0].strip()).splitlines()
    text = f"{lines[0]} {' '.join(lines[1:])[:200]}".strip()
    return ValueError(text.encode("unicode_escape").decode())  # it may quote the file
