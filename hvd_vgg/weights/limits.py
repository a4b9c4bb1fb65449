"""Limits of a process that reads a file which may be made to take all time and memory."""

import contextlib
import resource
from pathlib import Path


def limit_this_process(memory: int, cpu_seconds: int) -> None:
    """Lets this process have `memory` bytes beyond what it has mapped by now, so much CPU time, and leave no core dump.

    To be called when its libraries are loaded, which map gigabytes that they never use.
    """
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = ((resource.RLIMIT_AS, mapped + memory), (resource.RLIMIT_CPU, cpu_seconds), (resource.RLIMIT_CORE, 0))
    for limit, most in limits:
        with contextlib.suppress(ValueError, OSError):  # where it is lower already
            resource.setrlimit(limit, (most, most))
