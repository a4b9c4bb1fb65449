"""What people's machines have set, lack and hold: variables, home directories, modules, libraries, limits (F43)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from oracles import log_rows
from support import BIN, ROOT, TINY, Started, command_line, full

COMMAND = [sys.executable, "-m", "hvd_vgg"]
# As in a shell that another allocation has left behind, of all schedulers whose variables Open MPI reads.
SCHEDULERS = {
    **dict.fromkeys(("SLURM_JOBID", "SLURM_JOB_ID", "JOB_ID", "PBS_JOBID", "LSB_JOBID", "LOADL_PID"), "1"),
    "SLURM_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_TASKS_PER_NODE": "8(x2)",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS": "16",
    "LSB_HOSTS": "gpu07 gpu08",
    "NSLOTS": "16",
    "ARC": "lx-amd64",
}


def tiny(data, out):
    """Returns the flags of a run of two updates."""
    return ["train", f"--data_dir={data}", f"--run_dir={out / 'run'}", *TINY, "--steps=2"]


def programs_without(folder, *left_out, **added):
    """Returns a PATH with all programs but some, and with scripts of given text in the place of others."""
    folder.mkdir()
    for name, text in added.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    for program in (*Path("/bin").iterdir(), *Path("/usr/bin").iterdir()):
        if program.name not in left_out and not (folder / program.name).exists():
            (folder / program.name).symlink_to(program)
    return f"{BIN}{os.pathsep}{folder}"


@pytest.mark.fault("F43")
def test_launch_in_a_shell_of_everything(tmp_path, data):
    """Variables of schedulers and profiles, no ssh, no temporary directory, modules in the current directory: as without."""
    (tmp_path / "hosts").write_text("gpu07 8 all.q@gpu07 UNDEFINED\n")
    called = f'#!/bin/sh\necho "$0" >> {tmp_path}/called\nexit 1\n'
    path = programs_without(tmp_path / "bin", "ssh", "rsh", srun=called, qrsh=called, blaunch=called)
    (tmp_path / "horovod").mkdir()
    (tmp_path / "horovod" / "__init__.py").touch()
    for name in ("queue", "horovod/tensorflow", "psutil", "tempfile", "absl"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the current directory ran')\n")
    environment = {
        **SCHEDULERS,
        **dict.fromkeys(("SGE_ROOT", "PE_HOSTFILE", "PBS_NODEFILE", "LSB_DJOB_HOSTFILE"), str(tmp_path / "hosts")),
        "TMPDIR": "/nonexistent",
        "LC_ALL": "zh_CN.GBK",
        "CONDA_PREFIX": "/opt/conda",
        "PYTHONPATH": f":{ROOT}:/nowhere:",
        "PYTHONOPTIMIZE": "1",
        "PYTHONNOUSERSITE": "1",
        "PYTHONSTARTUP": "/nowhere",
        "PMI_RANK": "0",
        "PMI_SIZE": "1",
        "TF_DETERMINISTIC_OPS": "1",
        "TF_NUM_INTEROP_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "x",
        "TF_CONFIG": "{",
        "OMP_NUM_THREADS": "1",
        "KMP_AFFINITY": "compact",
        "HOROVOD_CYCLE_TIME": "x",
        "HOROVOD_FUSION_THRESHOLD": "0",
    }
    command = [sys.executable, str(ROOT / "hvd_vgg" / "__main__.py"), "launch", "--ranks=2", *tiny(data, tmp_path)]
    ended = Started(command, tmp_path, PATH=path, **environment).wait(code=0)
    assert not (tmp_path / "called").exists()
    assert "on 2 ranks" in ended.out and "Traceback" not in ended.err


@pytest.mark.fault("F43", tier=3)
@pytest.mark.parametrize(
    "variable",
    [
        *("TF_CONFIG={}", "TF_ENABLE_ONEDNN_OPTS=0", "TF_CUDNN_DETERMINISTIC=1", "TF_FORCE_GPU_ALLOW_GROWTH=false"),
        *("TF_XLA_FLAGS=--tf_xla_auto_jit=2", "TF2_BEHAVIOR=0", "TF_USE_LEGACY_KERAS=1", "TF_NUM_INTRAOP_THREADS=x"),
        *("HOROVOD_AUTOTUNE=1", "HOROVOD_HIERARCHICAL_ALLREDUCE=1", "HOROVOD_HIERARCHICAL_ALLGATHER=1", "HOROVOD_SIZE=7"),
        *("HOROVOD_TIMELINE=/nowhere/x.json", "HOROVOD_STALL_CHECK_DISABLE=1", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS=1"),
        *("HOROVOD_CPU_OPERATIONS=mpi", "HOROVOD_CPU_OPERATIONS=ccl", "HOROVOD_LOG_LEVEL=x", "HOROVOD_ELASTIC=1"),
        *("HOROVOD_CACHE_CAPACITY=0", "HOROVOD_THREAD_AFFINITY=0,1", "HOROVOD_DISABLE_GROUP_FUSION=1", "NCCL_DEBUG=INFO"),
        *(
            "PYTHONDEVMODE=1",
            "PYTHONUTF8=1",
            "PYTHONIOENCODING=ascii",
            "PYTHONWARNINGS=error",
            "OMP_PROC_BIND=true",
        ),
    ],
)
def test_variable_changes_no_run(tmp_path, data, variable, plain_losses):
    """One by one, on ranks of the launcher."""
    name, _, value = variable.partition("=")
    words = [*COMMAND, "launch", "--ranks=2", "--max_restarts=0", *tiny(data, tmp_path)]
    ended = Started(words, tmp_path, **{"PYTHONPATH": str(ROOT), name: value}).wait(code=0)
    assert "Traceback" not in ended.err
    # oneDNN and XLA are other kernels, with other rounding.
    tolerance = 1e-4 if name in ("TF_ENABLE_ONEDNN_OPTS", "TF_XLA_FLAGS") else 0
    assert losses_of(tmp_path / "run") == pytest.approx(plain_losses, rel=tolerance, abs=0)


def losses_of(run_dir):
    """Returns the loss of each update of a run."""
    return [loss for row in log_rows(run_dir) for loss in row["data"].get("train.losses", [])]


@pytest.fixture(scope="module")
def plain_losses(tmp_path_factory, data):
    """Of the run of `tiny` without any variable, on one rank."""
    folder = tmp_path_factory.mktemp("plain")
    Started([*COMMAND, *tiny(data, folder)], folder, PYTHONPATH=str(ROOT)).wait(code=0)
    return losses_of(folder / "run")


@pytest.mark.fault("F43", tier=3)
def test_tf_config_of_each_rank_is_its_own(tmp_path, data):
    """As operators for jobs of TensorFlow set it; and a service that is younger than one of the pods."""
    script = tmp_path / "rank.sh"
    task = '{"task": {"type": "worker", "index": \'$OMPI_COMM_WORLD_RANK\'}}'
    script.write_text(f"export TF_CONFIG='{task}' TF_JOB_${{OMPI_COMM_WORLD_RANK}}_SERVICE_HOST=10.0.0.1\nexec \"$@\"\n")
    words = command_line(2, tiny(data, tmp_path), ["bash", str(script), *COMMAND])
    Started(words, tmp_path, PYTHONPATH=str(ROOT)).wait(code=0)


@pytest.mark.fault("F43")
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"HOROVOD_CONTROLLER": "gloo"}, "HOROVOD_CONTROLLER=gloo ends all ranks of mpirun"),
        *full(
            ({"HOROVOD_CONTROLLER": "x"}, "HOROVOD_CONTROLLER=x aborts Horovod"),
            ({"HOROVOD_CPU_OPERATIONS": "gloo"}, "HOROVOD_CPU_OPERATIONS=gloo ends all ranks"),
        ),
    ],
)
def test_variable_that_cannot_work_is_named(tmp_path, data, variables, message):
    """78 before MPI is initialised."""
    words = [*COMMAND, "launch", "--ranks=2", *tiny(data, tmp_path)]
    ended = Started(words, tmp_path, PYTHONPATH=str(ROOT), **variables).wait(code=78)
    assert message in ended.err and "Traceback" not in ended.err


@pytest.mark.fault("F43", tier=3)
@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD", "HOROVOD"])
@pytest.mark.parametrize("command", ["train", "doctor"])
def test_leftovers_of_a_launcher_are_named(tmp_path, data, name, command):
    """78, where Open MPI would abort the process."""
    words = [*COMMAND, command, *tiny(data, tmp_path)[1:]]
    leftovers = {f"{name}_RANK": "0", f"{name}_SIZE": "2", "PYTHONPATH": str(ROOT)}
    ended = Started(words, tmp_path, **leftovers).wait(code=78)
    assert f"{name}_RANK=0 is a leftover of a job" in ended.out + ended.err


@pytest.mark.fault("F43", tier=3)
def test_only_task_of_a_scheduler_trains_alone(tmp_path, data):
    """As in a shell of `srun --pty bash`, whose PMIx server serves no MPI here."""
    task = {"PMIX_RANK": "0", "PMIX_NAMESPACE": "slurm.pmix.1.0", "PMIX_SERVER_URI2": "x", "SLURM_STEP_NUM_TASKS": "1"}
    Started([*COMMAND, *tiny(data, tmp_path)], tmp_path, PYTHONPATH=str(ROOT), **task).wait(code=0)


@pytest.mark.fault("F43")
def test_launcher_on_ranks_of_a_launcher_is_refused(tmp_path):
    """Each rank would start a job."""
    words = command_line(1, ["launch", "--ranks=2", "--", "true"])
    ended = Started(words, tmp_path, PYTHONPATH=str(ROOT)).wait(code=78)
    assert "OMPI_COMM_WORLD_RANK=0 in the environment: this is a rank of a job" in ended.err


@pytest.mark.fault("F43")
def test_launch_without_home_and_passwd_entry(tmp_path):
    """As in a container that is started with any user's number."""
    words = ["unshare", "--user", "--map-user=987654", "--map-group=0", "env", "-u", "HOME"]
    tried = subprocess.run([*words, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"capability: another user ({tried.stderr.strip()})")
    ended = Started([*words, *COMMAND, "launch", "--ranks=1", "--", "id", "-u"], tmp_path, PYTHONPATH=str(ROOT)).wait(code=0)
    assert "\n987654\n" in ended.out


@pytest.mark.fault("F43")
@pytest.mark.parametrize(
    ("library", "message"),
    [("libmpi.so.40", "Horovod cannot be imported"), *full(("libstdc++.so.6", "a module cannot be loaded"))],
)
def test_library_of_another_kind_first_is_named(tmp_path, data, library, message):
    """As after `module load` or with conda; an empty file stands for it."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / library).touch()
    words = [*COMMAND, *tiny(data, tmp_path)]
    ended = Started(words, tmp_path, PYTHONPATH=str(ROOT), LD_LIBRARY_PATH=str(tmp_path / "lib")).wait(code=78)
    assert message in ended.err and f"{tmp_path / 'lib' / library}: file too short" in ended.err
    assert "LD_LIBRARY_PATH=" in ended.err and "Traceback" not in ended.err


@pytest.mark.fault("F43")
@pytest.mark.parametrize(
    ("command", "most"), [(["launch", "--ranks=2"], 12), *full(([], 12), (["launch", "--ranks=2"], 45))]
)
def test_limit_of_threads_is_named(tmp_path, data, command, most):
    """As of docker run --pids-limit: 78 with the limit, before TensorFlow aborts."""
    group = Path("/sys/fs/cgroup/pids") / f"hvgg{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"capability: pids cgroup: {error!r}")
    try:
        (group / "pids.max").write_text(str(most))
        join = ["bash", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "_"]
        words = [*join, *COMMAND, *command, *tiny(data, tmp_path)]
        ended = Started(words, tmp_path, PYTHONPATH=str(ROOT)).wait(code=78)
    finally:
        group.rmdir()
    assert f"{group}/pids.max is {most}" in ended.err and "Traceback" not in ended.err


@pytest.mark.fault("F43", tier=3)
def test_run_in_a_gbk_locale(tmp_path, data):
    """All files are where the name in GBK leads to, TensorBoard's too."""
    if not shutil.which("localedef"):
        pytest.skip("capability: making a locale: no localedef")
    if subprocess.run(["localedef", "-i", "zh_CN", "-f", "GBK", str(tmp_path / "zh_CN.GBK")]).returncode:
        pytest.skip("capability: making a locale: no charmap")
    name = os.fsencode(tmp_path) + b"/" + "\u6570\u636e".encode("gbk")
    os.mkdir(name)  # noqa: PTH102 (bytes)
    locale = {"LOCPATH": str(tmp_path), "LC_ALL": "zh_CN.GBK", "PYTHONPATH": str(ROOT)}
    flags = [os.fsencode(flag) for flag in tiny(data, tmp_path)]
    words = [*map(os.fsencode, COMMAND), *flags, b"--run_dir=" + name]
    Started(words, tmp_path, **locale).wait(code=0)
    assert {b"tensorboard", b"result.json", b"checkpoints"} <= set(os.listdir(name))  # noqa: PTH208 (bytes)


@pytest.mark.fault("F43", tier=3)
def test_run_in_a_directory_whose_name_is_no_text(tmp_path, data):
    """Bytes that are not UTF-8, in the current directory and in a variable."""
    place = os.fsencode(tmp_path) + b"/a\xff"
    os.mkdir(place)  # noqa: PTH102 (bytes)
    words = ["bash", "-c", f'cd {tmp_path}/a?; exec "$@"', "_", *COMMAND, "launch", "--ranks=2", *tiny(data, tmp_path)]
    Started([*words, "--run_dir=run"], tmp_path, PYTHONPATH=str(ROOT), TF_X=os.fsdecode(b"\xff")).wait(code=0)
    assert b"result.json" in os.listdir(place + b"/run")  # noqa: PTH208 (bytes)
