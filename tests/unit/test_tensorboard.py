"""What TensorBoard is given beside scalars: the confusion matrix as a picture, hyperparameters, and what may go wrong."""

import importlib.util
import struct
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from support import write_data

from hvd_vgg.config import TrainConfig
from hvd_vgg.data.index import scan_split
from hvd_vgg.data.sheet import encode_png
from hvd_vgg.errors import DATA, LOST_RANK, Failure
from hvd_vgg.reporting.confusion_image import draw_confusions
from hvd_vgg.reporting.console import Console
from hvd_vgg.reporting.tensorboard import open_events
from hvd_vgg.training import pictures
from hvd_vgg.training.dataset import Splits
from hvd_vgg.training.pictures import show_end, show_start
from hvd_vgg.training.reporter import Reporter

WHITE, DARK, GREY = [255] * 3, [8, 48, 107], [225] * 3


def values(folder):
    """Returns tag, plugin, step and tensor of all events in a directory."""
    (path,) = folder.iterdir()
    events = [tf.compat.v1.Event.FromString(bytes(each.numpy())) for each in tf.data.TFRecordDataset(str(path))]
    found = [(event.step, value) for event in events for value in event.summary.value]
    return {
        value.tag: (value.metadata.plugin_data.plugin_name, step, tf.make_ndarray(value.tensor)) for step, value in found
    }


def matrix(classes, *pairs, records=None):
    return draw_confusions(np.array(pairs), np.full(classes, 10) if records is None else np.array(records))


def test_confusion_image_has_a_row_for_each_label():
    """All right, all wrong, and no records; numbers of classes and percent; the same picture each time."""
    pairs = [[0, 0, 10], [1, 0, 4], [1, 2, 6]]
    drawn = matrix(3, *pairs, records=[10, 10, 0])
    cells = [[drawn[22 + row * 64 + 4, 20 + column * 64 + 4].tolist() for column in range(3)] for row in range(3)]
    assert cells[0] == [DARK, WHITE, WHITE] and cells[1][1] == WHITE and cells[2] == [GREY] * 3
    assert cells[1][0][0] > cells[1][2][0] > DARK[0]  # 40 and 60 percent
    assert np.array_equal(drawn, matrix(3, *pairs, records=[10, 10, 0]))
    one = draw_confusions(np.array([[0, 0, 1000], [1, 0, 3]]), np.array([1000, 1000]))
    assert one[22 + 64 : 22 + 128, 20:84].reshape(-1, 3).min() > 200  # 0.3 percent is no number


@pytest.mark.parametrize("classes", [2, 100, 1000, 1001, 21841])
def test_confusion_image_is_of_bounded_size(classes):
    """A single confusion of a thousand classes can be seen; beyond them classes share a row."""
    drawn = matrix(classes, [0, classes - 1, 1], [classes - 1, classes - 1, 10])
    height, width = drawn.shape[:2]
    assert 100 < height <= 1040 and height < width < height + 80
    blue = (drawn.astype(int)[:, :, 2] - drawn[:, :, 0]) > 20
    assert blue[: height // 3, -(width // 3) :].any() and not blue[-(height // 3) :, : width // 3].any()
    assert struct.unpack(">II", encode_png(drawn)[16:24]) == (width, height)


class Guest(Reporter):
    """A reporter that keeps what is said, with a file of events."""

    def __init__(self, folder):
        super().__init__(None, Console("lines", False), (), open_events(folder, Console("lines", False)))
        self.said = []

    def say(self, text):
        self.said.append(text)


def splits(folder):
    train, validation = (scan_split(str(folder), split) for split in ("train", "validation"))
    return Splits(train, validation, 1)


def test_tensorboard_of_a_run_that_goes_on_has_no_sheet(tmp_path):
    """It is of the first start; flags that are lists are text; the pictures need no run directory."""
    config = TrainConfig(num_classes=10, image_size=32, run_dir=str(tmp_path / "none"), no_decay=("bias", "norm"))
    data = splits(write_data(tmp_path / "data"))
    for first, expected in ((0, True), (7, False)):
        guest = Guest(tmp_path / str(first))
        show_start(config, data, first, guest)
        show_end(np.array([[0, 0, 3]]), np.full(10, 4), 9, guest)
        found = values(tmp_path / str(first))
        assert ("training samples" in found) == expected and not guest.said
        assert found["confusion matrix"][:2] == ("images", 9) and found["_hparams_/session_end_info"][0] == "hparams"


@pytest.mark.parametrize("code", [DATA, LOST_RANK])
def test_tensorboard_ends_no_run(tmp_path, monkeypatch, code):
    """But where storage is gone; a bad shard is named by training, and anything else is said."""
    guest, config = Guest(tmp_path / "events"), TrainConfig(num_classes=10, image_size=32)

    def fail(*_, **__):
        raise Failure(code, "a shard")

    monkeypatch.setattr(pictures, "sheet_rows", fail)
    data = splits(write_data(tmp_path / "data"))
    if code == LOST_RANK:
        with pytest.raises(Failure):
            show_start(config, data, 0, guest)
        return
    show_start(config, data, 0, guest)
    assert guest.said == []
    monkeypatch.setattr(pictures, "sheet_rows", lambda *_, **__: 1 / 0)
    show_start(config, data, 0, guest)
    assert guest.said == ["tensorboard/ lacks something: ZeroDivisionError: division by zero"]


def test_tensorboard_that_is_missing_gets_scalars_alone(tmp_path, monkeypatch):
    """And no picture is drawn for it; nor where the directory of events is unwritable."""
    data = Splits(None, None, 1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    guest = Guest(tmp_path / "events")
    guest.events.scalar("train/loss", 2.0, 3)
    show_start(TrainConfig(), data, 0, guest)
    assert {tag: found[:2] for tag, found in values(tmp_path / "events").items()} == {"train/loss": ("scalars", 3)}
    (tmp_path / "file").write_text("")
    guest = Guest(Path(tmp_path / "file" / "events"))
    assert guest.events is None
    show_start(TrainConfig(), data, 0, guest)
