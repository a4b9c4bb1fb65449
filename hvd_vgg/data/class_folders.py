"""A directory of images for each class, in the order of torchvision's ImageFolder."""

import os
from pathlib import Path
from typing import List, Tuple

import numpy as np

from hvd_vgg import storage
from hvd_vgg.data.shard_file import MAX_RECORD_BYTES, Shard, data_failure, regular_file_size

_IMAGES = (".jpg", ".jpeg", ".png")
_OTHERS = (".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # what ImageFolder reads as well


def scan(folder: Path, label: int) -> Shard:
    """Returns the index of the images in a directory and those below it: by directory, and in each by name.

    Raises Failure(DATA) where it has none, or one that is empty, larger than MAX_RECORD_BYTES or of another format; OSError.
    """
    names = storage.retrying(folder, lambda: _image_names(folder))
    if not names:
        raise data_failure(f"{folder} has no image. Expected files .jpg, .jpeg or .png in it, or no such directory")
    records: List[Tuple[int, int, int]] = []
    start = 0
    for name in names:
        path = folder / name
        size = regular_file_size(path, storage.retrying(path, path.stat))
        if not 0 < size <= MAX_RECORD_BYTES:
            raise data_failure(f"{path} has {size} bytes; expected 1 to {MAX_RECORD_BYTES}, one image. Leave it out")
        records.append((start, size, label))
        start += len(os.fsencode(name)) + 1
    return Shard.of_records(records, b"".join(os.fsencode(name) + b"\0" for name in names))


def _image_names(folder: Path) -> List[str]:
    def fail(error: OSError) -> None:
        raise error

    found: List[str] = []
    for root, _, names in sorted(os.walk(folder, onerror=fail, followlinks=True)):
        for name in sorted(names):
            path = Path(root, name)
            if name.lower().endswith(_OTHERS):
                raise data_failure(f"{path}: training reads JPEG and PNG. Convert it; hvd-vgg prepare makes TFRecords")
            if name.lower().endswith(_IMAGES):
                found.append(str(path.relative_to(folder)))
    return found


def file_name(names: np.ndarray, offset: int) -> str:
    """Returns the name at `offset` of the names of an index, uint8 [bytes]."""
    end = offset + int(np.argmin(names[offset : offset + 4096] != 0))
    return os.fsdecode(names[offset:end].tobytes())


def could_be_index(shard: Shard) -> bool:
    """Returns whether `scan` could have made `shard`."""
    ends = np.flatnonzero(shard.names == 0)
    return len(ends) == len(shard.offsets) and bool(
        (shard.offsets == np.concatenate([[0], ends[:-1] + 1])).all() and ends[-1] == len(shard.names) - 1
    )
