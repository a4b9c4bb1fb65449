"""Which MPI Horovod and mpi4py use, and whether mpirun can start ranks."""

import json
import re
import shutil
import subprocess
import sys
from typing import Any, Dict, List, Mapping, Optional

from hvd_vgg.environment import launched_rank
from hvd_vgg.parallel.mpi import mpi_libraries_in, root_refusal
from hvd_vgg.reporting.findings import Finding, failure, ok, warning

_REBUILD = "MPICC=/path/of/this/mpi/bin/mpicc pip install --no-cache-dir --no-deps --no-binary mpi4py mpi4py"
# In a process of its own: two MPIs in one may crash it. Initialises nothing.
_ASK = """
import json, mpi4py
mpi4py.rc.initialize = mpi4py.rc.finalize = False
from mpi4py import MPI
maps = open("/proc/self/maps").read()
print(json.dumps({"mpi4py": mpi4py.__version__, "mpi": MPI.Get_library_version(), "maps": maps}))
"""


def ask_mpi4py(environ: Mapping[str, str]) -> Dict[str, Any]:
    """Returns `mpi4py` (its version), `mpi` (what its MPI calls itself) and `libraries`; or `error`."""
    own = {name: value for name, value in environ.items() if not name.startswith(("OMPI_", "PMIX_", "PMI_"))}
    try:
        ended = subprocess.run(  # noqa: S603
            [sys.executable, "-c", _ASK], env=own, capture_output=True, text=True, timeout=20, check=False
        )
        told = json.loads(ended.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        said = "".join(ended.stderr.strip().splitlines()[-1:]) if "ended" in locals() else "no answer"
        return {"error": said or f"it ended with {ended.returncode}"}
    return {"mpi4py": told["mpi4py"], "mpi": told["mpi"], "libraries": mpi_libraries_in(told["maps"])}


def check_root(environ: Mapping[str, str]) -> List[Finding]:
    """Looks whether mpirun would start ranks for this user; what runs under a launcher has its answer."""
    why = root_refusal(environ) if launched_rank() is None else ""
    return [warning("mpi", why, "better: another user; `hvd-vgg launch` and mpirun start nothing till then")] if why else []


def check_mpirun(path: Optional[str]) -> List[Finding]:
    """Looks for mpirun on a PATH, the one that `hvd-vgg launch` would take, and asks it for 5 s what it is."""
    found = shutil.which("mpirun", path=path)
    fix = "install Open MPI 4, or put its bin on PATH; horovodrun --gloo needs none"
    if found is None:
        return [warning("mpi", "mpirun is not on PATH: `hvd-vgg launch` cannot start ranks", fix)]
    try:
        ended = subprocess.run(  # noqa: S603
            [found, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=5, check=False
        )
        said = (ended.stdout.strip() or ended.stderr.strip()).partition("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        said = "no answer"
    version = re.match(r"mpirun \((Open MPI)\) (\S+)", said)
    text = f"mpirun is {found}: {' '.join(version.groups()) if version else said}"
    if version and version[2].startswith("4."):
        return [ok("mpi", text)]
    return [warning("mpi", text, f"`hvd-vgg launch` speaks to Open MPI 4: {fix}")]


def check_mpi(horovods: List[str], mpi4pys: Dict[str, Any], controller: str, built: str, calls: str) -> List[Finding]:
    """Compares Horovod's MPI with mpi4py's; mpi4pys: from `ask_mpi4py`, empty where it is not installed.

    controller: mpi or gloo, what the ranks use now; built: Horovod's version and what it was built with;
    calls: what the MPI in use calls itself, "none" where none is (`comm.describe`).
    """
    alone = " (one process alone)" if launched_rank() is None and "mpi" in built and controller == "gloo" else ""
    text = f"Horovod {built} by {controller}{alone}" + (f", {calls}" if calls != "none" else "")
    if "mpi" not in built:
        fix = "start ranks by horovodrun --gloo; mpirun and `hvd-vgg launch` need a Horovod with MPI"
        return [warning("mpi", f"{text}: it is built without MPI", fix)]
    if not mpi4pys:
        return [ok("mpi", text)]
    if "error" in mpi4pys:
        said = f"{text}; mpi4py cannot be imported: {mpi4pys['error']}"
        return [warning("mpi", said, f"build it against this MPI: {_REBUILD}")]
    name = re.split(r"[,\n]", mpi4pys["mpi"])[0].strip("\0 ")
    text = f"{text}; mpi4py {mpi4pys['mpi4py']} with {name}"
    if horovods and mpi4pys["libraries"] and set(horovods) != set(mpi4pys["libraries"]):
        two = f"{text}: bound to {', '.join(mpi4pys['libraries'])}, but Horovod to {', '.join(horovods)}"
        return [failure("mpi", two, f"one MPI for both: {_REBUILD}")]
    return [ok("mpi", f"{text}, the MPI of Horovod" if horovods else text)]
