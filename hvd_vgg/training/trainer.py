"""What a run is made of on this rank, and everything that the loop does beside computing updates."""

import dataclasses
import os
import time
from pathlib import Path
from typing import IO, Any, Callable, Generator, Iterator, List, NoReturn, Optional, Tuple

from hvd_vgg.config import TrainConfig
from hvd_vgg.data.coverage import Coverage
from hvd_vgg.data.loader import BadRow, Batch, train_batches
from hvd_vgg.data.sampler import slice_bounds
from hvd_vgg.errors import CONFIGURATION, STOPPED, USAGE, Failure
from hvd_vgg.parallel import comm, cost
from hvd_vgg.parallel.consensus import check_replicas, run_on_all_ranks, run_on_root
from hvd_vgg.reporting.throughput import Throughput
from hvd_vgg.run_dir import RunDir, lock_run_dir
from hvd_vgg.training.bad_records import count_bad_records
from hvd_vgg.training.checkpoint_writer import CheckpointWriter
from hvd_vgg.training.dataset import open_data
from hvd_vgg.training.evaluate import Evaluation, evaluate, make_eval_step
from hvd_vgg.training.introduction import introduce
from hvd_vgg.training.kept_step import read_skipped_steps
from hvd_vgg.training.metrics import NonFiniteStep, PendingUpdates, measure_run, measure_window, reduce_metrics
from hvd_vgg.training.profile import profiled
from hvd_vgg.training.reporter import open_reporter
from hvd_vgg.training.result import finish_log, write_result, write_run_files
from hvd_vgg.training.resume import restore_state
from hvd_vgg.training.rewind import stop_or_skip
from hvd_vgg.training.schedule import learning_rate, make_cadence, stop_poll_steps, total_steps
from hvd_vgg.training.startup import join_ranks
from hvd_vgg.training.state import (
    TrainProgress,
    finish_save,
    initial_state,
    make_checksums,
    reset_state,
    run_fingerprint,
    save_state,
)
from hvd_vgg.training.train_step import SKIPPED_STEP, StepMetrics, make_train_step, step_inputs
from hvd_vgg.watchdog import StopRequested, watchdog


class Trainer:
    """A run: its data, state, compiled functions, progress, and what it reports and saves.

    Collective: all methods but `batches`, `update` (which communicates only within the update), `end_update`, `epoch`,
    `target_reached` and `evaluation_missed`.
    """

    def __init__(self, config: TrainConfig) -> None:
        """Joins the ranks, opens the data, restores the newest checkpoint. Collective; raises collective Failures."""
        self.config = config
        self.device, console, _ = join_ranks(config, timeline=bool(config.profile_steps))
        watchdog.save_when_asked()  # now: joining may have set other handlers
        self.lock = run_on_all_ranks(lambda: _claim_run_dir(config))
        self.reporter = open_reporter(config, console)
        self.data = open_data(config, Path(config.run_dir), console)
        self.total_steps = total_steps(config, self.data.train.records)
        self.state = initial_state(config)
        self.fingerprint = run_fingerprint(config, self.data.train, self.data.label_base)
        self.writer: Optional[CheckpointWriter] = None
        if self.reporter.log:
            self.writer = CheckpointWriter(RunDir(config.run_dir), config.keep_checkpoints, self.reporter.event)
        self.stream: Optional[Generator[Batch, None, None]] = None
        self._restore(config.resume)
        introduce(config, self.data, self.device, self.total_steps, self.progress, self.reporter)
        self.started = time.monotonic() - self.progress.seconds
        self.eval_step = make_eval_step(self.state.weights, config, self.device.data_format)
        self.checksums = make_checksums(self.state.weights)
        self.throughput = Throughput()  # last: its clock starts now, and the first update is to have nothing of the above

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, kind: Any, error: Optional[BaseException], trace: Any) -> None:
        if isinstance(error, Failure) and error.collective:
            self._close_stream()
            if self.writer:
                self.writer.wait()  # all ranks will leave, and the launcher would kill whoever is still writing

    def _restore(self, resume: str) -> None:
        """Brings the state to the newest checkpoint, as --resume says, and prepares to train from there. Collective."""
        config, records = self.config, self.data.train.records
        self.progress: TrainProgress = restore_state(
            self.state, dataclasses.replace(config, resume=resume), RunDir(config.run_dir), self.fingerprint, self.reporter
        )
        self.result: Optional[Evaluation] = None
        self.saved_step = -1
        # A checkpoint knows the steps skipped before it; a later one, which it was itself rewound to, is kept beside it.
        skipped = comm.broadcast_json(run_on_root(lambda: read_skipped_steps(RunDir(config.run_dir))))
        self.progress.skipped_steps = sorted({*self.progress.skipped_steps, *skipped})
        self.cadence = make_cadence(config, records, self.progress.step)
        self.coverage = Coverage(records, config.global_batch, self.progress.step, self.progress.coverage)
        self.bar = self.reporter.console.progress("training", self.total_steps, "steps", self.progress.step)
        self.window: PendingUpdates = []
        self.bad_rows: List[Tuple[int, BadRow]] = []
        factored = cost.factored_layers(config, comm.size())
        self.train_step: Callable[..., StepMetrics] = make_train_step(
            self.state.weights, self.state.slots, config, self.device.data_format, factored
        )
        self.part = slice_bounds(config.global_batch, comm.rank(), comm.size())  # of the global batch, this rank's

    def epoch(self) -> float:
        """Returns the epochs trained so far, as a fraction."""
        return self.progress.step * self.config.global_batch / self.data.train.records

    def target_reached(self) -> bool:
        """Returns whether an evaluation has reached --stop_at_top1."""
        target = self.config.stop_at_top1
        return target > 0 and self.progress.best_top1 >= target * self.data.validation.records

    def evaluation_missed(self) -> bool:
        """Returns whether the evaluation due at this step was missed, since the run was stopped before it."""
        return self.progress.step in self.cadence.evaluation_steps and self.progress.evaluated < self.progress.step

    def batches(self) -> Iterator[Tuple[int, Batch]]:
        """Yields each step to come with this rank's part of its global batch."""
        first = self.progress.step
        steps = range(first, first if self.target_reached() else self.total_steps)
        source = train_batches(
            self.data.train,
            self.config,
            self.data.label_base,
            steps,
            comm.rank(),
            comm.size(),
            self.device.input_threads,
        )
        self.stream = profiled(self.throughput.timed(source), steps, self.config, self.throughput)
        return zip(steps, self.stream)

    def _close_stream(self) -> None:
        """Ends the threads that decode batches which nobody will take, and a profile in progress."""
        if self.stream:
            self.stream.close()

    def update(self, step: int, batch: Batch) -> None:
        """Makes one update, or skips its records if --on_nonfinite=rewind says so; waits for nothing."""
        config, low = self.config, self.part[0]
        position = step * config.global_batch + low
        if step in self.progress.skipped_steps:
            ids = batch.ids.numpy()
            for row in batch.bad:  # a bad record counts as skipped itself, not the one in its place
                ids[row.row] = row.record
            self.coverage.skip(position, ids)
            self.window.append((step, SKIPPED_STEP))
        else:
            inputs = step_inputs(config, step, low, learning_rate(step, config, self.data.train.records))
            self.window.append((step, self.train_step(batch.images, batch.labels, *inputs)))
            self.coverage.add(position, batch.ids.numpy(), [(row.row, row.record) for row in batch.bad])
            self.bad_rows += [(step, row) for row in batch.bad]
        self.progress.step = step + 1
        watchdog.heartbeat(step + 1)
        if step == self.cadence.first_step:
            self.reporter.event("first_update", step=step)

    def end_update(self) -> None:
        """Ends the timing of an update after which nothing is due."""
        self.throughput.end_update()
        self.bar.update(self.progress.step)

    def any_stop_requested(self) -> bool:
        """Returns whether any rank was asked to stop; equal on all."""
        return comm.any_rank(watchdog.stop_requested())

    def log_metrics(self) -> None:
        """Sums the metrics since the last log line over all ranks, and reports them; waits for the device and all ranks.

        Raises NonFiniteStep on all ranks if one of these updates was not finite.
        """
        config, progress = self.config, self.progress
        row, nonfinite = reduce_metrics(self.window, config)
        self.throughput.end_update()
        if nonfinite:
            raise nonfinite[0]
        progress.bad_records = count_bad_records(
            self.bad_rows,
            progress.bad_records,
            config.bad_records_allowed,
            self.data.train,
            self.reporter.log,
            self.reporter.console,
        )
        self.bad_rows.clear()
        row["train.lr"] = learning_rate(progress.step - 1, config, self.data.train.records)
        speed, bottleneck = measure_window(self.window, self.throughput, config.global_batch)
        self._set_stop_poll(len(self.window))
        self.window.clear()
        if self.coverage.ended(progress.step):
            self._settle_coverage()
        if progress.step <= self.cadence.first_log_step:  # the estimate excludes compilation
            self.bar.restart(progress.step)
        self.reporter.training({**row, **speed}, bottleneck, progress.step, self.total_steps, self.epoch(), self.bar)
        self.reporter.save_failed(self.writer.failure() if self.writer else None)

    def _set_stop_poll(self, updates: int) -> None:
        """Sets how often to poll for stop requests, by the newest `updates`; the first, which compiles, is left out."""
        updates = min(updates, self.progress.step - self.cadence.first_step - 1)
        seconds = comm.gather_numbers([self.throughput.last(updates).total]).max()
        if updates:
            self.cadence = self.cadence._replace(stop_poll_steps=stop_poll_steps(updates, seconds))

    def _settle_coverage(self) -> None:
        for covered in self.coverage.settle(self.progress.step, comm.gather_json):
            self.reporter.coverage(covered, self.data.train.records)
        self.progress.coverage = self.coverage.state()

    def check_replicas(self) -> None:
        """Raises a collective Failure(NOT_FINITE) unless all ranks' weights are equal in every bit; see --drift_every_steps."""
        if self.config.drift_every_steps:
            check_replicas(list(self.state.weights), self.checksums().numpy(), self.progress.step - 1)

    def evaluate(self) -> bool:
        """Evaluates the weights; returns whether they are better than all before. Stops instead if asked to."""
        progress = self.progress
        with self.throughput.exclude("evaluation"), watchdog.phase("evaluation"):
            try:
                self.result = evaluate(
                    self.eval_step,
                    self.data.validation,
                    self.config,
                    self.data.label_base,
                    self.device.input_threads,
                    self.reporter.console,
                    self.reporter.log,
                )
            except StopRequested:
                self.stop()
            self.reporter.evaluation(self.result, progress.step, self.epoch())
        improved = self.result.top1 > progress.best_top1
        progress.best_top1, progress.evaluated = max(progress.best_top1, self.result.top1), progress.step
        return improved

    def save(self, best: bool = False) -> None:
        """Starts writing a checkpoint in the background; best: and marks it as the best."""
        with self.throughput.exclude("saving"), watchdog.phase("saving"):
            if self.writer:
                self.reporter.save_failed(self.writer.wait())
            self._settle_coverage()
            self.progress.seconds = time.monotonic() - self.started
            save_state(self.state, self.progress, self.fingerprint, self.writer, best)
            self.saved_step = self.progress.step
            comm.barrier()  # else the others wait for rank 0's copy inside their next update

    def write_result(self) -> None:
        """Writes result.json of the last evaluation; only the last one of a run must succeed."""
        try:
            with self.throughput.exclude("saving"):
                self._write_result()
        except Failure as failure:
            self.reporter.save_failed(failure)

    def _write_result(self) -> Any:
        assert self.result is not None  # noqa: S101
        measured = measure_run(self.throughput, self.config, self.config.device_tflops)
        updates = len(self.throughput.total_seconds)
        seconds = time.monotonic() - self.started
        write_result(self.config, self.result, measured, updates, self.progress.step, self.epoch(), seconds, self.reporter)
        return measured

    def stop(self) -> NoReturn:
        """Ends a run that was asked to stop, with a checkpoint; raises a collective Failure(STOPPED)."""
        self._close_stream()
        step = self.progress.step
        if self.saved_step != step:
            self.save()
        with watchdog.phase("saving"):
            finish_save(self.writer)
        self.reporter.event("stopped", step=step)
        run_on_root(lambda: write_run_files(self.config))
        raise Failure(
            STOPPED,
            f"stopped on request after step {step} of {self.total_steps}: the same command continues from there",
            collective=True,
        )

    def rewind_or_stop(self, error: NonFiniteStep) -> None:
        """Returns to the newest checkpoint, to skip the step that was not finite, or raises a Failure that ends the run."""
        config, throughput = self.config, self.throughput
        self._close_stream()
        known = len(throughput.exchange_seconds)
        unlogged = {
            "update_seconds": throughput.total_seconds[known:],
            "input_seconds": throughput.input_seconds[known:],
        }
        throughput.exchange_seconds += [0.0] * len(unlogged["update_seconds"])  # never read from these updates
        with throughput.exclude("rewinding"), watchdog.phase("saving"):
            if self.writer:
                self.reporter.save_failed(self.writer.wait())
            ids = stop_or_skip(
                error,
                self.progress.skipped_steps,
                self.state,
                self.train_step,
                self.data,
                config,
                self.device,
                self.reporter,
            )
            reset_state(self.state, config)
            self._restore("auto")  # with another train step, since this one applies no update any more
        skipped = self.progress.skipped_steps
        steps = {"from": error.step, "to": self.progress.step, "skipped_steps": skipped, "records": ids}
        self.reporter.event("rewind", **steps, **unlogged)
        watchdog.heartbeat(phase="start")  # what follows is compiled again

    def finish(self) -> None:
        """Ends a run that is complete, with the evaluation, checkpoint, result and summary that it must have."""
        self._close_stream()
        if self.target_reached() and self.progress.step < self.total_steps:
            self.reporter.say(f"acc@1 has reached --stop_at_top1={self.config.stop_at_top1}")
        if self.result is None or self.progress.evaluated < self.progress.step:  # nothing was left to train
            scored = self.progress.evaluated == self.progress.step
            improved = self.evaluate()
            if not scored:
                self.save(best=improved)
        with watchdog.phase("saving"):
            finish_save(self.writer)
        assert self.result is not None  # noqa: S101
        measured = self._write_result()
        seconds = time.monotonic() - self.started
        finish_log(self.config, self.result, measured, self.progress.step, seconds, self.writer, self.reporter)
        comm.shutdown()


def _claim_run_dir(config: TrainConfig) -> Optional[IO[str]]:
    """Returns the run directory's lock on rank 0; raises Failure where this number of ranks cannot run."""
    if config.global_batch < comm.size():
        raise Failure(
            USAGE, f"--global_batch={config.global_batch} has fewer images than the {comm.size()} ranks: start fewer"
        )
    if config.profile_steps and max(config.profile_ranks, default=0) >= comm.size():
        raise Failure(USAGE, f"--profile_ranks: expected numbers below {comm.size()}, the number of ranks")
    if not comm.is_root():
        return None
    run_dir = Path(config.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(run_dir, os.W_OK | os.X_OK):
            raise PermissionError(13, "no permission to write")
    except OSError as error:
        raise Failure(CONFIGURATION, f"--run_dir={run_dir} cannot be created or written: {error.strerror}") from error
    return lock_run_dir(run_dir)
