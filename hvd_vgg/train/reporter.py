"""What rank 0 says and writes of a run: console lines, the log, result.json."""

import contextlib
import dataclasses
import importlib.util
import json
import shlex
import socket
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import tensorflow as tf

from hvd_vgg.config import TrainConfig, profiled_steps
from hvd_vgg.data.coverage import EpochCoverage, to_hex
from hvd_vgg.data.sampler import slice_bounds
from hvd_vgg.data.transforms import IMAGE_LIBRARY
from hvd_vgg.errors import NOT_WRITTEN, Failure
from hvd_vgg.flags import to_flag_file
from hvd_vgg.models.architecture import count_parameters, training_flops, vgg_layers
from hvd_vgg.parallel import comm, cost
from hvd_vgg.parallel.consensus import run_on_all_ranks
from hvd_vgg.parallel.init import Device, describe_software, mpi_version
from hvd_vgg.provenance import describe_process
from hvd_vgg.reporting import receipt
from hvd_vgg.reporting.console import Console, Progress
from hvd_vgg.reporting.log import RunLog
from hvd_vgg.reporting.throughput import (
    Bottleneck,
    StepTime,
    Throughput,
    find_bottleneck,
    format_table,
    limiting_part,
    per_host,
    per_rank,
    slowest,
)
from hvd_vgg.run_dir import DISK_FULL, atomic_write_text, write_error
from hvd_vgg.text import format_duration, plural
from hvd_vgg.train import checkpoint
from hvd_vgg.train.checkpoint_writer import CheckpointWriter
from hvd_vgg.train.dataset import Splits
from hvd_vgg.train.evaluate import Evaluation
from hvd_vgg.train.state import TrainProgress, data_digest
from hvd_vgg.train.train_step import StepMetrics


def open_log(config: TrainConfig, run_dir: Path, console: Console) -> Optional[RunLog]:
    """Returns the log of the run, on rank 0 alone; all ranks must call. Raises a collective Failure(NOT_WRITTEN)."""

    def opened() -> Optional[RunLog]:
        if not comm.is_root():
            return None
        try:
            return RunLog(run_dir, config.console == "dllogger", _tensorboard(run_dir / "tensorboard", console))
        except OSError as error:
            raise Failure(NOT_WRITTEN, write_error(run_dir / "dllogger.json", error)) from error

    return run_on_all_ranks(opened)


def _tensorboard(place: Path, console: Console) -> Optional[Callable[[str, float, int], None]]:
    """Returns what writes a number for TensorBoard, or None, which is told, where no events can be written."""
    try:
        writer = tf.summary.create_file_writer(str(place))
    except tf.errors.OpError as error:
        reason = (error.message or "").splitlines()[0].split(";")[-1].strip()
        console.say(f"{place} cannot be written ({reason}): this start leaves no TensorBoard events")
        return None
    # What tf.summary.scalar writes. That function is TensorBoard's, and is not there where TensorBoard is not.
    kind = tf.compat.v1.SummaryMetadata()
    kind.plugin_data.plugin_name = "scalars"

    def scalar(name: str, value: float, at: int) -> None:
        # What TensorBoard shows is in dllogger.json too: a full disk is no reason to stop.
        with contextlib.suppress(tf.errors.OpError), writer.as_default():
            tf.summary.write(name, tf.constant(value, tf.float32), at, kind)
            writer.flush()

    return scalar


def _say_what_is_missing(console: Console) -> None:
    """Says which optional packages are not there, and what is lost."""
    optional = {
        "dllogger": "dllogger.json and DLLogger's lines are written without it, in its formats",
        "tensorboard": "tensorboard/ is written without it, and can be looked at where it is installed",
    }
    if comm.size() > 1 and mpi_version():
        optional["mpi4py"] = "a rank that fails exits, and it is left to mpirun to notice and to end the others"
    for name, lost in optional.items():
        if importlib.util.find_spec(name) is None:
            console.say(f"{name} is not installed: {lost}")


def introduce(
    config: TrainConfig,
    run_dir: Path,
    data: Splits,
    device: Device,
    choices: List[cost.Choice],
    total: int,
    at: TrainProgress,
    log: Optional[RunLog],
    console: Console,
) -> None:
    """Prints and logs what is about to be trained; writes the run's flag file and receipt. All ranks must call.

    Raises a collective Failure(NOT_WRITTEN).
    """
    _say_what_is_missing(console)
    first = at.step
    layers = vgg_layers(config.model, config.width, config.image_size, config.num_classes)
    slices = [slice_bounds(config.global_batch, rank, comm.size()) for rank in range(comm.size())]
    parts = sorted({high - low for low, high in slices}, reverse=True)
    console.say(
        f"{config.model} at width {config.width:g}, {config.image_size} pixels: {count_parameters(layers):,} parameters"
    )
    console.say(
        f"{data.train.records} records to train on, {data.validation.records} to evaluate; labels from {data.label_base} "
        f"({'0 is background' if data.label_base else 'no background'}; --label_base overrides)"
    )
    console.say(
        f"{plural(comm.size(), 'rank')} on {device.kind}, {plural(device.threads, 'CPU thread')} each, "
        f"{device.input_threads} to decode images; {config.global_batch} "
        f"images an update: {' or '.join(map(str, parts))} a rank, at most {config.device_batch} at once"
    )
    if comm.size() > 1:
        console.say(f"sent by each rank in an update, {config.wire_dtype} on the wire:\n{cost.table(choices)}")
    wanted = profiled_steps(config.profile_steps)
    if config.profile_steps and not range(max(first, wanted.start), min(total, wanted.stop)):
        console.say(f"--profile_steps={config.profile_steps}: none of them is between {first} and {total - 1}")
    console.say(f"steps {first} to {total}, lr {config.lr:g} for the mean gradient of {config.global_batch}")
    hosts = comm.gather_json(socket.gethostname())
    if log:
        facts = {
            **describe_software(IMAGE_LIBRARY),
            "ranks": comm.size(),
            "device": device.kind,
            "steps": total,
            "first_step": first,
        }
        log.log("PARAMETER", {**dataclasses.asdict(config), **facts, **cost.as_log(choices)})
        started = describe_process()
        started["packages"]["mpi"] = mpi_version()
        about = {
            split: {"records": index.records, "sha256": data_digest(index)}
            for split, index in (("train", data.train), ("validation", data.validation))
        }
        went_on_from = next((path for path in checkpoint.existing(run_dir) if checkpoint.step_of(path) == first), None)
        row = receipt.checkpoint_row(went_on_from) if went_on_from else None
        started.update(step=first, steps=total, skipped_steps=at.skipped_steps, ranks=comm.size(), hosts=hosts)
        log.event("start", **started, checkpoint=row, data=about)
    run_on_all_ranks(lambda: _describe(config, run_dir, console) if log else None)


def _describe(config: TrainConfig, run_dir: Path, console: Optional[Console] = None) -> None:
    """Brings flags.txt and the receipt up to date; rank 0 alone. Raises Failure(NOT_WRITTEN).

    With a console: where the disk is full, what an earlier start has left of them does until the next evaluation or the end.
    """
    flags = run_dir / "flags.txt"
    for path, write in (
        (flags, lambda: None if _holds(flags, to_flag_file(config)) else _write(flags, to_flag_file(config))),
        (run_dir / "receipt.json", lambda: receipt.write(run_dir)),
    ):
        try:
            write()
        except Failure as failure:
            if console is None or getattr(failure.__cause__, "errno", None) not in DISK_FULL or not path.exists():
                raise
            console.say(f"{path} is an earlier start's: the disk is full. It will be written with the next result")


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == text
    except (OSError, UnicodeDecodeError):
        return False


def _write(path: Path, text: str) -> None:
    """Writes a file, whole or not at all; raises Failure(NOT_WRITTEN)."""
    try:
        atomic_write_text(path, text)
    except OSError as error:
        raise Failure(NOT_WRITTEN, write_error(path, error)) from error


def speed_of_window(
    row: Dict[str, Any], window: List[Tuple[int, StepMetrics]], throughput: Throughput, config: TrainConfig
) -> Tuple[Dict[str, Any], Bottleneck]:
    """Returns `row` with the window's images/s and where its time went, and what held it back; all ranks call."""
    # The step's clock is the wall's, which may be set while it runs.
    times = zip(window, throughput.total_seconds[-len(window) :])
    throughput.exchange_seconds.extend(min(max(0.0, float(sums.exchange_seconds)), total) for (_, sums), total in times)
    splits = [StepTime(*numbers) for numbers in comm.gather_numbers(throughput.last(len(window))).tolist()]
    whole, network = sum(split.total for split in splits), min(split.exchange for split in splits)
    verdict = find_bottleneck(splits)
    return {
        **row,
        "train.fps": config.global_batch * len(window) / splits[0].total,
        "train.input_share": sum(split.input for split in splits) / whole,
        "train.network_share": network * len(splits) / whole,
        "train.straggler_share": sum(split.exchange - network for split in splits) / whole,
        "train.slow_rank": -1 if verdict.rank is None else verdict.rank,
        "train.update_seconds": throughput.total_seconds[-len(window) :],
        "train.input_seconds": throughput.input_seconds[-len(window) :],
    }, verdict


def training(
    row: Dict[str, Any],
    verdict: Bottleneck,
    done: int,
    total: int,
    epoch: float,
    log: Optional[RunLog],
    console: Console,
    progress: Progress,
) -> None:
    """Logs and prints one window of updates, on rank 0."""
    if log:
        log.log((int(epoch), done), row)
    left = progress.left_seconds(done)
    text = (
        f"step {done}/{total}  epoch {epoch:.2f}  loss {row['train.loss']:.4f}  acc@1 {row['train.acc@1']:.3f}  "
        f"lr {row['train.lr']:.3g}  {row['train.fps']:.1f} images/s  input {row['train.input_share']:.1%}"
    )
    if comm.size() > 1:
        text += f"  network {row['train.network_share']:.1%}  stragglers {row['train.straggler_share']:.1%}"
    if verdict.ranks:
        text += f"  slow: {_ranks(verdict.ranks)} ({verdict.cause})"
    if console.bar:
        progress.update(done, text.split("  ", 1)[1])
    else:
        progress.say(f"{text}  left {format_duration(left)}" if left is not None else text)


def _ranks(ranks: Sequence[int]) -> str:
    """Returns `rank 3` or `ranks 1, 3`; of many the first eight."""
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)[:8]))}{more}"


def evaluation(result: Evaluation, done: int, epoch: float, log: Optional[RunLog], console: Console) -> None:
    """Logs and prints an evaluation, on rank 0."""
    if log:
        log.log((int(epoch), done), result.metrics())
    console.say(
        f"step {done}  epoch {epoch:.2f}  evaluation: {result.accuracy()}  loss {result.loss_sum / result.records:.4f}  of "
        f"{result.records} records"
    )


def covered(proved: EpochCoverage, records: int, log: Optional[RunLog], console: Console) -> None:
    """Prints and logs that an epoch is complete and which of its records were trained on, on rank 0."""
    tally = proved.records
    row: Dict[str, Any] = {"epoch": proved.epoch, "step": proved.step, "records": records, "known": tally is not None}
    if tally is None:
        console.say(f"epoch {proved.epoch}: not proved: a part of it was trained in another order")
    else:
        console.say(f"epoch {proved.epoch}: {tally.text(records)}")
        row.update(seen=int(tally.seen[0]), seen_digest=to_hex(tally.seen))
        row.update(skipped=int(tally.skipped[0]), skipped_digest=to_hex(tally.skipped))
        row.update(replaced=sorted(tally.replaced.tolist()))
    if log:
        log.event("coverage", **row)


def stopped(config: TrainConfig, step: int, run_dir: Path, log: Optional[RunLog]) -> None:
    """Logs that a run stops on request after `step` updates, and brings flags and receipt up to it; all ranks call."""
    if log:
        log.event("stopped", step=step)
    run_on_all_ranks(lambda: _describe(config, run_dir) if log else None)


def save_failed(failure: Optional[Failure], log: Optional[RunLog], console: Console) -> None:
    """Prints and logs that a checkpoint could not be written, if it could not; training goes on, on rank 0."""
    if failure and log:
        log.event("save_failed", error=failure.message)
        console.say(failure.message)


def speed(throughput: Throughput, config: TrainConfig) -> Dict[str, Any]:
    """Returns what this start's updates measured, of the job and of each rank, the same on all ranks; all ranks call."""
    found: Dict[str, Any] = comm.broadcast_json(throughput.summary(config.global_batch))
    if not found["fps"]:
        return found
    updates = found["fps_updates"]
    low, high = slice_bounds(config.global_batch, comm.rank(), comm.size())
    mine = [*throughput.last(updates), float((high - low) * updates), *throughput.excluded_seconds.values()]
    numbers = comm.gather_numbers(mine).tolist()
    splits = [StepTime(*row[:3]) for row in numbers]
    hosts = comm.gather_json(socket.gethostname())
    rows = per_rank(splits, hosts, [int(row[3]) for row in numbers])
    for row, told in zip(rows, numbers):
        row.update(zip((f"{what}_seconds" for what in throughput.excluded_seconds), told[4:]))
    of = vgg_layers(config.model, config.width, config.image_size, config.num_classes)
    found["tflops_per_rank"] = training_flops(of, config.image_size) * found["fps"] / comm.size() / 1e12
    if config.device_tflops:
        found["share_of_peak"] = found["tflops_per_rank"] / config.device_tflops
    verdict = find_bottleneck(splits)
    found.update(bottleneck=verdict.cause, slow_rank=verdict.rank, slow_ranks=list(verdict.ranks))
    return {**found, "slowest_rank": slowest(rows)["rank"], "by_host": per_host(rows), "by_rank": rows}


def write_result(
    config: TrainConfig,
    run_dir: Path,
    result: Evaluation,
    throughput: Throughput,
    done: int,
    epoch: float,
    seconds: float,
    log: Optional[RunLog],
) -> Dict[str, Any]:
    """Writes result.json, the flags and the receipt, on rank 0, and returns `speed`, which it logs; all ranks must call.

    Raises a collective Failure(NOT_WRITTEN).
    """
    measured = speed(throughput, config)

    def write() -> None:
        # A start that trained nothing has measured nothing, and what stands may be of the start that did.
        if not log or (not throughput.total_seconds and _has_result_of(run_dir, done)):
            return
        log.event("throughput", step=done, **measured)
        content = {
            "acc@1": result.top1 / result.records,
            "acc@5": result.top5 / result.records,
            "top1_hits": result.top1,
            "top5_hits": result.top5,
            "records_evaluated": result.records,
            "bad_records_evaluated": result.bad,
            **measured,
            "steps": done,
            "epochs": epoch,
            "ranks": comm.size(),
            "global_batch": config.global_batch,
            "precision": config.precision,
            "seconds": seconds,
        }
        _write(run_dir / "result.json", json.dumps(content, indent=2) + "\n")

    run_on_all_ranks(write)
    run_on_all_ranks(lambda: _describe(config, run_dir) if comm.is_root() else None)
    return measured


def _has_result_of(run_dir: Path, done: int) -> bool:
    try:
        return bool(json.loads((run_dir / "result.json").read_text(encoding="utf-8"))["steps"] == done)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def summary(
    run_dir: Path,
    result: Evaluation,
    measured: Dict[str, Any],
    done: int,
    seconds: float,
    writer: Optional[CheckpointWriter],
    log: Optional[RunLog],
    console: Console,
) -> None:
    """Prints and logs the end of a run; all ranks call. Raises a collective Failure(NOT_WRITTEN) when the log cannot be.

    measured: what `write_result` returned, and has logged with its rows of ranks and hosts.
    """
    if log:
        log.log((), {**result.metrics(), **{name: value for name, value in measured.items() if not name.startswith("by_")}})
    console.say(f"finished in {format_duration(seconds)} on {plural(comm.size(), 'rank')}")
    console.say(f"  acc@1              {result.top1 / result.records:.4f}")
    console.say(f"  acc@5              {result.top5 / result.records:.4f}")
    console.say(f"  records evaluated  {result.records}")
    console.say(f"  steps              {done}")
    if measured["fps"]:
        _say_speed(measured, console)
    if writer and writer.written:
        console.say(
            f"  checkpoints        {writer.written} written in the background, {writer.seconds / writer.written:.2f} s each"
        )
    console.say(f"  run                {run_dir.resolve()}")
    console.say("  in it              result.json, dllogger.json, receipt.json, flags.txt, checkpoints/, tensorboard/")
    console.say(f"  check it           hvd-vgg verify-run {shlex.quote(str(run_dir.resolve()))}")
    run_on_all_ranks(lambda: log.close() if log else None)
    run_on_all_ranks(lambda: receipt.write(run_dir) if log else None)


def _say_speed(measured: Dict[str, Any], console: Console) -> None:
    rows, slow = measured["by_rank"], measured["slow_ranks"]
    aside = {name[: -len("_seconds")]: value for name, value in rows[0].items() if name.endswith("_seconds")}
    happened = {what: seconds for what, seconds in aside.items() if seconds}
    most = "" if measured["steady"] else ", the most that may be: it was not steady by then"
    warm_up = f"{plural(measured['warm_up_updates'], 'update')} of warm-up ({measured['warm_up_seconds']:.1f} s{most})"
    console.say(
        f"  fps                {measured['fps']:.1f} images/s over {plural(measured['fps_updates'], 'update')} (deviation "
        f"{measured['fps_standard_deviation']:.1f}, jitter {measured['fps_jitter']:.1f}); "
        f"left out: {', '.join([warm_up, *happened])}"
    )
    console.say(f"  fps, wall clock    {measured['fps_wall']:.1f} images/s with everything since the first update began")
    share = f", {measured['share_of_peak']:.1%} of --device_tflops" if "share_of_peak" in measured else ""
    console.say(f"  computing          {measured['tflops_per_rank']:.3g} TFLOP/s a rank{share}")
    hosts = ", ".join(dict.fromkeys(rows[rank]["host"] for rank in sorted(slow)[:8]))
    who = f"{_ranks(slow)} on {hosts}: {'its' if len(slow) == 1 else 'their'} " if slow else ""
    console.say(f"  bottleneck         {who}{measured['bottleneck']}")
    if len(rows) > 1:
        last = rows[measured["slowest_rank"]]
        cause = measured["bottleneck"] if last["rank"] in slow else limiting_part(last)
        console.say(
            f"  slowest rank       rank {last['rank']} on {last['host']}: {last['fps_alone']:.1f} images/s alone, "
            f"limited by its {cause} ({last[cause]:.1%} of its time)"
        )
    console.say(format_table(rows))
    if happened:
        told = ", ".join(f"{what} {seconds:.2f} s" for what, seconds in happened.items())
        console.say(f"  excluded, rank 0   {told}")
