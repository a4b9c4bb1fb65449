import functools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow as tf
from support import example, failure_of, picture, write_shard

from hvd_vgg.data import reader
from hvd_vgg.data.formats.layout import shard_bytes
from hvd_vgg.data.formats.tfrecord import FOOTER_BYTES
from hvd_vgg.data.index import scan_split
from hvd_vgg.data.reader import BadRecord, read_ahead, read_image, read_record, write_records


def one_shard(folder, *rows):
    """Returns the path of a shard, of three good records unless others are given, and its index."""
    path = folder / "train-00000-of-00001"
    write_shard(path, rows or [example(picture(i, 1), 1) for i in range(3)])
    return path, scan_split(str(folder), "train")


def test_reader_reads_what_tensorflow_reads(data):
    index = scan_split(str(data), "train")
    expected = [bytes(record.numpy()) for record in tf.data.TFRecordDataset([str(path) for path in index.paths])]
    assert index.records == len(expected) == 75
    assert [read_record(index, i)[:-4] for i in range(75)] == expected
    read_ahead(index, np.arange(75))
    for i, text in enumerate(expected):
        features = tf.train.Example.FromString(text).features.feature
        encoded, label = read_image(index, i)
        assert encoded == features["image/encoded"].bytes_list.value[0]
        assert label == index.labels[i] == features["image/class/label"].int64_list.value[0]


def test_read_ahead_asks_for_runs_of_records(data, monkeypatch):
    """One request for records that follow each other in a file of 25."""
    index, asked = scan_split(str(data), "train"), []
    monkeypatch.setattr(os, "posix_fadvise", lambda handle, *stretch: asked.append(stretch))
    read_ahead(index, np.array([30, 3, 2, 1, 24, 25, 26, 60]))
    ends = index.offsets + index.lengths + FOOTER_BYTES
    expected = [(1, 3), (24, 24), (25, 26), (30, 30), (60, 60)]
    assert [stretch[:2] for stretch in asked] == [(index.offsets[a], ends[b] - index.offsets[a]) for a, b in expected]


def test_read_record_names_damaged_data(tmp_path):
    path, index = one_shard(tmp_path)
    damaged = bytearray(path.read_bytes())
    damaged[int(index.offsets[1]) + 500] ^= 1
    path.write_bytes(damaged)
    read_record(index, 0)
    message = failure_of(lambda: read_record(index, 1), BadRecord)
    assert f"{path}, record 1, offset {index.offsets[1] - 12}: the checksum of its" in message


def test_read_record_names_a_shard_that_became_shorter(tmp_path):
    path, index = one_shard(tmp_path)
    os.truncate(path, int(index.offsets[2]) + 10)
    assert "has shrunk since it was indexed" in failure_of(lambda: read_record(index, 2), BadRecord)


def test_read_record_survives_eviction_by_other_threads(data, monkeypatch):
    """16 threads and one cached file of 3: nearly every read opens a file while others drop it."""
    index = scan_split(str(data), "train")
    ids = np.arange(75).reshape(3, 25).T.ravel().tolist()  # each from another shard than the one before
    expected = [read_record(index, i) for i in ids]
    small = functools.lru_cache(maxsize=1)(reader._open_shard.__wrapped__)
    monkeypatch.setattr(reader, "_open_shard", small)
    with ThreadPoolExecutor(16) as threads:
        for _ in range(20):
            assert list(threads.map(functools.partial(read_record, index), ids)) == expected
    assert small.cache_info().misses > 200


@pytest.mark.parametrize(
    ("make", "kind"),
    [(os.mkfifo, "FIFO"), (os.mkdir, "directory"), (lambda path: path.symlink_to("/dev/zero"), "device")],
)
def test_read_record_opens_regular_files_only(tmp_path, make, kind):
    """None of the others keeps a reader waiting."""
    path, index = one_shard(tmp_path)
    path.unlink()
    make(path)
    reader._open_shard.cache_clear()
    for action in (lambda: shard_bytes([path]), lambda: scan_split(str(tmp_path), "train"), lambda: read_record(index, 0)):
        assert f"{path} is a {kind}; expected a regular file" in failure_of(action)


def test_parse_example_names_the_record(tmp_path):
    path, index = one_shard(tmp_path, example(picture(0, 1), 1), example(None, 1))
    message = failure_of(lambda: read_image(index, 1), BadRecord)
    assert f"{path}, record 1, offset {index.offsets[1] - 12}: feature image/encoded is missing" in message
    assert message.endswith(
        "Expected a tf.train.Example with image/encoded (one JPEG or PNG) and image/class/label (one integer); "
        "--image_feature and --label_feature name others"
    )


def test_write_records_keeps_images_and_labels(tmp_path):
    _, index = one_shard(tmp_path)
    write_records(tmp_path / "records-00000-of-00001", index, [2, 0])
    again = scan_split(str(tmp_path), "records")
    assert [read_image(again, i) for i in range(2)] == [read_image(index, i) for i in (2, 0)]
