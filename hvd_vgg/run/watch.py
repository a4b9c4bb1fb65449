"""Whether this rank still gets on, and whether it was asked to stop: heartbeat, watchdog, last words. One a process.

The trainer says `beat` whenever it has got on. A thread looks at that: a rank that is silent for too long writes its last
words, waits a moment for the other ranks to do so too, and ends with exit code 75, which ends the job. Three more nets are
behind it: where Python's lock is never given back, and no thread can run, `faulthandler` writes the stacks from C and
SIGALRM ends the process; Horovod's stall inspector names the tensor that ranks wait for (`comm.start`); and the launcher may
limit the time of the whole job. Ranks that merely wait for a hung one are silent just as long and end with it.

Everything goes to RUN_DIR/faults: `fatal.rankN.jsonl` (why this rank alone ended the job), `last_words.rankN.jsonl`,
`stacks.rankN.txt`. Lines are appended, so that what happened before a restart stays there.
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import IO, Any, Callable, Deque, Dict, Iterator, Optional, Tuple

from hvd_vgg.run.health import LOST_RANK, STOPPED, launched_rank

# By how much a start, an evaluation or a save may be slower than an update.
LONGER = 10
# Without --hang_seconds: this many median updates, at least so many seconds.
LEAST_SECONDS, _MEDIANS = 60.0, 20
# Ranks in one collective fall silent within an update of each other; so long they are given to write what they know.
_OTHERS_SECONDS = 2.0


class Stopped(Exception):
    """All ranks know that one of them was asked to stop; raised by all at the same point."""


class _Heart:
    """What is known of this process: one instance, made by `begin`."""

    def __init__(self, rank: int, hang_seconds: float, folder: Optional[Path], stacks: Optional[IO[str]]) -> None:
        self.rank, self.hang_seconds, self.folder, self.stacks = rank, hang_seconds, folder, stacks
        self.last: Tuple[float, str, Optional[int]] = (time.monotonic(), "start", None)  # replaced whole: no lock needed
        self.updates: Deque[float] = deque(maxlen=101)  # seconds of each
        self.collective = ""
        self.reports: Dict[str, Callable[[], Any]] = {}
        self.wake, self.ended = threading.Event(), False
        self.thread = threading.Thread(target=_look, args=[self], name="watchdog", daemon=True)

    def limit_seconds(self, phase: str) -> float:
        """Returns how long this rank may be silent."""
        base = self.hang_seconds or max(LEAST_SECONDS, _MEDIANS * statistics.median(self.updates or [0.0]))
        # What the first update compiles and allocates takes as long as it takes.
        return base if phase == "update" and self.updates else LONGER * base


_heart: Optional[_Heart] = None
_asked = threading.Event()


def begin(run_dir: Optional[Path], rank: int, hang_seconds: float) -> None:
    """Begins to watch this process; the first call of every rank, before it meets the others.

    hang_seconds: how long an update may take; 0: 20 times the median one, 60 at least. Starting, evaluating and saving
    may take LONGER times as much. Where RUN_DIR/faults cannot be written, stderr must do.
    """
    global _heart
    folder, stacks = None, None
    if run_dir is not None:
        os.umask(os.umask(0o027) | 0o027)  # what a run writes is for its owner and group
        try:
            (run_dir / "faults").mkdir(parents=True, exist_ok=True, mode=0o750)
            stacks = open(run_dir / "faults" / f"stacks.rank{rank}.txt", "a", encoding="utf-8")  # noqa: SIM115
            folder = run_dir / "faults"
        except OSError:
            pass  # who must write there says so better
    faulthandler.enable(stacks or sys.stderr)
    _heart = _Heart(rank, hang_seconds, folder, stacks)
    _heart.thread.start()


def leaving() -> None:
    """Says that this rank is about to leave the others; it is watched from here on if it was not before."""
    if _heart is None:
        begin(None, launched_rank() or 0, 0.0)
    beat(phase="leaving")


def end() -> None:
    """Ends the watch of a rank that has left the others: SIGALRM ends it should it not end as soon as it should have left.

    The stacks of all its threads then go to stderr first.
    Removes this rank's file of stacks if nothing was written to it, and `faults` if nothing is in it.
    """
    global _heart
    heart, _heart = _heart, None
    if heart is None:
        return
    heart.ended = True
    heart.wake.set()
    heart.thread.join()  # it would arm again what is armed here
    faulthandler.disable()
    limit = heart.limit_seconds("leaving")
    faulthandler.dump_traceback_later(limit, file=sys.stderr)
    signal.setitimer(signal.ITIMER_REAL, limit + _OTHERS_SECONDS / 2)  # Python's own end may hold its lock
    if heart.stacks and heart.folder:
        heart.stacks.close()
        with contextlib.suppress(OSError):
            path = Path(heart.stacks.name)
            if path.stat().st_size == 0:
                path.unlink()
            heart.folder.rmdir()  # when it is empty: nothing went wrong on any rank


def beat(step: Optional[int] = None, phase: str = "update") -> None:
    """Says that this rank got on: with `step` updates done, or with something else than updates."""
    if _heart is None:
        return
    before, was, at = _heart.last
    now = time.monotonic()
    if phase == was == "update" and step != at:
        _heart.updates.append(now - before)
    _heart.last = (now, phase, at if step is None else step)
    if phase != was:
        _heart.wake.set()  # another limit holds


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Allows what is inside (evaluation, saving) LONGER times the silence of an update."""
    back = _heart.last[1] if _heart else "update"
    beat(phase=name)
    yield
    beat(phase=back)


def collective(name: str) -> None:
    """Notes what this rank last said to the others."""
    if _heart is not None:
        _heart.collective = name


def reports(name: str, value: Callable[[], Any]) -> None:
    """Adds `value()` to this rank's last words, under `name`."""
    if _heart is not None:
        _heart.reports[name] = value


def fatal(code: int, error: str) -> None:
    """Writes why this rank, alone, is about to end the job with exit code `code`."""
    if _heart is not None:
        _append(_heart, "fatal", {"event": "fatal", "code": code, "error": error})


def leave_when_asked() -> None:
    """Until `listen`, SIGTERM and SIGUSR1 end this rank with 80: nothing is trained yet that it could save; main thread."""

    def leave(number: int, frame: Any) -> None:
        if not launched_rank():
            with contextlib.suppress(OSError):  # written so, for the signal may have come amid a print
                os.write(2, b"hvd-vgg: stopped on request, before the first update\n")
        os._exit(STOPPED)

    for each in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(each, leave)


def listen() -> None:
    """From now on SIGTERM, SIGINT and SIGUSR1 ask this rank to stop (`asked`); main thread. Another SIGINT stops at once."""

    def ask(number: int, frame: Any) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        _asked.set()

    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(each, ask)


def asked() -> bool:
    """Says whether this rank was asked to stop. The ranks must agree before any of them does."""
    return _asked.is_set()


def _look(heart: _Heart) -> None:
    while not heart.ended:
        at, phase_now, step = heart.last
        limit, silent = heart.limit_seconds(phase_now), time.monotonic() - at
        if silent > limit:
            faulthandler.cancel_dump_traceback_later()
            try:
                _last_words(heart, phase_now, step, silent, limit)
            finally:  # even where nothing can be written any more
                time.sleep(_OTHERS_SECONDS)
                os._exit(LOST_RANK)
        # Both go off by themselves should this thread never run again.
        faulthandler.dump_traceback_later(limit - silent + _OTHERS_SECONDS / 2, file=heart.stacks or sys.stderr)
        signal.setitimer(signal.ITIMER_REAL, limit - silent + LONGER * _OTHERS_SECONDS)
        heart.wake.wait(min(1.0, limit / 10))
        heart.wake.clear()


def _last_words(heart: _Heart, phase_now: str, step: Optional[int], silent: float, limit: float) -> None:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        stacks = file.read()
    words = {"event": "stall", "phase": phase_now, "step": step, "silent_seconds": round(silent, 1), "limit_seconds": limit}
    words.update(last_collective=heart.collective, **{name: value() for name, value in heart.reports.items()})
    place = _append(heart, "last_words", {**words, "stacks": stacks.splitlines()})
    where = f"{phase_now} {step}" if phase_now == "update" and step is not None else phase_now
    text = (
        f"hvd-vgg: rank {heart.rank} ({socket.gethostname()}): no progress for {silent:.0f} s after {where} (--hang_seconds "
        f"allows {limit:.0f}): this rank or one that it waits for is stuck. Its last words: {place or 'see below'}"
    )
    print(text if place else f"{text}\n{stacks}", file=sys.stderr, flush=True)


def _append(heart: _Heart, name: str, data: Dict[str, Any]) -> Optional[Path]:
    """Appends one line, on disk when this returns; returns the file, or None where none can be written."""
    if heart.folder is None:
        return None
    _, phase_now, step = heart.last
    line = {"time": time.time(), "rank": heart.rank, "host": socket.gethostname(), "step": step, "phase": phase_now, **data}
    path = heart.folder / f"{name}.rank{heart.rank}.jsonl"
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        return None
    return path
