"""Text for messages: plurals, durations, tables of differences."""

from typing import Mapping, Tuple


def plural(number: int, noun: str, form: str = "") -> str:
    """Returns `1 rank`, `2 ranks`, `3 classes`; form: of the number, as in format strings."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:{form}} {noun}{ending}"


def printable(text: str, most: int = 1000) -> str:
    """Returns a text from a file without what a terminal would obey, and of a long one the beginning."""
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= most else f"{text[: most - 3]}..."


def format_bytes(number: int) -> str:
    """Returns a number of bytes for people: `312 bytes`, `4.5 kB`, `0.7 MB`, `138.0 GB`, in powers of 1000."""
    if number < 1000:
        return plural(number, "byte")
    for unit, size in (("kB", 1e3), ("MB", 1e6)):
        if number < 999.95 * size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1e9:.1f} GB"


def format_duration(seconds: float) -> str:
    """Returns a duration for people: `42 s`, `3 min 05 s`, `2 h 07 min`, `8 d 09 h`; hours up to 100."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    hours = whole // 3600
    return f"{hours} h {whole % 3600 // 60:02d} min" if hours < 100 else f"{hours // 24} d {hours % 24:02d} h"


def difference_table(expected: Mapping[str, object], found: Mapping[str, object], titles: Tuple[str, str]) -> str:
    """Returns a table of the keys whose values differ, in two columns headed by `titles`; empty if all are equal."""
    keys = sorted(key for key in {*expected, *found} if expected.get(key) != found.get(key))
    rows = [("", *titles), *((key, repr(expected.get(key)), repr(found.get(key))) for key in keys)]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"  {a:{widths[0]}}  {b:{widths[1]}}  {c}".rstrip() for a, b, c in rows) if keys else ""
