"""What an evaluation made of each class and of each record: tables of hits, confusions and predictions, the worst classes.

Every rank keeps the rows that it computed, 50 bytes a record, in every evaluation, for whether one is the last of a run
may depend on its result. They are gathered, once, for the last alone, when the run ends; all tables are made of them.
"""

import json
from pathlib import Path
from typing import Iterator, List, NamedTuple, Sequence, Tuple

import numpy as np

from hvd_vgg.config import EvaluationConfig
from hvd_vgg.data.index import Index
from hvd_vgg.errors import BUG, Failure
from hvd_vgg.parallel.consensus import run_on_root
from hvd_vgg.reporting.console import Console
from hvd_vgg.reporting.table import Row, order_of_class, rounded, table_lines
from hvd_vgg.run_dir import RunDir, atomic_write_lines, writing
from hvd_vgg.training.confusions import (
    CONFUSIONS,
    ERRORS,
    confused_pairs,
    confusion_rows,
    error_rows,
    name_of,
    predicted_pairs,
    with_a_class,
)
from hvd_vgg.training.evaluate import TOP, Evaluation, gather_rows
from hvd_vgg.training.names import known_names
from hvd_vgg.watchdog import watchdog

_WORST = 5  # classes that are printed


class Outcome(NamedTuple):
    """What an evaluation made of a split, the same on all ranks.

    rows: of `gather_rows`, all but those of bad records; labels: int64 [records], from 0; counts: int64 [classes, 3],
    records, top-1 and top-5 hits of each class; pairs: of `predicted_pairs`.
    """

    rows: np.ndarray
    labels: np.ndarray
    counts: np.ndarray
    pairs: np.ndarray


def gather_outcome(result: Evaluation, index: Index, label_base: int, num_classes: int) -> Outcome:
    """Returns what an evaluation made of each record and class, from the rows of all ranks. Collective.

    Raises a collective Failure(BUG) where they do not add up to the evaluation's own counts.
    """
    rows = gather_rows([result.rows], min(TOP, num_classes))
    labels: np.ndarray = index.labels.astype(np.int64) - label_base
    of_hits = [labels[rows["record"][rows["hits"][:, column]]] for column in (0, 1)]
    counts = np.stack([np.bincount(each, minlength=num_classes) for each in (labels, *of_hits)], axis=1)
    pairs = predicted_pairs(rows, labels, num_classes)
    _require_totals(counts.sum(axis=0).tolist(), result)
    _require_pairs(rows, pairs, labels, result)
    return Outcome(rows, labels, counts, pairs)


def _require_totals(found: Sequence[int], result: Evaluation) -> None:
    expected = [result.records, result.top1, result.top5]
    if list(found) != expected:
        what = "records, top-1 and top-5 hits"
        raise Failure(BUG, f"{what} of all classes add up to {found}, the evaluation counted {expected}", collective=True)


def _require_pairs(rows: np.ndarray, pairs: np.ndarray, labels: np.ndarray, result: Evaluation) -> None:
    """Raises Failure(BUG) unless each record is bad, without a class or in a pair, and each hit in a pair of equals."""
    unscored = len(rows) - len(with_a_class(rows))
    hits = rows[rows["hits"][:, 0]]
    found = [int(pairs[:, 2].sum()) + unscored + result.bad, int((hits["classes"][:, 0] == labels[hits["record"]]).sum())]
    expected = [result.records, result.top1]
    if found != expected:
        what = "records and hits of all pairs of classes"
        raise Failure(BUG, f"{what} add up to {found}, the evaluation counted {expected}", collective=True)


def write_details(config: EvaluationConfig, result: Evaluation, index: Index, label_base: int, console: Console) -> Outcome:
    """Writes the tables of a run that has ended, and --predictions_file, on rank 0; returns of what. Collective.

    Raises a collective Failure(NOT_WRITTEN).
    """
    with watchdog.phase("saving"):
        outcome = gather_outcome(result, index, label_base, config.num_classes)
        run_on_root(lambda: write_tables(config, result, outcome, index, console))
        run_on_root(lambda: write_predictions(config, outcome, index))
    return outcome


def write_tables(config: EvaluationConfig, result: Evaluation, outcome: Outcome, index: Index, console: Console) -> None:
    """Writes class_hits.csv, confusions.csv and confident_errors.csv; beside a result.json of another evaluation says so."""
    run_dir = RunDir(config.run_dir)
    refusal = other_result(run_dir.result, result)
    if refusal:
        names = [path.name for path in (run_dir.confusions, run_dir.confident_errors)]
        console.say(f"{run_dir.class_hits}, {' and '.join(names)} are left as they are: {refusal}")
        if config.predictions_file:
            console.say(f"{config.predictions_file} is of this process's evaluation")
        return
    names = known_names(run_dir.path, config.num_classes)
    tables: List[Tuple[Path, Iterator[Row], Sequence[str]]] = [
        (run_dir.class_hits, class_rows(outcome.counts, names), ()),
        (run_dir.confusions, confusion_rows(confused_pairs(outcome.pairs), names), CONFUSIONS),
        (run_dir.confident_errors, error_rows(outcome.rows, outcome.labels, index, names), ERRORS),
    ]
    for path, rows, columns in tables:
        with writing(path):
            atomic_write_lines(path, table_lines(".csv", rows, columns))


def other_result(path: Path, result: Evaluation) -> str:
    """Returns in what result.json, kept from an earlier process, is of another evaluation than `result`; "" where it is not.

    A process that finds its run complete evaluates it again, and may have been told to do so otherwise, or on other data.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        kept = [found[name] for name in ("top1_hits", "top5_hits", "records_evaluated")]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    own = [result.top1, result.top5, result.records]
    if kept == own:
        return ""
    texts = [f"{top1} and {top5} hits of {records} records" for top1, top5, records in (kept, own)]
    return f"{path.name} has an earlier evaluation, {texts[0]}, and this process has counted {texts[1]}"


def class_rows(counts: np.ndarray, names: Sequence[str]) -> Iterator[Row]:
    """Yields class, name, records, top1_hits, top5_hits of each class; names: of `known_names`."""
    for number, (records, top1, top5) in enumerate(counts.tolist()):
        yield {"class": number, "name": name_of(number, names), "records": records, "top1_hits": top1, "top5_hits": top5}


def worst_classes(counts: np.ndarray, names: Sequence[str]) -> str:
    """Returns lines with the classes that have the smallest share of top-1 hits, more records and lower numbers first."""
    rows = [row for row in class_rows(counts, names) if row["records"]]
    rows.sort(key=lambda row: order_of_class(row["top1_hits"], row["records"], row["class"]))
    lines = [
        f"  acc@1 {row['top1_hits'] / row['records']:.4f}  acc@5 {row['top5_hits'] / row['records']:.4f}  of "
        f"{row['records']:5d}  class {row['class']}  {row['name']}".rstrip()
        for row in rows[:_WORST]
    ]
    return "\n".join([f"the worst of {len(rows)} classes:", *lines])


def write_predictions(config: EvaluationConfig, outcome: Outcome, index: Index) -> None:
    """Writes --predictions_file, if there is to be one; for rank 0. Raises Failure(NOT_WRITTEN)."""
    if not config.predictions_file:
        return
    path, top = Path(config.predictions_file), min(TOP, config.num_classes)
    with writing(path):
        atomic_write_lines(path, table_lines(path.suffix, _prediction_rows(outcome, index, top)))


def _prediction_rows(outcome: Outcome, index: Index, top: int) -> Iterator[Row]:
    """Yields a row for each record of the split, in order; those of bad records have no prediction."""
    left = iter(outcome.rows)
    row = next(left, None)
    for record, label in enumerate(outcome.labels.tolist()):
        about = {"record": record, "where": index.where(record), "label": label}
        nothing: List[None] = [None] * top
        if row is None or row["record"] != record:
            yield {**about, "top1_hit": None, "top5_hit": None, "class": nothing, "probability": nothing}
            continue
        top1, top5 = map(int, row["hits"])
        probabilities = [rounded(float(each)) for each in row["probabilities"]]
        yield {**about, "top1_hit": top1, "top5_hit": top5, "class": row["classes"].tolist(), "probability": probabilities}
        row = next(left, None)
