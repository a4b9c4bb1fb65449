"""What happens after a step that is not finite: it is diagnosed and kept, and the run ends or continues without it."""

import shlex
from typing import Any, Dict

import numpy as np

from hvd_vgg.errors import NOT_FINITE, Failure
from hvd_vgg.parallel import comm
from hvd_vgg.parallel.consensus import run_on_root
from hvd_vgg.run_dir import RunDir
from hvd_vgg.text import plural
from hvd_vgg.training.kept_step import make_report, save_step, write_skipped_steps
from hvd_vgg.training.metrics import NonFiniteStep
from hvd_vgg.training.nonfinite import diagnose
from hvd_vgg.training.schedule import learning_rate
from hvd_vgg.training.state import reset_state
from hvd_vgg.training.trainer import Trainer
from hvd_vgg.watchdog import watchdog


def rewind_or_stop(trainer: Trainer, error: NonFiniteStep) -> None:
    """Returns to the newest checkpoint, from where the step that was not finite is skipped, or ends the run. Collective.

    Raises a collective Failure(NOT_FINITE) if --on_nonfinite or --max_rewinds ends the run.
    """
    throughput, updates = trainer.throughput, len(trainer.window)  # none of these is in the log
    throughput.exchange_seconds += [0.0] * updates  # never read from them
    times = {"update_seconds": throughput.total_seconds[-updates:], "input_seconds": throughput.input_seconds[-updates:]}
    with throughput.exclude("rewinding"), watchdog.phase("saving"):
        trainer.reporter.save_failed(trainer.writer.wait())
        report = _diagnose_and_keep(trainer, error)
        _skip_or_stop(trainer, error, report)
        reset_state(trainer.state, trainer.config)
        trainer.restore()  # with another train step, since this one applies no update any more
    steps = {"from": error.step, "to": trainer.progress.step, "skipped_steps": trainer.progress.skipped_steps}
    trainer.reporter.event("rewind", **steps, records=[row["record"] for row in report["batch"]], **times)
    watchdog.heartbeat(phase="start")  # what follows is compiled again


def _diagnose_and_keep(trainer: Trainer, error: NonFiniteStep) -> Dict[str, Any]:
    """Returns the report of a step, while the weights are those before it; `kept` says how to repeat it. Collective."""
    config, data, device, state = trainer.config, trainer.data, trainer.device, trainer.state
    batch, lr = next(trainer.load(range(error.step, error.step + 1))), learning_rate(error.step, config, data.train.records)
    diagnosis = diagnose(error.step, state, trainer.train_step, batch.images, batch.labels, lr, config, device.data_format)
    ids = np.concatenate(comm.gather_json(batch.ids.numpy().tolist()))
    report = make_report(error, diagnosis, ids, data, config, lr)
    folder = RunDir(config.run_dir).nonfinite_step(error.step)
    problem = comm.broadcast_json(save_step(folder, report, state, data, ids, config) if comm.is_root() else "")
    kept = problem or f"Repeat it on any number of ranks: hvd-vgg replay {shlex.quote(config.run_dir)} --step={error.step}"
    trainer.reporter.event("nonfinite", **{name: value for name, value in report.items() if name not in ("batch", "ranks")})
    return {**report, "kept": kept}


def _skip_or_stop(trainer: Trainer, error: NonFiniteStep, report: Dict[str, Any]) -> None:
    """Has the step skipped from now on, or raises a collective Failure(NOT_FINITE) that ends the run. Collective."""
    config, skipped = trainer.config, trainer.progress.skipped_steps
    text, fix = f"{error}: not finite, so not applied. {report['diagnosis']}. {report['kept']}", ""
    lower = "try a lower --lr or a longer --warmup_epochs in another --run_dir"
    if config.on_nonfinite == "stop":
        fix = f"The newest checkpoint is from before: {lower}, or --on_nonfinite=rewind to skip these records"
    elif len(skipped) >= config.max_rewinds:
        steps = ", ".join(map(str, skipped))
        fix = f"At most --max_rewinds={config.max_rewinds} steps are skipped, and steps {steps} already were: {lower}"
    if fix:
        raise Failure(NOT_FINITE, f"{text}\n{fix}", collective=True)
    run_on_root(lambda: write_skipped_steps(RunDir(config.run_dir), sorted({*skipped, error.step})))
    trainer.reporter.say(f"{text}\nrewinding: its {plural(config.global_batch, 'record')} will be skipped")
