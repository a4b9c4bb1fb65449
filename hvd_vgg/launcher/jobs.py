"""Tokens that mark the processes of a job, and the search for processes that earlier jobs of the same run left behind."""

import os
import re
import shlex
import socket
from pathlib import Path
from typing import Dict, List, Optional

import psutil

from hvd_vgg.environment import JOB_PARAMETER

_VARIABLE = f"OMPI_MCA_{JOB_PARAMETER}"


def own_token(run_token: str) -> str:
    """Returns what the token of each job that this process launches begins with: run, host, process, its start time.

    The number of the attempt follows.
    """
    return f"{run_token}.{_host()}.{os.getpid()}.{_start_ticks(os.getpid())}"


def search_command(run_token: str) -> str:
    """Returns a shell command that prints a path in /proc for each process on its host that a job of the run started."""
    # A process's environment and command line are entries that end with NUL. The caret keeps this command itself, whose
    # own entries contain the patterns, from matching.
    patterns = rf"^{_VARIABLE}={run_token}\.", rf"^{run_token}\."
    greps = " ".join(f"-e {shlex.quote(pattern)}" for pattern in patterns)
    return f"grep -lzs {greps} /proc/[0-9]*/environ /proc/[0-9]*/cmdline"


def local_processes(run_token: str) -> Dict[str, List[psutil.Process]]:
    """Returns this user's processes on this host that jobs of the run started, by the job's token."""
    jobs: Dict[str, List[psutil.Process]] = {}
    for process in psutil.process_iter(["uids", "cmdline", "environ"]):
        users, words, environ = (process.info[name] for name in ("uids", "cmdline", "environ"))  # None: gone, or a zombie
        if users is None or users.effective != os.getuid():
            continue
        arguments = dict(zip(words or [], (words or [])[1:]))
        token = arguments.get(JOB_PARAMETER) or (environ or {}).get(_VARIABLE, "")
        if token.startswith(f"{run_token}."):
            jobs.setdefault(token, []).append(process)
    return jobs


def launcher_is_alive(token: str) -> Optional[bool]:
    """Returns whether the launcher of a job is still running; None if it runs on another host."""
    _, host, launcher, started = token.split(".")[:4]
    return _start_ticks(int(launcher)) == started if host == _host() else None


def _host() -> str:
    return re.sub(r"\W", "-", socket.gethostname())


def _start_ticks(pid: int) -> str:
    """Returns when a process started, in clock ticks since boot; "" if there is none, or only a zombie.

    Not psutil's create_time(): that adds the time of boot, which changes when the host's clock is set, and a living launcher
    would then be taken for a dead one.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
