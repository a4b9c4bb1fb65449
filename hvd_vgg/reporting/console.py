"""What rank 0 prints for a person: lines, or a progress bar on a terminal."""

import sys
import time
from typing import Optional

from hvd_vgg.streams import write_line
from hvd_vgg.text import format_duration


class Console:
    """What rank 0 prints for a person; silent on other ranks and where DLLogger's lines are asked for.

    mode: bar, lines, dllogger or auto. Under mpirun stdout always looks like a terminal, so auto looks at stderr too;
    launch/ scripts, which know, say `bar`.
    """

    def __init__(self, mode: str, speaks: bool) -> None:
        if mode == "auto":
            mode = "bar" if sys.stdout.isatty() and sys.stderr.isatty() else "lines"
        self.bar = mode == "bar"
        self.speaks = speaks and mode != "dllogger"
        self.drawn = 0

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        if self.speaks:
            write_line(self._clear() + text, sys.stdout)

    def redraw(self, text: str) -> None:
        """Shows `text` in place of the line shown before it; on terminals only."""
        if self.speaks and self.bar:
            clear, self.drawn = self._clear(), len(text)
            write_line(clear + text, sys.stdout, end="")

    def _clear(self) -> str:
        clear, self.drawn = ("\r" + " " * self.drawn + "\r") if self.drawn else "", 0
        return clear

    def progress(self, title: str, total: int, unit: str, start: int = 0) -> "Progress":
        """Returns the progress of work of `total` units, of which `start` are done."""
        return Progress(self, title, total, unit, start)


class Progress:
    """How far a piece of work is and what is left: a bar on a terminal, else a line every ten seconds."""

    def __init__(self, console: Console, title: str, total: int, unit: str, start: int) -> None:
        self.console, self.title, self.total, self.unit, self.start = console, title, total, unit, start
        self.began = self.shown = time.monotonic()

    def restart(self, done: int) -> None:
        """Leaves what was done until now out of the estimate."""
        self.start, self.began = done, time.monotonic()

    def left_seconds(self, done: int) -> Optional[float]:
        """Returns an estimate of the time left, or None before there is one."""
        elapsed, fresh = time.monotonic() - self.began, done - self.start
        return elapsed / fresh * (self.total - done) if fresh > 0 else None

    def say(self, text: str) -> None:
        """Prints a line that stays and shows how far the work is, so that another need not soon follow."""
        self.shown = time.monotonic()
        self.console.say(text)

    def update(self, done: int, note: str = "") -> None:
        """Shows that `done` units are done; `note` is what else to show."""
        now = time.monotonic()
        if now - self.shown < (0.1 if self.console.bar else 10.0):
            return
        left = self.left_seconds(done)
        tail = (f"  {note}" if note else "") + (f"  left {format_duration(left)}" if left is not None else "")
        if self.console.bar:
            filled = 24 * done // max(1, self.total)
            bar = "#" * filled + "." * (24 - filled)
            self.shown = now
            self.console.redraw(f"{self.title} [{bar}] {done}/{self.total} {self.unit}{tail}")
        else:
            self.say(f"{self.title}: {done} of {self.total} {self.unit}{tail}")
