"""The training loop, and the evaluation of a run afterwards."""

import dataclasses
import math
import os
import time
from pathlib import Path
from typing import IO, Any, Callable, Dict, FrozenSet, Iterator, List, NamedTuple, NoReturn, Optional, Sequence, Tuple

import numpy as np

from hvd_vgg.config import EvaluateConfig, TrainConfig
from hvd_vgg.data.coverage import Coverage
from hvd_vgg.data.index import Index, check_labels
from hvd_vgg.data.loader import BadRow, Batch, train_batches
from hvd_vgg.data.sampler import slice_bounds
from hvd_vgg.data.transforms import IMAGE_LIBRARY
from hvd_vgg.errors import CONFIGURATION, STOPPED, USAGE, Failure
from hvd_vgg.parallel import comm, cost
from hvd_vgg.parallel.consensus import check_replicas, require_equal, run_on_all_ranks
from hvd_vgg.parallel.init import Device, compared_environment, describe_software, start
from hvd_vgg.reporting.console import Console
from hvd_vgg.reporting.log import RunLog
from hvd_vgg.reporting.throughput import Throughput
from hvd_vgg.run_dir import lock_run_dir
from hvd_vgg.text import plural
from hvd_vgg.train import checkpoint, reporter
from hvd_vgg.train.bad_records import count_bad_records
from hvd_vgg.train.checkpoint_writer import CheckpointWriter
from hvd_vgg.train.dataset import Splits, open_data, open_split
from hvd_vgg.train.evaluate import Evaluation, evaluate
from hvd_vgg.train.nonfinite import NonFinite, NonFiniteStep, stop_or_rewind, with_skipped_steps
from hvd_vgg.train.profile import profiled
from hvd_vgg.train.reporter import (
    evaluation,
    introduce,
    open_log,
    save_failed,
    speed_of_window,
    stopped,
    summary,
    training,
    write_result,
)
from hvd_vgg.train.schedule import evaluation_steps, learning_rate, total_steps
from hvd_vgg.train.state import (
    State,
    TrainProgress,
    assign_variables,
    data_digest,
    finish_save,
    initial_state,
    reset_state,
    restore_state,
    run_fingerprint,
    save_state,
)
from hvd_vgg.train.train_step import SKIPPED_STEP, StepMetrics, make_checksums, make_eval_step, make_train_step, step_inputs
from hvd_vgg.watchdog import StopRequested, watchdog

# A window of log lines ends early once: the user sees that it works, and the estimate leaves out what was compiled.
_FIRST_LOOK = 2
# Where updates are slow, the ranks ask each other between log lines too whether one of them was asked to stop.
_LISTEN_SECONDS = 5.0


class Trainer(NamedTuple):
    """What a run is made of on this rank; `log`, `writer` and `lock` are rank 0's."""

    config: TrainConfig
    run_dir: Path
    console: Console
    data: Splits
    total: int
    eval_at: FrozenSet[int]
    what: Dict[str, Any]
    run: State
    train_step: Callable[..., StepMetrics]
    eval_step: Callable[..., Any]
    checksums: Callable[[], Any]
    device: Device
    throughput: Throughput
    coverage: Coverage
    began: float  # time.monotonic() less the seconds of earlier starts
    log: Optional[RunLog]
    writer: Optional[CheckpointWriter]
    lock: Optional[IO[str]]

    def epoch(self, done: int) -> float:
        """Returns how many epochs `done` updates are."""
        return done * self.config.global_batch / self.data.train.records


def train(config: TrainConfig) -> None:
    """Trains, evaluates and leaves everything in --run_dir; all ranks call."""
    job, at = _begin(config)
    try:
        met = _train(job, at)
        while met:  # a step that was not finite: neither it nor any after it was applied
            job, at = _rewind(job, met)
            met = _train(job, at)
    except Failure as failure:
        if failure.collective and job.writer:
            job.writer.wait()  # all ranks will leave, and the launcher ends whoever is still writing then
        raise


def _train(job: Trainer, at: TrainProgress) -> Optional[NonFiniteStep]:
    """Trains from `at` to the end and ends the run, or returns the step that was not finite."""
    config = job.config
    throughput, result, begun_at, listen_every = job.throughput, None, at.step, config.log_every_steps
    if at.step in job.eval_at and at.evaluated < at.step:  # asked to stop before it was scored
        at, result, improved = _evaluate(job, at)
        _save(job, at, improved)
    steps = range(at.step, at.step if _reached(job, at) else job.total)
    progress = job.console.progress("training", job.total, "steps", at.step)
    window: List[Tuple[int, StepMetrics]] = []
    bad_rows: List[Tuple[int, BadRow]] = []
    for now, batch in zip(steps, profiled(throughput.timed(_batches(job, steps)), steps, config, throughput)):
        window.append((now, (_skip if now in at.skipped_steps else _update)(job, now, batch)))
        bad_rows += [(now, row) for row in batch.bad if now not in at.skipped_steps]
        at = at._replace(step=now + 1)
        watchdog.heartbeat(at.step)
        if job.log and now == begun_at:
            job.log.event("first_update", step=now)
        evaluates = at.step in job.eval_at
        saves = bool(config.save_every_steps) and at.step % config.save_every_steps == 0
        # Weights are compared before they are scored or saved too: a checkpoint of drifted ones would look whole.
        compares = config.drift_every_steps > 0 and (at.step % config.drift_every_steps == 0 or saves or evaluates)
        first_look = at.step - begun_at == _FIRST_LOOK
        due = first_look or at.step % config.log_every_steps == 0 or saves or compares or evaluates
        asked = (due or at.step % listen_every == 0) and comm.any_rank(watchdog.stop_requested())
        if not (due or asked):
            throughput.end_update()
            progress.update(at.step)
            continue

        row, seen = _close_window(window, config)
        throughput.end_update()
        if seen:
            return NonFiniteStep(seen, at.skipped_steps)
        at = _account(job, at, bad_rows)
        row["train.lr"] = learning_rate(now, config, job.data.train.records)
        row, verdict = speed_of_window(row, window, throughput, config)
        listen_every = _listen_every(throughput, at.step - begun_at, len(window)) or listen_every
        window.clear()
        if job.coverage.ended(at.step):
            at = _settle(job, at)
        if compares:
            check_replicas(list(job.run.weights), job.checksums().numpy(), now)
        if first_look:
            progress.restart(at.step)
        training(row, verdict, at.step, job.total, job.epoch(at.step), job.log, job.console, progress)
        save_failed(job.writer.failure() if job.writer else None, job.log, job.console)
        improved = False
        if evaluates:
            at, result, improved = _evaluate(job, at)
        reached = evaluates and _reached(job, at)
        if saves or improved or reached or at.step == job.total:
            _save(job, at, improved)
        if reached:
            job.console.say(f"acc@1 has reached --stop_at_top1={config.stop_at_top1}")
            break
        if at.step == job.total:
            break
        if evaluates and result:
            try:
                _write_result(job, at, result)
            except Failure as failure:  # agreed; only the last must be written
                save_failed(failure, job.log, job.console)
        if asked:
            _stop(job, at, saved=saves or improved)
    _end(job, at, result)
    return None


def _begin(config: TrainConfig) -> Tuple[Trainer, TrainProgress]:
    """Returns what the run is made of, and where it stands: at the start, or at a checkpoint."""
    # ---- who and where we are
    run_dir = Path(config.run_dir)
    device = start(
        config.input_threads,
        bool(config.profile_steps),
        hang_seconds=config.hang_seconds,
        precision=config.precision,
    )
    watchdog.save_when_asked()
    console = Console(config.console, comm.is_root())
    _check_ranks(config)
    lock = run_on_all_ranks(lambda: _check_start(config, run_dir))
    log = open_log(config, run_dir, console)

    # ---- the data
    data = open_data(config, run_dir, console)
    total = total_steps(config, data.train.records)

    # ---- the model, from the start or from a checkpoint
    run = initial_state(config)
    what = run_fingerprint(config, data.train, data.label_base)
    at = with_skipped_steps(restore_state(run, config, run_dir, what, log, console), run_dir)
    introduce(config, run_dir, data, device, cost.choose(config, comm.size()), total, at, log, console)
    return Trainer(
        config,
        run_dir,
        console,
        data,
        total,
        evaluation_steps(config, data.train.records, total),
        what,
        run,
        _make_train_step(config, run, device),
        make_eval_step(run.weights, config, device.data_format),
        make_checksums(run.weights),
        device,
        Throughput(),
        Coverage(data.train.records, config.global_batch, at.step, at.coverage),
        time.monotonic() - at.seconds,
        log,
        CheckpointWriter(run_dir, config.keep_checkpoints, log.event) if log else None,
        lock,
    ), at


def _make_train_step(config: TrainConfig, run: State, device: Device) -> Callable[..., StepMetrics]:
    factored = [choice.layer for choice in cost.choose(config, comm.size()) if choice.way == "factored"]
    return make_train_step(run.weights, run.slots, config, device.data_format, factored)


def _rewind(job: Trainer, met: NonFiniteStep) -> Tuple[Trainer, TrainProgress]:
    """Returns the run as it goes on from its newest checkpoint without that step, or raises the Failure that ends it."""
    config, run, throughput = job.config, job.run, job.throughput
    known = len(throughput.exchange_seconds)
    unlogged = {"update_seconds": throughput.total_seconds[known:], "input_seconds": throughput.input_seconds[known:]}
    throughput.exchange_seconds.extend([0.0] * len(unlogged["update_seconds"]))  # nobody asked its updates
    with throughput.exclude("rewinding"), watchdog.phase("saving"):
        if job.writer:
            save_failed(job.writer.wait(), job.log, job.console)
        ids = stop_or_rewind(met, run, job.train_step, job.data, config, job.device, job.log, job.console)
        reset_state(run, config)
        again = dataclasses.replace(config, resume="auto")
        at = restore_state(run, again, job.run_dir, job.what, job.log, job.console)
        at = with_skipped_steps(at, job.run_dir)
    if job.log:
        told = {"from": met.seen.step, "to": at.step, "skipped_steps": at.skipped_steps, "records": ids}
        job.log.event("rewind", **told, **unlogged)
    watchdog.heartbeat(phase="start")  # what follows is compiled again
    # A new one, since the other applies no update any more.
    covered = Coverage(job.data.train.records, config.global_batch, at.step, at.coverage)
    return job._replace(train_step=_make_train_step(config, run, job.device), coverage=covered), at


def _batches(job: Trainer, steps: range) -> Iterator[Batch]:
    data, threads = job.data, job.device.input_threads
    return train_batches(data.train, job.config, data.label_base, steps, comm.rank(), comm.size(), threads)


def _update(job: Trainer, now: int, batch: Batch) -> StepMetrics:
    low, _ = slice_bounds(job.config.global_batch, comm.rank(), comm.size())
    lr = learning_rate(now, job.config, job.data.train.records)
    sums = job.train_step(*batch[:2], *step_inputs(job.config, now, low, lr))
    job.coverage.add(now * job.config.global_batch + low, batch.ids.numpy(), [(row.row, row.record) for row in batch.bad])
    return sums


def _skip(job: Trainer, now: int, batch: Batch) -> StepMetrics:
    """Leaves a step out: its records are told as skipped, those that are bad too."""
    low, _ = slice_bounds(job.config.global_batch, comm.rank(), comm.size())
    due = batch.ids.numpy()
    for row in batch.bad:
        due[row.row] = row.record
    job.coverage.skip(now * job.config.global_batch + low, due)
    return SKIPPED_STEP


def _account(job: Trainer, at: TrainProgress, met: List[Tuple[int, BadRow]]) -> TrainProgress:
    """Returns where the run stands when the bad records `met`, of (step, row), are counted; they are no longer in `met`."""
    allowed, index = job.config.bad_records_allowed, job.data.train
    found = count_bad_records(met, at.bad_records, allowed, index, job.log, job.console)
    met.clear()
    return at._replace(bad_records=found)


def _settle(job: Trainer, at: TrainProgress) -> TrainProgress:
    """Returns where the run stands with what was trained on summed over ranks; tells the epochs that are complete."""
    for proved in job.coverage.settle(at.step, comm.gather_json):
        reporter.covered(proved, job.data.train.records, job.log, job.console)
    return at._replace(coverage=job.coverage.state())


def _evaluate(job: Trainer, at: TrainProgress) -> Tuple[TrainProgress, Evaluation, bool]:
    """Returns where the run stands then, the evaluation, and whether it is better than all before."""
    with job.throughput.exclude("evaluation"), watchdog.phase("evaluation"):
        try:
            data, threads = job.data, job.device.input_threads
            result = evaluate(job.eval_step, data.validation, job.config, data.label_base, threads, job.console, job.log)
        except StopRequested:
            _stop(job, at)
        evaluation(result, at.step, job.epoch(at.step), job.log, job.console)
    improved = result.top1 > at.best_top1
    return at._replace(best_top1=max(at.best_top1, result.top1), evaluated=at.step), result, improved


def _save(job: Trainer, at: TrainProgress, best: bool) -> None:
    with job.throughput.exclude("saving"), watchdog.phase("saving"):
        if job.writer:
            save_failed(job.writer.wait(), job.log, job.console)
        at = _settle(job, at)._replace(seconds=time.monotonic() - job.began)
        save_state(job.run, at, job.what, job.writer, best)
        comm.barrier()  # else the others wait for rank 0's copy inside their next update


def _listen_every(throughput: Throughput, done: int, window: int) -> int:
    """Returns how many updates like the newest `window` of `done` take _LISTEN_SECONDS; all ranks call, and get the same.

    The first update of a start also compiles and is left out; 0 where there is no other.
    """
    updates = min(window, done - 1)
    seconds = comm.gather_numbers([throughput.last(updates).total]).max()
    return max(1, round(_LISTEN_SECONDS * updates / seconds)) if updates else 0


def _write_result(job: Trainer, at: TrainProgress, result: Evaluation) -> Dict[str, Any]:
    with job.throughput.exclude("saving"):
        seconds = time.monotonic() - job.began
        epoch = job.epoch(at.step)
        return write_result(job.config, job.run_dir, result, job.throughput, at.step, epoch, seconds, job.log)


def _stop(job: Trainer, at: TrainProgress, saved: bool = False) -> NoReturn:
    """Ends a run that was asked to stop, with a checkpoint, if it is not `saved` yet; all ranks call at the same step."""
    if not saved:
        _save(job, at, False)
    with watchdog.phase("saving"):
        finish_save(job.writer)
    stopped(job.config, at.step, job.run_dir, job.log)
    raise Failure(
        STOPPED,
        f"stopped on request after step {at.step} of {job.total}: the same command goes on from there",
        collective=True,
    )


def _end(job: Trainer, at: TrainProgress, result: Optional[Evaluation]) -> None:
    """Ends a run that is through, with the evaluation and the checkpoint it must have."""
    if result is None or at.evaluated < at.step:  # nothing was left to train
        scored = at.evaluated == at.step
        at, result, improved = _evaluate(job, at)
        if not scored:
            _save(job, at, improved)
    with watchdog.phase("saving"):
        finish_save(job.writer)
    measured = _write_result(job, at, result)
    seconds = time.monotonic() - job.began
    summary(job.run_dir, result, measured, at.step, seconds, job.writer, job.log, job.console)
    comm.shutdown()


def evaluate_run(config: EvaluateConfig) -> None:
    """Evaluates a checkpoint of the run in --run_dir on the validation split; all ranks call."""
    score(config, [config.checkpoint])


class Score(NamedTuple):
    """What a checkpoint of `step` updates has scored, and the digest of the data."""

    step: int
    result: Evaluation
    data_sha256: str


def score(config: TrainConfig, checkpoints: Sequence[str]) -> List[Score]:
    """Evaluates checkpoints of the run in --run_dir on the validation split, and prints each; all ranks call.

    checkpoints: `best`, `newest`, or paths.
    """
    device = start(config.input_threads, hang_seconds=config.hang_seconds, precision=config.precision)
    console = Console(config.console, comm.is_root())
    _check_ranks(config)
    run_dir = Path(config.run_dir)
    index = open_split(config.data_dir, "validation", run_dir, console)
    scores = [_score(config, name, run_dir, index, device, console) for name in checkpoints]
    comm.shutdown()
    return scores


def _score(config: TrainConfig, name: str, run_dir: Path, index: Index, device: Device, console: Console) -> Score:
    found = run_on_all_ranks(lambda: _load_for_evaluation(name, run_dir) if comm.is_root() else None)
    meta = comm.broadcast_json(found.meta if found else None)
    label_base = meta["run"]["label_base"] if config.label_base == "auto" else int(config.label_base)
    run_on_all_ranks(lambda: check_labels(index, label_base, config.num_classes))
    run = initial_state(config)
    run_on_all_ranks(lambda: assign_variables(run.weights, found) if found else None)
    comm.broadcast_variables(list(run.weights.values()))
    eval_step = make_eval_step(run.weights, config, device.data_format)
    result = evaluate(eval_step, index, config, label_base, device.input_threads, console)
    console.say(
        f"step {meta['step']}: {result.accuracy()}  "
        f"({result.top1} and {result.top5} of {result.records} records, each once, on {plural(comm.size(), 'rank')})"
    )
    return Score(meta["step"], result, data_digest(index))


def _reached(job: Trainer, at: TrainProgress) -> bool:
    target = job.config.stop_at_top1
    return target > 0 and at.best_top1 >= target * job.data.validation.records


def _check_ranks(config: TrainConfig) -> None:
    flags = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
        if name not in ("data_dir", "run_dir", "console")  # a host may keep them elsewhere
    }
    require_equal("the flags", flags)
    require_equal("the software", describe_software(IMAGE_LIBRARY))
    require_equal("the environment", compared_environment())


def _check_start(config: TrainConfig, run_dir: Path) -> Optional[IO[str]]:
    """Returns the run directory's lock, on rank 0."""
    if config.global_batch < comm.size():
        raise Failure(
            USAGE, f"--global_batch={config.global_batch} leaves nothing to do for some of {comm.size()} ranks: start fewer"
        )
    if config.profile_steps and max(config.profile_ranks, default=0) >= comm.size():
        raise Failure(USAGE, f"--profile_ranks: expected numbers below {comm.size()}, which is how many ranks there are")
    if not comm.is_root():
        return None
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(run_dir, os.W_OK | os.X_OK):
            raise PermissionError(13, "no permission to write")
    except OSError as error:
        raise Failure(CONFIGURATION, f"--run_dir={run_dir} cannot be made or written: {error.strerror}") from error
    return lock_run_dir(run_dir)


def _close_window(
    window: List[Tuple[int, StepMetrics]], config: TrainConfig
) -> Tuple[Dict[str, float], Optional[NonFinite]]:
    """Returns the means of the window's steps over all ranks; the one place where the loop waits for all ranks.

    Beside them is the first step that was not finite, if there is one: neither its update nor any after it was applied.
    """
    trained = [(now, sums) for now, sums in window if sums is not SKIPPED_STEP]
    local = np.array([[float(sums.loss), float(sums.gradient_norm), not sums.sound] for _, sums in trained]).reshape(-1, 3)
    # The norm is every rank's already; summing it too makes what follows from it the same everywhere, to the last bit.
    losses, norms, unsound = (comm.sum_over_ranks(local) / [config.global_batch, comm.size(), 1]).T
    seen = [NonFinite(now, *numbers) for (now, _), *numbers in zip(trained, losses.tolist(), norms.tolist())]
    local_hits = np.array([[int(sums.top1), int(sums.top5)] for _, sums in trained], np.int64).reshape(-1, 2)
    top1, top5 = (comm.sum_over_ranks(local_hits).sum(axis=0) / (max(1, len(trained)) * config.global_batch)).tolist()
    loss = float(losses.mean()) if trained else math.nan  # of a window that was all skipped
    row = {"train.loss": loss, "train.acc@1": top1, "train.acc@5": top5}
    finite = norms[np.isfinite(norms)]
    row["train.gradient_norm"] = float(finite.mean()) if len(finite) else 0.0
    if config.precision == "float16":
        scale = float((trained or window)[-1][1].loss_scale)
        row.update({"train.loss_scale": scale, "train.skipped_updates": len(norms) - len(finite)})
    return row, next((each for each, odd in zip(seen, unsound) if odd), None)


def _load_for_evaluation(name: str, run_dir: Path) -> checkpoint.Checkpoint:
    if name == "best":
        path = checkpoint.best(run_dir)
    elif name == "newest":
        path = next(iter(checkpoint.existing(run_dir)), None)
    else:
        path = Path(name)
    if path is None:
        raise Failure(
            CONFIGURATION,
            f"{checkpoint.folder(run_dir)} has no {name} checkpoint: is --run_dir a run's, and has it been "
            f"evaluated yet? --checkpoint=newest needs no evaluation",
        )
    try:
        return checkpoint.load(path)
    except ValueError as error:
        raise Failure(CONFIGURATION, f"{path}: {error}") from error
