"""What a run leaves beside its log: flags, receipt and result; and the summary printed at its end."""

import functools
import json
import shlex
from pathlib import Path
from typing import Any, Dict, Optional

from hvd_vgg.colours import BOLD
from hvd_vgg.config import TrainConfig
from hvd_vgg.data.classes import class_names
from hvd_vgg.data.index import Index
from hvd_vgg.errors import Failure
from hvd_vgg.flags import to_flag_file
from hvd_vgg.parallel import comm
from hvd_vgg.parallel.consensus import run_on_root
from hvd_vgg.reporting import receipt
from hvd_vgg.reporting.console import Console
from hvd_vgg.reporting.goodput import Goodput, describe
from hvd_vgg.reporting.throughput import Throughput, format_table, limiting_part
from hvd_vgg.run_dir import DISK_FULL, RunDir, atomic_write_text, writing
from hvd_vgg.text import format_duration, plural
from hvd_vgg.training.checkpoint_writer import CheckpointWriter
from hvd_vgg.training.evaluate import Evaluation
from hvd_vgg.training.metrics import measure_run
from hvd_vgg.training.reporter import Reporter, format_ranks
from hvd_vgg.training.state import TrainProgress


def write_run_files(config: TrainConfig, console: Optional[Console] = None) -> None:
    """Brings flags.txt and receipt.json up to date; rank 0 alone. Raises Failure(NOT_WRITTEN).

    With a console, on a full disk: files of an earlier start are kept, with a warning; they are rewritten later.
    """
    run_dir = RunDir(config.run_dir)
    for path, write in (
        (run_dir.flags, lambda: _write_if_changed(run_dir.flags, to_flag_file(config))),
        (run_dir.receipt, lambda: receipt.write(run_dir)),
    ):
        try:
            write()
        except Failure as failure:
            if console is None or getattr(failure.__cause__, "errno", None) not in DISK_FULL or not path.exists():
                raise
            console.say(
                f"{path} is from an earlier start, since the disk is full; it will be rewritten with the next result"
            )


def write_class_names(config: TrainConfig, train: Index, label_base: int, step: int) -> None:
    """Writes classes.txt, where the data has names, unless a run continues that did; rank 0 alone.

    Raises Failure(NOT_WRITTEN), or as `classes.class_names` does.
    """
    path = RunDir(config.run_dir).classes
    if step and path.exists():
        return
    names = class_names(train, label_base, config.num_classes)
    if names:
        _write_if_changed(path, "".join(f"{name}\n" for name in names))
    else:
        with writing(path):
            path.unlink(missing_ok=True)  # of an earlier start with other data


def _write_if_changed(path: Path, text: str) -> None:
    try:
        if path.read_text(encoding="utf-8") == text:
            return
    except (OSError, UnicodeDecodeError):
        pass
    _write(path, text)


def _write(path: Path, text: str) -> None:
    with writing(path):
        atomic_write_text(path, text)


def write_result(
    config: TrainConfig,
    evaluation: Evaluation,
    throughput: Throughput,
    progress: TrainProgress,
    epochs: float,
    reporter: Reporter,
) -> Dict[str, Any]:
    """Writes result.json, flags and receipt, on rank 0; logs and returns the throughput of `measure_run`. Collective.

    On rank 0 what it returns has the goodput too, computed from the log up to here.

    Raises a collective Failure(NOT_WRITTEN).
    """
    measured = measure_run(throughput, config, config.device_tflops)
    path = RunDir(config.run_dir).result
    log = RunDir(config.run_dir).log
    goodput = run_on_root(lambda: Goodput(receipt.read_log(log)).report()) or {}

    def write() -> None:
        # A process that trained nothing has measured nothing, and may find the result of the one that did.
        if not throughput.total_seconds and _is_result_of(path, progress.step):
            return
        reporter.event("throughput", step=progress.step, **measured)
        content = {
            "acc@1": evaluation.top1 / evaluation.records,
            "acc@5": evaluation.top5 / evaluation.records,
            "top1_hits": evaluation.top1,
            "top5_hits": evaluation.top5,
            "records_evaluated": evaluation.records,
            "bad_records_evaluated": evaluation.bad,
            **evaluation.average_counts(),
            **measured,
            **goodput,
            "steps": progress.step,
            "epochs": epochs,
            "ranks": comm.size(),
            "global_batch": config.global_batch,
            "precision": config.precision,
            "seconds": progress.seconds,
            "state_sha256": evaluation.state_sha256,
        }
        _write(path, json.dumps(content, indent=2) + "\n")

    run_on_root(write)
    run_on_root(lambda: write_run_files(config))
    return {**measured, **goodput}


def _is_result_of(path: Path, step: int) -> bool:
    try:
        return bool(json.loads(path.read_text(encoding="utf-8"))["steps"] == step)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def finish_log(
    config: TrainConfig,
    evaluation: Evaluation,
    measured: Dict[str, Any],
    progress: TrainProgress,
    writer: CheckpointWriter,
    reporter: Reporter,
) -> None:
    """Logs and prints the end of a run. Collective; raises a collective Failure(NOT_WRITTEN) where the log is unwritable."""
    scalars = {name: value for name, value in measured.items() if not name.startswith("by_")}
    reporter.row((), {**evaluation.metrics(), **scalars})
    reporter.say(f"finished in {format_duration(progress.seconds)} on {plural(comm.size(), 'rank')}")
    bold = functools.partial(reporter.console.paint, colour=BOLD)
    reporter.say(f"  acc@1              {bold(f'{evaluation.top1 / evaluation.records:.4f}')}")
    reporter.say(f"  acc@5              {bold(f'{evaluation.top5 / evaluation.records:.4f}')}")
    if evaluation.average:
        reporter.say(f"  of the average     {bold(evaluation.average.accuracy())}")
    if measured["fps"]:
        reporter.say(f"  fps                {measured['fps']:.1f} images/s; limited by: {_limit(measured)}")
    if measured.get("goodput"):
        reporter.say(f"  goodput            {describe(measured)}")
    if config.verbose:
        _print_details(evaluation, measured, progress, writer, reporter)
    folder = RunDir(config.run_dir).path.resolve()
    reporter.say(f"  state SHA-256      {evaluation.state_sha256}")
    reporter.say(f"  to verify it       hvd-vgg verify-run {shlex.quote(str(folder))}")
    run_on_root(lambda: reporter.log.close() if reporter.log else None)
    run_on_root(lambda: receipt.write(RunDir(config.run_dir)))


def _limit(measured: Dict[str, Any]) -> str:
    """Returns what limits the throughput, and on which ranks if not on all alike."""
    rows, slow = measured["by_rank"], measured["slow_ranks"]
    hosts = ", ".join(dict.fromkeys(rows[rank]["host"] for rank in sorted(slow)[:8]))
    who = f"{format_ranks(slow)} on {hosts}: {'its' if len(slow) == 1 else 'their'} " if slow else ""
    return f"{who}{measured['bottleneck']}"


def _print_details(
    evaluation: Evaluation,
    measured: Dict[str, Any],
    progress: TrainProgress,
    writer: CheckpointWriter,
    reporter: Reporter,
) -> None:
    """Prints what --verbose adds: counts, and where the time of each rank went."""
    reporter.say(f"  records evaluated  {evaluation.records}")
    reporter.say(f"  steps              {progress.step}")
    if writer.written:
        each = writer.seconds / writer.written
        reporter.say(f"  checkpoints        {writer.written} written in the background, {each:.2f} s each")
    if not measured["fps"]:
        return
    rows, slow = measured["by_rank"], measured["slow_ranks"]
    seconds = {name[: -len("_seconds")]: value for name, value in rows[0].items() if name.endswith("_seconds")}
    excluded = {name: value for name, value in seconds.items() if value}
    limit = "" if measured["steady"] else ", the limit: no steady state by then"
    warm_up = f"{plural(measured['warm_up_updates'], 'update')} of warm-up ({measured['warm_up_seconds']:.1f} s{limit})"
    reporter.say(
        f"  fps, steady        of {plural(measured['fps_updates'], 'update')} (standard deviation "
        f"{measured['fps_standard_deviation']:.1f}, jitter {measured['fps_jitter']:.1f}); excluded: "
        f"{', '.join([warm_up, *excluded])}"
    )
    reporter.say(f"  fps, wall clock    {measured['fps_wall']:.1f} images/s, everything since the first update included")
    share = f", {measured['share_of_peak']:.1%} of --device_tflops" if "share_of_peak" in measured else ""
    reporter.say(f"  compute            {measured['tflops_per_rank']:.3g} TFLOP/s per rank{share}")
    if len(rows) > 1:
        last = rows[measured["slowest_rank"]]
        cause = measured["bottleneck"] if last["rank"] in slow else limiting_part(last)
        reporter.say(
            f"  slowest rank       rank {last['rank']} on {last['host']}: {last['fps_alone']:.1f} images/s alone, limited "
            f"by its {cause} ({last[cause]:.1%} of its time)"
        )
    reporter.say(format_table(rows))
    if excluded:
        text = ", ".join(f"{name} {value:.2f} s" for name, value in excluded.items())
        reporter.say(f"  excluded, rank 0   {text}")
