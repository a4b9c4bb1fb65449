"""`hvd-vgg report`: pages of finished, damaged and hostile runs, and of two that differ; what a browser would be given."""

import base64
import html.parser
import itertools
import json
import math
import re
import shutil
import time
from datetime import timedelta

import cv2
import numpy as np
import pytest
import test_verify
from support import picture, write_data
from test_verify import Killed, train

from hvd_vgg.commands import history, same_run, verify
from hvd_vgg.commands import report as command
from hvd_vgg.commands.report import make_page
from hvd_vgg.config import EvaluationConfig, ReportConfig
from hvd_vgg.data.index import data_digest
from hvd_vgg.data.thumbnails import open_alone
from hvd_vgg.errors import CONFIGURATION, NOT_WRITTEN, USAGE, Failure
from hvd_vgg.flags import parse_flags
from hvd_vgg.pages import figures, style
from hvd_vgg.pages.curves import POINTS, made_again, number, read_curves, whole
from hvd_vgg.pages.facts import read_facts
from hvd_vgg.pages.markup import Markup, escape, table
from hvd_vgg.pages.run_sections import state_text
from hvd_vgg.pages.timeline import spans
from hvd_vgg.reporting.goodput import PARTS, Goodput
from hvd_vgg.reporting.log import RunLog
from hvd_vgg.reporting.receipt import read_log
from hvd_vgg.run_dir import RunDir, lock_run_dir

VOID = {"meta", "input", "br", "img"}


class Page(html.parser.HTMLParser):
    """A page as a browser reads it: elements, ids, references, text; fails where elements are not nested."""

    def __init__(self, markup):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.words, self.pictures = [], [], [], [], [], []
        self.feed(markup)
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        named = dict(attrs)
        if tag == "img":
            self.pictures.append((named["alt"], named.pop("src")))
        self.ids += [named["id"]] if "id" in named else []
        self.links += [named[name] for name in ("href", "src", "xlink:href", "action", "data", "srcset") if name in named]
        assert not [name for name in named if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def page_of(*paths, refresh_seconds=0):
    """Returns the page of some runs, after checks that hold for any."""
    return checked(make_page([RunDir(path) for path in paths], time.time(), refresh_seconds))


def checked(markup):
    """Returns a page that loads nothing, leads nowhere but within itself, and has no colour but those of its style."""
    markup.encode("utf-8")
    page = Page(markup)
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert not {"script", "iframe", "object", "link", "form"} & set(page.tags) and "://" not in markup
    assert all(alt and re.match("data:image/(jpeg|png);base64,[A-Za-z0-9+/=]+$", source) for alt, source in page.pictures)
    assert set(re.findall(r"url\(([^)]*)\)", markup)) <= {f"#{name}" for name in page.ids}
    assert not re.findall(r"#0102\d\d|#010[2]0[0-9a-f]", markup), "a stand-in for a colour"
    return page


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "run"
    train(path)
    return path


@pytest.fixture
def brief(finished, tmp_path):
    """That run without a line of numbers, which are what takes time to draw."""
    (tmp_path / "brief").mkdir()
    lines = (finished / "dllogger.json").read_text().splitlines(keepends=True)
    kept = [line for line in lines if not ('"train.loss":' in line or ('"eval.loss":' in line and '"step": []' not in line))]
    (tmp_path / "brief" / "dllogger.json").write_text("".join(kept))
    return tmp_path / "brief"


def test_report_shows_a_result_with_its_proof(finished):
    result = json.loads((finished / "result.json").read_text())
    page = page_of(finished)
    for text in (
        *("It is done.", f"acc@1 {result['acc@1']:.4f}", f"{result['top1_hits']} of {result['records_evaluated']}"),
        *(result["state_sha256"], f"hvd-vgg verify-run {finished}", "0 failed, 0 unknown", "vgg11 at width 0.125"),
        *("--lr_schedule cosine", "All flags", "1 start and 0 faults.", "2 on a", "recipe optimizer momentum, lr 0."),
    ):
        assert text in page.text, text
    assert "Missing" not in page.text and page.tags.count("svg") > 10
    assert all(
        f"{line.step} {line.step * 32 / 75:.2f}" in page.text
        for line in read_log(finished / "dllogger.json")
        if line.kind == "evaluation"
    )


def test_report_shows_restarts_faults_and_what_is_gone(tmp_path):
    """A run that was killed, went on, rewound and stopped, with reports of a rank and of the launcher."""
    path = tmp_path / "run"
    with pytest.raises(Killed):
        train(path, kill_at=20)
    first = read_log(path / "dllogger.json")[-1].timestamp
    train(path, poisoned=[9])
    (path / "faults").mkdir()
    row = {"time": first + 1, "rank": 3, "host": "b", "error": "a device is gone\nmore", "step": 5}
    (path / "faults" / "fatal.rank3.jsonl").write_text(json.dumps(row) + "\n")
    rows = [
        {"event": "start", "time": first - 9, "attempt": 0, "job": "a"},
        {"event": "end", "time": first + 2, "attempt": 0, "job": "a", "code": 75, "reason": "rank 3 is gone"},
        {"event": "start", "time": first + 3, "attempt": 1, "job": "b"},
        {
            "event": "end",
            "time": first + 9,
            "attempt": 1,
            "job": "b",
            "code": 80,
            "reason": "on request",
            "lost_seconds": 4.0,
        },
        {"event": "start", "time": first + 10, "attempt": 0, "job": "c"},
        {"event": "end", "time": first + 11, "attempt": 0, "job": "c", "code": 137, "reason": "rank 0 killed by signal 9"},
    ]
    (path / "restarts.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in rows))
    (path / "flags.txt").unlink()
    text = page_of(path).text
    for expected in (
        *("2 starts and 3 faults: what happened", "fault rank 3 on b: a device is gone", "2 starts and 3 faults."),
        "change the processes ended with exit code 75: rank 3 is gone; the launcher started them again, and their first",
        "their first update was complete 4 s later",
        "end the processes ended with exit code 80: on request; another launch went on later",
        "fault the processes ended with exit code 137: rank 0 killed by signal 9",
        *("step 9 was not finite: back to step", "start 2: 2 ranks", "recomputed", "flags.txt is not there"),
        *("checks of verify-run failed ( details )", "Started on 20", "seconds since the first start"),
    ):
        assert expected in text, expected


def test_report_says_which_ranks_left_no_report(tmp_path):
    """A hang is one fault for all ranks that noticed it, and those that did not are named, by the start that it was in."""
    path = log_of(tmp_path / "run", start={"ranks": 4, "hosts": ["a", "a", "b", "b"]})
    (path / "faults").mkdir()
    now = read_log(path / "dllogger.json")[-1].timestamp
    for rank, host in ((0, "a"), (2, "b")):
        row = {"event": "hang", "time": now + 60 + rank, "rank": rank, "host": host, "step": 7, "phase": "update"}
        row.update(silent_seconds=30.0 + rank, last_collective="gather")
        (path / "faults" / f"hang.rank{rank}.jsonl").write_text(json.dumps(row) + "\n")
    text = page_of(path).text
    assert "1 start and 1 fault." in text and "start: 4 ranks on a, b, from step 0" in text
    assert (
        "rank 0 on a, 2 on b: hung in update, without progress for 32 s, last collective gather. Rank 1, 3 left no" in text
    )
    log = RunLog(path, False, None)
    log.log((0, 3), {"train.loss": 1.0})
    log.event("resume", checkpoint="step-00000000.safetensors")
    log.event("start", step=0, ranks=1, hosts=["b"])
    bad = {"record": 5, "where": "d/train-0, record 5, offset 70", "replaced_by": 9, "reason": "torn", "step": 0}
    log.event("bad_record", **bad)
    log.event("bad_record", **{**bad, "record": 1, "where": "d/validation-0, record 1, offset 0", "replaced_by": None})
    log.event("suspended", step=0, seconds=83.145)
    log.event("config_changed", flag="no_decay", before=[], after=["bias", "norm"])
    log.event("arithmetic_changed", before={"threads": "1", "numpy": "1"}, after={"threads": "2", "numpy": None})
    log.event("coverage", epoch=0, known=True, replaced=[], skipped=1)
    log.event("coverage", epoch=1, known=True, replaced=[5], skipped=0)
    log.event("coverage", epoch=2, known=True, replaced=[5], skipped=2)
    log.event("stopped", step=3)
    log.close()
    now = read_log(path / "dllogger.json")[-1].timestamp
    rows = [{"event": "start", "time": now - 1}, {"event": "end", "time": now + 1, "code": 80, "reason": "on request"}]
    rows.insert(0, {"event": "end", "time": now - 900, "code": 75, "reason": "gone"})
    (path / "restarts.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in rows))
    text = page_of(path).text
    assert "epoch 1" not in text and "exit code 80" not in text and "gone; another launch went on later (before the" in text
    for expected in (
        *("start 2: 1 rank on b instead of 4, from step 0", "suspended for 1 min 23 s", "1 record skipped, 0 replaced"),
        "fault bad record in the training data: d/train-0, record 5, offset 70: torn; record 9 of the split takes its place",
        "fault bad record in the validation data: d/validation-0, record 1, offset 0: torn; it counts as a miss",
        *("2 starts, 4 faults and 1 stop on request.", "2 records skipped, 0 replaced", "end stopped on request"),
        "start 2: 1 rank on b instead of 4, from step 0; continues from step-00000000.safetensors; made again: 3 updates",
        "up to step 3, the last in the log",
        *("--no_decay changed from (empty) to bias,norm", "or with other settings: threads 2, numpy None"),
    ):
        assert expected in text, expected


def damage_nothing(path):
    pass


def damage_log_is_gone(path):
    (path / "dllogger.json").unlink()


def damage_log_is_noise(path):
    (path / "dllogger.json").write_bytes(bytes(range(256)) * 40 + b"\nDLLL " + b"[" * 100_000 + b"\n")


def damage_times_are_none(path):
    """Of every other line: of two kinds, and far away."""
    lines = (path / "dllogger.json").read_text().splitlines(keepends=True)
    times = itertools.cycle(['"nan"', '"inf"', '"1e300"', '"-1e9"'])
    for index in range(0, len(lines), 2):
        lines[index] = re.sub('"timestamp": "[^"]*"', f'"timestamp": {next(times)}', lines[index])
    (path / "dllogger.json").write_text("".join(lines))


def damage_log_is_cut(path):
    whole_log = (path / "dllogger.json").read_bytes()
    (path / "dllogger.json").write_bytes(whole_log[: len(whole_log) // 2])


def damage_all_are_empty(path):
    for name in ("dllogger.json", "result.json", "receipt.json", "flags.txt"):
        (path / name).write_bytes(b"")


def damage_only_the_result_is_left(path):
    for name in ("dllogger.json", "receipt.json", "flags.txt"):
        (path / name).unlink()


def damage_result_is_a_list(path):
    (path / "result.json").write_text("[1, 2]")


def damage_result_is_deep(path):
    (path / "result.json").write_text('{"a":' * 100_000)


def damage_result_has_other_types(path):
    (path / "result.json").write_text(json.dumps({"top1_hits": "<b>", "fps": {}, "seconds": [], "epochs": True}))


def test_report_of_damaged_runs_says_what_is_missing(finished, tmp_path):
    """Of each kind of damage, side by side with a whole run; and of one alone."""
    damages = [each for name, each in sorted(globals().items()) if name.startswith("damage_")]
    paths = [shutil.copytree(finished, tmp_path / damage.__name__) for damage in damages]
    for path, damage in zip(paths, damages):
        damage(path)
    parts = page_of(*paths).text.split("Run ")[1:]
    named = {
        damage for damage in damages for part in parts if f"/{damage.__name__} " in part and "Missing or damaged" in part
    }
    assert named == {*damages} - {damage_nothing, damage_result_has_other_types, damage_times_are_none}
    assert "Missing or damaged" in page_of(tmp_path / "damage_log_is_cut").text


def test_report_of_logs_with_other_types(finished, tmp_path):
    """Each of these is in the place of every third value of a log; there is a page of all of them, and of one alone."""
    lines = (finished / "dllogger.json").read_text().splitlines()
    values = [None, "x", -1, True, [], {}, [None, "x"], {"a": 1}, 10**400, "nan", "\ud800<i>"]
    for which, value in enumerate(values):
        changed = []
        for index, line in enumerate(lines):
            row = json.loads(line[5:])
            for place, name in enumerate(sorted(row.get("data", {}))):
                if name != "event" and (index + place) % 3 == which % 3:
                    row["data"][name] = value
            changed.append(f"DLLL {json.dumps(row)}\n")
        (tmp_path / str(which)).mkdir()
        (tmp_path / str(which) / "dllogger.json").write_text("".join(changed))
    page = page_of(*(tmp_path / str(which) for which in range(len(values))))
    assert page.text.count("Missing or damaged") == len(values)
    page_of(tmp_path / "1")


HOSTILE = "</script><script>alert(1)</script>\"'><img src=http://e.org onerror=x>&amp;$\\frac{1}{0}$\x1b[31m\u202e\ud800"


def test_report_escapes_all_that_files_say(finished, tmp_path):
    """Every text of the log, and names of hosts, flags, packages, classes, directory and events."""

    def poison(value):
        if isinstance(value, dict):
            return {
                f"{name}{HOSTILE}" if name in ("numpy", "device") else name: poison(each) for name, each in value.items()
            }
        if isinstance(value, list):
            return [poison(each) for each in value]
        return f"{value}{HOSTILE}" if isinstance(value, str) else value

    path = tmp_path / "<script>alert(1)<b>&quot;$x$"
    path.mkdir()
    for line in (finished / "dllogger.json").read_text().splitlines():
        row = json.loads(line[5:])
        data = {name: value if name == "event" else poison(value) for name, value in row.get("data", {}).items()}
        with open(path / "dllogger.json", "a") as file:
            file.write(f"DLLL {json.dumps({**row, 'data': data})}\n")
            if data.get("event") == "start":
                for event in ("bad_record", "config_changed", HOSTILE):
                    file.write(f"DLLL {json.dumps({**row, 'data': {'event': event, 'reason': HOSTILE, 'flag': HOSTILE}})}\n")
    (path / "class_hits.csv").write_text(
        f"class,name,records,top1_hits,top5_hits\n0,{HOSTILE[:90]},4,1,2\n1,,4,0,1\n", errors="replace"
    )
    (path / "confusions.csv").write_text(f"{CONFUSIONS}0,{HOSTILE[:90]},1,{HOSTILE[:90]},2\n", errors="replace")
    (path / "confident_errors.csv").write_text(f"{ERRORS}0,{HOSTILE[:90]},0,{HOSTILE[:90]},1,,0.5\n", errors="replace")
    markup = make_page([RunDir(path), RunDir(path)], time.time())
    assert "<script" not in markup and "<img" not in markup and "\x1b" not in markup and "\u202e" not in markup
    text = Page(markup).text
    assert text.count("</script><script>alert(1)</script>") > 10 and "Worst classes" in text


def test_report_of_two_runs_says_where_they_part(finished, tmp_path, monkeypatch):
    same, other = tmp_path / "same", tmp_path / "other"
    train(same)
    monkeypatch.setattr(test_verify.Trainer, "loss", staticmethod(lambda step: 1 / (step + 3) + (step > 6) / 9))
    monkeypatch.setattr(test_verify, "CONFIG", test_verify.dataclasses.replace(test_verify.CONFIG, momentum=0.8))
    train(other)
    text = page_of(finished, same, other).text
    assert "A and B: losses of" in text and "are equal" in text
    assert "A and C:" in text and "learned 1 differs" in text and "losses part at step 7" in text
    assert "--momentum 0.9 0.9 0.8" in text and "Run C:" in text and "3 runs side by side" in text


def test_report_draws_the_reference_and_the_average(tmp_path):
    """Of a run whose flags have a reference curve, with an average of weights and a loss scale."""
    log = RunLog(tmp_path, False, None)
    log.log("PARAMETER", {"global_batch": 10, "reference_curve": "1:0.2,3:0.5"})
    log.event("start", step=0, ranks=1, hosts=["a"], data={"train": {"records": 20}})
    for step in range(2, 9, 2):
        log.log((step // 2, step), {"train.loss": 1.0, "train.loss_scale": 2.0**step, "train.gradient_norm": 0.5})
        log.log(
            (step // 2, step), {"eval.acc@1": step / 10, "eval.average_acc@1": step / 9, "eval.reference_difference": 0.1}
        )
    log.close()
    text = page_of(tmp_path).text
    assert all(word in text for word in ("reference curve", "average of weights", "Loss scale", "Gradient norm", "+0.1000"))


def test_report_lists_the_worst_classes(brief):
    (brief / "class_hits.csv").write_text(
        'class,name,records,top1_hits,top5_hits\n0,"a, b",10,9,10\n1,,10,1,2\n2,none,0,0,0\n', encoding="utf-8"
    )
    text = page_of(brief).text
    assert "1 0.1000 1 2 10" in text and text.index("1 0.1000") < text.index("0 a 0.9000")
    (brief / "class_hits.csv").write_text("class,name\n0,x\n")
    assert "class_hits.csv: damaged" in page_of(brief).text
    (brief / "class_hits.csv").write_text("class,name,records,top1_hits,top5_hits\n0,x,4,1,2\n2,z,4,1,2\n")
    assert "expected each class from 0 to 1 once, found 2 where 1 is due" in page_of(brief).text
    (brief / "class_hits.csv").write_text("class,name,records,top1_hits,top5_hits\n0,x,4,1,2\n1,y,\\x81,1,2\n")
    assert "row 2: expected whole numbers for class, records, top1_hits, top5_hits" in page_of(brief).text


def log_of(path, flags=None, start=None, evaluations=(), updates=0):
    """Writes a log of these rows; returns its directory."""
    path.mkdir()
    log = RunLog(path, False, None)
    if flags is not None:
        log.log("PARAMETER", flags)
    if start is not None:
        log.event("start", **{"step": 0, "ranks": 1, "hosts": ["a"], "data": {"train": {"records": 20}}, **start})
    if updates:
        log.log((0, updates), {"train.loss": 1.0, "train.losses": [1.0] * updates})
    for step, row in enumerate(evaluations, 1):
        log.log((step, step), {f"eval.{name}": value for name, value in row.items()})
    log.close()
    return path


def test_report_compares_what_both_logs_say(tmp_path):
    """A run without a configuration, and one that lacks flags, differ in none of what they do not say."""
    ones = {"packages": {"numpy": "1"}, "environment": {"A": "1"}}
    first = log_of(tmp_path / "a", {"seed": 1, "momentum": 0.9, "verbose": True, "predictions_file": "/a.csv"}, ones)
    older = log_of(tmp_path / "b", {"seed": 2, "verbose": False, "predictions_file": "/b.csv"}, {**ones, "environment": {}})
    silent = log_of(tmp_path / "c")
    text = page_of(first, older, silent).text
    differences = text[text.index("Left out of the comparison:") : text.index("Curves", text.index("Flags that differ"))]
    assert "The log of C has no flag." in differences and "The log of B does not have --" in differences
    assert "The log of C has no item of data, hosts and software." in differences
    assert "--seed 1 2 -" in differences and "environment: A 1 not set -" in differences
    table = differences[differences.index("Flags that differ") :]
    assert not any(word in table for word in ("--momentum", "--verbose", "--predictions_file", "numpy"))


def test_same_run_says_that_a_log_has_no_start(tmp_path):
    """A log with updates has not trained nothing; one without any has."""
    headless = log_of(tmp_path / "a", updates=2)
    (tmp_path / "b").mkdir()
    text = page_of(headless, tmp_path / "b").text
    assert f"the log of {headless} has updates, but not the start" in text and "trained nothing" not in text
    assert f"{tmp_path / 'b'} has no log that can be read" in text


@pytest.mark.parametrize(
    ("state", "reason", "expected"),
    [
        ("done", "", "It is done."),
        ("training", "on other, by its newest line", "It trains on other, by its newest line."),
        ("stopped", "on request; the same command goes on", "It was stopped on request; the same command goes on."),
        ("failed", "it left no reason: killed", "It failed and left no reason: killed."),
        ("failed", "rank 3 on b: it hung", "It failed: rank 3 on b: it hung."),
        ("failed", "not finite: hvd-vgg replay run", "It failed: not finite: hvd-vgg replay run"),
        ("unreadable", "there is no log", "It cannot be read: there is no log."),
        ("waiting", "", "Waiting."),
    ],
)
def test_state_of_a_run_is_one_sentence(state, reason, expected, tmp_path):
    assert state_text(read_facts(RunDir(tmp_path), "", state, reason)) == expected


def test_report_shows_no_count_that_is_none(tmp_path):
    """A result without top-5 hits, and an evaluation without hits and records."""
    path = log_of(tmp_path / "a", {"global_batch": 10}, {}, [{"top1_hits": 3, "records": 100}, {"loss": 1.0}])
    (path / "result.json").write_text(json.dumps({"top1_hits": 3, "records_evaluated": 100}))
    text = page_of(path).text
    shown = text[text.index("acc@1 0.0300") : text.index("to verify it")] + text[text.index("first 16 digits") :]
    assert "acc@5 - " in shown and "2 1.00 - - - - 1.0000" in shown and "-1" not in shown and "-0.0" not in shown


def test_report_says_of_which_evaluation_the_classes_are(tmp_path):
    rows = [{"top1_hits": 3, "top5_hits": 6, "records": 10}, {"top1_hits": 4, "top5_hits": 6, "records": 10}]
    path = log_of(tmp_path / "a", {}, {}, rows)
    for hits, expected in (
        (4, "the newest evaluation, after step 2."),
        (3, "an earlier evaluation, after step 1; the newest is after step 2."),
        (2, "no evaluation in the log."),
    ):
        (path / "class_hits.csv").write_text(f"class,name,records,top1_hits,top5_hits\n0,,10,{hits},6\n")
        assert f"class_hits.csv ({hits} top-1 and 6 top-5 hits of 10 records) matches {expected}" in page_of(path).text


CONFUSIONS = "label,label_name,predicted,predicted_name,records\n"
ERRORS = "record,where,label,label_name,predicted,predicted_name,probability\n"


def mistaken(path, data, augment="crop", sha256=""):
    """Writes a run whose last evaluation of `data` has mistakes: records 3, 5 and 900, a cat among dogs; returns it."""
    config = EvaluationConfig(data_dir=str(data))
    digest = sha256 or data_digest(open_alone(config, "validation", path, 60.0))
    start = {"data": {"train": {"records": 20}, "validation": {"records": 37, "sha256": digest}}}
    run = log_of(path, {"data_dir": str(data), "augment": augment, "eval_crop": 0.5 if augment == "crop" else 0.875}, start)
    (run / "class_hits.csv").write_text("class,name,records,top1_hits,top5_hits\n0,cat,10,4,10\n1,dog,27,27,27\n")
    (run / "confusions.csv").write_text(f'{CONFUSIONS}0,"cat, tabby",1,,6\n')
    rows = [(number, f"x, record {number}", probability) for number, probability in ((3, 0.75), (5, 0.999), (900, 0.5))]
    text = "".join(f'{number},"{where}",0,"cat, tabby",1,<i>,{probability}\n' for number, where, probability in rows)
    (run / "confident_errors.csv").write_text(f"{ERRORS}{text}")
    return run


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("pictures"))


@pytest.mark.parametrize(("augment", "side"), [("crop", 20), ("flip", 48)])
def test_report_shows_confusions_and_errors(pictures, tmp_path, augment, side):
    """The pictures are the records', cut as they are evaluated, the surest error first; without its data tables alone."""
    page = page_of(mistaken(tmp_path / "run", pictures, augment))
    assert "0 cat 1 6 60.0%" in page.text and "6 records misclassified in the last evaluation" in page.text
    assert page.text.index("5 x, record 5 0 cat 1 <i> 0.999") < page.text.index("3 x, record 3 0 cat 1 <i> 0.75")
    assert "1 picture could not be read; the first: record 900 is none of the 37" in page.text
    alts = [alt for alt, _ in page.pictures]
    assert alts == [
        f"Record {number}: label 0 cat, taken for 1 <i>, probability {probability}"
        for number, probability in ((5, "0.9990"), (3, "0.7500"))
    ]
    for record, (_, source) in zip((5, 3), page.pictures):
        shown = cv2.imdecode(np.frombuffer(base64.b64decode(source.split(",")[1]), np.uint8), cv2.IMREAD_COLOR)
        whole = cv2.imdecode(np.frombuffer(picture(record, record % 10 + 1), np.uint8), cv2.IMREAD_COLOR)
        expected = whole[10:30, 14:34] if augment == "crop" else cv2.resize(whole, (48, 48), interpolation=cv2.INTER_LINEAR)
        assert shown.shape == (side, side, 3) and np.abs(shown.astype(int) - expected).mean() < 2


def test_report_says_why_there_are_no_pictures(pictures, tmp_path):
    """Other data, none, a shard that is cut, a run that trains, a log without flags; the table is there all the same."""
    renewed = page_of(mistaken(tmp_path / "renewed", pictures), refresh_seconds=9)
    other = page_of(mistaken(tmp_path / "other", pictures, sha256="0" * 64))
    data = shutil.copytree(pictures, tmp_path / "data")
    cut = mistaken(tmp_path / "cut", data)
    shard = min(data.glob("validation-*"))
    shard.write_bytes(shard.read_bytes()[:-5])
    texts = [renewed.text, other.text, page_of(cut).text]
    shutil.rmtree(data)
    texts.append(page_of(cut).text)
    silent = mistaken(tmp_path / "silent", pictures)
    (silent / "dllogger.json").unlink()
    texts.append(page_of(silent).text)
    for text, expected in zip(
        texts,
        [
            "Pictures are drawn when the run has ended.",
            f"There are no pictures: {pictures} has other validation data than those that the log names",
            f"There are no pictures: data: {shard}, record ",
            f"There are no pictures: data: {data} is not a directory",
            "There are no pictures: the log does not say where the data were",
        ],
    ):
        assert expected in text and "5 x, record 5 0 cat 1 <i> 0.999" in text
    bad = shutil.copytree(pictures, tmp_path / "bad")
    run = mistaken(tmp_path / "run", bad)
    index = open_alone(EvaluationConfig(data_dir=str(bad)), "validation", run, 60.0)
    shard, content = index.path_of(3), bytearray(index.path_of(3).read_bytes())
    content[int(index.offsets[3]) + 90] ^= 1
    shard.write_bytes(content)
    page = page_of(run)
    assert "2 pictures could not be read; the first: data: " in page.text and len(page.pictures) == 1
    assert not list(bad.glob(".hvd_vgg_index*"))


@pytest.mark.parametrize(
    "row", ["0,,0,,1", "0,,2,,1", "0,,1,,7", "0,,1,,0", "0,,1", "-1,,1,,1", "0,,../../x,,1", "\0"], ids=ascii
)
def test_confusions_that_cannot_be_are_damaged(row, tmp_path):
    """One class, one of none, more records than are missed, no record, a cell that is missing or no number."""
    (tmp_path / "class_hits.csv").write_text("class,name,records,top1_hits,top5_hits\n0,,10,4,10\n1,,2,2,2\n")
    (tmp_path / "confusions.csv").write_text(f"{CONFUSIONS}{row}\n")
    facts = read_facts(RunDir(tmp_path), "", "", "")
    assert facts.classes and not facts.confusions
    assert any(each.startswith("confusions.csv: damaged") for each in facts.missing)


@pytest.mark.parametrize(
    "row", ["3,,0,,1,,1.5", "3,,0,,1,,nan", "-3,,0,,1,,0.5", "3,,0,,0,,0.5", "../x,,0,,1,,0.5", ""], ids=ascii
)
def test_errors_that_cannot_be_are_damaged(row, tmp_path):
    """No probability, no record, one class, a path; and a table of other columns."""
    (tmp_path / "confident_errors.csv").write_text(f"{ERRORS if row else CONFUSIONS}{row}\n")
    facts = read_facts(RunDir(tmp_path), "", "", "")
    assert not facts.errors and any(each.startswith("confident_errors.csv: damaged") for each in facts.missing)


@pytest.mark.parametrize("row", ["7,,10,11,11", "7,,10,-1,2", "7,,10,1,11", "7,,10,3,2", "7,,-1,0,0"])
def test_class_hits_that_cannot_be_are_damaged(row, tmp_path):
    (tmp_path / "class_hits.csv").write_text(f"class,name,records,top1_hits,top5_hits\n{row}\n")
    facts = read_facts(RunDir(tmp_path), "", "", "")
    assert not facts.classes and any(
        "class_hits.csv: damaged" in each and "class 7: expected" in each for each in facts.missing
    )


def test_figures_tell_runs_of_one_colour_apart():
    """Up to three times SERIES runs, with three quantities each: no two lines of a colour have the same style."""
    drawn = [
        (figures.colour(run), figures.style(run, which)) for run in range(1, 3 * style.SERIES + 1) for which in range(3)
    ]
    assert len({*drawn}) == len(drawn)
    few = figures.Line("a", np.arange(3.0), np.arange(3.0), 7, "long-dots")
    assert "stroke-dasharray: 11," in figures.curves("x", [few], "epochs") and "11 3 1.5 3" in figures.legend([few])


def test_report_replays_each_log_once(brief, monkeypatch):
    """However many runs it is compared with."""
    read = []
    monkeypatch.setattr(command, "read_history", lambda lines: read.append(1) or history.read_history(lines))
    for module in (same_run, verify):
        monkeypatch.setattr(module, "read_history", None)
    text = page_of(brief, brief, brief).text
    assert len(read) == 3 and "it failed: TypeError" not in text


# ---- numbers


def test_curves_and_spans_know_what_was_made_again(tmp_path):
    """A start from step 2 after a line of step 4: not in a curve against epochs; the spans are those of goodput."""
    log, clock = RunLog(tmp_path, False, None), [0.0]
    opened, _ = log.times()
    log.times = lambda: (opened + timedelta(seconds=clock[0]), clock[0])
    for clock[0], step, data in (
        (10.0, "EVENT", {"event": "start", "step": 0, "process_seconds": 10, "data": {"train": {"records": 20}}}),
        (20.0, (0, 2), {"train.loss": 1.0, "train.update_seconds": [3, 3]}),
        (26.0, (0, 4), {"train.loss": 2.0, "train.update_seconds": [3, 3]}),
        (30.0, "EVENT", {"event": "start", "step": 2, "process_seconds": 2, "data": {"train": {"records": 20}}}),
        (41.0, (0, 4), {"train.loss": 3.0, "train.update_seconds": [5, 5]}),
        (43.0, (0, 4), {"eval.loss": 1.0}),
        (50.0, "EVENT", {"event": "rewind", "to": 3, "update_seconds": [1, 2]}),
    ):
        log.log(step, data)
    lines = read_log(tmp_path / "dllogger.json")
    curve = read_curves(lines)["train.loss"]
    assert curve.values.tolist() == [1.0, 2.0, 3.0] and curve.counts.tolist() == [True, False, False]
    assert made_again(lines[-7:]) == [2, 2, 2, 3, 3, 3, 2**53]
    seconds = {part: sum(end - begin for begin, end in each) * 3600 for part, each in spans(lines).items() if each}
    expected = {part: each for part, each in Goodput(lines).report()["goodput_seconds"].items() if each}
    assert seconds == pytest.approx(expected) and set(seconds) > {"training", "recomputed", "restarting", "rewinding"}


def test_curves_of_long_logs_are_thinned(tmp_path):
    """To points that keep the least and largest single update."""
    log = RunLog(tmp_path, False, None)
    log.log("PARAMETER", {"global_batch": 10})
    log.event("start", step=0, data={"train": {"records": 20}})
    for step in range(1, 2001):
        losses = [1.0, 9.0 if step == 777 else 2.0]
        log.log((step // 2, step), {"train.loss": 1.5, "train.losses": losses, "train.lr": math.nan if step % 2 else 1.0})
    curves = read_curves(read_log(tmp_path / "dllogger.json"))
    loss = curves["train.loss"]
    assert len(loss.values) == POINTS and loss.high.max() == 9.0 and loss.low.min() == 1.0 and np.all(loss.values == 1.5)
    assert np.all(np.diff(loss.epochs) > 0) and loss.epochs[-1] > 990 and np.all(curves["train.lr"].values == 1.0)


@pytest.mark.parametrize(
    ("value", "expected", "count"),
    [
        (1, 1.0, 1),
        (0.5, 0.5, -1),
        (True, None, -1),
        ("1", None, -1),
        (10**400, None, -1),
        (math.inf, None, -1),
        ([], None, -1),
    ],
    ids=str,
)
def test_number_of_a_log_is_one_or_nan(value, expected, count):
    assert math.isnan(number(value)) if expected is None else number(value) == expected
    assert whole(value) == count


def test_markup_is_escaped_once():
    assert escape(Markup("<b>")) == "<b>" and escape(escape("<&\"'>")) == "&lt;&amp;&quot;&#x27;&gt;"
    assert escape("a\x00\u202e\ud800\nb") == "a\\x00\\u202e\\ud800\nb"
    assert "<td>&lt;i&gt;</td>" in table(["a", "b"], [["x", "<i>"]], "c")


def luminance(colour):
    """Returns the relative luminance of `#rrggbb`, as WCAG 2 defines it."""
    parts = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colours", [style._LIGHT, style._DARK, style._PAPER], ids=("light", "dark", "paper"))
def test_style_has_contrast_for_text_and_curves(colours):
    """At least 4.5, what WCAG 2 asks of small text, on both grounds."""
    for name in set(colours) - {"ground", "panel", "line"}:
        for ground in ("ground", "panel"):
            low, high = sorted([luminance(colours[name]), luminance(colours[ground])])
            assert (high + 0.05) / (low + 0.05) >= 4.5, (name, ground)
    assert all(f"var(--part-{part})" in figures._COLOURS for part in style._PARTS) and set(style._PARTS) == set(PARTS)


# ---- the command


def test_report_writes_a_page_and_says_where(brief, tmp_path, capsys):
    out = tmp_path / "page.html"
    command.report(parse_flags(ReportConfig, [str(brief), f"--out={out}"]))
    assert Page(out.read_text()).text and str(out) in capsys.readouterr().out
    (tmp_path / "other").write_text("")
    assert out.stat().st_mode == (tmp_path / "other").stat().st_mode  # as the umask has it
    assert "refresh" not in out.read_text()


def test_report_watch_renews_until_the_run_ends(brief, tmp_path, monkeypatch):
    """The page is there while the run trains, asks to be read again, and is final at the end."""
    out, seen, held = tmp_path / "page.html", [], lock_run_dir(brief)

    def sleep(seconds):
        seen.append(out.read_text())
        if len(seen) == 2:
            held.close()

    monkeypatch.setattr(command.time, "sleep", sleep)
    command.report(ReportConfig((str(brief),), out=str(out), watch=True, watch_seconds=7))
    assert len(seen) == 2 and all('http-equiv="refresh" content="7"' in each and "It trains." in each for each in seen)
    assert "refresh" not in out.read_text() and "It is done." in out.read_text()


@pytest.mark.parametrize(
    ("arguments", "code"), [([], USAGE), (["{0}/none"], CONFIGURATION), (["{1}", "--out={0}/no/page.html"], NOT_WRITTEN)]
)
def test_report_refuses_what_it_cannot_do(arguments, code, brief, tmp_path, monkeypatch):
    """Before it reads the logs, which may take minutes."""
    monkeypatch.setattr(command, "make_page", None)
    with pytest.raises(Failure) as raised:
        command.report(parse_flags(ReportConfig, [each.format(tmp_path, brief) for each in arguments]))
    assert raised.value.code == code


@pytest.mark.parametrize("name", ["dllogger.json", "report", "report.htm"])
def test_report_overwrites_no_file_of_a_run(tmp_path, name):
    """Pages alone have its ending, and so no --out can be a log."""
    assert any("expected a name that ends in .html" in each for each in ReportConfig((str(tmp_path),), name).conflicts())
    assert not list(ReportConfig((str(tmp_path),), "report.html").conflicts())
