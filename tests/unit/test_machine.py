import os
import resource

import pytest

from hvd_vgg.doctor.system import (
    check_leftovers,
    check_limits,
    check_memory,
    check_run_dir,
    check_shared_memory,
    processor_name,
)
from hvd_vgg.parallel.cores import cpu_quota, divide_cores
from hvd_vgg.reporting.findings import FAILURE, OK, WARNING


def host_with(root, total_kb, available_kb):
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/meminfo").write_text(f"MemTotal: {total_kb} kB\nMemFree: 5 kB\nMemAvailable: {available_kb} kB\n")


def test_memory_that_ranks_share(tmp_path):
    host_with(tmp_path, 64_000_000, 60_000_000)
    assert check_memory(tmp_path, 8, 138_000_000)[0].verdict == OK
    assert check_memory(tmp_path, 32, 138_000_000)[0].verdict == WARNING
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("8000000000\n")
    (tmp_path / "sys/fs/cgroup/memory.current").write_text("1000000000\n")
    (found,) = check_memory(tmp_path, 8, 138_000_000)
    assert "8 GB in all, 7.0 GB free" in found.text
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert check_memory(tmp_path, 8, 138_000_000)[0].verdict == OK


@pytest.mark.parametrize("version", [1, 2])
def test_memory_of_a_job_in_groups_of_its_scheduler(tmp_path, version):
    """Slurm's: the limit is on the job, the processes are in steps below; most of what is used are pages of files."""
    host_with(tmp_path, 512_000_000, 480_000_000)
    (tmp_path / "proc/self").mkdir()
    line, top = ("5:cpuset,memory:", "memory/") if version == 1 else ("0::", "")
    (tmp_path / "proc/self/cgroup").write_text(f"7:devices:/elsewhere\n{line}/slurm/job_7/step_0\n")
    job = tmp_path / f"sys/fs/cgroup/{top}slurm/job_7"
    (job / "step_0").mkdir(parents=True)
    limit, used, files = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if version == 1
        else ("memory.max", "memory.current", "inactive_file")
    )
    (job / limit).write_text("64000000000\n")
    (job / used).write_text("62000000000\n")
    (job / "step_0" / limit).write_text("9223372036854771712\n" if version == 1 else "max\n")
    (found,) = check_memory(tmp_path, 8, 138_000_000)
    assert "64 GB in all, 2.0 GB free" in found.text
    (job / "memory.stat").write_text(f"anon 5\n{files} 60000000000\n")
    (found,) = check_memory(tmp_path, 8, 138_000_000)
    assert (found.verdict, found.text) == (OK, "64 GB")


@pytest.mark.parametrize(
    ("own", "launchers", "quota", "ranks", "share"),
    [
        (64, None, None, 8, 8),  # alone, or of a launcher that is not known
        (64, 64, None, 8, 8),  # not bound
        (8, 64, None, 8, 8),  # bound to cores of its own
        (32, 64, None, 8, 8),  # bound to one of two sockets, as three others are
        (8, 8, None, 8, 1),  # taskset 0-7 mpirun
        (64, 64, 16.0, 8, 2),  # docker run --cpus=16
        (8, 64, 16.0, 8, 2),
        (64, 64, None, 1, 64),
        (2, 2, 0.5, 4, 1),
        (7, 7, None, 2, 3),
    ],
)
def test_cores_are_divided_once(own, launchers, quota, ranks, share):
    assert divide_cores(own, launchers, quota, ranks) == share


def test_a_quota_of_processor_time_is_found_in_both_versions_of_control_groups(tmp_path):
    assert cpu_quota(tmp_path) is None
    first = tmp_path / "sys/fs/cgroup/cpu"
    first.mkdir(parents=True)
    (first / "cpu.cfs_quota_us").write_text("-1\n")
    (first / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu_quota(tmp_path) is None
    (first / "cpu.cfs_quota_us").write_text("250000\n")
    assert cpu_quota(tmp_path) == 2.5
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/pod/container\n")
    pod = tmp_path / "sys/fs/cgroup/pod"
    (pod / "container").mkdir(parents=True)
    (pod / "container/cpu.max").write_text("max 100000\n")
    assert cpu_quota(tmp_path) is None
    (pod / "cpu.max").write_text("400000 100000\n")
    assert cpu_quota(tmp_path) == 4.0


def test_shared_memory_that_is_missing_or_too_small(tmp_path):
    assert check_shared_memory(tmp_path, 2)[0].verdict == WARNING
    (tmp_path / "dev/shm").mkdir(parents=True)
    assert check_shared_memory(tmp_path, 2)[0].verdict == OK
    (found,) = check_shared_memory(tmp_path, 10**9)
    assert (found.verdict, "--shm-size" in found.fix) == (WARNING, True)


def test_few_open_files_are_a_warning():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
        (found,) = check_limits()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert (found.verdict, found.text) == (WARNING, "512 open files")
    assert check_limits()[0].verdict == OK


def test_a_run_directory_is_tried_and_left_as_it_was(tmp_path):
    (found,) = check_run_dir(tmp_path / "a/b", 1e6, True)
    assert found.verdict == OK
    assert f"not there yet; {tmp_path} is" in found.text
    assert list(tmp_path.iterdir()) == []
    assert check_run_dir(tmp_path, 1e18, True)[0].verdict == FAILURE
    assert check_run_dir(tmp_path, 1e18, False) == []


def test_a_run_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    assert check_run_dir(tmp_path / "file", 1, True)[0].verdict == FAILURE
    assert check_run_dir(tmp_path / "file", 1, False)[0].verdict == WARNING


def process(root, number, name, *command, parent=1):
    (root / f"proc/{number}").mkdir(parents=True)
    (root / f"proc/{number}/comm").write_text(f"{name}\n")
    (root / f"proc/{number}/cmdline").write_bytes("\0".join(command).encode() + b"\0")
    (root / f"proc/{number}/stat").write_text(f"{number} ({name}) S {parent} 1 1\n")


def test_what_other_jobs_left_is_found_and_our_own_daemon_is_not(tmp_path):
    process(tmp_path, 7, "orted", "orted")
    process(tmp_path, os.getpid(), "python", "python", "-m", "hvd_vgg", "doctor", parent=7)
    assert check_leftovers(tmp_path) == []
    process(tmp_path, 8, "orted", "orted")
    process(tmp_path, 10, "hvd-vgg", "/x/python", "/x/hvd-vgg", "train")
    process(tmp_path, 11, "vim", "vim", "train")
    (found,) = check_leftovers(tmp_path)
    assert "orted (process 8), hvd-vgg train (process 10)" in found.text


def test_a_processor_is_called_what_the_kernel_calls_it(tmp_path):
    assert processor_name(tmp_path) == ""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor\t: 0\nmodel name\t: A: 64 cores\n\nmodel name\t: another\n")
    assert processor_name(tmp_path) == "A: 64 cores"
