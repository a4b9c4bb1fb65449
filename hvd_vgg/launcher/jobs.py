"""Tokens that mark a job's processes, and finding what an earlier job of the same run left behind."""

import os
import re
import shlex
import socket
from pathlib import Path
from typing import Dict, List, Optional

from hvd_vgg.environment import JOB_PARAMETER

_MARK = re.compile(JOB_PARAMETER.encode() + rb"[=\0]([0-9a-f]{16}\.[\w-]+\.\d+\.\d+)")


def find_jobs(run_token: str) -> str:
    """Returns a shell's command that prints a path in /proc of each process that jobs of the run have on its host."""
    # A process tells its own entries of the environment and of the command line, divided by NUL; this command's own
    # entries begin with a caret.
    pattern = rf"^OMPI_MCA_{JOB_PARAMETER}={run_token}\.", rf"^{run_token}\."
    greps = " ".join(f"-e {shlex.quote(each)}" for each in pattern)
    return f"grep -lzs {greps} /proc/[0-9]*/environ /proc/[0-9]*/cmdline"


def jobs_here(run_token: str) -> Dict[str, List[int]]:
    """Returns the living processes of this user on this host of all jobs of the run, by the job's token."""
    jobs: Dict[str, List[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if entry.stat().st_uid != os.getuid():
                continue
            match = _MARK.search((entry / "cmdline").read_bytes()) or _MARK.search((entry / "environ").read_bytes())
        except OSError:
            continue
        if match and match[1].startswith(f"{run_token}.".encode()):
            jobs.setdefault(match[1].decode(), []).append(int(entry.name))
    return jobs


def launcher_lives(token: str) -> Optional[bool]:
    """Says whether the launcher of a job is still there; None where it ran on another host."""
    _, host, launcher, began = token.split(".")
    return _start_time(int(launcher)) == began if host == _host() else None


def own_token(run_token: str) -> str:
    """Returns the token of the job that this process launches: run, host, process, when the process began."""
    return f"{run_token}.{_host()}.{os.getpid()}.{_start_time(os.getpid())}"


def _host() -> str:
    return re.sub(r"\W", "-", socket.gethostname())


def _start_time(pid: int) -> str:
    """Returns when a process of this host began, in ticks since the host did; "" where there is none, or its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
