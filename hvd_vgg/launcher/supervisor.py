"""`hvd-vgg launch`: starts a command on many ranks by one mpirun, stops it on request, and starts a run again that failed.

A run does not depend on the number of its ranks, so it goes on from its newest checkpoint on whatever hosts still answer.
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
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from hvd_vgg.config import LaunchConfig
from hvd_vgg.errors import CONFIGURATION, DONE, LOST_RANK, STOPPED, USAGE, Failure
from hvd_vgg.launcher.hostfile import Host, read_hostfile
from hvd_vgg.launcher.jobs import find_jobs, jobs_here, launcher_lives, own_token
from hvd_vgg.launcher.mpirun import ExitStatus, Limits, Requests, compose_mpirun, log_line, run, shell_quoted
from hvd_vgg.launcher.ssh import HostReply, ask_hosts
from hvd_vgg.parallel import network
from hvd_vgg.parallel.mpi import root_refusal
from hvd_vgg.reporting.findings import FAILURE
from hvd_vgg.run_dir import DISK_FULL, write_error
from hvd_vgg.streams import write_line
from hvd_vgg.text import plural
from hvd_vgg.training import checkpoint

# How long what a job has left may take to end by itself, before it is ended.
_LEAVE_SECONDS = 5.0
# Before a restart no host may answer for a while, as when a switch starts again: how often it asks, how far apart.
_ASKED_TIMES, _ASK_AGAIN_SECONDS = 10, 30.0


class LaunchSpec(NamedTuple):
    """What to start: the command of each rank; the directory of a run that can go on, or None; ranks that it can use.

    unwritten: lines of restarts.jsonl that a full disk had no room for.
    """

    program: List[str]
    run_dir: Optional[Path] = None
    most_ranks: Optional[int] = None
    unwritten: Sequence[bytes] = ()


def launch(config: LaunchConfig, job: LaunchSpec) -> int:
    """Runs the job to its end, over restarts, and returns the exit code. Raises Failure(USAGE or CONFIGURATION)."""
    listed = read_hostfile(config.hostfile) if config.hostfile else []
    wanted = _ranks(config, job, listed)
    run_token = hashlib.sha256(str((job.run_dir or Path(f"/{os.getpid()}")).resolve()).encode()).hexdigest()[:16]
    token = own_token(run_token)
    if config.dry_run:
        print("+", shell_quoted(compose_mpirun(config, wanted, listed, token, job.program)))
        return DONE
    refused = root_refusal(os.environ) or network.network_flag_error(config.network, network.interfaces())
    if refused:
        raise Failure(CONFIGURATION, refused)
    limit = config.time_limit_seconds
    limits = Limits(config.grace_seconds, time.monotonic() + limit if limit else math.inf)
    with Requests() as requests:
        return _supervise(config, job, listed, wanted, token, requests, limits)


def _ranks(config: LaunchConfig, job: LaunchSpec, listed: List[Host]) -> int:
    """Returns the number of ranks asked for, or one for each slot or device."""
    slots = sum(host.slots for host in listed)
    if listed and config.ranks > slots:
        where = ", ".join(f"{host.name}: {host.slots}" for host in listed)
        raise Failure(
            CONFIGURATION, f"--ranks={config.ranks}: {config.hostfile} has {plural(slots, 'slot')} ({where}): add some"
        )
    if job.most_ranks is not None and config.ranks > job.most_ranks:
        raise Failure(USAGE, f"--global_batch={job.most_ranks} leaves nothing to do for some of --ranks={config.ranks}")
    found = config.ranks or slots or _devices()
    return min(found, job.most_ranks or found)


def _devices() -> int:
    """Returns how many devices TensorFlow sees here, as the ranks will; 1 where it sees none."""
    program = "import tensorflow as tf; print(len(tf.config.list_physical_devices('GPU')))"
    asked = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)  # noqa: S603
    if asked.returncode:
        why = asked.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise Failure(CONFIGURATION, f"{sys.executable} cannot import tensorflow: {''.join(why)}")
    devices = int(asked.stdout.split()[-1])
    told = f"{plural(devices or 1, 'rank')}: TensorFlow sees {plural(devices, 'device')} (--ranks overrides)"
    write_line(told, sys.stdout)
    return devices or 1


def _supervise(
    config: LaunchConfig,
    job: LaunchSpec,
    listed: List[Host],
    wanted: int,
    token: str,
    requests: Requests,
    limits: Limits,
) -> int:
    """Starts the job, again while that is worth it, and returns the exit code."""
    before: Optional[Tuple[int, int]] = None
    ended_at: Optional[float] = None
    for attempt in range(config.max_restarts + 1):
        _clear_leftovers(token)
        answering = _answering(config, listed, token, attempt == 0, requests, limits)
        if requests.count:
            log_line("stopped on request, before a start")
            return STOPPED
        if time.monotonic() > limits.until:
            log_line("--time_limit_seconds is over, before a start")
            return LOST_RANK
        ranks = min(wanted, sum(host.slots for host in answering)) if listed else wanted
        command = compose_mpirun(config, ranks, answering, token, job.program)
        told = {"attempt": attempt, "ranks": ranks, "hosts": [f"{host.name}:{host.slots}" for host in answering]}
        job = _note(job, "start", **told, command=command)
        write_line(f"+ {shell_quoted(command)}", sys.stdout)
        watch = _FirstUpdate(job, ended_at)
        began = time.monotonic()
        ranks_here = not answering or network.is_this_host(answering[0].name)  # the first host is filled first
        ended = run(command, requests, limits._replace(ranks_here=ranks_here), watch.look)
        watch.look()
        ended_at = time.time()
        _clear_leftovers(token)
        seconds = round(time.monotonic() - began, 1)
        job = _note(
            job, "end", **told, code=ended.code, sentence=ended.sentence, seconds=seconds, lost_seconds=watch.lost_seconds
        )
        at = _progress(job)
        again = _worth_another(config, job, ended, requests, limits)
        if again and attempt == config.max_restarts:
            log_line(f"{ended.sentence}. --max_restarts={config.max_restarts} are used up; the same command goes on")
        elif again and at == before:
            log_line(
                f"{ended.sentence}, for the second time at step {at[1]}, with no checkpoint in between: not started again"
            )
        elif again:
            log_line(f"{ended.sentence}. Starting again, {attempt + 1} of at most {config.max_restarts}")
            before = at
            continue
        elif ended.code not in (DONE, *range(64, 128)) or requests.count or time.monotonic() > limits.until:
            log_line(ended.sentence)  # else the ranks have said it
        return ended.code
    raise AssertionError("the last start returns")


def _worth_another(config: LaunchConfig, job: LaunchSpec, ended: ExitStatus, requests: Requests, limits: Limits) -> bool:
    """Says whether a run that ended so may end otherwise when it is started again.

    A rank that hung or is gone, that was preempted, or that a signal killed: any but SIGILL, which the next would meet too.
    Not what was asked for here, nor what ranks have found wrong with data, flags, code, disk or numbers.
    """
    if job.run_dir is None or requests.count or time.monotonic() > limits.until:
        return False
    return ended.code in (LOST_RANK, STOPPED) or (ended.code > 128 and ended.code != 128 + signal.SIGILL)


def _answering(
    config: LaunchConfig, listed: List[Host], token: str, first: bool, requests: Requests, limits: Limits
) -> List[Host]:
    """Returns the hosts that answer and can connect back; all must at the first start.

    Before another start it asks again while there is none, for some minutes; none, too, once it was asked to stop.
    """
    for left in reversed(range(1 if first else _ASKED_TIMES)):
        asked = _ask(config, [host for host in listed if not network.is_this_host(host.name)], token, first)
        silent = {name: f"{f.text}; {f.fix}" for name, (f, _) in asked.items() if f.verdict == FAILURE}
        answering = [host for host in listed if host.name not in silent]
        why = "; ".join(f"{name} ({text})" for name, text in silent.items())
        if answering or not silent or not left:
            break
        if left == _ASKED_TIMES - 1:
            log_line(f"no host answers: {why}. Asking again every {_ASK_AGAIN_SECONDS:g} s, {left} times")
        again_at = min(time.monotonic() + _ASK_AGAIN_SECONDS, limits.until)
        while time.monotonic() < again_at and not requests.count:
            time.sleep(0.1)
        if requests.count or time.monotonic() > limits.until:
            return []
    if silent and (first or not answering):
        raise Failure(CONFIGURATION, f"cannot use {why}. Asked by: {config.rsh_agent} HOST")
    if silent:
        log_line(f"going on without {why}")
    for name, (_, pids) in asked.items():
        if pids:
            log_line(_left(name, pids))
    return answering


def _ask(config: LaunchConfig, others: List[Host], token: str, first: bool) -> Dict[str, HostReply]:
    """Returns by name what other hosts tell: a daemon that could not reach mpirun would be waited for for ever."""
    if not others:
        return {}
    there = network.interfaces()
    addresses = network.chosen_addresses({network.INCLUDE[0]: config.network} if config.network else os.environ, there)
    if first and not addresses:
        raise Failure(CONFIGURATION, f"no network; here are: {network.format_interfaces(there)}")
    told = ask_hosts(others, config.rsh_agent, addresses, find_jobs(token.split(".")[0]))
    return {host.name: each for host, each in zip(others, told)}


def _clear_leftovers(token: str) -> None:
    """Ends what jobs of this run have left on this host, after a moment to end by itself.

    Raises Failure(CONFIGURATION) when another launcher runs it now. What was launched from another host is only told.
    """
    deadline = time.monotonic() + _LEAVE_SECONDS
    while True:
        ours: List[int] = []
        foreign: List[int] = []
        for job, pids in jobs_here(token.split(".")[0]).items():
            lives = job != token and launcher_lives(job)
            if lives:
                raise Failure(CONFIGURATION, f"another launcher, process {job.split('.')[2]}, is running this --run_dir")
            (foreign if lives is None else ours).extend(pids)
        if not ours or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    if foreign:
        log_line(_left("this host", foreign))
    if ours:
        log_line(f"ending processes {_list(ours)}, which a job of this run left")
    for pid in ours:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # gone, or another user's by now
            os.kill(pid, signal.SIGKILL)


def _left(where: str, pids: List[int]) -> str:
    return f"{where}: another job of this run has left processes {_list(pids)}; if they stay, end them there: kill -9"


def _list(pids: List[int]) -> str:
    return ", ".join(map(str, pids))


def _progress(job: LaunchSpec) -> Tuple[int, int]:
    """Returns the step of the newest checkpoint and that of the last line of the log; -1 for none."""
    if job.run_dir is None:
        return -1, -1
    saved = [checkpoint.step_of(path) for path in checkpoint.existing(job.run_dir)]
    steps = [row["step"] for row in _log_rows(_read_from(job.run_dir / "dllogger.json", -65536)) if row["type"] == "LOG"]
    return max(saved, default=-1), next((step[1] for step in reversed(steps) if len(step) == 2), -1)


class _FirstUpdate:
    """Looks for the first update of a start in the log, and says how long nothing was trained before it."""

    def __init__(self, job: LaunchSpec, ended_at: Optional[float]) -> None:
        self.path = job.run_dir / "dllogger.json" if job.run_dir and ended_at is not None else None
        self.at = self.path.stat().st_size if self.path and self.path.exists() else 0
        self.ended_at = ended_at
        self.lost_seconds: Optional[float] = None

    def look(self) -> None:
        """Looks once."""
        if self.path is None or self.lost_seconds is not None or self.ended_at is None:
            return
        for row in _log_rows(_read_from(self.path, self.at)):
            if row.get("data", {}).get("event") == "first_update":
                self.lost_seconds = round(float(row["timestamp"]) - self.ended_at, 1)
                log_line(f"training again, {self.lost_seconds} s after the last start ended")


def _read_from(path: Path, at: int) -> bytes:
    """Returns a file's bytes from `at`, from the end if negative; none where it cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(max(at, -path.stat().st_size), os.SEEK_SET if at >= 0 else os.SEEK_END)
            return file.read()
    except OSError:
        return b""


def _log_rows(data: bytes) -> List[Dict[str, Any]]:
    """Returns the whole lines of DLLogger's in `data`; one that a killed rank left torn is passed over."""
    rows = []
    for line in data.splitlines(keepends=True):
        if line.startswith(b"DLLL {") and line.endswith(b"\n"):
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line[5:]))
    return rows


def _note(job: LaunchSpec, event: str, **data: Any) -> LaunchSpec:
    """Appends a line to RUN_DIR/restarts.jsonl, on disk when this returns; on a full disk, with the next one.

    Raises Failure(CONFIGURATION) where a start cannot be noted for another reason, or the first one for any.
    """
    if job.run_dir is None:
        return job
    now = time.time()
    when = datetime.datetime.fromtimestamp(now, datetime.timezone.utc).isoformat(timespec="milliseconds")
    path = job.run_dir / "restarts.jsonl"
    line = json.dumps({"time": now, "at": when, "event": event, **data}).encode() + b"\n"
    lines = b"".join([*job.unwritten, line])
    try:
        os.umask(os.umask(0o027) | 0o027)  # what a run writes is for its owner and group
        job.run_dir.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as file:
            end = file.tell()
            try:
                if file.write(lines) < len(lines):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)  # or the next line would be glued to a half
                raise
    except OSError as error:
        first = not path.exists() or path.stat().st_size == 0
        if event == "start" and (first or error.errno not in DISK_FULL):
            raise Failure(CONFIGURATION, write_error(path, error)) from error
        log_line(write_error(path, error))
        return job._replace(unwritten=[*job.unwritten, line])
    return job._replace(unwritten=())
