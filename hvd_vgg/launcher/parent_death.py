"""Processes that the kernel kills when the one that started them dies."""

import ctypes
import os
import signal
from typing import Callable

from hvd_vgg.errors import CONFIGURATION

_PR_SET_PDEATHSIG = 1


def dies_with(parent: int) -> Callable[[], None]:
    """Returns a preexec function with which the kernel kills the new process when the thread that starts it ends, or dies.

    parent: os.getpid().
    """
    libc = ctypes.CDLL(None)  # loaded here: little may be done between fork and exec

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has died already
            os._exit(CONFIGURATION)

    return prepare
