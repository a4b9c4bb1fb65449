"""What doctor concludes from exchanges, correct and wrong; what is wrong here is made so by the test."""

import numpy as np
import pytest

from hvd_vgg.config import DoctorConfig
from hvd_vgg.doctor import collectives
from hvd_vgg.doctor.collectives import assess_exchange, check_collectives, check_pairs, measure_link, pattern
from hvd_vgg.parallel import comm, exchange
from hvd_vgg.reporting.findings import FAILURE, OK, WARNING

SMALL = DoctorConfig(num_classes=10, model="vgg11", width=0.125, image_size=32, global_batch=32, device_batch=8)


@pytest.fixture(scope="module")
def link():
    """The link between the ranks, measured once: the seconds of a small sum, and a large one."""
    return measure_link("/CPU:0", "mpi")


@pytest.fixture(scope="module")
def measured(link):
    """What --collectives is told of the link."""
    return "/CPU:0", {"sums": "mpi", "gathers": "mpi"}, link[0]


def test_sendrecv_is_between_two_ranks_only():
    for _ in range(2):  # the second time Horovod knows the name
        received = comm.sendrecv(0, 1, 7)
        assert received.tolist() == ([1.0 - comm.rank()] * 7 if comm.rank() < 2 else [])


def test_pairs_of_hosts(monkeypatch):
    """They are measured, and what arrives is compared."""
    names = ["a", *["b"] * (comm.size() - 1)]
    (found,) = check_pairs(names)
    assert (found.verdict, found.text.startswith("between hosts by mpi, ")) == (OK, True)
    sendrecv = comm.sendrecv
    monkeypatch.setattr(comm, "sendrecv", lambda *asked: sendrecv(*asked) + (comm.rank() == 1))
    found = check_pairs(names)
    assert [each.verdict for each in found] == ([FAILURE, OK] if comm.rank() == 1 else [OK])


def test_link_with_a_wrong_sum(monkeypatch):
    large = collectives._LINK_BYTES // 4
    one_off = np.eye(1, large, 5, dtype=np.float32)[0] if comm.rank() == 1 else 0.0
    monkeypatch.setattr(collectives, "pattern", lambda n, rank: pattern(n, rank) + (one_off if n == large else 0.0))
    monkeypatch.setattr(collectives, "_LATENCY_REPEATS", 1)
    latency, sums = measure_link("/CPU:0", "mpi")
    found = assess_exchange("link", sums, latency, None, "/CPU:0")
    assert (found.about, found.verdict) == ("link", FAILURE)
    assert found.text.endswith(" ms: wrong: doctor_large/numbers")


def test_sums_and_gathers_that_are_wrong(monkeypatch, measured):
    """One number of the last kernel is off by one on rank 1, and of the limits, and all of a gathered factor."""
    assert [each.verdict for each in check_collectives(SMALL, *measured, None)] == [OK] * 4
    gather_rows, kernel, limits = exchange.gather_rows, 512 * 10, 3 * 2 * 11

    def gather_wrong(rows, name, *rest):
        return gather_rows(rows, name, *rest) + (name == "fc2_outputs")

    def pattern_wrong(count, rank):
        return pattern(count, rank) + np.eye(1, count, 7, dtype=np.float32)[0] * (
            count in (kernel, limits) and rank == comm.rank() == 1
        )

    monkeypatch.setattr(collectives, "pattern", pattern_wrong)
    monkeypatch.setattr(exchange, "gather_rows", gather_wrong)
    *sums, tally, gathers = check_collectives(SMALL, *measured, None)
    assert [each.verdict for each in (*sums, tally, gathers)] == [FAILURE] * 4
    assert all(each.text.endswith(": wrong: predictions/kernel") for each in sums)  # as float32 and as int32
    assert tally.text.endswith(": wrong: doctor_limits")
    assert gathers.text.endswith(": wrong: fc2 outputs")


@pytest.mark.parametrize(("gbit", "verdict"), [(1e-6, OK), (1e6, WARNING)])
def test_rates_are_compared_with_plan(link, measured, gbit, verdict):
    """As on several hosts."""
    latency, sums = link
    assert assess_exchange("link", sums, latency, gbit, "/CPU:0").verdict == verdict
    found = check_collectives(SMALL, *measured, gbit)
    assert all(f"`plan` with --gbit={gbit:g} assumes" in each.text for each in found)
    # This network sends too little to show a rate: its latencies alone take as long.
    assert [each.verdict for each in found] == [OK] * 4 or gbit > 1
