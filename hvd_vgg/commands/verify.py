"""Holds what a run claims against what its directory has: `hvd-vgg verify-run`.

Whatever the raw lines of the log allow is computed again: images/s from the seconds of each update, accuracies from hits,
coverage from the ids 0 .. N-1, learning rates and epochs from the configuration, the order of starts, lines and checkpoints
by a state machine. Digests (`run.receipt`) hold the rest together. With the data the checkpoints are evaluated again.

A claim that cannot be checked is no fault: a run that was killed has lines newer than its receipt. Of other ranks than 0
the log has no times of single updates: what result.json says of them is held against what was logged with it.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

import numpy as np

from hvd_vgg.commands.history import Attempt, Segment, ends, evaluates, read_attempts, skipped_steps, trains
from hvd_vgg.config import TrainConfig, VerifyConfig, fingerprint
from hvd_vgg.data.coverage import digest, digest_of_all, parse_epoch_records, to_hex
from hvd_vgg.data.sampler import positions
from hvd_vgg.environment import launched_rank
from hvd_vgg.errors import CONFIGURATION, DATA, DONE, STOPPED, Failure
from hvd_vgg.flags import parse_flags
from hvd_vgg.models.architecture import training_flops, vgg_layers
from hvd_vgg.reporting import receipt
from hvd_vgg.reporting.throughput import Throughput, per_host
from hvd_vgg.run_dir import find_flag_file
from hvd_vgg.streams import write_line
from hvd_vgg.text import plural
from hvd_vgg.training import checkpoint
from hvd_vgg.training.schedule import evaluation_steps, learning_rate, total_steps

PASS, FAIL, UNKNOWN = "holds", "does not hold", "cannot be checked"
_DAMAGED = (AttributeError, Failure, IndexError, KeyError, OverflowError, TypeError, ValueError, ZeroDivisionError)


class Check(NamedTuple):
    """What was checked: HOLDS, FAILS or UNKNOWN; what is claimed; the figures, or why not."""

    verdict: str
    what: str
    why: str


def verify_run(config: VerifyConfig) -> None:
    """Prints each claim of the run in --run_dir and whether it holds; with --data_dir all ranks must call.

    Raises Failure(DATA) when one does not hold, Failure(CONFIGURATION) where there is no run.
    """
    run_dir = Path(config.run_dir)
    if not (run_dir / "dllogger.json").is_file():
        raise Failure(CONFIGURATION, f"--run_dir={run_dir} has no dllogger.json: expected the directory of a run")
    speaks = not launched_rank()
    claims = [_said(claim) for claim in check(run_dir)] if speaks else []
    again = list(_claims_guarded("evaluated again", _evaluate_again(run_dir, config))) if config.data_dir else []
    claims += [_said(claim) for claim in again if speaks]
    failed = sum(claim.verdict == FAIL for claim in claims)
    if failed:
        raise Failure(
            DATA, f"{failed} of {plural(len(claims), 'claim')} of {run_dir} {'does' if failed == 1 else 'do'} not hold"
        )
    if speaks:
        unknown = sum(claim.verdict == UNKNOWN for claim in claims)
        write_line(
            f"{len(claims) - unknown} claims hold" + (f", {unknown} cannot be checked" if unknown else ""), sys.stdout
        )


def _said(claim: Check) -> Check:
    write_line(f"{claim.verdict:17s}  {claim.what}: {claim.why}", sys.stdout)
    return claim


def check(run_dir: Path) -> Iterator[Check]:
    """Yields every claim that can be checked without data."""
    lines = receipt.read_log(run_dir / "dllogger.json")
    starts, faults = read_attempts(lines)
    for what, claims in (
        ("log", _log(lines, starts, faults)),
        ("starts", _starts(run_dir, starts)),
        ("epochs", _epochs(starts)),
        ("evaluations", _evaluations(starts)),
        ("checkpoints", _checkpoints(run_dir, starts)),
        ("result.json", _result(run_dir, starts)),
        ("receipt.json", _receipt(run_dir, lines, starts)),
        ("flags.txt", _flags(run_dir, starts)),
    ):
        yield from _claims_guarded(what, claims)


def _guarded(what: str, faults: Iterator[str]) -> Iterator[str]:
    """Yields what `faults` yields; what it stumbles over in a damaged file is a fault too."""
    try:
        yield from faults
    except _DAMAGED as error:
        yield f"{what} has lines that no run writes: {type(error).__name__} {error}"


def _claims_guarded(what: str, claims: Iterator[Check]) -> Iterator[Check]:
    try:
        yield from claims
    except _DAMAGED as error:
        yield Check(
            FAIL, what, f"its content is none that a run writes, or of lines that are: {type(error).__name__} {error}"
        )


# ---- the log as a state machine


def _log(lines: List[receipt.LogLine], starts: List[Attempt], faults: List[str]) -> Iterator[Check]:
    for start in starts:
        faults = faults + list(_guarded(f"start {start.number}", _faults_of_start(start, starts)))
    yield from (Check(FAIL, "log", fault) for fault in faults[:10])
    if len(faults) > 10:
        yield Check(FAIL, "log", f"and {len(faults) - 10} more")
    if not faults:
        updates = sum(len(start.seconds()) for start in starts)
        yield Check(PASS, "log", f"{len(lines)} lines, {plural(len(starts), 'start')}, {plural(updates, 'update')} in order")


def _faults_of_start(start: Attempt, starts: List[Attempt]) -> Iterator[str]:
    """Yields what in the lines of a start contradicts itself or its configuration."""
    skipped = skipped_steps(starts)
    config, records, batch = start.config, start.records("train"), start.config.global_batch
    done, over = start.first, ""
    for line in start.lines:
        where = f"line {line.number}"
        if abs(line.began - start.line.began) > 0.01:
            yield f"{where} was written by another process than start {start.number}: a start between them is missing"
        if over and (trains(line) or evaluates(line) or ends(line)):
            yield f"{where} comes after start {start.number} {over}"
        if trains(line):
            before, done = done, int(line.step[1])
            yield from (f"{where}: {fault}" for fault in _faults_of_window(line, before, config, records, skipped))
        elif evaluates(line):
            if int(line.step[1]) != done:
                yield f"{where}: an evaluation at step {line.step[1]}, but {done} updates were made"
            elif line.step[0] != int(done * batch / records):
                yield f"{where}: epoch {line.step[0]}, but step {done} is in epoch {int(done * batch / records)}"
        elif line.event == "rewind":
            done = int(line.data["to"])
        elif line.event == "stopped":
            done, over = max(done, int(line.data["step"])), "has stopped"
        elif ends(line):
            over = "has ended"
    due = {step for step in evaluation_steps(config, records) if start.first < step <= done}
    if not start.end:
        due.discard(done)  # it may have been ended from outside before it got there
    for step in sorted(due - {int(line.step[1]) for line in start.evaluated}):
        yield f"start {start.number} has no line of the evaluation at step {step}"


def _faults_of_window(
    line: receipt.LogLine, before: int, config: TrainConfig, records: int, skipped: Set[int]
) -> Iterator[str]:
    data, done, batch = line.data, int(line.step[1]), config.global_batch
    seconds = [float(one) for one in data["train.update_seconds"]]
    if done - before != len(seconds):
        yield f"{len(seconds)} updates up to step {done}, but those before end at {before}: a line is missing or repeated"
    if line.step[0] != int(done * batch / records):
        yield f"epoch {line.step[0]}, but step {done} is in epoch {int(done * batch / records)}"
    if not all(one >= 0 for one in seconds) or not _close(data["train.fps"], batch * len(seconds) / sum(seconds)):
        yield f"train.fps {data['train.fps']:.6g}, but its updates make {batch * len(seconds) / sum(seconds):.6g}"
    waits = [float(one) for one in data["train.input_seconds"]]
    # A wait and the update around it are read from one clock, but summed otherwise.
    if len(waits) != len(seconds) or not all(0 <= wait <= one + 1e-6 for wait, one in zip(waits, seconds)):
        yield f"{len(waits)} waits for input that are no part of its {len(seconds)} updates"
    lr = learning_rate(done - 1, config, records)
    if not _close(data["train.lr"], lr):
        yield f"train.lr {data['train.lr']:.6g}, but the schedule has {lr:.6g} at step {done - 1}"
    images = batch * max(1, len(set(range(before, done)) - skipped))
    hits = [data[f"train.acc@{k}"] * images for k in (1, 5)]
    if any(abs(hit - round(hit)) > 1e-6 * max(1, hit) for hit in hits) or not 0 <= hits[0] <= hits[1] <= images:
        yield f"train.acc@1 {data['train.acc@1']:.6g} and acc@5 {data['train.acc@5']:.6g} are no shares of {images} images"


def _close(a: float, b: float) -> bool:
    # Sums of floats may differ in the last bits between versions of Python.
    return math.isclose(float(a), float(b), rel_tol=1e-9, abs_tol=1e-12)


# ---- the chain of starts


def _starts(run_dir: Path, starts: List[Attempt]) -> Iterator[Check]:
    saved: Dict[int, Tuple[receipt.LogLine, Any]] = {}  # the newest line of each step's checkpoint, and what it says of it
    for before, start in zip([None, *starts[:-1]], starts):
        yield _start(before, start, saved)
        if start.line.data["checkpoint"]:
            saved.setdefault(start.first, (start.line, start.line.data["checkpoint"]))
        for line in start.lines:
            if line.event == "checkpoint":
                saved[int(line.data["step"])] = line, line.data
            elif line.event == "rewind":
                yield _rewind(line, saved)
    yield from _supervised(run_dir, starts)


def _start(before: Optional[Attempt], start: Attempt, saved: Dict[int, Tuple[receipt.LogLine, Any]]) -> Check:
    where = f"step {start.first} on {plural(int(start.line.data['ranks']), 'rank')}"
    found, what = start.line.data["checkpoint"], f"start {start.number}"
    if start.first == 0 and found is None:
        if not saved:
            return Check(PASS, what, f"from {where}, of nothing")
        return Check(FAIL, what, f"from step 0, but the checkpoint of step {max(saved)} had been saved")
    if before is None:
        return Check(FAIL, what, f"from {where}, but no start before it is in the log")
    if start.first > before.last:
        return Check(FAIL, what, f"from {where}, but the start before it came to step {before.last} only")
    if start.first not in saved:
        reached = {before.first, *before.stopped, *(int(line.step[1]) for line in before.trained)}
        if start.first not in reached:
            return Check(FAIL, what, f"from {where}, which no start before it had saved")
        return Check(UNKNOWN, what, f"from {where}; that it had been saved was not logged before the kill")
    line, row = saved[start.first]
    if found and _written_anew(found, row, start.first, line.number, [before]):
        return Check(UNKNOWN, what, f"from {where}, by the weights saved then (line {line.number}) and scored since")
    if found is None or found["sha256"] != row["sha256"] or found["header_sha256"] != row["header_sha256"]:
        return Check(FAIL, what, f"from {where}, but by another checkpoint than was saved then (line {line.number})")
    return Check(PASS, what, f"from {where}, by the checkpoint saved then (line {line.number})")


def _rewind(line: receipt.LogLine, saved: Dict[int, Tuple[receipt.LogLine, Any]]) -> Check:
    to, steps = int(line.data["to"]), ", ".join(map(str, line.data["skipped_steps"]))
    text = f"line {line.number}, from step {line.data['from']} to {to}, leaving out {steps}"
    if to in saved or (to == 0 and not saved):
        return Check(PASS, "rewind", text)
    return Check(FAIL, "rewind", f"{text}: step {to} had not been saved")


def _supervised(run_dir: Path, starts: List[Attempt]) -> Iterator[Check]:
    """Holds the log's starts against the attempts of `hvd-vgg launch`, by its clock."""
    attempts: List[Dict[str, Any]] = []
    what = "restarts.jsonl"
    for row in receipt.read_json_lines(run_dir / what):
        newest = attempts[-1] if attempts else {"attempt": -1, "code": DONE}
        if row["event"] == "start":
            if row["attempt"] not in (0, newest["attempt"] + 1) or (row["attempt"] and "code" not in newest):
                yield Check(FAIL, what, f"attempt {row['attempt']} follows attempt {newest['attempt']}: one is missing")
            attempts.append({**row, "until": math.inf})
            newest["until"] = min(newest.get("until", math.inf), row["time"])
        elif row["event"] == "end":
            if not attempts or row["attempt"] != newest["attempt"] or "code" in newest:
                yield Check(FAIL, what, f"an end of attempt {row['attempt']}, whose start is missing")
            else:
                newest.update(until=row["time"], code=row["code"], lost_seconds=row.get("lost_seconds"))
    launched = [start for start in starts if start.line.data["launched"]]
    found: Set[int] = set()
    for start in launched:
        at = [n for n, row in enumerate(attempts) if row["time"] <= start.line.timestamp <= row["until"]]
        found.update(at)
        if not at:
            yield Check(FAIL, what, f"start {start.number} of the log was launched, but no attempt is there of that time")
        elif attempts[at[0]]["ranks"] != start.line.data["ranks"]:
            yield Check(FAIL, what, f"start {start.number} had {start.line.data['ranks']} ranks, its attempt another number")
    for number, row in enumerate(attempts):
        # One that ended otherwise may have ended before it began to log.
        logged = row.get("code") in (DONE, STOPPED) or row.get("lost_seconds") is not None
        if logged and number not in found:
            yield Check(FAIL, what, f"the attempt of {row['at']} ended with {row['code']}, but the log has no start of it")
    if attempts or launched:
        by_hand = f"; {len(starts) - len(launched)} by hand" if len(launched) < len(starts) else ""
        yield Check(PASS, what, f"{plural(len(attempts), 'attempt')}, {plural(len(launched), 'start')} in the log{by_hand}")


# ---- epochs and evaluations


def _epochs(starts: List[Attempt]) -> Iterator[Check]:
    proved, told = 0, []
    for start in starts:
        batch, records = start.config.global_batch, start.records("train")
        for each in start.passes:
            fault = _fault_of_epochs(each, batch, records, start.config.log_every_steps)
            if fault:
                yield Check(FAIL, "epochs", f"start {start.number} {fault}")
        for line in [line for line in start.lines if line.event == "coverage"]:
            fault = _fault_of_epoch(line, batch, records, start.config, skipped_steps(starts))
            if fault:
                yield Check(FAIL, "epochs", f"line {line.number}, epoch {line.data['epoch']}: {fault}")
            elif not line.data["known"]:
                yield Check(UNKNOWN, "epochs", f"line {line.number}, epoch {line.data['epoch']}: begun in another order")
            else:
                proved += 1
                replaced, skipped = line.data["replaced"], int(line.data["skipped"])
                told += [f"epoch {line.data['epoch']}: {len(replaced)} replaced {replaced}"] if replaced else []
                told += [f"epoch {line.data['epoch']}: {skipped} skipped"] if skipped else []
    if proved:
        whole = f"{proved} times a whole epoch of {starts[-1].records('train')} records, each once"
        yield Check(PASS, "epochs", "; ".join([whole, *told]))


def _fault_of_epochs(each: Segment, batch: int, records: int, log_every_steps: int) -> str:
    """Says which epochs of a pass are told too many, missing, or in another order."""
    found, low, high = [int(line.data["epoch"]) for line in each.lines if line.event == "coverage"], each.last, each.last
    if not any(ends(line) or line.event == "stopped" for line in each.lines):
        # A kill, or a step that is not finite, may have come between the lines of one step.
        low = max([each.first, *(int(line.step[1]) for line in each.trained[:-1])])
        high += log_every_steps
    begun, least, most = (step * batch // records for step in (each.first, low, high))
    if found == list(range(begun, begun + len(found))) and least <= begun + len(found) <= most:
        return ""
    return f"tells of epochs {found}, but completed {list(range(begun, each.last * batch // records))}"


def _fault_of_epoch(line: receipt.LogLine, batch: int, records: int, config: TrainConfig, skipped: Set[int]) -> str:
    data, epoch = line.data, int(line.data["epoch"])
    complete_at = -(-(epoch + 1) * records // batch)
    if int(data["step"]) != complete_at or int(data["records"]) != records:
        return f"{data['records']} records at step {data['step']}, but {records} make it complete at step {complete_at}"
    if not data["known"]:
        return ""
    left_out = np.zeros(3, np.int64)
    for step in skipped if int(data["skipped"]) else ():
        at = positions(step * batch, (step + 1) * batch, records, config.seed, config.shuffle_block_records)
        left_out += digest(at.ids[at.epochs == epoch])
    if int(data["skipped"]) != left_out[0] or list(data["skipped_digest"]) != to_hex(left_out):
        return f"{data['skipped']} records skipped, which are not those of the steps skipped ({sorted(skipped)})"
    replaced = np.array(data["replaced"], np.int64)
    seen = digest_of_all(records) - left_out - digest(replaced)
    if int(data["seen"]) != seen[0] or list(data["seen_digest"]) != to_hex(seen):
        return f"{data['seen']} records, whose digest is not that of all {records} but those replaced or skipped"
    return ""


def _evaluations(starts: List[Attempt]) -> Iterator[Check]:
    good = 0
    for start in starts:
        for line in [*start.evaluated, *([start.end] if start.end else [])]:
            data, there = line.data, start.records("validation")
            top1, top5, records = (int(data[f"eval.{name}"]) for name in ("top1_hits", "top5_hits", "records"))
            if records != there or not 0 <= top1 <= top5 <= records:
                yield Check(
                    FAIL, "evaluations", f"line {line.number}: {top1} and {top5} hits of {records} records, of {there}"
                )
            elif not (_close(data["eval.acc@1"], top1 / records) and _close(data["eval.acc@5"], top5 / records)):
                yield Check(FAIL, "evaluations", f"line {line.number}: shares that {top1} and {top5} of {records} are not")
            else:
                good += not ends(line)
        end, last = start.end, start.evaluated[-1:]
        if end and not (last and all(end.data[name] == value for name, value in last[0].data.items())):
            yield Check(FAIL, "evaluations", f"line {end.number}: the end of start {start.number} is not as last evaluated")
    if good:
        yield Check(
            PASS, "evaluations", f"{good} of {starts[-1].records('validation')} records, shares as the hits make them"
        )


# ---- the checkpoints


def _checkpoints(run_dir: Path, starts: List[Attempt]) -> Iterator[Check]:
    paths = checkpoint.existing(run_dir)
    for path in reversed(paths):
        yield _checkpoint(path, starts)
    if starts and starts[-1].end and starts[-1].last not in [checkpoint.step_of(path) for path in paths]:
        yield Check(FAIL, "checkpoints", f"the run ended at step {starts[-1].last}, of which there is none")
    lines = [line for start in starts for line in start.lines]
    saved = [line for line in lines if line.event == "checkpoint"]
    aside = {line.data["file"] for line in lines if line.event == "checkpoint_damaged"}
    # A later save, which a kill kept from the log, may have pruned it.
    if saved and saved[-1].data["file"] not in aside and not any(path.name >= saved[-1].data["file"] for path in paths):
        yield Check(FAIL, "checkpoints", f"{saved[-1].data['file']}, saved last (line {saved[-1].number}), is gone")
    best = checkpoint.best(run_dir)
    if best:
        yield _best(checkpoint.step_of(best), best.exists(), starts)
    elif _scored(saved, starts):
        yield Check(FAIL, "best", "names no checkpoint, though one was saved with its evaluation")


def _scored(saved: List[receipt.LogLine], starts: List[Attempt]) -> bool:
    """Says whether a checkpoint was saved after the evaluation of its step: the first of these `best` names, if no other."""
    scores = [line for start in starts for line in start.evaluated]
    return any(line.data["step"] == score.step[1] and score.number < line.number for line in saved for score in scores)


def _checkpoint(path: Path, starts: List[Attempt]) -> Check:
    step = checkpoint.step_of(path)
    lines = [(start, line) for start in starts for line in start.lines if line.event == "checkpoint"]
    written = [(start, line) for start, line in lines if line.data["step"] == step]
    try:
        row, meta = receipt.checkpoint_row(path), checkpoint.load(path).meta
    except ValueError as error:
        return Check(FAIL, path.name, str(error))
    # Of a save that ended as the run was killed the log may know only from the start that went on from it.
    went_on = [(start, start.line) for start in starts if start.first == step and start.line.data["checkpoint"]]
    known = {name: value for name, value in (written[-1][1].data if written else {}).items() if name in row}
    if went_on and not written:
        known = went_on[-1][1].data["checkpoint"]
    if not known:
        return Check(UNKNOWN, path.name, "whole, but the log does not say that it was saved")
    start, line = (written or went_on)[-1]
    if _written_anew(row, known, step, line.number, starts):
        return Check(UNKNOWN, path.name, f"the weights are those saved (line {line.number}), and were scored since")
    if row != known:
        return Check(FAIL, path.name, f"is not what was saved: its digests are not those of line {line.number}")
    run = {**fingerprint(start.config), "train_data_sha256": start.line.data["data"]["train"]["sha256"]}
    run.pop("steps", None)  # the log has the length of the run in steps, whichever way it was given
    different = [name for name, value in run.items() if meta["run"].get(name) != value]
    if different:
        return Check(FAIL, path.name, f"was saved under another {', '.join(different)} than start {start.number} has")
    fault = _fault_of_position(meta, start.config, start.records("train"))
    if fault:
        return Check(FAIL, path.name, fault)
    return Check(PASS, path.name, f"whole, as saved (line {line.number}), {_so_far(meta, start)}")


def _written_anew(row: Dict[str, Any], known: Dict[str, Any], step: int, after: int, starts: List[Attempt]) -> bool:
    """Says whether the weights are the same and only the heading is newer: a start that scores a checkpoint first saves
    it again with what it now knows, and a kill may come before that is logged. after: the line of the one `known`."""
    scored = (line for start in starts if start.first == step for line in start.evaluated if int(line.step[1]) == step)
    same = row["sha256"] == known["sha256"] and row["header_sha256"] != known["header_sha256"]
    return same and any(line.number > after for line in scored)


def _fault_of_position(meta: Dict[str, Any], config: TrainConfig, records: int) -> str:
    """Says what is wrong with the coverage that a checkpoint has of the epoch in progress."""
    if not meta["coverage"]:
        return ""
    tally, position = parse_epoch_records(meta["coverage"]), meta["step"] * config.global_batch
    begun = position - position % records
    due = positions(begun, position, records, config.seed, config.shuffle_block_records).ids
    found = tally.seen + tally.skipped + digest(tally.replaced)
    return "" if (found == digest(due)).all() else "its records of the epoch in progress are not those of the order"


def _so_far(meta: Dict[str, Any], start: Attempt) -> str:
    if not meta["coverage"]:
        return "of the epoch in progress nothing known"
    return f"with {meta['coverage'][0]} of {start.records('train')} records of the epoch in progress"


def _best(step: int, there: bool, starts: List[Attempt]) -> Check:
    hits: Dict[int, int] = {}
    for each in [each for start in starts for each in start.passes]:  # what is made again later takes its place
        hits = {at: value for at, value in hits.items() if at <= each.first}
        hits.update({int(line.step[1]): int(line.data["eval.top1_hits"]) for line in each.lines if evaluates(line)})
    if not there:
        return Check(FAIL, "best", f"the checkpoint of step {step} is named, but is not there")
    if step not in hits:
        return Check(UNKNOWN, "best", f"step {step}, whose evaluation was not logged, or was made again since")
    if hits[step] < max(hits.values()):
        better = max(hits, key=lambda at: hits[at])
        # Its checkpoint may have been under way when the run was killed.
        saved = any(line.event == "checkpoint" and line.data["step"] == better for start in starts for line in start.lines)
        verdict = FAIL if saved else UNKNOWN
        return Check(verdict, "best", f"step {step} has {hits[step]} hits, but step {better} has {hits[better]}")
    return Check(PASS, "best", f"step {step}: {hits[step]} hits, the most of {plural(len(hits), 'evaluation')}")


# ---- the result


def _result(run_dir: Path, starts: List[Attempt]) -> Iterator[Check]:
    path = run_dir / "result.json"
    if not path.exists():
        ended = bool(starts and starts[-1].end)
        yield Check(FAIL if ended else UNKNOWN, "result.json", "not there" + (", but the run ended" if ended else " yet"))
        return
    result = json.loads(path.read_bytes())
    step = int(result["steps"])
    if starts[-1].end and step != starts[-1].last:
        yield Check(FAIL, "result.json", f"of step {step}, but the run ended at step {starts[-1].last}")
    # A kill may have come between an evaluation's line and its result, which then is of an earlier start's at this step.
    found = [(start, line) for start in reversed(starts) for line in start.evaluated if int(line.step[1]) == step]
    if not found:
        yield Check(FAIL, "result.json", f"of step {step}, at which the log has no evaluation")
        return
    claims = [list(_result_of(result, step, start, line)) for start, line in found]
    yield from next((each for each in claims if all(claim.verdict != FAIL for claim in each)), claims[0])
    yield Check(UNKNOWN, "result.json, seconds", "the wall's time is in no log; the receipt has it")
    for start in starts:
        if start.end:
            yield _speed(f"fps at the end of start {start.number}", start.end.data, start, start.end)


def _result_of(result: Dict[str, Any], step: int, start: Attempt, line: receipt.LogLine) -> Iterator[Check]:
    expected = {
        **{f"acc@{k}": line.data[f"eval.top{k}_hits"] / line.data["eval.records"] for k in (1, 5)},
        **{f"top{k}_hits": line.data[f"eval.top{k}_hits"] for k in (1, 5)},
        "records_evaluated": line.data["eval.records"],
        "epochs": step * start.config.global_batch / start.records("train"),
        "ranks": start.line.data["ranks"],
        "global_batch": start.config.global_batch,
        "precision": start.config.precision,
    }
    text = f"acc@1 {expected['acc@1']:.4f}, acc@5 {expected['acc@5']:.4f} at step {step}, as line {line.number} has them"
    yield _compared("result.json, accuracy", result, expected, text)
    yield _speed("result.json, fps", result, start, line)
    yield _by_rank(result, step, start, line)


def _by_rank(result: Dict[str, Any], step: int, start: Attempt, line: receipt.LogLine) -> Check:
    """Holds what was measured of all ranks against the line that was logged of it after the evaluation at `line`."""
    what = "result.json, by_rank, by_host"
    later = (each for each in start.lines if each.number > line.number and each.event == "throughput")
    logged = next((each for each in later if int(each.data["step"]) == step), None)
    if logged is None:
        return Check(FAIL, what, f"the log has no line of the throughput at step {step}")
    measured = {name: value for name, value in logged.data.items() if name not in ("event", "step")}
    rows = measured.get("by_rank", [])
    if len(rows) != (int(start.line.data["ranks"]) if measured["fps"] else 0):
        return Check(FAIL, what, f"line {logged.number} has {plural(len(rows), 'rank')} of {start.line.data['ranks']}")
    if measured.get("by_host", []) != per_host(rows):
        return Check(FAIL, what, f"by_host of line {logged.number} is not the sum of its by_rank")
    unlogged = {name: None for name in ("by_rank", "by_host") if name not in measured}
    return _compared(
        what, result, {**measured, **unlogged}, f"{plural(len(rows), 'rank')}, as line {logged.number} has them"
    )


def _speed(what: str, told: Dict[str, Any], start: Attempt, until: receipt.LogLine) -> Check:
    throughput = Throughput()
    throughput.total_seconds, throughput.input_seconds = start.seconds(until), start.seconds(until, "input")
    updates = plural(len(throughput.total_seconds), "update")
    measured = throughput.summary(start.config.global_batch)
    if not measured["fps"]:
        return _compared(what, told, measured, f"none, of {updates} logged")
    del measured["fps_wall"]
    config, ranks = start.config, int(start.line.data["ranks"])
    flops = training_flops(vgg_layers(config.model, config.width, config.image_size, config.num_classes), config.image_size)
    measured["tflops_per_rank"] = flops * measured["fps"] / ranks / 1e12
    whole = config.global_batch * len(throughput.total_seconds) / sum(throughput.total_seconds)
    if float(told.get("fps_wall") or 0) > whole * (1 + 1e-6):
        return Check(FAIL, what, f"fps_wall {told['fps_wall']:.6g} is more than the updates alone make, {whole:.6g}")
    return _compared(
        what, told, measured, f"{measured['fps']:.1f} images/s over {measured['fps_updates']} of {updates} logged"
    )


def _equal(a: Any, b: Any) -> bool:
    numbers = isinstance(a, (int, float)) and isinstance(b, (int, float))
    return _close(a, b) if numbers else bool(a == b)


def _compared(what: str, told: Dict[str, Any], expected: Dict[str, Any], text: str) -> Check:
    different = [
        f"{name} {told.get(name)!r}, computed {value!r}"
        for name, value in expected.items()
        if not _equal(told.get(name), value)
    ]
    return Check(FAIL, what, "; ".join(different)) if different else Check(PASS, what, text)


# ---- receipt and flags


def _receipt(run_dir: Path, lines: List[receipt.LogLine], starts: List[Attempt]) -> Iterator[Check]:
    found = receipt.read(run_dir)
    if found is None:
        began = any(start.lines for start in starts) or (run_dir / "receipt.json").exists()
        why = "each start writes it before its first update"
        yield Check(FAIL if began else UNKNOWN, "receipt.json", f"not there, or cannot be read: {why}")
        return
    log = run_dir / "dllogger.json"
    covered = int(found["files"]["dllogger.json"]["bytes"])
    newer = log.stat().st_size - covered
    if receipt.file_row(log, covered) != found["files"]["dllogger.json"]:
        yield Check(FAIL, "receipt.json, log", f"the first {covered} bytes of dllogger.json are not what they were")
    elif newer and starts and starts[-1].end and starts[-1].end.end <= covered:
        yield Check(FAIL, "receipt.json, log", f"{newer} bytes of dllogger.json are newer than the end of the run")
    else:
        since = f"; {newer} bytes are newer, as of a run that goes on or was killed" if newer else ""
        yield Check(PASS, "receipt.json, log", f"the first {covered} bytes of dllogger.json are as they were{since}")
        told = receipt.from_log([line for line in lines if line.end <= covered])
        different = [name for name, value in told.items() if found.get(name) != value]
        if different:
            yield Check(FAIL, "receipt.json", f"its {', '.join(different)} are not what the log says")
    yield from _receipt_of_starts(found, log, starts, covered)
    yield from _receipt_of_files(found, run_dir, lines, covered, starts)


def _receipt_of_starts(found: Dict[str, Any], log: Path, starts: List[Attempt], covered: int) -> Iterator[Check]:
    known = [start for start in starts if start.line.end <= covered]
    if len(found["starts"]) != len(known):
        yield Check(FAIL, "receipt.json, starts", f"it has {len(found['starts'])}, and the log {len(known)} up to then")
        return
    for start, row in zip(known, found["starts"]):
        told = {name: value for name, value in row.items() if name not in ("timestamp", "log")}
        if told != start.line.data or receipt.file_row(log, int(row["log"]["bytes"])) != row["log"]:
            yield Check(FAIL, "receipt.json, starts", f"start {start.number} or the log before it is not what it was then")
            return
    if len(starts) > len(known):
        yield Check(UNKNOWN, "receipt.json, starts", f"start {len(starts)} was killed before it wrote one")
    yield Check(PASS, "receipt.json, starts", f"{len(known)}, and the log as it was at each")


def _receipt_of_files(
    found: Dict[str, Any], run_dir: Path, lines: List[receipt.LogLine], covered: int, starts: List[Attempt]
) -> Iterator[Check]:
    newer = [line for line in lines if line.end > covered]
    if receipt.file_row(run_dir / "result.json") == found["files"]["result.json"]:
        yield Check(
            PASS, "receipt.json, result", "result.json is as it was" if found["files"]["result.json"] else "none yet"
        )
    elif any(evaluates(line) for line in newer):
        yield Check(UNKNOWN, "receipt.json, result", "the run was killed as it wrote a newer one")
    else:
        yield Check(FAIL, "receipt.json, result", "result.json is not what it was")
    yield from _receipt_of_restarts(found, run_dir / "restarts.jsonl", covered, starts)
    saved_again = {line.data["file"] for line in newer if line.event == "checkpoint"}
    aside = {line.data["file"] for line in lines if line.event == "checkpoint_damaged"}
    rows = {row["file"]: row for row in found["checkpoints"] if row["file"] not in saved_again}
    there = {path.name: path for path in checkpoint.existing(run_dir)}
    changed = []
    for name, known in rows.items():
        row = receipt.checkpoint_row(there[name]) if name in there else None
        after = len(lines) - len(newer)
        if row is None:
            # A later save may have pruned it, even one that a kill kept from the log.
            later = any(each > name and (each not in rows or each in saved_again) for each in there)
            changed += [] if later or name in aside else [f"{name} is gone"]
        elif row != known and not _written_anew(row, known, checkpoint.step_of(there[name]), after, starts):
            changed.append(f"{name} is not what it was")
    told = [line.data["file"] for line in lines if line.event == "checkpoint" and line.end <= covered]
    if told and told[-1] in there and told[-1] not in rows and told[-1] not in saved_again:
        changed.append(f"{told[-1]}, which had been saved, is not in it")
    if changed:
        yield Check(FAIL, "receipt.json, checkpoints", "; ".join(changed))


def _receipt_of_restarts(found: Dict[str, Any], path: Path, covered: int, starts: List[Attempt]) -> Iterator[Check]:
    before, what = found["files"]["restarts.jsonl"], "receipt.json, restarts"
    if before is None:
        # Each start of the launcher's is in restarts.jsonl before its ranks begin, and so before any receipt of theirs.
        if any(start.line.data["launched"] and start.line.end <= covered for start in starts):
            yield Check(FAIL, what, "none, though `hvd-vgg launch` had started the run")
    elif receipt.file_row(path, int(before["bytes"])) != before:
        yield Check(FAIL, what, f"the first {before['bytes']} bytes of restarts.jsonl are not what they were")
    elif found["restarts"] != receipt.read_json_lines(path, int(before["bytes"])):
        yield Check(FAIL, what, f"not those in the first {before['bytes']} bytes of restarts.jsonl")


def _flags(run_dir: Path, starts: List[Attempt]) -> Iterator[Check]:
    path = find_flag_file(run_dir)
    if path is None or not starts:
        yield Check(UNKNOWN, "flags.txt", "not there, or nothing was started")
        return
    started = starts[-1].config
    flags = parse_flags(TrainConfig, [f"--flagfile={path}"])
    flags = dataclasses.replace(flags, steps=total_steps(flags, starts[-1].records("train")))
    different = [f.name for f in dataclasses.fields(TrainConfig) if getattr(flags, f.name) != getattr(started, f.name)]
    if different:
        yield Check(FAIL, "flags.txt", f"{', '.join(different)}: not what start {starts[-1].number} was given")
    else:
        yield Check(PASS, "flags.txt", f"what start {starts[-1].number} was given")


# ---- with the data


def _evaluate_again(run_dir: Path, config: VerifyConfig) -> Iterator[Check]:
    """Evaluates the newest and the best checkpoint again; all ranks must call."""
    starts, _ = read_attempts(receipt.read_log(run_dir / "dllogger.json"))
    best = checkpoint.best(run_dir)
    names = ["newest", "best"] if best in checkpoint.existing(run_dir)[1:] else ["newest"]
    if not starts or not checkpoint.existing(run_dir):
        yield Check(UNKNOWN, "evaluated again", "there is no checkpoint, or no start in the log")
        return
    from hvd_vgg.commands.evaluate import score as evaluate_checkpoints

    chosen = dataclasses.replace(starts[-1].config, data_dir=config.data_dir, run_dir=config.run_dir, console="auto")
    for name, score in zip(names, evaluate_checkpoints(chosen, names)):
        what = f"evaluated again, {name}"
        lines = [line for start in starts for line in start.evaluated if int(line.step[1]) == score.step]
        if starts[-1].line.data["data"]["validation"]["sha256"] != score.data_sha256:
            yield Check(FAIL, what, f"--data_dir={config.data_dir} has other validation records than the run had")
        elif not lines:
            yield Check(UNKNOWN, what, f"the run did not evaluate step {score.step}")
        else:
            then = [int(lines[-1].data[f"eval.top{k}_hits"]) for k in (1, 5)]
            now = [score.result.top1, score.result.top5]
            same = max(abs(a - b) for a, b in zip(then, now)) <= config.hits_tolerance
            text = f"{now[0]} and {now[1]} hits of {score.result.records} at step {score.step}; logged: {then[0]}, {then[1]}"
            yield Check(PASS if same else FAIL, what, text)
