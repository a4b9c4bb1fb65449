import sys

import pytest
from support import ROOT, TINY, Started, changed, command_line

from hvd_vgg.__main__ import COMMANDS, USAGE_TEXT


def test_help_without_a_command_lists_the_commands_and_exit_codes(launch):
    ended = launch(0, "--help")
    assert (ended.code, ended.out, ended.err) == (0, USAGE_TEXT, "")
    assert all(command in ended.out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_lists_its_flags(launch, command):
    ended = launch(0, command, "--help")
    assert ended.code == 0
    assert "--data_dir=" in ended.out
    assert ended.err == ""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["trian"], "expected one of train, evaluate, replay, verify-run, benchmark, plan, doctor, make-demo-data"),
        (["train", "--lr=-1", "--width=9"], "2 illegal flag(s)"),
        (["make-demo-data", "--lr=1"], "--lr=1: no such flag"),
        (["evaluate", "--checkpoint"], "checkpoint"),
    ],
)
def test_a_wrong_command_line_is_one_message_and_exit_64(launch, arguments, told):
    ended = launch(0, *arguments)
    assert ended.code == 64
    assert ended.err.startswith("hvd-vgg: ")
    assert told in ended.err
    assert "Traceback" not in ended.err


def test_a_missing_package_is_one_message_and_exit_78(launch, tmp_path):
    (tmp_path / "crc32c.py").write_text("raise ImportError('No module named crc32c')")
    ended = launch(0, "train", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert ended.code == 78
    assert "No module named crc32c" in ended.err
    assert "Traceback" not in ended.err


def test_worlds_of_one_rank_each_are_refused(launch, data):
    """Two processes that Horovod does not connect would both be rank 0 of the same run."""
    ended = launch(2, "train", f"--data_dir={data}", *TINY, HOROVOD_CONTROLLER="gloo", HOROVOD_CPU_OPERATIONS="gloo")
    assert ended.code == 78
    assert ended.err.count("the launcher started 2 processes, but Horovod sees 1") == 1


def test_two_ranks_say_it_once(launch):
    ended = launch(2, "train", "--lr=0")
    assert ended.code == 64
    assert ended.err.count("--lr=0: expected more than 0") == 1


def test_a_precision_that_no_rank_can_compute_in_is_refused_once(launch, data):
    """As TensorFlow 2.6 does on CPUs."""
    program = changed("""
        from hvd_vgg.parallel import comm
        comm.cpu_convolves = lambda precision: precision != 'bfloat16'
    """)
    ended = launch(2, "train", f"--data_dir={data}", *TINY, "--precision=bfloat16", program=program)
    assert ended.code == 78
    assert ended.err.count("hvd-vgg: ") == ended.err.count("--precision=bfloat16: TensorFlow") == 1, ended.err


@pytest.mark.parametrize(
    ("module", "words"), [("absl", ["--help"]), ("absl", ["doctor"]), ("psutil", ["launch", "--ranks=2", "doctor"])]
)
def test_a_package_that_is_not_there_is_told_without_a_traceback(tmp_path, module, words):
    program = f"import sys; sys.modules[{module!r}] = None; from hvd_vgg import __main__; __main__.main()"
    ended = Started([sys.executable, "-c", program, *words], tmp_path, PYTHONPATH=str(ROOT)).wait()
    assert (ended.code, "Traceback" in ended.err) == (78, False), ended.err
    assert f"{module} " in ended.err and "install it, or use launch/environment.sh" in ended.err


def test_an_interface_that_is_not_there_is_told_before_mpirun_is_asked(launch, tmp_path):
    ended = launch(0, "launch", "--ranks=2", "--network=eth9", "doctor", f"--data_dir={tmp_path}")
    assert ended.code == 78
    assert "--network=eth9: no interface has this name or an address in this network; here are: lo 127.0.0.1" in ended.err


def test_more_ranks_than_images_is_a_usage_error(launch, data):
    ended = launch(2, "train", f"--data_dir={data}", *TINY, "--global_batch=1")
    assert ended.code == 64
    assert ended.err.count("leaves nothing to do for some of 2 ranks") == 1


@pytest.mark.parametrize(
    "closed", [*(pytest.param(each, marks=pytest.mark.fault(tier=3)) for each in (">&-", "2>&-")), "<&- >&- 2>&-"]
)
@pytest.mark.fault(tier=3)
def test_a_run_whose_streams_were_closed_before_its_start_is_a_run(launch, tmp_path, data, closed):
    words = command_line(0, ["launch", "--ranks=2", "train", f"--data_dir={data}", *TINY, "--epochs=1", "--run_dir=run"])
    ended = Started(["bash", "-c", f'"$@" {closed}', "bash", *words], tmp_path).wait()
    assert (ended.code, "Traceback" in ended.err) == (0, False), ended.err
    verified = launch(0, "verify-run", "run")
    assert verified.code == 0, verified.out


def test_what_a_process_says_to_closed_streams_goes_into_no_file(tmp_path):
    """Else a shard is opened as stdin, stdout or stderr, and gets what TensorFlow, told to say all, says."""
    written = []
    for place, closed in (("open", ""), ("closed", "<&- >&- 2>&-")):
        flags = [f"--data_dir={place}", "--train_images=20", "--validation_images=10", "--shards=2"]
        words = ["bash", "-c", f'"$@" {closed}', "bash", *command_line(0, ["make-demo-data", *flags])]
        assert Started(words, tmp_path, TF_CPP_MIN_LOG_LEVEL="0").wait().code == 0
        written.append({path.name: path.read_bytes() for path in (tmp_path / place).iterdir()})
    assert written[0] == written[1]
