"""The training loop, and the evaluation of a run afterwards."""

import dataclasses
import json
import math
import os
import time
from pathlib import Path
from typing import Dict, FrozenSet, List, Tuple

import numpy as np

from hvd_vgg.config import Config, EvaluateConfig, epochs_to_steps, total_steps
from hvd_vgg.data import order, pipeline, records
from hvd_vgg.data.index import Data, open_data, open_split
from hvd_vgg.parallel import comm, cost
from hvd_vgg.run.health import CONFIGURATION, NOT_FINITE, USAGE, Failure
from hvd_vgg.run.log import Console, count
from hvd_vgg.run.throughput import Throughput
from hvd_vgg.train import checkpoint, evaluate, schedule, state, step, tell
from hvd_vgg.train.profile import profiled

# A window of log lines ends early once: the user sees that it works, and the estimate leaves out what was compiled.
_FIRST_LOOK = 2


def train(config: Config) -> None:
    """Trains, evaluates and leaves everything in --run_dir; all ranks call."""
    # ---- who and where we are
    device = comm.start(config.input_threads, timeline=bool(config.profile_steps))
    threads = device.input_threads
    console = Console(config.console, comm.is_root())
    run_dir = Path(config.run_dir)
    _check_ranks(config)
    comm.together(lambda: _check_start(config, run_dir))

    # ---- the data
    data = open_data(config, run_dir, console)
    total = total_steps(config, data.train.records)
    eval_at = _evaluation_steps(config, data.train.records, total)
    low, _ = order.slice_bounds(config.global_batch, comm.rank(), comm.size())

    # ---- the model, from the start or from a checkpoint
    run = state.initial(config)
    what = state.what_run(config, data.train, data.label_base)
    position = state.restore(run, config, run_dir, what, console)
    choices = cost.choose(config, comm.size())
    factored = [choice.layer for choice in choices if choice.way == "factored"]
    train_step = step.make_train_step(run.weights, run.slots, config, device.data_format, factored)
    checksums = step.make_checksums(run.weights)
    eval_step = step.make_eval_step(run.weights, config, device.data_format)
    log = tell.introduce(config, run_dir, data, device, choices, total, position.step, console)

    # ---- the loop
    best = position.best_top1
    steps = range(position.step, position.step if _reached(config, best, data) else total)
    batches = pipeline.train_batches(data.train, config, data.label_base, steps, comm.rank(), comm.size(), threads)
    throughput, progress = Throughput(), console.progress("training", total, "steps", position.step)
    began, done, result = time.monotonic() - position.seconds, position.step, None
    window: List[Tuple[int, step.Sums]] = []
    for now, batch in zip(steps, profiled(throughput.waiting(batches), steps, config, throughput)):
        lr = schedule.learning_rate(now, config, data.train.records)
        sums = train_step(*batch[:2], *step.arguments(config, now, low, lr))
        window.append((now, sums))
        done = now + 1
        saves = bool(config.save_every_steps) and done % config.save_every_steps == 0
        # Weights are compared before they are scored or saved too: a checkpoint of drifted ones would look whole.
        compares = config.drift_every_steps > 0 and (done % config.drift_every_steps == 0 or saves or done in eval_at)
        first_look = done - position.step == _FIRST_LOOK
        if not (first_look or done % config.log_every_steps == 0 or saves or compares or done in eval_at):
            throughput.end_update()
            progress.update(done)
            continue

        row = {**_close_window(window, config), "train.lr": lr}
        throughput.end_update()
        row, verdict = tell.speed_of_window(row, window, throughput, config)
        window.clear()
        if compares:
            state.check_identical(list(run.weights), checksums().numpy(), now)
        epoch = done * config.global_batch / data.train.records
        if first_look:
            progress.restart(done)
        tell.training(row, verdict, done, total, epoch, log, console, progress)
        improved = False
        if done in eval_at:
            with throughput.apart("evaluation"):
                result = evaluate.evaluate(eval_step, data.validation, config, data.label_base, threads, console)
                tell.evaluation(result, done, epoch, log, console)
            improved, best = result.top1 > best, max(best, result.top1)
        reached = _reached(config, best, data)
        if saves or improved or done == total or reached:
            with throughput.apart("saving"):
                at = state.Position(done, time.monotonic() - began, best)
                state.save(run, at, what, run_dir, config.keep_checkpoints, improved)
        if result and done in eval_at:
            with throughput.apart("saving"):
                measured = tell.write_result(config, run_dir, result, throughput, done, epoch, time.monotonic() - began)
        if reached:
            console.say(f"acc@1 has reached --stop_at_top1={config.stop_at_top1}")
            break

    # ---- the end
    if result is None:  # nothing was left to train
        epoch = done * config.global_batch / data.train.records
        result = evaluate.evaluate(eval_step, data.validation, config, data.label_base, threads, console)
        tell.evaluation(result, done, epoch, log, console)
        measured = tell.write_result(config, run_dir, result, throughput, done, epoch, time.monotonic() - began)
    tell.summary(run_dir, result, measured, done, time.monotonic() - began, log, console)
    comm.leave()


def evaluate_run(config: EvaluateConfig) -> None:
    """Evaluates a checkpoint of the run in --run_dir on the validation split; all ranks call."""
    device = comm.start(config.input_threads)
    console = Console(config.console, comm.is_root())
    _check_ranks(config)
    run_dir = Path(config.run_dir)
    found = comm.together(lambda: _load_for_evaluation(config, run_dir) if comm.is_root() else None)
    meta = json.loads(comm.from_root(json.dumps(found.meta if found else None).encode()).decode())
    index = open_split(config.data_dir, "validation", run_dir, console)
    label_base = meta["run"]["label_base"] if config.label_base == "auto" else int(config.label_base)
    comm.together(lambda: records.check_labels(index, label_base, config.num_classes))
    run = state.initial(config)
    comm.together(lambda: state.assign(run.weights, found) if found else None)
    comm.broadcast_variables(list(run.weights.values()))
    eval_step = step.make_eval_step(run.weights, config, device.data_format)
    result = evaluate.evaluate(eval_step, index, config, label_base, device.input_threads, console)
    console.say(
        f"step {meta['step']}: {result.accuracy()}  "
        f"({result.top1} and {result.top5} of {result.records} records, each once, on {count(comm.size(), 'rank')})"
    )
    comm.leave()


def _reached(config: Config, top1: int, data: Data) -> bool:
    return config.stop_at_top1 > 0 and top1 >= config.stop_at_top1 * data.validation.records


def _check_ranks(config: Config) -> None:
    flags = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
        if name not in ("data_dir", "run_dir", "console")  # a host may keep them elsewhere
    }
    comm.agree("the flags", flags)
    comm.agree("the software", comm.describe())


def _check_start(config: Config, run_dir: Path) -> None:
    if config.global_batch < comm.size():
        raise Failure(
            USAGE, f"--global_batch={config.global_batch} leaves nothing to do for some of {comm.size()} ranks: start fewer"
        )
    if config.profile_steps and max(config.profile_ranks, default=0) >= comm.size():
        raise Failure(USAGE, f"--profile_ranks: expected numbers below {comm.size()}, which is how many ranks there are")
    if not comm.is_root():
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(run_dir, os.W_OK | os.X_OK):
            raise PermissionError(13, "no permission to write")
    except OSError as error:
        raise Failure(CONFIGURATION, f"--run_dir={run_dir} cannot be made or written: {error.strerror}") from error


def _evaluation_steps(config: Config, records_count: int, total: int) -> FrozenSet[int]:
    """Returns the numbers of updates after which to evaluate; the last is the end of the run."""
    if not config.eval_every_epochs:
        return frozenset([total])
    count = int(total * config.global_batch / (records_count * config.eval_every_epochs)) + 1
    each = (epochs_to_steps(n * config.eval_every_epochs, config, records_count) for n in range(1, count + 1))
    return frozenset({done for done in each if 0 < done < total} | {total})


def _close_window(window: List[Tuple[int, step.Sums]], config: Config) -> Dict[str, float]:
    """Returns the means of the window's steps over all ranks; the one place where the loop waits for all ranks.

    Raises an agreed Failure(NOT_FINITE) naming the first step whose loss or gradient is not a number.
    """
    local = np.array([[float(sums.loss), float(sums.gradient_norm)] for _, sums in window])
    # The norm is every rank's already; summing it too makes what follows from it the same everywhere, to the last bit.
    losses, norms = (comm.sum_over_ranks(local) / [config.global_batch, comm.size()]).T
    hits = comm.sum_over_ranks(np.array([[int(sums.top1), int(sums.top5)] for _, sums in window], np.int64)).sum(axis=0)
    scales = [float(sums.loss_scale) for _, sums in window]
    for (now, _), loss, norm, scale in zip(window, losses, norms, scales):
        # In float16 an infinite gradient is one update skipped, unless no scale helps.
        if not (math.isfinite(loss) and (math.isfinite(norm) or config.precision == "float16") and scale >= 1):
            raise Failure(
                NOT_FINITE,
                f"step {now}: loss {loss:g}, gradient norm {norm:g}: not finite, training cannot go on. The newest "
                f"checkpoint is from before; try a lower --lr or a longer --warmup_epochs in another --run_dir",
                agreed=True,
            )
    top1, top5 = (hits / (len(window) * config.global_batch)).tolist()
    row = {"train.loss": float(losses.mean()), "train.acc@1": top1, "train.acc@5": top5}
    finite = norms[np.isfinite(norms)]
    row["train.gradient_norm"] = float(finite.mean()) if len(finite) else 0.0
    if config.precision == "float16":
        row.update({"train.loss_scale": scales[-1], "train.skipped_updates": len(norms) - len(finite)})
    return row


def _load_for_evaluation(config: EvaluateConfig, run_dir: Path) -> checkpoint.Checkpoint:
    if config.checkpoint in ("best", "newest"):
        path = checkpoint.pointed(run_dir, config.checkpoint)
        if path is None:
            place = checkpoint.folder(run_dir)
            raise Failure(
                CONFIGURATION,
                f"{place} names no {config.checkpoint} checkpoint: is --run_dir a run's, "
                "and has it been evaluated yet? --checkpoint=newest needs no evaluation",
            )
    else:
        path = Path(config.checkpoint)
    try:
        return checkpoint.load(path)
    except ValueError as error:
        raise Failure(CONFIGURATION, f"{path}: {error}") from error
