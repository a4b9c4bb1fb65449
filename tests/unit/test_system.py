import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from hvd_vgg.doctor.system import (
    check_limits,
    check_memory,
    check_other_jobs,
    check_run_dir,
    check_shared_memory,
    memory_within_limits,
)
from hvd_vgg.provenance import processor_name
from hvd_vgg.reporting.findings import FAILURE, OK, WARNING

GB = 1e9


def test_memory_is_shared_by_ranks():
    assert check_memory(64 * GB, 60 * GB, 8, 138_000_000, 4).verdict == OK
    found = check_memory(64 * GB, 60 * GB, 32, 138_000_000, 4)
    assert found.verdict == WARNING
    assert found.text == "64 GB, 60.0 GB available; 32 ranks need 102.7 GB plus activations"


def simulate_memory(monkeypatch, total, available):
    """Makes the host have so many GB."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=total * GB, available=available * GB))


def test_memory_of_a_container(tmp_path, monkeypatch):
    total, _ = memory_within_limits(tmp_path)
    assert total == psutil.virtual_memory().total
    simulate_memory(monkeypatch, 64, 60)
    assert memory_within_limits(tmp_path) == (64 * GB, 60 * GB)
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("8000000000\n")
    (tmp_path / "sys/fs/cgroup/memory.current").write_text("1000000000\n")
    assert memory_within_limits(tmp_path) == (8 * GB, 7 * GB)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert memory_within_limits(tmp_path) == (64 * GB, 60 * GB)


@pytest.mark.parametrize("version", [1, 2])
def test_memory_of_a_job_of_slurm(tmp_path, monkeypatch, version):
    """The limit is on the job, the processes are in steps below it; most of what is used are cached pages of files."""
    simulate_memory(monkeypatch, 512, 480)
    (tmp_path / "proc/self").mkdir(parents=True)
    line, top = ("5:cpuset,memory:", "memory/") if version == 1 else ("0::", "")
    (tmp_path / "proc/self/cgroup").write_text(f"7:devices:/elsewhere\n{line}/slurm/job_7/step_0\n")
    job = tmp_path / f"sys/fs/cgroup/{top}slurm/job_7"
    (job / "step_0").mkdir(parents=True)
    limit, used = ("limit_in_bytes", "usage_in_bytes") if version == 1 else ("max", "current")
    (job / f"memory.{limit}").write_text("64000000000\n")
    (job / f"memory.{used}").write_text("62000000000\n")
    (job / f"step_0/memory.{limit}").write_text("9223372036854771712\n" if version == 1 else "max\n")
    assert memory_within_limits(tmp_path) == (64 * GB, 2 * GB)
    total = "total_inactive_file 60000000000\n" if version == 1 else ""
    (job / "memory.stat").write_text(f"anon 5\ninactive_file {5 if total else 60000000000}\n{total}")
    assert memory_within_limits(tmp_path) == (64 * GB, 62 * GB)


def test_shared_memory_missing_or_small(tmp_path):
    assert check_shared_memory(tmp_path, 2).verdict == WARNING
    (tmp_path / "dev/shm").mkdir(parents=True)
    assert check_shared_memory(tmp_path, 2).verdict == OK
    found = check_shared_memory(tmp_path, 10**9)
    assert (found.verdict, "--shm-size" in found.fix) == (WARNING, True)


def test_limits_few_open_files():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
        found = next(check_limits(Path("/"), 1))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert (found.verdict, found.text) == (WARNING, "512 open files")
    assert next(check_limits(Path("/"), 1)).verdict == OK


def test_run_dir_is_tried_and_left_as_it_was(tmp_path):
    (found,) = check_run_dir(tmp_path / "a/b", 1e6, True)
    assert found.verdict == OK
    assert f"not created yet; {tmp_path} exists" in found.text
    assert list(tmp_path.iterdir()) == []
    assert check_run_dir(tmp_path, 1e18, True)[0].verdict == FAILURE
    assert check_run_dir(tmp_path, 1e18, False) == []


def test_run_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    assert check_run_dir(tmp_path / "file", 1, True)[0].verdict == FAILURE
    assert check_run_dir(tmp_path / "file", 1, False)[0].verdict == WARNING


def test_other_jobs_are_found_but_not_own_daemon(tmp_path):
    """`sh` and `tail` stand in for Open MPI's daemon and for ranks; a daemon that asks through a child is its own."""
    (tmp_path / "train").touch()
    daemon = shutil.copy("/bin/sh", tmp_path / "orted")
    started = [subprocess.Popen([daemon, "-c", "read line"], stdin=subprocess.PIPE)]
    for name in ("/x/hvd-vgg", "vim"):
        started.append(subprocess.Popen([name, "train", "-f"], executable=shutil.which("tail"), cwd=tmp_path))
    code = "from hvd_vgg.doctor.system import check_other_jobs; print(check_other_jobs())"
    try:
        orted, train, vim = (process.pid for process in started)
        (found,) = check_other_jobs()
        assert found.verdict == WARNING
        assert f"orted (process {orted})" in found.text
        assert f"hvd-vgg train (process {train})" in found.text
        assert f"(process {vim})" not in found.text
        asked = [daemon, "-c", 'echo $$; "$1" -c "$2"; true', "orted", sys.executable, code]
        own, jobs = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
        assert f"orted (process {orted})" in jobs
        assert f"orted (process {own})" not in jobs
    finally:
        for process in started:
            process.kill()
            process.communicate()


def test_processor_name_is_the_kernels(tmp_path):
    assert processor_name(tmp_path) == ""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor\t: 0\nmodel name\t: A: 64 cores\n\nmodel name\t: another\n")
    assert processor_name(tmp_path) == "A: 64 cores"
