"""Runs hvd-vgg and does harm at chosen steps of chosen ranks: `poison.py KIND@RANK:STEP[xA-B],... COMMAND FLAGS...`.

The harm is done from the A-th to the B-th time that the rank is at the step, or the first time only.
nan: the outputs of the last layer are NaN while the rank is at the step.
drift: 1e-3 is added to one number of fc2/bias before the step.
kill: SIGKILL before the step.
"""

import os
import re
import signal
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from hvd_vgg.__main__ import run
from hvd_vgg.data import loader
from hvd_vgg.environment import launched_rank
from hvd_vgg.models import vgg
from hvd_vgg.train import state

mine, times = {}, {}
for text in sys.argv[1].split(","):
    kind, rank, step, first, last = re.fullmatch(r"(\w+)@(\d+):(\d+)(?:x(\d+)-(\d+))?", text).groups()
    if int(rank) == (launched_rank() or 0):
        mine[kind, int(step)] = [int(first or 1), int(last or first or 1)]
batches, dense, initial = loader.train_batches, vgg.dense, state.initial_state
made = {}


def due(kind, step):
    """Says whether it is time, and counts."""
    times[kind, step] = times.get((kind, step), 0) + 1
    first, last = mine.get((kind, step), (1, 0))
    return first <= times[kind, step] <= last


def harmed(*arguments):
    """Yields what the pipeline yields, after doing the step's harm."""
    import tensorflow as tf

    with tf.device("/CPU:0"):
        made.setdefault("nan", tf.Variable(0.0))
    steps = next(argument for argument in arguments if isinstance(argument, range))
    for step, batch in zip(steps, batches(*arguments)):
        made["nan"].assign(float("nan") if due("nan", step) else 0.0)
        if due("drift", step):
            bias = made["run"].weights["fc2/bias"]
            bias.assign_add(1e-3 * tf.one_hot(2, bias.shape[0]))
        if due("kill", step):
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch


def poisoned(weights, x, name):
    """Computes a dense layer; the outputs of the last are those plus what `harmed` says."""
    import tensorflow as tf

    outputs = dense(weights, x, name)
    return outputs + tf.cast(made["nan"], outputs.dtype) if name == "predictions" and "nan" in made else outputs


def kept(config):
    """Makes the state and keeps it."""
    made["run"] = initial(config)
    return made["run"]


loader.train_batches, vgg.dense, state.initial_state = harmed, poisoned, kept
sys.exit(run(sys.argv[2:]))
