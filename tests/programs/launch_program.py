"""Runs `hvd-vgg launch` with another program on its ranks: `launch_program.py PROGRAM... -- FLAGS OF launch`.

Faults among PROGRAM's arguments (FAULT@RANK:STEP, inject.py) are for the first start alone.
"""

import sys

from patching import replace

from hvd_vgg import __main__
from hvd_vgg.launcher import command_line

cut = sys.argv.index("--")
starts = []


def with_faults_once(compose_mpirun):
    """Wraps what composes the command: without the faults from the second start on."""

    def compose(config, ranks, hosts, token, program):
        words = [word for word in program if not (starts and "@" in word)]
        starts.append(ranks)
        return compose_mpirun(config, ranks, hosts, token, words)

    return compose


__main__.PROGRAM = sys.argv[1:cut]
replace(command_line, "compose_mpirun", with_faults_once)
sys.exit(__main__.run(["launch", *sys.argv[cut + 1 :]]))
