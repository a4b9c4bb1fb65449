"""--metrics_file: the state of a run in Prometheus' text format, for the node exporter's textfile collector.

The file is replaced whole, at each line of the log; others than its owner may read it, as the exporter must. A file that
cannot be written is reported once, and ends nothing.
"""

import contextlib
import os
import time
from pathlib import Path
from typing import Callable, Dict, List, Optional, Tuple

from hvd_vgg import storage
from hvd_vgg.reporting.goodput import Goodput
from hvd_vgg.reporting.receipt import LogLine
from hvd_vgg.run_dir import write_error

# Name (after hvd_vgg_), type and meaning of all that is written; a name ends in its unit.
FAMILIES: Dict[str, Tuple[str, str]] = {
    "step": ("gauge", "Updates made; a rewind or restart sets it back."),
    "loss": ("gauge", "Mean cross-entropy of the updates since the last log line, in nats."),
    "learning_rate": ("gauge", "Learning rate of the newest update."),
    "accuracy_ratio": ("gauge", "Top-1 accuracy of the newest evaluation."),
    "images_per_second": ("gauge", "Images trained per second since the last log line, over all ranks."),
    "input_ratio": ("gauge", "Share of a rank's time in which it waited for its next batch."),
    "compute_ratio": ("gauge", "Share of a rank's time in which it computed."),
    "exchange_ratio": ("gauge", "Share of a rank's time in which it waited for the gradients of other ranks."),
    "goodput_ratio": ("gauge", "Share of the wall time since the first start that went into updates that count."),
    "restarts_total": ("counter", "Starts of the run after the first one."),
    "checkpoint_step": ("gauge", "Updates in the newest checkpoint."),
    "checkpoint_age_seconds": ("gauge", "Time since the newest checkpoint was written, when this file was."),
}
_Samples = Dict[str, List[Tuple[Dict[str, str], float]]]


class MetricsFile:
    """Follows the lines of a run's log and rewrites the file; say: prints a line.

    goodput: of the lines so far; it is kept up to date. saved: step and age in seconds of the newest checkpoint, if any.
    """

    def __init__(
        self,
        path: Path,
        run: str,
        goodput: Goodput,
        say: Callable[[str], None],
        saved: Optional[Tuple[int, float]] = None,
    ) -> None:
        self.path, self.run, self.goodput, self.say = path, run, goodput, say
        self.samples: _Samples = {}
        self.saved_at: Optional[float] = None  # of time.monotonic()
        self.failed = False
        if saved:
            self._note_checkpoint(*saved)

    def add(self, line: LogLine) -> None:
        """Accounts for a line of the log; those about updates, evaluations and the end bring the file up to date."""
        if line.kind == "checkpoint":  # by the thread that writes checkpoints: no more than these two values
            self._note_checkpoint(line.step)
            return
        self.goodput.add(line)
        if line.kind == "train":
            self._set_updates(line)
        elif line.kind == "evaluation":
            self._set("accuracy_ratio", line.data["eval.acc@1"])
        elif line.kind != "end":
            return
        self._set("restarts_total", self.goodput.starts - 1)
        self._set("goodput_ratio", self.goodput.report()["goodput"] or 0.0)
        if self.saved_at is not None:
            self._set("checkpoint_age_seconds", time.monotonic() - self.saved_at)
        self._write()

    def _note_checkpoint(self, step: int, age: float = 0.0) -> None:
        self.saved_at = time.monotonic() - age
        self._set("checkpoint_step", step)

    def _set(self, name: str, value: float) -> None:
        self.samples[name] = [({"run": self.run}, float(value))]

    def _set_updates(self, line: LogLine) -> None:
        data = line.data
        self._set("step", line.step)
        for name, key in (("loss", "train.loss"), ("learning_rate", "train.lr"), ("images_per_second", "train.fps")):
            self._set(name, data[key])
        inputs, exchanges = data["train.input_shares"], data["train.exchange_shares"]
        computes = [1.0 - both for both in map(sum, zip(inputs, exchanges))]
        for part, shares in (("input", inputs), ("compute", computes), ("exchange", exchanges)):
            ranks = [({"run": self.run, "rank": str(rank)}, share) for rank, share in enumerate(shares)]
            self.samples[f"{part}_ratio"] = ranks

    def _write(self) -> None:
        temporary = self.path.with_name(f"{self.path.name}.tmp")  # collectors read *.prom
        try:
            with open(temporary, "w", encoding="utf-8", errors="replace") as file:  # a path may be no text
                with contextlib.suppress(OSError):  # CIFS and vfat have no modes
                    os.fchmod(file.fileno(), 0o644)  # whatever the umask of this process is
                file.write(format_metrics(self.samples))
            storage.replace(temporary, self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            if not self.failed:
                self.say(f"--metrics_file: {write_error(self.path, error)}; training goes on; this is said once")
            self.failed = True


def format_metrics(samples: _Samples) -> str:
    """Returns the text format, version 0.0.4, of (labels, value) by the names of FAMILIES."""
    lines = []
    for name, (kind, text) in FAMILIES.items():
        if name in samples:
            lines += [f"# HELP hvd_vgg_{name} {text}", f"# TYPE hvd_vgg_{name} {kind}"]
        for labels, value in samples.get(name, []):
            pairs = ",".join(f'{key}="{_escaped(label)}"' for key, label in labels.items())
            lines.append(f"hvd_vgg_{name}{{{pairs}}} {_number(value)}")
    return "\n".join(lines) + "\n"


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return {"nan": "NaN", "inf": "+Inf", "-inf": "-Inf"}.get(repr(value), repr(value))
