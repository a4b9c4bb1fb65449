"""Which MPI is loaded, and which mpirun is on PATH."""

import os
import sys
from pathlib import Path

import pytest

from hvd_vgg.doctor.mpi import ask_mpi4py, check_mpi, check_mpirun, check_root
from hvd_vgg.parallel.mpi import mpi_libraries_in
from hvd_vgg.reporting.findings import FAILURE, OK, WARNING


def test_root_without_consent_is_told_what_mpirun_would_say(monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 0)
    (told,) = check_root({})
    assert (told.verdict, "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1" in told.text) == (WARNING, True)
    assert check_root({"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}) == []
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    assert check_root({}) == []


def test_two_mpis_are_a_failure_and_one_is_right():
    same = {"mpi4py": "4.0", "mpi": "Open MPI v4.1.8, package: x", "libraries": ["/a/libmpi.so.40"]}
    assert check_mpi(["/a/libmpi.so.40"], same, "mpi", "0.28.1 (mpi)", "Open MPI v4.1.8")[0].verdict == OK
    (found,) = check_mpi(["/b/libmpi.so.12"], same, "mpi", "0.28.1 (mpi)", "Open MPI v4.1.8")
    assert (found.verdict, "--no-binary mpi4py" in found.fix) == (FAILURE, True)
    assert check_mpi([], {"error": "no libmpi.so"}, "gloo", "0.28.1 (mpi, gloo)", "none")[0].verdict == WARNING
    assert check_mpi([], {}, "gloo", "0.28.1 (mpi, gloo)", "none")[0].verdict == OK
    (found,) = check_mpi([], {}, "gloo", "0.28.1 (gloo)", "none")
    assert (found.verdict, "built without MPI" in found.text, "--gloo" in found.fix) == (WARNING, True, True)
    (alone,) = check_mpi(["/a/libmpi.so.40"], {}, "mpi", "0.28.1 (mpi)", "Open MPI v4.1.8")
    assert alone.text == "Horovod 0.28.1 (mpi) by mpi, Open MPI v4.1.8"


@pytest.mark.parametrize(
    ("script", "verdict", "told"),
    [
        ("echo 'mpirun (Open MPI) 4.1.8'; echo; echo Report bugs", OK, "Open MPI 4.1.8"),
        ("echo 'mpirun (Open MPI) 5.0.5'", WARNING, "Open MPI 5.0.5"),
        ("echo 'mpirun (Open MPI) 40.0'", WARNING, "Open MPI 40.0"),
        ("echo 'HYDRA build details:'; echo Version: 4.1", WARNING, "HYDRA build details:"),
        ("echo 'no libopen-rte.so.40' >&2; exit 127", WARNING, "no libopen-rte.so.40"),
        ("exec sleep 60", WARNING, "no answer"),
    ],
)
def test_an_mpirun_on_path_is_asked_which_it_is(tmp_path, script, verdict, told):
    assert "not on PATH" in check_mpirun(str(tmp_path))[0].text
    path = tmp_path / "mpirun"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    (found,) = check_mpirun(str(tmp_path))
    assert (found.verdict, found.text) == (verdict, f"mpirun is {path}: {told}")


def test_this_environments_own_mpirun_is_the_right_one():
    assert check_mpirun(os.environ["PATH"])[0].verdict == OK


def test_mpi4py_is_asked_in_a_process_of_its_own(tmp_path):
    told = ask_mpi4py(os.environ)
    assert told["mpi"].startswith("Open MPI")
    assert all(Path(path).is_absolute() for path in told["libraries"])
    assert told["libraries"]
    assert "mpi4py" not in sys.modules
    (tmp_path / "mpi4py.py").write_text("raise ImportError('libmpi.so.40: cannot open shared object file')\n")
    broken = ask_mpi4py({**os.environ, "PYTHONPATH": str(tmp_path)})
    assert "libmpi.so.40: cannot open" in broken["error"]


@pytest.mark.parametrize("path", ["/opt/x/libmpi.so.40.30.8", "/opt/x/libmpich.so.12", "/home/my env/lib/libmpi.so.40.30.7"])
def test_the_library_of_mpi_is_found_among_those_loaded(path):
    line = "7f57c2e00000-7f57c2e41000 r--p 00000000 fe:00 329634    "
    maps = [f"{line}/usr/lib/libc.so.6", f"{line}{path}", f"{line}/opt/x/libmpi_cxx.so.40", f"{line}[stack]"]
    assert mpi_libraries_in("\n".join(maps)) == [path]
