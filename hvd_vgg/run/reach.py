"""Whether other hosts answer and can connect back, before mpirun is asked: `hvd-vgg doctor --hosts=...`, alone.

mpirun starts a daemon on each host through ssh (or another agent), and the daemon connects back to mpirun. The same is done
here with a line of Python. Where it fails mpirun would wait, or say little.
"""

import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Dict, List, Mapping, NamedTuple, Optional

from hvd_vgg.run.findings import Finding, failure, ok, warning
from hvd_vgg.run.health import USAGE, Failure

# Unknown keys are refused, never learned: who adds a host's key must have it from its administrator.
SSH = "ssh -o BatchMode=yes -o ConnectTimeout=5 -o StrictHostKeyChecking=yes"
_CLOCK_SECONDS = 1.0
# Runs on the other host: tries each address, sends the token over the first that answers, tells which.
_ANSWER = """
import json, socket, sys, time
port, token, reached = int(sys.argv[1]), sys.argv[2], ""
for address in sys.argv[3:]:
    try:
        with socket.create_connection((address, port), 2) as one:
            one.sendall(token.encode())
            reached = address
            break
    except OSError:
        pass
print(json.dumps({"name": socket.gethostname(), "reached": reached, "time": time.time()}))
"""


class Answer(NamedTuple):
    """What came of asking one host: exit code (None: none in time), what it printed, seconds, clock when it was read."""

    code: Optional[int]
    out: str
    err: str
    sent: float
    received: float


def read_hosts(text: str) -> Dict[str, int]:
    """Returns the ranks of each host of `a:8,b:8`, or of a host file with lines `a slots=8`.

    Raises Failure(USAGE) where it is neither.
    """
    path = Path(text)
    hosts: Dict[str, int] = {}
    if path.is_file():
        for line in path.read_text().splitlines():
            words = line.split("#")[0].split()
            given = [word[len("slots=") :] for word in words if word.startswith("slots=")]
            if words:
                hosts[words[0]] = hosts.get(words[0], 0) + (int(given[0]) if given and given[0].isdecimal() else 1)
    else:
        for part in text.split(","):
            name, _, slots = part.strip().partition(":")
            if not name or (slots and not slots.isdecimal()) or "/" in name or name.startswith("-"):
                raise Failure(USAGE, f"--hosts={text}: expected a host file that is there, or a:8,b:8")
            hosts[name] = hosts.get(name, 0) + int(slots or 1)
    if not hosts:
        raise Failure(USAGE, f"--hosts={text}: names no host")
    return hosts


def check_hosts(hosts: Mapping[str, int], agent: str, addresses: List[str], seconds: float) -> List[Finding]:
    """Asks all hosts at once, through `agent` (a command line), to connect back to one of `addresses`; within `seconds`."""
    token = secrets.token_hex(8)
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        server.settimeout(seconds)
        threading.Thread(target=_accept, args=[server], daemon=True).start()
        remote = " ".join(map(shlex.quote, [sys.executable, "-c", _ANSWER, str(port), token, *addresses]))
        with ThreadPoolExecutor(len(hosts)) as pool:
            answers = list(pool.map(lambda host: _ask([*shlex.split(agent), host, remote], seconds), hosts))
    return [_judge(host, answer, agent, addresses, seconds) for host, answer in zip(hosts, answers)]


def _accept(server: socket.socket) -> None:
    """Takes connections and what they send until the server is closed; who connected tells it himself."""
    while True:
        try:
            one, _ = server.accept()
            with one:
                one.settimeout(1)
                one.recv(64)
        except OSError:
            if server.fileno() < 0:
                return


def _ask(command: List[str], seconds: float) -> Answer:
    sent = time.time()
    try:
        process = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    except OSError as error:
        return Answer(127, "", f"{command[0]}: {error.strerror}", sent, time.time())
    try:
        out, err = process.communicate(timeout=seconds)
        return Answer(process.returncode, out, err, sent, time.time())
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return Answer(None, "", "", sent, time.time())


def _judge(host: str, answer: Answer, agent: str, addresses: List[str], seconds: float) -> Finding:
    by = agent.split()[0]
    if answer.code is None:
        text = f"{host} did not answer {by} within {seconds:g} s"
        return failure("hosts", text, "is it up, its name right, the network between? Leave it out of the job till then")
    try:
        told = json.loads(answer.out.strip().splitlines()[-1])
        reached, clock = str(told["reached"]), float(told["time"])
    except (ValueError, IndexError, KeyError, TypeError):
        said = " ".join(answer.err.split())[-200:] or "it said nothing"
        if "key verification failed" in answer.err.lower():
            todo = "get its key from who runs it and add it to ~/.ssh/known_hosts; nothing accepts unknown keys here"
        elif sys.executable in answer.err:
            todo = f"install the same environment at the same path on {host}"
        else:
            todo = f"`{agent} {host} true` must work without a question; mpirun starts its daemon so"
        return failure("hosts", f"{host}: {by} ended with {answer.code}: {said}", todo)
    if not reached:
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
