"""Draws a small data set that can be learned: ten classes of shapes and textures, as JPEG TFRecords in ImageNet's layout."""

from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import tensorflow as tf

from hvd_vgg.config import DemoConfig
from hvd_vgg.data.sampler import slice_bounds
from hvd_vgg.errors import DATA, NOT_WRITTEN, Failure
from hvd_vgg.parallel import comm
from hvd_vgg.parallel.consensus import run_on_all_ranks
from hvd_vgg.parallel.init import start
from hvd_vgg.reporting.console import Console

# A shape is where its function of (x, y) is above 0; x and y run from -1 to 1 over the shape, or beyond it over a texture.
_Drawing = Callable[[np.ndarray, np.ndarray], np.ndarray]
SHAPES: Dict[str, _Drawing] = {
    "disc": lambda x, y: 1 - np.hypot(x, y),
    "ring": lambda x, y: 0.3 - np.abs(np.hypot(x, y) - 0.7),
    "square": lambda x, y: 0.9 - np.maximum(np.abs(x), np.abs(y)),
    "triangle": lambda x, y: np.minimum(0.8 - y, (y + 1) / 2 - np.abs(x)),
    "cross": lambda x, y: np.where(np.maximum(np.abs(x), np.abs(y)) < 1, 0.3 - np.minimum(np.abs(x), np.abs(y)), -1),
}
TEXTURES: Dict[str, _Drawing] = {
    "rows": lambda x, y: np.sin(5 * y),
    "columns": lambda x, y: np.sin(5 * x),
    "diagonals": lambda x, y: np.sin(4 * (x + y)),
    "checks": lambda x, y: np.sin(4 * x) * np.sin(4 * y),
    "dots": lambda x, y: np.cos(5 * x) + np.cos(5 * y) - 0.9,
}
CLASSES = [*SHAPES, *TEXTURES]


def draw(kind: str, mean_size: int, random: np.random.Generator) -> np.ndarray:
    """Returns one picture of class `kind`, uint8 [height, width, 3], of random size, colours, place and scale."""
    height, width = random.integers(int(0.75 * mean_size), int(1.25 * mean_size) + 1, 2)
    scale = random.uniform(0.25, 0.45) * min(height, width)
    centre_y = random.uniform(scale, height - scale)
    centre_x = random.uniform(scale, width - scale)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    drawing = (SHAPES.get(kind) or TEXTURES[kind])((x - centre_x) / scale, (y - centre_y) / scale)
    mask = np.clip(drawing * 8 + 0.5, 0, 1)[..., np.newaxis]
    back, front = _two_colours(random)
    light = 1 + 0.25 * random.uniform(-1, 1) * (x / width - 0.5)[..., np.newaxis]
    picture = (back + (front - back) * mask) * light + random.normal(0, 10, (height, width, 1))
    return np.clip(picture, 0, 255).astype(np.uint8)


def _two_colours(random: np.random.Generator) -> Tuple[np.ndarray, np.ndarray]:
    """Returns two colours, float64 [3], far enough apart to be told from each other."""
    while True:
        back, front = random.uniform(0, 255, (2, 3))
        if np.abs(back - front).sum() > 180:
            return back, front


def make_demo_data(config: DemoConfig) -> None:
    """Writes both splits into --data_dir, each shard by one of the ranks; all ranks call.

    Shard contents are a function of the flags alone. Raises a collective Failure(DATA) when shards are there already.
    """
    start()
    console = Console(config.console, comm.is_root())
    folder = Path(config.data_dir)
    run_on_all_ranks(lambda: _make_folder(folder) if comm.is_root() else None)
    jobs = _shards(config)
    mine = jobs[comm.rank() :: comm.size()]
    progress = console.progress("drawing", sum(len(rows) for _, _, rows in mine), "pictures on rank 0")
    done = 0
    for name, split, rows in mine:
        temporary = folder / f"{name}.tmp"
        try:
            with tf.io.TFRecordWriter(str(temporary)) as writer:
                for row in rows:
                    writer.write(_example(row, split, config))
                    done += 1
                    progress.update(done)
            temporary.rename(folder / name)
        except (OSError, tf.errors.OpError) as error:
            raise Failure(NOT_WRITTEN, f"{temporary} cannot be written: {error}") from error
    drawn = comm.sum_over_ranks(np.array([done]))
    console.say(f"{drawn[0]} pictures of {len(CLASSES)} classes ({', '.join(CLASSES)}) in {folder.resolve()}")
    comm.shutdown()


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(DATA, f"--data_dir={folder} cannot be made: {error.strerror}") from error
    if any(folder.glob("train-?????-of-?????")) or any(folder.glob("validation-?????-of-?????")):
        raise Failure(DATA, f"{folder} holds shards already, which are never overwritten: give another --data_dir")


def _shards(config: DemoConfig) -> List[Tuple[str, int, range]]:
    """Returns (file name, number of the split, its pictures) of every shard."""
    jobs = []
    for split, (name, images, shards) in enumerate(
        [("train", config.train_images, config.shards), ("validation", config.validation_images, -(-config.shards // 2))]
    ):
        for shard in range(shards):
            low, high = slice_bounds(images, shard, shards)
            jobs.append((f"{name}-{shard:05d}-of-{shards:05d}", split, range(low, high)))
    return jobs


def _example(row: int, split: int, config: DemoConfig) -> bytes:
    kind = row % len(CLASSES)
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence([config.seed, split, row])))
    picture = draw(CLASSES[kind], config.image_size, random)
    encoded = tf.io.encode_jpeg(picture, quality=92).numpy()

    def integer(value: int) -> Any:
        return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))

    def text(value: bytes) -> Any:
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

    features = {
        "image/encoded": text(encoded),
        "image/format": text(b"JPEG"),
        "image/height": integer(picture.shape[0]),
        "image/width": integer(picture.shape[1]),
        "image/class/label": integer(kind + 1),  # from 1, as ImageNet's own files
        "image/class/text": text(CLASSES[kind].encode()),
        "image/filename": text(f"{row:06d}.jpg".encode()),
    }
    return bytes(tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString(deterministic=True))
