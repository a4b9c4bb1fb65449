"""What `prepare` reads, which records it takes, what it writes, and what it says where it cannot."""

import io
import json
import re
import shutil
import sys
import tarfile

import numpy as np
import pyarrow
import pytest
import raw_sets
from pyarrow import parquet
from raw_sets import WNIDS, encode
from support import failure_of

from hvd_vgg.commands.prepare import prepare
from hvd_vgg.config import PrepareConfig
from hvd_vgg.data import manifest
from hvd_vgg.data.conversion.pictures import Encoding, make_picture
from hvd_vgg.data.conversion.sources import count_classes, find_source, select
from hvd_vgg.data.formats.example import parse_features, parse_text
from hvd_vgg.data.index import join, scan_split
from hvd_vgg.data.reader import read_image, read_record
from hvd_vgg.errors import CONFIGURATION, DATA, USAGE, Failure
from hvd_vgg.flags import parse_flags
from hvd_vgg.run_dir import lock_run_dir

ROWS = raw_sets.images()
MAKE = {
    "folders": raw_sets.write_folders,
    "ilsvrc": raw_sets.write_ilsvrc,
    "parquet": raw_sets.write_parquet,
    "webdataset": raw_sets.write_webdataset,
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """The same images in each layout."""
    root = tmp_path_factory.mktemp("sets")
    for name, write in MAKE.items():
        write(root / name, ROWS)
    return root


def run(source, out, **flags):
    """Prepares and returns {split: [(label, file's name, bytes)]} in order."""
    prepare(
        PrepareConfig(
            source=str(source), out=str(out), console="lines", **{"train_shards": 3, "validation_shards": 2, **flags}
        )
    )
    return {split: contents(out, split) for split in flags.get("splits", ("train", "validation"))}


def contents(out, split):
    index, rows = scan_split(str(out), split), []
    for record in range(index.records):
        data, length = read_record(index, record), int(index.lengths[record])
        encoded, label = parse_features(data, length)
        rows.append((label, parse_text(data, length, b"image/filename").decode(), encoded))
    return rows


def expected(split):
    return [(WNIDS.index(wnid) + 1, name, data) for wnid, name, data in ROWS[split]]


def refused(code, action):
    with pytest.raises(Failure) as raised:
        action()
    assert raised.value.code == code
    return raised.value.message


@pytest.mark.parametrize("kind", MAKE)
def test_prepare_keeps_every_byte(sets, tmp_path, kind):
    """Of images, with their labels from 1 and names; nothing but the set, its names and its manifest is left."""
    found = run(sets / kind, tmp_path / "out")
    for split in ROWS:
        rows = [row if kind != "webdataset" else (row[0], row[2]) for row in expected(split)]
        assert sorted(row if kind != "webdataset" else (row[0], row[2]) for row in found[split]) == sorted(rows)
    if kind in ("parquet", "webdataset"):
        assert [row[2] for row in found["train"]] == [row[2] for row in expected("train")]  # in the source's order
    names = {path.name for path in (tmp_path / "out").iterdir() if ".hvd" not in path.name}
    shards = {f"{split}-{i:05d}-of-{n:05d}" for split, n in (("train", 3), ("validation", 2)) for i in range(n)}
    assert names == shards | {"manifest.json"} | ({"classes.txt"} if kind != "webdataset" else set())


def test_prepare_gives_the_usual_features(sets, tmp_path):
    """Those of imagenet_to_gcs.py, TensorFlow's own protobuf says."""
    import tensorflow as tf

    run(sets / "ilsvrc", tmp_path / "out")
    index = scan_split(str(tmp_path / "out"), "validation")
    features = tf.train.Example.FromString(read_record(index, 0)[:-4]).features.feature
    found = {name: [*f.bytes_list.value, *f.int64_list.value][0] for name, f in features.items() if name != "image/encoded"}
    wnid, name, _ = ROWS["validation"][0]
    assert found == {
        "image/format": b"JPEG",
        "image/height": 40,
        "image/width": 48,
        "image/channels": 3,
        "image/colorspace": b"RGB",
        "image/filename": name.encode(),
        "image/class/label": WNIDS.index(wnid) + 1,
        "image/class/synset": wnid.encode(),
    }
    assert (tmp_path / "out" / "classes.txt").read_text().split() == list(WNIDS)


def shards_of(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name.startswith(("train-", "validation-"))}


def test_prepare_is_a_function_of_images_and_flags(sets, tmp_path):
    """Folders and archives of the same files give the same shards to train on, whatever the threads; the seed does not."""
    one, two, three = (tmp_path / name for name in "abc")
    run(sets / "folders", one, input_threads=1)
    run(sets / "ilsvrc", two, input_threads=5)
    run(sets / "ilsvrc", three, seed=2)
    train = [{name: data for name, data in shards_of(out).items() if name.startswith("train")} for out in (one, two, three)]
    assert train[0] == train[1] and train[0].keys() == train[2].keys() and train[0] != train[2]
    assert sorted(contents(three, "train")) == sorted(contents(one, "train")) != contents(one, "train")


def test_prepare_of_what_it_made_is_the_same(sets, tmp_path):
    """TFRecords in today's layout are a source too; class names come from classes.txt."""
    run(sets / "ilsvrc", tmp_path / "a")
    run(tmp_path / "a", tmp_path / "b")
    assert shards_of(tmp_path / "a") == shards_of(tmp_path / "b")
    assert (tmp_path / "a" / "classes.txt").read_bytes() == (tmp_path / "b" / "classes.txt").read_bytes()


def test_prepare_takes_part_of_the_classes(sets, tmp_path):
    """Labels are numbered anew; the first records of each class are taken."""
    found = run(sets / "folders", tmp_path / "out", classes=("n01484850", "n01440764"), records_per_class=2)
    chosen = [WNIDS[0], WNIDS[2]]
    want = sorted(row for wnid in chosen for row in [r for r in expected("train") if r[1].startswith(wnid)][:2])
    assert sorted((label, name) for label, name, _ in found["train"]) == [
        (chosen.index(WNIDS[label - 1]) + 1, name) for label, name, _ in want
    ]
    made = manifest.read(tmp_path / "out")
    assert made.classes == tuple(chosen) and made.splits["train"].classes == (2, 2)


def test_prepare_finds_classes_by_the_first_of_their_names(tmp_path):
    """Names of Hugging Face have commas; where two begin alike, neither is meant."""
    names = ["tench, Tinca tinca", "crane", "crane, machine", "drake", "kite, a", "kite, b"]
    features = {"picture": {"_type": "Image"}, "fine": {"names": names, "_type": "ClassLabel"}}
    noted = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    rows = [{"bytes": encode(i), "path": None} for i in range(6)]
    table = pyarrow.table({"picture": rows, "fine": list(range(6))}).replace_schema_metadata(noted)
    parquet.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    flags = {"splits": ("train",), "train_shards": 1}
    found = run(tmp_path, tmp_path / "out", classes=("crane", "tench"), **flags)
    assert [row[2] for row in found["train"]] == [rows[0]["bytes"], rows[1]["bytes"]]
    assert (tmp_path / "out" / "classes.txt").read_text() == "tench, Tinca tinca\ncrane\n"
    text = failure_of(lambda: run(tmp_path, tmp_path / "other", classes=("kite",), **flags))
    assert "has several classes kite" in text
    assert "has no class kiwi; its 6 classes are" in failure_of(
        lambda: run(tmp_path, tmp_path / "x", classes=("kiwi",), **flags)
    )


@pytest.mark.parametrize(
    ("splits", "name"), [(("train",), "ILSVRC2012_img_train.tar"), (("validation",), "ILSVRC2012_img_val.tar")]
)
def test_prepare_takes_one_file(sets, tmp_path, splits, name):
    """With --splits of one; otherwise the other one is missing, which is no silence."""
    found = run(sets / "ilsvrc" / name, tmp_path / "out", splits=splits)
    assert sorted(found[splits[0]]) == sorted(expected(splits[0]))
    text = failure_of(lambda: run(sets / "ilsvrc" / name, tmp_path / "other"))
    assert f"{name} is one file, and --splits=train,validation are two" in text


@pytest.mark.parametrize("kind", MAKE)
def test_prepare_without_validation_is_refused(tmp_path, kind):
    """Though it is all the same to whoever converts train first; the message says how."""
    MAKE[kind](tmp_path / "set", ROWS)
    for path in (tmp_path / "set").rglob("*val*"):
        if path.is_file():
            path.unlink()
    for path in sorted((tmp_path / "set").rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    text = failure_of(lambda: run(tmp_path / "set", tmp_path / "out"))
    assert text.startswith("data: ") and text.endswith(". Or convert --splits=train alone"), text
    assert "hvd-vgg prepare" not in text and ("no validation-*.parquet" in text) == (kind == "parquet")
    assert run(tmp_path / "set", tmp_path / "out", splits=("train",))


LABELS = {
    "caffe": ("labels.txt", "".join(f"{name} {WNIDS.index(wnid)}\n" for wnid, name, _ in reversed(ROWS["validation"]))),
    "wnids": ("labels.txt", "".join(f"{wnid}\n" for wnid, _, _ in ROWS["validation"])),
}


@pytest.mark.parametrize("kind", [*LABELS, "kit directory"])
def test_prepare_reads_each_list_of_labels(sets, tmp_path, kind):
    """Caffe's, WNIDs in order of the names, and the development kit, whose own numbers are not in WNID order."""
    path = tmp_path / "labels.txt"
    if kind == "kit directory":
        with tarfile.open(sets / "ilsvrc" / "ILSVRC2012_devkit_t12.tar.gz") as archive:
            for member in archive.getmembers():
                target = tmp_path / "kit" / "data" / member.name.rpartition("/")[2]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.extractfile(member).read())
        path = tmp_path / "kit"
    else:
        path.write_text(LABELS[kind][1])
    found = run(sets / "ilsvrc", tmp_path / "out", validation_labels=str(path))
    assert found["validation"] == expected("validation")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("490\n361\n", "has '490'; numbers of the development kit mean nothing without its meta.mat. Expected one of"),
        ("n01440764\nn01443537\n", "ILSVRC2012_img_val.tar has 6 images, and"),
        ("n01440764\n" * 5 + "n99999999\n", "label n99999999 of 'ILSVRC2012_val_00000006.JPEG' is none of the 3 classes"),
        (LABELS["caffe"][1].replace("JPEG 2", "JPEG 3"), "is none of the 3 classes, sorted by WNID"),
        (
            LABELS["caffe"][1].replace("00000003.JPEG", "00000009.JPEG"),
            "lacks 1 of its images: ILSVRC2012_val_00000003.JPEG",
        ),
        (
            re.sub(r"\d$", lambda found: str(int(found[0]) + 1), LABELS["caffe"][1], flags=re.M),
            "has labels from 1; expected",
        ),
        ("", "has 'nothing'. Expected one of"),
        ("a b c\n", "has 'a b c'. Expected one of"),
    ],
    ids=["kit", "short", "foreign", "beyond", "name", "from 1", "empty", "words"],
)
def test_prepare_refuses_other_labels(sets, tmp_path, text, message):
    (tmp_path / "labels.txt").write_text(text)
    found = failure_of(lambda: run(sets / "ilsvrc", tmp_path / "out", validation_labels=str(tmp_path / "labels.txt")))
    assert message in found and "labels.txt" in found


@pytest.mark.parametrize("kind", ["folders", "parquet", "webdataset"])
def test_prepare_refuses_a_list_beside_labels(sets, tmp_path, kind):
    (tmp_path / "labels.txt").write_text(LABELS["caffe"][1])
    text = failure_of(lambda: run(sets / kind, tmp_path / "out", validation_labels=str(tmp_path / "labels.txt")))
    assert "which has labels of its own. Leave out --validation_labels" in text


@pytest.mark.parametrize("listed", [True, False])
def test_prepare_takes_validation_unpacked_flat(tmp_path, listed):
    """Beside class directories: with a list of labels, or with the kit that lies there."""
    raw_sets.write_folders(tmp_path / "set", {"train": ROWS["train"]})
    (tmp_path / "set" / "val").mkdir()
    for _, name, data in ROWS["validation"]:
        (tmp_path / "set" / "val" / name).write_bytes(data)
    assert "is not beside it. Expected one of" in failure_of(lambda: run(tmp_path / "set", tmp_path / "none"))
    flags = {}
    if listed:
        (tmp_path / "labels").write_text(LABELS["caffe"][1])
        flags["validation_labels"] = str(tmp_path / "labels")
    else:
        kit = [raw_sets.KIT_IDS[row[0]] for row in ROWS["validation"]]
        raw_sets.write_kit(tmp_path / "set" / "ILSVRC2012_devkit_t12.tar.gz", kit)
    assert run(tmp_path / "set", tmp_path / "out", **flags)["validation"] == expected("validation")


def test_prepare_of_archives_needs_labels(tmp_path):
    """The kit beside them, or a flag."""
    raw_sets.write_ilsvrc(tmp_path / "set", ROWS)
    (tmp_path / "set" / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    text = failure_of(lambda: run(tmp_path / "set", tmp_path / "out"))
    assert "ILSVRC2012_devkit_t12.tar.gz is not beside it. Expected one of: Caffe's list" in text


def test_prepare_converts_odd_images_and_lists_them(tmp_path):
    """CMYK, and PNG named JPEG; an honest PNG stays."""
    rows = {
        "train": [
            ("a", "1.JPEG", encode(1, mode="CMYK")),
            ("a", "2.JPEG", encode(2, "PNG")),
            ("a", "3.png", encode(3, "PNG")),
        ]
    }
    raw_sets.write_folders(tmp_path / "set", rows)
    found = run(tmp_path / "set", tmp_path / "out", splits=("train",), train_shards=1)
    assert sorted((name, data[:2]) for _, name, data in found["train"]) == [
        ("1.JPEG", b"\xff\xd8"),
        ("2.JPEG", b"\xff\xd8"),
        ("3.png", b"\x89P"),
    ]
    listed = [json.loads(line) for line in (tmp_path / "out" / "converted.jsonl").read_text().splitlines()]
    assert sorted((row["file"], row["reason"]) for row in listed) == [
        ("1.JPEG", "a CMYK JPEG"),
        ("2.JPEG", "a PNG named as a JPEG"),
    ]
    assert all(row["record"].startswith(str(tmp_path / "set")) for row in listed)
    assert manifest.read(tmp_path / "out").splits["train"].converted == 2
    plain = run(tmp_path / "set", tmp_path / "plain", splits=("train",), train_shards=1, rgb_jpeg=False)
    assert sorted(data for *_, data in plain["train"]) == sorted(row[2] for row in rows["train"])


def test_prepare_encodes_large_images_anew(tmp_path):
    """And no other; the record's height and width are the new ones."""
    rows = {"train": [("a", "1.jpg", encode(1, size=(96, 80))), ("a", "2.jpg", encode(2))]}
    raw_sets.write_folders(tmp_path / "set", rows)
    found = run(tmp_path / "set", tmp_path / "out", splits=("train",), shorter_side=40, quality=80, train_shards=1)
    data = {name: data for _, name, data in found["train"]}
    assert data["2.jpg"] == rows["train"][1][2]
    assert make_picture(data["1.jpg"], "", Encoding())[2:4] == (40, 48)
    assert manifest.read(tmp_path / "out").splits["train"].resized == 1


def test_prepare_refuses_bad_images_and_writes_all_others(tmp_path, capsys):
    """The list names them; the same command with the flag finishes without writing a shard again."""
    rows = {**ROWS, "train": [*ROWS["train"], (WNIDS[1], "bad.JPEG", b"no image"), (WNIDS[2], "page.JPEG", b"<html>")]}
    raw_sets.write_folders(tmp_path / "set", rows)
    out = tmp_path / "out"
    text = refused(DATA, lambda: run(tmp_path / "set", out))
    assert "no image that Pillow can open" in text and "2 records of this kind, listed in" in text
    assert text.endswith("the same command with --bad_records_allowed=2") and manifest.read(out) is None
    listed = [json.loads(line) for line in (out / "refused.jsonl").read_text().splitlines()]
    assert {row["record"].rpartition("/")[2] for row in listed} == {"bad.JPEG", "page.JPEG"}
    assert "with --bad_records_allowed=2" in refused(DATA, lambda: run(tmp_path / "set", out, bad_records_allowed=1))
    before = {path: path.stat().st_mtime_ns for path in out.glob("train-*")}
    found = run(tmp_path / "set", out, bad_records_allowed=2)
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("train-?????-of-?????")}
    assert sorted(found["train"]) == sorted(expected("train"))
    made = manifest.read(out).splits["train"]
    assert (made.records, made.refused, made.classes) == (12, 2, (4, 4, 4)) and not (out / ".prepare").exists()


def test_prepare_looks_again_at_what_it_refused(tmp_path):
    """The image may be whole by then, at the same size."""
    raw_sets.write_folders(tmp_path / "set", ROWS)
    path = next((tmp_path / "set" / "train").rglob("*.*"))
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole)))
    refused(DATA, lambda: run(tmp_path / "set", tmp_path / "out"))
    path.write_bytes(whole)
    assert sorted(run(tmp_path / "set", tmp_path / "out")["train"]) == sorted(expected("train"))


def test_manifest_counts_the_records_of_each_class(sets, tmp_path):
    run(sets / "folders", tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    made = json.loads(path.read_text())
    made["splits"]["train"]["classes"] = [3, 5, 4]
    path.write_text(json.dumps(made))
    index = scan_split(str(tmp_path / "out"), "train")
    sizes = {shard.name: shard.stat().st_size for shard in index.paths}
    text = failure_of(lambda: manifest.check_index(tmp_path / "out", "train", index, sizes, whole=True))
    assert "train has 4 records of label 1; manifest.json says 3" in text


def test_prepare_of_a_finished_set_says_so(sets, tmp_path, capsys):
    """And compares sizes; with other flags it is refused."""
    run(sets / "folders", tmp_path / "out")
    before = shards_of(tmp_path / "out")
    capsys.readouterr()
    run(sets / "folders", tmp_path / "out")
    assert "is finished: 12 records of train, 6 records of validation" in capsys.readouterr().out
    assert shards_of(tmp_path / "out") == before
    text = refused(CONFIGURATION, lambda: run(sets / "folders", tmp_path / "out", seed=2))
    assert "was begun with other flags" in text and "seed  1         2" in text
    text = refused(CONFIGURATION, lambda: run(sets / "webdataset", tmp_path / "out"))
    assert "was begun with other records or labels" in text
    shutil.copytree(sets / "folders", tmp_path / "moved")
    run(tmp_path / "moved", tmp_path / "out")
    shutil.rmtree(tmp_path / "moved")
    capsys.readouterr()
    run(tmp_path / "moved", tmp_path / "out")
    assert "moved is not there any more, and not compared" in capsys.readouterr().out
    shard = tmp_path / "out" / "train-00001-of-00003"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "train-00001-of-00003 has" in failure_of(lambda: run(sets / "folders", tmp_path / "out"))
    shard.unlink()
    assert "lacks train-00001-of-00003" in failure_of(lambda: run(sets / "folders", tmp_path / "out"))


@pytest.mark.parametrize("change", ["flags", "source", "foreign file"])
def test_prepare_goes_on_with_the_same_alone(tmp_path, change):
    """What was begun with other flags or of another source, or has files of somebody else, is refused."""
    rows = {"train": [("a", "1.jpg", b"bad"), ("a", "2.jpg", encode(2))]}
    raw_sets.write_folders(tmp_path / "set", rows)
    flags = {"splits": ("train",), "train_shards": 1}
    refused(DATA, lambda: run(tmp_path / "set", tmp_path / "out", **flags))
    if change == "flags":
        flags["shorter_side"] = 16
    elif change == "source":
        (tmp_path / "set" / "train" / "a" / "3.jpg").write_bytes(encode(3))
    else:
        (tmp_path / "out" / "notes.txt").write_text("mine")
    text = refused(CONFIGURATION, lambda: run(tmp_path / "set", tmp_path / "out", **flags))
    assert (
        "has 'notes.txt', which prepare did not make" if change == "foreign file" else "was begun with other flags, soft"
    ) in text


def test_prepare_writes_into_no_directory_of_others(sets, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    text = refused(CONFIGURATION, lambda: run(sets / "folders", tmp_path))
    assert "has notes.txt, which prepare did not make. Choose an empty directory" in text.replace("'", "")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("made", [False, True])
def test_prepare_leaves_nothing_of_a_wrong_flag(sets, tmp_path, made):
    """A typo in --classes, after which the right command finds an --out as it was."""
    out = tmp_path / "out"
    if made:
        out.mkdir()
    assert "has no class n0144" in failure_of(lambda: run(sets / "folders", out, classes=("n0144",)))
    assert not list(out.iterdir()) if made else not out.exists()


def test_prepare_names_the_out_that_is_in_use(sets, tmp_path):
    """As it was given."""
    out = tmp_path / "out"
    (out / ".prepare").mkdir(parents=True)
    with lock_run_dir(out / ".prepare"):
        text = refused(CONFIGURATION, lambda: run(sets / "folders", out))
    assert f"--out={out} is in use by another job" in text


def test_prepare_removes_its_own_files_alone(sets, tmp_path):
    """Half a shard of a killed start, and no other .tmp."""
    folder = tmp_path / "out" / ".prepare"
    folder.mkdir(parents=True)
    for name in ("mine.tmp", f"train-00000-of-00003.{'a1' * 16}.tmp", f"text.{'0f' * 16}.tmp"):
        (folder / name).write_text("x")
    run(sets / "folders", tmp_path / "out")
    assert [path.name for path in folder.iterdir()] == ["mine.tmp"]


def test_prepare_warns_of_classes_that_a_split_lacks(tmp_path, capsys):
    """By name."""
    rows = {**ROWS, "validation": [row for row in ROWS["validation"] if row[0] != WNIDS[1]]}
    raw_sets.write_folders(tmp_path / "set", rows)
    run(tmp_path / "set", tmp_path / "out", classes=(WNIDS[0], WNIDS[1]))
    assert f"warning: validation has no record of 1 class: {WNIDS[1]}" in capsys.readouterr().out


def test_prepare_of_one_record_is_in_the_singular(tmp_path, capsys):
    raw_sets.write_folders(tmp_path / "set", {"train": ROWS["train"][:1]})
    run(tmp_path / "set", tmp_path / "out", splits=("train",))
    printed = capsys.readouterr().out
    assert "train: 1 record of " in printed and "\n1 class, labels from 1" in printed
    assert re.search(r"^1 record in 1 shard, [0-9.]+ k?B|^1 record in 1 shard, [0-9]+ bytes", printed, re.M)
    run(tmp_path / "set", tmp_path / "out", splits=("train",))
    assert "is finished: 1 record of train. " in capsys.readouterr().out


def test_prepare_says_whose_classes_it_counts(sets, tmp_path, capsys):
    """Where train is not there to say which there are."""
    (tmp_path / "set").mkdir()
    shutil.copy(sets / "ilsvrc" / "ILSVRC2012_img_val.tar", tmp_path / "set")
    (tmp_path / "set" / "list").write_text(LABELS["wnids"][1])
    flags = {"splits": ("validation",), "validation_labels": str(tmp_path / "set" / "list")}
    run(tmp_path / "set", tmp_path / "out", **flags)
    text = f"validation: train is not there, so labels are numbers of the 3 classes that {tmp_path}/set/list lists"
    assert text in capsys.readouterr().out
    run(sets / "ilsvrc", tmp_path / "other", **flags)
    assert "train is not there" not in capsys.readouterr().out


def test_file_that_cannot_be_read_is_no_bad_image(sets, tmp_path):
    """It ends the command by name, with 65; nothing is listed as refused."""
    shutil.copytree(sets / "folders", tmp_path / "set")
    config = PrepareConfig(source=str(tmp_path / "set"))
    source = find_source(config, "train")
    index = join(source.paths, [source.scan(number) for number in range(len(source.paths))], source.layout)
    (split,) = select(config, [("train", source, index)]).splits
    index.path_of(1).unlink()
    text = refused(DATA, lambda: split.read(1))
    assert text.startswith(f"data: {index.path_of(1)}: it cannot be read: No such file") and split.read(0)[0]


def test_prepare_in_two_layouts_is_refused(tmp_path):
    """Until a flag says which."""
    raw_sets.write_folders(tmp_path / "set", ROWS)
    raw_sets.write_ilsvrc(tmp_path / "set", ROWS)
    text = failure_of(lambda: run(tmp_path / "set", tmp_path / "out"))
    assert "train data in several layouts: archives of ILSVRC2012 (--data_format=ilsvrc)" in text
    assert run(tmp_path / "set", tmp_path / "out", data_format="ilsvrc")["validation"] == expected("validation")


@pytest.mark.parametrize(
    ("module", "kind", "message"),
    [
        ("pyarrow", "parquet", "pip install pyarrow"),
        ("scipy.io", "ilsvrc", "pip install scipy"),
        ("PIL", "folders", "pip install --no-deps pillow"),
    ],
)
def test_prepare_without_a_library_says_which(sets, tmp_path, monkeypatch, module, kind, message):
    for name in [name for name in sys.modules if name == module or name.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    text = refused(CONFIGURATION, lambda: run(sets / kind, tmp_path / "out"))
    assert message in text and "\n" not in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--source=a", "--out=a/b"], "--out=a/b: expected a directory outside --source"),
        (["--source=a", "--splits=test"], "--splits=test: expected one of train, validation"),
        (["--source=a", "--splits="], "--splits is empty"),
        (["--source=a", "--quality=80"], "--quality=80 needs --shorter_side"),
        (["--source=a", "--train_shards=0"], "--train_shards=0: expected at least 1"),
        (["--source=a", "--splits=train", "--validation_labels=b"], "--validation_labels needs --splits with validation"),
        (["--source=a", "--data_format=mds"], "--data_format=mds: expected one of auto, imagenet"),
        (["--source=a", "--train_pattern=/etc/*"], "--train_pattern=/etc/*: expected names below"),
        (["--source=s3://a"], "files are not read from s3:// storage"),
    ],
)
def test_prepare_flags_that_cannot_run_are_refused(flags, message):
    assert message in refused(USAGE, lambda: parse_flags(PrepareConfig, flags))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"image": [{"bytes": b"x", "path": "a"}]}, "has no column label; it has image"),
        ({"image": ["x"], "label": [1]}, "column image is string; expected image {bytes, path}, or bytes"),
        ({"image": [b"x"], "label": ["a"]}, "column label is string; expected integers"),
        ({"image": [b"x", b"y"], "label": pyarrow.array([1, None], pyarrow.int64())}, "has 1 labels for 2 rows"),
        ({"image": [b"x"], "label": [2**40]}, "row 0: label 1099511627776"),
        ({"image": [b"x"], "label": [-1]}, "row 0: label -1 is outside 0.."),
    ],
)
def test_prepare_refuses_other_parquet(tmp_path, table, message):
    parquet.write_table(pyarrow.table(table), tmp_path / "train-00000-of-00001.parquet")
    assert message in failure_of(lambda: run(tmp_path, tmp_path / "out", splits=("train",)))


def test_prepare_of_splits_with_other_classes_is_refused(tmp_path):
    """Where both have names: a label would mean two classes."""
    for split, names in (("train", ["a", "b"]), ("validation", ["b", "a"])):
        noted = json.dumps({"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}).encode()
        table = pyarrow.table({"image": [encode(1)], "label": [0]}).replace_schema_metadata({b"huggingface": noted})
        parquet.write_table(table, tmp_path / f"{split}-00000-of-00001.parquet")
    assert "the splits name their classes differently" in failure_of(lambda: run(tmp_path, tmp_path / "out"))
    assert run(tmp_path, tmp_path / "out", splits=("validation",))["validation"][0][:1] == (1,)


def test_prepare_takes_archives_of_other_names(sets, tmp_path):
    """By patterns, with --data_format."""
    for name in ("train", "val"):
        (tmp_path / f"my_{name}.tar").symlink_to(sets / "ilsvrc" / f"ILSVRC2012_img_{name}.tar")
    (tmp_path / "labels").write_text(LABELS["wnids"][1])
    flags = {"train_pattern": "my_train.tar", "validation_pattern": "my_val.tar", "data_format": "ilsvrc"}
    found = run(tmp_path, tmp_path / "out", validation_labels=str(tmp_path / "labels"), **flags)
    assert found["validation"] == expected("validation") and len(found["train"]) == 12


def test_prepare_refuses_rows_without_an_image(tmp_path):
    """A path alone is not followed: it would lead out of the data set."""
    rows = [{"bytes": None, "path": "/etc/hostname"}, {"bytes": encode(1), "path": "../../a\\b/c.jpg"}]
    parquet.write_table(pyarrow.table({"image": rows, "label": [0, 1]}), tmp_path / "train-00000-of-00001.parquet")
    found = run(tmp_path, tmp_path / "out", splits=("train",), bad_records_allowed=1, train_shards=1)
    assert found["train"] == [(2, "c.jpg", encode(1))]
    assert "row 0" in (tmp_path / "out" / "refused.jsonl").read_text()


def test_prepare_wants_all_files_of_a_set(tmp_path):
    raw_sets.write_parquet(tmp_path, ROWS, files=3)
    (tmp_path / "data" / "train-00001-of-00003.parquet").unlink()
    assert "lacks 1 of its 3 files: train-00001-of-00003" in failure_of(lambda: run(tmp_path, tmp_path / "out"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("README", b"x")], "has 'README' in it; expected one WNID.tar for each class"),
        ([("a.tar", raw_sets.tar_of([("1.txt", b"x")]))], "a.tar has '1.txt'; expected images alone"),
        ([("a.tar", raw_sets.tar_of([("1.JPEG", b"")]))], "a.tar: '1.JPEG' has 0 bytes; expected 1 to"),
        ([("a.tar", raw_sets.tar_of([]))], "a.tar has no image"),
        ([("a.tar", b"x" * 1024)], "not a whole tar archive"),
        ([("a.tar", raw_sets.tar_of([("x/1.JPEG", b"x"), ("y/1.JPEG", b"y")]))], "has images of equal names (1)"),
        ([], "has nothing in it"),
    ],
)
def test_prepare_refuses_other_archives(tmp_path, rows, message):
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(raw_sets.tar_of(rows))
    config = PrepareConfig(source=str(tmp_path), splits=("train",))

    def look():
        source = find_source(config, "train")
        return [source.scan(number) for number in range(len(source.paths))]

    assert message in failure_of(look)


def test_archive_cut_off_is_one_message(sets, tmp_path):
    """As a download that ended early."""
    data = (sets / "ilsvrc" / "ILSVRC2012_img_train.tar").read_bytes()
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(data[: len(data) * 2 // 3])
    text = failure_of(lambda: run(tmp_path, tmp_path / "out", splits=("train",)))
    assert "not a whole tar archive" in text and "Copy the file again" in text


@pytest.mark.parametrize("kind", ["folders", "imagenet", "tfds", "webdataset", "parquet", "ilsvrc"])
def test_prepare_reads_what_the_usual_writers_wrote(layouts, tmp_path, kind):
    """The same images and labels, whichever library wrote them; one is a PNG, which the archives call JPEG."""
    prepare(
        PrepareConfig(source=str(layouts / kind), out=str(tmp_path), console="lines", train_shards=2, validation_shards=1)
    )
    for split, folder in (("train", "train"), ("validation", "val")):
        order = json.loads((layouts / "folders.json").read_text())[folder]
        want = sorted((label + 1, (layouts / "folders" / folder / name).read_bytes()) for name, label in order)
        found = sorted((label, data) for label, _, data in contents(tmp_path, split))
        if kind == "ilsvrc":
            assert [label for label, _ in found] == [label for label, _ in want]
            want = [row for row in want if row[1][:2] == b"\xff\xd8"]
        assert set(want) <= set(found) and len(found) == len(order)
    made = manifest.read(tmp_path).splits["train"]
    assert made.converted == (kind == "ilsvrc") and made.classes == (6, 6, 6)


def test_prepared_set_is_compared_when_it_is_opened(sets, tmp_path):
    """A shard that lost a record between two others is whole for the index; the manifest names it."""
    run(sets / "folders", tmp_path)
    index, path = scan_split(str(tmp_path), "train"), tmp_path / "train-00001-of-00003"
    sizes = {shard.name: shard.stat().st_size for shard in index.paths}
    manifest.check_index(tmp_path, "train", index, sizes, whole=True)
    first, second = index.starts[1], index.starts[1] + 1
    path.write_bytes(path.read_bytes()[int(index.offsets[second] - index.offsets[first]) :])
    index, sizes = scan_split(str(tmp_path), "train"), {**sizes, path.name: path.stat().st_size}
    text = failure_of(lambda: manifest.check_index(tmp_path, "train", index, sizes, whole=True))
    assert f"{path} has" in text and "and 3 records; manifest.json says" in text and "and 4 records" in text


def test_count_classes_counts_labels_from_1():
    assert count_classes(np.array([1, 3, 3]), 4) == [1, 0, 2, 0]
    assert count_classes(np.array([], np.int64), 2) == [0, 0]


def test_prepared_records_are_read_by_training(sets, tmp_path):
    """Label and image, by the reader of training."""
    run(sets / "parquet", tmp_path / "out")
    index = scan_split(str(tmp_path / "out"), "train")
    assert read_image(index, 0) == (ROWS["train"][0][2], 1)
    assert io.BytesIO(read_image(index, 0)[0]).read(2) == b"\xff\xd8"
