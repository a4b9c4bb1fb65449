"""What is kept of an evaluation, and `predict`: the same on any number of ranks; errors of a user."""

import csv
import json
import shutil
from collections import Counter

import pytest
from oracles import result
from support import TINY, full, picture


def table_of(run_dir, name):
    with open(run_dir / name, newline="") as file:
        return list(csv.DictReader(file))


def class_rows(run_dir):
    with open(run_dir / "class_hits.csv", newline="") as file:
        return [{name: text if name == "name" else int(text) for name, text in row.items()} for row in csv.DictReader(file)]


def predictions(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def images(tmp_path):
    """Returns a directory with 11 images, a file that is none, and names with spaces, commas and bytes that are no text."""
    folder = tmp_path / "images"
    (folder / "sub, 2").mkdir(parents=True)
    for number in range(11):
        name = f"sub, 2/{number}\udcff.jpg" if number % 3 else f"{number} a.jpeg"
        (folder / name).write_bytes(picture(number, number % 10 + 1))
    (folder / "page.jpg").write_text("<html>")
    return folder


def test_hits_a_class_are_those_of_any_ranks(launch, tmp_path, data, undisturbed):
    """Of a run on 2 ranks, and of the same weights evaluated on 1 and 2 without the run, with every record's prediction."""
    run_dir, found = undisturbed / "run", result(undisturbed / "run")
    rows = class_rows(run_dir)
    for name, total in (("records", 37), ("top1_hits", found["top1_hits"]), ("top5_hits", found["top5_hits"])):
        assert sum(row[name] for row in rows) == total
    assert [row["class"] for row in rows] == list(range(10)) and max(row["records"] for row in rows) == 4
    for ranks in (0, 2):
        flags = [f"--weights={run_dir}", f"--data_dir={data}", f"--predictions_file={ranks}.jsonl"]
        ended = launch(ranks, "evaluate", *flags, code=0)
        assert f"({found['top1_hits']} and {found['top5_hits']} of 37 records" in ended.out
        assert "the worst of 10 classes:" in ended.out and "the most confused of " in ended.out
        assert not list(tmp_path.rglob("confusions.csv"))
    kept = predictions(tmp_path / "0.jsonl")
    assert (tmp_path / "0.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()
    assert [row["record"] for row in kept] == list(range(37))
    for row in rows:
        own = [each for each in kept if each["label"] == row["class"]]
        counted = [len(own), sum(each["top1_hit"] for each in own), sum(each["top5_hit"] for each in own)]
        assert counted == [row["records"], row["top1_hits"], row["top5_hits"]]
    errors = [row for row in kept if row["class"][0] != row["label"]]
    pairs = Counter((row["label"], row["class"][0]) for row in errors)
    confusions = table_of(run_dir, "confusions.csv")
    expected = sorted(((*pair, records) for pair, records in pairs.items()), key=lambda each: (-each[2], *each))
    assert [tuple(int(row[name]) for name in ("label", "predicted", "records")) for row in confusions] == expected
    confident = [(-row["probability"][0], row["record"], row["where"], row["label"], row["class"][0]) for row in errors]
    found = [
        (-float(row["probability"]), int(row["record"]), row["where"], int(row["label"]), int(row["predicted"]))
        for row in table_of(run_dir, "confident_errors.csv")
    ]
    assert found == sorted(confident) and 0 < len(found) <= 48
    for row in kept:
        assert row["top1_hit"] == (row["class"][0] == row["label"]) and row["top5_hit"] == (row["label"] in row["class"])
        assert sorted(row["probability"], reverse=True) == row["probability"]


@pytest.mark.parametrize("ranks", [0, *full(2, 3)])
def test_predict_writes_in_order_and_passes_over(launch, tmp_path, undisturbed, images, ranks):
    """65, since a file is no image; the same bytes on any ranks; what is printed is what is written."""
    predict = ["predict", f"--weights={undisturbed / 'run'}", "--device_batch=4", "--top=3", str(images)]
    ended = launch(ranks, *predict, "--out=a.csv", code=65)
    assert "predict: 1 of 12 files passed over, see above: no images" in ended.err and "Traceback" not in ended.err
    assert f"passed over: {images}/page.jpg: the image (6 bytes) cannot be decoded: it is neither" in ended.out
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 33 and [int(row["rank"]) for row in rows[:4]] == [1, 2, 3, 1]
    paths = [row["path"] for row in rows[::3]]
    names = sorted(path.name for path in images.iterdir() if path.suffix == ".jpeg")
    assert paths[: len(names)] == [f"{images}/{name}" for name in names]
    assert paths[len(names) :] == [f"{images}/sub, 2/{number}\\xff.jpg" for number in (10, 1, 2, 4, 5, 7, 8)]
    if ranks:
        launch(0, *predict, "--out=b.csv", code=65)
        assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
        printed = launch(ranks, *predict, code=65).out
        found = [line.split()[0::2] for line in printed.splitlines() if line.startswith("  0.")]
        assert found == [[f"{float(row['probability']):.4f}", row["class"]] for row in rows]


def copy_with_bad_record(data, broken):
    """Copies a data set and changes a bit of its first validation record; returns the copy's directory."""
    shutil.copytree(data, broken)
    shard = sorted(broken.glob("validation-*"))[0]
    content = bytearray(shard.read_bytes())
    content[40] ^= 1
    shard.write_bytes(bytes(content))
    return broken


@pytest.mark.fault("F30", tier=3)
def test_bad_record_has_no_prediction(launch, tmp_path, data, undisturbed):
    """It is a row with its label, and a miss of its class."""
    broken = copy_with_bad_record(data, tmp_path / "broken")
    flags = [f"--weights={undisturbed / 'run'}", f"--data_dir={broken}", "--bad_records_allowed=1"]
    for ranks in (0, 2):
        launch(ranks, "evaluate", *flags, f"--predictions_file={ranks}.jsonl", code=0)
    kept = predictions(tmp_path / "0.jsonl")
    assert kept == predictions(tmp_path / "2.jsonl") and len(kept) == 37
    assert [row["record"] for row in kept if row["top1_hit"] is None] == [0] and kept[0]["class"] == [None] * 5


@pytest.mark.fault(tier=3)
def test_tables_of_a_run_are_the_same_on_any_ranks(launch, tmp_path, data):
    """To the byte; a bad record is a miss, and neither a confusion nor an error."""
    broken = copy_with_bad_record(data, tmp_path / "broken")
    names = ["class_hits.csv", "confusions.csv", "confident_errors.csv"]
    kept = []
    for ranks in (0, 2, 3):
        flags = [*TINY, "--steps=3", f"--data_dir={broken}", f"--run_dir={ranks}", "--bad_records_allowed=1"]
        launch(ranks, "train", *flags, code=0)
        kept.append([(tmp_path / str(ranks) / name).read_bytes() for name in names])
    assert kept[0] == kept[1] == kept[2]
    confused = sum(int(row["records"]) for row in table_of(tmp_path / "0", names[1]))
    assert confused == 37 - 1 - result(tmp_path / "0")["top1_hits"]
    assert "0" not in {row["record"] for row in table_of(tmp_path / "0", names[2])}


@pytest.mark.fault(tier=3)
def test_run_keeps_predictions_of_its_last_evaluation(launch, tmp_path, data):
    """Which `evaluate` makes again to the byte; --stop_at_top1 ends a run at one that might not have been."""
    flags = [*TINY, "--steps=6", "--eval_every_epochs=1", "--stop_at_top1=0.01", f"--data_dir={data}", "--run_dir=run"]
    launch(2, "train", *flags, "--predictions_file=run.csv", code=0)
    assert result(tmp_path / "run")["steps"] < 6
    launch(0, "evaluate", "--run_dir=run", "--checkpoint=newest", "--predictions_file=again.csv", code=0)
    assert (tmp_path / "run.csv").read_bytes() == (tmp_path / "again.csv").read_bytes()
    (tmp_path / "run.csv").unlink()
    launch(0, "evaluate", "--run_dir=run", "--checkpoint=newest", code=0)  # the run's flags do not say where it writes
    assert not (tmp_path / "run.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["predict", "--weights=none", "."], 78, "none cannot be read: No such file or directory"),
        *full(
            (["predict", "--weights=RUN", "none.jpg"], 64, "none.jpg: No such file or directory"),
            (["predict", "--weights=RUN"], 64, "no image is given"),
            (["predict", "--weights=RUN", "--out=none/a.csv", "."], 74, "--out=none/a.csv cannot be written"),
            (["predict", "--weights=RUN", "--names_file=none", "."], 64, "none cannot be read"),
            (["predict", "."], 78, "run cannot be read: No such file or directory"),
            (["evaluate", "--weights=RUN", "--model=vgg16", "--data_dir=."], 64, "--model=vgg16: it has vgg11"),
            (["evaluate", "--weights=RUN", "--average", "--data_dir=DATA"], 78, "has no best checkpoint of an average"),
            (["evaluate", "--weights=RUN", "--predictions_file=none/a.csv", "--data_dir=DATA"], 74, "cannot be written"),
            (["train", "--predictions_file=none/a.csv", "--data_dir=DATA"], 74, "--predictions_file=none/a.csv cannot be"),
            (["train", "--predictions_file=/proc/a.csv", "--data_dir=DATA"], 74, "--predictions_file=/proc/a.csv cannot be"),
        ),
    ],
)
def test_predict_errors_are_one_message(launch, data, undisturbed, arguments, code, expected):
    words = [word.replace("RUN", str(undisturbed / "run")).replace("DATA", str(data)) for word in arguments]
    ended = launch(0, *words, code=code)
    assert expected in ended.err and ended.err.count("hvd-vgg: ") == 1 and "Traceback" not in ended.err


@pytest.mark.fault(tier=3)
def test_launch_passes_words_on(launch, undisturbed):
    """Its own flag comes before what stands behind --."""
    ended = launch(
        0, "launch", "--ranks=2", "--dry_run", "predict", f"--weights={undisturbed / 'run'}", "--", "-x.jpg", code=0
    )
    assert "--console=lines -- -x.jpg" in ended.out
