"""Seconds until `hvd-vgg doctor` has ended and named what keeps hosts from meeting, on emulated hosts (namespaces.py; root).

    python benchmarks/doctor.py [--rounds=3] [--hosts=2,4]

All that passes counts, from the command to its end: Python, TensorFlow, mpirun, every host's own doctor. The goal is 20 s.
Each case is tried in turn, round by round; what it names is looked for in what it prints.

    silent          a host of the host file never answers the remote shell      doctor --hostfile
    unreachable     there is no route to it                                     doctor --hostfile
    one way         hosts answer, and cannot connect back                       doctor --hostfile
    no interface    MPI is told of one that no host has                         mpirun ... doctor
    loopback        MPI is told of lo                                           mpirun ... doctor
    dead end        MPI is told of one that leads to no other host              mpirun ... doctor
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, List, Tuple

import namespaces

PROGRAM = [sys.executable, "-m", "hvd_vgg"]
GOAL_SECONDS = 20
CASES = {
    "silent": "did not answer",
    "unreachable": "No route to host",
    "one way": "cannot connect to this host",
    "no interface": "no such interface with an address",
    "loopback": "never leaves this host",
    "dead end": "the ranks have not met",
}


def command(case: str, hosts: namespaces.Hosts, folder: Path) -> List[str]:
    """Returns what is typed on the first host."""
    doctor = [
        "doctor",
        f"--data_dir={folder / 'data'}",
        f"--run_dir={folder / 'run'}",
        "--num_classes=10",
        "--image_size=32",
    ]
    if case in ("silent", "unreachable", "one way"):
        agent = hosts.agent
        names = list(hosts.addresses)
        if case == "silent":
            agent = folder / "silent.sh"
            agent.write_text("#!/bin/sh\nexec sleep 600\n")
            agent.chmod(0o755)
        elif case == "unreachable":
            names.append(f"{namespaces.NETWORK}.99")
        (folder / "hosts").write_text("".join(f"{name} slots=1\n" for name in names))
        return [*PROGRAM, *doctor, f"--hostfile={folder / 'hosts'}", f"--rsh_agent={agent}"]
    told = {
        "plm_rsh_agent": str(hosts.agent),
        "plm_rsh_no_tree_spawn": "1",
        "oob_tcp_if_include": f"{namespaces.NETWORK}.0/24",
        "btl_tcp_if_include": {"no interface": "eth7", "loopback": "lo", "dead end": "dum0"}[case],
        "btl": "self,tcp",
        "pml": "ob1",
    }
    line = [
        "mpirun",
        "-np",
        str(hosts.count),
        "-H",
        ",".join(f"{address}:1" for address in hosts.addresses),
        "--bind-to",
        "none",
    ]
    for name, value in told.items():
        line += ["--mca", name, value]
    return [*line, "-x", "PATH", "-x", "PYTHONPATH", *PROGRAM, *doctor]


def once(case: str, count: int, folder: Path) -> float:
    """Returns the seconds that a case takes; ends this program where doctor does not name it, with 78."""
    consent = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    with namespaces.Hosts(count, folder) as hosts:
        hosts.add_dead_end("dum0")
        line = hosts.on(1, command(case, hosts, folder))
        if case == "one way":  # these hosts' agent needs no link of the host that asks
            namespaces.ip("-n", hosts.spaces[0], "link", "set", "eth0", "down")
        began = time.perf_counter()
        ended = subprocess.run(
            line, capture_output=True, text=True, env={**os.environ, **consent}, cwd=folder, timeout=120, check=False
        )
        seconds = time.perf_counter() - began
    if ended.returncode != 78 or CASES[case] not in ended.stdout + ended.stderr:
        sys.exit(f"{case}, {count} hosts: not named (exit code {ended.returncode})\n{ended.stdout}{ended.stderr}")
    return seconds


def main() -> None:
    """Lets the cases take turns and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hosts", default="2,4", help="numbers of emulated hosts")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds={options.rounds}: expected 1 or more")
    if namespaces.missing():
        sys.exit(f"doctor.py: needs {namespaces.missing()}")
    counts = [int(count) for count in options.hosts.split(",")]
    seconds: Dict[Tuple[str, int], List[float]] = {(case, count): [] for case in CASES for count in counts}
    with tempfile.TemporaryDirectory() as place:
        for _ in range(options.rounds):
            for case, count in seconds:
                seconds[case, count].append(once(case, count, Path(place)))
                print(f"{case}, {count} hosts: {seconds[case, count][-1]:.1f} s", file=sys.stderr)
    print(f"\n{options.rounds} rounds; seconds, median (smallest to largest); goal {GOAL_SECONDS}")
    print("| case |" + "".join(f" {count} hosts |" for count in counts))
    print("|---|" + "---|" * len(counts))
    for case in CASES:
        cells = [
            f" {statistics.median(of):.1f} ({min(of):.1f} to {max(of):.1f}) |" for of in (seconds[case, n] for n in counts)
        ]
        print(f"| {case} |" + "".join(cells))


if __name__ == "__main__":
    main()
