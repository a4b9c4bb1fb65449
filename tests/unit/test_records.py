import functools
import os
import struct
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow as tf
from support import example, picture, write_data, write_shard

from hvd_vgg.data import index, reader
from hvd_vgg.data.index import (
    check_labels,
    find_label_base,
    find_shards,
    join,
    load_cache,
    save_cache,
    scan_shard,
    shard_bytes,
    split_index,
)
from hvd_vgg.data.reader import parse_example, read_ahead, read_record
from hvd_vgg.data.tfrecord import FOOTER_BYTES, masked_crc
from hvd_vgg.errors import DATA, Failure


def open_all(folder, split="train"):
    paths = find_shards(str(folder), split)
    return join(paths, [scan_shard(path) for path in paths])


def failure_of(action):
    with pytest.raises(Failure) as raised:
        action()
    assert raised.value.code == DATA
    return raised.value.message


def test_the_index_finds_what_tensorflow_reads(data):
    index = open_all(data)
    expected = [bytes(r.numpy()) for r in tf.data.TFRecordDataset([str(path) for path in index.paths])]
    assert index.records == len(expected) == 75
    assert [read_record(index, i)[:-4] for i in range(75)] == expected
    read_ahead(index, np.arange(75))
    parsed = [tf.train.Example.FromString(text).features.feature for text in expected]
    for i, features in enumerate(parsed):
        encoded, label = parse_example(index, i, expected[i])
        assert encoded == features["image/encoded"].bytes_list.value[0]
        assert label == index.labels[i] == features["image/class/label"].int64_list.value[0]


def test_records_that_follow_each_other_are_asked_for_as_one_stretch(data, monkeypatch):
    index, asked = open_all(data), []  # 25 records in each of 3 shards
    monkeypatch.setattr(os, "posix_fadvise", lambda handle, *stretch: asked.append(stretch))
    read_ahead(index, np.array([30, 3, 2, 1, 24, 25, 26, 60]))
    ends = index.offsets + index.lengths + FOOTER_BYTES
    expected = [(1, 3), (24, 24), (25, 26), (30, 30), (60, 60)]
    assert [stretch[:2] for stretch in asked] == [(index.offsets[a], ends[b] - index.offsets[a]) for a, b in expected]


def test_an_index_entry_takes_16_bytes_so_that_imagenet_takes_21_megabytes(data):
    index = open_all(data)
    entry = sum(column.itemsize for column in (index.offsets, index.lengths, index.labels))
    assert entry == 16
    assert entry * 1_281_167 < 40e6


def test_records_with_imagenets_features_in_any_order(tmp_path):
    def text(*values):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=list(values)))

    def floats(*values):
        return tf.train.Feature(float_list=tf.train.FloatList(value=list(values)))

    more = {
        "image/height": tf.train.Feature(int64_list=tf.train.Int64List(value=[40])),
        "image/class/synset": text(b"n01440764"),
        "image/class/text": text(b"tench, Tinca tinca", b"x" * 300),
        "image/object/bbox/xmin": floats(0.1, 0.2, 0.3),
        "image/object/bbox/label": tf.train.Feature(int64_list=tf.train.Int64List(value=[1, 2, 3])),
        "a" * 200: text(b"long name"),
        "image/empty": tf.train.Feature(),
    }
    write_shard(tmp_path / "train-00000-of-00001", [example(picture(i, 1), 900 + i, **more) for i in range(20)])
    index = open_all(tmp_path)
    assert index.labels.tolist() == [900 + i for i in range(20)]
    assert parse_example(index, 3, read_record(index, 3))[0] == picture(3, 1)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("train-00001-of-00003", "lacks 1 of the 3 train shards: train-00001-of-00003"),
        ("validation-00001-of-00002", "lacks 1"),
    ],
)
def test_a_missing_shard_is_named(tmp_path, name, told):
    write_data(tmp_path)
    (tmp_path / name).unlink()
    assert told in failure_of(lambda: find_shards(str(tmp_path), name.split("-")[0]))


def test_no_directory_no_shards_mixed_sets_and_extra_shards_are_told(tmp_path):
    assert "is not a directory" in failure_of(lambda: find_shards(str(tmp_path / "none"), "train"))
    assert "has no shard train-" in failure_of(lambda: find_shards(str(tmp_path), "train"))
    (tmp_path / "train-00000-of-00001").write_bytes(b"x")
    (tmp_path / "train-00000-of-00002").write_bytes(b"x")
    assert "mixes train sets of [1, 2]" in failure_of(lambda: find_shards(str(tmp_path), "train"))
    (tmp_path / "train-00000-of-00002").rename(tmp_path / "train-00001-of-00001")
    assert "beyond 0" in failure_of(lambda: find_shards(str(tmp_path), "train"))


def test_an_empty_shard(tmp_path):
    path = tmp_path / "train-00000-of-00001"
    path.write_bytes(b"")
    assert f"{path} is empty" in failure_of(lambda: scan_shard(path))


def test_a_shard_cut_off_anywhere_but_between_records_is_told_with_record_and_offset(tmp_path):
    path = tmp_path / "train-00000-of-00001"
    write_shard(path, [example(picture(i, 1), 1) for i in range(3)])
    whole = path.read_bytes()
    offsets, lengths, _ = scan_shard(path)
    second = int(offsets[1]) - 12
    for cut in (second + 1, second + 11, second + 12, int(offsets[1]) + 5, int(offsets[1]) + int(lengths[1]) + 3):
        path.write_bytes(whole[:cut])
        message = failure_of(lambda: scan_shard(path))
        assert f"{path}, record 1, offset {second}: expected" in message
        assert f"ends at byte {cut}" in message


def test_a_damaged_length_and_damaged_data_are_told(tmp_path):
    path = tmp_path / "train-00000-of-00001"
    write_shard(path, [example(picture(i, 1), 1) for i in range(3)])
    whole = bytearray(path.read_bytes())
    index = open_all(tmp_path)
    second = int(index.offsets[1]) - 12
    damaged = bytearray(whole)
    damaged[second + 1] ^= 1
    path.write_bytes(damaged)
    assert f"{path}, record 1, offset {second}: the checksum of the record's length" in failure_of(lambda: scan_shard(path))
    damaged = bytearray(whole)
    damaged[second + 12 + 500] ^= 1
    path.write_bytes(damaged)
    read_record(index, 0)
    message = failure_of(lambda: read_record(index, 1))
    assert f"{path}, record 1, offset {second}: the checksum of its" in message


def test_a_shard_that_became_shorter_while_in_use_is_told(tmp_path):
    path = tmp_path / "train-00000-of-00001"
    write_shard(path, [example(picture(i, 1), 1) for i in range(3)])
    index = open_all(tmp_path)
    with open(path, "rb+") as file:
        file.truncate(int(index.offsets[2]) + 10)
    assert "became shorter" in failure_of(lambda: read_record(index, 2))


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (lambda: example(picture(0, 1), None), "image/class/label is missing; it has image/encoded"),
        (lambda: example(None, 1), "image/encoded is missing; it has image/class/label"),
        (lambda: example(b"", 1), "image/encoded has not one byte string, or an empty one"),
        (lambda: b"junk that is no example at all, but long enough", "not a tf.train.Example"),
        (lambda: b"", "image/class/label is missing; it has none"),
        (lambda: example(picture(0, 1), 2**40), "image/class/label is 1099511627776"),
    ],
)
def test_a_record_without_what_is_needed_is_named(tmp_path, bad, told):
    path = tmp_path / "train-00000-of-00001"
    write_shard(path, [example(picture(0, 1), 1), bad()])

    def read():
        index = open_all(tmp_path)
        parse_example(index, 1, read_record(index, 1))

    message = failure_of(read)
    assert told in message
    assert f"{path}, record 1, offset " in message


def test_labels_of_the_wrong_kind_or_number_are_named(tmp_path):
    kinds = {
        "holds no integers": tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"1"])),
        "has 2 integers": tf.train.Feature(int64_list=tf.train.Int64List(value=[1, 2])),
        "has 0 integers": tf.train.Feature(int64_list=tf.train.Int64List(value=[])),
    }
    for told, feature in kinds.items():
        path = tmp_path / "train-00000-of-00001"
        write_shard(path, [example(picture(0, 1), None, **{"image/class/label": feature})])
        assert told in failure_of(lambda: scan_shard(path))


def test_negative_labels_are_read_as_such(tmp_path):
    write_shard(tmp_path / "train-00000-of-00001", [example(picture(0, 1), -1)])
    assert open_all(tmp_path).labels.tolist() == [-1]


@pytest.mark.parametrize(
    ("labels", "classes", "base"),
    [([1, 10], 10, 1), ([0, 9], 10, 0), ([3, 7], 10, 1), ([0, 10], 10, 1), ([1, 1000], 1000, 1), ([0, 999], 1000, 0)],
)
def test_the_first_label_is_found(labels, classes, base):
    assert find_label_base(np.array(labels), classes) == base


def test_a_label_outside_the_classes_is_named_with_its_record(data):
    index = open_all(data)
    check_labels(index, 1, 10)
    message = failure_of(lambda: check_labels(index, 0, 10))
    assert f"{index.paths[0]}, record 9, offset {index.offsets[9] - 12}: label 10 is outside 0..9" in message
    assert "label 6 is outside 1..5" in failure_of(lambda: check_labels(index, 1, 5))


def test_the_cache_gives_the_index_again_and_notices_changed_shards(tmp_path):
    write_data(tmp_path)
    index, cache = open_all(tmp_path), tmp_path / "cache.npz"
    save_cache(cache, index)
    known = load_cache(cache, index.paths)
    assert list(known) == list(index.paths) and all(each.unchanged for each in known.values())
    again = join(index.paths, [each.shard for each in known.values()])
    for a, b in zip(index[1:], again[1:]):
        assert a.dtype == b.dtype
        assert (a == b).all()
    write_shard(index.paths[1], [example(picture(i, 1), 1) for i in range(5)])
    known = load_cache(cache, index.paths)
    assert [each.unchanged for each in known.values()] == [True, False, True]
    assert (known[index.paths[1]].shard.offsets == split_index(index)[1].offsets).all()
    assert list(load_cache(cache, [*index.paths[:2], tmp_path / "new"])) == list(index.paths[:2])
    assert list(tmp_path.glob("*.tmp")) == []


def test_a_damaged_cache_is_as_good_as_none(tmp_path):
    write_data(tmp_path)
    index, cache = open_all(tmp_path), tmp_path / "cache.npz"
    assert load_cache(cache, index.paths) == {}
    save_cache(cache, index)
    whole = cache.read_bytes()
    for damaged in (b"", b"junk", whole[: len(whole) // 2], whole[:200] + b"\0" * 50 + whole[250:]):
        cache.write_bytes(damaged)
        assert load_cache(cache, index.paths) == {}
    for damaged in (
        index._replace(offsets=index.offsets - 2**40),
        index._replace(offsets=index.offsets.astype(np.float64)),
        index._replace(lengths=index.lengths + np.uint32(1)),
        index._replace(labels=index.labels[:-1]),
        index._replace(starts=index.starts[::-1]),
    ):
        save_cache(cache, damaged)
        assert load_cache(cache, index.paths) == {}


def test_a_length_that_reaches_beyond_the_file_is_refused_without_reading_it(tmp_path):
    path = tmp_path / "train-00000-of-00001"
    header = struct.pack("<Q", 2**60)
    path.write_bytes(header + struct.pack("<I", masked_crc(header)) + b"x" * 100)
    assert "expected 1152921504606846976 bytes" in failure_of(lambda: scan_shard(path))


def test_many_threads_read_at_once_while_files_are_opened_and_dropped(data, monkeypatch):
    index = open_all(data)
    expected = [read_record(index, i) for i in range(index.records)]
    small = functools.lru_cache(maxsize=1)(reader._open_shard.__wrapped__)  # 3 shards: nearly every read opens anew
    monkeypatch.setattr(index, "_open", small)
    with ThreadPoolExecutor(16) as threads:
        for _ in range(20):
            assert list(threads.map(functools.partial(read_record, index), range(index.records))) == expected


def test_a_record_that_claims_more_than_an_image_takes_is_refused_when_indexed_and_in_a_cache(tmp_path, monkeypatch):
    path, cache = tmp_path / "train-00000-of-00001", tmp_path / "cache.npz"
    write_shard(path, [example(picture(i, 1), 1) for i in range(2)])
    save_cache(cache, open_all(tmp_path))
    assert load_cache(cache, [path])[path].unchanged
    largest = int(open_all(tmp_path).lengths.max())
    monkeypatch.setattr(index, "MAX_RECORD_BYTES", largest - 1)
    message = failure_of(lambda: scan_shard(path))
    assert f"it claims {largest} bytes of data; expected at most {largest - 1}" in message
    assert load_cache(cache, [path]) == {}


@pytest.mark.parametrize(
    ("make", "told"),
    [(os.mkfifo, "FIFO"), (os.mkdir, "directory"), (lambda path: path.symlink_to("/dev/zero"), "device")],
)
def test_only_regular_files_are_opened(tmp_path, make, told):
    """None of them keeps a reader waiting."""
    path = tmp_path / "train-00000-of-00001"
    write_shard(path, [example(picture(0, 1), 1)])
    index = open_all(tmp_path)
    path.unlink()
    make(path)
    reader._open_shard.cache_clear()
    for action in (
        lambda: shard_bytes([path]),
        lambda: scan_shard(path),
        lambda: read_record(index, 0),
    ):
        assert f"{path} is a {told}; expected a regular file" in failure_of(action)


def test_shards_may_be_links_to_files_elsewhere(tmp_path):
    write_data(tmp_path / "real")
    (tmp_path / "links").mkdir()
    for path in (tmp_path / "real").iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    assert (open_all(tmp_path / "links").offsets == open_all(tmp_path / "real").offsets).all()
    paths = find_shards(str(tmp_path / "links"), "train")
    assert list(shard_bytes(paths).values()) == [path.stat().st_size for path in paths]


def test_what_files_hold_cannot_steer_a_terminal(tmp_path):
    (tmp_path / "\x1b[2Jname").write_bytes(b"")
    (tmp_path / "train-00000-of-00001\n").write_bytes(b"")
    message = failure_of(lambda: find_shards(str(tmp_path), "train"))
    assert message.isprintable() and "x1b[2Jname" in message
    write_shard(tmp_path / "train-00000-of-00001", [example(picture(0, 1), None, **{"\x1b[2J\u202e": tf.train.Feature()})])
    message = failure_of(lambda: open_all(tmp_path))
    assert message.isprintable() and "\\x1b[2J\\u202e" in message


def test_a_record_of_millions_of_features_takes_no_memory_to_refuse(tmp_path):
    """Of fields without a name, and of an image list of empty strings: what each would be noted by is a hundred times it."""

    def field(number, data):
        return bytes([number << 3 | 2]) + varint(len(data)) + data

    def varint(value):
        return bytes([value & 0x7F | 0x80]) + varint(value >> 7) if value > 0x7F else bytes([value])

    entries = field(1, field(1, b"") * 100_000)
    values = field(1, field(1, field(1, b"image/encoded") + field(2, field(1, field(1, b"") * 100_000))))
    label = field(1, field(1, b"image/class/label") + field(2, field(3, field(1, b"\x01"))))
    for data, told in ((entries, "is missing; it has"), (field(1, label + values[4:]), "has not one byte string")):
        path = tmp_path / "train-00000-of-00001"
        write_shard(path, [data])
        tracemalloc.start()

        def read():
            index = open_all(tmp_path)
            parse_example(index, 0, read_record(index, 0))

        assert told in failure_of(read)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 5 * len(data)
