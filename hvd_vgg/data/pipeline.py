"""Reads, decodes and batches one rank's part of the stream, ahead of need and within bounds.

Two pools of threads work ahead of the batch that is asked for: READERS threads read the records of the next batches, in
pieces of PIECE rows and in the order they lie in the files; `threads` threads decode them. At any time at most the decoded
images of A batches and the encoded images of A + 2 are held, A = 2 + ceil(threads * PIECE / rows), rows the images of a
batch: with 8 threads and 32 rows of 224 pixels 4 * 4.8 MB and, at ImageNet's mean of 110 kB, 6 * 3.5 MB. Beside that are the
batch handed out and the one image that each thread is at work on. A row is a function of the seed, the epoch and the record:
threads decide nothing.
"""

import functools
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Callable, Deque, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np
import tensorflow as tf

from hvd_vgg.config import Config
from hvd_vgg.data import images, order, records
from hvd_vgg.run.health import DATA, Failure

PADDING = -1  # the label of a row that only fills up a batch
READERS = 4  # threads that mostly wait for storage: so many reads are under way at once
PIECE = 8  # rows that a thread takes on at once
_READ_AHEAD = 2  # batches read beyond those that are being decoded

# Makes a row of what is read: (encoded image, its seed int64 [2]) to uint8 [image_size, image_size, 3]; ValueError.
_Decode = Callable[[bytes, np.ndarray], np.ndarray]


class _Plan(NamedTuple):
    """What a batch consists of: record ids int64 [n] and their seeds int64 [n, 2]."""

    ids: np.ndarray
    seeds: np.ndarray


class _Begun(NamedTuple):
    """A batch that is being made: its plan, labels and images being filled in, and the pieces of work on it."""

    plan: _Plan
    labels: np.ndarray
    images: np.ndarray
    reads: "List[Tuple[np.ndarray, Future[List[bytes]]]]"  # the rows of each piece, and their encoded images
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

    decode = functools.partial(images.train_image, augment=config.augment, image_size=config.image_size)
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

    def decode(encoded: bytes, seed: np.ndarray) -> np.ndarray:
        del seed  # nothing is random here
        return images.eval_image(encoded, config.augment, config.image_size)

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
    reading: Deque[_Begun] = deque()
    decoding: Deque[Tuple[_Begun, List[Any]]] = deque()
    left = iter(numbers)
    readers = ThreadPoolExecutor(READERS, "read")
    decoders = ThreadPoolExecutor(threads, "decode")
    try:
        for _ in numbers:
            for number in left:
                reading.append(_begin(plan(number), index, label_base, rows, image_size, readers))
                if len(reading) + len(decoding) == ahead + _READ_AHEAD:
                    break
            while reading and len(decoding) < ahead:
                begun = reading.popleft()
                fills = [decoders.submit(_fill, begun, part, encoded, decode, index) for part, encoded in begun.reads]
                decoding.append((begun, fills))
            (made,) = (batch for batch in [fill.result() for fill in decoding[0][1]] if batch)
            decoding.popleft()
            yield made
    finally:
        for _, fills in decoding:  # before what they wait for
            for fill in fills:
                fill.cancel()
        for begun in reading:
            for _, read in begun.reads:
                read.cancel()
        readers.shutdown()
        decoders.shutdown()


def _begin(
    plan: _Plan, index: records.Index, label_base: int, rows: int, image_size: int, readers: ThreadPoolExecutor
) -> _Begun:
    """Starts to read a batch; rows beyond its plan's are PADDING and repeat the last of it."""
    labels = np.full(rows, PADDING, np.int32)
    by_place = np.argsort(plan.ids, kind="stable")  # ids count records in the order they lie in the files
    parts = [by_place[start : start + PIECE] for start in range(0, len(by_place), PIECE)]
    reads = [(part, readers.submit(_read, plan.ids[part], index, label_base, labels, part)) for part in parts]
    return _Begun(plan, labels, np.empty([rows, image_size, image_size, 3], np.uint8), reads, list(range(len(parts))))


def _read(ids: np.ndarray, index: records.Index, label_base: int, labels: np.ndarray, rows: np.ndarray) -> List[bytes]:
    """Returns the encoded images of records `ids` and writes their labels to `rows` of `labels`."""
    encoded = []
    for row, record in zip(rows.tolist(), ids.tolist()):
        image, label = records.parse_example(index, record, records.read_record(index, record))
        if label != index.labels[record]:
            raise Failure(
                DATA,
                f"data: {index.where(record)}: its label is {label}, but was {index.labels[record]} when the shard was "
                f"indexed. Did the shard change while in use? Start again",
            )
        encoded.append(image)
        labels[row] = label - label_base
    return encoded


def _fill(
    begun: _Begun, rows: np.ndarray, read: "Future[List[bytes]]", decode: _Decode, index: records.Index
) -> Optional[Batch]:
    """Decodes the images of `rows` into their places; the call that completes the batch returns it, the others None.

    Raises Failure(DATA) naming the record that cannot be decoded.
    """
    last = len(begun.plan.ids) - 1
    for row, encoded in zip(rows.tolist(), read.result()):
        try:
            image = decode(encoded, begun.plan.seeds[row])
        except ValueError as reason:
            where = index.where(int(begun.plan.ids[row]))
            raise Failure(
                DATA,
                f"data: {where}: the image ({len(encoded)} bytes) cannot be decoded: {reason}. Expected a whole JPEG or "
                f"PNG: replace the record",
            ) from reason
        begun.images[row] = image
        if row == last:
            begun.images[last + 1 :] = image
    if begun.left.pop() > 0:  # one step that no other thread can come between
        return None
    with tf.device("/CPU:0"):
        return Batch(*(tf.convert_to_tensor(column) for column in (begun.images, begun.labels, begun.plan.ids)))
