import os
import subprocess

import pytest

from hvd_vgg import provenance
from hvd_vgg.environment import JOB_PARAMETER, NO_RUN
from hvd_vgg.launcher.jobs import own_token


def test_code_fingerprint_commit_of_a_clone(tmp_path):
    """As `git rev-parse` has it, of a branch and detached; none without a repository."""

    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.invalid"]
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert provenance._git_commit(tmp_path / ".git") is None
    git("init")
    assert provenance._git_commit(tmp_path / ".git") is None
    for words in (["commit"], ["commit", "--amend"]):
        git(*words, "--allow-empty", "--allow-empty-message", "-m", " ".join(words))
        assert provenance._git_commit(tmp_path / ".git") == git("rev-parse", "HEAD")
    git("gc")  # which packs the branch
    assert provenance._git_commit(tmp_path / ".git") == git("rev-parse", "HEAD")
    git("checkout", "--detach", "HEAD@{1}")
    assert provenance._git_commit(tmp_path / ".git") == git("rev-parse", "HEAD")


@pytest.mark.parametrize(("token", "launched"), [(own_token("0123456789abcdef"), True), (own_token(f"{NO_RUN}12"), False)])
def test_describe_process_job_is_one_that_restarts_are_noted_of(monkeypatch, token, launched):
    """Not where `launch -- PROGRAM` started what trains: its launcher writes no restarts.jsonl."""
    monkeypatch.setenv(f"OMPI_MCA_{JOB_PARAMETER}", f"{token}.0")
    found = provenance.describe_process()
    assert (found["launched"], found["job"]) == (launched, f"{token}.0" if launched else None)


def test_describe_process_lists_allowed_variables_only(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("SECRET_TOKEN", "x")
    found = provenance.describe_process()["environment"]
    assert found.items() <= os.environ.items()
    assert "SECRET_TOKEN" not in found and found["OMP_NUM_THREADS"] == "3"
