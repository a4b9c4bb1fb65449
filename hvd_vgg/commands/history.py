"""Replays the log of a run: its attempts (process starts), their segments (between rewinds), and what contradicts itself.

Each line is checked once, in order, against the configuration of its attempt and the lines before it. What a kill explains
is no fault: a torn last line, and after the last line of updates an evaluation, a coverage or a checkpoint that is missing.
"""

import dataclasses
import math
from dataclasses import field
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np

from hvd_vgg.config import TrainConfig
from hvd_vgg.data.coverage import digest, digest_of_all, to_hex
from hvd_vgg.data.sampler import positions
from hvd_vgg.errors import Failure
from hvd_vgg.models.architecture import training_flops, vgg_layers
from hvd_vgg.reporting.receipt import LogLine
from hvd_vgg.reporting.throughput import Throughput, per_host
from hvd_vgg.text import plural
from hvd_vgg.train.schedule import evaluation_steps, learning_rate

PASS, FAIL, UNKNOWN = "pass", "fail", "unknown"
# Raised by content that no run writes.
DAMAGED = (AttributeError, Failure, IndexError, KeyError, OverflowError, TypeError, ValueError, ZeroDivisionError)
_PROGRESS = ("train", "evaluation", "end")
_Row = Tuple[str, Any, Any]  # name, found, expected


class Check(NamedTuple):
    """What was checked, with PASS, FAIL or UNKNOWN, and the figures, or the reason."""

    verdict: str
    subject: str
    text: str


class Segment:
    """The part of an attempt between rewinds, as far as it has been replayed."""

    def __init__(self, step: int, next_epoch: int, skipped: Iterable[int]) -> None:
        self.first = self.last = step  # updates that the run had at its beginning, and has now
        self.next_epoch = next_epoch  # to be complete
        self.skipped = set(skipped)  # steps left out after rewinds
        self.evaluated = -1  # the step of the newest evaluation


class Attempt:
    """One process start: its configuration, its lines, and how far it came."""

    def __init__(self, number: int, start: LogLine, parameters: Dict[str, Any]) -> None:
        self.number, self.start = number, start  # from 1
        self.lines: List[LogLine] = []  # after `start`
        names = {each.name for each in dataclasses.fields(TrainConfig)}
        flags = {name: value for name, value in parameters.items() if name in names}
        lists: Dict[str, Any] = {name: tuple(value) for name, value in flags.items() if isinstance(value, list)}
        self.config = TrainConfig(**{**flags, **lists})  # with the length of the run in steps
        self.batch, self.ranks = self.config.global_batch, int(start.data["ranks"])
        self.records, self.validation_records = (
            int(start.data["data"][name]["records"]) for name in ("train", "validation")
        )
        self.evaluation_steps = evaluation_steps(self.config, self.records)
        self.begin_segment(start.step, start)

    def begin_segment(self, step: int, line: LogLine) -> None:
        """Continues after `step` updates, leaving out the steps that `line` names."""
        self.segment = Segment(step, step * self.batch // self.records, line.data["skipped_steps"])

    def select(self, kind: str) -> List[LogLine]:
        """Returns its lines of a kind."""
        return [line for line in self.lines if line.kind == kind]

    def seconds(self, name: str) -> List[float]:
        """Returns the `update` or `input` seconds of each update so far; those of a rewind are in its line."""
        keys = {"train": f"train.{name}_seconds", "rewind": f"{name}_seconds"}
        return [float(one) for line in self.lines if line.kind in keys for one in line.data[keys[line.kind]]]


@dataclasses.dataclass
class History:
    """What a log says of a run."""

    lines: List[LogLine]
    attempts: List[Attempt] = field(default_factory=list)
    checks: List[Check] = field(default_factory=list)  # of each start
    faults: List[str] = field(default_factory=list)  # of lines
    saved: Dict[int, LogLine] = field(default_factory=dict)  # the newest line about the checkpoint of each step
    scores: Dict[int, int] = field(default_factory=dict)  # top-1 hits by step, without what was trained again since
    candidates: Dict[int, int] = field(default_factory=dict)  # those of them that were then saved
    parameters: Optional[Dict[str, Any]] = None  # of the start to come
    current: Optional[Attempt] = None  # None between the first line of a process and its start
    end: Optional[LogLine] = None  # the line by which the newest attempt has stopped or ended

    def select(self, kind: str) -> List[LogLine]:
        """Returns the lines of all attempts of a kind."""
        return [line for attempt in self.attempts for line in attempt.select(kind)]


def read_history(lines: List[LogLine]) -> History:
    """Returns what `lines` say and the checks of them."""
    history = History(lines)
    for line, following in zip(lines, [*lines[1:], None]):
        try:
            history.faults += [f"line {line.number}: {fault}" for fault in _replay(history, line, following)]
        except DAMAGED as error:
            history.faults.append(f"line {line.number}: no run writes this: {type(error).__name__} {error}")
    return history


def mismatches(rows: Iterable[_Row]) -> Iterator[str]:
    """Yields a sentence for each (name, found, expected) that differ."""
    for name, found, expected in rows:
        numbers = isinstance(found, (int, float)) and isinstance(expected, (int, float))
        # Sums of floats may differ in the last bits between versions of Python.
        if not (math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-12) if numbers else found == expected):
            yield f"{name} {found!r}, expected {expected!r}"


def compare_checkpoints(found: Any, known: Any, step: int, history: History, lines: range) -> str:
    """Returns PASS if two rows of `receipt.checkpoint_row` are equal; else FAIL, or UNKNOWN if a kill explains it.

    An attempt that first evaluates the checkpoint it began from saves it again with the result. A kill may keep that out of
    the log: then there is an evaluation within `lines`, and the header is another, but not the weights.
    """
    if found and all(found[name] == known[name] for name in found):
        return PASS
    scores = (line for each in history.attempts if each.start.step == step for line in each.select("evaluation"))
    explained = any(line.step == step and line.number in lines for line in scores)
    return UNKNOWN if explained and found and found["sha256"] == known["sha256"] else FAIL


def saved_row(line: LogLine) -> Any:
    """Returns what a line of a checkpoint, or of a start that goes on from one, says of it."""
    return line.data["checkpoint"] if line.kind == "start" else line.data


def _replay(history: History, line: LogLine, following: Optional[LogLine]) -> Iterator[str]:
    if not line.kind and following and following.kind != "METADATA":
        yield "cannot be read, and no kill tore it: the process wrote on"
    elif line.kind in ("METADATA", "PARAMETER"):
        history.current, history.parameters = None, line.data if line.kind == "PARAMETER" else None
    elif line.kind == "start":
        if history.parameters is None:
            yield "a start without its configuration"
        attempt = Attempt(len(history.attempts) + 1, line, history.parameters or {})
        verdict, text = _check_origin(history, line)
        where = f"from step {line.step} on {plural(attempt.ranks, 'rank')}, {text}"
        history.checks.append(Check(verdict, f"start {attempt.number}", where))
        history.attempts.append(attempt)
        history.current, history.parameters, history.end = attempt, None, None
        _forget_scores(history, line.step)
        if line.data["checkpoint"]:
            history.saved.setdefault(line.step, line)
    elif history.current:
        yield from _replay_in_attempt(history, history.current, line)
    elif line.kind in _PROGRESS:
        yield f"{line.kind} before a start"


def _check_origin(history: History, line: LogLine) -> Tuple[str, str]:
    step, found, saved = line.step, line.data["checkpoint"], history.saved.get(line.step)
    before = history.attempts[-1] if history.attempts else None
    if step == 0 and found is None:
        lost = max(history.saved, default=None)
        return (
            (PASS, "without a checkpoint") if lost is None else (FAIL, f"but the checkpoint of step {lost} had been saved")
        )
    if before is None or step > before.segment.last:
        return FAIL, f"but {f'start {before.number} only reached {before.segment.last}' if before else 'it is the first'}"
    if saved is None:
        reached = any(each.step == step for each in [before.start, *before.select("train")])
        return (UNKNOWN if reached else FAIL), "but no line says that its checkpoint was saved"
    verdict = compare_checkpoints(found, saved_row(saved), step, history, range(saved.number, line.number))
    text = {
        PASS: "the checkpoint",
        UNKNOWN: "the weights, since evaluated, of the checkpoint",
        FAIL: "but not the checkpoint",
    }
    return verdict, f"{text[verdict]} saved in line {saved.number}"


def _forget_scores(history: History, step: int) -> None:
    """What was reached after `step` is trained again."""
    for scores in (history.scores, history.candidates):
        for later in [each for each in scores if each > step]:
            del scores[later]


def _replay_in_attempt(history: History, attempt: Attempt, line: LogLine) -> Iterator[str]:
    segment, kind, data = attempt.segment, line.kind, line.data
    complete = segment.last * attempt.batch // attempt.records  # epochs
    attempt.lines.append(line)
    if abs(line.began - attempt.start.began) > 0.01:
        yield f"written by another process than start {attempt.number}: a start between them is missing"
    if history.end and kind in _PROGRESS:
        yield f"comes after line {history.end.number}, '{history.end.kind}', of start {attempt.number}"
    due = segment.last in attempt.evaluation_steps and segment.last > segment.first
    if due and kind in ("train", "end") and segment.evaluated != segment.last:
        yield f"no evaluation at step {segment.last} before it"
    early = segment.next_epoch > complete and kind in ("end", "stopped")
    if early or (segment.next_epoch < complete and kind in ("train", "end", "stopped")):
        yield f"{complete} epochs are complete by then, but the coverage of {segment.next_epoch} is logged"

    if kind == "train":
        yield from mismatches(_train_rows(line, attempt))
        segment.last = line.step
    elif kind == "coverage":
        yield from mismatches(_coverage_rows(line, attempt))
        segment.next_epoch = int(data["epoch"]) + 1
    elif kind == "evaluation":
        segment.evaluated, history.scores[line.step] = line.step, int(data["eval.top1_hits"])
        yield from mismatches([("step", line.step, segment.last), ("epoch", line.epoch, complete)])
        yield from mismatches(_evaluation_rows(line, attempt))
    elif kind == "throughput":
        yield from mismatches([("step", line.step, segment.evaluated), *_throughput_rows(line, attempt)])
        rows = data.get("by_rank", [])
        yield from mismatches([("ranks in by_rank", len(rows), attempt.ranks if data["fps"] else 0)])
        yield from mismatches([("by_host", data.get("by_host", []), per_host(rows))])
    elif kind == "end":
        last = attempt.select("evaluation")[-1].data
        yield from mismatches([(name, data.get(name), last[name]) for name in last] + _throughput_rows(line, attempt))
        history.end = line
    elif kind == "stopped":
        yield from mismatches([("step", line.step, segment.last)])
        history.end = line
    elif kind == "checkpoint":
        history.saved[line.step] = line
        history.candidates.update({line.step: history.scores[line.step]} if line.step in history.scores else {})
    elif kind == "rewind":
        to = int(data["to"])
        if to not in history.saved and (to or history.saved):
            yield f"back to step {to}, which had not been saved"
        attempt.begin_segment(to, line)
        _forget_scores(history, to)


def _train_rows(line: LogLine, attempt: Attempt) -> List[_Row]:
    data, batch, before = line.data, attempt.batch, attempt.segment.last
    seconds, waits = data["train.update_seconds"], data["train.input_seconds"]
    images = batch * max(1, line.step - before - sum(before <= step < line.step for step in attempt.segment.skipped))
    top1, top5 = (round(data[f"train.acc@{k}"] * images) for k in (1, 5))
    return [
        ("updates", len(seconds), line.step - before),  # or a line is missing or repeated
        ("epoch", line.epoch, line.step * batch // attempt.records),
        ("waits for input", len(waits), len(seconds)),
        # A wait and the update around it are read from one clock, but summed differently.
        ("train.input_seconds", waits, [min(max(0, wait), total + 1e-6) for wait, total in zip(waits, seconds)]),
        ("train.fps", data["train.fps"], batch * len(seconds) / sum(seconds)),
        ("train.lr", data["train.lr"], learning_rate(line.step - 1, attempt.config, attempt.records)),
        (f"train.acc@1 of {images} images", data["train.acc@1"], min(max(0, top1), top5) / images),
        (f"train.acc@5 of {images} images", data["train.acc@5"], min(top5, images) / images),
    ]


def _evaluation_rows(line: LogLine, attempt: Attempt) -> List[_Row]:
    data, records = line.data, attempt.validation_records
    top1, top5 = int(data["eval.top1_hits"]), int(data["eval.top5_hits"])
    return [
        ("eval.records", data["eval.records"], records),
        ("eval.top1_hits", data["eval.top1_hits"], min(max(0, top1), top5)),
        ("eval.top5_hits", data["eval.top5_hits"], min(top5, records)),
        ("eval.acc@1", data["eval.acc@1"], top1 / records),
        ("eval.acc@5", data["eval.acc@5"], top5 / records),
    ]


def _throughput_rows(line: LogLine, attempt: Attempt) -> List[_Row]:
    """Computes the speed again from the seconds of every update of the attempt so far."""
    throughput, config = Throughput(), attempt.config
    throughput.total_seconds, throughput.input_seconds = attempt.seconds("update"), attempt.seconds("input")
    expected = throughput.summary(attempt.batch)
    if expected["fps"]:
        layers = vgg_layers(config.model, config.width, config.image_size, config.num_classes)
        expected["tflops_per_rank"] = training_flops(layers, config.image_size) * expected["fps"] / attempt.ranks / 1e12
        most = attempt.batch * len(throughput.total_seconds) / sum(throughput.total_seconds)
        expected["fps_wall"] = min(line.data["fps_wall"], most * (1 + 1e-6))  # whose time is longer than the updates'
    return [(name, line.data.get(name), value) for name, value in expected.items()]


def _coverage_rows(line: LogLine, attempt: Attempt) -> List[_Row]:
    data, config, records, batch = line.data, attempt.config, attempt.records, attempt.batch
    epoch, segment = int(data["epoch"]), attempt.segment
    complete_at = -(-(epoch + 1) * records // batch)
    rows: List[_Row] = [
        ("epoch", epoch, segment.next_epoch),
        ("step", line.step, min(complete_at, segment.last + config.log_every_steps)),
        ("records", data["records"], records),
    ]
    if data["known"]:
        left_out = np.zeros(3, np.int64)
        for step in segment.skipped if data["skipped"] else ():
            due = positions(step * batch, (step + 1) * batch, records, config.seed, config.shuffle_block_records)
            left_out += digest(due.ids[due.epochs == epoch])
        seen = digest_of_all(records) - left_out - digest(np.array(data["replaced"], np.int64))
        for name, expected in (("skipped", left_out), ("seen", seen)):
            rows.append((name, [data[name], *data[f"{name}_digest"]], [int(expected[0]), *to_hex(expected)]))
    return rows
