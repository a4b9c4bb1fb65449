"""The training loop, and the evaluation of a run afterwards."""

import dataclasses
import json
import math
import os
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import tensorflow as tf

from hvd_vgg.config import Config, EvaluateConfig, epochs_to_steps, to_flag_file, total_steps
from hvd_vgg.data import order, pipeline, records
from hvd_vgg.data.index import open_split
from hvd_vgg.model import vgg
from hvd_vgg.parallel import comm
from hvd_vgg.run.health import CONFIGURATION, NOT_FINITE, NOT_WRITTEN, USAGE, Failure
from hvd_vgg.run.log import Console, RunLog, duration
from hvd_vgg.run.throughput import WARMUP_STEPS, Throughput
from hvd_vgg.train import checkpoint, evaluate, schedule, state, step


class Data(NamedTuple):
    """The splits of a run and the label of their first class."""

    train: records.Index
    validation: records.Index
    label_base: int


def train(config: Config) -> None:
    """Trains, evaluates and leaves everything in --run_dir; all ranks call."""
    # ---- who and where we are
    device = comm.start()
    console = Console(config.console, comm.is_root())
    _check_ranks(config)
    run_dir = Path(config.run_dir)
    comm.together(lambda: _make_run_dir(run_dir) if comm.is_root() else None)

    # ---- the data
    data = _open_data(config, run_dir, console)
    total = total_steps(config, data.train.records)
    eval_at = _evaluation_steps(config, data.train.records, total)
    low, _ = order.slice_bounds(config.global_batch, comm.rank(), comm.size())

    # ---- the model, from the start or from a checkpoint
    run = state.initial(config)
    what = state.what_run(config, data.train, data.label_base)
    position = state.restore(run, config, run_dir, what, console)
    train_step = step.make_train_step(run.weights, run.slots, config, device.data_format)
    eval_step = step.make_eval_step(run.weights, config.model, device.data_format)
    log = _open_log(config, run_dir) if comm.is_root() else None
    _introduce(config, data, device, total, position.step, log, console)

    # ---- the loop
    steps = range(position.step, total)
    batches = pipeline.train_batches(data.train, config, data.label_base, steps, comm.rank(), comm.size(), device.threads)
    throughput, progress = Throughput(), console.progress("training", total, "steps", position.step)
    began, best, result = time.monotonic() - position.seconds, position.best_top1, None
    window: List[Tuple[int, step.Sums]] = []
    for now, batch in zip(steps, batches):
        lr = schedule.learning_rate(now, config, data.train.records)
        keys = order.dropout_keys(config.seed, now, len(vgg.DENSE) - 1)
        sums = train_step(
            batch.images, batch.labels, tf.constant(low, tf.int64), tf.constant(keys), tf.constant(lr, tf.float32)
        )
        window.append((now, sums))
        done = now + 1
        saves = bool(config.save_every_steps) and done % config.save_every_steps == 0
        if done - position.step == min(WARMUP_STEPS, len(steps) - 1):
            float(sums.gradient_norm)  # waits for the device
            throughput.skip()
        if done % config.log_every_steps and done not in eval_at and not saves and done != total:
            progress.update(done)
            continue

        row = _close_window(window, config, throughput, position.step)
        row["train.lr"] = lr
        epoch = done * config.global_batch / data.train.records
        _tell_training(row, done, total, epoch, log, console, progress)
        with throughput.paused():
            improved = False
            if done in eval_at:
                result = evaluate.evaluate(eval_step, data.validation, config, data.label_base, device.threads, console)
                improved, best = result.top1 > best, max(best, result.top1)
                _tell_evaluation(result, done, epoch, log, console)
            reached = bool(result and config.stop_at_top1 and result.top1 >= config.stop_at_top1 * result.records)
            if saves or improved or done == total or reached:
                at = state.Position(done, time.monotonic() - began, best)
                state.save(run, at, what, run_dir, config.keep_checkpoints, improved)
            if result and done in eval_at:
                _write_result(config, run_dir, result, throughput, done, epoch, time.monotonic() - began)
        if reached:
            console.say(f"acc@1 has reached --stop_at_top1={config.stop_at_top1}")
            break

    # ---- the end
    if result is None:  # nothing was left to train
        result = evaluate.evaluate(eval_step, data.validation, config, data.label_base, device.threads, console)
        _tell_evaluation(result, total, total * config.global_batch / data.train.records, log, console)
    _summarize(config, run_dir, result, throughput, time.monotonic() - began, console)
    comm.leave()


def evaluate_run(config: EvaluateConfig) -> None:
    """Evaluates a checkpoint of the run in --run_dir on the validation split; all ranks call."""
    device = comm.start()
    console = Console(config.console, comm.is_root())
    comm.agree("the software", comm.describe())
    run_dir = Path(config.run_dir)
    found = comm.together(lambda: _load_for_evaluation(config, run_dir) if comm.is_root() else None)
    meta = json.loads(comm.from_root(json.dumps(found.meta if found else None).encode()).decode())
    index = open_split(config.data_dir, "validation", run_dir, console)
    label_base = meta["run"]["label_base"] if config.label_base == "auto" else int(config.label_base)
    comm.together(lambda: records.check_labels(index, label_base, config.num_classes))
    run = state.initial(config)
    comm.together(lambda: state.assign(run.weights, found) if found else None)
    comm.broadcast_variables(list(run.weights.values()))
    eval_step = step.make_eval_step(run.weights, config.model, device.data_format)
    result = evaluate.evaluate(eval_step, index, config, label_base, device.threads, console)
    console.say(
        f"step {meta['step']}: acc@1 {result.top1 / result.records:.4f}  acc@5 {result.top5 / result.records:.4f}  "
        f"({result.top1} and {result.top5} of {result.records} records, each once, on {comm.size()} ranks)"
    )
    comm.leave()


def _check_ranks(config: Config) -> None:
    flags = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
        if name not in ("data_dir", "run_dir", "console")  # a host may keep them elsewhere
    }
    comm.agree("the flags", flags)
    comm.agree("the software", comm.describe())
    if config.global_batch < comm.size():
        raise Failure(
            USAGE,
            f"--global_batch={config.global_batch} leaves nothing to do for some of {comm.size()} ranks: start fewer",
            agreed=True,
        )


def _make_run_dir(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(run_dir, os.W_OK | os.X_OK):
            raise PermissionError(13, "no permission to write")
    except OSError as error:
        raise Failure(CONFIGURATION, f"--run_dir={run_dir} cannot be made or written: {error.strerror}") from error


def _open_data(config: Config, run_dir: Path, console: Console) -> Data:
    train_index = open_split(config.data_dir, "train", run_dir, console)
    validation = open_split(config.data_dir, "validation", run_dir, console)
    found = records.find_label_base(np.concatenate([train_index.labels, validation.labels]), config.num_classes)
    label_base = found if config.label_base == "auto" else int(config.label_base)
    for index in (train_index, validation):
        comm.together(lambda index=index: records.check_labels(index, label_base, config.num_classes))  # type: ignore[misc]
    return Data(train_index, validation, label_base)


def _evaluation_steps(config: Config, records_count: int, total: int) -> List[int]:
    """Returns the numbers of updates after which to evaluate; the last is the end of the run."""
    if not config.eval_every_epochs:
        return [total]
    count = int(total * config.global_batch / (records_count * config.eval_every_epochs)) + 1
    each = (epochs_to_steps(n * config.eval_every_epochs, config, records_count) for n in range(1, count + 1))
    return sorted({done for done in each if 0 < done < total} | {total})


def _open_log(config: Config, run_dir: Path) -> RunLog:
    (run_dir / "flags.txt").write_text(to_flag_file(config), encoding="utf-8")
    return RunLog(run_dir, config.console == "dllogger", _tensorboard(run_dir))


def _tensorboard(run_dir: Path) -> Callable[[str, float, int], None]:
    writer = tf.summary.create_file_writer(str(run_dir / "tensorboard"))

    def scalar(name: str, value: float, at: int) -> None:
        with writer.as_default():
            tf.summary.scalar(name, value, at)
        writer.flush()

    return scalar


def _introduce(
    config: Config, data: Data, device: comm.Device, total: int, first: int, log: Optional[RunLog], console: Console
) -> None:
    layers = vgg.layers(config.model, config.width, config.image_size, config.num_classes)
    slices = [order.slice_bounds(config.global_batch, rank, comm.size()) for rank in range(comm.size())]
    parts = sorted({high - low for low, high in slices}, reverse=True)
    count = f"{vgg.parameters(layers):,} parameters"
    console.say(f"{config.model} at width {config.width:g}, {config.image_size} pixels: {count}")
    console.say(
        f"{data.train.records} records to train on, {data.validation.records} to evaluate; labels from {data.label_base} "
        f"({'0 is background' if data.label_base else 'no background'}; --label_base overrides)"
    )
    console.say(
        f"{comm.size()} ranks on {device.kind}, {device.threads} CPU threads each; {config.global_batch} images an update: "
        f"{' or '.join(map(str, parts))} a rank, at most {config.device_batch} at once"
    )
    console.say(f"steps {first} to {total}, lr {config.lr:g} for the mean gradient of {config.global_batch}")
    if log:
        facts = {**comm.describe(), "ranks": comm.size(), "device": device.kind, "steps": total, "first_step": first}
        log.log("PARAMETER", {**dataclasses.asdict(config), **facts})


def _close_window(
    window: List[Tuple[int, step.Sums]], config: Config, throughput: Throughput, first: int
) -> Dict[str, float]:
    """Empties the window and returns its means over all ranks; the one place where the loop waits for all ranks.

    Raises an agreed Failure(NOT_FINITE) naming the first step whose loss or gradient is not a number.
    """
    losses = comm.sum_over_ranks(np.array([float(sums.loss) for _, sums in window])) / config.global_batch
    hits = comm.sum_over_ranks(np.array([[int(sums.top1), int(sums.top5)] for _, sums in window], np.int64)).sum(axis=0)
    norms = [float(sums.gradient_norm) for _, sums in window]
    for (now, _), loss, norm in zip(window, losses, norms):
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Failure(
                NOT_FINITE,
                f"step {now}: loss {loss:g}, gradient norm {norm:g}: not finite, training cannot go on. The newest "
                f"checkpoint is from before; try a lower --lr or a longer --warmup_epochs",
                agreed=True,
            )
    measured = sum(now - first >= WARMUP_STEPS for now, _ in window) or (len(window) if window[0][0] == first else 0)
    images = len(window) * config.global_batch
    fps = throughput.close_window(measured * config.global_batch)
    window.clear()
    top1, top5 = (hits / images).tolist()
    means = {"train.loss": float(losses.mean()), "train.acc@1": top1, "train.acc@5": top5}
    return {**means, "train.gradient_norm": float(np.mean(norms)), "train.fps": fps}


def _tell_training(
    row: Dict[str, float], done: int, total: int, epoch: float, log: Optional[RunLog], console: Console, progress: Any
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
        console.say(f"{text}  left {duration(left or 0)}")


def _tell_evaluation(result: evaluate.Evaluation, done: int, epoch: float, log: Optional[RunLog], console: Console) -> None:
    if log:
        log.log((int(epoch), done), result.metrics())
    console.say(
        f"step {done}  epoch {epoch:.2f}  evaluation: acc@1 {result.top1 / result.records:.4f}  acc@5 "
        f"{result.top5 / result.records:.4f}  loss {result.loss_sum / result.records:.4f}  of {result.records} records"
    )


def _write_result(
    config: Config,
    run_dir: Path,
    result: evaluate.Evaluation,
    throughput: Throughput,
    done: int,
    epoch: float,
    seconds: float,
) -> None:
    def write() -> None:
        if not comm.is_root():
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


def _summarize(
    config: Config, run_dir: Path, result: evaluate.Evaluation, throughput: Throughput, seconds: float, console: Console
) -> None:
    speed = throughput.summary()
    console.say(f"finished in {duration(seconds)} on {comm.size()} ranks")
    console.say(f"  acc@1              {result.top1 / result.records:.4f}")
    console.say(f"  acc@5              {result.top5 / result.records:.4f}")
    console.say(f"  records evaluated  {result.records}")
    if speed["fps"]:
        console.say(
            f"  fps                {speed['fps']:.1f} images/s (deviation {speed['fps_standard_deviation']:.1f} over "
            f"{speed['fps_windows']} windows; without warm-up, evaluation, saving)"
        )
    console.say(f"  run                {run_dir.resolve()}")
    console.say("  in it              result.json, dllogger.json, flags.txt, checkpoints/, tensorboard/")


def _load_for_evaluation(config: EvaluateConfig, run_dir: Path) -> checkpoint.Checkpoint:
    if config.checkpoint in ("best", "newest"):
        path = checkpoint.pointed(run_dir, config.checkpoint)
        if path is None:
            place = checkpoint.folder(run_dir)
            raise Failure(CONFIGURATION, f"{place} names no {config.checkpoint} checkpoint: is --run_dir a run's?")
    else:
        path = Path(config.checkpoint)
    try:
        return checkpoint.load(path)
    except ValueError as error:
        raise Failure(CONFIGURATION, f"{path}: {error}") from error
