"""Console output for people: lines, or a progress bar on a terminal."""

import sys
from typing import Optional

from hvd_vgg.streams import write_line
from hvd_vgg.text import format_duration
from hvd_vgg.watchdog import watchdog

_BAR_SECONDS, _LINE_SECONDS = 0.1, 10.0  # how often progress is shown
_LINE_WIDTH, _BAR_WIDTH = 79, 24  # columns; a bar is shorter where the rest of its line is long, down to 4
_CLEAR = "\r\x1b[K"  # erases the line that the cursor is in


class Console:
    """Prints if `speaks`, that is on rank 0, and unless DLLogger's lines are asked for.

    mode: bar, lines, dllogger or auto. Under mpirun stdout always looks like a terminal, so that auto checks stderr too; the
    scripts in launch/ know better and pass `bar`.
    """

    def __init__(self, mode: str, speaks: bool) -> None:
        if mode == "auto":
            mode = "bar" if sys.stdout.isatty() and sys.stderr.isatty() else "lines"
        self.bar = mode == "bar"
        self.speaks = speaks and mode != "dllogger"
        self._drawn = False  # whether the cursor is in a line that was redrawn

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        if self.speaks:
            write_line(f"{_CLEAR}{text}" if self._drawn else text, sys.stdout)
            self._drawn = False

    def redraw(self, text: str) -> None:
        """Shows `text`, as much as fits, in place of the last redrawn line, in bar mode only."""
        if self.speaks and self.bar:
            write_line(f"{_CLEAR}{text[:_LINE_WIDTH]}", sys.stdout, end="")
            self._drawn = True

    def clear(self) -> None:
        """Erases the redrawn line, if any, before something else is printed."""
        if self._drawn:
            write_line(_CLEAR, sys.stdout, end="")
            self._drawn = False

    def progress(self, title: str, total: int, unit: str, start: int = 0) -> "Progress":
        """Returns the progress of a task of `total` units, of which `start` are done."""
        return Progress(self, title, total, unit, start)


class Progress:
    """The progress of a task, with the time left: a bar on a terminal, else a line every ten seconds."""

    def __init__(self, console: Console, title: str, total: int, unit: str, start: int) -> None:
        self.console, self.title, self.total, self.unit, self.start = console, title, total, unit, start
        self.note = ""  # the newest
        self.began = self.shown = watchdog.active_seconds()

    def restart(self, done: int) -> None:
        """Excludes what was done before from the estimate of the time left."""
        self.start, self.began = done, watchdog.active_seconds()

    def left_seconds(self, done: int) -> Optional[float]:
        """Returns an estimate of the time left; None before there is one."""
        elapsed, fresh = watchdog.active_seconds() - self.began, done - self.start
        return elapsed / fresh * (self.total - done) if fresh > 0 else None

    def say(self, text: str) -> None:
        """Prints a line that stays and itself shows the progress, so that the next one is due later."""
        self.shown = watchdog.active_seconds()
        self.console.say(text)

    def update(self, done: int, note: str = "") -> None:
        """Redraws the progress, `done` units, if the interval has elapsed, with the newest note."""
        now = watchdog.active_seconds()
        self.note = note or self.note
        if now - self.shown < (_BAR_SECONDS if self.console.bar else _LINE_SECONDS):
            return
        left = self.left_seconds(done)
        tail = (f"  {self.note}" if self.note else "") + (f"  left {format_duration(left)}" if left is not None else "")
        if self.console.bar:
            tail = f" {done}/{self.total} {self.unit}".rstrip() + tail
            width = max(4, min(_BAR_WIDTH, _LINE_WIDTH - len(f"{self.title} []{tail}")))
            bar = ("#" * (width * done // max(1, self.total))).ljust(width, ".")
            self.shown = now
            self.console.redraw(f"{self.title} [{bar}]{tail}")
        else:
            self.say(f"{self.title}: {done} of {self.total} {self.unit}{tail}")
