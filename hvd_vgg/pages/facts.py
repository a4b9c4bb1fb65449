"""What is known of a run: read from its directory, with a sentence about each thing that is missing or damaged."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple

from hvd_vgg import storage
from hvd_vgg.config import TrainConfig
from hvd_vgg.errors import Failure
from hvd_vgg.pages.class_tables import ClassRow, ConfusionRow, ErrorRow, read_classes, read_confusions, read_errors
from hvd_vgg.pages.curves import Curve, mapping, read_curves, text_list, whole
from hvd_vgg.pages.timeline import Event, Span, events, spans
from hvd_vgg.reporting.goodput import Goodput
from hvd_vgg.reporting.receipt import LogLine, read_log
from hvd_vgg.run_dir import RunDir

# What a damaged file may raise where its contents are used.
DAMAGED = (AttributeError, LookupError, OSError, ArithmeticError, RecursionError, TypeError, ValueError, Failure)


class Facts(NamedTuple):
    """A run. letter: of it in a page of several, "" in one of its own; missing: sentences; of state and reason: `runs`."""

    letter: str
    run: RunDir
    state: str
    reason: str
    lines: List[LogLine]
    flags: Dict[str, Any]  # of TrainConfig, as the newest start has them
    software: Dict[str, Any]
    start: Dict[str, Any]  # the data of the newest start
    result: Dict[str, Any]
    throughput: Dict[str, Any]  # the newest
    evaluations: List[LogLine]
    curves: Dict[str, Curve]
    spans: Dict[str, List[Span]]
    events: List[Event]
    goodput: Dict[str, Any]
    classes: List[ClassRow]  # of the last evaluation, as the next two
    confusions: List[ConfusionRow]
    errors: List[ErrorRow]
    missing: List[str]

    @property
    def name(self) -> str:
        """How the page calls it."""
        return f"{self.letter}: {self.run.path}" if self.letter else str(self.run.path)


def read_facts(run: RunDir, letter: str, state: str, reason: str) -> Facts:
    """Returns what is known of a run, whatever its files are like; state, reason: of the `runs` command."""
    missing: List[str] = []

    def attempt(what: str, read: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return read()
        except DAMAGED as error:
            missing.append(f"{what}: damaged, or not what a run writes ({reason_of(error)})")
            return otherwise

    lines: List[LogLine] = attempt("dllogger.json", lambda: read_log(run.log), [])
    missing += _missing_lines(run, lines)
    parameters = next((line.data for line in reversed(lines) if line.kind == "PARAMETER"), {})
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    software = ("hvd_vgg", "python", "tensorflow", "horovod", "controller", "mpi", "numpy", "images", "device")
    for path, why in (
        (run.flags, "the flags of the newest start"),
        (run.receipt, "the digests of all that it consisted of"),
    ):
        if not path.is_file():
            missing.append(f"{path.name} is not there: {why}")
    result: Dict[str, Any] = {}
    if run.result.is_file():
        result = attempt("result.json", lambda: _object(json.loads(storage.read_bytes(run.result))), {})
    else:
        missing.append("result.json is not there: it is written with the first evaluation")
    ends = [line.data for line in lines if line.kind == "throughput"]

    def table(path: Path, read: Callable[[], Any]) -> Any:
        return attempt(path.name, read, []) if path.is_file() else []

    classes = table(run.class_hits, lambda: read_classes(run.class_hits))
    return Facts(
        letter,
        run,
        state,
        reason,
        lines,
        {name: parameters[name] for name in names if name in parameters},
        {name: parameters[name] for name in software if name in parameters},
        next((line.data for line in reversed(lines) if line.kind == "start"), {}),
        result,
        next((each for each in reversed(ends) if each.get("by_rank")), {}),
        [line for line in lines if line.kind == "evaluation"],
        attempt("curves", lambda: read_curves(lines), {}),
        attempt("time", lambda: spans(lines), {}),
        attempt("events", lambda: events(run, lines), []),
        attempt("goodput", lambda: Goodput(lines).report(), {}),
        classes,
        table(run.confusions, lambda: read_confusions(run.confusions, classes)),
        table(run.confident_errors, lambda: read_errors(run.confident_errors, classes)),
        missing,
    )


def reason_of(error: Exception) -> str:
    """Returns why something could not be read, in one sentence."""
    if isinstance(error, Failure):
        return error.message
    return (str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}")[:200]


def _object(value: Any) -> Dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("expected an object")
    return value


def _missing_lines(run: RunDir, lines: Sequence[LogLine]) -> List[str]:
    """Returns what a log lacks."""
    if not run.log.is_file():
        return ["dllogger.json is not there: nothing is known of what the run did"]
    torn = [line.number for line in lines if not line.kind]
    found = []
    if torn:
        found.append(f"{len(torn)} of {len(lines)} lines of dllogger.json cannot be read; the first is line {torn[0]}")
    for kind, text in (
        ("PARAMETER", "its configuration"),
        ("start", "a start, with data, hosts and versions"),
        ("train", "an update"),
        ("evaluation", "an evaluation"),
    ):
        if not any(line.kind == kind for line in lines):
            found.append(f"the log does not have {text}")
    return found


def hosts_of(facts: Facts) -> List[Tuple[str, int]]:
    """Returns the hosts of the newest start with their ranks."""
    hosts = text_list(facts.start.get("hosts"))
    return [(host, hosts.count(host)) for host in dict.fromkeys(hosts)]


def ranks_of(facts: Facts) -> int:
    """Returns the ranks of the newest start; 0 if the log does not say."""
    return max(0, whole(facts.start.get("ranks"), 0))


def records_of(facts: Facts, split: str) -> Dict[str, Any]:
    """Returns records and sha256 of a split, as the newest start has them."""
    return mapping(mapping(facts.start.get("data")).get(split))
