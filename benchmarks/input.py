"""Images a second that one core decodes: this package's pipelines beside others, on any directory of ImageNet's TFRecords.

    python benchmarks/input.py --data_dir=DIR [--tf_cnn_benchmarks=DIR [--peer_python=FILE]] [--rounds=9] [--images=512]
        [--size=224] [--core=0] [--ways=decode,train,...]

Each way runs in a process of its own, pinned to one core (or to those of --core) with one thread to decode. The ways take
turns, round by round, so that whatever else the machine does meets all of them. A ratio is of one round's times per image,
to decode-and-crop alone of the same images with the same windows in that round.

    decode        tf.io.decode_and_crop_jpeg alone: encoded images and windows lie in memory as tensors
    train         hvd_vgg's pipeline for augment=crop: read, checked, decoded, cropped, resized, flipped, batched, as uint8
    decode_eval   as decode, with the windows of evaluation
    evaluate      hvd_vgg's pipeline for evaluation after augment=crop
    tf_cnn        tf_cnn_benchmarks' own preprocessing.py (RecordInputImagePreprocessor, no colour distortion, decoding fused
                  with cropping), from the directory scripts/tf_cnn_benchmarks of github.com/tensorflow/benchmarks
    tf_data       a plain tf.data pipeline as in TensorFlow's ImageNet examples
    pillow        a PyTorch-style loader: Pillow decodes, crops (RandomResizedCrop), resizes and flips; torch's DataLoader
                  without workers if torch can be imported, else a plain loop
    trainer       only if --ways names it: `hvd-vgg train` on the same images, of a network too small to matter (VGG11 at
                  width 0.02), started anew each round; images/s are those of its result.json, beside those of `train`

Beside wall time stands the processor time of all threads of the process, which other load on the core disturbs less.
The pipelines of this package are timed from their start to their end over a stretch of the stream, nothing made before. The
others are timed in the middle of theirs, after as many batches as they may have made ahead.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Set, Tuple

BATCH, SEED = 32, 1
DRAINED = 8  # batches taken untimed before a round from a pipeline that has worked ahead in the meantime
IDLE_SECONDS = 0.5  # for a pipeline to make what it makes ahead, before it is the turn of the next
BASES = {"decode": "decode", "decode_eval": "decode_eval", "evaluate": "decode_eval"}  # of the rest: decode

Seconds = Tuple[float, float]  # an image: by the wall clock, and of processor time
Round = Callable[[], Seconds]  # makes the images of one round


def timed(make: Callable[[], int]) -> Seconds:
    """Returns the seconds an image of `make`, which returns how many it made."""
    wall, processor = time.perf_counter(), time.process_time()
    made = make()
    return (time.perf_counter() - wall) / made, (time.process_time() - processor) / made


def load(options: argparse.Namespace) -> Any:
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


def passes(options: argparse.Namespace, index: Any) -> int:
    """Returns how often evaluation goes through all records in a round of --images images at least."""
    return int(-(-options.images // index.records))


def our_config(options: argparse.Namespace) -> Any:
    """Returns a Config of batches of BATCH images with crops."""
    from hvd_vgg.config import TrainConfig

    return TrainConfig(
        data_dir=options.data_dir, global_batch=BATCH, device_batch=BATCH, image_size=options.size, augment="crop", seed=SEED
    )


def ours(options: argparse.Namespace, split: str) -> Round:
    """Returns the rounds of this package's pipeline for training or evaluation."""
    from hvd_vgg.data.loader import PADDING, eval_batches, train_batches

    index, config = load(options), our_config(options)

    def make() -> int:
        if split == "train":
            batches = train_batches(index, config, 0, range(options.images // BATCH), 0, 1, 1)
            return sum(len(batch.ids) for batch in batches)
        splits = (eval_batches(index, config, 0, 0, 1, 1) for _ in range(passes(options, index)))
        return sum(int((batch.labels.numpy() != PADDING).sum()) for batches in splits for batch in batches)

    return lambda: timed(make)


def decode_alone(options: argparse.Namespace, split: str) -> Round:
    """Returns the rounds of TensorFlow's decode-and-crop on the images and windows of `ours`."""
    import tensorflow as tf

    from hvd_vgg.data.reader import parse_example, read_record
    from hvd_vgg.data.sampler import positions, sample_seeds
    from hvd_vgg.data.transforms import augmentation_params, central_window, image_shape, random_window

    index, windows, encoded = load(options), [], []
    at = positions(0, options.images, index.records, SEED)
    draws = augmentation_params(sample_seeds(SEED, at))
    ids = at.ids.tolist() if split == "train" else list(range(index.records)) * passes(options, index)
    for n, record in enumerate(ids):
        data, _ = parse_example(index, record, read_record(index, record))
        encoded.append(tf.constant(data))
        height, width = image_shape(data)
        window = random_window(height, width, draws[n][3:]) if split == "train" else central_window(height, width)
        windows.append(tf.constant(window))

    def make() -> int:
        for data, window in zip(encoded, windows):
            tf.io.decode_and_crop_jpeg(data, window, channels=3)
        return len(encoded)

    return lambda: timed(make)


def in_the_middle(batches: Iterator[Any], options: argparse.Namespace) -> Round:
    """Returns the rounds of an endless pipeline."""

    def make() -> int:
        for _ in range(options.images // BATCH):
            next(batches)
        return options.images

    def once() -> Seconds:
        for _ in range(DRAINED):
            next(batches)
        return timed(make)

    return once


def one_thread(dataset: Any) -> Iterator[Any]:
    """Returns an iterator of `dataset` that is made by one thread."""
    import tensorflow as tf

    settings = tf.data.Options()
    settings.threading.private_threadpool_size = 1
    settings.threading.max_intra_op_parallelism = 1
    return iter(dataset.with_options(settings))


def tf_cnn(options: argparse.Namespace) -> Round:
    """Returns the rounds of tf_cnn_benchmarks' preprocessing, imported from where its user has it."""
    sys.path.insert(0, options.tf_cnn_benchmarks)
    import preprocessing  # type: ignore[import-not-found]
    import tensorflow as tf

    class Dataset:
        """What the preprocessor asks of a data set."""

        def tf_record_pattern(self, subset: str) -> str:
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
    dataset = maker.create_dataset(BATCH, 1, BATCH, Dataset(), "train", True, False)
    return in_the_middle(one_thread(dataset), options)


def tf_data(options: argparse.Namespace) -> Round:
    """Returns the rounds of tf.data as in TensorFlow's ImageNet examples: float32, mean subtracted."""
    import tensorflow as tf

    features = {
        "image/encoded": tf.io.FixedLenFeature([], tf.string),
        "image/class/label": tf.io.FixedLenFeature([], tf.int64),
    }

    def parse(serialized: Any) -> Any:
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


def pillow(options: argparse.Namespace) -> Round:
    """Returns the rounds of a loader as PyTorch users have it: uint8 [n, height, width, 3]."""
    import io
    import random

    import numpy as np
    from PIL import Image

    from hvd_vgg.data.reader import parse_example, read_record
    from hvd_vgg.data.transforms import random_window

    index, draw = load(options), random.Random(SEED)  # noqa: S311

    class Records:
        """One image and its label by number, as a map-style data set of PyTorch."""

        def __len__(self) -> int:
            return int(index.records)

        def __getitem__(self, record: int) -> Any:
            encoded, label = parse_example(index, record, read_record(index, record))
            image = Image.open(io.BytesIO(encoded)).convert("RGB")
            window = random_window(image.height, image.width, [draw.random() for _ in range(30)])
            top, left, height, width = window
            image = image.crop((left, top, left + width, top + height)).resize((options.size, options.size), Image.BILINEAR)
            if draw.random() < 0.5:
                image = image.transpose(Image.FLIP_LEFT_RIGHT)
            return np.asarray(image), label

    try:
        import torch  # type: ignore[import-not-found]
    except ImportError:
        print("pillow: torch cannot be imported: a plain loop stands in for its DataLoader", file=sys.stderr)
        torch = None

    def plain() -> Iterator[Any]:
        data = Records()
        while True:
            chosen = [data[draw.randrange(len(data))] for _ in range(BATCH)]
            yield np.stack([image for image, _ in chosen]), np.array([label for _, label in chosen])

    def with_torch() -> Iterator[Any]:
        torch.set_num_threads(1)
        while True:
            yield from torch.utils.data.DataLoader(Records(), BATCH, shuffle=True, drop_last=True)

    return in_the_middle(with_torch() if torch else plain(), options)


def trainer(options: argparse.Namespace) -> Round:
    """Returns the rounds of a whole training of --images images; no processor time, for it also starts and evaluates."""

    def once() -> Seconds:
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
            command = [sys.executable, "-m", "hvd_vgg", "train", *(f"--{name}={value}" for name, value in flags.items())]
            subprocess.run(command, check=True, stdout=sys.stderr)
            return 1 / json.loads((Path(folder) / "result.json").read_text())["fps"], math.nan

    return once


WAYS: Dict[str, Callable[[argparse.Namespace], Round]] = {
    "decode": lambda options: decode_alone(options, "train"),
    "train": lambda options: ours(options, "train"),
    "decode_eval": lambda options: decode_alone(options, "evaluate"),
    "evaluate": lambda options: ours(options, "evaluate"),
    "tf_cnn": tf_cnn,
    "tf_data": tf_data,
    "pillow": pillow,
    "trainer": trainer,
}


def work(options: argparse.Namespace) -> None:
    """One way: makes a round for each line of stdin and answers with its seconds."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a peer prints
    os.sched_setaffinity(0, cores(options.core))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if options.worker == "trainer":
        version = "as train"
    elif options.worker != "pillow":
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        version = f"TensorFlow {tf.__version__}"
    else:
        import PIL

        version = f"Pillow {PIL.__version__}"
    once = WAYS[options.worker](options)
    if options.worker != "trainer":
        once()  # the first touches files, memory and code
    print(f"{version}, Python {sys.version.split()[0]}", file=answers)
    for _ in sys.stdin:
        print(*once(), file=answers)


def main() -> None:
    """Starts the ways, lets them take turns and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="TFRecords train-?????-of-?????, of JPEG")
    parser.add_argument("--tf_cnn_benchmarks", default="", help="its directory; without it that way is left out")
    parser.add_argument("--peer_python", default=sys.executable, help="a Python whose TensorFlow tf_cnn_benchmarks runs on")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--images", type=int, default=512, help=f"a round, of each way; a multiple of {BATCH}")
    parser.add_argument("--core", default=str(min(os.sched_getaffinity(0))), help="what all ways are pinned to, such as 0,1")
    parser.add_argument("--size", type=int, default=224, help="pixels of the images made")
    parser.add_argument("--ways", default="", help="only these, such as decode,train; without it all but trainer")
    parser.add_argument("--worker", default="", choices=("", *WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.images % BATCH or options.images <= 0:
        parser.error(f"--images={options.images}: expected a multiple of {BATCH}")
    if options.worker:
        work(options)
        return
    check(parser, options)
    ways = options.ways.split(",") if options.ways else [way for way in WAYS if way != "trainer"]
    if "tf_cnn" in ways and not options.tf_cnn_benchmarks:
        ways.remove("tf_cnn")
        print("tf_cnn is left out: --tf_cnn_benchmarks was not given")
    workers = {}
    for way in ways:
        python = options.peer_python if way == "tf_cnn" else sys.executable
        command = [python, __file__, *sys.argv[1:], f"--worker={way}", f"--core={options.core}"]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        version = worker.stdout.readline().strip()  # type: ignore[union-attr]
        if version:
            workers[way] = worker
            print(f"{way}: {version}", flush=True)
        else:
            print(f"{way} is left out: it could not be started", flush=True)
    if not workers:
        sys.exit("nothing could be started")
    times: Dict[str, List[Seconds]] = {way: [] for way in workers}
    for _ in range(options.rounds):
        for way, worker in workers.items():
            time.sleep(IDLE_SECONDS)
            print("go", file=worker.stdin, flush=True)
            wall, processor = map(float, worker.stdout.readline().split())  # type: ignore[union-attr]
            times[way].append((wall, processor))
    for worker in workers.values():
        worker.stdin.close()  # type: ignore[union-attr]
        worker.wait()
    print(
        f"\n{options.rounds} rounds of {options.images} images, 1 thread, core {options.core}; median (smallest to largest)"
    )
    print("| way | images/s | of wall time, relative to decode-and-crop alone | ms of processor time | relative |")
    print("|---|---|---|---|---|")
    for way, own in times.items():
        base = times.get(BASES.get(way, "decode"), [(math.nan, math.nan)] * options.rounds)
        wall, processor = ([mine[kind] / other[kind] for mine, other in zip(own, base)] for kind in (0, 1))
        print(
            f"| {way} | {spread([1 / each for each, _ in own], '.0f')} | {spread(wall, '.2f')} "
            f"| {spread([1000 * each for _, each in own], '.3f')} | {spread(processor, '.2f')} |"
        )
    if {"trainer", "train"} <= set(times):
        ratios = [alone / whole for (alone, _), (whole, _) in zip(times["train"], times["trainer"])]
        print(f"\nimages/s of the trainer, relative to its pipeline alone: {spread(ratios, '.3f')}")


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the script where an option cannot be used."""
    from hvd_vgg.data.index import find_shards
    from hvd_vgg.errors import Failure

    if options.rounds < 1:
        parser.error(f"--rounds={options.rounds}: expected at least 1")
    unknown = set(options.ways.split(",")) - set(WAYS)
    if options.ways and unknown:
        parser.error(f"--ways: {', '.join(unknown)}: expected some of {', '.join(WAYS)}")
    try:
        if not cores(options.core) <= os.sched_getaffinity(0):
            raise ValueError
    except ValueError:
        parser.error(f"--core={options.core}: expected some of {','.join(map(str, sorted(os.sched_getaffinity(0))))}")
    try:
        find_shards(options.data_dir, "train")
    except Failure as failure:
        parser.error(f"--data_dir: {failure.message}")


def cores(text: str) -> Set[int]:
    """Returns the numbers in `0,1`; raises ValueError."""
    return {int(number) for number in text.split(",")}


def spread(values: List[float], form: str) -> str:
    """Returns median (smallest to largest) of `values`; `-` of what is not known."""
    if any(math.isnan(value) for value in values):
        return "-"
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    main()
