"""What `predict` is made of: its words and flags, files as records, names of classes, rows and tables."""

import csv
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from support import failure_of, picture

from hvd_vgg.commands.predict import _COLUMNS, _escaped, _table_rows, _texts
from hvd_vgg.config import EvaluateConfig, ExportConfig, PredictConfig, TrainConfig
from hvd_vgg.data.classes import imagenet_names
from hvd_vgg.data.image_files import ImageFiles, find_images, index_images
from hvd_vgg.data.loader import scoring_batches
from hvd_vgg.errors import BUG, CONFIGURATION, USAGE, Failure
from hvd_vgg.flags import describe_flags, parse_flags, to_flag_file
from hvd_vgg.reporting.console import Console
from hvd_vgg.reporting.table import rounded, table_lines
from hvd_vgg.training import checkpoint
from hvd_vgg.training.confusions import (
    CONFUSIONS,
    ERRORS,
    confused_pairs,
    confusion_rows,
    error_rows,
    most_confused,
    predicted_pairs,
)
from hvd_vgg.training.evaluate import Evaluation, _row
from hvd_vgg.training.names import known_names
from hvd_vgg.training.predictions import (
    Outcome,
    _prediction_rows,
    _require_pairs,
    _require_totals,
    other_result,
    worst_classes,
    write_tables,
)
from hvd_vgg.training.weights import read_weights, require_classes, require_own_flags

ODD = "odd\udcff, b.jpg"  # a byte that is no text, a comma and a space


def refusal(action, code=USAGE):
    with pytest.raises(Failure) as raised:
        action()
    assert raised.value.code == code
    return raised.value.message


# ---- words and flags


def test_words_are_images_wherever_they_stand():
    """Between flags, with commas, spaces and bytes that are no text; behind -- whatever they begin with."""
    config = parse_flags(PredictConfig, ["a,b.jpg", "--top=3", ODD, "--eval_flip", "c=d.png", "--", "--top=4", "-"])
    assert config.images == ("a,b.jpg", ODD, "c=d.png", "--top=4", "-")
    assert (config.top, config.eval_flip) == (3, True)
    assert parse_flags(PredictConfig, ["--top", "2", "x"]).images == ("x",)


def test_words_hide_no_unknown_flag():
    text = refusal(lambda: parse_flags(PredictConfig, ["a.jpg", "--tops=3", "--images=b.jpg", "b.jpg"]))
    assert "--tops=3: no such flag of this command; did you mean --top?" in text and "--images=b.jpg: no such flag" in text
    assert "b.jpg: no such" not in text.replace("--images=b.jpg", "")
    assert "stray: no such flag" in refusal(lambda: parse_flags(TrainConfig, ["stray"]))
    assert "it comes first, before all flags" in refusal(lambda: parse_flags(ExportConfig, ["--to=savedmodel", "my/run"]))


def test_words_are_in_help_and_in_no_flag_file():
    assert "\nIMAGE ...: Images" in describe_flags(PredictConfig, "usage") and "--images=" not in to_flag_file(
        PredictConfig()
    )


@pytest.mark.parametrize(
    ("kind", "flags", "expected"),
    [
        (PredictConfig, ["--out=a.txt"], "--out=a.txt: expected a name that ends in .csv or .jsonl"),
        (PredictConfig, ["--top=0"], "--top=0: expected at least 1"),
        (PredictConfig, ["--console=dllogger"], "--console=dllogger is for train"),
        (TrainConfig, ["--predictions_file=a.json"], "--predictions_file=a.json: expected a name that ends in .csv"),
        (EvaluateConfig, ["--weights=a", "--checkpoint=newest"], "--checkpoint=newest is of --run_dir"),
    ],
)
def test_predict_flags_that_cannot_work_are_refused(kind, flags, expected):
    assert expected in refusal(lambda: parse_flags(kind, flags))


FOUND = {"model": "vgg11", "width": 0.5, "num_classes": 7, "head": "flattened", "image_size": 64}
FOUND.update(pixel_normalization="caffe", resize="pillow", eval_crop=0.9)


def test_weights_decide_network_and_pixels():
    """What contradicts them is one message; size, filter and crop of evaluation may be others."""
    given = ["--resize=opencv", "--eval_crop=1", "--eval_size=96", "--model=vgg11"]
    config = parse_flags(PredictConfig, given, SimpleNamespace(**FOUND))
    assert (config.num_classes, config.pixel_normalization, config.resize, config.eval_crop) == (7, "caffe", "opencv", 1.0)
    require_own_flags(config, FOUND, "a.h5")
    wrong = ["--model=vgg16", "--image_size=96", "--pixel_normalization=auto"]
    text = refusal(lambda: require_own_flags(parse_flags(PredictConfig, wrong, SimpleNamespace(**FOUND)), FOUND, "a.h5"))
    assert "not those of a.h5" in text and "  --model=vgg16: it has vgg11" in text and "For images of another size" in text
    assert "  --image_size=96: it has 64" in text and "  --pixel_normalization=auto: it has caffe" in text


def test_weights_of_names_for_the_same_pixels_agree():
    """`auto` is `imagenet`; and the weights of --head=pooled are for any size."""
    found = {**FOUND, "pixel_normalization": "auto", "head": "pooled"}
    config = parse_flags(PredictConfig, ["--pixel_normalization=imagenet", "--image_size=96"], SimpleNamespace(**found))
    require_own_flags(config, found, "a.safetensors")


def test_weights_without_classes_are_refused(tmp_path):
    """Convolutions alone; and files of others have no average."""
    text = refusal(lambda: require_classes({"model": "vgg16"}, "a.h5"), CONFIGURATION)
    assert "a.h5 holds no layer that scores classes" in text and "--init_from=a.h5" in text
    (tmp_path / "b.pth").write_bytes(bytes(64))
    assert "holds no average" in refusal(lambda: read_weights(tmp_path / "b.pth", average=True), CONFIGURATION)


# ---- files as records


def write(path, data=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(1, 1) if data is None else data)
    return str(path)


def test_find_images_in_the_order_given(tmp_path):
    """Of a directory by its subdirectories and names, without hidden ones and without what is not named as an image."""
    last = write(tmp_path / "z.data")
    names = ["b.jpg", "a.PNG", "sub/c.jpeg", "sub.2/d.bmp"]
    for name in (*names, ".hidden.jpg", ".git/e.jpg", "readme.txt"):
        write(tmp_path / "folder" / name, b"x")
    (tmp_path / "folder" / "away.jpg").symlink_to("nothing")
    os.mkfifo(tmp_path / "folder" / "pipe.png")
    folder = str(tmp_path / "folder")
    found = find_images([last, folder, last])
    inside = [f"{folder}/{name}" for name in ("a.PNG", "b.jpg", "sub/c.jpeg", "sub.2/d.bmp")]
    assert found.paths == [last, *inside, last] and found.sizes[1:-1] == [1] * 4
    missing = f"{folder}/away.jpg: it cannot be read: No such file or directory"
    assert found.passed_over == [missing, f"{folder}/pipe.png: it is no regular file"]


def test_find_images_that_are_missing(tmp_path):
    """All in one message, of which the first five are named; and so is having none."""
    given = [str(tmp_path / f"{number}\udcff.jpg") for number in range(7)]
    text = refusal(lambda: find_images([write(tmp_path / "a.jpg"), *given]))
    assert f"{tmp_path}/0\\udcff.jpg: No such file or directory" in text and text.count("No such file") == 5
    assert "and 2 more" in text
    (tmp_path / "empty").mkdir()
    assert "no image is given" in refusal(lambda: find_images([str(tmp_path / "empty")]))
    assert "no image is given" in refusal(lambda: find_images([]))
    assert '"": an empty name' in refusal(lambda: find_images([""]))
    (tmp_path / "empty" / "up").symlink_to(tmp_path)
    assert "is a link to a directory that it lies in" in failure_of(lambda: find_images([str(tmp_path)]))


def test_images_are_records_in_order(tmp_path, monkeypatch):
    """Whatever their names, absolute or not; those that cannot be decoded are rows without an image."""
    monkeypatch.chdir(tmp_path)
    names = ["b, c.jpg", write(tmp_path / "a.jpg"), ODD, "empty.jpg", "sub/../b, c.jpg"]
    for number, name in enumerate(names[:3]):
        write(tmp_path / name, picture(number, number))
    write(tmp_path / "empty.jpg", b"")
    (tmp_path / "sub").mkdir()
    index = index_images(find_images(names))
    assert [os.fspath(index.path_of(record)) for record in range(5)] == names
    config = PredictConfig(image_size=32, num_classes=3, device_batch=2)
    batches = list(scoring_batches(index, config, 0, 0, 1, 2, bad_allowed=5))
    assert [batch.labels.numpy().tolist() for batch in batches] == [[0, 0], [0, -1], [0, -1]]
    images = np.concatenate([batch.images.numpy() for batch in batches])
    assert (images[0] == images[4]).all() and not (images[0] == images[1]).all() and not images[3].any()
    (bad,) = batches[1].bad
    assert bad.record == 3 and "it is neither a JPEG nor a PNG" in bad.reason


# ---- names


def test_imagenet_names_are_those_of_wordnet():
    """Sorted by WNID, as labels of ImageNet are; words of two classes may be the same."""
    names = imagenet_names()
    wnids = [name.split(" ")[0] for name in names]
    assert len(set(wnids)) == 1000 and wnids == sorted(wnids) and all(name.isprintable() for name in names)
    assert names[0] == "n01440764 tench, Tinca tinca" and names[281] == "n02123045 tabby, tabby cat"
    assert [number for number, name in enumerate(names) if name.endswith(" crane")] == [134, 517]


def test_known_names_come_from_the_run_or_a_file(tmp_path):
    """Of a directory, or of a checkpoint in it; WNIDs get their words; else ImageNet's, if there are 1000."""
    path = tmp_path / "run" / "checkpoints" / "step-00000001.safetensors"
    path.parent.mkdir(parents=True)
    assert known_names(path, 3) == [] and known_names(tmp_path / "vgg.h5", 1000) == imagenet_names()
    (tmp_path / "run" / "classes.txt").write_text("n01440764\n\nmug\n")
    for weights in (path, tmp_path / "run"):
        assert known_names(weights, 3) == ["n01440764 tench, Tinca tinca", "", "mug"]
    names = tmp_path / "names"
    names.write_bytes("\ufeffTür\r\nlamp\x1b[2J\r\nc".encode())
    assert known_names(path, 3, str(names)) == ["Tür", "lamp [2J", "c"]


@pytest.mark.parametrize("data", [b"a\nb\n", b"a\n\xca\xfd\nc\n"], ids=["two lines", "no text"])
def test_known_names_of_the_run_that_do_not_fit(tmp_path, data):
    """Nobody asked for them: there are none."""
    (tmp_path / "classes.txt").write_bytes(data)
    assert known_names(tmp_path, 3) == known_names(tmp_path, 1000) == []


def test_known_names_in_the_weights_themselves(tmp_path):
    """Which `export` writes; what is no list of as many is passed over."""
    path = tmp_path / "a.safetensors"
    for names, found in (
        (["a", "n01440764", "c\nd"], ["a", "n01440764 tench, Tinca tinca", "c d"]),
        (["a"], []),
        ("abc", []),
    ):
        checkpoint.write(path, {"fc1/bias": np.zeros(3, np.float32)}, {"class_names": names})
        assert known_names(path, 3) == found


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"a\nb\n", "names has 2 lines; the network has 3 classes"),
        (b"a\n\xca\xfd\nc\n", "names, byte 2: expected text in UTF-8"),
        (None, "names cannot be read: No such file or directory"),
    ],
)
def test_known_names_that_do_not_fit_are_refused(tmp_path, data, expected):
    if data is not None:
        (tmp_path / "names").write_bytes(data)
    assert expected in refusal(lambda: known_names(tmp_path, 3, str(tmp_path / "names")))


# ---- rows and tables


def rows_of(*records, top=2):
    rows = np.zeros(len(records), _row(top))
    for row, record in zip(rows, records):
        row["record"], row["hits"] = record, (record == 0, True)
        row["classes"], row["probabilities"] = range(top), [0.75, np.nan][:top]
    return rows


def test_tables_hold_the_same_in_both_formats(tmp_path):
    """Lists have a column for each part, or are lists; what is not a number is empty."""
    rows = [{"a": 'x, "y"\n', "b": [rounded(1 / 3), rounded(float("nan"))]}, {"a": "ü", "b": [1e-9, None]}]
    (tmp_path / "a.csv").write_text("".join(table_lines(".csv", rows)))
    with open(tmp_path / "a.csv", newline="") as file:
        assert list(csv.reader(file)) == [["a", "b_1", "b_2"], ['x, "y"\n', "0.333333", ""], ["ü", "1e-09", ""]]
    assert [json.loads(line) for line in table_lines(".jsonl", rows)] == rows
    assert list(table_lines(".csv", [], ["a", "b"])) == ["a,b\n"] and not list(table_lines(".jsonl", [], ["a"]))


def test_predicted_path_stands_for_one_file_alone():
    """Bytes that are no text, control characters and backslashes are escaped; letters stay readable."""
    names = [b"\xff.jpg", b"\\xff.jpg", "\x9b.jpg".encode(), "ü\n\x1b.jpg".encode(), "日.jpg".encode()]
    expected = ["\\xff.jpg", "\\\\xff.jpg", "\\u009b.jpg", "ü\\n\\x1b.jpg", "日.jpg"]
    assert [_escaped(os.fsdecode(name)) for name in names] == expected


def test_predictions_of_a_round_are_in_order():
    files = ImageFiles(["a.jpg", ODD, "c.jpg"], [1, 1, 1], [])
    texts = list(_texts(rows_of(0, 2), {1: "torn"}, files, ["cat", "dog"]))
    assert texts[:5] == [
        "a.jpg",
        "  0.7500  class 0  cat",
        "  nan  class 1  dog",
        "odd\\xff, b.jpg",
        "  passed over: torn",
    ]
    assert texts[5] == "c.jpg"
    table = list(_table_rows(rows_of(2), files, []))
    first = {"path": "c.jpg", "rank": 1, "class": 0, "name": "", "probability": 0.75}
    assert tuple(first) == _COLUMNS
    assert table == [first, {**first, "rank": 2, "class": 1, "probability": None}]


def test_predictions_of_records_have_a_row_for_each(tmp_path):
    """In order; those that could not be read have a label, and nothing else."""
    names = [write(tmp_path / name) for name in ("a.jpg", "b.jpg", "c.jpg")]
    index = index_images(find_images(names))._replace(labels=np.array([1, 2, 2], np.int32))
    outcome = Outcome(rows_of(0, 2), index.labels - 1, np.zeros([3, 3], np.int64), np.zeros([0, 3], np.int64))
    first, bad, last = _prediction_rows(outcome, index, 2)
    assert first == {
        "record": 0,
        "where": names[0],
        "label": 0,
        "top1_hit": 1,
        "top5_hit": 1,
        "class": [0, 1],
        "probability": [0.75, None],
    }
    assert (bad["label"], bad["top1_hit"], bad["class"]) == (1, None, [None, None]) and last["top1_hit"] == 0


def test_worst_classes_are_those_with_records():
    counts = np.array([[4, 4, 4], [2, 0, 1], [0, 0, 0], [4, 0, 4], [10, 5, 5]])
    lines = worst_classes(counts, ["a", "b", "c", "d", "e"]).splitlines()
    assert lines[0] == "the worst of 4 classes:"
    assert [line.split()[-1] for line in lines[1:]] == ["d", "b", "e", "a"]
    assert lines[1] == "  acc@1 0.0000  acc@5 1.0000  of     4  class 3  d"
    assert worst_classes(counts, []).splitlines()[1].endswith("class 3")


def test_result_of_an_earlier_process_is_told_apart(tmp_path):
    """By its counts; one that cannot be read, or is of a version without them, is no reason to keep anything."""
    path, result = tmp_path / "result.json", Evaluation(3, 5, 9, 1.0, 0)
    kept = {"top1_hits": 3, "top5_hits": 5, "records_evaluated": 9}
    assert other_result(path, result) == ""
    for found in (kept, {"top1_hits": 4}, [], {**kept, "top5_hits": 6}):
        path.write_text(json.dumps(found))
        assert ("6 hits of 9 records, and this process has counted 3 and 5" in other_result(path, result)) == (
            "6" in str(found)
        )


def scored(*rows):
    """Returns rows of (record, hit, class, its probability)."""
    found = np.zeros(len(rows), _row(2))
    for row, (record, hit, number, probability) in zip(found, rows):
        row["record"], row["hits"], row["classes"], row["probabilities"] = record, [hit, hit], [number, 0], [probability, 0]
    return found


def test_tables_are_of_the_evaluation_in_the_result(tmp_path, capsys):
    """What an earlier process kept of it stays where this one, which finds the run complete, counts otherwise."""
    config = TrainConfig(num_classes=2, run_dir=str(tmp_path), predictions_file="a.csv")
    index = index_images(find_images([write(tmp_path / name) for name in ("a.jpg", "b.jpg")]))
    rows, counts, pairs = scored((0, True, 0, 0.5), (1, False, 1, 0.5)), [[2, 1, 2], [0] * 3], [[0, 0, 1], [0, 1, 1]]
    outcome = Outcome(rows, index.labels.astype(np.int64), np.array(counts), np.array(pairs))
    names = ["class_hits.csv", "confusions.csv", "confident_errors.csv"]
    for top1 in (0, 1):
        (tmp_path / "result.json").write_text(json.dumps({"top1_hits": top1, "top5_hits": 2, "records_evaluated": 2}))
        for name in names:
            (tmp_path / name).write_text("theirs")
        write_tables(config, Evaluation(1, 2, 2, 1.0, 0), outcome, index, Console("lines", True))
        assert {(tmp_path / name).read_text() == "theirs" for name in names} == {top1 == 0}
        said = capsys.readouterr().out
        assert ("are left as they are: result.json" in said) == ("a.csv is of this process" in said) == (top1 == 0)
    assert (tmp_path / names[0]).read_text().splitlines()[1:] == ["0,,2,1,2", "1,,0,0,0"]
    assert (tmp_path / names[1]).read_text().splitlines() == [",".join(CONFUSIONS), "0,,1,,1"]
    with open(tmp_path / names[2], newline="") as file:
        (error,) = csv.DictReader(file)
    assert (error["record"], error["where"], error["probability"]) == ("1", str(tmp_path / "b.jpg"), "0.5")


def test_confused_pairs_have_most_records_first():
    """Equal classes, ties at the label and outputs that are not finite are no pairs; classes need no name."""
    labels = np.array([0, 0, 0, 1, 2, 2, 1, 2])
    answers = [0, 1, 1, 0, 2, 0, 2, 0]
    rows = scored(*((record, record == 0, answer, 0.9 if record != 7 else np.nan) for record, answer in enumerate(answers)))
    pairs = predicted_pairs(rows, labels, 3)
    assert pairs.tolist() == [[0, 0, 1], [0, 1, 2], [1, 0, 1], [1, 2, 1], [2, 0, 1], [2, 2, 1]]  # record 4 is a tie
    confused = confused_pairs(pairs)
    assert confused.tolist() == [[0, 1, 2], [1, 0, 1], [1, 2, 1], [2, 0, 1]]
    assert next(confusion_rows(confused, ["a, b", "c", "d"])) == dict(zip(CONFUSIONS, (0, "a, b", 1, "c", 2)))
    _require_pairs(rows, pairs, labels, Evaluation(1, 1, 9, 1.0, 1))
    for wrong in (Evaluation(2, 2, 9, 1.0, 1), Evaluation(1, 1, 8, 1.0, 1)):
        assert "add up to" in refusal(lambda wrong=wrong: _require_pairs(rows, pairs, labels, wrong), BUG)
    counts = np.array([[3, 1, 1], [2, 0, 0], [3, 0, 0]])
    lines = most_confused(confused, counts, ["a, b", "c", "d"]).splitlines()
    assert lines[:2] == ["the most confused of 4 pairs of classes:", "      2 of     3  class 0 a  taken for  1 c"]
    assert most_confused(confused[:1], counts, []).endswith("class 0  taken for  1") and not most_confused(
        pairs[:0], counts, []
    )


def test_confident_errors_are_the_surest_first(tmp_path):
    """By six digits and then by record, 48 of them; a tie with the label is none, nor is what is not finite."""
    index = index_images(find_images([write(tmp_path / f"{number:02}.jpg") for number in range(60)]))
    labels = np.zeros(60, np.int64)
    probabilities = [0.5, 0.25, 0.50000001, np.nan, 1.0, *[0.125] * 55]
    rows = scored(*((record, False, int(record != 4), each) for record, each in enumerate(probabilities)))
    found = list(error_rows(rows, labels, index, []))
    assert [row["record"] for row in found] == [0, 2, 1, *range(5, 50)] and tuple(found[0]) == ERRORS
    assert found[0]["where"] == str(tmp_path / "00.jpg") and found[2]["probability"] == 0.25


def test_totals_that_differ_are_a_bug():
    """Of records and of both kinds of hits."""
    result = Evaluation(3, 5, 9, 1.0, 0)
    _require_totals([9, 3, 5], result)
    for found in ([8, 3, 5], [9, 4, 5], [9, 3, 4]):
        assert "add up to" in refusal(lambda found=found: _require_totals(found, result), BUG)


def test_evaluation_says_nothing_of_its_rows():
    """They are this rank's own: what is logged is equal on all."""
    assert not any("rows" in name for name in Evaluation(1, 2, 3, 4.0, 0, rows=rows_of(0)).metrics())
