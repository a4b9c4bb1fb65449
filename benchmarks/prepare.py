"""How fast `hvd-vgg prepare` is on one core, beside the limits: `cp` of the same bytes, and libjpeg-turbo alone.

    python benchmarks/prepare.py --data_dir=DIR [--images=2000] [--shorter_side=256] [--quality=90] [--rounds=5]

Takes the first JPEGs of the train split, in any layout, and writes them as --images files of one class each, again and again
where there are fewer. `pass` makes TFRecords of them as they are, 1,251 a shard as ImageNet has them; `cp` copies the files,
and `cat` writes them one after the other into one file, which it puts on disk, as `pass` does and `cp` does not. `encode`
makes TFRecords with --shorter_side and --quality; `libjpeg_turbo` decodes each image at the scale at which its decoder can
shrink it, and encodes as many pixels of it as `encode` does, by Pillow's binding, without a resize between; `pillow` does
the same with the resize. All of it is one thread, from and to the page cache; each round runs all of them in turn. `train`
and `train_small` are images/s that one thread of training's input makes of the images as they are, and of what `encode`
wrote: what --shorter_side gains. The last column is the ratio to the limit: of `pass` and `cat` to `cp`, of `encode` and
`pillow` to `libjpeg_turbo`, of `train_small` to `train`. Needs room for five copies of the images in --work_dir.
"""

import contextlib
import io
import itertools
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import measure

LIMITS = {"cat": "cp", "pass": "cp", "pillow": "libjpeg_turbo", "encode": "libjpeg_turbo", "train_small": "train"}
RECORDS = 1251  # of a shard, as ImageNet has them
BICUBIC = 3  # PIL.Image.BICUBIC


def write_source(options, root):
    """Writes the images as train/CLASS/NUMBER.jpg and returns them, encoded."""
    from hvd_vgg.config import DataConfig
    from hvd_vgg.data.formats.layout import find_split
    from hvd_vgg.data.index import join, scan_shard
    from hvd_vgg.data.reader import read_image

    layout, paths = find_split(DataConfig(data_dir=options.data_dir), "train")
    shards = [scan_shard(path, layout) for path in paths]
    index = join(paths, shards, layout)
    found = (read_image(index, record) for record in range(min(options.images, index.records)))
    rows = [(image, label) for image, label in found if image.startswith(b"\xff\xd8")]
    rows = list(itertools.islice(itertools.cycle(rows), options.images))
    for number, (image, label) in enumerate(rows):
        folder = root / "train" / f"{label:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:07d}.jpg").write_bytes(image)
    return [image for image, _ in rows]


def prepare(source, out, images, **flags):
    """Runs the command in this process, on one thread; returns its seconds."""
    from hvd_vgg.commands.prepare import prepare as command
    from hvd_vgg.config import PrepareConfig

    shutil.rmtree(out, ignore_errors=True)
    config = PrepareConfig(
        source=str(source),
        out=str(out),
        splits=("train",),
        train_shards=max(1, round(images / RECORDS)),
        input_threads=1,
        console="lines",
        **flags,
    )
    began = time.perf_counter()
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        command(config)
    return time.perf_counter() - began


def copy(source, target):
    """Returns the seconds in which `cp` copies the files."""
    shutil.rmtree(target, ignore_errors=True)
    began = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    return time.perf_counter() - began


def concatenate(source, target):
    """Returns the seconds in which `cat` writes the files into one, and that is put on disk."""
    target.unlink(missing_ok=True)
    paths = sorted(map(str, source.rglob("*.jpg")))
    began = time.perf_counter()
    with open(target, "wb") as file:
        subprocess.run(["xargs", "cat"], input="\n".join(paths).encode(), stdout=file, check=True)
        os.fsync(file.fileno())
    return time.perf_counter() - began


def recode(encoded, options, resizes=False):
    """Returns the seconds in which libjpeg-turbo decodes and encodes the images, and Pillow resizes them between."""
    from PIL import Image

    began = time.perf_counter()
    for data in encoded:
        image = Image.open(io.BytesIO(data))
        scale = options.shorter_side / min(image.size)
        if scale < 1:
            size = tuple(max(options.shorter_side, round(side * scale)) for side in image.size)
            image.draft(None, size)
            small = image.resize(size, BICUBIC) if resizes else image.crop((0, 0, *size))
            small.convert("RGB").save(io.BytesIO(), "JPEG", quality=options.quality)
    return time.perf_counter() - began


def train(encoded):
    """Returns the seconds in which one thread makes training images of these."""
    import numpy as np

    from hvd_vgg.config import ImageConfig
    from hvd_vgg.data.transforms import augmentation_params, train_image

    config, out = ImageConfig(), np.empty([224, 224, 3], np.uint8)
    params = augmentation_params(np.stack([np.zeros(len(encoded), np.int64), np.arange(len(encoded))], 1), config)
    began = time.perf_counter()
    for data, row in zip(encoded, params):
        train_image(data, row, config, out)
    return time.perf_counter() - began


def small_images(out):
    """Returns the images of a prepared set."""
    from hvd_vgg.data.index import scan_split
    from hvd_vgg.data.reader import read_image

    index = scan_split(str(out), "train")
    return [read_image(index, record)[0] for record in range(index.records)]


def main():
    """Prints the table."""
    parser = measure.command_line(__doc__, images=2000, rounds=5)
    parser.add_argument("--data_dir", required=True, help="a data set with JPEGs to train on")
    parser.add_argument("--shorter_side", type=measure.positive, default=256, help="pixels, of encode")
    parser.add_argument("--quality", type=measure.positive, default=90, help="of encode")
    parser.add_argument("--work_dir", help="where to write; default: a temporary directory")
    options = parser.parse_args()
    ways = ("cp", "cat", "pass", "libjpeg_turbo", "pillow", "encode", "train", "train_small")
    seconds = {name: [] for name in ways}
    with tempfile.TemporaryDirectory(dir=options.work_dir) as folder:
        source, out, small = (Path(folder) / name for name in ("source", "out", "small"))
        encoded = write_source(options, source)
        if not encoded:
            measure.refuse(f"{options.data_dir} has no JPEG to train on", 65)
        train(encoded[:4])  # what is loaded once, here and below
        prepare(source, out, len(encoded))
        for _ in range(options.rounds):
            seconds["cp"].append(copy(source, Path(folder) / "copy"))
            seconds["cat"].append(concatenate(source, Path(folder) / "cat"))
            seconds["pass"].append(prepare(source, out, len(encoded)))
            seconds["libjpeg_turbo"].append(recode(encoded, options))
            seconds["pillow"].append(recode(encoded, options, resizes=True))
            sizes = {"shorter_side": options.shorter_side, "quality": options.quality}
            seconds["encode"].append(prepare(source, small, len(encoded), **sizes))
            seconds["train"].append(train(encoded))
            seconds["train_small"].append(train(small_images(small)))
        written = {"pass": out, "encode": small}
        megabytes = {
            name: sum(path.stat().st_size for path in place.glob("train-*")) / 1e6 for name, place in written.items()
        }
    rates = {name: [len(encoded) / each for each in of_way] for name, of_way in seconds.items()}
    rows = []
    for name, of_way in rates.items():
        ratios = measure.ratios(of_way, rates.get(LIMITS.get(name, "")))
        size = f"{megabytes[name]:.1f}" if name in megabytes else "-"
        rows.append([name, measure.spread(of_way, ",.0f"), size, measure.spread(ratios)])
    title = f"{options.rounds} rounds over {len(encoded)} images of {sum(map(len, encoded)) / len(encoded) / 1e3:.0f} kB"
    measure.print_table(title, ("way", "images/s, one thread", "MB written", "of its limit"), rows)


if __name__ == "__main__":
    measure.run(main)
