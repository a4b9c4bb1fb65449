"""Reads, decodes and batches one rank's part of the stream, ahead of need."""

import functools
from typing import Any, Callable, Iterator, List, NamedTuple, Tuple

import numpy as np
import tensorflow as tf

from hvd_vgg.config import Config
from hvd_vgg.data import images, order, records
from hvd_vgg.run.health import DATA, Failure

PADDING = -1  # the label of a row that only fills up a batch

# What is read for one batch: encoded images (object [n]), labels from 0 (int32 [n]), ids (int64 [n]), seeds (int64 [n, 2]).
_Raw = Tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
_Decode = Callable[[Any, Any], Any]


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

    def read(step: int) -> _Raw:
        start = step * config.global_batch
        at = order.positions(start + low, start + high, index.records, config.seed)
        return _read(index, label_base, at.ids, order.sample_seeds(config.seed, at))

    decode = functools.partial(images.train_image, augment=config.augment, image_size=config.image_size)
    return _batches(read, decode, index, steps, high - low, threads)


def eval_batches(
    index: records.Index, config: Config, label_base: int, rank: int, size: int, threads: int
) -> Iterator[Batch]:
    """Yields this rank's batches of a whole split, each record once; the last batch is filled with PADDING rows.

    Batch b holds records b * device_batch onward whoever computes it, so that a record meets the same arithmetic on any
    number of ranks; rank r takes batches r, r + size, ... Raises Failure(DATA) naming the record at fault.
    """

    def read(batch: int) -> _Raw:
        start = batch * config.device_batch
        ids = np.arange(start, min(start + config.device_batch, index.records))
        raw = _read(index, label_base, ids, np.zeros([len(ids), 2], np.int64))
        fill = config.device_batch - len(ids)
        rows = np.concatenate([np.arange(len(ids)), np.full(fill, len(ids) - 1)])
        labels = np.concatenate([raw[1], np.full(fill, PADDING, np.int32)])
        return raw[0][rows], labels, raw[2][rows], raw[3][rows]

    def decode(encoded: Any, seed: Any) -> Any:
        del seed  # nothing is random here
        return images.eval_image(encoded, config.augment, config.image_size)

    count = -(-index.records // config.device_batch)
    return _batches(read, decode, index, range(rank, count, size), config.device_batch, threads)


def _read(index: records.Index, label_base: int, ids: np.ndarray, seeds: np.ndarray) -> _Raw:
    encoded, labels = np.empty(len(ids), object), np.empty(len(ids), np.int32)
    for row, record in enumerate(ids.tolist()):
        data = records.read_record(index, record)
        encoded[row], label = records.parse_example(index, record, data)
        if label != index.labels[record]:
            raise Failure(
                DATA,
                f"data: {index.where(record)}: its label is {label}, but was {index.labels[record]} when the shard was "
                f"indexed. Did the shard change while in use? Start again",
            )
        labels[row] = label - label_base
    return encoded, labels, ids, seeds


def _batches(
    read: Callable[[int], _Raw], decode: _Decode, index: records.Index, numbers: range, rows: int, threads: int
) -> Iterator[Batch]:
    failures: List[Failure] = []

    def read_or_note(number: np.ndarray) -> _Raw:
        try:
            return read(int(number))
        except Failure as failure:  # TensorFlow would turn it into text
            failures.append(failure)
            raise

    def load(number: Any) -> Any:
        kinds = [tf.string, tf.int32, tf.int64, tf.int64]
        encoded, labels, ids, seeds = tf.numpy_function(read_or_note, [number], kinds)
        encoded, labels, ids = (tf.ensure_shape(column, [rows]) for column in (encoded, labels, ids))
        return encoded, labels, ids, tf.ensure_shape(seeds, [rows, 2])

    def decode_row(encoded: Any, label: Any, record: Any, seed: Any) -> Any:
        return Batch(decode(encoded, seed), label, record)

    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    dataset = tf.data.Dataset.range(numbers.start, numbers.stop, numbers.step)
    dataset = dataset.map(load, num_parallel_calls=2).unbatch()
    dataset = dataset.map(decode_row, num_parallel_calls=threads).batch(rows, drop_remainder=True)
    iterator = iter(dataset.prefetch(2).with_options(options))
    for number in numbers:
        try:
            batch = next(iterator)
        except (tf.errors.OpError, StopIteration) as error:
            if failures:
                raise failures[0] from error
            raise _undecodable(read, decode, index, range(number, numbers.stop, numbers.step), error) from error
        yield batch


def _undecodable(
    read: Callable[[int], _Raw], decode: _Decode, index: records.Index, numbers: range, error: Exception
) -> Exception:
    """Returns the Failure that names the record whose decoding raised `error`: TensorFlow does not say which it was.

    Records are decoded ahead of need, so the next few batches are looked through one record at a time.
    """
    for number in numbers[:8]:
        encoded, _, ids, seeds = read(number)
        for data, record, seed in zip(encoded, ids.tolist(), seeds):
            try:
                decode(tf.constant(data), tf.constant(seed))
            except tf.errors.OpError as reason:
                text = reason.message.split("[Op:")[0].strip().splitlines()
                return Failure(
                    DATA,
                    f"data: {index.where(record)}: the image ({len(data)} bytes) cannot be decoded: {text[0]} "
                    f"{' '.join(text[1:])[:200]}. Expected a whole JPEG or PNG: replace the record",
                )
    return error
