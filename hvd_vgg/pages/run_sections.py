"""The sections of one run: its result with the proof, what ran, where the time went, evaluations, events, classes."""

import dataclasses
import math
import shlex
import time
from typing import Any, Dict, List, Sequence, Tuple

from hvd_vgg.config import TrainConfig
from hvd_vgg.pages.curves import began, flag_text, mapping, number, unit_of, updates_per_epoch, whole
from hvd_vgg.pages.facts import Facts, hosts_of, ranks_of, records_of
from hvd_vgg.pages.figures import TIMES, colour, framed, keys, timeline
from hvd_vgg.pages.markup import Markup, bullets, code, details, join, pairs, paragraph, section, table, tag
from hvd_vgg.reporting.goodput import PARTS
from hvd_vgg.reporting.table import order_of_class
from hvd_vgg.reporting.throughput import per_host
from hvd_vgg.text import format_duration, plural

_EVENTS, _EVALUATIONS, _RANKS, _CLASSES = 100, 200, 32, 20  # rows of tables
_TEXT = 300  # characters of a text that a file has
_RECIPE = ("optimizer", "lr", "lr_schedule", "momentum", "weight_decay", "global_batch")  # flags in the result
_SHARES = ("input", "compute", "network", "straggler_wait")
_VERDICTS = {"pass": "good", "fail": "bad", "unknown": "note"}
_WORDS = {"training": "It trains", "done": "It is done", "stopped": "It was stopped", "failed": "It failed"}
_WORDS["unreadable"] = "It cannot be read"


def short(value: Any) -> str:
    """Returns a value as text, of a long one the beginning."""
    text = str(value)
    return text if len(text) <= _TEXT else f"{text[:_TEXT]} ..."


def format_number(value: Any, form: str = "", unknown: str = "-") -> str:
    """Returns a number of a log with a format, as of `format`; `unknown` for what is none."""
    found = number(value)
    return unknown if math.isnan(found) else format(found, form)


def format_count(value: Any) -> str:
    """Returns a count or step of a log; `-` for what is none."""
    found = whole(value)
    return str(found) if found >= 0 else "-"


def state_text(facts: Facts) -> str:
    """Returns state and reason, as `runs` has them, as one sentence."""
    words, reason = _WORDS.get(facts.state, facts.state.capitalize()), facts.reason.strip()
    if not reason:
        return f"{words}."
    if reason.startswith("on "):  # a host, or request
        text = f"{words} {reason}"
    elif reason.startswith("it "):
        text = f"{words} and {reason[len('it ') :]}"
    else:
        text = f"{words}: {reason}"
    return text if text.endswith((".", "!", "?")) or "hvd-vgg " in reason else f"{text}."


def anchor_of(facts: Facts, name: str) -> str:
    """Returns the anchor of a section of a run."""
    return f"{name}-{facts.letter.lower()}" if facts.letter else name


def overview(facts: Facts, checks: Any) -> Markup:
    """Returns what became of a run, and what of it is missing or wrong; checks: as of `result`."""
    failed = [] if isinstance(checks, str) else [check for check in checks if check.verdict == "fail"]
    kind = {"done": "" if failed else "good", "failed": "bad", "unreadable": "bad"}.get(facts.state, "")
    parts = [paragraph(tag("span", short(state_text(facts)), f'class="{kind}"'))]
    if failed:
        text = f"{len(failed)} of {plural(len(checks), 'check')} of verify-run failed"
        link = tag("a", "details", f'href="#{anchor_of(facts, "result")}"')
        parts.append(paragraph(tag("span", text, 'class="bad"'), " (", link, ")."))
    times = [line.timestamp for line in facts.lines if line.kind and math.isfinite(line.timestamp)]
    if times:
        parts.append(paragraph(f"Started on {made_at(began(facts.lines))}; newest log line on {made_at(max(times))}."))
    missing = join([paragraph(tag("strong", "Missing or damaged:")), bullets(map(short, facts.missing))])
    link = tag("a", "what happened", f'href="#{anchor_of(facts, "events")}"')
    parts += [paragraph(_count_events(facts), ": ", link, ".")] if facts.events else []
    return join([*parts, *([tag("div", missing, 'class="missing"')] if facts.missing else [])])


def result(facts: Facts, checks: Any, level: int) -> Markup:
    """Returns the section of the result with its proof. checks: of `verify-run`, or the sentence why there are none."""
    return section(anchor_of(facts, "result"), "Result", _figure(facts), _proof(facts, checks), level=level)


def _figure(facts: Facts) -> Markup:
    found, newest = facts.result, facts.evaluations[-1].data if facts.evaluations else {}
    hits, records = whole(found.get("top1_hits")), whole(found.get("records_evaluated"))
    top5 = whole(found.get("top5_hits"))
    if hits < 0 or records <= 0:
        hits, records, top5 = (whole(newest.get(f"eval.{name}")) for name in ("top1_hits", "records", "top5_hits"))
    if hits < 0 or records <= 0:
        return paragraph("There is no result yet.")
    rows: List[Tuple[Any, Any]] = [
        ("acc@1", f"{hits} of {records} validation records"),
        ("acc@5", f"{top5} of {records}: {top5 / records:.4f}" if top5 >= 0 else "-"),
    ]
    trained = next((line.data for line in reversed(facts.lines) if line.kind == "train"), {})
    evaluated = newest.get("eval.loss") if whole(newest.get("eval.top1_hits")) == hits else None
    losses = [format_number(loss, ".4f") for loss in (evaluated, trained.get("train.loss"))]
    if any(each != "-" for each in losses):
        rows.append(("loss", f"{losses[0]} of the validation data; {losses[1]} of the last logged updates in training"))
    average = whole(found.get("average_top1_hits", newest.get("eval.average_top1_hits")))
    if average >= 0:
        rows.append(("acc@1 of the average of weights", f"{average} of {records}: {average / records:.4f}"))
    best = max(facts.evaluations, key=lambda line: whole(line.data.get("eval.top1_hits")), default=None)
    if best is not None and whole(best.data.get("eval.top1_hits")) > hits:
        rows.append(
            ("best evaluation", f"{format_number(best.data.get('eval.acc@1'), '.4f')} after step {format_count(best.step)}")
        )
    steps = whole(found.get("steps"), whole(facts.evaluations[-1].step) if facts.evaluations else -1)
    epochs = found.get("epochs", steps / updates_per_epoch(facts.lines) if steps >= 0 else None)
    rows.append(("after", f"{format_count(steps)} updates, {format_number(epochs, '.2f')} epochs"))
    recipe = {name: facts.flags[name] for name in _RECIPE if name in facts.flags}
    rows += [("recipe", short(flag_text(recipe)))] if recipe else []
    if found.get("fps"):
        rate, spread = (format_number(found.get(name), ".1f") for name in ("fps", "fps_jitter"))
        text = (
            f"{rate} images/s in the steady updates of the newest start; limited by: {found.get('bottleneck')}. Spread of "
        )
        text += f"single updates: {spread} images/s (1.4826 times the median absolute deviation)"
        rows.append(("throughput", text))
    if not math.isnan(number(found.get("seconds"))):
        wall, least = sum(_seconds_of_parts(facts).values()), format_duration(number(found["seconds"]))
        text = f"{least} without process start-up, downtime and updates made again"
        rows.append(("time", f"{format_duration(wall)} since the first start; {text}" if wall else text))
    return join([paragraph(f"acc@1 {hits / records:.4f}", kind="figure-of"), pairs(rows)])


def _proof(facts: Facts, checks: Any) -> Markup:
    digest = facts.result.get("state_sha256")
    if not digest and facts.evaluations:
        digest = facts.evaluations[-1].data.get("eval.state_sha256")
    command = f"hvd-vgg verify-run {shlex.quote(str(facts.run.path.resolve()))}"
    rows = [("state SHA-256", code(short(digest or "unknown"))), ("to verify it", code(command))]
    if isinstance(checks, str):
        return join([pairs([*rows, ("verification", checks)])])
    words = [check.verdict for check in checks]
    bad = [check for check in checks if check.verdict == "fail"]
    verdict = f"{words.count('pass')} passed, {words.count('fail')} failed, {words.count('unknown')} unknown"
    shown = tag("span", verdict, f'class="{"bad" if bad else "good"}"')
    listed = table(
        ("check", "verdict", "what was found"),
        [
            (each.subject, tag("span", each.verdict, f'class="{_VERDICTS[each.verdict]}"'), short(each.text))
            for each in checks
        ],
        "What verify-run finds without the data",
    )
    failed = bullets(join([each.subject, ": ", short(each.text)]) for each in bad[:3])
    return join([pairs([*rows, ("verification", shown)]), failed, details("All checks", listed)])


def what_ran(facts: Facts, level: int) -> Markup:
    """Returns the section of configuration, data, hosts and versions."""
    start, flags = facts.start, facts.flags
    hosts = [f"{ranks} on {host}" for host, ranks in hosts_of(facts)]
    shown = ", ".join(hosts[:16]) + (f" and {len(hosts) - 16} more hosts" if len(hosts) > 16 else "")
    total = "" if len(hosts) == 1 else f"{ranks_of(facts) or '?'}: "
    arithmetic, packages = mapping(start.get("arithmetic")), mapping(start.get("packages"))
    source = mapping(start.get("code"))
    rows: List[Tuple[Any, Any]] = [
        ("network", f"{flags.get('model', '?')} at width {flags.get('width', '?')}, {flags.get('image_size', '?')} pixels"),
        ("ranks", f"{total}{shown or 'unknown hosts'}"),
        (
            "device",
            ", ".join(str(arithmetic[name]) for name in ("device", "processor") if arithmetic.get(name)) or "unknown",
        ),
    ]
    for split in ("train", "validation"):
        data = records_of(facts, split)
        digest = join([f"{data.get('records', '?')} records, SHA-256 ", code(short(data.get("sha256", "unknown")))])
        rows.append((f"{split} data", digest))
    rows.append(
        ("code", join([f"hvd_vgg {source.get('version', '?')}, SHA-256 ", code(short(source.get("sha256", "unknown")))]))
    )
    rows.append(("packages", ", ".join(f"{name} {version}" for name, version in packages.items()) or "unknown"))
    listed = flag_tables(flags) if flags else paragraph("The log has no configuration.")
    return section(
        anchor_of(facts, "configuration"), "What ran", pairs([(a, short_cell(b)) for a, b in rows]), listed, level=level
    )


def flag_tables(flags: Dict[str, Any], kind: Any = TrainConfig) -> Markup:
    """Returns the flags that are not the defaults of a configuration of `kind`, and all of them when asked for."""
    changed = _changed_flags(flags, kind)
    own = (
        table(("flag", "value", "default"), changed, "Flags that are not the defaults")
        if changed
        else paragraph("All flags are the defaults.")
    )
    rows = [(f"--{name}", short(flag_text(value))) for name, value in sorted(flags.items())]
    return join([own, details("All flags", table(("flag", "value"), rows, "All flags of the run"))])


def short_cell(value: Any) -> Any:
    """Returns `short` of what is not markup."""
    return value if isinstance(value, Markup) else short(value)


def _changed_flags(flags: Dict[str, Any], kind: Any) -> List[Tuple[str, str, str]]:
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    pairs_ = ((name, flag_text(value), flag_text(defaults.get(name, ""))) for name, value in sorted(flags.items()))
    return [(f"--{name}", short(value), default) for name, value, default in pairs_ if value != default]


def where_time_went(facts: Facts, level: int) -> Markup:
    """Returns the section of goodput on the time axis, and of each host's and rank's time."""
    parts = [_goodput(facts)]
    rows = [mapping(row) for row in facts.throughput.get("by_rank") or [] if isinstance(row, dict)]
    if rows:
        parts += [rank_table(rows, "in the steady updates of the newest start"), keys(list(TIMES))]
    else:
        parts.append(
            paragraph("The log does not say where each rank's time went: it does with the first result.", kind="note")
        )
    return section(anchor_of(facts, "time"), "Where the time went", *parts, level=level)


def rank_table(rows: Sequence[Dict[str, Any]], when: str) -> Markup:
    """Returns the table of where each rank's time went, for rows of `throughput.per_rank`; when: for its caption.

    Its bars have the colours of `keys(list(TIMES))`.
    """
    hosts = [{**row, "rank": f"all {row['ranks']}"} for row in per_host(rows)]
    ranks = rows if len(rows) <= _RANKS else sorted(rows, key=lambda row: number(row.get("fps_alone")))[:_RANKS]
    what = "each rank's" if len(ranks) == len(rows) else f"of the {_RANKS} slowest of {len(rows)} ranks the"
    caption = f"Where {what} time went {when}; images/s alone: without its waits for input, network and other ranks"
    headings = ("rank", "host", "images/s", "alone", *TIMES, "")
    shown = (hosts if len(hosts) > 1 else []) + list(ranks)
    return table(headings, map(_rank_row, shown), caption, numbers=range(2, 8), kind="tight")


def _rank_row(row: Dict[str, Any]) -> List[Any]:
    shares = [number(row.get(name)) for name in _SHARES]
    widths = [0.0 if math.isnan(share) else min(max(share, 0.0), 1.0) for share in shares]
    colours = map(colour, TIMES.values())
    bar = join(Markup(f'<span style="width: {width:.1%}; background: {c}"></span>') for c, width in zip(colours, widths))
    texts = [format_number(share, ".1%") for share in shares]
    rates = [format_number(row.get(name), ".1f") for name in ("fps", "fps_alone")]
    return [
        short(row.get("rank")),
        short(row.get("host")),
        *rates,
        *texts,
        tag("div", bar, 'class="parts" aria-hidden="true"'),
    ]


def _seconds_of_parts(facts: Facts) -> Dict[str, float]:
    """Returns the seconds of each part of goodput that the log has."""
    found = mapping(facts.goodput.get("goodput_seconds"))
    return {part: number(found[part]) for part in PARTS if not math.isnan(number(found.get(part)))}


def _goodput(facts: Facts) -> Markup:
    seconds = _seconds_of_parts(facts)
    wall = sum(seconds.values())
    if not wall:
        return paragraph("The log has no time that could be divided.", kind="note")
    svg = timeline(f"timeline{facts.letter.lower()}", facts.spans, facts.events, *unit_of(wall / 3600))
    text = "Events: a triangle is a start, a cross a fault, a diamond a change, a square an end; they are listed below."
    drawn = framed("The run on the time axis", svg, Markup(), text)
    share = format_number(facts.goodput.get("goodput"), ".1%")
    rows = [(part, format_duration(value), f"{value / wall:.1%}") for part, value in seconds.items() if value >= 0.05]
    listed = table(("part", "time", "share"), rows, f"All {format_duration(wall)} since the first start", numbers=(1, 2))
    text = paragraph("Goodput: ", tag("strong", share), " of the wall time went into updates that count.")
    return join([text, tag("div", join([drawn, listed]), 'class="beside"')])


def evaluations(facts: Facts, level: int) -> Markup:
    """Returns the section of all evaluations."""
    found = facts.evaluations
    if not found:
        return section(anchor_of(facts, "evaluations"), "Evaluations", paragraph("There is none in the log."), level=level)
    averages = any("eval.average_top1_hits" in line.data for line in found)
    references = any("eval.reference_difference" in line.data for line in found)
    headings = ["step", "epoch", "acc@1", "acc@5", "hits", "records", "loss"]
    headings += ["acc@1 of the average"] * averages + ["beside the reference"] * references
    headings.append("state SHA-256, first 16 digits")
    per_epoch, shown = updates_per_epoch(facts.lines), found[-_EVALUATIONS:]

    def row(data: Dict[str, Any], step: int) -> List[Any]:
        epoch = format_number(step / per_epoch if step >= 0 else None, ".2f")
        cells = [format_count(step), epoch, format_number(data.get("eval.acc@1"), ".4f")]
        cells += [
            format_number(data.get("eval.acc@5"), ".4f"),
            format_count(data.get("eval.top1_hits")),
            format_count(data.get("eval.records")),
        ]
        cells += [format_number(data.get("eval.loss"), ".4f")]
        cells += [format_number(data.get("eval.average_acc@1"), ".4f")] * averages
        cells += [format_number(data.get("eval.reference_difference"), "+.4f")] * references
        return [*cells, code(str(data.get("eval.state_sha256", ""))[:16])]

    rows = [row(line.data, whole(line.step)) for line in shown]
    more = f", the last {len(shown)} of {len(found)}" if len(shown) < len(found) else ""
    listed = table(headings, rows, f"Evaluations{more}", numbers=range(len(headings) - 1), kind="tight")
    return section(anchor_of(facts, "evaluations"), "Evaluations", listed, level=level)


def what_happened(facts: Facts, level: int) -> Markup:
    """Returns the section of starts, restarts, faults and what else happened."""
    found = facts.events
    text = f"{_count_events(facts)}." if found else "Nothing is known."
    shown = found if len(found) <= 2 * _EVENTS else [*found[:_EVENTS], *found[-_EVENTS:]]
    more = f", {len(found) - len(shown)} in the middle left out" if len(shown) < len(found) else ""
    rows = [
        (
            "?" if math.isnan(event.hours) else clock(event.hours),
            "" if event.step < 0 else event.step,
            tag("span", event.kind, 'class="bad"') if event.kind == "fault" else event.kind,
            short(event.what),
        )
        for event in shown
    ]
    listed = table(
        ("time", "step", "kind", "what"),
        rows,
        f"Hours:minutes:seconds since the first start, {made_at(began(facts.lines))}{more}",
        numbers=(0, 1),
        kind="loose",
    )
    return section(anchor_of(facts, "events"), "What happened", paragraph(text), listed if rows else "", level=level)


def _count_events(facts: Facts) -> str:
    """Returns how many starts, faults and stops a run had."""
    kinds = [line.kind for line in facts.lines]
    starts, stops = plural(kinds.count("start"), "start"), plural(kinds.count("stopped"), "stop")
    faults = plural(sum(event.kind == "fault" for event in facts.events), "fault")
    return f"{starts}, {faults} and {stops} on request" if "stopped" in kinds else f"{starts} and {faults}"


def clock(hours: float) -> str:
    """Returns a time as hours, minutes and seconds, such as `12:05:09`."""
    seconds = round(abs(hours) * 3600)
    return f"{'-' if hours < 0 and seconds else ''}{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def classes(facts: Facts, level: int) -> Markup:
    """Returns the section of the classes with the least accuracy; nothing where class_hits.csv is not there."""
    known = [row for row in facts.classes if row.records > 0]
    if not known:
        return Markup()
    worst = sorted(known, key=lambda row: order_of_class(row.top1, row.records, row.label))[:_CLASSES]
    rows = [
        (class_text(row.label, row.name), f"{row.top1 / row.records:.4f}", row.top1, row.top5, row.records) for row in worst
    ]
    headings = ("class", "acc@1", "top-1 hits", "top-5 hits", "records")
    which = f"The {len(worst)}" if len(worst) < len(known) else "All"
    caption = f"{which} of {plural(len(known), 'class')}, lowest acc@1 first"
    listed = table(headings, rows, caption, numbers=(1, 2, 3, 4))
    about = paragraph(_origin_of_classes(facts), kind="note")
    return section(anchor_of(facts, "classes"), "Worst classes", about, listed, level=level)


def _origin_of_classes(facts: Facts) -> str:
    """Returns of which evaluation class_hits.csv is, by its totals: of the newest that has them."""
    names = ("top1_hits", "top5_hits", "records")
    totals = tuple(sum(column) for column in zip(*((row.top1, row.top5, row.records) for row in facts.classes)))
    found = [line for line in facts.evaluations if tuple(line.data.get(f"eval.{name}") for name in names) == totals]
    result = tuple(facts.result.get(name) for name in (*names[:2], "records_evaluated"))
    of = f"class_hits.csv ({totals[0]} top-1 and {totals[1]} top-5 hits of {plural(totals[2], 'record')}) matches"
    if found and found[-1] is facts.evaluations[-1]:
        return f"{of} the newest evaluation, after step {format_count(found[-1].step)}."
    if found:
        steps = [format_count(line.step) for line in (found[-1], facts.evaluations[-1])]
        return f"{of} an earlier evaluation, after step {steps[0]}; the newest is after step {steps[1]}."
    if result == totals and not facts.evaluations:
        return f"{of} the evaluation in result.json."
    return f"{of} no evaluation in the log."


def class_text(number: int, name: str) -> str:
    """Returns a class with the first of its names."""
    return short(f"{number} {name.partition(',')[0]}".rstrip())


def made_at(now: float) -> str:
    """Returns a time, in seconds since 1970, for people."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(now))
    except (OverflowError, OSError, ValueError):  # a damaged log has any number
        return "an unknown day"


def joined_hosts(facts: Facts) -> str:
    """Returns the hosts of a run with their ranks, for a table; "" where the log does not say."""
    return ", ".join(f"{host} x {ranks}" for host, ranks in hosts_of(facts)[:16])
