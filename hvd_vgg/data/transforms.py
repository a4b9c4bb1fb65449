"""One encoded image to one array: `train_image` and `eval_image`.

TensorFlow decodes, since it can decode just a window of a JPEG; OpenCV resizes, on bytes, in a fraction of the time of
TensorFlow's resize, which computes in float32; or Pillow, which averages over what it shrinks and takes several times as
long. All release the GIL while they work, so that threads run side by side.
"""

import math
import re
import struct
from typing import Any, List, Sequence, Tuple

import cv2
import numpy as np
import tensorflow as tf

from hvd_vgg.config import ImageConfig
from hvd_vgg.data.augment import DRAWS, augment_image, is_augmented
from hvd_vgg.data.image_header import JPEG, PNG, require_size
from hvd_vgg.data.windows import BILINEAR, Crop, central_window
from hvd_vgg.errors import CONFIGURATION, Failure
from hvd_vgg.seeds import uniform_draws

# The random-resized crop of torchvision's recipe for VGG16 (torchvision.transforms.RandomResizedCrop).
_AREA, _RATIO, _TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10
# What Pillow decodes with. TensorFlow's own choice, INTEGER_FAST, is darker by 0.3 to 0.9 units of 255.
PILLOW_METHOD = "INTEGER_ACCURATE"
_FIRST_DRAWS = 3 + 3 * _TRIES  # of a sample: one for the flip, 2 for the shift, 30 for the crop
# Markers of the JPEG frames that are decoded (baseline, extended, progressive), and of the segments that may precede one:
# Huffman and quantization tables, restart interval, application data, comment.
_FRAMES = frozenset((0xC0, 0xC1, 0xC2))
_SEGMENTS = frozenset((0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)))
cv2.setNumThreads(0)  # the loader has threads of its own


def image_library(resize: str) -> str:
    """Returns what a resized image depends on besides TensorFlow; resize: opencv or pillow, as in `ImageConfig`.

    Raises Failure(CONFIGURATION) where Pillow is needed and cannot be imported.
    """
    if resize == "opencv":
        return f"OpenCV {cv2.__version__}"
    try:
        import PIL
    except ImportError as error:
        raise Failure(CONFIGURATION, f"--resize=pillow: {error}; pip install --no-deps pillow") from error
    return f"OpenCV {cv2.__version__}, Pillow {PIL.__version__}"


def train_image(encoded: bytes, params: Sequence[float], config: ImageConfig, out: np.ndarray) -> None:
    """Writes one image as the network trains on it to `out`, uint8 [image_size, image_size, 3].

    encoded: JPEG or PNG; params: a row of `augmentation_params`, which decides all that is random. Raises ValueError where
    the image cannot be decoded.
    """
    augment = config.augment
    height, width = image_shape(encoded)
    window = random_window(height, width, params[3:]) if augment == "crop" else (0, 0, height, width)
    flips = augment != "none" and params[0] < 0.5
    image = np.empty_like(out) if flips or augment == "shift" else out
    _decode_and_resize(encoded, window, config.resize, image)
    if augment == "shift":
        image_size, margin = len(out), len(out) // 8
        top, left = (int(draw * (2 * margin + 1)) for draw in params[1:3])
        padded = np.pad(image, [(margin, margin), (margin, margin), (0, 0)])
        image = padded[top : top + image_size, left : left + image_size]
    if flips:
        cv2.flip(image, 1, dst=out)
    elif image is not out:
        out[:] = image
    if is_augmented(config):
        augment_image(out, params[_FIRST_DRAWS:], config)


def eval_image(encoded: bytes, crop: float, resize: str, out: np.ndarray) -> None:
    """Writes one image as it is evaluated to `out`, uint8 [n, n, 3]: its central square, or all of it.

    crop: the side of the square relative to the shorter side (0.875 is 224 of 256 pixels: Simonyan and Zisserman,
    section 3.2), or 0 for the whole image; resize: opencv or pillow. Raises ValueError where the image cannot be decoded.
    """
    height, width = image_shape(encoded)
    if crop and resize == "pillow":
        _centre_by_pillow(encoded, height, width, crop, out)
    else:
        window = central_window(height, width, crop) if crop else (0, 0, height, width)
        _decode_and_resize(encoded, window, resize, out)


def decode_image(encoded: bytes) -> np.ndarray:
    """Returns all of an image as it is, uint8 [height, width, 3]; raises ValueError where it cannot be decoded."""
    return _decode(encoded, (0, 0, *image_shape(encoded)))


def augmentation_params(seeds: np.ndarray, config: ImageConfig) -> List[List[float]]:
    """Returns all that is random of each image, numbers in [0, 1): 33 for flip, shift and crop, and those of `augment`.

    seeds: int64 [n, 2], of `sampler.sample_seeds`.
    """
    return list(uniform_draws(seeds, _FIRST_DRAWS + (DRAWS if is_augmented(config) else 0)).tolist())


def random_window(height: int, width: int, params: Sequence[float]) -> Crop:
    """Returns a random part of an image: top, left, height and width in pixels.

    Its area is uniform in 0.08..1 of the image, its ratio of width to height log-uniform in 3/4..4/3. The first of ten
    tries that fits counts; if none does, the largest central window whose ratio is within bounds. params: 30 numbers in
    [0, 1).
    """
    low, high = math.log(_RATIO[0]), math.log(_RATIO[1])
    for attempt in range(_TRIES):
        area = height * width * (_AREA[0] + params[attempt] * (_AREA[1] - _AREA[0]))
        ratio = math.exp(low + params[_TRIES + attempt] * (high - low))
        # height * width = area and width / height = ratio, rounded to pixels
        box_height, box_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < box_height <= height and 0 < box_width <= width:
            down, across = params[2 * _TRIES : 2 * _TRIES + 2]
            return int(down * (height - box_height + 1)), int(across * (width - box_width + 1)), box_height, box_width
    box_height, box_width = min(height, round(width / _RATIO[0])), min(width, round(height * _RATIO[1]))
    return (height - box_height + 1) // 2, (width - box_width + 1) // 2, box_height, box_width


def image_shape(encoded: bytes) -> Tuple[int, int]:
    """Returns (height, width) from the header alone; raises ValueError where that is not the header of a supported image."""
    channels = 3
    if encoded.startswith(JPEG):
        height, width, channels = _jpeg_shape(encoded)
    elif encoded.startswith(PNG) and encoded[8:16] == b"\0\0\0\rIHDR" and len(encoded) >= 24:
        # Width, then height, big-endian, in the first chunk of every PNG (ISO/IEC 15948, sections 5.6 and 11.2.2).
        width, height = struct.unpack(">II", encoded[16:24])
    else:
        raise ValueError(f"it is neither a JPEG nor a PNG; it begins with {encoded[:8]!r}")
    require_size(encoded, height, width)
    if channels not in (1, 3, 4):
        raise ValueError(f"its header claims {channels} channels; expected 1, 3 or 4")
    return height, width


def _jpeg_shape(encoded: bytes) -> Tuple[int, int, int]:
    """Returns (height, width, channels) from the frame header, which segments of known length precede.

    ITU-T T.81, B.1.1.4 and B.2.2. A file that starts in any other way is left to TensorFlow, which is slower: it copies the
    image first.
    """
    start = 2
    while start + 10 <= len(encoded) and encoded[start] == 0xFF:
        if encoded[start + 1] in _FRAMES:
            height, width, channels = struct.unpack(">HHB", encoded[start + 5 : start + 10])
            return height, width, channels
        if encoded[start + 1] not in _SEGMENTS:
            break
        start += 2 + (encoded[start + 2] << 8 | encoded[start + 3])
    try:
        height, width, channels = tf.io.extract_jpeg_shape(encoded).numpy().tolist()
    except tf.errors.OpError as error:
        raise _decode_error(error) from error
    return height, width, channels


def _decode(encoded: bytes, window: Crop, method: str = "") -> np.ndarray:
    """Returns a window of the image, uint8 [height, width, 3]; raises ValueError where it cannot be decoded.

    method: of the inverse DCT, as in tf.io.decode_jpeg; "" is TensorFlow's choice.
    """
    top, left, height, width = window
    data = tf.constant(encoded)
    try:
        if encoded.startswith(JPEG):
            # Only the rows and columns of the window are decoded. The operation itself would take longer to make tensors.
            part = np.asarray(tf.io.decode_and_crop_jpeg(data, tf.constant(window), channels=3, dct_method=method))
        else:
            part = np.asarray(tf.io.decode_png(data, channels=3))[top : top + height, left : left + width]
    except tf.errors.OpError as error:
        raise _decode_error(error) from error
    if part.shape[:2] != (height, width):
        raise ValueError(f"its header claims more than the {part.shape[0]} by {part.shape[1]} pixels that it holds")
    return part


def _decode_and_resize(encoded: bytes, window: Crop, resize: str, out: np.ndarray) -> None:
    """Writes the bilinear resize, with half-pixel centres, of a window of the image to `out`."""
    if resize == "pillow":
        part = _decode(encoded, window, PILLOW_METHOD)
        out[:] = _pillow_resize(part, len(out), (0, 0, part.shape[1], part.shape[0]))
    else:
        cv2.resize(_decode(encoded, window), (len(out), len(out)), dst=out, interpolation=cv2.INTER_LINEAR)


def _centre_by_pillow(encoded: bytes, height: int, width: int, crop: float, out: np.ndarray) -> None:
    """Writes what torchvision's and timm's evaluation makes of an image to `out`, uint8 [n, n, 3].

    They resize all of it so that its shorter side is n / crop pixels, rounded down as the longer one is, and take n by n in
    the centre. The filter of a pixel reaches its own neighbourhood alone, so that only that part is decoded and resized.
    """
    size = len(out)
    shorter = max(size, int(size / crop + 1e-9))  # a crop of 224 / 400 is meant to be of 400
    sides = [int(shorter * side / min(height, width)) for side in (height, width)]
    starts = [round((side - size) / 2) for side in sides]
    scales = [whole / side for whole, side in zip((height, width), sides)]
    bounds = []
    for whole, start, scale in zip((height, width), starts, scales):
        # A linear filter reaches as far as a pixel of its result, or of its image if larger; colour in a JPEG 2 pixels more.
        margin = max(scale, 1.0) + 3
        bounds.append((max(0, int(start * scale - margin)), min(whole, math.ceil((start + size) * scale + margin))))
    (top, bottom), (left, right) = bounds
    part = _decode(encoded, (top, left, bottom - top, right - left), PILLOW_METHOD)
    x, y = starts[1] * scales[1] - left, starts[0] * scales[0] - top
    # Pillow wants the box within the image, which rounding may leave.
    box = (x, y, min(x + size * scales[1], part.shape[1]), min(y + size * scales[0], part.shape[0]))
    out[:] = _pillow_resize(part, size, box)


def _pillow_resize(image: np.ndarray, size: int, box: Tuple[float, float, float, float]) -> np.ndarray:
    """Returns a part (left, top, right, bottom) of an image, resized by Pillow's antialiased bilinear filter."""
    from PIL import Image  # only for those who ask for it: it takes a while to load

    return np.asarray(Image.fromarray(image).resize((size, size), BILINEAR, box))


def _decode_error(error: Any) -> ValueError:
    """Returns TensorFlow's reason in one line."""
    lines = re.sub(r"^\{\{.*?\}\}\s*", "", error.message.split("[Op:")[0].strip()).splitlines()
    text = f"{lines[0]} {' '.join(lines[1:])[:200]}".strip()
    return ValueError(text.encode("unicode_escape").decode())  # it may quote the file
