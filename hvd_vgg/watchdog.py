"""Per-process watchdog: detects hangs, writes a hang report, and handles stop signals.

The trainer calls `heartbeat` whenever it makes progress, and a thread checks on it: a rank that is silent for too long
writes a hang report, waits a moment for the other ranks to do the same, and exits with code 75, which ends the job. Ranks
that merely wait for a hung one are silent just as long, and exit with it. Three more safety nets back this one up: where the
GIL is never released, so that no thread can run, `faulthandler` writes the stacks from C and SIGALRM ends the process;
Horovod's stall inspector names the tensor that ranks wait for (`parallel.init`); and the launcher may limit the time of the
whole job.

A job that is suspended (SIGSTOP, a frozen cgroup, a paused virtual machine) is no hang. The thread looks several times a
second; where it was away for long, and was not merely waiting for the GIL, this process was stopped, and everything is
counted anew. `active_seconds` is a clock that leaves such times out. A rank that is stopped alone remains a hang: the
threads of the others were not away.

Everything goes to RUN_DIR/faults: `fatal.rankN.jsonl` (why this rank alone ended the job), `hang.rankN.jsonl` (the report),
`stacks.rankN.txt`. Lines are appended, so that what happened before a restart is kept.
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import resource
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import IO, Any, Callable, Deque, Dict, Iterator, NamedTuple, Optional, Tuple, Union

from hvd_vgg import storage
from hvd_vgg.environment import launched_rank
from hvd_vgg.errors import LOST_RANK, STOPPED
from hvd_vgg.run_dir import RunDir
from hvd_vgg.streams import write_line

# How much longer than an update a start, an evaluation or a save may take.
SLOW_PHASE_FACTOR = 10
# Without --hang_seconds: this many median updates, and at least this long.
MIN_HANG_SECONDS, _MEDIANS = 60.0, 20
# Ranks in one collective fall silent within an update of each other; this long they may write their reports.
_REPORT_SECONDS = 2.0
# How often the thread looks, and how late it may be on a busy host before this process counts as having been stopped.
_TICK_SECONDS, _LATE_SECONDS = 0.5, 5.0
# A thread that waits for the GIL wakes every 5 ms (sys.getswitchinterval), one of a stopped process does not. So far apart
# are these moments at most on a host, or in a container, that is short of processors.
_WAKE_SECONDS = 0.1
# From a SIGALRM that may be due to such a stop to the one that ends the process: the number of the signal, see `_set_alarm`.
_SECOND_ALARM_SECONDS = float(signal.SIGALRM)
_LIBC = ctypes.CDLL(None)
if hasattr(_LIBC, "sysv_signal"):
    _LIBC.sysv_signal.argtypes, _LIBC.sysv_signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p


class _Found(NamedTuple):
    """What `Watchdog.start` changes in a process, before it does; Python has the handlers of signals besides."""

    time: float
    timer: Tuple[float, float]
    faulthandler: bool
    umask: int


class StopRequested(Exception):
    """All ranks know that one of them was asked to stop; raised by all at the same point."""


class Watchdog:
    """Watches this process from `start` to `stop`; before and after, a heartbeat does nothing."""

    def __init__(self) -> None:
        self._stop_requested = threading.Event()
        self._handlers: Dict[int, Any] = {}  # those in place before this one's
        self._seen = (time.monotonic(), 0.0)  # when the thread last looked; seconds stopped by then
        self._looked = threading.Condition()
        self._wakes = 0  # of the thread, by then
        self._found: Optional[_Found] = None  # how `start` found this process
        self._reset()

    def _reset(self) -> None:
        self.rank, self.hang_seconds = 0, 0.0
        self.run_dir: Optional[RunDir] = None  # None where RUN_DIR/faults cannot be written
        self.stacks: Optional[IO[str]] = None
        # When, in what phase, after how many updates; replaced whole, so that no lock is needed.
        self.last: Tuple[float, str, Optional[int]] = (time.monotonic(), "start", None)
        self.counted_from = 0.0  # no silence before this is a hang: when this process was continued
        self.update_seconds: Deque[float] = deque(maxlen=101)
        self.last_collective = ""
        self.reports: Dict[str, Callable[[], Any]] = {}
        self.wake = threading.Event()
        self.thread: Optional[threading.Thread] = None

    def start(self, run_dir: Optional[Path], rank: int, hang_seconds: float) -> None:
        """Starts watching; the first call of every rank, before it joins the others.

        hang_seconds: how long an update may take; 0: 20 times the median one, at least 60. Starting, evaluating and saving
        may take SLOW_PHASE_FACTOR times as long. Where RUN_DIR/faults cannot be written, reports go to stderr.
        """
        if self.thread is not None:
            raise RuntimeError("the watchdog of this process is running already")
        self._reset()
        self.rank, self.hang_seconds = rank, hang_seconds
        umask = os.umask(0o027)
        os.umask(umask | (0o027 if run_dir else 0))  # what a run writes is for its owner and group
        if self._found is None:
            timer = signal.getitimer(signal.ITIMER_REAL)
            self._found = _Found(time.monotonic(), timer, faulthandler.is_enabled(), umask)
            self._handlers[signal.SIGALRM] = signal.getsignal(signal.SIGALRM)
        if run_dir is not None:
            with contextlib.suppress(OSError):  # whoever must write there reports it better
                paths = RunDir(run_dir)
                paths.faults.mkdir(parents=True, exist_ok=True, mode=0o750)
                self.stacks = open(paths.stacks(rank), "a", encoding="utf-8")  # noqa: SIM115 (it stays open)
                self.run_dir = paths
        faulthandler.enable(self.stacks or _stacks_to_stderr())
        self._seen = (time.monotonic(), self._seen[1])
        self.thread = threading.Thread(target=self._watch, args=[self.wake], name="watchdog", daemon=True)
        self.thread.start()

    def start_leaving(self) -> None:
        """Notes that this rank is about to leave the others; it is watched from here on if it was not before."""
        if self.thread is None:
            self.start(None, launched_rank() or 0, 0.0)
        self.heartbeat(phase="leaving")

    def stop(self) -> None:
        """Stops watching a rank that has left the others; SIGALRM ends the process if it does not exit within the limit.

        The stacks of all its threads go to stderr first. Removes this rank's file of stacks if nothing was written to it,
        and `faults` if it is empty.
        """
        if self.thread is None:
            return
        thread, self.thread = self.thread, None
        self.wake.set()
        thread.join()  # it would set again the timers that are set here
        faulthandler.disable()
        limit = self._limit_seconds("leaving")
        faulthandler.dump_traceback_later(limit, file=_stacks_to_stderr())
        _set_alarm(limit + _REPORT_SECONDS / 2)  # Python's own shutdown may hold the GIL
        if self.stacks and self.run_dir:
            self.stacks.close()
            with contextlib.suppress(OSError):
                path = Path(self.stacks.name)
                if path.stat().st_size == 0:
                    path.unlink()
                self.run_dir.faults.rmdir()  # only if it is empty: nothing went wrong on any rank

    def heartbeat(self, step: Optional[int] = None, phase: str = "update") -> None:
        """Notes that this rank made progress: with `step` updates done, or in another phase than updates."""
        if self.thread is None:
            return
        before, last_phase, last_step = self.last
        now = time.monotonic()
        # One in which the process was stopped says nothing of how long an update takes.
        if phase == last_phase == "update" and step != last_step and self.counted_from <= before:
            self.update_seconds.append(now - before)
        self.last = (now, phase, last_step if step is None else step)
        if phase != last_phase:
            self.wake.set()  # another limit applies

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Allows what is inside (evaluation, saving) SLOW_PHASE_FACTOR times the silence of an update."""
        before = self.last[1] if self.thread else "update"
        self.heartbeat(phase=name)
        yield
        self.heartbeat(phase=before)

    def active_seconds(self) -> float:
        """Returns a monotonic clock, in seconds, that stands still while this process is stopped, but for _LATE_SECONDS."""
        seen = self._seen
        if self.thread and time.monotonic() - seen[0] > _LATE_SECONDS:  # the thread has still to judge what that was
            self.wake.set()
            with self._looked:
                self._looked.wait_for(lambda: self._seen is not seen or self.thread is None, _LATE_SECONDS)
        return time.monotonic() - self._seen[1]

    def stopped_seconds(self) -> float:
        """Returns how long this process has been stopped so far: what `active_seconds` leaves out."""
        self.active_seconds()
        return self._seen[1]

    def note_collective(self, name: str) -> None:
        """Notes the collective that this rank entered last, for the hang report."""
        self.last_collective = name

    def add_to_report(self, name: str, value: Callable[[], Any]) -> None:
        """Adds `value()` to this rank's hang report, under `name`."""
        self.reports[name] = value

    def record_fatal(self, code: int, error: str) -> None:
        """Writes why this rank, alone, is about to end the job with exit code `code`."""
        self._append("fatal", {"event": "fatal", "code": code, "error": error})

    def exit_when_asked(self) -> None:
        """Until `save_when_asked`, SIGTERM and SIGUSR1 end this rank with 80: nothing is trained yet that it could save.

        To be called in the main thread.
        """

        def leave(number: int, frame: Any) -> None:
            if not launched_rank():
                with contextlib.suppress(OSError):  # written so, for the signal may have arrived during a print
                    os.write(2, b"hvd-vgg: stopped on request, before the first update\n")
            os._exit(STOPPED)

        self._handle(leave, signal.SIGTERM, signal.SIGUSR1)

    def save_when_asked(self) -> None:
        """From now on SIGTERM, SIGINT and SIGUSR1 set `stop_requested`; another SIGINT interrupts at once. Main thread."""

        def request(number: int, frame: Any) -> None:
            if number == signal.SIGINT:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            self._stop_requested.set()

        self._handle(request, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def _handle(self, handler: Callable[[int, Any], None], *numbers: int) -> None:
        for number in numbers:
            self._handlers.setdefault(number, signal.signal(number, handler))

    def release(self) -> None:
        """Returns a process that goes on after `stop` to what it was: signal handlers, timer, umask, faulthandler."""
        found, self._found = self._found, None
        if found:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            faulthandler.cancel_dump_traceback_later()
            os.umask(found.umask)
            if found.faulthandler:
                faulthandler.enable(_stacks_to_stderr())
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not Python's
        self._handlers.clear()
        self._stop_requested.clear()
        if found and found.timer[0]:  # if its time has come meanwhile, at once
            left = found.timer[0] - (time.monotonic() - found.time)
            signal.setitimer(signal.ITIMER_REAL, max(left, 1e-3), found.timer[1])

    def stop_requested(self) -> bool:
        """Returns whether this rank was asked to stop. The ranks must agree before any of them does."""
        return self._stop_requested.is_set()

    def _limit_seconds(self, phase: str) -> float:
        base = self.hang_seconds or max(MIN_HANG_SECONDS, _MEDIANS * statistics.median(self.update_seconds or [0.0]))
        # The first update also compiles and allocates, for which there is no measure.
        return base if phase == "update" and self.update_seconds else SLOW_PHASE_FACTOR * base

    def _watch(self, wake: threading.Event) -> None:
        self._wakes = _count_wakes()
        while self.thread is not None:
            self._look()
            since, phase, step = self.last
            limit, silent = self._limit_seconds(phase), time.monotonic() - max(since, self.counted_from)
            if silent > limit:
                faulthandler.cancel_dump_traceback_later()
                try:
                    self._report_hang(phase, step, silent, limit)
                finally:  # even where nothing can be written any more
                    time.sleep(_REPORT_SECONDS)
                    os._exit(LOST_RANK)
            # Both go off by themselves should this thread never run again.
            faulthandler.dump_traceback_later(limit - silent + _REPORT_SECONDS / 2, file=self.stacks or _stacks_to_stderr())
            _set_alarm(limit - silent + SLOW_PHASE_FACTOR * _REPORT_SECONDS)
            wake.wait(min(_TICK_SECONDS, limit / 10))
            wake.clear()

    def _look(self) -> None:
        """Notes, on the watchdog's thread, that this process runs; counts anew if it was stopped, and says so."""
        (seen, stopped), now, wakes = self._seen, time.monotonic(), _count_wakes()
        woken, self._wakes = wakes - self._wakes, wakes
        away = 0.0
        if now - seen - woken * _WAKE_SECONDS > _LATE_SECONDS:
            away = now - seen - max(_LATE_SECONDS, woken * sys.getswitchinterval())  # a part may have been a held GIL
            self.counted_from = now
        with self._looked:
            self._seen = (now, stopped + away)
            self._looked.notify_all()
        if away > 0:
            with contextlib.suppress(Exception):  # whatever stderr is: without this thread SIGALRM would end the process
                self._report_stop(now - seen)

    def _report_stop(self, seconds: float) -> None:
        text = f"was stopped for {seconds:.0f} s (suspended?): no hang, and not counted"
        if self.stacks:
            with contextlib.suppress(OSError):  # where faulthandler's time was over too
                self.stacks.write(f"this process {text}; stacks of that moment may be above or below\n")
                self.stacks.flush()
        if self.rank == 0:
            write_line(f"hvd-vgg: this process {text}", sys.stderr)
        else:  # once: of a job that is suspended every night rank 0 speaks
            storage.warn_once("stopped", f"rank {self.rank} {text}; if the other ranks were not, they waited for it")

    def _report_hang(self, phase: str, step: Optional[int], silent: float, limit: float) -> None:
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            stacks = file.read()
        report: Dict[str, Any] = {"event": "hang", "phase": phase, "step": step, "last_collective": self.last_collective}
        report.update(silent_seconds=round(silent, 1), limit_seconds=limit)
        report.update({name: value() for name, value in self.reports.items()})
        path = self._append("hang", {**report, "stacks": stacks.splitlines()})
        where = f"{phase} {step}" if phase == "update" and step is not None else phase
        text = (
            f"hvd-vgg: rank {self.rank} ({socket.gethostname()}): no progress for {silent:.0f} s after {where} "
            f"(--hang_seconds allows {limit:.0f}): this rank, or one that it waits for, is stuck. "
            f"Hang report: {path or 'see below'}"
        )
        print(text if path else f"{text}\n{stacks}", file=sys.stderr, flush=True)

    def _append(self, name: str, data: Dict[str, Any]) -> Optional[Path]:
        """Appends one line, on disk when this returns; returns the file, or None where none can be written."""
        if self.run_dir is None:
            return None
        _, phase, step = self.last
        line = {"time": time.time(), "rank": self.rank, "host": socket.gethostname(), "step": step, "phase": phase, **data}
        path = self.run_dir.fault_report(name, self.rank)
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                storage.sync(file.fileno(), path)
        except OSError:
            return None
        return path


def _set_alarm(seconds: float) -> None:
    """Has SIGALRM end this process after `seconds` unless this is called again before, even where the GIL is never released.

    A process that was stopped gets the signal when it is continued, before any thread of it runs. So the first one does not
    end it: its handler is the C library's own `alarm`, called with the signal's number, 14, which asks for a second one 14 s
    later. `sysv_signal` has the handler serve once, so that the second one ends the process. None of it needs the GIL.
    """
    if hasattr(_LIBC, "sysv_signal"):
        _LIBC.sysv_signal(signal.SIGALRM, ctypes.cast(_LIBC.alarm, ctypes.c_void_p))
        seconds = max(seconds - _SECOND_ALARM_SECONDS, _REPORT_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _count_wakes() -> int:
    """Returns how often this thread has waited for something so far."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


def _stacks_to_stderr() -> Union[IO[str], int]:
    """Returns where faulthandler may write: stderr, or its descriptor where the caller has put something else there."""
    try:
        return sys.stderr if sys.stderr.fileno() >= 0 else 2
    except (AttributeError, OSError, ValueError):
        return 2


# The one of this process; `hvd_vgg.__main__` starts it for the commands that need it, `parallel.comm.shutdown` stops it.
watchdog = Watchdog()
