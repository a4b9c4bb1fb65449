"""The environment of a process: what its launcher says of ranks there, and which variables are secret."""

import os
import re
from typing import Optional, Sequence

# A parameter that Open MPI itself does not know: mpirun passes it on the command lines of its daemons and in the environment
# of all ranks, so the processes of a job can be recognised on every host.
JOB_PARAMETER = "hvd_vgg_job"
# Variables with such names are neither passed to other hosts nor printed.
SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASS|CRED", re.I)
# Set for each process by mpirun, horovodrun --gloo, and srun with either form of PMI.
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "HOROVOD_RANK", "PMIX_RANK", "PMI_RANK")
# PMIx has no size variable of its own under srun.
_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "HOROVOD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
_LOCAL_SIZE_VARIABLES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "HOROVOD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")
_LOCAL_RANK_VARIABLES = ("OMPI_COMM_WORLD_LOCAL_RANK", "HOROVOD_LOCAL_RANK", "SLURM_LOCALID")


def launched_rank() -> Optional[int]:
    """Returns this process's rank according to its launcher, before Horovod is initialised; None without a launcher."""
    return _first_number(_RANK_VARIABLES)


def launched_size() -> Optional[int]:
    """Returns the number of ranks according to the launcher; None without a launcher, or if it does not say."""
    return None if launched_rank() is None else _first_number(_SIZE_VARIABLES)


def launched_local_size() -> Optional[int]:
    """Returns the number of ranks on this host according to the launcher; None if it does not say."""
    return None if launched_rank() is None else _first_number(_LOCAL_SIZE_VARIABLES)


def launched_local_rank() -> int:
    """Returns this process's rank on its host, from 0; 0 too if no launcher says."""
    return 0 if launched_rank() is None else _first_number(_LOCAL_RANK_VARIABLES) or 0


def _first_number(names: Sequence[str]) -> Optional[int]:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), None)
