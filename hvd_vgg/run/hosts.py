"""The hosts of a job: the host file, and what an earlier job of the same run left on them."""

import os
import re
import shlex
import socket
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional

from hvd_vgg.run.health import CONFIGURATION, Failure

# A parameter that Open MPI does not know: mpirun hands it to its daemons, on their command lines, and to all ranks, in
# their environment. So whatever a job has started can be told from all else, on every host.
JOB_PARAMETER = "hvd_vgg_job"
_MARK = re.compile(JOB_PARAMETER.encode() + rb"[=\0]([0-9a-f]{16}\.[\w-]+\.\d+\.\d+)")
_LINE = re.compile(r"^(\S+?)((?:\s+\w+\s*=\s*\d+)*)$")


class Host(NamedTuple):
    """A host as mpirun names it, and how many ranks it takes."""

    name: str
    slots: int


def read(path: str) -> List[Host]:
    """Returns the hosts of an Open MPI host file: a line a host, `name slots=N`, 1 slot where it says none.

    A host that occurs again adds slots; # begins a comment. Raises Failure(CONFIGURATION) naming file and line.
    """
    slots: Dict[str, int] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(CONFIGURATION, f"--hostfile={path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        match = _LINE.match(text)
        # A name goes into a command line of the remote shell: -oProxyCommand=... is none.
        if not match or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", match[1]):
            raise Failure(CONFIGURATION, f"{path}, line {number}: {line!r}: expected `host slots=N`")
        given = dict(re.findall(r"(\w+)\s*=\s*(\d+)", match[2]))
        count = int(given.pop("slots", 1))
        given.pop("max_slots", given.pop("max-slots", None))
        if given or count < 1:
            raise Failure(CONFIGURATION, f"{path}, line {number}: {line!r}: expected `host slots=N`, N of 1 or more")
        slots[match[1]] = slots.get(match[1], 0) + count
    if not slots:
        raise Failure(CONFIGURATION, f"--hostfile={path} names no host: expected a line `host slots=N` for each")
    return [Host(name, count) for name, count in slots.items()]


def is_here(name: str) -> bool:
    """Says whether a host is the one that this runs on."""
    return name == socket.gethostname() or leads_here(name)


def leads_here(name: str) -> bool:
    """Says whether a name leads to an address of this host: one that a socket can be bound to."""
    try:
        found = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as end:
                end.bind(address)
            return True
        except OSError:
            continue
    return False


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
