"""What happens after a step that is not finite: it is diagnosed and kept, and the run ends or continues without it."""

from typing import Any, Callable, List

import numpy as np

from hvd_vgg.config import TrainConfig
from hvd_vgg.data.loader import Batch
from hvd_vgg.errors import NOT_FINITE, Failure
from hvd_vgg.parallel import comm
from hvd_vgg.parallel.consensus import run_on_root
from hvd_vgg.run_dir import RunDir
from hvd_vgg.text import plural
from hvd_vgg.training.dataset import Splits
from hvd_vgg.training.kept_step import make_report, save_step, write_skipped_steps
from hvd_vgg.training.metrics import NonFiniteStep
from hvd_vgg.training.nonfinite import diagnose
from hvd_vgg.training.reporter import Reporter
from hvd_vgg.training.schedule import learning_rate
from hvd_vgg.training.state import State


def stop_or_skip(
    error: NonFiniteStep,
    batch: Batch,
    skipped_steps: List[int],
    state: State,
    train_step: Callable[..., Any],
    data: Splits,
    config: TrainConfig,
    data_format: str,
    reporter: Reporter,
) -> List[int]:
    """Diagnoses and keeps a step that was not finite, while `state` is what it was before it. Collective.

    batch: this rank's part of the step's global batch.

    Returns the ids of the step's records if the run is to continue without them, from a checkpoint. Raises a collective
    Failure(NOT_FINITE) if it is to end.
    """
    lr = learning_rate(error.step, config, data.train.records)
    diagnosis = diagnose(error.step, state, train_step, batch.images, batch.labels, lr, config, data_format)
    parts = comm.gather_bytes(batch.ids.numpy().astype(np.int64).tobytes())
    ids = np.concatenate([np.frombuffer(part, np.int64) for part in parts])
    report = make_report(error, diagnosis, ids, data, config, lr)
    run_dir = RunDir(config.run_dir)
    problem = save_step(run_dir.nonfinite_step(error.step), report, state, data, ids, config) if comm.is_root() else ""
    kept = comm.broadcast_json(problem)
    kept = kept or f"Repeat it on any number of ranks: hvd-vgg replay {config.run_dir} --step={error.step}"
    reporter.event("nonfinite", **{name: value for name, value in report.items() if name not in ("batch", "ranks")})
    text = f"{error}: not finite, so not applied. {diagnosis}. {kept}"
    if config.on_nonfinite == "stop":
        raise Failure(
            NOT_FINITE,
            f"{text}\nThe newest checkpoint is from before: try a lower --lr or a longer --warmup_epochs in another "
            f"--run_dir, or --on_nonfinite=rewind to skip these records",
            collective=True,
        )
    if len(skipped_steps) >= config.max_rewinds:
        steps = ", ".join(map(str, skipped_steps))
        raise Failure(
            NOT_FINITE,
            f"{text}\nAt most --max_rewinds={config.max_rewinds} steps are skipped, and steps {steps} already were: try a "
            f"lower --lr or a longer --warmup_epochs in another --run_dir",
            collective=True,
        )
    run_on_root(lambda: write_skipped_steps(run_dir, sorted({*skipped_steps, error.step})))
    reporter.say(f"{text}\nrewinding: its {plural(len(ids), 'record')} will be skipped")
    return list(ids.tolist())
