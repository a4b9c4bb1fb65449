"""The MPI library of this process, and settings under which it cannot run."""

import os
import re
from pathlib import Path
from typing import List, Mapping

UNSET_GLOO = "unset HOROVOD_CPU_OPERATIONS; horovodrun --gloo sets what it needs"


def gloo_under_mpi_error(environ: Mapping[str, str]) -> str:
    """Returns what would come of Horovod's exchange by Gloo among ranks of MPI; nothing where that is not asked for."""
    operations, controller = (environ.get(f"HOROVOD_{name}", "").lower() for name in ("CPU_OPERATIONS", "CONTROLLER"))
    if operations != "gloo" or controller == "gloo":
        return ""
    return "HOROVOD_CPU_OPERATIONS=gloo ends all ranks of mpirun by signal 11 in their first collective (Horovod 0.28.1)"


_CONSENT = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
# A line of /proc/PID/maps has its first slash where the path begins.
_LIBRARY = re.compile(r"^[^/\n]*(/.*/libmpi(?:ch)?\.so\S*)", re.MULTILINE)


def loaded_mpi_libraries() -> List[str]:
    """Returns the MPI libraries in this process: Horovod's, once that is imported."""
    return mpi_libraries_in(Path("/proc/self/maps").read_text())


def root_refusal(environ: Mapping[str, str]) -> str:
    """Returns why Open MPI would start nothing for this user; nothing where it would."""
    if os.getuid() != 0 or all(environ.get(name) == "1" for name in _CONSENT):
        return ""
    return f"Open MPI does not run as root unless told twice: in a container, export {'=1 '.join(_CONSENT)}=1"


def mpi_libraries_in(maps: str) -> List[str]:
    return sorted({os.path.realpath(path) for path in _LIBRARY.findall(maps)})
