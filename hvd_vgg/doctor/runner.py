"""`hvd-vgg doctor`: says whether this host, or the ranks of the job to come, can train, and how to fix what prevents it.

First comes what needs no other rank: packages, devices, memory, interfaces. Then the ranks join, within a time limit of
their own, because with a wrong interface they would wait for ever. Then devices, links and data are tried. The findings of
all ranks are merged and printed once.
"""

import sys
from pathlib import Path
from typing import Iterator, Sequence

from hvd_vgg.config import DoctorConfig
from hvd_vgg.doctor import driver, mpi, packages, settings, system
from hvd_vgg.doctor.driver import Accelerators
from hvd_vgg.doctor.given_weights import check_given_weights
from hvd_vgg.doctor.network import check_interfaces
from hvd_vgg.doctor.report import Report
from hvd_vgg.environment import launched_local_rank, launched_local_size, launched_size
from hvd_vgg.errors import USAGE, Failure
from hvd_vgg.launcher.hostfile import Host, read_hostfile
from hvd_vgg.launcher.ssh import ask_hosts
from hvd_vgg.models.architecture import count_parameters, layers_of
from hvd_vgg.parallel import network
from hvd_vgg.reporting.findings import FAILURE, Finding, failure, ok
from hvd_vgg.streams import write_line


def doctor(config: DoctorConfig) -> None:
    """Checks everything, prints what was found and writes --out. Collective.

    Raises Failure: CONFIGURATION if training would fail, NOT_WRITTEN for --out, USAGE for --hostfile under a launcher.
    """
    hosts = read_hostfile(config.hostfile) if config.hostfile else []
    if hosts and (launched_size() or 1) > 1:
        raise Failure(USAGE, "--hostfile checks hosts before mpirun is used: start doctor alone, without a launcher")
    report = Report(config)
    accelerators = driver.find_accelerators(packages.this_host())

    report.findings += _check_software(accelerators)
    report.findings += _check_system(config, accelerators.host.root, report.rank == 0)
    report.findings += _check_network(config, accelerators, hosts)
    if any(finding.about in ("interfaces", "hosts", "environment", "limits") for finding in report.failures()):
        raise report.finish_alone()  # the ranks would wait for each other for ever, or be aborted
    _warn_early(report, accelerators)
    _join_ranks(report, accelerators, config.join_seconds)

    from hvd_vgg.doctor import collectives, dataset, device_test, ranks  # here, because they import TensorFlow

    device, threads = device_test.check_devices(report, config, accelerators)
    hosts_of_ranks = ranks.check_ranks(report, config, accelerators.host)
    device_test.check_precision(report, config, device)
    collectives.check_links(report, config, device, hosts_of_ranks)
    if not config.host_only:
        dataset.check_dataset(report, config, threads)
    report.finish(hosts_of_ranks)


def _check_software(accelerators: Accelerators) -> Iterator[Finding]:
    """Checks packages and devices without importing TensorFlow."""
    host, vendor = accelerators.host, accelerators.vendor
    yield ok("vendor", f"{vendor} ({', '.join(accelerators.evidence)})")
    yield from packages.check_packages(host)
    yield from packages.check_tensorflow(host, vendor)
    yield from driver.check_device_nodes(accelerators)
    yield mpi.check_mpirun(host.environ.get("PATH"))
    yield from mpi.check_root(host.environ)
    yield from settings.check_environment(host.environ)


def _check_system(config: DoctorConfig, root: Path, is_root: bool) -> Iterator[Finding]:
    """Checks what this host gives its ranks."""
    ranks = _ranks_here()
    parameters = count_parameters(layers_of(config))
    # Weights, momentum and average in float32; besides those kept there are the best ones, and the one being written.
    averages = 1 if config.ema_decay else 0
    checkpoint_bytes = (config.keep_checkpoints + 2 + averages) * (2 + averages) * 4 * parameters
    yield system.check_memory(*system.memory_within_limits(root), ranks, parameters, 4 + averages)
    yield system.check_shared_memory(root, ranks)
    yield from system.check_limits(root, 1 if launched_size() else ranks)
    yield from system.check_run_dir(Path(config.run_dir), checkpoint_bytes, is_root)
    if config.checkpoint_copy_dir and is_root and not config.host_only:  # of the host that will have rank 0 alone
        copies = Path(config.checkpoint_copy_dir)
        yield from system.check_run_dir(copies, checkpoint_bytes, is_root, "checkpoint_copy_dir")
    if config.init_from and is_root and not config.host_only:
        yield check_given_weights(config)
    yield from system.check_other_jobs()


def _ranks_here() -> int:
    return launched_local_size() or launched_size() or 1


def _check_network(config: DoctorConfig, accelerators: Accelerators, hosts: Sequence[Host]) -> Iterator[Finding]:
    """Checks the interfaces, and with --hostfile that `hosts` answer and can connect back."""
    environ, interfaces = accelerators.host.environ, network.interfaces()
    several = len(hosts) > 1 or (launched_size() or 1) > _ranks_here()
    yield from check_interfaces(environ, interfaces, several, accelerators.vendor != "CPU")
    error = network.network_flag_error(config.network, interfaces)
    others = [host for host in hosts if not network.is_this_host(host.name)]
    if error:
        yield failure("interfaces", error, "name one that leads to the other hosts")
    elif others:
        addresses = network.chosen_addresses({network.INCLUDE[0]: config.network} if config.network else environ, interfaces)
        yield from (reply.finding for reply in ask_hosts(others, config.rsh_agent, addresses))
    elif hosts:
        yield ok("hosts", f"{config.hostfile} lists this host only")


def _warn_early(report: Report, accelerators: Accelerators) -> None:
    """Prints failures to stderr: with a driver that does not fit, importing TensorFlow may end the process."""
    found = [*report.findings, *driver.check_driver(accelerators)]
    failures = "; ".join(f"{finding.about}: {finding.text}" for finding in found if finding.verdict == FAILURE)
    if failures and launched_local_rank() == 0:
        write_line(f"hvd-vgg: doctor on {report.host}, before importing TensorFlow: {failures}", sys.stderr)


def _join_ranks(report: Report, accelerators: Accelerators, seconds: float) -> None:
    """Imports what training imports and joins the other ranks; raises Failure if anything is missing or broken.

    They join before TensorFlow touches a device that this could then be waiting for. Joining uses the interfaces: Horovod
    splits MPI's communicator by hosts.
    """
    with report.time_limit("software", "TensorFlow and Horovod were not imported"):
        try:
            from hvd_vgg.doctor import collectives, dataset, device_test, ranks  # noqa: F401
            from hvd_vgg.parallel.init import join
        except Exception as error:  # a broken installation may raise anything
            text = error.message if isinstance(error, Failure) else f"{type(error).__name__}: {error}"
            fix = "install what is missing (`pip check` lists it); a driver that does not fit may also cause this"
            raise report.finish_alone(failure("software", text, fix), *driver.check_driver(accelerators)) from error
    with report.time_limit("ranks", "the ranks have not met", seconds):
        try:
            join()
        except Failure as error:
            raise report.finish_alone(failure("ranks", error.message, "follow the message")) from error
