"""Runs hvd-vgg with one rank slowed on purpose: `slow.py input|compute|saving RANK COMMAND FLAGS...`.

input: each record that it reads takes 20 ms longer; compute: every forward pass also multiplies large matrices; saving: it
takes half a second longer to begin a checkpoint.
"""

import os
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from hvd_vgg.__main__ import run
from hvd_vgg.data import reader
from hvd_vgg.environment import launched_rank
from hvd_vgg.models import vgg
from hvd_vgg.train import state

kind, slowed = sys.argv[1], launched_rank() == int(sys.argv[2])
read, dense, save = reader.read_record, vgg.dense, state.save_state


def read_slowly(*arguments):
    """Reads a record late."""
    time.sleep(0.02)
    return read(*arguments)


def compute_again(weights, x, name):
    """Computes a dense layer, and for fc1 much else that changes nothing."""
    import tensorflow as tf

    if name == "fc1":
        kernel = tf.ones([1500, 1500]) * tf.reduce_sum(x)
        for _ in range(12):
            kernel = tf.matmul(kernel, kernel) * 1e-6
        x += 1e-30 * tf.stop_gradient(tf.clip_by_value(tf.reduce_sum(kernel), -1.0, 1.0))
    return dense(weights, x, name)


def save_slowly(*arguments):
    """Saves late."""
    time.sleep(0.5)
    return save(*arguments)


if slowed and kind == "input":
    reader.read_record = read_slowly
if slowed and kind == "compute":
    vgg.dense = compute_again
if slowed and kind == "saving":
    state.save_state = save_slowly
sys.exit(run(sys.argv[3:]))
