"""Replays the log of a run: its attempts (process starts), their segments (between rewinds), and where it is inconsistent.

Lines are checked against the configuration of their attempt and the lines before. A kill may have torn the last line of an
attempt, or come before the evaluation, coverage or checkpoint of its last updates: that is no fault.
"""

import dataclasses
import itertools
import math
import statistics
from pathlib import Path
from typing import Any, Dict, Generator, Iterable, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np

from hvd_vgg.config import TrainConfig
from hvd_vgg.data.coverage import digest, digest_of_all, to_hex
from hvd_vgg.data.sampler import positions
from hvd_vgg.errors import Failure
from hvd_vgg.models.architecture import layers_to_train, training_flops
from hvd_vgg.reporting.receipt import LogLine
from hvd_vgg.reporting.throughput import Throughput, per_host
from hvd_vgg.run_dir import checkpoint_step
from hvd_vgg.text import plural, printable
from hvd_vgg.training.schedule import is_evaluation_step, learning_rate

PASS, FAIL, UNKNOWN = "pass", "fail", "unknown"
_PROGRESS = ("train", "evaluation", "end")
_MOST_PARTS = 5  # of objects that differ, which one sentence names
DAMAGED = (ArithmeticError, AttributeError, Failure, LookupError, RecursionError, TypeError, ValueError)
_Row = Tuple[str, Any, Any]  # name, found, expected
Findings = Generator[str, None, Tuple[str, str]]  # yields what is wrong; returns verdict and text if nothing is


class Check(NamedTuple):
    """What was checked, with PASS, FAIL or UNKNOWN, and the figures, or the reason."""

    verdict: str
    subject: str
    text: str


class Attempt:
    """One process start: its configuration, its lines, and where its replay has come."""

    def __init__(self, number: int, start: LogLine, parameters: Dict[str, Any]) -> None:
        self.number, self.start = number, start  # from 1
        self.lines: List[LogLine] = []  # after `start`
        flags = {field.name: parameters[field.name] for field in dataclasses.fields(TrainConfig) if field.name in parameters}
        self.known = set(flags)  # others are of later versions
        flags.update({name: tuple(value) for name, value in flags.items() if isinstance(value, list)})
        self.config = TrainConfig(**flags)  # with the length of the run in steps
        self.batch, self.ranks = self.config.global_batch, int(start.data["ranks"])
        self.records = int(start.data["data"]["train"]["records"])
        self.begin_segment(start.step, start)

    def begin_segment(self, step: int, line: LogLine) -> None:
        """Begins the lines up to the next rewind, after `step` updates; `line` names the steps to leave out."""
        self.first = self.last = step  # updates at the beginning of the segment, and by now
        self.next_epoch = step * self.batch // self.records  # the next to be complete
        self.skipped = {int(skipped) for skipped in line.data["skipped_steps"]}
        self.evaluated = -1  # the step of the newest evaluation
        self.states: Dict[int, Any] = {}  # `state_sha256` by the step of an evaluation

    def select(self, kind: str) -> List[LogLine]:
        """Returns its lines of a kind."""
        return [line for line in self.lines if line.kind == kind]


class History:
    """What a log says of a run."""

    def __init__(self, lines: List[LogLine]) -> None:
        self.lines = lines
        self.attempts: List[Attempt] = []
        self.checks: List[Check] = []
        self.faults: List[str] = []  # of lines
        self.saved: Dict[int, Tuple[int, Any]] = {}  # by step: number of the newest line about its checkpoint, and the row
        self.scores: Dict[int, LogLine] = {}  # by step: its newest evaluation
        self.parameters: Optional[Dict[str, Any]] = None  # of the start to come
        self.current: Optional[Attempt] = None  # None between the first line of a process and its start
        self.over = ""  # `end` or `stopped` if the newest attempt has come to that
        self.damaged = {line.data.get("file") for line in lines if line.kind == "checkpoint_damaged"}

    def select(self, kind: str) -> List[LogLine]:
        """Returns the lines of all attempts of a kind."""
        return [line for attempt in self.attempts for line in attempt.select(kind)]

    def compare(self, row: Any, known: Any, after: int, before: float = math.inf) -> str:
        """Returns PASS for equal rows of `receipt.checkpoint_row`, else FAIL, or UNKNOWN where a kill may explain it.

        A checkpoint that is evaluated on resume is saved again, with the result: a kill may keep that out of the log. Then
        there is an evaluation between the lines `after` and `before`, and only the header has changed.
        """
        if row is None or row["sha256"] != known["sha256"]:
            return FAIL
        step = checkpoint_step(Path(row["file"]))
        scores = (line for attempt in self.attempts if attempt.start.step == step for line in attempt.select("evaluation"))
        explained = any(line.step == step and after < line.number < before for line in scores)
        return PASS if all(row[name] == known[name] for name in row) else UNKNOWN if explained else FAIL


def read_history(lines: List[LogLine]) -> History:
    """Returns what `lines` say, and what is wrong with them."""
    history = History(lines)
    for line, following in zip(lines, [*lines[1:], None]):
        try:
            history.faults += [f"line {line.number}: {fault}" for fault in _replay(history, line, following)]
        except DAMAGED as error:
            history.faults.append(f"line {line.number}: is damaged, or not what a run writes: {error!r}")
    return history


def equal(a: Any, b: Any) -> bool:
    """Compares JSON values; floats up to the last bits: sums may differ there between versions of Python."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    numbers = isinstance(a, (int, float)) and isinstance(b, (int, float))
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12) if numbers else bool(a == b)


def mismatches(rows: Iterable[_Row]) -> Iterator[str]:
    """Yields a sentence for each (name, found, expected) that differ, of long values the beginning."""
    for name, found, expected in rows:
        if not equal(found, expected):
            yield printable(f"{name}{_mismatch(found, expected)}")


def _mismatch(found: Any, expected: Any) -> str:
    """Returns how two values differ; of objects, and of as many objects in a list, each part that does."""
    verb = ""
    if isinstance(found, dict) and isinstance(expected, dict):
        verb = " differs"
        keys = {**found, **expected}
        parts: List[_Row] = [(printable(str(key), 100), found.get(key, ...), expected.get(key, ...)) for key in keys]
    elif _are_objects(found) and _are_objects(expected) and len(found) == len(expected):
        parts = [(f"entry {number}", a, b) for number, (a, b) in enumerate(zip(found, expected), 1)]
    else:
        texts = _brief(found), _brief(expected)
        if texts[0] == texts[1]:
            return f" begins as expected, {texts[0]}, but differs further on"
        return f" is {texts[0]}, expected {texts[1]}"
    differing = [f"{name}{_mismatch(a, b)}" for name, a, b in parts if not equal(a, b)]
    more = [f"and {len(differing) - _MOST_PARTS} more"] if len(differing) > _MOST_PARTS else []
    return f"{verb}: {'; '.join([*differing[:_MOST_PARTS], *more])}"


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def _brief(value: Any) -> str:
    """Returns a value of JSON, or the beginning of a long one; an object without what is only Python's; ...: none."""
    if value is ...:
        return "absent"
    if isinstance(value, dict):
        return printable(", ".join(f"{name} {each!r}" for name, each in value.items()), 100) or "empty"
    return f"a list of {len(value)}" if _are_objects(value) else printable(repr(value), 100)


def _replay(history: History, line: LogLine, following: Optional[LogLine]) -> Iterator[str]:
    if not line.kind:
        if following and following.kind != "METADATA":
            yield "cannot be read, and no kill tore it: the process wrote on"
    elif line.kind in ("METADATA", "PARAMETER"):
        history.current, history.parameters = None, line.data if line.kind == "PARAMETER" else None
    elif line.kind == "start" and history.parameters:
        attempt = Attempt(len(history.attempts) + 1, line, history.parameters)
        verdict, text = _check_origin(history, line)
        history.checks.append(Check(verdict, f"start {attempt.number}", text))
        history.attempts.append(attempt)
        history.current, history.parameters, history.over = attempt, None, ""
        if line.data["checkpoint"]:
            history.saved.setdefault(line.step, (line.number, line.data["checkpoint"]))
    elif history.current and line.kind != "start":
        yield from mismatches(_replay_in_attempt(history, history.current, line))
    elif line.kind in ("start", *_PROGRESS):
        yield f"`{line.kind}` without the configuration or the start that comes before it"


def _check_origin(history: History, line: LogLine) -> Tuple[str, str]:
    step, row, before = line.step, line.data["checkpoint"], history.attempts[-1] if history.attempts else None
    number, saved = history.saved.get(step, (0, None))
    verdict = FAIL
    if step == 0 and row is None:
        verdict = FAIL if history.saved else PASS
    elif before and step <= before.last and saved is None:
        verdict = UNKNOWN if any(each.step == step for each in [before.start, *before.select("train")]) else FAIL
    elif before and step <= before.last:
        verdict = history.compare(row, saved, number, line.number)
    source = f"the checkpoint of line {number}" if number else "no checkpoint"
    text = {PASS: source, UNKNOWN: "a kill kept its save out of the log", FAIL: f"not what had been saved ({source})"}
    return verdict, f"from step {step} on {plural(int(line.data['ranks']), 'rank')}: {text[verdict]}"


def _replay_in_attempt(history: History, attempt: Attempt, line: LogLine) -> Iterator[_Row]:
    kind, data, last = line.kind, line.data, attempt.last
    complete = last * attempt.batch // attempt.records  # epochs
    attempt.lines.append(line)
    if abs(line.began - attempt.start.began) > 0.01:
        yield f"start of its process (one after start {attempt.number} is missing)", line.began, attempt.start.began
    if history.over == "end" or (history.over and kind in _PROGRESS):
        yield "kind of line", kind, f"none after `{history.over}`"
    history.over = kind if kind in ("end", "stopped") else history.over
    if kind in ("train", "end", "stopped"):
        covered = max(complete, attempt.next_epoch) if kind == "train" else complete
        yield "number of covered epochs", attempt.next_epoch, covered
    if kind in ("train", "end") and last > attempt.first and is_evaluation_step(last, attempt.config, attempt.records):
        yield "step of the newest evaluation", attempt.evaluated, last

    if kind == "train":
        yield from _train_rows(line, attempt)
        attempt.last = line.step
    elif kind == "coverage":
        yield from _coverage_rows(line, attempt)
        attempt.next_epoch = int(data["epoch"]) + 1
        text = f"{data['skipped']} skipped, replaced {data['replaced']}" if data["known"] else "was trained in two orders"
        if not data["known"] or data["skipped"] or data["replaced"]:
            history.checks.append(Check(PASS if data["known"] else UNKNOWN, f"epoch {data['epoch']}", text))
    elif kind == "evaluation":
        yield from [("step", line.step, last), ("epoch", line.epoch, complete), *_evaluation_rows(line, attempt)]
        attempt.evaluated, history.scores[line.step] = line.step, line
        attempt.states[line.step] = data["eval.state_sha256"]
    elif kind == "throughput":
        rows = data.get("by_rank", [])
        yield from [("step", line.step, attempt.evaluated), ("by_host", data.get("by_host", []), per_host(rows))]
        yield "number of ranks in by_rank", len(rows), attempt.ranks if data["fps"] else 0
    elif kind == "end":
        yield from ((name, data.get(name), value) for name, value in attempt.select("evaluation")[-1].data.items())
        yield from throughput_rows(line, attempt)
    elif kind == "stopped":
        yield "step", line.step, last
    elif kind == "checkpoint":
        yield "state_sha256", data["state_sha256"], attempt.states.get(line.step, data["state_sha256"])
        history.saved[line.step] = line.number, data
    elif kind == "rewind":
        step = data["to"]
        yield f"whether step {step} had been saved", step in history.saved or not (step or history.saved), True
        attempt.begin_segment(step, line)


def _train_rows(line: LogLine, attempt: Attempt) -> Iterator[_Row]:
    data, batch, before = line.data, attempt.batch, attempt.last
    seconds, waits = data["train.update_seconds"], data["train.input_seconds"]
    losses, skipped = data["train.losses"], sorted(step for step in attempt.skipped if before <= step < line.step)
    trained = [loss for loss in losses if loss is not None]
    images = batch * max(1, line.step - before - len(skipped))
    accuracies = [data["train.acc@1"], data["train.acc@5"]]
    shares = [min(max(0, round(share * images)), images) / images for share in accuracies]
    yield "number of updates since the last line", len(seconds), line.step - before
    yield "epoch", line.epoch, line.step * batch // attempt.records
    yield "number of losses since the last line", len(losses), line.step - before
    yield "steps without a loss", [step for step, loss in enumerate(losses, before) if loss is None], skipped
    yield "train.loss", data["train.loss"], statistics.fmean(trained) if trained else "nan"
    # A wait and the update around it are read from one clock, but summed differently.
    limits = itertools.zip_longest(waits, seconds, fillvalue=-1)
    yield "train.input_seconds", waits, [min(max(0, wait), total + 1e-6) for wait, total in limits]
    yield "train.fps", data["train.fps"], batch * len(seconds) / sum(seconds)
    yield "train.lr", data["train.lr"], learning_rate(line.step - 1, attempt.config, attempt.records)
    yield f"train.acc@1, acc@5 of {images} images", accuracies, sorted(shares)


def _evaluation_rows(line: LogLine, attempt: Attempt) -> Iterator[_Row]:
    data, records = line.data, attempt.start.data["data"]["validation"]["records"]
    for prefix in ("eval.", "eval.average_") if "eval.average_top1_hits" in data else ("eval.",):
        hits = [data[f"{prefix}top1_hits"], data[f"{prefix}top5_hits"], data["eval.records"]]
        expected = sorted([*(max(0, int(each)) for each in hits[:2]), records])
        yield f"{prefix}top1_hits, top5_hits, eval.records", hits, expected
        shares = [data[f"{prefix}acc@{k}"] for k in (1, 5)]
        yield f"{prefix}acc@1, acc@5", shares, [each / records for each in hits[:2]]


def throughput_rows(line: LogLine, attempt: Attempt) -> Iterator[_Row]:
    """Computes again, from the seconds of every update of an attempt before a line, what the line says of the speed."""
    throughput, config = Throughput(), attempt.config
    for data in [each.data for each in attempt.lines if each.number < line.number]:
        # The updates between the last line of updates and a rewind are in the latter.
        throughput.total_seconds += data.get("train.update_seconds", data.get("update_seconds", []))
        throughput.input_seconds += data.get("train.input_seconds", data.get("input_seconds", []))
    expected = throughput.summary(attempt.batch)
    if expected["fps"]:
        layers = layers_to_train(config)
        expected["tflops_per_rank"] = training_flops(layers, config.image_size) * expected["fps"] / attempt.ranks / 1e12
        most = attempt.batch * len(throughput.total_seconds) / sum(throughput.total_seconds)
        expected["fps_wall"] = min(line.data["fps_wall"], most * (1 + 1e-6))  # whose time is longer than the updates'
    return ((name, line.data.get(name), value) for name, value in expected.items())


def _coverage_rows(line: LogLine, attempt: Attempt) -> Iterator[_Row]:
    data, config, records, batch = line.data, attempt.config, attempt.records, attempt.batch
    epoch = int(data["epoch"])
    yield "epoch", epoch, attempt.next_epoch
    yield "step", line.step, min(-(-(epoch + 1) * records // batch), attempt.last + config.log_every_steps)
    yield "records", data["records"], records
    if data["known"]:
        left_out = np.zeros(3, np.int64)
        for step in attempt.skipped if data["skipped"] else ():
            due = positions(step * batch, (step + 1) * batch, records, config.seed, config.shuffle_block_records)
            left_out += digest(due.ids[due.epochs == epoch])
        seen = digest_of_all(records) - left_out - digest(np.array(data["replaced"], np.int64))
        for name, part in (("skipped", left_out), ("seen", seen)):
            yield name, [data[name], *data[f"{name}_digest"]], [int(part[0]), *to_hex(part)]
