"""The curves of one run, or of several in one figure each: what is drawn in which figure, and in which colour."""

import math
from typing import Iterator, List, Sequence

import numpy as np

from hvd_vgg.config import reference_points
from hvd_vgg.pages.curves import Curve, updates_per_epoch
from hvd_vgg.pages.facts import Facts
from hvd_vgg.pages.figures import Line, curves, framed, keys, legend, stack, style
from hvd_vgg.pages.markup import Markup

_LABELS = {"epochs": "epochs", "hours": "hours since the first start"}


def _line(facts: Facts, name: str, axis: str, label: str, colour: int, style: str) -> List[Line]:
    """Returns the line of a curve, or none. Against epochs, updates that were made again are left out."""
    found = facts.curves.get(name)
    if found is None:
        return []
    keep = found.counts if axis == "epochs" else np.ones(len(found.values), bool)
    chosen = Curve(*(column[keep] for column in found))
    marker = "o" if name.startswith("eval.") and len(chosen.values) <= 30 else ""
    limits = (chosen.low, chosen.high) if name == "train.loss" and not facts.letter else (None, None)
    x = chosen.epochs if axis == "epochs" else chosen.hours
    return [Line(f"{facts.letter} {label}".strip(), x, chosen.values, colour, style, marker, *limits)]


def _reference(runs: Sequence[Facts], axis: str) -> List[Line]:
    """Returns the reference curves of the runs' flags, each once; against hours there are none."""
    texts = dict.fromkeys(str(facts.flags.get("reference_curve") or "") for facts in runs) if axis == "epochs" else {}
    found = [points for points in map(reference_points, texts) if points]
    return [Line("reference curve", np.array(p)[:, 0], np.array(p)[:, 1], 0, "dotted") for p in found]


def draw_curves(runs: Sequence[Facts], axis: str) -> Iterator[Markup]:
    """Yields the figures that the logs of some runs have; axis: `epochs` or `hours`.

    Of one run each quantity has a colour, of several each run, and runs whose colours are the same have other styles.
    """
    alone = len(runs) == 1

    def lines(*wanted: Sequence[str]) -> List[Line]:
        return [
            line
            for number, facts in enumerate(runs, 1)
            for index, (name, label) in enumerate(wanted)
            for line in _line(
                *(facts, name, axis, label, index + 1 if alone else number, "solid" if alone else style(number, index))
            )
        ]

    def figure(
        name: str, title: str, shown: List[Line], caption: str = "", log: bool = False, least: float = math.nan
    ) -> Markup:
        svg = curves(f"{name}-{axis}", shown, _LABELS[axis], log, None if math.isnan(least) else least)
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
    text = "Share of the validation records whose class was the likeliest (acc@1) or among the five likeliest (acc@5)."
    yield figure("accuracy", "Accuracy", lines(*scores) + _reference(runs, axis), text, least=0.0)
    yield figure("rate", "Learning rate", lines(("train.lr", "rate")), least=0.0)
    yield figure("throughput", "Throughput", lines(("train.fps", "images/s")), "Images/s over all ranks.", least=0.0)
    norm = lines(("train.gradient_norm", "norm"))
    yield figure("norm", "Gradient norm", norm, "The mean norm of the global gradient, before clipping.", log=True)
    scale = lines(("train.loss_scale", "scale"))
    yield figure("scale", "Loss scale", scale, "Of float16; it halves after an update that overflowed.", log=True)
    if alone:
        yield _shares(runs[0], axis)


def _shares(facts: Facts, axis: str) -> Markup:
    """Returns the figure of where the ranks' time went, as each line of the log has it."""
    names = {"input": "train.input_share", "network": "train.network_share", "stragglers": "train.straggler_share"}
    found = {title: facts.curves[name] for title, name in names.items() if name in facts.curves}
    if not found or math.isnan(updates_per_epoch(facts.lines)) or len({len(each.values) for each in found.values()}) != 1:
        return Markup()
    any_curve = next(iter(found.values()))
    keep = any_curve.counts if axis == "epochs" else np.ones(len(any_curve.values), bool)
    parts = {title: each.values[keep] for title, each in found.items()}
    parts["compute"] = np.clip(1 - np.sum([np.nan_to_num(each) for each in parts.values()], axis=0), 0, 1)
    x = (any_curve.epochs if axis == "epochs" else any_curve.hours)[keep]
    svg = stack(f"shares-{axis}", x, parts, _LABELS[axis])
    text = (
        "Shares of the time of all ranks in their updates, from below; what is not counted here is below, on the time axis."
    )
    return framed("Where the ranks' time went", svg, keys(list(parts)), text)
