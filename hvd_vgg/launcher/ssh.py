"""Whether other hosts answer and can connect back, before mpirun is asked: `launch`, `doctor --hostfile=...` alone.

mpirun starts a daemon on each host through ssh (or another agent), and the daemon connects back to mpirun. The same is done
here with a line of Python. Where it fails mpirun would wait, or say little.
"""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import List, NamedTuple, Optional, Sequence

from hvd_vgg.launcher.hostfile import Host
from hvd_vgg.reporting.findings import Finding, failure, ok, warning

_CLOCK_SECONDS, ANSWER_SECONDS, _SAID = 1.0, 12.0, 200
# Runs on the other host: tries all addresses at once, tells which is the first of those that answer within 2 s.
_ANSWER = """
import json, socket, sys, time
from concurrent.futures import ThreadPoolExecutor
def answers(address):
    try:
        socket.create_connection((address, int(sys.argv[1])), 2).close()
        return address
    except OSError:
        return ""
with ThreadPoolExecutor(len(sys.argv)) as pool:
    reached = [address for address in pool.map(answers, sys.argv[2:]) if address]
print(json.dumps({"reached": (reached or [""])[0], "time": time.time()}))
"""


class ShellAnswer(NamedTuple):
    """What came of asking one host: exit code (None: none in time), what it printed, seconds, clock when it was read."""

    code: Optional[int]
    out: str
    err: str
    sent: float
    received: float


class HostReply(NamedTuple):
    """What one host has told: whether it can be used, and its processes that `find` found."""

    finding: Finding
    processes: List[int]


def check_hosts(hosts: Sequence[Host], agent: str, addresses: List[str], seconds: float = ANSWER_SECONDS) -> List[Finding]:
    """Asks all hosts at once, through `agent` (a command line), to connect back to one of `addresses`; a finding a host."""
    return [asked.finding for asked in ask_hosts(hosts, agent, addresses, "true", seconds)]


def ask_hosts(
    hosts: Sequence[Host], agent: str, addresses: List[str], find: str, seconds: float = ANSWER_SECONDS
) -> List[HostReply]:
    """Asks as `check_hosts` does; in the same remote shells `find`, a command, prints paths in /proc before."""
    with socket.create_server(("", 0), backlog=128) as server, ThreadPoolExecutor(len(hosts) + 1) as pool:
        pool.submit(_accept, server)
        port = server.getsockname()[1]
        remote = f"{find}; " + " ".join(map(shlex.quote, [sys.executable, "-c", _ANSWER, str(port), *addresses]))
        try:
            answers = list(pool.map(lambda host: _ask([*shlex.split(agent), host.name, remote], seconds), hosts))
        finally:
            server.shutdown(socket.SHUT_RDWR)  # ends `_accept`
    return [
        HostReply(
            _assess(host.name, answer, agent, addresses, seconds),
            sorted({int(pid) for pid in re.findall(r"/proc/(\d+)/", answer.out)}),
        )
        for host, answer in zip(hosts, answers)
    ]


def _accept(server: socket.socket) -> None:
    """Takes connections until there is no server; none carries anything, but the kernel keeps few that nobody takes."""
    while True:
        try:
            server.accept()[0].close()
        except OSError:
            return


def _ask(command: List[str], seconds: float) -> ShellAnswer:
    """Runs an agent for `seconds` at most; what it leaves behind, as ssh its ControlPersist master, is not waited for."""
    sent = time.time()
    # Files, not pipes: a pipe ends with the last process that holds it, not with the agent. In memory: the disk may be full.
    with open(os.memfd_create("out"), "w+b") as out, open(os.memfd_create("err"), "w+b") as err:
        try:
            process = subprocess.Popen(  # noqa: S603
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )
        except OSError as error:
            return ShellAnswer(127, "", f"{command[0]}: {error.strerror}", sent, time.time())
        code: Optional[int] = None
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        received = time.time()
        for each in (out, err):
            each.seek(0)
        return ShellAnswer(code, out.read().decode(errors="replace"), err.read().decode(errors="replace"), sent, received)


def _assess(host: str, answer: ShellAnswer, agent: str, addresses: List[str], seconds: float) -> Finding:
    by = agent.split()[0]
    try:
        told = json.loads(answer.out.strip().splitlines()[-1])
        reached, clock = str(told["reached"]), float(told["time"])
    except (ValueError, IndexError, KeyError, TypeError):
        if answer.code is None:
            text = f"{host} did not answer {by} within {seconds:g} s"
            return failure("hosts", text, "is it up, its name right, the network between? Leave it out of the job till then")
        said = " ".join(answer.err.split()) or "it said nothing"
        if len(said) > _SAID:
            said = f"... {said[-_SAID:].partition(' ')[2]}"
        if "key verification failed" in answer.err.lower():
            fix = f"get its key from who runs it, for {by} to know (~/.ssh/known_hosts): no unknown key is accepted"
        elif sys.executable in answer.err:
            fix = f"install the same environment at the same path on {host}"
        else:
            fix = f"`{agent} {host} true` must work without a question; mpirun starts its daemon so"
        return failure("hosts", f"{host}: {by} ended with {answer.code}: {said}", fix)
    if reached not in addresses:
        text = f"{host} answers, but cannot connect to this host at {', '.join(addresses) or 'any address'}"
        return failure(
            "hosts", text, "open TCP ports between the hosts, or the interface is wrong: MPI needs both directions"
        )
    # The other clock was read between these two readings of ours.
    apart = max(answer.sent - clock, clock - answer.received, 0.0)
    if apart > _CLOCK_SECONDS:
        return warning(
            "hosts", f"{host} answers; its clock is {apart:.0f} s or more off", "let NTP or chrony set both clocks"
        )
    return ok("hosts", f"{host} answers and reaches {reached}")
