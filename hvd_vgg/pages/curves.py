"""The numbers of a log as curves, against epochs and against time; long ones thinned.

A log may be damaged: whatever is no number where one is expected is NaN, which no figure shows.
"""

import math
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import numpy as np

from hvd_vgg.reporting.receipt import LogLine

POINTS = 400  # of a curve at most; a screen has few more columns
TRAINING = (
    *("train.loss", "train.acc@1", "train.acc@5", "train.lr", "train.fps", "train.gradient_norm", "train.loss_scale"),
    *("train.input_share", "train.network_share", "train.straggler_share"),
)
EVALUATION = ("eval.loss", "eval.acc@1", "eval.acc@5", "eval.average_loss", "eval.average_acc@1", "eval.average_acc@5")


class Curve(NamedTuple):
    """Values with their places, float64 [points]; low, high: of what each point stands for, equal to the values for one."""

    epochs: np.ndarray
    hours: np.ndarray
    values: np.ndarray
    low: np.ndarray
    high: np.ndarray
    counts: np.ndarray  # whether a point is of updates that no restart or rewind made again, bool [points]


def number(value: Any) -> float:
    """Returns a number of a log as a float; NaN for what is none, or not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:  # an integer of hundreds of digits
        return math.nan


def whole(value: Any, default: int = -1) -> int:
    """Returns a count or step of a log; the default for what is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53 else default


def number_list(value: Any) -> List[float]:
    """Returns the numbers of a list of a log, in order, without what is none."""
    numbers = map(number, value) if isinstance(value, list) else iter(())
    return [each for each in numbers if not math.isnan(each)]


def text_list(value: Any) -> List[str]:
    """Returns a list of a log as texts."""
    return [str(each) for each in value] if isinstance(value, list) else []


def mapping(value: Any) -> Dict[str, Any]:
    """Returns an object of a log; {} for what is none."""
    return value if isinstance(value, dict) else {}


def flag_text(value: Any) -> str:
    """Returns a flag's value as it is written on a command line; of an object in a log the names too."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {flag_text(each)}" for name, each in value.items()) or "(empty)"
    if isinstance(value, (list, tuple)):
        return ",".join(map(flag_text, value)) or "(empty)"
    return str(value).lower() if isinstance(value, bool) else str(value) or "(empty)"


def made_again(lines: Sequence[LogLine]) -> List[int]:
    """Returns for each line after how many updates later starts and rewinds went on: those beyond are made again.

    Where nothing is made again that is more than any step.
    """
    floors, floor = [], 2**53
    for line in reversed(lines):
        floors.append(floor)
        if line.kind == "start":
            floor = min(floor, whole(line.step, floor))
        elif line.kind == "rewind":
            floor = min(floor, whole(line.data.get("to"), floor))
    return floors[::-1]


def updates_per_epoch(lines: Sequence[LogLine]) -> float:
    """Returns how many updates an epoch has; NaN if the log does not say."""
    starts = [line.data for line in lines if line.kind == "start"]
    flags = [line.data for line in lines if line.kind == "PARAMETER"]
    records = number(mapping(mapping(starts[-1].get("data")).get("train")).get("records")) if starts else math.nan
    batch = number(flags[-1].get("global_batch")) if flags else math.nan
    return records / batch if batch > 0 and records > 0 else math.nan


def began(lines: Sequence[LogLine]) -> float:
    """Returns when the first process of a run began, in seconds since 1970; NaN if the log does not say."""
    for line in lines:
        if line.kind == "start" and math.isfinite(line.timestamp):
            return process_began(line)
    times = (line.timestamp for line in lines if line.kind and math.isfinite(line.timestamp))
    return next(times, math.nan)


def process_began(start: LogLine) -> float:
    """Returns when the process of a start began, in seconds since 1970: before its line by imports and joining."""
    seconds = number(start.data.get("process_seconds"))
    return start.timestamp - (0.0 if math.isnan(seconds) else seconds)


def hours_since(origin: float, timestamp: float) -> float:
    """Returns the hours from a time to another, both in seconds since 1970; NaN where one is none."""
    hours = (timestamp - origin) / 3600
    return hours if math.isfinite(hours) else math.nan


def unit_of(hours: float) -> Tuple[str, float]:
    """Returns the unit in which an axis of a number of hours has few digits, and how many of it an hour has."""
    return ("hours", 1.0) if hours >= 1.5 else ("minutes", 60.0) if hours >= 1 / 40 else ("seconds", 3600.0)


def read_curves(lines: Sequence[LogLine]) -> Dict[str, Curve]:
    """Returns the curves that a log has, by the names of TRAINING and EVALUATION."""
    found: Dict[str, List[Tuple[float, ...]]] = {}
    origin, per_epoch, floors = began(lines), updates_per_epoch(lines), made_again(lines)
    for line, floor in zip(lines, floors):
        if line.kind not in ("train", "evaluation"):
            continue
        step = whole(line.step)
        place = step / per_epoch if step >= 0 else math.nan, hours_since(origin, line.timestamp)
        for name in TRAINING if line.kind == "train" else EVALUATION:
            if name not in line.data:
                continue
            value = number(line.data[name])
            losses = number_list(line.data.get("train.losses")) if name == "train.loss" else []
            low, high = (min(losses), max(losses)) if losses else (value, value)
            found.setdefault(name, []).append((*place, value, low, high, float(step <= floor)))
    return {name: _thinned(rows) for name, rows in found.items()}


def _thinned(rows: List[Tuple[float, ...]]) -> Curve:
    """Returns the rows as a curve of at most POINTS points, each the mean of neighbours, with their least and largest."""
    columns = np.array(rows, np.float64).T
    epochs, hours, values, low, high, counts = columns if columns.shape[1] <= POINTS else _reduce(columns)
    return Curve(epochs, hours, values, low, high, counts > 0)


def _reduce(columns: np.ndarray) -> Iterator[np.ndarray]:
    cuts = np.linspace(0, columns.shape[1], POINTS + 1).astype(int)
    parts = list(zip(cuts, cuts[1:]))

    def over(function: Any, column: np.ndarray) -> np.ndarray:
        finite = (part[np.isfinite(part)] for part in (column[low:high] for low, high in parts))
        return np.array([function(part) if len(part) else math.nan for part in finite])

    yield from (over(np.mean, column) for column in columns[:3])
    yield from (over(np.min, columns[3]), over(np.max, columns[4]))
    yield over(np.min, columns[5])
