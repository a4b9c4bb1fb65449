"""What a run says of its training: to the log and TensorBoard, and on the console. A no-op on ranks other than 0."""

import contextlib
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from hvd_vgg.config import TrainConfig
from hvd_vgg.data.coverage import EpochCoverage, to_hex
from hvd_vgg.errors import Failure
from hvd_vgg.parallel import comm
from hvd_vgg.parallel.consensus import run_on_root
from hvd_vgg.reporting.console import Console, Progress
from hvd_vgg.reporting.goodput import Goodput
from hvd_vgg.reporting.log import RunLog, Step
from hvd_vgg.reporting.prometheus import MetricsFile
from hvd_vgg.reporting.receipt import LogLine, kind_of, read_log
from hvd_vgg.reporting.tensorboard import Events, open_events
from hvd_vgg.reporting.throughput import Bottleneck
from hvd_vgg.run_dir import RunDir, checkpoint_step, writing
from hvd_vgg.text import format_duration

# Called on rank 0 with a line of the log: `kind` (train, evaluation, end), `step` and `epoch` but for the end, and its data.
OnLog = Callable[[Dict[str, Any]], None]


class Reporter:
    """Rank 0's log and console. On other ranks `log` is None and the console is silent, so that every call is a no-op.

    followers: called with each line of the log, of updates, evaluations, events and the end; events: TensorBoard's, whose
    scalars the log writes.
    """

    def __init__(
        self,
        log: Optional[RunLog],
        console: Console,
        followers: Sequence[Callable[[LogLine], None]] = (),
        events: Optional[Events] = None,
    ) -> None:
        self.log, self.console, self.followers, self.events = log, console, followers, events

    def event(self, name: str, **data: Any) -> None:
        """Logs that something happened."""
        self.row("EVENT", {"event": name, **data})

    def row(self, step: Step, data: Dict[str, Any]) -> None:
        """Logs metrics; step: (epoch, update), "PARAMETER", "EVENT", or () for the end of the run."""
        if self.log:
            self.log.log(step, data)
            now, elapsed = self.log.times()
            for follow in self.followers:
                kind, epoch, done = kind_of(step, data)
                follow(LogLine(0, kind, {}, epoch, done, data, now.timestamp(), now.timestamp() - elapsed))

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        self.console.say(text)

    def training(
        self, row: Dict[str, Any], bottleneck: Bottleneck, step: int, total_steps: int, epoch: float, progress: Progress
    ) -> None:
        """Logs and prints the updates since the last line."""
        self.row((int(epoch), step), row)
        if self.console.bar:
            progress.title, progress.unit = f"epoch {epoch:.2f}", ""
            progress.update(step, f"loss {row['train.loss']:.4f}  {row['train.fps']:.0f} images/s")
            return
        left = progress.left_seconds(step)
        text = (
            f"step {step}/{total_steps}  epoch {epoch:.2f}  loss {row['train.loss']:.4f}  acc@1 {row['train.acc@1']:.3f}  "
            f"lr {row['train.lr']:.3g}  {row['train.fps']:.1f} images/s  input {row['train.input_share']:.1%}"
        )
        if comm.size() > 1:
            text += f"  network {row['train.network_share']:.1%}  stragglers {row['train.straggler_share']:.1%}"
        if bottleneck.ranks:
            text += f"  slow: {format_ranks(bottleneck.ranks)} ({bottleneck.cause})"
        progress.say(f"{text}  left {format_duration(left)}" if left is not None else text)

    def coverage(self, covered: EpochCoverage, records: int) -> None:
        """Logs and prints which records a complete epoch was trained on."""
        found = covered.records
        data: Dict[str, Any] = {"epoch": covered.epoch, "step": covered.step, "records": records, "known": found is not None}
        if found is None:
            self.say(f"epoch {covered.epoch}: not proved, since part of it was trained in another order")
        else:
            self.say(f"epoch {covered.epoch}: {found.text(records)}")
            data.update(seen=int(found.seen[0]), seen_digest=to_hex(found.seen))
            data.update(skipped=int(found.skipped[0]), skipped_digest=to_hex(found.skipped))
            data.update(replaced=sorted(found.replaced.tolist()))
        self.event("coverage", **data)

    def save_failed(self, failure: Optional[Failure]) -> None:
        """Logs and prints why a file could not be written, if one could not; training continues."""
        if failure:
            self.event("save_failed", error=failure.message)
            self.say(failure.message)


def open_reporter(config: TrainConfig, console: Console, on_log: Optional[OnLog] = None) -> Reporter:
    """Opens the run's log on rank 0. Collective; raises a collective Failure(NOT_WRITTEN)."""
    run_dir = RunDir(config.run_dir)
    followers: List[Callable[[LogLine], None]] = []
    if config.metrics_file and comm.is_root():
        followers.append(_open_metrics(Path(config.metrics_file), run_dir, console).add)
    if on_log:
        followers.append(calling(on_log, console.say))

    def open_log() -> Tuple[RunLog, Optional[Events]]:
        with writing(run_dir.log):
            events = open_events(run_dir.tensorboard, console)
            return RunLog(Path(config.run_dir), config.console == "dllogger", events.scalar if events else None), events

    log, events = run_on_root(open_log) or (None, None)
    return Reporter(log, console, followers, events)


def _open_metrics(path: Path, run_dir: RunDir, console: Console) -> MetricsFile:
    newest, saved = next(iter(run_dir.list_checkpoints()), None), None
    if newest:
        with contextlib.suppress(OSError):  # its age is by the host's clock, which may have been set since
            saved = checkpoint_step(newest) or 0, max(0.0, time.time() - newest.stat().st_mtime)
    return MetricsFile(path, str(run_dir.path.resolve()), Goodput(read_log(run_dir.log)), console.say, saved)


def calling(on_log: OnLog, say: Callable[[str], None]) -> Callable[[LogLine], None]:
    """Returns a follower that calls `on_log`. It is a guest: if it raises, that is said once and it is called no more."""
    callbacks = [on_log]

    def follow(line: LogLine) -> None:
        row = {"kind": line.kind, **({} if line.kind == "end" else {"step": line.step, "epoch": line.epoch}), **line.data}
        for callback in callbacks if line.kind in ("train", "evaluation", "end") else ():
            try:
                callback(row)
            except Exception as error:  # whatever another tracker may raise
                callbacks.clear()
                name = getattr(callback, "__qualname__", repr(callback))
                what = f"raised {type(error).__name__}: {error}"
                when = line.kind if line.kind == "end" else f"{line.kind} {line.step}"
                say(f"on_log={name} {what} (at {when}): it is not called again, and training goes on")

    return follow


def format_ranks(ranks: Sequence[int]) -> str:
    """Returns `rank 3` or `ranks 1, 3`; of many the first eight."""
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)[:8]))}{more}"
