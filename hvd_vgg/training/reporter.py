"""What a run says of its training: to the log and TensorBoard, and on the console. A no-op on ranks other than 0."""

from pathlib import Path
from typing import Any, Dict, Optional, Sequence

from hvd_vgg.config import TrainConfig
from hvd_vgg.data.coverage import EpochCoverage, to_hex
from hvd_vgg.errors import Failure
from hvd_vgg.parallel import comm
from hvd_vgg.parallel.consensus import run_on_root
from hvd_vgg.reporting.console import Console, Progress
from hvd_vgg.reporting.log import RunLog
from hvd_vgg.reporting.tensorboard import open_scalars
from hvd_vgg.reporting.throughput import Bottleneck
from hvd_vgg.run_dir import RunDir, writing
from hvd_vgg.text import format_duration


class Reporter:
    """Rank 0's log and console. On other ranks `log` is None and the console is silent, so that every call is a no-op."""

    def __init__(self, log: Optional[RunLog], console: Console) -> None:
        self.log, self.console = log, console

    def event(self, name: str, **data: Any) -> None:
        """Logs that something happened."""
        if self.log:
            self.log.event(name, **data)

    def row(self, step: Any, data: Dict[str, Any]) -> None:
        """Logs metrics; step: (epoch, update), "PARAMETER", or () for the end of the run."""
        if self.log:
            self.log.log(step, data)

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        self.console.say(text)

    def training(
        self, row: Dict[str, Any], bottleneck: Bottleneck, step: int, total_steps: int, epoch: float, progress: Progress
    ) -> None:
        """Logs and prints the updates since the last line."""
        self.row((int(epoch), step), row)
        left = progress.left_seconds(step)
        text = (
            f"step {step}/{total_steps}  epoch {epoch:.2f}  loss {row['train.loss']:.4f}  acc@1 {row['train.acc@1']:.3f}  "
            f"lr {row['train.lr']:.3g}  {row['train.fps']:.1f} images/s  input {row['train.input_share']:.1%}"
        )
        if comm.size() > 1:
            text += f"  network {row['train.network_share']:.1%}  stragglers {row['train.straggler_share']:.1%}"
        if bottleneck.ranks:
            text += f"  slow: {format_ranks(bottleneck.ranks)} ({bottleneck.cause})"
        if self.console.bar:
            progress.update(step, text.split("  ", 1)[1])
        else:
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


def open_reporter(config: TrainConfig, console: Console) -> Reporter:
    """Opens the run's log on rank 0. Collective; raises a collective Failure(NOT_WRITTEN)."""
    run_dir = RunDir(config.run_dir)

    def open_log() -> RunLog:
        with writing(run_dir.log):
            scalars = open_scalars(run_dir.tensorboard, console)
            return RunLog(Path(config.run_dir), config.console == "dllogger", scalars)

    return Reporter(run_on_root(open_log), console)


def format_ranks(ranks: Sequence[int]) -> str:
    """Returns `rank 3` or `ranks 1, 3`; of many the first eight."""
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)[:8]))}{more}"
