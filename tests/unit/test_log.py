import json
import os
import re
import subprocess
import sys

from support import ROOT

from hvd_vgg.reporting.console import Console
from hvd_vgg.reporting.log import METRICS, RunLog, time
from hvd_vgg.streams import write_line
from hvd_vgg.text import format_duration


def lines_of(run_dir):
    text = (run_dir / "dllogger.json").read_text()
    assert text.endswith("\n")
    return [json.loads(line[len("DLLL ") :]) for line in text.splitlines() if line.startswith("DLLL ")]


def test_json_lines_are_dlloggers(tmp_path):
    run = RunLog(tmp_path, False, None)
    run.log("PARAMETER", {"seed": 1})
    run.log((0, 5), {"train.loss": 8.56})
    metadata, (parameter, row) = lines_of(tmp_path)[:-2], lines_of(tmp_path)[-2:]
    assert {line["metric"]: line["metadata"] for line in metadata} == METRICS
    assert all(line["type"] == "METADATA" for line in metadata)
    assert (parameter["type"], parameter["step"], parameter["data"]) == ("LOG", "PARAMETER", {"seed": 1})
    assert (row["type"], row["step"], row["data"]) == ("LOG", [0, 5], {"train.loss": 8.56})
    assert set(row) == {"timestamp", "datetime", "elapsedtime", "type", "step", "data"}
    assert re.fullmatch(r"\d+\.\d+", row["timestamp"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+[+-]\d\d:\d\d", row["datetime"])
    assert float(row["elapsedtime"]) >= 0


def test_stdout_lines_are_dlloggers(tmp_path, capsys):
    run = RunLog(tmp_path, True, None)
    run.log((0, 5), {"train.loss": 8.56, "train.fps": 12.345})
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"DLL \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+ - \(0, 5\) train\.loss : 8\.56000 nats train\.fps : 12\.3 images/s", line
    )


def test_a_log_is_appended_to_even_after_a_torn_line_and_each_line_is_written_at_once(tmp_path):
    RunLog(tmp_path, False, None).log((0, 1), {"train.loss": 1.0})
    with open(tmp_path / "dllogger.json", "a") as file:
        file.write('DLLL {"torn')
    second = RunLog(tmp_path, False, None)
    second.log((0, 2), {"train.loss": 2.0})
    text = (tmp_path / "dllogger.json").read_text()
    rows = [json.loads(line[5:]) for line in text.splitlines() if "torn" not in line]
    assert [row["step"] for row in rows if row["type"] == "LOG"] == [[0, 1], [0, 2]]


def test_what_is_no_number_is_valid_json_and_can_be_printed(tmp_path, capsys):
    RunLog(tmp_path, True, None).log((0, 1), {"train.loss": float("nan"), "train.gradient_norm": float("inf")})

    def refuse(name):
        raise AssertionError(name)

    line = (tmp_path / "dllogger.json").read_text().splitlines()[-1]
    assert json.loads(line[5:], parse_constant=refuse)["data"] == {"train.loss": "nan", "train.gradient_norm": "inf"}
    assert "train.loss : nan nats" in capsys.readouterr().out


def test_metrics_go_to_tensorboard_by_group_and_step(tmp_path):
    seen = []
    RunLog(tmp_path, False, lambda *row: seen.append(row)).log((1, 7), {"train.loss": 2.0, "eval.records": 5})
    assert seen == [("train/loss", 2.0, 7), ("eval/records", 5.0, 7)]


def test_a_terminal_gets_a_bar_and_a_file_gets_lines(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    for mode in ("bar", "lines"):
        progress = Console(mode, True).progress("training", 100, "steps")
        for done in (10, 50):
            clock[0] += 30
            progress.update(done, "note")
    out = capsys.readouterr().out
    assert "training [############............] 50/100 steps  note  left 1 min 00 s" in out
    assert out.splitlines()[-1] == "training: 50 of 100 steps  note  left 1 min 00 s"


def test_only_rank_0_speaks_and_not_beside_dlloggers_lines(capsys):
    Console("lines", False).say("x")
    Console("dllogger", True).say("x")
    assert capsys.readouterr().out == ""


def test_durations_are_as_people_say_them():
    assert [format_duration(s) for s in (0.4, 59, 60, 185, 7620)] == [
        "0 s",
        "59 s",
        "1 min 00 s",
        "3 min 05 s",
        "2 h 07 min",
    ]


def written_to(stream, run_dir, lines=2000):
    """Returns how a process ended that logs `lines` lines and prints them to `stream`, and what it said of that."""
    program = f"""
import pathlib
from hvd_vgg.run import log
run, console = log.RunLog(pathlib.Path({str(run_dir)!r}), True, None), log.Console("bar", True)
for number in range({lines}):
    run.log((0, number), {{"train.loss": 1.0}})
    console.redraw("a bar")
    console.say(f"line {{number}}")
run.close()
"""
    ended = subprocess.run([sys.executable, "-c", program], stdout=stream, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    return ended.returncode, ended.stderr


def test_a_full_stdout_ends_nothing_and_keeps_no_line_from_the_file(tmp_path):
    """2000 lines are more than Python holds back for a stream that takes none; at exit it must have none left."""
    with open("/dev/full", "w") as full:
        assert written_to(full, tmp_path) == (0, "")
    assert [row["step"][1] for row in lines_of(tmp_path) if row["type"] == "LOG"] == list(range(2000))


def test_a_closed_stdout_ends_nothing_and_keeps_no_line_from_the_file(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as gone:
        assert written_to(gone, tmp_path) == (0, "")
    assert [row["step"][1] for row in lines_of(tmp_path) if row["type"] == "LOG"] == list(range(2000))


def test_a_stdout_that_takes_lines_again_gets_them(tmp_path, capfd):
    """As when room is made on a full disk: what was lost meanwhile does not come late, in half lines."""
    kept, full = os.dup(1), os.open("/dev/full", os.O_WRONLY)
    with open(1, "w", closefd=False) as stream:
        os.dup2(full, 1)
        write_line("lost", stream)
        os.dup2(kept, 1)
        write_line("told", stream)
    os.close(kept)
    os.close(full)
    assert capfd.readouterr().out == "told\n"
