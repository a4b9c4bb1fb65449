"""The `benchmark` command: images/s of training with no input, with input from the host, and with the real pipeline; and of
that pipeline alone.
"""

import dataclasses
import functools
import itertools
import json
import os
import socket
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional

import numpy as np
import tensorflow as tf

from hvd_vgg.config import BITS, BenchmarkConfig
from hvd_vgg.data.loader import train_batches
from hvd_vgg.data.sampler import part_bounds
from hvd_vgg.data.transforms import image_library
from hvd_vgg.doctor.driver import find_accelerators
from hvd_vgg.doctor.packages import this_host
from hvd_vgg.errors import CONFIGURATION, NOT_FINITE, USAGE, Failure
from hvd_vgg.pages.benchmark_page import benchmark_page
from hvd_vgg.pages.figures import require_matplotlib
from hvd_vgg.pages.markup import write_page
from hvd_vgg.parallel import comm, cost
from hvd_vgg.parallel.consensus import keep_alive, run_in_subgroup, run_on_root
from hvd_vgg.parallel.init import Device, describe_software
from hvd_vgg.provenance import processor_name
from hvd_vgg.reporting.throughput import Throughput
from hvd_vgg.run_dir import atomic_write_text, check_out, writing
from hvd_vgg.text import plural
from hvd_vgg.training.dataset import Splits, open_data
from hvd_vgg.training.metrics import measure_run
from hvd_vgg.training.startup import Session, join_ranks
from hvd_vgg.training.state import initial_state
from hvd_vgg.training.train_step import make_train_step, step_inputs

_UPDATES = 30
# Weights that hardly move stay as they were drawn, however long a row is; the time of an update does not depend on them.
_LR_FACTOR = 1e-3
# How often the ranks outside a subgroup are kept alive. It takes 1 to 2 ms, and shows in no update.
_KEEP_ALIVE_SECONDS = 2.0


def benchmark(config: BenchmarkConfig) -> None:
    """Measures each kind of input on each number of --ranks, prints a table and writes --out. Collective.

    Raises collective Failures before anything is measured: USAGE for more --ranks than were started, CONFIGURATION where
    --out cannot be written, or its page not be drawn. NOT_FINITE for updates that are not finite.
    """
    wanted = sorted(set(config.ranks))
    here = _hardware()
    session = join_ranks(config, group_sizes=wanted)
    console, started = session.console, comm.size()
    if wanted and wanted[-1] > started:
        fix = f"hvd-vgg launch --ranks={wanted[-1]} benchmark --ranks={','.join(map(str, wanted))} ..."
        text = f"--ranks={wanted[-1]}: expected at most the {plural(started, 'rank')} started: {fix}"
        raise Failure(USAGE, text, collective=True)
    if config.out:
        run_on_root(lambda: _check_out(config.out))
    group = config.group_batch
    per_rank = group * max(1, config.global_batch // (started * group))
    if config.reproducible == BITS:  # each rank has whole micro-batches, as large as can be
        count = -(-per_rank // config.device_batch)
        config = dataclasses.replace(config, device_batch=group * -(-per_rank // (count * group)))
        per_rank = count * config.device_batch
    data = None
    if all(comm.gather_numbers([float(Path(config.data_dir).is_dir())])):
        data = open_data(config, Path(config.run_dir), console)
    else:
        console.say(f"no real data: --data_dir={config.data_dir} does not exist")
    hosts = _all_hardware(here, session.device)
    updates, name = config.steps or _UPDATES, hosts[0]["gpu"] or hosts[0]["cpu"] or "unknown"
    console.say(
        f"{config.model} at width {config.width:g}, {config.image_size} pixels, {per_rank} images per rank and update in "
        f"micro-batches of at most {config.device_batch}, "
        f"{config.precision}, on {session.device.kind} ({name}); {updates} updates per row, "
        f"{plural(updates * per_rank, 'image')} per rank"
    )
    peak = f" {'of peak':>8s}" if config.device_tflops else ""
    console.say(
        f"{'ranks':>5s}  {'input':12s} {'images/s':>9s} {'deviation':>9s} {'per rank':>9s} {'efficiency':>10s} "
        f"{'TFLOP/s/rank':>14s}{peak}  bottleneck"
    )
    rows: List[Dict[str, Any]] = []
    for number in wanted or [started]:
        ranks, own = session.groups.get(number, comm.WORLD), dataclasses.replace(config, global_batch=per_rank * number)
        run_in_subgroup(ranks, functools.partial(_measure, own, session, data, ranks, rows))
    record = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "flags": dataclasses.asdict(config),
        "software": describe_software(image_library(config.resize)),
        "machine": {**session.device._asdict(), "hosts": hosts},
        "images_per_rank": per_rank,
        "updates": updates,
        "rows": rows,
    }
    run_on_root(lambda: _write(config.out, record))
    comm.shutdown()


def _measure(
    config: BenchmarkConfig, session: Session, data: Optional[Splits], group: comm.Group, rows: List[Dict[str, Any]]
) -> None:
    """Adds a row to `rows` for each kind of input, measured on the ranks of `group`. Collective over the group."""
    state, size, console = initial_state(config), comm.size(group), session.console
    factored = cost.factored_layers(config, size)
    train_step = make_train_step(state, config, session.device, factored, group)
    low, _ = part_bounds(config, comm.rank(group), size)
    for kind in ("device", "host", "real") if data else ("device", "host"):
        throughput, keep_alive_at = Throughput(), 0
        throughput.excluded_seconds["keep_alive"] = 0.0
        progress = console.progress(f"{plural(size, 'rank')}, {kind}", config.steps or _UPDATES, "updates")
        for step, batch in enumerate(throughput.timed(_batches(kind, config, session.device, data, group))):
            metrics = train_step(*batch[:2], *step_inputs(config, step, low, config.lr * _LR_FACTOR))
            throughput.exchange_seconds.append(float(metrics.exchange_seconds))
            throughput.end_update()
            progress.update(step + 1)
            if not metrics.finite:  # equal on all ranks
                raise Failure(
                    NOT_FINITE,
                    f"update {step + 1} on {plural(size, 'rank')}, input {kind}: the loss or gradient is not finite, and "
                    f"updates that are not applied measure nothing: lower --lr={config.lr:g}, of which {_LR_FACTOR:g} is "
                    f"used here, or try --precision=float32",
                    collective=True,
                )
            if step >= keep_alive_at:
                with throughput.exclude("keep_alive"):
                    keep_alive_at = step + _keep_alive(throughput.total_seconds[-1], group)
        row = {"ranks": size, "input": kind, **measure_run(throughput, config, config.device_tflops, group)}
        _compare(row, rows)
        console.say(_format_row(row))
    if data is not None:
        row = {"ranks": size, "input": "alone", "fps": _input_alone(config, session.device, data, group)}
        _compare(row, rows)
        console.say(
            f"{size:5d}  {'input alone':12s} {row['fps']:9.1f} {'':9s} {row['fps'] / size:9.1f} {row['efficiency']:10.1%}"
        )


def _compare(row: Dict[str, Any], rows: List[Dict[str, Any]]) -> None:
    """Adds a row and its efficiency: images/s of a rank, in shares of those on the fewest ranks."""
    first = next((earlier for earlier in rows if earlier["input"] == row["input"]), row)
    row["efficiency"] = row["fps"] / row["ranks"] / (first["fps"] / first["ranks"])
    rows.append(row)


def _keep_alive(seconds: float, group: comm.Group) -> int:
    """Keeps the ranks outside of `group` alive; returns after how many updates of `seconds` it is due again. Collective."""
    keep_alive(group)
    return max(1, round(_KEEP_ALIVE_SECONDS / float(comm.gather_numbers([seconds], group).max())))


def _input_alone(config: BenchmarkConfig, device: Device, data: Splits, group: comm.Group) -> float:
    """Returns the images/s that all ranks of `group` read and decode when nothing is trained. Collective over the group."""
    comm.gather_numbers([0.0], group)  # all begin together
    began, keep_alive_at = time.monotonic(), 0
    for step, _ in enumerate(_batches("real", config, device, data, group)):
        if step >= keep_alive_at:
            keep_alive_at = step + _keep_alive((time.monotonic() - began) / (step + 1), group)
    seconds = float(comm.gather_numbers([time.monotonic() - began], group).max())
    return (config.steps or _UPDATES) * config.global_batch / seconds


def _format_row(row: Dict[str, Any]) -> str:
    peak = f" {row['share_of_peak']:8.1%}" if "share_of_peak" in row else ""
    slow = f" of rank {row['slow_rank']}" if row["slow_rank"] is not None else ""
    return (
        f"{row['ranks']:5d}  {row['input']:12s} {row['fps']:9.1f} {row['fps_standard_deviation']:9.1f} "
        f"{row['fps'] / row['ranks']:9.1f} {row['efficiency']:10.1%} {row['tflops_per_rank']:14.3g}{peak}  "
        f"{row['bottleneck']}{slow}"
    )


def _batches(kind: str, config: BenchmarkConfig, device: Device, data: Optional[Splits], group: comm.Group) -> Iterable[Any]:
    """Returns the batches of this rank: the same tensors again, the same arrays copied each time, or the loader's."""
    steps, rank, size = range(config.steps or _UPDATES), comm.rank(group), comm.size(group)
    if kind == "real" and data is not None:
        return train_batches(data.train, config, data.label_base, steps, rank, size, device.input_threads)
    low, high = part_bounds(config, rank, size)
    random = np.random.default_rng(config.seed)
    images = random.integers(0, 256, (high - low, config.image_size, config.image_size, 3), np.uint8)
    labels = random.integers(0, config.num_classes, high - low).astype(np.int32)
    if kind == "device":
        return itertools.repeat((tf.identity(tf.constant(images)), tf.constant(labels)), len(steps))
    return ((tf.constant(images), tf.constant(labels)) for _ in steps)


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
    """Returns `here` of each host, with the name of the device that its first rank computes on. Collective."""
    gpus = tf.config.get_visible_devices("GPU") if device.kind == "GPU" else []
    details = tf.config.experimental.get_device_details(gpus[0]) if gpus else {}
    mine = {**here, "gpu": str(details.get("device_name", "GPU")) if gpus else ""}
    hosts: Dict[str, Dict[str, Any]] = {}
    for each in comm.gather_json(mine):
        hosts.setdefault(each["host"], each)
    return list(hosts.values())


def _check_out(out: str) -> None:
    """Raises Failure(CONFIGURATION) where --out cannot be written, or needs what is not installed."""
    check_out(out, CONFIGURATION)
    if Path(out).suffix == ".html":
        require_matplotlib()


def _write(out: str, record: Dict[str, Any]) -> None:
    """Writes --out, if it is given: the record as JSON, or its page. Raises Failure(NOT_WRITTEN)."""
    if not out:
        return
    path = Path(out).absolute()
    if path.suffix == ".html":
        write_page(path, benchmark_page(record))
        return
    with writing(path):
        atomic_write_text(path, json.dumps(record, indent=2) + "\n")
