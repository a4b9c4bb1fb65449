"""Reads each shard of a directory by itself, as a run does, and prints how that went: `read_shards.py DIR`.

One line of JSON per shard: its name, the message with which it was refused or null, and by how many bytes the peak memory
of the process has grown since it read the first. Any other exception ends the program.
"""

import json
import os
import resource
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from hvd_vgg.config import TrainConfig
from hvd_vgg.data.formats.layout import shard_bytes
from hvd_vgg.data.index import check_labels, join, scan_shard
from hvd_vgg.data.loader import eval_batches, train_batches
from hvd_vgg.errors import Failure

CONFIG = TrainConfig(global_batch=1, device_batch=1, image_size=64, augment="crop")


def read(path):
    """Returns the message of the failure, or None."""
    try:
        shard_bytes([path])
        index = join([path], [scan_shard(path)])
        check_labels(index, 1, 1000)
        for batches in (
            train_batches(index, CONFIG, 1, range(index.records), 0, 1, 1),
            eval_batches(index, CONFIG, 1, 0, 1, 1),
        ):
            assert sum(len(batch.ids) for batch in batches) == index.records
    except Failure as failure:
        return failure.message
    return None


start = 0
for path in sorted(Path(sys.argv[1]).iterdir()):
    message = read(path)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = start or peak
    print(json.dumps([path.name, message, peak - start]), flush=True)
