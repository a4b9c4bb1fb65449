"""How many CPU cores a rank may use: affinity, control groups, ranks on the host."""

import contextlib
import os
from pathlib import Path
from typing import List, Optional

# How the names of the daemons begin that start ranks: of Open MPI 4 and 5 (orterun_wrapper too), MPICH and Slurm.
_LAUNCHERS = ("mpirun", "mpiexec", "orte", "prte", "hydra_pmi_proxy", "slurmstepd")


def share_of_cores(ranks: int, root: Path = Path("/")) -> int:
    """Returns how many cores this rank may use, one of `ranks` on its host, 1 at least.

    A launcher that binds each rank to cores of its own has divided them already: what its own process may run on is what
    all of its ranks share. Where the container has a quota of processor time, they share that.
    """
    if not hasattr(os, "sched_getaffinity"):
        return max(1, (os.cpu_count() or 1) // ranks)
    return divide_cores(len(os.sched_getaffinity(0)), _launcher_cores(root), cpu_quota(root), ranks)


def divide_cores(own: int, launchers: Optional[int], quota: Optional[float], ranks: int) -> int:
    """Returns the cores of one of `ranks`: own: that it may run on; launchers: that its launcher may, None for unknown;
    quota: cores' worth of time for all ranks, None for no limit.
    """
    share = min(own, max(own, launchers or own) / ranks)
    return max(1, int(share if quota is None else min(share, quota / ranks)))


def cpu_quota(root: Path) -> Optional[float]:
    """Returns how many cores' worth of processor time this process's control groups leave it; None for no limit."""
    limits = []
    for group in control_groups(root, "cpu"):
        try:
            told = (group / "cpu.max").read_text().split()
        except OSError:
            told = [str(read_int(group / f"cpu.cfs_{name}_us") or "") for name in ("quota", "period")]
        if len(told) == 2 and told[0].isdigit() and told[1].isdigit():  # else max, -1, or no such file
            limits.append(int(told[0]) / int(told[1]))
    return min(limits, default=None)


def _launcher_cores(root: Path) -> Optional[int]:
    """Returns how many cores the daemon may run on that started this process among others; None where there is none."""
    for process in ancestors(root, os.getpid())[1:]:
        with contextlib.suppress(OSError):
            if (root / "proc" / str(process) / "comm").read_text().startswith(_LAUNCHERS):
                return len(os.sched_getaffinity(process))
    return None


def control_groups(root: Path, controller: str) -> List[Path]:
    """Returns the folders of the control groups that limit this process by `controller`, the innermost first."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = ["0::/", f"1:{controller}:/"]
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        place = top / path.lstrip("/")
        # In a container the path may be the host's: what is not there is passed over.
        found += [each for each in (place, *place.parents) if (each == top or top in each.parents) and each.is_dir()]
    return found


def read_int(path: Path) -> Optional[int]:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def ancestors(root: Path, process: int) -> List[int]:
    """Returns a process and all that it descends from."""
    line = [process]
    while line[-1] > 1:
        try:
            line.append(int((root / "proc" / str(line[-1]) / "stat").read_text().rsplit(")", 1)[1].split()[1]))
        except (OSError, ValueError, IndexError):
            break
    return line
