"""What an evaluation made of each class and of each record: tables of hits and predictions, and the classes it does worst.

Every rank keeps the rows that it computed, 50 bytes a record, in every evaluation, for whether one is the last of a run
may depend on its result. They are summed, gathered and written for the last alone, when the run ends.
"""

import json
from pathlib import Path
from typing import Iterator, List, Sequence

import numpy as np

from hvd_vgg.config import EvaluationConfig
from hvd_vgg.data.index import Index
from hvd_vgg.errors import BUG, Failure
from hvd_vgg.parallel import comm
from hvd_vgg.parallel.consensus import run_on_root
from hvd_vgg.reporting.console import Console
from hvd_vgg.reporting.table import Row, order_of_class, rounded, table_lines
from hvd_vgg.run_dir import RunDir, atomic_write_lines, writing
from hvd_vgg.training.evaluate import TOP, Evaluation, gather_rows
from hvd_vgg.training.names import known_names
from hvd_vgg.watchdog import watchdog

_WORST = 5  # classes that are printed


def count_classes(result: Evaluation, index: Index, label_base: int, num_classes: int) -> np.ndarray:
    """Returns records, top-1 and top-5 hits of each class over all ranks, int64 [num_classes, 3]. Collective.

    Raises a collective Failure(BUG) where they do not add up to the evaluation's own.
    """
    labels = index.labels.astype(np.int64) - label_base
    of_hits = [labels[result.rows["record"][result.rows["hits"][:, column]]] for column in (0, 1)]
    hits = comm.sum_over_ranks(np.stack([np.bincount(each, minlength=num_classes) for each in of_hits], axis=1))
    counts = np.concatenate([np.bincount(labels, minlength=num_classes)[:, np.newaxis], hits], axis=1)
    _require_totals(counts.sum(axis=0).tolist(), result)
    return counts


def _require_totals(found: Sequence[int], result: Evaluation) -> None:
    expected = [result.records, result.top1, result.top5]
    if list(found) != expected:
        what = "records, top-1 and top-5 hits"
        raise Failure(BUG, f"{what} of all classes add up to {found}, the evaluation counted {expected}", collective=True)


def write_details(config: EvaluationConfig, result: Evaluation, index: Index, label_base: int, console: Console) -> None:
    """Writes class_hits.csv of a run that has ended, and --predictions_file, on rank 0. Collective.

    Raises a collective Failure(NOT_WRITTEN).
    """
    counts = count_classes(result, index, label_base, config.num_classes)
    with watchdog.phase("saving"):
        run_on_root(lambda: write_class_hits(config, result, counts, console))
        write_predictions(config, result, index, label_base)


def write_class_hits(config: EvaluationConfig, result: Evaluation, counts: np.ndarray, console: Console) -> None:
    """Writes class_hits.csv, but beside a result.json of another evaluation says so; counts: of `count_classes`."""
    run_dir = RunDir(config.run_dir)
    refusal = other_result(run_dir.result, result)
    if refusal:
        console.say(f"{run_dir.class_hits} is left as it is: {refusal}")
        if config.predictions_file:
            console.say(f"{config.predictions_file} is of this process's evaluation")
        return
    names = known_names(run_dir.path, config.num_classes)
    with writing(run_dir.class_hits):
        atomic_write_lines(run_dir.class_hits, table_lines(".csv", class_rows(counts, names)))


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
        name = names[number] if names else ""
        yield {"class": number, "name": name, "records": records, "top1_hits": top1, "top5_hits": top5}


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


def write_predictions(config: EvaluationConfig, result: Evaluation, index: Index, label_base: int) -> None:
    """Writes --predictions_file, if there is to be one, on rank 0. Collective; raises a collective Failure(NOT_WRITTEN)."""
    if not config.predictions_file:
        return
    top = min(TOP, config.num_classes)
    rows, path = gather_rows([result.rows], top), Path(config.predictions_file)

    def write() -> None:
        hits = rows["hits"].sum(axis=0).tolist()
        _require_totals([len(rows) + result.bad, *hits], result)
        with writing(path):
            atomic_write_lines(path, table_lines(path.suffix, _prediction_rows(rows, index, label_base, top)))

    run_on_root(write)


def _prediction_rows(rows: np.ndarray, index: Index, label_base: int, top: int) -> Iterator[Row]:
    """Yields a row for each record of the split, in order; those of bad records have no prediction."""
    left = iter(rows)
    row = next(left, None)
    for record, label in enumerate((index.labels - label_base).tolist()):
        about = {"record": record, "where": index.where(record), "label": label}
        nothing: List[None] = [None] * top
        if row is None or row["record"] != record:
            yield {**about, "top1_hit": None, "top5_hit": None, "class": nothing, "probability": nothing}
            continue
        top1, top5 = map(int, row["hits"])
        probabilities = [rounded(float(each)) for each in row["probabilities"]]
        yield {**about, "top1_hit": top1, "top5_hit": top5, "class": row["classes"].tolist(), "probability": probabilities}
        row = next(left, None)
