"""Paths in a run directory, atomic writes, and the lock that one job holds."""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Iterable, Iterator, List, Optional, Union

from hvd_vgg import storage
from hvd_vgg.errors import CONFIGURATION, NOT_WRITTEN, Failure
from hvd_vgg.streams import write_line

_CHECKPOINT = re.compile(r"step-(\d{8})\.safetensors")


class RunDir:
    """Paths of all that a run writes; creating one touches no file."""

    def __init__(self, path: Union[str, Path]) -> None:
        self.path = Path(path)
        self.flags = self.path / "flags.txt"  # every flag of the run: `--flagfile` with it is the same run
        self.classes = self.path / "classes.txt"  # names, a line each, in order of label; absent where unknown
        self.log = self.path / "dllogger.json"
        self.receipt = self.path / "receipt.json"
        self.result = self.path / "result.json"
        self.class_hits = self.path / "class_hits.csv"  # of the last evaluation, as the next two
        self.confusions = self.path / "confusions.csv"
        self.confident_errors = self.path / "confident_errors.csv"
        self.restarts = self.path / "restarts.jsonl"  # the launcher's, a line for each start and each end
        self.lock = self.path / "lock"
        self.checkpoints = self.path / "checkpoints"
        self.nonfinite = self.path / "nonfinite"
        self.skipped_steps = self.nonfinite / "skipped.json"
        self.faults = self.path / "faults"
        self.tensorboard = self.path / "tensorboard"
        self.profile = self.path / "profile"
        self.horovod_timeline = self.profile / "horovod_timeline.json"

    def checkpoint(self, step: int) -> Path:
        """Returns the path of the checkpoint after `step` updates."""
        return self.checkpoints / f"step-{step:08d}.safetensors"

    def list_checkpoints(self) -> List[Path]:
        """Returns the checkpoint files that exist, newest first; they may be damaged.

        Raises Failure(CONFIGURATION), or as `storage.retrying`, where the directory is there but cannot be read.
        """
        found = [path for path in _list(self.checkpoints) if checkpoint_step(path) is not None]
        return sorted(found, reverse=True)  # steps have leading zeros

    def nonfinite_step(self, step: int) -> "StepDir":
        """Returns where a step that was not finite is kept.

        step -1: the latest one that was kept; a path that does not exist if there is none.
        """
        if step >= 0:
            return StepDir(self.nonfinite / f"step-{step:08d}")
        return StepDir(max(self.nonfinite.glob("step-????????"), default=self.nonfinite / "step-none"))

    def fault_report(self, kind: str, rank: int) -> Path:
        """Returns the path of a rank's reports of a kind, `fatal` or `hang`: JSON lines."""
        return self.faults / f"{kind}.rank{rank}.jsonl"

    def stacks(self, rank: int) -> Path:
        """Returns the path of the stacks that faulthandler writes for a rank."""
        return self.faults / f"stacks.rank{rank}.txt"

    def trace(self, rank: int) -> Path:
        """Returns the directory of a rank's TensorFlow profile."""
        return self.profile / f"rank{rank}"


class StepDir:
    """Paths of what `RUN_DIR/nonfinite/step-N` keeps for `hvd-vgg replay`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = path / "records-00000-of-00001"
        self.state = path / "state.safetensors"
        self.flags = path / "flags.txt"
        self.report = path / "report.json"


def checkpoint_step(path: Path) -> Optional[int]:
    """Returns the number of updates in a checkpoint's file name; None if it is not the name of one."""
    match = _CHECKPOINT.fullmatch(path.name)
    return int(match[1]) if match else None


def _list(folder: Path) -> List[Path]:
    try:
        return storage.retrying(folder, lambda: list(folder.iterdir()))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise Failure(CONFIGURATION, f"{folder} cannot be read: {error.strerror}") from error


def lock_run_dir(run_dir: Path, flag: str = "--run_dir", value: Optional[Path] = None) -> IO[str]:
    """Returns the open file `RUN_DIR/lock`, locked until it is closed or this process ends in any way.

    flag: whose value `run_dir` is, or `value`, where it lies elsewhere. Raises Failure(CONFIGURATION) naming the job that
    holds it, or why it cannot be opened. Locking a file that exists takes no disk space. On a file system without locks (NFS
    and Lustre may be mounted so), prints that and goes on.
    """
    path, given = RunDir(run_dir).lock, value or run_dir
    with writing(path, CONFIGURATION):
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (stays open)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        with file:
            file.seek(0)
            holder = file.read().strip() or "holder unknown"
        text = f"{flag}={given} is in use by another job ({holder})"
        raise Failure(CONFIGURATION, f"{text}. Wait for it, stop it, or use another {flag}") from error
    except OSError as error:
        if error.errno not in storage.UNSUPPORTED:
            file.close()
            raise Failure(CONFIGURATION, f"{path} cannot be locked: {error.strerror}") from error
        text = f"hvd-vgg: {given} cannot be locked ({error.strerror}): make sure that only one job uses it"
        write_line(text, sys.stdout)
    signature = {"host": socket.gethostname(), "process": os.getpid(), "since": time.ctime()}
    with contextlib.suppress(OSError):  # on a full disk it is locked all the same
        file.truncate(0)
        os.write(file.fileno(), json.dumps(signature).encode() + b"\n")
    return file


# The file system is full, or this user's quota of it is: the quota's free bytes are not the file system's.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_OF_GROUP = 0o640  # the mode of files that the group, and nobody else, may read


def atomic_write_text(path: Path, text: str, mode: int = _OF_GROUP) -> None:
    """Writes `text` to a file as `atomic_write_lines` does. Raises OSError."""
    atomic_write_lines(path, [text], mode)


def atomic_write_lines(path: Path, lines: Iterable[str], mode: int = _OF_GROUP) -> None:
    """Writes to a temporary file, syncs it to disk, renames it to `path`. Raises OSError.

    mode: who may read and write it, as far as the umask lets them.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            storage.sync(file.fileno(), path)
        storage.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()  # on a full disk half a file takes the space of others
        raise


def append_whole(path: Path, data: bytes, sync: bool = False) -> None:
    """Appends all of `data`, and puts it on disk if asked to; or leaves the file as it was and raises OSError."""
    with open(path, "ab", buffering=0) as file:
        end = file.tell()
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if sync:
                storage.sync(file.fileno(), path)
        except OSError:
            file.truncate(end)  # the next line must not be appended to half a line
            raise


@contextlib.contextmanager
def writing(path: Path, code: int = NOT_WRITTEN) -> Iterator[None]:
    """Raises Failure(code) that says why `path` cannot be written, for an OSError inside the block."""
    try:
        yield
    except OSError as error:
        raise Failure(code, write_error(path, error)) from error


def write_error(path: Path, error: OSError) -> str:
    """Returns why `path` cannot be written; if the disk is full, also how much is free and what to do."""
    text = f"{path} cannot be written: {error.strerror or error}"
    if error.errno not in DISK_FULL:
        return text
    folder = next(parent for parent in path.resolve().parents if parent.exists())
    return f"{text} ({shutil.disk_usage(folder).free / 1e6:.1f} MB are free in {folder}): make room, then start again"


def probe_file(directory: Path) -> IO[bytes]:
    """Returns a new file in `directory` that is deleted when it is closed; raises OSError."""
    return tempfile.NamedTemporaryFile(dir=directory, prefix=".hvd_vgg_doctor_")


def check_out(out: str, code: int, flag: str = "--out") -> None:
    """Raises Failure(code) if the file `out`, of a flag, cannot be written: hours of work should not end in a wrong path."""
    path = Path(out).absolute()
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        probe_file(path.parent).close()
    except OSError as error:
        raise Failure(code, f"{flag}={out} cannot be written: {error.strerror}") from error
