"""The page of `hvd-vgg report`: of one run, or of several side by side."""

import dataclasses
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Sequence, Tuple

from hvd_vgg import __version__
from hvd_vgg.config import TrainConfig
from hvd_vgg.pages import mistakes
from hvd_vgg.pages import run_sections as sections
from hvd_vgg.pages.charts import draw_curves
from hvd_vgg.pages.curves import flag_text, mapping, whole
from hvd_vgg.pages.facts import DAMAGED, Facts, ranks_of, records_of
from hvd_vgg.pages.figures import both_axes
from hvd_vgg.pages.markup import Markup, bullets, code, join, page, paragraph, section, table, tag
from hvd_vgg.text import plural

# Of these runs differ by nature.
_OWN = {"run_dir", "console", "verbose", "metrics_file", "predictions_file", "checkpoint_copy_dir"}
_UNKNOWN = "-"  # in the tables of differences: the log does not say
_NAMED = 6  # flags or packages that one sentence names


_Row = Tuple[str, List[str]]  # a name with the value of each run


class Comparison(NamedTuple):
    """Where a run parts from the first, as `verify-run --same_as` has it.

    letters: of both; faults: [] if they are the same.
    """

    letters: Tuple[str, str]
    faults: List[str]
    conclusion: str


def report_page(
    runs: Sequence[Facts],
    checks: Sequence[Any],
    sheets: Sequence[mistakes.Sheet],
    comparisons: Sequence[Comparison],
    now: float,
    refresh_seconds: float = 0,
) -> str:
    """Returns the page; checks: of each run, as `run_sections.result` takes them; now: seconds since 1970."""
    single = len(runs) == 1
    title = f"Run {runs[0].run.path.resolve().name}" if single else f"{plural(len(runs), 'run')} side by side"
    about = join([f"Made by hvd-vgg report {__version__} on {sections.made_at(now)}."])
    if refresh_seconds:
        about = join([about, f" The run trains: this page is renewed, and read again, every {refresh_seconds:g} s."])
    body: List[Any] = []
    links: List[Tuple[str, str]] = []
    if not single:
        links += [("side-by-side", "Side by side"), ("differences", "Differences")]
        body += [
            _safely("Side by side", lambda: _side_by_side(runs)),
            _safely("Differences", lambda: _differences(runs, comparisons)),
        ]
    curves = _safely("Curves", lambda: _curves(runs))
    if not single:
        body.append(curves)
        links.append(("curves", "Curves"))
    for facts, found, sheet in zip(runs, checks, sheets):
        inner = _run(facts, found, sheet, curves if single else Markup(), 2 if single else 3)
        anchor = f"run-{facts.letter.lower()}"
        body.append(inner if single else section(anchor, f"Run {facts.name}", inner))
        if not single:
            links.append((anchor, f"Run {facts.letter}"))
    if single:
        names = ("result", "Result"), ("curves", "Curves"), ("time", "Time"), ("events", "What happened")
        links += [*names, ("evaluations", "Evaluations"), ("configuration", "What ran")]
        links += [("classes", "Worst classes")] if any(row.records > 0 for row in runs[0].classes) else []
        links += [("confusions", "Confused classes")] if runs[0].confusions else []
        links += [("errors", "Confident errors")] if runs[0].errors else []
    return page(title, about, links, join(body), refresh_seconds)


def _run(facts: Facts, checks: Any, sheet: mistakes.Sheet, curves: Markup, level: int) -> Markup:
    """Returns all sections of a run. A damaged part does not take the others with it."""
    parts: List[Tuple[str, Callable[[], Markup]]] = [
        ("Overview", lambda: sections.overview(facts, checks)),
        ("Result", lambda: sections.result(facts, checks, level)),
        ("Curves", lambda: curves),
        ("Where the time went", lambda: sections.where_time_went(facts, level)),
        ("What happened", lambda: sections.what_happened(facts, level)),
        ("Evaluations", lambda: sections.evaluations(facts, level)),
        ("What ran", lambda: sections.what_ran(facts, level)),
    ]
    by_class = [
        _safely("Worst classes", lambda: sections.classes(facts, level)),
        _safely("Most confused classes", lambda: mistakes.confused(facts, level)),
    ]
    errors = _safely("Most confident errors", lambda: mistakes.errors(facts, sheet, level))
    shown = (_safely(name, make) for name, make in parts)
    return join([*shown, tag("div", join(by_class), 'class="beside"'), errors])


def _safely(name: str, make: Callable[[], Markup]) -> Markup:
    """Returns a section, or why damaged files do not allow it."""
    try:
        return make()
    except DAMAGED as error:
        why = "for the run's files are damaged, or not what a run writes"
        text = f"{name}: cannot be shown, {why} ({type(error).__name__}: {error})"
        return paragraph(sections.short(text), kind="missing")


def _curves(runs: Sequence[Facts]) -> Markup:
    drawn = both_axes(lambda axis: draw_curves(runs, axis))
    return section("curves", "Curves", drawn or paragraph("The log has no numbers to draw."))


def _side_by_side(runs: Sequence[Facts]) -> Markup:
    rows = []
    for facts in runs:
        found, newest = facts.result, facts.evaluations[-1].data if facts.evaluations else {}
        step = max((whole(line.step) for line in facts.lines if line.kind in ("train", "evaluation", "start")), default=-1)
        top1, top5 = (found.get(name, newest.get(f"eval.{name}")) for name in ("acc@1", "acc@5"))
        cells = [sections.format_number(each, ".4f") for each in (top1, top5)]
        cells += [str(step) if step >= 0 else "-", sections.format_number(found.get("epochs"), ".2f")]
        cells += [
            sections.format_number(found.get("fps"), ".1f"),
            sections.format_number(facts.goodput.get("goodput"), ".1%"),
        ]
        state = sections.short(sections.state_text(facts))
        rows.append([facts.letter, sections.short(facts.run.path), state, *cells, ranks_of(facts) or "-"])
    headings = ("run", "directory", "state", "acc@1", "acc@5", "updates", "epochs", "images/s", "goodput", "ranks")
    return section("side-by-side", "Side by side", table(headings, rows, "The runs", numbers=range(3, 10)))


def _differences(runs: Sequence[Facts], comparisons: Sequence[Comparison]) -> Markup:
    """Returns what differs in flags, software and hosts, and where runs part in bits."""
    parted = [_where_they_part(each) for each in comparisons]
    headings = ("", *(facts.letter for facts in runs))
    names = [field.name for field in dataclasses.fields(TrainConfig) if field.name not in _OWN]
    flags = [(f"--{name}", [_flag(facts, name) for facts in runs]) for name in names]
    software = _software(runs)
    silent = [*_silent(runs, flags, "flag"), *_silent(runs, software, "item of data, hosts and software")]
    known = ", as far as the logs say" if silent else ""
    return section(
        "differences",
        "Differences",
        join([paragraph("Left out of the comparison:"), bullets(silent)]) if silent else "",
        paragraph("As ", code("hvd-vgg verify-run A --same_as=B"), " compares them:"),
        bullets(parted),
        _table_of(headings, flags, "Flags that differ")
        or paragraph(f"All flags but those of paths and console are the same{known}."),
        _table_of(headings, software, "Data, hosts and software that differ")
        or paragraph(f"Data, hosts and software are the same{known}."),
    )


def _table_of(headings: Sequence[str], rows: Sequence[_Row], caption: str) -> Markup:
    """Returns the table of rows in which known values differ; nothing where there is none."""
    differing = [[name, *values] for name, values in rows if len({*values} - {_UNKNOWN}) > 1]
    return table(headings, differing, caption) if differing else Markup()


def _silent(runs: Sequence[Facts], rows: Sequence[_Row], noun: str) -> Iterator[str]:
    """Yields for each run of whose log some of the rows' values are missing a sentence that says which."""
    for index, facts in enumerate(runs):
        missing = [name for name, values in rows if values[index] == _UNKNOWN]
        if len(missing) == len(rows):
            yield f"The log of {facts.letter} has no {noun}."
        elif missing:
            more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
            yield sections.short(f"The log of {facts.letter} does not have {', '.join(missing[:_NAMED])}{more}.")


def _where_they_part(found: Comparison) -> Markup:
    """Returns what a comparison says; of the flags that it names how many there are, since a table has them."""
    said = [part for fault in found.faults for part in fault.split("; ")]
    flags = [part for part in said if part.startswith("--")]
    rest = [part for part in said if part not in flags]
    differ = f"{len(flags)} differ{'s' if len(flags) == 1 else ''}"
    counted = [f"of the flags that decide what is learned {differ} (below)"] if flags else []
    text = paragraph(f"{found.letters[0]} and {found.letters[1]}: ", *([] if said else [sections.short(found.conclusion)]))
    return join([text, bullets(map(sections.short, [*rest, *counted]))])


def _flag(facts: Facts, name: str) -> str:
    return sections.short(flag_text(facts.flags[name])) if name in facts.flags else _UNKNOWN


def _software(runs: Sequence[Facts]) -> List[_Row]:
    """Returns rows of everything else that may decide speed or bits, with each run's value."""
    columns: List[Dict[str, Any]] = []
    for facts in runs:
        start = facts.start
        column = {f"{split} data, sha256": records_of(facts, split).get("sha256") for split in ("train", "validation")}
        column.update(hosts=sections.joined_hosts(facts) or None, ranks=ranks_of(facts) or None)
        for name in ("code", "packages", "environment", "arithmetic"):
            column.update({f"{name}: {key}": value for key, value in mapping(start.get(name)).items()})
        column.update({key: value for key, value in facts.software.items() if key in ("horovod", "controller", "device")})
        columns.append(column)
    every = dict.fromkeys(name for column in columns for name, value in column.items() if value is not None)

    def value(facts: Facts, column: Dict[str, Any], name: str) -> str:
        if column.get(name) is None:  # a log has the variables that were set, and so says of the others that they were not
            unset = name.startswith("environment: ") and isinstance(facts.start.get("environment"), dict)
            return "not set" if unset else _UNKNOWN
        text = sections.short(column[name])
        return text[:16] if name.lower().endswith("sha256") else text

    return [(name, [value(facts, column, name) for facts, column in zip(runs, columns)]) for name in every]
