"""Proves that an epoch was trained on whole: an order-free digest of the record ids that the ranks really trained on.

The digest of a multiset of ids is how many there are, and the sums modulo 2^64 of two 64-bit hashes of each. Sums know no
order, so digests of parts add up to the digest of the whole, however an epoch was divided over ranks, updates and starts: a
run stopped on 3 ranks and resumed on 2 proves its epoch as if it had not been stopped. A set, or one bit a record, would
take memory of the data set's size on every rank and in every checkpoint, and would not tell a record seen twice.

The hashes are the finalisers of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA
2014, with the constants of Vigna's splitmix64.c) and of MurmurHash3 (fmix64, Appleby). Both are bijections of 64 bits: one
record in another's place is always noticed. For more, a wrong multiset of the right size passes by chance only, once in
2^128 if the hashes are as good as random (sums of hashes: Clarke et al., "Incremental multiset hash functions", ASIACRYPT
2003). They are no defence against someone who chooses ids in order to collide; nobody here does.
"""

import functools
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from hvd_vgg.errors import BUG, Failure

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_WORDS = 3  # of a digest
_AT_ONCE = 64  # updates whose records are hashed together: between updates a few take nearly as long as many


def digest(ids: np.ndarray) -> np.ndarray:
    """Returns the digest of record ids (integers from 0 up, any shape): int64 [3], to be added with wrap-around."""
    x = np.asarray(ids).astype(np.uint64).ravel()
    z = x + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    first = z ^ (z >> np.uint64(31))
    z = x ^ _GOLDEN  # fmix64 leaves 0 as it is
    z = (z ^ (z >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    z = (z ^ (z >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    second = z ^ (z >> np.uint64(33))
    return np.array([x.size, first.sum(dtype=np.uint64), second.sum(dtype=np.uint64)], np.uint64).view(np.int64)


@functools.lru_cache(maxsize=2)
def digest_of_all(records: int) -> np.ndarray:
    """Returns the digest of the ids 0 .. records - 1, each once."""
    total = np.zeros(_WORDS, np.int64)
    for start in range(0, records, 1 << 20):
        total += digest(np.arange(start, min(start + (1 << 20), records)))
    return total


def to_hex(digest: np.ndarray) -> List[str]:
    """Returns the two sums of a digest as the log has them, 16 hexadecimal digits each: JSON's numbers may be rounded."""
    return [f"{int(word):016x}" for word in digest[1:].view(np.uint64)]


class EpochRecords(NamedTuple):
    """What became of the records of an epoch: digests of those trained on and those skipped, ids of those replaced."""

    seen: np.ndarray  # int64 [3]
    skipped: np.ndarray  # int64 [3]
    replaced: np.ndarray  # int64 [n]

    def plus(self, other: "EpochRecords") -> "EpochRecords":
        """Returns the tally of both."""
        replaced = np.concatenate([self.replaced, other.replaced])
        return EpochRecords(self.seen + other.seen, self.skipped + other.skipped, replaced)

    def numbers(self) -> List[int]:
        """Returns the tally as `tally` reads it."""
        return [*self.seen.tolist(), *self.skipped.tolist(), *np.sort(self.replaced).tolist()]

    def proves(self, records: int) -> bool:
        """Says whether each of the ids 0 .. records - 1 was trained on once, or skipped, or replaced, and no other was."""
        return bool((self.seen + self.skipped + digest(self.replaced) == digest_of_all(records)).all())

    def text(self, records: int) -> str:
        """Returns what a tally that proves its epoch says: `49999 of 50000 records, each once; 1 replaced (17)`."""
        said = f"{int(self.seen[0])} of {records} records, each once"
        if len(self.replaced):
            said += f"; {len(self.replaced)} replaced ({', '.join(map(str, np.sort(self.replaced).tolist()))})"
        if self.skipped[0]:
            said += f"; {int(self.skipped[0])} skipped"
        return said


def parse_epoch_records(numbers: Sequence[int]) -> EpochRecords:
    """Returns the tally of `numbers`; of none, the tally of nothing."""
    values = np.array(numbers or [0] * (2 * _WORDS), np.int64)
    return EpochRecords(values[:_WORDS], values[_WORDS : 2 * _WORDS], values[2 * _WORDS :])


class EpochCoverage(NamedTuple):
    """An epoch that is complete, the update it was complete with, and its tally over all ranks and starts.

    The tally is proved to be whole, or None: the checkpoint that the run went on from in this epoch did not know.
    """

    epoch: int
    step: int
    records: Optional[EpochRecords]


class Coverage:
    """What this rank has trained on since `settle` last summed it over ranks, and the sums of the epoch in progress."""

    def __init__(self, records: int, global_batch: int, step: int, state: Sequence[int]) -> None:
        """Begins after `step` updates, with the `state` of the checkpoint that the run goes on from.

        state: [] where an epoch begins, or for an epoch in progress of which nothing is known: it was in another order.
        """
        self.records, self.global_batch = records, global_batch
        self.epoch, begun = divmod(step * global_batch, records)  # the one in progress
        self.total = None if begun and not state else parse_epoch_records(state)
        self.mine: Dict[int, EpochRecords] = {}
        self.added: List[Tuple[int, np.ndarray, Sequence[Tuple[int, int]]]] = []  # not yet in `mine`

    def add(self, position: int, ids: np.ndarray, bad: Sequence[Tuple[int, int]] = ()) -> None:
        """Counts records that this rank has trained on: `ids` int64 [n], at `position` of the stream and onward.

        The ids are counted later and must stay as they are.
        bad: (row, id due there) of the rows whose record is bad and had another take its place. The id due counts as
        replaced, and the one in its place not at all: its own turn is elsewhere.
        """
        self.added.append((position, ids, bad))
        if len(self.added) == _AT_ONCE:
            self._count_added()

    def _count_added(self) -> None:
        seen: Dict[int, List[np.ndarray]] = {}
        replaced: Dict[int, List[int]] = {}
        for position, ids, bad in self.added:
            at_fault = np.zeros(len(ids), bool)
            at_fault[[row for row, _ in bad]] = True
            for epoch, part in self._epochs(position, len(ids)):
                seen.setdefault(epoch, []).append(ids[part][~at_fault[part]])
                replaced.setdefault(epoch, []).extend(due for row, due in bad if part.start <= row < part.stop)
        self.added.clear()
        for epoch, parts in seen.items():
            due = np.array(replaced[epoch], np.int64)
            self._count(epoch, EpochRecords(digest(np.concatenate(parts)), np.zeros(_WORDS, np.int64), due))

    def skip(self, position: int, ids: np.ndarray) -> None:
        """Counts records, due at `position` and onward, that this rank leaves out on purpose (--on_nonfinite=rewind)."""
        for epoch, part in self._epochs(position, len(ids)):
            self._count(epoch, EpochRecords(np.zeros(_WORDS, np.int64), digest(ids[part]), np.zeros(0, np.int64)))

    def _epochs(self, position: int, count: int) -> Iterator[Tuple[int, slice]]:
        first, last = position // self.records, (position + count - 1) // self.records
        for epoch in range(first, last + 1):
            start, stop = (max(0, epoch * self.records - position), (epoch + 1) * self.records - position)
            yield epoch, slice(start, stop)

    def _count(self, epoch: int, more: EpochRecords) -> None:
        self.mine[epoch] = self.mine[epoch].plus(more) if epoch in self.mine else more

    def ended(self, step: int) -> bool:
        """Says whether an epoch is complete after `step` updates that `settle` has not yet proved; the same on all ranks."""
        return step * self.global_batch // self.records > self.epoch

    def settle(self, step: int, gather: Callable[[Any], List[Any]]) -> List[EpochCoverage]:
        """Sums over all ranks what they trained on up to `step` updates, and returns the epochs that are complete with it.

        Collective, before a checkpoint and when an epoch has `ended`; gather: `parallel.comm.gather_json`. Raises a
        collective Failure(BUG) when a record of a complete epoch was missed or seen twice.
        """
        self._count_added()
        epochs = range(self.epoch, step * self.global_batch // self.records + 1)
        totals = [self.total] + [parse_epoch_records([]) for _ in epochs[1:]]
        for rank in gather([self.mine.pop(epoch, parse_epoch_records([])).numbers() for epoch in epochs]):
            totals = [total and total.plus(parse_epoch_records(more)) for total, more in zip(totals, rank)]
        self.epoch, self.total = epochs[-1], totals[-1]
        proved = [EpochCoverage(e, -(-(e + 1) * self.records // self.global_batch), t) for e, t in zip(epochs[:-1], totals)]
        for epoch, complete_at, total in proved:
            if total and not total.proves(self.records):
                raise Failure(
                    BUG,
                    f"epoch {epoch}, complete with update {complete_at}: {int(total.seen[0])} records were trained on, "
                    f"{len(total.replaced)} replaced, {int(total.skipped[0])} skipped, and these are not the "
                    f"{self.records} of the data set, each once: please report it with the run's flags.txt",
                    collective=True,
                )
        return proved

    def state(self) -> List[int]:
        """Returns what a checkpoint is to keep of the epoch in progress, over all ranks; directly after `settle`."""
        return self.total.numbers() if self.total else []
