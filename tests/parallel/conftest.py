"""The whole folder runs under mpirun: every rank runs every test in the same order (launch/test.sh does so on 2 and 3)."""

import faulthandler
import os
from typing import TextIO

import pytest

from hvd_vgg.config import ROUNDING, ComputeConfig
from hvd_vgg.parallel import comm
from hvd_vgg.parallel.consensus import run_on_all_ranks
from hvd_vgg.parallel.init import join, take_device

FAILED, STDERR = pytest.StashKey[int](), pytest.StashKey[TextIO]()


def limit_time(config):
    """A rank that waits for another that failed a test would wait for ever: the time limit ends it, and mpirun all."""
    faulthandler.dump_traceback_later(600, exit=True, file=config.stash[STDERR])


def pytest_sessionstart(session):
    with session.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        session.config.stash[STDERR] = os.fdopen(os.dup(2), "w")  # the one that is not captured
    limit_time(session.config)
    join()
    # Else TensorFlow would compute deterministically in all tests, which XLA cannot.
    run_on_all_ranks(lambda: take_device(ComputeConfig(reproducible=ROUNDING)))
    if comm.size() == 1:
        pytest.exit("tests/parallel needs ranks: mpirun -np 2 python -m pytest tests/parallel", returncode=78)


def pytest_exception_interact(node):
    limit_time(node.config)  # again: where a test fails, pytest ends what it takes for its own limit


def pytest_sessionfinish(session, exitstatus):
    session.config.stash[FAILED] = int(exitstatus)


def pytest_unconfigure(config):
    if config.stash.get(FAILED, 0):
        comm.abort(config.stash[FAILED])
    comm.shutdown()
    faulthandler.cancel_dump_traceback_later()
