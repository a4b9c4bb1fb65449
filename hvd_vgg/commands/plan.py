"""The `plan` command: what each method of exchanging gradients would cost on a cluster. Needs no TensorFlow."""

import dataclasses
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple

from hvd_vgg.config import PlanConfig
from hvd_vgg.errors import CONFIGURATION, NOT_WRITTEN, Failure
from hvd_vgg.parallel import cost
from hvd_vgg.text import plural


class Method(NamedTuple):
    """A method of exchange: its name in tables, and the flags that choose it."""

    name: str
    exchange: str
    wire_dtype: str


def methods(config: PlanConfig) -> List[Method]:
    """Returns the methods to compare: allreduce of everything, and this configuration's exchange with both wire dtypes."""
    ours = f"ours ({config.exchange})"
    return [
        Method("allreduce of everything", "allreduce", "float32"),
        Method(f"{ours}, float32", config.exchange, "float32"),
        Method(f"{ours}, float16", config.exchange, "float16"),
    ]


def plan(config: PlanConfig) -> None:
    """Prints the bytes of each layer, and the predicted time and efficiency of each method; plots the sweep."""
    choices = cost.choose(config, config.ranks)
    hosts = -(-config.ranks // config.ranks_per_host)
    per_rank = config.global_batch / config.ranks
    print(
        f"{config.model}, {config.global_batch} images per update on {config.ranks} ranks ({per_rank:g} each), "
        f"{hosts} hosts of {config.ranks_per_host}, {config.gbit:g} Gbit/s per host, "
        f"{config.fps_per_rank:g} images/s per rank alone\n"
    )
    print(f"Sent by each rank in an update, {config.wire_dtype} on the wire:")
    print(cost.table(choices), "\n")
    print(_ASSUMPTIONS)
    print(f"{'':28s} {'MB/rank':>10s} {'seconds per update':>20s} {'efficiency':>16s} {'images/s':>16s}")
    for method in methods(config):
        print(_row(method, config))
    if config.sweep_ranks:
        _sweep(config)


_ASSUMPTIONS = """\
Predictions range from no overlap to full overlap of the exchange with the backward pass. Assumed: computing takes
images / rate, two thirds of it in the backward pass; products of gathered factors add their multiplications; messages take
bytes / bandwidth of a host's link, in one ring through all ranks, those of a host next to each other. Not counted: traffic
within a host, the processor time of sending, stragglers.
"""


def _predicted(method: Method, config: PlanConfig) -> Tuple[float, cost.Prediction]:
    link = cost.Cluster(config.ranks, config.ranks_per_host, config.gbit, config.fps_per_rank)
    chosen = dataclasses.replace(config, exchange=method.exchange, wire_dtype=method.wire_dtype)
    return cost.sent(cost.choose(chosen, config.ranks)) / 1e6, cost.predict(chosen, link)


def _row(method: Method, config: PlanConfig) -> str:
    megabytes, found = _predicted(method, config)
    seconds = f"{found.seconds_apart:.3f} .. {found.seconds_overlapped:.3f}"
    efficiency = f"{found.efficiency_apart:.1%} .. {found.efficiency_overlapped:.1%}"
    rates = [config.fps_per_rank * config.ranks * e for e in (found.efficiency_apart, found.efficiency_overlapped)]
    return f"{method.name:28s} {megabytes:10.1f} {seconds:>20s} {efficiency:>16s} {rates[0]:7.0f} .. {rates[1]:.0f}"


def _sweep(config: PlanConfig) -> None:
    """Prints, and draws into --out, efficiency against ranks, with the images of each rank held fixed."""
    per_rank = config.global_batch / config.ranks
    curves: Dict[str, List[Tuple[int, cost.Prediction]]] = {method.name: [] for method in methods(config)}
    print(f"\nEfficiency with {per_rank:g} images per rank:")
    print(f"{'ranks':>6s} " + " ".join(f"{name:>30s}" for name in curves))
    for ranks in (int(number) for number in config.sweep_ranks):
        at = dataclasses.replace(config, ranks=ranks, global_batch=max(ranks, round(per_rank * ranks)))
        for method in methods(config):
            curves[method.name].append((ranks, _predicted(method, at)[1]))
        last = [points[-1][1] for points in curves.values()]
        cells = [f"{found.efficiency_apart:.1%} .. {found.efficiency_overlapped:.1%}" for found in last]
        print(f"{ranks:6d} " + " ".join(f"{cell:>30s}" for cell in cells))
    if config.out:
        _draw(curves, per_rank, config)
        print(f"\ndrawn: {config.out}")


def _draw(curves: Dict[str, List[Tuple[int, cost.Prediction]]], per_rank: float, config: PlanConfig) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise Failure(CONFIGURATION, "--out needs matplotlib: pip install matplotlib (or hvd_vgg[plot])") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure: Any
    figure, axes = pyplot.subplots(figsize=(8, 5), constrained_layout=True)
    for name, points in curves.items():
        ranks = [number for number, _ in points]
        low = [found.efficiency_apart for _, found in points]
        high = [found.efficiency_overlapped for _, found in points]
        (line,) = axes.plot(ranks, high, label=name)
        axes.plot(ranks, low, color=line.get_color(), linestyle=":")
        axes.fill_between(ranks, low, high, color=line.get_color(), alpha=0.15)
    axes.set(xscale="log", xlabel="ranks", ylabel="scaling efficiency", ylim=(0, 1.02))
    axes.set_xticks(ranks, [str(number) for number in ranks])
    axes.set_title(
        f"{config.model}, {per_rank:g} images per rank; a host has {plural(config.ranks_per_host, 'rank')} and "
        f"{config.gbit:g} Gbit/s\n"
        "dotted: nothing overlaps; line: all overlaps with the backward pass"
    )
    axes.legend(loc="lower left")
    try:
        figure.savefig(Path(config.out), dpi=120)
    except (OSError, ValueError) as error:
        raise Failure(NOT_WRITTEN, f"--out={config.out} cannot be written: {error}") from error
