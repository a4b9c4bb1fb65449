"""A run as its log has it: starts, what each was told, and the passes between rewinds."""

import dataclasses
from typing import Any, Dict, List, NamedTuple, Optional, Set, Tuple

from hvd_vgg.config import TrainConfig
from hvd_vgg.reporting import receipt


class Segment(NamedTuple):
    """Lines of a start that no rewind comes between, and the updates that the run had at first."""

    first: int
    lines: List[receipt.LogLine]

    @property
    def trained(self) -> List[receipt.LogLine]:
        """The lines of its updates."""
        return [line for line in self.lines if trains(line)]

    @property
    def last(self) -> int:
        """The updates that the run had at last."""
        stopped = [int(line.data["step"]) for line in self.lines if line.event == "stopped"]
        return max([self.first, *(int(line.step[1]) for line in self.trained), *stopped])


class Attempt(NamedTuple):
    """One start of a run as the log has it: its configuration, its `start` line, and its lines after that."""

    number: int  # from 1
    parameters: Dict[str, Any]
    line: receipt.LogLine
    lines: List[receipt.LogLine]

    @property
    def config(self) -> TrainConfig:
        """The configuration, with the length of the run in steps."""
        known = {field.name for field in dataclasses.fields(TrainConfig)}
        told: Dict[str, Any] = {name: value for name, value in self.parameters.items() if name in known}
        chosen: Dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}
        return TrainConfig(**chosen)

    @property
    def first(self) -> int:
        """The updates that the run had when this began."""
        return int(self.line.data["step"])

    @property
    def last(self) -> int:
        """The updates that the run had when this wrote its last line of them."""
        return self.passes[-1].last

    @property
    def passes(self) -> List[Segment]:
        """Its lines from one rewind to the next; one if there was none."""
        found = [Segment(self.first, [])]
        for line in self.lines:
            if line.event == "rewind":
                found.append(Segment(int(line.data["to"]), []))
            else:
                found[-1].lines.append(line)
        return found

    @property
    def trained(self) -> List[receipt.LogLine]:
        """The lines of its updates."""
        return [line for line in self.lines if trains(line)]

    @property
    def evaluated(self) -> List[receipt.LogLine]:
        """The lines of its evaluations."""
        return [line for line in self.lines if evaluates(line)]

    @property
    def stopped(self) -> List[int]:
        """The update after which it stopped on request, or nothing."""
        return [int(line.data["step"]) for line in self.lines if line.event == "stopped"]

    @property
    def end(self) -> Optional[receipt.LogLine]:
        """The line of its end, if it came to one."""
        return next((line for line in self.lines if ends(line)), None)

    def records(self, split: str) -> int:
        """The records of a split."""
        return int(self.line.data["data"][split]["records"])

    def seconds(self, before: Optional[receipt.LogLine] = None, of: str = "update") -> List[float]:
        """The seconds of its updates, or of those logged before a line; of: `update` in all, or `input` waited for."""
        lines = [line for line in self.lines if before is None or line.number < before.number]
        # Those of a window with a step that is not finite are told by the rewind.
        each = [line.data[f"train.{of}_seconds" if trains(line) else f"{of}_seconds"] for line in lines if timed(line)]
        return [float(one) for seconds in each for one in seconds]


def trains(line: receipt.LogLine) -> bool:
    """Says whether a line is one of updates."""
    return "train.loss" in line.data


def timed(line: receipt.LogLine) -> bool:
    """Says whether a line has seconds of updates."""
    return trains(line) or line.event == "rewind"


def evaluates(line: receipt.LogLine) -> bool:
    """Says whether a line is one of an evaluation."""
    return "eval.records" in line.data and not ends(line)


def ends(line: receipt.LogLine) -> bool:
    """Says whether a line is that of a run's end."""
    return line.kind == "LOG" and not line.step


def read_attempts(lines: List[receipt.LogLine]) -> Tuple[List[Attempt], List[str]]:
    """Returns the starts that a log tells of, and what in its lines belongs to none."""
    starts: List[Attempt] = []
    faults: List[str] = []
    parameters: Optional[Dict[str, Any]] = None
    current: Optional[Attempt] = None
    for at, line in enumerate(lines):
        if not line.kind:
            torn = at + 1 == len(lines) or lines[at + 1].kind == "METADATA"
            if not torn:
                faults.append(f"line {line.number} cannot be read, and no kill has cut it off: others follow it")
        elif line.kind == "METADATA":
            parameters = current = None
        elif line.step == "PARAMETER":
            parameters, current = line.data, None
        elif line.event == "start":
            if parameters is None:
                faults.append(f"line {line.number}: a start without its configuration")
            current = Attempt(len(starts) + 1, parameters or {}, line, [])
            starts.append(current)
            parameters = None
        elif current:
            current.lines.append(line)
        elif trains(line) or evaluates(line) or ends(line):
            faults.append(f"line {line.number}: an update, evaluation or end before a start")
    return starts, faults


def skipped_steps(starts: List[Attempt]) -> Set[int]:
    """Returns the steps that rewinds have left out: whatever is logged of them was without an update."""
    lines = [line for start in starts for line in [start.line, *start.lines] if line.event in ("start", "rewind")]
    return {int(step) for line in lines for step in line.data["skipped_steps"]}
