"""Exact top-1 and top-5: every record of a split once, counted in integers over all ranks."""

import itertools
import math
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Callable, Deque, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import tensorflow as tf

from hvd_vgg.colours import BOLD
from hvd_vgg.config import EvaluationConfig, ScoringConfig
from hvd_vgg.data.index import Index
from hvd_vgg.data.loader import PADDING, BadRow, Batch, eval_batches
from hvd_vgg.errors import BUG, Failure
from hvd_vgg.models import vgg
from hvd_vgg.models.batch_norm import fold
from hvd_vgg.parallel import comm
from hvd_vgg.parallel.init import Device
from hvd_vgg.text import plural
from hvd_vgg.training.bad_records import count_bad_records
from hvd_vgg.training.loss import cross_entropy, top_k_hits
from hvd_vgg.training.metrics import exact_sum
from hvd_vgg.training.reporter import Reporter
from hvd_vgg.watchdog import StopRequested, watchdog

TOP = 5  # classes of each record that an evaluation keeps
_POLL_BATCHES = 4  # how often the ranks ask each other whether one was asked to stop


class Evaluation(NamedTuple):
    """Integer hits among `records` records, of which `bad` could not be read and are misses, and the sum of their losses.

    state_sha256: of the run that was evaluated, on rank 0; average: the evaluation of the average of its weights, if any;
    reference: acc@1 that --reference_curve has there, if it does; rows: of `ranked_rows`, this rank's, without bad records.
    """

    top1: int
    top5: int
    records: int
    loss_sum: float
    bad: int
    state_sha256: str = ""
    average: Any = None
    reference: Optional[float] = None
    rows: Any = None

    def reference_difference(self) -> Optional[float]:
        """Returns acc@1 minus the reference curve's; None where it has none."""
        return None if self.reference is None else self.top1 / self.records - self.reference

    def accuracy(self) -> str:
        """Returns both accuracies for people."""
        text = f"acc@1 {self.top1 / self.records:.4f}  acc@5 {self.top5 / self.records:.4f}"
        return f"{text}  ({plural(self.bad, 'bad record')} counted as missed)" if self.bad else text

    def counts(self) -> Dict[str, Any]:
        """Returns loss, shares and hits of one network by name."""
        return {
            "loss": self.loss_sum / self.records,
            "acc@1": self.top1 / self.records,
            "acc@5": self.top5 / self.records,
            "top1_hits": self.top1,
            "top5_hits": self.top5,
        }

    def average_counts(self) -> Dict[str, Any]:
        """Returns `counts` of the average, under names that say so; nothing without one."""
        return {f"average_{name}": value for name, value in self.average.counts().items()} if self.average else {}

    def metrics(self) -> Dict[str, Any]:
        """Returns shares and counts under the names of the log."""
        difference = self.reference_difference()
        return {
            **{f"eval.{name}": value for name, value in self.counts().items()},
            "eval.records": self.records,
            "eval.bad_records": self.bad,
            "eval.state_sha256": self.state_sha256,
            **{f"eval.{name}": value for name, value in self.average_counts().items()},
            **({} if difference is None else {"eval.reference_difference": difference}),
        }


class Scored(NamedTuple):
    """Scores of a batch: sums over its rows, and what is predicted for each.

    loss: float32; top1, top5: hits, and records, int64. hits: bool [n, 2], top-1 and top-5; classes: int32 [n, k], the k
    likeliest, best first, of equal ones the lower first; probabilities: float32 [n, k], theirs.
    """

    loss: Any
    top1: Any
    top5: Any
    records: Any
    hits: Any
    classes: Any
    probabilities: Any


def make_eval_step(network: vgg.Weights, config: ScoringConfig, data_format: str, top: int = TOP) -> Callable[..., Any]:
    """Returns the function (images, labels) -> Scored, of one batch; top: how many classes it ranks.

    network: weights and moments, by name; images: uint8 [n, h, w, 3]; labels: int32 [n], negative where the row is padding
    and counts for nothing. With --eval_flip the logarithm of the mean of the posteriors of an image and its mirror image
    takes the place of logits (Simonyan and Zisserman, section 3.2).
    """

    def scores(weights: vgg.Weights, images: Any) -> Any:
        return vgg.logits(weights, config.model, images, data_format, config.pixel_normalization, config.precision)

    def flipped_scores(weights: vgg.Weights, images: Any) -> Any:
        both = tf.stack([tf.nn.log_softmax(scores(weights, each)) for each in (images, tf.reverse(images, [2]))])
        return tf.reduce_logsumexp(both, axis=0) - math.log(2)

    @tf.function(jit_compile=False, autograph=False)
    def eval_step(images: Any, labels: Any) -> Any:
        weights = fold(network)
        logits = flipped_scores(weights, images) if config.eval_flip else scores(weights, images)
        real = labels >= 0
        losses = cross_entropy(logits, tf.maximum(labels, 0))
        loss = tf.reduce_sum(tf.where(real, losses, 0.0))
        records = tf.reduce_sum(tf.cast(real, tf.int64))
        hits = tf.stack([top_k_hits(logits, labels, k) for k in (1, 5)], axis=1)
        top1, top5 = tf.unstack(tf.reduce_sum(tf.cast(hits, tf.int64), axis=0))
        best = tf.math.top_k(logits, min(top, config.num_classes))
        probabilities = tf.exp(best.values - tf.reduce_logsumexp(logits, axis=1, keepdims=True))
        return Scored(loss, top1, top5, records, hits, best.indices, probabilities)

    return eval_step


def ranked_rows(batch: Batch, scored: Scored) -> np.ndarray:
    """Returns what is predicted for the records of a batch, without padding and bad ones: a structured array [n].

    record: id; hits: bool [2], top-1 and top-5; classes: int32 [k], probabilities: float32 [k], best first.
    """
    real = np.asarray(batch.labels) != PADDING
    top = scored.classes.shape[1]
    rows = np.zeros(int(real.sum()), _row(top))
    columns = batch.ids, scored.hits, scored.classes, scored.probabilities
    for name, column in zip(("record", "hits", "classes", "probabilities"), columns):
        rows[name] = np.asarray(column)[real]
    return rows


def _row(top: int) -> np.dtype:
    return np.dtype([("record", "<i8"), ("hits", "?", (2,)), ("classes", "<i4", (top,)), ("probabilities", "<f4", (top,))])


def gather_rows(rows: Sequence[np.ndarray], top: int) -> np.ndarray:
    """Returns the rows of `ranked_rows` of all ranks, in order of their records. Collective.

    rows: this rank's; top: how many classes each ranks.
    """
    mine = np.concatenate([np.zeros(0, _row(top)), *rows])
    everyones = np.frombuffer(b"".join(comm.gather_bytes(mine.tobytes())), _row(top))
    return everyones[np.argsort(everyones["record"], kind="stable")]


def evaluate(
    eval_step: Callable[..., Any],
    index: Index,
    config: EvaluationConfig,
    label_base: int,
    device: Device,
    reporter: Reporter,
) -> Evaluation:
    """Returns the evaluation of a whole split, equal on all ranks. Collective.

    A bad record counts as a record and as a miss, with a loss of 0, if --bad_records_allowed admits it; else Failure(DATA)
    is raised. Raises Failure(BUG) should a record be missed or seen twice, and StopRequested on all ranks when any was asked
    to stop. reporter: reports bad records and progress.
    """
    counts, losses = np.zeros(3, np.int64), []
    rows = [np.zeros(0, _row(min(TOP, config.num_classes)))]
    bad: List[Tuple[int, BadRow]] = []
    size, rows_per_batch = comm.size(), config.device_batch
    common = -(-index.records // rows_per_batch) // size  # batches of every rank; some have one more
    own = sum(min(rows_per_batch, index.records - first) for first in range(0, index.records, size * rows_per_batch))
    progress = reporter.console.progress("evaluating", own, "records on rank 0")
    batches = eval_batches(index, config, label_base, comm.rank(), size, device.input_threads)
    for number, (batch, scored) in enumerate(score_batches(eval_step, batches, device.micro_batches)):
        counts += [int(each) for each in (scored.top1, scored.top5, scored.records)]
        counts[2] += len(batch.bad)
        losses.append(float(scored.loss))
        bad += [(0, row) for row in batch.bad]
        rows.append(ranked_rows(batch, scored))
        progress.update(int(counts[2]))
        watchdog.heartbeat(phase="evaluation")
        if number < common and number % _POLL_BATCHES == 0 and comm.any_rank(watchdog.stop_requested()):
            raise StopRequested
    missed = count_bad_records(bad, [], config.bad_records_allowed, index, reporter)
    scored_rows = np.concatenate(rows)
    ids = np.concatenate([scored_rows["record"], np.array([row.record for _, row in bad], np.int64)])
    seen = comm.sum_over_ranks(np.bincount(ids, minlength=index.records).astype(np.int64))
    top1, top5, total = comm.sum_over_ranks(counts).tolist()
    if total != index.records or (seen != 1).any():
        raise Failure(BUG, f"evaluated {total} records, {int((seen == 1).sum())} of {index.records} once", collective=True)
    loss = exact_sum(itertools.chain(*comm.gather_json(losses)))
    return Evaluation(top1, top5, total, loss, len(missed), rows=scored_rows)


def score_batches(eval_step: Callable[..., Any], batches: Iterator[Batch], at_a_time: int) -> Iterator[Tuple[Batch, Scored]]:
    """Yields each batch with its results, in order, while `at_a_time` others are being computed."""
    begun: Deque[Tuple[Batch, Future[Any]]] = deque()
    with ThreadPoolExecutor(at_a_time, "evaluate") as pool:
        for batch in batches:
            begun.append((batch, pool.submit(eval_step, batch.images, batch.labels)))
            if len(begun) > at_a_time:
                done, results = begun.popleft()
                yield done, results.result()
        for done, results in begun:
            yield done, results.result()


def report_evaluation(result: Evaluation, step: int, epoch: float, reporter: Reporter) -> None:
    """Logs and prints the evaluation of a run after `step` updates, that is `epoch` epochs."""
    reporter.row((int(epoch), step), result.metrics())
    loss, difference = result.loss_sum / result.records, result.reference_difference()
    reference = "" if difference is None else f"  reference {result.reference:.4f} ({difference:+.4f})"
    paint = reporter.console.paint
    text = f"step {step}  epoch {epoch:.2f}  evaluation: {paint(result.accuracy(), BOLD)}{reference}  loss {loss:.4f}"
    more = "" if reporter.console.bar else f"  of {result.records} records  state {result.state_sha256[:16]}"
    reporter.say(f"{text}{more}")
    if result.average:
        loss = result.average.loss_sum / result.records
        reporter.say(f"  the average of the weights: {paint(result.average.accuracy(), BOLD)}  loss {loss:.4f}")
