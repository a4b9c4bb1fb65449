"""What the header of an encoded image may claim before it is decoded: by training, `prepare` and `inspect` alike."""

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"  # how such files begin
# An image whose header claims more is refused before it is decoded: 269 MB of RGB. The limit at which Pillow warns of a
# decompression bomb; the largest image of ImageNet has about 60 million pixels.
MAX_PIXELS = 1024**3 // 4 // 3
# So is a JPEG whose header claims more than its bytes can hold, as a block of 8 by 8 takes at least a bit: a few hundred
# bytes would otherwise be decoded into a hundred million grey pixels.
_JPEG_PIXELS_PER_BYTE = 8 * 64


def require_size(encoded: bytes, height: int, width: int) -> None:
    """Raises ValueError where the header of an image claims a height and width, in pixels, that are refused."""
    limit = min(MAX_PIXELS, _JPEG_PIXELS_PER_BYTE * len(encoded)) if encoded.startswith(JPEG) else MAX_PIXELS
    if not (height > 0 and width > 0 and height * width <= limit):
        raise ValueError(f"its header claims this height and width; expected 1 to {limit} pixels: {height} by {width}")
