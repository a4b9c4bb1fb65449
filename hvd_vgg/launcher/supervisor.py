"""`hvd-vgg launch`: starts a command on many ranks with mpirun, stops it on request, and restarts a run that failed.

A run does not depend on its number of ranks, so it resumes from its newest checkpoint on whatever hosts still answer.
Nothing here imports TensorFlow, and no value of the environment is printed, written or put on a command line.
"""

import contextlib
import datetime
import hashlib
import json
import math
import os
import secrets
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, List, NamedTuple, Optional, Tuple

import psutil

from hvd_vgg.config import LaunchConfig, StepConfig
from hvd_vgg.data.sampler import most_ranks, too_many_ranks
from hvd_vgg.environment import NO_RUN, environment_of_job, nested_refusal, python_program
from hvd_vgg.errors import CONFIGURATION, DONE, LOST_RANK, STOPPED, USAGE, Failure
from hvd_vgg.launcher.command_line import compose_mpirun
from hvd_vgg.launcher.deadline import Deadline
from hvd_vgg.launcher.exit_status import ExitStatus
from hvd_vgg.launcher.host_faults import HostFaults, check_hosts, find_faulty_host, hosts_in_use
from hvd_vgg.launcher.hostfile import Host, read_hostfile
from hvd_vgg.launcher.jobs import launcher_is_alive, local_processes, own_token, search_command
from hvd_vgg.launcher.mpirun import StopRequests, log_line, run
from hvd_vgg.launcher.ssh import ask_hosts
from hvd_vgg.parallel import network
from hvd_vgg.parallel.cores import threads_refusal
from hvd_vgg.parallel.mpi import root_refusal
from hvd_vgg.reporting.findings import FAILURE
from hvd_vgg.reporting.goodput import Goodput
from hvd_vgg.reporting.receipt import LogLine, read_log
from hvd_vgg.run_dir import DISK_FULL, RunDir, append_whole, checkpoint_step, write_error
from hvd_vgg.streams import write_line
from hvd_vgg.text import plural

# How long processes that a job left behind may take to exit by themselves before they are killed.
_EXIT_SECONDS = 5.0
# Before a restart no host may answer for a while, as when a switch restarts: how often they are asked, and how far apart.
_ASK_TIMES, _ASK_AGAIN_SECONDS = 10, 30.0


class LaunchSpec(NamedTuple):
    """What to start: the command of each rank; the directory of a run that can be resumed; what its ranks share.

    host_check: the command that checks a host before a restart.
    """

    program: List[str]
    run_dir: Optional[Path] = None
    shared: Optional[StepConfig] = None
    host_check: Tuple[str, ...] = ()


def launch(config: LaunchConfig, spec: LaunchSpec) -> int:
    """Runs a command on many ranks, over restarts, and returns its exit code. Raises Failure(USAGE or CONFIGURATION)."""
    hosts = read_hostfile(config.hostfile) if config.hostfile else []
    ranks = rank_count(config, spec, hosts)
    run = f"{NO_RUN}{secrets.token_hex(4)}"
    if spec.run_dir:
        run = hashlib.sha256(os.fsencode(spec.run_dir.resolve())).hexdigest()[:16]
    token = own_token(run)
    if config.dry_run:
        print("+", shlex.join(compose_mpirun(config, ranks, hosts, token, spec.program)))
        return DONE
    refusal = nested_refusal(os.environ) or root_refusal(os.environ)
    refusal = refusal or network.network_flag_error(config.network, network.interfaces())
    refusal = refusal or _tmpdir_refusal() or ("" if hosts else threads_refusal(Path("/"), ranks))
    if refusal:
        raise Failure(CONFIGURATION, refusal)
    until = time.monotonic() + (config.time_limit_seconds or math.inf)
    with StopRequests(config.grace_seconds, until) as requests:
        return _supervise(config, spec, hosts, ranks, token, requests)


def _tmpdir_refusal() -> str:
    """Returns why Open MPI cannot use TMPDIR, "" if it can; one that does not exist it passes over."""
    folder = os.environ.get("TMPDIR", "")
    try:
        if Path(folder).is_dir():
            tempfile.TemporaryFile(dir=folder or None).close()
    except OSError as error:
        return f"TMPDIR={folder} cannot be written: {error.strerror}; Open MPI needs it: unset it, or name another directory"
    return ""


def rank_count(config: LaunchConfig, spec: LaunchSpec, hosts: List[Host]) -> int:
    """Returns the number of ranks asked for, or one for each slot or device."""
    slots = sum(host.slots for host in hosts)
    if hosts and config.ranks > slots:
        has = f"has {plural(slots, 'slot')} ({', '.join(f'{host.name}: {host.slots}' for host in hosts)})"
        raise Failure(CONFIGURATION, f"--ranks={config.ranks}: {config.hostfile} {has}: add some")
    ranks = config.ranks or slots or _device_count()
    refusal = too_many_ranks(spec.shared, ranks) if spec.shared else ""
    if not spec.shared or not refusal:
        return ranks
    if config.ranks:
        raise Failure(USAGE, f"--ranks={config.ranks}: {refusal}")
    write_line(f"{plural(most_ranks(spec.shared), 'rank')}: {refusal}", sys.stdout)
    return most_ranks(spec.shared)


def _device_count() -> int:
    """Returns how many devices TensorFlow sees here, as the ranks will; 1 if it sees none."""
    program = python_program("import tensorflow as tf; print(len(tf.config.list_physical_devices('GPU')))")
    ended = subprocess.run(program, capture_output=True, check=False, env=environment_of_job(os.environ))  # noqa: S603
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
    ended_at: Optional[Tuple[float, float]] = None  # of the last start, in time.time() and time.monotonic()
    last_progress: Optional[Tuple[int, int]] = None
    faults = HostFaults()
    for attempt in range(config.max_restarts + 1):
        _clear_leftovers(token)
        answering = _answering_hosts(config, faults.usable(hosts), token, attempt == 0, requests)
        if attempt and spec.host_check and len(answering) > 1:
            answering = _check_hosts(config, spec, answering, token, faults, requests)
            _clear_leftovers(token)
        if requests.reason():
            log_line(f"{requests.reason()}, before a start")
            return STOPPED if requests.count else LOST_RANK
        count = min(ranks, sum(host.slots for host in answering)) if hosts else ranks
        used = hosts_in_use(answering, count)
        if not attempt:
            _report_spares(answering, used)
        job = f"{token}.{attempt}"  # the ranks log it at their start
        command = compose_mpirun(config, count, used, job, spec.program)
        facts = {"attempt": attempt, "job": job, "ranks": count, "hosts": [f"{host.name}:{host.slots}" for host in used]}
        log.append("start", **facts, command=command)
        write_line(f"+ {shlex.join(command)}", sys.stdout)
        started, logged_before = time.monotonic(), len(_read_log(run_dir))
        ranks_here = not used or network.is_this_host(used[0].name)
        status = run(command, requests, ranks_here)
        seconds, lost_seconds = round(time.monotonic() - started, 1), _lost_seconds(run_dir, logged_before, ended_at)
        ended_at = time.time(), time.monotonic()
        _clear_leftovers(token)
        goodput = Goodput(_read_log(run_dir)).report()["goodput"]
        ended = {"code": status.code, "reason": status.reason, "seconds": seconds, "lost_seconds": lost_seconds}
        log.append("end", **facts, **ended, goodput=goodput)
        if run_dir is None or requests.reason() or not _may_pass(status):
            if not status.said or requests.reason():
                log_line(status.reason)
            return status.code
        faulty = find_faulty_host(status, used) if status.code != STOPPED else ""
        left_out = bool(faulty) and _count_fault(faults, faulty, f"{status.reason} (start {attempt + 1})")
        progress = _progress(run_dir)
        if not left_out and progress == last_progress:
            log_line(f"{status.reason}, for the second time at step {progress[1]} without a new checkpoint: not restarted")
            return status.code
        if attempt < config.max_restarts:
            so_far = "" if goodput is None else f"; goodput so far {goodput:.1%}"
            log_line(f"{status.reason}. Restarting, {attempt + 1} of at most {config.max_restarts}{so_far}")
        last_progress = progress
    log_line(f"{status.reason}. --max_restarts={config.max_restarts} is used up; the same command resumes the run")
    return status.code


def _may_pass(status: ExitStatus) -> bool:
    """Returns whether a run that ended in this way may succeed when it is restarted.

    It may after a rank hung, was lost or preempted, or was killed by a signal other than SIGILL. It would not after what
    ranks found wrong with data, flags, code, disk or numbers.
    """
    return status.code in (LOST_RANK, STOPPED) or (status.code > 128 and status.code != 128 + signal.SIGILL)


def _answering_hosts(config: LaunchConfig, hosts: List[Host], token: str, first: bool, requests: StopRequests) -> List[Host]:
    """Returns the hosts that answer and can connect back, as mpirun's daemons must; at the first start all must.

    Before a restart, asks again for some minutes while no host answers. Returns none if it is asked to stop meanwhile.
    """
    others = [host for host in hosts if not network.is_this_host(host.name)]
    if not others:
        return hosts
    environ = {network.INCLUDE[0]: config.network} if config.network else os.environ
    search = search_command(token.split(".")[0])
    for left in reversed(range(1 if first else _ASK_TIMES)):
        addresses = network.chosen_addresses(environ, network.interfaces())
        replies = dict(zip(others, ask_hosts(others, config.rsh_agent, addresses, search)))
        silent = {host: f"{host.name} ({f.text}; {f.fix})" for host, (f, _) in replies.items() if f.verdict == FAILURE}
        answering = [host for host in hosts if host not in silent]
        why = "; ".join(silent.values())
        if answering or not left:
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
    for host, (_, pids) in replies.items():
        _report_leftovers(host.name, pids)
    return answering


def _check_hosts(
    config: LaunchConfig, spec: LaunchSpec, hosts: List[Host], token: str, faults: HostFaults, requests: StopRequests
) -> List[Host]:
    """Returns the hosts that pass doctor's checks; all of them if none does, for then it is no one host's fault.

    Also all of them if it is asked to stop meanwhile.
    """
    began = time.monotonic()

    def command_for(host: Host) -> List[str]:
        return compose_mpirun(config, host.slots, [host], token, spec.host_check)

    wrong = check_hosts(hosts, command_for, environment_of_job(os.environ), requests.reason)
    if requests.reason():
        return hosts
    log_line(
        f"checked {plural(len(hosts), 'host')} in {time.monotonic() - began:.0f} s: {len(hosts) - len(wrong)} can train"
    )
    if len(wrong) == len(hosts):
        log_line(f"no host passed: {'; '.join(f'{name} ({text})' for name, text in wrong.items())}. Starting all the same")
        return hosts
    for name, text in wrong.items():
        log_line(f"continuing without {name} ({text})")
        _count_fault(faults, name, f"its checks: {text}")
    return [host for host in hosts if host.name not in wrong]


def _count_fault(faults: HostFaults, host: str, reason: str) -> bool:
    """Counts a fault of a host's own; returns whether the host is left out from now on, which is said."""
    left_out = faults.add(host, reason)
    if left_out:
        log_line(left_out)
    return bool(left_out)


def _report_spares(hosts: List[Host], used: List[Host]) -> None:
    names = {host.name for host in used}
    named = ", ".join(f"{host.name} ({plural(host.slots, 'slot')})" for host in hosts if host.name not in names)
    if named:
        write_line(f"spare: {named}; used where another host fails", sys.stdout)


def _clear_leftovers(token: str) -> None:
    """Kills what earlier jobs of this run left behind on this host, after a moment to exit by itself.

    Raises Failure(CONFIGURATION) if another launcher is running it now. What another host launched is only reported.
    """
    deadline = Deadline(_EXIT_SECONDS)
    while True:
        ours: List[psutil.Process] = []
        foreign: List[psutil.Process] = []
        for job, processes in local_processes(token.split(".")[0]).items():  # without zombies, which may stay for ever
            alive = not f"{job}.".startswith(f"{token}.") and launcher_is_alive(job)
            if alive:
                raise Failure(CONFIGURATION, f"another launcher, process {job.split('.')[2]}, is running this --run_dir")
            (foreign if alive is None else ours).extend(processes)
        if not ours or deadline.passed():
            break
        time.sleep(0.1)
    _report_leftovers("this host", [process.pid for process in foreign])
    if ours:
        log_line(f"killing processes {[process.pid for process in ours]}, which a job of this run left behind")
    for process in ours:
        with contextlib.suppress(psutil.Error):  # gone, or another user's by now
            process.kill()


def _report_leftovers(host: str, pids: List[int]) -> None:
    if pids:
        log_line(f"{host}: another job of this run left processes {pids} behind; if they stay, kill -9 them there")


def _progress(run_dir: RunDir) -> Tuple[int, int]:
    """Returns the step of the newest checkpoint and that of the last line of the log; -1 for none."""
    saved = None
    with contextlib.suppress(Failure):  # storage that does not come back is the ranks' to report
        saved = checkpoint_step(next(iter(run_dir.list_checkpoints()), Path()))
    steps = [line.step for line in _read_log(run_dir) if line.epoch >= 0]
    return -1 if saved is None else saved, steps[-1] if steps else -1


def _read_log(run_dir: Optional[RunDir]) -> List[LogLine]:
    with contextlib.suppress(OSError, Failure):
        return read_log(run_dir.log) if run_dir else []
    return []


def _lost_seconds(run_dir: Optional[RunDir], logged_before: int, ended_at: Optional[Tuple[float, float]]) -> Optional[float]:
    """Returns how long after `ended_at` (time.time() and time.monotonic(), or None) the run made its first update again.

    logged_before: lines of the log that earlier starts wrote. None if it has made none, and at the first start. A clock that
    was set since then makes it no less than the log's process took by itself, and no more than has passed here.
    """
    for line in _read_log(run_dir)[logged_before:]:
        if line.kind == "first_update" and ended_at is not None:
            least, most = line.timestamp - line.began, time.monotonic() - ended_at[1]
            seconds = min(max(line.timestamp - ended_at[0], least), most)
            log_line(f"trained again {seconds:.1f} s after the last start ended")
            return round(seconds, 1)
    return None


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
            append_whole(self._path, self._unwritten, sync=True)
            self._unwritten = b""
        except OSError as error:
            first = not self._path.exists() or self._path.stat().st_size == 0
            if event == "start" and (first or error.errno not in DISK_FULL):
                raise Failure(CONFIGURATION, write_error(self._path, error)) from error
            log_line(write_error(self._path, error))
