"""The watchdog's clock, and its alarm; real hangs and suspended jobs are in tests/faults/test_processes.py."""

import signal
import subprocess
import sys
import time

import pytest
from support import ROOT

from hvd_vgg import watchdog as module
from hvd_vgg.watchdog import Watchdog


@pytest.fixture
def clock(monkeypatch):
    """The monotonic clock, to be moved."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def watched(clock):
    """A watchdog whose thread looks only when it is told to."""
    dog = Watchdog()
    dog.thread = object()
    return dog


def test_watchdog_clock_stands_still_while_stopped(watched, clock, capsys):
    """Whoever reads it first after a stop of a night, this thread or another: never back, and 5 s of the stop at most."""
    began, readings = watched.active_seconds(), []
    for step, looks in ((0.5, True), (0.5, True), (30000.0, False), (0.1, False), (0.1, True), (0.5, True), (1.9, True)):
        clock[0] += step
        if looks:
            watched._look()
        readings.append(watched.active_seconds() - began)
    assert readings == pytest.approx([0.5, 1.0, 6.0, 6.1, 6.2, 6.7, 8.6])
    assert watched.stopped_seconds() == pytest.approx(30000.0 - 5.0)
    assert capsys.readouterr().err.count("this process was stopped for 30000 s") == 1


def test_watchdog_counts_anew_after_a_stop(watched, clock):
    """The silence before it is none, and the update around it no measure of how long updates take."""
    watched.heartbeat(1)
    for step in (2, 3):
        clock[0] += 0.5
        watched._look()
        watched.heartbeat(step)
    clock[0] += 500.0
    watched._look()
    assert watched.counted_from == clock[0]
    watched.heartbeat(4)
    assert max(watched.update_seconds) == 0.5
    clock[0] += 0.5
    watched._look()
    watched.heartbeat(5)
    assert len(watched.update_seconds) == 3


def test_watchdog_clock_goes_on_without_a_thread(clock):
    """Before `start` and after `stop` it is the monotonic clock, less what the process was stopped."""
    dog = Watchdog()
    clock[0] += 100.0
    assert dog.active_seconds() == clock[0]


def test_watchdog_alarm_ends_a_process_at_the_second_signal():
    """The first may be due to a stop; the default action of the second needs no GIL."""
    program = "from hvd_vgg import watchdog; import time\nwatchdog._set_alarm(600)\nprint(flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGALRM)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGALRM)
        assert process.wait(20) == -signal.SIGALRM
