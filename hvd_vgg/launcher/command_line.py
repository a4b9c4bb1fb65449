"""The command line of mpirun: which of Open MPI's versions it is, where ranks go, and what they are given."""

import functools
import os
import re
import shutil
import subprocess
from typing import Any, Dict, List, Mapping, Sequence

from hvd_vgg.config import LaunchConfig
from hvd_vgg.environment import JOB_PARAMETER, SECRET_NAME
from hvd_vgg.errors import CONFIGURATION, Failure
from hvd_vgg.launcher.hostfile import Host
from hvd_vgg.parallel import network
from hvd_vgg.parallel.mpi import OTHER_MPIS, VERSION_SECONDS, parse_mpirun_version

# The variables that ranks on other hosts get, besides --export_env; ranks on this host inherit all.
_EXPORTED = re.compile(
    r"PATH|LD_LIBRARY_PATH|LD_PRELOAD|PYTHON\w+|(OMP|KMP)_\w+|TMPDIR|TZ|LANG|LC_\w+|XLA_FLAGS"
    r"|NO_COLOR|TERM|COLUMNS"  # how rank 0 prints
    r"|(HOROVOD|TF|NCCL|CUDA|UCX|GLOO|UMD|CRT|DRT)_\w+|COREX_VISIBLE_DEVICES"  # the last four: Iluvatar's
)
# Open MPI takes hosts from its command line alone: neither from a scheduler's allocation, which may be one that is over, nor
# from the installation's host file. By its major version.
_NO_SCHEDULER = {4: "^alps,gridengine,loadleveler,lsf,slurm,tm", 5: "^flux,gridengine,lsf,pbs,slurm"}
# How it starts daemons on other hosts; and where there are none: isolated, 4 needs neither ssh nor srun, as 5 does anyway.
_REMOTE, _LOCAL = {4: "rsh", 5: "ssh"}, {4: "isolated", 5: "ssh"}
# Open MPI's own settings notice a lost host after eight minutes or more; these after 20 seconds.
_KEEPALIVE = {"oob_tcp_keepalive_time": 10, "oob_tcp_keepalive_intvl": 3, "oob_tcp_keepalive_probes": 3}


def compose_mpirun(config: LaunchConfig, ranks: int, hosts: Sequence[Host], token: str, program: Sequence[str]) -> List[str]:
    """Returns the command that starts `program` on `ranks` ranks, all on this host if `hosts` is empty.

    It contains no value of the environment. Raises Failure(CONFIGURATION) if there is no mpirun, or none that can be used.
    """
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        raise Failure(CONFIGURATION, "mpirun is not on PATH: install Open MPI 4 or 5, or use launch/environment.sh")
    version = open_mpi_version(mpirun)
    command = ["mpirun", "-np", str(ranks), "--bind-to", "none", "--map-by", "slot", "--oversubscribe"]
    exports: List[str] = []
    daemons = _LOCAL if all(network.is_this_host(host.name) for host in hosts) else _REMOTE
    runtime = "orte" if version == 4 else "prte"
    settings: Dict[str, Any] = {JOB_PARAMETER: token, f"{runtime}_default_hostfile": "none"}
    placement = {"ras": _NO_SCHEDULER[version], "plm": daemons[version]}
    settings.update({name: value for name, value in placement.items() if f"OMPI_MCA_{name}" not in os.environ})
    if hosts:
        if re.search(r"\s", mpirun):
            text = f"{mpirun}: Open MPI starts its daemon on other hosts by this path, and cuts it at spaces"
            raise Failure(CONFIGURATION, f"{text}: install Open MPI, or set HVD_VGG_VENV, to a path without any")
        command[0] = mpirun  # called by its absolute path, it starts its daemon from the same path on the other hosts
        command += ["--host", ",".join(f"{host.name}:{host.slots}" for host in hosts)]
        # All daemons are started from here, so the other hosts need no keys.
        agent = f"plm_{_REMOTE[version]}"
        settings.update({f"{agent}_agent": config.rsh_agent, f"{agent}_no_tree_spawn": 1, **_KEEPALIVE})
        exports += exported_variables(os.environ, config.export_env)
    if config.network:
        settings.update(oob_tcp_if_include=config.network, btl_tcp_if_include=config.network)
        names = nccl_interfaces(config.network)
        if names and "NCCL_SOCKET_IFNAME" not in os.environ:
            exports.append(f"NCCL_SOCKET_IFNAME={names}")
    command += [word for variable in exports for word in ("-x", variable)]
    command += [word for name, value in settings.items() for word in ("--mca", name, str(value))]
    if version == 5:  # what its runtime does not know it gives to ranks, and to daemons by this option alone
        command += ["--prtemca", JOB_PARAMETER, token]
    return [*command, *program]


@functools.lru_cache(maxsize=None)
def open_mpi_version(mpirun: str) -> int:
    """Returns whose options an mpirun takes: 4, those of Open MPI up to 4, or 5, those of 5 and later.

    Raises Failure(CONFIGURATION) for another MPI's.
    """
    try:
        printed = subprocess.run(  # noqa: S603
            [mpirun, "--version"], capture_output=True, text=True, check=False, timeout=VERSION_SECONDS
        ).stdout
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        why = f"{mpirun} --version: {getattr(error, 'strerror', None) or error}"
        raise Failure(CONFIGURATION, f"mpirun cannot be started: {why}") from error
    name, version = parse_mpirun_version(printed)
    if name in OTHER_MPIS:
        text = f"{mpirun} is {name}, which has other options: `hvd-vgg launch` needs Open MPI 4 or 5 on PATH"
        raise Failure(CONFIGURATION, f"{text}; or start the ranks by {name} itself: mpiexec -n 8 hvd-vgg train ...")
    return 5 if version >= 5 else 4


def nccl_interfaces(network: str) -> str:
    """Returns NCCL_SOCKET_IFNAME for --network=`network`; "" if the list contains a network, since NCCL accepts only names.

    The interfaces of a network may have other names on other hosts.
    """
    names = [part.strip() for part in network.split(",") if part.strip()]
    # Without = NCCL also takes interfaces whose names begin with one of these.
    return "=" + ",".join(names) if names and not any("/" in name for name in names) else ""


def exported_variables(environ: Mapping[str, str], export_env: str) -> List[str]:
    """Returns the names of the variables that ranks on other hosts get; export_env: more names, separated by commas."""
    allowed = {name for name in environ if _EXPORTED.fullmatch(name) and not SECRET_NAME.search(name)}
    return sorted(allowed | (set(export_env.split(",")) & set(environ)))
