"""Reads, decodes and batches one rank's part of the stream, ahead of need and within bounds.

A batch is made by `threads` threads in pieces of PIECE rows, in the order in which its records lie in the files. They work
ahead of the batch that is asked for by at most A batches of decoded images, A = 2 + ceil(threads * PIECE / rows), rows the
images of a batch. For READ_AHEAD batches beyond these the kernel is told to read the records into its page cache, so that
storage works while processors decode; that memory is the kernel's to take back. With 8 threads and 32 rows of 224 pixels a
rank holds 4 * 4.8 MB decoded, and 4 * 3.5 MB are read ahead at ImageNet's mean of 110 kB. Beside that are the batch handed
out and the one image that each thread is at work on. A row is a function of the seed, the epoch and the record: threads
decide nothing.
"""

import itertools
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Deque, Iterator, List, NamedTuple, Optional

import numpy as np
import tensorflow as tf

from hvd_vgg.config import Config
from hvd_vgg.data import images, order, records
from hvd_vgg.run import watch
from hvd_vgg.run.health import DATA, Failure

PADDING = -1  # the label of a row that only fills up a batch
PIECE = 8  # rows that a thread takes on at once
READ_AHEAD = 4  # batches that storage is asked for beyond those that are being decoded

# Makes a row: of an encoded image and its `images.image_draws`, into uint8 [image_size, image_size, 3]; ValueError.
_Decode = Callable[[bytes, List[float], np.ndarray], None]


class _Plan(NamedTuple):
    """What a batch consists of: record ids int64 [n] and their seeds int64 [n, 2]."""

    ids: np.ndarray
    seeds: np.ndarray


class _Begun(NamedTuple):
    """A batch that is being made: its plan, labels and images being filled in, and the pieces of work on it."""

    plan: _Plan
    labels: np.ndarray
    images: np.ndarray
    left: List[int]  # as many numbers from 0 up as there are pieces; each takes the last when it is done


class Batch(NamedTuple):
    """Images uint8 [n, image_size, image_size, 3], labels int32 [n] from 0 (PADDING: no record), ids int64 [n]."""

    images: Any
    labels: Any
    ids: Any


def train_batches(
    index: records.Index, config: Config, label_base: int, steps: range, rank: int, size: int, threads: int
) -> Iterator[Batch]:
    """Yields this rank's part of each step of `steps`, in order; raises Failure(DATA) naming the record at fault."""
    low, high = order.slice_bounds(config.global_batch, rank, size)

    def plan(step: int) -> _Plan:
        start = step * config.global_batch
        block = config.shuffle_block_records
        at = order.positions(start + low, start + high, index.records, config.seed, block)
        return _Plan(at.ids, order.sample_seeds(config.seed, at))

    def decode(encoded: bytes, draws: List[float], out: np.ndarray) -> None:
        images.train_image(encoded, draws, config.augment, out)

    return _batches(plan, decode, index, label_base, steps, high - low, config.image_size, threads)


def eval_batches(
    index: records.Index, config: Config, label_base: int, rank: int, size: int, threads: int
) -> Iterator[Batch]:
    """Yields this rank's batches of a whole split, each record once; the last batch is filled with PADDING rows.

    Batch b holds records b * device_batch onward whoever computes it, so that a record meets the same arithmetic on any
    number of ranks; rank r takes batches r, r + size, ... Raises Failure(DATA) naming the record at fault.
    """

    def plan(batch: int) -> _Plan:
        start = batch * config.device_batch
        ids = np.arange(start, min(start + config.device_batch, index.records))
        return _Plan(ids, np.zeros([len(ids), 2], np.int64))

    def decode(encoded: bytes, draws: List[float], out: np.ndarray) -> None:
        del draws  # nothing is random here
        images.eval_image(encoded, config.augment, out)

    numbers = range(rank, -(-index.records // config.device_batch), size)
    return _batches(plan, decode, index, label_base, numbers, config.device_batch, config.image_size, threads)


def _batches(
    plan: Callable[[int], _Plan],
    decode: _Decode,
    index: records.Index,
    label_base: int,
    numbers: range,
    rows: int,
    image_size: int,
    threads: int,
) -> Iterator[Batch]:
    ahead = 2 + -(-threads * PIECE // max(1, rows))
    planned: Deque[_Plan] = deque()
    begun: Deque[List[Any]] = deque()  # the futures of each batch's pieces
    left = iter(numbers)
    pool = ThreadPoolExecutor(threads, "decode")
    watch.reports("batches_ready", lambda: sum(all(piece.done() for piece in each) for each in list(begun)))
    try:
        for _ in numbers:
            for number in itertools.islice(left, ahead + READ_AHEAD - len(planned) - len(begun)):
                planned.append(plan(number))
                pool.submit(records.read_ahead, index, planned[-1].ids)
            while planned and len(begun) < ahead:
                batch = _begin(planned.popleft(), rows, image_size)
                begun.append([pool.submit(_fill, batch, part, decode, index, label_base) for part in _parts(batch.plan)])
            (made,) = (batch for batch in [piece.result() for piece in begun[0]] if batch)
            begun.popleft()
            yield made
    finally:
        for piece in itertools.chain(*begun):
            piece.cancel()
        pool.shutdown()


def _parts(plan: _Plan) -> List[np.ndarray]:
    """Returns the rows of each piece of work; ids count records in the order in which they lie in the files."""
    by_place = np.argsort(plan.ids, kind="stable")
    return [by_place[start : start + PIECE] for start in range(0, len(by_place), PIECE)]


def _begin(plan: _Plan, rows: int, image_size: int) -> _Begun:
    """Returns an empty batch; rows beyond its plan's are PADDING and will repeat the last of it."""
    empty = np.empty([rows, image_size, image_size, 3], np.uint8)
    return _Begun(plan, np.full(rows, PADDING, np.int32), empty, list(range(len(_parts(plan)))))


def _fill(batch: _Begun, rows: np.ndarray, decode: _Decode, index: records.Index, label_base: int) -> Optional[Batch]:
    """Reads and decodes the records of `rows`; the call that completes the batch returns it, the others None.

    Raises Failure(DATA) naming the record that cannot be read or decoded.
    """
    last = len(batch.plan.ids) - 1
    for row, draws in zip(rows.tolist(), images.image_draws(batch.plan.seeds[rows])):
        record = int(batch.plan.ids[row])
        encoded, label = records.parse_example(index, record, records.read_record(index, record))
        if label != index.labels[record]:
            raise Failure(
                DATA,
                f"data: {index.where(record)}: its label is {label}, but was {index.labels[record]} when the shard was "
                f"indexed. Did the shard change while in use? Start again",
            )
        batch.labels[row] = label - label_base
        try:
            decode(encoded, draws, batch.images[row])
        except ValueError as reason:
            raise Failure(
                DATA,
                f"data: {index.where(record)}: the image ({len(encoded)} bytes) cannot be decoded: {reason}. Expected a "
                f"whole JPEG or PNG: replace the record",
            ) from reason
        if row == last:
            batch.images[last + 1 :] = batch.images[last]
    if batch.left.pop() > 0:  # one step that no other thread can come between
        return None
    ids = np.pad(batch.plan.ids, [0, len(batch.labels) - 1 - last], "edge")
    with tf.device("/CPU:0"):
        return Batch(*(tf.convert_to_tensor(column) for column in (batch.images, batch.labels, ids)))
