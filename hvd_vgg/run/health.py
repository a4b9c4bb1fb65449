"""How a run ends: exit codes, and the one exception whose text is for the user."""

import os
import re
from typing import Dict, Optional, Sequence, Tuple

DONE = 0
USAGE = 64  # a flag is unknown, illegal, or does not go with another
DATA = 65  # the data set is absent, incomplete or damaged; or what a run claims does not hold
BUG = 70  # an error of the program: the only case with a traceback
NOT_WRITTEN = 74  # a result or checkpoint could not be written
LOST_RANK = 75  # hung, or another rank is gone or does not answer: worth a retry
CONFIGURATION = 78  # installation, run directory or ranks do not fit together
STOPPED = 80  # on request, with a checkpoint where anything was trained
NOT_FINITE = 81  # a loss or gradient is NaN or Inf

# Variables of such names are neither passed to other hosts nor printed.
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|CRED", re.I)
# What mpirun, horovodrun --gloo, and srun with either form of PMI set for each process they start.
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "HOROVOD_RANK", "PMIX_RANK", "PMI_RANK")
# srun with PMIx sets no size of PMIx's own.
_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "HOROVOD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
_LOCAL_SIZE_VARIABLES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "HOROVOD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")
_LOCAL_RANK_VARIABLES = ("OMPI_COMM_WORLD_LOCAL_RANK", "HOROVOD_LOCAL_RANK", "SLURM_LOCALID")


class Failure(Exception):
    """A reason to end the run that its user can act on.

    `code` is the process's exit code. `agreed` says that every rank raises the same failure at the same point, so that
    rank 0 alone speaks and all leave in order; otherwise the rank that failed speaks and ends all the others.
    """

    def __init__(self, code: int, message: str, agreed: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.agreed = agreed


def launched_rank() -> Optional[int]:
    """Returns this process's rank as its launcher says it, before Horovod is there to ask; None without a launcher."""
    return _first_number(_RANK_VARIABLES)


def launched_size() -> Optional[int]:
    """Returns how many processes the launcher says it started; None without a launcher, or when it does not say."""
    return None if launched_rank() is None else _first_number(_SIZE_VARIABLES)


def launched_local_size() -> Optional[int]:
    """Returns how many of those are on this host; None when it does not say."""
    return None if launched_rank() is None else _first_number(_LOCAL_SIZE_VARIABLES)


def launched_local_rank() -> int:
    """Returns this process's number on its host, from 0; 0 too where no launcher says it."""
    return 0 if launched_rank() is None else _first_number(_LOCAL_RANK_VARIABLES) or 0


def _first_number(names: Sequence[str]) -> Optional[int]:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), None)


def difference(expected: Dict[str, object], found: Dict[str, object], titles: Tuple[str, str]) -> str:
    """Returns a table of the keys whose values differ, in two columns under `titles`; empty when all are equal."""
    keys = sorted(key for key in set(expected) | set(found) if expected.get(key) != found.get(key))
    rows = [(key, repr(expected.get(key)), repr(found.get(key))) for key in keys]
    widths = [max(len(row[column]) for row in [("", *titles), *rows]) for column in (0, 1)]
    lines = [f"  {a:{widths[0]}}  {b:{widths[1]}}  {c}" for a, b, c in [("", *titles), *rows]]
    return "\n".join(line.rstrip() for line in lines) if rows else ""
