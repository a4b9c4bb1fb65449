"""Runs hvd-vgg and flips a byte of a file when rank 0 has trained a step: `damage.py FILE OFFSET COMMAND FLAGS...`."""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from hvd_vgg import __main__
from hvd_vgg.data import pipeline

original = pipeline.train_batches


def damaging(index, config, label_base, steps, rank, size, threads):
    """Yields what the pipeline yields; the damage is done before the second batch."""
    for step, batch in zip(steps, original(index, config, label_base, steps, rank, size, threads)):
        if (step, rank) == (1, 0):
            with open(sys.argv[1], "rb+") as file:
                file.seek(int(sys.argv[2]))
                byte = file.read(1)[0]
                file.seek(int(sys.argv[2]))
                file.write(bytes([byte ^ 1]))
        yield batch


pipeline.train_batches = damaging
sys.exit(__main__.run(sys.argv[3:]))
