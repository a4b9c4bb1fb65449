"""`hvd-vgg inspect` on ranks: the same summary and sheet on any number of them, bad records named, wrong paths told."""

import json

import pytest
from support import example, full, picture, survey_alone, write_data, write_shard

from hvd_vgg import __main__
from hvd_vgg.config import InspectConfig
from hvd_vgg.data.classes import class_names
from hvd_vgg.data.loader import Dataset
from hvd_vgg.data.sheet import draw_sheet, sheet_rows
from hvd_vgg.data.summary import summarize

FLAGS = ["--num_classes=5", "--image_size=32", "--seed=7", "--out=sheet.png", "--json=found.json", "--sheet_records=4"]
CONFIG = InspectConfig(num_classes=5, image_size=32, seed=7)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Two splits of four of five classes, with bad records, and images that occur twice."""
    folder = tmp_path_factory.mktemp("damaged") / "data"
    folder.mkdir()
    rows = [example(picture(number, number % 4), number % 4 + 1) for number in range(23)]
    rows[2], rows[20], rows[9] = example(b"no image", 3), example(picture(1, 1)[:300], 1), rows[5]
    write_shard(folder / "train-00000-of-00002", rows[:9])
    write_shard(folder / "train-00001-of-00002", rows[9:])
    write_shard(folder / "validation-00000-of-00001", [*rows[5:7], example(picture(99, 3), 4)])
    return folder


def expected(folder):
    """Returns the summary and the sheet as this process makes them."""
    surveys = [survey_alone(folder, split, CONFIG) for split in ("train", "validation")]
    datasets = [
        Dataset(surveys[0].split, 1, 32, CONFIG, training, crop, seed=7) for training, crop in ((True, 0), (False, 0.875))
    ]
    names = class_names(surveys[0].split, 1, 5)
    return summarize(*surveys, 5, 1, names), draw_sheet(sheet_rows(*datasets, 4, 4, names))


@pytest.mark.fault("F24", "F25")
@pytest.mark.parametrize("ranks", [2, *full(0, 1, 3)])
def test_inspect_is_the_same_on_any_ranks(launch, tmp_path, damaged, ranks):
    """As one process finds it without ranks; bad records end it with 65, after all is written."""
    ended = launch(ranks, "inspect", str(damaged), *FLAGS, code=65)
    assert "Traceback" not in ended.err
    assert ended.err.count("hvd-vgg: inspect: 2 bad records, see above") == 1
    found, sheet = json.loads((tmp_path / "found.json").read_text()), (tmp_path / "sheet.png").read_bytes()
    assert found.pop("data_dir") == str(damaged)
    summary, image = expected(damaged)
    assert found == summary
    assert sheet == image
    assert found["splits"]["train"]["bad"]["records"] == 2
    for line in (
        "train: 23 records in 2 shards, TFRecords in ImageNet's layout; ",
        "  classes      4 of --num_classes=5, the first label is 1; least 5 (",
        f"      {damaged}/train-00000-of-00002, record 2, offset ",
        "  duplicates   1 record whose image occurs before in the split, 0 under another label",
        "  shared       2 records of validation whose image is in train too, 0 under another label",
        "drawn: sheet.png",
    ):
        assert f"\n{line}" in f"\n{ended.out}", line


def test_inspect_ends_with_65_for_labels_outside(launch, tmp_path):
    """As training would; all is printed."""
    for split, labels in (("train", (1, 2, 3, 3)), ("validation", (1, 3))):
        rows = [example(picture(label, label), label) for label in labels]
        write_shard(tmp_path / f"{split}-00000-of-00001", rows)
    ended = launch(0, "inspect", str(tmp_path), "--num_classes=2", "--image_size=32", code=65)
    assert "hvd-vgg: inspect: 3 records with labels outside --num_classes=2, see above" in ended.err
    assert "\n  outside      2 records with labels that training refuses: 3" in ended.out
    assert "2 of --num_classes=2, the first label is 1; 1 record each" in ended.out


@pytest.mark.fault(tier=3)
def test_inspect_of_sound_data_ends_with_0(launch, data, tmp_path):
    """With the flags of a run's flag file, of which it takes those it has; nothing is written that was not asked for."""
    (tmp_path / "run.flags").write_text("--lr=0.5\n--num_classes=10\n--image_size=32\n--model=vgg11\n--run_dir=run\n")
    ended = launch(0, "inspect", str(data), "--flagfile=run.flags", code=0)
    assert "10 of --num_classes=10, the first label is 1; least 7 (" in ended.out
    assert not (tmp_path / "run").exists()
    launch(0, "launch", "--ranks=2", "inspect", str(data), "--flagfile=run.flags", code=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out=sheet.jpg"], "--out=sheet.jpg: expected a name that ends in .png"),
        (["--out=a.png", "--json=./a.png"], "--out=a.png and --json=./a.png: expected two files"),
        (["--eval_size=16"], "--eval_size=16: expected at least 32 pixels"),
        (["--sheet_records=0"], "--sheet_records=0: expected at least 1"),
        (["--lr=1"], "--lr=1: no such flag"),
        (["--console=dllogger"], "--json writes what is found"),
        (["more"], "more: no such flag"),
    ],
)
def test_inspect_refuses_wrong_flags(capsys, arguments, message):
    assert __main__.run(["inspect", "DATA", *arguments]) == 64
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    full(
        (["nowhere"], 65, "nowhere is not a directory"),
        (["half"], 65, "half has no shard validation-?????-of-?????"),
        (["half", "--out=nowhere/sheet.png"], 74, "--out=nowhere/sheet.png cannot be written: No such file"),
        (["half", "--json=half"], 74, "--json=half cannot be written: Is a directory"),
        (["half", "--data_format=folders"], 65, "no train data for --data_format=folders"),
    ),
)
def test_inspect_refuses_wrong_paths(launch, tmp_path, arguments, code, message):
    """Before it reads a record."""
    write_data(tmp_path / "half", 4, 4, 1)
    for path in (tmp_path / "half").glob("validation-*"):
        path.unlink()
    ended = launch(2, "inspect", *arguments, code=code)
    assert ended.err.count(message) == 1, ended.err
    assert "Traceback" not in ended.err and "bytes" not in ended.out
