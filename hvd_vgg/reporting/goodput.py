"""Goodput: the share of a run's wall time, over all its starts, that went into updates that count. Computed from its log.

Every second from the start of the first process to the newest line belongs to one part:

    training     updates that count: those that no restart or rewind made again
    recomputed   updates that were made again later
    starting     from the start of a process to its first update: imports, joining, restoring, compiling
    evaluation   evaluating
    saving       between updates otherwise: the copy for a checkpoint, results, profiling
    rewinding    diagnosing a step that was not finite, and returning to a checkpoint
    suspended    the processes were stopped from outside
    restarting   from the last line of a start that failed to the next process: updates that reached no line, and nothing
    stopped      the same after a start that ended in order

Within a start the times are of a monotonic clock (`reporting.log`), and so they are between two starts of rank 0 on one
host. Between starts on different hosts they are of the hosts' clocks: a negative time counts as none.
"""

from typing import Any, Dict, Iterable, List

from hvd_vgg.reporting.receipt import LogLine
from hvd_vgg.text import format_duration

PARTS = "training", "recomputed", "starting", "evaluation", "saving", "rewinding", "suspended", "restarting", "stopped"


class Goodput:
    """Adds up the lines of a log, in order."""

    def __init__(self, lines: Iterable[LogLine] = ()) -> None:
        self.starts = 0
        self._parts = dict.fromkeys(PARTS, 0.0)
        self._updates: List[float] = []  # seconds of each update that counts so far, by step
        self._mark = 0.0  # all time until this one, as the newest start has timestamps, is accounted for
        self._boot: Dict[str, Any] = {}  # id of the kernel's boot, seconds since then and timestamp, at the newest start
        self._gap = ""  # the part of what is before the next line of updates, or the next start
        self._suspended = 0.0  # seconds since the mark
        for line in lines:
            self.add(line)

    def add(self, line: LogLine) -> None:
        """Accounts for the time up to a line."""
        data = line.data
        if line.kind == "start":
            self._start(line)
        elif not self.starts:
            return
        elif line.kind == "train":
            self._account(line, data.get("train.update_seconds", []), self._gap)
            self._gap = "saving"
        elif line.kind == "rewind":
            self._account(line, data.get("update_seconds", []), "rewinding", counts=False)
            self._discard(int(data["to"]))
        elif line.kind == "suspended":
            self._suspended += data.get("seconds", 0.0)
        elif line.kind == "evaluation":
            self._account(line, [], "evaluation")
        elif line.kind in ("throughput", "end", "stopped"):
            self._account(line, [], "saving")
            self._gap = self._gap if line.kind == "throughput" else "stopped"

    def _start(self, line: LogLine) -> None:
        boot, before = {"timestamp": line.timestamp, **line.data.get("boot", {})}, self._boot
        process_began = line.timestamp - line.data.get("process_seconds", 0.0)
        if self.starts:
            seconds = process_began - self._mark
            if before.get("id") and before["id"] == boot.get("id"):  # less what the host's clock was set by meanwhile
                seconds -= (boot["timestamp"] - boot["seconds"]) - (before["timestamp"] - before["seconds"])
            self._parts["stopped" if self._gap == "stopped" else "restarting"] += max(0.0, seconds)
        self._parts["starting"] += line.timestamp - process_began
        self.starts, self._mark, self._gap, self._suspended = self.starts + 1, line.timestamp, "starting", 0.0
        self._boot = boot
        self._discard(line.step)

    def _account(self, line: LogLine, updates: List[float], rest: str, counts: bool = True) -> None:
        """Divides the time since the mark: what the processes were suspended, `updates`, and the rest."""
        window = max(0.0, line.timestamp - self._mark)
        suspended, self._suspended, self._mark = min(self._suspended, window), 0.0, max(self._mark, line.timestamp)
        self._parts["suspended"] += suspended
        # A line is written a little after its last update: what is too much here is too little at the next line.
        self._parts[rest] += window - suspended - sum(updates)
        if not counts:
            self._parts["recomputed"] += sum(updates)
        elif updates:
            self._discard(line.step - len(updates))
            self._updates += updates

    def _discard(self, step: int) -> None:
        """Returns to `step` updates: those after it will be made again."""
        self._parts["recomputed"] += sum(self._updates[step:])
        self._updates[step:] = [0.0] * (step - len(self._updates))  # lines that a full disk had no room for

    def report(self) -> Dict[str, Any]:
        """Returns `goodput`, None before there is any time, and `goodput_seconds` of each part, under the names above."""
        seconds = {**self._parts, "training": sum(self._updates)}
        for name in ("saving", "rewinding"):  # too little, as above, with the first line's too much in `starting`
            seconds["starting"] += min(0.0, seconds[name])
        seconds = {name: max(0.0, value) for name, value in seconds.items()}
        wall = sum(seconds.values())
        return {"goodput": seconds["training"] / wall if wall else None, "goodput_seconds": seconds}


def describe(report: Dict[str, Any]) -> str:
    """Returns a report for people: the share, of how much time, and where the rest went, the largest part first."""
    seconds = dict(report["goodput_seconds"])
    wall = sum(seconds.values())
    del seconds["training"]
    rest = sorted(((value, name) for name, value in seconds.items() if value >= 0.5), reverse=True)
    lost = f"; the rest: {', '.join(f'{name} {format_duration(value)}' for value, name in rest)}" if rest else ""
    return f"{report['goodput'] or 0.0:.1%} of {format_duration(wall)}{lost}"
