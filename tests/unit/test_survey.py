"""What is known of records and of a data set: counts that are known beforehand, whatever the layout; the sheet's images."""

import io
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from support import example, picture, survey_alone, write_shard

from hvd_vgg.commands.inspect_report import format_summary
from hvd_vgg.config import DataConfig, ImageConfig, TrainConfig
from hvd_vgg.data.classes import class_names
from hvd_vgg.data.formats.example import encode_example
from hvd_vgg.data.formats.layout import find_split
from hvd_vgg.data.index import join, scan_shard
from hvd_vgg.data.loader import Dataset, eval_batches, train_batches
from hvd_vgg.data.sheet import draw_sheet, sheet_rows, training_images
from hvd_vgg.data.summary import MOST_NAMED, first_equal, summarize
from hvd_vgg.data.survey import ROW, describe_image

CONFIG = ImageConfig(num_classes=4, image_size=32)


def encoded(mode, kind, height=40, width=48, seed=0):
    """Returns an image as Pillow writes it."""
    pixels = np.random.default_rng(seed).integers(0, 255, [height // 8, width // 8, 3], np.uint8).repeat(8, 0).repeat(8, 1)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


def mended(seed):
    """Returns a JPEG with zeros in its data, which the decoder fills up."""
    whole = picture(seed, seed, 80, 96)
    middle = len(whole) // 2
    return whole[:middle] + bytes(40) + whole[middle + 40 :]


# Images with labels of the classes 1 to 4, of which train lacks the last.
TRAIN = [
    (picture(1, 1), 1),
    (encoded("RGB", "PNG", 48, 40), 1),
    (encoded("CMYK", "JPEG", seed=1), 2),
    (picture(1, 1), 3),  # as the first, with another label
    (encoded("L", "JPEG", 32, 400), 2),
    (picture(2, 2, 80, 96)[:700], 2),  # cut off: not decoded
    (mended(3), 3),
    (b"GIF89a no image", 1),
    (picture(4, 4), 1),
    (picture(4, 4), 1),
]
VALIDATION = [(picture(5, 5), 1), (picture(4, 4), 1), (picture(6, 6), 4), (encoded("CMYK", "JPEG", seed=1), 3)]


def write_imagenet(folder):
    for split, rows in (("train", TRAIN), ("validation", VALIDATION)):
        write_shard(folder / f"{split}-00000-of-00002", [example(image, label) for image, label in rows[:3]])
        write_shard(folder / f"{split}-00001-of-00002", [example(image, label) for image, label in rows[3:]])


def write_webdataset(folder):
    for split, rows in (("train", TRAIN), ("validation", VALIDATION)):
        with tarfile.open(folder / f"{split}-0000.tar", "w") as archive:
            for number, (image, label) in enumerate(rows):
                for suffix, data in (("jpg", image), ("cls", str(label - 1).encode())):
                    member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    (folder / "classes.txt").write_text("one\ntwo\nthree\nfour\n")


def write_folders(folder):
    """Directories of a class are its labels' order; train has an image more of the last class, as it must have one."""
    more = [(picture(7, 7), 4)]
    for split, rows in (("train", TRAIN + more), ("val", VALIDATION)):
        for number, (image, label) in enumerate(rows):
            place = folder / split / ("", "a_one", "b_two", "c_three", "d_four")[label]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:04d}.jpg").write_bytes(image)


def survey(folder, split):
    return survey_alone(folder, split, CONFIG)


def summary_of(folder, label_base):
    train = survey(folder, "train")
    return summarize(train, survey(folder, "validation"), 4, label_base, class_names(train.split, label_base, 4))


def test_summary_counts_are_exact(tmp_path, capfd):
    """Bad and mended records, formats, classes, sizes, duplicates: all are known beforehand."""
    write_imagenet(tmp_path)
    found = summary_of(tmp_path, 1)
    train, validation = found["splits"]["train"], found["splits"]["validation"]
    first, second = (f"{tmp_path}/train-0000{number}-of-00002" for number in (0, 1))
    assert (train["layout"], train["shards"], train["records"], validation["records"]) == ("imagenet", 2, 10, 4)
    assert train["image_bytes"] == sum(len(image) for image, _ in TRAIN)
    assert train["classes"] == {
        "present": 3,
        "least": {"records": 2, "labels": 1, "first": ["3"]},
        "most": {"records": 5, "labels": 1, "first": ["1"]},
        "missing": {"labels": 1, "first": ["4"]},
        "outside": {"records": 0, "labels": 0, "first": []},
        "records": [5, 3, 2, 0],
    }
    assert {(row["format"], row["mode"]): row["records"] for row in train["formats"]} == {
        ("JPEG", "RGB"): 6,
        ("PNG", "RGB"): 1,
        ("JPEG", "CMYK"): 1,
        ("JPEG", "L"): 1,
        ("other", ""): 1,
    }
    assert train["sizes"]["shorter_side"] == {"least": 32, "median": 40, "most": 80}
    assert train["sizes"]["area"] == {"least": 1920, "median": 1920, "most": 12800}
    assert train["sizes"]["smallest"] == {"height": 40, "width": 48, "where": f"{first}, record 0, offset 0"}
    assert train["sizes"]["largest"]["where"].startswith(f"{second}, record 1, ")
    assert train["bad"]["records"] == 2
    for text, part in zip(train["bad"]["first"], ("record 2, ", "record 4, ")):
        assert text.startswith(f"data: {second}, {part}")
    assert train["mended"]["records"] == 1
    assert train["mended"]["first"][0].startswith(f"{second}, record 3, ") and "mended" in train["mended"]["first"][0]
    assert (train["duplicates"]["records"], train["duplicates"]["with_another_label"]) == (2, 1)
    assert train["duplicates"]["first"][0][1] == f"{first}, record 0, offset 0"
    shared = found["validation_in_train"]
    assert (shared["records"], shared["with_another_label"], len(shared["first"])) == (2, 1, 2)
    assert [pair[1].split(", offset")[0] for pair in shared["first"]] == [f"{second}, record 5", f"{first}, record 2"]
    assert validation["bad"]["records"] == validation["duplicates"]["records"] == 0
    assert found["labels_of_train_alone"] == {"labels": 1, "first": ["2"]}
    assert found["labels_of_validation_alone"] == {"labels": 1, "first": ["4"]}
    assert "Corrupt JPEG" not in capfd.readouterr().err  # it is in the summary, with a name
    text = format_summary(found)
    for line in (
        "  classes      3 of --num_classes=4, the first label is 1; least 2 (3), most 5 (1)",
        "  missing      1 label: 4",
        "  formats      6 JPEG RGB, 1 JPEG CMYK, 1 JPEG L, 1 PNG RGB, 1 other",
        "  bad          2 records",
        "  duplicates   2 records whose image occurs before in the split, 1 under another label",
        "  shared       2 records of validation whose image is in train too, 1 under another label",
        "  labels       1 label of validation without records in train; they count as misses: 4",
    ):
        assert line in text.splitlines()


def without_places(value):
    """Returns a summary without what depends on the layout: places, bytes of what is around images, labels' base."""
    if isinstance(value, dict):
        own = {"where", "first", "layout", "shards", "bytes", "label_base"}
        return {name: without_places(each) for name, each in value.items() if name not in own}
    return [without_places(each) for each in value] if isinstance(value, list) else value


def test_summary_of_webdataset_is_that_of_tfrecords(tmp_path):
    """Whose classes have names."""
    for name, write in (("imagenet", write_imagenet), ("tars", write_webdataset)):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
    found = summary_of(tmp_path / "tars", 0)
    assert without_places(found) == without_places(summary_of(tmp_path / "imagenet", 1))
    assert found["splits"]["train"]["classes"]["missing"]["first"] == ["3 four"]
    assert found["labels_of_train_alone"]["first"] == ["1 two"]


def test_summary_of_class_folders(tmp_path):
    """Records are named by their files; `DIR/val` is validation."""
    write_folders(tmp_path)
    found = summary_of(tmp_path, 0)
    train = found["splits"]["train"]
    assert (train["layout"], train["shards"], train["records"]) == ("folders", 4, 11)
    assert train["classes"]["records"] == [5, 3, 2, 1]
    assert train["classes"]["most"]["first"] == ["0 a_one"]
    assert [text.split(": ")[1] for text in train["bad"]["first"]] == [
        f"{tmp_path}/train/a_one/0007.jpg",
        f"{tmp_path}/train/b_two/0005.jpg",
    ]
    pairs = found["validation_in_train"]["first"]
    assert pairs[0] == [f"{tmp_path}/val/a_one/0001.jpg", f"{tmp_path}/train/a_one/0008.jpg"]
    assert "11 records in 4 directories, a directory of images for each class" in format_summary(found)


@pytest.mark.parametrize("known", ["records", "file"])
def test_summary_names_classes_of_tfrecords(tmp_path, known):
    """As the records name them, up to a comma, or as classes.txt does."""
    features = {"image/class/label": 1, "image/encoded": picture(1, 1)}
    if known == "records":
        features["image/class/text"] = b"one, first"
    for split in ("train", "validation"):
        write_shard(tmp_path / f"{split}-00000-of-00001", [encode_example(features)])
    if known == "file":
        (tmp_path / "classes.txt").write_text("one\ntwo\n")
    found = summary_of(tmp_path, 1)["splits"]["train"]["classes"]
    assert found["most"]["first"] == ["1 one"]
    assert found["missing"]["first"] == (["2", "3", "4"] if known == "records" else ["2 two", "3", "4"])


def test_summary_of_one_record_is_in_the_singular(tmp_path):
    for split in ("train", "validation"):
        write_shard(tmp_path / f"{split}-00000-of-00001", [example(picture(1, 1), 1)])
    text = format_summary(summary_of(tmp_path, 1))
    assert "train: 1 record in 1 shard, " in text and "; 1 record each" in text and " 1 bytes" not in text


def test_summary_names_no_more_than_some(tmp_path):
    """All are counted."""
    rows = [example(picture(0, 1), number % 4 + 1) for number in range(MOST_NAMED + 5)]
    for split in ("train", "validation"):
        write_shard(tmp_path / f"{split}-00000-of-00001", rows)
    found = summary_of(tmp_path, 1)
    duplicates = found["splits"]["train"]["duplicates"]
    assert (duplicates["records"], len(duplicates["first"])) == (MOST_NAMED + 4, MOST_NAMED)
    assert found["validation_in_train"]["records"] == MOST_NAMED + 5
    text = format_summary(found)
    assert f"      and {MOST_NAMED + 4 - 5} more\n" in text and text.count(" = ") == 15  # 5 of each kind


def test_summary_of_nothing_readable(tmp_path):
    """A data set whose every image is bad still has classes and records."""
    for split in ("train", "validation"):
        write_shard(tmp_path / f"{split}-00000-of-00001", [example(b"no image", 1), example(b"nor this", 9)])
    found = summary_of(tmp_path, 1)
    train = found["splits"]["train"]
    assert (train["sizes"], train["bad"]["records"]) == ({}, 2)
    assert train["classes"]["outside"] == {"records": 1, "labels": 1, "first": ["9"]}
    assert "1 record with labels that training refuses: 9. Correct --num_classes" in format_summary(found)


def test_first_equal_is_that_of_all_pairs():
    """Against a plain loop; rows that could not be read are equal to none."""
    random = np.random.default_rng(0)
    rows = np.zeros(300, ROW)
    rows["digest"] = random.integers(0, 6, [300, 2]) * np.uint64(2**61)  # of which some differ in one half alone
    rows["bytes"] = random.integers(0, 5, 300)
    expected, seen = [], {}
    for number, row in enumerate(rows):
        expected.append(seen.setdefault(row["digest"].tobytes(), number) if row["bytes"] else number)
    assert first_equal(rows).tolist() == expected
    assert first_equal(rows[:0]).tolist() == []


@pytest.mark.parametrize(("mode", "kind"), [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG")])
def test_describe_image_of_damaged_headers(mode, kind):
    """Whatever is in them: nothing is raised, nothing is printed, and a sound one is described."""
    whole, random = encoded(mode, kind, 48, 40), np.random.default_rng(1)
    assert describe_image(whole) == (kind, mode, 48, 40)
    for _ in range(200):
        changed = bytearray(whole[: random.integers(0, len(whole))] if random.integers(2) else whole)
        for place in random.integers(0, max(1, min(len(changed), 200)), 3) if changed else ():
            changed[place] = random.integers(256)
        assert describe_image(bytes(changed))[0] in ("JPEG", "PNG", "")


# ---- the sheet


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """The index of a train split with two bad records."""
    folder = tmp_path_factory.mktemp("sheet")
    rows = [example(picture(number, number % 4), number % 4 + 1) for number in range(12)]
    rows[3], rows[8] = example(b"no image", 1), example(picture(1, 1)[:300], 2)
    write_shard(folder / "train-00000-of-00001", rows)
    layout, paths = find_split(DataConfig(data_dir=str(folder)), "train")
    return join(paths, [scan_shard(path, layout) for path in paths], layout)


@pytest.mark.parametrize("flags", [{}, {"augment": "shift", "auto_augment": "trivial", "random_erasing": 0.5}])
def test_training_images_are_those_of_batches(train, flags):
    """Of the same seed, epoch by epoch."""
    config = TrainConfig(global_batch=12, device_batch=12, image_size=32, seed=5, bad_records_allowed=9, **flags)
    dataset = Dataset(train, 1, 32, config, True, seed=5)
    views = {record: training_images(dataset, dataset.read(record), 3) for record in (0, 5, 11)}
    for epoch, batch in enumerate(train_batches(train, config, 1, range(3), 0, 1, 1)):
        replaced = {row.row for row in batch.bad}
        own = {record: row for row, record in enumerate(batch.ids.numpy().tolist()) if row not in replaced}
        for record, images in views.items():
            assert (batch.images.numpy()[own[record]] == images[epoch]).all(), (record, epoch)


def test_sheet_shows_the_first_records_of_training(train):
    """Pixel by pixel, each as a square of 4; bad records are left out; the same bytes again."""
    config = TrainConfig(global_batch=4, device_batch=4, image_size=32, seed=5)
    training, evaluation = (Dataset(train, 1, 32, config, True, seed=5), Dataset(train, 1, 32, config, False, 0.875))
    rows = sheet_rows(training, evaluation, 20, 2)
    assert len(rows) == 10
    png = draw_sheet(rows[:3])
    assert png == draw_sheet(rows[:3]) and png.startswith(b"\x89PNG")
    pixels = np.asarray(Image.open(io.BytesIO(png)))
    assert pixels.shape == (18 + 3 * (18 + 128 + 8), 4 * (128 + 8) + 8, 3)
    config = replace(config, bad_records_allowed=9)
    taken = []
    for batch in train_batches(train, config, 1, range(3), 0, 1, 1):
        replaced = {row.row for row in batch.bad}
        taken += [record for row, record in enumerate(batch.ids.numpy().tolist()) if row not in replaced]
    evaluated = np.concatenate([batch.images.numpy() for batch in eval_batches(train, config, 1, 0, 1, 1)])
    for number, row in enumerate(rows[:3]):
        top = 18 + number * (18 + 128 + 8) + 18
        tiles = [pixels[top : top + 128 : 4, left : left + 128 : 4] for left in range(8, 4 * 136, 136)]
        assert (tiles[1] == row.training[0]).all() and (tiles[2] == row.training[1]).all()
        assert f", record {taken[number]}, offset " in row.caption
        assert (tiles[3] == evaluated[taken[number]]).all()
    assert rows[0].original.shape == (40, 48, 3)
    (row,) = sheet_rows(training, evaluation, 1, 2, stored=False)  # as TensorBoard has it, beside the confusion matrix
    assert row.caption == rows[0].caption.replace(f"label {taken[0] % 4 + 1},", f"class {taken[0] % 4},")


@pytest.mark.parametrize("size", [224, 96])
def test_sheet_fits_images_of_other_shapes(train, size):
    """A record of another shape than a square, and an evaluation of another size than training, lie within their tile."""
    config = TrainConfig(image_size=size, seed=5)
    rows = sheet_rows(Dataset(train, 1, size, config, True, seed=5), Dataset(train, 1, 80, config, False, 0.9), 1, 1)
    pixels = np.asarray(Image.open(io.BytesIO(draw_sheet(rows))))
    assert pixels.shape == (18 + 18 + size + 8, 3 * (size + 8) + 8, 3)
    assert (pixels[-8:] == 255).all()
    assert (pixels[36, 8 : 8 + size] == 228).all()  # a record wider than high has grey above
