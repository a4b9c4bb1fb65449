"""Exact top-1 and top-5: every record of a split once, counted in integers over all ranks."""

from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np

from hvd_vgg.config import EvaluationConfig
from hvd_vgg.data.index import Index
from hvd_vgg.data.loader import PADDING, BadRow, eval_batches
from hvd_vgg.errors import BUG, Failure
from hvd_vgg.parallel import comm
from hvd_vgg.reporting.console import Console
from hvd_vgg.reporting.log import RunLog
from hvd_vgg.text import plural
from hvd_vgg.train.bad_records import count_bad_records
from hvd_vgg.watchdog import StopRequested, watchdog

_LISTEN_BATCHES = 4  # the ranks ask each other this often whether one was asked to stop


class Evaluation(NamedTuple):
    """Integer hits among `records` records, of which `bad` could not be read and are misses, and the sum of their losses."""

    top1: int
    top5: int
    records: int
    loss_sum: float
    bad: int

    def accuracy(self) -> str:
        """Returns both accuracies for people."""
        text = f"acc@1 {self.top1 / self.records:.4f}  acc@5 {self.top5 / self.records:.4f}"
        return f"{text}  ({plural(self.bad, 'bad record')} counted as missed)" if self.bad else text

    def metrics(self) -> Dict[str, Any]:
        """Returns the shares and counts under the names of the log."""
        return {
            "eval.loss": self.loss_sum / self.records,
            "eval.acc@1": self.top1 / self.records,
            "eval.acc@5": self.top5 / self.records,
            "eval.top1_hits": self.top1,
            "eval.top5_hits": self.top5,
            "eval.records": self.records,
            "eval.bad_records": self.bad,
        }


def evaluate(
    eval_step: Callable[..., Any],
    index: Index,
    config: EvaluationConfig,
    label_base: int,
    threads: int,
    console: Console,
    log: Optional[RunLog] = None,
) -> Evaluation:
    """Returns the evaluation of a whole split, the same on all ranks; all ranks must call.

    A bad record counts as a record and as a miss, with a loss of 0, if --bad_records_allowed lets it; else Failure(DATA) is
    raised. Raises Failure(BUG) should a record be missed or seen twice, and watch.Stopped on all ranks when any was asked
    to stop.
    """
    counts, loss_sum, ids = np.zeros(3, np.int64), 0.0, []
    met: List[Tuple[int, BadRow]] = []
    progress = console.progress("evaluating", -(-index.records // comm.size()), "records on rank 0")
    all_have = -(-index.records // config.device_batch) // comm.size()  # batches; some ranks have one more
    for number, batch in enumerate(eval_batches(index, config, label_base, comm.rank(), comm.size(), threads)):
        loss, *hits = eval_step(batch.images, batch.labels)
        counts += [int(hit) for hit in hits]
        counts[2] += len(batch.bad)
        loss_sum += float(loss)
        met += [(0, row) for row in batch.bad]
        ids.append(np.array([row.record for row in batch.bad], np.int64))
        ids.append(np.asarray(batch.ids)[np.asarray(batch.labels) != PADDING])
        progress.update(int(counts[2]))
        watchdog.heartbeat(phase="evaluation")
        if number < all_have and number % _LISTEN_BATCHES == 0 and comm.any_rank(watchdog.stop_requested()):
            raise StopRequested
    missed = count_bad_records(met, [], config.bad_records_allowed, index, log, console)
    mine = np.concatenate(ids) if ids else np.zeros(0, np.int64)
    seen = comm.sum_over_ranks(np.bincount(mine, minlength=index.records).astype(np.int64))
    top1, top5, total = comm.sum_over_ranks(counts).tolist()
    if total != index.records or (seen != 1).any():
        raise Failure(BUG, f"evaluated {total} records, {int((seen == 1).sum())} of {index.records} once", collective=True)
    return Evaluation(top1, top5, total, float(comm.sum_over_ranks(np.array([loss_sum]))[0]), len(missed))
