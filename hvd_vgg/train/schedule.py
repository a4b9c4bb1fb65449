"""The learning rate as a pure function of the step."""

import math
from typing import FrozenSet

from hvd_vgg.config import TrainConfig


def total_steps(config: TrainConfig, records: int) -> int:
    """Returns the updates of the run over a data set of `records`: ceil(epochs * records / global_batch)."""
    return config.steps or max(1, math.ceil(config.epochs * records / config.global_batch - 1e-9))


def epochs_to_steps(epochs: float, config: TrainConfig, records: int) -> int:
    """Returns the first step whose batch begins at or after `epochs` of the stream."""
    return math.ceil(epochs * records / config.global_batch - 1e-9)


def evaluation_steps(config: TrainConfig, records: int, total: int) -> FrozenSet[int]:
    """Returns the numbers of updates after which to evaluate; the last is the end of the run."""
    if not config.eval_every_epochs:
        return frozenset([total])
    count = int(total * config.global_batch / (records * config.eval_every_epochs)) + 1
    each = (epochs_to_steps(n * config.eval_every_epochs, config, records) for n in range(1, count + 1))
    return frozenset({done for done in each if 0 < done < total} | {total})


def learning_rate(step: int, config: TrainConfig, records: int) -> float:
    """Returns the learning rate of update `step` (from 0) in a run over `records` records.

    Rises linearly to --lr over the warm-up's steps (Goyal et al., arXiv 1706.02677, section 2.2); then constant, divided
    by 10 at each of --lr_step_epochs, or half a cosine to 0 at the end (Loshchilov and Hutter, arXiv 1608.03983,
    equation 5 without restarts).
    """
    warmup = epochs_to_steps(config.warmup_epochs, config, records)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.lr_schedule == "step":
        drops = sum(step >= epochs_to_steps(epoch, config, records) for epoch in config.lr_step_epochs)
        return config.lr / 10**drops
    if config.lr_schedule == "cosine":
        done = (step - warmup) / max(1, total_steps(config, records) - warmup)
        return config.lr * (1 + math.cos(math.pi * min(1.0, done))) / 2
    return config.lr
