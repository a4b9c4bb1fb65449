"""Which record is read when, and with which random seeds: pure functions of the seed and the step.

The stream is epoch 0, epoch 1, ... laid end to end, each a permutation of all N records. Step s takes positions
[s * G, (s + 1) * G) of it, G the global batch. Nothing here depends on the number of ranks but `slice_bounds`.

Only bit streams that NumPy promises never to change (SeedSequence, Philox, the raw draws) are used, so that a seed means
the same run under every NumPy; `Generator.permutation` has no such promise.
"""

import functools
from typing import Callable, NamedTuple, Tuple

import numpy as np

from hvd_vgg.seeds import AUGMENT, BLOCKS, ORDER, REPLACEMENT, raw_draws, seed_bits

# Whole blocks are mixed within windows of about so many records, as many as TensorFlow's examples hold in shuffle buffers.
WINDOW_RECORDS = 16_384


class Positions(NamedTuple):
    """A run of positions of the stream: record ids int64 [n] and the epoch each belongs to, int64 [n]."""

    ids: np.ndarray
    epochs: np.ndarray


@functools.lru_cache(maxsize=2)  # A batch spans two epochs at most, unless the data set is smaller than it.
def permutation(records: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order of `records` ids in one epoch, uint32 [records], read-only."""
    order = np.argsort(raw_draws(records, seed, ORDER, epoch), kind="stable").astype(np.uint32)
    order.setflags(write=False)
    return order


@functools.lru_cache(maxsize=2)
def block_permutation(records: int, seed: int, epoch: int, block: int) -> np.ndarray:
    """Returns the order of `records` ids in one epoch by blocks, uint32 [records], read-only.

    Blocks of `block` consecutive ids (the last may be shorter) are laid end to end in random order. That is cut into windows
    of as many records as there are in WINDOW_RECORDS // block whole blocks, two at least, and each window is permuted.
    """
    windows = np.arange(records) // window_records(block)
    within = np.lexsort((raw_draws(records, seed, ORDER, epoch), windows))
    order = _blocks(records, seed, epoch, block)[within]
    order.setflags(write=False)
    return order


@functools.lru_cache(maxsize=2)
def _blocks(records: int, seed: int, epoch: int, block: int) -> np.ndarray:
    """Returns the blocks of an epoch laid end to end, before windows are permuted, uint32 [records], read-only."""
    count = -(-records // block)
    blocks = np.argsort(raw_draws(count, seed, BLOCKS, epoch), kind="stable")
    ids = (blocks[:, None] * block + np.arange(min(block, records))).ravel()
    ids = ids[ids < records].astype(np.uint32)
    ids.setflags(write=False)
    return ids


def window_records(block: int) -> int:
    """Returns how many consecutive places of an epoch share their records when blocks of `block` are permuted."""
    return max(2, WINDOW_RECORDS // block) * block


def slice_bounds(global_batch: int, rank: int, size: int) -> Tuple[int, int]:
    """Returns the part [low, high) of the global batch that `rank` of `size` works on: parts differ by one at most."""
    short, longer = divmod(global_batch, size)
    low = rank * short + min(rank, longer)
    return low, low + short + (1 if rank < longer else 0)


def positions(start: int, stop: int, records: int, seed: int, block: int = 1) -> Positions:
    """Returns the records at positions [start, stop) of the stream over `records` records.

    block: 1, or of how many consecutive records are the blocks that are permuted as wholes (`block_permutation`).
    """
    if block > 1:
        return _positions(start, stop, records, lambda epoch: block_permutation(records, seed, epoch, block))
    return _positions(start, stop, records, lambda epoch: permutation(records, seed, epoch))


def storage_order(start: int, stop: int, records: int, seed: int, block: int) -> np.ndarray:
    """Returns the ids of as many records, int64 [stop - start], in the order in which storage best reads them.

    They are those of whole blocks: at each start of a window (`block_permutation`) the records before it are the same as
    those of `positions`.
    """
    return _positions(start, stop, records, lambda epoch: _blocks(records, seed, epoch, block)).ids


def _positions(start: int, stop: int, records: int, order: Callable[[int], np.ndarray]) -> Positions:
    epochs, offsets = np.divmod(np.arange(start, stop, dtype=np.int64), records)
    ids = np.empty_like(offsets)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        ids[chosen] = order(int(epoch))[offsets[chosen]]
    return Positions(ids, epochs)


def sample_seeds(seed: int, at: Positions) -> np.ndarray:
    """Returns the seeds of each sample's crop and flip, int64 [n, 2]: one from (seed, epoch), the other the record id."""
    seeds = np.empty((len(at.ids), 2), np.int64)
    for epoch in np.unique(at.epochs):
        seeds[at.epochs == epoch, 0] = seed_bits(seed, AUGMENT, int(epoch)).astype(np.int64)
    seeds[:, 1] = at.ids
    return seeds


def replacement_record(records: int, seed: int, epoch: int, record: int, attempt: int) -> int:
    """Returns the id of a record to take the place of `record` in an epoch, by chance `record` itself; attempt: from 0."""
    return int(seed_bits(seed, REPLACEMENT, epoch, record, attempt) % np.uint64(records))
