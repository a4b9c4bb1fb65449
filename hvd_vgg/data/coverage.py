"""Proves that every record of an epoch was trained on, by an order-free digest of the ids trained on.

The digest of a multiset of ids is its size, and the sums modulo 2^64 of two 64-bit hashes of each id. Sums are free of
order, so the digests of parts add up to the digest of the whole, however an epoch was divided over ranks, updates and
starts: a run stopped on 3 ranks and resumed on 2 proves its epoch as if it had never stopped. A set, or one bit a record,
would take memory of the data set's size on every rank and in every checkpoint, and would not show a record seen twice.

The hashes are the finalizers of SplitMix64 (`seeds.splitmix64`) and of MurmurHash3 (fmix64, Appleby). Both are bijections
of 64 bits: one record in another's place is always noticed. Of several errors, a wrong multiset of the right size passes
with probability 2^-128 if the hashes are as good as random (sums of hashes: Clarke et al., "Incremental multiset hash
functions", ASIACRYPT 2003). They are no defence against ids chosen in order to collide; nobody chooses any here.
"""

import functools
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from hvd_vgg.errors import BUG, Failure
from hvd_vgg.seeds import GOLDEN_GAMMA, splitmix64

_WORDS = 3  # of a digest


def digest(ids: np.ndarray) -> np.ndarray:
    """Returns the digest of record ids (integers from 0 up, any shape): int64 [3], to be added with wrap-around."""
    ids = np.asarray(ids).astype(np.uint64).ravel()  # whose arithmetic wraps around
    first = splitmix64(ids + GOLDEN_GAMMA)
    second = ids ^ GOLDEN_GAMMA  # fmix64 maps 0 to itself
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        second = (second ^ (second >> np.uint64(33))) * np.uint64(factor)
    second ^= second >> np.uint64(33)
    return np.array([ids.size, first.sum(dtype=np.uint64), second.sum(dtype=np.uint64)], np.uint64).view(np.int64)


@functools.lru_cache(maxsize=2)
def digest_of_all(records: int) -> np.ndarray:
    """Returns the digest of the ids 0 .. records - 1, each once: int64 [3]."""
    total = np.zeros(_WORDS, np.int64)
    for start in range(0, records, 1 << 20):
        total += digest(np.arange(start, min(start + (1 << 20), records)))
    return total


def to_hex(digest: np.ndarray) -> List[str]:
    """Returns a digest's two sums for the log, 16 hexadecimal digits each: JSON readers may round numbers."""
    return [f"{int(word):016x}" for word in digest[1:].view(np.uint64)]


class EpochRecords(NamedTuple):
    """What became of the records of an epoch: digests of those trained on and those skipped, ids of those replaced."""

    seen: np.ndarray  # int64 [3]
    skipped: np.ndarray  # int64 [3]
    replaced: np.ndarray  # int64 [n]

    def plus(self, other: "EpochRecords") -> "EpochRecords":
        """Returns the records of both."""
        replaced = np.concatenate([self.replaced, other.replaced])
        return EpochRecords(self.seen + other.seen, self.skipped + other.skipped, replaced)

    def numbers(self) -> List[int]:
        """Returns them as integers, for checkpoints and other ranks; `parse_epoch_records` is the inverse."""
        return [*self.seen.tolist(), *self.skipped.tolist(), *np.sort(self.replaced).tolist()]

    def proves(self, records: int) -> bool:
        """Returns whether each id of 0 .. records - 1 was trained on, skipped or replaced exactly once, and no other was."""
        return bool((self.seen + self.skipped + digest(self.replaced) == digest_of_all(records)).all())

    def text(self, records: int) -> str:
        """Returns what a proved epoch consists of: `49999 of 50000 records, each once; 1 replaced (17)`."""
        text = f"{int(self.seen[0])} of {records} records, each once"
        if len(self.replaced):
            text += f"; {len(self.replaced)} replaced ({', '.join(map(str, np.sort(self.replaced).tolist()))})"
        if self.skipped[0]:
            text += f"; {int(self.skipped[0])} skipped"
        return text


def parse_epoch_records(numbers: Sequence[int]) -> EpochRecords:
    """Returns the records of which `EpochRecords.numbers` made `numbers`; none where there are none."""
    values = np.array(numbers or [0] * (2 * _WORDS), np.int64)
    return EpochRecords(*np.split(values, [_WORDS, 2 * _WORDS]))


class EpochCoverage(NamedTuple):
    """A complete epoch, the update that completed it, and its records over all ranks and starts.

    The records are proved to be all of the data set's, or None: the checkpoint that the run continued from in the middle of
    this epoch did not know them.
    """

    epoch: int
    step: int
    records: Optional[EpochRecords]


class Update(NamedTuple):
    """The records of an update on this rank, those at `position` of the stream and onward.

    ids: used, int64 [n]. bad: (row, id due there) of the rows where another record took a bad one's place: the id due counts
    as replaced; its replacement does not count, as its own turn is elsewhere. skipped: whether the records due were left out
    on purpose (--on_nonfinite=rewind).
    """

    position: int
    ids: np.ndarray
    bad: Sequence[Tuple[int, int]] = ()
    skipped: bool = False


class Coverage:
    """What this rank has trained on since the ranks' counts were last summed, and the sum for the epoch in progress."""

    def __init__(self, records: int, global_batch: int, step: int, state: Sequence[int]) -> None:
        """Starts after `step` updates, with the `state` in the checkpoint that the run continues from.

        state: [] at the start of an epoch, or where nothing is known of the epoch in progress (its order was another).
        """
        self.records, self.global_batch = records, global_batch
        self.epoch, done = divmod(step * global_batch, records)  # the epoch in progress
        self.total = None if done and not state else parse_epoch_records(state)
        self.mine: Dict[int, EpochRecords] = {}

    def add(self, updates: Iterable[Update]) -> None:
        """Counts this rank's records of some updates. Of many at once: hashing takes nearly as long for few ids."""
        parts: Dict[int, Tuple[List[np.ndarray], List[np.ndarray], List[np.ndarray]]] = {}
        for position, ids, bad, skipped in updates:
            due, good = ids.copy(), np.ones(len(ids), bool)
            for row, record in bad:
                due[row], good[row] = record, False
            for epoch, rows in self._epochs(position, len(ids)):
                seen, left_out, replaced = parts.setdefault(epoch, ([], [], []))
                if skipped:
                    left_out.append(due[rows])
                else:
                    seen.append(due[rows][good[rows]])
                    replaced.append(due[rows][~good[rows]])
        for epoch, lists in parts.items():
            seen, left_out, replaced = (np.concatenate([np.zeros(0, np.int64), *part]) for part in lists)
            self.mine[epoch] = self._mine(epoch).plus(EpochRecords(digest(seen), digest(left_out), replaced))

    def _mine(self, epoch: int) -> EpochRecords:
        return self.mine.pop(epoch, parse_epoch_records([]))

    def _epochs(self, position: int, count: int) -> Iterator[Tuple[int, slice]]:
        """Yields the epochs of `count` positions of the stream, and the rows that belong to each."""
        # A batch may begin in one epoch and end in the next, or beyond it where the data set is smaller.
        first, last = position // self.records, (position + count - 1) // self.records
        for epoch in range(first, last + 1):
            start = epoch * self.records - position
            yield epoch, slice(max(0, start), start + self.records)

    def ended(self, step: int) -> bool:
        """Returns whether `step` updates complete an epoch that is not yet proved; the same on all ranks."""
        return step * self.global_batch // self.records > self.epoch

    def settle(self, step: int, gather: Callable[[Any], List[Any]]) -> List[EpochCoverage]:
        """Sums over ranks what they trained on up to `step` updates; returns the epochs that this completes. Collective.

        To be called before a checkpoint and when an epoch has `ended`. gather: `parallel.comm.gather_json`. Raises a
        collective Failure(BUG) where a record of a complete epoch was missed or seen twice.
        """
        epochs = range(self.epoch, step * self.global_batch // self.records + 1)
        totals = [self.total, *(parse_epoch_records([]) for _ in epochs[1:])]
        for rank in gather([self._mine(epoch).numbers() for epoch in epochs]):
            totals = [total and total.plus(parse_epoch_records(more)) for total, more in zip(totals, rank)]
        self.epoch, self.total = epochs[-1], totals[-1]
        # An epoch ends within the batch of update ceil((e + 1) * N / G), counted from 1.
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
        """Returns what a checkpoint keeps of the epoch in progress, over all ranks; to be called directly after `settle`."""
        return self.total.numbers() if self.total else []
