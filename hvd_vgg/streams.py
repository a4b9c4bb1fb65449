"""What a process says on stdout or stderr. Either may be full, or closed by who read it: no reason to end a run."""

import contextlib
import os
import sys
from typing import Iterator, TextIO


def ensure_std_streams() -> None:
    """Opens /dev/null for each of stdin, stdout, stderr that was closed before the start; first thing in a process.

    Else the next file opened would get its number, and whatever C code or another program prints.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)  # the lowest that is free
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, mode, encoding="utf-8"))  # noqa: SIM115 (it stays open)


def write_line(text: str, stream: TextIO, end: str = "\n") -> None:
    """Prints `text` at once, or not at all where `stream` does not take it."""
    with ignore_broken_pipe(stream):
        print(text, file=stream, end=end)


@contextlib.contextmanager
def ignore_broken_pipe(stream: TextIO) -> Iterator[None]:
    """Flushes what is printed to `stream` inside; what it does not take is lost, and is no error, now or at exit."""
    try:
        yield
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError):
            _discard_buffer(stream)


def _discard_buffer(stream: TextIO) -> None:
    """Empties what Python still holds for `stream`: it would fail again when Python exits, and change the exit code."""
    descriptor = stream.fileno()
    kept, nowhere = os.dup(descriptor), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, descriptor)
        stream.flush()
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)
        os.close(nowhere)
