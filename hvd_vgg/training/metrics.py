"""What the updates since the last log line amount to over all ranks: loss, accuracy, throughput and where time went."""

import math
import socket
import statistics
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Tuple

import numpy as np

from hvd_vgg.config import BITS, StepConfig
from hvd_vgg.data.loader import BadRow
from hvd_vgg.data.sampler import part_bounds
from hvd_vgg.models.architecture import layers_to_train, training_flops
from hvd_vgg.parallel import comm
from hvd_vgg.reporting.throughput import (
    Bottleneck,
    StepTime,
    Throughput,
    find_bottleneck,
    mean_shares,
    per_host,
    per_rank,
    slowest,
)
from hvd_vgg.training.train_step import StepMetrics


class PendingUpdate(NamedTuple):
    """An update since the last log line; metrics: None where its records were skipped; ids, bad: of its batch."""

    step: int
    metrics: Optional[StepMetrics]
    ids: Any
    bad: List[BadRow]


class NonFiniteStep(Exception):
    """A step whose loss, gradient or moment is not finite: neither its update nor any after it was applied, on any rank.

    loss: the mean over the global batch; gradient_norm: of the global gradient.
    """

    def __init__(self, step: int, loss: float, gradient_norm: float) -> None:
        super().__init__(f"step {step}: loss {loss:g}, gradient norm {gradient_norm:g}")
        self.step, self.loss, self.gradient_norm = step, loss, gradient_norm


def reduce_metrics(window: List[PendingUpdate], config: StepConfig) -> Dict[str, Any]:
    """Returns the means of the window's metrics over its images; raises NonFiniteStep for its first step that is not finite.

    Collective: here the host waits for the device and for all ranks. Skipped steps count for nothing.
    """
    steps = [update.step for update in window if update.metrics]
    trained = [update.metrics for update in window if update.metrics]
    losses = global_losses([m.losses.numpy() for m in trained]) / config.global_batch
    # Every rank has the norm; that of rank 0 makes what follows from it equal everywhere, to the last bit.
    norms = comm.gather_numbers([float(m.gradient_norm) for m in trained])[0]
    failed = comm.sum_over_ranks(np.array([not m.finite for m in trained], np.int64))
    for step, loss, norm, bad in zip(steps, losses, norms, failed):
        if bad:
            raise NonFiniteStep(step, loss, norm)
    correct = comm.sum_over_ranks(np.array([[int(m.top1), int(m.top5)] for m in trained], np.int64).reshape(-1, 2))
    top1, top5 = (correct.sum(axis=0) / (max(1, len(trained)) * config.global_batch)).tolist()
    finite, each = norms[np.isfinite(norms)], iter(losses.tolist())
    row = {
        "train.loss": float(losses.mean()) if trained else math.nan,  # nan: all of them were skipped
        "train.losses": [next(each) if update.metrics else None for update in window],
        "train.acc@1": top1,
        "train.acc@5": top5,
        "train.gradient_norm": float(finite.mean()) if len(finite) else 0.0,
    }
    if config.reproducible == BITS:
        row["train.recomputed_updates"] = sum(int(m.passes) - 1 for m in trained)
    if config.precision == "float16":
        scale = float(trained[-1].loss_scale) if trained else 1.0
        row.update({"train.loss_scale": scale, "train.skipped_updates": len(norms) - len(finite)})
    return row


def global_losses(losses: List[np.ndarray]) -> np.ndarray:
    """Returns the loss of each update summed over all ranks, float64 [updates]. Collective.

    losses: of each update, of this rank's micro-batches, float32. They are added exactly, and so in whatever order.
    """
    everyones = [np.frombuffer(each, np.float32) for each in comm.gather_bytes(np.array(losses, np.float32).tobytes())]
    columns = [each.reshape(len(losses), -1) for each in everyones] if losses else []
    return np.array([exact_sum(row) for row in np.concatenate(columns, axis=1)] if losses else [])


def exact_sum(numbers: Iterable[float]) -> float:
    """Returns the float64 next to the sum of the numbers, whatever their order; inf or nan if one of them is."""
    try:
        return math.fsum(map(float, numbers))
    except (OverflowError, ValueError):  # infinities of both signs
        return math.nan


def measure_window(
    window: List[PendingUpdate], throughput: Throughput, global_batch: int
) -> Tuple[Dict[str, Any], Bottleneck, float]:
    """Returns the window's images/s and where its time went, for the log; what limited it; and the seconds of an update.

    These are the slowest rank's, and a low median: what a first update compiles is left out. Collective.
    """
    updates = len(window)
    totals = throughput.total_seconds[-updates:]
    exchanges = [float(update.metrics.exchange_seconds) if update.metrics else 0.0 for update in window]
    throughput.exchange_seconds += [min(max(0.0, seconds), total) for seconds, total in zip(exchanges, totals)]
    gathered = comm.gather_numbers([*throughput.last(updates), statistics.median_low(totals)])
    times = [StepTime(*numbers) for numbers in gathered[:, :3].tolist()]
    bottleneck, shares = find_bottleneck(times), mean_shares(times)
    row = {
        "train.fps": global_batch * updates / times[0].total,
        "train.input_share": shares["input"],
        "train.network_share": shares["network"],
        "train.straggler_share": shares["straggler_wait"],
        "train.input_shares": [round(one.input / one.total, 4) for one in times],
        "train.exchange_shares": [round(one.exchange / one.total, 4) for one in times],
        "train.slow_rank": -1 if bottleneck.rank is None else bottleneck.rank,
        "train.update_seconds": totals,
        "train.input_seconds": throughput.input_seconds[-updates:],
    }
    return row, bottleneck, float(gathered[:, 3].max())


def measure_run(
    throughput: Throughput, config: StepConfig, device_tflops: float, group: comm.Group = comm.WORLD
) -> Dict[str, Any]:
    """Returns the throughput of this process's updates, of the job and of each rank; equal on all ranks. Collective."""
    found: Dict[str, Any] = comm.gather_json(throughput.summary(config.global_batch), group)[0]
    if not found["fps"]:
        return found
    updates = found["fps_updates"]
    low, high = part_bounds(config, comm.rank(group), comm.size(group))
    mine = {"host": socket.gethostname(), "images": (high - low) * updates, "times": throughput.last(updates)}
    everyones = comm.gather_json({**mine, "excluded": throughput.excluded_seconds}, group)
    times = [StepTime(*each["times"]) for each in everyones]
    rows = per_rank(times, [each["host"] for each in everyones], [each["images"] for each in everyones])
    for row, each in zip(rows, everyones):
        row.update({f"{name}_seconds": seconds for name, seconds in each["excluded"].items()})
    layers = layers_to_train(config)
    found["tflops_per_rank"] = training_flops(layers, config.image_size) * found["fps"] / comm.size(group) / 1e12
    if device_tflops:
        found["share_of_peak"] = found["tflops_per_rank"] / device_tflops
    bottleneck = find_bottleneck(times)
    found.update(bottleneck=bottleneck.cause, slow_rank=bottleneck.rank, slow_ranks=list(bottleneck.ranks))
    return {**found, "slowest_rank": slowest(rows)["rank"], "by_host": per_host(rows), "by_rank": rows}
