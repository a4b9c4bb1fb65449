"""`hvd-vgg launch`: starts a command on many ranks with mpirun, stops it on request, and restarts a run that failed.

A run does not depend on its number of ranks, so it resumes from its newest checkpoint on whatever hosts still answer.
Nothing here imports TensorFlow, and no value of the environment is printed, written or put on a command line.
"""

import contextlib
import datetime
import errno
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from hvd_vgg.config import LaunchConfig
from hvd_vgg.errors import CONFIGURATION, DONE, LOST_RANK, STOPPED, USAGE, Failure
from hvd_vgg.launcher.hostfile import Host, read_hostfile
from hvd_vgg.launcher.jobs import launcher_is_alive, local_processes, own_token, search_command
from hvd_vgg.launcher.mpirun import ExitStatus, StopRequests, compose_mpirun, log_line, run, shell_quoted
from hvd_vgg.launcher.ssh import HostReply, ask_hosts
from hvd_vgg.parallel import network
from hvd_vgg.parallel.mpi import root_refusal
from hvd_vgg.reporting.findings import FAILURE
from hvd_vgg.run_dir import DISK_FULL, RunDir, checkpoint_step, write_error
from hvd_vgg.streams import write_line
from hvd_vgg.text import plural

# How long processes that a job left behind may take to exit by themselves before they are killed.
_EXIT_SECONDS = 5.0
# Before a restart no host may answer for a while, as when a switch restarts: how often they are asked, and how far apart.
_ASK_TIMES, _ASK_AGAIN_SECONDS = 10, 30.0


class LaunchSpec(NamedTuple):
    """What to start: the command of each rank; the directory of a run that can be resumed; the most ranks it can use."""

    program: List[str]
    run_dir: Optional[Path] = None
    most_ranks: Optional[int] = None


def launch(config: LaunchConfig, spec: LaunchSpec) -> int:
    """Runs a command on many ranks, over restarts, and returns its exit code. Raises Failure(USAGE or CONFIGURATION)."""
    hosts = read_hostfile(config.hostfile) if config.hostfile else []
    ranks = _rank_count(config, spec, hosts)
    run_path = str((spec.run_dir or Path(f"/{os.getpid()}")).resolve())
    token = own_token(hashlib.sha256(run_path.encode()).hexdigest()[:16])
    if config.dry_run:
        print("+", shell_quoted(compose_mpirun(config, ranks, hosts, token, spec.program)))
        return DONE
    refusal = root_refusal(os.environ) or network.network_flag_error(config.network, network.interfaces())
    if refusal:
        raise Failure(CONFIGURATION, refusal)
    until = time.monotonic() + (config.time_limit_seconds or math.inf)
    with StopRequests(config.grace_seconds, until) as requests:
        return _supervise(config, spec, hosts, ranks, token, requests)


def _rank_count(config: LaunchConfig, spec: LaunchSpec, hosts: List[Host]) -> int:
    """Returns the number of ranks asked for, or one for each slot or device."""
    slots = sum(host.slots for host in hosts)
    if hosts and config.ranks > slots:
        has = f"has {plural(slots, 'slot')} ({', '.join(f'{host.name}: {host.slots}' for host in hosts)})"
        raise Failure(CONFIGURATION, f"--ranks={config.ranks}: {config.hostfile} {has}: add some")
    if spec.most_ranks is not None and config.ranks > spec.most_ranks:
        raise Failure(USAGE, f"--global_batch={spec.most_ranks} has fewer images than --ranks={config.ranks}")
    ranks = config.ranks or slots or _device_count()
    return min(ranks, spec.most_ranks or ranks)


def _device_count() -> int:
    """Returns how many devices TensorFlow sees here, as the ranks will; 1 if it sees none."""
    program = "import tensorflow as tf; print(len(tf.config.list_physical_devices('GPU')))"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)  # noqa: S603
    if ended.returncode:
        error = ended.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise Failure(CONFIGURATION, f"{sys.executable} cannot import tensorflow: {''.join(error)}")
    devices = int(ended.stdout.split()[-1])
    ranks = max(1, devices)
    write_line(f"{plural(ranks, 'rank')}: TensorFlow sees {plural(devices, 'device')} (--ranks overrides)", sys.stdout)
    return ranks


def _supervise(
    config: LaunchConfig, spec: LaunchSpec, hosts: List[Host], ranks: int, token: str, requests: StopRequests
) -> int:
    """Starts the command, and restarts it while that is worth it; returns the exit code."""
    run_dir = RunDir(spec.run_dir) if spec.run_dir else None
    log = _RestartLog(run_dir)
    ended_at: Optional[float] = None
    last_progress: Optional[Tuple[int, int]] = None
    attempt = 0
    while True:
        _clear_leftovers(token)
        answering = _answering_hosts(config, hosts, token, attempt == 0, requests)
        if requests.reason():
            log_line(f"{requests.reason()}, before a start")
            return STOPPED if requests.count else LOST_RANK
        count = min(ranks, sum(host.slots for host in answering)) if hosts else ranks
        command = compose_mpirun(config, count, answering, token, spec.program)
        facts = {"attempt": attempt, "ranks": count, "hosts": [f"{host.name}:{host.slots}" for host in answering]}
        log.append("start", **facts, command=command)
        write_line(f"+ {shell_quoted(command)}", sys.stdout)
        first_update, started = _FirstUpdate(run_dir, ended_at), time.monotonic()
        ranks_here = not answering or network.is_this_host(answering[0].name)  # the first host is filled first
        status = run(command, requests, first_update.look, ranks_here)
        first_update.look()
        ended_at = time.time()
        _clear_leftovers(token)
        seconds, lost_seconds = round(time.monotonic() - started, 1), first_update.lost_seconds
        log.append("end", **facts, code=status.code, reason=status.reason, seconds=seconds, lost_seconds=lost_seconds)
        if run_dir is None or requests.reason() or not _may_pass(status):
            if status.code not in (DONE, *range(64, 128)) or requests.reason():  # otherwise the ranks have said it
                log_line(status.reason)
            return status.code
        progress = _progress(run_dir)
        if attempt == config.max_restarts:
            log_line(f"{status.reason}. --max_restarts={attempt} is used up; the same command resumes the run")
            return status.code
        if progress == last_progress:
            log_line(f"{status.reason}, for the second time at step {progress[1]} without a new checkpoint: not restarted")
            return status.code
        log_line(f"{status.reason}. Restarting, {attempt + 1} of at most {config.max_restarts}")
        last_progress = progress
        attempt += 1


def _may_pass(status: ExitStatus) -> bool:
    """Returns whether a run that ended in this way may succeed when it is restarted.

    It may after a rank hung, was lost or preempted, or was killed by a signal other than SIGILL. It would not after what
    ranks found wrong with data, flags, code, disk or numbers.
    """
    return status.code in (LOST_RANK, STOPPED) or (status.code > 128 and status.code != 128 + signal.SIGILL)


def _answering_hosts(config: LaunchConfig, hosts: List[Host], token: str, first: bool, requests: StopRequests) -> List[Host]:
    """Returns the hosts that answer and can connect back; at the first start all must.

    Before a restart, asks again for some minutes while no host answers. Returns none if it is asked to stop meanwhile.
    """
    others = [host for host in hosts if not network.is_this_host(host.name)]
    for left in reversed(range(1 if first else _ASK_TIMES)):
        replies = _ask(config, others, token, first)
        silent = {name: f"{name} ({f.text}; {f.fix})" for name, (f, _) in replies.items() if f.verdict == FAILURE}
        answering = [host for host in hosts if host.name not in silent]
        why = "; ".join(silent.values())
        if answering or not silent or not left:
            break
        if left == _ASK_TIMES - 1:
            log_line(f"no host answers: {why}. Asking again every {_ASK_AGAIN_SECONDS:g} s, {left} times")
        again_at = min(time.monotonic() + _ASK_AGAIN_SECONDS, requests.until)
        while time.monotonic() < again_at and not requests.count:
            time.sleep(0.1)
        if requests.reason():
            return []
    if silent and (first or not answering):
        raise Failure(CONFIGURATION, f"cannot use {why}. Tried: {config.rsh_agent} HOST")
    if silent:
        log_line(f"continuing without {why}")
    for name, (_, pids) in replies.items():
        _report_leftovers(name, pids)
    return answering


def _ask(config: LaunchConfig, others: List[Host], token: str, first: bool) -> Dict[str, HostReply]:
    """Returns the replies of other hosts by name; mpirun would wait forever for a daemon that cannot connect back."""
    if not others:
        return {}
    interfaces = network.interfaces()
    environ = {network.INCLUDE[0]: config.network} if config.network else os.environ
    addresses = network.chosen_addresses(environ, interfaces)
    if first and not addresses:
        here = network.format_interfaces(interfaces)
        raise Failure(CONFIGURATION, f"no interface may lead to other hosts; here are: {here}")
    replies = ask_hosts(others, config.rsh_agent, addresses, search_command(token.split(".")[0]))
    return {host.name: reply for host, reply in zip(others, replies)}


def _clear_leftovers(token: str) -> None:
    """Kills what earlier jobs of this run left behind on this host, after a moment to exit by itself.

    Raises Failure(CONFIGURATION) if another launcher is running it now. What another host launched is only reported.
    """
    deadline = time.monotonic() + _EXIT_SECONDS
    while True:
        ours: List[int] = []
        foreign: List[int] = []
        for job, pids in local_processes(token.split(".")[0]).items():
            alive = job != token and launcher_is_alive(job)
            if alive:
                raise Failure(CONFIGURATION, f"another launcher, process {job.split('.')[2]}, is running this --run_dir")
            (foreign if alive is None else ours).extend(pids)
        if not ours or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    _report_leftovers("this host", foreign)
    if ours:
        log_line(f"killing processes {ours}, which a job of this run left behind")
    for pid in ours:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # gone, or another user's by now
            os.kill(pid, signal.SIGKILL)


def _report_leftovers(host: str, pids: List[int]) -> None:
    if pids:
        log_line(f"{host}: another job of this run left processes {pids} behind; if they stay, kill -9 them there")


def _progress(run_dir: RunDir) -> Tuple[int, int]:
    """Returns the step of the newest checkpoint and that of the last line of the log; -1 for none."""
    saved = [step for step in map(checkpoint_step, run_dir.list_checkpoints()) if step is not None]
    steps = [row["step"] for row in _log_rows(run_dir.log, -65536) if row["type"] == "LOG"]
    return max(saved, default=-1), next((step[1] for step in reversed(steps) if len(step) == 2), -1)


class _FirstUpdate:
    """Looks for the first update of a restart in the log; `lost_seconds` without training are then known."""

    def __init__(self, run_dir: Optional[RunDir], ended_at: Optional[float]) -> None:
        self.lost_seconds: Optional[float] = None
        self._ended_at = ended_at  # the time.time() at which the start before ended; None if there was none
        self._log = run_dir.log if run_dir and ended_at is not None else None
        self._offset = self._log.stat().st_size if self._log and self._log.exists() else 0

    def look(self) -> None:
        """Reads what the log has now."""
        if self._log is None or self._ended_at is None or self.lost_seconds is not None:
            return
        for row in _log_rows(self._log, self._offset):
            if row.get("data", {}).get("event") == "first_update":
                self.lost_seconds = round(float(row["timestamp"]) - self._ended_at, 1)
                log_line(f"training again, {self.lost_seconds} s after the last start ended")


def _log_rows(path: Path, offset: int) -> List[Dict[str, Any]]:
    """Returns DLLogger's complete lines in a file from `offset`, or in its last `-offset` bytes; none if it cannot be read.

    A line that a killed rank left incomplete is skipped.
    """
    rows = []
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(offset if offset >= 0 else max(0, path.stat().st_size + offset))
        for line in file:
            if line.startswith(b"DLLL {") and line.endswith(b"\n"):
                with contextlib.suppress(ValueError):
                    rows.append(json.loads(line[5:]))
    return rows


class _RestartLog:
    """RUN_DIR/restarts.jsonl, with a line for each start and each end; writes nothing if there is no run directory."""

    def __init__(self, run_dir: Optional[RunDir]) -> None:
        self._path = run_dir.restarts if run_dir else None
        self._unwritten = b""  # lines that a full disk had no room for

    def append(self, event: str, **data: Any) -> None:
        """Appends a line, on disk when this returns; on a full disk it is kept for the next call.

        Raises Failure(CONFIGURATION) if a start cannot be written for another reason, or the first one for any.
        """
        if self._path is None:
            return
        now = time.time()
        when = datetime.datetime.fromtimestamp(now, datetime.timezone.utc).isoformat(timespec="milliseconds")
        self._unwritten += json.dumps({"time": now, "at": when, "event": event, **data}).encode() + b"\n"
        try:
            os.umask(os.umask(0o027) | 0o027)  # what a run writes is for its owner and group
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _append_whole(self._path, self._unwritten)
            self._unwritten = b""
        except OSError as error:
            first = not self._path.exists() or self._path.stat().st_size == 0
            if event == "start" and (first or error.errno not in DISK_FULL):
                raise Failure(CONFIGURATION, write_error(self._path, error)) from error
            log_line(write_error(self._path, error))


def _append_whole(path: Path, data: bytes) -> None:
    """Appends all of `data` and puts it on disk, or leaves the file as it was and raises OSError."""
    with open(path, "ab", buffering=0) as file:
        end = file.tell()
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)  # the next line must not be appended to half a line
            raise
