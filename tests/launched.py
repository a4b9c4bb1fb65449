"""Runs `hvd-vgg launch` with another program in place of its ranks': `launched.py PROGRAM... -- FLAGS OF launch`.

A fault among PROGRAM's words (FAULT@RANK:STEP, tests/worker.py) is for the first start alone.
"""

import sys

from hvd_vgg import __main__
from hvd_vgg.__main__ import run
from hvd_vgg.launcher import supervisor

cut = sys.argv.index("--")
compose, starts = supervisor.compose_mpirun, []


def compose_with_faults_once(config, ranks, hosts, token, program):
    """Composes without the faults from the second start on."""
    words = [word for word in program if not (starts and "@" in word)]
    starts.append(ranks)
    return compose(config, ranks, hosts, token, words)


__main__.PROGRAM = sys.argv[1:cut]
supervisor.compose_mpirun = compose_with_faults_once
sys.exit(run(["launch", *sys.argv[cut + 1 :]]))
