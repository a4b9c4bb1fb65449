"""What is due when, as pure functions of the step: the learning rate, evaluations, log lines, checkpoints."""

import math
from typing import FrozenSet, NamedTuple

from hvd_vgg.config import DECAYING, TrainConfig

# Log once after two steps: early feedback, and the ETA excludes compilation.
_FIRST_LOG_STEP = 2
# Where updates are slow, the ranks ask each other more often than they log whether one of them was asked to stop.
_STOP_POLL_SECONDS = 5.0


def total_steps(config: TrainConfig, records: int) -> int:
    """Returns the number of updates of the run over a data set of `records`: ceil(epochs * records / global_batch)."""
    return config.steps or max(1, epochs_to_steps(config.epochs, config, records))


def epochs_to_steps(epochs: float, config: TrainConfig, records: int) -> int:
    """Returns the first step whose batch begins at or after `epochs` of the stream."""
    return math.ceil(epochs * records / config.global_batch - 1e-9)


def evaluation_steps(config: TrainConfig, records: int) -> FrozenSet[int]:
    """Returns the numbers of updates after which to evaluate; the last is the end of the run."""
    total = total_steps(config, records)
    if not config.eval_every_epochs:
        return frozenset([total])
    count = int(total * config.global_batch / (records * config.eval_every_epochs)) + 1
    steps = (epochs_to_steps(n * config.eval_every_epochs, config, records) for n in range(1, count + 1))
    return frozenset({step for step in steps if 0 < step < total} | {total})


def is_evaluation_step(step: int, config: TrainConfig, records: int) -> bool:
    """Returns whether `step` is one of `evaluation_steps`, without making them: a log may claim any number."""
    total, every = total_steps(config, records), config.eval_every_epochs
    if step >= total or not every:
        return step == total
    nearest = int(step * config.global_batch / (records * every))
    numbers = (nearest + each for each in (-1, 0, 1) if nearest + each >= 1)
    return step > 0 and any(epochs_to_steps(number * every, config, records) == step for number in numbers)


def rate_factor(config: TrainConfig) -> float:
    """Returns what the rates of the flags are multiplied by: the linear scaling rule, if --lr_base_batch asks for it.

    When the batch is k times as large, so is the rate (Goyal et al., arXiv 1706.02677, section 2.1).
    """
    return config.global_batch / config.lr_base_batch if config.lr_base_batch else 1.0


def learning_rate(step: int, config: TrainConfig, records: int) -> float:
    """Returns the learning rate of update `step` (from 0) in a run over `records` records.

    Rises linearly from --warmup_lr to --lr over the warm-up's steps, the first of which is a step above it (Goyal et al.,
    section 2.2); then constant, divided by 10 at each of --lr_step_epochs, or down to --lr_min at the end: along half a
    cosine (Loshchilov and Hutter, arXiv 1608.03983, equation 5 without restarts), or as the power --lr_power of what is left
    of the run (You et al., arXiv 1708.03888, section 5; torch's PolynomialLR where --lr_min is 0).
    """
    factor = rate_factor(config)
    lr, least, first = factor * config.lr, factor * config.lr_min, factor * config.warmup_lr
    warmup = epochs_to_steps(config.warmup_epochs, config, records)
    if step < warmup:
        return first + (lr - first) * (step + 1) / warmup
    if config.lr_schedule == "step":
        drops = sum(step >= epochs_to_steps(epoch, config, records) for epoch in config.lr_step_epochs)
        return lr / 10**drops
    if config.lr_schedule in DECAYING:
        done = min(1.0, (step - warmup) / max(1, total_steps(config, records) - warmup))
        share = (1 + math.cos(math.pi * done)) / 2 if config.lr_schedule == "cosine" else (1 - done) ** config.lr_power
        return least + (lr - least) * share
    return lr


class Due(NamedTuple):
    """What is due after an update: ask all ranks whether to stop, log, compare replicas, evaluate, save a checkpoint."""

    poll: bool
    log: bool
    check_replicas: bool
    evaluate: bool
    save: bool


class Cadence(NamedTuple):
    """When the loop does more than update; equal on all ranks, since all of it is collective.

    first_step: updates that the run had when this process started. evaluation_steps: as the function of that name returns.
    The others are in updates, 0 for never: log_every_steps, save_every_steps, check_every_steps (compare replicas) and
    stop_poll_steps (ask whether to stop, beside every log line).
    """

    first_step: int
    evaluation_steps: FrozenSet[int]
    log_every_steps: int
    save_every_steps: int
    check_every_steps: int
    stop_poll_steps: int

    @property
    def first_log_step(self) -> int:
        """The number of updates after which the first line is logged, unless --log_every_steps is less."""
        return self.first_step + _FIRST_LOG_STEP

    def due(self, step: int) -> Due:
        """Returns what is due when `step` updates have been made."""
        evaluate = step in self.evaluation_steps
        save = _every(self.save_every_steps, step)
        # Before weights are scored or saved they are compared: a checkpoint of drifted ones would look whole.
        check = self.check_every_steps > 0 and (_every(self.check_every_steps, step) or save or evaluate)
        log = step == self.first_log_step or _every(self.log_every_steps, step) or evaluate or save or check
        return Due(log or _every(self.stop_poll_steps, step), log, check, evaluate, save)


def make_cadence(config: TrainConfig, records: int, first_step: int) -> Cadence:
    """Returns the cadence of a run over `records` records that starts after `first_step` updates."""
    return Cadence(
        first_step,
        evaluation_steps(config, records),
        config.log_every_steps,
        config.save_every_steps,
        config.drift_every_steps,
        stop_poll_steps=config.log_every_steps,
    )


def stop_poll_steps(seconds: float) -> int:
    """Returns how many updates take _STOP_POLL_SECONDS, given the `seconds` of one."""
    return max(1, round(_STOP_POLL_SECONDS / seconds))


def _every(period: int, step: int) -> bool:
    return period > 0 and step % period == 0
