"""Where each rank's time goes, and the images per second that follow from it.

The wall time of an update runs from the end of the previous update to its own end. A rank spends it on

    input     waiting for its next batch;
    exchange  waiting for the other ranks' gradients once its own are ready: the part of the exchange that the backward
              pass does not hide, from clock readings inside the compiled step;
    compute   the rest.

The last rank to arrive waits for the network alone, so the least exchange time of all ranks is called `network`, and what
another rank waits beyond it is its `straggler_wait`. Evaluation, saving, profiling and rewinding are timed separately, up
to the point where all ranks meet again, and belong to no update. On a GPU these are times of the host, which runs ahead of
the device: where ranks exchange, by no more than one weight update; a single rank may run further ahead, and waiting for
the device then shows up wherever the host first needs a result.

Images per second (fps) are the images of the steady updates over their wall time on rank 0. Where the steady updates begin
is found in the times themselves, without the waits for input (`steady_from`): a run that starts slowly because its input
is slow, as from cold storage, is slow, and those updates count. What was left out is reported. The time in which a job was
suspended is in none of these times (`Watchdog.active_seconds`).
"""

import contextlib
import statistics
from typing import Any, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, TypeVar

from hvd_vgg.watchdog import watchdog

T = TypeVar("T")
_SHARES = ("input", "compute", "network", "straggler_wait")
_HEADINGS = ("input", "compute", "network", "stragglers")
# Warm-up is tracing, first touch of memory, the choice of convolution algorithms, first connections. It is over within a few
# updates: at most this many, and at most this share of all updates.
_WARM_UP_UPDATES, _WARM_UP_SHARE = 20, 1 / 3
# Share of the time above which waiting for input makes input the bottleneck. The loader works ahead: as long as it is the
# faster side a batch lies ready, and a steady wait means that only faster input makes the job faster, however much of the
# time goes into computing. Handing over a ready batch, and the odd batch delayed by storage, stay below.
_INPUT_SHARE = 0.05
# Share of its time by which a rank must be busy longer than the median rank to hold the others up.
_SLOW_SHARE = 0.1


class StepTime(NamedTuple):
    """Seconds that one rank spent on some updates: in all, waiting for input, and in the exchange."""

    total: float
    input: float
    exchange: float

    @property
    def compute(self) -> float:
        """Seconds that are neither input nor exchange."""
        return self.total - self.input - self.exchange

    @property
    def busy(self) -> float:
        """Seconds in which this rank waited for no other rank and no network."""
        return self.total - self.exchange


class Bottleneck(NamedTuple):
    """What limits a job: `cause` is input, compute or network; `ranks`: the stragglers, slowest first.

    Without stragglers it limits all ranks alike.
    """

    cause: str
    ranks: Tuple[int, ...] = ()

    @property
    def rank(self) -> Optional[int]:
        """The slowest straggler, or None."""
        return self.ranks[0] if self.ranks else None


class Throughput:
    """Times of every update since this process began to train, on this rank, in seconds."""

    def __init__(self) -> None:
        self.began = self.mark = watchdog.active_seconds()
        self.total_seconds: List[float] = []
        self.input_seconds: List[float] = []
        self.exchange_seconds: List[float] = []
        self.excluded_seconds: Dict[str, float] = {"evaluation": 0.0, "saving": 0.0, "profiling": 0.0, "rewinding": 0.0}

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """Yields `batches` and records the wait for each."""
        began = watchdog.active_seconds()
        for batch in batches:
            self.input_seconds.append(watchdog.active_seconds() - began)
            yield batch
            began = watchdog.active_seconds()

    def end_update(self) -> None:
        """Records the end of an update, where the next one begins."""
        now = watchdog.active_seconds()
        self.total_seconds.append(now - self.mark)
        self.mark = now

    @contextlib.contextmanager
    def exclude(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to `excluded_seconds[name]` and to no update.

        If it takes some ranks longer than others they must meet inside, or the wait lands in the others' next update.
        """
        began = watchdog.active_seconds()
        yield
        seconds = watchdog.active_seconds() - began
        self.excluded_seconds[name] += seconds
        self.mark += seconds

    def last(self, updates: int) -> StepTime:
        """Returns the sums over the newest `updates`."""
        lists = self.total_seconds, self.input_seconds, self.exchange_seconds
        return StepTime(*(sum(seconds[len(seconds) - updates :]) for seconds in lists))

    def summary(self, global_batch: int) -> Dict[str, Any]:
        """Returns `fps` of the steady updates with its spread, the warm-up left out of it, and `fps_wall`, of all wall time.

        steady: whether a steady state was found before the limit of the warm-up. fps_jitter: 1.4826 times the median
        absolute deviation of the updates' own images/s, as in tf_cnn_benchmarks.
        """
        first, found = steady_from([total - wait for total, wait in zip(self.total_seconds, self.input_seconds)])
        steady = self.total_seconds[first:]
        if not steady:
            return {"fps": None, "fps_updates": 0}
        each = [global_batch / seconds for seconds in steady]
        return {
            "fps": global_batch * len(steady) / sum(steady),
            "fps_updates": len(steady),
            "fps_standard_deviation": statistics.pstdev(each),
            "fps_jitter": _robust_deviation(each),
            "fps_wall": global_batch * len(self.total_seconds) / (watchdog.active_seconds() - self.began),
            "warm_up_updates": first,
            "warm_up_seconds": sum(self.total_seconds[:first]),
            "steady": found,
        }


def _robust_deviation(values: Sequence[float]) -> float:
    """Returns 1.4826 times the median absolute deviation: the standard deviation, if the values are normally distributed."""
    middle = statistics.median(values)
    return 1.4826 * statistics.median(abs(value - middle) for value in values)


def steady_from(seconds: Sequence[float]) -> Tuple[int, bool]:
    """Returns the index of the first steady update, and whether there is one; the updates before it are the warm-up.

    seconds: of each update, without its wait for input; waits for other ranks, and so for their input, are included.

    The steady state begins with three updates in a row (or all that are left) that take no longer than is usual in the later
    half of the run: its median plus three robust deviations, or plus a tenth if that is more. Slow updates after that are
    part of the run and count. The warm-up is at most 20 updates and at most a third of all (one of two), whether or not a
    steady state was found; a single update is all warm-up.
    """
    if len(seconds) < 2:
        return len(seconds), False
    later = seconds[len(seconds) // 2 :]
    usual = statistics.median(later)
    threshold = usual + max(3 * _robust_deviation(later), 0.1 * usual)
    limit = min(_WARM_UP_UPDATES, max(1, int(len(seconds) * _WARM_UP_SHARE)))
    steady = (index for index in range(limit + 1) if max(seconds[index : index + 3]) <= threshold)
    return next(((index, True) for index in steady), (limit, False))


def _shares(times: StepTime, network: float) -> Dict[str, float]:
    parts = times.input, times.compute, network, times.exchange - network
    return {name: part / times.total for name, part in zip(_SHARES, parts)}


def mean_shares(times: Sequence[StepTime]) -> Dict[str, float]:
    """Returns input, compute, network and straggler_wait as shares of the ranks' time taken together."""
    whole = StepTime(*(sum(part) for part in zip(*times)))
    return _shares(whole, min(one.exchange for one in times) * len(times))


def find_bottleneck(times: Sequence[StepTime]) -> Bottleneck:
    """Returns what limits the job, given each rank's times of the same updates.

    Stragglers are ranks that are busy longer than the median rank (the less busy of two) by a tenth of their time. The cause
    is input or compute, whichever exceeds the other ranks' by more. Without stragglers all ranks are limited alike, by the
    `limiting_part` of their mean shares. A slow network of a single rank cannot be found: all ranks wait for the same sum.
    """
    typical = statistics.median_low([one.busy for one in times])
    slow = [rank for rank, one in enumerate(times) if one.busy - typical > _SLOW_SHARE * one.total]
    if not slow:
        return Bottleneck(limiting_part(mean_shares(times)))
    rest = [one for rank, one in enumerate(times) if rank not in set(slow)]

    def excess(part: str) -> float:
        mean = statistics.fmean(getattr(times[rank], part) for rank in slow)
        return float(mean - statistics.median(getattr(one, part) for one in rest))

    cause = "input" if excess("input") > excess("compute") else "compute"
    return Bottleneck(cause, tuple(sorted(slow, key=lambda rank: -times[rank].busy)))


def limiting_part(shares: Mapping[str, Any]) -> str:
    """Returns the part that limits a rank: input above a share of _INPUT_SHARE, else the larger of compute and network."""
    if shares["input"] > _INPUT_SHARE:
        return "input"
    return "compute" if shares["compute"] >= shares["network"] else "network"


def per_rank(times: Sequence[StepTime], hosts: Sequence[str], images: Sequence[int]) -> List[Dict[str, Any]]:
    """Returns a row for each rank: rank, host, fps, fps_alone, and input, compute, network, straggler_wait as shares.

    images: consumed by each rank in these updates. `fps_alone` counts the rank's busy time only: images/s if it were alone.
    """
    network = min(one.exchange for one in times)
    return [
        {"rank": rank, "host": host, "fps": count / one.total, "fps_alone": count / one.busy, **_shares(one, network)}
        for rank, (one, host, count) in enumerate(zip(times, hosts, images))
    ]


def slowest(rows: Sequence[Dict[str, Any]]) -> Dict[str, Any]:
    """Returns the row of `per_rank` with the lowest fps_alone."""
    return min(rows, key=lambda row: row["fps_alone"])


def per_host(rows: Sequence[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Returns the rows of `per_rank` reduced to one a host: images/s summed, shares averaged over its ranks."""
    hosts = dict.fromkeys(row["host"] for row in rows)
    by_host = {host: [row for row in rows if row["host"] == host] for host in hosts}
    return [
        {
            "host": host,
            "ranks": len(ranks),
            **{name: sum(row[name] for row in ranks) for name in ("fps", "fps_alone")},
            **{name: statistics.fmean(row[name] for row in ranks) for name in _SHARES},
        }
        for host, ranks in by_host.items()
    ]


def format_table(rows: Sequence[Dict[str, Any]]) -> str:
    """Formats the rows of `per_rank`: hosts if there are several, then all ranks, or of more than 16 the three slowest."""
    lines = [f"  {'rank':>6s} {'host':20s} {'images/s':>9s} {'alone':>9s}" + "".join(f"{name:>11s}" for name in _HEADINGS)]
    hosts = [{**row, "rank": f"all {row['ranks']}"} for row in per_host(rows)]
    ranks = list(rows) if len(rows) <= 16 else sorted(rows, key=lambda row: row["fps_alone"])[:3]
    for row in (hosts if len(hosts) > 1 or len(rows) > 16 else []) + ranks:
        shares = "".join(f"{row[name]:11.1%}" for name in _SHARES)
        lines.append(f"  {row['rank']:>6} {row['host'][:20]:20s} {row['fps']:9.1f} {row['fps_alone']:9.1f}{shares}")
    return "\n".join(lines)
