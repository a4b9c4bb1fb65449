"""What must be equal on all ranks, and what they share: software, flags, variables, clocks, the run directory.

All functions are collective.
"""

import contextlib
import dataclasses
import os
import time
from pathlib import Path
from typing import List, Mapping

from hvd_vgg.config import DoctorConfig
from hvd_vgg.data.transforms import image_library
from hvd_vgg.doctor.mpi import check_mpi, query_mpi4py
from hvd_vgg.doctor.packages import HostView, is_installed
from hvd_vgg.doctor.report import Report
from hvd_vgg.doctor.settings import LINKS, link_variables
from hvd_vgg.doctor.system import nearest_existing
from hvd_vgg.environment import launched_rank
from hvd_vgg.parallel import comm
from hvd_vgg.parallel.init import compared_environment, describe_software
from hvd_vgg.parallel.mpi import loaded_mpi_libraries
from hvd_vgg.reporting.findings import Finding, failure, ok, warning
from hvd_vgg.run_dir import probe_file
from hvd_vgg.text import plural
from hvd_vgg.training.startup import OWN_FLAGS, placement_error

# Largest clock difference between hosts: beyond it, times in logs and checkpoints are misleading.
_MAX_CLOCK_SKEW_SECONDS = 1.0


def check_ranks(report: Report, config: DoctorConfig, host: HostView) -> List[str]:
    """Checks all of this and adds it to the report; returns the host name of each rank."""
    # A rank whose own device hangs reaches its limit before those that wait for it here, and is the one to be named.
    with report.time_limit("devices", "the devices of another rank did not answer"):
        hosts = comm.gather_json(report.host)
    per_host = ", ".join(f"{name} ({hosts.count(name)})" for name in dict.fromkeys(hosts))
    software = describe_software(image_library(config.resize))
    libraries = loaded_mpi_libraries()
    mpi4py = query_mpi4py(host.environ, libraries) if is_installed(host, "mpi4py") else {}
    with report.time_limit("ranks", "the ranks did not compare settings and clocks"):
        # One by one: if a check hangs, what was found before it is reported.
        report.findings.append(ok("ranks", f"{plural(len(hosts), 'rank')} on {per_host}"))
        report.findings += check_placement(config)
        report.findings.append(check_mpi(libraries, mpi4py, software))
        report.findings += compare_with_root(config, software)
        report.findings += check_shared_run_dir(Path(config.run_dir))
        report.findings += check_clocks()
    return hosts


def check_placement(config: DoctorConfig) -> List[Finding]:
    """Checks that the ranks are on --expect_hosts; not without a launcher, nor of the one host of --host_only."""
    if config.host_only or launched_rank() is None:
        return []
    error, fix = placement_error(config.expect_hosts)
    return [failure("ranks", error, fix)] if error else []


def compare_with_root(config: DoctorConfig, software: Mapping[str, str]) -> List[Finding]:
    """Compares flags, software and variables with rank 0's: what training requires to be equal, and some more."""
    flags = {f"--{name}": str(value) for name, value in dataclasses.asdict(config).items() if name not in OWN_FLAGS}
    mine = {**flags, **software, **compared_environment(), **link_variables(os.environ)}
    root = comm.broadcast_json(mine)
    found = []
    for name in sorted({name for name, _ in mine.items() ^ root.items()}):
        text = f"{name} is {mine.get(name, 'not set')}; on rank 0 it is {root.get(name, 'not set')}"
        if name.startswith(LINKS):
            fix = "fine if it names what is called differently on each host; otherwise use the same on all hosts"
            found.append(warning("software", text, fix))
        else:
            found.append(failure("software", text, "use the same flags, software and variables on all hosts"))
    return found


def check_clocks() -> List[Finding]:
    """Compares this rank's clock with rank 0's, as exactly as the time of a gather allows; nothing on a single rank."""
    if comm.size() == 1:
        return []
    skews = []
    for _ in range(3):  # a rank may be held up between the barrier and the clock
        comm.barrier()  # all ranks leave it at nearly the same time
        clocks = comm.gather_numbers([time.time()])[:, 0]
        skews.append(clocks[comm.rank()] - clocks[0])
    skew = min(skews, key=abs)
    if abs(skew) <= _MAX_CLOCK_SKEW_SECONDS:
        return [ok("clocks", "equal to within a second")]
    return [warning("clocks", f"the clock is {skew:+.0f} s from rank 0's", "set the clocks of all hosts by NTP or chrony")]


def check_shared_run_dir(run_dir: Path) -> List[Finding]:
    """Checks that this rank sees what rank 0 writes where the run will go."""
    with contextlib.ExitStack() as stack:
        name = ""
        if comm.is_root():
            with contextlib.suppress(OSError):  # reported by `check_run_dir`
                name = stack.enter_context(probe_file(nearest_existing(run_dir))).name
        name = comm.broadcast_json(name)
        seen = not name or os.path.exists(name)  # noqa: PTH110 (Path.exists raises without permission)
        comm.barrier()  # the file is there until all have looked
    if seen:
        return []
    fix = "use a directory that all hosts share; otherwise a restart without rank 0's host finds no checkpoint"
    return [warning("run_dir", f"what rank 0 writes to {Path(name).parent} is not visible here", fix)]
