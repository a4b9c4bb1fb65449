"""Reads, decodes and batches one rank's part of the stream, ahead of need and within bounds.

A batch is made by `threads` threads in tasks of ROWS_PER_TASK rows, in the order in which its records lie in the files.
They work ahead of the batch that is asked for by at most A batches of decoded images, A = 2 + ceil(threads * ROWS_PER_TASK
/ rows), rows the images of a batch. For READ_AHEAD batches beyond these the kernel is asked to read the records into its
page cache, so that storage works while processors decode; the kernel may reclaim that memory. With 8 threads and 32 rows
of 224 pixels a rank holds 4 * 4.8 MB decoded, and 4 * 3.5 MB are read ahead at ImageNet's mean of 110 kB. On top come the
batch handed out and what each thread is working on: the records of one task, and an image. A row is a function of the
seed, the epoch and the record, whichever thread makes it.

With --shuffle_block_records above 1 storage is asked for whole blocks, the next window's while this one is trained on: two
windows of 16,384 records, 3.6 GB at ImageNet's mean, of each host's page cache. Each host then reads all of the data set.

A bad record (its checksum, features, image or label) ends the run, unless --bad_records_allowed is above 0. Then in training
another record takes its place, a function of the seed, the epoch and the bad record, with the row's own crop and flip; in
evaluation the row stays empty. The batch says so, and `training.bad_records` keeps count.
"""

import contextlib
import dataclasses
import itertools
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Callable, Deque, Iterable, Iterator, List, NamedTuple, Optional, Tuple, Union

import numpy as np
import tensorflow as tf

from hvd_vgg.config import BatchConfig, ComputeConfig, EvaluationConfig, ImageConfig, ScoringConfig
from hvd_vgg.data.index import Index
from hvd_vgg.data.mended import decode_and_name
from hvd_vgg.data.reader import BadRecord, read_ahead, read_image, reads_in_progress
from hvd_vgg.data.sampler import part_bounds, positions, replacement_record, sample_seeds, storage_order, window_records
from hvd_vgg.data.transforms import augmentation_params, eval_image, train_image
from hvd_vgg.errors import DATA, Failure
from hvd_vgg.watchdog import watchdog

PADDING = -1  # the label of a row that only fills up a batch
ROWS_PER_TASK = 8
READ_AHEAD = 4  # batches that storage is asked for beyond those that are being decoded
READ_AHEAD_RECORDS = 512  # records that storage is asked for at once: the request blocks where its queue is full
MAX_REPLACEMENTS = 8  # records that are tried in place of a bad one


class BadRow(NamedTuple):
    """A row whose record is bad: its number in the batch, the record, the one in its place (None: none), what is wrong."""

    row: int
    record: int
    by: Optional[int]
    reason: str


class Batch(NamedTuple):
    """A batch on the host: images uint8 [n, image_size, image_size, 3], labels int32 [n] from 0, record ids int64 [n].

    In training `ids` are the records that the images show; `bad` says which of them replace others. In evaluation `bad` are
    black rows with the label PADDING, which also marks the rows that fill up the last batch.
    """

    images: Any
    labels: Any
    ids: Any
    bad: List[BadRow]


class Sample(NamedTuple):
    """A record as read: its id, the encoded image, the label from 0."""

    record: int
    encoded: bytes
    label: int


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The records of a split as rows of a batch. Its methods may be called on any thread."""

    index: Index
    label_base: int  # of the first class
    image_size: int  # height and width of a row, pixels
    config: ImageConfig
    training: bool  # or evaluation: nothing is random, and no record takes another's place
    crop: float = 0.0  # of evaluation, as in `eval_image`
    seed: int = 0
    bad_allowed: int = 0  # with 0 a bad record ends the run

    def read(self, record: int) -> Union[Sample, BadRecord]:
        """Returns a record, or what is wrong with it. Raises Failure(DATA) where its shard cannot be read at all."""
        try:
            encoded, label = read_image(self.index, record)
        except BadRecord as bad:
            return bad
        if label != self.index.labels[record]:
            reason = f"its label is {label}, but was {self.index.labels[record]} when the shard was indexed"
            advice = "Did the shard change while in use? Start again; if its size and time stayed as they were, remove the"
            return BadRecord(
                self.index, record, reason, f"{advice} .hvd_vgg_index_* beside it or in the run directory first"
            )
        return Sample(record, encoded, label - self.label_base)

    def decode(self, sample: Union[Sample, BadRecord], params: List[float], out: np.ndarray) -> int:
        """Writes the image to `out`, uint8 [image_size, image_size, 3], and returns the label; raises BadRecord.

        sample: of `read`; params: a row of `transforms.augmentation_params`.
        """
        if isinstance(sample, BadRecord):
            raise sample

        def decode() -> None:
            if self.training:
                train_image(sample.encoded, params, self.config, out)
            else:
                eval_image(sample.encoded, self.crop, self.config.resize, out)

        try:
            decode_and_name(self.index, sample.record, sample.encoded, decode)
        except ValueError as error:
            reason = f"the image ({len(sample.encoded)} bytes) cannot be decoded: {error}"
            advice = "Expected a whole JPEG or PNG: replace the record"
            raise BadRecord(self.index, sample.record, reason, advice) from error
        except Exception as error:
            where = self.index.where(sample.record)
            raise RuntimeError(f"{where}: the image ({len(sample.encoded)} bytes) broke the program") from error
        return sample.label

    def replace(self, bad: BadRecord, epoch: int, params: List[float], out: np.ndarray) -> Tuple[int, Optional[int]]:
        """Writes what takes the place of a bad record to `out`, and returns its label and id.

        Training takes another record; evaluation a black image, PADDING and None. Raises Failure(DATA) where bad records
        are not allowed, or those tried are all bad.
        """
        if not self.bad_allowed:
            raise Failure(DATA, f"{bad.message}, or go on without: --bad_records_allowed=1 (or more)") from bad
        if not self.training:
            out[:] = 0
            return PADDING, None
        for attempt in range(MAX_REPLACEMENTS):
            by = replacement_record(self.index.records, self.seed, epoch, bad.record, attempt)
            with contextlib.suppress(BadRecord):  # each is reported in its own place
                return self.decode(self.read(by), params, out), by
        raise Failure(DATA, f"{bad.message} ({MAX_REPLACEMENTS} others tried in its place are bad too)") from bad


class BatchSpec(NamedTuple):
    """The rows of a batch, and what else is to be read from storage when the batch is planned."""

    ids: np.ndarray  # int64 [n]
    epochs: np.ndarray  # int64 [n]
    seeds: np.ndarray  # int64 [n, 2]
    read_ahead: np.ndarray  # int64 [m], record ids


def train_batches(
    index: Index, config: BatchConfig, label_base: int, steps: range, rank: int, size: int, threads: int
) -> Iterator[Batch]:
    """Yields this rank's slice of each step of `steps`, in order; raises Failure(DATA) naming the bad record."""
    low, high = part_bounds(config, rank, size)
    block = config.shuffle_block_records

    def specs() -> Iterator[BatchSpec]:
        for step in steps:
            start = step * config.global_batch
            part = positions(start + low, start + high, index.records, config.seed, block)
            ahead = part.ids if block == 1 else blocks_ahead(start, step == steps.start)
            yield BatchSpec(part.ids, part.epochs, sample_seeds(config.seed, part), ahead)

    def blocks_ahead(start: int, first: bool) -> np.ndarray:
        # Whole blocks, for all ranks: what lies a window ahead of the batch; with the first batch its own window too.
        window = window_records(block)
        begin = start - start % index.records % window if first else start + window
        return storage_order(begin, start + config.global_batch + window, index.records, config.seed, block)

    dataset = Dataset(
        index, label_base, config.image_size, config, True, seed=config.seed, bad_allowed=config.bad_records_allowed
    )
    return load_batches(dataset, specs(), high - low, threads)


def load_records(
    index: Index, config: ComputeConfig, label_base: int, ids: np.ndarray, seeds: np.ndarray, threads: int
) -> Batch:
    """Returns the records `ids`, int64 [n], as training sees them with the seeds of `sampler.sample_seeds`, int64 [n, 2].

    Raises Failure(DATA) naming the bad record.
    """
    spec = BatchSpec(ids, np.zeros(len(ids), np.int64), seeds, ids)
    return next(load_batches(Dataset(index, label_base, config.image_size, config, True), [spec], len(ids), threads))


def eval_batches(
    index: Index, config: EvaluationConfig, label_base: int, rank: int, size: int, threads: int
) -> Iterator[Batch]:
    """Yields `scoring_batches` of a whole split, with --bad_records_allowed."""
    return scoring_batches(index, config, label_base, rank, size, threads, config.bad_records_allowed)


def scoring_batches(
    index: Index, config: ScoringConfig, label_base: int, rank: int, size: int, threads: int, bad_allowed: int
) -> Iterator[Batch]:
    """Yields this rank's batches of a whole split, each record once; the last batch is filled up with PADDING rows.

    Batch b holds records b * device_batch onward whichever rank computes it, so that a record meets the same arithmetic on
    any number of ranks; rank r takes batches r, r + size, ... With `bad_allowed` 0 raises Failure(DATA) naming the
    bad record.
    """
    rows = config.device_batch

    def spec(start: int) -> BatchSpec:
        ids = np.arange(start, min(start + rows, index.records))
        return BatchSpec(ids, np.zeros(len(ids), np.int64), np.zeros([len(ids), 2], np.int64), ids)

    dataset = Dataset(
        index, label_base, config.evaluated_size, config, False, config.evaluated_crop, bad_allowed=bad_allowed
    )
    starts = range(rank * rows, index.records, size * rows)
    return load_batches(dataset, map(spec, starts), rows, threads)


def load_batches(dataset: Dataset, specs: Iterable[BatchSpec], rows: int, threads: int) -> Iterator[Batch]:
    """Yields a batch of `rows` rows for each of `specs`, in order; of several failures the first in file order is raised."""
    ahead = 2 + -(-threads * ROWS_PER_TASK // max(1, rows))
    left = iter(specs)
    planned: Deque[BatchSpec] = deque()
    begun: Deque[Future[Batch]] = deque()
    closed = threading.Event()
    pools = ThreadPoolExecutor(threads, "decode"), ThreadPoolExecutor(1, "finish"), ThreadPoolExecutor(1, "read_ahead")
    decoders, finisher, storage = pools

    def submit(pool: ThreadPoolExecutor, function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        return pool.submit(lambda: None if closed.is_set() else function(*arguments))

    watchdog.add_to_report("batches_ready", lambda: sum(batch.done() for batch in list(begun)))
    watchdog.add_to_report("reading", reads_in_progress)
    try:
        while True:
            for spec in itertools.islice(left, ahead + READ_AHEAD - len(planned) - len(begun)):
                planned.append(spec)
                for ids in _chunks(spec.read_ahead, READ_AHEAD_RECORDS):
                    submit(storage, read_ahead, dataset.index, ids)
            while planned and len(begun) < ahead:
                spec = planned.popleft()
                batch = _allocate(spec, rows, dataset.image_size)
                by_place = np.argsort(spec.ids, kind="stable")  # ids count records in the order in which files hold them
                tasks = [submit(decoders, _fill, batch, spec, part, dataset) for part in _chunks(by_place, ROWS_PER_TASK)]
                begun.append(submit(finisher, _finish, batch, len(spec.ids), tasks))
            if not begun:
                return
            batch = begun[0].result()
            begun.popleft()
            yield batch
    finally:
        closed.set()
        for pool in pools:
            pool.shutdown()


def _chunks(rows: np.ndarray, size: int) -> List[np.ndarray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _allocate(spec: BatchSpec, rows: int, image_size: int) -> Batch:
    """Returns a batch of NumPy arrays to be filled; its rows beyond those of `spec` are PADDING."""
    ids = np.pad(spec.ids, [0, rows - len(spec.ids)], "edge")
    return Batch(np.empty([rows, image_size, image_size, 3], np.uint8), np.full(rows, PADDING, np.int32), ids, [])


def _fill(batch: Batch, spec: BatchSpec, rows: np.ndarray, dataset: Dataset) -> None:
    """Reads and decodes the records of `rows`; raises Failure(DATA) naming a bad one that may not be replaced."""
    # All are read before the first is decoded: decoding pushes the code that reads out of the processor's caches.
    samples = [dataset.read(record) for record in spec.ids[rows].tolist()]
    params_of_rows = augmentation_params(spec.seeds[rows], dataset.config)
    for row, params, sample in zip(rows.tolist(), params_of_rows, samples):
        try:
            batch.labels[row] = dataset.decode(sample, params, batch.images[row])
        except BadRecord as bad:
            batch.labels[row], by = dataset.replace(bad, int(spec.epochs[row]), params, batch.images[row])
            batch.ids[row] = bad.record if by is None else by
            batch.bad.append(BadRow(row, bad.record, by, bad.reason))


def _finish(batch: Batch, filled: int, tasks: List["Future[None]"]) -> Batch:
    """Waits for a batch's tasks and returns it as tensors; rows beyond the first `filled` repeat the last of these."""
    for task in tasks:
        task.result()
    batch.images[filled:] = batch.images[filled - 1]
    with tf.device("/CPU:0"):
        images, labels, ids = map(tf.convert_to_tensor, batch[:3])
    return Batch(images, labels, ids, sorted(batch.bad))
