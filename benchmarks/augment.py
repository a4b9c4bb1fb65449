"""Images a second that one core decodes and augments: this package beside torchvision and timm, with the same recipe.

    python benchmarks/augment.py --data_dir=DIR [--peer_python=FILE] [--rounds=9] [--images=256] [--size=224] [--core=0]
        [--recipes=bare,color_jitter,...]

All decode the same JPEGs from memory, take a random-resized crop (area 0.08 to 1), flip half of them, and collect batches of
32 as uint8. Each program runs in a process of its own, pinned to one core, with one thread; recipes and programs take turns,
round by round. A ratio is of one round's images/s, to this package's with the same recipe in that round.

    bare             no more than that
    color_jitter     brightness, contrast and saturation of 0.4, in random order
    auto_augment     TrivialAugment; timm's nearest: one operation of its 15 with a uniform magnitude
    random_erasing   of every second image

    hvd_vgg          TensorFlow decodes the window alone; OpenCV's bilinear resize
    hvd_vgg, pillow  the same with --resize=pillow: Pillow's antialiased bilinear resize, as the peers have it
    torchvision      its transforms on Pillow's images, as its training reference has them
    timm             its create_transform

The peers need --peer_python, a Python with torch, torchvision and timm; without it their rows are left out. They normalise
before they erase; here they erase bytes, which is less work.
"""

import functools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure
from input import load, timed

BATCH, SEED, JITTER, ERASING = 32, 1, 0.4, 0.5
RECIPES = {
    "bare": {},
    "color_jitter": {"color_jitter": JITTER},
    "auto_augment": {"auto_augment": "trivial"},
    "random_erasing": {"random_erasing": ERASING},
}


def ours(options, resize):
    """Returns the function that makes batches of a recipe by this package."""
    import itertools

    import numpy as np
    import tensorflow as tf

    from hvd_vgg.config import ImageConfig
    from hvd_vgg.data.transforms import augmentation_params, train_image

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    counter = itertools.count()

    def make(recipe, images):
        config = ImageConfig(augment="crop", resize=resize, **RECIPES[recipe])
        for start in range(0, len(images), BATCH):
            part = images[start : start + BATCH]
            seeds = np.array([[SEED, next(counter)] for _ in part], np.int64)
            batch = np.empty((len(part), options.size, options.size, 3), np.uint8)
            for encoded, params, out in zip(part, augmentation_params(seeds, config), batch):
                train_image(encoded, params, config, out)
        return len(images)

    return make


def peer(options, transforms):
    """Returns the function that makes batches of a recipe by the transforms of `transforms`, a dictionary by recipe."""
    import io

    import torch
    from PIL import Image

    torch.set_num_threads(1)
    torch.manual_seed(SEED)

    def make(recipe, images):
        transform = transforms[recipe]
        for start in range(0, len(images), BATCH):
            part = images[start : start + BATCH]
            torch.stack([transform(Image.open(io.BytesIO(encoded)).convert("RGB")) for encoded in part])
        return len(images)

    return make


def torchvision(options):
    """Returns the function that makes batches of a recipe by torchvision."""
    from torchvision import transforms as t

    bilinear = t.InterpolationMode.BILINEAR
    first = [t.RandomResizedCrop(options.size, interpolation=bilinear), t.RandomHorizontalFlip()]
    mean = (124, 116, 104)
    more = {
        "bare": [t.PILToTensor()],
        "color_jitter": [t.ColorJitter(JITTER, JITTER, JITTER), t.PILToTensor()],
        "auto_augment": [t.TrivialAugmentWide(interpolation=bilinear), t.PILToTensor()],
        "random_erasing": [t.PILToTensor(), t.RandomErasing(ERASING, value=mean)],
    }
    return peer(options, {recipe: t.Compose([*first, *rest]) for recipe, rest in more.items()})


def timm(options):
    """Returns the function that makes batches of a recipe by timm."""
    from timm.data import create_transform
    from timm.data.random_erasing import RandomErasing
    from torchvision.transforms import Compose

    common = {"input_size": options.size, "is_training": True, "interpolation": "bilinear", "normalize": False}
    bare = create_transform(**common, color_jitter=None)
    return peer(
        options,
        {
            "bare": bare,
            "color_jitter": create_transform(**common, color_jitter=JITTER),
            "auto_augment": create_transform(**common, color_jitter=None, auto_augment="rand-m10-n1-p1-mstd101-inc1"),
            "random_erasing": Compose([bare, RandomErasing(ERASING, device="cpu")]),
        },
    )


PROGRAMS = {
    "hvd_vgg": lambda options: ours(options, "opencv"),
    "hvd_vgg, pillow": lambda options: ours(options, "pillow"),
    "torchvision": torchvision,
    "timm": timm,
}
PEERS = ("torchvision", "timm")


def work(options):
    """One program, in a process of its own: a line of its software, then a round's seconds an image of each recipe named."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a peer prints
    os.sched_setaffinity(0, [options.core])  # before any thread is made
    images = [path.read_bytes() for path in sorted(Path(options.images_dir).iterdir())]
    images = [images[number % len(images)] for number in range(options.images)]
    try:
        make = PROGRAMS[options.program](options)
    except ImportError as error:
        print(f"not installed: {error}", file=answers)
        return
    for recipe in options.recipes:
        make(recipe, images[:BATCH])  # the first touches memory and code
    print(measure.software("tensorflow", "tensorflow-cpu", "pillow", "torch", "torchvision", "timm"), file=answers)
    for line in sys.stdin:
        print(*timed(functools.partial(make, line.strip(), images)), file=answers)


def start(program, options):
    """Returns the worker of a program, or None where it could not be started."""
    if program in PEERS and not options.peer_python:
        print(f"{program}: --peer_python was not given: left out")
        return None
    python = options.peer_python if program in PEERS else sys.executable
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 1}
    worker = measure.start(measure.worker(options, python, program=program), **pipes)
    line = worker.stdout.readline().strip()
    if not line and program not in PEERS:
        measure.refuse(f"{program} could not be started, as said above", 1)
    left_out = not line or line.startswith("not installed")
    print(f"{program}: {line or 'could not be started'}{': left out' * left_out}", flush=True)
    return None if left_out else worker


def extract(options, folder):
    """Writes the images of the first records to files, which need none of this package to be read."""
    from hvd_vgg.data.reader import read_image

    index = load(options)
    for record in range(index.records):
        encoded, _ = read_image(index, record)
        (Path(folder) / f"{record:06d}").write_bytes(encoded)


def main():
    """Starts the programs, lets them take turns and prints the table."""
    here = sorted(os.sched_getaffinity(0))
    parser = measure.command_line(__doc__, rounds=9, images=256, size=224)
    parser.add_argument("--data_dir", required=True, help="TFRecords train-?????-of-?????, of JPEG")
    parser.add_argument("--peer_python", help="a Python with torch, torchvision and timm")
    parser.add_argument("--core", type=int, default=here[0], choices=here, help="what programs are pinned to")
    parser.add_argument("--recipes", type=measure.some_of(RECIPES), default=",".join(RECIPES), help="only these")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        extract(options, folder)
        options.images_dir = folder
        started = {program: start(program, options) for program in PROGRAMS}
        workers = {program: worker for program, worker in started.items() if worker}
        wall, processor = ({(recipe, program): [] for recipe in options.recipes for program in workers} for _ in range(2))
        for _ in range(options.rounds):
            for recipe, program in wall:
                time.sleep(0.1)
                print(recipe, file=workers[program].stdin, flush=True)
                answer = workers[program].stdout.readline().split()
                if not answer:
                    measure.refuse(f"{program} ended in a round", 1)
                wall[recipe, program].append(float(answer[0]))
                processor[recipe, program].append(1000 * float(answer[1]))
        measure.end_processes()
    rows = []
    for (recipe, program), own in wall.items():
        images, base = [1 / each for each in own], (recipe, "hvd_vgg")
        row = [f"{recipe}, {program}", measure.spread(images, ".0f"), measure.spread(measure.ratios(wall[base], own))]
        row.append(measure.spread(processor[recipe, program], ".2f"))
        rows.append([*row, measure.spread(measure.ratios(processor[base], processor[recipe, program]))])
    title = f"{options.rounds} rounds of {options.images} images, {options.size} pixels, 1 thread, core {options.core}"
    head = ("recipe, program", "images/s", "relative to hvd_vgg", "ms of processor time", "speed by it, relative")
    measure.print_table(title, head, rows)


if __name__ == "__main__":
    measure.run(main, work)
