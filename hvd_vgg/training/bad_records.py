"""The bad records that a run continues without: counted over ranks and restarts, reported, and no more than allowed."""

from typing import List, Tuple

from hvd_vgg.data.index import Index
from hvd_vgg.data.loader import BadRow
from hvd_vgg.errors import DATA, Failure
from hvd_vgg.parallel import comm
from hvd_vgg.training.reporter import Reporter

MAX_LISTED = 20  # on the console per call, and in a message; the log has all


def count_bad_records(
    rows: List[Tuple[int, BadRow]], known: List[int], allowed: int, index: Index, reporter: Reporter
) -> List[int]:
    """Returns the ids of a split's bad records that any rank has used: `known`, then those of `rows`, ordered. Collective.

    rows: (step, row) of what this rank has used since the last call; known: the result of that call, or of a checkpoint;
    allowed: --bad_records_allowed; with 0 no batch holds a bad record, and nothing is exchanged. Each record is reported
    once, on the console and as event `bad_record` in the log. Raises a collective Failure(DATA) listing the records where
    they are more than `allowed`.
    """
    if not allowed:
        return list(known)
    everyones = comm.gather_json([(step, row.record, row.by, row.reason) for step, row in rows])
    found, new = list(known), []
    for step, record, by, reason in sorted((row for rank in everyones for row in rank), key=lambda row: row[:2]):
        if record in found:
            continue
        found.append(record)
        new.append(f"{index.where(record)}: {reason}")
        reporter.event("bad_record", record=record, where=index.where(record), replaced_by=by, reason=reason, step=step)
        if len(new) <= MAX_LISTED:
            outcome = "it counts as a miss" if by is None else f"{index.where(by)} takes its place"
            reporter.say(f"bad record {len(found)} of {allowed} allowed: {new[-1]}; {outcome}")
    if len(found) > allowed:
        lines = [*map(index.where, known), *new]
        more = f"\n  and {len(lines) - MAX_LISTED} more" if len(lines) > MAX_LISTED else ""
        listed = "\n  ".join(lines[:MAX_LISTED])
        raise Failure(
            DATA,
            f"data: {len(found)} bad records; expected at most --bad_records_allowed={allowed}:\n  {listed}{more}\nCopy "
            f"these shards again, or allow more: nothing was saved that was trained with more than allowed",
            collective=True,
        )
    return found
