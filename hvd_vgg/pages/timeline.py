"""Where the wall time of a run went, by the hour, and what happened when: from its log and the reports beside it."""

import math
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Tuple

from hvd_vgg.pages.curves import began, hours_since, made_again, number, number_list, text_list, whole
from hvd_vgg.reporting.receipt import LogLine, read_json_lines
from hvd_vgg.run_dir import RunDir
from hvd_vgg.text import format_duration, plural

Span = Tuple[float, float]  # begin and end, in hours since the first start


class Event(NamedTuple):
    """Something that happened. hours: since the first start; kind: start, fault, change or end; what: of any text."""

    hours: float
    step: int  # -1 where unknown
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
            process = now - (number(data.get("process_seconds")) if "process_seconds" in data else 0.0)
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
    """Returns what happened in a run, in order of time, from its log, its launcher and the reports of its ranks."""
    origin, found, starts = began(lines), [], 0
    for line in lines:
        if line.kind == "start":
            starts += 1
        for kind, what in _of_line(line, starts):
            found.append(Event(hours_since(origin, line.timestamp), whole(line.step), kind, what))
    for row in read_json_lines(run.restarts):
        if row.get("event") == "end" and row.get("code") != 0:
            lost = number(row.get("lost_seconds"))
            text = f"the launcher saw the processes end with {row.get('code')}: {row.get('reason')}"
            text += "" if math.isnan(lost) else f"; {format_duration(lost)} of work lost"
            found.append(Event(hours_since(origin, number(row.get("time"))), -1, "fault", text))
    for path in sorted(run.faults.glob("*.rank*.jsonl")):
        for row in read_json_lines(path):
            what = str(row.get("error") or f"hung in {row.get('phase')}").split("\n")[0]
            text = f"rank {row.get('rank')} on {row.get('host')}: {what}"
            found.append(Event(hours_since(origin, number(row.get("time"))), whole(row.get("step")), "fault", text))
    return sorted(found, key=lambda event: (math.isnan(event.hours), event.hours if not math.isnan(event.hours) else 0.0))


def _of_line(line: LogLine, starts: int) -> Iterator[Tuple[str, str]]:
    """Yields (kind, what) for a line that says that something happened."""
    data, kind = line.data, line.kind
    if kind == "start":
        hosts = text_list(data.get("hosts"))
        where = f" on {', '.join(dict.fromkeys(hosts))}" if hosts else ""
        name = "start" if starts == 1 else f"start {starts}"
        yield "start", f"{name}: {plural(whole(data.get('ranks'), 0), 'rank')}{where}, from step {data.get('step')}"
    elif kind == "coverage":
        replaced, skipped = data.get("replaced") or [], data.get("skipped") or 0
        if not data.get("known", True):
            yield "change", f"epoch {data.get('epoch')}: which records it was trained on is not proved"
        elif replaced or skipped:
            count = len(replaced) if isinstance(replaced, list) else replaced
            yield "change", f"epoch {data.get('epoch')}: {skipped} records skipped, {count} replaced"
    elif kind == "throughput" and whole(data.get("slow_rank")) >= 0:
        yield "change", f"rank {data.get('slow_rank')} holds the others up ({data.get('bottleneck')})"
    elif kind in _TEXTS:
        sort, text = _TEXTS[kind]
        yield sort, text.format_map(_Known(data))


class _Known(Dict[str, Any]):
    """What a line says; `?` for what it should say and does not."""

    def __missing__(self, key: str) -> str:
        return "?"


_TEXTS = {
    "resume": ("start", "continues from {checkpoint}"),
    "init_from": ("start", "weights from {file}"),
    "rewind": ("fault", "step {from} was not finite: back to step {to}, its records are skipped"),
    "nonfinite": ("fault", "step {step} was not finite; the run stopped"),
    "bad_record": ("fault", "record {record} cannot be used ({reason}); replaced by {replaced_by}"),
    "checkpoint_damaged": ("fault", "checkpoint {file} is damaged: {reason}"),
    "checkpoint_copy_used": ("change", "continues from the copy {file}"),
    "save_failed": ("fault", "a file could not be written: {error}"),
    "copy_failed": ("fault", "a checkpoint could not be copied: {error}"),
    "suspended": ("change", "the processes were suspended for {seconds} s"),
    "config_changed": ("change", "--{flag} changed from {before} to {after}"),
    "arithmetic_changed": ("change", "computes on another processor or with other settings: {after}"),
    "below_reference": ("change", "acc@1 is far below the reference curve"),
    "stopped": ("end", "stopped on request"),
    "end": ("end", "the end of the run"),
}
