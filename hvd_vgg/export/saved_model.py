"""TensorFlow's SavedModel: a signature for encoded images, and one for pixels.

`pixels` is the network itself. `encoded`, which is `serving_default`, also decodes, crops and resizes as evaluation does:
with the same decoder and the same part of the image, but TensorFlow's resize in the place of OpenCV's or Pillow's. They
compute the same filter and round differently, so that a pixel may differ by 1 of 255 (with Pillow's, by 2).
"""

from pathlib import Path
from typing import Any, Dict, Tuple

import numpy as np
import tensorflow as tf

from hvd_vgg.data.transforms import PILLOW_METHOD
from hvd_vgg.export.network import Network
from hvd_vgg.models import vgg

CLASS_NAMES = "class_names.txt"  # the asset


def write(network: Network, path: Path, scratch: Path) -> None:
    """Writes a network without BatchNorm (`network.folded`) into the new directory `path`.

    scratch: a directory for a file that is read meanwhile. Raises OSError, and tf.errors.OpError where TensorFlow cannot
    write.
    """
    module = tf.Module()
    module.network = {name: tf.Variable(value, trainable=False, name=name) for name, value in network.tensors.items()}
    if network.class_names:
        names = scratch / CLASS_NAMES
        names.write_text("".join(f"{name}\n" for name in network.class_names), encoding="utf-8")
        module.class_names = tf.saved_model.Asset(str(names))
    size, config = network.config.image_size, network.config

    def outputs(images: Any) -> Dict[str, Any]:
        logits = vgg.logits(module.network, config.model, images, "NHWC", network.normalization)
        return {"logits": logits, "probabilities": tf.nn.softmax(logits)}

    @tf.function(input_signature=[tf.TensorSpec([None, size, size, 3], tf.uint8, "pixels")], autograph=False)
    def from_pixels(pixels: Any) -> Dict[str, Any]:
        return outputs(pixels)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "encoded")], autograph=False)
    def from_encoded(encoded: Any) -> Dict[str, Any]:
        return outputs(
            tf.map_fn(
                lambda each: decode(each, size, network.crop, network.resize),
                encoded,
                fn_output_signature=tf.TensorSpec([size, size, 3], tf.uint8),
            )
        )

    module.from_pixels, module.from_encoded = from_pixels, from_encoded
    signatures = {"serving_default": from_encoded, "encoded": from_encoded, "pixels": from_pixels}
    tf.saved_model.save(module, str(path), signatures=signatures)


def run(path: Path, pixels: np.ndarray, encoded: Any) -> Tuple[np.ndarray, np.ndarray]:
    """Returns the logits that a SavedModel has for uint8 images [n, size, size, 3], and for `encoded` ones, bytes."""
    model = tf.saved_model.load(str(path))  # kept: in TensorFlow 2.6 signatures alone let their variables go
    of_pixels = model.signatures["pixels"](pixels=tf.constant(pixels))["logits"]
    return np.asarray(of_pixels), np.asarray(model.signatures["encoded"](encoded=tf.constant(encoded))["logits"])


def decode(encoded: Any, size: int, crop: float, resize: str) -> Any:
    """Returns an encoded JPEG or PNG as the network is evaluated on it, uint8 [size, size, 3]; operations of a graph alone.

    crop, resize: as for `transforms.eval_image`.
    """
    if resize == "pillow" and crop:
        image = _decode_window(encoded, lambda shape: tf.stack([0, 0, shape[0], shape[1]]), PILLOW_METHOD)
        return _centre(image, size, crop)
    method = PILLOW_METHOD if resize == "pillow" else ""
    part = _decode_window(encoded, lambda shape: _central_window(shape, crop), method)
    return _resize(part, tf.constant([size, size]), resize)


def _decode_window(encoded: Any, window: Any, method: str) -> Any:
    """Returns a part of an image; window: the function from its height and width to top, left, height and width."""

    def jpeg() -> Any:
        part = window(tf.io.extract_jpeg_shape(encoded)[:2])
        return tf.io.decode_and_crop_jpeg(encoded, part, channels=3, dct_method=method)

    def png() -> Any:
        image = tf.io.decode_png(encoded, channels=3)
        top, left, height, width = tf.unstack(window(tf.shape(image)[:2]))
        return image[top : top + height, left : left + width]

    return tf.cond(tf.io.is_jpeg(encoded), jpeg, png)


def _central_window(shape: Any, crop: float) -> Any:
    """Returns what `windows.central_window` does, or the whole image for a crop of 0."""
    if not crop:
        return tf.stack([0, 0, shape[0], shape[1]])
    side = tf.cast(tf.round(crop * tf.cast(tf.reduce_min(shape), tf.float64)), tf.int32)
    return tf.stack([(shape[0] - side) // 2, (shape[1] - side) // 2, side, side])


def _centre(image: Any, size: int, crop: float) -> Any:
    """Returns an image resized so that its shorter side is size / crop pixels, and of it the central square."""
    shorter = max(size, int(size / crop + 1e-9))
    shape = tf.cast(tf.shape(image)[:2], tf.float64)
    sides = tf.cast(tf.floor(shorter * shape / tf.reduce_min(shape)), tf.int32)
    top, left = tf.unstack(tf.cast(tf.round(tf.cast(sides - size, tf.float64) / 2), tf.int32))
    return tf.ensure_shape(_resize(image, sides, "pillow")[top : top + size, left : left + size], [size, size, 3])


def _resize(image: Any, sides: Any, resize: str) -> Any:
    resized = tf.image.resize(tf.cast(image, tf.float32), sides, antialias=resize == "pillow")
    return tf.cast(tf.floor(resized + 0.5), tf.uint8)
