"""The page of `hvd-vgg plan`: what was asked, what would be sent, and time and efficiency on the cluster."""

import dataclasses
from typing import Iterator, List, Sequence, Tuple

import numpy as np

from hvd_vgg import __version__
from hvd_vgg.flags import format_value
from hvd_vgg.pages.figures import Line, curves, framed, legend
from hvd_vgg.pages.markup import Markup, bullets, join, page, pairs, paragraph, section, table
from hvd_vgg.pages.run_sections import flag_tables, made_at
from hvd_vgg.parallel.cost import Choice, sent
from hvd_vgg.parallel.plan import ASSUMPTIONS, Plan, efficiency_range
from hvd_vgg.text import plural

_STYLES = ("solid", "dashed", "long")  # of the methods, which have colours too


def plan_page(found: Plan, now: float) -> str:
    """Returns the page; now: seconds since 1970."""
    config = found.config
    title = f"Plan: {config.model} on {plural(config.ranks, 'rank')}"
    links = [("asked", "What was asked"), ("predicted", "Time and efficiency"), ("bytes", "Bytes of each layer")]
    content = [_asked(found), _predicted(found), _bytes(found)]
    if found.advice:
        links.append(("advice", "Advice"))
        content.append(section("advice", "Advice", bullets(found.advice)))
    links.append(("assumptions", "Assumptions"))
    content.append(section("assumptions", "Assumptions", paragraph(" ".join(ASSUMPTIONS.split()))))
    return page(title, f"Made by hvd-vgg plan {__version__} on {made_at(now)}.", links, join(content))


def _asked(found: Plan) -> Markup:
    config = found.config
    where = f"{plural(config.ranks, 'rank')} on {plural(found.hosts, 'host')}, {config.ranks_per_host} on each"
    rows: List[Tuple[str, str]] = [
        ("network", f"{config.model} at width {config.width:g}, {config.image_size} pixels"),
        ("cluster", f"{where}; a host's link has {config.gbit:g} Gbit/s"),
        ("a rank alone", f"{config.fps_per_rank:g} images/s"),
        ("images per update", f"{config.global_batch}: {found.images_per_rank:g} per rank"),
        ("exchange", f"{config.exchange}, {config.wire_dtype} on the wire"),
        ("computed per byte of link", f"{format_value(float(f'{found.link_flops_per_byte:.4g}'))} FLOP"),
    ]
    return section("asked", "What was asked", pairs(rows), flag_tables(dataclasses.asdict(config), type(config)))


def _predicted(found: Plan) -> Markup:
    """Returns time and efficiency of each method on the ranks planned for, and efficiency against ranks."""
    headings = ("method", "MB per rank", "seconds per update", "efficiency", "images/s")
    rows = [
        (
            method,
            f"{number / 1e6:.1f}",
            f"{predicted.seconds_apart:.3f} .. {predicted.seconds_overlapped:.3f}",
            efficiency_range(predicted),
            f"{fps[0]:.0f} .. {fps[1]:.0f}",
        )
        for method, number, predicted, fps in found.forecasts
    ]
    caption = f"On {plural(found.config.ranks, 'rank')}, from no overlap of exchange and backward pass to full overlap"
    listed = table(headings, rows, caption, numbers=range(1, 5), kind="tight")
    return section("predicted", "Time and efficiency", listed, _sweep(found))


def _sweep(found: Plan) -> Markup:
    if not found.sweep_ranks:
        return Markup()
    upper, lower = list(_lines(found, True)), list(_lines(found, False))
    svg = curves("efficiency", [*upper, *lower], "ranks", least=0.0, ticks=found.sweep_ranks)
    text = (
        f"With {found.images_per_rank:g} images per rank and {plural(found.config.ranks_per_host, 'rank')} per host. A band "
        "reaches from no overlap (dotted) to full overlap of the exchange with the backward pass."
    )
    drawn = framed("Scaling efficiency against ranks", svg, legend(upper), text, kind="wide")
    rows = [(ranks, *map(efficiency_range, points)) for ranks, points in zip(found.sweep_ranks, zip(*found.sweep.values()))]
    listed = table(("ranks", *found.sweep), rows, "Scaling efficiency", numbers=range(1 + len(found.sweep)), kind="tight")
    return join([drawn, listed])


def _lines(found: Plan, overlapped: bool) -> Iterator[Line]:
    """Yields a line for each method: with its band below it, or without overlap."""
    x = np.array(found.sweep_ranks, np.float64)
    for number, (name, points) in enumerate(found.sweep.items(), 1):
        low, high = (np.array([point[index] for point in points]) for index in (2, 3))
        if overlapped:
            yield Line(name, x, high, number, _STYLES[(number - 1) % len(_STYLES)], False, low, high)
        else:
            yield Line(name, x, low, number, "dotted")


def _bytes(found: Plan) -> Markup:
    """Returns the table of what each rank sends in an update, by layer."""

    def cells(name: str, choices: Sequence[Choice], method: str) -> List[str]:
        gathered = [choice.factored_bytes for choice in choices if choice.factored_bytes is not None]
        summed = sum(choice.allreduce_bytes for choice in choices)
        factored = f"{sum(gathered) / 1e6:.1f}" if len(gathered) == len(choices) else "-"
        return [name, f"{summed / 1e6:.1f}", factored, method, f"{sent(list(choices)) / 1e6:.1f}"]

    rows = [cells(choice.layer, [choice], choice.method) for choice in found.choices]
    rows.append(cells("all", found.choices, "as chosen"))
    headings = ("layer", "allreduce MB", "factored MB", "method", "sent MB")
    caption = f"Sent by each rank in an update, {found.config.wire_dtype} on the wire"
    return section("bytes", "Bytes of each layer", table(headings, rows, caption, numbers=(1, 2, 4), kind="tight"))
