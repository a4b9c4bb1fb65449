import os
import signal
import sys
from pathlib import Path

import pytest

from hvd_vgg.config import RSH_AGENT
from hvd_vgg.run import network, reach
from hvd_vgg.run.findings import FAILURE, OK, WARNING
from hvd_vgg.run.hosts import Host

THERE = {"lo": "127.0.0.1", "eth0": "10.0.0.2", "docker0": "172.17.0.1"}
GLOO = "HOROVOD_GLOO_RENDEZVOUS_ADDR"
MPI = "OMPI_MCA_btl_tcp_if_include"


@pytest.mark.parametrize(
    ("environ", "hosts", "verdict", "told"),
    [
        ({MPI: "eth0"}, 2, OK, "eth0"),
        ({MPI: "10.0.0.0/24"}, 2, OK, "eth0"),
        ({"NCCL_SOCKET_IFNAME": "^docker,lo", MPI: "eth0"}, 2, OK, "eth0"),
        ({"NCCL_SOCKET_IFNAME": "=eth0", MPI: "eth0"}, 2, OK, "eth0"),
        ({MPI: "lo"}, 1, OK, "eth0"),
        ({MPI: "lo"}, 2, FAILURE, "never leaves this host"),
        ({MPI: "127.0.0.0/8"}, 2, FAILURE, "never leaves this host"),
        ({MPI: "ib0"}, 1, FAILURE, "no such interface with an address; here are: lo 127.0.0.1, eth0 10.0.0.2"),
        ({MPI: "192.168.0.0/16"}, 1, FAILURE, "no such interface"),
        ({MPI: "300.1.2.3/8"}, 1, FAILURE, "no such interface"),
        ({"HOROVOD_GLOO_IFACE": "eth7", GLOO: "10.0.0.1"}, 1, FAILURE, "HOROVOD_GLOO_IFACE=eth7"),
        ({"HOROVOD_GLOO_IFACE": "eth7"}, 1, WARNING, "HOROVOD_GLOO_IFACE=eth7"),
        ({}, 2, WARNING, "Open MPI may try docker0"),
        ({}, 1, OK, "eth0"),
        ({"OMPI_MCA_btl_tcp_if_exclude": "docker0"}, 2, WARNING, "takes the place of the default"),
        ({"OMPI_MCA_btl_tcp_if_exclude": "docker0,lo"}, 2, OK, "eth0"),
    ],
)
def test_interfaces_that_launchers_were_told(environ, hosts, verdict, told):
    (found,) = network.check_interfaces(environ, THERE, hosts, True)
    assert found.verdict == verdict
    assert told in found.text


def test_an_interface_of_nccl_matters_where_there_are_devices():
    for devices, verdict in ((True, FAILURE), (False, WARNING)):
        (found,) = network.check_interfaces({"NCCL_SOCKET_IFNAME": "ib0"}, THERE, 2, devices)[:1]
        assert found.verdict == verdict


def test_this_machine_has_a_loopback():
    assert network.interfaces()["lo"] == "127.0.0.1"


def test_addresses_to_be_reached_at_and_the_way_to_mpirun():
    assert network.chosen({}, THERE) == ["10.0.0.2"]
    assert network.chosen({MPI: "docker0"}, THERE) == ["172.17.0.1"]
    assert network.toward_launcher({}, THERE) == ""
    uri = {"OMPI_MCA_orte_hnp_uri": "1534132224.0;tcp://127.0.0.1,127.0.0.2:40791;tcp6://[fd00::2]:48419"}
    assert network.toward_launcher(uri, {"lo": "127.0.0.1"}) == ""  # a loopback leads nowhere
    assert network.toward_launcher(uri, {"eth0": "127.0.0.1"}) == ""


def agent(tmp_path, text):
    """Returns a stand-in for ssh: a script that gets the host and the command."""
    path = tmp_path / "agent"
    path.write_text(f"#!/bin/bash\nhost=$1; shift\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "addresses", "verdict", "told"),
    [
        ('exec bash -c "$*"', ["127.0.0.1"], OK, "b answers and reaches 127.0.0.1"),
        ('exec bash -c "$*"', ["127.255.255.254:1", "x.invalid"], FAILURE, "b answers, but cannot connect to this host at"),
        ("sleep 60", ["127.0.0.1"], FAILURE, "b did not answer"),
        ("echo 'Host key verification failed.' >&2; exit 255", [], FAILURE, "ended with 255: Host key verification failed."),
        (f"echo 'bash: {sys.executable}: No such file' >&2; exit 127", [], FAILURE, "ended with 127"),
        ("echo 'Welcome to b'; exit 0", [], FAILURE, "ended with 0: it said nothing"),
        ('echo \'{"reached": "10.0.0.1", "time": 1000}\'', ["10.0.0.1"], WARNING, "s or more off"),
    ],
)
def test_hosts_that_answer_and_that_do_not(tmp_path, script, addresses, verdict, told):
    """An agent in place of ssh; what it starts is the real line that connects back."""
    limit = 2 if "sleep" in script else 60
    (found,) = reach.check_hosts([Host("b", 1)], agent(tmp_path, script), addresses, limit)
    assert found.verdict == verdict, found
    assert told in found.text
    if "key" in script:
        assert "known_hosts" in found.todo
    if "No such file" in script:
        assert "install the same environment at the same path on b" in found.todo


@pytest.mark.parametrize(
    ("script", "verdict"),
    [
        ('setsid sleep 40 & bash -c "$*"', OK),  # as an ssh that leaves a ControlPersist master
        ("setsid sleep 40 & sleep 50", FAILURE),
        ('bash -c "$*"; exec sleep 40', OK),  # it has answered
    ],
)
def test_what_an_agent_leaves_behind_is_not_waited_for(tmp_path, script, verdict):
    """The process left holds stdout and stderr; had it been waited for, it would run no more."""
    left = tmp_path / "left"
    script = script.replace("&", f"& echo $! > {left};", 1)
    (found,) = reach.check_hosts([Host("b", 1)], agent(tmp_path, script), ["127.0.0.1"], 4)
    assert found.verdict == verdict, found
    if left.exists():
        pid = int(left.read_text())
        assert b"sleep" in Path(f"/proc/{pid}/cmdline").read_bytes()
        os.kill(pid, signal.SIGKILL)


def test_an_agent_that_is_not_there_is_named():
    (found,) = reach.check_hosts([Host("b", 1)], "/nowhere/ssh", ["127.0.0.1"], 5)
    assert "/nowhere/ssh" in found.text


def test_ssh_refuses_unknown_keys_and_asks_nothing():
    assert "StrictHostKeyChecking=yes" in RSH_AGENT
    assert "BatchMode=yes" in RSH_AGENT
