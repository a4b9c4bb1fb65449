"""Checks that other hosts answer and can connect back, before mpirun is started: `launch`, and `doctor --hostfile` alone.

mpirun starts a daemon on each host through ssh (or another agent), and the daemon connects back to mpirun. These checks do
the same with a few lines of Python. Where they fail, mpirun would wait forever or say little.
"""

import json
import os
import re
import shlex
import signal
import socketserver
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Callable, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from hvd_vgg.environment import python_program
from hvd_vgg.launcher.deadline import Deadline
from hvd_vgg.launcher.hostfile import Host
from hvd_vgg.launcher.parent_death import dies_with
from hvd_vgg.reporting.findings import Finding, failure, ok, warning

ANSWER_SECONDS = 12.0
TOOK_TOO_LONG = -1000  # no exit code, and no signal
_POLL_SECONDS = 0.02
_MAX_CLOCK_SKEW_SECONDS = 1.0  # more makes the times in logs and checkpoints wrong
_QUOTED_CHARACTERS = 200  # of an agent's error message
# Runs on the other host: tries all addresses at once and prints the first of those that answer within 2 s.
_CONNECT_BACK = """
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


class HostReply(NamedTuple):
    """Whether a host can be used, and the processes on it that a search found."""

    finding: Finding
    processes: List[int]


class _Listener(socketserver.TCPServer):
    """Accepts connections and closes them: the kernel's queue of connections that nobody accepts is short."""

    request_queue_size = 128


def ask_hosts(
    hosts: Sequence[Host], agent: str, addresses: List[str], search: str = "true", seconds: float = ANSWER_SECONDS
) -> List[HostReply]:
    """Asks all hosts at once, through `agent` (a command line), to connect back to one of `addresses`; one reply each.

    Before it, the remote shells run `search`, which prints the /proc paths of processes.
    """
    with _Listener(("", 0), socketserver.BaseRequestHandler) as server, ThreadPoolExecutor(len(hosts) + 1) as pool:
        pool.submit(server.serve_forever, poll_interval=0.05)
        connect_back = [*python_program(_CONNECT_BACK), str(server.server_address[1]), *addresses]
        remote = f"{search}; {shlex.join(connect_back)}"
        try:
            return list(pool.map(lambda host: _ask(host.name, agent, remote, addresses, seconds), hosts))
        finally:
            server.shutdown()


def _ask(host: str, agent: str, remote: str, addresses: List[str], seconds: float) -> HostReply:
    """Runs the command `remote` on a host and judges what it prints; `agent`: a command line."""
    started = time.time()
    code, output = run_command([*shlex.split(agent), host, remote], seconds)
    read = time.time()
    processes = sorted({int(pid) for pid in re.findall(r"/proc/(\d+)/", output)})
    try:  # an agent may write more, before and after, and echo its command
        answer = json.loads(re.findall(r'^\{"reached": .*\}$', output, re.MULTILINE)[-1])
        reached, clock = str(answer["reached"]), float(answer["time"])
    except (ValueError, LookupError, TypeError):
        return HostReply(failure("hosts", *_explain_silence(host, agent, seconds, code, output)), processes)
    # The other clock was read between these two readings of ours.
    skew = max(started - clock, clock - read, 0.0)
    if reached not in addresses:
        text = f"{host} answers, but cannot connect to this host at {', '.join(addresses) or 'any address'}"
        fix = "open TCP ports between the hosts, or use another interface: MPI needs both directions"
        return HostReply(failure("hosts", text, fix), processes)
    if skew > _MAX_CLOCK_SKEW_SECONDS:
        text = f"{host} answers; its clock is {skew:.0f} s or more off"
        return HostReply(warning("hosts", text, "set both clocks by NTP or chrony"), processes)
    return HostReply(ok("hosts", f"{host} answers and reaches {reached}"), processes)


def run_command(
    command: List[str],
    seconds: float,
    environ: Optional[Mapping[str, str]] = None,
    stop: Callable[[], object] = lambda: False,
) -> Tuple[int, str]:
    """Returns a command's exit code, TOOK_TOO_LONG if it had to be killed after `seconds`, and what it wrote.

    stop: once it returns something true, the command is killed. The kernel kills it if this process dies.
    Does not wait for what it leaves behind, such as ssh's ControlPersist master: a pipe would end with the last process that
    holds it, so its output goes to a file. It is in memory, because the disk may be full.
    """
    with _open_in_memory() as output:
        try:
            process = subprocess.Popen(  # noqa: S603
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environ,
                preexec_fn=dies_with(os.getpid()),
            )
        except OSError as error:
            return 127, f"{command[0]}: {error.strerror}"
        deadline = Deadline(seconds)
        while process.poll() is None:
            late = deadline.passed()
            if late or stop():
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return (TOOK_TOO_LONG if late else -signal.SIGKILL), _contents(output)
            time.sleep(_POLL_SECONDS)
        return process.returncode, _contents(output)


def _open_in_memory() -> IO[str]:
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("output"), "w+", errors="replace")
    return tempfile.TemporaryFile("w+", errors="replace")  # a Python built for an older glibc


def _contents(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _explain_silence(host: str, agent: str, seconds: float, code: int, output: str) -> Tuple[str, str]:
    """Returns what happened to an agent that brought no answer, and what to do."""
    shell = agent.split()[0]
    if code == TOOK_TOO_LONG:
        text = f"{host} did not answer {shell} within {seconds:g} s"
        return text, "is it up, its name right, the network between the hosts up? Leave it out of the job until then"
    message = " ".join(output.split())[-_QUOTED_CHARACTERS:] or "it printed nothing"
    fix = f"`{agent} {host} true` must work without asking anything: mpirun starts its daemon in this way"
    if "key verification failed" in output.lower():
        fix = f"{shell} accepts no unknown host key: get it from the host's administrator and add it to ~/.ssh/known_hosts"
    elif sys.executable in output:
        fix = f"install the same environment at the same path on {host}"
    return f"{host}: {shell} exited with {code}: {message}", fix
