"""What a checkpoint of VGG16 costs training: written in the background, and in the foreground.

    python benchmarks/saving.py [--rounds=5] [--batch=2] [--size=224] [--width=1] [--out=DIR]

One rank trains on synthetic images. A round is, in turn: updates with no save; a save in the background, with updates until
it is on disk; the same save with the loop waiting for it. Prints the loop's pause, the time until the file is on disk, and
how much slower updates are meanwhile. --out is where checkpoints go.
"""

import statistics
import tempfile
import time
from pathlib import Path

import measure


def main():
    """Runs the rounds and prints the table."""
    parser = measure.command_line(__doc__, rounds=5, batch=2, size=224)
    parser.add_argument("--width", type=float, default=1.0, help="multiplier on the width of every layer")
    parser.add_argument("--out", help="directory on the disk to measure; else a temporary one")
    options = parser.parse_args()
    import numpy as np
    import tensorflow as tf

    from hvd_vgg.config import TrainConfig
    from hvd_vgg.parallel.init import start
    from hvd_vgg.run_dir import RunDir
    from hvd_vgg.training.checkpoint_writer import CheckpointWriter
    from hvd_vgg.training.state import TrainProgress, initial_state, save_state
    from hvd_vgg.training.train_step import make_train_step, step_inputs

    device, count, size = start(), options.batch, options.size
    config = TrainConfig(width=options.width, image_size=size, global_batch=count, device_batch=count)
    state = initial_state(config)
    train_step = make_train_step(state, config, device, [])
    images = tf.constant(np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8))
    inputs = (images, tf.zeros([count], tf.int32), *step_inputs(config, 0, 0, 1e-6))

    def update():
        began = time.perf_counter()
        float(train_step(*inputs).gradient_norm)
        return time.perf_counter() - began

    def begin_save(step):
        began = time.perf_counter()
        save_state(state, TrainProgress(step=step), {}, writer, [])
        return began

    for _ in range(3):
        update()
    rounds = []
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        writer = CheckpointWriter(RunDir(folder), 1, lambda *_, **__: None)
        for number in range(options.rounds):
            alone, during = statistics.median(update() for _ in range(4)), []
            began = begin_save(2 * number)
            pause = time.perf_counter() - began
            while not writer.saving.done():
                during.append(update())
            on_disk, failure = time.perf_counter() - began, writer.wait()
            began = begin_save(2 * number + 1)
            failure = writer.wait() or failure
            foreground = time.perf_counter() - began
            if failure:
                raise failure
            slower = statistics.mean(during) / alone if during else 1.0
            rounds.append((alone, pause, on_disk, slower, pause + sum(during) - alone * len(during), foreground))
        megabytes = max(path.stat().st_size for path in Path(folder).rglob("*.safetensors")) / 1e6
    title = f"A checkpoint of {megabytes:.0f} MB, {count} images of {size} pixels an update, {options.rounds} rounds"
    names = ["an update with no save, seconds", "background: the loop waits for the copy, seconds"]
    names += ["background: on disk after, seconds", "background: an update meanwhile takes, times"]
    names += ["background: training loses in all, seconds", "foreground: the loop waits, seconds"]
    measure.print_table(title, ("what", "found"), zip(names, map(measure.spread, zip(*rounds))))


if __name__ == "__main__":
    measure.run(main)
