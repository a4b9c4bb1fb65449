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

import psutil
import pytest

from hvd_vgg.config import LaunchConfig
from hvd_vgg.environment import JOB_PARAMETER
from hvd_vgg.errors import Failure
from hvd_vgg.flags import parse_flags
from hvd_vgg.launcher import supervisor
from hvd_vgg.launcher.command_line import compose_mpirun, nccl_interfaces
from hvd_vgg.launcher.exit_status import explain
from hvd_vgg.launcher.hostfile import Host, read_hostfile
from hvd_vgg.launcher.jobs import launcher_is_alive, local_processes, own_token, search_command
from hvd_vgg.launcher.mpirun import StopRequests
from hvd_vgg.launcher.ssh import ask_hosts
from hvd_vgg.parallel import network
from hvd_vgg.reporting.findings import OK
from hvd_vgg.reporting.log import RunLog
from hvd_vgg.run_dir import RunDir

PROGRAM = ["python", "-m", "hvd_vgg", "train", "--data_dir=/data/my images", "--run_dir=$HOME; rm x"]


def options(command, name):
    """Returns what follows each `name` in a command."""
    return [value for word, value in zip(command, command[1:]) if word == name]


def settings(command):
    """Returns the --mca settings of a command."""
    return {name: value for at, name, value in zip(command, command[1:], command[2:]) if at == "--mca"}


def mpirun_that_prints(folder, text):
    """Makes a program that prints `text`, the name and version of an MPI, to be found first on PATH."""
    folder.mkdir()
    (folder / "mpirun").write_text(f"#!/bin/sh\necho '{text}'\n")
    (folder / "mpirun").chmod(0o755)
    return str(folder)


@pytest.fixture
def open_mpi_4(tmp_path, monkeypatch):
    """Whichever MPI this environment has, the mpirun that is found says that it is Open MPI 4."""
    monkeypatch.setenv("PATH", mpirun_that_prints(tmp_path / "4", "mpirun (Open MPI) 4.1.8"), prepend=os.pathsep)


# Neither a scheduler nor the installation's host file names hosts, and no daemon is started.
HERE_ALONE = {"ras": "^alps,gridengine,loadleveler,lsf,slurm,tm", "orte_default_hostfile": "none", "plm": "isolated"}


@pytest.mark.usefixtures("open_mpi_4")
@pytest.mark.parametrize("ranks", [1, 8, 16, 32])
def test_compose_mpirun_one_host(ranks):
    """On one host nothing is exported and no host is named."""
    command = compose_mpirun(LaunchConfig(), ranks, [], "token", PROGRAM)
    assert command[:3] == ["mpirun", "-np", str(ranks)]
    assert command[-len(PROGRAM) :] == PROGRAM
    assert settings(command) == {JOB_PARAMETER: "token", **HERE_ALONE}
    assert not {"-x", "--host", "--allow-run-as-root"} & set(command)
    assert shlex.split(shlex.join(command)) == command


@pytest.mark.usefixtures("open_mpi_4")
@pytest.mark.parametrize("count", [1, 2, 4])
def test_compose_mpirun_several_hosts(count):
    """On several hosts mpirun is called by its path, with the agent and the network asked for."""
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
    assert shlex.split(shlex.join(command)) == command


@pytest.mark.parametrize("listed", [[], [Host("a", 2), Host("b", 2)]])
def test_compose_mpirun_nccl_uses_named_interfaces(listed, monkeypatch):
    """NCCL is confined to the interfaces of --network where these are names, unless the user has set them."""
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
def test_nccl_interfaces_empty_for_networks(network):
    """NCCL accepts names only."""
    assert nccl_interfaces(network) == ""


@pytest.mark.usefixtures("open_mpi_4")
def test_compose_mpirun_host_list_of_this_host_starts_no_daemon():
    """So that it needs no ssh; elsewhere daemons are started by the agent, whatever the scheduler would use."""
    assert settings(compose_mpirun(LaunchConfig(), 2, [Host("localhost", 2)], "token", PROGRAM)).items() > HERE_ALONE.items()
    several = settings(compose_mpirun(LaunchConfig(), 2, [Host("localhost", 1), Host("b", 1)], "token", PROGRAM))
    assert several.items() > {**HERE_ALONE, "plm": "rsh"}.items()


@pytest.mark.usefixtures("open_mpi_4")
def test_compose_mpirun_keeps_settings_of_the_user(monkeypatch):
    """What the environment has for Open MPI is not overridden."""
    monkeypatch.setenv("OMPI_MCA_plm", "slurm")
    monkeypatch.setenv("OMPI_MCA_ras", "simulator")
    told = settings(compose_mpirun(LaunchConfig(), 2, [], "token", PROGRAM))
    assert told == {JOB_PARAMETER: "token", "orte_default_hostfile": "none"}


@pytest.mark.parametrize("text", ["mpirun (Open MPI) 5.0.11", "mpirun (Open MPI) 6.1.0rc2", "mpirun (Open MPI) v5.0.x"])
def test_compose_mpirun_speaks_to_open_mpi_5(tmp_path, monkeypatch, text):
    """Its runtime has other names, and marks its daemons by an option of its own."""
    monkeypatch.setenv("PATH", mpirun_that_prints(tmp_path / "5", text), prepend=os.pathsep)
    command = compose_mpirun(LaunchConfig(), 2, [Host("a", 1), Host("b", 1)], "token", PROGRAM)
    told = settings(command)
    assert (
        told["plm"] == "ssh" and told["plm_ssh_agent"] == LaunchConfig().rsh_agent and told["plm_ssh_no_tree_spawn"] == "1"
    )
    assert told["prte_default_hostfile"] == "none" and told[JOB_PARAMETER] == "token" and "orte_default_hostfile" not in told
    at = command.index("--prtemca")
    assert command[at + 1 : at + 3] == [JOB_PARAMETER, "token"] and command[at + 3 :] == PROGRAM
    assert settings(compose_mpirun(LaunchConfig(), 2, [], "token", PROGRAM))["plm"] == "ssh"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("HYDRA build details:\n    Version:                                 5.0.2", "MPICH"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.16 Build 20250613", "Intel MPI"),
    ],
)
def test_compose_mpirun_refuses_other_mpi(tmp_path, monkeypatch, text, name):
    """Whose options are others: it says so, and what works."""
    monkeypatch.setenv("PATH", mpirun_that_prints(tmp_path / "other", text), prepend=os.pathsep)
    with pytest.raises(Failure) as raised:
        compose_mpirun(LaunchConfig(), 2, [], "token", PROGRAM)
    assert raised.value.code == 78 and f"is {name}, which has other options" in raised.value.message
    assert "mpiexec -n 8 hvd-vgg train" in raised.value.message


def test_compose_mpirun_path_with_space_refused(tmp_path, monkeypatch):
    """Open MPI could not start its daemon on other hosts by such a path; on one host it is not needed."""
    folder = tmp_path / "my own" / "bin"
    folder.mkdir(parents=True)
    (folder / "mpirun").symlink_to(shutil.which("mpirun"))
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    assert compose_mpirun(LaunchConfig(), 2, [], "token", PROGRAM)[0] == "mpirun"
    with pytest.raises(Failure, match="cuts it at spaces") as raised:
        compose_mpirun(LaunchConfig(), 2, [Host("a", 2)], "token", PROGRAM)
    assert raised.value.code == 78


def test_compose_mpirun_exports_allowed_names_only(monkeypatch):
    """Only allowed variables are passed to other hosts, by name; values are on no command line."""
    secret = "HVD_VGG_CANARY_SECRET", "HOROVOD_API_KEY", "TF_TOKEN"
    for name in (*secret, "AWS_REGION", "NCCL_DEBUG", "MY_OWN", "HOME", "UMD_X"):
        monkeypatch.setenv(name, "canary")
    command = compose_mpirun(LaunchConfig(export_env="MY_OWN,NOT_SET"), 2, [Host("a", 2)], "token", PROGRAM)
    names = set(options(command, "-x"))
    assert {"PATH", "NCCL_DEBUG", "MY_OWN", "UMD_X"} <= names
    assert not {*secret, "AWS_REGION", "NOT_SET", "HOME"} & names
    assert not any("=" in name for name in names)
    assert "canary" not in shlex.join(command)


def test_export_env_value_refused():
    """--export_env takes names, not values."""
    with pytest.raises(Failure, match="'A=1' is not a variable's name"):
        parse_flags(LaunchConfig, ["--export_env=B,A=1"])


def test_read_hostfile_open_mpi(tmp_path):
    """Comments, spaces, maximal slots in both spellings, and a host that is listed twice."""
    path = tmp_path / "hosts"
    path.write_text("# two\na slots=4 max_slots=8\n\n10.0.0.2   slots = 2 max-slots=3 # half\na slots=4\nb\nc max-slots=2\n")
    assert read_hostfile(str(path)) == [Host("a", 8), Host("10.0.0.2", 2), Host("b", 1), Host("c", 1)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "names no host"),
        ("a slot=4", "line 1"),
        ("a\nb slots=0", "line 2"),
        ("a slots=x", "line 1"),
        ("-oProxyCommand=id slots=2", "line 1"),
        ("user@a slots=2; id", "line 1"),
        ("a:2", "not host:N, user@host or an IPv6 address"),
    ],
)
def test_read_hostfile_error_names_line(tmp_path, text, told):
    """What is wrong with a host file is reported with its line; no name can be an option of ssh."""
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(Failure, match=told) as raised:
        read_hostfile(str(path))
    assert raised.value.code == 78


def test_is_this_host():
    """A host is this one by its name or by an address that a socket can be bound to."""
    assert network.is_this_host("localhost") and network.is_local_address("localhost")
    assert network.is_this_host(socket.gethostname())  # whatever that leads to
    assert not network.is_local_address("nowhere.invalid")
    assert not network.is_this_host("192.0.2.1")  # RFC 5737: nobody's


def test_leftovers_found_here_and_on_other_hosts(tmp_path):
    """The remote shell is one that stays here; the other job is one that another host launched."""
    run = "0123456789abcdef"
    variable = f"OMPI_MCA_{JOB_PARAMETER}"
    left = subprocess.Popen(["sleep", "60"], env={variable: f"{run}.elsewhere.1.2"})
    other = subprocess.Popen(["sleep", "60"], env={variable: f"{run[::-1]}.elsewhere.1.2"})
    agent = tmp_path / "agent"
    agent.write_text('#!/bin/bash\nshift\nexec bash -c "$*"\n')
    agent.chmod(0o755)
    try:
        (asked,) = ask_hosts([Host("b.invalid", 1)], str(agent), ["127.0.0.1"], search_command(run))
        assert (asked.finding.verdict, asked.processes) == (OK, [left.pid])
        assert local_processes(run) == {f"{run}.elsewhere.1.2": [psutil.Process(left.pid)]}
        assert launcher_is_alive(f"{run}.elsewhere.1.2") is None
        assert launcher_is_alive(own_token(run)) is True
        assert launcher_is_alive(f"{own_token(run).rpartition('.')[0]}.1") is False  # its process number was given again
    finally:
        for process in (left, other):
            process.kill()
            process.wait()


def test_leftovers_of_other_users_ignored(monkeypatch):
    """Here it is this user's own process that another user looks for; root aside, that one could not end it."""
    run = "0123456789abcdef"
    process = subprocess.Popen(["sleep", "60"], env={f"OMPI_MCA_{JOB_PARAMETER}": f"{run}.elsewhere.1.2"})
    try:
        assert local_processes(run) == {f"{run}.elsewhere.1.2": [psutil.Process(process.pid)]}
        user = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: user + 1)
        assert local_processes(run) == {}
    finally:
        process.kill()
        process.wait()


def test_restart_log_full_disk_keeps_lines_for_later(tmp_path):
    """A limit of the size of files cuts a write as a full disk does."""
    path, limits = RunDir(tmp_path).restarts, resource.getrlimit(resource.RLIMIT_FSIZE)
    log = supervisor._RestartLog(RunDir(tmp_path))
    log.append("start", attempt=0)
    whole = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, limits[1]))
    try:
        log.append("end", attempt=0)
        log.append("start", attempt=1)
        assert path.read_bytes() == whole
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.append("end", attempt=1)
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


FAR, TOKEN = [Host("b.invalid", 1)], "0123456789abcdef.here.1.2"


def test_answering_hosts_restart_asks_again(tmp_path, monkeypatch, capfd):
    """Before a restart hosts are asked until one answers; that is said once."""
    monkeypatch.setattr(supervisor, "_ASK_AGAIN_SECONDS", 0.1)
    with StopRequests(60.0) as requests:
        assert supervisor._answering_hosts(flaky_agent(tmp_path, 3), FAR, TOKEN, False, requests) == FAR
    assert asked_times(tmp_path) == 4
    assert capfd.readouterr().err.count("no host answers: b.invalid (b.invalid: ") == 1


@pytest.mark.parametrize(("first", "times"), [(True, 1), (False, 10)])
def test_answering_hosts_gives_up(tmp_path, monkeypatch, first, times):
    """Hosts that never answer are given up at the first start at once, before a restart after some minutes."""
    monkeypatch.setattr(supervisor, "_ASK_AGAIN_SECONDS", 0.1)
    with StopRequests(60.0) as requests, pytest.raises(Failure, match="cannot use b.invalid") as raised:
        supervisor._answering_hosts(flaky_agent(tmp_path, 99), FAR, TOKEN, first, requests)
    assert (raised.value.code, asked_times(tmp_path)) == (78, times)


@pytest.mark.parametrize("how", ["request", "limit"])
def test_answering_hosts_stops_on_request_or_limit(tmp_path, how):
    """A request and the time limit are heeded while hosts are asked again."""
    with StopRequests(60.0, time.monotonic() + (1 if how == "limit" else 600)) as requests:
        if how == "request":
            threading.Timer(1, os.kill, [os.getpid(), signal.SIGTERM]).start()
        assert supervisor._answering_hosts(flaky_agent(tmp_path, 99), FAR, TOKEN, False, requests) == []
        assert requests.count == (how == "request")
    assert asked_times(tmp_path) == 1


def noticed(signal_number):
    """Returns what mpirun says of a rank that a signal ended."""
    return f"x\nmpirun noticed that process rank 1 with PID 0 on node vm exited on signal {signal_number} (Whatever).\n--"


LOST = """ORTE has lost communication with a remote daemon.

  HNP daemon   : [[27509,0],0] on node vm
  Remote daemon: [[27509,0],1] on node 10.213.99.2
"""

LOST_5 = """PRTE has lost communication with a remote daemon.

  HNP daemon   : [prterun-host1-13062@0,0] on node host1
  Remote daemon: [prterun-host1-13062@0,1] on node host2
"""
ABORTED_5 = """-----
An MPI communication peer process has unexpectedly disconnected.  This
usually indicates a failure in the peer process.

  Local host: host1
  Local PID:  18440
  Peer host:  host2
-----
prterun has exited due to process rank 0 with PID 0 on node host1 calling
"abort".
"""
UNREACHED_5 = """a line
-----
A daemon failed to report back after being spawned. This could
be due to several factors, including inability to find the
daemon executable

  Local host:    host1
  Remote host:   10.213.77.2
  Daemon exit status: 127
-----
"""


@pytest.mark.parametrize(
    ("status", "told", "code", "reason"),
    [
        (0, "", 0, "done"),
        (0, LOST_5, 75, "host host2 is gone: mpirun lost its daemon there"),
        (14, ABORTED_5, 75, "a rank on host2 is gone: another lost its connection"),
        (70, ABORTED_5, 70, "exit code 70"),
        (
            213,
            "-----\nNo network interfaces were found\n-----",
            78,
            "Open MPI 5 found no interface of --network on a host, or only loopback: see above",
        ),
        (
            1,
            "-----\nprocess rank 1 with PID 7 on\nnode vm exiting\nimproperly. There",
            75,
            "rank 1 exited without leaving MPI, on vm",
        ),
        (
            1,
            "user ORTE text\n-----\nProcess name: [[1,1],0]\n  Exit code:    1\n-----",
            1,
            "exit code 1; rank 0 exited first",
        ),
        (255, "", 255, "exit code 255"),
        (
            3,
            "-----\n Process name: [prterun-a.b-9188@1,11]\n  Exit code:    3\n-----",
            3,
            "exit code 3; rank 11 exited first",
        ),
        (137, noticed(9), 137, "rank 1 killed by signal 9 (out of memory?), on vm"),
        (139, noticed(11), 139, "rank 1 killed by signal 11 (segmentation fault), on vm"),
        (135, noticed(7), 135, "rank 1 killed by signal 7 (bus error: is /dev/shm full?), on vm"),
        (
            142,
            noticed(14),
            142,
            "rank 1 killed by signal 14 (hung while holding the GIL: see RUN_DIR/faults; or hung at exit: see above), on vm",
        ),
        (140, noticed(12), 140, "rank 1 killed by signal 12, on vm"),
        (-9, "", 137, "mpirun killed by signal 9"),
        (1, "mpirun: Forwarding signal 10 to job\n", 75, "mpirun was terminated from outside"),
        (1, "-----\nProcess name: [[1,1],0]\n  Exit code:    1\n-----", 1, "exit code 1; rank 0 exited first"),
        (205, LOST, 75, "host 10.213.99.2 is gone: mpirun lost its daemon there"),
        (74, "Process name: [[1,1],3]\n  Exit code:    74", 74, "exit code 74"),
        (75, "Process name: [[1,1],3]\n  Exit code:    75", 75, "a rank hung, was lost, or could not read its files"),
        (80, "Process name: [[1,1],0]\n  Exit code:    80", 80, "all ranks stopped in order"),
        (65, "", 65, "exit code 65"),
    ],
)
def test_explain_exit_status(status, told, code, reason):
    """What mpirun's exit status and last messages mean; the launcher prints a reason that no rank has said."""
    found = explain(status, told, {})
    assert found[:2] == (code, reason)
    assert found.said == (status == code and (code == 0 or 64 <= code < 128))


@pytest.mark.parametrize("status", [127, 255])
def test_explain_daemon_that_did_not_start(status):
    """Open MPI 5 says so on stdout; a program's own exit with the same code is its own."""
    found = explain(status, "", {}, UNREACHED_5)
    assert found == (75, "mpirun could not start its daemon on 10.213.77.2: see above", -1, "10.213.77.2", False)
    assert explain(status, "", {})[:2] == (status, f"exit code {status}")


def test_explain_oom_counter_for_sigkill_only():
    """The kernel's counter of out-of-memory kills is quoted for signal 9 only."""
    risen = {"/sys/fs/cgroup/memory/job/memory.oom_control": 1}
    ended = explain(137, noticed(9), risen)
    assert ended.reason.endswith("; oom_kill in /sys/fs/cgroup/memory/job/memory.oom_control rose by 1")
    assert "oom_kill" not in explain(139, noticed(11), risen).reason


def test_progress_newest_checkpoint_and_last_log_line(tmp_path):
    """What two failures in a row are compared by; an incomplete line is skipped."""
    run_dir = RunDir(tmp_path)
    assert supervisor._progress(run_dir) == (-1, -1)
    (tmp_path / "checkpoints").mkdir()
    for name in ("step-00000010.safetensors", "step-00000020.safetensors", "step-00000030.safetensors.tmp", "best"):
        (tmp_path / "checkpoints" / name).touch()
    log = RunLog(tmp_path, False, None)
    log.log((1, 24), {"train.loss": 1.0})
    log.event("stopped", step=25)
    with open(run_dir.log, "a") as file:
        file.write('DLLL {"type": "LOG", "st')
    assert supervisor._progress(run_dir) == (20, 24)


def test_launch_tmpdir_that_cannot_be_written(monkeypatch):
    """It is named before Open MPI ends with a page of its own; one that does not exist is passed over."""
    monkeypatch.setenv("TMPDIR", "/proc")
    assert supervisor._tmpdir_refusal().startswith("TMPDIR=/proc cannot be written")
    monkeypatch.setenv("TMPDIR", "/nonexistent")
    assert supervisor._tmpdir_refusal() == ""
