"""Runs a module of this package in a process of its own, with a file of weights as its standard input."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Sequence

# This package's folder, so that what is imported is found neither in the current directory nor beside the file.
_ROOT = Path(__file__).resolve().parent.parent.parent
# Libraries take memory for each thread; HDF5 would load filters from files, and lock what it reads, which not every file
# system can.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HDF5_PLUGIN_PRELOAD": "::",
    "HDF5_USE_FILE_LOCKING": "FALSE",
}


def run_child(module: str, arguments: Sequence[str], path: Path, seconds: float, python: str = sys.executable) -> bytes:
    """Returns what hvd_vgg.weights.`module` prints, run by `python` on the file `path`.

    Raises ValueError where it takes more than `seconds`, or does not end well, and OSError where it cannot be started.
    """
    command = [python, "-m", f"hvd_vgg.weights.{module}", *arguments]
    search = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": search}
    with open(path, "rb") as file:
        try:
            ended = subprocess.run(  # noqa: S603
                command, cwd=_ROOT, env=environment, stdin=file, capture_output=True, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise ValueError(f"reading it took more than {seconds:.0f} s, and was ended: it is damaged") from error
    if ended.returncode < 0:
        raise ValueError(f"reading it ended the process that read it, by signal {-ended.returncode}: it is damaged")
    if ended.returncode:
        lines = ended.stderr.decode(errors="replace").strip().splitlines()
        raise ValueError(f"it cannot be read: {lines[-1] if lines else f'exit code {ended.returncode}'}")
    return ended.stdout
