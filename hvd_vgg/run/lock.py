"""One run directory, one job: the lock that rank 0 holds while it trains."""

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO

from hvd_vgg.run.health import CONFIGURATION, Failure


def acquire(run_dir: Path) -> IO[str]:
    """Returns the open file `RUN_DIR/lock`, locked until it is closed or this process ends, however it does.

    Raises Failure(CONFIGURATION) naming who holds it, or why it cannot be held.
    """
    path = run_dir / "lock"
    try:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (it stays open)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            held = file.read().strip() or "nobody has signed it"
            raise Failure(
                CONFIGURATION,
                f"--run_dir={run_dir} is in use by another job ({held}). Wait for it, stop it, or give another --run_dir",
            ) from error
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": time.ctime()}) + "\n")
        file.flush()
    except OSError as error:
        raise Failure(CONFIGURATION, f"{path} cannot be locked: {error.strerror}") from error
    return file
