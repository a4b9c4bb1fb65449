"""Tables in files: comma-separated values, or JSON lines. Both are text in UTF-8 with one line for each row."""

import csv
import io
import json
import math
from typing import Any, Dict, Iterable, Iterator, Optional, Sequence, Tuple

Row = Dict[str, Any]


def table_lines(suffix: str, rows: Iterable[Row], names: Sequence[str] = ()) -> Iterator[str]:
    """Yields the lines of a file of rows, which all have the same names in the same order.

    suffix: .csv, which begins with the names, and has a column NAME_1, NAME_2, ... for each part of a list; or .jsonl. None
    is an empty cell, or null. names: those of the columns, for a table of no rows.
    """
    first = True
    for row in rows:
        if suffix == ".jsonl":
            yield json.dumps(row, allow_nan=False) + "\n"
            continue
        if first:
            yield _csv_line(name for name, _ in _cells(row))
        yield _csv_line(value for _, value in _cells(row))
        first = False
    if first and names and suffix != ".jsonl":
        yield _csv_line(names)


def _cells(row: Row) -> Iterator[Any]:
    for name, value in row.items():
        if isinstance(value, list):
            yield from ((f"{name}_{number}", part) for number, part in enumerate(value, start=1))
        else:
            yield name, value


def _csv_line(values: Iterable[Any]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerow(list(values))
    return file.getvalue()


def order_of_class(hits: int, records: int, label: int) -> Tuple[float, int, int]:
    """Returns the key that sorts classes that have records: smaller shares of hits first, more records, lower numbers."""
    return hits / records, -records, label


def rounded(probability: float) -> Optional[float]:
    """Returns a probability to six digits, the same text on every host; None for one that is not a number."""
    return None if math.isnan(probability) else float(f"{probability:.6g}")
