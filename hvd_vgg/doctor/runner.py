"""`hvd-vgg doctor`: says whether this host, or all the ranks to come, can train, and what to do where they cannot.

First what needs nobody else: host, packages, interfaces. Then the ranks meet, under a time limit of their own, because with
a wrong interface they would wait for ever. Then devices, links and data; all findings are put together and said once.
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from hvd_vgg.config import DoctorConfig
from hvd_vgg.doctor import packages
from hvd_vgg.doctor.driver import Listing, check_devices, check_driver, listing
from hvd_vgg.doctor.mpi import ask_mpi4py, check_mpi, check_mpirun, check_root
from hvd_vgg.doctor.network import check_interfaces
from hvd_vgg.doctor.packages import Host, check_python, check_tensorflow, nodes, this_host, version
from hvd_vgg.doctor.settings import (
    check_environment,
    check_flags,
    check_rank_count,
    check_schedule,
    check_visible_devices,
    link_variables,
)
from hvd_vgg.doctor.system import (
    check_leftovers,
    check_limits,
    check_memory,
    check_run_dir,
    check_shared_memory,
    nearest_existing,
    probe_file,
)
from hvd_vgg.environment import launched_local_rank, launched_local_size, launched_rank, launched_size
from hvd_vgg.errors import CONFIGURATION, NOT_WRITTEN, USAGE, Failure
from hvd_vgg.launcher.hostfile import read_hostfile
from hvd_vgg.launcher.ssh import check_hosts
from hvd_vgg.models.architecture import count_parameters, vgg_layers
from hvd_vgg.parallel import network
from hvd_vgg.parallel.mpi import loaded_mpi_libraries
from hvd_vgg.reporting.console import Console
from hvd_vgg.reporting.findings import (
    FAILURE,
    Finding,
    MergedFinding,
    as_json,
    counts,
    failure,
    format_findings,
    merge,
    ok,
    warning,
)
from hvd_vgg.streams import write_line
from hvd_vgg.text import plural

# No import, device or link that works takes as long; the first use of a GPU compiles and loads libraries.
_LONG_SECONDS, _COLLECTIVES_SECONDS = 120.0, 600.0
# So long the other ranks are given to say what they know before the first one's end ends them.
_OTHERS_SECONDS = 2.0


@dataclasses.dataclass
class _Report:
    """What this rank has found so far, and for whom."""

    config: DoctorConfig
    found: List[Finding]
    began: float  # time.monotonic()
    rank: int  # as the launcher says it
    host: str


class _Vendor(NamedTuple):
    """The vendor of this host's devices, and what its tool says of them."""

    vendor: str
    said: Optional[Listing]


def doctor(config: DoctorConfig, here: Optional[Host] = None) -> None:
    """Looks at everything, prints it, writes --out; all ranks call. here: the host to look at, this one by default.

    Raises Failure(CONFIGURATION) if anything would fail.
    """
    here = here or this_host()
    listed = read_hostfile(config.hostfile) if config.hostfile else []
    if listed and (launched_size() or 1) > 1:
        raise Failure(USAGE, "--hostfile looks at hosts before mpirun is asked: start doctor alone, without a launcher")
    report = _Report(config, [], time.monotonic(), launched_rank() or 0, socket.gethostname())
    if config.out and report.rank == 0:
        try:
            probe_file(Path(config.out).absolute().parent).close()
        except OSError as error:  # what is found would be lost, after minutes
            raise _not_written(config, error) from error
    seen = _check_host(here, len(listed), report)
    if listed:
        why = network.network_flag_error(config.network, network.interfaces())
        report.found += [failure("interfaces", why, "name one that leads to the other hosts")] if why else []
        told = {network.INCLUDE[0]: config.network} if config.network else here.environ
        addresses = network.chosen_addresses(told, network.interfaces())
        others = [each for each in listed if not network.is_this_host(each.name)]
        report.found += check_hosts(others, config.rsh_agent, addresses) if others and not why else []
        report.found += [] if others else [ok("hosts", f"{config.hostfile} names this host alone")]
    never = ("interfaces", "hosts", "environment")
    if any(finding.about in never and finding.verdict == FAILURE for finding in report.found):
        raise _report_alone(report)  # the ranks would never meet
    _report_early(here, seen, report)
    _import(here, seen, report)
    _join(report)
    device, threads = _devices(here, seen, report)
    _conclude(report, _check_together(here, device, threads, report))


def _check_host(here: Host, listed: int, report: _Report) -> _Vendor:
    """Looks at what needs neither TensorFlow nor other ranks; listed: hosts of the job to come, 0 where nobody said."""
    config = report.config
    whose, why = packages.vendor(here)
    said = listing(here, whose)
    size, local = launched_size() or 1, launched_local_size() or launched_size() or 1
    numbers = count_parameters(vgg_layers(config.model, config.width, config.image_size, config.num_classes))
    # Weights and momentum; beside those kept there are the best one, and the one that is being written.
    kept = (config.keep_checkpoints + 2) * 2 * 4 * numbers
    report.found += [
        ok("vendor", f"{whose} ({', '.join(why)})"),
        *check_python(here),
        *check_tensorflow(here, whose),
        *check_devices(here, whose, said),
        *check_memory(here.root, local, numbers),
        *check_shared_memory(here.root, local),
        *check_limits(),
        *check_run_dir(Path(config.run_dir), kept, report.rank == 0),
        *check_leftovers(here.root),
        *check_mpirun(here.environ.get("PATH")),
        *check_root(here.environ),
        *check_interfaces(here.environ, network.interfaces(), max(listed, 2 if size > local else 1), whose != "CPU"),
        *check_environment(here.environ),
    ]
    return _Vendor(whose, said)


def _report_early(here: Host, seen: _Vendor, report: _Report) -> None:
    """Says on stderr what is bad already: under a driver that does not fit, what comes next may end the process."""
    found = [*report.found, *check_driver(here, seen.vendor, seen.said, "", False)]
    bad = [finding for finding in found if finding.verdict == FAILURE]
    if bad and launched_local_rank() == 0:
        text = "; ".join(f"{finding.about}: {finding.text}" for finding in bad)
        write_line(f"hvd-vgg: doctor on {report.host}, before TensorFlow is tried: {text}", sys.stderr)


def _import(here: Host, seen: _Vendor, report: _Report) -> None:
    """Imports TensorFlow and Horovod; raises Failure where they are not there or broken."""
    with _time_limit(
        _LONG_SECONDS, report, "software", f"TensorFlow and Horovod were not imported within {_LONG_SECONDS:g} s"
    ):
        try:
            from hvd_vgg.parallel.init import take_device  # noqa: F401
        except Exception as error:  # a broken installation may raise anything
            text = error.message if isinstance(error, Failure) else f"{type(error).__name__}: {error}"
            report.found.append(
                failure("software", text, "install what is missing; a driver that does not fit may do this too")
            )
            report.found += check_driver(here, seen.vendor, seen.said, "", False)
            raise _report_alone(report) from error


def _join(report: _Report) -> None:
    """Joins the other ranks, before TensorFlow touches a device: no device can be what this waits for.

    To join is to exchange, over the interfaces in use: Horovod splits MPI's communicator by hosts.
    """
    from hvd_vgg.parallel.init import join

    limit = report.config.join_seconds
    with _time_limit(limit, report, "ranks", f"the ranks have not met within {limit:g} s (--join_seconds)"):
        try:
            join()
        except Failure as error:
            report.found.append(failure("ranks", error.message, "as it says"))
            raise _report_alone(report) from error


def _devices(here: Host, seen: _Vendor, report: _Report) -> Tuple[str, int]:
    """Takes and tries this rank's device, or all devices where there is no launcher.

    Returns the name of the one to exchange from, and how many threads may decode.
    """
    import tensorflow as tf

    from hvd_vgg.doctor.device_test import check_devices
    from hvd_vgg.parallel import comm
    from hvd_vgg.parallel.init import take_device

    config, found = report.config, report.found
    cuda = str(tf.sysconfig.get_build_info().get("cuda_version", ""))
    alone, mask = launched_rank() is None, here.environ.get("CUDA_VISIBLE_DEVICES")
    with _time_limit(_LONG_SECONDS, report, "devices", f"the devices were not listed within {_LONG_SECONDS:g} s"):
        physical = tf.config.list_physical_devices("GPU")
    seconds = _LONG_SECONDS * (len(physical) if alone and physical else 1)
    with _time_limit(seconds, report, "devices", f"the devices did not answer within {seconds:g} s"):
        if physical and (alone or len(physical) < comm.local_size()):
            threads = os.cpu_count() or 1
            for each in physical:
                tf.config.experimental.set_memory_growth(each, True)
        else:
            try:
                threads = take_device(config.input_threads, config.precision).input_threads
            except Failure:  # a precision that it does not compute in, which check_devices finds and tells
                threads = 1
        try:
            logical = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")[:1]
        except (RuntimeError, tf.errors.OpError) as error:
            text = f"TensorFlow lists {plural(len(physical), 'device')} and cannot begin to use them: {error}"
            fix = "driver and SDK must fit; leave a broken device out by CUDA_VISIBLE_DEVICES"
            # The driver is judged as one under which nothing computed; without a device nothing can be told to others.
            found += [failure("devices", text, fix), *check_driver(here, seen.vendor, seen.said, cuda, False)]
            raise _report_alone(report) from error
        numbers = count_parameters(vgg_layers(config.model, config.width, config.image_size, config.num_classes))
        tried = check_devices(logical, config.precision, 4 * numbers)
    computed = bool(physical) and all(finding.verdict != FAILURE for finding in tried)
    found += [
        *tried,
        *check_driver(here, seen.vendor, seen.said, cuda, computed),
        *check_visible_devices(len(nodes(here, seen.vendor)), len(physical), mask),
        *check_rank_count(len(physical), comm.local_size(), alone, mask),
        *check_flags(config, comm.size(), len(physical)),
    ]
    return str(logical[0].name), threads


def _check_together(here: Host, device: str, threads: int, report: _Report) -> List[str]:
    """Looks at software, links and data with all ranks; returns the name of each one's host."""
    from hvd_vgg.data.transforms import IMAGE_LIBRARY
    from hvd_vgg.doctor.collectives import check_clocks, check_collectives, check_link, check_pairs
    from hvd_vgg.doctor.dataset import survey
    from hvd_vgg.parallel import comm
    from hvd_vgg.parallel.init import describe_software

    config, found = report.config, report.found
    # A rank whose own device hangs gives up before those that wait for it here, and is the one that is named.
    with _time_limit(_LONG_SECONDS, report, "devices", f"the devices of another rank did not answer in {_LONG_SECONDS:g} s"):
        names = comm.gather_json(report.host)
    each = {name: names.count(name) for name in names}
    found.append(ok("ranks", f"{plural(len(names), 'rank')} on " + ", ".join(f"{name} ({each[name]})" for name in each)))
    about = describe_software(IMAGE_LIBRARY)
    mpi4pys = ask_mpi4py(here.environ) if version(here, ("mpi4py",)) else {}
    found += check_mpi(loaded_mpi_libraries(), mpi4pys, about["controller"], about["horovod"], about["mpi"])
    found += _same_as_root(config)
    found += _same_run_dir(Path(config.run_dir))
    with _time_limit(_LONG_SECONDS, report, "link", f"the ranks did not exchange some MB within {_LONG_SECONDS:g} s"):
        found += check_clocks()
        found += check_link(device, config.gbit)
        found += check_pairs(names, about["controller"])
    if config.collectives:
        text = f"--collectives took longer than {_COLLECTIVES_SECONDS:g} s"
        with _time_limit(_COLLECTIVES_SECONDS, report, "collectives", text):
            found += check_collectives(config, device)
    with contextlib.ExitStack() as stack:
        if not config.full:
            text = f"{config.data_dir} was not looked at within {_LONG_SECONDS:g} s: a file system or a rank hangs"
            stack.enter_context(_time_limit(_LONG_SECONDS, report, "data", text))
        data, records = survey(config, config.full, threads, Console(config.console, comm.is_root()))
    found += [*data, *check_schedule(config, records)]
    return names


def _same_as_root(config: DoctorConfig) -> List[Finding]:
    """Compares flags, versions, code and variables with rank 0's: what training refuses to differ in, and some others."""
    from hvd_vgg.data.transforms import IMAGE_LIBRARY
    from hvd_vgg.parallel import comm
    from hvd_vgg.parallel.init import compared_environment, describe_software

    # As in training, a host may keep its files elsewhere.
    own = ("data_dir", "run_dir", "console", "out")
    flags = {f"--{name}": str(value) for name, value in dataclasses.asdict(config).items() if name not in own}
    strict, free = {**flags, **describe_software(IMAGE_LIBRARY), **compared_environment()}, link_variables(os.environ)
    theirs: List[Dict[str, str]] = comm.broadcast_json([strict, free])
    found = []
    for say, mine, other, fix in (
        (failure, strict, theirs[0], "the same flags, software and variables on all hosts"),
        (warning, free, theirs[1], "right where it names what hosts call differently; else the same on all hosts"),
    ):
        for name in sorted({*mine, *other}):
            if mine.get(name) != other.get(name):
                text = f"{name} is {mine.get(name, 'not set')}; on rank 0 {other.get(name, 'not set')}"
                found.append(say("software", text, fix))
    return found


def _same_run_dir(run_dir: Path) -> List[Finding]:
    """Looks whether this rank sees what rank 0 writes where the run will go."""
    from hvd_vgg.parallel import comm

    with contextlib.ExitStack() as stack:
        name = ""
        if comm.is_root():
            with contextlib.suppress(OSError):  # told by machine.check_run_dir
                name = stack.enter_context(probe_file(nearest_existing(run_dir))).name
        name = comm.broadcast_json(name)
        there = not name or os.path.exists(name)  # noqa: PTH110 (Path.exists raises where it may not look)
        comm.barrier()  # it is there until all have looked
    if there:
        return []
    text = f"what rank 0 writes to {Path(name).parent} is not seen here"
    fix = "a directory that all hosts share: else a restart without rank 0's host finds no checkpoint"
    return [warning("run_dir", text, fix)]


def _conclude(report: _Report, names: Sequence[str]) -> None:
    """Puts all ranks' findings together, tells them, and leaves; raises a collective Failure where any is a failure."""
    from hvd_vgg.parallel import comm
    from hvd_vgg.parallel.consensus import run_on_all_ranks

    everyones = comm.gather_json(report.found)
    told = merge([[Finding(*row) for row in rows] for rows in everyones])
    run_on_all_ranks(lambda: _print_report(report, told, names) if comm.is_root() else None)
    failures = counts([each.finding for each in told])[FAILURE]
    if failures:
        raise Failure(CONFIGURATION, f"doctor: {plural(failures, 'failure')}, see above", collective=True)
    comm.shutdown()


def _print_report(report: _Report, told: Sequence[MergedFinding], names: Sequence[str]) -> None:
    """Prints and writes what was found."""
    seconds = time.monotonic() - report.began
    number = counts([each.finding for each in told])
    summary = (
        f"{plural(len(names), 'rank')}, {plural(len(set(names)), 'host')}: {number['ok']} ok, "
        f"{plural(number['warning'], 'warning')}, {plural(number['failure'], 'failure')}, {seconds:.1f} s"
    )
    write_line("\n".join([*format_findings(told, names), summary]), sys.stdout)
    if report.config.out:
        text = json.dumps(as_json(told, names, seconds=round(seconds, 1), time=time.time()), indent=1)
        try:
            Path(report.config.out).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise _not_written(report.config, error) from error


def _not_written(config: DoctorConfig, error: OSError) -> Failure:
    return Failure(NOT_WRITTEN, f"--out={config.out} cannot be written: {error.strerror}")


def _report_alone(report: _Report) -> Failure:
    """Tells what a rank found that does not get to the others; returns the failure to end with.

    Rank 0 prints its whole report; what other ranks say, if they live to, are their failures alone.
    """
    bad = [finding for finding in report.found if finding.verdict == FAILURE]
    if report.rank == 0:
        _print_report(report, merge([report.found]), [report.host])
        others = "" if launched_rank() is None else "; other ranks were not heard"
        return Failure(CONFIGURATION, f"doctor: {plural(len(bad), 'failure')}, see above{others}")
    text = "\n".join(f"{finding.about}: {finding.text}\n  do: {finding.fix}" for finding in bad)
    return Failure(CONFIGURATION, f"doctor on {report.host}: {text}")


@contextlib.contextmanager
def _time_limit(seconds: float, report: _Report, about: str, what: str) -> Iterator[None]:
    """Ends this rank with 78, and so the job, unless what is inside ends in time."""
    timer = threading.Timer(seconds, _report_timeout, [report, about, what])
    timer.daemon = True
    timer.start()
    # Needs no lock of Python's, should something inside hold it for ever; ends with 1.
    faulthandler.dump_traceback_later(seconds + 3 * _OTHERS_SECONDS, exit=True)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()


def _report_timeout(report: _Report, about: str, what: str) -> None:
    """Says what has not come, with all that is known here of the way to the others; does not return."""
    there = network.interfaces()
    text = f"{what}; interfaces here: {network.format_interfaces(there)}"
    by = network.toward_launcher(os.environ, there)
    text += f"; mpirun's host is reached by {by}" if by else ""
    told = [f"{name}={os.environ[name]}" for name in network.INCLUDE if os.environ.get(name)]
    text += f"; told to use: {', '.join(told)}" if told else ""
    fix = {
        "software": "a file system hangs, or the machine is very slow",
        "devices": "driver and SDK must fit (see driver); leave this device out by CUDA_VISIBLE_DEVICES till then",
        "data": "see whether `ls` of the data directory answers on each host",
    }.get(
        about,
        "a host is down, a firewall, or a wrong interface: hvd-vgg launch --network=NAME or NETWORK/BITS, or mpirun --mca "
        "btl_tcp_if_include with one; where TensorFlow takes long to be imported on one: --join_seconds=60",
    )
    report.found.append(failure(about, text, fix))
    try:
        # Of what all wait for, one rank of a host is enough; a device is each rank's own.
        if about == "devices" or report.rank == 0 or launched_local_rank() == 0:
            message = _report_alone(report).message
            write_line(f"hvd-vgg: rank {report.rank}: {message}", sys.stderr)
    finally:
        time.sleep(_OTHERS_SECONDS)
        os._exit(CONFIGURATION)
