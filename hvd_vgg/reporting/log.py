"""What a run tells: DLLogger's JSON lines in a file, a console a person can read, TensorBoard events.

The names in METRICS, their units and formats are an interface: others parse them.
"""

import contextlib
import errno
import json
import math
import os
import sys
import threading
from datetime import datetime
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

from hvd_vgg.errors import NOT_WRITTEN, Failure
from hvd_vgg.streams import ignore_broken_pipe

try:
    import dllogger
except ImportError:
    dllogger = None
METRICS: Dict[str, Dict[str, str]] = {
    "train.loss": {"unit": "nats", "format": ":.5f"},
    "train.acc@1": {"unit": "", "format": ":.4f"},
    "train.acc@5": {"unit": "", "format": ":.4f"},
    "train.gradient_norm": {"unit": "", "format": ":.4g"},
    "train.loss_scale": {"unit": "", "format": ":g"},
    "train.skipped_updates": {"unit": "updates", "format": ":d"},
    "train.lr": {"unit": "", "format": ":.6g"},
    "train.fps": {"unit": "images/s", "format": ":.1f"},
    "train.input_share": {"unit": "", "format": ":.4f"},
    "train.network_share": {"unit": "", "format": ":.4f"},
    "train.straggler_share": {"unit": "", "format": ":.4f"},
    "train.slow_rank": {"unit": "", "format": ":d"},
    "train.update_seconds": {"unit": "s, each update on rank 0"},
    "train.input_seconds": {"unit": "s, of them waiting for input"},
    "eval.loss": {"unit": "nats", "format": ":.5f"},
    "eval.acc@1": {"unit": "", "format": ":.4f"},
    "eval.acc@5": {"unit": "", "format": ":.4f"},
    "eval.top1_hits": {"unit": "records", "format": ":d"},
    "eval.top5_hits": {"unit": "records", "format": ":d"},
    "eval.records": {"unit": "records", "format": ":d"},
    "eval.bad_records": {"unit": "records", "format": ":d"},
}
Step = Union[str, Tuple[int, ...]]


def _format_metric(name: str, metadata: Dict[str, str], value: Any) -> str:
    """Returns a metric as DLLogger prints it; its own function fails on the text that NaN has become."""
    text = value if isinstance(value, str) else ("{" + metadata.get("format", "") + "}").format(value)
    return f"{name} : {text} {metadata.get('unit', '')}"


class _StdoutBackend:
    """DLLogger's stdout format, for when the package is not installed: `DLL TIME - STEP NAME : VALUE UNIT ...`."""

    def __init__(self) -> None:
        self.known: Dict[str, Dict[str, str]] = {}

    def metadata(self, now: datetime, elapsed: float, metric: str, metadata: Dict[str, str]) -> None:
        self.known[metric] = metadata

    def log(self, now: datetime, elapsed: float, step: Step, data: Dict[str, Any]) -> None:
        parts = [_format_metric(name, self.known.get(name, {}), value) for name, value in data.items()]
        print(f"DLL {now.replace(tzinfo=None)} - {step} {' '.join(parts)}")

    def flush(self) -> None:
        sys.stdout.flush()


class _JsonBackend:
    """DLLogger's JSON format, for when the package is not installed: `DLLL {...}` a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting = b""

    def _write(self, now: datetime, elapsed: float, kind: str, **more: Any) -> None:
        times = {
            "timestamp": str(now.timestamp()),
            "datetime": str(now),
            "elapsedtime": str(elapsed),
            "type": kind,
        }
        self.waiting += f"DLLL {json.dumps({**times, **more})}\n".encode()

    def metadata(self, now: datetime, elapsed: float, metric: str, metadata: Dict[str, str]) -> None:
        self._write(now, elapsed, "METADATA", metric=metric, metadata=metadata)

    def log(self, now: datetime, elapsed: float, step: Step, data: Dict[str, Any]) -> None:
        self._write(now, elapsed, "LOG", step=step, data=data)

    def flush(self) -> None:
        """Appends the lines that wait, all or none."""
        with open(self.path, "ab", buffering=0) as file:
            end = file.tell()
            try:
                written = file.write(self.waiting)
                if written < len(self.waiting):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(end)
                raise
        self.waiting = b""


class _Logger:
    """The part of dllogger.Logger that is used here."""

    def __init__(self, backends: List[Any]) -> None:
        self.backends = backends
        self.started = datetime.now().astimezone()

    def _each(self, call: str, *arguments: Any) -> None:
        now = datetime.now().astimezone()
        for backend in self.backends:
            getattr(backend, call)(now, (now - self.started).total_seconds(), *arguments)

    def metadata(self, metric: str, metadata: Dict[str, str]) -> None:
        self._each("metadata", metric, metadata)

    def log(self, step: Step, data: Dict[str, Any]) -> None:
        self._each("log", step, data)

    def flush(self) -> None:
        for backend in self.backends:
            backend.flush()


class RunLog:
    """The log files of a run, for rank 0: `dllogger.json` (appended to on resume) and TensorBoard's events.

    `tensorboard` is a function (name, value, step), or None.
    """

    def __init__(self, run_dir: Path, stdout: bool, tensorboard: Optional[Callable[[str, float, int], None]]) -> None:
        self.path = path = run_dir / "dllogger.json"
        self.one_at_a_time = threading.Lock()
        _terminate_last_line(path)
        if dllogger:
            kind, file = dllogger.Logger, dllogger.JSONStreamBackend(dllogger.Verbosity.VERBOSE, str(path), append=True)
            lines = dllogger.StdOutBackend(dllogger.Verbosity.VERBOSE, metric_format=_format_metric)
        else:
            kind, file, lines = _Logger, _JsonBackend(path), _StdoutBackend()
        # Two loggers, for a stdout that is gone must not keep a line from the file.
        self.logger, self.printer = kind([file]), kind([lines]) if stdout else None
        self.tensorboard = tensorboard
        for name, metadata in METRICS.items():
            self.logger.metadata(name, metadata)
            if self.printer:
                self.printer.metadata(name, metadata)

    def log(self, step: Step, data: Dict[str, Any]) -> None:
        """Writes one line; step: (epoch, update), "PARAMETER" for what the run is, "EVENT", or () for its end.

        The line is with the kernel when this returns; where the disk is full it waits for the next one, or for `close`.
        """
        # NaN and Inf are no JSON: strict parsers would refuse the line that matters most.
        finite = {name: str(v) if isinstance(v, float) and not math.isfinite(v) else v for name, v in data.items()}
        # A full disk is no reason to stop before the end. Checkpoints are told by the thread that writes them.
        with self.one_at_a_time:
            with contextlib.suppress(OSError):
                self.logger.log(step, finite)
                self.logger.flush()
            if self.printer:
                with ignore_broken_pipe(sys.stdout):
                    self.printer.log(step, finite)
        if self.tensorboard and step and not isinstance(step, str):
            for name, value in data.items():
                if name in METRICS and not isinstance(value, list):
                    self.tensorboard(name.replace(".", "/"), float(value), step[1])

    def event(self, name: str, **data: Any) -> None:
        """Writes a line for something that happened, such as `start` or `save_failed`."""
        self.log("EVENT", {"event": name, **data})

    def close(self) -> None:
        """Writes what still waits; raises Failure(NOT_WRITTEN) where that cannot be."""
        try:
            self.logger.flush()
        except OSError as error:
            raise Failure(
                NOT_WRITTEN, f"the log {self.path} cannot be written: {error.strerror}. Make room, start again"
            ) from error


def _terminate_last_line(path: Path) -> None:
    """Ends a line that a killed run left unfinished, so that the next is whole."""
    if path.exists() and path.stat().st_size:
        with open(path, "rb+") as file:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
