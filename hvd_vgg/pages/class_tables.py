"""The tables that the last evaluation of a run leaves: hits of classes, confusions, errors. Any may be damaged."""

import csv
import io
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence

from hvd_vgg import storage


class ClassRow(NamedTuple):
    """Hits of one class: of the records with this label."""

    label: int
    name: str
    records: int
    top1: int
    top5: int


class ConfusionRow(NamedTuple):
    """How many records of a label have another likeliest class."""

    label: int
    label_name: str
    predicted: int
    predicted_name: str
    records: int


class ErrorRow(NamedTuple):
    """A record whose likeliest class is not its label, with that class's probability."""

    record: int
    where: str
    label: int
    label_name: str
    predicted: int
    predicted_name: str
    probability: float


def read_classes(path: Path) -> List[ClassRow]:
    """Returns the rows of class_hits.csv; raises ValueError for what is none, or cannot be."""
    rows = [
        ClassRow(int(row["class"]), row["name"], int(row["records"]), int(row["top1_hits"]), int(row["top5_hits"]))
        for row in _rows(path, ("class", "name", "records", "top1_hits", "top5_hits"))
    ]
    for row in rows:
        if not 0 <= row.top1 <= row.top5 <= row.records:
            counts = f"{row.top1}, {row.top5} and {row.records}"
            raise ValueError(f"class {row.label}: expected 0 <= top1_hits <= top5_hits <= records, found {counts}")
    return rows


def read_confusions(path: Path, classes: Sequence[ClassRow]) -> List[ConfusionRow]:
    """Returns the rows of confusions.csv, most records first; raises ValueError for what is none, or cannot be.

    classes: of the same evaluation, [] where they are unknown.
    """
    names = ("label", "label_name", "predicted", "predicted_name", "records")
    found = [
        ConfusionRow(int(row["label"]), row["label_name"], int(row["predicted"]), row["predicted_name"], int(row["records"]))
        for row in _rows(path, names)
    ]
    misses = {row.label: row.records - row.top1 for row in classes}
    counted = dict.fromkeys(misses, 0)
    for each in found:
        _require_classes(each.label, each.predicted, classes)
        counted[each.label] = counted.get(each.label, 0) + each.records
        if each.records < 1 or (misses and counted[each.label] > misses[each.label]):
            of = f" of the {misses[each.label]} that class_hits.csv has" if misses else ""
            raise ValueError(f"label {each.label}: expected 1 or more records a row{of}, found {counted[each.label]}")
    return sorted(found, key=lambda row: (-row.records, row.label, row.predicted))


def read_errors(path: Path, classes: Sequence[ClassRow]) -> List[ErrorRow]:
    """Returns the rows of confident_errors.csv, the surest first; as `read_confusions`."""
    names = ("record", "where", "label", "label_name", "predicted", "predicted_name", "probability")
    found = []
    for row in _rows(path, names):
        label, predicted, probability = int(row["label"]), int(row["predicted"]), float(row["probability"])
        _require_classes(label, predicted, classes)
        record = int(row["record"])
        if not (0 <= record < 2**53 and 0 <= probability <= 1):
            raise ValueError(f"record {record}: expected a number from 0 and a probability, found {row['probability']}")
        names_of = row["label_name"], row["predicted_name"]
        found.append(ErrorRow(record, row["where"], label, names_of[0], predicted, names_of[1], probability))
    return sorted(found, key=lambda each: (-each.probability, each.record))


def _require_classes(label: int, predicted: int, classes: Sequence[ClassRow]) -> None:
    known = range(len(classes) or 2**31)
    if label == predicted or label not in known or predicted not in known:
        raise ValueError(f"expected two classes of {len(known)}, from 0, found {label} and {predicted}")


def _rows(path: Path, columns: Sequence[str]) -> List[Dict[str, str]]:
    """Returns the cells of these columns, row by row; a missing one is "". Raises ValueError for what is no such table."""
    text = storage.read_bytes(path).decode("utf-8", "replace")
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""))
        if not set(columns) <= set(reader.fieldnames or ()):
            raise ValueError(f"expected the columns {','.join(columns)}")
        return [{name: row[name] or "" for name in columns} for row in reader]
    except csv.Error as error:
        raise ValueError(str(error)) from error
