"""The watchdog's clock, and its alarm; real hangs and suspended jobs are in tests/faults/test_processes.py."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import pytest
from support import ROOT, full

from hvd_vgg import watchdog as module
from hvd_vgg.watchdog import Watchdog


@pytest.fixture
def clock(monkeypatch):
    """The monotonic clock, to be moved."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def watched(clock, monkeypatch):
    """A watchdog whose thread looks only when it is told to, or woken."""
    monkeypatch.setattr(module, "_count_wakes", lambda: 0)
    dog = Watchdog()
    dog.thread, dog.wake = object(), SimpleNamespace(set=dog._look)
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


@pytest.mark.parametrize(
    ("seconds", "wakes", "stopped"),
    [(9, 1512, 0), (600, 100000, 0), (9, 90, 0), (9, 2, 4), (300, 168, 295), (310, 1680, 310 - 1680 * 0.005)],
)
def test_watchdog_tells_a_held_gil_from_a_stop(watched, clock, monkeypatch, seconds, wakes, stopped):
    """Held for long, held in a throttled container, stopped, and stopped after the GIL was held for 1 and 10 s."""
    monkeypatch.setattr(module.sys, "getswitchinterval", lambda: 0.005)
    began, watched.rank = watched.active_seconds(), 1
    monkeypatch.setattr(module, "_count_wakes", lambda: wakes)
    clock[0] += seconds
    assert watched.active_seconds() - began == pytest.approx(seconds - stopped)
    assert watched.stopped_seconds() == pytest.approx(stopped)
    assert (watched.counted_from == clock[0]) == (stopped > 0)  # otherwise the silence counts as one


def test_watchdog_names_a_rank_that_was_stopped(watched, clock, capsys, monkeypatch):
    """Once: where the whole job is, rank 0 says it each time."""
    monkeypatch.setattr(module.storage, "_told", set())
    watched.rank = 3
    for _ in range(2):
        clock[0] += 40
        watched._look()
    error = capsys.readouterr().err
    assert error.count("was stopped for") == 1
    assert f"warning on {socket.gethostname()}: rank 3 was stopped for 40 s" in error


STOPPED = """
    import ctypes, os, signal, sys, time
    from hvd_vgg import watchdog as module
    module._TICK_SECONDS, module._LATE_SECONDS = 0.1, 1.0
    dog = module.Watchdog()
    dog.start(None, 0, 60.0)
    {stderr}
    began, active = time.monotonic(), dog.active_seconds()
    {harm}
    passed = dog.active_seconds() - active
    assert abs(passed + dog.stopped_seconds() - (time.monotonic() - began)) < 0.5
    time.sleep(0.5)
    assert dog.thread.is_alive()
    print(dog.stopped_seconds() > 0, flush=True)
    os._exit(0)
"""
STOP = "os.kill(os.getpid(), signal.SIGSTOP)"
HOLD = "ctypes.PyDLL(None).sleep(2)"


@pytest.mark.parametrize(
    ("harm", "stderr"),
    [
        (HOLD, ""),
        (STOP, "os.dup2(os.open('/dev/full', os.O_WRONLY), 2)"),
        (STOP, "sys.stderr = object()"),
        *full((STOP, ""), (STOP, "sys.stderr.close()"), (STOP, "sys.stderr = None")),
    ],
)
def test_watchdog_survives_a_real_stop(harm, stderr):
    """Or a GIL that is held for as long, which is no stop; also where it cannot say so, for its thread must live."""
    program = textwrap.dedent(STOPPED.format(harm=harm, stderr=stderr))
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE) as process:
        if harm == STOP:
            assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
            time.sleep(2)
            process.send_signal(signal.SIGCONT)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert out.split()[-1:] == [str(harm == STOP).encode()]


def test_watchdog_gives_back_what_its_caller_had(tmp_path):
    """The handler of SIGALRM, though the watchdog's own is set behind Python's back; timer, umask, faulthandler."""
    program = """
        import faulthandler, os, pathlib, signal, sys, time
        from hvd_vgg.watchdog import Watchdog
        rang = []
        signal.signal(signal.SIGALRM, lambda *_: rang.append(1))
        signal.setitimer(signal.ITIMER_REAL, 0.2, 500)
        faulthandler.enable()
        umask = os.umask(0o022)
        dog = Watchdog()
        dog.start(pathlib.Path(sys.argv[1]), 0, 60.0)
        time.sleep(1)
        assert not rang
        dog.stop()
        dog.release()
        time.sleep(0.5)
        assert rang == [1], rang  # its time had come meanwhile
        assert 400 < signal.getitimer(signal.ITIMER_REAL)[0] < 500
        signal.raise_signal(signal.SIGALRM)
        assert rang == [1, 1]
        assert faulthandler.is_enabled() and os.umask(0) == 0o022
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


def test_watchdog_report_where_fsync_is_unknown(tmp_path, monkeypatch):
    """It is there, and its path is what the message names."""

    def refused(handle):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(module.os, "fsync", refused)
    dog = Watchdog()
    dog.run_dir = module.RunDir(tmp_path)
    dog.run_dir.faults.mkdir()
    path = dog._append("hang", {"event": "hang"})
    assert json.loads(path.read_text())["event"] == "hang"


def test_watchdog_alarm_leaves_no_garbage():
    """It is set twice a second for weeks."""
    program = """
        import gc, signal
        from hvd_vgg import watchdog
        watchdog._set_alarm(600)
        gc.collect()
        for _ in range(100):
            watchdog._set_alarm(600)
        print(gc.collect())
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    ended = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60)
    assert int(ended.stdout) < 100


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
