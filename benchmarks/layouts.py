"""Reading each layout of a data set beside TFRecords in ImageNet's: indexing it, and reading its records at random.

    python benchmarks/layouts.py --data_dir=DIR [--images=4096] [--shards=8] [--rounds=9]

The first --images records of DIR, in whatever layout, are written in each layout into a temporary directory, so that all
hold the same images. Each round indexes and then reads all of them in each layout, in one thread and in an order drawn
anew, the layouts taking turns; nothing is decoded. Everything is in the page cache, which a first round that does not count
fills: this is what the layouts cost the processor, to which storage adds (an open file for each image of class
directories). A ratio is of one round's times, to ImageNet's layout in that round. Decoding an image takes milliseconds.
"""

import io
import random
import tarfile
import tempfile
import time
from pathlib import Path

import measure

KINDS = ("imagenet", "tfds", "webdataset", "folders")


def load(options):
    """Returns [(image, label from 0)] of the first records to train on."""
    from hvd_vgg.config import DataConfig
    from hvd_vgg.data.formats.layout import find_split
    from hvd_vgg.data.index import join, scan_shard
    from hvd_vgg.data.reader import read_image

    layout, paths = find_split(DataConfig(data_dir=options.data_dir), "train")
    shards = []
    for path in paths:
        shards.append(scan_shard(path, layout))
        if sum(len(shard.offsets) for shard in shards) >= options.images:
            break
    index = join(paths[: len(shards)], shards, layout)
    rows = [read_image(index, record) for record in range(min(index.records, options.images))]
    first = min(label for _, label in rows)
    # In the order of class directories, which is then that of all.
    return sorted(((image, label - first) for image, label in rows), key=lambda row: row[1])


def write(kind, folder, rows, shards):
    """Writes `rows` in a layout below `folder`."""
    from hvd_vgg.data.formats.example import encode_example
    from hvd_vgg.data.formats.tfrecord import frame

    folder.mkdir()
    if kind == "folders":
        for number, (image, label) in enumerate(rows):
            path = folder / "train" / f"n{label:08d}" / f"n{label:08d}_{number:07d}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)
        return
    for shard in range(shards):
        part = list(enumerate(rows))[len(rows) * shard // shards : len(rows) * (shard + 1) // shards]
        if kind == "webdataset":
            with tarfile.open(folder / f"images-train-{shard:04d}.tar", "w") as archive:
                for number, (image, label) in part:
                    for name, data in ((f"{number:07d}.cls", str(label).encode()), (f"{number:07d}.jpg", image)):
                        member = tarfile.TarInfo(name)
                        member.size = len(data)
                        archive.addfile(member, io.BytesIO(data))
            continue
        name = f"train-{shard:05d}-of-{shards:05d}"
        with open(folder / (name if kind == "imagenet" else f"images-train.tfrecord-{name[6:]}"), "wb") as file:
            for number, (image, label) in part:
                values = (image, label + 1, b"") if kind == "imagenet" else (image, label, b"%d" % number)
                names = ("image/encoded", "image/class/label", "image/class/text")
                names = names if kind == "imagenet" else ("image", "label", "file_name")
                file.write(frame(encode_example(dict(zip(names, values)))))


def measure_once(folder, draw):
    """Returns (seconds to index, seconds to read) of a layout, and the bytes of its images."""
    from hvd_vgg.config import DataConfig
    from hvd_vgg.data.formats.layout import find_split
    from hvd_vgg.data.index import join, scan_shard
    from hvd_vgg.data.reader import read_image

    began = time.perf_counter()
    layout, paths = find_split(DataConfig(data_dir=str(folder)), "train")
    index = join(paths, [scan_shard(path, layout) for path in paths], layout)
    indexed = time.perf_counter() - began
    order = list(range(index.records))
    draw.shuffle(order)
    began, size = time.perf_counter(), 0
    for record in order:
        size += len(read_image(index, record)[0])
    return indexed, time.perf_counter() - began, size


def main():
    """Lets the layouts take turns and prints the table."""
    parser = measure.command_line(__doc__, rounds=9, images=4096)
    parser.add_argument("--data_dir", required=True, help="images to train on, in any layout")
    parser.add_argument("--shards", type=measure.positive, default=8, help="of each layout but class directories")
    options = parser.parse_args()
    rows, draw = load(options), random.Random(1)  # noqa: S311
    if len(rows) < options.shards:
        parser.error(f"--shards={options.shards}: expected at most the {len(rows)} images of --data_dir")
    indexing, reading = ({kind: [] for kind in KINDS} for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            write(kind, Path(folder) / kind, rows, options.shards)
        for number in range(options.rounds + 1):
            for kind in KINDS:
                indexed, read, size = measure_once(Path(folder) / kind, draw)
                if size != sum(len(image) for image, _ in rows):
                    measure.refuse(f"{kind}: the images are not those that were written", 1)
                if number:  # the first fills the page cache
                    indexing[kind].append(indexed)
                    reading[kind].append(read)
    table = []
    for kind in KINDS:
        row = [kind]
        for seconds, base in ((indexing[kind], indexing["imagenet"]), (reading[kind], reading["imagenet"])):
            row += [
                measure.spread([len(rows) / each for each in seconds], ",.0f"),
                measure.spread(measure.ratios(seconds, base)),
            ]
        table.append(row)
    size = sum(len(image) for image, _ in rows) / len(rows)
    title = f"{options.rounds} rounds of {len(rows):,} images of {size / 1000:.1f} kB on average, one thread"
    head = ("layout", "indexed a second", "of time, relative to imagenet", "read a second", "of time, relative to imagenet")
    measure.print_table(title, head, table)


if __name__ == "__main__":
    measure.run(main)
