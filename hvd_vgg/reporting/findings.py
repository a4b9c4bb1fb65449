"""What `hvd-vgg doctor` found: a verdict, a line and what to do; and those of all ranks put together."""

from typing import Any, Dict, List, NamedTuple, Sequence

OK, WARNING, FAILURE = "ok", "warning", "failure"
_GRAVITY = (OK, WARNING, FAILURE)


class Finding(NamedTuple):
    """One thing looked at. `text` must be the same on ranks that found the same, so that it is said once."""

    about: str
    verdict: str
    text: str
    fix: str = ""


class MergedFinding(NamedTuple):
    """A finding and the ranks that made it."""

    finding: Finding
    ranks: List[int]


def ok(about: str, text: str) -> Finding:
    """Returns a finding that asks for nothing."""
    return Finding(about, OK, text)


def warning(about: str, text: str, fix: str) -> Finding:
    """Returns a finding with which training works, but not as it should."""
    return Finding(about, WARNING, text, fix)


def failure(about: str, text: str, fix: str) -> Finding:
    """Returns a finding with which training does not work, or not right."""
    return Finding(about, FAILURE, text, fix)


def merge(found: Sequence[Sequence[Finding]]) -> List[MergedFinding]:
    """Returns each distinct finding of the ranks once, by what it is about, in the order in which rank 0 looked."""
    told: Dict[Finding, List[int]] = {}
    for rank, findings in enumerate(found):
        for finding in dict.fromkeys(findings):
            told.setdefault(finding, []).append(rank)
    order: Dict[str, int] = {}
    for finding in told:
        order.setdefault(finding.about, len(order))
    return sorted((MergedFinding(*item) for item in told.items()), key=lambda each: order[each.finding.about])


def worst(findings: Sequence[Finding]) -> str:
    """Returns the gravest verdict."""
    return max((finding.verdict for finding in findings), key=_GRAVITY.index, default=OK)


def counts(findings: Sequence[Finding]) -> Dict[str, int]:
    """Returns how many findings there are of each verdict."""
    return {verdict: sum(finding.verdict == verdict for finding in findings) for verdict in _GRAVITY}


def format_ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Returns `rank 3 (host b)` or `ranks 0, 1 (host a), 2 (host b)`; nothing where all ranks are meant."""
    if len(ranks) == len(hosts):
        return ""
    parts = []
    for host in dict.fromkeys(hosts[rank] for rank in ranks):
        parts.append(f"{', '.join(str(rank) for rank in ranks if hosts[rank] == host)} (host {host})")
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(parts)}"


def format_findings(told: Sequence[MergedFinding], hosts: Sequence[str]) -> List[str]:
    """Returns the report for people; hosts: the name of each rank's host."""
    found = []
    for finding, ranks in told:
        whose = format_ranks(ranks, hosts)
        found.append(f"{finding.verdict:8s} {finding.about:12s} {whose}{': ' if whose else ''}{finding.text}")
        if finding.fix:
            found.append(f"{'':21s} do: {finding.fix}")
    return found


def as_json(told: Sequence[MergedFinding], hosts: Sequence[str], **more: Any) -> Dict[str, Any]:
    """Returns the report for programs."""
    everything = [each.finding for each in told]
    rows = [{**each.finding._asdict(), "ranks": each.ranks} for each in told]
    return {"verdict": worst(everything), "counts": counts(everything), "hosts": list(hosts), **more, "findings": rows}
