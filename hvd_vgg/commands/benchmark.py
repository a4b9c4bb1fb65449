"""The `benchmark` command: images/s of training with no input, with input from the host, and with the real pipeline."""

import dataclasses
import errno
import functools
import itertools
import json
import os
import socket
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Optional

import numpy as np
import tensorflow as tf

from hvd_vgg.config import BatchConfig, BenchmarkConfig
from hvd_vgg.data.loader import train_batches
from hvd_vgg.data.sampler import slice_bounds
from hvd_vgg.data.transforms import IMAGE_LIBRARY
from hvd_vgg.doctor.driver import find_accelerators
from hvd_vgg.doctor.packages import this_host
from hvd_vgg.doctor.system import probe_file, processor_name
from hvd_vgg.errors import CONFIGURATION, NOT_FINITE, NOT_WRITTEN, USAGE, Failure
from hvd_vgg.parallel import comm, cost
from hvd_vgg.parallel.consensus import require_equal, run_on_all_ranks
from hvd_vgg.parallel.init import Device, describe_software, start
from hvd_vgg.reporting.console import Console
from hvd_vgg.reporting.throughput import Throughput
from hvd_vgg.run_dir import atomic_write_text, write_error
from hvd_vgg.text import plural
from hvd_vgg.train.dataset import Splits, open_data
from hvd_vgg.train.reporter import speed
from hvd_vgg.train.state import initial_state
from hvd_vgg.train.train_step import make_train_step, step_inputs

_UPDATES = 30
# Weights that hardly move stay as they were drawn, however long a row is; the time of an update does not depend on them.
_LR_SHARE = 1e-3
# Ranks that only wait for a row are told this often that it goes on. It is seen in no update, and 1 ms or two.
_TELL_SECONDS = 2.0


def benchmark(config: BenchmarkConfig) -> None:
    """Measures each kind of input on each number of --ranks, prints a table and writes --out; all ranks call."""
    wanted = sorted({int(number) for number in config.ranks})
    here = _hardware()
    device = start(config.input_threads, subsets=wanted, hang_seconds=config.hang_seconds, precision=config.precision)
    console = Console(config.console, comm.is_root())
    started = comm.size()
    require_equal("the flags", {**dataclasses.asdict(config), "data_dir": "", "run_dir": "", "console": ""})
    if wanted and wanted[-1] > started:
        fix = f"hvd-vgg launch --ranks={wanted[-1]} benchmark --ranks={','.join(map(str, wanted))} ..."
        text = f"--ranks={wanted[-1]}: expected at most the {plural(started, 'rank')} started: {fix}"
        raise Failure(USAGE, text, collective=True)
    run_on_all_ranks(lambda: _check_out(config))
    per_rank = max(1, config.global_batch // started)
    data = None
    if all(comm.gather_numbers([float(Path(config.data_dir).is_dir())])):
        data = open_data(config, Path(config.run_dir), console)
    else:
        console.say(f"no real data: --data_dir={config.data_dir} is not there")
    hosts = _all_hardware(here, device)
    name = hosts[0]["gpu"] or hosts[0]["cpu"] or "unknown"
    updates = config.steps or _UPDATES
    console.say(
        f"{config.model} at width {config.width:g}, {config.image_size} pixels, {per_rank} images a rank and update, "
        f"{config.precision}, on {device.kind} ({name}); {updates} updates a row, "
        f"{plural(updates * per_rank, 'image')} a rank"
    )
    peak = f" {'of peak':>8s}" if config.device_tflops else ""
    console.say(
        f"{'ranks':>5s}  {'input':12s} {'images/s':>9s} {'deviation':>9s} {'a rank':>9s} {'efficiency':>10s} "
        f"{'TFLOP/s a rank':>14s}{peak}  held back by"
    )
    found: List[Dict[str, Any]] = []
    for number in wanted or [started]:
        own = dataclasses.replace(config, global_batch=per_rank * number)
        comm.subgroup(number, functools.partial(_measure, own, device, data, found, console))
    _write(config, device, hosts, found)
    comm.shutdown()


def _measure(
    config: BenchmarkConfig, device: Device, data: Optional[Splits], found: List[Dict[str, Any]], console: Console
) -> None:
    """Adds a row to `found` for each kind of input, measured on the ranks there are; in it are those of fewer ranks.

    Raises a collective Failure(NOT_FINITE) where an update is not applied: it would take less time than one that is.
    """
    run = initial_state(config)
    factored = [choice.layer for choice in cost.choose(config, comm.size()) if choice.way == "factored"]
    train_step = make_train_step(run.weights, run.slots, config, device.data_format, factored)
    for kind in ("device", "host", "real"):
        if kind == "real" and data is None:
            continue
        throughput, tell_at = Throughput(), 0
        throughput.excluded_seconds["reporting"] = 0.0
        progress = console.progress(f"{plural(comm.size(), 'rank')}, {kind}", config.steps or _UPDATES, "updates")
        for now, batch in enumerate(throughput.timed(_batches(kind, config, device, data))):
            low, _ = slice_bounds(config.global_batch, comm.rank(), comm.size())
            sums = train_step(*batch[:2], *step_inputs(config, now, low, config.lr * _LR_SHARE))
            throughput.exchange_seconds.append(float(sums.exchange_seconds))
            throughput.end_update()
            progress.update(now + 1)
            if not sums.sound:  # the same on all ranks
                raise Failure(
                    NOT_FINITE,
                    f"update {now + 1} on {plural(comm.size(), 'rank')}, input {kind}: the loss or gradient is not finite, "
                    f"and updates that are not applied measure nothing: lower --lr={config.lr:g}, of which "
                    f"{_LR_SHARE:g} is used here, or try --precision=float32",
                    collective=True,
                )
            if now >= tell_at:
                with throughput.exclude("reporting"):
                    tell_at = now + _get_on(throughput)
        row = {"ranks": comm.size(), "input": kind, **speed(throughput, config)}
        first = next((old for old in found if old["input"] == kind), row)
        row["efficiency"] = row["fps"] / row["ranks"] / (first["fps"] / first["ranks"])
        found.append(row)
        peak = f" {row['share_of_peak']:8.1%}" if config.device_tflops else ""
        console.say(
            f"{row['ranks']:5d}  {kind:12s} {row['fps']:9.1f} {row['fps_standard_deviation']:9.1f} "
            f"{row['fps'] / row['ranks']:9.1f} {row['efficiency']:10.1%} "
            f"{row['tflops_per_rank']:14.3g}{peak}  {row['bottleneck']}"
            + (f" of rank {row['slow_rank']}" if row["slow_rank"] is not None else "")
        )


def _get_on(throughput: Throughput) -> int:
    """Tells the ranks that wait that these get on; returns after how many updates they are to hear it again."""
    comm.keep_alive()
    slowest = float(comm.gather_numbers([throughput.total_seconds[-1]]).max())
    return max(1, round(_TELL_SECONDS / slowest))


def _batches(kind: str, config: BatchConfig, device: Device, data: Optional[Splits]) -> Iterable[Any]:
    """Returns the batches of this rank: the same tensors again, the same arrays copied each time, or the pipeline's."""
    steps = range(config.steps or _UPDATES)
    if kind == "real" and data is not None:
        return train_batches(data.train, config, data.label_base, steps, comm.rank(), comm.size(), device.input_threads)
    low, high = slice_bounds(config.global_batch, comm.rank(), comm.size())
    random = np.random.default_rng(config.seed)
    images = random.integers(0, 256, (high - low, config.image_size, config.image_size, 3), np.uint8)
    labels = random.integers(0, config.num_classes, high - low).astype(np.int32)
    if kind == "device":
        return itertools.repeat((tf.identity(tf.constant(images)), tf.constant(labels)), len(steps))
    return _copied(images, labels, len(steps))


def _copied(images: np.ndarray, labels: np.ndarray, times: int) -> Iterator[Any]:
    for _ in range(times):
        yield tf.constant(images), tf.constant(labels)


def _hardware() -> Dict[str, Any]:
    """Returns this host's name, processor and driver; before MPI begins, for the vendor's tool is a process of its own."""
    host = this_host()
    listing = find_accelerators(host).listing
    return {
        "host": socket.gethostname(),
        "cpu": processor_name(host.root),
        "cores": os.cpu_count(),
        "driver": listing.driver if listing else "",
    }


def _all_hardware(here: Dict[str, Any], device: Device) -> List[Dict[str, Any]]:
    """Returns `here` of each host with the name of the device that its first rank computes on; all ranks call."""
    gpus = tf.config.get_visible_devices("GPU") if device.kind == "GPU" else []
    details = tf.config.experimental.get_device_details(gpus[0]) if gpus else {}
    mine = {**here, "gpu": str(details.get("device_name", "GPU")) if gpus else ""}
    hosts: Dict[str, Dict[str, Any]] = {}
    for one in comm.gather_json(mine):
        hosts.setdefault(one["host"], one)
    return list(hosts.values())


def _check_out(config: BenchmarkConfig) -> None:
    """Makes sure, on rank 0, that --out can be written: hours of measuring should not end in a wrong path."""
    if not config.out or not comm.is_root():
        return
    out = Path(config.out).absolute()
    try:
        if out.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        probe_file(out.parent).close()
    except OSError as error:
        raise Failure(CONFIGURATION, f"--out={config.out} cannot be written: {error.strerror}") from error


def _write(config: BenchmarkConfig, device: Device, hosts: List[Dict[str, Any]], found: List[Dict[str, Any]]) -> None:
    """Writes --out, if asked for, on rank 0; all ranks must call."""

    def write() -> None:
        if not config.out or not comm.is_root():
            return
        content = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "flags": dataclasses.asdict(config),
            "software": describe_software(IMAGE_LIBRARY),
            "machine": {**device._asdict(), "hosts": hosts},
            "rows": found,
        }
        try:
            atomic_write_text(Path(config.out).absolute(), json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise Failure(NOT_WRITTEN, write_error(Path(config.out), error)) from error

    run_on_all_ranks(write)
