"""One mpirun: how it is called, how it is run and stopped, and what its end means."""

import ctypes
import math
import os
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Sequence

from hvd_vgg.config import LaunchConfig
from hvd_vgg.environment import JOB_PARAMETER, SECRET_NAME
from hvd_vgg.errors import CONFIGURATION, DONE, LOST_RANK, STOPPED, Failure
from hvd_vgg.launcher.hostfile import Host
from hvd_vgg.parallel.cores import control_groups

# What the ranks of other hosts get of this environment, and nothing else of it; those of this host have all of it.
_PASSED = re.compile(
    r"PATH|LD_LIBRARY_PATH|PYTHONPATH|PYTHONDONTWRITEBYTECODE|OMP_NUM_THREADS|TMPDIR|TZ|LANG|LC_\w+|XLA_FLAGS"
    r"|(HOROVOD|TF|NCCL|CUDA|UCX|GLOO|UMD|CRT|DRT)_\w+"  # the last three: of Iluvatar's driver
)
# Open MPI's own settings would notice a host that is gone after eight minutes; with these, after 20 seconds.
_KEEPALIVE = {"oob_tcp_keepalive_time": 10, "oob_tcp_keepalive_intvl": 3, "oob_tcp_keepalive_probes": 3}
# Between SIGTERM and SIGKILL to mpirun: it needs two seconds to end the ranks that do not end by themselves.
_END_SECONDS = 5.0
# The ranks of a job end within seconds of each other. So long mpirun may stay when those of this host are gone.
_LINGER_SECONDS = 30.0
# So long mpirun may take to reach all hosts and begin the first rank.
_BEGIN_SECONDS = 120.0
_TAIL_BYTES = 20_000
_RUNNING, _STOPPING, _LEAVING, _ENDING = range(4)
_ASKED, _TOO_LONG = "stopped on request", "--time_limit_seconds is over"
_NOT_BEGUN = f"mpirun has begun no rank in {_BEGIN_SECONDS:g} s: it was ended"
_RANKS_GONE = f"the ranks of this host were gone, but mpirun waited {_LINGER_SECONDS:g} s for others: it was ended too"
_HINTS = {
    4: "illegal instruction: built for another processor?",
    6: "aborted by a library, which says above why",
    7: "bus error: is /dev/shm full?",
    9: "out of memory?",
    11: "segmentation fault",
    14: "hung with Python's lock: see RUN_DIR/faults; or as it ended: see above",
    15: "ended from outside",
}
_PR_SET_PDEATHSIG = 1


class ExitStatus(NamedTuple):
    """How a start ended: an exit code, and a sentence that says why."""

    code: int
    sentence: str


def compose_mpirun(config: LaunchConfig, ranks: int, hosts: Sequence[Host], token: str, program: Sequence[str]) -> List[str]:
    """Returns the command that starts `program` on `ranks`, on this host where there are no `hosts`.

    No value of the environment is in it. Raises Failure(CONFIGURATION) where there is no mpirun, or none that can be used.
    """
    found = shutil.which("mpirun")
    if found is None:
        raise Failure(CONFIGURATION, "mpirun is not on PATH: install Open MPI 4, or use launch/environment.sh")
    # Named by its whole path it looks for its daemon under the same path on the other hosts.
    command = [found if hosts else "mpirun", "-np", str(ranks), "--bind-to", "none", "--map-by", "slot", "--oversubscribe"]
    settings: Dict[str, Any] = {JOB_PARAMETER: token}
    if hosts:
        if re.search(r"\s", found):
            text = f"{found}: Open MPI starts its daemon on other hosts by this path, and cuts it at spaces"
            raise Failure(CONFIGURATION, f"{text}: put Open MPI, or HVD_VGG_VENV, where its path has none")
        command += ["--host", ",".join(f"{host.name}:{host.slots}" for host in hosts)]
        # All daemons are started from here: other hosts need no keys.
        settings.update(plm_rsh_agent=config.rsh_agent, plm_rsh_no_tree_spawn=1, **_KEEPALIVE)
        for name in exported_variables(os.environ, config):
            command += ["-x", name]
    if config.network:
        settings.update(oob_tcp_if_include=config.network, btl_tcp_if_include=config.network)
        names = nccl_interfaces(config.network)
        if names and "NCCL_SOCKET_IFNAME" not in os.environ:
            command += ["-x", f"NCCL_SOCKET_IFNAME={names}"]
    for name, value in settings.items():
        command += ["--mca", name, str(value)]
    return [*command, *program]


def nccl_interfaces(network: str) -> str:
    """Returns what tells NCCL to use the interfaces of --network, as it tells Open MPI.

    It knows names alone, and a network's may differ from host to host: nothing where a network is in the list.
    """
    names = [part.strip() for part in network.split(",") if part.strip()]
    # It takes what begins with a name too unless it is told =.
    return "=" + ",".join(names) if names and not any("/" in name for name in names) else ""


def exported_variables(environment: Any, config: LaunchConfig) -> List[str]:
    """Returns the names of what ranks on other hosts get of the environment."""
    asked = {name for name in config.export_env.split(",") if name}
    allowed = {name for name in environment if _PASSED.fullmatch(name) and not SECRET_NAME.search(name)}
    return sorted(allowed | (asked & set(environment)))


def log_line(text: str) -> None:
    """Prints a line of the launcher to stderr, which may be gone."""
    write_stderr(f"hvd-vgg launch: {text}\n".encode())


def write_stderr(data: bytes) -> None:
    """Writes to stderr; a terminal that is gone is no reason to end a job."""
    try:
        sys.stderr.flush()
        while data:
            data = data[os.write(2, data) :]
    except OSError:
        pass


class Requests:
    """SIGTERM, SIGINT, SIGHUP and SIGUSR1, counted while this is open; `wake` is readable when a signal came."""

    def __init__(self) -> None:
        self.count = 0
        self.wake, self._end = socket.socketpair()
        self._before: Dict[int, Any] = {}

    def __enter__(self) -> "Requests":
        for end in (self.wake, self._end):
            end.setblocking(False)
        signal.set_wakeup_fd(self._end.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                self._before[number] = signal.signal(number, self._ask)
        self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda number, frame: None)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        signal.set_wakeup_fd(-1)
        self.wake.close()
        self._end.close()

    def _ask(self, number: int, frame: Any) -> None:
        self.count += 1


class _Stdout:
    """What mpirun prints, on its way to this process's stdout; one that is gone is no reason to end a job.

    Where ours is slow, as below a pager, mpirun waits to be read; this process does not, for it must hear requests.
    """

    def __init__(self) -> None:
        self.source, self.given = os.pipe()
        self.waiting = b""
        self.ended = False

    def to_read(self) -> List[int]:
        """Returns what to wait for to `move` the next bytes: readable."""
        return [] if self.waiting or self.ended else [self.source]

    def to_write(self) -> List[int]:
        """Returns what to wait for to `move` the next bytes: writable."""
        return [1] if self.waiting else []

    def move(self, readable: List[Any], writable: List[int]) -> bool:
        """Moves bytes, as `select` says; says whether there were any."""
        if 1 in writable:
            try:
                # No more than a pipe that is writable takes at once.
                self.waiting = self.waiting[os.write(1, self.waiting[: select.PIPE_BUF]) :]
            except BlockingIOError:
                pass
            except OSError:
                self.waiting = b""
            return True
        if self.source in readable:
            self.waiting = os.read(self.source, 65536)
            self.ended = not self.waiting
            return not self.ended
        return False


class Limits(NamedTuple):
    """How long ranks may take to stop; the clock reading (time.monotonic) at which the job ends; if this host has ranks."""

    grace_seconds: float
    until: float
    ranks_here: bool = True


def run(command: Sequence[str], requests: Requests, limits: Limits, look: Callable[[], None]) -> ExitStatus:
    """Runs mpirun to its end and says how it ended; the kernel ends it should this process be killed.

    Its stdout and stderr are copied as they come, and the latter is read. The terminal's Ctrl-C does not reach it: a
    request makes it send SIGUSR1 to all ranks, which save and leave; when they have not after `grace_seconds`, or are
    asked again, it is ended. `look` is called about once a second.
    """
    before = oom_kills()
    stdout = _Stdout()
    told, its_stderr = os.pipe()
    process = subprocess.Popen(  # noqa: S603 (what it runs is the user's)
        command,
        stdin=subprocess.DEVNULL,
        stdout=stdout.given,
        stderr=its_stderr,
        start_new_session=True,
        preexec_fn=_dies_with(os.getpid()),
    )
    os.close(stdout.given)
    os.close(its_stderr)
    readers: List[Any] = [told, requests.wake]
    tail, stage, why, asked_for = b"", _RUNNING, "", 0
    deadline, next_look, ranks_seen = math.inf, 0.0, math.inf
    begun_by = time.monotonic() + _BEGIN_SECONDS if limits.ranks_here else math.inf
    while True:
        over = process.poll() is not None  # asked before, so that all it wrote is there to be read
        seconds = 0.0 if over and not stdout.waiting else 1.0
        readable, writable, _ = select.select(readers + stdout.to_read(), stdout.to_write(), [], seconds)
        if requests.wake in readable:
            requests.wake.recv(4096)
        data = os.read(told, 65536) if told in readable else b""
        write_stderr(data)
        tail = (tail + data)[-_TAIL_BYTES:]
        moved = stdout.move(readable, writable)
        if over and not (data or moved) and (why or not stdout.waiting):  # who asked to stop waits for no pager
            break
        if told in readable and not data:
            readers.remove(told)
        if over:
            continue
        now = time.monotonic()
        if now >= next_look:
            next_look = now + 1.0
            look()
            if _has_ranks(process.pid):
                ranks_seen, begun_by = now, math.inf
        if stage == _RUNNING:
            why = _why_stop(requests, limits, now, ranks_seen, begun_by)
            if why in (_RANKS_GONE, _NOT_BEGUN):
                stage, deadline = _ENDING, now + _END_SECONDS
                process.terminate()
            elif why:
                stage, deadline, asked_for = _STOPPING, now + limits.grace_seconds, requests.count
                log_line(f"{why}: all ranks save and leave, within {limits.grace_seconds:g} s; Ctrl-C ends them now")
                process.send_signal(signal.SIGUSR1)
        elif stage == _STOPPING and (now > deadline or requests.count > asked_for):
            # An mpirun whose ranks have left is about to end, and crashes on SIGTERM.
            stage, deadline = _ENDING if _has_ranks(process.pid) else _LEAVING, now + _END_SECONDS
            if stage == _ENDING:
                log_line("the ranks have not left: ending them")
                process.terminate()
        elif stage in (_LEAVING, _ENDING) and now > deadline:
            deadline = math.inf
            process.kill()
    os.close(told)
    os.close(stdout.source)
    risen = {name: count - before.get(name, 0) for name, count in oom_kills().items() if count > before.get(name, 0)}
    ended = explain(process.returncode, tail.decode(errors="replace"), risen)
    return _account(why, stage, ended)


def _why_stop(requests: Requests, limits: Limits, now: float, ranks_seen: float, begun_by: float) -> str:
    if requests.count:
        return _ASKED
    if now > limits.until:
        return _TOO_LONG
    if now > begun_by:
        return _NOT_BEGUN
    return _RANKS_GONE if now - ranks_seen > _LINGER_SECONDS else ""


def _account(why: str, stage: int, ended: ExitStatus) -> ExitStatus:
    """Returns how a start ended that this launcher may have stopped, for the reason `why`."""
    if why in (_RANKS_GONE, _NOT_BEGUN):
        return ExitStatus(LOST_RANK, why)
    # What the ranks found meanwhile is worth more than that they were asked: a checkpoint that could not be written.
    found = 64 <= ended.code < 128 and ended.code not in (LOST_RANK, STOPPED)
    if not why or found or ended.code == DONE:
        return ended
    how = "they had to be ended" if stage == _ENDING else ended.sentence
    if ended.code == 128 + signal.SIGUSR1:  # Python has just begun, or a program of one's own that knows nothing of it
        how = "the ranks did not listen for SIGUSR1, which ended them"
    return ExitStatus(STOPPED if why == _ASKED else LOST_RANK, f"{why}; {how}")


def explain(status: int, told: str, oom_risen: Dict[str, int]) -> ExitStatus:
    """Returns what an exit status of mpirun means.

    status: negative for a signal that ended mpirun itself; told: the end of what was on stderr; oom_risen: counters of
    kills for want of memory that rose meanwhile.
    """
    killed = re.search(r"process rank (\d+) with PID \d+ on node (\S+) exited on\s+signal (\d+)", told)
    lost = re.search(r"lost communication with a remote daemon.*?Remote daemon:.*? on node (\S+)", told, re.S)
    silent = re.search(r"process rank (\d+) with PID \d+ on\s+node (\S+) exiting improperly", told)
    first = re.search(r"Process name: \[\[\d+,\d+\],(\d+)\]\s+Exit code:\s+(\d+)", told)
    if killed:
        number = int(killed[3])
        hint = f" ({_HINTS[number]})" if number in _HINTS else ""
        counted = "".join(f"; oom_kill in {name} rose by {count}" for name, count in oom_risen.items() if number == 9)
        return ExitStatus(128 + number, f"rank {killed[1]} killed by signal {number}{hint}, on {killed[2]}{counted}")
    if status < 0:
        return ExitStatus(128 - status, f"mpirun killed by signal {-status}")
    if lost:
        return ExitStatus(LOST_RANK, f"host {lost[1]} is gone: mpirun lost its daemon there")
    if silent:  # by exit code 0, without leaving MPI: as code of a library may
        return ExitStatus(LOST_RANK, f"rank {silent[1]} left without a word, on {silent[2]}")
    if status == 1 and "ORTE" in told:
        return ExitStatus(LOST_RANK, "mpirun could not reach all its hosts: see above")
    if status == 1 and "-----" not in told:  # it frames all that it has to say of ranks, and says nothing of a SIGTERM
        return ExitStatus(LOST_RANK, "mpirun was ended from outside")
    said = {DONE: "done", STOPPED: "all ranks left in order", LOST_RANK: "a rank hung or is gone"}
    # Ranks that end with a code of this package's say who found what; which of those that agreed left first says nothing.
    rank = f"; rank {first[1]} left first" if first and not 64 <= status < 128 else ""
    return ExitStatus(status, said.get(status, f"exit code {status}") + rank)


def _dies_with(parent: int) -> Callable[[], None]:
    """Returns what a child does before it becomes mpirun: from then on the kernel kills it when this process ends."""
    libc = ctypes.CDLL(None)  # loaded here: little may be done between fork and exec

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was too late
            os._exit(CONFIGURATION)

    return prepare


def _has_ranks(pid: int) -> bool:
    """Says whether mpirun has ranks among its own children, which are on this host."""
    for child in _read(f"/proc/{pid}/task/{pid}/children").split():
        if b"\0OMPI_COMM_WORLD_RANK=" in b"\0" + _read(f"/proc/{child.decode()}/environ"):
            return True
    return False


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def oom_kills() -> Dict[str, int]:
    """Returns the kernel's counters of processes that memory ran out for: this host's, this cgroup's."""
    files = [Path("/proc/vmstat")]
    for group in control_groups(Path("/"), "memory")[:1]:
        files += [folder / name for folder in (group, *group.glob("*/")) for name in ("memory.oom_control", "memory.events")]
    counts = {}
    for file in files:
        match = re.search(rb"^oom_kill (\d+)", _read(str(file)), re.M)
        if match:
            counts[str(file)] = int(match[1])
    return counts


def shell_quoted(command: Sequence[str]) -> str:
    """Returns a command as a shell reads it."""
    return " ".join(shlex.quote(word) for word in command)
