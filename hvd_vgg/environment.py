"""What the launcher tells each process through its environment, and which variables are secret."""

import os
import re
from typing import Optional, Sequence

# A parameter that Open MPI does not know: mpirun hands it to its daemons, on their command lines, and to all ranks, in
# their environment. So whatever a job has started can be told from all else, on every host.
JOB_PARAMETER = "hvd_vgg_job"
# Variables of such names are neither passed to other hosts nor printed.
SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASS|CRED", re.I)
# What mpirun, horovodrun --gloo, and srun with either form of PMI set for each process they start.
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "HOROVOD_RANK", "PMIX_RANK", "PMI_RANK")
# srun with PMIx sets no size of PMIx's own.
_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "HOROVOD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
_LOCAL_SIZE_VARIABLES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "HOROVOD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")
_LOCAL_RANK_VARIABLES = ("OMPI_COMM_WORLD_LOCAL_RANK", "HOROVOD_LOCAL_RANK", "SLURM_LOCALID")


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
