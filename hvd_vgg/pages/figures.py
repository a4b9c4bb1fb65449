"""Figures: drawn by matplotlib as SVG, which becomes part of the page and takes its colours from the page's style.

Colours are drawn as stand-ins and replaced by variables of CSS afterwards, so that one figure serves light, dark and paper.
No text from files gets into an SVG: legends and captions are HTML, where all of it is escaped.
"""

import importlib.util
import io
import math
import re
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from hvd_vgg.errors import CONFIGURATION, Failure
from hvd_vgg.pages.markup import Markup, escape, join, paragraph, tag
from hvd_vgg.pages.style import SERIES
from hvd_vgg.pages.timeline import Event, Span
from hvd_vgg.reporting.goodput import PARTS

# Colours that matplotlib writes and nothing else uses, and what they become.
_INK, _FAINT, _LINE = "#010203", "#010204", "#010205"
_STAND_INS = {_INK: "var(--ink)", _FAINT: "var(--faint)", _LINE: "var(--line)"}
_STAND_INS.update({f"#0102{16 + index:02x}": f"var(--c{index + 1})" for index in range(SERIES)})
_STAND_INS.update({f"#0102{32 + index:02x}": f"var(--part-{part})" for index, part in enumerate(PARTS)})
_COLOURS = {variable: colour for colour, variable in _STAND_INS.items()}
_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "axes.formatter.useoffset": False,
    "font.size": 10.5,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), _INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), _FAINT),
    "grid.color": _LINE,
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
}
_SIZE = 4.6, 2.8  # small, so that its text can be read on a phone
_BORDERS = {"left": 0.16, "right": 0.97, "top": 0.96, "bottom": 0.18}
TIMES = {"input": 2, "compute": 3, "network": 1, "stragglers": 5}  # the colour of each part of a rank's time
# Lengths of strokes and gaps. Where a figure has several runs, each of its quantities has a style of a group of three; after
# SERIES runs another group follows, so that runs of the same colour can be told apart.
_DASHES = dict(
    [
        *(("solid", ""), ("dashed", "5 3"), ("dashdot", "6 3 1.5 3")),
        *(("long", "11 3"), ("long-dot", "11 3 1.5 3"), ("long-dots", "11 3 1.5 3 1.5 3")),
        *(("short", "2.5 2.5"), ("short-dots", "4 2 1.5 2 1.5 2"), ("short-long", "3 2 9 2")),
        ("dotted", "1.5 3"),
    ]
)
_STYLES = [name for name in _DASHES if name != "dotted"]  # which is that of reference curves
_QUANTITIES = 3


class Line(NamedTuple):
    """A line of a figure. colour: of the page's SERIES, from 1; 0 is that of text; label: any text."""

    label: Any
    x: np.ndarray
    y: np.ndarray
    colour: int = 1
    style: str = "solid"
    marker: bool = False  # at every point
    low: Optional[np.ndarray] = None
    high: Optional[np.ndarray] = None


class Bars(NamedTuple):
    """Bars of one colour in a figure, float64 [groups]: NaN where a group has none. colour: as of `Line`."""

    label: Any
    values: np.ndarray
    deviations: np.ndarray
    colour: int


def colour(index: int) -> str:
    """Returns the CSS colour of a series; more of them than SERIES begin anew."""
    return f"var(--c{(index - 1) % SERIES + 1})" if index else "var(--ink)"


def style(series: int, quantity: int) -> str:
    """Returns the style of a quantity (0, 1 or 2) of a run; series: as in `colour`. More than 3 * SERIES runs begin anew."""
    group = (series - 1) // SERIES
    return _STYLES[(group * _QUANTITIES + quantity % _QUANTITIES) % len(_STYLES)]


def require_matplotlib() -> None:
    """Raises Failure(CONFIGURATION) where matplotlib is not installed: before hours of work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise Failure(CONFIGURATION, "matplotlib, which draws the figures, is not installed: pip install matplotlib")


def curves(
    anchor: str,
    lines: Sequence[Line],
    x_label: str,
    log: bool = False,
    least: Optional[float] = None,
    ticks: Sequence[int] = (),
) -> Markup:
    """Returns the SVG of lines; nothing where no line has a point. anchor: letters, digits and `-`, unique in a page.

    log: a logarithmic scale of values, all above 0; least: of the scale; ticks: at which the other axis, which is
    logarithmic then, has numbers, such as those of ranks.
    """
    shown = [line for line in lines if np.any(np.isfinite(line.x) & np.isfinite(line.y))]
    if not shown:
        return Markup()

    def draw(axes: Any) -> None:
        for line in shown:
            drawn = _COLOURS[colour(line.colour)]
            if line.low is not None and line.high is not None and len(line.x) > 1:
                axes.fill_between(line.x, line.low, line.high, color=drawn, alpha=0.2, linewidth=0)
            known = np.concatenate([[False], np.isfinite(line.x) & np.isfinite(line.y), [False]])
            lone = known[1:-1] & ~known[:-2] & ~known[2:]  # which no line reaches
            dashes = tuple(float(each) / 1.5 for each in _DASHES[line.style].split())  # in widths of the line
            shape: Any = (0, dashes) if dashes else "solid"
            marked = None if line.marker else lone
            axes.plot(line.x, line.y, color=drawn, linestyle=shape, linewidth=1.5, marker="o", markevery=marked)
        if log:
            _scale_by_decades(axes, [np.nanmin(line.y) for line in shown], [np.nanmax(line.y) for line in shown])
        elif least is not None:
            axes.set_ylim(bottom=least)
        if ticks:
            _scale_by_factors(axes, ticks)
        axes.set_xlabel(x_label)

    return _svg(anchor, draw, _SIZE, _BORDERS)


def _scale_by_factors(axes: Any, ticks: Sequence[int]) -> None:
    """Makes the horizontal scale logarithmic, with at most 11 of the numbers at it, the last among them."""
    from matplotlib.ticker import NullLocator

    shown = sorted(set(ticks))[:: -max(1, -(-len(set(ticks)) // 11))]
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(shown)
    axes.set_xticklabels([str(each) for each in shown])


def bars(anchor: str, groups: Sequence[str], series: Sequence[Bars], x_label: str) -> Markup:
    """Returns the SVG of bars side by side in groups, with a line for each deviation; nothing where there is none.

    groups: their names, of this program and not of a file.
    """
    if not groups or not any(np.any(np.isfinite(each.values)) for each in series):
        return Markup()

    def draw(axes: Any) -> None:
        width, places = 0.8 / len(series), np.arange(len(groups))
        for number, each in enumerate(series):
            known = np.isfinite(each.values)
            at, errors = places + (number - (len(series) - 1) / 2) * width, np.nan_to_num(each.deviations)
            drawn = _COLOURS[colour(each.colour)]
            axes.bar(at[known], each.values[known], width * 0.9, color=drawn, linewidth=0)
            some = known & (errors > 0)
            axes.errorbar(at[some], each.values[some], errors[some], fmt="none", ecolor=_INK, elinewidth=1, capsize=2)
        axes.set_ylim(bottom=0)
        axes.set_xticks(places)
        axes.set_xticklabels(groups)
        axes.grid(axis="x", visible=False)
        axes.set_xlabel(x_label)

    return _svg(anchor, draw, _SIZE, _BORDERS)


def _scale_by_decades(axes: Any, least: Sequence[float], most: Sequence[float]) -> None:
    """Makes the scale of values logarithmic, with at least two numbers at it."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if max(most) < 100 * min(least) else (1.0,)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def stack(anchor: str, x: np.ndarray, parts: Dict[str, np.ndarray], x_label: str) -> Markup:
    """Returns the SVG of shares that are 1 together, from below; parts: by the names of TIMES."""

    def draw(axes: Any) -> None:
        colours = [_COLOURS[colour(TIMES[part])] for part in parts]
        axes.stackplot(x, *(np.nan_to_num(each) for each in parts.values()), colors=colours, linewidth=0)
        axes.set_ylim(0, 1)
        axes.set_xlabel(x_label)

    good = len(x) > 1 and bool(np.any(np.isfinite(x)))
    return _svg(anchor, draw, _SIZE, _BORDERS) if good else Markup()


def timeline(anchor: str, spans: Dict[str, List[Span]], events: Sequence[Event], unit: str, factor: float) -> Markup:
    """Returns the SVG of a lane for each part of the wall time that there was, and one of events.

    factor: units of the axis an hour. Nothing where there is no time.
    """
    lanes = [part for part in PARTS if spans.get(part)]
    times = [hours for each in spans.values() for span in each for hours in span]
    times += [event.hours for event in events if math.isfinite(event.hours)]
    begin, end = min(times, default=0.0), max(times, default=0.0)
    if not lanes or not math.isfinite(end - begin) or end <= begin:
        return Markup()
    marks = {"start": ("^", "var(--ink)"), "fault": ("x", "var(--part-recomputed)"), "change": ("d", "var(--c4)")}
    marks["end"] = ("s", "var(--ink)")

    def draw(axes: Any) -> None:
        for row, part in enumerate(lanes):
            least = (end - begin) / 500  # the shortest that can be seen
            bars = [(low * factor, max(high - low, least) * factor) for low, high in spans[part]]
            axes.broken_barh(bars, (row - 0.35, 0.7), color=_COLOURS[f"var(--part-{part})"], linewidth=0)
        for kind, (marker, variable) in marks.items():
            hours = [event.hours * factor for event in events if event.kind == kind and math.isfinite(event.hours)]
            if hours:
                axes.plot(*(hours, [-1] * len(hours)), marker=marker, color=_COLOURS[variable], linestyle="", clip_on=False)
        axes.set_yticks([-1, *range(len(lanes))], ["events", *lanes])
        axes.set_ylim(len(lanes) - 0.5, -1.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlim(begin * factor, end * factor)
        axes.set_xlabel(f"{unit} since the first start")

    height = 1.0 + 0.3 * (len(lanes) + 1)
    return _svg(anchor, draw, (4.9, height), {"left": 0.24, "right": 0.97, "top": 0.97, "bottom": 0.55 / height})


def _svg(anchor: str, draw: Callable[[Any], None], size: Tuple[float, float], borders: Dict[str, float]) -> Markup:
    """Returns what `draw` draws on axes as an element of a page."""
    import matplotlib
    from matplotlib.figure import Figure

    file = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": anchor}):
        figure: Any = Figure(figsize=size, dpi=72)
        axes = figure.subplots()
        figure.subplots_adjust(**borders)
        draw(axes)
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    return Markup(_adapt(file.getvalue(), anchor))


def _adapt(svg: str, anchor: str) -> str:
    """Returns an SVG file as an element of a page: in the page's colours, with ids of its own, without its addresses."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.S)
    view = re.search(r'viewBox="[^"]*"', svg)
    svg = re.sub(r"<svg[^>]*>", f'<svg {view[0] if view else ""} aria-hidden="true" focusable="false">', svg, count=1)
    svg = re.sub(r'\bid="', f'id="{anchor}-', svg)
    svg = svg.replace("url(#", f"url(#{anchor}-").replace('xlink:href="#', f'href="#{anchor}-')
    for stand_in, variable in _STAND_INS.items():
        svg = svg.replace(stand_in, variable)
    svg = re.sub(r"(font: [\d.]+px) [^;\"]*", r"\1 sans-serif", svg)  # the reader's
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)  # hundredths of a point are enough
    return re.sub(r"\s*\n\s*", " ", svg)


def legend(lines: Sequence[Line]) -> Markup:
    """Returns the lines' labels with a piece of each."""

    def piece(line: Line) -> Markup:
        stroke = f'stroke="{colour(line.colour)}" stroke-width="3" stroke-dasharray="{_DASHES[line.style]}"'
        return Markup(f'<svg viewBox="0 0 28 10" aria-hidden="true"><path d="M0 5H28" {stroke}/></svg>')

    return (
        tag("ul", join(tag("li", join([piece(line), line.label])) for line in lines), 'class="legend"')
        if lines
        else Markup()
    )


def keys(parts: Sequence[str]) -> Markup:
    """Returns the legend of `stack` and of bars in its colours."""
    return squares({part: TIMES[part] for part in parts})


def squares(colours: Dict[str, int]) -> Markup:
    """Returns the legend of areas: names with their colours."""
    items = (Markup(f'<span class="key" style="background: {colour(index)}"></span>') for index in colours.values())
    return tag("ul", join(tag("li", join([square, name])) for square, name in zip(items, colours)), 'class="legend"')


def framed(title: Any, svg: Markup, legend_: Markup, caption: Any = "", kind: str = "") -> Markup:
    """Returns a figure with its title, legend and caption; nothing where there is nothing to show."""
    if not svg:
        return Markup()
    image = tag("div", svg, f'role="img" aria-label="{escape(title)}"')
    parts = [paragraph(title, kind="title"), legend_, image, tag("figcaption", caption) if caption else ""]
    return tag("figure", join(parts), f'class="{kind}"' if kind else "")


def both_axes(draw: Callable[[str], Iterator[Markup]]) -> Markup:
    """Returns figures against epochs and against time, of which the reader chooses.

    draw: yields those for `epochs` or `time`.
    """
    choice = Markup(
        '<input type="radio" name="axis" id="by-epochs" checked><label class="axis" for="by-epochs">against epochs</label>'
        '<input type="radio" name="axis" id="by-time"><label class="axis" for="by-time">against time</label>'
    )
    drawn = (tag("div", figure, f'class="{axis}"') for axis in ("epochs", "time") for figure in draw(axis) if figure)
    figures = join(drawn)
    return join([choice, tag("div", figures, 'class="figures"')]) if figures else Markup()
