"""Findings of checks: a verdict, what was found and how to fix it; those of all ranks are merged into one report."""

from typing import Any, Callable, Dict, Iterable, List, Mapping, NamedTuple, Sequence

from hvd_vgg.colours import GREEN, RED, YELLOW

OK, WARNING, FAILURE = "ok", "warning", "failure"
_SEVERITY = (OK, WARNING, FAILURE)
_COLOURS = {OK: GREEN, WARNING: YELLOW, FAILURE: RED}


class Finding(NamedTuple):
    """The result of one check. `text` must be identical on ranks with the same result, so that it is printed once."""

    about: str
    verdict: str
    text: str
    fix: str = ""


def ok(about: str, text: str) -> Finding:
    """Returns a finding that needs no action."""
    return Finding(about, OK, text)


def warning(about: str, text: str, fix: str) -> Finding:
    """Returns a finding with which training works, but not as well as it could."""
    return Finding(about, WARNING, text, fix)


def failure(about: str, text: str, fix: str) -> Finding:
    """Returns a finding with which training fails, or computes something wrong."""
    return Finding(about, FAILURE, text, fix)


def merge(per_rank: Sequence[Sequence[Finding]]) -> Dict[Finding, List[int]]:
    """Returns the ranks that share each distinct finding, grouped by what it is about; groups are in rank 0's order."""
    ranks: Dict[Finding, List[int]] = {}
    for rank, findings in enumerate(per_rank):
        for finding in dict.fromkeys(findings):
            ranks.setdefault(finding, []).append(rank)
    order = list(dict.fromkeys(finding.about for finding in ranks))
    return dict(sorted(ranks.items(), key=lambda item: order.index(item[0].about)))


def worst(findings: Iterable[Finding]) -> str:
    """Returns the most severe verdict."""
    return max((finding.verdict for finding in findings), key=_SEVERITY.index, default=OK)


def counts(findings: Iterable[Finding]) -> Dict[str, int]:
    """Returns the number of findings of each verdict."""
    verdicts = [finding.verdict for finding in findings]
    return {verdict: verdicts.count(verdict) for verdict in _SEVERITY}


def format_ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Returns `rank 3 (host b)` or `ranks 0, 1 (host a), 2 (host b)`; "" for all ranks. hosts: of each rank."""
    if len(ranks) == len(hosts):
        return ""
    groups = []
    for host in dict.fromkeys(hosts[rank] for rank in ranks):
        groups.append(f"{', '.join(str(rank) for rank in ranks if hosts[rank] == host)} (host {host})")
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(groups)}"


def format_findings(
    merged: Mapping[Finding, Sequence[int]],
    hosts: Sequence[str],
    paint: Callable[[str, str], str] = lambda text, colour: text,
) -> List[str]:
    """Returns the lines of the report for people; merged: as from `merge`; hosts: the host name of each rank.

    paint: as `Console.paint`, for the verdicts.
    """
    lines = []
    for finding, ranks in merged.items():
        prefix = format_ranks(ranks, hosts)
        verdict = paint(f"{finding.verdict:8s}", _COLOURS[finding.verdict])
        lines.append(f"{verdict} {finding.about:12s} {prefix}{': ' if prefix else ''}{finding.text}")
        lines += [f"{'':21s} fix: {finding.fix}"] if finding.fix else []
    return lines


def as_json(merged: Mapping[Finding, Sequence[int]], hosts: Sequence[str], **more: Any) -> Dict[str, Any]:
    """Returns the report for programs; merged: as from `merge`; hosts: the host name of each rank."""
    rows = [{**finding._asdict(), "ranks": ranks} for finding, ranks in merged.items()]
    return {"verdict": worst(merged), "counts": counts(merged), "hosts": list(hosts), **more, "findings": rows}
