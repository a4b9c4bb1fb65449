"""Which hosts fail: faults counted by host, doctor's checks of each before a restart, and the hosts that a start uses."""

from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Dict, List, Mapping, Sequence

from hvd_vgg.launcher.exit_status import ExitStatus
from hvd_vgg.launcher.hostfile import Host
from hvd_vgg.launcher.ssh import TOOK_TOO_LONG, run_command
from hvd_vgg.parallel import network
from hvd_vgg.reporting.findings import FAILURE

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
    """Returns the first hosts, and as many of their slots, as `ranks` need, in the order of their ranks; others are spare.

    Open MPI gives the first ranks to its own host, wherever that stands, and then keeps to the order of the file.
    """
    used, left = [], ranks
    for host in sorted(hosts, key=lambda host: not network.is_this_host(host.name)):
        if left > 0:
            used.append(Host(host.name, min(host.slots, left)))
            left -= host.slots
    return used


def find_faulty_host(status: ExitStatus, hosts: Sequence[Host]) -> str:
    """Returns the host by whose fault a start ended; "" if no one host's is known, or there is only one.

    hosts: of `hosts_in_use`. It is the host of a rank that was killed or left MPI, or one whose daemon is gone. Of a hang
    nobody can tell from outside; the checks before the restart find a device that hangs.
    """
    places = [host.name for host in hosts for _ in range(host.slots)]
    if len(set(places)) < 2:
        return ""
    if 0 <= status.rank < len(places):
        return places[status.rank]
    # mpirun may name it without its domain
    same = (name for name in places if status.host and status.host in (name, name.split(".")[0]))
    return next(same, "")


def check_hosts(
    hosts: Sequence[Host],
    command_for: Callable[[Host], List[str]],
    environ: Mapping[str, str],
    stop: Callable[[], object] = lambda: False,
) -> Dict[str, str]:
    """Runs a command for each host, at the same time; returns what is wrong, by the names of those where it failed.

    command_for: returns the command that runs `hvd-vgg doctor --host_only` on a host's ranks; stop: once it returns
    something true, the commands are killed, and what they say means nothing.
    """
    with ThreadPoolExecutor(len(hosts)) as pool:
        ended = list(pool.map(lambda host: run_command(command_for(host), _CHECK_SECONDS, environ, stop), hosts))
    return {host.name: _explain_check(code, output) for host, (code, output) in zip(hosts, ended) if code}


def _explain_check(code: int, output: str) -> str:
    """Returns the first failure that doctor printed, or the last line of what it printed instead."""
    if code == TOOK_TOO_LONG:
        return f"its checks did not end within {_CHECK_SECONDS:g} s"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    failures = [" ".join(line.split()[1:]) for line in lines if line.startswith(FAILURE)]
    return (failures or lines[-1:] or [f"doctor ended with {code}"])[0][:300]
