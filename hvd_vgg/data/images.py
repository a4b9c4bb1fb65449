"""One encoded image to one tensor: `train_image` and `eval_image`, an exact pair, as TensorFlow graph operations."""

from typing import Any, Tuple

import tensorflow as tf

# An image whose header claims more is refused before it is decoded: 269 MB of RGB. The limit at which Pillow warns of a
# decompression bomb; the largest image of ImageNet has about 60 million pixels.
MAX_PIXELS = 1024**3 // 4 // 3

# Random-resized crop as the recipe of torchvision's VGG16 has it (torchvision.transforms.RandomResizedCrop).
_AREA, _RATIO, _TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10
# Evaluation sees the middle 224 of a shorter side of 256, at whatever image size (Simonyan and Zisserman, section 3.2).
_CENTRE = 224 / 256


def train_image(encoded: Any, seed: Any, augment: str, image_size: int) -> Any:
    """Returns one image as the network trains on it.

    encoded: string scalar, JPEG or PNG; seed: int64 [2], of which crop and flip are functions.
    Result: uint8 [image_size, image_size, 3]. An image that cannot be decoded raises InvalidArgumentError.
    """
    height, width = _shape(encoded)
    draws = tf.random.stateless_uniform([3 * _TRIES + 3], seed)
    window = random_window(height, width, draws[3:]) if augment == "crop" else (0, 0, height, width)
    image = _resized(encoded, window, image_size)
    if augment == "shift":
        margin = image_size // 8
        padded = tf.pad(image, [[margin, margin], [margin, margin], [0, 0]])
        offset = tf.cast(draws[1:3] * (2 * margin + 1), tf.int32)
        image = tf.slice(padded, [offset[0], offset[1], 0], [image_size, image_size, 3])
    if augment != "none":
        image = tf.cond(draws[0] < 0.5, lambda: tf.reverse(image, [1]), lambda: image)
    return tf.ensure_shape(image, [image_size, image_size, 3])


def eval_image(encoded: Any, augment: str, image_size: int) -> Any:
    """Returns one image as it is evaluated: the whole of it, or its centre if training took crops.

    Result: uint8 [image_size, image_size, 3]. An image that cannot be decoded raises InvalidArgumentError.
    """
    height, width = _shape(encoded)
    window = (0, 0, height, width)
    if augment == "crop":
        side = tf.cast(tf.round(_CENTRE * tf.cast(tf.minimum(height, width), tf.float32)), tf.int32)
        window = ((height - side) // 2, (width - side) // 2, side, side)
    return tf.ensure_shape(_resized(encoded, window, image_size), [image_size, image_size, 3])


def random_window(height: Any, width: Any, draws: Any) -> Tuple[Any, Any, Any, Any]:
    """Returns (top, left, height, width), int32, of a random part of an image.

    Area uniform in 0.08..1 of the image, ratio of width to height log-uniform in 3/4..4/3, the first of ten tries that
    fits; else the largest central window whose ratio is within bounds. draws: float32 [30], uniform in [0, 1).
    """
    draws = tf.reshape(draws, [3, _TRIES])
    tall, wide = tf.cast(height, tf.float32), tf.cast(width, tf.float32)
    area = tall * wide * (_AREA[0] + draws[0] * (_AREA[1] - _AREA[0]))
    low, high = tf.math.log(_RATIO[0]), tf.math.log(_RATIO[1])
    ratio = tf.exp(low + draws[1] * (high - low))
    widths = tf.cast(tf.round(tf.sqrt(area * ratio)), tf.int32)
    heights = tf.cast(tf.round(tf.sqrt(area / ratio)), tf.int32)
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = tf.argmax(tf.cast(fits, tf.int32))
    # Places of the chosen try and, if none fits, of the central window, share the last row of draws.
    bounded_width = tf.minimum(width, tf.cast(tf.round(tall * _RATIO[1]), tf.int32))
    bounded_height = tf.minimum(height, tf.cast(tf.round(wide / _RATIO[0]), tf.int32))
    found = tf.reduce_any(fits)
    box_height = tf.where(found, heights[first], bounded_height)
    box_width = tf.where(found, widths[first], bounded_width)
    place = tf.where(found, draws[2][:2], [0.5, 0.5])
    top = tf.cast(place[0] * tf.cast(height - box_height + 1, tf.float32), tf.int32)
    left = tf.cast(place[1] * tf.cast(width - box_width + 1, tf.float32), tf.int32)
    return top, left, box_height, box_width


def _shape(encoded: Any) -> Tuple[Any, Any]:
    """Returns (height, width), int32, from the header alone; InvalidArgumentError where it is absurd."""
    shape = tf.cond(tf.io.is_jpeg(encoded), lambda: tf.io.extract_jpeg_shape(encoded)[:2], lambda: _png_shape(encoded))
    # Products in 64 bits: a header may claim 2**31 by 2**31.
    pixels = tf.reduce_prod(tf.cast(shape, tf.int64))
    sane = (tf.reduce_min(shape) > 0) & (pixels <= MAX_PIXELS)
    message = f"its header claims this height and width; expected 1 to {MAX_PIXELS} pixels:"
    with tf.control_dependencies([tf.debugging.Assert(sane, [message, shape])]):
        shape = tf.identity(shape)
    return shape[0], shape[1]


def _png_shape(encoded: Any) -> Any:
    is_png = tf.strings.substr(encoded, 0, 8) == b"\x89PNG\r\n\x1a\n"
    enough = is_png & (tf.strings.length(encoded) >= 24)
    message = "it is neither a JPEG nor a PNG; it begins with"
    with tf.control_dependencies([tf.debugging.Assert(enough, [message, tf.strings.substr(encoded, 0, 8)])]):
        # Width, then height, big-endian, at byte 16 of every PNG (ISO/IEC 15948, section 11.2.2).
        size = tf.io.decode_raw(tf.strings.substr(encoded, 16, 8), tf.int32, little_endian=False)
    return tf.reverse(tf.ensure_shape(size, [2]), [0])


def _resized(encoded: Any, window: Tuple[Any, Any, Any, Any], image_size: int) -> Any:
    top, left, height, width = window
    part = tf.cond(
        tf.io.is_jpeg(encoded),
        # Only the rows and columns of the window are decoded.
        lambda: tf.io.decode_and_crop_jpeg(encoded, [top, left, height, width], channels=3),
        lambda: tf.slice(tf.io.decode_png(encoded, channels=3), [top, left, 0], [height, width, 3]),
    )
    resized = tf.image.resize(part, [image_size, image_size])  # bilinear, half-pixel centres
    return tf.cast(tf.round(resized), tf.uint8)
