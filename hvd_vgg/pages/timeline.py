"""Where the wall time of a run went, by the hour, and what happened when: from its log and the reports beside it."""

import math
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Set, Tuple

from hvd_vgg.errors import DONE, STOPPED
from hvd_vgg.pages.curves import (
    began,
    flag_text,
    hours_since,
    made_again,
    number,
    number_list,
    process_began,
    text_list,
    whole,
)
from hvd_vgg.reporting.receipt import LogLine, read_json_lines
from hvd_vgg.run_dir import RunDir
from hvd_vgg.text import format_duration, plural

_NAMED, _RANKS = 8, 4096  # ranks that one text names, and among which those without a report are looked for
_NEWLINE = "\n"
Span = Tuple[float, float]  # begin and end, in hours since the first start


class Event(NamedTuple):
    """Something that happened. hours: since the first start; kind: start, fault, change or end; what: of any text."""

    hours: float
    step: int  # updates made by then as far as the log says; -1 where unknown
    kind: str
    what: str


def spans(lines: Sequence[LogLine]) -> Dict[str, List[Span]]:
    """Returns when a run was in each part that `reporting.goodput` names; to the precision of a log line.

    The sums of `Goodput` are exact; here the updates since the last line are taken to be what ended with it.
    """
    found: Dict[str, List[Span]] = {}
    origin, mark, gap = began(lines), math.nan, ""

    def add(part: str, begin: float, end: float) -> None:
        if end > begin:
            found.setdefault(part, []).append(((begin - origin) / 3600, (end - origin) / 3600))

    for line, floor in zip(lines, made_again(lines)):
        now, data = line.timestamp, line.data
        if not math.isfinite(now):
            continue
        if line.kind == "start":
            process = process_began(line)
            if not math.isnan(mark):
                add("stopped" if gap == "stopped" else "restarting", mark, process)
            add("starting", process, now)
            mark, gap = now, "starting"
        elif math.isnan(mark):
            continue
        elif line.kind == "train":
            updates = number_list(data.get("train.update_seconds"))
            began_updates = max(mark, now - sum(updates))
            add(gap, mark, began_updates)
            kept = max(0, min(len(updates), floor - whole(line.step) + len(updates)))
            cut = began_updates + sum(updates[:kept])
            add("training", began_updates, min(cut, now) if kept < len(updates) else now)
            add("recomputed", cut, now if kept < len(updates) else cut)
            mark, gap = now, "saving"
        elif line.kind == "rewind":
            cut = min(now, mark + sum(number_list(data.get("update_seconds"))))
            add("recomputed", mark, cut)
            add("rewinding", cut, now)
            mark = now
        elif line.kind == "suspended":
            cut = max(mark, now - max(0.0, number(data.get("seconds"))))
            add("training" if gap == "saving" else gap, mark, cut)
            add("suspended", cut, now)
            mark = now
        elif line.kind == "evaluation":
            add("evaluation", mark, now)
            mark = now
        elif line.kind in ("throughput", "end", "stopped"):
            add("saving", mark, now)
            mark, gap = max(mark, now), gap if line.kind == "throughput" else "stopped"
    return _joined(found)


def _joined(found: Dict[str, List[Span]]) -> Dict[str, List[Span]]:
    """Returns spans of which neighbours that no eye tells apart are one."""
    ends = [end for each in found.values() for _, end in each]
    least = max(ends, default=0.0) / 1000
    found["saving"] = [
        (begin, end) for begin, end in found.get("saving", []) if end - begin > least / 2
    ]  # a line of the log
    joined: Dict[str, List[Span]] = {}
    for part, each in found.items():
        rows = joined.setdefault(part, [])
        for begin, end in sorted(each):
            if rows and begin - rows[-1][1] < least:
                rows[-1] = rows[-1][0], max(end, rows[-1][1])
            else:
                rows.append((begin, end))
    return joined


def events(run: RunDir, lines: Sequence[LogLine]) -> List[Event]:
    """Returns what happened in a run, in order of time, from its log, its launcher and the reports of its ranks.

    What several of them say of one fault, start or stop is one event.
    """
    origin, found = began(lines), _of_log(lines)
    reports = [row for path in sorted(run.faults.glob("*.rank*.jsonl")) for row in read_json_lines(path)]
    found += [*_of_reports(reports), *_of_hangs(reports, lines)]
    found += _of_launcher(read_json_lines(run.restarts), [number(row.get("time")) for row in reports], lines)
    timed = [event._replace(hours=hours_since(origin, event.hours)) for event in found]
    return sorted(timed, key=lambda event: (math.isnan(event.hours), event.hours if not math.isnan(event.hours) else 0.0))


# Below, `hours` of an event is seconds since 1970, as files have them.


def _of_log(lines: Sequence[LogLine]) -> List[Event]:
    found: List[Event] = []
    loaded: List[Event] = []  # what a start has loaded, which the log has before the start
    known: Set[str] = set()  # records that were replaced
    starts, ranks, reached = 0, 0, -1
    for line in lines:
        if line.kind == "start":
            starts += 1
            texts = [_describe_start(line, starts, ranks), *(event.what for event in loaded)]
            again = reached - whole(line.step, reached)
            if again > 0:
                texts.append(f"made again: {plural(again, 'update')} up to step {reached}, the last in the log")
            found.append(Event(process_began(line), whole(line.step), "start", "; ".join(texts)))
            ranks, reached, loaded = whole(line.data.get("ranks"), 0), whole(line.step), []
            continue
        if line.kind in ("train", "evaluation"):
            reached = whole(line.step, reached)
        elif line.kind == "rewind":
            reached = whole(line.data.get("to"), reached)
        elif line.kind == "coverage" and isinstance(line.data.get("replaced"), list):
            new = [each for each in map(str, line.data["replaced"]) if each not in known]
            known.update(new)
            line = line._replace(data={**line.data, "replaced": new})
        elif line.kind == "bad_record":
            known.add(str(line.data.get("record")))
        step = whole(line.step) if whole(line.step) >= 0 else reached
        told = [Event(line.timestamp, step, kind, what) for kind, what in _of_line(line)]
        (loaded if line.kind in _LOADED else found).extend(told)
    return [*found, *loaded]


def _describe_start(line: LogLine, starts: int, before: int) -> str:
    """Returns the text of a start, the `starts`-th, after one of `before` ranks."""
    ranks, hosts = whole(line.data.get("ranks"), 0), text_list(line.data.get("hosts"))
    where = f" on {', '.join(dict.fromkeys(hosts))}" if hosts else ""
    other = f" instead of {before}" if before > 0 and before != ranks else ""
    name = "start" if starts == 1 else f"start {starts}"
    return f"{name}: {plural(ranks, 'rank')}{where}{other}, from step {line.data.get('step')}"


def _of_reports(rows: Sequence[Dict[str, Any]]) -> Iterator[Event]:
    """Yields the faults that ranks reported, but for hangs."""
    for row in rows:
        if "error" in row:
            what = f"rank {row.get('rank')} on {row.get('host')}: {str(row['error']).split(_NEWLINE)[0]}"
            yield Event(number(row.get("time")), whole(row.get("step")), "fault", what)


def _of_hangs(rows: Sequence[Dict[str, Any]], lines: Sequence[LogLine]) -> Iterator[Event]:
    """Yields a fault for each start that hung: who noticed it, and who said nothing. The culprit may be either."""
    starts = [(line.timestamp, whole(line.data.get("ranks"), 0)) for line in lines if line.kind == "start"]
    by_start: Dict[int, List[Dict[str, Any]]] = {}
    for row in rows:
        if "error" not in row:
            by_start.setdefault(sum(begin <= number(row.get("time")) for begin, _ in starts), []).append(row)
    for start, reports in by_start.items():
        alike: Dict[Tuple[str, str], List[Dict[str, Any]]] = {}
        for row in reports:
            alike.setdefault((str(row.get("phase")), str(row.get("last_collective") or "")), []).append(row)
        texts = [_describe_hang(*where, each) for where, each in alike.items()]
        what = "; ".join([*texts[:_NAMED], *(["and more of such"] if len(texts) > _NAMED else [])])
        reported = {whole(row.get("rank")) for row in reports}
        silent = [str(rank) for rank in range(min(starts[start - 1][1], _RANKS) if start else 0) if rank not in reported]
        what += f". Rank {_some(silent)} left no report: the others may have waited for it" if silent else ""
        yield Event(number(reports[0].get("time")), whole(reports[0].get("step")), "fault", what)


def _describe_hang(phase: str, collective: str, reports: Sequence[Dict[str, Any]]) -> str:
    """Returns the text of reports of ranks that hung at the same place."""
    ranks = _some([f"{row.get('rank')} on {row.get('host')}" for row in reports])
    seconds = max((each for row in reports for each in number_list([row.get("silent_seconds")])), default=math.nan)
    silent = "" if math.isnan(seconds) else f", without progress for {format_duration(seconds)}"
    return f"rank {ranks}: hung in {phase}{silent}" + (f", last collective {collective}" if collective else "")


def _of_launcher(rows: Sequence[Dict[str, Any]], reported: Sequence[float], lines: Sequence[LogLine]) -> Iterator[Event]:
    """Yields how starts ended that did not reach the end of the run; reported: when ranks reported faults.

    A stop that the log has is left out.
    """
    ends = [row for row in rows if row.get("event") == "end"]
    stops = [line.timestamp for line in lines if line.kind == "stopped"]
    begin = -math.inf
    for index, row in enumerate(rows):
        if row.get("event") == "start":
            begin = number(row.get("time"))
        if row.get("event") != "end" or row.get("code") == DONE:
            continue
        time, following = number(row.get("time")), rows[index + 1] if index + 1 < len(rows) else {}
        if row.get("code") == STOPPED and any(begin <= each <= time for each in stops):
            continue
        what = f"the processes ended with exit code {row.get('code')}: {row.get('reason')}"
        if following.get("event") == "start":
            again = whole(following.get("attempt"), 0) > 0
            what += f"; {'the launcher started them again' if again else 'another launch went on later'}"
            ended_next = next((each for each in ends if each.get("job") == following.get("job")), {})
            idle = number(ended_next.get("lost_seconds")) if again else math.nan
            what += "" if math.isnan(idle) else f", and their first update was complete {format_duration(idle)} later"
        what += " (before the log begins)" if time < began(lines) else ""
        told = any(begin <= each <= time for each in reported)
        kind = "end" if row.get("code") == STOPPED else "change" if told else "fault"
        trained = [line for line in lines if line.kind in ("start", "train") and begin <= line.timestamp <= time]
        yield Event(time, whole(trained[-1].step) if trained else -1, kind, what)


def _some(names: Sequence[str]) -> str:
    """Returns names as a list, of many the first."""
    shown = ", ".join(names[:_NAMED])
    return f"{shown} and {len(names) - _NAMED} more" if len(names) > _NAMED else shown


def _of_line(line: LogLine) -> Iterator[Tuple[str, str]]:
    """Yields (kind, what) for a line, but for a start, that says that something happened."""
    data, kind = line.data, line.kind
    if kind == "coverage":
        replaced, skipped = data.get("replaced") or [], data.get("skipped") or 0
        if not data.get("known", True):
            yield "change", f"epoch {data.get('epoch')}: which records it was trained on is not proved"
        elif replaced or skipped:
            count = len(replaced) if isinstance(replaced, list) else replaced
            yield "change", f"epoch {data.get('epoch')}: {plural(whole(skipped, 0), 'record')} skipped, {count} replaced"
    elif kind == "bad_record":
        by, where = data.get("replaced_by", "?"), data.get("where") or f"record {data.get('record')}"
        outcome = "it counts as a miss" if by is None else f"record {by} of the split takes its place"
        split = "validation" if by is None else "training"
        yield "fault", f"bad record in the {split} data: {where}: {data.get('reason')}; {outcome}"
    elif kind == "throughput" and whole(data.get("slow_rank")) >= 0:
        yield "change", f"rank {data.get('slow_rank')} holds the others up ({data.get('bottleneck')})"
    elif kind in _TEXTS:
        sort, text = _TEXTS[kind]
        known = _Known((name, flag_text(value)) for name, value in data.items())
        seconds = number(data.get("seconds"))
        yield sort, text.format_map(known if math.isnan(seconds) else _Known(known, duration=format_duration(seconds)))


class _Known(Dict[str, Any]):
    """What a line says; `?` for what it should say and does not."""

    def __missing__(self, key: str) -> str:
        return "?"


_LOADED = ("resume", "init_from")  # the log has these before the start that they belong to
_TEXTS = {
    "resume": ("start", "continues from {checkpoint}"),
    "init_from": ("start", "weights from {file}"),
    "rewind": ("fault", "step {from} was not finite: back to step {to}, its records are skipped"),
    "nonfinite": ("fault", "step {step} was not finite; the run stopped"),
    "checkpoint_damaged": ("fault", "checkpoint {file} is damaged: {reason}"),
    "checkpoint_copy_used": ("change", "continues from the copy {file}"),
    "save_failed": ("fault", "a file could not be written: {error}"),
    "copy_failed": ("fault", "a checkpoint could not be copied: {error}"),
    "suspended": ("change", "the processes were suspended for {duration}"),
    "config_changed": ("change", "--{flag} changed from {before} to {after}"),
    "arithmetic_changed": ("change", "computes on another processor or with other settings: {after}"),
    "below_reference": ("change", "acc@1 is far below the reference curve"),
    "stopped": ("end", "stopped on request"),
    "end": ("end", "the end of the run"),
}
