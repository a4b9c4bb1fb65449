"""Printing to stdout and stderr. Either may be closed or full, which is no reason to end a run.

The last line of stdout may be a bar that is redrawn in place, without an end: whatever is printed next erases it first, to
whichever stream it goes, for both may be the same terminal.
"""

import contextlib
import io
import os
import sys
from typing import Iterator, Optional, TextIO

_CLEAR = "\r\x1b[K"  # erases the line that the cursor is in


class _Bar:
    """stream: stdout, while its last line is a bar; copied: the end of what was copied to that line."""

    stream: Optional[TextIO] = None
    copied = b""


def ensure_std_streams() -> None:
    """Opens /dev/null in place of each of stdin, stdout and stderr that is closed; call first in a process.

    Otherwise the next file that is opened would take its descriptor and receive what C libraries and children print. What
    the locale's encoding lacks (in a path, a variable, the name of a host) is printed as a number after a backslash.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, mode, encoding="utf-8"))  # noqa: SIM115 (stays open)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def write_line(text: str, stream: TextIO, end: str = "\n") -> None:
    """Prints `text`, below what was printed before, and flushes; drops it if `stream` cannot take it."""
    clear_bar()
    _print(text, stream, end)


def redraw_bar(text: str) -> None:
    """Prints `text`, which is at most a line, to stdout in the place of the last bar."""
    _print(f"{_CLEAR}{text}", sys.stdout, "")
    _Bar.stream = sys.stdout


def clear_bar() -> None:
    """Erases the bar that is the last line of stdout, if one is."""
    stream, _Bar.stream = _Bar.stream, None
    if stream is not None and stream is sys.stdout:  # else it has been replaced since
        _print(_CLEAR, stream, "")


def note_copied(data: bytes) -> None:
    """Notes whether what another process printed, and this one has copied to stdout, ends in a bar of that process.

    data: the next of it; a read may end anywhere in a bar, and so between the bytes that begin one.
    """
    line, clear = (_Bar.copied + data).rpartition(b"\n")[2], _CLEAR.encode()
    if clear in line:
        _Bar.stream = sys.stdout if line.split(clear)[-1] else None
    elif b"\n" in data:
        _Bar.stream = None
    _Bar.copied = line[-len(clear) :]


def _print(text: str, stream: TextIO, end: str) -> None:
    with ignore_broken_pipe(stream):
        print(text, file=stream, end=end)


@contextlib.contextmanager
def ignore_broken_pipe(stream: TextIO) -> Iterator[None]:
    """Flushes what is printed to `stream` inside the block; drops what it cannot take, now and at exit, without an error."""
    try:
        yield
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError):
            _discard_buffer(stream)


def _discard_buffer(stream: TextIO) -> None:
    """Empties Python's buffer of `stream`: flushing it at exit would fail again and change the exit code."""
    descriptor = stream.fileno()
    kept, null = os.dup(descriptor), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, descriptor)
        stream.flush()
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)
        os.close(null)
