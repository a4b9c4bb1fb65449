"""Checks a run against what its directory holds: `hvd-vgg verify-run`.

Whatever the raw lines of the log allow is computed again: images/s from the seconds of each update, accuracies from hits,
coverage from the ids 0 .. N-1, learning rates and epochs from the configuration, and the order of starts, lines and
checkpoints (`read_history`). The digests of the receipt hold the rest together. With the data, checkpoints are evaluated again.

What cannot be checked is unknown, and no failure: a kill at any moment leaves work that is newer than the last receipt, result
or line about it. The log has the times of single updates of rank 0 only; what result.json says of the other ranks is compared
with what was logged at the same time.
"""

import dataclasses
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, Optional

from hvd_vgg.commands.history import (
    DAMAGED,
    FAIL,
    PASS,
    UNKNOWN,
    Attempt,
    Check,
    History,
    compare_checkpoints,
    mismatches,
    read_history,
    saved_row,
)
from hvd_vgg.config import TrainConfig, VerifyConfig, fingerprint
from hvd_vgg.data.coverage import digest, parse_epoch_records
from hvd_vgg.data.sampler import positions
from hvd_vgg.environment import launched_rank
from hvd_vgg.errors import CONFIGURATION, DATA, DONE, STOPPED, Failure
from hvd_vgg.flags import parse_flags
from hvd_vgg.reporting import receipt
from hvd_vgg.reporting.receipt import LogLine
from hvd_vgg.run_dir import RunDir, checkpoint_step
from hvd_vgg.streams import write_line
from hvd_vgg.text import plural
from hvd_vgg.train import checkpoint
from hvd_vgg.train.schedule import total_steps


def verify_run(config: VerifyConfig) -> None:
    """Checks the run in --run_dir and prints each result. Collective with --data_dir.

    Raises Failure(DATA) if a check fails, Failure(CONFIGURATION) if there is no run.
    """
    run_dir, speaks = Path(config.run_dir), not launched_rank()
    if not RunDir(run_dir).log.is_file():
        raise Failure(CONFIGURATION, f"--run_dir={run_dir} has no dllogger.json: expected the directory of a run")
    again = _guarded("evaluated again", _evaluate_again(run_dir, config)) if config.data_dir else iter([])
    verdicts = []
    for verdict, subject, text in itertools.chain(check(run_dir) if speaks else [], again):
        verdicts.append(verdict)
        if speaks:
            write_line(f"{verdict:7s}  {subject}: {text}", sys.stdout)
    if FAIL in verdicts:
        raise Failure(DATA, f"{verdicts.count(FAIL)} of {plural(len(verdicts), 'check')} of {run_dir} failed")
    if speaks:
        write_line(f"{verdicts.count(PASS)} passed, {verdicts.count(UNKNOWN)} unknown", sys.stdout)


def check(run_dir: Path) -> Iterator[Check]:
    """Yields every check that needs no data."""
    run = RunDir(run_dir)
    history, found = read_history(receipt.read_log(run.log)), receipt.read(run_dir)
    for subject, checks in (
        ("log", _check_log(history)),
        ("restarts.jsonl", _check_restarts(run, history)),
        ("checkpoints", _check_checkpoints(run, history, found)),
        ("best", _check_best(run, history)),
        ("result.json", _check_result(run, history)),
        ("receipt.json", _check_receipt(run, history, found)),
        ("flags.txt", _check_flags(run, history)),
    ):
        yield from _guarded(subject, checks)


def _guarded(subject: str, checks: Iterator[Check]) -> Iterator[Check]:
    try:
        yield from checks
    except DAMAGED as error:
        yield Check(FAIL, subject, f"has content that no run writes: {type(error).__name__} {error}")


def _conclude(subject: str, faults: Iterable[str], text: str, verdict: str = PASS) -> Iterator[Check]:
    """Yields a failure for each of the first ten faults, or else `verdict`."""
    found = list(faults)
    shown = found[:10] + ([f"and {len(found) - 10} more"] if len(found) > 10 else [])
    yield from [Check(FAIL, subject, fault) for fault in shown] or [Check(verdict, subject, text)]


def _check_log(history: History) -> Iterator[Check]:
    counts = [(len(history.attempts), "start"), (sum(len(each.seconds("update")) for each in history.attempts), "update")]
    counts += [(len(history.select(kind)), kind) for kind in ("evaluation", "rewind")]
    text = ", ".join(plural(*count) for count in counts)
    yield from _conclude("log", history.faults, f"{plural(len(history.lines), 'line')} in order: {text}")
    yield from history.checks
    epochs = [line.data for line in history.select("coverage")]
    odd = [
        f"epoch {row['epoch']}: {row['skipped']} skipped, {len(row['replaced'])} replaced {row['replaced']}"
        for row in epochs
        if row["known"] and (row["skipped"] or row["replaced"])
    ]
    odd += [f"epoch {row['epoch']} was begun in another order" for row in epochs if not row["known"]]
    if epochs and not history.faults:
        text = f"{sum(row['known'] for row in epochs)} times all {epochs[-1]['records']} records, each once"
        yield Check(PASS if all(row["known"] for row in epochs) else UNKNOWN, "epochs", "; ".join([text, *odd]))


def _check_restarts(run: RunDir, history: History) -> Iterator[Check]:
    """Compares the starts in the log with those that `hvd-vgg launch` has noted, by the clock of its host."""
    rows = [row for row in receipt.read_json_lines(run.restarts) if row["event"] in ("start", "end")]
    launched = [attempt for attempt in history.attempts if attempt.start.data["launched"]]
    event, number, matched, faults = "end", -1, [], []
    for row, following in zip(rows, [*rows[1:], {"time": math.inf}]):
        expected = ("end", number) if event == "start" else ("start", number + 1)
        event, number = row["event"], row["attempt"]
        if (event, number) not in (expected, ("start", 0)):
            faults.append(f"{event} of attempt {number}, expected {' '.join(map(str, expected))}: a line is missing")
        if event == "start":
            inside = [each for each in launched if row["time"] <= each.start.timestamp <= following["time"]]
            matched += [each for each in inside if each.ranks == row["ranks"]]
            # One that ended otherwise may have ended before it began to log.
            if not inside and (following.get("code") in (DONE, STOPPED) or following.get("lost_seconds") is not None):
                faults.append(f"the attempt of {row['at']} ended with {following['code']}, but the log has no start of it")
    for attempt in launched:
        if attempt not in matched:
            faults.append(
                f"has no attempt on {plural(attempt.ranks, 'rank')} at the time of start {attempt.number} of the log"
            )
    if rows or launched:
        yield from _conclude("restarts.jsonl", faults, f"{len(launched)} of {plural(len(history.attempts), 'start')}")


def _covered(history: History, found: Optional[Dict[str, Any]]) -> int:
    """Returns how many lines of the log a receipt covers."""
    length = int(found["files"]["dllogger.json"]["bytes"]) if found else 0
    return sum(line.end <= length for line in history.lines)


# ---- files


def _check_checkpoints(run: RunDir, history: History, found: Optional[Dict[str, Any]]) -> Iterator[Check]:
    """Compares each checkpoint with what log and receipt say of it, and finds those that are gone."""
    covered, saved = _covered(history, found), history.select("checkpoint")
    known = {row["file"]: row for row in found["checkpoints"]} if found else {}
    newer = {line.data["file"] for line in saved if line.number > covered}
    settled = {line.data["file"] for line in saved} - newer  # not saved again since the receipt
    damaged = {line.data["file"] for line in history.lines if line.kind == "checkpoint_damaged"}
    there, expected = {path.name: path for path in run.list_checkpoints()}, [line.data["file"] for line in saved[-1:]]
    if history.end and history.end.kind == "end":
        expected.append(run.checkpoint(history.attempts[-1].segment.last).name)
    for name in sorted({*there, *known, *expected} - damaged):
        if name in there:
            yield from _guarded(name, _check_file(there[name], history, None if name in newer else known.get(name), covered))
            if found and name in settled - set(known):
                yield Check(FAIL, name, "was saved before the receipt was written, but is not in it")
        # A later save may have pruned it, even one that a kill kept out of the log.
        elif all(later <= name or later in settled for later in there):
            yield Check(FAIL, name, "was saved, and is gone")


def _check_file(path: Path, history: History, known: Optional[Dict[str, Any]], covered: int) -> Iterator[Check]:
    """known: the receipt's row, written after line `covered`."""
    step, end = checkpoint_step(path) or 0, len(history.lines) + 1
    row, meta, line = receipt.checkpoint_row(path), checkpoint.load(path).meta, history.saved.get(step)
    if line is None:
        yield Check(UNKNOWN, path.name, "whole, but the log does not say that it was saved")
        return
    verdict = compare_checkpoints(row, saved_row(line), step, history, range(line.number, end))
    faults = [f"is not what was saved: its digests are not those of line {line.number}"] if verdict == FAIL else []
    if known and compare_checkpoints(row, known, step, history, range(covered + 1, end)) == FAIL:
        faults.append("is not what it was: its digests are not those of receipt.json")
    attempt = [attempt for attempt in history.attempts if attempt.start.number <= line.number][-1]
    config, records = attempt.config, attempt.records
    expected = {**fingerprint(config), "train_data_sha256": attempt.start.data["data"]["train"]["sha256"]}
    expected.pop("steps", None)  # the log has the length of the run in steps, whichever way it was given
    faults += mismatches((name, meta["run"].get(name), value) for name, value in expected.items())
    if meta["coverage"]:
        part, position = parse_epoch_records(meta["coverage"]), step * attempt.batch
        due = positions(position - position % records, position, records, config.seed, config.shuffle_block_records).ids
        total = part.seen + part.skipped + digest(part.replaced)
        faults += mismatches([("digest of the epoch in progress", total.tolist(), digest(due).tolist())])
    text = "whole, as saved" if verdict == PASS else "the weights are those saved, and were evaluated since"
    yield from _conclude(path.name, faults, f"{text} (line {line.number})", verdict)


def _check_best(run: RunDir, history: History) -> Iterator[Check]:
    best, most = checkpoint.best(run.path), max(history.candidates.values(), default=-1)
    hits = history.scores.get(checkpoint_step(best) or 0) if best else -1
    if best and not best.exists():
        yield Check(FAIL, "best", f"names {best.name}, which is not there")
    elif hits is None:
        yield Check(UNKNOWN, "best", "its evaluation was not logged, or was made again since")
    elif hits < most:
        name = f"names {best.name} with {hits} hits" if best else "names no checkpoint"
        yield Check(FAIL, "best", f"{name}, but one with {most} hits was saved")
    elif best:
        yield Check(PASS, "best", f"{best.name}: {hits} hits, the most of {plural(len(history.scores), 'evaluation')}")


def _check_result(run: RunDir, history: History) -> Iterator[Check]:
    ended = history.end is not None and history.end.kind == "end"
    if not run.result.exists():
        yield Check(
            FAIL if ended else UNKNOWN, "result.json", "is missing" + (", but the run ended" if ended else " as yet")
        )
        return
    result = json.loads(run.result.read_bytes())
    step = history.attempts[-1].segment.last if ended else result["steps"]
    # A kill may have come between its line in the log and the file, which then is an earlier attempt's of the same step.
    logged = [(each, line) for each in reversed(history.attempts) for line in each.select("throughput") if line.step == step]
    faults = [list(_result_faults(result, attempt, line)) for attempt, line in logged]
    text = f"of step {step}, as the log has it; of its `seconds` only the receipt knows"
    yield from _conclude("result.json", min(faults, key=len) if faults else [f"the log has none of step {step}"], text)


def _result_faults(result: Dict[str, Any], attempt: Attempt, line: LogLine) -> Iterator[str]:
    evaluation = [each.data for each in attempt.select("evaluation") if each.number < line.number][-1]
    expected = {
        **{name: evaluation[f"eval.{name}"] for name in ("acc@1", "acc@5", "top1_hits", "top5_hits")},
        "records_evaluated": evaluation["eval.records"],
        "by_rank": None, "by_host": None, **line.data, "event": None, "step": None,
        "steps": line.step,
        "epochs": line.step * attempt.batch / attempt.records,
        "ranks": attempt.ranks,
        "global_batch": attempt.batch,
        "precision": attempt.config.precision,
    }
    yield from mismatches((name, result.get(name), value) for name, value in expected.items())


def _check_receipt(run: RunDir, history: History, found: Optional[Dict[str, Any]]) -> Iterator[Check]:
    if found is None:
        began = any(attempt.lines for attempt in history.attempts) or run.receipt.exists()
        yield Check(FAIL if began else UNKNOWN, "receipt.json", "is missing or unreadable; each start writes it at once")
        return
    expected, covered = receipt.content(run.path, found["files"]), _covered(history, found)
    newer = history.lines[covered:]
    if any(line.kind == "evaluation" for line in newer):  # a kill may have come before the receipt of the newer result
        expected["files"]["result.json"] = found["files"]["result.json"]
    if not found["files"]["restarts.jsonl"]:
        # The launcher notes a start before its ranks begin, and so before any receipt of theirs.
        launched = any(line.kind == "start" and line.data["launched"] for line in history.lines[:covered])
        expected["files"]["restarts.jsonl"] = "a row, since `hvd-vgg launch` started the run" if launched else None
    del expected["written"], expected["checkpoints"]
    faults = [*mismatches((name, found.get(name), value) for name, value in expected.items())]
    if newer and history.end and history.end.kind == "end" and history.end.number <= covered:
        faults.append(f"{len(newer)} lines of dllogger.json are newer than the end of the run")
    since = f"; {len(newer)} lines are newer, as in a run that goes on or was killed" if newer else ""
    yield from _conclude("receipt.json", faults, f"log, starts, restarts and result are as they were{since}")


def _check_flags(run: RunDir, history: History) -> Iterator[Check]:
    if not run.flags.is_file() or not history.attempts:
        yield Check(UNKNOWN, "flags.txt", "is missing, or nothing was started")
        return
    attempt = history.attempts[-1]
    flags = parse_flags(TrainConfig, [f"--flagfile={run.flags}"])
    flags = dataclasses.replace(flags, steps=total_steps(flags, attempt.records))
    rows = ((name, getattr(flags, name), value) for name, value in dataclasses.asdict(attempt.config).items())
    yield from _conclude("flags.txt", mismatches(rows), f"the flags of start {attempt.number}")


# ---- with the data


def _evaluate_again(run_dir: Path, config: VerifyConfig) -> Iterator[Check]:
    """Evaluates the newest and the best checkpoint again. Collective."""
    history, paths = read_history(receipt.read_log(RunDir(run_dir).log)), RunDir(run_dir).list_checkpoints()
    if not history.attempts or not paths:
        yield Check(UNKNOWN, "evaluated again", "there is no checkpoint, or no start in the log")
        return
    from hvd_vgg.train import loop

    attempt, names = history.attempts[-1], ["newest", "best"] if checkpoint.best(run_dir) in paths[1:] else ["newest"]
    flags = dataclasses.replace(attempt.config, data_dir=config.data_dir, run_dir=config.run_dir, console="auto")
    for name, score in zip(names, loop.score(flags, names)):
        verdict, text = UNKNOWN, f"the run did not evaluate step {score.step}"
        now, lines = score.result, [line.data for line in history.select("evaluation") if line.step == score.step]
        if attempt.start.data["data"]["validation"]["sha256"] != score.data_sha256:
            verdict, text = FAIL, f"--data_dir={config.data_dir} has other validation records than the run had"
        elif lines:
            top1, top5 = (int(lines[-1][f"eval.top{k}_hits"]) for k in (1, 5))
            verdict = PASS if max(abs(now.top1 - top1), abs(now.top5 - top5)) <= config.hits_tolerance else FAIL
            text = f"{now.top1} and {now.top5} hits of {now.records} at step {score.step}; logged: {top1} and {top5}"
        yield Check(verdict, f"evaluated again, {name}", text)
