"""The `make-demo-data` command: draws a small data set of ten classes that a network can learn, in ImageNet's layout."""

from pathlib import Path
from typing import Callable, Dict, Iterator, Tuple, Union

import numpy as np
import tensorflow as tf

from hvd_vgg.config import DemoConfig
from hvd_vgg.data.sampler import slice_bounds
from hvd_vgg.errors import DATA, NOT_WRITTEN, Failure
from hvd_vgg.parallel import comm
from hvd_vgg.parallel.consensus import run_on_root
from hvd_vgg.parallel.init import start
from hvd_vgg.reporting.console import Console
from hvd_vgg.run_dir import writing

# A class covers the points where its function of (x, y) is above 0. A shape extends from -1 to 1, a texture over all of the
# image.
_Drawing = Callable[[np.ndarray, np.ndarray], np.ndarray]
CLASSES: Dict[str, _Drawing] = {
    "disc": lambda x, y: 1 - np.hypot(x, y),
    "ring": lambda x, y: 0.3 - np.abs(np.hypot(x, y) - 0.7),
    "square": lambda x, y: 0.9 - np.maximum(np.abs(x), np.abs(y)),
    "triangle": lambda x, y: np.minimum(0.8 - y, (y + 1) / 2 - np.abs(x)),
    "cross": lambda x, y: np.where(np.maximum(np.abs(x), np.abs(y)) < 1, 0.3 - np.minimum(np.abs(x), np.abs(y)), -1),
    "rows": lambda x, y: np.sin(5 * y),
    "columns": lambda x, y: np.sin(5 * x),
    "diagonals": lambda x, y: np.sin(4 * (x + y)),
    "checks": lambda x, y: np.sin(4 * x) * np.sin(4 * y),
    "dots": lambda x, y: np.cos(5 * x) + np.cos(5 * y) - 0.9,
}


def make_demo_data(config: DemoConfig) -> None:
    """Writes both splits into --data_dir, each shard by one of the ranks. Collective.

    The shards are a function of the flags alone. Raises a collective Failure(DATA) where shards exist already, or
    Failure(NOT_WRITTEN).
    """
    start()
    console = Console(config.console, comm.is_root())
    folder = Path(config.data_dir)
    run_on_root(lambda: _make_folder(folder))
    shards = list(_plan_shards(config))[comm.rank() :: comm.size()]
    progress = console.progress("drawing", sum(len(rows) for _, _, rows in shards), "pictures on rank 0")
    done = 0
    for name, split, rows in shards:
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
    with writing(folder, DATA):
        folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("train-?????-of-?????")) or any(folder.glob("validation-?????-of-?????")):
        raise Failure(DATA, f"{folder} has shards already, which are never overwritten: choose another --data_dir")


def _plan_shards(config: DemoConfig) -> Iterator[Tuple[str, int, range]]:
    """Yields the file name, the number of the split and the pictures of every shard."""
    splits = (
        ("train", config.train_images, config.shards),
        ("validation", config.validation_images, -(-config.shards // 2)),
    )
    for split, (name, images, shards) in enumerate(splits):
        for shard in range(shards):
            yield f"{name}-{shard:05d}-of-{shards:05d}", split, range(*slice_bounds(images, shard, shards))


def _example(row: int, split: int, config: DemoConfig) -> bytes:
    """Returns picture `row` of a split as a serialized tf.train.Example."""
    label = row % len(CLASSES)
    name = list(CLASSES)[label]
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence([config.seed, split, row])))
    picture = draw(name, config.image_size, random)
    features: Dict[str, Union[int, bytes]] = {
        "image/encoded": tf.io.encode_jpeg(picture, quality=92).numpy(),
        "image/format": b"JPEG",
        "image/height": picture.shape[0],
        "image/width": picture.shape[1],
        "image/class/label": label + 1,  # from 1, as in ImageNet's own files
        "image/class/text": name.encode(),
        "image/filename": f"{row:06d}.jpg".encode(),
    }
    example = tf.train.Example()
    for key, value in features.items():
        feature = example.features.feature[key]
        (feature.int64_list if isinstance(value, int) else feature.bytes_list).value.append(value)
    return bytes(example.SerializeToString(deterministic=True))


def draw(name: str, mean_size: int, random: np.random.Generator) -> np.ndarray:
    """Returns a picture of class `name`, uint8 [height, width, 3], of random size, colours, place and scale."""
    height, width = random.integers(int(0.75 * mean_size), int(1.25 * mean_size) + 1, 2)
    scale = random.uniform(0.25, 0.45) * min(height, width)
    centre_y = random.uniform(scale, height - scale)
    centre_x = random.uniform(scale, width - scale)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    mask = np.clip(CLASSES[name]((x - centre_x) / scale, (y - centre_y) / scale) * 8 + 0.5, 0, 1)[..., np.newaxis]
    while True:
        back, front = random.uniform(0, 255, (2, 3))
        if np.abs(back - front).sum() > 180:  # they can be told apart
            break
    light = 1 + 0.25 * random.uniform(-1, 1) * (x / width - 0.5)[..., np.newaxis]
    picture = (back + (front - back) * mask) * light + random.normal(0, 10, (height, width, 1))
    return np.clip(picture, 0, 255).astype(np.uint8)
