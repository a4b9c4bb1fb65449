"""What a checkpoint of VGG16 at width 1 costs training: written in the background, and in the foreground.

    python benchmarks/saving.py [--rounds=5] [--images=2] [--width=1] [--out=DIR]

One rank trains on synthetic images of 224 pixels. A round is, in turn: updates with no save; a save in the background, with
updates until it is on disk; the same save with the loop waiting for it. Prints the loop's pause, the time until the file
is on disk, and how much slower updates are meanwhile, with their spread over the rounds. --out is where checkpoints go.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import tensorflow as tf

from hvd_vgg.config import TrainConfig
from hvd_vgg.models.architecture import DENSE
from hvd_vgg.parallel.init import start
from hvd_vgg.run_dir import RunDir
from hvd_vgg.seeds import dropout_keys
from hvd_vgg.training.checkpoint_writer import CheckpointWriter
from hvd_vgg.training.state import TrainProgress, initial_state, save_state
from hvd_vgg.training.train_step import make_train_step


def parse():
    """Returns the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--out", help="directory on the disk to measure (default: a temporary one)")
    return parser.parse_args()


def told(name, values, unit="s"):
    """Prints a median and its spread."""
    print(f"{name:52} {statistics.median(values):8.2f} {unit}  ({min(values):.2f} to {max(values):.2f})", flush=True)


def main():
    """Runs the rounds and prints the table."""
    options = parse()
    device = start()
    config = TrainConfig(width=options.width, global_batch=options.images, device_batch=options.images)
    run = initial_state(config)
    train_step = make_train_step(run.weights, run.slots, config, device.data_format, [])
    images = tf.constant(np.random.default_rng(1).integers(0, 256, (options.images, 224, 224, 3)).astype(np.uint8))
    batch = [images, tf.zeros([options.images], tf.int32), tf.constant(0, tf.int64)]
    keys = tf.constant(dropout_keys(1, 0, len(DENSE) - 1))

    def update():
        began = time.perf_counter()
        float(train_step(*batch, keys, tf.constant(1e-6, tf.float32)).loss)
        return time.perf_counter() - began

    for _ in range(3):
        update()
    rows = {name: [] for name in ("alone", "pause", "behind", "slower", "foreground", "lost")}
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        writer = CheckpointWriter(RunDir(Path(folder)), 1, lambda *_, **__: None)
        position = TrainProgress()
        for number in range(options.rounds):
            alone = statistics.median(update() for _ in range(4))
            began = time.perf_counter()
            save_state(run, position._replace(step=2 * number), {}, writer, False)
            pause, during = time.perf_counter() - began, []
            while not writer.saving.done():
                during.append(update())
            behind = time.perf_counter() - began
            if writer.wait():
                raise SystemExit("a save failed")
            began = time.perf_counter()
            save_state(run, position._replace(step=2 * number + 1), {}, writer, False)
            writer.wait()
            foreground = time.perf_counter() - began
            lost = pause + sum(during) - alone * len(during)
            values = (alone, pause, behind, statistics.mean(during) / alone, foreground, lost)
            for name, value in zip(rows, values):
                rows[name].append(value)
        size = max(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
    print(f"checkpoint of {size / 1e6:.0f} MB; {options.images} images an update; {options.rounds} rounds; median (spread)")
    told("an update with no save", rows["alone"])
    told("background: the loop waits for the copy", rows["pause"])
    told("background: on disk after", rows["behind"])
    told("background: an update meanwhile takes", rows["slower"], "times")
    told("background: training loses in all", rows["lost"])
    told("foreground: the loop waits", rows["foreground"])


if __name__ == "__main__":
    main()
