"""The command line: help, what is refused before any rank starts, missing packages, closed streams."""

import dataclasses
import sys

import pytest
from support import ROOT, TINY, Started, command_line, full

from hvd_vgg.__main__ import COMMANDS, USAGE_TEXT


def test_help_lists_the_commands_and_exit_codes(launch):
    ended = launch(0, "--help")
    assert (ended.code, ended.out, ended.err) == (0, USAGE_TEXT, "")
    assert all(command in ended.out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_lists_its_flags(launch, command):
    ended = launch(0, command, "--help")
    assert (ended.code, ended.err) == (0, "")
    for field in dataclasses.fields(COMMANDS[command].config):
        words = field.metadata.get("words")
        assert (f"\n{words} ...: " if words else f"\n  --{field.name}=") in ended.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["trian"],
            "expected one of train, evaluate, predict, replay, verify-run, benchmark, plan, doctor, acceptance, "
            "make-demo-data, prepare",
        ),
        (["train", "--lr=-1", "--width=9"], "2 illegal flag(s)"),
        (["make-demo-data", "--lr=1"], "--lr=1: no such flag"),
        (["evaluate", "--checkpoint"], "checkpoint"),
    ],
)
def test_wrong_command_line_is_one_message(launch, arguments, message):
    ended = launch(0, *arguments, code=64)
    assert ended.err.startswith("hvd-vgg: ")
    assert message in ended.err
    assert "Traceback" not in ended.err


def test_wrong_command_line_of_two_ranks_is_one_message(launch):
    ended = launch(2, "train", "--lr=0", code=64)
    assert ended.err.count("--lr=0: expected more than 0") == 1


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("absl", ["--help"], "install it, or use launch/environment.sh"),
        ("absl", ["doctor"], "install it, or use launch/environment.sh"),
        ("psutil", ["launch", "--ranks=2", "doctor"], "install it, or use launch/environment.sh"),
        ("numpy", ["train"], "numpy"),
    ],
)
def test_missing_package_is_one_message(tmp_path, module, arguments, message):
    program = f"import sys; sys.modules[{module!r}] = None; from hvd_vgg import __main__; __main__.main()"
    ended = Started([sys.executable, "-c", program, *arguments], tmp_path, PYTHONPATH=str(ROOT)).wait()
    assert (ended.code, "Traceback" in ended.err) == (78, False), ended.err
    assert f"{module} " in ended.err and message in ended.err


def test_missing_interface_is_named_before_mpirun_starts(launch, tmp_path):
    ended = launch(0, "launch", "--ranks=2", "--network=eth9", "doctor", f"--data_dir={tmp_path}", code=78)
    assert "--network=eth9: no interface has this name or an address in this network; here are: lo 127.0.0.1" in ended.err


@pytest.mark.parametrize("closed", full(">&-", "2>&-", "<&- >&- 2>&-"))
def test_run_whose_streams_are_closed_is_a_run(launch, tmp_path, data, closed):
    words = command_line(0, ["launch", "--ranks=2", "train", f"--data_dir={data}", *TINY, "--epochs=1", "--run_dir=run"])
    ended = Started(["bash", "-c", f'"$@" {closed}', "bash", *words], tmp_path).wait()
    assert (ended.code, "Traceback" in ended.err) == (0, False), ended.err
    launch(0, "verify-run", "run", code=0)


def test_closed_streams_put_nothing_into_files(tmp_path):
    """Else the next file is opened as stdin, stdout or stderr, and gets what C code prints."""
    program = """
import os
from hvd_vgg import streams
streams.ensure_std_streams()
with open("shard", "wb") as file:
    os.write(1, b"printed by C code")
    os.write(2, b"printed by C code")
    file.write(b"data")
"""
    words = ["bash", "-c", '"$@" <&- >&- 2>&-', "bash", sys.executable, "-c", program]
    Started(words, tmp_path, PYTHONPATH=str(ROOT)).wait(code=0)
    assert (tmp_path / "shard").read_bytes() == b"data"


@pytest.mark.fault(tier=3)
def test_demo_data_with_closed_streams_are_the_same(tmp_path):
    """Where TensorFlow prints all that it can."""
    written = []
    for place, closed in (("open", ""), ("closed", "<&- >&- 2>&-")):
        flags = [f"--data_dir={place}", "--train_images=20", "--validation_images=10", "--shards=2"]
        words = ["bash", "-c", f'"$@" {closed}', "bash", *command_line(0, ["make-demo-data", *flags])]
        Started(words, tmp_path, TF_CPP_MIN_LOG_LEVEL="0").wait(code=0)
        written.append({path.name: path.read_bytes() for path in (tmp_path / place).iterdir()})
    assert written[0] == written[1]
