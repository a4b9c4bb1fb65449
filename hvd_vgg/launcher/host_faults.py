"""Which hosts fail: faults counted by host, doctor's checks of each before a restart, and the hosts that a start uses."""

from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Dict, List, Optional, Sequence

from hvd_vgg.launcher.hostfile import Host
from hvd_vgg.launcher.mpirun import ExitStatus
from hvd_vgg.launcher.ssh import run_command
from hvd_vgg.reporting.findings import FAILURE
from hvd_vgg.run_dir import RunDir

# A host with as many faults of its own is left out: one may be chance.
_MOST_FAULTS = 2
# Importing TensorFlow and compiling a first kernel take a minute on a slow host.
_CHECK_SECONDS = 180.0


class HostFaults:
    """The faults of each host's own, over all starts of this launcher."""

    def __init__(self) -> None:
        self._reasons: Dict[str, List[str]] = {}

    def add(self, host: str, reason: str) -> str:
        """Counts a fault; returns why the host is left out from now on, "" if it is not."""
        reasons = self._reasons.setdefault(host, [])
        reasons.append(reason)
        if len(reasons) != _MOST_FAULTS:
            return ""
        return f"{host} is left out from now on, after {_MOST_FAULTS} faults of its own: {'; '.join(reasons)}"

    def usable(self, hosts: Sequence[Host]) -> List[Host]:
        """Returns the hosts that are not left out; all of them if none would remain."""
        return [host for host in hosts if len(self._reasons.get(host.name, [])) < _MOST_FAULTS] or list(hosts)


def hosts_in_use(hosts: Sequence[Host], ranks: int) -> List[Host]:
    """Returns the first hosts, and as many of their slots, as `ranks` need; the others are spare."""
    used, left = [], ranks
    for host in hosts:
        if left > 0:
            used.append(Host(host.name, min(host.slots, left)))
            left -= host.slots
    return used


def reporting_ranks(run_dir: Optional[RunDir], ranks: int) -> Dict[int, int]:
    """Returns the size of each rank's hang report, in bytes; compared over a start, it shows which ranks wrote one."""
    paths = {rank: run_dir.fault_report("hang", rank) for rank in range(ranks)} if run_dir else {}
    return {rank: path.stat().st_size if path.exists() else 0 for rank, path in paths.items()}


def find_faulty_host(
    status: ExitStatus, hosts: Sequence[Host], reports_before: Dict[int, int], reports: Dict[int, int]
) -> str:
    """Returns the host by whose fault a start ended; "" if no one host's is known, or there is only one.

    hosts: in use, with as many slots as it has ranks. It is the host of a rank that was killed or left MPI, one whose daemon
    is gone, or that of the ranks that wrote no hang report while the others did: they were stopped as a whole.
    """
    places = [host.name for host in hosts for _ in range(host.slots)]
    if len(set(places)) < 2:
        return ""
    if 0 <= status.rank < len(places):
        return places[status.rank]
    if status.host:  # mpirun may use another name for it, or a shorter one
        return next((name for name in places if name.split(".")[0] == status.host.split(".")[0]), "")
    silent = {places[rank] for rank, size in reports.items() if size == reports_before.get(rank, 0)}
    return silent.pop() if len(silent) == 1 else ""


def check_hosts(hosts: Sequence[Host], command_for: Callable[[Host], List[str]], environ: Dict[str, str]) -> Dict[str, str]:
    """Runs a command for each host, at the same time; returns what is wrong, by the names of those where it failed.

    command_for: returns the command that runs `hvd-vgg doctor --host_only` on a host's ranks.
    """
    with ThreadPoolExecutor(len(hosts)) as pool:
        ended = list(pool.map(lambda host: run_command(command_for(host), _CHECK_SECONDS, environ), hosts))
    return {host.name: _explain_check(code, output) for host, (code, output) in zip(hosts, ended) if code}


def _explain_check(code: int, output: str) -> str:
    """Returns the first failure that doctor printed, or the last line of what it printed instead."""
    if code < 0:
        return f"its checks did not end within {_CHECK_SECONDS:g} s"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    failures = [" ".join(line.split()[1:]) for line in lines if line.startswith(FAILURE)]
    return (failures or lines[-1:] or [f"doctor ended with {code}"])[0][:300]
