"""What doctor concludes from exchanges, right and wrong; what is wrong here is made so by the test."""

import dataclasses

import numpy as np
import pytest

from hvd_vgg.config import DoctorConfig
from hvd_vgg.doctor import collectives
from hvd_vgg.doctor.collectives import check_collectives, check_link, check_pairs, pattern
from hvd_vgg.parallel import comm, exchange
from hvd_vgg.reporting.findings import FAILURE, OK, WARNING

SMALL = DoctorConfig(num_classes=10, model="vgg11", width=0.125, image_size=32, global_batch=32)


def test_two_ranks_swap_and_the_others_get_nothing():
    for _ in range(2):  # the second time Horovod knows the name
        got = comm.sendrecv(0, 1, 7)
        assert got.tolist() == ([1.0 - comm.rank()] * 7 if comm.rank() < 2 else [])


def test_pairs_of_hosts_are_measured_and_what_came_compared(monkeypatch):
    names = ["a", *["b"] * (comm.size() - 1)]
    (found,) = check_pairs(names, "mpi")
    assert (found.verdict, found.text.startswith("between hosts by mpi, ")) == (OK, True)
    right = comm.sendrecv
    monkeypatch.setattr(comm, "swap", lambda *asked: right(*asked) + (comm.rank() == 1))
    found = check_pairs(names, "mpi")
    assert [each.verdict for each in found] == ([FAILURE, OK] if comm.rank() == 1 else [OK])


def test_a_large_sum_that_is_wrong_is_a_failure(monkeypatch):
    right = pattern
    large = collectives._QUICK_BYTES // 4
    one_off = np.eye(1, large, 5, dtype=np.float32)[0] if comm.rank() == 1 else 0.0
    monkeypatch.setattr(collectives, "pattern", lambda n, rank: right(n, rank) + (one_off if n == large else 0.0))
    (found,) = check_link("/CPU:0", None)
    assert (found.verdict, "a sum of 16 MB over ranks by mpi is wrong" in found.text) == (FAILURE, True)


def test_gathered_rows_that_are_wrong_are_a_failure(monkeypatch):
    sums, gathers = check_collectives(SMALL, "/CPU:0")
    assert (sums.verdict, gathers.verdict) == (OK, OK)
    right = exchange.gather_factors

    def wrong(name, *rest):
        x, d = right(name, *rest)
        return x, d + (name == "fc2")

    monkeypatch.setattr(exchange, "gather_factors", wrong)
    sums, gathers = check_collectives(SMALL, "/CPU:0")
    assert (sums.verdict, gathers.verdict) == (OK, FAILURE)
    assert "wrong: fc2 outputs" in gathers.text


@pytest.mark.parametrize(("gbit", "verdict"), [(1e-6, OK), (1e6, WARNING)])
def test_rates_are_held_against_what_plan_was_told(monkeypatch, gbit, verdict):
    """As on several hosts: each rank is then alone on its own."""
    monkeypatch.setattr(comm, "local_size", lambda: 1)
    assert check_link("/CPU:0", gbit)[0].verdict == verdict
    found = check_collectives(dataclasses.replace(SMALL, gbit=gbit), "/CPU:0")
    assert all(f"`plan` with --gbit={gbit:g} assumes" in each.text for each in found)
    # What the network sends here is too little for a rate: its latencies alone take as long.
    assert [each.verdict for each in found] == [OK, OK] or gbit > 1
