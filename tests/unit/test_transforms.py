import io
import struct
import zlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from hvd_vgg.config import ImageConfig
from hvd_vgg.data import transforms
from hvd_vgg.data.transforms import augmentation_params, image_shape, random_window


def natural(height=60, width=80, channels=3):
    y, x = np.mgrid[:height, :width]
    planes = [np.sin(x / 9 + c) * 60 + np.cos(y / 7 - c) * 60 + 128 for c in range(channels)]
    return np.stack(planes, -1).astype(np.uint8)


def encoded(mode, kind="JPEG"):
    channels = {"RGB": 3, "L": 1, "CMYK": 4, "RGBA": 4, "P": 3, "I;16": 1}[mode]
    array = natural(channels=channels)
    if mode == "P":
        image = Image.fromarray(array).convert("P")
    elif mode == "I;16":
        image = Image.fromarray(array[..., 0].astype(np.uint16) * 256)
    else:
        image = Image.fromarray(array.squeeze(), mode="L" if channels == 1 else mode)
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return file.getvalue()


def params_of(n):
    """The augmentation of one image."""
    return augmentation_params(np.array([[123, n]], np.int64), ImageConfig())[0]


def train_image(data, draws, augment, size):
    out = np.zeros([size, size, 3], np.uint8)
    transforms.train_image(data, draws, ImageConfig(augment=augment), out)
    return out


def eval_image(data, augment, size):
    out = np.zeros([size, size, 3], np.uint8)
    transforms.eval_image(data, 0.875 if augment == "crop" else 0.0, "opencv", out)
    return out


def reference(data, size, box=None):
    """Bilinear with half-pixel centres and no antialiasing, by NumPy."""
    part = np.asarray(tf.io.decode_image(data, channels=3, expand_animations=False), np.float64)
    if box:
        part = part[box[0] : box[0] + box[2], box[1] : box[1] + box[3]]
    for axis in (0, 1):
        n = part.shape[axis]
        at = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, n - 1)
        weight = (at - low).reshape([-1, 1, 1] if axis == 0 else [1, -1, 1])
        part = np.take(part, low, axis) * (1 - weight) + np.take(part, high, axis) * weight
    return part


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("RGB", "JPEG"),
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("RGB", "PNG"),
        ("L", "PNG"),
        ("RGBA", "PNG"),
        ("P", "PNG"),
        ("I;16", "PNG"),
    ],
)
@pytest.mark.parametrize("augment", ["none", "crop"])
def test_images_of_every_kind_become_rgb_of_the_size(mode, kind, augment):
    """Every kind that ImageNet holds, and those of PNG."""
    for image in (
        train_image(encoded(mode, kind), params_of(1), augment, 32),
        eval_image(encoded(mode, kind), augment, 32),
    ):
        assert image.shape == (32, 32, 3)
        assert image.dtype == np.uint8
        if mode != "I;16":  # which Pillow does not scale
            expected = np.asarray(Image.open(io.BytesIO(encoded(mode, kind))).convert("RGB")).mean(axis=(0, 1))
            assert np.abs(image.mean(axis=(0, 1)) - expected).max() < 40


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_eval_image_is_bilinear_with_half_pixel_centres(kind):
    data = encoded("RGB", kind)
    difference = np.abs(eval_image(data, "none", 32) - reference(data, 32))
    assert difference.max() <= 1
    assert difference.mean() < 0.5


def test_eval_image_takes_the_centre_with_crops():
    data = encoded("RGB", "PNG")  # 80 by 60: side round(0.875 * 60) = 52, from (4, 14)
    difference = np.abs(eval_image(data, "crop", 32) - reference(data, 32, (4, 14, 52, 52)))
    assert difference.max() <= 1


@pytest.mark.parametrize(("height", "width"), [(60, 80), (20, 150), (375, 500), (448, 448)])
@pytest.mark.parametrize("size", [32, 224])
def test_train_image_is_its_window_resized(height, width, size):
    """Through shrinking, stretching and, of 448 by 448 whole, the factor of 2 that OpenCV has another way for."""
    file = io.BytesIO()
    Image.fromarray(natural(height, width)).save(file, "JPEG", quality=95)
    data, differences = file.getvalue(), []
    for n in range(8):
        draws = params_of(n)
        wanted = reference(data, size, random_window(height, width, draws[3:]))
        found = train_image(data, params_of(n), "crop", size)
        differences.append(np.abs(found - (wanted[:, ::-1] if draws[0] < 0.5 else wanted)))
    whole = np.abs(train_image(data, params_of(0), "none", size) - reference(data, size))
    assert max(each.mean() for each in [*differences, whole]) < 0.5
    # TensorFlow decodes a window without the columns beside it, and so interpolates colour a little differently at its edge.
    assert max(each[2:-2, 2:-2].max() for each in differences) <= 8
    assert whole.max() <= 1


def test_augmentation_params_never_change():
    """Literal numbers: a change here means that no old run can be continued or repeated."""
    assert params_of(7)[:3] == pytest.approx([0.12491519132416173, 0.8137839508964462, 0.841284325309366], abs=1e-15)


def test_augmentation_params_are_uniform_and_independent():
    """Of each other and of either seed; a row does not depend on the others."""
    seeds = np.stack(np.meshgrid(np.arange(-50, 50), np.arange(100)), -1).reshape([-1, 2]).astype(np.int64)
    draws = np.array(augmentation_params(seeds, ImageConfig()))
    assert draws.shape == (10_000, 33) and (draws >= 0).all() and (draws < 1).all()
    assert len(np.unique(draws)) == draws.size
    for column in draws.T:  # 20 classes of 500: chi-squared has mean 19 and deviation 6.2
        counts = np.histogram(column, 20, (0, 1))[0]
        assert ((counts - 500) ** 2 / 500).sum() < 60
    assert np.abs(np.corrcoef(draws.T) - np.eye(33)).max() < 0.05
    one = np.array(augmentation_params(seeds[77:78], ImageConfig()))
    assert (one == draws[77]).all()


def test_train_image_is_a_function_of_its_params():
    """And varies with them."""
    data = encoded("RGB")
    for augment in ("flip", "shift", "crop"):
        each = [train_image(data, params_of(n), augment, 32) for n in range(16)]
        again = [train_image(data, params_of(n), augment, 32) for n in range(16)]
        assert all((a == b).all() for a, b in zip(each, again))
        assert len({image.tobytes() for image in each}) >= (2 if augment == "flip" else 12)
    plain = train_image(data, params_of(0), "none", 32)
    flips = {train_image(data, params_of(n), "flip", 32).tobytes() for n in range(16)}
    assert flips == {plain.tobytes(), plain[:, ::-1].tobytes()}


def test_shift_moves_the_picture_by_an_eighth_at_most():
    plain = train_image(encoded("RGB", "PNG"), params_of(0), "none", 32)
    padded = np.pad(plain, [(4, 4), (4, 4), (0, 0)])
    allowed = {padded[y : y + 32, x : x + 32].tobytes() for y in range(9) for x in range(9)}
    allowed |= {padded[y : y + 32, x : x + 32][:, ::-1].tobytes() for y in range(9) for x in range(9)}
    seen = {train_image(encoded("RGB", "PNG"), params_of(n), "shift", 32).tobytes() for n in range(60)}
    assert seen <= allowed
    assert len(seen) > 40


def test_random_window_has_the_recipes_area_and_ratio():
    """And lies inside the image."""
    height, width = 375, 500
    boxes = np.array([random_window(height, width, row) for row in np.random.default_rng(3).random([500, 30])])
    top, left, tall, wide = boxes.T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + tall <= height).all() and (left + wide <= width).all()
    area, ratio = tall * wide / (height * width), wide / tall
    assert 0.075 < area.min() < 0.12
    assert area.max() > 0.9
    # Uniform but for the tries that do not fit, which are large.
    assert 0.42 < area.mean() < 0.54
    assert ratio.min() > 0.73 and ratio.max() < 1.36
    assert abs(np.log(ratio).mean()) < 0.05


def test_random_window_of_a_strip_is_central():
    """None of the ten tries fits: the largest central window is taken."""
    assert random_window(10, 1000, [0.9] * 30) == (0, (1000 - 13 + 1) // 2, 10, 13)


def saved(**options):
    file = io.BytesIO()
    Image.fromarray(natural(50, 70)).save(file, "JPEG", **options)
    return file.getvalue()


THUMBNAIL = encoded("L")  # a whole JPEG of another size, within a segment


@pytest.mark.parametrize(
    "data",
    [
        saved(),
        saved(progressive=True, optimize=True),
        saved(exif=b"Exif\0\0" + THUMBNAIL, comment=THUMBNAIL, icc_profile=b"\xff\xc0" * 40_000),
        saved(restart_marker_blocks=1),
        saved()[:2] + b"\xff\xff" + saved()[2:],  # markers may be preceded by any number of these
        saved()[:20] + b"garbage" + saved()[20:],
        b"\xff\xd8\xff\x01" + saved()[2:],  # a marker without a segment
    ],
    ids=["plain", "progressive", "segments", "restarts", "fill", "garbage", "bare"],
)
def test_image_shape_is_what_tensorflow_finds(data):
    assert image_shape(data) == tuple(tf.io.extract_jpeg_shape(data).numpy()[:2]) == (50, 70)


def tall_header(height, width):
    data = bytearray(encoded("RGB"))
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(data)


def two_channels():
    """The headers of a JPEG of 10 by 10 pixels with 2 components, and no more."""
    frame = b"\xff\xc0\0\x0e\x08\0\x0a\0\x0a\x02\x01\x11\0\x02\x11\0"
    return b"\xff\xd8" + frame + b"\xff\xda\0\x0a\x02\x01\0\x02\0\0\x3f\0\xff\xd9"


def png_header(height, width):
    data = bytearray(encoded("RGB", "PNG"))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (tall_header(13000, 13000), "claims this height and width"),
        (tall_header(65500, 65500), "claims this height and width"),
        (tall_header(5000, 5000), "claims this height and width"),  # more than its bytes can hold
        (two_channels(), "claims 2 channels; expected 1, 3 or 4"),
        (png_header(100_000, 100_000), "claims this height and width"),
        (png_header(0, 5), "claims this height and width"),
        (png_header(2**31 - 1, 2**31 - 1), "claims this height and width"),
        (b"GIF89a and some more bytes to be long enough", "neither a JPEG nor a PNG"),
        (b"no image", "neither a JPEG nor a PNG"),
        (b"\x89PNG\r\n\x1a\n", "neither a JPEG nor a PNG"),
        (encoded("RGB")[:400], "."),
        (encoded("RGB", "PNG")[:-400], "."),
    ],
    ids=[
        "13000",
        "65500",
        "5000",
        "2channels",
        "png100000",
        "png0",
        "png2**31",
        "gif",
        "text",
        "png-magic",
        "cut-jpeg",
        "cut-png",
    ],
)
def test_images_that_cannot_be_decoded_are_refused(data, told):
    """Or whose header is absurd, before they take memory."""
    for make in (lambda: train_image(data, params_of(1), "crop", 32), lambda: eval_image(data, "none", 32)):
        with pytest.raises(ValueError, match=told):
            make()


@pytest.mark.parametrize("claimed", [(10, 10), (1000, 1000)])
def test_png_with_its_size_elsewhere_is_refused(claimed):
    """The header is read from the first chunk, which decides what is decoded."""
    whole = bytes(tf.io.encode_png(np.zeros((100, 100, 3), np.uint8)).numpy())
    body = struct.pack(">II", *claimed) + b"\x08\x02\0\0\0"
    fake = struct.pack(">I", len(body)) + b"abCd" + body + struct.pack(">I", zlib.crc32(b"abCd" + body))
    out = np.empty((32, 32, 3), np.uint8)
    transforms.eval_image(whole, 0.875, "opencv", out)
    with pytest.raises(ValueError, match="neither a JPEG nor a PNG"):
        transforms.eval_image(whole[:8] + fake + whole[8:], 0.875, "opencv", out)
