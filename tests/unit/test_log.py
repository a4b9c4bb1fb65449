import json
import os
import re
import socket
import subprocess
import sys

import pytest
from support import ROOT, on_a_terminal, screen

from hvd_vgg.errors import NOT_WRITTEN, Failure
from hvd_vgg.reporting import log
from hvd_vgg.reporting.console import Console, watchdog
from hvd_vgg.reporting.log import METRICS, RunLog
from hvd_vgg.streams import note_copied, write_line
from hvd_vgg.text import format_bytes, format_duration, plural


def rows_of(run_dir):
    text = (run_dir / "dllogger.json").read_text()
    assert text.endswith("\n")
    return [json.loads(line[len("DLLL ") :]) for line in text.splitlines() if line.startswith("DLLL ")]


def test_log_json_lines_are_dlloggers(tmp_path):
    run = RunLog(tmp_path, False, None)
    run.log("PARAMETER", {"seed": 1})
    run.log((0, 5), {"train.loss": 8.56})
    *metadata, parameter, row = rows_of(tmp_path)
    assert {line["metric"]: line["metadata"] for line in metadata} == METRICS
    assert all(line["type"] == "METADATA" for line in metadata)
    assert (parameter["type"], parameter["step"], parameter["data"]) == ("LOG", "PARAMETER", {"seed": 1})
    assert (row["type"], row["step"], row["data"]) == ("LOG", [0, 5], {"train.loss": 8.56})
    assert set(row) == {"timestamp", "datetime", "elapsedtime", "type", "step", "data"}
    assert re.fullmatch(r"\d+\.\d+", row["timestamp"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+([+-]\d\d:\d\d)?", row["datetime"])
    assert float(row["elapsedtime"]) >= 0


def test_log_stdout_lines_are_dlloggers(tmp_path, capsys):
    RunLog(tmp_path, True, None).log((0, 5), {"train.loss": 8.56, "train.fps": 12.345})
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"DLL \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+ - \(0, 5\) train\.loss : 8\.56000 nats train\.fps : 12\.3 images/s", line
    )


def test_log_is_appended_to_after_a_torn_line(tmp_path):
    """Each line is in the file as soon as it is written."""
    RunLog(tmp_path, False, None).log((0, 1), {"train.loss": 1.0})
    with open(tmp_path / "dllogger.json", "a") as file:
        file.write('DLLL {"torn')
    second = RunLog(tmp_path, False, None)
    second.log((0, 2), {"train.loss": 2.0})
    text = (tmp_path / "dllogger.json").read_text()
    rows = [json.loads(line[5:]) for line in text.splitlines() if "torn" not in line]
    assert [row["step"] for row in rows if row["type"] == "LOG"] == [[0, 1], [0, 2]]


def test_log_of_nan_is_valid_json_and_can_be_printed(tmp_path, capsys):
    RunLog(tmp_path, True, None).log((0, 1), {"train.loss": float("nan"), "train.gradient_norm": float("inf")})

    def refuse(name):
        raise AssertionError(name)

    line = (tmp_path / "dllogger.json").read_text().splitlines()[-1]
    assert json.loads(line[5:], parse_constant=refuse)["data"] == {"train.loss": "nan", "train.gradient_norm": "inf"}
    assert "train.loss : nan nats" in capsys.readouterr().out


def test_log_sends_metrics_to_tensorboard(tmp_path):
    """By group and step; no lists, no text, and no events."""
    seen = []
    run = RunLog(tmp_path, False, lambda *row: seen.append(row))
    run.log((1, 7), {"train.loss": 2.0, "eval.records": 5, "train.update_seconds": [0.1], "eval.state_sha256": "a"})
    run.event("stopped", step=7)
    assert seen == [("train/loss", 2.0, 7), ("eval/records", 5.0, 7)]


def test_log_that_cannot_be_written_fails_at_its_end(tmp_path, monkeypatch):
    """Not before: training continues, and the own writer writes the lines as soon as it can."""
    monkeypatch.setattr(log, "dllogger", None)
    run = RunLog(tmp_path, False, None)
    path = tmp_path / "dllogger.json"
    path.symlink_to("/dev/full")
    run.log((0, 1), {"train.loss": 1.0})
    with pytest.raises(Failure) as raised:
        run.close()
    assert raised.value.code == NOT_WRITTEN
    path.unlink()
    run.close()
    assert rows_of(tmp_path)[-1]["step"] == [0, 1]


def test_console_draws_a_bar_on_terminals_alone(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(watchdog, "active_seconds", lambda: clock[0])
    for mode in ("bar", "lines"):
        progress = Console(mode, True).progress("training", 100, "steps")
        for done in (10, 50):
            clock[0] += 30
            progress.update(done, "note")
    out = capsys.readouterr().out
    assert "training [############............] 50/100 steps  note  left 1 min 00 s" in out
    long = "loss 12.3456  12345 images/s"
    progress = Console("bar", True).progress("epoch 77.71", 450360, "")
    clock[0] += 30000
    progress.update(225180, long)
    drawn = capsys.readouterr().out.split("\x1b[K")[-1]
    assert drawn.startswith("epoch 77.71 [##..] 225180/450360  loss 12.3456") and drawn.endswith("left 8 h 20 min")
    assert len(drawn) <= 80
    progress.update(225180, long * 3)
    clock[0] += 1
    progress.update(225181)
    assert len(capsys.readouterr().out.split("\x1b[K")[-1]) == 79
    console = progress.console
    console.clear()
    console.clear()
    assert capsys.readouterr().out == "\r\x1b[K"
    assert out.splitlines()[-1] == "training: 50 of 100 steps  note  left 1 min 00 s"


# A bar of a long run, as `Reporter.training` draws it; an evaluation and a warning; and how any command fails.
BAR = """
import sys
from hvd_vgg.__main__ import _end
from hvd_vgg.colours import BOLD
from hvd_vgg.errors import DATA, Failure
from hvd_vgg.reporting import console
from hvd_vgg.storage import warn_once
from hvd_vgg.watchdog import watchdog

clock = [0.0]
watchdog.active_seconds = lambda: clock[0]
shown = console.Console("auto", True)
progress = shown.progress("epoch 89.71", 450360, "")
progress.restart(440000)
def draw():
    clock[0] += 80000
    progress.update(449180 - 1, "loss 12.3456  12345 images/s")
draw()
shown.say(f"step 449180  evaluation: {shown.paint('acc@1 0.7123', BOLD)}")
draw()
shown.say("warning: a host is slow")
draw()
warn_once("storage", "a file was read twice")
draw()
_end(Failure(DATA, "record 7 is damaged"))
"""


def test_console_keeps_the_bar_below_all_else():
    """On a terminal: within its width, evaluations and warnings above it, a failure in a line of its own; with colours."""
    printed = on_a_terminal(["-c", BAR])
    bars = re.findall("\r\x1b\\[K(epoch[^\r\x1b]*)", printed)
    text = "epoch 89.71 [...] 449179/450360  loss 12.3456  12345 images/s  left 2 h 51 min"
    assert len(bars) == 4 and all(len(bar) <= 79 for bar in bars) and bars[0].split(" [")[0] == text.split(" [")[0]
    assert bars[0].endswith(text.split("] ")[1])
    assert screen(printed) == [
        "step 449180  evaluation: acc@1 0.7123",
        "warning: a host is slow",
        f"hvd-vgg: warning on {socket.gethostname()}: a file was read twice",
        "hvd-vgg: record 7 is damaged",
        "",
    ]
    for painted in ("\x1b[1macc@1 0.7123", "\x1b[33mwarning:\x1b[0m", "\x1b[33mwarning\x1b[0m", "\x1b[31mhvd-vgg:\x1b[0m"):
        assert painted in printed


@pytest.mark.parametrize(
    ("columns", "environment", "shown"), [(50, {}, 49), (80, {"COLUMNS": "40"}, 39), (200, {}, 79)], ids=str
)
def test_console_bar_keeps_to_a_narrow_terminal(columns, environment, shown):
    """And to 80 columns of a wide one."""
    program = "from hvd_vgg.reporting.console import Console\nConsole('auto', True).redraw('x' * 200)"
    printed = on_a_terminal(["-c", program], columns, **environment)
    assert printed.count("x") == shown


def test_console_has_no_colours_where_none_are_wanted():
    """NO_COLOR leaves the bar; a dumb terminal has neither; a pipe no escape at all, whatever --console says."""
    printed = on_a_terminal(["-c", BAR], NO_COLOR="1")
    assert "\r\x1b[K" in printed and not re.search("\x1b\\[[0-9]*m", printed)
    assert "\x1b[1m" in on_a_terminal(["-c", BAR], NO_COLOR="")
    printed = on_a_terminal(["-c", BAR], TERM="dumb")
    assert "\x1b" not in printed and "epoch 89.71: 449179 of 450360" in printed
    piped = subprocess.run([sys.executable, "-c", BAR], capture_output=True, text=True, cwd=ROOT)
    assert "\x1b" not in piped.stdout + piped.stderr
    asked = subprocess.run([sys.executable, "-c", BAR.replace("auto", "bar")], capture_output=True, text=True, cwd=ROOT)
    assert not re.search("\x1b\\[[0-9]*m", asked.stdout + asked.stderr)


def test_bar_of_another_process_is_erased(capfd):
    """As `launch` knows of from what it copies: before its own messages, and only while the bar is the last line.

    However a pipe hands it over, a byte at a time too.
    """
    for copied, erased in (
        (b"line\r\n\r\x1b[Kepoch 1 [##]", True),
        (b"\r\x1b[Kepoch 1 [##]\r\x1b[K", False),
        (b"\r\x1b[Kepoch 1\r\x1b[Kline\n", False),
        (b"half a line", False),
    ):
        for size in (len(copied), 3, 1):
            for begin in range(0, len(copied), size):
                note_copied(copied[begin : begin + size])
            write_line("ended", sys.stderr)
            assert capfd.readouterr() == ("\r\x1b[K" if erased else "", "ended\n")


def test_console_is_silent_on_other_ranks(capsys):
    """And where DLLogger's lines are asked for."""
    Console("lines", False).say("x")
    Console("dllogger", True).say("x")
    assert capsys.readouterr().out == ""


def test_text_of_numbers():
    """Plurals, and bytes of a data set as of one record."""
    assert [plural(1, "class"), plural(2, "class"), plural(1200, "record", ",")] == ["1 class", "2 classes", "1,200 records"]
    sizes = {1: "1 byte", 999: "999 bytes", 4500: "4.5 kB", 999_949: "999.9 kB", 999_950: "1.0 MB", 138e9: "138.0 GB"}
    assert {size: format_bytes(size) for size in sizes} == sizes


def test_format_duration_rounds_to_two_units():
    durations = {0.4: "0 s", 59: "59 s", 60: "1 min 00 s", 185: "3 min 05 s", 7620: "2 h 07 min"}
    durations.update({359_999: "99 h 59 min", 360_000: "4 d 04 h", 724_000: "8 d 09 h"})
    assert {seconds: format_duration(seconds) for seconds in durations} == durations


def log_and_print(stream, run_dir, lines=2000):
    """Returns the exit code and stderr of a process that logs `lines` lines and prints them to `stream`."""
    program = f"""
import pathlib
from hvd_vgg.reporting import log
from hvd_vgg.reporting.console import Console
from hvd_vgg.reporting.log import RunLog
run, console = RunLog(pathlib.Path({str(run_dir)!r}), True, None), Console("bar", True)
for number in range({lines}):
    run.log((0, number), {{"train.loss": 1.0}})
    console.redraw("a bar")
    console.say(f"line {{number}}")
run.close()
"""
    ended = subprocess.run([sys.executable, "-c", program], stdout=stream, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    return ended.returncode, ended.stderr


def steps_logged(run_dir):
    return [row["step"][1] for row in rows_of(run_dir) if row["type"] == "LOG"]


def test_log_is_complete_where_stdout_is_full(tmp_path):
    """2000 lines are more than Python buffers for a stream that takes none; at exit it must have none left."""
    with open("/dev/full", "w") as full:
        assert log_and_print(full, tmp_path) == (0, "")
    assert steps_logged(tmp_path) == list(range(2000))


def test_log_is_complete_where_stdout_is_closed(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as gone:
        assert log_and_print(gone, tmp_path) == (0, "")
    assert steps_logged(tmp_path) == list(range(2000))


def test_write_line_recovers_where_a_stream_does(capfd):
    """As when room is made on a full disk: what was lost meanwhile does not come late, in half lines."""
    kept, full = os.dup(1), os.open("/dev/full", os.O_WRONLY)
    with open(1, "w", closefd=False) as stream:
        os.dup2(full, 1)
        write_line("lost", stream)
        os.dup2(kept, 1)
        write_line("printed", stream)
    os.close(kept)
    os.close(full)
    assert capfd.readouterr().out == "printed\n"
