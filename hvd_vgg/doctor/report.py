"""The report of `hvd-vgg doctor`: this rank's findings, and the ways to end: with all ranks, alone, or at a time limit."""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Dict, Iterator, List, Sequence

from hvd_vgg.config import DoctorConfig
from hvd_vgg.environment import launched_local_rank, launched_rank
from hvd_vgg.errors import CONFIGURATION, NOT_WRITTEN, Failure
from hvd_vgg.parallel import network
from hvd_vgg.reporting.console import Console
from hvd_vgg.reporting.findings import FAILURE, Finding, as_json, counts, failure, format_findings, merge
from hvd_vgg.run_dir import check_out
from hvd_vgg.streams import write_line
from hvd_vgg.text import plural

# No import, device, link or directory that works takes as long: the first use of a GPU compiles and loads libraries.
PHASE_SECONDS = 120.0
# How long the other ranks have to report what they know, before the end of the first one ends them.
_GRACE_SECONDS = 2.0
EXCLUDE_DEVICE = "driver and SDK must fit (see driver); until then exclude this device by CUDA_VISIBLE_DEVICES"
# What to do when a time limit is over, by what it is about.
_FIXES = {
    "software": "a file system hangs, or the machine is very slow",
    "devices": EXCLUDE_DEVICE,
    "data": "a file system or a rank hangs: find out whether `ls` of the data directory answers on each host",
}
_NETWORK_FIX = (
    "a host is down, a firewall, or a wrong interface: hvd-vgg launch --network=NAME or NETWORK/BITS, or mpirun --mca "
    "btl_tcp_if_include with one; if a host takes long to import TensorFlow: a larger --join_seconds"
)


class Report:
    """The findings of this rank so far. Raises Failure(NOT_WRITTEN) if --out cannot be written."""

    def __init__(self, config: DoctorConfig) -> None:
        self.findings: List[Finding] = []
        self.rank, self.host = launched_rank() or 0, socket.gethostname()  # Horovod is not there yet
        self._out = config.out if self.rank == 0 else ""
        self._console = Console(config.console, self.rank == 0)
        self._started = time.monotonic()
        if self._out:
            check_out(self._out, NOT_WRITTEN)  # now, not after minutes

    def failures(self) -> List[Finding]:
        """Returns the findings that are failures."""
        return [finding for finding in self.findings if finding.verdict == FAILURE]

    def finish(self, hosts: Sequence[str]) -> None:
        """Prints the findings of all ranks and leaves; hosts: the host name of each rank. Collective.

        Raises a collective Failure(CONFIGURATION) if any finding is a failure.
        """
        from hvd_vgg.parallel import comm
        from hvd_vgg.parallel.consensus import run_on_root

        merged = merge([[Finding(*row) for row in rows] for rows in comm.gather_json(self.findings)])
        run_on_root(lambda: self._print(merged, hosts))
        failures = counts(merged)[FAILURE]
        if failures:
            raise Failure(CONFIGURATION, f"doctor: {plural(failures, 'failure')}, see above", collective=True)
        comm.shutdown()

    def finish_alone(self, *findings: Finding) -> Failure:
        """Reports what this rank found, `findings` too, without the other ranks; returns the failure to end with.

        Rank 0 prints its whole report; other ranks, if they live that long, only their failures.
        """
        self.findings += findings
        failures = self.failures()
        if self.rank == 0:
            self._print(merge([self.findings]), [self.host])
            others = "" if launched_rank() is None else "; nothing is known of the other ranks"
            return Failure(CONFIGURATION, f"doctor: {plural(len(failures), 'failure')}, see above{others}")
        text = "\n".join(f"{finding.about}: {finding.text}\n  fix: {finding.fix}" for finding in failures)
        return Failure(CONFIGURATION, f"doctor on {self.host}: {text}")

    @contextlib.contextmanager
    def time_limit(self, about: str, text: str, seconds: float = 0.0) -> Iterator[None]:
        """Ends this rank with 78, and so the job, unless the block ends within `seconds`; 0: 120.

        text: what was not done by then.
        """
        seconds = seconds or PHASE_SECONDS
        timer = threading.Timer(seconds, self._end_at_limit, [about, f"{text} within {seconds:g} s"])
        timer.start()
        # Ends with 1 even if the block never releases the GIL.
        faulthandler.dump_traceback_later(seconds + 3 * _GRACE_SECONDS, exit=True)
        try:
            yield
        finally:
            timer.cancel()
            faulthandler.cancel_dump_traceback_later()

    def _end_at_limit(self, about: str, text: str) -> None:
        """Reports what took too long, and what is known of the network to the other ranks. Does not return."""
        interfaces = network.interfaces()
        known = {
            "interfaces": network.format_interfaces(interfaces),
            "toward mpirun's host": network.interface_toward_launcher(os.environ, interfaces),
            "configured": ", ".join(f"{name}={os.environ[name]}" for name in network.INCLUDE if os.environ.get(name)),
        }
        text += "".join(f"; {name}: {value}" for name, value in known.items() if value)
        try:
            ended = self.finish_alone(failure(about, text, _FIXES.get(about, _NETWORK_FIX)))
            # All ranks of a host wait for the same, so one reports it; a device is each rank's own.
            if about == "devices" or self.rank == 0 or launched_local_rank() == 0:
                write_line(f"hvd-vgg: rank {self.rank}: {ended.message}", sys.stderr)
        finally:
            time.sleep(_GRACE_SECONDS)
            os._exit(CONFIGURATION)

    def _print(self, merged: Dict[Finding, List[int]], hosts: Sequence[str]) -> None:
        """Prints the merged findings and writes --out."""
        seconds = round(time.monotonic() - self._started, 1)
        number = counts(merged)
        summary = f"{plural(len(hosts), 'rank')}, {plural(len(set(hosts)), 'host')}: {number['ok']} ok, "
        summary += f"{plural(number['warning'], 'warning')}, {plural(number['failure'], 'failure')}, {seconds} s"
        write_line("\n".join([*format_findings(merged, hosts, self._console.paint), summary]), sys.stdout)
        self._write(json.dumps(as_json(merged, hosts, seconds=seconds, time=time.time()), indent=1) + "\n")

    def _write(self, text: str) -> None:
        """Writes --out, if this is rank 0 and it is given."""
        try:
            if self._out:
                Path(self._out).write_text(text, encoding="utf-8")
        except OSError as error:
            raise Failure(NOT_WRITTEN, f"--out={self._out} cannot be written: {error.strerror}") from error
