"""The learning rate as a pure function of the step."""

import math

from hvd_vgg.config import Config, epochs_to_steps, total_steps


def learning_rate(step: int, config: Config, records: int) -> float:
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
