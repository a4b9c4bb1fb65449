"""What the environment says of ranks and what a job gets of it; whose code a process runs; pauses and limits."""

import os
import re
import subprocess
import sys

import pytest
from support import ROOT

from hvd_vgg import environment
from hvd_vgg.launcher import deadline
from hvd_vgg.launcher.deadline import Deadline
from hvd_vgg.parallel import init
from hvd_vgg.parallel.cores import threads_refusal

RANKS = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMIX_NAMESPACE", "PMI_RANK", "PMI_SIZE")
RANKS += ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_GLOO_RENDEZVOUS_ADDR", "SLURM_STEP_NUM_TASKS")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "alone", "leftover", "nested"),
    [
        ({}, True, "", ""),
        # srun --pty bash, with either form of PMI
        ({"PMIX_RANK": "0", "PMIX_NAMESPACE": "slurm", "SLURM_STEP_NUM_TASKS": "1"}, True, "", ""),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, True, "", ""),
        ({"PMI_RANK": "0", "PMI_SIZE": "2", "PMI_FD": "9"}, False, "", "PMI_RANK=0"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, False, "PMI_FD", "PMI_RANK=0"),
        ({"PMI_RANK": "0"}, False, "PMI_FD", "PMI_RANK=0"),
        # mpiexec of MPICH and Intel MPI
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "PMI_FD": "11", "MPI_LOCALRANKID": "1"}, False, "", "PMI_RANK=1"),
        ({"PMIX_RANK": "0", "SLURM_STEP_NUM_TASKS": "2", "PMIX_NAMESPACE": "1"}, False, "", "PMIX_RANK=0"),
        ({"PMIX_RANK": "0", "SLURM_STEP_NUM_TASKS": "2"}, False, "PMIX_NAMESPACE", "PMIX_RANK=0"),
        # mpirun, and what is left of it
        (
            {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "PMIX_NAMESPACE": "1"},
            False,
            "",
            "OMPI_COMM_WORLD_RANK=0",
        ),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, False, "PMIX_NAMESPACE", "OMPI_COMM_WORLD_RANK=1"),
        # horovodrun --gloo, and what is left of it
        (
            {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2", "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1"},
            False,
            "",
            "HOROVOD_RANK=1",
        ),
        ({"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2"}, False, "HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_RANK=1"),
        ({"HOROVOD_RANK": "0", "HOROVOD_SIZE": "1"}, True, "", ""),
    ],
)
def test_rank_variables(monkeypatch, variables, alone, leftover, nested):
    """Whether a process runs alone, is a rank, has leftovers of one, or would start a job on each rank."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert environment.runs_alone() == alone
    for found, expected in ((environment.leftover_error, leftover), (environment.nested_refusal, nested)):
        assert (expected in found(os.environ)) if expected else found(os.environ) == ""


def test_rank_variables_of_mpich(monkeypatch):
    """As `mpiexec -n 4 -ppn 2` of MPICH 5 sets them on the second host."""
    for name, value in {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1"}.items():
        monkeypatch.setenv(name, value)
    assert (environment.launched_rank(), environment.launched_size()) == (3, 4)
    assert (environment.launched_local_rank(), environment.launched_local_size()) == (1, 2)
    assert environment.environment_of_job(os.environ).keys() & {"PMI_RANK", "MPI_LOCALRANKID"} == set()


def test_environment_of_job_loses_ranks_and_empty_path_entries():
    """Whatever else there is stays."""
    rank = {"PMI_FD": "9", "PMIX_RANK": "0", "HOROVOD_RANK": "0", "HOROVOD_LOCAL_SIZE": "1", "HOROVOD_GLOO_IFACE": "lo"}
    kept = {
        "PMIX_MCA_gds": "hash",
        "HOROVOD_CYCLE_TIME": "1",
        "OMPI_MCA_btl": "self,tcp",
        "HOME": "/root",
        "SLURM_JOB_ID": "1",
    }
    found = environment.environment_of_job({**rank, **kept, "PYTHONPATH": ":/a::.:/b:"})
    assert found == {**kept, "PYTHONPATH": "/a:.:/b"}


def test_environment_of_job_has_a_home(monkeypatch):
    """Open MPI ends by signal 11 without one, for a user whom /etc/passwd does not know."""
    monkeypatch.setattr(os, "getuid", lambda: 987654)
    monkeypatch.delenv("HOME")
    assert environment.environment_of_job({})["HOME"] == "/"
    monkeypatch.undo()
    assert "HOME" not in environment.environment_of_job({})  # /etc/passwd has it


@pytest.mark.parametrize(
    ("name", "compared"),
    [
        *((name, True) for name in ("TF_ENABLE_ONEDNN_OPTS", "XLA_FLAGS", "TF_XLA_FLAGS", "HOROVOD_FUSION_THRESHOLD")),
        *((name, True) for name in ("TF_DETERMINISTIC_OPS", "NVIDIA_TF32_OVERRIDE", "HOROVOD_HIERARCHICAL_ALLREDUCE")),
        *((name, False) for name in ("TF_CONFIG", "HOROVOD_RANK", "HOROVOD_TIMELINE", "TF_CPP_MIN_LOG_LEVEL", "NCCL_DEBUG")),
        *((name, False) for name in ("HOROVOD_JOB_SERVICE_HOST", "TF_JOB_WORKER_0_PORT_2222_TCP_ADDR", "TF_BOARD_PORT")),
        *(
            (name, False)
            for name in ("TF_NUM_INTEROP_THREADS", "HOROVOD_AUTOTUNE_LOG", "HOROVOD_SECRET_KEY", "SLURM_JOB_ID")
        ),
    ],
)
def test_variables_compared_between_ranks(monkeypatch, name, compared):
    """What changes what is computed is; what says which rank, host or service there is may differ."""
    monkeypatch.setenv(name, "x")
    assert (name in init.compared_environment()) == compared


# ---- whose code runs


def shadowed(folder):
    """Puts modules of Python's own names into a folder, each of which ends the process."""
    for name in ("queue", "logging", "random", "statistics", "socket", "tempfile", "psutil"):
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the user ran')\n")


@pytest.mark.parametrize("program", [["-m", "hvd_vgg"], [str(ROOT / "hvd_vgg" / "__main__.py")]])
def test_commands_import_nothing_of_the_current_directory(tmp_path, program):
    """By the module's name or by its path; another hvd_vgg elsewhere on the search path is not run either."""
    shadowed(tmp_path)
    command = [sys.executable, *program, "plan", "--ranks=2"]
    found = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")
    other = tmp_path / "other"
    (other / "hvd_vgg").mkdir(parents=True)
    (other / "hvd_vgg" / "__init__.py").write_text("raise SystemExit('another hvd_vgg')\n")
    if program[0] != "-m":
        environ = {"PYTHONPATH": str(other)}
        found = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
        assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.parametrize("start", ["hvd_vgg.__main__", "hvd_vgg.environment"])
def test_console_script_passes_over_an_empty_entry(tmp_path, start):
    """PYTHONPATH=:/x leads to the current directory; the programs that `launch` starts by text pass over it too."""
    shadowed(tmp_path)
    script = tmp_path / "bin" / "program"
    script.parent.mkdir()
    text = {  # as pip writes it
        "hvd_vgg.__main__": "import sys\nfrom hvd_vgg.__main__ import main\nsys.argv[1:] = ['plan']\nmain()\n",
        "hvd_vgg.environment": "import os, subprocess, hvd_vgg.__main__\nfrom hvd_vgg.environment import *\n"
        "subprocess.run(python_program('import queue'), check=True, env=environment_of_job(os.environ))\n",
    }
    script.write_text(text[start])
    environ = {"PYTHONPATH": f":{ROOT}"}
    found = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")


def test_launch_in_a_clone_starts_the_package_of_the_clone():
    """python -m hvd_vgg finds the package in the current directory, and so do the ranks."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "hvd_vgg", "launch", "--ranks=1", "--dry_run", "train"]
    shown = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True)
    assert f" {ROOT / 'hvd_vgg' / '__main__.py'} train " in shown.stdout


@pytest.mark.parametrize("command", [["launch", "--ranks=1", "--", "true"], ["train"]])
def test_python_without_docstrings_is_refused(command):
    """TensorFlow 2.16 reads its own docstrings."""
    environ = {**os.environ, "PYTHONOPTIMIZE": "2"}
    found = subprocess.run(
        [sys.executable, "-m", "hvd_vgg", *command], env=environ, cwd=ROOT, capture_output=True, text=True
    )
    assert (found.returncode, found.stdout) == (78, "")
    assert "PYTHONOPTIMIZE=2 or python -OO leaves out" in found.stderr


def test_not_importable_holds_within():
    """What is loaded stays, and what could be imported before it can be after it."""
    text = """
import sys
import decimal
from hvd_vgg.environment import not_importable
try:
    with not_importable("decimal", "fractions"):
        import decimal
        import fractions
except ModuleNotFoundError as error:
    import fractions
    print(error.name)
"""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.check_output([sys.executable, "-c", text], text=True, env=environ) == "fractions\n"


def test_commands_load_neither_matplotlib_nor_scipy(tmp_path):
    """TensorFlow and Keras would, where they are installed, as here. Which Keras other programs use does not matter."""
    words = [sys.executable, "-X", "importtime", "-m", "hvd_vgg", "evaluate", f"--data_dir={tmp_path / 'none'}"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "KERAS_BACKEND": "torch", "TF_USE_LEGACY_KERAS": "1"}
    ended = subprocess.run(words, env=environ, capture_output=True, text=True)
    assert ended.returncode == 65
    # Of packages that are not found there is a line too, but none of what is in them.
    assert set(re.findall(r"\| +(horovod|matplotlib|scipy)\.\w+\.\w+$", ended.stderr, re.M)) == {"horovod"}


def test_python_program_imports_nothing_of_the_current_directory(tmp_path):
    """What doctor and the launcher ask other processes."""
    shadowed(tmp_path)
    command = environment.python_program("import queue, concurrent.futures.thread, sys; print(*sys.argv[1:])")
    assert subprocess.run([*command, "a", "b"], cwd=tmp_path, capture_output=True, text=True).stdout == "a b\n"


@pytest.mark.parametrize(("path", "stays"), [(":/a", False), ("/a:", False), ("/a", True), (".:", True), ("", True)])
def test_empty_entry_of_pythonpath_is_passed_over(tmp_path, monkeypatch, path, stays):
    """Python takes it for the current directory, and so does nobody else; a dot is meant."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setattr(sys, "path", ["/x", str(tmp_path), "/y"])
    environment.leave_out_current_directory()
    assert sys.path == (["/x", str(tmp_path), "/y"] if stays else ["/x", "/y"])


def test_output_beyond_the_locale_is_escaped():
    """Where stdout is GBK, as under zh_CN.GBK, a name may have what GBK lacks."""
    words = [sys.executable, "-m", "hvd_vgg", "launch", "--ranks=1", "--dry_run", "--", "echo", "\u6570\U0001f600"]
    environ = {**os.environ, "PYTHONIOENCODING": "gbk:strict", "PYTHONUTF8": "1"}
    found = subprocess.run(words, env=environ, cwd=ROOT, capture_output=True)
    assert (found.returncode, found.stderr) == (0, b"")
    assert "\u6570".encode("gbk") + rb"\U0001f600" in found.stdout


# ---- pauses, limits


def test_deadline_does_not_count_a_pause(monkeypatch):
    """A process that was stopped between two looks has a second less, not as much as it was stopped."""
    now = 100.0
    monkeypatch.setattr(deadline.time, "monotonic", lambda: now)
    limit = Deadline(3.0)
    now = 100.9
    assert not limit.passed()
    now = 5000.0
    assert not limit.passed()
    now = 5000.9
    assert not limit.passed()
    now = 5001.1
    assert limit.passed()


@pytest.mark.parametrize(
    ("most", "ranks", "refused"), [("12", 1, True), ("100000", 1, False), ("max", 9, False), ("60", 9, True)]
)
def test_threads_beyond_a_control_group_are_refused(tmp_path, most, ranks, refused):
    """As of docker run --pids-limit; the message has the file, the limit and what to do."""
    group = tmp_path / "sys/fs/cgroup/pids"
    group.mkdir(parents=True)
    (group / "pids.max").write_text(most)
    (group / "pids.current").write_text("4")
    text = threads_refusal(tmp_path, ranks)
    assert bool(text) == refused
    assert not refused or (
        f"pids/pids.max is {most}, which leaves room for {int(most) - 4} more" in text and "raise it" in text
    )
