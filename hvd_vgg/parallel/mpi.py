"""The MPI library of this process, and settings under which it cannot run."""

import os
import re
from pathlib import Path
from typing import List, Mapping, Sequence, Tuple

UNSET_GLOO = "unset HOROVOD_CPU_OPERATIONS and HOROVOD_CONTROLLER; horovodrun --gloo sets what it needs"
_CONSENT = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
VERSION_SECONDS = 20.0  # in which mpirun has to say its version
# What another MPI's mpirun says of itself at --version.
_SAY_AT_VERSION = {"HYDRA": "MPICH", "Intel(R) MPI": "Intel MPI"}
OTHER_MPIS = tuple(_SAY_AT_VERSION.values())
# In a line of /proc/PID/maps the path starts at the first slash.
_LIBRARY = re.compile(r"^[^/\n]*(/.*/libmpi(?:ch)?\.so\S*)", re.MULTILINE)


def gloo_under_mpi_error(environ: Mapping[str, str]) -> str:
    """Returns what happens if the environment asks for Gloo under mpirun, or for what Horovod lacks; "" if not."""
    operations, controller = (environ.get(f"HOROVOD_{name}", "").lower() for name in ("CPU_OPERATIONS", "CONTROLLER"))
    if controller not in ("", "mpi", "gloo"):
        return f"HOROVOD_CONTROLLER={controller} aborts Horovod, which knows mpi and gloo"
    if controller == "gloo" and "OMPI_COMM_WORLD_RANK" in environ:
        return "HOROVOD_CONTROLLER=gloo ends all ranks of mpirun with MPI_ERR_COMM (Horovod 0.28.1)"
    if operations != "gloo" or controller == "gloo":
        return ""
    return "HOROVOD_CPU_OPERATIONS=gloo ends all ranks of mpirun with signal 11 in their first collective (Horovod 0.28.1)"


def foreign_mpiexec_error(environ: Mapping[str, str], libraries: Sequence[str]) -> str:
    """Returns what happens if mpiexec of MPICH or Intel MPI started this rank and Horovod loaded Open MPI; "" if not.

    libraries: paths, as from `loaded_mpi_libraries`. Open MPI's is libmpi.so.40, theirs is libmpi.so.12 or libmpich.so.12.
    In a shell that such an mpiexec started, mpirun and horovodrun may start ranks all the same.
    """
    inside = any(name in environ for name in ("OMPI_COMM_WORLD_RANK", "HOROVOD_RANK"))
    ours = [path for path in libraries if re.search(r"/libmpi\.so\.40\b", path)]
    if inside or not ours or not {"PMI_RANK", "MPI_LOCALRANKID"} <= set(environ):
        return ""
    return f"mpiexec of MPICH or Intel MPI started this rank, but Horovod is built with Open MPI ({ours[0]})"


def root_refusal(environ: Mapping[str, str]) -> str:
    """Returns why Open MPI would refuse to start anything for this user; "" if it would not."""
    if os.getuid() != 0 or all(environ.get(name) == "1" for name in _CONSENT):
        return ""
    return f"Open MPI does not run as root unless asked twice: in a container, export {'=1 '.join(_CONSENT)}=1"


def parse_mpirun_version(printed: str) -> Tuple[str, int]:
    """Returns what an mpirun is, such as `Open MPI 5.0.11` or `MPICH`, and its major version; 0 if it is not Open MPI's.

    printed: what it prints for --version. Of one that is not known the first line stands for its name.
    """
    if found := re.search(r"mpirun \((Open MPI)\) v?((\d+)\S*)", printed):
        return f"{found[1]} {found[2]}", int(found[3])
    other = next((name for word, name in _SAY_AT_VERSION.items() if word in printed), "")
    return other or printed.strip().partition("\n")[0], 0


def loaded_mpi_libraries() -> List[str]:
    """Returns the paths of the MPI libraries in this process: Horovod's, once it is imported."""
    return mpi_libraries_in(Path("/proc/self/maps").read_text())


def mpi_libraries_in(maps: str) -> List[str]:
    """Returns the paths of the MPI libraries in the text of a /proc/PID/maps."""
    return sorted({os.path.realpath(path) for path in _LIBRARY.findall(maps)})
