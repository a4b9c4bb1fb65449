"""The tables that the last evaluation of a run leaves: hits of classes, confusions, errors. Any may be damaged."""

import csv
import io
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence

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
    found = _rows(path, ("name",), ("class", "records", "top1_hits", "top5_hits"))
    rows = [ClassRow(row["class"], row["name"], row["records"], row["top1_hits"], row["top5_hits"]) for row in found]
    for row in rows:
        if not 0 <= row.top1 <= row.top5 <= row.records:
            counts = f"{row.top1}, {row.top5} and {row.records}"
            raise ValueError(f"class {row.label}: expected 0 <= top1_hits <= top5_hits <= records, found {counts}")
    for due, label in enumerate(sorted(row.label for row in rows)):
        if label != due:
            raise ValueError(f"expected each class from 0 to {len(rows) - 1} once, found {label} where {due} is due")
    return rows


def read_confusions(path: Path, classes: Sequence[ClassRow]) -> List[ConfusionRow]:
    """Returns the rows of confusions.csv, most records first; raises ValueError for what is none, or cannot be.

    classes: of the same evaluation, [] where they are unknown.
    """
    rows = _rows(path, ("label_name", "predicted_name"), ("label", "predicted", "records"))
    found = [ConfusionRow(**row) for row in rows]
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
    found = []
    texts = ("where", "label_name", "predicted_name", "probability")
    for row in _rows(path, texts, ("record", "label", "predicted")):
        each = ErrorRow(**{**row, "probability": float(row["probability"])})
        _require_classes(each.label, each.predicted, classes)
        if not (0 <= each.record < 2**53 and 0 <= each.probability <= 1):
            text = f"record {each.record}: expected a number from 0 and a probability"
            raise ValueError(f"{text}, found {row['probability']}")
        found.append(each)
    return sorted(found, key=lambda each: (-each.probability, each.record))


def _require_classes(label: int, predicted: int, classes: Sequence[ClassRow]) -> None:
    known = range(len(classes) or 2**31)
    if label == predicted or label not in known or predicted not in known:
        raise ValueError(f"expected two classes of {len(known)}, from 0, found {label} and {predicted}")


def _rows(path: Path, texts: Sequence[str], numbers: Sequence[str]) -> Iterator[Dict[str, Any]]:
    """Yields the cells of these columns, row by row: texts, where a missing one is "", and whole numbers.

    Raises ValueError for what is no such table.
    """
    content = storage.read_bytes(path).decode("utf-8", "replace")
    reader = csv.DictReader(io.StringIO(content, newline=""))
    try:
        if not {*texts, *numbers} <= set(reader.fieldnames or ()):
            raise ValueError(f"expected the columns {','.join((*texts, *numbers))}")
        for number, row in enumerate(reader, start=1):
            try:
                counts = {name: int(row[name]) for name in numbers}
            except (TypeError, ValueError) as error:
                raise ValueError(f"row {number}: expected whole numbers for {', '.join(numbers)}") from error
            yield {**{name: row[name] or "" for name in texts}, **counts}
    except csv.Error as error:
        raise ValueError(str(error)) from error
