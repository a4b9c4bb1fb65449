"""Whose fault an end was, which hosts a start uses, and what a check of hosts says."""

import os
import socket

import pytest

from hvd_vgg.errors import LOST_RANK
from hvd_vgg.launcher.exit_status import ExitStatus
from hvd_vgg.launcher.host_faults import HostFaults, check_hosts, find_faulty_host, hosts_in_use
from hvd_vgg.launcher.hostfile import Host

HOSTS = [Host("node1", 2), Host("node2.site", 2)]


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (1, [Host("node1", 1)]),
        (2, [Host("node1", 2)]),
        (3, [Host("node1", 2), Host("node2.site", 1)]),
        (4, HOSTS),
    ],
)
def test_first_hosts_are_used_and_others_spare(ranks, expected):
    assert hosts_in_use([*HOSTS, Host("node3", 2)], ranks) == expected


def test_host_is_left_out_after_two_faults():
    """It is said once; the last hosts are never left out."""
    faults = HostFaults()
    assert faults.add("node1", "one") == ""
    assert faults.usable(HOSTS) == HOSTS
    assert faults.add("node1", "two") == "node1 is left out from now on, after 2 faults of its own: one; two"
    assert faults.add("node1", "three") == ""
    assert faults.usable(HOSTS) == HOSTS[1:]
    assert faults.add("node2.site", "one") == "" != faults.add("node2.site", "two")
    assert faults.usable(HOSTS) == HOSTS


@pytest.mark.parametrize("place", [0, 1, 2])
def test_own_host_has_the_first_ranks(place):
    """As Open MPI has it: `mpirun --host a:1,THIS:1` starts rank 0 here."""
    own = Host(socket.gethostname(), 2)
    hosts = [*HOSTS[:place], own, *HOSTS[place:]]
    assert hosts_in_use(hosts, 6) == [own, *HOSTS]
    assert hosts_in_use(hosts, 3) == [own, Host("node1", 1)]


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (ExitStatus(137, "", rank=1), "node1"),
        (ExitStatus(139, "", rank=2), "node2.site"),
        (ExitStatus(LOST_RANK, "", host="node2"), "node2.site"),
        (ExitStatus(LOST_RANK, "", host="node2.site"), "node2.site"),
        (ExitStatus(LOST_RANK, "", host="10.0.0.9"), ""),
        (ExitStatus(LOST_RANK, ""), ""),
        (ExitStatus(137, "", rank=4), ""),
    ],
)
def test_faulty_host_is_that_of_the_rank_at_fault(status, expected):
    assert find_faulty_host(status, HOSTS) == expected


def test_faulty_host_of_addresses():
    hosts = [Host("10.0.0.1", 1), Host("10.0.0.2", 1)]
    assert find_faulty_host(ExitStatus(LOST_RANK, "", host="10.0.0.2"), hosts) == "10.0.0.2"


def test_single_host_is_never_blamed():
    assert find_faulty_host(ExitStatus(137, "", rank=0), [Host("node1", 2)]) == ""
    assert find_faulty_host(ExitStatus(137, "", rank=0), []) == ""


def test_checks_name_hosts_that_fail_them():
    """By doctor's first failure, or the last line of what was printed in its place."""
    printed = {
        "good": "echo 'ok       devices      fine'",
        "bad": "echo 'failure  devices      GPU 3 cannot allocate'; echo '  fix: exclude it'; exit 78",
        "gone": "echo 'ssh: no route' >&2; exit 255",
        "killed": "kill -SEGV $$",
    }
    wrong = check_hosts([Host(name, 1) for name in printed], lambda host: ["sh", "-c", printed[host.name]], dict(os.environ))
    assert wrong == {"bad": "devices GPU 3 cannot allocate", "gone": "ssh: no route", "killed": "doctor ended with -11"}


def test_checks_end_when_the_job_is_to_stop(tmp_path):
    """And not when they are done."""
    command = ["sh", "-c", f"touch {tmp_path}/begun; sleep 100; touch {tmp_path}/done"]
    check_hosts([Host("slow", 1)], lambda host: command, dict(os.environ), (tmp_path / "begun").exists)
    assert not (tmp_path / "done").exists()
