"""What a process runs: the package's code and version, its packages, and selected environment variables."""

import hashlib
import os
import re
import sys
from pathlib import Path
from typing import Any, Dict, Optional

from hvd_vgg import __version__
from hvd_vgg.environment import JOB_PARAMETER

# What may be copied of the environment: numbers and names of devices that decide speed or rounding. Nothing else is.
_ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES",
    "HOROVOD_CYCLE_TIME",
    "HOROVOD_FUSION_THRESHOLD",
    "OMPI_MCA_btl_tcp_rdma_pipeline_frag_size",
    "OMP_NUM_THREADS",
    "TF_CUDNN_DETERMINISTIC",
    "TF_DETERMINISTIC_OPS",
    "TF_ENABLE_ONEDNN_OPTS",
    "TF_GPU_ALLOCATOR",
    "TF_NUM_INTEROP_THREADS",
    "TF_NUM_INTRAOP_THREADS",
)
_LAUNCHED = f"OMPI_MCA_{JOB_PARAMETER}"  # what mpirun gives to the ranks of `hvd-vgg launch`
_PACKAGES = ("absl", "crc32c", "cv2", "dllogger", "horovod", "mpi4py", "numpy", "safetensors", "tensorflow")


def describe_process() -> Dict[str, Any]:
    """Returns what a start is made of on this rank: code, packages, and what the allow-list has of the environment."""
    versions = {name: getattr(sys.modules.get(name), "__version__", None) for name in _PACKAGES}
    return {
        "code": code_fingerprint(),
        "packages": {"python": sys.version.split()[0], **{name: version for name, version in versions.items() if version}},
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        "launched": _LAUNCHED in os.environ,
    }


def code_fingerprint() -> Dict[str, Any]:
    """Returns the package's version, a SHA-256 over the names and contents of its .py files, and its git commit or None."""
    package, digest = Path(__file__).resolve().parent.parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return {"version": __version__, "sha256": digest.hexdigest(), "commit": _git_commit(package.parent / ".git")}


def _git_commit(git: Path) -> Optional[str]:
    """Returns the commit that is checked out, read without starting git: forking after MPI has begun may harm it."""
    try:
        if git.is_file():  # a worktree's
            git = Path(git.read_text().split("gitdir:", 1)[1].strip())
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        common = git / (git / "commondir").read_text().strip() if (git / "commondir").exists() else git
        name = head[len("ref: ") :]
        for place in (git, common):
            if (place / name).exists():
                return (place / name).read_text().strip()
        packed = re.search(rf"^([0-9a-f]{{40,64}}) {re.escape(name)}$", (common / "packed-refs").read_text(), re.M)
        return packed.group(1) if packed else None
    except (OSError, IndexError, UnicodeDecodeError):
        return None
