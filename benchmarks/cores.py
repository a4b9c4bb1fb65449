"""Images a second that a core reads, decodes and augments, by size of the stored images and recipe; cores a device needs.

    python benchmarks/cores.py --data_dir=DIR [--shorter_sides=0,256] [--recipes=bare,pillow,...] [--rounds=9] [--images=256]
        [--size=224] [--core=0] [--device=1000]

The whole input pipeline of training is timed, from the records on disk (in the page cache, after the first turn) to batches,
with one thread in a process on one core, without a network behind it. Sizes and recipes take turns, round by round.

    --shorter_sides  0: images as they are stored; 256: larger ones are resized to a shorter side of 256 pixels (bicubic) and
                     encoded as JPEG of quality 90 first, as `hvd-vgg prepare --shorter_side=256` does
    --recipes        those of augment.py, after a random-resized crop and a flip; pillow: bare with --resize=pillow
    --device         images/s that a device trains

The cores that a device needs are --device divided by the images/s of a core, rounded up. One more for Horovod's own thread.
"""

import io
import math
import os
import tempfile
import time
from pathlib import Path

import measure
from augment import BATCH, RECIPES, SEED
from input import load, timed

ALL = {**RECIPES, "pillow": {"resize": "pillow"}}
QUALITY = 90


def smaller(encoded, side):
    """Returns an image as a JPEG with a shorter side of `side` pixels, or as it is where it has no longer one."""
    from PIL import Image

    image = Image.open(io.BytesIO(encoded))
    if min(image.size) <= side:
        return encoded
    scale, file = side / min(image.size), io.BytesIO()
    size = tuple(max(side, round(each * scale)) for each in image.size)
    image.draft(None, size)
    image.convert("RGB").resize(size, Image.BICUBIC).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def stored(whole, side, folder):
    """Returns the index of the records of `whole`, whose images have the shorter side `side`, 0: as they are."""
    if not side:
        return whole
    from hvd_vgg.data.formats.example import encode_example
    from hvd_vgg.data.formats.tfrecord import frame
    from hvd_vgg.data.index import join, scan_shard
    from hvd_vgg.data.reader import read_image

    path = Path(folder) / f"train-{side}"
    with open(path, "wb") as file:
        for record in range(whole.records):
            encoded, label = read_image(whole, record)
            example = encode_example({"image/class/label": label, "image/encoded": smaller(encoded, side)})
            file.write(frame(example))
    return join([path], [scan_shard(path)])


def pipeline(index, recipe, options):
    """Makes --images images by the pipeline of training; returns their number."""
    from hvd_vgg.config import TrainConfig
    from hvd_vgg.data.loader import train_batches

    shape = {"global_batch": BATCH, "device_batch": BATCH, "image_size": options.size}
    config = TrainConfig(**shape, augment="crop", seed=SEED, **ALL[recipe])
    batches = train_batches(index, config, 0, range(options.images // BATCH), 0, 1, 1)
    return sum(len(batch.ids) for batch in batches)


def main():
    """Lets sizes and recipes take turns and prints the table."""
    here = sorted(os.sched_getaffinity(0))
    parser = measure.command_line(__doc__, rounds=9, images=256, size=224)
    parser.add_argument("--data_dir", required=True, help="TFRecords train-?????-of-?????, of JPEG")
    parser.add_argument("--core", type=int, default=here[0], choices=here, help="what the process is pinned to")
    parser.add_argument("--shorter_sides", type=measure.list_of(int), default="0,256", help="pixels of stored images")
    parser.add_argument("--recipes", type=measure.some_of(ALL), default=",".join(ALL), help="only these")
    parser.add_argument("--device", type=measure.positive, default=1000, help="images/s that a device trains")
    options = parser.parse_args()
    if options.images % BATCH:
        parser.error(f"--images={options.images}: expected a multiple of {BATCH}")
    os.sched_setaffinity(0, [options.core])  # before TensorFlow makes threads
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    whole = load(options)
    with tempfile.TemporaryDirectory() as folder:
        indexes = {side: stored(whole, side, folder) for side in options.shorter_sides}
        wall, processor = ({(side, recipe): [] for side in indexes for recipe in options.recipes} for _ in range(2))
        for turn in range(options.rounds + 1):  # the first is not counted: it touches files, memory and code
            for side, recipe in wall:
                time.sleep(0.1)
                seconds = timed(lambda index=indexes[side], recipe=recipe: pipeline(index, recipe, options))
                for found, each in zip((wall, processor), seconds):
                    found[side, recipe] += [each] * (turn > 0)
    rows = []
    for (side, recipe), own in wall.items():
        index = indexes[side]
        images = [1 / each for each in own]
        row = [f"{side or 'as they are'}, {recipe}", f"{index.lengths.mean() / 1000:.0f}", measure.spread(images, ".0f")]
        row.append(measure.spread([1000 * each for each in processor[side, recipe]], ".2f"))
        rows.append([*row, measure.spread([math.ceil(options.device * each) for each in own], ".0f")])
    title = f"{options.rounds} rounds of {options.images} images, {options.size} pixels, 1 thread, core {options.core}"
    head = ("shorter side, recipe", "kB a record", "images/s a core", "ms of processor time")
    measure.print_table(title, (*head, f"cores for {options.device} images/s"), rows)


if __name__ == "__main__":
    measure.run(main)
