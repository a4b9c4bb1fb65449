"""Reads, decodes and batches one rank's part of the stream, ahead of need and within bounds.

A batch is made by `threads` threads in pieces of PIECE rows, in the order in which its records lie in the files. They work
ahead of the batch that is asked for by at most A batches of decoded images, A = 2 + ceil(threads * PIECE / rows), rows the
images of a batch. For READ_AHEAD batches beyond these the kernel is told to read the records into its page cache, so that
storage works while processors decode; that memory is the kernel's to take back. With 8 threads and 32 rows of 224 pixels a
rank holds 4 * 4.8 MB decoded, and 4 * 3.5 MB are read ahead at ImageNet's mean of 110 kB. Beside that are the batch handed
out and what each thread is at work on: the records of one piece, and an image. A row is a function of the seed, the epoch
and the record: threads decide nothing.

With --shuffle_block_records above 1 storage is asked for whole blocks, the next window's while this one is trained on: two
windows of 16,384 records, 3.6 GB at ImageNet's mean, of each host's page cache. Each host then reads all of the data set.

A record that is bad (its checksum, features, image or label) ends the run, unless --bad_records_allowed is above 0. Then in
training another record takes its place, with the crop and flip of the row; in evaluation none does. Which one is a
function of the seed, the epoch and the bad record. The batch says so, and `data.bad` keeps count.
"""

import itertools
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Deque, Iterator, List, NamedTuple, Optional, Union

import numpy as np
import tensorflow as tf

from hvd_vgg.config import BatchConfig, ComputeConfig, EvaluationConfig, StepConfig
from hvd_vgg.data.index import Index
from hvd_vgg.data.reader import BadRecord, parse_example, read_ahead, read_record
from hvd_vgg.data.sampler import positions, replacement_record, sample_seeds, slice_bounds, storage_order, window_records
from hvd_vgg.data.transforms import augmentation_params, eval_image, train_image
from hvd_vgg.errors import DATA, Failure
from hvd_vgg.watchdog import watchdog

PADDING = -1  # the label of a row that only fills up a batch
ROWS_PER_TASK = 8  # rows that a thread takes on at once
READ_AHEAD = 4  # batches that storage is asked for beyond those that are being decoded
READ_AHEAD_RECORDS = 512  # records that storage is asked for at once: where its queue is full, that waits
MAX_REPLACEMENTS = 8  # records that are tried in place of a bad one
# Makes a row: of an encoded image and its `images.image_draws`, into uint8 [image_size, image_size, 3]; ValueError.
_Decode = Callable[[bytes, List[float], np.ndarray], None]


class BadRow(NamedTuple):
    """A row whose record is bad: its number in the batch, the record, the one in its place (None: none), what is wrong."""

    row: int
    record: int
    by: Optional[int]
    reason: str


class _BatchSpec(NamedTuple):
    """What a batch consists of: record ids int64 [n], their epochs int64 [n] and seeds int64 [n, 2].

    ahead: ids of the records that storage is asked for when the batch is planned, int64.
    """

    ids: np.ndarray
    epochs: np.ndarray
    seeds: np.ndarray
    ahead: np.ndarray


class _PendingBatch(NamedTuple):
    """A batch that is being made: its plan, labels and images being filled in, and the pieces of work on it."""

    plan: _BatchSpec
    labels: np.ndarray
    images: np.ndarray
    left: List[int]  # as many numbers from 0 up as there are pieces; each takes the last when it is done
    bad: List[BadRow]


class Batch(NamedTuple):
    """Images uint8 [n, image_size, image_size, 3], labels int32 [n] from 0 (PADDING: no record), ids int64 [n].

    In training `ids` are the records that the images are of; `bad` says which of them stand in for others. In evaluation
    `bad` are rows of no image, with the label PADDING.
    """

    images: Any
    labels: Any
    ids: Any
    bad: List[BadRow]


class _Read(NamedTuple):
    """A record as read: its id, the encoded image, the label as written."""

    record: int
    encoded: bytes
    label: int


class _RowMaker(NamedTuple):
    """How a row is made: a record is read, then decoded with its draws into uint8 [image_size, image_size, 3].

    `decode` returns the label from 0. Both raise records.BadRecord.
    """

    read: Callable[[int], _Read]
    decode: Callable[[_Read, List[float], np.ndarray], int]


# Settles, in a batch, a row with its draws whose record is bad.
_OnBadRecord = Callable[[_PendingBatch, int, List[float], BadRecord], None]


def train_batches(
    index: Index, config: BatchConfig, label_base: int, steps: range, rank: int, size: int, threads: int
) -> Iterator[Batch]:
    """Yields this rank's part of each step of `steps`, in order; raises Failure(DATA) naming the record at fault."""
    low, high = slice_bounds(config.global_batch, rank, size)

    def plan(step: int) -> _BatchSpec:
        start = step * config.global_batch
        block = config.shuffle_block_records
        at = positions(start + low, start + high, index.records, config.seed, block)
        return _BatchSpec(at.ids, at.epochs, sample_seeds(config.seed, at), at.ids if block == 1 else blocks_ahead(step))

    def blocks_ahead(step: int) -> np.ndarray:
        # Of whole blocks, for all ranks, what lies a window ahead of the batch; with the first batch its own window too.
        start, window = step * config.global_batch, window_records(config.shuffle_block_records)
        begin = start + window if step > steps.start else start - start % index.records % window
        stop = start + config.global_batch + window
        return storage_order(begin, stop, index.records, config.seed, config.shuffle_block_records)

    def replace(batch: _PendingBatch, row: int, draws: List[float], bad: BadRecord) -> None:
        record, epoch = int(batch.plan.ids[row]), int(batch.plan.epochs[row])
        for attempt in range(MAX_REPLACEMENTS):
            by = replacement_record(index.records, config.seed, epoch, record, attempt)
            try:
                batch.labels[row] = make.decode(make.read(by), draws, batch.images[row])
            except BadRecord:  # it may be the bad record itself; others are told in their own place
                continue
            batch.bad.append(BadRow(row, record, by, bad.reason))
            return
        raise Failure(DATA, f"{bad.message} ({MAX_REPLACEMENTS} others tried in its place are bad too)") from bad

    make = _make_row_maker(index, label_base, _train_decode(config))
    settle = replace if config.bad_records_allowed else _fail_on_bad_record
    return _batches(plan, make, settle, index, steps, high - low, config.image_size, threads)


def load_records(
    index: Index, config: StepConfig, label_base: int, ids: np.ndarray, seeds: np.ndarray, threads: int
) -> Batch:
    """Returns the records `ids`, int64 [n], as training sees them under `order.sample_seeds`, int64 [n, 2].

    Raises Failure(DATA) naming the record at fault.
    """
    plan = _BatchSpec(ids, np.zeros(len(ids), np.int64), seeds, ids)
    make = _make_row_maker(index, label_base, _train_decode(config))
    return next(_batches(lambda _: plan, make, _fail_on_bad_record, index, range(1), len(ids), config.image_size, threads))


def _train_decode(config: ComputeConfig) -> _Decode:
    def decode(encoded: bytes, draws: List[float], out: np.ndarray) -> None:
        train_image(encoded, draws, config.augment, out)

    return decode


def eval_batches(
    index: Index, config: EvaluationConfig, label_base: int, rank: int, size: int, threads: int
) -> Iterator[Batch]:
    """Yields this rank's batches of a whole split, each record once; the last batch is filled with PADDING rows.

    Batch b holds records b * device_batch onward whoever computes it, so that a record meets the same arithmetic on any
    number of ranks; rank r takes batches r, r + size, ... Raises Failure(DATA) naming the record at fault.
    """

    def plan(batch: int) -> _BatchSpec:
        start = batch * config.device_batch
        ids = np.arange(start, min(start + config.device_batch, index.records))
        return _BatchSpec(ids, np.zeros(len(ids), np.int64), np.zeros([len(ids), 2], np.int64), ids)

    def decode(encoded: bytes, draws: List[float], out: np.ndarray) -> None:
        del draws  # nothing is random here
        eval_image(encoded, config.augment, out)

    def leave_out(batch: _PendingBatch, row: int, draws: List[float], bad: BadRecord) -> None:
        del draws
        batch.images[row] = 0
        batch.bad.append(BadRow(row, int(batch.plan.ids[row]), None, bad.reason))

    make = _make_row_maker(index, label_base, decode)
    settle = leave_out if config.bad_records_allowed else _fail_on_bad_record
    numbers = range(rank, -(-index.records // config.device_batch), size)
    return _batches(plan, make, settle, index, numbers, config.device_batch, config.image_size, threads)


def _fail_on_bad_record(batch: _PendingBatch, row: int, draws: List[float], bad: BadRecord) -> None:
    raise Failure(DATA, f"{bad.message}, or go on without: --bad_records_allowed=1 (or more)") from bad


def _make_row_maker(index: Index, label_base: int, decode: _Decode) -> _RowMaker:
    def read(record: int) -> _Read:
        encoded, label = parse_example(index, record, read_record(index, record))
        if label != index.labels[record]:
            raise BadRecord(
                index.where(record),
                f"its label is {label}, but was {index.labels[record]} when the shard was indexed",
                "Did the shard change while in use? Start again",
            )
        return _Read(record, encoded, label)

    def decode_read(one: _Read, draws: List[float], out: np.ndarray) -> int:
        try:
            decode(one.encoded, draws, out)
        except ValueError as reason:
            raise BadRecord(
                index.where(one.record),
                f"the image ({len(one.encoded)} bytes) cannot be decoded: {reason}",
                "Expected a whole JPEG or PNG: replace the record",
            ) from reason
        except Exception as reason:
            raise RuntimeError(
                f"{index.where(one.record)}: the image ({len(one.encoded)} bytes) broke the program"
            ) from reason
        return one.label - label_base

    return _RowMaker(read, decode_read)


def _batches(
    plan: Callable[[int], _BatchSpec],
    make: _RowMaker,
    settle: _OnBadRecord,
    index: Index,
    numbers: range,
    rows: int,
    image_size: int,
    threads: int,
) -> Iterator[Batch]:
    ahead = 2 + -(-threads * ROWS_PER_TASK // max(1, rows))
    planned: Deque[_BatchSpec] = deque()
    begun: Deque[List[Any]] = deque()  # the futures of each batch's pieces
    left = iter(numbers)
    pool, asker = ThreadPoolExecutor(threads, "decode"), ThreadPoolExecutor(1, "read_ahead")
    asked: List[Any] = []  # futures of what storage is to be asked for
    watchdog.add_to_report("batches_ready", lambda: sum(all(piece.done() for piece in each) for each in list(begun)))
    try:
        for _ in numbers:
            for number in itertools.islice(left, ahead + READ_AHEAD - len(planned) - len(begun)):
                planned.append(plan(number))
                for start in range(0, len(planned[-1].ahead), READ_AHEAD_RECORDS):
                    asked.append(asker.submit(read_ahead, index, planned[-1].ahead[start : start + READ_AHEAD_RECORDS]))
            asked = [each for each in asked if not each.done()]
            while planned and len(begun) < ahead:
                batch = _allocate_batch(planned.popleft(), rows, image_size)
                begun.append([pool.submit(_fill, batch, part, make, settle) for part in _tasks(batch.plan)])
            (made,) = (batch for batch in [piece.result() for piece in begun[0]] if batch)
            begun.popleft()
            yield made
    finally:
        for piece in itertools.chain(asked, *begun):
            piece.cancel()
        pool.shutdown()
        asker.shutdown()


def _tasks(plan: _BatchSpec) -> List[np.ndarray]:
    """Returns the rows of each piece of work; ids count records in the order in which they lie in the files."""
    by_place = np.argsort(plan.ids, kind="stable")
    return [by_place[start : start + ROWS_PER_TASK] for start in range(0, len(by_place), ROWS_PER_TASK)]


def _allocate_batch(plan: _BatchSpec, rows: int, image_size: int) -> _PendingBatch:
    """Returns an empty batch; rows beyond its plan's are PADDING and will repeat the last of it."""
    empty = np.empty([rows, image_size, image_size, 3], np.uint8)
    return _PendingBatch(plan, np.full(rows, PADDING, np.int32), empty, list(range(len(_tasks(plan)))), [])


def _fill(batch: _PendingBatch, rows: np.ndarray, make: _RowMaker, settle: _OnBadRecord) -> Optional[Batch]:
    """Reads and decodes the records of `rows`; the call that completes the batch returns it, the others None.

    Raises Failure(DATA) naming the record that cannot be read, or is bad and not settled.
    """
    last = len(batch.plan.ids) - 1
    # All are read before the first is decoded: decoding pushes the code that reads out of the processor's caches.
    found = [_read_or_bad(make.read, record) for record in batch.plan.ids[rows].tolist()]
    for row, draws, one in zip(rows.tolist(), augmentation_params(batch.plan.seeds[rows]), found):
        try:
            if isinstance(one, BadRecord):
                raise one
            batch.labels[row] = make.decode(one, draws, batch.images[row])
        except BadRecord as bad:
            settle(batch, row, draws, bad)
        if row == last:
            batch.images[last + 1 :] = batch.images[last]
    if batch.left.pop() > 0:  # one step that no other thread can come between
        return None
    ids = np.pad(batch.plan.ids, [0, len(batch.labels) - 1 - last], "edge")
    for each in batch.bad:
        if each.by is not None:
            ids[each.row] = each.by
    with tf.device("/CPU:0"):
        pictures, labels, ids = (tf.convert_to_tensor(column) for column in (batch.images, batch.labels, ids))
    return Batch(pictures, labels, ids, sorted(batch.bad))


def _read_or_bad(read: Callable[[int], _Read], record: int) -> Union[_Read, BadRecord]:
    try:
        return read(record)
    except BadRecord as bad:
        return bad
