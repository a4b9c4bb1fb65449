"""What the end of an mpirun means: its exit code, its last messages, the kernel's counters of out-of-memory kills."""

import contextlib
import re
import signal
from collections import Counter
from pathlib import Path
from typing import Dict, Mapping, NamedTuple

from hvd_vgg.errors import CONFIGURATION, DONE, LOST_RANK, STOPPED
from hvd_vgg.parallel.cores import control_groups

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
    """How a start ended: the exit code, the reason in a sentence, and the rank or host that mpirun blames, if any.

    said: whether the ranks have said why themselves, since they exited with a code of this package.
    """

    code: int
    reason: str
    rank: int = -1
    host: str = ""
    said: bool = False


def explain(status: int, stderr: str, oom_kills: Mapping[str, int], stdout: str = "") -> ExitStatus:
    """Returns what an exit status of mpirun means.

    status: negative for a signal that killed mpirun itself; stderr, stdout: the ends of them; oom_kills: the counters of
    out-of-memory kills that rose meanwhile, and by how much.
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
    if silent := re.search(r"process rank (\d+) with PID \d+ on\s+node (\S+) exiting\s+improperly", stderr):
        return ExitStatus(LOST_RANK, f"rank {silent[1]} exited without leaving MPI, on {silent[2]}", int(silent[1]))
    # Open MPI 5 says so on stdout, and ends with the code of what was to start the daemon; 4 ends with 1, and 5 with 213
    # where a host has no interface of the network.
    if silent_host := re.search(r"-----\nA daemon failed to report back.*?Remote host:\s+(\S+)", stdout, re.S):
        text = f"mpirun could not start its daemon on {silent_host[1]}: see above"
        return ExitStatus(LOST_RANK, text, host=silent_host[1])
    if status == 1 and "ORTE" in stderr and "Process name:" not in stderr:
        return ExitStatus(LOST_RANK, "mpirun could not reach all of its hosts: see above")
    if status == 213 and "No network interfaces" in stderr:  # it would be the same at the next start
        return ExitStatus(CONFIGURATION, "Open MPI 5 found no interface of --network on a host, or only loopback: see above")
    if status == 1 and "-----" not in stderr:  # the frame of all its messages about ranks; a SIGTERM is no such message
        return ExitStatus(LOST_RANK, "mpirun was terminated from outside")
    # With Open MPI 5 another rank may notice a loss before mpirun does, and abort with a code of MPI's.
    peer = re.search(r"communication peer process has unexpectedly disconnected.*?Peer host:\s+(\S+)", stderr, re.S)
    if peer and status not in (DONE, *range(64, 128)) and "Process name:" not in stderr:
        return ExitStatus(LOST_RANK, f"a rank on {peer[1]} is gone: another lost its connection", host=peer[1])
    first = re.search(r"Process name: \[(?:\[\d+,\d+\]|\S+@\d+),(\d+)\]\s+Exit code:\s+(\d+)", stderr)
    known = {
        DONE: "done",
        STOPPED: "all ranks stopped in order",
        LOST_RANK: "a rank hung, was lost, or could not read its files",
    }
    # Ranks that exit with a code of this package have said who found what; which of them mpirun noticed first means nothing.
    said = status in (DONE, *range(64, 128))
    rank = f"; rank {first[1]} exited first" if first and not said else ""
    return ExitStatus(status, known.get(status, f"exit code {status}") + rank, said=said)


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
