"""A sheet of images for people: records as they are, as training sees them epoch by epoch, and as they are evaluated."""

import io
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import cv2
import numpy as np

from hvd_vgg.config import EvaluationImageConfig
from hvd_vgg.data.index import Index
from hvd_vgg.data.loader import Dataset, Sample
from hvd_vgg.data.reader import BadRecord
from hvd_vgg.data.sampler import Positions, permutation, sample_seeds
from hvd_vgg.data.summary import label_text
from hvd_vgg.data.transforms import augmentation_params, decode_image
from hvd_vgg.data.windows import BILINEAR

_LEAST_TILE = 128  # pixels: smaller images are shown with each pixel as a square of several
_GAP, _LINE = 8, 18  # pixels between tiles; of a line of text
_PAPER, _INK, _FRAME = (255, 255, 255), (0, 0, 0), (228, 228, 228)


class SheetRow(NamedTuple):
    """A record on the sheet: all of its image, uint8 [height, width, 3], and what is made of it."""

    caption: str
    original: np.ndarray
    training: np.ndarray  # uint8 [epochs, n, n, 3]
    evaluated: np.ndarray  # uint8 [m, m, 3]


def training_images(dataset: Dataset, sample: Sample, epochs: int) -> np.ndarray:
    """Returns the images that training makes of a record in epochs 0 .. epochs - 1, uint8 [epochs, n, n, 3].

    dataset: of training. Raises BadRecord.
    """
    size, records = dataset.image_size, np.full(epochs, sample.record, np.int64)
    seeds = sample_seeds(dataset.seed, Positions(records, np.arange(epochs, dtype=np.int64)))
    images = np.empty([epochs, size, size, 3], np.uint8)
    for params, image in zip(augmentation_params(seeds, dataset.config), images):
        dataset.decode(sample, params, image)
    return images


def sheet_datasets(config: EvaluationImageConfig, train: Index, label_base: int, seed: int) -> Tuple[Dataset, Dataset]:
    """Returns the train split as training and as evaluation see it."""
    training = Dataset(train, label_base, config.image_size, config, True, seed=seed)
    return training, Dataset(train, label_base, config.evaluated_size, config, False, config.evaluated_crop)


def sheet_rows(
    training: Dataset,
    evaluation: Dataset,
    count: int,
    epochs: int,
    names: Sequence[str] = (),
    tried: Optional[int] = None,
    *,
    stored: bool = True,
) -> List[SheetRow]:
    """Returns the first `count` records that training takes, bad ones left out; fewer where there are no more.

    The two datasets hold the same records; names: of the classes, where they are known; tried: records that are looked at,
    at most; stored: whether captions have labels as they are stored, or else classes, from 0. Raises Failure(DATA) where a
    shard cannot be read at all.
    """
    index, rows = training.index, []
    for record in permutation(index.records, training.seed, 0)[:tried].tolist():
        try:
            sample = training.read(record)
            if isinstance(sample, BadRecord):
                raise sample
            images = training_images(training, sample, epochs)
            evaluated = np.empty([evaluation.image_size, evaluation.image_size, 3], np.uint8)
            evaluation.decode(sample, [], evaluated)
        except BadRecord:
            continue
        original = decode_image(sample.encoded)
        label, base = int(index.labels[record]), training.label_base
        of = f"label {label_text(label, base, names)}" if stored else f"class {label_text(label - base, 0, names)}"
        caption = f"{of}, {original.shape[1]} x {original.shape[0]} pixels: {index.where(record)}"
        rows.append(SheetRow(caption, original, images, evaluated))
        if len(rows) == count:
            break
    return rows


def draw_sheet(rows: Sequence[SheetRow]) -> bytes:
    """Returns the sheet as a PNG, the same bytes for equal rows under one version of Pillow.

    Training images are shown pixel by pixel, those smaller than 128 pixels enlarged by a whole number. All rows have images
    of equal sizes; there is at least one.
    """
    from PIL import Image, ImageDraw, ImageFont  # only for those who ask for it: it takes a while to load

    epochs, size = rows[0].training.shape[:2]
    side = size * max(1, _LEAST_TILE // size)
    titles = ["the record", *(f"training, epoch {epoch}" for epoch in range(epochs)), "evaluation"]
    width, height = len(titles) * (side + _GAP) + _GAP, _LINE + len(rows) * (_LINE + side + _GAP)
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()

    def write(text: str, left: int, top: int, limit: int) -> None:
        text = text.encode("ascii", "replace").decode()  # the built-in font has no more in some versions
        while text and draw.textlength(text, font) > limit:
            text = text[: -4 if text.endswith("...") else -3] + "..." if len(text) > 4 else ""
        draw.text((left, top + 2), text, _INK, font)

    lefts = [_GAP + column * (side + _GAP) for column in range(len(titles))]
    for title, left in zip(titles, lefts):
        write(title, left, 0, side)
    for number, row in enumerate(rows):
        top = _LINE + number * (_LINE + side + _GAP)
        write(row.caption, _GAP, top, width - 2 * _GAP)
        for image, left in zip((row.original, *row.training, row.evaluated), lefts):
            sheet.paste(_fit(image, side), (left, top + _LINE))
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()


def encode_png(image: np.ndarray) -> bytes:
    """Returns a picture, uint8 [height, width, 3], as a PNG; without Pillow."""
    _, encoded = cv2.imencode(".png", image[:, :, ::-1])  # OpenCV has blue first
    return bytes(encoded)


def _fit(image: np.ndarray, side: int) -> Any:
    """Returns an image fitted into a square of `side` pixels, on grey; pixel by pixel where that is a whole multiple."""
    from PIL import Image

    height, width = image.shape[:2]
    if height == width and side % width == 0:
        return Image.fromarray(image.repeat(side // width, axis=0).repeat(side // width, axis=1))
    longer = max(height, width)
    shown = Image.fromarray(image).resize([max(1, round(each * side / longer)) for each in (width, height)], BILINEAR)
    tile = Image.new("RGB", (side, side), _FRAME)
    tile.paste(shown, ((side - shown.width) // 2, (side - shown.height) // 2))
    return tile
