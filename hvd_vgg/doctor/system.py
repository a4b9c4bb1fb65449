"""What this host gives its ranks: memory, shared memory, limits, disk space; and what other jobs left running on it."""

import contextlib
import os
import re
import resource
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Iterator, List, Mapping, Optional, Sequence, Tuple

import psutil

from hvd_vgg.parallel.cores import control_groups, read_int, threads_refusal
from hvd_vgg.reporting.findings import Finding, failure, ok, warning
from hvd_vgg.run_dir import probe_file

_GB = 1e9
# Open files: the input pipeline keeps shards open, Open MPI a socket per rank, TensorFlow its own.
_OPEN_FILES = 1024
# Ranks of one host exchange through /dev/shm: Open MPI's buffers take some MB per rank; NCCL's more.
_SHM_BYTES_PER_RANK = 64e6
# Python, TensorFlow and its buffers, without the model.
_PROCESS_BYTES = 1e9


def check_memory(total: float, available: float, ranks: int, parameters: int, copies: int) -> Finding:
    """Checks that `available` bytes of memory suffice for `ranks` on this host and a network of `parameters` weights.

    copies: of the parameters in float32 that a rank holds on CPUs (weights, momentum, gradients, what the exchange packs,
    averages); activations come on top.
    """
    needed = ranks * (_PROCESS_BYTES + copies * 4 * parameters)
    text = f"{total / _GB:.0f} GB"
    if available >= needed:
        return ok("memory", text)
    text += f", {available / _GB:.1f} GB available; {ranks} ranks need {needed / _GB:.1f} GB plus activations"
    return warning("memory", text, "start fewer ranks on this host, end other jobs, or raise the container's --memory")


def memory_within_limits(root: Path) -> Tuple[float, float]:
    """Returns bytes in all and available: the host's, or what this process's control groups allow if that is less."""
    host = psutil.virtual_memory()
    total, available = host.total, host.available
    for group in control_groups(root, "memory"):
        limit = read_int(group / "memory.max") or read_int(group / "memory.limit_in_bytes")
        if limit and limit < host.total:
            used = read_int(group / "memory.current") or read_int(group / "memory.usage_in_bytes") or 0
            with contextlib.suppress(OSError, IndexError):  # it counts cached pages of files, which the kernel reclaims
                cached = re.findall(r"^(?:total_)?inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
                used -= int(cached[-1])  # in cgroup v1 the second one, which includes the groups below
            total, available = min(total, limit), min(available, limit - used)
    return total, available


def check_shared_memory(root: Path, ranks: int) -> Finding:
    """Checks /dev/shm: containers have 64 MB of it by default, and ranks die of a bus error when it is full."""
    try:
        total, _, free = shutil.disk_usage(root / "dev/shm")
    except OSError:
        return warning("shm", "there is no /dev/shm", "docker run --shm-size=8g")
    if free >= ranks * _SHM_BYTES_PER_RANK:
        return ok("shm", f"{total / _GB:.1f} GB in /dev/shm")
    text = f"{free / 1e6:.0f} of {total / 1e6:.0f} MB in /dev/shm are free; {ranks} ranks may need {ranks * 64} MB"
    return warning("shm", text, "docker run --shm-size=8g or --ipc=host; remove what dead jobs left in it")


def check_limits(root: Path, ranks: int) -> Iterator[Finding]:
    """Checks the limits of this process and its `ranks`: threads, open files, locked memory where there is InfiniBand."""
    text, _, fix = threads_refusal(root, ranks).partition(": ")
    if text:
        yield failure("limits", text, fix)
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # -1: unlimited
    if 0 <= files < _OPEN_FILES:
        fix = f"ulimit -n {min(most, 65536) if most > 0 else 65536} before mpirun; docker run --ulimit nofile=65536"
        yield warning("limits", f"{files} open files", fix)
    else:
        yield ok("limits", f"{'unlimited' if files < 0 else files} open files")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if locked != resource.RLIM_INFINITY and sorted(Path("/sys/class/infiniband").glob("*")):
        text = f"{locked // 1024} KiB of locked memory; InfiniBand registers its buffers"
        yield warning("limits", text, "ulimit -l unlimited on every host; docker run --ulimit memlock=-1")


def check_run_dir(run_dir: Path, checkpoint_bytes: float, is_root: bool, flag: str = "run_dir") -> List[Finding]:
    """Checks that files can be written and synced where the run will go, and that `checkpoint_bytes` fit.

    Leaves nothing behind. Only rank 0 writes checkpoints; the others need the directory for their hang reports.
    """
    place = nearest_existing(run_dir)
    text = f"--{flag}={run_dir}" + ("" if place == run_dir.absolute() else f" (not created yet; {place} exists)")
    try:
        with probe_file(place) as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        severity = failure if is_root else warning
        return [severity("run_dir", f"{text} cannot be written: {error.strerror}", f"use another --{flag}, or free space")]
    free = shutil.disk_usage(place).free
    if is_root and free < checkpoint_bytes:
        text += f" has {free / _GB:.1f} GB free; its checkpoints take {checkpoint_bytes / _GB:.1f} GB"
        return [failure("run_dir", text, f"free space, use another --{flag}, or lower --keep_checkpoints")]
    return [ok("run_dir", f"{text} is writable; {free / _GB:.0f} GB free")] if is_root else []


def nearest_existing(path: Path) -> Path:
    """Returns the absolute path, or the nearest directory above it that exists."""
    place = path.absolute()
    return next(each for each in (place, *place.parents) if os.path.exists(each))  # noqa: PTH110 (Path.exists raises)


def check_other_jobs() -> List[Finding]:
    """Checks for Open MPI's daemons and training ranks of this package that this process does not descend from.

    After a link broke, the daemon on the far host was seen alive and ignoring SIGTERM 10 minutes later.
    """
    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    jobs = []
    for process in psutil.process_iter(["name", "cmdline", "status"]):
        name, command = process.info["name"], process.info["cmdline"] or []
        training = "train" in command[:5] and any(
            word.endswith(("hvd-vgg", "hvd_vgg", "hvd_vgg/__main__.py")) for word in command[:4]
        )
        other = process.pid not in own and process.info["status"] != psutil.STATUS_ZOMBIE
        if other and (training or name in ("orted", "prted")):
            jobs.append(f"{'hvd-vgg train' if training else name} (process {process.pid})")
    text = f"other jobs run on {socket.gethostname()}, or were left: {', '.join(jobs[:6])}{', ...' if len(jobs) > 6 else ''}"
    return [warning("other jobs", text, "wait for them; end those whose job is over by `kill -9`")] if jobs else []


def run_tool(
    command: Sequence[str], environ: Mapping[str, str], seconds: float
) -> "Optional[subprocess.CompletedProcess[str]]":
    """Runs a program without input and returns how it ended; None if it cannot be started or takes longer."""
    try:
        return subprocess.run(  # noqa: S603
            command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
