"""Runs one mpirun and stops it."""

import contextlib
import math
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import IO, Any, Dict, Sequence, Set

import psutil

from hvd_vgg.environment import environment_of_job
from hvd_vgg.errors import CONFIGURATION, DONE, LOST_RANK, STOPPED, Failure
from hvd_vgg.launcher.deadline import Deadline
from hvd_vgg.launcher.exit_status import ExitStatus, explain, oom_kills
from hvd_vgg.launcher.parent_death import dies_with
from hvd_vgg.parallel.cores import thread_limit
from hvd_vgg.streams import clear_bar, note_copied, write_line

# Between SIGTERM and SIGKILL to mpirun, which needs two seconds to end ranks that do not exit by themselves.
_TERMINATE_SECONDS = 5.0
# Grace period for mpirun after the local ranks have exited: the ranks of a job exit within seconds of each other.
_LINGER_SECONDS = 30.0
# Time limit for mpirun to reach all hosts and start the first rank.
_START_SECONDS = 120.0
# Once a stop was requested, the reader of our stdout and stderr gets this long to take what mpirun printed.
_COPY_SECONDS = 1.0
_POLL_SECONDS = 0.1
_TAIL_BYTES = 20_000
_STDOUT, _STDERR = 1, 2  # descriptors
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_STOP_REQUESTED, _TIME_LIMIT = "stopped on request", "--time_limit_seconds has passed"
_NOT_STARTED = f"mpirun started no rank within {_START_SECONDS:g} s and was terminated"
_RANKS_GONE = (
    f"all ranks on this host had exited, but mpirun was still waiting {_LINGER_SECONDS:g} s later and was terminated"
)


def log_line(text: str) -> None:
    """Prints a line of the launcher to stderr."""
    write_line(f"hvd-vgg launch: {text}", sys.stderr)


class StopRequests(contextlib.ExitStack):
    """Requests to stop the job: SIGTERM, SIGINT, SIGHUP and SIGUSR1 inside the `with` block, and its time limit.

    grace_seconds: how long ranks may take to stop; until: time.monotonic() at which the job is to be stopped. Main thread
    only.
    """

    def __init__(self, grace_seconds: float, until: float = math.inf) -> None:
        super().__init__()
        self.grace_seconds, self.until = grace_seconds, until
        self.count = 0  # of signals

    def __enter__(self) -> "StopRequests":
        # A parent may have left SIGCHLD ignored; then the kernel keeps no exit codes.
        handlers: Dict[signal.Signals, Any] = {signal.SIGCHLD: signal.SIG_DFL}
        handlers.update({each: self._handle for each in STOP_SIGNALS if signal.getsignal(each) != signal.SIG_IGN})  # nohup
        for number, handler in handlers.items():
            # None: what handled it before is not of Python, and cannot be set from here.
            self.callback(signal.signal, number, signal.signal(number, handler) or signal.SIG_DFL)
        return self

    def _handle(self, number: int, frame: Any) -> None:
        self.count += 1

    def reason(self) -> str:
        """Returns why the job is to be stopped; "" if it is not."""
        if self.count:
            return _STOP_REQUESTED
        return _TIME_LIMIT if time.monotonic() > self.until else ""


def run(command: Sequence[str], requests: StopRequests, ranks_here: bool = True) -> ExitStatus:
    """Runs mpirun to its end and returns how it ended; the kernel kills it if this process dies.

    Copies its stdout and stderr as they come. The terminal's Ctrl-C does not reach it: a request makes it send SIGUSR1 to
    all ranks, which save and exit; if they have not after the grace period, or at another request, it is terminated.
    ranks_here: whether any ranks are on this host.
    """
    kills_before = oom_kills()
    parent_death = dies_with(os.getpid())
    try:
        process = Popen(  # noqa: S603 (what it runs is the user's)
            command,
            bufsize=0,
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=PIPE,
            env=environment_of_job(os.environ),
            start_new_session=True,
            preexec_fn=parent_death,
        )
    except OSError as error:  # such as no process left to this user
        limit = thread_limit(Path("/"))[1] or "look for free memory and processes (ulimit -a)"
        raise Failure(CONFIGURATION, f"mpirun cannot be started: {error.strerror} ({limit})") from error
    out_tail, tail, ended = bytearray(), bytearray(), threading.Event()
    streams = ((process.stdout, _STDOUT, out_tail, ended), (process.stderr, _STDERR, tail, ended))
    pumps = [threading.Thread(target=_copy_output, args=stream, daemon=True) for stream in streams]
    for pump in pumps:
        pump.start()
    reason = _watch(process, requests, ranks_here)
    terminated = _stop(process, requests, reason) if reason else False
    ended.set()
    patience = Deadline(_COPY_SECONDS)
    for pump in pumps:
        while pump.is_alive() and not ((reason or requests.count) and patience.passed()):
            pump.join(_POLL_SECONDS)
    stderr, stdout = (each.decode(errors="replace") for each in (tail, out_tail))
    status = explain(process.returncode, stderr, oom_kills() - kills_before, stdout)
    return _stopped_status(reason, terminated, status)


def _copy_output(source: IO[bytes], target: int, tail: bytearray, ended: threading.Event) -> None:
    """Copies an output of mpirun to the descriptor `target` and keeps its last bytes in `tail`. Runs in a thread.

    A bar that a rank draws on stdout is erased before what any rank says on stderr, which would be glued to it.

    Where our reader is slow, as a pager is, mpirun waits for it, while the main thread goes on handling requests. Returns at
    the end of `source`; or, for a process that mpirun left behind may keep it open, when `ended` is set and all is copied.
    """
    with source:
        while True:
            last = ended.is_set()  # asked first: all that mpirun wrote can then be read
            if select.select([source], [], [], 0.0 if last else 1.0)[0]:
                data = os.read(source.fileno(), 65536)
                tail += data
                del tail[:-_TAIL_BYTES]
                if target == _STDERR:
                    clear_bar()
                _write(target, data)
                if target == _STDOUT:
                    note_copied(data)
                last = not data
            if last:
                return


def _write(descriptor: int, data: bytes) -> None:
    """Writes to a descriptor; a reader that is gone is no reason to end a job."""
    with contextlib.suppress(OSError):
        while data:
            try:
                data = data[os.write(descriptor, data) :]
            except BlockingIOError:  # a process that shares the terminal made it so
                select.select([], [descriptor], [])


def _watch(process: "Popen[bytes]", requests: StopRequests, ranks_here: bool) -> str:
    """Waits until mpirun has ended and returns "", or until there is a reason to stop it and returns that."""
    ranks: Set[psutil.Process] = set()
    next_look, overdue = 0.0, _NOT_STARTED
    deadline = Deadline(_START_SECONDS if ranks_here else math.inf)
    while process.poll() is None:
        now = time.monotonic()
        if now > next_look:
            next_look = now + 1.0
            # Looking for new children reads all of /proc, which takes a while on a large host.
            ranks = {rank for rank in ranks if _is_rank(rank)} or _local_ranks(process.pid)
            if ranks:
                deadline, overdue = Deadline(_LINGER_SECONDS), _RANKS_GONE
        reason = requests.reason() or (overdue if deadline.passed() else "")
        if reason:
            return reason
        time.sleep(_POLL_SECONDS)
    return ""


def _stop(process: "Popen[bytes]", requests: StopRequests, reason: str) -> bool:
    """Stops mpirun; returns whether it was terminated while it had ranks."""
    terminate = True
    if reason in (_STOP_REQUESTED, _TIME_LIMIT):
        count = requests.count
        process.send_signal(signal.SIGUSR1)
        log_line(f"{reason}: all ranks save and exit within {requests.grace_seconds:g} s; Ctrl-C terminates them now")
        if _ends_within(requests.grace_seconds, process, requests, count):
            return False
        # An mpirun whose ranks have exited is about to end, and crashes on SIGTERM.
        terminate = bool(_local_ranks(process.pid))
        if terminate:
            log_line("the ranks have not exited: terminating them")
    if terminate:
        process.terminate()
    if not _ends_within(_TERMINATE_SECONDS, process, requests):
        process.kill()
        process.wait()
    return terminate


def _ends_within(seconds: float, process: "Popen[bytes]", requests: StopRequests, most: float = math.inf) -> bool:
    """Waits for mpirun to end, for `seconds` and `most` requests at most; returns whether it has ended."""
    deadline = Deadline(seconds)
    while process.poll() is None and not deadline.passed() and requests.count <= most:
        time.sleep(_POLL_SECONDS)
    return process.poll() is not None


def _local_ranks(pid: int) -> Set[psutil.Process]:
    """Returns the ranks on this host, which are mpirun's own children."""
    try:
        return {child for child in psutil.Process(pid).children() if _is_rank(child)}
    except psutil.NoSuchProcess:
        return set()


def _is_rank(process: psutil.Process) -> bool:
    try:
        return process.is_running() and "OMPI_COMM_WORLD_RANK" in process.environ()
    except psutil.Error:  # gone, or a zombie
        return False


def _stopped_status(reason: str, terminated: bool, status: ExitStatus) -> ExitStatus:
    """Returns how a start ended that was stopped for `reason`, "" if it was not; status: as mpirun's exit alone says."""
    if reason in (_RANKS_GONE, _NOT_STARTED):
        return ExitStatus(LOST_RANK, reason)
    # What the ranks found meanwhile is worth more than the request: a checkpoint that could not be written.
    failed = 64 <= status.code < 128 and status.code not in (LOST_RANK, STOPPED)
    if not reason or failed or status.code == DONE:
        return status
    how = "the ranks had to be terminated" if terminated else status.reason
    if status.code == 128 + signal.SIGUSR1:  # Python had just started, or it is another program, which does not know of it
        how = "the ranks do not handle SIGUSR1, which killed them"
    return ExitStatus(STOPPED if reason == _STOP_REQUESTED else LOST_RANK, f"{reason}; {how}")
