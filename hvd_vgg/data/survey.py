"""Looks at records one by one: is each read and decoded, what image is it, and by which digest is it found again?

A surveyed record is a row of numbers, so that what is known of ImageNet's 1.28 million records takes 42 bytes each and no
Python object. Rows of several ranks are laid end to end in order of the records; whatever is derived from them is the same
on any number of ranks.
"""

import contextlib
import hashlib
import io
from concurrent.futures import Executor
from typing import Callable, Dict, List, NamedTuple, Sequence, Tuple

import numpy as np

from hvd_vgg.config import ImageConfig
from hvd_vgg.data.image_header import JPEG, PNG
from hvd_vgg.data.index import Index
from hvd_vgg.data.mended import count_writes, decoder_message, decoder_messages, describe
from hvd_vgg.data.reader import read_image
from hvd_vgg.data.transforms import eval_image, image_shape
from hvd_vgg.errors import CONFIGURATION, DATA, Failure

# What is known of a record. A record that could not be read has 0 bytes; an image whose header is no image's has no height
# and width; format: JPEG, PNG or nothing; mode: Pillow's name of its colours, such as RGB, L or CMYK.
ROW: np.dtype = np.dtype(
    [
        ("digest", "<u8", 2),
        ("bytes", "<u4"),
        ("height", "<u4"),
        ("width", "<u4"),
        ("format", "S4"),
        ("mode", "S8"),
        ("bad", "?"),
        ("mended", "?"),
    ]
)
_SIGNATURES = {"JPEG": JPEG, "PNG": PNG}


class Survey(NamedTuple):
    """A split whose records have been looked at; `bad` and `mended` are texts that name the first of these."""

    split: Index
    rows: np.ndarray  # ROW [records]
    bad: List[str]
    mended: List[str]


def check_record(index: Index, record: int, config: ImageConfig) -> Tuple[bytes, str, bool]:
    """Returns a record's encoded image, what is wrong with it, and whether the decoder may have printed about it.

    The image is empty where it cannot be read; nothing is wrong, "", where all of it decodes. Raises Failure(LOST_RANK)
    where storage does not come back.
    """
    written, encoded, error = count_writes(), b"", ""
    try:
        encoded, _ = read_image(index, record)
        # All of the image: training may see any part of it.
        eval_image(encoded, 0.0, config.resize, np.empty([config.image_size, config.image_size, 3], np.uint8))
    except Failure as failed:
        if failed.code != DATA:
            raise
        error = failed.message
    except ValueError as failed:
        error = f"data: {index.where(record)}: {failed}"
    return encoded, error, not error and (not written or count_writes() != written)


def check_block(
    index: Index, records: Sequence[int], check: Callable[[int], Tuple[str, bool]], pool: Executor
) -> Tuple[Dict[int, str], Dict[int, str]]:
    """Returns what is wrong with bad records, and what the decoder says of those that it mends, both by record.

    check: returns of a record what is wrong, and whether the decoder may have printed, as `check_record`; called on the
    threads of `pool`, while nothing else may use stderr.
    """
    with decoder_messages() as messages:
        checked = list(pool.map(check, records))
    bad = {record: error for record, (error, _) in zip(records, checked) if error}
    # Each message is of one of the threads that have written meanwhile.
    suspects = [record for record, (_, wrote) in zip(records, checked) if wrote and messages]
    mended = {record: decoder_message(read_image(index, record)[0]) for record in suspects}
    texts = {record: f"{index.where(record)}: {describe(message)}" for record, message in mended.items() if message}
    return bad, texts


def survey_block(index: Index, first: int, config: ImageConfig, rows: np.ndarray, pool: Executor) -> Tuple[List[str], ...]:
    """Writes what is known of the records from `first` on to `rows`, of dtype ROW, one for each.

    Returns the texts of bad records and of mended ones, in their order; raises as `check_record`. Uses `pool` and stderr as
    `check_block`.
    """

    def survey(record: int) -> Tuple[str, bool]:
        return _survey_record(index, record, config, rows[record - first])

    bad, mended = check_block(index, range(first, first + len(rows)), survey, pool)
    rows["mended"][[record - first for record in mended]] = True
    return list(bad.values()), list(mended.values())


def _survey_record(index: Index, record: int, config: ImageConfig, row: np.ndarray) -> Tuple[str, bool]:
    """Writes what is known of a record to `row`, but whether it is mended; returns as `check_block` wants it."""
    encoded, error, wrote = check_record(index, record, config)
    row["bad"] = bool(error)
    if encoded:
        row["bytes"] = len(encoded)
        row["digest"] = np.frombuffer(hashlib.blake2b(encoded, digest_size=16).digest(), "<u8")
        row["format"], row["mode"], row["height"], row["width"] = describe_image(encoded)
    return error, wrote


def describe_image(encoded: bytes) -> Tuple[str, str, int, int]:
    """Returns (format, colour mode, height, width) from an image's header alone, as ROW has them."""
    from PIL import Image  # a part of it that takes a while to load

    kind = next((name for name, begin in _SIGNATURES.items() if encoded.startswith(begin)), "")
    mode, height, width = "", 0, 0
    with contextlib.suppress(ValueError):
        height, width = image_shape(encoded)  # what training goes by
    # Pillow warns of larger images than that accepts, and raises many kinds of errors for damaged headers.
    if width:
        with contextlib.suppress(Exception), Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG")) as image:
            mode = image.mode
    return kind, mode, height, width


def require_pillow() -> None:
    """Raises Failure(CONFIGURATION) where Pillow, which knows formats and colours, cannot be imported."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise Failure(CONFIGURATION, f"inspect needs Pillow: {error}; pip install --no-deps pillow") from error
