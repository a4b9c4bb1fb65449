"""How many CPU cores a rank may use and threads it may start: affinity, limits, control groups, ranks on the host."""

import contextlib
import os
import resource
from pathlib import Path
from typing import List, Optional, Tuple

import psutil

from hvd_vgg.text import plural

# How the names of daemons that start ranks begin: Open MPI 4 and 5 (orterun_wrapper too), MPICH, Slurm.
_LAUNCHERS = ("mpirun", "mpiexec", "orte", "prte", "hydra_pmi_proxy", "slurmstepd")

# What a rank starts at the least, seen on 1 and 2 cores; pools of TensorFlow and of the input pipeline grow with the cores.
_THREADS_OF_RANK, _THREADS_PER_CORE = 10, 2


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


def threads_refusal(root: Path, ranks: int) -> str:
    """Returns why `ranks` cannot start their threads on this host, "" if nothing is known against it.

    TensorFlow aborts the process where it can start no thread, and Horovod may wait for one that is not there.
    """
    room, limit = thread_limit(root)
    needed = ranks * (_THREADS_OF_RANK + _THREADS_PER_CORE * share_of_cores(ranks))
    if room is None or room >= needed:
        return ""
    text = f"{limit}, which leaves room for {max(room, 0)} more threads, but {plural(ranks, 'rank')} here will start"
    return f"{text} {needed} or more: raise it (ulimit -u; pids.max, docker run --pids-limit), or start fewer ranks"


def thread_limit(root: Path) -> Tuple[Optional[int], str]:
    """Returns how many more threads this process's user may start, and what limits them; (None, "") without a limit.

    Each process is one thread at least. For root only control groups count.
    """
    found = []
    most, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if os.getuid() != 0 and most != resource.RLIM_INFINITY:
        running = sum(
            process.info["num_threads"] or 0
            for process in psutil.process_iter(["uids", "num_threads"])
            if process.info["uids"] and process.info["uids"].real == os.getuid()
        )
        found.append((most - running, f"ulimit -u is {most}"))
    for group in control_groups(root, "pids"):
        limit, running = read_int(group / "pids.max"), read_int(group / "pids.current") or 0
        if limit is not None:  # not "max"
            found.append((limit - running, f"{group / 'pids.max'} is {limit}"))
    return min(found, default=(None, ""))


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
