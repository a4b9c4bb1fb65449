"""How many CPU cores a rank may use: affinity, control groups, ranks on the host."""

import contextlib
import os
from pathlib import Path
from typing import List, Optional

import psutil

# How the names of daemons that start ranks begin: Open MPI 4 and 5 (orterun_wrapper too), MPICH, Slurm.
_LAUNCHERS = ("mpirun", "mpiexec", "orte", "prte", "hydra_pmi_proxy", "slurmstepd")


def share_of_cores(ranks: int) -> int:
    """Returns how many cores this rank may use, at least 1; ranks: on this host.

    A launcher that binds each rank to its own cores has divided them already; otherwise all ranks share the launcher's
    cores. They also share a container's quota of CPU time.
    """
    return divide_cores(len(os.sched_getaffinity(0)), _launcher_cores(), cpu_quota(Path("/")), ranks)


def divide_cores(own: int, launchers: Optional[int], quota: Optional[float], ranks: int) -> int:
    """Returns the cores for one of `ranks`, at least 1.

    own: cores that it may run on; launchers: cores that its launcher may run on, None if unknown; quota: cores' worth of CPU
    time for all ranks, None for no limit.
    """
    share = min(own, max(own, launchers or own) / ranks)
    return max(1, int(share if quota is None else min(share, quota / ranks)))


def cpu_quota(root: Path) -> Optional[float]:
    """Returns how many cores' worth of CPU time this process's control groups allow; None for no limit."""
    limits = []
    for group in control_groups(root, "cpu"):
        try:
            quota, period = (group / "cpu.max").read_text().split()
        except OSError:
            quota, period = (str(read_int(group / f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
        if quota.isdigit() and period.isdigit():  # not "max", "-1" or "None"
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def _launcher_cores() -> Optional[int]:
    """Returns how many cores the daemon that started this rank may run on; None if there is none."""
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().parents():
            if process.name().startswith(_LAUNCHERS):
                return len(process.cpu_affinity())
    return None


def control_groups(root: Path, controller: str) -> List[Path]:
    """Returns the directories of the control groups that limit this process by `controller`, innermost first."""
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
        group = top / path.lstrip("/")
        # In a container the path may be the host's: directories that do not exist here are skipped.
        found += [each for each in (group, *group.parents) if (each == top or top in each.parents) and each.is_dir()]
    return found


def read_int(path: Path) -> Optional[int]:
    """Returns the integer in a file; None if there is none."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
