"""Small pictures of records for pages, by one process alone and without TensorFlow."""

import io
from pathlib import Path
from typing import NamedTuple

from hvd_vgg.config import DataConfig
from hvd_vgg.data.formats.layout import find_split, shard_bytes
from hvd_vgg.data.formats.shard_file import data_failure
from hvd_vgg.data.image_header import require_size
from hvd_vgg.data.index import Index, cache_places, cached_shards, join, scan_for, scan_shard
from hvd_vgg.data.windows import BILINEAR, central_window

SIDE = 112  # pixels at most
_LOSSLESS = 64  # pixels: smaller ones are shown enlarged, and would show what JPEG makes of edges


class Thumbnail(NamedTuple):
    """An encoded picture; media: its type, `image/png` for small ones, which are to be shown pixel by pixel."""

    media: str
    data: bytes


def open_alone(config: DataConfig, split: str, fallback_dir: Path, seconds: float) -> Index:
    """Returns the index of a split from its cache, as far as that is current, and else from the shards; writes nothing.

    Raises Failure(DATA) as `find_split` and `scan_shard` do, and where what is not cached takes longer than `seconds`.
    """
    layout, paths = find_split(config, split)
    shard_bytes(paths, layout)  # regular files: opening others may wait for ever
    cached = cached_shards(cache_places(config.data_dir, split, fallback_dir), paths, layout)
    known = {number: each.shard for number, each in cached.items() if each.unchanged}
    left = [number for number in range(len(paths)) if number not in known]
    if left:
        known.update(scan_for(seconds, left, lambda number: scan_shard(paths[number], layout)))
    if len(known) < len(paths):
        raise data_failure(
            f"{config.data_dir}: {len(paths) - len(known)} of {len(paths)} {split} shards are in no index, and to make one "
            f"takes long. hvd-vgg inspect does"
        )
    return join(paths, [known[number] for number in range(len(paths))], layout)


def thumbnail(encoded: bytes, crop: float) -> Thumbnail:
    """Returns the part of an image that is evaluated, at most SIDE pixels high and wide; crop: as of `eval_image`.

    Raises ValueError where it cannot be decoded.
    """
    from PIL import Image  # only for those who ask for it: it takes a while to load

    try:
        if not 0 <= crop <= 1:
            raise ValueError(f"a crop of {crop}")
        with Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG")) as image:
            width, height = image.size
            require_size(encoded, height, width)
            top, left, high, wide = central_window(height, width, crop) if crop else (0, 0, height, width)
            side, box = min(SIDE, max(high, wide)), (left, top, left + wide, top + high)
            shown = image.convert("RGB").resize((side, side), BILINEAR, box)
        file, lossless = io.BytesIO(), side <= _LOSSLESS
        shown.save(file, "PNG" if lossless else "JPEG", quality=80)
    except Exception as error:  # damaged bytes make decoders raise a dozen kinds
        raise ValueError(f"the image cannot be decoded: {type(error).__name__}: {error}") from error
    return Thumbnail("image/png" if lossless else "image/jpeg", file.getvalue())
