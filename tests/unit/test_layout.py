"""Layouts: detected, named by flags, refused where they are not whole or not one; what is beside them is used."""

import json
import os
import re
import shutil
import subprocess
import sys
from errno import EIO
from pathlib import Path

import numpy as np
import pytest
from support import failure_of

from hvd_vgg import storage
from hvd_vgg.config import DataConfig
from hvd_vgg.data.classes import class_names
from hvd_vgg.data.formats.example import STANDARD, encode_example
from hvd_vgg.data.formats.layout import FOLDERS, IMAGENET, TFDS, WEBDATASET, find_split, shard_bytes
from hvd_vgg.data.formats.tfrecord import frame
from hvd_vgg.data.index import cache_places, cached_shards, join, save_cache, scan_shard
from hvd_vgg.data.reader import read_ahead, read_image, reads_in_progress
from hvd_vgg.errors import USAGE, Failure

KINDS = (IMAGENET, TFDS, WEBDATASET, FOLDERS)
BASES = {IMAGENET: 1, TFDS: 0, WEBDATASET: 0, FOLDERS: 0}  # labels of the first class
WNIDS = ["n01440764", "n01443537", "n01484850"]


def config(folder, **flags):
    return DataConfig(data_dir=str(folder), **flags)


def open_split(folder, split="train", **flags):
    layout, paths = find_split(config(folder, **flags), split)
    return join(paths, [scan_shard(path, layout) for path in paths], layout)


def read(index, base=0):
    """Returns [(image, label from 0)]."""
    found = (read_image(index, record) for record in range(index.records))
    return [(image, label - base) for image, label in found]


def expected(layouts, split="train"):
    """Returns [(image, label from 0)] in ImageFolder's order."""
    folder = {"train": "train", "validation": "val"}[split]
    order = json.loads((layouts / "folders.json").read_text())[folder]
    return [((layouts / "folders" / folder / name).read_bytes(), label) for name, label in order]


def copy(layouts, kind, folder):
    shutil.copytree(layouts / kind, folder)
    return folder


def move(paths, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        path.rename(folder / path.name)


def refusal(folder, split="train", **flags):
    return failure_of(lambda: open_split(folder, split, **flags))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_layout_has_the_same_records(layouts, kind, split):
    """By looking and by force; from files made by each format's own library."""
    for flags in ({}, {"data_format": kind}):
        index = open_split(layouts / kind, split, **flags)
        assert index.layout.kind == kind
        assert read(index, BASES[kind]) == expected(layouts, split)
        assert index.layout.label_base in (BASES[kind], None)
        read_ahead(index, np.arange(index.records))
    for other in set(KINDS) - {kind}:
        with pytest.raises(Failure, match=f"no {split} data for --data_format={other}|has no shard {split}-"):
            find_split(config(layouts / kind, data_format=other), split)


def test_several_layouts_are_refused(layouts, tmp_path):
    for kind in KINDS:
        shutil.copytree(layouts / kind, tmp_path / "all", dirs_exist_ok=True)
    for split in ("train", "validation"):
        message = refusal(tmp_path / "all", split)
        assert f"has {split} data in several layouts: " in message
        assert all(f"(--data_format={kind})" in message for kind in KINDS)
    for kind in KINDS:
        assert read(open_split(tmp_path / "all", data_format=kind), BASES[kind]) == expected(layouts)


@pytest.mark.parametrize("words", [("train", "validation"), ("train", "val")])
@pytest.mark.parametrize("kind", [IMAGENET, WEBDATASET])
def test_split_folders(layouts, tmp_path, kind, words):
    folder = copy(layouts, kind, tmp_path / "data")
    for split, word in zip(("train", "validation"), words):
        move(sorted(folder.glob(f"*{split}*")), folder / word)
        index = open_split(folder, split)
        assert read(index, BASES[kind]) == expected(layouts, split)
        assert next(iter(shard_bytes(index.paths, index.layout))).startswith(f"{word}/")
    assert sorted(path.name for path in folder.iterdir()) == sorted(words)


def test_two_parts_are_one_set(layouts, tmp_path):
    """One unpacked into train/, one flat; a shard in both is refused, and so is a set that is not whole."""
    folder = copy(layouts, IMAGENET, tmp_path / "data")
    move([folder / "train-00001-of-00002"], folder / "train")
    assert read(open_split(folder), 1) == expected(layouts)
    shutil.copy(folder / "train" / "train-00001-of-00002", folder)
    assert "has train-00001-of-00002 in several directories. Move all but one away" in refusal(folder)
    (folder / "train-00001-of-00002").unlink()
    (folder / "train" / "train-00001-of-00002").unlink()
    assert "lacks 1 of its 2 train shards: train-00001-of-00002" in refusal(folder)


@pytest.mark.parametrize("kind", ["gzip", "zlib"])
def test_compressed_shards_are_refused_with_what_unpacks_them(layouts, tmp_path, kind):
    message = refusal(layouts / kind)
    assert f"is compressed with {kind}; expected a plain TFRecord file." in message
    (tmp_path / "PLAIN").mkdir()
    command = message.rpartition("plain shards: ")[2]
    subprocess.run(["bash", "-c", command], check=True, cwd=tmp_path)
    assert read(open_split(tmp_path / "PLAIN"), 1) == expected(layouts)[:9]


@pytest.mark.parametrize("name", ["train-00000-of-00001.gz", "train/pictures-0000.tar.gz", "pictures train.tgz"])
def test_compressed_names_are_refused_with_what_unpacks_them(layouts, tmp_path, name):
    source = next((layouts / (IMAGENET if "-of-" in name else WEBDATASET)).glob("*train*"))
    (tmp_path / "data" / name).parent.mkdir(parents=True)
    with open(tmp_path / "data" / name, "wb") as file:
        subprocess.run(["gzip", "-c", source], check=True, stdout=file)
    message = refusal(tmp_path / "data")
    assert f"{tmp_path / 'data' / name} is compressed" in message
    (tmp_path / "PLAIN").mkdir()
    subprocess.run(["bash", "-c", message.rpartition("plain shards: ")[2]], check=True, cwd=tmp_path)
    (unpacked,) = (tmp_path / "PLAIN").iterdir()
    assert unpacked.read_bytes() == source.read_bytes() and unpacked.suffix in (".tar", "")


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (
            "ilsvrc",
            "ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar, archives of archives. Convert them with hvd-vgg prepare",
        ),
        ("parquet", "has Parquet files. Convert them with hvd-vgg prepare"),
        ("flat", "val has images, but no directory for each class"),
        ("tfds_parent", "has versions of a data set: 4.0.0, 5.1.0. Name one: --data_dir="),
        (
            "array_record",
            "has pictures-validation.array_record-00000-of-00001; expected TFRecords. Convert them: tfds convert_f",
        ),
        ("class_tars", "has n01440764.tar, archives of archives"),
        ("nothing", "has no shard validation-?????-of-?????; it has 'other'. Expected ImageNet's layout, such as"),
    ],
)
def test_known_data_that_is_not_read_is_named(layouts, tmp_path, kind, told):
    folder = layouts / kind
    if not folder.exists():
        folder = tmp_path
        names = {
            "flat": ["train/a/1.jpg", "val/1.jpg"],
            "tfds_parent": ["4.0.0/features.json", "5.1.0/features.json"],
            "array_record": ["pictures-validation.array_record-00000-of-00001"],
            "class_tars": ["val/n01440764.tar"],
            "nothing": ["other"],
        }
        for name in names[kind]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"x")
    assert told in refusal(folder, "validation")


def test_patterns_name_shards(layouts, tmp_path):
    """Other names of files, in other directories; whatever the layout."""
    folder = copy(layouts, IMAGENET, tmp_path / "data")
    for number, path in enumerate(sorted(folder.glob("train-*"))):
        (folder / f"part{number}").mkdir()
        path.rename(folder / f"part{number}" / f"images-{number}.tfrecord")
    index = open_split(folder, train_pattern="part*/images-*.tfrecord")
    assert index.layout.kind == IMAGENET and read(index, 1) == expected(layouts)
    assert list(shard_bytes(index.paths, index.layout)) == ["part0/images-0.tfrecord", "part1/images-1.tfrecord"]
    assert read(open_split(folder, "validation", train_pattern="*"), 1) == expected(layouts, "validation")
    message = refusal(folder, train_pattern="images-*")
    assert f"{folder} has nothing that matches --train_pattern=images-*. Correct it" in message
    wrong = "/a*" if sys.version_info >= (3, 13) else "a**"  # from 3.13 on Python takes ** for * there
    with pytest.raises(Failure, match=rf"--train_pattern={re.escape(wrong)}: ") as raised:
        open_split(folder, train_pattern=wrong)
    assert raised.value.code == USAGE


def test_patterns_keep_what_layouts_know(layouts, tmp_path):
    index = open_split(layouts / TFDS, "validation", validation_pattern="pictures-train.tfrecord-*")
    assert index.layout.kind == TFDS and read(index) == expected(layouts) and index.layout.classes == tuple(WNIDS)
    assert open_split(layouts / TFDS, data_format=TFDS, train_pattern="*-train.*").layout.kind == TFDS
    index = open_split(layouts / WEBDATASET, train_pattern="*validation*.tar")
    assert index.layout.kind == WEBDATASET and read(index) == expected(layouts, "validation")
    index = open_split(layouts / FOLDERS, "validation", validation_pattern="train")
    assert index.layout.kind == FOLDERS and read(index) == expected(layouts)
    folder = copy(layouts, IMAGENET, tmp_path / "data")
    (folder / "train-00000-of-00002").unlink()
    assert "lacks 1 of its 2 train shards" in refusal(folder, train_pattern="train-*")
    assert "matches the directory" in refusal(layouts / FOLDERS, train_pattern="train", data_format=IMAGENET)
    assert "which has no directory for each class" in refusal(layouts, train_pattern=IMAGENET)
    assert "matches 2 files" in refusal(layouts / IMAGENET, train_pattern="train-*", data_format=FOLDERS)


def test_features_by_name(layouts, tmp_path):
    rows = expected(layouts)
    (tmp_path / "train-00000-of-00001").write_bytes(
        b"".join(frame(encode_example({"jpeg": image, "class": label, "noise": 5})) for image, label in rows)
    )
    index = open_split(tmp_path, image_feature="jpeg", label_feature="class")
    assert read(index) == rows
    assert "feature class is missing; it has" not in refusal(tmp_path)
    message = refusal(tmp_path, label_feature="klass")
    assert "feature klass is missing; it has class, jpeg, noise. Expected a tf.train.Example with image/encoded" in message
    for kind in (WEBDATASET, FOLDERS):
        with pytest.raises(Failure, match="--image_feature and --label_feature are for TFRecords") as raised:
            open_split(layouts / kind, image_feature="jpeg")
        assert raised.value.code == USAGE


def test_cache_is_of_one_layout(layouts, tmp_path):
    """Of these features, for the labels of others may be others."""
    folder = copy(layouts, IMAGENET, tmp_path / "data")
    places = cache_places(str(folder), "train", tmp_path)
    index = open_split(folder)
    save_cache(places[0], index)
    assert all(each.unchanged for each in cached_shards(places, index.paths, index.layout).values())
    other = index.layout._replace(features=STANDARD._replace(label=b"image/height"))
    assert cached_shards(places, index.paths, other) == {}
    assert set(open_split(folder, label_feature="image/height").labels.tolist()) == {40}
    move([folder / "train-00001-of-00002"], folder / "train")
    moved = open_split(folder)
    assert list(cached_shards(places, moved.paths, moved.layout)) == [0]


def test_names_in_messages_steer_no_terminal(layouts, tmp_path):
    folder = copy(layouts, WEBDATASET, tmp_path / "data")
    for number in (1, 3):
        (folder / f"train-\x1b[2J{number}.tar").write_bytes(b"")
    assert refusal(folder).isprintable()
    (folder / "train-\x1b[2J3.tar").unlink()
    assert "\\x1b[2J1.tar is empty" in refusal(folder)


def test_shards_missing_between_others_are_told(layouts, tmp_path):
    folder = copy(layouts, WEBDATASET, tmp_path / "data")
    (folder / "pictures-train-0001.tar").unlink()
    assert "lacks 1 of its shards: pictures-train-0001.tar. Copy them there" in refusal(folder)
    (folder / "pictures-train-0002.tar").rename(folder / f"pictures-train-{10**9}.tar")
    assert open_split(folder).records == 7 + 4  # another number than that of shards


def test_copies_of_an_archive_are_refused(layouts, tmp_path):
    folder = copy(layouts, WEBDATASET, tmp_path / "data")
    (folder / "train").mkdir()
    shutil.copy(folder / "pictures-train-0001.tar", folder / "train")
    assert "has pictures-train-0001.tar in several directories" in refusal(folder)


def test_shards_are_counted_where_the_data_set_says(layouts, tmp_path):
    """A shard that was cut off between two records is told at the first sight of it."""
    folder = copy(layouts, TFDS, tmp_path / "tfds")
    index, path = open_split(folder), folder / "pictures-train.tfrecord-00001-of-00002"
    os.truncate(path, int(index.offsets[-1]) - 12)
    message = refusal(folder)
    assert f"{path}: expected 9 records, as the data set's description beside it says; found 8" in message
    (folder / "dataset_info.json").write_text('{"splits": [{"name": "train", "shardLengths": [[], "x"]}, 5]}')
    assert open_split(folder).records == 17
    folder = copy(layouts, WEBDATASET, tmp_path / "webdataset")
    names = sorted(path.name for path in folder.glob("*-train-*"))
    train = {"name": "train", "num_samples": 19, "filenames": names, "shard_lengths": [7, 7, 4]}
    (folder / "_info.json").write_text(json.dumps({"splits": {"train": train}}))
    assert open_split(folder).records == 18
    train["shard_lengths"][2] = 5
    (folder / "_info.json").write_text(json.dumps({"splits": {"train": train}}))
    assert "pictures-train-0002.tar: expected 5 records" in refusal(folder)
    (folder / names[-1]).unlink()
    assert f"lacks 1 of the train shards that its _info.json names: {names[-1]}" in refusal(folder)
    for damaged in ("{", "[]", '{"splits": {"train": {"filenames": 5}}}', "[" * 10**5):
        (folder / "_info.json").write_text(damaged)
        assert open_split(folder).records == 14


@pytest.mark.parametrize("kind", KINDS)
def test_storage_that_hiccups_is_read_again(layouts, monkeypatch, kind):
    """Whatever is asked of it: names, kinds and sizes of files, and their bytes."""
    monkeypatch.setattr(storage, "WAITS", (0.001,))
    monkeypatch.setattr(storage, "_given_up", {})
    rows, calls, hiccups = expected(layouts), [], {-1}

    def counted(call):
        def maybe(*arguments, **named):
            calls.append(call)
            if len(calls) in hiccups:
                raise OSError(EIO, os.strerror(EIO), str(arguments[0]))
            return call(*arguments, **named)

        return maybe

    def found():
        calls.clear()
        index = open_split(layouts / kind)
        return [read_image(index, 0), read_image(index, index.records - 1)]

    for place, name in ((os, "open"), (os, "pread"), (os, "scandir"), (Path, "stat"), (Path, "iterdir")):
        monkeypatch.setattr(place, name, counted(getattr(place, name)))
    first = found()
    assert first == [(image, label + BASES[kind]) for image, label in (rows[0], rows[-1])]
    assert len(calls) > 10 and len(set(calls)) >= 4
    for number in np.unique(np.linspace(1, len(calls), 10, dtype=int)).tolist():
        hiccups = {number}
        assert found() == first and reads_in_progress() == []


def test_names_of_classes(layouts, tmp_path):
    """From each layout; a file beside the data goes before what records have."""
    texts = ["tench, Tinca tinca", "goldfish, Carassius auratus", "great white shark"]
    found = {kind: class_names(open_split(layouts / kind), BASES[kind], 3) for kind in KINDS}
    assert found == {IMAGENET: texts, TFDS: WNIDS, WEBDATASET: [], FOLDERS: WNIDS}
    assert class_names(open_split(layouts / IMAGENET), 0, 5) == ["", *texts, ""]
    assert class_names(open_split(layouts / TFDS), 0, 2) == WNIDS[:2]
    for kind in (IMAGENET, TFDS, WEBDATASET):
        folder = copy(layouts, kind, tmp_path / kind)
        (folder / "classes.txt").write_bytes(b"one\r\ntwo \x1b[2J\xff\nthree")
        (folder / "label.labels.txt").unlink(missing_ok=True)
        assert class_names(open_split(folder), BASES[kind], 4) == ["one", "two [2J\ufffd", "three", ""]


def test_names_of_classes_in_records(tmp_path):
    """Of the first record of each label, unless that is bad; synsets where there is no text."""
    rows = [(3, "n3"), (1, "n1"), (3, "not the first")]
    features = [
        {"image/encoded": b"x", "image/class/label": label, "image/class/synset": name.encode()} for label, name in rows
    ]
    path = tmp_path / "train-00000-of-00001"
    path.write_bytes(b"".join(map(frame, map(encode_example, features))))
    assert class_names(open_split(tmp_path), 1, 3) == ["n1", "", "n3"]
    index, data = open_split(tmp_path), bytearray(path.read_bytes())
    data[int(index.offsets[1])] ^= 1
    path.write_bytes(data)
    assert class_names(index, 1, 3) == ["", "", "n3"]
    path.write_bytes(frame(encode_example({"image/encoded": b"x", "image/class/label": 1})))
    assert class_names(open_split(tmp_path), 1, 3) == []
