import os

from hvd_vgg import provenance


def test_code_fingerprint_commit_of_a_clone(tmp_path):
    """Of a branch, loose or packed, and detached; none without a repository."""
    git, commit = tmp_path / ".git", "a" * 40
    git.mkdir()
    assert provenance._git_commit(git) is None
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "packed-refs").write_text(f"# pack-refs\n{'b' * 40} refs/heads/main2\n{commit} refs/heads/main\n")
    assert provenance._git_commit(git) == commit
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "refs" / "heads" / "main").write_text("c" * 40 + "\n")
    assert provenance._git_commit(git) == "c" * 40
    (git / "HEAD").write_text(commit + "\n")
    assert provenance._git_commit(git) == commit


def test_describe_process_lists_allowed_variables_only(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("SECRET_TOKEN", "x")
    found = provenance.describe_process()["environment"]
    assert found.items() <= os.environ.items()
    assert "SECRET_TOKEN" not in found and found["OMP_NUM_THREADS"] == "3"
