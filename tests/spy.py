"""Runs hvd-vgg and writes the record ids of every step that this rank trains on: `spy.py OUT_DIR COMMAND FLAGS...`.

The package has no switch for this: the test wraps the stream of batches from outside.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from hvd_vgg import __main__
from hvd_vgg.data import pipeline

out = Path(sys.argv[1])
original = pipeline.train_batches


def noted(index, config, label_base, steps, rank, size, threads):
    """Yields what the pipeline yields, after writing its ids."""
    with open(out / f"ids.rank{rank}", "a", buffering=1) as file:
        for step, batch in zip(steps, original(index, config, label_base, steps, rank, size, threads)):
            file.write(f"{step} {' '.join(map(str, batch.ids.numpy().tolist()))}\n")
            yield batch


pipeline.train_batches = noted
sys.exit(__main__.run(sys.argv[2:]))
