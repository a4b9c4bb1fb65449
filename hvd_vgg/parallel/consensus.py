"""Decisions that all ranks take together: run an action on all, require equal values, compare replicas."""

import hashlib
import json
from typing import Any, Callable, Dict, List, Optional, TypeVar

import numpy as np

from hvd_vgg.errors import CONFIGURATION, NOT_FINITE, Failure
from hvd_vgg.parallel import comm
from hvd_vgg.text import difference_table

T = TypeVar("T")

_BUSY = "busy"  # sent by the ranks of a subgroup to those that wait for it


def run_on_all_ranks(action: Callable[[], T], group: comm.Group = comm.WORLD) -> T:
    """Returns `action()`, which must not communicate; if it fails on any rank, all raise one collective Failure. Collective.

    The Failure lists each distinct message once, with the ranks that raised it unless all did.
    """
    mine: Optional[Failure] = None
    value: Any = None
    try:
        value = action()
    except Failure as failure:
        mine = failure
    everyones = comm.gather_json([mine.code, mine.message] if mine else None, group)
    failed: Dict[str, List[int]] = {}
    for rank, found in enumerate(everyones):
        if found:
            failed.setdefault(found[1], []).append(rank)
    if failed:
        lines = [
            message if len(ranks) == len(everyones) or ranks == [0] else f"rank {', '.join(map(str, ranks))}: {message}"
            for message, ranks in failed.items()
        ]
        raise Failure(next(filter(None, everyones))[0], "\n".join(lines), collective=True)
    return value


def run_on_root(action: Callable[[], Any]) -> Any:
    """Runs `action` on rank 0 alone and returns what it returned there, None elsewhere; fails on all ranks. Collective."""
    return run_on_all_ranks(lambda: action() if comm.is_root() else None)


def require_equal(what: str, mine: Dict[str, Any]) -> None:
    """Raises a collective Failure(CONFIGURATION) listing what differs, unless `mine` is equal on all ranks. Collective."""
    digests = comm.gather_bytes(hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).digest())
    if len(set(digests)) == 1:
        return
    everyones = comm.gather_json(mine)
    other = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
    table = difference_table(everyones[0], everyones[other], ("rank 0", f"rank {other}"))
    raise Failure(
        CONFIGURATION,
        f"ranks disagree about {what}:\n{table}\nStart all ranks with the same flags, software and data",
        collective=True,
    )


def check_replicas(names: List[str], checksums: np.ndarray, step: int) -> None:
    """Raises a collective Failure(NOT_FINITE) naming the first weight that is not the same on all ranks. Collective.

    checksums: int64 [names], this rank's. The ranks that differ from the majority are named; all are where there is none.
    """
    everyones = np.array(comm.gather_json(checksums.tolist()), np.int64)
    differs = (everyones != everyones[0]).any(axis=0)
    if not differs.any():
        return
    first = int(np.argmax(differs))
    values, counts = np.unique(everyones[:, first], return_counts=True)
    majority = values[np.argmax(counts)] if (counts == counts.max()).sum() == 1 else None  # on a tie nobody is right
    odd = [rank for rank, value in enumerate(everyones[:, first]) if value != majority]
    raise Failure(
        NOT_FINITE,
        f"step {step}: {names[first]} ({int(differs.sum())} of {len(names)} weights) is not the same on all ranks: "
        f"{', '.join(f'rank {rank}' for rank in odd)} differ(s). Replicas that drift apart no longer train one network "
        f"(different processors, or faulty memory?): continue from an earlier checkpoint, or use --exchange=allreduce",
        collective=True,
    )


def run_in_subgroup(group: comm.Group, action: Callable[[], None]) -> None:
    """Runs `action` on the ranks of `group`, of which rank 0 is one, while the others wait. Collective over all ranks.

    They wait as long as it takes, provided that `action` calls `keep_alive` now and then: Horovod considers a rank lost that
    waits longer than HOROVOD_STALL_SHUTDOWN_TIME_SECONDS. A collective Failure of `action` is raised on all ranks.
    """
    failed: Optional[Failure] = None
    if group.process_set.included():
        try:
            action()
        except Failure as failure:
            if not failure.collective:
                raise
            failed = failure
        message = comm.broadcast_json([failed.code, failed.message] if failed else [])
    else:
        message = _BUSY
        while message == _BUSY:
            message = comm.broadcast_json(None)
    if message:
        code, text = message
        raise failed or Failure(code, text, collective=True)


def keep_alive(group: comm.Group) -> None:
    """Tells the ranks that wait outside `group` that it is making progress. Collective over the group, between updates."""
    if group is not comm.WORLD:
        comm.broadcast_json(_BUSY)
