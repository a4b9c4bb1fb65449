"""What rank 0 says and writes of a run: console lines, the log, result.json."""

import dataclasses
import json
from pathlib import Path
from typing import Callable, Dict, List, Optional

import tensorflow as tf

from hvd_vgg.config import Config, to_flag_file
from hvd_vgg.data import order
from hvd_vgg.data.index import Data
from hvd_vgg.model import layers as tables
from hvd_vgg.parallel import comm, cost
from hvd_vgg.run.health import NOT_WRITTEN, Failure
from hvd_vgg.run.log import Console, Progress, RunLog, count, duration
from hvd_vgg.run.throughput import Throughput
from hvd_vgg.train.evaluate import Evaluation


def open_log(config: Config, run_dir: Path) -> RunLog:
    """Writes the run's flag file and opens its logs, on rank 0; raises Failure(NOT_WRITTEN)."""
    try:
        (run_dir / "flags.txt").write_text(to_flag_file(config), encoding="utf-8")
        return RunLog(run_dir, config.console == "dllogger", _tensorboard(run_dir))
    except (OSError, tf.errors.OpError) as error:
        raise Failure(NOT_WRITTEN, f"the logs in {run_dir} cannot be written: {error}") from error


def _tensorboard(run_dir: Path) -> Callable[[str, float, int], None]:
    writer = tf.summary.create_file_writer(str(run_dir / "tensorboard"))

    def scalar(name: str, value: float, at: int) -> None:
        try:
            with writer.as_default():
                tf.summary.scalar(name, value, at)
            writer.flush()
        except tf.errors.OpError as error:
            raise Failure(NOT_WRITTEN, f"{run_dir / 'tensorboard'} cannot be written: {error.message}") from error

    return scalar


def introduce(
    config: Config,
    data: Data,
    device: comm.Device,
    choices: List[cost.Choice],
    total: int,
    first: int,
    log: Optional[RunLog],
    console: Console,
) -> None:
    layers = tables.layers(config.model, config.width, config.image_size, config.num_classes)
    slices = [order.slice_bounds(config.global_batch, rank, comm.size()) for rank in range(comm.size())]
    parts = sorted({high - low for low, high in slices}, reverse=True)
    console.say(
        f"{config.model} at width {config.width:g}, {config.image_size} pixels: {tables.parameters(layers):,} parameters"
    )
    console.say(
        f"{data.train.records} records to train on, {data.validation.records} to evaluate; labels from {data.label_base} "
        f"({'0 is background' if data.label_base else 'no background'}; --label_base overrides)"
    )
    console.say(
        f"{count(comm.size(), 'rank')} on {device.kind}, {count(device.threads, 'CPU thread')} each, "
        f"{device.input_threads} to decode images; {config.global_batch} "
        f"images an update: {' or '.join(map(str, parts))} a rank, at most {config.device_batch} at once"
    )
    if comm.size() > 1:
        console.say(f"sent by each rank in an update, {config.wire_dtype} on the wire:\n{cost.table(choices)}")
    console.say(f"steps {first} to {total}, lr {config.lr:g} for the mean gradient of {config.global_batch}")
    if log:
        facts = {**comm.describe(), "ranks": comm.size(), "device": device.kind, "steps": total, "first_step": first}
        facts.update(cost.as_log(choices))
        log.log("PARAMETER", {**dataclasses.asdict(config), **facts})


def training(
    row: Dict[str, float], done: int, total: int, epoch: float, log: Optional[RunLog], console: Console, progress: Progress
) -> None:
    if log:
        log.log((int(epoch), done), row)
    left = progress.left_seconds(done)
    text = (
        f"step {done}/{total}  epoch {epoch:.2f}  loss {row['train.loss']:.4f}  acc@1 {row['train.acc@1']:.3f}  "
        f"lr {row['train.lr']:.3g}  {row['train.fps']:.1f} images/s"
    )
    if console.bar:
        progress.update(done, text.split("  ", 1)[1])
    else:
        progress.say(f"{text}  left {duration(left)}" if left is not None else text)


def evaluation(result: Evaluation, done: int, epoch: float, log: Optional[RunLog], console: Console) -> None:
    if log:
        log.log((int(epoch), done), result.metrics())
    console.say(
        f"step {done}  epoch {epoch:.2f}  evaluation: acc@1 {result.top1 / result.records:.4f}  acc@5 "
        f"{result.top5 / result.records:.4f}  loss {result.loss_sum / result.records:.4f}  of {result.records} records"
    )


def write_result(
    config: Config,
    run_dir: Path,
    result: Evaluation,
    throughput: Throughput,
    done: int,
    epoch: float,
    seconds: float,
) -> None:
    def write() -> None:
        # A start that trained nothing has measured nothing, and what stands may be of the start that did.
        if not comm.is_root() or (not throughput.windows and _has_result_of(run_dir, done)):
            return
        content = {
            "acc@1": result.top1 / result.records,
            "acc@5": result.top5 / result.records,
            "top1_hits": result.top1,
            "top5_hits": result.top5,
            "records_evaluated": result.records,
            **throughput.summary(),
            "steps": done,
            "epochs": epoch,
            "ranks": comm.size(),
            "global_batch": config.global_batch,
            "seconds": seconds,
        }
        try:
            temporary = run_dir / "result.json.tmp"
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            temporary.replace(run_dir / "result.json")
        except OSError as error:
            raise Failure(NOT_WRITTEN, f"{run_dir / 'result.json'} cannot be written: {error.strerror}") from error

    comm.together(write)


def _has_result_of(run_dir: Path, done: int) -> bool:
    try:
        return bool(json.loads((run_dir / "result.json").read_text(encoding="utf-8"))["steps"] == done)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def summary(run_dir: Path, result: Evaluation, throughput: Throughput, done: int, seconds: float, console: Console) -> None:
    speed = throughput.summary()
    console.say(f"finished in {duration(seconds)} on {count(comm.size(), 'rank')}")
    console.say(f"  acc@1              {result.top1 / result.records:.4f}")
    console.say(f"  acc@5              {result.top5 / result.records:.4f}")
    console.say(f"  records evaluated  {result.records}")
    console.say(f"  steps              {done}")
    if speed["fps"]:
        console.say(
            f"  fps                {speed['fps']:.1f} images/s (deviation {speed['fps_standard_deviation']:.1f} over "
            f"{speed['fps_windows']} windows; without warm-up, evaluation, saving)"
        )
    console.say(f"  run                {run_dir.resolve()}")
    console.say("  in it              result.json, dllogger.json, flags.txt, checkpoints/, tensorboard/")
