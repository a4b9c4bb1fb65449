"""Console output for people: lines, or a progress bar on a terminal, and there colours."""

import shutil
import sys
from typing import Optional

from hvd_vgg.colours import YELLOW, coloured, has_colours, is_terminal
from hvd_vgg.streams import clear_bar, redraw_bar, write_line
from hvd_vgg.text import format_duration
from hvd_vgg.watchdog import watchdog

_BAR_SECONDS, _LINE_SECONDS = 0.1, 10.0  # how often progress is shown
_LINE_WIDTH, _BAR_WIDTH = 79, 24  # columns; a bar is shorter where the rest of its line is long, down to 4, then left out
_WARNING = "warning:"


class Console:
    """Prints if `speaks`, that is on rank 0, and unless DLLogger's lines are asked for.

    mode: bar, lines, dllogger or auto. Under mpirun stdout always looks like a terminal, so that auto checks stderr too; the
    scripts in launch/ know better and pass `bar`. Colours are shown where a bar is, on a terminal.
    """

    def __init__(self, mode: str, speaks: bool) -> None:
        if mode == "auto":
            mode = "bar" if is_terminal(sys.stdout) and sys.stderr.isatty() else "lines"
        self.bar = mode == "bar"
        self.speaks = speaks and mode != "dllogger"
        self.colours = self.bar and has_colours(sys.stdout)

    def paint(self, text: str, colour: str) -> str:
        """Returns `text`, a part of what is to be printed, in a colour of `hvd_vgg.colours` where they are shown."""
        return coloured(text, colour) if self.colours else text

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        if self.speaks:
            if text.startswith(_WARNING):
                text = f"{self.paint(_WARNING, YELLOW)}{text[len(_WARNING) :]}"
            write_line(text, sys.stdout)

    def redraw(self, text: str) -> None:
        """Shows `text`, as much as fits, in place of the last redrawn line, in bar mode only."""
        if self.speaks and self.bar:
            redraw_bar(text[: line_width()])

    def clear(self) -> None:
        """Erases the redrawn line, if any, before something else is printed than by `say` or `write_line`."""
        if self.speaks:
            clear_bar()

    def progress(self, title: str, total: int, unit: str, start: int = 0) -> "Progress":
        """Returns the progress of a task of `total` units, of which `start` are done."""
        return Progress(self, title, total, unit, start)


def line_width() -> int:
    """Returns how many columns a bar may have: 79, or less on a narrow terminal, whose last column would wrap."""
    return min(_LINE_WIDTH, max(1, shutil.get_terminal_size().columns - 1))


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
            width = min(_BAR_WIDTH, line_width() - len(f"{self.title} []{tail}"))
            bar = ("#" * (width * done // max(1, self.total))).ljust(width, ".")
            self.shown = now
            self.console.redraw(f"{self.title} [{bar}]{tail}" if width >= 4 else f"{self.title}{tail}")
        else:
            self.say(f"{self.title}: {done} of {self.total} {self.unit}{tail}")
