"""The environment of a process: what its launcher says of ranks there, which variables are secret, what children get."""

import contextlib
import os
import re
import sys
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Optional, Sequence

# A parameter that Open MPI itself does not know: mpirun passes it on the command lines of its daemons and in the environment
# of all ranks, so the processes of a job can be recognised on every host.
JOB_PARAMETER = "hvd_vgg_job"
# What the name of a job begins with where its launcher knows of no run: it then writes no restarts.jsonl.
NO_RUN = "no-run-"
# What starts a command of this package: the same files, and nothing of the current directory.
PROGRAM = [sys.executable, str(Path(__file__).absolute().with_name("__main__.py"))]
# Variables with such names are neither passed to other hosts nor printed.
SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASS|CRED", re.I)
# Which of a host's devices a process may see. The second is Iluvatar's, in containers of SDK 4.5.0: no page of the vendor's
# has it, and a user calls it the counterpart of the first.
DEVICE_MASKS = ("CUDA_VISIBLE_DEVICES", "COREX_VISIBLE_DEVICES")
# Set for each process by mpirun, horovodrun --gloo, and srun with either form of PMI; PMI_RANK by MPICH's mpiexec too.
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "HOROVOD_RANK", "PMIX_RANK", "PMI_RANK")
# What each of them cannot do without: the way to the launcher.
_BESIDE = {
    "OMPI_COMM_WORLD_RANK": ("PMIX_NAMESPACE",),
    "HOROVOD_RANK": ("HOROVOD_GLOO_RENDEZVOUS_ADDR",),
    "PMIX_RANK": ("PMIX_NAMESPACE",),
    "PMI_RANK": ("PMI_FD", "PMI_PORT"),
}
# PMIx has no size variable of its own under srun.
_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "HOROVOD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
# MPI_LOCAL...: MPICH's and Intel MPI's, whose mpiexec sets PMI_RANK and PMI_SIZE too.
_LOCAL_SIZE_VARIABLES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "HOROVOD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE")
_LOCAL_RANK_VARIABLES = ("OMPI_COMM_WORLD_LOCAL_RANK", "HOROVOD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
# All that horovodrun, srun and MPICH's mpiexec set for a rank: a shell that one of them started has it too, and so has what
# starts there.
_OF_A_RANK = re.compile(
    r"PMI_\w+|MPI_LOCAL\w+|PMIX_(?!MCA_)\w+"
    r"|HOROVOD_(RANK|SIZE|LOCAL_\w+|CROSS_\w+|HOSTNAME|GLOO_\w+|RENDEZVOUS_\w+)"
)


def device_masks(environ: Mapping[str, str]) -> str:
    """Returns the variables that decide which devices are seen, as `NAME=VALUE, NAME=VALUE`; "" if none is set."""
    return ", ".join(f"{name}={environ[name]}" for name in DEVICE_MASKS if name in environ)


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


def is_restarted() -> bool:
    """Returns whether this process is of a job that `hvd-vgg launch` has started again, on the hosts that still answer."""
    return bool(re.fullmatch(r"[^.]+\.[^.]+\.\d+\.\d+\.[1-9]\d*", os.environ.get(f"OMPI_MCA_{JOB_PARAMETER}", "")))


def runs_alone() -> bool:
    """Returns whether there are no other ranks: no launcher started this process, or a scheduler did, as the only task.

    So it is in a shell of `srun --pty bash`. What mpirun starts is its rank, though it be the only one.
    """
    return launched_rank() is None or ("OMPI_COMM_WORLD_RANK" not in os.environ and launched_size() == 1)


def leftover_error(environ: Mapping[str, str]) -> str:
    """Returns which variable says that a launcher started this process, though none did; "" if none does.

    With it Horovod would ask Open MPI for ranks that are not there, which aborts the process.
    """
    name = next((name for name in _RANK_VARIABLES if environ.get(name, "").isdigit()), "")
    beside = _BESIDE.get(name, ())
    if runs_alone() or not name or any(each in environ for each in beside):
        return ""
    return f"{name}={environ[name]} is a leftover of a job: what its launcher sets beside it, {beside[0]}, is not there"


def nested_refusal(environ: Mapping[str, str]) -> str:
    """Returns why no job is to be started in this process, which a launcher has started as a rank; "" if none has."""
    if runs_alone():
        return ""
    found = next(name for name in _RANK_VARIABLES if environ.get(name, "").isdigit())
    text = f"{found}={environ[found]} in the environment: this is a rank of a job, and each of its ranks would start another"
    return f"{text}: call `hvd-vgg launch` once, outside of any launcher; if the variable is a leftover, unset it"


def environment_of_job(environ: Mapping[str, str]) -> Dict[str, str]:
    """Returns the environment to start mpirun in: this process's, with what would bend a job put right.

    Left out: what a launcher said of this process as a rank, and empty entries of PYTHONPATH, which Python takes for the
    current directory. Added: a HOME for users without one, whom /etc/passwd does not know: Open MPI 4 ends by signal 11.
    """
    kept = {name: value for name, value in environ.items() if not _OF_A_RANK.fullmatch(name)}
    if "PYTHONPATH" in kept:
        kept["PYTHONPATH"] = os.pathsep.join(filter(None, kept["PYTHONPATH"].split(os.pathsep)))
    if not kept.get("HOME") and os.path.expanduser("~") in ("~", "/"):  # noqa: PTH111 (Path raises where there is none)
        kept["HOME"] = "/"
    return kept


def leave_out_current_directory() -> None:
    """Removes the current directory from Python's search path, where an empty entry of PYTHONPATH has put it there."""
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    here = os.path.realpath(os.curdir)
    if "" in entries[len(entries) == 1 :] and not any(entry and os.path.realpath(entry) == here for entry in entries):
        sys.path[:] = [each for each in sys.path if os.path.realpath(each) != here]


@contextlib.contextmanager
def not_importable(*names: str) -> Iterator[None]:
    """Within it the import of these modules fails as if they were not installed, unless they are loaded already."""
    missing = [name for name in names if name not in sys.modules]
    for name in missing:
        sys.modules[name] = None  # type: ignore[assignment] # with which Python's import raises ModuleNotFoundError
    try:
        yield
    finally:
        for name in missing:
            sys.modules.pop(name, None)


def python_program(text: str) -> List[str]:
    """Returns the command that runs `text` without importing anything from the current directory.

    In `environment_of_job`, or where PYTHONPATH has no empty entry.
    """
    return [sys.executable, "-c", f"import sys; sys.path = [each for each in sys.path if each]\n{text}"]


def library_path_hint(error: str) -> str:
    """Returns where a library that cannot be loaded may come from; "" if `error` names none, or no variable leads there."""
    path = os.environ.get("LD_LIBRARY_PATH") if ".so" in error else ""
    return f" (LD_LIBRARY_PATH={path} is searched first: is another version there, or another MPI?)" if path else ""


def _first_number(names: Sequence[str]) -> Optional[int]:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), None)
