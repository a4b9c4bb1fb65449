"""The names of classes, from what a data set has."""

import re
from typing import List, Optional

import numpy as np

from hvd_vgg.data.formats.example import parse_text
from hvd_vgg.data.formats.layout import FOLDERS, WEBDATASET
from hvd_vgg.data.index import Index
from hvd_vgg.data.reader import BadRecord, read_record
from hvd_vgg.watchdog import watchdog

_FEATURES = (b"image/class/text", b"image/class/synset")  # of ImageNet's layout, the better one first
_MAX_CHARACTERS = 200


def class_names(index: Index, label_base: int, num_classes: int) -> List[str]:
    """Returns the name of each class, in order of their labels from `label_base`, "" where unknown; [] where all are.

    From the layout, or else from the first record of each label, which is read. Raises Failure as `read_record` does, but
    not for a bad record.
    """
    names = list(index.layout.classes)
    if not names and index.layout.kind not in (FOLDERS, WEBDATASET):
        names = _names_in_records(index, label_base, num_classes)
    names = [_printable(name) for name in names[:num_classes]]
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


def _printable(name: str) -> str:
    """Returns a name as one line."""
    return re.sub(r"\s+", " ", "".join(each if each.isprintable() else " " for each in name)).strip()[:_MAX_CHARACTERS]
