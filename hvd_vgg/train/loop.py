"""The training loop, and the evaluation of a run afterwards."""

import dataclasses
import json
import math
import os
import time
from pathlib import Path
from typing import IO, Any, Callable, Dict, FrozenSet, Iterator, List, NamedTuple, NoReturn, Optional, Sequence, Tuple

import numpy as np

from hvd_vgg.config import Config, EvaluateConfig, evaluation_steps, total_steps
from hvd_vgg.data import bad, order, pipeline, records
from hvd_vgg.data.index import Data, open_data, open_split
from hvd_vgg.parallel import comm, cost
from hvd_vgg.run import lock, watch
from hvd_vgg.run.coverage import Coverage
from hvd_vgg.run.health import CONFIGURATION, STOPPED, USAGE, Failure
from hvd_vgg.run.log import Console, RunLog, count
from hvd_vgg.run.throughput import Throughput
from hvd_vgg.train import checkpoint, evaluate, nonfinite, schedule, state, step, tell
from hvd_vgg.train.profile import profiled
from hvd_vgg.train.writer import Writer

# A window of log lines ends early once: the user sees that it works, and the estimate leaves out what was compiled.
_FIRST_LOOK = 2
# Where updates are slow, the ranks ask each other between log lines too whether one of them was asked to stop.
_LISTEN_SECONDS = 5.0


class Job(NamedTuple):
    """What a run is made of on this rank; `log`, `writer` and `lock` are rank 0's."""

    config: Config
    run_dir: Path
    console: Console
    data: Data
    total: int
    eval_at: FrozenSet[int]
    what: Dict[str, Any]
    run: state.State
    train_step: Callable[..., step.Sums]
    eval_step: Callable[..., Any]
    checksums: Callable[[], Any]
    device: comm.Device
    throughput: Throughput
    coverage: Coverage
    began: float  # time.monotonic() less the seconds of earlier starts
    log: Optional[RunLog]
    writer: Optional[Writer]
    lock: Optional[IO[str]]

    def epoch(self, done: int) -> float:
        """Returns how many epochs `done` updates are."""
        return done * self.config.global_batch / self.data.train.records


def train(config: Config) -> None:
    """Trains, evaluates and leaves everything in --run_dir; all ranks call."""
    job, at = _begin(config)
    try:
        met = _train(job, at)
        while met:  # a step that was not finite: neither it nor any after it was applied
            job, at = _rewind(job, met)
            met = _train(job, at)
    except Failure as failure:
        if failure.agreed and job.writer:
            job.writer.wait()  # all ranks will leave, and the launcher ends whoever is still writing then
        raise


def _train(job: Job, at: state.Position) -> Optional[nonfinite.Met]:
    """Trains from `at` to the end and ends the run, or returns the step that was not finite."""
    config = job.config
    throughput, result, begun_at, listen_every = job.throughput, None, at.step, config.log_every_steps
    if at.step in job.eval_at and at.evaluated < at.step:  # asked to stop before it was scored
        at, result, improved = _evaluate(job, at)
        _save(job, at, improved)
    steps = range(at.step, at.step if _reached(job, at) else job.total)
    progress = job.console.progress("training", job.total, "steps", at.step)
    window: List[Tuple[int, step.Sums]] = []
    bad_rows: List[Tuple[int, pipeline.BadRow]] = []
    for now, batch in zip(steps, profiled(throughput.waiting(_batches(job, steps)), steps, config, throughput)):
        window.append((now, (_skip if now in at.skipped_steps else _update)(job, now, batch)))
        bad_rows += [(now, row) for row in batch.bad if now not in at.skipped_steps]
        at = at._replace(step=now + 1)
        watch.beat(at.step)
        if job.log and now == begun_at:
            job.log.event("first_update", step=now)
        evaluates = at.step in job.eval_at
        saves = bool(config.save_every_steps) and at.step % config.save_every_steps == 0
        # Weights are compared before they are scored or saved too: a checkpoint of drifted ones would look whole.
        compares = config.drift_every_steps > 0 and (at.step % config.drift_every_steps == 0 or saves or evaluates)
        first_look = at.step - begun_at == _FIRST_LOOK
        due = first_look or at.step % config.log_every_steps == 0 or saves or compares or evaluates
        asked = (due or at.step % listen_every == 0) and comm.any_rank(watch.asked())
        if not (due or asked):
            throughput.end_update()
            progress.update(at.step)
            continue

        row, seen = _close_window(window, config)
        throughput.end_update()
        if seen:
            return nonfinite.Met(seen, at.skipped_steps)
        at = _account(job, at, bad_rows)
        row["train.lr"] = schedule.learning_rate(now, config, job.data.train.records)
        row, verdict = tell.speed_of_window(row, window, throughput, config)
        listen_every = _listen_every(throughput, at.step - begun_at, len(window)) or listen_every
        window.clear()
        if job.coverage.ended(at.step):
            at = _settle(job, at)
        if compares:
            state.check_identical(list(job.run.weights), job.checksums().numpy(), now)
        if first_look:
            progress.restart(at.step)
        tell.training(row, verdict, at.step, job.total, job.epoch(at.step), job.log, job.console, progress)
        tell.save_failed(job.writer.failure() if job.writer else None, job.log, job.console)
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
                tell.save_failed(failure, job.log, job.console)
        if asked:
            _stop(job, at, saved=saves or improved)
    _end(job, at, result)
    return None


def _begin(config: Config) -> Tuple[Job, state.Position]:
    """Returns what the run is made of, and where it stands: at the start, or at a checkpoint."""
    # ---- who and where we are
    run_dir = Path(config.run_dir)
    device = comm.start(
        config.input_threads,
        bool(config.profile_steps),
        hang_seconds=config.hang_seconds,
        precision=config.precision,
    )
    watch.listen()
    console = Console(config.console, comm.is_root())
    _check_ranks(config)
    lock = comm.together(lambda: _check_start(config, run_dir))
    log = tell.open_log(config, run_dir, console)

    # ---- the data
    data = open_data(config, run_dir, console)
    total = total_steps(config, data.train.records)

    # ---- the model, from the start or from a checkpoint
    run = state.initial(config)
    what = state.what_run(config, data.train, data.label_base)
    at = nonfinite.recall_skipped(state.restore(run, config, run_dir, what, log, console), run_dir)
    tell.introduce(config, run_dir, data, device, cost.choose(config, comm.size()), total, at, log, console)
    return Job(
        config,
        run_dir,
        console,
        data,
        total,
        evaluation_steps(config, data.train.records, total),
        what,
        run,
        _make_train_step(config, run, device),
        step.make_eval_step(run.weights, config, device.data_format),
        step.make_checksums(run.weights),
        device,
        Throughput(),
        Coverage(data.train.records, config.global_batch, at.step, at.coverage),
        time.monotonic() - at.seconds,
        log,
        Writer(run_dir, config.keep_checkpoints, log.event) if log else None,
        lock,
    ), at


def _make_train_step(config: Config, run: state.State, device: comm.Device) -> Callable[..., step.Sums]:
    factored = [choice.layer for choice in cost.choose(config, comm.size()) if choice.way == "factored"]
    return step.make_train_step(run.weights, run.slots, config, device.data_format, factored)


def _rewind(job: Job, met: nonfinite.Met) -> Tuple[Job, state.Position]:
    """Returns the run as it goes on from its newest checkpoint without that step, or raises the Failure that ends it."""
    config, run, throughput = job.config, job.run, job.throughput
    known = len(throughput.exchange)
    unlogged = {"update_seconds": throughput.total[known:], "input_seconds": throughput.input[known:]}
    throughput.exchange.extend([0.0] * len(unlogged["update_seconds"]))  # nobody asked its updates
    with throughput.apart("rewinding"), watch.phase("saving"):
        if job.writer:
            tell.save_failed(job.writer.wait(), job.log, job.console)
        ids = nonfinite.stop_or_rewind(met, run, job.train_step, job.data, config, job.device, job.log, job.console)
        state.reset(run, config)
        again = dataclasses.replace(config, resume="auto")
        at = state.restore(run, again, job.run_dir, job.what, job.log, job.console)
        at = nonfinite.recall_skipped(at, job.run_dir)
    if job.log:
        told = {"from": met.seen.step, "to": at.step, "skipped_steps": at.skipped_steps, "records": ids}
        job.log.event("rewind", **told, **unlogged)
    watch.beat(phase="start")  # what follows is compiled again
    # A new one, since the other applies no update any more.
    covered = Coverage(job.data.train.records, config.global_batch, at.step, at.coverage)
    return job._replace(train_step=_make_train_step(config, run, job.device), coverage=covered), at


def _batches(job: Job, steps: range) -> Iterator[pipeline.Batch]:
    data, threads = job.data, job.device.input_threads
    return pipeline.train_batches(data.train, job.config, data.label_base, steps, comm.rank(), comm.size(), threads)


def _update(job: Job, now: int, batch: pipeline.Batch) -> step.Sums:
    low, _ = order.slice_bounds(job.config.global_batch, comm.rank(), comm.size())
    lr = schedule.learning_rate(now, job.config, job.data.train.records)
    sums = job.train_step(*batch[:2], *step.arguments(job.config, now, low, lr))
    job.coverage.add(now * job.config.global_batch + low, batch.ids.numpy(), [(row.row, row.record) for row in batch.bad])
    return sums


def _skip(job: Job, now: int, batch: pipeline.Batch) -> step.Sums:
    """Leaves a step out: its records are told as skipped, those that are bad too."""
    low, _ = order.slice_bounds(job.config.global_batch, comm.rank(), comm.size())
    due = batch.ids.numpy()
    for row in batch.bad:
        due[row.row] = row.record
    job.coverage.skip(now * job.config.global_batch + low, due)
    return step.SKIPPED


def _account(job: Job, at: state.Position, met: List[Tuple[int, pipeline.BadRow]]) -> state.Position:
    """Returns where the run stands when the bad records `met`, of (step, row), are counted; they are no longer in `met`."""
    allowed, index = job.config.bad_records_allowed, job.data.train
    found = bad.account(met, at.bad_records, allowed, index, job.log, job.console)
    met.clear()
    return at._replace(bad_records=found)


def _settle(job: Job, at: state.Position) -> state.Position:
    """Returns where the run stands with what was trained on summed over ranks; tells the epochs that are complete."""
    for proved in job.coverage.settle(at.step, comm.gather):
        tell.covered(proved, job.data.train.records, job.log, job.console)
    return at._replace(coverage=job.coverage.state())


def _evaluate(job: Job, at: state.Position) -> Tuple[state.Position, evaluate.Evaluation, bool]:
    """Returns where the run stands then, the evaluation, and whether it is better than all before."""
    with job.throughput.apart("evaluation"), watch.phase("evaluation"):
        try:
            data, threads = job.data, job.device.input_threads
            result = evaluate.evaluate(
                job.eval_step, data.validation, job.config, data.label_base, threads, job.console, job.log
            )
        except watch.Stopped:
            _stop(job, at)
        tell.evaluation(result, at.step, job.epoch(at.step), job.log, job.console)
    improved = result.top1 > at.best_top1
    return at._replace(best_top1=max(at.best_top1, result.top1), evaluated=at.step), result, improved


def _save(job: Job, at: state.Position, best: bool) -> None:
    with job.throughput.apart("saving"), watch.phase("saving"):
        if job.writer:
            tell.save_failed(job.writer.wait(), job.log, job.console)
        at = _settle(job, at)._replace(seconds=time.monotonic() - job.began)
        state.save(job.run, at, job.what, job.writer, best)
        comm.gather(b"")  # else the others wait for rank 0's copy inside their next update


def _listen_every(throughput: Throughput, done: int, window: int) -> int:
    """Returns how many updates like the newest `window` of `done` take _LISTEN_SECONDS; all ranks call, and get the same.

    The first update of a start also compiles and is left out; 0 where there is no other.
    """
    updates = min(window, done - 1)
    seconds = comm.gather_numbers([throughput.last(updates).total]).max()
    return max(1, round(_LISTEN_SECONDS * updates / seconds)) if updates else 0


def _write_result(job: Job, at: state.Position, result: evaluate.Evaluation) -> Dict[str, Any]:
    with job.throughput.apart("saving"):
        seconds = time.monotonic() - job.began
        epoch = job.epoch(at.step)
        return tell.write_result(job.config, job.run_dir, result, job.throughput, at.step, epoch, seconds, job.log)


def _stop(job: Job, at: state.Position, saved: bool = False) -> NoReturn:
    """Ends a run that was asked to stop, with a checkpoint, if it is not `saved` yet; all ranks call at the same step."""
    if not saved:
        _save(job, at, False)
    with watch.phase("saving"):
        state.finish(job.writer)
    tell.stopped(job.config, at.step, job.run_dir, job.log)
    raise Failure(
        STOPPED,
        f"stopped on request after step {at.step} of {job.total}: the same command goes on from there",
        agreed=True,
    )


def _end(job: Job, at: state.Position, result: Optional[evaluate.Evaluation]) -> None:
    """Ends a run that is through, with the evaluation and the checkpoint it must have."""
    if result is None or at.evaluated < at.step:  # nothing was left to train
        scored = at.evaluated == at.step
        at, result, improved = _evaluate(job, at)
        if not scored:
            _save(job, at, improved)
    with watch.phase("saving"):
        state.finish(job.writer)
    measured = _write_result(job, at, result)
    seconds = time.monotonic() - job.began
    tell.summary(job.run_dir, result, measured, at.step, seconds, job.writer, job.log, job.console)
    comm.leave()


def evaluate_run(config: EvaluateConfig) -> None:
    """Evaluates a checkpoint of the run in --run_dir on the validation split; all ranks call."""
    score(config, [config.checkpoint])


class Score(NamedTuple):
    """What a checkpoint of `step` updates has scored, and the digest of the data."""

    step: int
    result: evaluate.Evaluation
    data_sha256: str


def score(config: Config, checkpoints: Sequence[str]) -> List[Score]:
    """Evaluates checkpoints of the run in --run_dir on the validation split, and prints each; all ranks call.

    checkpoints: `best`, `newest`, or paths.
    """
    device = comm.start(config.input_threads, hang_seconds=config.hang_seconds, precision=config.precision)
    console = Console(config.console, comm.is_root())
    _check_ranks(config)
    run_dir = Path(config.run_dir)
    index = open_split(config.data_dir, "validation", run_dir, console)
    scores = [_score(config, name, run_dir, index, device, console) for name in checkpoints]
    comm.leave()
    return scores


def _score(config: Config, name: str, run_dir: Path, index: records.Index, device: comm.Device, console: Console) -> Score:
    found = comm.together(lambda: _load_for_evaluation(name, run_dir) if comm.is_root() else None)
    meta = json.loads(comm.from_root(json.dumps(found.meta if found else None).encode()).decode())
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
    return Score(meta["step"], result, state.data_digest(index))


def _reached(job: Job, at: state.Position) -> bool:
    target = job.config.stop_at_top1
    return target > 0 and at.best_top1 >= target * job.data.validation.records


def _check_ranks(config: Config) -> None:
    flags = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
        if name not in ("data_dir", "run_dir", "console")  # a host may keep them elsewhere
    }
    comm.agree("the flags", flags)
    comm.agree("the software", comm.describe())
    comm.agree("the environment", comm.environment())


def _check_start(config: Config, run_dir: Path) -> Optional[IO[str]]:
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
    return lock.acquire(run_dir)


def _close_window(window: List[Tuple[int, step.Sums]], config: Config) -> Tuple[Dict[str, float], Optional[nonfinite.Seen]]:
    """Returns the means of the window's steps over all ranks; the one place where the loop waits for all ranks.

    Beside them is the first step that was not finite, if there is one: neither its update nor any after it was applied.
    """
    trained = [(now, sums) for now, sums in window if sums is not step.SKIPPED]
    local = np.array([[float(sums.loss), float(sums.gradient_norm), not sums.sound] for _, sums in trained]).reshape(-1, 3)
    # The norm is every rank's already; summing it too makes what follows from it the same everywhere, to the last bit.
    losses, norms, unsound = (comm.sum_over_ranks(local) / [config.global_batch, comm.size(), 1]).T
    seen = [nonfinite.Seen(now, *numbers) for (now, _), *numbers in zip(trained, losses.tolist(), norms.tolist())]
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
