"""Checks a run against what its directory holds: `hvd-vgg verify-run`.

What the log allows is computed again (`read_history`); the digests of the receipt hold the rest together; with the data,
checkpoints are evaluated again; with another run, the two are compared (`compare_runs`). What a kill leaves newer than the
last line or receipt about it is unknown, and no failure.
"""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any, Dict, Iterator, Optional

from hvd_vgg.commands.history import (
    DAMAGED,
    FAIL,
    PASS,
    UNKNOWN,
    Attempt,
    Check,
    Findings,
    History,
    mismatches,
    read_history,
    throughput_rows,
)
from hvd_vgg.commands.same_run import compare_runs
from hvd_vgg.config import TrainConfig, VerifyConfig, fingerprint
from hvd_vgg.data.coverage import digest, parse_epoch_records
from hvd_vgg.data.sampler import positions
from hvd_vgg.environment import launched_rank
from hvd_vgg.errors import CONFIGURATION, DATA, DONE, STOPPED, Failure
from hvd_vgg.flags import parse_flags
from hvd_vgg.reporting import receipt
from hvd_vgg.reporting.console import Console
from hvd_vgg.reporting.goodput import Goodput
from hvd_vgg.reporting.receipt import LogLine
from hvd_vgg.run_dir import RunDir, checkpoint_step
from hvd_vgg.text import plural
from hvd_vgg.training import checkpoint
from hvd_vgg.training.schedule import total_steps
from hvd_vgg.watchdog import watchdog

_AVERAGE_HITS = "eval.average_top1_hits"
# What an evaluation depends on beside weights and data, and may change at a restart.
_EVALUATION_FLAGS = ("eval_crop", "eval_size", "eval_flip", "resize", "augment", "precision")


def verify_run(config: VerifyConfig) -> None:
    """Checks the run in --run_dir and prints each result. Collective with --data_dir.

    Raises Failure(DATA) if a check fails, Failure(CONFIGURATION) if there is no run.
    """
    run, console, verdicts = RunDir(config.run_dir), Console("lines", not launched_rank()), []
    for name, path in (("run_dir", config.run_dir), ("same_as", config.same_as or config.run_dir)):
        if not RunDir(path).log.is_file():
            raise Failure(CONFIGURATION, f"--{name}={path} has no dllogger.json: expected the directory of a run")
    if config.data_dir:
        watchdog.start(None, launched_rank() or 0, 0.0)  # evaluation sends heartbeats
    checks = [check(run.path)] if console.speaks else []
    if config.same_as and console.speaks:
        checks.append(_conclude(f"same as {config.same_as}", compare_runs(run, RunDir(config.same_as))))
    if config.data_dir:
        checks.append(_conclude("evaluated again", _evaluate_again(run, config)))
    for verdict, subject, text in itertools.chain(*checks):
        console.say(f"{verdict:7s}  {subject}: {text}")
        verdicts.append(verdict)
    if FAIL in verdicts:
        raise Failure(DATA, f"{verdicts.count(FAIL)} of {plural(len(verdicts), 'check')} of {run.path} failed")
    console.say(f"{verdicts.count(PASS)} passed, {verdicts.count(UNKNOWN)} unknown")


def check(run_dir: Path, history: Optional[History] = None) -> Iterator[Check]:
    """Yields every check that needs no data; history: of the log, if it has been read."""
    run = RunDir(run_dir)
    history = read_history(receipt.read_log(run.log)) if history is None else history
    yield from _conclude("log", _check_log(history))
    yield from history.checks
    yield from _conclude("restarts.jsonl", _check_restarts(run, history))
    for path in reversed(run.list_checkpoints()):
        yield from _conclude(path.name, _check_file(path, history))
    yield from _conclude(checkpoint.BEST, _check_best(run, history, checkpoint.BEST, "eval.top1_hits"))
    if any(_AVERAGE_HITS in line.data for line in history.scores.values()):
        yield from _conclude(checkpoint.BEST_AVERAGE, _check_best(run, history, checkpoint.BEST_AVERAGE, _AVERAGE_HITS))
    yield from _conclude("result.json", _check_result(run, history))
    yield from _conclude("receipt.json", _check_receipt(run, history))
    yield from _conclude("flags.txt", _check_flags(run, history))


def _conclude(subject: str, findings: Findings) -> Iterator[Check]:
    """Yields a failure for each of the first ten faults, or else the conclusion."""
    faults, conclusion = [], (PASS, "")
    try:
        while True:
            faults.append(next(findings))
    except StopIteration as done:
        conclusion = done.value
    except DAMAGED as error:
        faults.append(f"is damaged, or not what a run writes: {error!r}")
    shown = faults[:10] + ([f"and {len(faults) - 10} more"] if len(faults) > 10 else [])
    yield from [Check(FAIL, subject, fault) for fault in shown] or [Check(conclusion[0], subject, conclusion[1])]


def _check_log(history: History) -> Findings:
    yield from history.faults
    starts, epochs = plural(len(history.attempts), "start"), plural(len(history.select("coverage")), "whole epoch")
    return PASS, f"{len(history.lines)} lines in order: {starts}, {epochs}"


def _check_restarts(run: RunDir, history: History) -> Findings:
    """Compares the starts in the log with those that `hvd-vgg launch` has noted, by the name that it gave each.

    Runs of earlier versions have no names; there the clock of the launcher's host must do.
    """
    rows = [row for row in receipt.read_json_lines(run.restarts) if row["event"] in ("start", "end")]
    launched = [attempt for attempt in history.attempts if attempt.start.data["launched"]]
    event, number, matched = "end", -1, []
    for row, following in zip(rows, [*rows[1:], {"time": math.inf}]):
        expected = ("end", number) if event == "start" else ("start", number + 1)
        event, number = row["event"], row["attempt"]
        if (event, number) not in (expected, ("start", 0)):
            yield f"{event} of attempt {number}, expected {' '.join(map(str, expected))}: a line is missing"
        if event == "start":
            inside = [each for each in launched if _is_start_of(each, row, following["time"])]
            matched += [each for each in inside if each.ranks == row["ranks"]]
            # One that ended otherwise may have ended before it began to log.
            if not inside and (following.get("code") in (DONE, STOPPED) or following.get("lost_seconds") is not None):
                yield f"the attempt of {row['at']} ended with {following['code']}, but the log has no start of it"
    for attempt in [attempt for attempt in launched if attempt not in matched]:
        yield f"no attempt on {plural(attempt.ranks, 'rank')} is start {attempt.number} of the log"
    return PASS, f"has {len(launched)} of {plural(len(history.attempts), 'start')} in the log"


def _is_start_of(attempt: Attempt, row: Dict[str, Any], ended: float) -> bool:
    """Returns whether `attempt` is what the launcher started, with `row` of restarts.jsonl, and saw end at a time."""
    job, began = attempt.start.data.get("job"), row["time"]
    if job or "job" in row:
        return bool(job == row.get("job"))
    # A clock that was set back meanwhile says nothing of this start.
    return bool(ended < began or began <= attempt.start.timestamp <= ended)


def _check_file(path: Path, history: History) -> Findings:
    step = checkpoint_step(path) or 0
    row, meta = receipt.checkpoint_row(path), checkpoint.load(path).meta
    number, saved = history.saved.get(step, (0, None))
    if saved is None:
        return UNKNOWN, "whole, but the log does not say that it was saved"
    verdict = history.compare(row, saved, number)
    if verdict == FAIL:
        yield f"is not what was saved: its digests are not those of line {number}"
    attempt = [attempt for attempt in history.attempts if attempt.start.number < number][-1]
    config, records = attempt.config, attempt.records
    known = {name: value for name, value in fingerprint(config).items() if name in attempt.known}
    expected = {**known, "train_data_sha256": attempt.start.data["data"]["train"]["sha256"]}
    # The log has the length of the run in steps, whichever way it was given.
    yield from mismatches((name, meta["run"].get(name), value) for name, value in expected.items() if name != "steps")
    yield from mismatches([("state_sha256", row["state_sha256"], checkpoint.state_sha256(row["sha256"], meta))])
    if meta["coverage"]:
        part, position = parse_epoch_records(meta["coverage"]), step * attempt.batch
        due = positions(position - position % records, position, records, config.seed, config.shuffle_block_records).ids
        total = part.seen + part.skipped + digest(part.replaced)
        yield from mismatches([("digest of the epoch in progress", total.tolist(), digest(due).tolist())])
    text = "whole, as saved" if verdict == PASS else "the weights are those saved, and were evaluated since"
    return verdict, f"{text} (line {number})"


def _check_best(run: RunDir, history: History, name: str, metric: str) -> Findings:
    best = checkpoint.best(run, name)
    scores = {step: line for step, line in history.scores.items() if metric in line.data}
    hits = {step: int(line.data[metric]) for step, line in scores.items()}
    most = hits.get(checkpoint_step(best) or 0) if best else -1
    if best and not best.exists():
        yield f"names {best.name}, which is not there"
    if most is None:
        return UNKNOWN, "the log has no evaluation of it"
    for step, line in scores.items():
        saved = history.saved.get(step, (0, None))[0] > line.number and run.checkpoint(step).name not in history.damaged
        if saved and hits[step] > most:
            yield f"names {best.name if best else 'nothing'}, but the checkpoint of step {step} has {hits[step]} hits"
    return PASS, f"{best.name if best else 'none'}, {most} hits: the most of {plural(len(scores), 'evaluation')}"


def _check_result(run: RunDir, history: History) -> Findings:
    if not run.result.exists():
        if history.over == "end":
            yield "is missing, but the run ended"
        return UNKNOWN, "there is none yet"
    result = json.loads(run.result.read_bytes())
    step = history.attempts[-1].last if history.over == "end" else result["steps"]
    logged = [(each, line) for each in reversed(history.attempts) for line in each.select("throughput") if line.step == step]
    if not logged:
        yield f"is of step {result['steps']}, of which the log has none"
        return FAIL, ""
    # A kill may have come between its line in the log and the file, which then is an earlier attempt's of the same step.
    attempt, line = min(logged, key=lambda each: bool(each[1].data.get("fps_wall") != result.get("fps_wall")))
    evaluation = [each.data for each in attempt.select("evaluation") if each.number < line.number][-1]
    expected = {name: evaluation[f"eval.{name}"] for name in ("acc@1", "acc@5", "top1_hits", "top5_hits")}
    expected.update({"by_rank": None, "by_host": None, **line.data, "event": None, "step": None, "steps": step})
    expected.update(records_evaluated=evaluation["eval.records"], epochs=step * attempt.batch / attempt.records)
    expected.update(state_sha256=evaluation["eval.state_sha256"])
    averages = {name[len("eval.") :]: value for name, value in evaluation.items() if name.startswith("eval.average_")}
    expected.update(averages)
    expected.update(ranks=attempt.ranks, global_batch=attempt.batch, precision=attempt.config.precision)
    yield from mismatches((name, result.get(name), value) for name, value in expected.items())
    if "goodput" in result or "process_seconds" in attempt.start.data:  # earlier versions had neither
        expected = Goodput(each for each in history.lines if each.number < line.number).report()
        yield from mismatches((name, result.get(name), value) for name, value in expected.items())
    yield from mismatches(throughput_rows(line, attempt))
    return PASS, f"of step {step}, as line {line.number} has it; its `seconds` are in no log"


def _check_receipt(run: RunDir, history: History) -> Findings:
    found, lines = receipt.read(run), history.lines
    if found is None:
        if any(attempt.lines for attempt in history.attempts) or run.receipt.exists():
            yield "is missing or unreadable, though each start writes it before its first update"
        return UNKNOWN, "there is none yet"
    files, restarts = found["files"], found["files"]["restarts.jsonl"]
    covered = sum(line.digest["bytes"] <= files["dllogger.json"]["bytes"] for line in lines)
    now = receipt.content(run, lines[:covered], restarts["bytes"] if restarts else 0)
    if any(line.kind == "evaluation" for line in lines[covered:]):  # a kill may have come before the newer result's receipt
        now["files"]["result.json"] = files["result.json"]
    if not restarts:
        now["files"]["restarts.jsonl"] = None
        # The launcher notes a start before its ranks begin, and so before any receipt of theirs.
        if any(line.kind == "start" and line.data["launched"] for line in lines[:covered]):
            yield "digest of restarts.jsonl is missing, though `hvd-vgg launch` made a start"
    yield from _checkpoint_faults(run, history, covered, found["checkpoints"], now.pop("checkpoints"))
    # What the directory has now is found; what it had, as the receipt knows, is expected.
    yield from mismatches((f"digest of {name}", row, files.get(name)) for name, row in now.pop("files").items())
    yield from mismatches((name, value, found.get(name)) for name, value in now.items() if name != "written")
    newer = f"; {len(lines) - covered} lines are newer, as in a run that goes on or was killed" if lines[covered:] else ""
    return PASS, f"log, restarts, result and checkpoints are as they were{newer}"


def _checkpoint_faults(run: RunDir, history: History, covered: int, known: Any, there: Any) -> Iterator[str]:
    """Compares checkpoints that exist with those known to a receipt of `covered` lines, and finds which are gone."""
    lines = history.select("checkpoint")
    known, there = ({row["file"]: row for row in rows} for rows in (known, there))
    newer = {line.data["file"] for line in lines if line.number > covered}
    settled = {line.data["file"] for line in lines} - newer  # not saved again since the receipt
    expected = [line.data["file"] for line in lines[-1:]]
    expected += [run.checkpoint(history.attempts[-1].last).name] if history.over == "end" else []
    for name in sorted({*there, *known, *expected} - history.damaged):
        row = there.get(name)
        if row is None:  # a later save may have pruned it, even one that a kill kept out of the log
            if all(later <= name or later in settled for later in there):
                yield f"{name} is gone"
        elif name not in known:
            if name in settled:
                yield f"{name} was saved before, but is not in it"
        elif name not in newer and history.compare(row, known[name], covered) == FAIL:
            yield f"{name} is not what it was"


def _check_flags(run: RunDir, history: History) -> Findings:
    if not run.flags.is_file() or not history.attempts:
        return UNKNOWN, "is missing, or nothing was started"
    attempt = history.attempts[-1]
    flags = parse_flags(TrainConfig, [f"--flagfile={run.flags}"])
    flags = dataclasses.replace(flags, steps=total_steps(flags, attempt.records))
    yield from mismatches((name, getattr(flags, name), value) for name, value in dataclasses.asdict(attempt.config).items())
    return PASS, f"the flags of start {attempt.number}"


def _evaluated_alike(history: History, line: LogLine) -> bool:
    """Returns whether an evaluation in the log has the newest start's flags of evaluation, which a restart may change."""
    then, now = _config_at(history, line.number), history.attempts[-1].config
    return all(getattr(then, name) == getattr(now, name) for name in _EVALUATION_FLAGS)


def _config_at(history: History, number: int) -> TrainConfig:
    """Returns the configuration of the start that line `number` of the log belongs to."""
    before = [attempt for attempt in history.attempts if attempt.start.number < number]
    return (before or history.attempts[:1])[-1].config


def _evaluate_again(run: RunDir, config: VerifyConfig) -> Findings:
    """Evaluates the newest and the best checkpoint again, and those of the average. Collective."""
    history, paths, texts, verdict = read_history(receipt.read_log(run.log)), run.list_checkpoints(), [], PASS
    if not history.attempts or not paths:
        return UNKNOWN, "there is no checkpoint, or no start in the log"
    from hvd_vgg.commands import evaluate

    attempt = history.attempts[-1]
    subjects = [evaluate.Subject("newest"), *([evaluate.Subject("best")] if checkpoint.best(run) in paths[1:] else [])]
    saved, _ = history.saved.get(checkpoint_step(paths[0]) or 0, (0, None))
    if saved and _config_at(history, saved).ema_decay:  # not where it was switched on after this checkpoint
        subjects.append(evaluate.Subject("newest", average=True))
    if checkpoint.best(run, checkpoint.BEST_AVERAGE) in paths[1:]:
        subjects.append(evaluate.Subject("best", average=True))
    flags = dataclasses.replace(attempt.config, data_dir=config.data_dir, run_dir=config.run_dir, console="auto")
    for subject, score in zip(subjects, evaluate.score(flags, subjects)):
        now, line, prefix = score.result, history.scores.get(score.step), "average_" * subject.average
        alike = line and _evaluated_alike(history, line)
        known = line and alike and f"eval.{prefix}top1_hits" in line.data
        then = [int(line.data[f"eval.{prefix}top{k}_hits"]) for k in (1, 5)] if line and known else None
        other = " (made under other flags)" if line and not alike else ""
        hits = f"{now.top1} and {now.top5} hits of {now.records} at step {score.step}; logged: {then}{other}"
        texts.append(f"{subject.of}{subject.checkpoint}: {hits}")
        verdict = verdict if then else UNKNOWN
        if attempt.start.data["data"]["validation"]["sha256"] != score.data_sha256:
            yield f"--data_dir={config.data_dir} has other validation records than the run had"
        elif then and max(abs(now.top1 - then[0]), abs(now.top5 - then[1])) > config.hits_tolerance:
            yield texts[-1]
    return verdict, "; ".join(texts)
