"""Which classes a network takes for which others, and of which wrong answers it is most sure; of an evaluation's rows.

`rows` are those of `evaluate.gather_rows`, `labels` the class of each record of the split, int64 [records], from 0. What a
record shows has no likeliest class where the network's outputs are not finite: it is in none of these tables.
"""

from typing import Iterator, Sequence

import numpy as np

from hvd_vgg.data.index import Index
from hvd_vgg.data.summary import label_text
from hvd_vgg.reporting.table import Row, rounded

CONFUSIONS = ("label", "label_name", "predicted", "predicted_name", "records")  # columns of confusions.csv
ERRORS = ("record", "where", "label", "label_name", "predicted", "predicted_name", "probability")  # confident_errors.csv
_ERRORS = 48  # wrong answers that are kept
_PRINTED = 5  # pairs of classes that are printed


def name_of(number: int, names: Sequence[str]) -> str:
    """Returns the name of a class for a table; "" where names are unknown."""
    return names[number] if names else ""


def with_a_class(rows: np.ndarray) -> np.ndarray:
    """Returns those of `rows` that have a likeliest class."""
    return rows[np.isfinite(rows["probabilities"][:, 0])]


def predicted_pairs(rows: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns label, likeliest class and how many records have both, int64 [pairs, 3], in order; equal ones among them."""
    scored = with_a_class(rows)
    keys, records = np.unique(labels[scored["record"]] * num_classes + scored["classes"][:, 0], return_counts=True)
    return np.stack([keys // num_classes, keys % num_classes, records], axis=1).astype(np.int64)


def confused_pairs(pairs: np.ndarray) -> np.ndarray:
    """Returns those of `predicted_pairs` that differ, most records first, then by numbers."""
    differing = pairs[pairs[:, 0] != pairs[:, 1]]
    return differing[np.lexsort((differing[:, 1], differing[:, 0], -differing[:, 2]))]


def confusion_rows(pairs: np.ndarray, names: Sequence[str]) -> Iterator[Row]:
    """Yields CONFUSIONS of each pair of `confused_pairs`; names: of the classes, [] where unknown."""
    for label, predicted, records in pairs.tolist():
        yield dict(zip(CONFUSIONS, (label, name_of(label, names), predicted, name_of(predicted, names), records)))


def error_rows(rows: np.ndarray, labels: np.ndarray, index: Index, names: Sequence[str]) -> Iterator[Row]:
    """Yields ERRORS of the wrong answers with the highest probability, of equal ones the earlier record first.

    A tie of several classes is no answer, and so not a wrong one, where the label is the first of them.
    """
    scored = with_a_class(rows)
    wrong = scored[scored["classes"][:, 0] != labels[scored["record"]]]
    found = [(rounded(float(row["probabilities"][0])) or 0.0, int(row["record"]), int(row["classes"][0])) for row in wrong]
    found.sort(key=lambda each: (-each[0], each[1]))
    for probability, record, predicted in found[:_ERRORS]:
        label = int(labels[record])
        both = label, name_of(label, names), predicted, name_of(predicted, names)
        yield dict(zip(ERRORS, (record, index.where(record), *both, probability)))


def most_confused(pairs: np.ndarray, counts: np.ndarray, names: Sequence[str]) -> str:
    """Returns lines with the pairs of `confused_pairs` that have most records; "" where there is none.

    counts: int64 [classes, 3], the first column the records of each class.
    """
    lines = [
        f"  {records:5d} of {counts[label, 0]:5d}  class {label_text(label, 0, names)}  taken for  "
        f"{label_text(predicted, 0, names)}"
        for label, predicted, records in pairs[:_PRINTED].tolist()
    ]
    return "\n".join([f"the most confused of {len(pairs)} pairs of classes:", *lines]) if lines else ""
