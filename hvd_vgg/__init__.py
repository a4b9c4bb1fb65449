"""Trains VGG networks on ImageNet-style TFRecords with TensorFlow and Horovod."""

from typing import TYPE_CHECKING, Any, Callable, Dict, Optional

if TYPE_CHECKING:
    from hvd_vgg.config import TrainConfig

__version__ = "0.3.0"


def train(config: "TrainConfig", on_log: Optional[Callable[[Dict[str, Any]], None]] = None) -> None:
    """Trains as `hvd-vgg train` does, with the flags of that command as fields: `train(TrainConfig(lr=0.02, steps=100))`.

    Call this at most once per process, alone or on all ranks of a launcher: `hvd-vgg launch --ranks=8 -- python train.py`.
    Most scripts set data_dir, run_dir, model, width, image_size, num_classes, global_batch, epochs or steps, lr, lr_schedule
    and seed; `hvd-vgg train --help` lists all fields with units and limits.

    on_log: for another tracker; called on rank 0, in the training loop, with a dictionary for each log line of updates, each
    evaluation and the end of the run: `kind` (train, evaluation, end), `step`, `epoch` (neither at the end), and the numbers
    under their names in the log, such as `train.loss`. If it raises an exception, that is printed, it is not called again,
    and training goes on.

    Returns when the run is complete; what it leaves is in `config.run_dir`. Raises `hvd_vgg.errors.Failure`, which has the
    command's exit code and message, where the run ended otherwise; illegal flags are in one Failure of code 64. A failure of
    one rank alone ends the processes of all ranks, as it does for the command.
    """
    from hvd_vgg.__main__ import run_command
    from hvd_vgg.errors import USAGE, Failure
    from hvd_vgg.flags import expand_home, validate
    from hvd_vgg.watchdog import watchdog

    config = expand_home(config)
    errors = validate(config)
    if errors:
        raise Failure(USAGE, "\n".join(errors))
    try:
        failure = run_command("train", config, on_log=on_log)
    finally:
        watchdog.release()
    if failure:
        raise Failure(failure.code, failure.message)
