"""Images a second that one core decodes: this package's pipelines beside others, on any directory of ImageNet's TFRecords.

    python benchmarks/input.py --data_dir=DIR [--tf_cnn_benchmarks=DIR [--peer_python=FILE]] [--rounds=9] [--images=512]
        [--size=224] [--core=0] [--ways=decode,train,...] [--before=COMMIT_OR_DIR]

Each way runs in a process of its own, pinned to one core (or to those of --core) with one thread to decode. The ways take
turns, round by round, so that whatever disturbs the machine disturbs all of them. A ratio is of one round's times per image,
to decode-and-crop alone of the same images with the same windows in that round.

    decode        tf.io.decode_and_crop_jpeg alone: encoded images and windows lie in memory as tensors
    train         hvd_vgg's pipeline for augment=crop: read, checked, decoded, cropped, resized, flipped, batched, as uint8
    decode_eval   as decode, with the windows of evaluation
    evaluate      hvd_vgg's pipeline for evaluation after augment=crop
    tf_cnn        tf_cnn_benchmarks' own preprocessing.py (RecordInputImagePreprocessor, no colour distortion, decoding fused
                  with cropping), from the directory scripts/tf_cnn_benchmarks of github.com/tensorflow/benchmarks; float32
    tf_data       a plain tf.data pipeline as in TensorFlow's ImageNet examples; float32
    pillow        a PyTorch-style loader: Pillow decodes, crops (RandomResizedCrop), resizes and flips, as uint8; torch's
                  DataLoader without workers if torch is installed, else a plain loop
    trainer       only if --ways names it: `hvd-vgg train` on the same images, of a network too small to matter (VGG11 at
                  width 0.02), started anew each round; images/s are those of its result.json, beside those of `train`

With --before, `train` and `evaluate` of another checkout of this package take turns with the others, by that checkout's own
input.py; a table of their ratios, after / before, follows.

Beside wall time stands the processor time of all threads of the process, which other load on the core disturbs less.
The pipelines of this package are timed from their start to their end over a stretch of the stream, nothing made before. The
others are timed in the middle of theirs, after as many batches as they may have made ahead.
"""

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure
from checkouts import checkout

BATCH, SEED = 32, 1
DRAINED = 8  # batches taken untimed before a round from a pipeline that has worked ahead in the meantime
IDLE_SECONDS = 0.5  # for a pipeline to make what it makes ahead, before it is the turn of the next
BASES = {"decode": "decode", "decode_eval": "decode_eval", "evaluate": "decode_eval"}  # of the others: decode
OURS = ("decode", "train", "decode_eval", "evaluate", "trainer")  # these need nothing that may not be installed


def timed(make):
    """Returns wall and processor seconds an image of `make`, which returns how many it made."""
    wall, processor = time.perf_counter(), time.process_time()
    made = make()
    return (time.perf_counter() - wall) / made, (time.process_time() - processor) / made


def load(options):
    """Returns the index of the first records of the train split, at most --images of them."""
    import numpy as np

    from hvd_vgg.data.index import Index, find_shards, join, scan_shard

    paths, shards = [], []
    for path in find_shards(options.data_dir, "train"):
        paths.append(path)
        shards.append(scan_shard(path))
        if sum(len(shard.offsets) for shard in shards) >= options.images:
            break
    whole = join(paths, shards)
    count = min(whole.records, options.images)
    starts = np.minimum(whole.starts, count)
    return Index(whole.paths, starts, whole.offsets[:count], whole.lengths[:count], whole.labels[:count])


def passes(options, index):
    """Returns how often evaluation goes through all records in a round of --images images at least."""
    return -(-options.images // index.records)


def pipeline(options, split):
    """Returns the rounds of this package's pipeline for training or evaluation."""
    from hvd_vgg.config import TrainConfig
    from hvd_vgg.data.loader import PADDING, eval_batches, train_batches

    index = load(options)
    config = TrainConfig(global_batch=BATCH, device_batch=BATCH, image_size=options.size, augment="crop", seed=SEED)

    def make():
        if split == "train":
            batches = train_batches(index, config, 0, range(options.images // BATCH), 0, 1, 1)
            return sum(len(batch.ids) for batch in batches)
        splits = (eval_batches(index, config, 0, 0, 1, 1) for _ in range(passes(options, index)))
        return sum(int((batch.labels.numpy() != PADDING).sum()) for batches in splits for batch in batches)

    return lambda: timed(make)


def decode_alone(options, split):
    """Returns the rounds of TensorFlow's decode-and-crop on the images and windows of `pipeline`."""
    import tensorflow as tf

    from hvd_vgg.data.reader import parse_example, read_record
    from hvd_vgg.data.sampler import positions, sample_seeds
    from hvd_vgg.data.transforms import augmentation_params, central_window, image_shape, random_window

    index, work = load(options), []
    drawn = positions(0, options.images, index.records, SEED)
    draws = augmentation_params(sample_seeds(SEED, drawn))
    ids = drawn.ids.tolist() if split == "train" else list(range(index.records)) * passes(options, index)
    for number, record in enumerate(ids):
        encoded, _ = parse_example(index, record, read_record(index, record))
        height, width = image_shape(encoded)
        window = random_window(height, width, draws[number][3:]) if split == "train" else central_window(height, width)
        work.append((tf.constant(encoded), tf.constant(window)))

    def make():
        for encoded, window in work:
            tf.io.decode_and_crop_jpeg(encoded, window, channels=3)
        return len(work)

    return lambda: timed(make)


def in_the_middle(batches, options):
    """Returns the rounds of an endless pipeline."""

    def take(count):
        for _ in range(count):
            next(batches)
        return count * BATCH

    def once():
        take(DRAINED)
        return timed(lambda: take(options.images // BATCH))

    return once


def one_thread(dataset):
    """Returns an iterator of `dataset` that is made by one thread."""
    import tensorflow as tf

    settings = tf.data.Options()
    settings.threading.private_threadpool_size = 1
    settings.threading.max_intra_op_parallelism = 1
    return iter(dataset.with_options(settings))


def tf_cnn(options):
    """Returns the rounds of tf_cnn_benchmarks' preprocessing, imported from where its user has it."""
    sys.path.insert(0, options.tf_cnn_benchmarks)
    import preprocessing
    import tensorflow as tf

    class Dataset:
        """What the preprocessor asks of a data set."""

        def tf_record_pattern(self, subset):
            return str(Path(options.data_dir) / f"{subset}-*-of-*")

    maker = preprocessing.RecordInputImagePreprocessor(
        BATCH,
        [[BATCH, options.size, options.size, 3], [BATCH]],
        num_splits=1,
        dtype=tf.float32,
        train=True,
        distortions=False,
        resize_method="bilinear",
        fuse_decode_and_crop=True,
    )
    return in_the_middle(one_thread(maker.create_dataset(BATCH, 1, BATCH, Dataset(), "train", True, False)), options)


def tf_data(options):
    """Returns the rounds of tf.data as in TensorFlow's ImageNet examples: float32, mean subtracted."""
    import tensorflow as tf

    features = {
        "image/encoded": tf.io.FixedLenFeature([], tf.string),
        "image/class/label": tf.io.FixedLenFeature([], tf.int64),
    }

    def parse(serialized):
        parsed = tf.io.parse_single_example(serialized, features)
        encoded = parsed["image/encoded"]
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(encoded),
            bounding_boxes=tf.zeros([1, 0, 4]),
            min_object_covered=0.1,
            aspect_ratio_range=[3 / 4, 4 / 3],
            area_range=[0.08, 1.0],
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.stack([begin[0], begin[1], size[0], size[1]])
        image = tf.io.decode_and_crop_jpeg(encoded, window, channels=3)
        image = tf.image.resize(image, [options.size, options.size])
        image = tf.image.random_flip_left_right(image)
        return image - tf.constant([123.68, 116.78, 103.94]), tf.cast(parsed["image/class/label"], tf.int32)

    files = tf.data.Dataset.list_files(str(Path(options.data_dir) / "train-*-of-*"), shuffle=True)
    dataset = files.interleave(tf.data.TFRecordDataset, cycle_length=10, num_parallel_calls=1)
    dataset = dataset.shuffle(10_000).repeat().map(parse, num_parallel_calls=1).batch(BATCH, drop_remainder=True).prefetch(1)
    return in_the_middle(one_thread(dataset), options)


def pillow(options):
    """Returns the rounds of a loader as PyTorch users have it: uint8 [n, height, width, 3]."""
    import io
    import random

    import numpy as np
    from PIL import Image

    from hvd_vgg.data.reader import parse_example, read_record
    from hvd_vgg.data.transforms import random_window

    index, draw = load(options), random.Random(SEED)  # noqa: S311

    class Records:
        """An image and its label by number, as a map-style data set of PyTorch."""

        def __len__(self):
            return int(index.records)

        def __getitem__(self, record):
            encoded, label = parse_example(index, record, read_record(index, record))
            image = Image.open(io.BytesIO(encoded)).convert("RGB")
            top, left, height, width = random_window(image.height, image.width, [draw.random() for _ in range(30)])
            image = image.crop((left, top, left + width, top + height)).resize((options.size, options.size), Image.BILINEAR)
            if draw.random() < 0.5:
                image = image.transpose(Image.FLIP_LEFT_RIGHT)
            return np.asarray(image), label

    def plain():
        data = Records()
        while True:
            chosen = [data[draw.randrange(len(data))] for _ in range(BATCH)]
            yield np.stack([image for image, _ in chosen]), np.array([label for _, label in chosen])

    def with_torch():
        torch.set_num_threads(1)
        while True:
            yield from torch.utils.data.DataLoader(Records(), BATCH, shuffle=True, drop_last=True)

    try:
        import torch
    except ImportError:
        return in_the_middle(plain(), options)
    return in_the_middle(with_torch(), options)


def trainer(options):
    """Returns the rounds of a whole training of --images images; no processor time, for it also starts and evaluates."""

    def once():
        with tempfile.TemporaryDirectory() as folder:
            flags = {
                "data_dir": options.data_dir,
                "run_dir": folder,
                "model": "vgg11",
                "width": 0.02,
                "image_size": options.size,
                "augment": "crop",
                "global_batch": BATCH,
                "device_batch": BATCH,
                "steps": options.images // BATCH,
                "eval_every_epochs": 0,
                "save_every_steps": 0,
                "lr": 0.001,
                "input_threads": 1,
            }
            command = [*measure.TRAINER, "train", *(f"--{name}={value}" for name, value in flags.items())]
            subprocess.run(command, check=True, stdout=sys.stderr)
            return 1 / json.loads((Path(folder) / "result.json").read_text())["fps"], math.nan

    return once


WAYS = {
    "decode": lambda options: decode_alone(options, "train"),
    "train": lambda options: pipeline(options, "train"),
    "decode_eval": lambda options: decode_alone(options, "evaluate"),
    "evaluate": lambda options: pipeline(options, "evaluate"),
    "tf_cnn": tf_cnn,
    "tf_data": tf_data,
    "pillow": pillow,
    "trainer": trainer,
}


def work(options):
    """One way, in a process of its own: a line of its software, then for each line of stdin a round's seconds an image.

    Other checkouts' drivers start it too (--before): its options, its lines and their order stay.
    """
    way = options.worker
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a peer prints
    os.sched_setaffinity(0, options.core)  # before any thread is made
    try:
        if way not in ("pillow", "trainer"):
            import tensorflow as tf

            tf.config.threading.set_intra_op_parallelism_threads(1)
            tf.config.threading.set_inter_op_parallelism_threads(1)
        once = WAYS[way](options)
        if way != "trainer":
            once()  # the first touches files, memory and code
    except ImportError as error:
        print(f"not installed: {error}", file=answers)
        return
    print(measure.software("tensorflow", "tensorflow-cpu", "pillow", "torch"), file=answers)
    for _ in sys.stdin:
        print(*once(), file=answers)


def start(way, options, place):
    """Returns the worker of a way of the checkout `place`."""
    words = {name: getattr(options, name) for name in ("data_dir", "images", "size", "tf_cnn_benchmarks")}
    words.update(worker=way, core=",".join(map(str, options.core)))
    python = options.peer_python if way == "tf_cnn" else sys.executable
    command = [python, place / "benchmarks" / "input.py", *(f"--{name}={value}" for name, value in words.items())]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 1}
    return measure.start(command, env={"PYTHONPATH": str(place)}, **pipes)


def ready(name, worker):
    """Says whether a worker has started, and prints what it runs on; ends the benchmark where one of ours has not."""
    line = worker.stdout.readline().strip()
    if not line and name.split()[0] in OURS:
        measure.refuse(f"{name} could not be started, as said above", 1)
    left_out = not line or line.startswith("not installed")
    print(f"{name}: {line or 'could not be started'}{': left out' * left_out}", flush=True)
    return not left_out


def drive(options):
    """Starts the ways, lets them take turns and prints the tables."""
    from hvd_vgg.data.index import find_shards

    find_shards(options.data_dir, "train")  # raises a Failure
    with contextlib.ExitStack() as stack:
        if "tf_cnn" in options.ways and not options.tf_cnn_benchmarks:
            options.ways.remove("tf_cnn")
            print("tf_cnn: --tf_cnn_benchmarks was not given: left out")
        workers = {way: start(way, options, measure.ROOT) for way in options.ways}
        if options.before:
            before = stack.enter_context(checkout(options.before))
            for way in {"train", "evaluate"} & set(options.ways):
                workers[f"{way} before"] = start(way, options, before)
        seconds = {name: [] for name, worker in workers.items() if ready(name, worker)}
        for _ in range(options.rounds):
            for name, own in seconds.items():
                time.sleep(IDLE_SECONDS)
                print("go", file=workers[name].stdin, flush=True)
                answer = workers[name].stdout.readline().split()
                if not answer:
                    measure.refuse(f"{name} ended in a round", 1)
                own.append([float(value) for value in answer])
    report(seconds, options)


def report(seconds, options):
    """Prints the tables."""
    wall = {name: [own[0] for own in rounds] for name, rounds in seconds.items()}
    processor = {name: [own[1] for own in rounds if own[1] == own[1]] for name, rounds in seconds.items()}
    rows = []
    for name in seconds:
        base = BASES.get(name.split()[0], "decode")
        row = [name, measure.spread([1 / each for each in wall[name]], ".0f")]
        row.append(measure.spread(measure.ratios(wall[name], wall.get(base))))
        row.append(measure.spread([1000 * each for each in processor[name]], ".3f"))
        rows.append([*row, measure.spread(measure.ratios(processor[name], processor.get(base)))])
    title = f"{options.rounds} rounds of {options.images} images, 1 thread, core {','.join(map(str, options.core))}"
    head = ("way", "images/s", "of wall time, relative to decode-and-crop alone", "ms of processor time", "relative")
    measure.print_table(title, head, rows)
    pairs = [("trainer", "train"), *((name.split()[0], name) for name in seconds if name.endswith(" before"))]
    rows = [
        (f"{own} / {other}", *(measure.spread(measure.ratios(kind[other], kind[own]), ".3f") for kind in (wall, processor)))
        for own, other in pairs
        if {own, other} <= set(seconds)
    ]
    if rows:
        measure.print_table("Of one round", ("ratio of", "images/s", "images a second of processor time"), rows)


def main():
    """Drives, or is one way."""
    here = sorted(os.sched_getaffinity(0))
    parser = measure.command_line(__doc__, rounds=9)
    parser.add_argument("--data_dir", required=True, help="TFRecords train-?????-of-?????, of JPEG")
    parser.add_argument("--tf_cnn_benchmarks", default="", help="its directory; without it that way is left out")
    parser.add_argument("--peer_python", default=sys.executable, help="a Python whose TensorFlow tf_cnn_benchmarks runs on")
    parser.add_argument("--images", type=measure.positive, default=512, help=f"a round, of each way; a multiple of {BATCH}")
    parser.add_argument("--core", type=measure.list_of(int), default=str(here[0]), help="what ways are pinned to, as 0,1")
    parser.add_argument("--size", type=measure.positive, default=224, help="pixels of the images made")
    usual = ",".join(way for way in WAYS if way != "trainer")
    parser.add_argument("--ways", type=measure.some_of(WAYS), default=usual, help="only these")
    parser.add_argument("--before", help="another checkout: a commit, or a directory")
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.images % BATCH:
        parser.error(f"--images={options.images}: expected a multiple of {BATCH}")
    if not set(options.core) <= set(here):
        parser.error(f"--core: expected some of {','.join(map(str, here))}")
    if options.worker:
        work(options)
    else:
        measure.run(lambda: drive(options))


if __name__ == "__main__":
    main()
