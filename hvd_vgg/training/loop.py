"""The training loop."""

from typing import Optional

from hvd_vgg.config import TrainConfig
from hvd_vgg.training.metrics import NonFiniteStep
from hvd_vgg.training.reporter import OnLog
from hvd_vgg.training.rewind import rewind_or_stop
from hvd_vgg.training.trainer import Trainer


def train(config: TrainConfig, on_log: Optional[OnLog] = None) -> None:
    """Trains to the end and leaves everything in --run_dir. Collective.

    on_log: called on rank 0 with each line of updates, each evaluation and the end, as a dictionary (`hvd_vgg.train`).
    Raises a collective Failure where the run must end otherwise: STOPPED on request, NOT_FINITE, DATA, CONFIGURATION ...
    """
    with Trainer(config, on_log) as trainer:  # joins the ranks, opens the data, restores the newest checkpoint
        while True:
            try:
                return fit(trainer)
            except NonFiniteStep as error:  # neither it nor any update after it was applied
                rewind_or_stop(trainer, error)


def fit(trainer: Trainer) -> None:
    """Trains from where the run stands to its end: last checkpoint, result, summary. Collective; raises NonFiniteStep."""
    progress = trainer.progress
    if trainer.evaluation_missed():
        trainer.save(best=trainer.evaluate())
    for step, batch in trainer.batches():
        trainer.update(step, batch)  # device tensors; waits for nothing
        due = trainer.cadence.due(progress.step)  # a pure function of the step: equal on all ranks
        stopping = due.poll and trainer.any_stop_requested()
        if not (due.log or stopping):  # whatever else is due, a log line is
            trainer.end_update()
            continue

        trainer.log_metrics()  # waits for the device and all ranks; raises NonFiniteStep
        overdue = trainer.save_overdue()
        if due.check_replicas or overdue or stopping:  # before weights are scored or saved
            trainer.check_replicas()
        improved = trainer.evaluate() if due.evaluate else []
        done = progress.step == trainer.total_steps or trainer.target_reached()
        if due.save or overdue or improved or done or stopping:
            trainer.save(best=improved)  # rank 0 writes in the background
        if done:
            break
        if due.evaluate:
            trainer.write_result()
        if stopping:
            trainer.stop()  # exit code 80
    trainer.finish()
