"""One mpirun: its command line, running and stopping it, and what its exit means."""

import contextlib
import math
import os
import re
import select
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import IO, Any, Dict, List, Mapping, NamedTuple, Sequence, Set

import psutil

from hvd_vgg.config import LaunchConfig
from hvd_vgg.environment import JOB_PARAMETER, SECRET_NAME, environment_of_job
from hvd_vgg.errors import CONFIGURATION, DONE, LOST_RANK, STOPPED, Failure
from hvd_vgg.launcher.deadline import Deadline
from hvd_vgg.launcher.hostfile import Host
from hvd_vgg.launcher.parent_death import dies_with
from hvd_vgg.parallel import network
from hvd_vgg.parallel.cores import control_groups, thread_limit
from hvd_vgg.streams import clear_bar, note_copied, write_line

# The variables that ranks on other hosts get, besides --export_env; ranks on this host inherit all.
_EXPORTED = re.compile(
    r"PATH|LD_LIBRARY_PATH|LD_PRELOAD|PYTHON\w+|(OMP|KMP)_\w+|TMPDIR|TZ|LANG|LC_\w+|XLA_FLAGS"
    r"|NO_COLOR|TERM|COLUMNS"  # how rank 0 prints
    r"|(HOROVOD|TF|NCCL|CUDA|UCX|GLOO|UMD|CRT|DRT)_\w+"  # the last three: Iluvatar's driver
)
# Open MPI takes hosts from its command line alone: neither from a scheduler's allocation, which may be one that is over, nor
# from the installation's host file.
_NO_SCHEDULER = "^alps,gridengine,loadleveler,lsf,slurm,tm"
# Open MPI's own settings notice a lost host after eight minutes; these after 20 seconds.
_KEEPALIVE = {"oob_tcp_keepalive_time": 10, "oob_tcp_keepalive_intvl": 3, "oob_tcp_keepalive_probes": 3}
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
_HINTS: Dict[int, str] = {
    signal.SIGILL: "illegal instruction: built for another processor?",
    signal.SIGABRT: "aborted by a library: see its message above",
    signal.SIGBUS: "bus error: is /dev/shm full?",
    signal.SIGKILL: "out of memory?",
    signal.SIGSEGV: "segmentation fault",
    signal.SIGALRM: "hung while holding the GIL: see RUN_DIR/faults; or hung at exit: see above",
    signal.SIGTERM: "terminated from outside the job",
}


class ExitStatus(NamedTuple):
    """How a start ended: the exit code, the reason in a sentence, and the rank or host that mpirun blames, if any."""

    code: int
    reason: str
    rank: int = -1
    host: str = ""


def compose_mpirun(config: LaunchConfig, ranks: int, hosts: Sequence[Host], token: str, program: Sequence[str]) -> List[str]:
    """Returns the command that starts `program` on `ranks` ranks, all on this host if `hosts` is empty.

    It contains no value of the environment. Raises Failure(CONFIGURATION) if there is no mpirun, or none that can be used.
    """
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        raise Failure(CONFIGURATION, "mpirun is not on PATH: install Open MPI 4, or use launch/environment.sh")
    command = ["mpirun", "-np", str(ranks), "--bind-to", "none", "--map-by", "slot", "--oversubscribe"]
    exports: List[str] = []
    # Isolated, it starts no daemon, so that neither ssh nor srun need be there.
    daemons = "isolated" if all(network.is_this_host(host.name) for host in hosts) else "rsh"
    settings: Dict[str, Any] = {JOB_PARAMETER: token, "orte_default_hostfile": "none"}
    placement = {"ras": _NO_SCHEDULER, "plm": daemons}
    settings.update({name: value for name, value in placement.items() if f"OMPI_MCA_{name}" not in os.environ})
    if hosts:
        if re.search(r"\s", mpirun):
            text = f"{mpirun}: Open MPI starts its daemon on other hosts by this path, and cuts it at spaces"
            raise Failure(CONFIGURATION, f"{text}: install Open MPI, or set HVD_VGG_VENV, to a path without any")
        command[0] = mpirun  # called by its absolute path, it starts its daemon from the same path on the other hosts
        command += ["--host", ",".join(f"{host.name}:{host.slots}" for host in hosts)]
        # All daemons are started from here, so the other hosts need no keys.
        settings.update(plm_rsh_agent=config.rsh_agent, plm_rsh_no_tree_spawn=1, **_KEEPALIVE)
        exports += exported_variables(os.environ, config.export_env)
    if config.network:
        settings.update(oob_tcp_if_include=config.network, btl_tcp_if_include=config.network)
        names = nccl_interfaces(config.network)
        if names and "NCCL_SOCKET_IFNAME" not in os.environ:
            exports.append(f"NCCL_SOCKET_IFNAME={names}")
    command += [word for variable in exports for word in ("-x", variable)]
    command += [word for name, value in settings.items() for word in ("--mca", name, str(value))]
    return [*command, *program]


def nccl_interfaces(network: str) -> str:
    """Returns NCCL_SOCKET_IFNAME for --network=`network`; "" if the list contains a network, since NCCL accepts only names.

    The interfaces of a network may have other names on other hosts.
    """
    names = [part.strip() for part in network.split(",") if part.strip()]
    # Without = NCCL also takes interfaces whose names begin with one of these.
    return "=" + ",".join(names) if names and not any("/" in name for name in names) else ""


def exported_variables(environ: Mapping[str, str], export_env: str) -> List[str]:
    """Returns the names of the variables that ranks on other hosts get; export_env: more names, separated by commas."""
    allowed = {name for name in environ if _EXPORTED.fullmatch(name) and not SECRET_NAME.search(name)}
    return sorted(allowed | (set(export_env.split(",")) & set(environ)))


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
        self.callback(signal.signal, signal.SIGCHLD, signal.signal(signal.SIGCHLD, signal.SIG_DFL))
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                self.callback(signal.signal, number, signal.signal(number, self._handle))
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
    tail, ended = bytearray(), threading.Event()
    streams = ((process.stdout, _STDOUT, bytearray(), ended), (process.stderr, _STDERR, tail, ended))
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
    status = explain(process.returncode, tail.decode(errors="replace"), oom_kills() - kills_before)
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


def explain(status: int, stderr: str, oom_kills: Mapping[str, int]) -> ExitStatus:
    """Returns what an exit status of mpirun means.

    status: negative for a signal that killed mpirun itself; stderr: the end of it; oom_kills: the counters of out-of-memory
    kills that rose meanwhile, and by how much.
    """
    if killed := re.search(r"process rank (\d+) with PID \d+ on node (\S+) exited on\s+signal (\d+)", stderr):
        number = int(killed[3])
        hint = f" ({_HINTS[number]})" if number in _HINTS else ""
        risen = "".join(f"; oom_kill in {name} rose by {n}" for name, n in oom_kills.items() if number == signal.SIGKILL)
        text = f"rank {killed[1]} killed by signal {number}{hint}, on {killed[2]}{risen}"
        return ExitStatus(128 + number, text, int(killed[1]))
    if status < 0:
        return ExitStatus(128 - status, f"mpirun killed by signal {-status}")
    if lost := re.search(r"lost communication with a remote daemon.*?Remote daemon:.*? on node (\S+)", stderr, re.S):
        return ExitStatus(LOST_RANK, f"host {lost[1]} is gone: mpirun lost its daemon there", host=lost[1])
    # With exit code 0, but without MPI_Finalize: a library may do so.
    if silent := re.search(r"process rank (\d+) with PID \d+ on\s+node (\S+) exiting improperly", stderr):
        return ExitStatus(LOST_RANK, f"rank {silent[1]} exited without leaving MPI, on {silent[2]}", int(silent[1]))
    if status == 1 and "ORTE" in stderr:
        return ExitStatus(LOST_RANK, "mpirun could not reach all of its hosts: see above")
    if status == 1 and "-----" not in stderr:  # the frame of all its messages about ranks; a SIGTERM is no such message
        return ExitStatus(LOST_RANK, "mpirun was terminated from outside")
    first = re.search(r"Process name: \[\[\d+,\d+\],(\d+)\]\s+Exit code:\s+(\d+)", stderr)
    known = {
        DONE: "done",
        STOPPED: "all ranks stopped in order",
        LOST_RANK: "a rank hung, was lost, or could not read its files",
    }
    # Ranks that exit with a code of this package have said who found what; which of them mpirun noticed first means nothing.
    rank = f"; rank {first[1]} exited first" if first and not 64 <= status < 128 else ""
    return ExitStatus(status, known.get(status, f"exit code {status}") + rank)


def oom_kills() -> "Counter[str]":
    """Returns the kernel's counters of out-of-memory kills, of this host and of this control group, by file."""
    files = [Path("/proc/vmstat")]
    for group in control_groups(Path("/"), "memory")[:1]:
        files += [folder / name for folder in (group, *group.glob("*/")) for name in ("memory.oom_control", "memory.events")]
    counters: Counter[str] = Counter()
    for file in files:
        with contextlib.suppress(OSError):
            match = re.search(r"^oom_kill (\d+)", file.read_text(), re.M)
            counters[str(file)] = int(match[1]) if match else 0
    return counters
