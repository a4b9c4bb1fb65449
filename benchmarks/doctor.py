"""Seconds until `hvd-vgg doctor` has named what keeps hosts apart and ended, on emulated hosts (namespaces.py; root).

    python benchmarks/doctor.py [--rounds=3] [--hosts=2,4] [--cases=silent,...]

Everything counts, from the command to its end: Python, TensorFlow, mpirun, every host's own doctor. The goal is 20 s.
The cases take turns; what each names is looked for in what doctor prints.

    silent        a host of the host file never answers the remote shell            doctor --hostfile
    unreachable   there is no route to it                                           doctor --hostfile
    one_way       hosts answer, but cannot connect back                             doctor --hostfile
    no_interface  MPI is to use an interface that no host has                       mpirun ... doctor
    loopback      MPI is to use lo                                                  mpirun ... doctor
    dead_end      MPI is to use an interface from which no other host is reached    mpirun ... doctor
"""

import subprocess
import tempfile
import time
from pathlib import Path

import measure
import namespaces

CASES = {
    "silent": "did not answer",
    "unreachable": "No route to host",
    "one_way": "cannot connect to this host",
    "no_interface": "no such interface with an address",
    "loopback": "never leaves this host",
    "dead_end": "the ranks have not met",
}
INTERFACES = {"no_interface": "eth7", "loopback": "lo", "dead_end": "dum0"}


def command(case, hosts, folder):
    """Returns what is typed on the first host."""
    flags = [f"--data_dir={folder / 'data'}", f"--run_dir={folder / 'run'}", "--num_classes=10", "--image_size=32"]
    doctor = [*measure.TRAINER, "doctor", *flags]
    if case in INTERFACES:
        return [*hosts.mpirun(INTERFACES[case]), *doctor]
    agent, names = hosts.agent, list(hosts.addresses)
    if case == "silent":
        agent = folder / "silent.sh"
        agent.write_text("#!/bin/sh\nexec sleep 600\n")
        agent.chmod(0o755)
    elif case == "unreachable":
        names.append(f"{namespaces.NETWORK}.99")
    (folder / "hosts").write_text("".join(f"{name} slots=1\n" for name in names))
    return hosts.on(1, [*doctor, f"--hostfile={folder / 'hosts'}", f"--rsh_agent={agent}"])


def seconds_to_name(case, count, folder):
    """Returns the seconds that a case takes; ends this program where doctor does not name it, with 78."""
    with namespaces.Hosts(count, folder) as hosts:
        hosts.add_dead_end("dum0")
        line = command(case, hosts, folder)
        if case == "one_way":  # these hosts' agent needs no link of the host that asks
            hosts.cut(1)
        began = time.perf_counter()
        doctor = measure.start(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder)
        output, _ = doctor.communicate(timeout=120)
        seconds = time.perf_counter() - began
    if doctor.returncode != measure.CONFIGURATION or CASES[case] not in output:
        measure.refuse(f"{case}, {count} hosts: not named (exit code {doctor.returncode})\n{output}", 1)
    return seconds


def main():
    """Lets the cases take turns and prints the table."""
    parser = measure.command_line(__doc__, rounds=3)
    parser.add_argument("--hosts", type=measure.list_of(measure.positive), default="2,4", help="numbers of emulated hosts")
    parser.add_argument("--cases", type=measure.some_of(CASES), default=",".join(CASES))
    options = parser.parse_args()
    measure.require("mpirun")
    if namespaces.missing():
        measure.refuse(f"needs {namespaces.missing()}")
    seconds = {(case, count): [] for case in options.cases for count in options.hosts}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for (case, count), own in seconds.items():
                own.append(seconds_to_name(case, count, Path(folder)))
                print(f"round {number + 1}: {case}, {count} hosts: {own[-1]:.1f} s", flush=True)
    rows = [[case, *(measure.spread(seconds[case, count], ".1f") for count in options.hosts)] for case in options.cases]
    title = f"{options.rounds} rounds; seconds, of which the goal is 20"
    measure.print_table(title, ["case", *(f"{count} hosts" for count in options.hosts)], rows)


if __name__ == "__main__":
    measure.run(main)
