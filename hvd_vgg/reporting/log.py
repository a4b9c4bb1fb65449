"""What a run logs: DLLogger's JSON lines in a file, DLLogger's lines on stdout, and TensorBoard events.

The names in METRICS, their units and formats are an interface: other programs parse them.

The times of a process's lines are that at which it opened the log plus a monotonic clock: a host's clock that is set in
mid-run makes no time between two of them negative, and none too long.
"""

import contextlib
import json
import math
import os
import sys
import threading
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Tuple, Union

from hvd_vgg.run_dir import RunDir, append_whole, writing
from hvd_vgg.streams import ignore_broken_pipe

try:
    import dllogger
except ImportError:
    dllogger = None
METRICS: Dict[str, Dict[str, str]] = {
    "train.loss": {"unit": "nats", "format": ":.5f"},
    "train.losses": {"unit": "nats, each update"},
    "train.acc@1": {"unit": "", "format": ":.4f"},
    "train.acc@5": {"unit": "", "format": ":.4f"},
    "train.gradient_norm": {"unit": "", "format": ":.4g"},
    "train.loss_scale": {"unit": "", "format": ":g"},
    "train.skipped_updates": {"unit": "updates", "format": ":d"},
    "train.recomputed_updates": {"unit": "updates", "format": ":d"},
    "train.lr": {"unit": "", "format": ":.6g"},
    "train.fps": {"unit": "images/s", "format": ":.1f"},
    "train.input_share": {"unit": "", "format": ":.4f"},
    "train.network_share": {"unit": "", "format": ":.4f"},
    "train.straggler_share": {"unit": "", "format": ":.4f"},
    "train.input_shares": {"unit": "of each rank"},
    "train.exchange_shares": {"unit": "of each rank, its waits for the network and for other ranks"},
    "train.slow_rank": {"unit": "", "format": ":d"},
    "train.update_seconds": {"unit": "s, each update on rank 0"},
    "train.input_seconds": {"unit": "s, of them waiting for input"},
    "eval.loss": {"unit": "nats", "format": ":.5f"},
    "eval.acc@1": {"unit": "", "format": ":.4f"},
    "eval.acc@5": {"unit": "", "format": ":.4f"},
    "eval.top1_hits": {"unit": "records", "format": ":d"},
    "eval.top5_hits": {"unit": "records", "format": ":d"},
    "eval.average_loss": {"unit": "nats", "format": ":.5f"},
    "eval.average_acc@1": {"unit": "", "format": ":.4f"},
    "eval.average_acc@5": {"unit": "", "format": ":.4f"},
    "eval.average_top1_hits": {"unit": "records", "format": ":d"},
    "eval.average_top5_hits": {"unit": "records", "format": ":d"},
    "eval.records": {"unit": "records", "format": ":d"},
    "eval.bad_records": {"unit": "records", "format": ":d"},
    "eval.state_sha256": {"unit": ""},
    "eval.reference_difference": {"unit": "", "format": ":+.4f"},
}
Step = Union[str, Tuple[int, ...]]


def _format_metric(name: str, _: Dict[str, str], value: Any) -> str:
    """Returns a metric as DLLogger prints it; its own function fails on NaN, which is text here."""
    metadata = METRICS.get(name, {})
    text = value if isinstance(value, str) else ("{" + metadata.get("format", "") + "}").format(value)
    return f"{name} : {text} {metadata.get('unit', '')}"


class _JsonFile:
    """Writes DLLogger's JSON format, `DLLL {...}` a line, where the package is not installed; called as its backend is."""

    def __init__(self, path: Path) -> None:
        self.path, self.unwritten = path, b""

    def _append(self, timestamp: datetime, elapsed: float, kind: str, **fields: Any) -> None:
        times = {"timestamp": str(timestamp.timestamp()), "datetime": str(timestamp), "elapsedtime": str(elapsed)}
        self.unwritten += f"DLLL {json.dumps({**times, 'type': kind, **fields})}\n".encode()

    def metadata(self, timestamp: datetime, elapsed: float, metric: str, metadata: Dict[str, str]) -> None:
        self._append(timestamp, elapsed, "METADATA", metric=metric, metadata=metadata)

    def log(self, timestamp: datetime, elapsed: float, step: Step, data: Dict[str, Any]) -> None:
        self._append(timestamp, elapsed, "LOG", step=step, data=data)

    def flush(self) -> None:
        """Appends the unwritten lines to the file, all or none."""
        append_whole(self.path, self.unwritten)
        self.unwritten = b""


def _print(step: Step, data: Dict[str, Any]) -> None:
    """Prints DLLogger's stdout format, `DLL TIME - STEP NAME : VALUE UNIT ...`, where the package is not installed."""
    print(f"DLL {datetime.now()} - {step} {' '.join(_format_metric(name, {}, value) for name, value in data.items())}")


def _open(path: Path) -> Tuple[Any, Callable[[Step, Dict[str, Any]], None]]:
    """Returns the backend that writes to the file, with `metadata`, `log` and `flush`, and a function that prints a line.

    They are separate, so that a closed stdout keeps no line out of the file.
    """
    if not dllogger:
        return _JsonFile(path), _print
    verbosity = dllogger.Verbosity.VERBOSE
    printer = dllogger.Logger([dllogger.StdOutBackend(verbosity, metric_format=_format_metric)])
    return dllogger.JSONStreamBackend(verbosity, str(path), append=True), printer.log


class RunLog:
    """The log of a run, for rank 0: `dllogger.json` (appended to on resume), TensorBoard's events, and lines on stdout.

    tensorboard: a function (name, value, step), or None.
    """

    def __init__(self, run_dir: Path, stdout: bool, tensorboard: Optional[Callable[[str, float, int], None]]) -> None:
        self.path, self.tensorboard = RunDir(run_dir).log, tensorboard
        self.lock = threading.Lock()  # checkpoints are logged by the thread that writes them
        _terminate_last_line(self.path)
        self.file, self.print = _open(self.path)
        self.stdout = stdout
        self._opened, self._opened_at = datetime.now().astimezone(), time.monotonic()
        for name, metadata in METRICS.items():
            self.file.metadata(*self.times(), name, metadata)

    def times(self) -> Tuple[datetime, float]:
        """Returns the time now, by the clock of this log, and the seconds since it was opened."""
        elapsed = round(time.monotonic() - self._opened_at, 6)
        return self._opened + timedelta(seconds=elapsed), elapsed

    def log(self, step: Step, data: Dict[str, Any]) -> None:
        """Writes one line; step: (epoch, update), "PARAMETER" for what the run is, "EVENT", or () for its end.

        The kernel has the line when this returns; on a full disk it is retried with the next one, and by `close`.
        """
        # NaN and Inf are not JSON: strict parsers would refuse the line that matters most.
        finite = {name: str(v) if isinstance(v, float) and not math.isfinite(v) else v for name, v in data.items()}
        with self.lock:
            with contextlib.suppress(OSError):  # a full disk is no reason to stop before the end
                self.file.log(*self.times(), step, finite)
                self.file.flush()
            if self.stdout:
                with ignore_broken_pipe(sys.stdout):
                    self.print(step, finite)
        if self.tensorboard and step and not isinstance(step, str):
            for name, value in data.items():
                if name in METRICS and not isinstance(value, (list, str)):
                    self.tensorboard(name.replace(".", "/"), float(value), step[1])

    def event(self, name: str, **data: Any) -> None:
        """Writes a line about something that happened, such as `start` or `save_failed`."""
        self.log("EVENT", {"event": name, **data})

    def close(self) -> None:
        """Writes what a full disk has kept back; raises Failure(NOT_WRITTEN) if it still does."""
        with writing(self.path):
            self.file.flush()


def _terminate_last_line(path: Path) -> None:
    """Ends a line that a kill left unfinished, so that the next one is whole."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
