"""The `runs` command: the runs below a directory, a line each. Needs no TensorFlow; changes nothing."""

import json
import os
import shlex
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Tuple

from hvd_vgg import storage
from hvd_vgg.colours import CYAN, GREEN, RED, YELLOW
from hvd_vgg.commands.history import DAMAGED
from hvd_vgg.config import RunsConfig
from hvd_vgg.errors import CONFIGURATION, DATA, DONE, Failure
from hvd_vgg.reporting.console import Console
from hvd_vgg.reporting.receipt import LogLine, read_json_lines, read_log
from hvd_vgg.run_dir import RunDir
from hvd_vgg.text import format_duration, printable

_MOST_DEPTH = 6  # of directories that are looked into
_OTHER_HOST_SECONDS = 600.0  # since its newest line, until which a run that another host holds is taken to train
_LEAST_REASON = 40  # columns that a reason has on a terminal, however narrow that is
_COLOURS = {"training": CYAN, "stopped": YELLOW, "done": GREEN, "failed": RED, "unreadable": RED}


class Row(NamedTuple):
    """A run for people. state: training, stopped, done, failed or unreadable; reason: why, or "".

    top1, top5: of the evaluation with the best acc@1, which need not be the last.
    """

    name: str
    state: str
    step: str
    epochs: str
    top1: str
    top5: str
    fps: str
    age: str
    reason: str


def list_runs(config: RunsConfig) -> None:
    """Prints a line for each run below --dir, the newest at the end; on a terminal as much of reasons as fits.

    Raises Failure(DATA) where there is none, Failure(CONFIGURATION) where there is no directory.
    """
    folder = Path(config.dir)
    if not folder.is_dir():
        raise Failure(CONFIGURATION, f"--dir={folder}: expected a directory with runs, or that of one run")
    found = sorted(find_runs(folder), key=_written)
    if not found:
        raise Failure(DATA, f"--dir={folder}: no run in it: expected directories that `hvd-vgg train --run_dir=` made")
    rows = [Row(*map(printable, _describe(run, folder))) for run in found]
    table = [Row("run", "state", "step", "epochs", "best acc@1", "its acc@5", "images/s", "age", ""), *rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    console, room = Console("auto", True), sys.maxsize  # columns for reasons
    if sys.stdout.isatty():
        room = max(_LEAST_REASON, shutil.get_terminal_size().columns - sum(width + 2 for width in widths[:-1]))
    for row in table:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths)]
        left[1] = console.paint(left[1], _COLOURS[row.state]) if row.state in _COLOURS else left[1]
        right = [cell.rjust(width) for cell, width in zip(row[2:-1], widths[2:])]
        print("  ".join([*left, *right, printable(row.reason, room)]).rstrip())


def _written(run: RunDir) -> float:
    try:
        return run.log.stat().st_mtime
    except OSError:
        return 0.0


def _describe(run: RunDir, folder: Path) -> Row:
    """Returns the row of a run, whatever is in its log."""
    try:
        return describe_run(run, folder, time.time())
    except DAMAGED as error:
        what = f"its log is damaged, or not what a run writes ({type(error).__name__}: {error})"
        return Row(_name(run, folder), "unreadable", "", "", "", "", "", "", what)


def _name(run: RunDir, folder: Path) -> str:
    name = str(run.path.relative_to(folder))
    return run.path.resolve().name if name == "." else name


def find_runs(folder: Path) -> Iterator[RunDir]:
    """Yields the runs in a directory and below it; links to directories are not followed, nor are runs looked into."""
    for path, folders, files in os.walk(folder):
        run = RunDir(path)
        if run.log.name in files:
            yield run
        deep = len(Path(path).relative_to(folder).parts) >= _MOST_DEPTH
        folders[:] = [] if deep or run.log.name in files else sorted(folders)


def describe_run(run: RunDir, folder: Path, now: float) -> Row:
    """Returns the row of a run; now: seconds since 1970. Raises as DAMAGED where its log is not what a run writes."""
    name = _name(run, folder)
    try:
        lines = read_log(run.log)
        age = max(0.0, now - run.log.stat().st_mtime)
    except (OSError, Failure) as error:
        return Row(name, "unreadable", "", "", "", "", "", "", getattr(error, "strerror", None) or str(error))
    flags: Dict[str, Any] = next((line.data for line in reversed(lines) if line.kind == "PARAMETER"), {})
    state, reason = _state(run, lines, age)
    best = max((line.data for line in lines if line.kind == "evaluation"), key=_top1, default={})
    step = max((line.step for line in lines if line.kind in ("train", "evaluation", "start")), default=0)
    trained = [line for line in lines if line.kind == "train"]
    rates = [line.data["train.fps"] for line in trained[-20:] if isinstance(line.data.get("train.fps"), float)]
    ends = [line.data["fps"] for line in lines if line.kind == "throughput" and line.data.get("fps")]
    fps = ends[-1] if ends and state == "done" else sorted(rates)[len(rates) // 2] if rates else None
    total = next((line.data.get("steps") for line in reversed(lines) if line.kind == "start"), None)
    epochs = step * flags.get("global_batch", 0) / max(1, _records(lines))
    top1, top5 = (f"{best[name]:.4f}" if name in best else "-" for name in ("eval.acc@1", "eval.acc@5"))
    return Row(
        name,
        state,
        f"{step}/{total}" if total else str(step),
        f"{epochs:.1f}",
        top1,
        top5,
        "-" if fps is None else f"{fps:.1f}",
        format_duration(age),
        reason,
    )


def _top1(data: Dict[str, Any]) -> float:
    return float(data.get("eval.acc@1", -1.0))


def _records(lines: List[LogLine]) -> int:
    starts = [line.data for line in lines if line.kind == "start"]
    return int(starts[-1].get("data", {}).get("train", {}).get("records", 0)) if starts else 0


def _state(run: RunDir, lines: List[LogLine], age: float) -> Tuple[str, str]:
    """Returns (state, reason) of a run."""
    holder = _holder(run)
    if _is_locked_here(run, holder):
        return "training", ""
    if lines and lines[-1].kind == "end":
        return "done", ""
    if lines and lines[-1].kind == "stopped":
        return "stopped", "on request; the same command goes on"
    reason = _why(run, lines)
    if not reason and holder.get("host") not in (None, socket.gethostname()) and age < _OTHER_HOST_SECONDS:
        return "training", f"on {holder['host']}, by its newest line"
    return "failed", reason or "it left no reason: killed, or its host is gone"


def _why(run: RunDir, lines: List[LogLine]) -> str:
    """Returns why the newest start of a run failed, as its files have it; "" where they say nothing."""
    if lines and lines[-1].kind == "nonfinite":
        return f"not finite at step {lines[-1].data.get('step')}: hvd-vgg replay {shlex.quote(str(run.path))}"
    began = next((line.timestamp for line in reversed(lines) if line.kind == "start"), 0.0)
    reports = [row for path in sorted(run.faults.glob("*.rank*.jsonl")) for row in read_json_lines(path)]
    newest = [row for row in reports if isinstance(row.get("time"), float) and row["time"] >= began]
    if newest:
        first = min(newest, key=lambda row: float(row["time"]))
        what = str(first.get("error") or f"hung in {first.get('phase')}").split("\n")[0]
        return f"rank {first.get('rank')} on {first.get('host')}: {what}"
    ends = [row for row in read_json_lines(run.restarts) if row.get("reason") and float(row.get("time", 0)) >= began]
    if ends and ends[-1].get("code") == DONE:
        return "the log has no end, though the launcher saw the run done"
    return str(ends[-1]["reason"]) if ends else ""


def _holder(run: RunDir) -> Dict[str, Any]:
    try:
        found = json.loads(storage.read_bytes(run.lock))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_locked_here(run: RunDir, holder: Dict[str, Any]) -> bool:
    """Returns whether a process of this host holds the run's lock; taking it to find out could turn a starting job away.

    The kernel's list has another device than files have on some file systems: then the process that signed the lock counts.
    """
    try:
        status, locks = run.lock.stat(), Path("/proc/locks").read_text()
    except OSError:
        return False
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    rows = [line.split() for line in locks.splitlines() if " FLOCK " in line and "->" not in line]
    return any(
        row[5] == device or (row[5].endswith(f":{status.st_ino}") and row[4] == str(holder.get("process"))) for row in rows
    )
