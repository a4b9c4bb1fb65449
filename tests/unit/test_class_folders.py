"""Class directories: ImageFolder's order, and files that come, go, change or cannot be read."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from support import failure_of

from hvd_vgg.config import DataConfig
from hvd_vgg.data.formats.class_folders import folders_with_images
from hvd_vgg.data.formats.layout import FOLDERS, Layout, find_split, shard_bytes
from hvd_vgg.data.index import join, load_cache, save_cache, scan_shard, split_index, take_stamps
from hvd_vgg.data.reader import BadRecord, read_ahead, read_image
from hvd_vgg.errors import Failure


def make(folder, *names):
    """Writes files, each with its own name as contents."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.fsencode(name))
    return folder


def open_split(folder, split="train", **flags):
    layout, paths = find_split(DataConfig(data_dir=str(folder), **flags), split)
    return join(paths, [scan_shard(path, layout) for path in paths], layout)


def names(index):
    """Returns what is read, files that hold their names, with their labels."""
    return [(os.fsdecode(image), label) for image, label in (read_image(index, i) for i in range(index.records))]


def touch(path, seconds):
    """Sets a time apart from what a clock of a few milliseconds would give."""
    os.utime(path, (seconds, seconds))


@pytest.mark.parametrize(("split", "folder"), [("train", "train"), ("validation", "val")])
def test_order_is_that_of_image_folder(layouts, split, folder):
    index = open_split(layouts / "folders", split)
    order = json.loads((layouts / "folders.json").read_text())[folder]
    root = layouts / "folders" / folder
    assert [[str(index.path_of(i).relative_to(root)), int(index.labels[i])] for i in range(index.records)] == order
    assert [read_image(index, i) for i in range(index.records)] == [((root / name).read_bytes(), k) for name, k in order]
    assert index.where(3) == str(root / order[3][0])
    read_ahead(index, np.arange(index.records))


def test_directories_below_are_sorted_as_paths(tmp_path):
    """By their whole path, in which a hyphen is before the slash."""
    make(tmp_path / "train", "a/b/1.jpg", "a/b-c/2.jpg", "a/z.jpg", "a/b/c/0.png", "b/Z.JPEG", "b/a.JpG", "b/notes.txt")
    expected = ["a/z.jpg", "a/b/1.jpg", "a/b-c/2.jpg", "a/b/c/0.png", "b/Z.JPEG", "b/a.JpG"]
    assert names(open_split(tmp_path)) == [(name, "ab".index(name[0])) for name in expected]


def test_hidden_names_are_left_out(tmp_path):
    """Unlike ImageFolder, which makes a class of .ipynb_checkpoints."""
    make(tmp_path / "train", ".ipynb_checkpoints/1.jpg", "b/._1.jpg", "b/1.jpg", "b/.thumbnails/1.jpg")
    assert names(open_split(tmp_path)) == [("b/1.jpg", 0)]


def test_names_that_are_no_utf_8_are_read(tmp_path):
    """And shown; a cache keeps them."""
    odd = os.fsdecode(b"train/b\xff/\xe9\n1.jpg")
    make(tmp_path, "train/a/1.jpg", odd)
    index = open_split(tmp_path)
    assert names(index) == [("train/a/1.jpg", 0), (odd, 1)]
    save_cache(tmp_path / "cache.npz", index)
    known = load_cache(tmp_path / "cache.npz", index.paths, index.layout)
    assert [each.unchanged for each in known.values()] == [True, True]
    assert index.where(1).isprintable() and "b\\udcff/\\udce9\\n1.jpg" in index.where(1)
    (tmp_path / odd).unlink()
    assert "cannot be read: No such file" in failure_of(lambda: read_image(index, 1), BadRecord)


def test_validation_takes_the_classes_of_train(tmp_path):
    make(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "train/c/1.jpg", "validation/c/1.jpg", "validation/b/1.jpg")
    index = open_split(tmp_path, "validation")
    assert index.layout.classes == ("a", "b", "c")
    assert names(index) == [("validation/b/1.jpg", 1), ("validation/c/1.jpg", 2)]
    make(tmp_path, "validation/d/1.jpg")
    message = failure_of(lambda: open_split(tmp_path, "validation"))
    assert f"{tmp_path / 'validation'} has classes that {tmp_path / 'train'} lacks: d" in message
    shutil.rmtree(tmp_path / "train")
    assert open_split(tmp_path, "validation").layout.classes == ("b", "c", "d")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("b/1.webp", "b/1.webp: training reads JPEG and PNG"),
        ("b/notes.txt", "b has no image. Expected files .jpg, .jpeg or .png in it, or no such directory"),
    ],
)
def test_scan_refuses_what_image_folder_would_count(tmp_path, name, told):
    make(tmp_path / "train", "a/1.jpg", name)
    assert told in failure_of(lambda: open_split(tmp_path))


def test_scan_names_files_that_are_no_images(tmp_path):
    path = make(tmp_path / "train", "a/1.jpg", "a/2.jpg") / "a" / "2.jpg"
    path.write_bytes(b"")
    assert f"{path} has 0 bytes; expected 1 to" in failure_of(lambda: open_split(tmp_path))
    path.unlink()
    path.symlink_to("nowhere.jpg")
    assert f"{path} cannot be read: No such file" in failure_of(lambda: open_split(tmp_path))
    path.unlink()
    os.mkfifo(path)
    assert f"{path} is a FIFO" in failure_of(lambda: open_split(tmp_path))


def test_links_are_followed_but_not_in_circles(tmp_path):
    make(tmp_path, "train/a/1.jpg", "elsewhere/2.jpg", "elsewhere/deep/3.jpg")
    (tmp_path / "train" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "a" / "4.jpg").symlink_to(tmp_path / "train" / "a" / "1.jpg")
    assert names(open_split(tmp_path)) == [
        *[("train/a/1.jpg", 0)] * 2,
        ("elsewhere/2.jpg", 1),
        ("elsewhere/deep/3.jpg", 1),
    ]
    (tmp_path / "elsewhere" / "deep" / "up").symlink_to(tmp_path / "elsewhere")
    assert "b/deep/up is a link to a directory that it lies in" in failure_of(lambda: open_split(tmp_path))


def test_cache_notices_files_that_come_and_go(tmp_path):
    """At any depth."""
    make(tmp_path / "train", "a/1.jpg", "b/1.jpg", "c/more/1.jpg")
    for folder in ("a", "b", "c", "c/more"):
        touch(tmp_path / "train" / folder, 1e9)
    index, cache = open_split(tmp_path), tmp_path / "cache.npz"
    save_cache(cache, index)

    def unchanged():
        return [each.unchanged for each in load_cache(cache, index.paths, index.layout).values()]

    assert unchanged() == [True, True, True]
    make(tmp_path / "train", "a/2.jpg", "c/more/2.jpg")
    assert unchanged() == [False, True, False]
    save_cache(cache, open_split(tmp_path))
    assert unchanged() == [True, True, True]
    (tmp_path / "train" / "c" / "more" / "2.jpg").unlink()
    (tmp_path / "train" / "b" / "deep").mkdir()
    touch(tmp_path / "train" / "b", 1e9 + 1)
    touch(tmp_path / "train" / "c" / "more", 1e9 + 1)
    assert unchanged() == [True, False, False]
    make(tmp_path / "train", "d/1.jpg")
    assert load_cache(cache, index.paths, open_split(tmp_path).layout) == {}  # labels may be others


def test_folders_with_images_are_those_that_are_scanned(tmp_path):
    """Without listing them: what a stamp takes from the index where a file system counts no links."""
    make(tmp_path / "train", "a/b/1.jpg", "a/b-c/2.jpg", "a/z.jpg", "a/b/c/d/0.png", "b/1.jpg")
    index = open_split(tmp_path)
    for path, shard in zip(index.paths, split_index(index)):
        walked = [Path(root) for root, _, _ in os.walk(path)]
        assert folders_with_images(path, shard) == sorted(walked, key=str)


def test_cache_of_another_directory_is_not_used(tmp_path):
    """Though its classes and times are the same."""
    make(tmp_path, "train/a/1.jpg", "small/a/2.jpg", "small/a/3.jpg")
    for folder in ("train/a", "small/a"):
        touch(tmp_path / folder, 1e9)
    save_cache(tmp_path / "cache.npz", open_split(tmp_path))
    other = open_split(tmp_path, train_pattern="small")
    assert load_cache(tmp_path / "cache.npz", other.paths, other.layout) == {}
    assert list(shard_bytes(other.paths, other.layout)) == ["small/a"]


def test_cache_holds_no_path_that_leads_elsewhere(tmp_path):
    make(tmp_path / "train", "aaa/11.jpg")
    index, cache = open_split(tmp_path), tmp_path / "cache.npz"
    for name in (b"/1.jpg", b"../.jpg", b"./1.jpg", b"a//.jpg", b"a/../jp"):
        (shard,) = split_index(index)
        changed = np.frombuffer(name[: len(shard.names) - 1].ljust(len(shard.names) - 1, b"g") + b"\0", np.uint8)
        save_cache(cache, index._replace(names=changed))
        assert load_cache(cache, index.paths, index.layout) == {}
    save_cache(cache, index)
    assert load_cache(cache, index.paths, index.layout)[0].unchanged


@pytest.mark.parametrize("change", ["longer", "shorter", "gone", "directory"])
def test_read_image_names_a_file_that_changed(tmp_path, change):
    path = make(tmp_path / "train", "a/1.jpg", "a/2.jpg") / "a" / "2.jpg"
    index = open_split(tmp_path)
    path.unlink()
    if change == "directory":
        path.mkdir()
    elif change != "gone":
        path.write_bytes(b"a/2.jpg, longer" if change == "longer" else b"a")
    kind = Failure if change == "directory" else BadRecord
    message = failure_of(lambda: read_image(index, 1), kind)
    told = {"gone": "cannot be read: No such file", "directory": "is a directory"}
    assert str(path) in message and told.get(change, "but had 7 when it was indexed. Restore it as it was, or") in message
    read_ahead(index, np.arange(2))  # a hint, which fails in silence
    assert names(index._replace(starts=np.array([0, 1])))[:1] == [("a/1.jpg", 0)]


def test_layout_of_an_index_without_data(tmp_path):
    layout = Layout(FOLDERS, tmp_path / "train")
    assert layout.key(tmp_path / "train" / "a") == "train/a"


def test_train_pattern_decides_labels_of_validation(tmp_path):
    """Though validation is detected, and lacks the first class."""
    make(tmp_path, "training/a/1.jpg", "training/b/1.jpg", "val/b/2.jpg")
    assert open_split(tmp_path, "validation", train_pattern="training").labels.tolist() == [1]


def test_class_that_is_a_link_to_nothing_is_refused(tmp_path):
    """Without it the classes behind it would take other labels."""
    make(tmp_path, "train/b/1.jpg")
    (tmp_path / "train" / "a").symlink_to(tmp_path / "unmounted")
    assert "train/a is a link to nothing" in failure_of(lambda: open_split(tmp_path))


def test_cache_notices_what_came_while_it_was_made(tmp_path):
    """Stamps are those before the scan."""
    make(tmp_path, "train/a/1.jpg")
    layout, paths = find_split(DataConfig(data_dir=str(tmp_path)), "train")
    stamps = take_stamps(paths, layout)
    index = join(paths, [scan_shard(path, layout) for path in paths], layout)
    touch(paths[0], 5)
    save_cache(tmp_path / "cache.npz", index, stamps)
    assert not load_cache(tmp_path / "cache.npz", paths, layout)[0].unchanged
    save_cache(tmp_path / "cache.npz", index, take_stamps(paths, layout))
    assert load_cache(tmp_path / "cache.npz", paths, layout)[0].unchanged
