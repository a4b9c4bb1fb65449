"""The sections of what a network takes for what, and of its most confident errors, with pictures where data are at hand."""

import dataclasses
from typing import Any, Dict, List, NamedTuple

from hvd_vgg.config import EvaluationConfig
from hvd_vgg.data.index import data_digest
from hvd_vgg.data.reader import read_image
from hvd_vgg.data.thumbnails import Thumbnail, open_alone, thumbnail
from hvd_vgg.pages.class_tables import ErrorRow
from hvd_vgg.pages.facts import DAMAGED, Facts, reason_of, records_of
from hvd_vgg.pages.markup import Markup, details, image, join, paragraph, section, table, tag
from hvd_vgg.pages.run_sections import anchor_of, class_text, short
from hvd_vgg.text import plural

_PAIRS, _ERRORS = 20, 48  # rows of tables
_INDEXING_SECONDS = 3.0  # for shards that are in no index


class Sheet(NamedTuple):
    """Pictures of errors by their records; why: a sentence about those that are missing, or ""."""

    pictures: Dict[int, Thumbnail]
    why: str


def read_sheet(facts: Facts, count: int) -> Sheet:
    """Returns the pictures of a run's first errors, at most `count`, where its validation data are at hand; reads them.

    Whoever wrote the log names the directory. It has the same data, by their digest, or no picture of it is shown; regular
    files alone are read, as records and images; and the page is its reader's own, and sends nothing.
    """
    errors = facts.errors[:count]
    if not errors:
        return Sheet({}, "")
    try:
        config = _evaluated_as(facts.flags)
        index = open_alone(config, "validation", facts.run.path, _INDEXING_SECONDS)
        if data_digest(index) != records_of(facts, "validation").get("sha256"):
            raise ValueError(f"{config.data_dir} has other validation data than those that the log names")
    except DAMAGED as error:
        return Sheet({}, f"There are no pictures: {reason_of(error)}")
    pictures: Dict[int, Thumbnail] = {}
    failed: List[str] = []
    for error_row in errors:
        try:
            if error_row.record >= index.records:
                raise ValueError(f"record {error_row.record} is none of the {index.records}")
            pictures[error_row.record] = thumbnail(read_image(index, error_row.record)[0], config.evaluated_crop)
        except DAMAGED as error:
            failed.append(reason_of(error))
    missing = f"{plural(len(failed), 'picture')} could not be read; the first: {failed[0]}" if failed else ""
    return Sheet(pictures, missing)


def _evaluated_as(flags: Dict[str, Any]) -> EvaluationConfig:
    """Returns how a run evaluates its data, from the flags in its log; raises ValueError where they do not name the data."""
    if not isinstance(flags.get("data_dir"), str):
        raise ValueError("the log does not say where the data were")
    fields = {field.name: field.default for field in dataclasses.fields(EvaluationConfig)}
    known = {name: flags[name] for name, default in fields.items() if type(flags.get(name)) is type(default)}
    config = EvaluationConfig(**known)
    for conflict in config.conflicts():  # such as patterns that lead out of the directory
        raise ValueError(conflict)
    return config


def confused(facts: Facts, level: int) -> Markup:
    """Returns the section of the classes that are most often taken for others; nothing where confusions.csv is not there."""
    found = facts.confusions
    if not found:
        return Markup()
    of = {row.label: row.records for row in facts.classes}
    rows = [
        (
            *(class_text(row.label, row.label_name), class_text(row.predicted, row.predicted_name), row.records),
            f"{row.records / of[row.label]:.1%}" if of.get(row.label) else "-",
        )
        for row in found[:_PAIRS]
    ]
    headings = ("class", "taken for", "records", "of the class's records")
    which = f"The {len(rows)}" if len(rows) < len(found) else "All"
    caption = f"{which} of {plural(len(found), 'pair')} of classes, most records first"
    listed = table(headings, rows, caption, numbers=(2, 3))
    records = sum(row.records for row in found)
    text = f"{plural(records, 'record')} misclassified in the last evaluation, according to confusions.csv."
    about = paragraph(text, kind="note")
    return section(anchor_of(facts, "confusions"), "Most confused classes", about, listed, level=level)


def errors(facts: Facts, sheet: Sheet, level: int) -> Markup:
    """Returns the section of the errors that the network was surest of; nothing where confident_errors.csv is not there."""
    found = facts.errors[:_ERRORS]
    if not found:
        return Markup()
    rows = [
        (row.record, short(row.where), class_text(row.label, row.label_name), class_text(row.predicted, row.predicted_name))
        + (f"{row.probability:.6g}",)
        for row in found
    ]
    headings = ("record", "where", "label", "taken for", "probability")
    total = sum(row.records for row in facts.confusions)
    of = f" of {plural(total, 'error')}" if total > len(rows) else ""
    caption = f"The {len(rows)} most confident{of}, from confident_errors.csv"
    listed = table(headings, rows, caption, numbers=(0, 4))
    shown = join(_picture(row, sheet.pictures[row.record]) for row in found if row.record in sheet.pictures)
    parts: List[Any] = [paragraph(short(sheet.why), kind="note")] if sheet.why else []
    if shown:
        text = "The part of each image that is evaluated, resized; most confident first."
        parts += [paragraph(text, kind="note"), tag("div", shown, 'class="sheet"'), details(caption, listed)]
    else:
        parts.append(listed)
    return section(anchor_of(facts, "errors"), "Most confident errors", *parts, level=level)


def _picture(row: ErrorRow, picture: Thumbnail) -> Markup:
    label, predicted = class_text(row.label, row.label_name), class_text(row.predicted, row.predicted_name)
    alt = f"Record {row.record}: label {label}, taken for {predicted}, probability {row.probability:.4f}"
    caption = join([f"label {label}", f"taken for {predicted}", f"probability {row.probability:.4f}"], "<br>")
    return tag("figure", join([image(*picture, alt), tag("figcaption", caption)]))
