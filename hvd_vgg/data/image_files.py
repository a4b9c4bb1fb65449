"""Single image files and directories of them, as an index: what `hvd-vgg predict` is given."""

import os
import stat
from pathlib import Path
from typing import List, NamedTuple, Sequence

from hvd_vgg import storage
from hvd_vgg.data.formats.class_folders import OTHER_SUFFIXES, walk
from hvd_vgg.data.formats.layout import FOLDERS, Layout
from hvd_vgg.data.formats.shard_file import IMAGE_SUFFIXES, MAX_RECORD_BYTES, Shard, shown
from hvd_vgg.data.index import Index, join
from hvd_vgg.errors import USAGE, Failure
from hvd_vgg.watchdog import watchdog

_MAX_LISTED = 5


class ImageFiles(NamedTuple):
    """Files in order: their paths and sizes in bytes. passed_over: those that are no images, each with what is wrong."""

    paths: List[str]
    sizes: List[int]
    passed_over: List[str]


def find_images(given: Sequence[str]) -> ImageFiles:
    """Returns the files that are given, in this order; in the place of a directory the images in and below it, sorted.

    Those in directories are recognised by their names' endings; hidden ones are left out. What is no regular file, or larger
    than MAX_RECORD_BYTES, is passed over. Raises Failure(USAGE) where one is missing or cannot be looked at, or there are
    none; Failure(DATA) for a directory with a link to one above it.
    """
    paths: List[str] = []
    missing: List[str] = []
    for word in given:
        path = Path(word)
        if not word:  # which would be the current directory
            missing.append('"": an empty name')
            continue
        try:
            if storage.retrying(path, path.stat) and path.is_dir():
                paths += _images_below(path)
            else:
                paths.append(word)
        except (OSError, ValueError) as error:  # the latter: a zero byte in the name
            missing.append(f"{shown(path)}: {getattr(error, 'strerror', None) or error}")
    if missing:
        more = f"\n  and {len(missing) - _MAX_LISTED} more" if len(missing) > _MAX_LISTED else ""
        listed = "\n  ".join(missing[:_MAX_LISTED])
        raise Failure(USAGE, f"expected images, or directories with images:\n  {listed}{more}\nNothing was predicted")
    found = ImageFiles([], [], [])
    for number, name in enumerate(paths):
        if not number % 1024:
            watchdog.heartbeat(phase="start")
        _add(found, name)
    if not paths:
        raise Failure(USAGE, f"no image is given: expected files, or directories with {', '.join(IMAGE_SUFFIXES)}")
    return found


def _images_below(folder: Path) -> List[str]:
    endings = (*IMAGE_SUFFIXES, *OTHER_SUFFIXES)  # the latter are named as what they are, rather than left out in silence
    return [str(root / name) for root, names in walk(folder) for name in sorted(names) if name.lower().endswith(endings)]


def _add(found: ImageFiles, name: str) -> None:
    path = Path(name)
    try:
        status = storage.retrying(path, path.stat)
    except OSError as error:
        found.passed_over.append(f"{shown(path)}: it cannot be read: {error.strerror}")
        return
    if not stat.S_ISREG(status.st_mode):  # a FIFO would block its reader
        found.passed_over.append(f"{shown(path)}: it is no regular file")
    elif status.st_size > MAX_RECORD_BYTES:
        text = f"it has {status.st_size} bytes; expected at most {MAX_RECORD_BYTES}, one image"
        found.passed_over.append(f"{shown(path)}: {text}")
    else:
        found.paths.append(name)
        found.sizes.append(status.st_size)


def index_images(files: ImageFiles) -> Index:
    """Returns the files, at least one, as records of one split, in their order, each with the label 0."""
    records, names, start = [], [], 0
    for name, size in zip(files.paths, files.sizes):
        records.append((start, size, 0))
        names.append(os.fsencode(name) + b"\0")
        start += len(names[-1])
    here = Path()
    return join([here], [Shard.of_records(records, b"".join(names))], Layout(FOLDERS, here))
