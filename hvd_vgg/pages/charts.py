"""The curves of one run, or of several in one figure each: what is drawn in which figure, and in which colour."""

import math
from typing import Iterator, List, Sequence, Tuple

import numpy as np

from hvd_vgg.config import reference_points
from hvd_vgg.pages.curves import Curve, unit_of, updates_per_epoch
from hvd_vgg.pages.facts import Facts
from hvd_vgg.pages.figures import Line, curves, framed, keys, legend, stack, style
from hvd_vgg.pages.markup import Markup


def _unit(runs: Sequence[Facts]) -> Tuple[str, float]:
    """Returns the unit of the axis of time, and how many of it an hour has."""
    ends = [end for facts in runs for each in facts.spans.values() for _, end in each]
    return unit_of(max(ends, default=0.0))


def _chosen(facts: Facts, found: Curve, axis: str, factor: float) -> Curve:
    """Returns a curve without updates that were made again, or, against time, with gaps where nothing trained.

    factor: of its hours.
    """
    if axis == "epochs":
        return Curve(*(column[found.counts] for column in found))
    begins = [begin for part in ("starting", "suspended") for begin, _ in facts.spans.get(part, [])]
    places = np.searchsorted(found.hours, begins)
    broken = Curve(*(np.insert(column.astype(np.float64), places, math.nan) for column in found))
    return broken._replace(hours=broken.hours * factor)


def _line(facts: Facts, name: str, axis: str, factor: float, label: str, colour: int, style: str) -> List[Line]:
    """Returns the line of a curve, or none."""
    found = facts.curves.get(name)
    if found is None:
        return []
    chosen = _chosen(facts, found, axis, factor)
    marker = name.startswith("eval.") and len(chosen.values) <= 30
    limits = (chosen.low, chosen.high) if name == "train.loss" and not facts.letter else (None, None)
    x = chosen.epochs if axis == "epochs" else chosen.hours
    return [Line(f"{facts.letter} {label}".strip(), x, chosen.values, colour, style, marker, *limits)]


def _reference(runs: Sequence[Facts], axis: str) -> List[Line]:
    """Returns the reference curves of the runs' flags, each once; against time there are none."""
    texts = dict.fromkeys(str(facts.flags.get("reference_curve") or "") for facts in runs) if axis == "epochs" else {}
    found = [points for points in map(reference_points, texts) if points]
    return [Line("reference curve", np.array(p)[:, 0], np.array(p)[:, 1], 0, "dotted") for p in found]


def draw_curves(runs: Sequence[Facts], axis: str) -> Iterator[Markup]:
    """Yields the figures that the logs of some runs have; axis: `epochs` or `time`.

    Of one run each quantity has a colour, of several each run, and runs whose colours are the same have other styles.
    """
    alone = len(runs) == 1
    unit, factor = _unit(runs)
    x_label = "epochs" if axis == "epochs" else f"{unit} since the first start"

    def lines(*wanted: Sequence[str]) -> List[Line]:
        return [
            line
            for number, facts in enumerate(runs, 1)
            for index, (name, label) in enumerate(wanted)
            for line in _line(
                *(facts, name, axis, factor, label),
                *(index + 1 if alone else number, "solid" if alone else style(number, index)),
            )
        ]

    def figure(
        name: str, title: str, shown: List[Line], caption: str = "", log: bool = False, least: float = math.nan
    ) -> Markup:
        log = log and not any(np.any(line.y <= 0) for line in shown)
        svg = curves(f"{name}-{axis}", shown, x_label, log, None if math.isnan(least) else least)
        caption += " The scale is logarithmic." if log else ""
        return framed(title, svg, legend(shown), caption)

    losses = [
        ("train.loss", "training"),
        ("eval.loss", "evaluation"),
        ("eval.average_loss", "evaluation, average of weights"),
    ]
    text = "In nats. A band around the training loss: the least and the largest of single updates." if alone else "In nats."
    yield figure("loss", "Loss", lines(*losses), text)
    scores = [
        ("eval.acc@1", "acc@1"),
        ("eval.average_acc@1", "acc@1, average of weights"),
        ("train.acc@1", "acc@1 in training"),
    ]
    scores += [("eval.acc@5", "acc@5")] if alone else []
    text = "Share of records whose class was the likeliest (acc@1) or among the five likeliest (acc@5): of the validation "
    text += "data, or, in training, of the batches since the last line of the log."
    yield figure("accuracy", "Accuracy", lines(*scores) + _reference(runs, axis), text, least=0.0)
    yield figure("rate", "Learning rate", lines(("train.lr", "rate")), least=0.0)
    yield figure("throughput", "Throughput", lines(("train.fps", "images/s")), "Images/s over all ranks.", least=0.0)
    norm = lines(("train.gradient_norm", "norm"))
    yield figure("norm", "Gradient norm", norm, "The mean norm of the global gradient before clipping.", log=True)
    scale = lines(("train.loss_scale", "scale"))
    yield figure("scale", "Loss scale", scale, "Of float16; it halves after an update that overflowed.", log=True)
    if alone:
        yield _shares(runs[0], axis, factor, x_label)


def _shares(facts: Facts, axis: str, factor: float, x_label: str) -> Markup:
    """Returns the figure of where the ranks' time went, as each line of the log has it."""
    names = {"input": "train.input_share", "network": "train.network_share", "stragglers": "train.straggler_share"}
    found = {title: facts.curves[name] for title, name in names.items() if name in facts.curves}
    if not found or math.isnan(updates_per_epoch(facts.lines)) or len({len(each.values) for each in found.values()}) != 1:
        return Markup()
    chosen = {title: _chosen(facts, each, axis, factor) for title, each in found.items()}
    parts = {title: each.values for title, each in chosen.items()}
    parts["compute"] = np.clip(1 - np.sum([np.nan_to_num(each) for each in parts.values()], axis=0), 0, 1)
    any_curve = next(iter(chosen.values()))
    x = any_curve.epochs if axis == "epochs" else any_curve.hours
    svg = stack(f"shares-{axis}", x, parts, x_label)
    text = "Shares of the time of all ranks in their updates, from below. All other time is on the time axis below."
    return framed("Where the ranks' time went", svg, keys(list(parts)), text)
