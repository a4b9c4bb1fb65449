"""The page of `hvd-vgg benchmark`, of the record that its JSON has: images/s by input and ranks, and what limits them."""

import math
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

import numpy as np

from hvd_vgg import __version__
from hvd_vgg.config import BenchmarkConfig
from hvd_vgg.pages.figures import TIMES, Bars, Line, bars, curves, framed, keys, legend, squares
from hvd_vgg.pages.markup import Markup, bullets, join, page, pairs, section, table, tag
from hvd_vgg.pages.run_sections import flag_tables, format_number, rank_table, short
from hvd_vgg.text import plural

_COLOURS = {"device": 1, "host": 4, "real": 2, "alone": 5}  # of inputs
_NAMES = {"device": "on the device", "host": "from the host", "real": "the real pipeline", "alone": "the pipeline alone"}
_STYLES = {"device": "solid", "host": "dashed", "real": "long", "alone": "dashdot"}
_GROUPS = 12  # numbers of ranks that have bars at most

_Row = Dict[str, Any]


def benchmark_page(record: Dict[str, Any]) -> str:
    """Returns the page. record: as `commands.benchmark` writes it as JSON."""
    flags, rows = record["flags"], record["rows"]
    title = f"Benchmark: {flags['model']} on {record['machine']['kind']}"
    links = [
        ("rates", "Images/s"),
        ("limit", "What limits it"),
        ("time", "Where the time went"),
        ("conditions", "Conditions"),
    ]
    content = [_rates(rows), _limit(rows), _time(rows), _conditions(record)]
    return page(title, f"Measured by hvd-vgg benchmark {__version__} at {record['date']}.", links, join(content))


def _rates(rows: Sequence[_Row]) -> Markup:
    """Returns the figures of images/s and efficiency, and the table of all that was measured."""
    ranks, inputs = _distinct(rows, "ranks"), _distinct(rows, "input")

    def column(kind: str, value: Callable[[_Row], float]) -> np.ndarray:
        found = {row["ranks"]: value(row) for row in rows if row["input"] == kind}
        return np.array([found.get(number, math.nan) for number in ranks], np.float64)

    last = ranks[-_GROUPS:]
    names = [str(number) for number in last]
    series = [
        Bars(
            _NAMES[kind],
            column(kind, lambda row: row["fps"])[-len(last) :],
            column(kind, lambda row: row.get("fps_standard_deviation", 0.0))[-len(last) :],
            _COLOURS[kind],
        )
        for kind in inputs
    ]
    text = "Images/s of all ranks together; the line on a bar: the standard deviation of single updates' images/s."
    drawn = [framed("Images/s by input", bars("rates", names, series, "ranks"), squares(_colours(inputs)), text)]
    if len(ranks) > 1:
        x = np.array(ranks, np.float64)
        lines = [
            Line(_NAMES[kind], x, column(kind, lambda row: row["efficiency"]), _COLOURS[kind], _STYLES[kind], True)
            for kind in inputs
        ]
        text = f"Images/s of a rank, in shares of those on {plural(ranks[0], 'rank')}."
        svg = curves("efficiency", lines, "ranks", least=0.0, ticks=ranks)
        drawn.append(framed("Efficiency against ranks", svg, legend(lines), text))
    return section("rates", "Images/s", tag("div", join(drawn), 'class="figures"'), _table(rows))


def _table(rows: Sequence[_Row]) -> Markup:
    peak = any("share_of_peak" in row for row in rows)
    headings = ["ranks", "input", "images/s", "deviation", "per rank", "efficiency", "TFLOP/s per rank"]
    headings += ["of peak"] * peak + ["bottleneck"]

    def cells(row: _Row) -> List[Any]:
        known = [
            format_number(row["fps"], ".1f"),
            format_number(row.get("fps_standard_deviation"), ".1f"),
            format_number(row["fps"] / row["ranks"], ".1f"),
            format_number(row["efficiency"], ".1%"),
            format_number(row.get("tflops_per_rank"), ".3g"),
        ]
        known += [format_number(row.get("share_of_peak"), ".1%")] * peak
        return [row["ranks"], _NAMES[row["input"]], *known, _bottleneck(row)]

    numbers = [0, *range(2, len(headings) - 1)]
    return table(headings, map(cells, rows), "What was measured", numbers=numbers, kind="tight")


def _bottleneck(row: _Row) -> str:
    slow = "" if row.get("slow_rank") is None else f" of rank {row['slow_rank']}"
    return f"{row.get('bottleneck', '-')}{slow}"


def _limit(rows: Sequence[_Row]) -> Markup:
    """Returns what limits training on each number of ranks, by the real pipeline where it was measured."""
    return section("limit", "What limits it", bullets(_sentences(rows)))


def _sentences(rows: Sequence[_Row]) -> Iterator[str]:
    for number in _distinct(rows, "ranks"):
        found = {row["input"]: row for row in rows if row["ranks"] == number}
        shown = found.get("real") or found["host"]
        text = f"{plural(number, 'rank')}, {_NAMES[shown['input']]}: {shown['fps']:.1f} images/s, limited by: "
        text += f"{_bottleneck(shown)}; {shown['fps'] / found['device']['fps']:.1%} of what is reached without input"
        if "alone" in found:
            text += f"; the pipeline alone, with no training beside it, gives {found['alone']['fps']:.1f}"
        yield f"{text}."


def _time(rows: Sequence[_Row]) -> Markup:
    tables = [
        rank_table(row["by_rank"], f"on {plural(row['ranks'], 'rank')}, {_NAMES[row['input']]}")
        for row in rows
        if row.get("by_rank")
    ]
    return section("time", "Where the time went", *tables, keys(list(TIMES)))


def _conditions(record: Dict[str, Any]) -> Markup:
    flags, machine, number = record["flags"], record["machine"], record["images_per_rank"]
    device = ", ".join(f"{name} {value}" for name, value in machine.items() if name != "hosts")
    rows: List[Tuple[str, Any]] = [
        ("network", f"{flags['model']} at width {flags['width']:g}, {flags['image_size']} pixels, {flags['precision']}"),
        ("images per rank", f"{number} in an update, in micro-batches of at most {flags['device_batch']}"),
        (
            "measured",
            f"{plural(record['updates'], 'update')} per row, {plural(record['updates'] * number, 'image')} per rank",
        ),
        ("device of rank 0", short(device)),
        ("software", short(", ".join(f"{name} {value}" for name, value in record["software"].items()))),
    ]
    headings = ("host", "processor", "cores", "accelerator", "its driver")
    hosts = [
        [short(host.get(name) or "-") for name in ("host", "cpu", "cores", "gpu", "driver")] for host in machine["hosts"]
    ]
    listed = table(headings, hosts, "Hosts, each by its first rank", numbers=(2,))
    return section("conditions", "Conditions", pairs(rows), listed, flag_tables(flags, BenchmarkConfig))


def _distinct(rows: Sequence[_Row], name: str) -> List[Any]:
    return list(dict.fromkeys(row[name] for row in rows))


def _colours(inputs: Sequence[str]) -> Dict[str, int]:
    return {_NAMES[kind]: _COLOURS[kind] for kind in inputs}
