"""The launcher's command line and its reading of mpirun's end, without starting anything."""

import json
import os
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from hvd_vgg.config import LaunchConfig
from hvd_vgg.environment import JOB_PARAMETER
from hvd_vgg.errors import Failure
from hvd_vgg.flags import parse_flags
from hvd_vgg.launcher import supervisor
from hvd_vgg.launcher.hostfile import Host, read_hostfile
from hvd_vgg.launcher.jobs import find_jobs, jobs_here, launcher_lives, own_token
from hvd_vgg.launcher.mpirun import ExitStatus, Limits, Requests, compose_mpirun, explain, nccl_interfaces, shell_quoted
from hvd_vgg.launcher.ssh import ask_hosts
from hvd_vgg.launcher.supervisor import LaunchSpec
from hvd_vgg.parallel import network
from hvd_vgg.reporting.findings import OK

PROGRAM = ["python", "-m", "hvd_vgg", "train", "--data_dir=/data/my images", "--run_dir=$HOME; rm x"]


def options(command, name):
    """Returns what follows each `name` in a command."""
    return [value for word, value in zip(command, command[1:]) if word == name]


def settings(command):
    """Returns the --mca settings of a command."""
    return {name: value for at, name, value in zip(command, command[1:], command[2:]) if at == "--mca"}


@pytest.mark.parametrize("ranks", [1, 8, 16, 32])
def test_one_host(ranks):
    command = compose_mpirun(LaunchConfig(), ranks, [], "token", PROGRAM)
    assert command[:3] == ["mpirun", "-np", str(ranks)]
    assert command[-len(PROGRAM) :] == PROGRAM
    assert settings(command) == {JOB_PARAMETER: "token"}
    assert not {"-x", "--host", "--allow-run-as-root"} & set(command)
    assert shlex.split(shell_quoted(command)) == command


@pytest.mark.parametrize("count", [1, 2, 4])
def test_several_hosts(count):
    listed = [Host(f"node{number}", 8) for number in range(count)]
    config = LaunchConfig(rsh_agent="ssh -p 2222 -o BatchMode=yes", network="10.1.0.0/16")
    command = compose_mpirun(config, 8 * count, listed, "token", PROGRAM)
    assert Path(command[0]).is_absolute()  # so that the others find their daemon
    assert options(command, "--host") == [",".join(f"node{number}:8" for number in range(count))]
    told = settings(command)
    assert told["plm_rsh_agent"] == "ssh -p 2222 -o BatchMode=yes"
    assert told["oob_tcp_if_include"] == told["btl_tcp_if_include"] == "10.1.0.0/16"
    assert not any("IFNAME" in word for word in command)  # NCCL knows names alone
    assert "StrictHostKeyChecking=yes" in LaunchConfig().rsh_agent
    assert shlex.split(shell_quoted(command)) == command


@pytest.mark.parametrize("listed", [[], [Host("a", 2), Host("b", 2)]])
def test_nccl_keeps_to_interfaces_that_are_named(listed, monkeypatch):
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    config = LaunchConfig(network="eth1,ib0")
    command = compose_mpirun(config, 2, listed, "token", PROGRAM)
    assert settings(command)["btl_tcp_if_include"] == "eth1,ib0"
    assert "NCCL_SOCKET_IFNAME==eth1,ib0" in options(command, "-x")
    assert not any("IFACE" in word for word in command)  # under mpirun nothing goes by Gloo
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    command = compose_mpirun(config, 2, listed, "token", PROGRAM)
    told = [value for value in options(command, "-x") if value.startswith("NCCL_SOCKET_IFNAME")]
    assert told == (["NCCL_SOCKET_IFNAME"] if listed else [])  # the user's own value


@pytest.mark.parametrize("network", ["", "10.1.0.0/16", "eth1,10.1.0.0/16"])
def test_what_is_no_list_of_names_tells_nccl_nothing(network):
    assert nccl_interfaces(network) == ""


def test_an_open_mpi_whose_path_has_a_space_is_refused_on_several_hosts(tmp_path, monkeypatch):
    folder = tmp_path / "my own" / "bin"
    folder.mkdir(parents=True)
    (folder / "mpirun").symlink_to(shutil.which("mpirun"))
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    assert compose_mpirun(LaunchConfig(), 2, [], "token", PROGRAM)[0] == "mpirun"
    with pytest.raises(Failure, match="cuts it at spaces") as raised:
        compose_mpirun(LaunchConfig(), 2, [Host("a", 2)], "token", PROGRAM)
    assert raised.value.code == 78


def test_names_of_variables_are_passed_by_an_allow_list_and_values_never(monkeypatch):
    secret = "HVD_VGG_CANARY_SECRET", "HOROVOD_API_KEY", "TF_TOKEN"
    for name in (*secret, "AWS_REGION", "NCCL_DEBUG", "MY_OWN", "HOME", "UMD_X"):
        monkeypatch.setenv(name, "canary")
    command = compose_mpirun(LaunchConfig(export_env="MY_OWN,NOT_SET"), 2, [Host("a", 2)], "token", PROGRAM)
    names = set(options(command, "-x"))
    assert {"PATH", "NCCL_DEBUG", "MY_OWN", "UMD_X"} <= names
    assert not {*secret, "AWS_REGION", "NOT_SET", "HOME"} & names
    assert not any("=" in name for name in names)
    assert "canary" not in shell_quoted(command)


def test_a_value_among_the_names_is_refused():
    with pytest.raises(Failure, match="'A=1' is no name of a variable"):
        parse_flags(LaunchConfig, ["--export_env=B,A=1"])


def test_a_host_file_of_open_mpi(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# two\na slots=4 max_slots=8\n\n10.0.0.2   slots = 2 # half\na slots=4\nb\n")
    assert read_hostfile(str(path)) == [Host("a", 8), Host("10.0.0.2", 2), Host("b", 1)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "names no host"),
        ("a slot=4", "line 1"),
        ("a\nb slots=0", "line 2"),
        ("a slots=x", "line 1"),
        ("-oProxyCommand=id slots=2", "line 1"),
        ("user@a slots=2; id", "line 1"),
    ],
)
def test_a_wrong_host_file_is_named_with_its_line(tmp_path, text, told):
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(Failure, match=told) as raised:
        read_hostfile(str(path))
    assert raised.value.code == 78


def test_a_host_that_is_this_one_is_known():
    assert network.is_this_host("localhost") and network.is_local_address("localhost")
    assert network.is_this_host(socket.gethostname())  # whatever that leads to
    assert not network.is_local_address("nowhere.invalid")
    assert not network.is_this_host("192.0.2.1")  # RFC 5737: nobody's


def test_what_a_job_of_the_run_left_is_found_here_and_through_the_remote_shell(tmp_path):
    """The remote shell is one that stays here; the other job is one that another host launched."""
    run = "0123456789abcdef"
    variable = f"OMPI_MCA_{JOB_PARAMETER}"
    left = subprocess.Popen(["sleep", "60"], env={variable: f"{run}.elsewhere.1.2"})
    other = subprocess.Popen(["sleep", "60"], env={variable: f"{run[::-1]}.elsewhere.1.2"})
    agent = tmp_path / "agent"
    agent.write_text('#!/bin/bash\nshift\nexec bash -c "$*"\n')
    agent.chmod(0o755)
    try:
        (asked,) = ask_hosts([Host("b.invalid", 1)], str(agent), ["127.0.0.1"], find_jobs(run))
        assert (asked.finding.verdict, asked.processes) == (OK, [left.pid])
        assert jobs_here(run) == {f"{run}.elsewhere.1.2": [left.pid]}
        assert launcher_lives(f"{run}.elsewhere.1.2") is None
        assert launcher_lives(own_token(run)) is True
    finally:
        for process in (left, other):
            process.kill()
            process.wait()


def test_what_another_user_runs_is_passed_over(monkeypatch):
    """Here it is this user's own process that another user looks for; root aside, that one could not end it."""
    run = "0123456789abcdef"
    process = subprocess.Popen(["sleep", "60"], env={f"OMPI_MCA_{JOB_PARAMETER}": f"{run}.elsewhere.1.2"})
    try:
        assert jobs_here(run) == {f"{run}.elsewhere.1.2": [process.pid]}
        user = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: user + 1)
        assert jobs_here(run) == {}
    finally:
        process.kill()
        process.wait()


def test_a_line_that_does_not_fit_on_the_disk_leaves_nothing_behind_and_is_written_with_the_next(tmp_path):
    """A limit of the size of files cuts a write as a full disk does."""
    path, limits = tmp_path / "restarts.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    job = supervisor._note(LaunchSpec([], tmp_path), "start", attempt=0)
    whole = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, limits[1]))
    try:
        job = supervisor._note(job, "end", attempt=0)
        job = supervisor._note(job, "start", attempt=1)
        assert path.read_bytes() == whole
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    supervisor._note(job, "end", attempt=1)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["event"], row["attempt"]) for row in rows] == [("start", 0), ("end", 0), ("start", 1), ("end", 1)]


def flaky_agent(tmp_path, fails):
    """Returns a remote shell that stays here, and fails so many times first."""
    agent = tmp_path / "agent"
    asked = f'echo >> {tmp_path}/asked; [ "$(wc -l < {tmp_path}/asked)" -gt {fails} ] || exit 255'
    agent.write_text(f'#!/bin/bash\n{asked}\nshift\nexec bash -c "$*"\n')
    agent.chmod(0o755)
    return LaunchConfig(rsh_agent=str(agent))


def asked_times(tmp_path):
    """Returns how often a flaky agent was asked."""
    return len((tmp_path / "asked").read_text())


FAR, TOKEN, NO_LIMIT = [Host("b.invalid", 1)], "0123456789abcdef.here.1.2", Limits(1.0, float("inf"))


def test_a_restart_asks_again_while_no_host_answers_and_says_so_once(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(supervisor, "_ASK_AGAIN_SECONDS", 0.1)
    with Requests() as requests:
        assert supervisor._answering(flaky_agent(tmp_path, 3), FAR, TOKEN, False, requests, NO_LIMIT) == FAR
    assert asked_times(tmp_path) == 4
    assert capfd.readouterr().err.count("no host answers: b.invalid (b.invalid: ") == 1


@pytest.mark.parametrize(("first", "times"), [(True, 1), (False, 10)])
def test_hosts_that_never_answer_are_given_up_at_once_or_after_some_minutes(tmp_path, monkeypatch, first, times):
    monkeypatch.setattr(supervisor, "_ASK_AGAIN_SECONDS", 0.1)
    with Requests() as requests, pytest.raises(Failure, match="cannot use b.invalid") as raised:
        supervisor._answering(flaky_agent(tmp_path, 99), FAR, TOKEN, first, requests, NO_LIMIT)
    assert (raised.value.code, asked_times(tmp_path)) == (78, times)


@pytest.mark.parametrize("how", ["request", "limit"])
def test_who_asks_again_still_hears_a_request_and_the_time_limit(tmp_path, how):
    limits = NO_LIMIT if how == "request" else Limits(1.0, time.monotonic() + 1)
    with Requests() as requests:
        if how == "request":
            threading.Timer(1, os.kill, [os.getpid(), signal.SIGTERM]).start()
        assert supervisor._answering(flaky_agent(tmp_path, 99), FAR, TOKEN, False, requests, limits) == []
        assert requests.count == (how == "request")
    assert asked_times(tmp_path) == 1


def noticed(signal_number):
    """Returns what mpirun says of a rank that a signal ended."""
    return f"x\nmpirun noticed that process rank 1 with PID 0 on node vm exited on signal {signal_number} (Whatever).\n--"


LOST = """ORTE has lost communication with a remote daemon.

  HNP daemon   : [[27509,0],0] on node vm
  Remote daemon: [[27509,0],1] on node 10.213.99.2
"""


@pytest.mark.parametrize(
    ("status", "told", "code", "sentence"),
    [
        (0, "", 0, "done"),
        (137, noticed(9), 137, "rank 1 killed by signal 9 (out of memory?), on vm"),
        (139, noticed(11), 139, "rank 1 killed by signal 11 (segmentation fault), on vm"),
        (135, noticed(7), 135, "rank 1 killed by signal 7 (bus error: is /dev/shm full?), on vm"),
        (
            142,
            noticed(14),
            142,
            "rank 1 killed by signal 14 (hung with Python's lock: see RUN_DIR/faults; or as it ended: see above), on vm",
        ),
        (140, noticed(12), 140, "rank 1 killed by signal 12, on vm"),
        (-9, "", 137, "mpirun killed by signal 9"),
        (1, "mpirun: Forwarding signal 10 to job\n", 75, "mpirun was ended from outside"),
        (1, "-----\nProcess name: [[1,1],0]\n  Exit code:    1\n-----", 1, "exit code 1; rank 0 left first"),
        (205, LOST, 75, "host 10.213.99.2 is gone: mpirun lost its daemon there"),
        (74, "Process name: [[1,1],3]\n  Exit code:    74", 74, "exit code 74"),
        (75, "Process name: [[1,1],3]\n  Exit code:    75", 75, "a rank hung or is gone"),
        (80, "Process name: [[1,1],0]\n  Exit code:    80", 80, "all ranks left in order"),
        (65, "", 65, "exit code 65"),
    ],
)
def test_what_an_end_of_mpirun_means(status, told, code, sentence):
    assert explain(status, told, {}) == ExitStatus(code, sentence)


def test_the_counter_of_memory_kills_is_quoted_for_signal_9_alone():
    risen = {"/sys/fs/cgroup/memory/job/memory.oom_control": 1}
    ended = explain(137, noticed(9), risen)
    assert ended.sentence.endswith("; oom_kill in /sys/fs/cgroup/memory/job/memory.oom_control rose by 1")
    assert "oom_kill" not in explain(139, noticed(11), risen).sentence


def test_progress_is_the_newest_checkpoint_and_the_last_line_of_the_log(tmp_path):
    job = LaunchSpec([], tmp_path)
    assert supervisor._progress(job) == (-1, -1)
    (tmp_path / "checkpoints").mkdir()
    for name in ("step-00000010.safetensors", "step-00000020.safetensors", "step-00000030.safetensors.tmp", "best"):
        (tmp_path / "checkpoints" / name).touch()
    lines = ['{"type": "METADATA"}', '{"type": "LOG", "step": [1, 24]}', '{"type": "LOG", "step": "EVENT"}']
    (tmp_path / "dllogger.json").write_text("".join(f"DLLL {line}\n" for line in lines) + 'DLLL {"type": "LOG", "st')
    assert supervisor._progress(job) == (20, 24)
