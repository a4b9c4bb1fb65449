"""Images as they are prepared: their headers, odd ones made RGB JPEGs, large ones encoded anew. By Pillow.

A header is read without decoding the image. Pillow releases the GIL while it decodes and resizes, and while it encodes into
a file, so that threads run side by side.
"""

import contextlib
import io
import os
import warnings
from typing import Any, Iterator, NamedTuple, Tuple

import numpy as np

from hvd_vgg.data.image_header import MAX_PIXELS, require_size
from hvd_vgg.errors import CONFIGURATION, Failure

# The readers of Pillow that are used: among the others are some that start programs, or read files that an image names.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
_JPEG_NAMES = (".jpg", ".jpeg")
_BICUBIC = 3  # PIL.Image.BICUBIC, which some versions of Pillow expose under another name only
RGB_QUALITY = 100  # of imagenet_to_gcs.py and build_imagenet_data.py, for images that are not RGB JPEGs


class Encoding(NamedTuple):
    """What is done to images.

    shorter_side: images whose shorter side is larger are resized to it, in pixels, and encoded with JPEG `quality`; 0: none.
    rgb_jpeg: CMYK JPEGs, PNGs named .jpg or .jpeg, and other formats are made RGB JPEGs.
    """

    shorter_side: int = 0
    quality: int = 90
    rgb_jpeg: bool = True


class Picture(NamedTuple):
    """An encoded image as it is to be written."""

    encoded: bytes
    format: str  # JPEG or PNG
    height: int  # pixels
    width: int
    colorspace: str  # RGB, as the usual converters say of grey images too, for they are decoded as such; or CMYK
    channels: int
    converted: str = ""  # why it was made an RGB JPEG; "" where it was not
    resized: bool = False


def library() -> str:
    """Returns the versions that encoded images depend on; raises Failure(CONFIGURATION) where Pillow is missing."""
    try:
        import PIL
        from PIL import features
    except ImportError as error:
        raise Failure(CONFIGURATION, f"prepare reads images by Pillow: {error}; pip install --no-deps pillow") from error
    return f"Pillow {PIL.__version__}, libjpeg-turbo {features.version('libjpeg_turbo')}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops, in all threads, Pillow's warnings of odd headers inside the block, except those of decompression bombs.

    These are raised, for `make_picture` to report. On the main thread, around all others: Python's filters are global.
    """
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def make_picture(encoded: bytes, name: str, encoding: Encoding) -> Picture:
    """Returns an image as it is to be written, its bytes as they are where nothing is to be done.

    name: the file's, whose extension says what it claims to be. Raises ValueError saying what is wrong with the image: what
    its header shows, or, where it is encoded anew, decoding; OSError.
    """
    from PIL import Image  # here: it takes a while to load

    try:
        image = Image.open(io.BytesIO(encoded), formats=_FORMATS)
        width, height = image.size
        kind = "JPEG" if image.format == "MPO" else str(image.format)  # MPO: a JPEG that others follow in the same file
        require_size(encoded, height, width)
        converted = _oddity(kind, image.mode, name)
        if converted and not encoding.rgb_jpeg:
            if kind not in ("JPEG", "PNG"):
                raise ValueError(f"it is a {kind}; expected JPEG or PNG, or --rgb_jpeg to convert it")
            converted = ""
        larger = 0 < encoding.shorter_side < min(height, width)
        if larger:
            encoded, (width, height) = _resized(image, encoding)
        elif converted:
            encoded = _encode(_rgb(image).convert("RGB"), quality=RGB_QUALITY, subsampling=0)
    except (ValueError, Failure):
        raise
    except MemoryError as error:
        raise Failure(CONFIGURATION, "no memory to decode an image: use fewer --input_threads, or ranks") from error
    except Exception as error:  # damaged bytes make its readers raise a dozen kinds
        if isinstance(error, OSError) and error.errno:  # of the system, and not about the image
            raise
        raise ValueError(_explain(error, encoded)) from error
    kind = "JPEG" if larger or converted else kind
    cmyk = image.mode == "CMYK" and not (larger or converted)
    return Picture(encoded, kind, height, width, *(("CMYK", 4) if cmyk else ("RGB", 3)), converted, larger)


def _oddity(kind: str, mode: str, name: str) -> str:
    """Returns why an image should be made an RGB JPEG; "" if it need not."""
    if kind == "JPEG":
        return "a CMYK JPEG" if mode == "CMYK" else ""
    named_jpeg = name.lower().endswith(_JPEG_NAMES)
    if kind == "PNG":
        return "a PNG named as a JPEG" if named_jpeg else ""
    return f"a {kind}"


def _resized(image: Any, encoding: Encoding) -> Tuple[bytes, Tuple[int, int]]:
    """Returns an image as a JPEG with the shorter side of `encoding`, and its (width, height).

    Its EXIF orientation is ignored, as in training.
    """
    scale = encoding.shorter_side / min(image.size)
    width, height = (max(encoding.shorter_side, round(side * scale)) for side in image.size)
    # Where it is at least twice as large, the decoder itself shrinks it to a half, a quarter or an eighth, not below `size`.
    image.draft(None, (width, height))
    return _encode(_rgb(image).resize((width, height), _BICUBIC), quality=encoding.quality), (width, height)


def _rgb(image: Any) -> Any:
    """Returns an image decoded, in RGB, or grey if it is; without alpha, which training ignores too."""
    from PIL import Image

    if image.mode in ("L", "RGB"):
        image.load()
        return image
    if image.mode.startswith("I"):  # 16 bits, of which Pillow would keep the lowest 8
        return Image.fromarray(np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8))
    return image.convert("RGB")


def _encode(image: Any, **options: int) -> bytes:
    # Pillow holds the GIL while it encodes into memory, and releases it where it writes to a file.
    with open(os.memfd_create("image"), "w+b") as file:
        image.save(file, "JPEG", **options)
        file.seek(0)
        return file.read()


def _explain(error: Exception, encoded: bytes) -> str:
    """Returns what is wrong with an image at which Pillow failed, in one line."""
    kind = type(error).__name__
    if kind == "UnidentifiedImageError":  # its text holds an address in memory
        return f"no image that Pillow can open; it begins with {encoded[:8]!r}"
    text = " ".join(str(error).split())[:200] or kind
    if kind.startswith("DecompressionBomb"):
        return f"a decompression bomb: its header claims more than {MAX_PIXELS} pixels"
    return f"not a whole image ({text})".encode("unicode_escape").decode()  # it may quote the file
