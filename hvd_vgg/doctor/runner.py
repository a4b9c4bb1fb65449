"""`hvd-vgg doctor`: says whether this host, or the ranks of the job to come, can train, and how to fix what prevents it.

First comes what needs no other rank: packages, devices, memory, interfaces. Then the ranks join, within a time limit of
their own, because with a wrong interface they would wait for ever. Then devices, links and data are tried. The findings of
all ranks are merged and printed once.
"""

import os
import sys
from pathlib import Path
from typing import Any, Iterator, List, Sequence, Tuple

from hvd_vgg.config import DoctorConfig
from hvd_vgg.doctor import driver, mpi, packages, settings, system
from hvd_vgg.doctor.driver import Accelerators
from hvd_vgg.doctor.network import check_interfaces
from hvd_vgg.doctor.packages import HostView
from hvd_vgg.doctor.report import Report
from hvd_vgg.environment import launched_local_rank, launched_local_size, launched_rank, launched_size
from hvd_vgg.errors import USAGE, Failure
from hvd_vgg.launcher.hostfile import Host, read_hostfile
from hvd_vgg.launcher.ssh import check_hosts
from hvd_vgg.models.architecture import count_parameters, vgg_layers
from hvd_vgg.parallel import network
from hvd_vgg.parallel.mpi import loaded_mpi_libraries
from hvd_vgg.reporting.console import Console
from hvd_vgg.reporting.findings import FAILURE, Finding, failure, ok
from hvd_vgg.streams import write_line
from hvd_vgg.text import plural

# No import, device, link or directory that works takes as long: the first use of a GPU compiles and loads libraries.
_PHASE_SECONDS, _COLLECTIVES_SECONDS = 120.0, 600.0


def doctor(config: DoctorConfig) -> None:
    """Checks everything, prints what was found and writes --out. Collective.

    Raises Failure: CONFIGURATION if training would fail, NOT_WRITTEN for --out, USAGE for --hostfile under a launcher.
    """
    hosts = read_hostfile(config.hostfile) if config.hostfile else []
    if hosts and (launched_size() or 1) > 1:
        raise Failure(USAGE, "--hostfile checks hosts before mpirun is used: start doctor alone, without a launcher")
    report = Report(config)
    accelerators = driver.find_accelerators(packages.this_host())

    report.add(*_check_software(accelerators), *_check_system(config, accelerators.host.root, report.rank == 0))
    report.add(*_check_network(config, accelerators, hosts))
    if any(finding.about in ("interfaces", "hosts", "environment") for finding in report.failures()):
        raise report.finish_alone()  # the ranks would wait for each other for ever
    _warn_early(report, accelerators)
    _import_tensorflow(report, accelerators)
    _join_ranks(report, config.join_seconds)
    device, threads = _check_devices(report, config, accelerators)
    hosts_of_ranks = _check_ranks(report, config, accelerators.host)
    _check_links(report, config, device, hosts_of_ranks)
    _check_data(report, config, threads)
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
    ranks = launched_local_size() or launched_size() or 1
    parameters = _parameters(config)
    # Weights and momentum in float32; besides those kept there are the best one, and the one that is being written.
    checkpoint_bytes = (config.keep_checkpoints + 2) * 2 * 4 * parameters
    yield system.check_memory(root, ranks, parameters)
    yield system.check_shared_memory(root, ranks)
    yield from system.check_limits()
    yield from system.check_run_dir(Path(config.run_dir), checkpoint_bytes, is_root)
    yield from system.check_other_jobs()


def _check_network(config: DoctorConfig, accelerators: Accelerators, hosts: Sequence[Host]) -> Iterator[Finding]:
    """Checks the interfaces, and with --hostfile that `hosts` answer and can connect back."""
    environ, interfaces = accelerators.host.environ, network.interfaces()
    several = (launched_size() or 1) > (launched_local_size() or launched_size() or 1)
    yield from check_interfaces(environ, interfaces, len(hosts) or 1 + several, accelerators.vendor != "CPU")
    error = network.network_flag_error(config.network, interfaces) if hosts else ""
    others = [host for host in hosts if not network.is_this_host(host.name)]
    if error:
        yield failure("interfaces", error, "name one that leads to the other hosts")
    elif others:
        addresses = network.chosen_addresses({network.INCLUDE[0]: config.network} if config.network else environ, interfaces)
        yield from check_hosts(others, config.rsh_agent, addresses)
    elif hosts:
        yield ok("hosts", f"{config.hostfile} lists this host only")


def _warn_early(report: Report, accelerators: Accelerators) -> None:
    """Prints failures to stderr: with a driver that does not fit, importing TensorFlow may end the process."""
    drivers = [finding for finding in driver.check_driver(accelerators, "", False) if finding.verdict == FAILURE]
    failures = "; ".join(f"{finding.about}: {finding.text}" for finding in [*report.failures(), *drivers])
    if failures and launched_local_rank() == 0:
        write_line(f"hvd-vgg: doctor on {report.host}, before importing TensorFlow: {failures}", sys.stderr)


def _import_tensorflow(report: Report, accelerators: Accelerators) -> None:
    """Imports TensorFlow and Horovod; raises Failure if they are missing or broken."""
    with report.time_limit(_PHASE_SECONDS, "software", "TensorFlow and Horovod were not imported"):
        try:
            import hvd_vgg.parallel.init  # noqa: F401
        except Exception as error:  # a broken installation may raise anything
            text = error.message if isinstance(error, Failure) else f"{type(error).__name__}: {error}"
            fix = "install what is missing; a driver that does not fit may also cause this"
            report.add(failure("software", text, fix), *driver.check_driver(accelerators, "", False))
            raise report.finish_alone() from error


def _join_ranks(report: Report, seconds: float) -> None:
    """Joins the other ranks, before TensorFlow touches a device that this could then be waiting for.

    Joining uses the interfaces: Horovod splits MPI's communicator by hosts.
    """
    from hvd_vgg.parallel.init import join

    with report.time_limit(seconds, "ranks", "the ranks have not met"):
        try:
            join()
        except Failure as error:
            report.add(failure("ranks", error.message, "follow the message"))
            raise report.finish_alone() from error


def _check_devices(report: Report, config: DoctorConfig, accelerators: Accelerators) -> Tuple[str, int]:
    """Tries this rank's device, or without a launcher all of this host.

    Returns the name of the device to exchange from, and the number of threads that may decode images.
    """
    import tensorflow as tf

    from hvd_vgg.doctor.device_test import check_computation
    from hvd_vgg.parallel import comm

    alone, mask = launched_rank() is None, accelerators.host.environ.get("CUDA_VISIBLE_DEVICES")
    cuda = str(tf.sysconfig.get_build_info().get("cuda_version", ""))
    with report.time_limit(_PHASE_SECONDS, "devices", "the devices were not listed"):
        gpus = tf.config.list_physical_devices("GPU")
    seconds = _PHASE_SECONDS * (len(gpus) if alone and gpus else 1)
    with report.time_limit(seconds, "devices", "the devices did not answer"):
        threads = _take_devices(config, gpus, alone)
        try:
            devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")[:1]
        except (RuntimeError, tf.errors.OpError) as error:
            text = f"TensorFlow lists {plural(len(gpus), 'device')} but cannot initialize them: {error}"
            fix = "driver and SDK must fit; exclude a broken device by CUDA_VISIBLE_DEVICES"
            # Nothing computed, which decides about the driver; without a device this rank cannot exchange findings.
            report.add(failure("devices", text, fix), *driver.check_driver(accelerators, cuda, False))
            raise report.finish_alone() from error
        tried = check_computation(devices, config.precision, 4 * _parameters(config))
    computed = bool(gpus) and all(finding.verdict != FAILURE for finding in tried)
    report.add(*tried, *driver.check_driver(accelerators, cuda, computed))
    nodes = packages.device_nodes(accelerators.host, accelerators.vendor)
    report.add(*settings.check_visible_devices(len(nodes), len(gpus), mask))
    report.add(*settings.check_rank_count(len(gpus), comm.local_size(), alone, mask))
    report.add(*settings.check_flags(config, comm.size(), len(gpus)))
    return str(devices[0].name), threads


def _take_devices(config: DoctorConfig, gpus: Sequence[Any], alone: bool) -> int:
    """Takes this rank's device as training does, or all `gpus` if they are to be tried; returns the decoding threads."""
    import tensorflow as tf

    from hvd_vgg.parallel import comm
    from hvd_vgg.parallel.init import take_device

    if gpus and (alone or len(gpus) < comm.local_size()):
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)
        return os.cpu_count() or 1
    try:
        return take_device(config.input_threads, config.precision).input_threads
    except Failure:  # a precision that the device does not support, which `check_computation` reports
        return 1


def _check_ranks(report: Report, config: DoctorConfig, host: HostView) -> List[str]:
    """Checks what must be equal on all ranks and what they share; returns the host name of each rank. Collective."""
    from hvd_vgg.data.transforms import IMAGE_LIBRARY
    from hvd_vgg.doctor.ranks import check_clocks, check_shared_run_dir, compare_with_root, describe_ranks
    from hvd_vgg.parallel import comm
    from hvd_vgg.parallel.init import describe_software

    # A rank whose own device hangs reaches its limit before those that wait for it here, and is the one to be named.
    with report.time_limit(_PHASE_SECONDS, "devices", "the devices of another rank did not answer"):
        hosts_of_ranks = comm.gather_json(report.host)
    software = describe_software(IMAGE_LIBRARY)
    mpi4py = mpi.query_mpi4py(host.environ) if packages.is_installed(host, "mpi4py") else {}
    report.add(describe_ranks(hosts_of_ranks), mpi.check_mpi(loaded_mpi_libraries(), mpi4py, software))
    with report.time_limit(_PHASE_SECONDS, "ranks", "the ranks did not compare settings and clocks"):
        report.add(*compare_with_root(config, software), *check_shared_run_dir(Path(config.run_dir)), *check_clocks())
    return hosts_of_ranks


def _check_links(report: Report, config: DoctorConfig, device: str, hosts_of_ranks: Sequence[str]) -> None:
    """Checks sums and gathers over all ranks, and the link of each host. Collective."""
    from hvd_vgg.doctor.collectives import assess_link, check_collectives, check_pairs, measure_link
    from hvd_vgg.parallel import comm

    with report.time_limit(_PHASE_SECONDS, "link", "the ranks did not exchange a few MB"):
        link = measure_link(device)
        gbit = config.gbit if comm.local_size() < comm.size() else 0.0
        report.add(*assess_link(link, device, comm.size(), gbit))
        report.add(*check_pairs(hosts_of_ranks))
    if config.collectives:
        with report.time_limit(_COLLECTIVES_SECONDS, "collectives", "--collectives did not end"):
            report.add(*check_collectives(config, device, link))


def _check_data(report: Report, config: DoctorConfig, threads: int) -> None:
    """Checks the data set, and with its size the learning rate's schedule. Collective."""
    from hvd_vgg.doctor.dataset import check_dataset
    from hvd_vgg.parallel import comm

    console = Console(config.console, comm.is_root())
    if config.full:  # takes as long as it takes
        found, records = check_dataset(config, True, threads, console)
    else:
        with report.time_limit(_PHASE_SECONDS, "data", f"{config.data_dir} was not scanned"):
            found, records = check_dataset(config, False, threads, console)
    report.add(*found, *settings.check_schedule(config, records))


def _parameters(config: DoctorConfig) -> int:
    return count_parameters(vgg_layers(config.model, config.width, config.image_size, config.num_classes))
