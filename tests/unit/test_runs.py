"""`hvd-vgg runs`: each run below a directory with what became of it."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
from support import ROOT, on_a_terminal
from test_verify import STEPS, Killed, train

from hvd_vgg.commands.runs import describe_run, find_runs, list_runs
from hvd_vgg.config import RunsConfig
from hvd_vgg.errors import CONFIGURATION, DATA, Failure
from hvd_vgg.reporting.log import RunLog
from hvd_vgg.run_dir import RunDir, lock_run_dir


def row_of(path, seconds=0.0):
    return describe_run(RunDir(path), path.parent, time.time() + seconds)


def test_runs_of_a_finished_run_has_its_result(tmp_path):
    train(tmp_path / "a")
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    row = row_of(tmp_path / "a", 3600)
    assert row[:3] == ("a", "done", str(STEPS)) and row.epochs == f"{result['epochs']:.1f}"
    assert float(row.top1) >= result["acc@1"] - 1e-4 and row.fps == f"{result['fps']:.1f}"
    assert row.age.startswith("1 h") and not row.reason


def test_runs_say_why_one_failed(tmp_path):
    """By what its ranks have left since the newest start; what is older says nothing."""
    path = tmp_path / "a"
    with pytest.raises(Killed):
        train(path, kill_at=20)
    assert row_of(path)[1:2] == ("failed",) and "it left no reason" in row_of(path).reason
    (path / "faults").mkdir()
    report = {"time": time.time() - 1e6, "rank": 0, "host": "old", "error": "long ago"}
    (path / "faults" / "fatal.rank0.jsonl").write_text(json.dumps(report) + "\n")
    assert "long ago" not in row_of(path).reason
    late = {"time": time.time() + 1, "rank": 3, "host": "b", "error": "a device is gone\nmore"}
    (path / "faults" / "fatal.rank3.jsonl").write_text(json.dumps(late) + "\n")
    assert row_of(path).reason == "rank 3 on b: a device is gone"
    (path / "faults" / "fatal.rank3.jsonl").unlink()
    for when, reason in ((100.0, "it left no reason"), (time.time() + 1, "rank 1 hung")):
        (path / "restarts.jsonl").write_text(json.dumps({"event": "end", "time": when, "reason": "rank 1 hung"}) + "\n")
        assert row_of(path).reason.startswith(reason)
    done = {"event": "end", "time": time.time() + 2, "code": 0, "reason": "done"}  # what follows in the log was lost
    (path / "restarts.jsonl").write_text(json.dumps(done) + "\n")
    assert row_of(path)[1] == "failed" and row_of(path).reason.startswith("the log has no end, though")
    odd = tmp_path / "a b"
    odd.mkdir()
    log = RunLog(odd, False, None)
    log.event("nonfinite", step=7)
    log.close()
    assert row_of(odd).reason == f"not finite at step 7: hvd-vgg replay '{odd}'"


def test_runs_print_nothing_that_a_terminal_obeys(tmp_path, capsys, monkeypatch):
    """A reason is from a file that others may have written; on a terminal it ends where that does, in a pipe it is whole."""
    path = tmp_path / "a"
    with pytest.raises(Killed):
        train(path, kill_at=20)
    (path / "faults").mkdir()
    report = {"time": time.time() + 1, "rank": 0, "host": "h\x1b[31m", "error": f"bad \x1b]0;owned\x07 thing {'x' * 200}"}
    (path / "faults" / "fatal.rank0.jsonl").write_text(json.dumps(report) + "\n")
    list_runs(RunsConfig(dir=str(tmp_path)))
    out = capsys.readouterr().out
    assert rf"rank 0 on h\x1b[31m: bad \x1b]0;owned\x07 thing {'x' * 200}" in out and out.replace("\n", "").isprintable()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for columns, width in ((150, 150), (60, len(out.splitlines()[0]) + 2 + 40)):
        monkeypatch.setenv("COLUMNS", str(columns))
        list_runs(RunsConfig(dir=str(tmp_path)))
        line = capsys.readouterr().out.splitlines()[1]
        assert len(line) == width and line.endswith("...")


def test_runs_that_were_stopped_or_train(tmp_path):
    """A lock that a process of this host holds decides; it is not taken to find out."""
    with pytest.raises(Failure):
        train(tmp_path / "a", stop_at=8)
    assert row_of(tmp_path / "a")[1] == "stopped"
    with lock_run_dir(tmp_path / "a"):
        assert row_of(tmp_path / "a")[1] == "training"
    assert row_of(tmp_path / "a")[1] == "stopped"
    (tmp_path / "a" / "lock").write_text(json.dumps({"host": "elsewhere"}))
    assert row_of(tmp_path / "a", 10)[1] == "stopped"
    with pytest.raises(Killed):
        train(tmp_path / "b", kill_at=20)
    (tmp_path / "b" / "lock").write_text(json.dumps({"host": "elsewhere"}))
    assert [row_of(tmp_path / "b", seconds)[1] for seconds in (10, 3600)] == ["training", "failed"]


def test_runs_are_found_below_a_directory(tmp_path, capsys):
    """The newest at the end; neither links nor what is inside a run; a damaged log is a row."""
    for number, name in enumerate(("old", "deeper/new", "odd \n name")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        train(path)
        os.utime(path / "dllogger.json", (number, number))
    (tmp_path / "odd \n name" / "dllogger.json").write_bytes(b"\xff" * 100)
    os.utime(tmp_path / "odd \n name" / "dllogger.json", (0, 0))
    (tmp_path / "old" / "inner").mkdir()
    (tmp_path / "old" / "inner" / "dllogger.json").touch()
    (tmp_path / "link").symlink_to(tmp_path / "old")
    assert len(list(find_runs(tmp_path))) == 3
    list_runs(RunsConfig(dir=str(tmp_path)))
    head, *rows = capsys.readouterr().out.splitlines()
    assert re.split("  +", head) == ["run", "state", "step", "epochs", "best acc@1", "its acc@5", "images/s", "age"]
    assert len(rows) == 3 and [row.split()[0] for row in rows[1:]] == ["old", "deeper/new"]
    assert rows[0].startswith("odd \\n name")


def test_runs_are_in_colours_on_a_terminal(tmp_path):
    """Their states alone; columns are as wide as without; a pipe has no escape."""
    train(tmp_path / "a")
    with pytest.raises(Killed):
        train(tmp_path / "long name", kill_at=20)
    for name in ("a", "long name"):  # 8 d 08 h and some minutes ago
        os.utime(tmp_path / name / "dllogger.json", (time.time() - 200.5 * 3600,) * 2)
    command = ["-m", "hvd_vgg", "runs", str(tmp_path)]
    printed = on_a_terminal(command, 200).replace("\r\n", "\n")
    assert set(re.findall(r"\x1b\[(3\d)m(\w+) *\x1b\[0m", printed)) == {("32", "done"), ("31", "failed")}
    piped = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, check=True)
    without = [re.sub(r"\x1b\[\d+m", "", text) for text in (printed, piped.stdout)]
    assert "\x1b" not in piped.stdout and without[0] == without[1]
    assert "\x1b" not in on_a_terminal(command, NO_COLOR="1")


@pytest.mark.parametrize("change", [("eval.acc@1", None), ("global_batch", "256")], ids=str)
def test_runs_lists_others_beside_an_odd_one(tmp_path, capsys, change):
    """Of another program, whose log has this name too, or without its log."""
    name, value = change
    for each in ("good", "odd"):
        train(tmp_path / each)
    log = tmp_path / "odd" / "dllogger.json"
    rows = [json.loads(line[5:]) for line in log.read_text().splitlines()]
    for row in rows:
        row.get("data", {}).update({name: value} if name in row.get("data", {}) else {})
    log.write_text("".join(f"DLLL {json.dumps(row)}\n" for row in rows))
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "dllogger.json").symlink_to("/nowhere")
    list_runs(RunsConfig(dir=str(tmp_path)))
    out = capsys.readouterr().out
    assert "good  done" in out and "gone  unreadable" in out and "odd   unreadable" in out


@pytest.mark.parametrize(("name", "code"), [("none", CONFIGURATION), ("", DATA)])
def test_runs_refuses_a_directory_without_any(tmp_path, name, code):
    with pytest.raises(Failure) as raised:
        list_runs(RunsConfig(dir=str(tmp_path / name)))
    assert raised.value.code == code and "--dir=" in raised.value.message
