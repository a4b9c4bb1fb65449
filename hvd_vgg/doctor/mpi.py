"""Which MPI Horovod and mpi4py use, and whether mpirun can start ranks."""

import json
import os
import re
import shutil
from typing import Any, Dict, List, Mapping, Optional, Sequence

from hvd_vgg.doctor.system import run_tool
from hvd_vgg.environment import environment_of_job, launched_rank, python_program
from hvd_vgg.parallel.mpi import VERSION_SECONDS, mpi_libraries_in, parse_mpirun_version, root_refusal
from hvd_vgg.reporting.findings import Finding, failure, ok, warning

_REBUILD = "MPICC=/path/of/this/mpi/bin/mpicc pip install --no-cache-dir --no-deps --no-binary mpi4py mpi4py"
# Runs in a process of its own, because two MPIs in one may crash it. Initialises nothing.
_QUERY = """
import ctypes, json, mpi4py
for path in sys.argv[1:]:
    ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
mpi4py.rc.initialize = mpi4py.rc.finalize = False
from mpi4py import MPI
maps = open("/proc/self/maps").read()
print(json.dumps({"mpi4py": mpi4py.__version__, "mpi": MPI.Get_library_version(), "maps": maps}))
"""


def query_mpi4py(environ: Mapping[str, str], libraries: Sequence[str]) -> Dict[str, Any]:
    """Returns `mpi4py` (its version), `mpi` (its MPI's version string) and `libraries` (paths); or `error`.

    libraries: paths of what Horovod has loaded. As in training they come first: an mpi4py of Open MPI 4 then uses 5's, whose
    library has the same name.
    """
    alone = {name: value for name, value in environ.items() if not name.startswith(("OMPI_", "PMIX_", "PMI_"))}
    done = run_tool([*python_program(_QUERY), *libraries], environment_of_job(alone), 20)
    if done is None:
        return {"error": "no answer"}
    try:
        reply = json.loads(done.stdout)
    except ValueError:
        return {"error": "".join(done.stderr.strip().splitlines()[-1:]) or f"exit code {done.returncode}"}
    return {"mpi4py": reply["mpi4py"], "mpi": reply["mpi"], "libraries": mpi_libraries_in(reply["maps"])}


def check_root(environ: Mapping[str, str]) -> List[Finding]:
    """Checks that mpirun would start ranks for this user; a process under a launcher has its answer."""
    refusal = root_refusal(environ) if launched_rank() is None else ""
    fix = "better: another user; until then `hvd-vgg launch` and mpirun start nothing"
    return [warning("mpi", refusal, fix)] if refusal else []


def check_mpirun(path: Optional[str]) -> Finding:
    """Checks the version of the mpirun on `path` (PATH) that `hvd-vgg launch` would use, in VERSION_SECONDS."""
    mpirun = shutil.which("mpirun", path=path)
    fix = "install Open MPI 4 or 5, or add its bin to PATH; horovodrun --gloo needs none"
    if mpirun is None:
        return warning("mpi", "mpirun is not on PATH: `hvd-vgg launch` cannot start ranks", fix)
    done = run_tool([mpirun, "--version"], os.environ, VERSION_SECONDS)
    name, version = parse_mpirun_version((done.stdout.strip() or done.stderr.strip()) if done else "no answer")
    text = f"mpirun is {mpirun}: {name}"
    if version in (4, 5):
        return ok("mpi", text)
    return warning("mpi", text, f"`hvd-vgg launch` needs Open MPI 4 or 5: {fix}")


def check_mpi(libraries: List[str], mpi4py: Dict[str, Any], software: Mapping[str, str]) -> Finding:
    """Compares the MPI `libraries` that Horovod loaded with those of `mpi4py`, as from `query_mpi4py`; {}: not installed.

    software: as from `parallel.init.describe_software`; of it `horovod` (version and what it was built with), `controller`
    (mpi or gloo, what the ranks use now) and `mpi` (version of the MPI in use, "none" for none).
    """
    built, controller = software["horovod"], software["controller"]
    text = f"Horovod {built} using {controller}"
    if launched_rank() is None and "mpi" in built and controller == "gloo":
        text += " (a single process)"
    text += f", {software['mpi']}" if software["mpi"] != "none" else ""
    if "mpi" not in built:
        fix = "start ranks by horovodrun --gloo; mpirun and `hvd-vgg launch` need a Horovod with MPI"
        return warning("mpi", f"{text}: it was built without MPI", fix)
    if not mpi4py:
        return ok("mpi", text)
    if "error" in mpi4py:
        return warning("mpi", f"{text}; mpi4py cannot be imported: {mpi4py['error']}", f"build it for this MPI: {_REBUILD}")
    name = re.split(r"[,\n]", mpi4py["mpi"])[0].strip("\0 ")
    text += f"; mpi4py {mpi4py['mpi4py']} with {name}"
    if libraries and mpi4py["libraries"] and set(libraries) != set(mpi4py["libraries"]):
        its_own = sorted({*mpi4py["libraries"]} - {*libraries}) or mpi4py["libraries"]
        text += f": linked to {', '.join(its_own)}, but Horovod to {', '.join(libraries)}"
        return failure("mpi", text, f"use one MPI for both: {_REBUILD}")
    return ok("mpi", f"{text}, the same MPI as Horovod" if libraries else text)
