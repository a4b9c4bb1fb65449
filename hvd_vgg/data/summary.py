"""What is found in a data set, from its surveyed records: classes, sizes, formats, duplicates; as JSON has it."""

from typing import Any, Dict, List, Sequence, Tuple

import numpy as np

from hvd_vgg.data.index import Index
from hvd_vgg.data.survey import Survey

MOST_NAMED = 20  # records, pairs of them and labels that are named; the others are only counted


def summarize(train: Survey, validation: Survey, num_classes: int, label_base: int, names: Sequence[str]) -> Dict[str, Any]:
    """Returns all that is found in both splits; the same for the same records, wherever they lie in memory.

    names: of the classes, as `classes.class_names`.
    """
    surveys = {"train": train, "validation": validation}
    own = {split: np.unique(survey.split.labels) for split, survey in surveys.items()}
    return {
        "num_classes": num_classes,
        "label_base": label_base,
        "splits": {split: _summarize_split(survey, num_classes, label_base, names) for split, survey in surveys.items()},
        "validation_in_train": _shared(train, validation),
        "labels_of_train_alone": _labels(np.setdiff1d(own["train"], own["validation"]), label_base, names),
        "labels_of_validation_alone": _labels(np.setdiff1d(own["validation"], own["train"]), label_base, names),
    }


def _summarize_split(survey: Survey, num_classes: int, label_base: int, names: Sequence[str]) -> Dict[str, Any]:
    index, rows = survey.split, survey.rows
    return {
        "layout": index.layout.kind,
        "shards": len(index.paths),
        "records": index.records,
        "bytes": int(index.lengths.sum(dtype=np.int64)),
        "image_bytes": int(rows["bytes"].sum(dtype=np.int64)),
        "classes": class_counts(index, num_classes, label_base, names),
        "sizes": image_sizes(index, rows),
        "formats": image_formats(rows),
        "bad": {"records": int(rows["bad"].sum()), "first": survey.bad[:MOST_NAMED]},
        "mended": {"records": int(rows["mended"].sum()), "first": survey.mended[:MOST_NAMED]},
        "duplicates": _duplicates(survey),
    }


def label_text(label: int, label_base: int, names: Sequence[str]) -> str:
    """Returns a label as it is stored, and the name of its class, up to a comma, where it is known: `3 ring`."""
    number = label - label_base
    name = names[number].partition(",")[0] if 0 <= number < len(names) else ""
    return f"{label} {name}".rstrip()


def _labels(labels: np.ndarray, label_base: int, names: Sequence[str]) -> Dict[str, Any]:
    first = [label_text(label, label_base, names) for label in labels[:MOST_NAMED].tolist()]
    return {"labels": len(labels), "first": first}


def class_counts(index: Index, num_classes: int, label_base: int, names: Sequence[str]) -> Dict[str, Any]:
    """Returns the records of each class, in order of labels, and which have least, most and none, and labels outside."""
    labels: np.ndarray = index.labels.astype(np.int64) - label_base
    inside = (labels >= 0) & (labels < num_classes)
    counts = np.bincount(labels[inside], minlength=num_classes)
    outside = np.unique(index.labels[~inside])

    def having(records: int) -> Dict[str, Any]:
        return {"records": records, **_labels(np.flatnonzero(counts == records) + label_base, label_base, names)}

    return {
        "present": int((counts > 0).sum()),
        "least": having(int(counts[counts > 0].min(initial=index.records))),
        "most": having(int(counts.max())),
        "missing": _labels(np.flatnonzero(counts == 0) + label_base, label_base, names),
        "outside": {"records": int((~inside).sum()), **_labels(outside, label_base, names)},
        "records": counts.tolist(),
    }


def image_sizes(index: Index, rows: np.ndarray) -> Dict[str, Any]:
    """Returns least, median and most of shorter side and area in pixels, and which image is smallest and largest by area.

    Of the records whose header is an image's; nothing where there are none.
    """
    known = np.flatnonzero(rows["width"] > 0)
    if not len(known):
        return {}
    heights, widths = (rows[name][known].astype(np.int64) for name in ("height", "width"))
    areas = heights * widths
    found: Dict[str, Any] = {}
    for name, values in (("shorter_side", np.minimum(heights, widths)), ("area", areas)):
        found[name] = {"least": int(values.min()), "median": float(np.median(values)), "most": int(values.max())}
    for name, image in (("smallest", int(areas.argmin())), ("largest", int(areas.argmax()))):
        found[name] = {"height": int(heights[image]), "width": int(widths[image]), "where": index.where(int(known[image]))}
    return found


def image_formats(rows: np.ndarray) -> List[Dict[str, Any]]:
    """Returns how many images there are of each format and colour mode, most first; of what was read."""
    read = rows[rows["bytes"] > 0]
    kinds, counts = np.unique(read[["format", "mode"]], return_counts=True)
    table = [
        {"format": kind.decode() or "other", "mode": mode.decode(), "records": count}
        for (kind, mode), count in zip(kinds.tolist(), counts.tolist())
    ]
    return sorted(table, key=lambda row: (-int(row["records"]), row["format"], row["mode"]))


def first_equal(rows: np.ndarray) -> np.ndarray:
    """Returns for each of `rows` the number of the first whose encoded image is equal to its own, by digest: int64 [n].

    That is its own number where there is none before it, or where it could not be read.
    """
    first = np.arange(len(rows))
    read = np.flatnonzero(rows["bytes"] > 0)
    high, low = (rows["digest"][read, part] for part in (0, 1))
    order = np.lexsort((low, high))  # stable: equal ones stay in order
    begins = np.ones(len(order), bool)
    begins[1:] = (high[order][1:] != high[order][:-1]) | (low[order][1:] != low[order][:-1])
    groups = np.cumsum(begins) - 1
    first[read[order]] = read[order[begins][groups]]
    return first


def _duplicates(survey: Survey) -> Dict[str, Any]:
    """Returns the records of a split whose image occurs before in it."""
    first = first_equal(survey.rows)
    again = np.flatnonzero(first != np.arange(len(first)))
    return _pairs((survey, again), (survey, first[again]))


def _shared(train: Survey, validation: Survey) -> Dict[str, Any]:
    """Returns the records of validation whose image is also in train."""
    of_train = len(train.rows)
    first = first_equal(np.concatenate([train.rows, validation.rows]))[of_train:]
    shared = np.flatnonzero(first < of_train)
    return _pairs((validation, shared), (train, first[shared]))


def _pairs(later: Tuple[Survey, np.ndarray], before: Tuple[Survey, np.ndarray]) -> Dict[str, Any]:
    """Returns how many pairs of equal images there are, in how many of them labels differ, and where the first are."""
    labels = [survey.split.labels[ids] for survey, ids in (later, before)]
    firsts = [[survey.split.where(record) for record in ids[:MOST_NAMED].tolist()] for survey, ids in (later, before)]
    other = int((labels[0] != labels[1]).sum())
    return {"records": len(later[1]), "with_another_label": other, "first": [list(pair) for pair in zip(*firsts)]}
