"""Profiles of some updates: TensorFlow's, for TensorBoard, and Horovod's timeline, for chrome://tracing."""

import sys
from typing import Generator, Iterable, TypeVar

import tensorflow as tf

from hvd_vgg.config import TrainConfig, profiled_steps
from hvd_vgg.errors import NOT_WRITTEN, Failure
from hvd_vgg.parallel import comm
from hvd_vgg.parallel.consensus import run_on_all_ranks
from hvd_vgg.reporting.throughput import Throughput
from hvd_vgg.run_dir import RunDir
from hvd_vgg.streams import write_line
from hvd_vgg.watchdog import watchdog

T = TypeVar("T")


def profiled(batches: Iterable[T], steps: range, config: TrainConfig, throughput: Throughput) -> Generator[T, None, None]:
    """Yields what `batches` does, one for each of `steps`, and profiles --profile_steps; for all ranks.

    Leaves in --run_dir/profile `rankR/` of each of --profile_ranks, and `horovod_timeline.json` of rank 0, which alone can
    write one: it shows when each rank was ready to exchange. Raises a collective Failure(NOT_WRITTEN).
    """
    wanted = profiled_steps(config.profile_steps)
    chosen = range(max(steps.start, wanted.start), min(steps.stop, wanted.stop))
    run_dir = RunDir(config.run_dir)
    traces, running = comm.rank() in config.profile_ranks, False
    try:
        for now, batch in zip(steps, batches):
            if running and now == chosen[-1] + 1:
                running = False
                with throughput.exclude("profiling"), watchdog.phase("profiling"):
                    _end(traces)
                    comm.barrier()  # else the others wait for the slowest inside their next update
            if chosen and now == chosen[0]:
                with throughput.exclude("profiling"), watchdog.phase("profiling"):
                    run_on_all_ranks(lambda: _begin(run_dir, traces))
                running = True
            yield batch
    finally:
        if running:
            _end(traces)


def _begin(run_dir: RunDir, traces: bool) -> None:
    try:
        if traces:
            run_dir.trace(comm.rank()).mkdir(parents=True, exist_ok=True)
            tf.profiler.experimental.start(str(run_dir.trace(comm.rank())))
        if comm.is_root():
            run_dir.profile.mkdir(parents=True, exist_ok=True)
            comm.start_timeline(str(run_dir.horovod_timeline))
    except (OSError, tf.errors.OpError) as error:
        raise Failure(NOT_WRITTEN, f"--profile_steps: {run_dir.profile} cannot be written: {error}") from error


def _end(traces: bool) -> None:
    if comm.is_root():
        comm.stop_timeline()
    if traces:
        try:
            tf.profiler.experimental.stop()
        except (OSError, tf.errors.OpError) as error:  # no reason to lose a run
            write_line(f"hvd-vgg: --profile_steps: the profile of rank {comm.rank()} cannot be written: {error}", sys.stdout)
