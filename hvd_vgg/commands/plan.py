"""The `plan` command: what each method of exchanging gradients would cost on a cluster. Needs no TensorFlow."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Dict, List

from hvd_vgg.config import PlanConfig, TrainConfig
from hvd_vgg.flags import format_value
from hvd_vgg.parallel import cost
from hvd_vgg.run_dir import writing
from hvd_vgg.text import plural


def _methods(config: PlanConfig) -> Dict[str, PlanConfig]:
    """Returns what to compare, by name: allreduce of everything, and this configuration's exchange with both wire dtypes."""
    flags = {
        "allreduce of everything": ("allreduce", "float32"),
        f"ours ({config.exchange}), float32": (config.exchange, "float32"),
        f"ours ({config.exchange}), float16": (config.exchange, "float16"),
    }
    return {name: dataclasses.replace(config, exchange=each, wire_dtype=dtype) for name, (each, dtype) in flags.items()}


def plan(config: PlanConfig) -> None:
    """Prints the bytes of each layer, and the predicted time and efficiency of each method; plots the sweep."""
    flops_per_byte = cost.link_flops_per_byte(config, _cluster(config))
    advice = _advice(config, flops_per_byte)
    config = dataclasses.replace(config, link_flops_per_byte=config.link_flops_per_byte or flops_per_byte)
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
    for name, method in _methods(config).items():
        found = _predict(method)
        seconds = f"{found.seconds_apart:.3f} .. {found.seconds_overlapped:.3f}"
        both = (found.efficiency_apart, found.efficiency_overlapped)
        rates = [config.fps_per_rank * config.ranks * each for each in both]
        print(
            f"{name:28s} {cost.sent(cost.choose(method, config.ranks)) / 1e6:10.1f} {seconds:>20s} "
            f"{_efficiency(found):>16s} {rates[0]:7.0f} .. {rates[1]:.0f}"
        )
    for text in filter(None, (advice, _saving_advice(config.save_seconds, config.failure_hours))):
        print(f"\n{text}")
    if config.sweep_ranks:
        _sweep(config)


_ASSUMPTIONS = """\
Predictions range from no overlap to full overlap of the exchange with the backward pass. Assumed: computing takes
images / rate, two thirds of it in the backward pass; products of gathered factors add their multiplications; messages take
bytes / bandwidth of a host's link, in one ring through all ranks, those of a host next to each other. Not counted: traffic
within a host, the processor time of sending, stragglers.
"""


def _cluster(config: PlanConfig) -> cost.Cluster:
    return cost.Cluster(config.ranks, config.ranks_per_host, config.gbit, config.fps_per_rank)


def _predict(config: PlanConfig) -> cost.Prediction:
    return cost.predict(config, _cluster(config))


def _advice(config: PlanConfig, flops_per_byte: float) -> str:
    """Returns which --link_flops_per_byte to train with, where `auto` would choose otherwise without it; else "".

    flops_per_byte: this cluster's.
    """

    def choices(value: float) -> List[List[cost.Choice]]:
        methods = _methods(dataclasses.replace(config, link_flops_per_byte=value)).values()
        return [cost.choose(method, config.ranks) for method in methods]

    other, wanted = config.link_flops_per_byte or TrainConfig.link_flops_per_byte, choices(flops_per_byte)
    if choices(other) == wanted:
        return ""
    rounded = (float(f"{flops_per_byte:.{digits}g}") for digits in range(3, 18))  # 17 digits are exact
    value = next(each for each in rounded if choices(each) == wanted)
    return (
        f"Train with --link_flops_per_byte={format_value(value)}, which is this cluster's: with {format_value(other)} "
        "auto chooses otherwise."
    )


def _saving_advice(save_seconds: float, failure_hours: float) -> str:
    """Returns how often to save; "" where one of the two is unknown.

    With C the cost of a save and M the mean time between failures, saving every T loses about C/T of the time to saves and
    T/2M to updates that are made again. The sum is least at T = sqrt(2CM), where it is sqrt(2C/M): the best to first order,
    for C much less than M (J. W. Young, Communications of the ACM 17(9), 1974).
    """
    if not save_seconds or not failure_hours:
        return ""
    seconds = math.sqrt(2 * save_seconds * 3600 * failure_hours)
    lost = math.sqrt(2 * save_seconds / (3600 * failure_hours))
    return (
        f"Save with --save_every_minutes={format_value(float(f'{seconds / 60:.3g}'))}: sqrt(2 x {save_seconds:g} s a save x "
        f"{failure_hours:g} h between failures), to first order (Young 1974); saves and lost updates take {lost:.1%} then."
    )


def _efficiency(found: cost.Prediction) -> str:
    return f"{found.efficiency_apart:.1%} .. {found.efficiency_overlapped:.1%}"


def _sweep(config: PlanConfig) -> None:
    """Prints, and draws into --out, efficiency against ranks, with the images of each rank held fixed."""
    per_rank = config.global_batch / config.ranks
    curves: Dict[str, List[cost.Prediction]] = {name: [] for name in _methods(config)}
    print(f"\nEfficiency with {per_rank:g} images per rank:")
    print(f"{'ranks':>6s} " + " ".join(f"{name:>30s}" for name in curves))
    for ranks in config.sweep_ranks:
        at = dataclasses.replace(config, ranks=ranks, global_batch=max(ranks, round(per_rank * ranks)))
        for name, method in _methods(at).items():
            curves[name].append(_predict(method))
        print(f"{ranks:6d} " + " ".join(f"{_efficiency(points[-1]):>30s}" for points in curves.values()))
    if config.out:
        _draw(curves, per_rank, config)
        print(f"\ndrawn: {config.out}")


def _draw(curves: Dict[str, List[cost.Prediction]], per_rank: float, config: PlanConfig) -> None:
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(8, 5), constrained_layout=True)
    axes = figure.subplots()
    ranks = list(config.sweep_ranks)
    for name, points in curves.items():
        low, high = [each.efficiency_apart for each in points], [each.efficiency_overlapped for each in points]
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
    with writing(Path(config.out)):
        figure.savefig(config.out, dpi=120)
