"""The names of classes, from what a data set has, a file says, or WordNet calls those of ImageNet."""

import re
from pathlib import Path
from typing import List, Optional, Sequence

import numpy as np

from hvd_vgg import storage
from hvd_vgg.data.formats.example import parse_text
from hvd_vgg.data.formats.layout import FOLDERS, WEBDATASET
from hvd_vgg.data.index import Index
from hvd_vgg.data.reader import BadRecord, read_record
from hvd_vgg.errors import USAGE, Failure
from hvd_vgg.watchdog import watchdog

_FEATURES = (b"image/class/text", b"image/class/synset")  # of ImageNet's layout, the better one first
_MAX_CHARACTERS = 200
# Of ILSVRC2012, sorted by WNID, each with the words of WordNet 3.0 (tests/reference/make_imagenet_classes.py).
_IMAGENET = Path(__file__).with_name("imagenet_classes.txt")


def class_names(index: Index, label_base: int, num_classes: int) -> List[str]:
    """Returns the name of each class, in order of their labels from `label_base`, "" where unknown; [] where all are.

    From the layout, or else from the first record of each label, which is read. Raises Failure as `read_record` does, but
    not for a bad record.
    """
    names = list(index.layout.classes)
    if not names and index.layout.kind not in (FOLDERS, WEBDATASET):
        names = _names_in_records(index, label_base, num_classes)
    names = [printable(name) for name in names[:num_classes]]
    return names + [""] * (num_classes - len(names)) if any(names) else []


def _names_in_records(index: Index, label_base: int, num_classes: int) -> List[str]:
    labels, firsts = np.unique(index.labels, return_index=True)
    names = [""] * num_classes
    for label, record in zip(labels.tolist(), firsts.tolist()):
        watchdog.heartbeat(phase="start")
        name = _name_in_record(index, record)
        if name == "":
            return []  # where one record has none, none has
        if name and 0 <= label - label_base < num_classes:
            names[label - label_base] = name
    return names


def _name_in_record(index: Index, record: int) -> Optional[str]:
    """Returns the name of a record's class, "" where it has none; None where the record is bad."""
    try:
        data = read_record(index, record)
    except BadRecord:
        return None
    texts = (parse_text(data, int(index.lengths[record]), name) for name in _FEATURES)
    return next(filter(None, texts), b"")[: 4 * _MAX_CHARACTERS].decode("utf-8", "replace")


def printable(name: str) -> str:
    """Returns a name as one line."""
    return re.sub(r"\s+", " ", "".join(each if each.isprintable() else " " for each in name)).strip()[:_MAX_CHARACTERS]


def imagenet_names() -> List[str]:
    """Returns ImageNet's 1000 classes in order of their numbers from 0, each as `WNID words`."""
    return _IMAGENET.read_text(encoding="utf-8").splitlines()


def with_words(names: Sequence[str], imagenet: Sequence[str]) -> List[str]:
    """Returns `names` with WordNet's words behind those that are WNIDs of ImageNet; imagenet: of `imagenet_names`."""
    words = {line.split(" ", 1)[0]: line for line in imagenet}
    return [words.get(name, name) for name in names]


def read_names(path: Path) -> List[str]:
    """Returns the names in a file, one a line; raises Failure(USAGE) where it cannot be read."""
    try:
        lines = storage.read_bytes(path).decode("utf-8-sig").split("\n")
    except OSError as error:
        raise Failure(
            USAGE, f"{path} cannot be read: {error.strerror}. Expected the names of classes, one a line"
        ) from error
    except UnicodeDecodeError as error:
        raise Failure(USAGE, f"{path}, byte {error.start}: expected text in UTF-8") from error
    return [printable(line) for line in (lines if lines[-1] else lines[:-1])]
