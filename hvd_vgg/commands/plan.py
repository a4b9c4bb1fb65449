"""The `plan` command: what each method of exchanging gradients would cost on a cluster. Needs no TensorFlow."""

import time
from pathlib import Path
from typing import Any

from hvd_vgg.config import PlanConfig
from hvd_vgg.errors import NOT_WRITTEN
from hvd_vgg.parallel import cost
from hvd_vgg.parallel.plan import ASSUMPTIONS, Plan, efficiency_range, make_plan, powers_of_two
from hvd_vgg.run_dir import check_out, writing
from hvd_vgg.text import plural


def plan(config: PlanConfig) -> None:
    """Prints the bytes of each layer, and the predicted time and efficiency of each method; draws them into --out.

    Raises Failure(CONFIGURATION) where matplotlib is needed and not installed, Failure(NOT_WRITTEN).
    """
    out = Path(config.out)
    if config.out:
        from hvd_vgg.pages.figures import require_matplotlib  # here: NumPy takes longer to load than all else

        require_matplotlib()
        check_out(config.out, NOT_WRITTEN)
    found = make_plan(config, config.sweep_ranks or (powers_of_two(config.ranks) if out.suffix == ".html" else ()))
    _print(found)
    if config.out:
        _draw(found, out)
        print(f"\ndrawn: {config.out}")


def _print(found: Plan) -> None:
    config = found.config
    print(
        f"{config.model}, {config.global_batch} images per update on {plural(config.ranks, 'rank')} "
        f"({found.images_per_rank:g} each), {plural(found.hosts, 'host')} of {config.ranks_per_host}, "
        f"{config.gbit:g} Gbit/s per host, {config.fps_per_rank:g} images/s per rank alone\n"
    )
    print(f"Sent by each rank in an update, {config.wire_dtype} on the wire:")
    print(cost.table(found.choices), "\n")
    print(ASSUMPTIONS)
    print(f"{'':28s} {'MB/rank':>10s} {'seconds per update':>20s} {'efficiency':>16s} {'images/s':>16s}")
    for method, sent, predicted, fps in found.forecasts:
        seconds = f"{predicted.seconds_apart:.3f} .. {predicted.seconds_overlapped:.3f}"
        print(
            f"{method:28s} {sent / 1e6:10.1f} {seconds:>20s} "
            f"{efficiency_range(predicted):>16s} {fps[0]:7.0f} .. {fps[1]:.0f}"
        )
    for text in found.advice:
        print(f"\n{text}")
    if found.sweep_ranks:
        print(f"\nEfficiency with {found.images_per_rank:g} images per rank:")
        print(f"{'ranks':>6s} " + " ".join(f"{name:>30s}" for name in found.sweep))
    for ranks, points in zip(found.sweep_ranks, zip(*found.sweep.values())):
        print(f"{ranks:6d} " + " ".join(f"{efficiency_range(each):>30s}" for each in points))


def _draw(found: Plan, out: Path) -> None:
    """Draws the page, or efficiency against ranks into a picture."""
    if out.suffix == ".html":
        from hvd_vgg.pages.markup import write_page
        from hvd_vgg.pages.plan_page import plan_page

        write_page(out, plan_page(found, time.time()))
        return
    from matplotlib.figure import Figure

    config = found.config
    figure: Any = Figure(figsize=(8, 5), constrained_layout=True)
    axes = figure.subplots()
    ranks = list(found.sweep_ranks)
    for name, points in found.sweep.items():
        low, high = [each.efficiency_apart for each in points], [each.efficiency_overlapped for each in points]
        (line,) = axes.plot(ranks, high, label=name)
        axes.plot(ranks, low, color=line.get_color(), linestyle=":")
        axes.fill_between(ranks, low, high, color=line.get_color(), alpha=0.15)
    axes.set(xscale="log", xlabel="ranks", ylabel="scaling efficiency", ylim=(0, 1.02))
    axes.set_xticks(ranks, [str(number) for number in ranks])
    axes.set_title(
        f"{config.model}, {found.images_per_rank:g} images per rank; a host has {plural(config.ranks_per_host, 'rank')} and "
        f"{config.gbit:g} Gbit/s\n"
        "dotted: nothing overlaps; line: all overlaps with the backward pass"
    )
    axes.legend(loc="lower left")
    with writing(out):
        figure.savefig(out, dpi=120)
