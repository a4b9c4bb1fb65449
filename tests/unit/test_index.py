import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from support import ROOT, example, failure_of, picture, write_data, write_shard

from hvd_vgg.data import index as index_module
from hvd_vgg.data.formats import tfrecord
from hvd_vgg.data.formats.layout import find_shards, shard_bytes
from hvd_vgg.data.formats.tfrecord import masked_crc
from hvd_vgg.data.index import (
    cache_places,
    cached_shards,
    check_labels,
    find_label_base,
    join,
    load_cache,
    pack_shards,
    save_cache,
    scan_shard,
    scan_split,
    split_index,
    unpack_shards,
)


def scan(folder):
    return scan_split(str(folder), "train")


def three_records(folder):
    """Returns the path of a shard of three records, and the offset of the second's header."""
    path = folder / "train-00000-of-00001"
    write_shard(path, [example(picture(i, 1), 1) for i in range(3)])
    return path, int(scan_shard(path).offsets[1]) - 12


def test_data_works_without_horovod(data):
    """With only the modules of data/, the root and their libraries."""
    program = f"""
import pkgutil, sys
import hvd_vgg.data
for module in pkgutil.iter_modules(hvd_vgg.data.__path__):
    __import__("hvd_vgg.data." + module.name)
from hvd_vgg.config import TrainConfig
from hvd_vgg.data.index import scan_split
from hvd_vgg.data.loader import train_batches
index = scan_split({str(data)!r}, "train")
(batch,) = train_batches(index, TrainConfig(image_size=32, global_batch=8), 1, range(1), 0, 1, 1)
assert batch.images.shape == (8, 32, 32, 3)
above = "horovod", "mpi4py", *("hvd_vgg." + name for name in ("parallel", "reporting", "training", "models"))
assert not [name for name in sys.modules if name.startswith(above)]
"""
    hide = {"PYTHONPATH": f"{ROOT / 'tests' / 'programs' / 'hide_packages'}:{ROOT}", "HIDDEN_PACKAGES": "horovod,mpi4py"}
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, **hide})


def test_index_entries_take_16_bytes(data):
    """So that ImageNet's index takes 21 MB on every rank."""
    index = scan(data)
    assert sum(column.itemsize for column in (index.offsets, index.lengths, index.labels)) == 16


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("train-00001-of-00003", "lacks 1 of its 3 train shards: train-00001-of-00003"),
        ("validation-00001-of-00002", "lacks 1 of its 2"),
    ],
)
def test_find_shards_names_a_missing_one(tmp_path, name, told):
    write_data(tmp_path)
    (tmp_path / name).unlink()
    assert told in failure_of(lambda: find_shards(str(tmp_path), name.split("-")[0]))


def test_find_shards_refuses_what_is_no_complete_set(tmp_path):
    assert "is not a directory" in failure_of(lambda: find_shards(str(tmp_path / "none"), "train"))
    assert "has no shard train-" in failure_of(lambda: find_shards(str(tmp_path), "train"))
    for number in range(2):
        (tmp_path / f"train-{number:05d}-of-00002").write_bytes(b"x")
    for extra in ("train-00000-of-00003", "train-00002-of-00002"):
        (tmp_path / extra).write_bytes(b"x")
        message = failure_of(lambda: find_shards(str(tmp_path), "train"))
        assert f"has shards that are none of its 2 train shards: {extra}. Move" in message
        (tmp_path / extra).unlink()
    assert [path.name for path in find_shards(str(tmp_path), "train")] == ["train-00000-of-00002", "train-00001-of-00002"]


def test_find_shards_follows_links(tmp_path):
    write_data(tmp_path / "real")
    (tmp_path / "links").mkdir()
    for path in (tmp_path / "real").iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    assert (scan(tmp_path / "links").offsets == scan(tmp_path / "real").offsets).all()
    paths = find_shards(str(tmp_path / "links"), "train")
    assert list(shard_bytes(paths).values()) == [path.stat().st_size for path in paths]


def test_messages_are_printable_whatever_files_hold(tmp_path):
    (tmp_path / "\x1b[2Jname").write_bytes(b"")
    (tmp_path / "train-00000-of-00001\n").write_bytes(b"")
    message = failure_of(lambda: find_shards(str(tmp_path), "train"))
    assert message.isprintable() and "x1b[2Jname" in message
    write_shard(tmp_path / "train-00000-of-00001", [example(picture(0, 1), None, **{"\x1b[2J\u202e": tf.train.Feature()})])
    message = failure_of(lambda: scan(tmp_path))
    assert message.isprintable() and "\\x1b[2J\\u202e" in message


@pytest.mark.parametrize("value", [0, 7, 127, 128, 999, 16383, 16384, 2**31 - 1, -1])
@pytest.mark.parametrize("place", ["before", "behind", "far"])
def test_scan_shard_finds_labels_wherever_they_are(tmp_path, monkeypatch, value, place):
    """By a short read where a writer of ImageNet's layout puts them, in one or two bytes; else by reading the record."""
    label = tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
    noise = {name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[bytes(1000)])) for name in ("a", "z")}
    features = {"image/class/label": label, "image/encoded": noise["a"], **(noise if place == "far" else {})}
    order = sorted(features, reverse=place == "behind")
    entries = [
        tf.train.Features(feature={name: features[name]}).SerializeToString()  # each a map of one entry
        for name in (["a", *order[1:]] if place == "far" else order)
    ]
    body = b"".join(entries)
    write_shard(tmp_path / "shard", [tf.train.Example().SerializeToString() + b"\x0a" + varint(len(body)) + body] * 2)
    pread, read = os.pread, []
    monkeypatch.setattr(os, "pread", lambda handle, count, offset: read.append(count) or pread(handle, count, offset))
    assert scan_shard(tmp_path / "shard").labels.tolist() == [value, value]
    assert (max(read) > 1000) == (place == "far" or not 0 <= value < 2**14)


def varint(value):
    return bytes([value & 0x7F | 0x80]) + varint(value >> 7) if value > 0x7F else bytes([value])


def test_scan_shard_refuses_an_empty_file(tmp_path):
    path = tmp_path / "train-00000-of-00001"
    path.write_bytes(b"")
    assert f"{path} is empty" in failure_of(lambda: scan_shard(path))


def test_scan_shard_names_where_a_file_is_cut(tmp_path):
    """Anywhere but between two records, which looks like a whole file."""
    path, second = three_records(tmp_path)
    whole, length = path.read_bytes(), int(scan_shard(path).lengths[1])
    for cut in (second + 1, second + 11, second + 12, second + 17, second + 12 + length + 3):
        path.write_bytes(whole[:cut])
        message = failure_of(lambda: scan_shard(path))
        assert f"{path}, record 1, offset {second}: expected" in message
        assert f"ends at byte {cut}" in message


def test_scan_shard_names_a_damaged_length(tmp_path):
    path, second = three_records(tmp_path)
    damaged = bytearray(path.read_bytes())
    damaged[second + 1] ^= 1
    path.write_bytes(damaged)
    assert f"{path}, record 1, offset {second}: the checksum of the record's length" in failure_of(lambda: scan_shard(path))


def test_scan_shard_refuses_a_length_beyond_the_file(tmp_path):
    path = tmp_path / "train-00000-of-00001"
    header = struct.pack("<Q", 2**60)
    path.write_bytes(header + struct.pack("<I", masked_crc(header)) + b"x" * 100)
    assert "expected 1152921504606846976 bytes" in failure_of(lambda: scan_shard(path))


def test_scan_shard_refuses_more_than_an_image_takes(tmp_path, monkeypatch):
    """So does a cache."""
    path, _ = three_records(tmp_path)
    cache, whole = tmp_path / "cache.npz", scan(tmp_path)
    save_cache(cache, whole)
    assert load_cache(cache, [path])[0].unchanged
    largest = int(whole.lengths.max())
    for module in (index_module, tfrecord):
        monkeypatch.setattr(module, "MAX_RECORD_BYTES", largest - 1)
    message = failure_of(lambda: scan_shard(path))
    assert f"it claims {largest} bytes of data; expected at most {largest - 1}" in message
    assert load_cache(cache, [path]) == {}


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (
            example(picture(0, 1), None),
            "image/class/label is missing; it has image/encoded. Expected a tf.train.Example with",
        ),
        (b"junk that is no example at all, but long enough", "not a tf.train.Example"),
        (b"", "image/class/label is missing; it has none"),
        (example(picture(0, 1), 2**40), "image/class/label is 1099511627776"),
    ],
)
def test_scan_shard_names_a_record_without_label(tmp_path, bad, told):
    path = tmp_path / "train-00000-of-00001"
    write_shard(path, [example(picture(0, 1), 1), bad])
    message = failure_of(lambda: scan_shard(path))
    assert told in message and f"{path}, record 1, offset " in message


@pytest.mark.parametrize(
    ("labels", "classes", "base"),
    [([1, 10], 10, 1), ([0, 9], 10, 0), ([3, 7], 10, 1), ([0, 10], 10, 1), ([1, 1000], 1000, 1), ([0, 999], 1000, 0)],
)
def test_find_label_base(labels, classes, base):
    assert find_label_base(np.array(labels), classes) == base


def test_check_labels_names_the_first_record_outside(data):
    index = scan(data)
    check_labels(index, 1, 10)
    message = failure_of(lambda: check_labels(index, 0, 10))
    assert f"{index.paths[0]}, record 9, offset {index.offsets[9] - 12}: label 10 is outside 0..9" in message
    assert "label 6 is outside 1..5" in failure_of(lambda: check_labels(index, 1, 5))


def assert_same(found, expected):
    for a, b in zip(found, expected):
        assert a.dtype == b.dtype and (a == b).all()


def test_cache_returns_the_index_and_notices_changes(tmp_path):
    write_data(tmp_path)
    index, cache = scan(tmp_path), tmp_path / "cache.npz"
    save_cache(cache, index)
    known = load_cache(cache, index.paths)
    assert list(known) == [0, 1, 2] and all(each.unchanged for each in known.values())
    assert_same(join(index.paths, [each.shard for each in known.values()])[1:6], index[1:6])
    write_shard(index.paths[1], [example(picture(i, 1), 1) for i in range(5)])
    known = load_cache(cache, index.paths)
    assert [each.unchanged for each in known.values()] == [True, False, True]
    assert_same(known[1].shard, split_index(index)[1])
    assert list(load_cache(cache, [tmp_path / "new", *index.paths[:2]])) == [1, 2]
    assert list(tmp_path.glob("*.tmp")) == []


def test_cache_that_is_damaged_is_as_good_as_none(tmp_path):
    write_data(tmp_path)
    index, cache = scan(tmp_path), tmp_path / "cache.npz"
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


def test_cached_shards_prefers_unchanged_then_the_first_place(tmp_path):
    write_data(tmp_path / "data")
    (tmp_path / "run").mkdir()
    first, second = places = cache_places(str(tmp_path / "data"), "train", tmp_path / "run")
    assert (first.parent, second.parent) == (tmp_path / "data", tmp_path / "run")
    old = scan(tmp_path / "data")
    save_cache(first, old)
    write_shard(old.paths[0], [example(picture(i, 1), 1) for i in range(5)])
    assert [each.unchanged for each in cached_shards(places, old.paths).values()] == [False, True, True]
    new = scan(tmp_path / "data")
    save_cache(second, new)
    found = cached_shards(places, old.paths)
    assert all(each.unchanged for each in found.values())
    assert_same(join(new.paths, [found[number].shard for number in range(3)])[1:6], new[1:6])


def test_packed_shards_arrive_as_they_were(data):
    shards = dict(zip((4, 0, 7), split_index(scan(data))))
    arrived = unpack_shards(pack_shards(shards))
    assert list(arrived) == [4, 0, 7]
    for number, shard in shards.items():
        assert_same(arrived[number], shard)
    assert unpack_shards(pack_shards({})) == {}
