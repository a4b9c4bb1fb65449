"""Which record is read when, and with which random seeds: pure functions of the seed and the step.

The stream is epoch 0, epoch 1, ... laid end to end, each a permutation of all N records. Step s takes positions
[s * G, (s + 1) * G) of it, G the global batch. Only `part_bounds` depends on the number of ranks.
"""

import functools
from typing import Callable, NamedTuple, Tuple

import numpy as np

from hvd_vgg.config import BITS, StepConfig
from hvd_vgg.seeds import AUGMENT, BLOCKS, ORDER, REPLACEMENT, raw_draws, seed_bits
from hvd_vgg.text import plural

# Whole blocks are shuffled within windows of about this many records, the size of the shuffle buffers in TensorFlow's
# ImageNet examples.
WINDOW_RECORDS = 16_384


class Positions(NamedTuple):
    """Consecutive positions of the stream: the record id and the epoch of each."""

    ids: np.ndarray  # int64 [n]
    epochs: np.ndarray  # int64 [n]


@functools.lru_cache(maxsize=2)  # a batch spans two epochs at most, unless it is larger than the data set
def permutation(records: int, seed: int, epoch: int, block: int = 1) -> np.ndarray:
    """Returns the order of the `records` ids in one epoch, uint32 [records], read-only.

    block: 1 for a free permutation. With more, blocks of `block` consecutive ids (the last may be shorter) are laid end to
    end in random order. The result is cut into windows of WINDOW_RECORDS // block whole blocks, two at least, and each
    window is permuted.
    """
    draws = raw_draws(records, seed, ORDER, epoch)
    if block == 1:
        return _read_only(np.argsort(draws, kind="stable"))
    # Sorted by window, and within one by a random number: each window keeps its records and loses their order.
    windows = np.arange(records) // window_records(block)
    return _read_only(_shuffled_blocks(records, seed, epoch, block)[np.lexsort((draws, windows))])


@functools.lru_cache(maxsize=2)
def _shuffled_blocks(records: int, seed: int, epoch: int, block: int) -> np.ndarray:
    """Returns the blocks of an epoch laid end to end, before windows are permuted, uint32 [records], read-only."""
    blocks = np.argsort(raw_draws(-(-records // block), seed, BLOCKS, epoch), kind="stable")
    ids = (blocks[:, None] * block + np.arange(min(block, records))).ravel()
    return _read_only(ids[ids < records])


def _read_only(ids: np.ndarray) -> np.ndarray:
    ids = ids.astype(np.uint32)
    ids.setflags(write=False)
    return ids


def window_records(block: int) -> int:
    """Returns the records in a window: those that are shuffled among each other with blocks of `block` records."""
    return max(2, WINDOW_RECORDS // block) * block


def slice_bounds(count: int, rank: int, size: int) -> Tuple[int, int]:
    """Returns the slice [low, high) of `count` that `rank` of `size` takes; slices differ by one at most."""
    short, longer = divmod(count, size)
    low = rank * short + min(rank, longer)
    return low, low + short + (1 if rank < longer else 0)


def micro_batches(config: StepConfig) -> int:
    """Returns how many micro-batches of --device_batch the global batch is cut into under --reproducible=bits."""
    return -(-config.global_batch // config.device_batch)


def whole_images(config: StepConfig) -> int:
    """Returns of how many consecutive positions of the global batch a rank takes all or none.

    A micro-batch under --reproducible=bits; else the images that must be computed together.
    """
    return config.device_batch if config.reproducible == BITS else config.group_batch


def most_ranks(config: StepConfig) -> int:
    """Returns how many ranks can share the global batch."""
    return -(-config.global_batch // whole_images(config))


def too_many_ranks(config: StepConfig, ranks: int) -> str:
    """Returns why `ranks` cannot share the global batch, and what to do; "" if they can."""
    most, batch = most_ranks(config), config.global_batch
    if ranks <= most:
        return ""
    if most == batch:
        return f"--global_batch={batch} has fewer images than the {ranks} ranks: start at most {batch}"
    if config.reproducible != BITS:
        groups = f"{plural(most, 'group')} of {config.group_batch} images (--norm_batch, --mix_batch)"
        least = f"fewer than the {ranks} ranks, each of which computes whole ones: start at most {most}"
        return f"--global_batch={batch} has {groups}, {least}"
    text = (
        f"--global_batch={batch} has {most} micro-batch{'es' if most > 1 else ''} of --device_batch={config.device_batch}, "
        f"fewer than the {ranks} ranks, each of which computes whole ones under --reproducible={BITS}: start at most {most}"
    )
    group = config.group_batch
    enough = batch // ranks // group * group
    return f"{text}, or begin a new run with --device_batch={enough}" if enough else text


def part_bounds(config: StepConfig, rank: int, size: int) -> Tuple[int, int]:
    """Returns the part [low, high) of the global batch that `rank` of `size` computes.

    Parts differ by `whole_images` at most. Ranks for which none is left have no images.
    """
    low, high = slice_bounds(most_ranks(config), rank, size)
    images = whole_images(config)
    return min(low * images, config.global_batch), min(high * images, config.global_batch)


def positions(start: int, stop: int, records: int, seed: int, block: int = 1) -> Positions:
    """Returns positions [start, stop) of the stream over `records` records, permuted by `block` as `permutation` says."""
    return _positions(start, stop, records, lambda epoch: permutation(records, seed, epoch, block))


def storage_order(start: int, stop: int, records: int, seed: int, block: int) -> np.ndarray:
    """Returns the ids at [start, stop) of the stream before windows are permuted, int64 [stop - start].

    Up to each window's end these are the same records as those of `positions`, as whole blocks that storage reads fast.
    """
    return _positions(start, stop, records, lambda epoch: _shuffled_blocks(records, seed, epoch, block)).ids


def _positions(start: int, stop: int, records: int, order: Callable[[int], np.ndarray]) -> Positions:
    epochs, offsets = np.divmod(np.arange(start, stop, dtype=np.int64), records)
    ids = np.empty_like(offsets)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        ids[chosen] = order(int(epoch))[offsets[chosen]]
    return Positions(ids, epochs)


def sample_seeds(seed: int, at: Positions) -> np.ndarray:
    """Returns the seeds of each sample's augmentation, int64 [n, 2]: a hash of (seed, epoch), and the record id."""
    seeds = np.empty((len(at.ids), 2), np.int64)
    for epoch in np.unique(at.epochs):
        seeds[at.epochs == epoch, 0] = seed_bits(seed, AUGMENT, int(epoch)).astype(np.int64)
    seeds[:, 1] = at.ids
    return seeds


def replacement_record(records: int, seed: int, epoch: int, record: int, attempt: int) -> int:
    """Returns the id that takes the place of a bad `record` in an epoch, possibly `record` itself; attempt: from 0."""
    return int(seed_bits(seed, REPLACEMENT, epoch, record, attempt) % np.uint64(records))
