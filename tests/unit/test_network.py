import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hvd_vgg.config import RSH_AGENT
from hvd_vgg.launcher import ssh
from hvd_vgg.launcher.hostfile import Host
from hvd_vgg.launcher.ssh import ANSWER_SECONDS, ask_hosts
from hvd_vgg.parallel import network
from hvd_vgg.reporting.findings import FAILURE, OK, WARNING

THERE = {"lo": "127.0.0.1", "eth0": "10.0.0.2", "docker0": "172.17.0.1"}
MPI, EXCLUDE = "OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_btl_tcp_if_exclude"


def test_interfaces_include_loopback():
    """The real interfaces of this machine."""
    assert network.interfaces()["lo"] == "127.0.0.1"


DEFAULT = "Iface\tDestination\tGateway\teth1\t00000000\n{}\t00000000\t0100000A\t0003\ndocker0\t000011AC\t00000000\t0001\n"
DOCKERS = "br-0123456789ab"


@pytest.mark.parametrize(
    ("environ", "more", "texts", "default", "left_out"),
    [
        ({}, {}, [], "eth0", "127.0.0.0/8,docker0"),
        ({}, {DOCKERS: "172.18.0.1", "virbr0": "192.168.122.1"}, [], "", f"127.0.0.0/8,docker0,{DOCKERS},virbr0"),
        ({}, {"br0": "10.1.0.2", "br-lan": "10.2.0.2"}, [], "", "127.0.0.0/8,docker0"),  # may be what a host's card is in
        # Somebody has told MPI; in a file or by a file of mpirun's too.
        ({MPI: "docker0"}, {}, [], "eth0", ""),
        ({EXCLUDE: "lo"}, {}, [], "eth0", ""),
        ({}, {}, ["# nothing\n", "mpi_show = 1\n btl_tcp_if_include=eth0\n"], "eth0", ""),
        ({}, {}, ["-mca btl_tcp_if_exclude lo"], "eth0", ""),
        ({}, {}, ["# btl_tcp_if_include = eth0\noob_tcp_if_include = eth0\n"], "eth0", "127.0.0.0/8,docker0"),
        # The way out is a bridge.
        ({}, {DOCKERS: "10.1.0.2"}, [], DOCKERS, "127.0.0.0/8,docker0"),
        ({}, {DOCKERS: "10.1.0.2"}, [], "docker0", f"127.0.0.0/8,{DOCKERS}"),
        ({}, {}, [], "docker0", ""),
    ],
)
def test_exclude_bridges_that_lead_nowhere(environ, more, texts, default, left_out):
    """Bridges of containers are left out, unless MPI is configured already or they are the way out."""
    found = network.exclude_bridges(environ, {**THERE, **more}, texts, DEFAULT.format(default))
    assert found == ({EXCLUDE: left_out} if left_out else {})


def test_exclude_bridges_keeps_last_interface():
    """A bridge stays if only lo would remain."""
    assert network.exclude_bridges({}, {"lo": "127.0.0.1", "docker0": "172.17.0.1"}, [], "") == {}
    assert network.exclude_bridges({}, {"lo": "127.0.0.1", "eth0": "10.0.0.2"}, [], "") == {}
    two = {"lo": "127.0.0.1", "docker0": "172.17.0.1", DOCKERS: "10.1.0.2"}
    assert network.exclude_bridges({}, two, [], "") == {}
    assert network.exclude_bridges({}, two, [], DEFAULT.format(DOCKERS)) == {EXCLUDE: "127.0.0.0/8,docker0"}
    assert network.chosen_addresses({}, {"lo": "127.0.0.1", "docker0": "172.17.0.1"}) == ["172.17.0.1"]


def test_exclude_bridges_keeps_way_to_mpirun(monkeypatch):
    """What sends to 10.1 leaves by the bridge, all else by eth0."""
    there = {**THERE, DOCKERS: "10.1.0.2"}
    monkeypatch.setattr(
        network, "_source_address", lambda address: "10.1.0.2" if address.startswith("10.1.") else "10.0.0.2"
    )
    uri = "OMPI_MCA_orte_hnp_uri"
    by_bridge, both = {uri: "7.0;tcp://172.17.0.1,10.1.0.1:4071"}, {uri: "7.0;tcp://172.17.0.1,10.1.0.1,10.0.0.1:4071"}
    assert network.interface_toward_launcher(by_bridge, there) == DOCKERS
    assert network.exclude_bridges(by_bridge, there, [], "") == {EXCLUDE: "127.0.0.0/8,docker0"}
    assert network.interface_toward_launcher(both, there) == "eth0"
    assert network.exclude_bridges(both, there, [], "") == {EXCLUDE: f"127.0.0.0/8,docker0,{DOCKERS}"}
    # This is mpirun's host, or has its docker0: that says nothing.
    assert network.interface_toward_launcher({uri: "7.0;tcp://172.17.0.1,10.0.0.2:4071"}, there) == ""


def test_mpi_parameter_files(tmp_path):
    """The user's, the installation's and what overrides both; those that a variable names, in place of the first two."""
    texts = {
        "home/.openmpi/mca-params.conf": "user",
        "prefix/etc/openmpi-mca-params.conf": "installed",
        "prefix/etc/openmpi-mca-params-override.conf": "overrides",
        "named.conf": "named",
        "tuned.conf": "tuned",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    environ = {"HOME": str(tmp_path / "home"), "OPAL_PREFIX": str(tmp_path / "prefix"), "PATH": "/nowhere"}
    mine = set(texts.values())
    assert mine & set(network.mpi_parameter_files(environ)) == {"user", "installed", "overrides"}
    environ["OMPI_MCA_mca_base_envar_file_prefix"] = str(tmp_path / "tuned.conf")
    environ["OMPI_MCA_mca_base_param_files"] = f"{tmp_path}/named.conf,{tmp_path}/absent.conf"
    assert mine & set(network.mpi_parameter_files(environ)) == {"named", "overrides", "tuned"}


def test_mpi_parameter_files_beside_mpirun(tmp_path):
    """Of the installation that mpirun on PATH belongs to."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "openmpi-mca-params.conf").write_text("of its own")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "mpirun").touch(0o755)
    assert "of its own" in network.mpi_parameter_files({"HOME": str(tmp_path), "PATH": str(tmp_path / "bin")})


def test_chosen_addresses_and_way_to_mpirun():
    """Addresses that other hosts may connect to, and the interface toward mpirun's host."""
    assert network.chosen_addresses({}, THERE) == ["10.0.0.2"]
    assert network.chosen_addresses({MPI: "docker0"}, THERE) == ["172.17.0.1"]
    assert network.interface_toward_launcher({}, THERE) == ""
    uri = {"OMPI_MCA_orte_hnp_uri": "1534132224.0;tcp://127.0.0.1,127.0.0.2:40791;tcp6://[fd00::2]:48419"}
    assert network.interface_toward_launcher(uri, {"lo": "127.0.0.1"}) == ""  # a loopback leads nowhere
    assert network.interface_toward_launcher(uri, {"eth0": "127.0.0.1"}) == ""


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
        # More connections than hosts: one from each to each address.
        ('for i in 1 2 3 4 5; do bash -c "$*"; done', ["127.0.0.1"] * 100, OK, "b answers and reaches 127.0.0.1"),
        ("sleep 60", ["127.0.0.1"], FAILURE, "b did not answer"),
        (
            "echo 'Host key verification failed.' >&2; exit 255",
            [],
            FAILURE,
            "exited with 255: Host key verification failed.",
        ),
        (f"echo 'bash: {sys.executable}: No such file' >&2; exit 127", [], FAILURE, "exited with 127"),
        ("echo 'Welcome to b'; exit 0", [], FAILURE, "exited with 0: Welcome to b"),
        ('echo "debug1: Sending command: $*" >&2; exit 127', [], FAILURE, "exited with 127"),
        ('echo \'{"reached": "10.0.0.1", "time": 1000}\'', ["10.0.0.1"], WARNING, "s or more off"),
    ],
)
def test_ask_hosts(tmp_path, script, addresses, verdict, told):
    """An agent in place of ssh; what it starts is the real line that connects back."""
    limit = 2 if "sleep" in script else 60
    ((found, _),) = ask_hosts([Host("b", 1)], agent(tmp_path, script), addresses, seconds=limit)
    assert found.verdict == verdict, found
    assert told in found.text
    if "key" in script:
        assert "known_hosts" in found.fix
    if "No such file" in script:
        assert "install the same environment at the same path on b" in found.fix


def test_connect_back_tries_all_addresses_at_once():
    """As behind a firewall that drops: ten sockets whose queues are full. One by one they take 20 s, and a host has 12."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.99", 0)))
        port = server.getsockname()[1]
        silent = [f"127.0.0.{number}" for number in range(2, 12)]
        for address in silent:
            stack.enter_context(socket.create_server((address, port), backlog=0))
            with contextlib.suppress(TimeoutError, socket.timeout):  # one in the queue is as many as it holds
                while True:
                    stack.enter_context(socket.create_connection((address, port), 0.2))
        asked = [sys.executable, "-c", ssh._CONNECT_BACK, str(port), *silent, "127.0.0.99"]
        ended = subprocess.run(asked, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=True)
    assert json.loads(ended.stdout)["reached"] == "127.0.0.99"


@pytest.mark.parametrize(
    ("script", "verdict"),
    [
        ('setsid sleep 40 & bash -c "$*"', OK),  # as an ssh that leaves a ControlPersist master
        ("setsid sleep 40 & sleep 50", FAILURE),
        ('bash -c "$*"; exec sleep 40', OK),  # it has answered
    ],
)
def test_ask_hosts_leaves_agents_children_alone(tmp_path, script, verdict):
    """The process left holds stdout and stderr; had it been waited for, it would run no more."""
    left = tmp_path / "left"
    script = script.replace("&", f"& echo $! > {left};", 1)
    ((found, _),) = ask_hosts([Host("b", 1)], agent(tmp_path, script), ["127.0.0.1"], seconds=4)
    assert found.verdict == verdict, found
    if left.exists():
        pid = int(left.read_text())
        assert b"sleep" in Path(f"/proc/{pid}/cmdline").read_bytes()
        os.kill(pid, signal.SIGKILL)


def test_ask_hosts_missing_agent_is_named():
    """An agent that is not installed is a finding, not an error."""
    ((found, _),) = ask_hosts([Host("b", 1)], "/nowhere/ssh", ["127.0.0.1"], seconds=5)
    assert "/nowhere/ssh" in found.text


def test_default_agent_refuses_unknown_keys():
    """ssh must neither accept a new host key nor ask."""
    assert "StrictHostKeyChecking=yes" in RSH_AGENT
    assert "BatchMode=yes" in RSH_AGENT
