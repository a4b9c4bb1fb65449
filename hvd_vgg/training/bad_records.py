"""The bad records that a run goes on without: counted over ranks and restarts, told, and no more of them than allowed."""

from typing import List, Optional, Sequence, Tuple

from hvd_vgg.data.index import Index
from hvd_vgg.data.loader import BadRow
from hvd_vgg.errors import DATA, Failure
from hvd_vgg.parallel import comm
from hvd_vgg.reporting.console import Console
from hvd_vgg.reporting.log import RunLog

LISTED = 20  # on the console at once and in a message; the log has all


def count_bad_records(
    met: Sequence[Tuple[int, BadRow]],
    known: Sequence[int],
    allowed: int,
    index: Index,
    log: Optional[RunLog],
    console: Console,
) -> List[int]:
    """Returns the ids of the bad records of a split that all ranks have met: `known`, and in order those of `met`.

    met: (step, row) of what this rank used since the last call; known: as returned then, or by a checkpoint; allowed:
    --bad_records_allowed, with 0 of which no batch holds any and nothing is said between ranks. All ranks must call.
    A record is told once: to the console, and as event `bad_record` to the log. Raises a collective Failure(DATA) that lists
    the records when they are more than `allowed`.
    """
    if not allowed:
        return list(known)
    told = comm.gather_json([(step, row.record, row.by, row.reason) for step, row in met])
    found, new = list(known), []
    for step, record, by, reason in sorted((row for rows in told for row in rows), key=_place):
        if record not in found:
            found.append(record)
            new.append(f"{index.where(record)}: {reason}")
            instead = index.where(by) if by is not None else None
            if log:
                log.event("bad_record", record=record, where=index.where(record), replaced_by=by, reason=reason, step=step)
            if len(new) <= LISTED:
                took = f"{instead} takes its place" if instead else "it counts as a miss"
                console.say(f"bad record {len(found)} of {allowed} allowed: {new[-1]}; {took}")
    if len(found) > allowed:
        lines = [*(index.where(record) for record in known), *new]
        more = f"\n  and {len(lines) - LISTED} more" if len(lines) > LISTED else ""
        raise Failure(
            DATA,
            f"data: {len(found)} bad records; expected at most --bad_records_allowed={allowed}:\n  "
            + "\n  ".join(lines[:LISTED])
            + f"{more}\nCopy these shards again, or allow more: nothing was saved that was trained on more than allowed",
            collective=True,
        )
    return found


def _place(row: Tuple[int, int, Optional[int], str]) -> Tuple[int, int]:
    return row[0], row[1]
