"""Where each rank's time goes, and the images per second that follow from it.

Of the wall time of an update, from the end of the one before to its own end, a rank spends

    input     waiting for its next batch;
    exchange  from when its own gradients and rows are ready until those of all ranks are there, by clock readings inside
              the compiled step: what of the exchange it could not hide behind the backward pass;
    compute   the rest.

Whoever comes last waits for nothing but the network: the least exchange of all ranks is called `network`, and what a rank
waits beyond it is for `others`. Evaluation, saving, profiling and rewinding are timed apart, to where all ranks meet again,
and are no part of any rank's updates. On a GPU these are the host's times, which runs ahead of the device by no more than an
update of the weights where ranks exchange; alone it may run ahead further, and waiting for the device then shows wherever
the host first needs a result.

Images per second ("fps") are the images of the steady updates over their wall time on rank 0. Where they begin is found in
the times themselves, without the waits for input (`steady_from`): a run that was slow at first because its input was, as
from cold storage, was slow, and that stays counted. What was left out is told.
"""

import contextlib
import statistics
import time
from typing import Any, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, TypeVar

T = TypeVar("T")
_SHARES = ("input", "compute", "network", "others")
# Warm-up is tracing, first touch of memory, choice of convolutions, first connections: a matter of the first updates, of
# which it is never more than these, nor more than a third of all.
_WARM_UP_UPDATES, _WARM_UP_SHARE = 20, 1 / 3
# Share of the time above which waiting for input means that input is the limit. The pipeline works ahead: where it is the
# faster side a batch lies ready, and where anyone waits steadily nothing but faster input makes the job faster, however much
# of the time computing takes. The handing over of a ready batch, and one that storage delayed, stay below.
_INPUT_SHARE = 0.05
# Share of the time by which a rank must be busy longer than the median rank to hold the others back.
_SLOW_SHARE = 0.1


class StepTime(NamedTuple):
    """Seconds of some updates on one rank: in all, waiting for input, and of exchange."""

    total: float
    input: float
    exchange: float

    @property
    def compute(self) -> float:
        """Seconds that are neither input nor exchange."""
        return self.total - self.input - self.exchange

    @property
    def busy(self) -> float:
        """Seconds in which this rank held up itself, and not the others or the network."""
        return self.total - self.exchange


class Bottleneck(NamedTuple):
    """What holds a job back: `cause` is input, compute or network; `ranks`: those slower than the rest, the slowest first.

    Where there are none it is what limits all of them.
    """

    cause: str
    ranks: Tuple[int, ...] = ()

    @property
    def rank(self) -> Optional[int]:
        """The slowest of `ranks`."""
        return self.ranks[0] if self.ranks else None


class Throughput:
    """The updates of this start on this rank: seconds in all, waiting for input, and of exchange."""

    def __init__(self) -> None:
        self.began = self.mark = time.perf_counter()
        self.total: List[float] = []
        self.input: List[float] = []
        self.exchange: List[float] = []
        self.aside: Dict[str, float] = {"evaluation": 0.0, "saving": 0.0, "profiling": 0.0, "rewinding": 0.0}

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """Yields what `batches` does and measures the wait for each."""
        source = iter(batches)
        while True:
            began = time.perf_counter()
            try:
                batch = next(source)
            except StopIteration:
                return
            self.input.append(time.perf_counter() - began)
            yield batch

    def end_update(self) -> None:
        """Ends an update where the next one begins."""
        now = time.perf_counter()
        self.total.append(now - self.mark)
        self.mark = now

    @contextlib.contextmanager
    def apart(self, what: str) -> Iterator[None]:
        """Times what happens inside as one of `aside`, which is no part of any update.

        Where it may take ranks unequally long they must meet inside, or the next update has what the others wait.
        """
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self.aside[what] += seconds
        self.mark += seconds

    def last(self, updates: int) -> StepTime:
        """Returns the sums over the newest `updates`."""
        return StepTime(*(sum(each[len(each) - updates :]) for each in (self.total, self.input, self.exchange)))

    def summary(self, global_batch: int) -> Dict[str, Any]:
        """Returns `fps` of the steady updates with its spread, what was left out, and `fps_wall`, which leaves out nothing.

        steady: whether a steady state was found before as much was left out as may be. fps_jitter is 1.4826 times the
        median absolute deviation of the updates' own images/s, as tf_cnn_benchmarks has it.
        """
        first, found = steady_from([total - wait for total, wait in zip(self.total, self.input)])
        steady = self.total[first:]
        if not steady:
            return {"fps": None, "fps_updates": 0}
        each = [global_batch / seconds for seconds in steady]
        middle = statistics.median(each)
        return {
            "fps": global_batch * len(steady) / sum(steady),
            "fps_updates": len(steady),
            "fps_standard_deviation": statistics.pstdev(each),
            "fps_jitter": 1.4826 * statistics.median(abs(one - middle) for one in each),
            "fps_wall": global_batch * len(self.total) / (time.perf_counter() - self.began),
            "warm_up_updates": first,
            "warm_up_seconds": sum(self.total[:first]),
            "steady": found,
        }


def steady_from(seconds: Sequence[float]) -> Tuple[int, bool]:
    """Returns the number of the first steady update, and whether it was found; warm-up is what comes before it.

    seconds: of each update, without its wait for input; the waits for other ranks, and so for their input, are in it.

    Steady is where three updates in a row (or all that are left) take no more than the later half usually does: its median
    plus three deviations (1.4826 times the median absolute deviation), a tenth of the median at the least. Slow updates
    after that are part of the run and stay counted. No more is warm-up than 20 updates or a third of all (one of two),
    found or not; of less than two, all is.
    """
    if len(seconds) < 2:
        return len(seconds), False
    later = seconds[len(seconds) // 2 :]
    usual = statistics.median(later)
    deviation = 1.4826 * statistics.median(abs(one - usual) for one in later)
    limiting_share = usual + max(3 * deviation, 0.1 * usual)
    most = min(_WARM_UP_UPDATES, max(1, int(len(seconds) * _WARM_UP_SHARE)))
    found = (at for at in range(most + 1) if max(seconds[at : at + 3]) <= limiting_share)
    return next(((at, True) for at in found), (most, False))


def find_bottleneck(splits: Sequence[StepTime]) -> Bottleneck:
    """Returns what holds the job back, from each rank's seconds of the same updates.

    Ranks do that are busy longer than the median rank (of two in the middle, the less busy) by a tenth of their time: with
    input or with computing, whichever exceeds the other ranks' by more. Where there is none, all ranks are limited alike, by
    what `limit` says of their mean shares. Of the network each rank sees but the sum: nobody can be told to have a slow one.
    """
    usual = statistics.median_low([split.busy for split in splits])
    slow = [rank for rank, split in enumerate(splits) if split.busy - usual > _SLOW_SHARE * split.total]
    if slow:
        late, others = [splits[rank] for rank in slow], [split for rank, split in enumerate(splits) if rank not in set(slow)]
        late_input, late_compute = (
            statistics.fmean(getattr(split, what) for split in late)
            - statistics.median(getattr(split, what) for split in others)
            for what in ("input", "compute")
        )
        cause = "input" if late_input > late_compute else "compute"
        return Bottleneck(cause, tuple(sorted(slow, key=lambda rank: -splits[rank].busy)))
    whole = sum(split.total for split in splits)
    waiting, computing = sum(split.input for split in splits), sum(split.compute for split in splits)
    network = min(split.exchange for split in splits) * len(splits)
    return Bottleneck(limiting_share({"input": waiting / whole, "compute": computing / whole, "network": network / whole}))


def limiting_share(shares: Mapping[str, Any]) -> str:
    """Returns what limits whoever spends these shares of the time: input where it takes more than _INPUT_SHARE, else
    compute or network, whichever takes more."""
    if shares["input"] > _INPUT_SHARE:
        return "input"
    return "compute" if shares["compute"] >= shares["network"] else "network"


def per_rank(splits: Sequence[StepTime], hosts: Sequence[str], images: Sequence[int]) -> List[Dict[str, Any]]:
    """Returns a row for each rank: host, images/s, images/s were it alone, and the shares of its time.

    images: that each rank consumed in these updates. `fps_alone` counts only the time in which the rank held up itself.
    """
    network = min(split.exchange for split in splits)
    return [
        {
            "rank": rank,
            "host": hosts[rank],
            "fps": images[rank] / split.total,
            "fps_alone": images[rank] / split.busy,
            "input": split.input / split.total,
            "compute": split.compute / split.total,
            "network": network / split.total,
            "others": (split.exchange - network) / split.total,
        }
        for rank, split in enumerate(splits)
    ]


def slowest(rows: Sequence[Dict[str, Any]]) -> Dict[str, Any]:
    """Returns the row of `per_rank` with the fewest images/s were it alone."""
    return min(rows, key=lambda row: row["fps_alone"])


def per_host(rows: Sequence[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Returns the rows of `per_rank` summed to a row for each host: images/s added up, shares as means of its ranks."""
    by_host: Dict[str, List[Dict[str, Any]]] = {}
    for row in rows:
        by_host.setdefault(row["host"], []).append(row)
    return [
        {
            "host": host,
            "ranks": len(of),
            **{name: sum(row[name] for row in of) for name in ("fps", "fps_alone")},
            **{name: statistics.fmean(row[name] for row in of) for name in _SHARES},
        }
        for host, of in by_host.items()
    ]


def format_table(rows: Sequence[Dict[str, Any]]) -> str:
    """Returns the rows of `per_rank` for people: hosts if there are several, and all ranks or the three slowest of many."""
    lines = [f"  {'rank':>6s} {'host':20s} {'images/s':>9s} {'alone':>9s}" + "".join(f"{name:>9s}" for name in _SHARES)]
    hosts = [{**row, "rank": f"all {row['ranks']}"} for row in per_host(rows)]
    ranks = list(rows) if len(rows) <= 16 else sorted(rows, key=lambda row: row["fps_alone"])[:3]
    for row in (hosts if len(hosts) > 1 or len(rows) > 16 else []) + ranks:
        shares = "".join(f"{row[name]:9.1%}" for name in _SHARES)
        lines.append(f"  {row['rank']:>6} {row['host'][:20]:20s} {row['fps']:9.1f} {row['fps_alone']:9.1f}{shares}")
    return "\n".join(lines)
