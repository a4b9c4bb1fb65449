"""What a host gives a rank: memory, cores, shared memory, limits, room on disk; and what other jobs left behind."""

import os
import resource
import shutil
import socket
import tempfile
from pathlib import Path
from typing import IO, List

from hvd_vgg.parallel.cores import ancestors, control_groups, read_int
from hvd_vgg.reporting.findings import Finding, failure, ok, warning

_GB = 1e9
# Open files: the pipeline holds shards open, Open MPI a socket a rank, TensorFlow its own.
_FILES = 1024
# What ranks of one host exchange lies in /dev/shm: Open MPI's buffers are some MB a rank; NCCL's more.
_SHM_BYTES_A_RANK = 64e6
# Python, TensorFlow and its buffers, before anything of the model.
_PROCESS_BYTES = 1e9


def check_memory(root: Path, ranks: int, parameters: int) -> List[Finding]:
    """Looks at the memory that the host's ranks share; parameters: of the network, on CPUs held four times in float32.

    Weights, momentum, gradients and what the exchange packs; activations come on top.
    """
    total, free = _memory(root)
    if not total:
        return []
    needed = ranks * (_PROCESS_BYTES + 4 * 4 * parameters)
    text = f"{total / _GB:.0f} GB"
    if free < needed:
        said = f"{text} in all, {free / _GB:.1f} GB free; {ranks} ranks need {needed / _GB:.1f} GB and room for activations"
        return [warning("memory", said, "fewer ranks on this host, end other jobs, or raise the container's --memory")]
    return [ok("memory", text)]


def check_shared_memory(root: Path, ranks: int) -> List[Finding]:
    """Looks at /dev/shm; containers have 64 MB of it unless told otherwise, and die of a bus error when it is full."""
    place = root / "dev/shm"
    if not place.is_dir():
        return [warning("shm", "there is no /dev/shm", "docker run --shm-size=8g")]
    size = os.statvfs(place)
    total, free = size.f_blocks * size.f_frsize, size.f_bavail * size.f_frsize
    if free < ranks * _SHM_BYTES_A_RANK:
        text = f"{free / 1e6:.0f} of {total / 1e6:.0f} MB of /dev/shm are free; {ranks} ranks may need {ranks * 64} MB"
        return [warning("shm", text, "docker run --shm-size=8g or --ipc=host; remove what dead jobs left in it")]
    return [ok("shm", f"{total / _GB:.1f} GB in /dev/shm")]


def check_limits() -> List[Finding]:
    """Looks at limits of this process: open files, locked memory, core count."""
    found = []
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < _FILES:
        fix = f"ulimit -n {min(most, 65536) if most > 0 else 65536} before mpirun; docker run --ulimit nofile=65536"
        found.append(warning("limits", f"{files} open files", fix))
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if locked != resource.RLIM_INFINITY and sorted(Path("/sys/class/infiniband").glob("*")):
        text = f"{locked // 1024} KiB of locked memory; InfiniBand registers its buffers"
        found.append(warning("limits", text, "ulimit -l unlimited on every host; docker run --ulimit memlock=-1"))
    return found or [ok("limits", f"{'unlimited' if files == resource.RLIM_INFINITY else files} open files")]


def check_run_dir(run_dir: Path, needed_bytes: float, is_root: bool) -> List[Finding]:
    """Looks whether files can be written and put on disk where the run will go, and whether there is room.

    needed_bytes: of the checkpoints that are kept. Creates nothing that stays. Only rank 0 writes checkpoints; the others
    need the directory for their last words alone.
    """
    place = nearest_existing(run_dir)
    say = failure if is_root else warning
    text = f"--run_dir={run_dir}" + ("" if place == run_dir.absolute() else f" (not there yet; {place} is)")
    try:
        with probe_file(place) as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return [say("run_dir", f"{text} cannot be written: {error.strerror}", "give another --run_dir, or make room")]
    free = shutil.disk_usage(place).free
    if is_root and free < needed_bytes:
        told = f"{text} has {free / _GB:.1f} GB free; its checkpoints take {needed_bytes / _GB:.1f} GB"
        return [failure("run_dir", told, "make room, give another --run_dir, or lower --keep_checkpoints")]
    return [ok("run_dir", f"{text} can be written; {free / _GB:.0f} GB free")] if is_root else []


def nearest_existing(path: Path) -> Path:
    """Returns the path, absolute, or the nearest directory above it that is there."""
    place = path.absolute()
    while not os.path.exists(place) and place != place.parent:  # noqa: PTH110 (Path.exists raises where it may not look)
        place = place.parent
    return place


def probe_file(directory: Path) -> IO[bytes]:
    """Returns a new file of a name of its own there, which is gone when it is closed; raises OSError."""
    return tempfile.NamedTemporaryFile(dir=directory, prefix=".hvd_vgg_doctor_")


def processor_name(root: Path) -> str:
    """Returns what the host's first processor calls itself; "" where the kernel does not say."""
    try:
        lines = (root / "proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name") and ":" in line), "")


def check_leftovers(root: Path) -> List[Finding]:
    """Looks for what other jobs left: daemons of Open MPI and ranks of this package that no launcher of ours started.

    Where a link breaks, the daemon of the far host was seen alive and deaf to SIGTERM after 10 minutes.
    """
    ours = ancestors(root, os.getpid())
    found = []
    for place in sorted((root / "proc").glob("[0-9]*"), key=lambda each: int(each.name)):
        try:
            name = (place / "comm").read_text().strip()
            if (place / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                continue
            command = (place / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        training = any(part.endswith((b"hvd-vgg", b"hvd_vgg")) for part in command[:4]) and b"train" in command[:5]
        if (name in ("orted", "prted") or training) and int(place.name) not in ours:
            found.append(f"{'hvd-vgg train' if training else name} (process {place.name})")
    if not found:
        return []
    text = (
        f"on {socket.gethostname()} other jobs run, or are left: {', '.join(found[:6])}{', ...' if len(found) > 6 else ''}"
    )
    return [warning("other jobs", text, "wait for them; those of a job that is over end by `kill -9` of the process")]


def _memory(root: Path) -> "tuple[float, float]":
    """Returns the bytes of memory there are and are free, of the host or of this process's control groups if less."""
    try:
        rows = (line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
        kilobytes = {name: int(rest.split()[0]) for name, rest in rows}
        host_total, free = kilobytes["MemTotal"] * 1024.0, kilobytes["MemAvailable"] * 1024.0
    except (OSError, ValueError, KeyError):
        return 0.0, 0.0
    total = host_total
    for group in control_groups(root, "memory"):
        limit = read_int(group / "memory.max") or read_int(group / "memory.limit_in_bytes")
        if limit and limit < host_total:
            used = read_int(group / "memory.current") or read_int(group / "memory.usage_in_bytes") or 0
            # The kernel counts pages of files too, and takes these back.
            used -= _statistic(group / "memory.stat", "total_inactive_file", "inactive_file")
            total, free = min(total, float(limit)), min(free, float(limit - used))
    return total, free


def _statistic(path: Path, *names: str) -> int:
    """Returns the first of `names` that a file of `NAME NUMBER` lines has; 0 where it has none."""
    try:
        rows = dict(line.split() for line in path.read_text().splitlines())
        return next((int(rows[name]) for name in names if name in rows), 0)
    except (OSError, ValueError):
        return 0
