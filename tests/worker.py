"""Runs hvd-vgg, notes the record ids of every step that this rank trains on, and does harm where it is asked to:

    worker.py OUT_DIR [FAULT@RANK:STEP[:SECONDS] ...] COMMAND FLAGS...

OUT_DIR/ids.rankN gets a line a step. A fault, one of _FAULTS, happens on one rank when STEP updates are done, with 0 at
once. The package has no switch for any of this: it is wrapped from outside.
"""

import atexit
import ctypes
import os
import re
import signal
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from hvd_vgg.__main__ import run
from hvd_vgg.data import loader, transforms
from hvd_vgg.environment import launched_rank
from hvd_vgg.parallel import init
from hvd_vgg.train import checkpoint
from hvd_vgg.watchdog import watchdog

out = Path(sys.argv[1])
faults = [re.fullmatch(r"(\w+)@(\d+):(\d+)(?::([\d.]+))?", argument) for argument in sys.argv[2:]]
faults = faults[: faults.index(None)]
mine = [fault for fault in faults if int(fault[2]) == (launched_rank() or 0)]
train_batches, beat, save = loader.train_batches, watchdog.heartbeat, checkpoint.save


def noted(index, config, label_base, steps, rank, size, threads):
    """Yields what the pipeline yields, after writing its ids."""
    with open(out / f"ids.rank{rank}", "a", buffering=1) as file:
        for step, batch in zip(steps, train_batches(index, config, label_base, steps, rank, size, threads)):
            file.write(f"{step} {' '.join(map(str, batch.ids.numpy().tolist()))}\n")
            yield batch


def fail(seconds):
    """Raises what no part of the package does."""
    raise RuntimeError("a fault of the test")


def hold_the_lock(seconds):
    """Sleeps without giving Python's lock back: PyDLL does not, as C extensions may not."""
    ctypes.PyDLL(None).usleep(ctypes.c_uint(int(seconds * 1e6)))


def fill_memory(seconds):
    """Takes memory until there is no more."""
    taken = []
    while True:
        taken.append(b"x" * 10_000_000)


def linger(seconds):
    """Makes Python take longer to end."""
    atexit.register(time.sleep, seconds)


def flip_a_byte(seconds):
    """Damages a file as the line `OFFSET PATH` of OUT_DIR/flip says."""
    offset, path = (out / "flip").read_text().split(maxsplit=1)
    with open(path, "rb+") as file:
        file.seek(int(offset))
        byte = file.read(1)[0]
        file.seek(int(offset))
        file.write(bytes([byte ^ 1]))


def save_slowly(seconds):
    """Makes each save take longer from here on."""

    def slow(*arguments):
        time.sleep(seconds)
        return save(*arguments)

    checkpoint.save = slow


def break_preprocessing(seconds):
    """Makes every image from here on fail in a way that no part of the package foresees."""

    def broken(*arguments):
        raise RuntimeError("a fault of the test")

    transforms.train_image = broken


def another_version(seconds):
    """Makes this rank say that its TensorFlow is another."""
    describe = init.describe_software
    init.describe_software = lambda: {**describe(), "tensorflow": "2.15.1"}


_FAULTS = {
    "raise": fail,
    "kill": lambda seconds: os.kill(os.getpid(), signal.SIGKILL),
    "term": lambda seconds: os.kill(os.getpid(), signal.SIGTERM),
    "usr1": lambda seconds: os.kill(os.getpid(), signal.SIGUSR1),
    "stop": lambda seconds: os.kill(os.getpid(), signal.SIGSTOP),
    "segv": lambda seconds: ctypes.string_at(0),
    "leave": lambda seconds: sys.exit(0),
    "sleep": time.sleep,
    "hold": hold_the_lock,
    "fill": fill_memory,
    "linger": linger,
    "flip": flip_a_byte,
    "saveslowly": save_slowly,
    "preprocess": break_preprocessing,
    "version": another_version,
}


def beat_and_fail(step=None, phase="update"):
    """Beats, then does what was asked for at this step."""
    beat(step, phase)
    for fault in mine:
        if phase == "update" and step == int(fault[3]):
            _FAULTS[fault[1]](float(fault[4] or 0))


for fault in mine:
    if int(fault[3]) == 0:  # before anything is done
        _FAULTS[fault[1]](float(fault[4] or 0))
loader.train_batches = noted
watchdog.heartbeat = beat_and_fail
sys.exit(run(sys.argv[2 + len(faults) :]))
