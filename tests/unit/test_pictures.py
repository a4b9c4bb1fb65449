"""Images as `prepare` makes them: headers, RGB JPEGs, sizes, and what is refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from raw_sets import encode

from hvd_vgg.data import transforms
from hvd_vgg.data.conversion.pictures import Encoding, library, make_picture, quiet
from hvd_vgg.data.image_header import MAX_PIXELS

PLAIN = Encoding()


def pixels(encoded, mode="RGB"):
    return np.asarray(Image.open(io.BytesIO(encoded)).convert(mode)).astype(int)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width, height):
    """Returns a PNG that claims so many pixels, and has none."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("kind", "mode", "name"),
    [("JPEG", "RGB", "a.JPEG"), ("JPEG", "L", "a.jpg"), ("PNG", "RGBA", "a.png"), ("PNG", "P", "")],
)
def test_picture_that_is_usual_keeps_its_bytes(kind, mode, name):
    """And its header is read: height before width."""
    encoded = encode(1, kind, mode)
    picture = make_picture(encoded, name, PLAIN)
    assert picture == (encoded, kind, 40, 48, "RGB", 3, "", False)


@pytest.mark.parametrize(
    ("kind", "mode", "name", "reason"),
    [
        ("JPEG", "CMYK", "n02447366_23489.JPEG", "a CMYK JPEG"),
        ("PNG", "RGB", "n02105855_2933.JPEG", "a PNG named as a JPEG"),
        ("PNG", "RGBA", "a.jpg", "a PNG named as a JPEG"),
        ("WEBP", "RGB", "a.webp", "a WEBP"),
    ],
)
def test_picture_that_is_odd_becomes_rgb_jpeg(kind, mode, name, reason):
    """Of quality 100, so that its colours stay; its colours are those that Pillow sees."""
    encoded = encode(1, kind, mode)
    picture = make_picture(encoded, name, PLAIN)
    assert (picture.format, picture.height, picture.width, picture.converted) == ("JPEG", 40, 48, reason)
    image = Image.open(io.BytesIO(picture.encoded))
    assert (image.format, image.mode) == ("JPEG", "RGB")
    assert np.abs(pixels(picture.encoded) - pixels(encoded)).max() <= 4
    transforms.eval_image(picture.encoded, 0.0, "opencv", np.empty([32, 32, 3], np.uint8))


def test_picture_without_rgb_jpeg_stays():
    """CMYK is then called so; what training cannot read is refused."""
    cmyk, off = encode(1, "JPEG", "CMYK"), Encoding(rgb_jpeg=False)
    assert make_picture(cmyk, "a.jpg", off) == (cmyk, "JPEG", 40, 48, "CMYK", 4, "", False)
    png = encode(1, "PNG")
    assert make_picture(png, "a.JPEG", off).encoded == png
    with pytest.raises(ValueError, match="it is a WEBP; expected JPEG or PNG, or --rgb_jpeg"):
        make_picture(encode(1, "WEBP"), "a.webp", off)


@pytest.mark.parametrize(("size", "shorter", "expected"), [((480, 360), 90, (120, 90)), ((300, 700), 256, (256, 597))])
def test_picture_that_is_larger_is_resized(size, shorter, expected):
    """By the shorter side, antialiased, as a resize of all of the image shows."""
    y, x = np.mgrid[: size[1], : size[0]]
    image = np.stack([128 + 100 * np.sin(x / 40), 128 + 100 * np.cos(y / 30), 128 + 100 * np.sin((x + y) / 50)], -1)
    file = io.BytesIO()
    Image.fromarray(image.astype(np.uint8)).save(file, "JPEG", quality=95)
    encoded = file.getvalue()
    picture = make_picture(encoded, "a.jpg", Encoding(shorter, 95))
    assert (picture.width, picture.height, picture.resized, picture.converted) == (*expected, True, "")
    assert Image.open(io.BytesIO(picture.encoded)).size == expected
    whole = np.asarray(Image.open(io.BytesIO(encoded)).resize(expected, 3)).astype(int)
    assert np.abs(pixels(picture.encoded) - whole).mean() < 4


def test_picture_that_is_not_larger_keeps_its_bytes():
    encoded = encode(1, "JPEG")
    assert make_picture(encoded, "a.jpg", Encoding(40)).encoded == encoded
    assert make_picture(encoded, "a.jpg", Encoding(39)).resized


def test_picture_of_16_bits_keeps_its_brightness():
    """Pillow alone would keep the lower 8 bits, or the highest value."""
    file = io.BytesIO()
    Image.fromarray((np.arange(40 * 48).reshape(40, 48) * 34).astype(np.uint16)).save(file, "PNG")
    picture = make_picture(file.getvalue(), "a.jpg", PLAIN)
    assert np.abs(pixels(picture.encoded, "L") - (np.arange(40 * 48).reshape(40, 48) * 34 >> 8)).max() <= 3


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (b"", "no image that Pillow can open; it begins with b''"),
        (b"<html>404</html>", "no image that Pillow can open; it begins with b'<html>40'"),
        (encode(1)[:150], "image"),
        (png_header(20_000, 20_000), "decompression bomb"),
        (png_header(13_000, 13_000), "decompression bomb"),
        (encode(1, "GIF")[:6], "image"),
    ],
    ids=["empty", "page", "cut", "large bomb", "bomb", "gif"],
)
def test_picture_that_is_none_is_refused(encoded, reason):
    """Before anything is decoded."""
    with quiet(), pytest.raises(ValueError, match=reason):
        make_picture(encoded, "a.jpg", PLAIN)


def test_picture_that_claims_too_much_is_refused():
    """A JPEG has a bit at least for each block of 64 pixels: what training refuses is refused here."""
    encoded = bytearray(encode(1, "JPEG", size=(64, 64)))
    start = encoded.index(b"\xff\xc0") + 5
    encoded[start : start + 4] = struct.pack(">HH", 9000, 9000)
    with pytest.raises(ValueError, match="its header claims this height and width; expected 1 to"):
        make_picture(bytes(encoded), "a.jpg", PLAIN)
    with pytest.raises(ValueError, match="its header claims this height and width; expected 1 to"):
        transforms.image_shape(bytes(encoded))
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS


def test_picture_that_is_cut_is_refused_when_decoded():
    """Its header alone does not show it, and then its bytes stay."""
    encoded = encode(1, "JPEG", size=(480, 360))
    cut = encoded[: len(encoded) // 2]
    assert make_picture(cut, "a.jpg", PLAIN).encoded == cut
    with pytest.raises(ValueError, match=r"not a whole image \(image file is truncated"):
        make_picture(cut, "a.jpg", Encoding(64))


def test_pictures_name_their_libraries():
    assert "Pillow" in library() and "libjpeg-turbo" in library()
