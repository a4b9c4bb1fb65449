"""What a run is made of on this rank, and everything that the loop does beside computing updates."""

import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NoReturn, Optional, Sequence, Tuple

from hvd_vgg.config import BITS, TrainConfig
from hvd_vgg.data.coverage import Coverage, Update
from hvd_vgg.data.loader import Batch, train_batches
from hvd_vgg.data.sampler import part_bounds
from hvd_vgg.errors import STOPPED, Failure
from hvd_vgg.parallel import comm
from hvd_vgg.parallel.consensus import check_replicas, run_on_all_ranks, run_on_root
from hvd_vgg.reporting.throughput import Throughput
from hvd_vgg.run_dir import RunDir
from hvd_vgg.training import checkpoint
from hvd_vgg.training.bad_records import count_bad_records
from hvd_vgg.training.checkpoint_copy import open_copy_dir
from hvd_vgg.training.checkpoint_writer import CheckpointWriter
from hvd_vgg.training.dataset import open_data
from hvd_vgg.training.evaluate import evaluate, make_eval_step, report_evaluation
from hvd_vgg.training.init_from import resolve_source
from hvd_vgg.training.introduction import introduce
from hvd_vgg.training.metrics import PendingUpdate, measure_window, reduce_metrics
from hvd_vgg.training.pictures import show_end
from hvd_vgg.training.predictions import write_details
from hvd_vgg.training.profile import profiled
from hvd_vgg.training.reference_curve import warn_if_far_below, with_reference
from hvd_vgg.training.reporter import OnLog, open_reporter
from hvd_vgg.training.reproducibility import check_bits, describe_arithmetic
from hvd_vgg.training.result import finish_log, write_result, write_run_files
from hvd_vgg.training.resume import require_checkpoints, restore_state
from hvd_vgg.training.schedule import learning_rate, make_cadence, stop_poll_steps, total_steps
from hvd_vgg.training.startup import claim_run_dir, join_ranks, require_hosts
from hvd_vgg.training.state import initial_state, make_checksums, run_fingerprint, save_state, state_sha256
from hvd_vgg.training.train_step import StepMetrics, make_local_sums, make_train_step, step_inputs
from hvd_vgg.watchdog import MIN_HANG_SECONDS, SLOW_PHASE_FACTOR, StopRequested, watchdog


class Trainer:
    """A run: its data, state, compiled functions, progress, and what it reports and saves.

    Collective: all methods but `batches`, `load`, `update` (which communicates only within the update), `end_update`,
    `epoch`, `target_reached` and `evaluation_missed`.
    """

    def __init__(self, config: TrainConfig, on_log: Optional[OnLog] = None) -> None:
        """Joins the ranks, opens the data, restores the newest checkpoint. Collective; raises collective Failures."""
        self.device, console, _ = join_ranks(config, timeline=bool(config.profile_steps))
        require_hosts(config.expect_hosts)
        watchdog.save_when_asked()  # now: joining may have set other handlers
        self.lock = run_on_all_ranks(lambda: claim_run_dir(config))
        config, source = resolve_source(config)
        self.config = config
        self.reporter = open_reporter(config, console, on_log)
        self.data = open_data(config, Path(config.run_dir), console)
        self.total_steps = total_steps(config, self.data.train.records)
        self.arithmetic = describe_arithmetic(self.device, config.resize)
        self.low, _ = part_bounds(config, comm.rank(), comm.size())  # of this rank's part of a global batch
        self.state = initial_state(config)
        self.fingerprint = {**run_fingerprint(config, self.data.train, self.data.label_base), **source}
        self.copy = run_on_root(lambda: open_copy_dir(config.checkpoint_copy_dir, self.reporter))
        run_dir, reporter = RunDir(config.run_dir), self.reporter
        self.writer = CheckpointWriter(run_dir, config.keep_checkpoints, reporter.event, self.copy, reporter.say)
        # Half of what the watchdog allows a save: the most that the end of the run waits for the last copy.
        self.copy_seconds = SLOW_PHASE_FACTOR * (config.hang_seconds or MIN_HANG_SECONDS) / 2
        run_on_root(lambda: require_checkpoints(config, self.copy))
        self.restore()
        introduce(
            config, self.data, self.device, self.arithmetic, self.factored, self.total_steps, self.progress, self.reporter
        )
        self.started = time.monotonic() - self.progress.seconds
        self.eval_step = make_eval_step(self.state.network(), config, self.device.data_format)
        average = self.state.averaged_network()
        self.average_step = make_eval_step(average, config, self.device.data_format) if average else None
        if config.reproducible == BITS:
            check_bits(self.local_sums, self.eval_step, self.state, config, self.device)
        self.checked = {**self.state.network(), **self.state.averages}  # across ranks
        self.checksums = make_checksums(self.checked)
        self.saved_at = watchdog.active_seconds()  # the newest checkpoint, or the start of this process
        self.suspended = watchdog.stopped_seconds()  # seconds, as the log has them
        self.throughput = Throughput()  # last: its clock starts now, and the first update is to have nothing of the above

    def restore(self) -> None:
        """Brings the state to the newest checkpoint, if any, and prepares to train from there. Collective."""
        config, records = self.config, self.data.train.records
        found = restore_state(self.state, config, self.fingerprint, self.arithmetic, self.reporter, self.copy)
        self.progress, self.factored = found
        step = self.progress.step
        self.result: Any = None  # the newest Evaluation of this process
        self.cadence = make_cadence(config, records, step)
        self.coverage = Coverage(records, config.global_batch, step, self.progress.coverage)
        self.bar = self.reporter.console.progress("training", self.total_steps, "steps", step)
        self.window: List[PendingUpdate] = []  # since the last log line
        network = (self.state, config, self.device, self.factored)
        self.local_sums = make_local_sums(*network)
        self.train_step: Callable[..., StepMetrics] = make_train_step(*network, local_sums=self.local_sums)

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, kind: Any, error: Optional[BaseException], trace: Any) -> None:
        self.reporter.console.clear()
        if isinstance(error, Failure) and error.collective:
            # All ranks will leave, and the launcher would kill whoever is still writing.
            self.writer.wait(self.copy_seconds)

    def epoch(self) -> float:
        """Returns the epochs trained so far, as a fraction."""
        return self.progress.step * self.config.global_batch / self.data.train.records

    def target_reached(self) -> bool:
        """Returns whether an evaluation has reached --stop_at_top1."""
        target = self.config.stop_at_top1
        return target > 0 and self.progress.best_top1 >= target * self.data.validation.records

    def evaluation_missed(self) -> bool:
        """Returns whether this step is still to be evaluated: the run was stopped before that, or is to end here."""
        step = self.progress.step
        ends = step >= self.total_steps or self.target_reached()
        return self.progress.evaluated < step and (ends or step in self.cadence.evaluation_steps)

    def batches(self) -> Iterator[Tuple[int, Batch]]:
        """Yields each step to come with this rank's part of its global batch.

        With the last reference to the iterator its threads end, and a profile in progress.
        """
        first = self.progress.step
        steps = range(first, first if self.target_reached() else self.total_steps)
        return zip(steps, profiled(self.throughput.timed(self.load(steps)), steps, self.config, self.throughput))

    def load(self, steps: range) -> Iterator[Batch]:
        """Yields this rank's part of the global batch of each of `steps`."""
        data, threads = self.data, self.device.input_threads
        return train_batches(data.train, self.config, data.label_base, steps, comm.rank(), comm.size(), threads)

    def update(self, step: int, batch: Batch) -> None:
        """Makes one update, or skips its records if --on_nonfinite=rewind says so; waits for nothing."""
        metrics = None
        if step not in self.progress.skipped_steps:
            inputs = step_inputs(self.config, step, self.low, learning_rate(step, self.config, self.data.train.records))
            metrics = self.train_step(batch.images, batch.labels, *inputs)
        self.window.append(PendingUpdate(step, metrics, batch.ids, batch.bad))
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
        config, progress, train = self.config, self.progress, self.data.train
        try:
            row = reduce_metrics(self.window, config)
        finally:
            self.throughput.end_update()
        bad_rows = [(update.step, row) for update in self.window if update.metrics for row in update.bad]
        allowed = config.bad_records_allowed
        progress.bad_records = count_bad_records(bad_rows, progress.bad_records, allowed, train, self.reporter)
        self.coverage.add(
            Update(step * config.global_batch + self.low, ids.numpy(), [(row.row, row.record) for row in bad], not metrics)
            for step, metrics, ids, bad in self.window
        )
        row["train.lr"] = learning_rate(progress.step - 1, config, train.records)
        speed, bottleneck, seconds = measure_window(self.window, self.throughput, config.global_batch)
        self.cadence = self.cadence._replace(stop_poll_steps=stop_poll_steps(seconds))
        self.window.clear()
        self._log_suspension()
        if self.coverage.ended(progress.step):
            self._settle_coverage()
        if progress.step <= self.cadence.first_log_step:  # the estimate excludes compilation
            self.bar.restart(progress.step)
        self.reporter.training({**row, **speed}, bottleneck, progress.step, self.total_steps, self.epoch(), self.bar)
        self.reporter.save_failed(self.writer.failure())

    def _log_suspension(self) -> None:
        seconds = watchdog.stopped_seconds() - self.suspended
        if seconds > 0.5:  # more than two clocks differ
            self.suspended += seconds
            self.reporter.event("suspended", step=self.progress.step, seconds=round(seconds, 3))

    def save_overdue(self) -> bool:
        """Returns whether --save_every_minutes have passed since the newest checkpoint by rank 0's clock; equal on all."""
        minutes = self.config.save_every_minutes
        return minutes > 0 and bool(comm.broadcast_json(watchdog.active_seconds() - self.saved_at >= 60 * minutes))

    def _settle_coverage(self) -> None:
        for covered in self.coverage.settle(self.progress.step, comm.gather_json):
            self.reporter.coverage(covered, self.data.train.records)
        self.progress.coverage = self.coverage.state()

    def check_replicas(self) -> None:
        """Raises a collective Failure(NOT_FINITE) if the ranks' weights differ in any bit; see --drift_every_steps."""
        if self.config.drift_every_steps:
            check_replicas(list(self.checked), self.checksums().numpy(), self.progress.step - 1)

    def evaluate(self) -> List[str]:
        """Evaluates the weights and their average; returns which are better than all before, as `save` takes them.

        Stops instead if asked to.
        """
        config, data, progress = self.config, self.data, self.progress
        try:
            with self.throughput.exclude("evaluation"), watchdog.phase("evaluation"):
                inputs = data.validation, config, data.label_base, self.device, self.reporter
                result = evaluate(self.eval_step, *inputs)
                improved = [checkpoint.BEST] if result.top1 > progress.best_top1 else []
                if self.average_step:
                    result = result._replace(average=evaluate(self.average_step, *inputs))
                    improved += [checkpoint.BEST_AVERAGE] if result.average.top1 > progress.best_average_top1 else []
                    progress.best_average_top1 = max(result.average.top1, progress.best_average_top1)
                self._log_suspension()
                progress.best_top1, progress.evaluated = max(result.top1, progress.best_top1), progress.step
                digest = run_on_root(lambda: state_sha256(self.state, progress))  # as a checkpoint saved now has it
                self.result = with_reference(result._replace(state_sha256=digest or ""), config, progress.step, self.epoch())
                report_evaluation(self.result, progress.step, self.epoch(), self.reporter)
                run_on_root(lambda: warn_if_far_below(self.result, config, progress.step, self.epoch(), self.reporter))
        except StopRequested:
            self.save()
            self.stop()
        return improved

    def save(self, best: Sequence[str] = ()) -> None:
        """Starts writing a checkpoint in the background; best: of what it is the best, as for `checkpoint.save`."""
        with self.throughput.exclude("saving"), watchdog.phase("saving"):
            self.reporter.save_failed(self.writer.wait())
            self._settle_coverage()
            self.progress.seconds = time.monotonic() - self.started
            kept: Dict[str, Any] = {"run": self.fingerprint, "arithmetic": self.arithmetic}
            kept.update(data_format=self.data.train.layout.kind, eval_crop=self.config.eval_crop)
            save_state(self.state, self.progress, kept, self.writer, best)
            self.saved_at = watchdog.active_seconds()
            comm.barrier()  # else the others wait for rank 0's copy inside their next update

    def write_result(self, required: bool = False) -> Any:
        """Writes result.json of the newest evaluation, and returns the throughput in it; failing matters if `required`."""
        self.progress.seconds = time.monotonic() - self.started
        try:
            with self.throughput.exclude("saving"):
                return write_result(self.config, self.result, self.throughput, self.progress, self.epoch(), self.reporter)
        except Failure as failure:
            if required:
                raise
            self.reporter.save_failed(failure)

    def stop(self) -> NoReturn:
        """Ends a run that was asked to stop and is saved; raises a collective Failure(STOPPED)."""
        step = self.progress.step
        with watchdog.phase("saving"):
            self.writer.finish(self.copy_seconds)
        self.reporter.event("stopped", step=step)
        run_on_root(lambda: write_run_files(self.config))
        text = f"stopped on request after step {step} of {self.total_steps}: the same command continues from there"
        raise Failure(STOPPED, text, collective=True)

    def finish(self) -> None:
        """Ends a run that is complete, with the evaluation, checkpoint, result and summary that it must have."""
        if self.target_reached() and self.progress.step < self.total_steps:
            self.reporter.say(f"acc@1 has reached --stop_at_top1={self.config.stop_at_top1}")
        if self.result is None:  # it was complete before this process began
            self.evaluate()
        with watchdog.phase("saving"):
            self.writer.finish(self.copy_seconds)
        measured = self.write_result(required=True)
        found = write_details(self.config, self.result, self.data.validation, self.data.label_base, self.reporter.console)
        run_on_root(lambda: show_end(found.pairs, found.counts[:, 0], self.progress.step, self.reporter))
        finish_log(self.config, self.result, measured, self.progress, self.writer, self.reporter)
        comm.shutdown()
