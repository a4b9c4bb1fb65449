"""One run directory, one job: the lock that rank 0 holds while it trains."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import IO

from hvd_vgg.run import output
from hvd_vgg.run.files import not_written
from hvd_vgg.run.health import CONFIGURATION, Failure


def acquire(run_dir: Path) -> IO[str]:
    """Returns the open file `RUN_DIR/lock`, locked until it is closed or this process ends, however it does.

    Raises Failure(CONFIGURATION) naming who holds it, or why it cannot be opened; where the file is, locking takes no room
    on the disk. Where the file system has no locks (NFS and Lustre may be mounted so), it says so and goes on.
    """
    path = run_dir / "lock"
    try:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (it stays open)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                told = f"hvd-vgg: {run_dir} cannot be locked ({error.strerror}): see to it that one job uses it"
                output.say(told, sys.stdout)
                return file
            if not isinstance(error, BlockingIOError):
                raise
            file.seek(0)
            held = file.read().strip() or "nobody has signed it"
            file.close()
            raise Failure(
                CONFIGURATION,
                f"--run_dir={run_dir} is in use by another job ({held}). Wait for it, stop it, or give another --run_dir",
            ) from error
        signature = json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": time.ctime()})
        with contextlib.suppress(OSError):  # on a full disk it is locked all the same
            file.truncate(0)
            os.write(file.fileno(), f"{signature}\n".encode())
    except OSError as error:
        raise Failure(CONFIGURATION, f"{path} cannot be locked: {not_written(path, error)}") from error
    return file
