"""Images a second that one core decodes: this package's pipelines beside others, on any directory of ImageNet's TFRecords.

    python benchmarks/input.py --data_dir=DIR [--tf_cnn_benchmarks=DIR [--peer_python=FILE]] [--rounds=9] [--images=512]
        [--size=224] [--core=0] [--ways=decode,train,...]

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
    pillow        a PyTorch-style loader, as its DataLoader without workers does it: Pillow decodes, crops
                  (RandomResizedCrop), resizes and flips, as uint8
    trainer       only if --ways names it: `hvd-vgg train` on the same images, of a network too small to matter (VGG11 at
                  width 0.02), started anew each round; images/s are those of its result.json, beside those of `train`

Beside wall time stands the processor time of all threads of the process, which other load on the core disturbs less.
The pipelines of this package are timed from their start to their end over a stretch of the stream, nothing made before. The
others are timed in the middle of theirs, after as many batches as they may have made ahead.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure

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

    from hvd_vgg.data.formats.layout import find_shards
    from hvd_vgg.data.index import join, scan_shard

    paths, shards = [], []
    for path in find_shards(options.data_dir, "train"):
        paths.append(path)
        shards.append(scan_shard(path))
        if sum(len(shard.offsets) for shard in shards) >= options.images:
            break
    whole = join(paths, shards)
    count = min(whole.records, options.images)
    columns = {name: getattr(whole, name)[:count] for name in ("offsets", "lengths", "labels")}
    return whole._replace(starts=np.minimum(whole.starts, count), **columns)


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
        splits = (eval_batches(index, config, 0, 0, 1, 1) for _ in range(-(-options.images // index.records)))
        return sum(int((batch.labels.numpy() != PADDING).sum()) for batches in splits for batch in batches)

    return lambda: timed(make)


def decode_alone(options, split):
    """Returns the rounds of TensorFlow's decode-and-crop on the images and windows of `pipeline`."""
    import tensorflow as tf

    from hvd_vgg.config import ImageConfig
    from hvd_vgg.data.reader import read_image
    from hvd_vgg.data.sampler import positions, sample_seeds
    from hvd_vgg.data.transforms import augmentation_params, image_shape, random_window
    from hvd_vgg.data.windows import central_window

    index, work = load(options), []
    drawn = positions(0, options.images, index.records, SEED)
    draws = augmentation_params(sample_seeds(SEED, drawn), ImageConfig())
    ids = drawn.ids.tolist() if split == "train" else list(range(index.records)) * -(-options.images // index.records)
    for number, record in enumerate(ids):
        encoded, _ = read_image(index, record)
        height, width = image_shape(encoded)
        window = (
            random_window(height, width, draws[number][3:]) if split == "train" else central_window(height, width, 0.875)
        )
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

    shapes = [[BATCH, options.size, options.size, 3], [BATCH]]
    settings = {"distortions": False, "resize_method": "bilinear", "fuse_decode_and_crop": True}
    maker = preprocessing.RecordInputImagePreprocessor(BATCH, shapes, 1, dtype=tf.float32, train=True, **settings)
    return in_the_middle(one_thread(maker.create_dataset(BATCH, 1, BATCH, Dataset(), "train", True, False)), options)


def tf_data(options):
    """Returns the rounds of tf.data as in TensorFlow's ImageNet examples: float32, mean subtracted."""
    import tensorflow as tf

    types = {"image/encoded": tf.string, "image/class/label": tf.int64}
    features = {name: tf.io.FixedLenFeature([], kind) for name, kind in types.items()}

    def parse(serialized):
        parsed = tf.io.parse_single_example(serialized, features)
        encoded = parsed["image/encoded"]
        shape, boxes, ranges = tf.io.extract_jpeg_shape(encoded), tf.zeros([1, 0, 4]), ([3 / 4, 4 / 3], [0.08, 1.0])
        begin, size, _ = tf.image.sample_distorted_bounding_box(shape, boxes, 0, 0.1, *ranges, 10, True)
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

    from hvd_vgg.data.reader import read_image
    from hvd_vgg.data.transforms import random_window

    index, draw = load(options), random.Random(SEED)  # noqa: S311

    def example(record):
        encoded, label = read_image(index, record)
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
        top, left, height, width = random_window(image.height, image.width, [draw.random() for _ in range(30)])
        image = image.crop((left, top, left + width, top + height)).resize((options.size, options.size), Image.BILINEAR)
        if draw.random() < 0.5:
            image = image.transpose(Image.FLIP_LEFT_RIGHT)
        return np.asarray(image), label

    def batches():
        while True:
            chosen = [example(draw.randrange(index.records)) for _ in range(BATCH)]
            yield np.stack([image for image, _ in chosen]), np.array([label for _, label in chosen])

    return in_the_middle(batches(), options)


def trainer(options):
    """Returns the rounds of a whole training of --images images; no processor time, for it also starts and evaluates."""

    def once():
        with tempfile.TemporaryDirectory() as folder:
            flags = f"--global_batch={BATCH} --device_batch={BATCH} --steps={options.images // BATCH} --augment=crop "
            flags += f"--image_size={options.size} --model=vgg11 --width=0.02 --eval_every_epochs=0 --save_every_steps=0"
            place = [f"--data_dir={options.data_dir}", f"--run_dir={folder}", "--lr=0.001", "--input_threads=1"]
            command = [*measure.TRAINER, "train", *flags.split(), *place]
            measure.output_of(command)
            return (1 / json.loads((Path(folder) / "result.json").read_text())["fps"],)

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
    """One way, in a process of its own: a line of its software, then for each line of stdin a round's seconds an image."""
    way, answers = options.way, os.fdopen(os.dup(1), "w", buffering=1)
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


def start(way, options):
    """Returns the worker of a way, or None where it could not be started."""
    python = options.peer_python if way == "tf_cnn" else sys.executable
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 1}
    worker = measure.start(measure.worker(options, python, way=way), **pipes)
    line = worker.stdout.readline().strip()
    if not line and way in OURS:
        measure.refuse(f"{way} could not be started, as said above", 1)
    left_out = not line or line.startswith("not installed")
    print(f"{way}: {line or 'could not be started'}{': left out' * left_out}", flush=True)
    return None if left_out else worker


def main():
    """Starts the ways, lets them take turns and prints the table."""
    here = sorted(os.sched_getaffinity(0))
    parser = measure.command_line(__doc__, rounds=9, images=512, size=224)
    parser.add_argument("--data_dir", required=True, help="TFRecords train-?????-of-?????, of JPEG")
    parser.add_argument("--tf_cnn_benchmarks", help="its directory; without it that way is left out")
    parser.add_argument("--peer_python", default=sys.executable, help="a Python whose TensorFlow tf_cnn_benchmarks runs on")
    parser.add_argument("--core", type=measure.list_of(int), default=str(here[0]), help="what ways are pinned to, as 0,1")
    usual = ",".join(way for way in WAYS if way != "trainer")
    parser.add_argument("--ways", type=measure.some_of(WAYS), default=usual, help="only these")
    options = parser.parse_args()
    if options.images % BATCH:
        parser.error(f"--images={options.images}: expected a multiple of {BATCH}")
    if not set(options.core) <= set(here):
        parser.error(f"--core: expected some of {','.join(map(str, here))}")
    from hvd_vgg.data.formats.layout import find_shards

    find_shards(options.data_dir, "train")  # raises a Failure
    if "tf_cnn" in options.ways and not options.tf_cnn_benchmarks:
        options.ways.remove("tf_cnn")
        print("tf_cnn: --tf_cnn_benchmarks was not given: left out")
    workers = {way: start(way, options) for way in options.ways}
    wall, processor = ({way: [] for way, worker in workers.items() if worker} for _ in range(2))
    for _ in range(options.rounds):
        for way in wall:
            time.sleep(IDLE_SECONDS)
            print("go", file=workers[way].stdin, flush=True)
            answer = workers[way].stdout.readline().split()
            if not answer:
                measure.refuse(f"{way} ended in a round", 1)
            wall[way].append(float(answer[0]))
            processor[way] += map(float, answer[1:])
    rows = []
    for way, own in wall.items():
        base = BASES.get(way, "decode")
        row = [way, measure.spread([1 / each for each in own], ".0f"), measure.spread(measure.ratios(own, wall.get(base)))]
        row.append(measure.spread([1000 * each for each in processor[way]], ".3f"))
        rows.append([*row, measure.spread(measure.ratios(processor[way], processor.get(base)))])
    title = f"{options.rounds} rounds of {options.images} images, 1 thread, core {','.join(map(str, options.core))}"
    head = ("way", "images/s", "of wall time, relative to decode-and-crop alone", "ms of processor time", "relative")
    measure.print_table(title, head, rows)
    if {"trainer", "train"} <= set(wall):
        ratio = measure.spread(measure.ratios(wall["train"], wall["trainer"]), ".3f")
        print(f"\nimages/s of the trainer, relative to its pipeline alone: {ratio}")


if __name__ == "__main__":
    measure.run(main, work)
