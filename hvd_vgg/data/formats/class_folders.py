"""A directory of images for each class, in the order of torchvision's ImageFolder.

Names that begin with a dot, such as .ipynb_checkpoints and ._NAME.jpg, are left out, which ImageFolder does not do.
"""

import itertools
import os
import re
from pathlib import Path
from typing import Iterable, List, Sequence, Tuple

import numpy as np

from hvd_vgg import storage
from hvd_vgg.data.formats.shard_file import IMAGE_SUFFIXES, MAX_RECORD_BYTES, Shard, data_failure, regular_file_size, shown
from hvd_vgg.watchdog import watchdog

OTHER_SUFFIXES = (".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # what ImageFolder reads as well
_PATH_BYTES = 4096  # of a path, at most (PATH_MAX)
# An empty part of a path, or one that leads elsewhere, among names each of which is followed by a zero byte.
_STRAY = re.compile(rb"(?:\A|[\0/])\.{0,2}(?=[\0/])")


def scan(folder: Path, label: int) -> Shard:
    """Returns the index of the images in a directory and those below it: by directory, and in each by name.

    Raises Failure(DATA) where it has none, or one that is empty, larger than MAX_RECORD_BYTES or of another format; OSError.
    """
    names = storage.retrying(folder, lambda: _image_names(folder))
    if not names:
        raise data_failure(f"{shown(folder)} has no image. Expected files .jpg, .jpeg or .png in it, or no such directory")
    return index_files(folder, names, itertools.repeat(label), "Leave it out")


def index_files(folder: Path, names: Sequence[str], labels: Iterable[int], advice: str) -> Shard:
    """Returns the index of files of a directory, in this order, each with its label.

    advice: what to do about a file that is empty or larger than MAX_RECORD_BYTES, for which Failure(DATA) is raised. Raises
    OSError too.
    """
    records: List[Tuple[int, int, int]] = []
    start = 0
    for name, label in zip(names, labels):
        if not len(records) % 1024:
            watchdog.heartbeat(phase="start")
        path = folder / name
        size = regular_file_size(path, storage.retrying(path, path.stat))
        if not 0 < size <= MAX_RECORD_BYTES:
            raise data_failure(f"{shown(path)} has {size} bytes; expected 1 to {MAX_RECORD_BYTES}, one image. {advice}")
        records.append((start, size, label))
        start += len(os.fsencode(name)) + 1
    return Shard.of_records(records, b"".join(os.fsencode(name) + b"\0" for name in names))


def _image_names(folder: Path) -> List[str]:
    found: List[str] = []
    for root, names in walk(folder):
        for name in sorted(names):
            if name.lower().endswith(OTHER_SUFFIXES):
                raise data_failure(f"{shown(root / name)}: training reads JPEG and PNG. Convert it, or leave it out")
            if name.lower().endswith(IMAGE_SUFFIXES):
                found.append(f"{root}/{name}"[len(str(folder)) + 1 :])
    return found


def walk(top: Path) -> List[Tuple[Path, List[str]]]:
    """Returns a directory and those below it, links followed, sorted, with the names of their files; raises OSError.

    Raises Failure(DATA) for a link to a directory that it lies in: following it would count its images again and again.
    """
    found: List[Tuple[Path, List[str]]] = []
    left: List[Tuple[Path, Tuple[Tuple[int, int], ...]]] = [(top, ())]  # with the devices and inodes of those above
    while left:
        folder, above = left.pop()
        status = folder.stat()
        own = status.st_dev, status.st_ino
        if own in above:
            raise data_failure(f"{shown(folder)} is a link to a directory that it lies in. Remove it")
        with os.scandir(folder) as entries:
            seen = [(entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(".")]
        found.append((folder, [name for name, is_folder in seen if not is_folder]))
        left += [(folder / name, (*above, own)) for name, is_folder in seen if is_folder]
    return sorted(found, key=lambda each: str(each[0]))  # as ImageFolder sorts: a/b-c is before a/b/c


def stamp(folder: Path, shard: Shard) -> Tuple[int, int]:
    """Returns two numbers that change when a file below an indexed directory is added, removed or renamed; raises OSError.

    They do not when one is rewritten in place: that would take a look at each file. shard: the index of the directory, or
    NO_RECORDS before it is scanned.
    """
    links = folder.stat().st_nlink
    if links == 2 and not (shard.names == ord("/")).any():
        folders = [folder]  # the usual case, told from its links, and from what was found: it has no other
    elif links < 2 and len(shard.names):
        # Overlay and btrfs do not count links, and listing all directories at each start takes long. Those with images are
        # enough: a new one shows in the time of what holds it. One without images, which the stamp before the scan counts
        # and this one does not, makes the two differ, so that its class is scanned at each start.
        folders = folders_with_images(folder, shard)
    else:
        folders = [root for root, _ in walk(folder)]
    stats = [each.stat() for each in folders if each == folder or each.is_dir()]
    if len(stats) == 1:
        return stats[0].st_size, stats[0].st_mtime_ns
    return sum(each.st_size for each in stats), hash(tuple(each.st_mtime_ns for each in stats))


def folders_with_images(folder: Path, shard: Shard) -> List[Path]:
    """Returns an indexed directory and those below it that lead to its images, in the order in which they are scanned."""
    found = {folder}
    if (shard.names == ord("/")).any():
        for name in set(map(os.path.dirname, shard.names.tobytes().split(b"\0"))):
            path = folder / os.fsdecode(name)
            while path != folder:
                found.add(path)
                path = path.parent
    return sorted(found, key=str)


def file_name(names: np.ndarray, offset: int) -> str:
    """Returns the name at `offset` of the names of an index, uint8 [bytes]."""
    return os.fsdecode(names[offset : offset + _PATH_BYTES].tobytes().partition(b"\0")[0])


def could_be_index(shard: Shard) -> bool:
    """Returns whether `scan` could have made `shard`."""
    ends = np.flatnonzero(shard.names == 0)
    if len(ends) != len(shard.offsets) or ends[-1] != len(shard.names) - 1:
        return False
    starts = np.concatenate([[0], ends[:-1] + 1])
    return bool((shard.offsets == starts).all()) and not _STRAY.search(shard.names.tobytes())
