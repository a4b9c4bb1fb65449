import os
import sys
from pathlib import Path

import pytest

from hvd_vgg.doctor.mpi import check_mpi, check_mpirun, check_root, query_mpi4py
from hvd_vgg.parallel.mpi import foreign_mpiexec_error, mpi_libraries_in
from hvd_vgg.reporting.findings import FAILURE, OK, WARNING


def test_root_without_consent_is_a_warning(monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 0)
    (found,) = check_root({})
    assert found.verdict == WARNING
    assert "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1" in found.text
    assert check_root({"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}) == []
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    assert check_root({}) == []


def test_mpi_must_be_one_for_horovod_and_mpi4py():
    by_mpi = {"horovod": "0.28.1 (mpi, gloo)", "controller": "mpi", "mpi": "Open MPI v4.1.8"}
    by_gloo = {**by_mpi, "controller": "gloo", "mpi": "none"}
    mpi4py = {"mpi4py": "4.0", "mpi": "Open MPI v4.1.8, package: x", "libraries": ["/a/libmpi.so.40"]}
    assert check_mpi(["/a/libmpi.so.40"], mpi4py, by_mpi).verdict == OK
    found = check_mpi(["/b/libmpi.so.12"], mpi4py, by_mpi)
    assert (found.verdict, "--no-binary mpi4py" in found.fix) == (FAILURE, True)
    assert check_mpi([], {"error": "no libmpi.so"}, by_gloo).verdict == WARNING
    assert check_mpi([], {}, by_gloo).verdict == OK
    found = check_mpi([], {}, {**by_gloo, "horovod": "0.28.1 (gloo)"})
    assert (found.verdict, "built without MPI" in found.text, "--gloo" in found.fix) == (WARNING, True, True)
    found = check_mpi(["/a/libmpi.so.40"], {}, by_mpi)
    assert found.text == "Horovod 0.28.1 (mpi, gloo) using mpi, Open MPI v4.1.8"


@pytest.mark.parametrize(
    ("script", "verdict", "answer"),
    [
        ("echo 'mpirun (Open MPI) 4.1.8'; echo; echo Report bugs", OK, "Open MPI 4.1.8"),
        ("echo 'mpirun (Open MPI) 5.0.5'", OK, "Open MPI 5.0.5"),
        ("echo 'mpirun (Open MPI) 40.0'", WARNING, "Open MPI 40.0"),
        ("echo 'HYDRA build details:'; echo Version: 4.1", WARNING, "MPICH"),
        ("echo 'no libopen-rte.so.40' >&2; exit 127", WARNING, "no libopen-rte.so.40"),
        pytest.param("exec sleep 60", WARNING, "no answer", marks=pytest.mark.fault(tier=3)),
    ],
)
def test_mpirun_on_path_is_asked_its_version(tmp_path, script, verdict, answer):
    assert "not on PATH" in check_mpirun(str(tmp_path)).text
    path = tmp_path / "mpirun"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    found = check_mpirun(str(tmp_path))
    assert (found.verdict, found.text) == (verdict, f"mpirun is {path}: {answer}")


def test_mpirun_of_this_environment():
    assert check_mpirun(os.environ["PATH"]).verdict == OK


def test_mpi4py_is_queried_in_another_process(tmp_path):
    reply = query_mpi4py(os.environ, [])
    assert reply["mpi"].startswith("Open MPI")
    assert reply["libraries"]
    assert all(Path(path).is_absolute() for path in reply["libraries"])
    assert "mpi4py" not in sys.modules
    (tmp_path / "mpi4py.py").write_text("raise ImportError('libmpi.so.40: cannot open shared object file')\n")
    broken = query_mpi4py({**os.environ, "PYTHONPATH": str(tmp_path)}, [])
    assert "libmpi.so.40: cannot open" in broken["error"]


def test_mpiexec_of_another_mpi_is_noticed():
    started = {"PMI_RANK": "0", "PMI_FD": "9", "MPI_LOCALRANKID": "0"}
    text = "mpiexec of MPICH or Intel MPI started this rank, but Horovod is built with Open MPI (/a/libmpi.so.40.30.8)"
    assert foreign_mpiexec_error(started, ["/a/libmpi.so.40.30.8"]).startswith(text)
    assert foreign_mpiexec_error(started, ["/a/libmpi.so.12.1.8"]) == foreign_mpiexec_error(started, []) == ""
    assert foreign_mpiexec_error({"PMI_RANK": "0", "PMI_FD": "9"}, ["/a/libmpi.so.40.30.8"]) == ""  # srun's PMI-2
    for inside in ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK"):  # horovodrun or mpirun, in a shell that mpiexec started
        assert foreign_mpiexec_error({**started, inside: "0"}, ["/a/libmpi.so.40.30.8"]) == ""


@pytest.mark.parametrize("path", ["/opt/x/libmpi.so.40.30.8", "/opt/x/libmpich.so.12", "/home/my env/lib/libmpi.so.40.30.7"])
def test_mpi_library_in_a_memory_map(path):
    line = "7f57c2e00000-7f57c2e41000 r--p 00000000 fe:00 329634    "
    maps = [f"{line}/usr/lib/libc.so.6", f"{line}{path}", f"{line}/opt/x/libmpi_cxx.so.40", f"{line}[stack]"]
    assert mpi_libraries_in("\n".join(maps)) == [path]
