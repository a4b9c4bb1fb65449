"""What doctor concludes from exchanges, correct and wrong; what is wrong here is made so by the test."""

import dataclasses

import numpy as np
import pytest

from hvd_vgg.config import DoctorConfig
from hvd_vgg.doctor import collectives
from hvd_vgg.doctor.collectives import assess_link, check_collectives, check_pairs, measure_link, pattern
from hvd_vgg.parallel import comm, exchange
from hvd_vgg.reporting.findings import FAILURE, OK, WARNING

SMALL = DoctorConfig(num_classes=10, model="vgg11", width=0.125, image_size=32, global_batch=32)


@pytest.fixture(scope="module")
def link():
    """The link between the ranks, measured once."""
    return measure_link("/CPU:0")


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
    (found,) = assess_link(measure_link("/CPU:0"), "/CPU:0", 0.0)
    assert (found.verdict, "a sum of 16 MB over all ranks by mpi is wrong" in found.text) == (FAILURE, True)


def test_sums_and_gathers_that_are_wrong(monkeypatch, link):
    """One number of the last kernel is off by one on rank 1, and all of a gathered factor."""
    assert [each.verdict for each in check_collectives(SMALL, "/CPU:0", link)] == [OK, OK]
    gather_factors, kernel = exchange.gather_factors, 512 * 10

    def gather_wrong(name, *rest):
        x, d = gather_factors(name, *rest)
        return x, d + (name == "fc2")

    def pattern_wrong(count, rank):
        return pattern(count, rank) + np.eye(1, count, 7, dtype=np.float32)[0] * (
            count == kernel and rank == comm.rank() == 1
        )

    monkeypatch.setattr(collectives, "pattern", pattern_wrong)
    monkeypatch.setattr(exchange, "gather_factors", gather_wrong)
    sums, gathers = check_collectives(SMALL, "/CPU:0", link)
    assert (sums.verdict, gathers.verdict) == (FAILURE, FAILURE)
    assert sums.text.endswith(": wrong: predictions/kernel")
    assert gathers.text.endswith(": wrong: fc2 outputs")


@pytest.mark.parametrize(("gbit", "verdict"), [(1e-6, OK), (1e6, WARNING)])
def test_rates_are_compared_with_plan(monkeypatch, link, gbit, verdict):
    """As on several hosts, with one rank each."""
    monkeypatch.setattr(comm, "local_size", lambda: 1)
    assert assess_link(link, "/CPU:0", gbit)[0].verdict == verdict
    found = check_collectives(dataclasses.replace(SMALL, gbit=gbit), "/CPU:0", link)
    assert all(f"`plan` with --gbit={gbit:g} assumes" in each.text for each in found)
    # This network sends too little to show a rate: its latencies alone take as long.
    assert [each.verdict for each in found] == [OK, OK] or gbit > 1
