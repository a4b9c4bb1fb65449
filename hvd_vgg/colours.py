"""Colours on a terminal, and there alone: none in files and pipes, with NO_COLOR (https://no-color.org), or on TERM=dumb."""

import os
from typing import TextIO

BOLD, RED, GREEN, YELLOW, CYAN = "1", "31", "32", "33", "36"


def is_terminal(stream: TextIO) -> bool:
    """Returns whether a stream is a terminal that understands escape sequences.

    Under mpirun stdout always seems to be one: what a rank prints to it asks `reporting.console.Console`.
    """
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def has_colours(stream: TextIO) -> bool:
    """Returns whether a stream shows colours, and they are wanted; any NO_COLOR that is not empty says no."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


def coloured(text: str, colour: str) -> str:
    """Returns `text` in a colour, with the codes around it: widths are counted before."""
    return f"\x1b[{colour}m{text}\x1b[0m"


def prefix(text: str, colour: str, stream: TextIO) -> str:
    """Returns `text`, which begins a message to `stream`, in a colour where the stream shows them."""
    return coloured(text, colour) if has_colours(stream) else text
