"""What a process runs: the code and version of this package, other packages, and selected environment variables."""

import contextlib
import functools
import hashlib
import os
import re
import sys
import time
from pathlib import Path
from typing import Any, Dict, Optional

from hvd_vgg import __version__
from hvd_vgg.environment import JOB_PARAMETER, NO_RUN

# The only variables that are recorded: numbers and device names that affect speed or rounding.
_ENVIRONMENT = (
    "COREX_VISIBLE_DEVICES",
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
# oneDNN and Eigen choose their kernels by these.
_INSTRUCTION_SETS = (
    *("avx", "avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_int8", "amx_bf16", "amx_fp16"),
)
_PACKAGES = ("absl", "crc32c", "cv2", "dllogger", "horovod", "mpi4py", "numpy", "PIL", "safetensors", "tensorflow")


def describe_process() -> Dict[str, Any]:
    """Returns what this rank runs: `code`, `packages`, a part of `environment`, and whether `hvd-vgg launch` supervises it.

    `launched` then is true, and `job` is the launcher's name for this attempt, which restarts.jsonl has too.
    And when: `process_seconds`, for how long it has been running, and `boot`, the id of the kernel's boot and the seconds
    since then: unlike a host's clock nobody sets them.
    """
    job = os.environ.get(f"OMPI_MCA_{JOB_PARAMETER}")
    if job is not None and job.startswith(NO_RUN):
        job = None
    versions = {name: getattr(sys.modules.get(name), "__version__", None) for name in _PACKAGES}
    return {
        "code": code_fingerprint(),
        "packages": {"python": sys.version.split()[0], **{name: version for name, version in versions.items() if version}},
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        "launched": job is not None,
        "job": job,
        "process_seconds": round(_process_seconds(), 2),
        "boot": {"id": _boot_id(), "seconds": time.clock_gettime(time.CLOCK_BOOTTIME)},
    }


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


def _process_seconds() -> float:
    """Returns how long ago this process was started, whatever became of the host's clock since then; 0 if it is unknown."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # from boot to the start
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    return 0.0


def processor_name(root: Path) -> str:
    """Returns the model name of the host's first processor; "" if the kernel does not give one."""
    return _of_first_processor(root, "model name")


def instruction_sets(root: Path) -> str:
    """Returns which of the instructions that decide what a CPU's kernels compute the first processor has."""
    have = _of_first_processor(root, "flags").split()
    return " ".join(name for name in _INSTRUCTION_SETS if name in have)


def _of_first_processor(root: Path, field: str) -> str:
    """Returns a field of /proc/cpuinfo; "" if the kernel does not give it."""
    with contextlib.suppress(OSError):
        found = re.search(rf"^{field}\s*:\s*(.*)$", (root / "proc/cpuinfo").read_text(errors="replace"), re.MULTILINE)
        return found[1] if found else ""
    return ""


@functools.lru_cache(maxsize=1)
def code_fingerprint() -> Dict[str, Any]:
    """Returns the package's version, a SHA-256 over the names and contents of its .py files, and its git commit or None."""
    package, digest = Path(__file__).resolve().parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return {"version": __version__, "sha256": digest.hexdigest(), "commit": _git_commit(package.parent / ".git")}


def _git_commit(git: Path) -> Optional[str]:
    """Returns the commit that a clone has checked out, without starting git: forking once MPI runs may harm it.

    None where the package is installed without its repository, or in a worktree of it: the SHA-256 identifies the code.
    (A reflog has it too, but those expire, and may be switched off.)
    """
    with contextlib.suppress(OSError, IndexError, UnicodeDecodeError):  # a repository may be damaged
        head = (git / "HEAD").read_text().split()[-1]  # a commit, or the ref of a branch
        if not head.startswith("refs/"):
            return head
        if (git / head).exists():
            return (git / head).read_text().strip()
        lines = (git / "packed-refs").read_text().splitlines()
        return next((line.split()[0] for line in lines if line.endswith(f" {head}")), None)
    return None
