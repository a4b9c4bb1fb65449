"""Headers of safetensors files (their format: huggingface.co/docs/safetensors), read so that a wrong one is refused.

The library's own reader maps the file into memory, where storage that fails ends the process, and has no bfloat16 for NumPy.
"""

import json
import struct
from typing import Any, Callable, Dict, List, Tuple

from hvd_vgg.weights.contents import Contents, Entry, check_entries

MOST_HEADER_BYTES = 10_000_000  # a network of 19 layers needs some thousand


def is_safetensors(head: bytes, size: int) -> bool:
    """Whether a file of `size` bytes that begins with `head`, 9 bytes, may be one."""
    return len(head) == 9 and head[8:] == b"{" and struct.unpack("<Q", head[:8])[0] <= size


def read_contents(read: Callable[[int, int], bytes], size: int, form: str = "safetensors") -> Contents:
    """Returns what is in a file of `size` bytes. Raises ValueError with what is wrong with it."""
    start = read(0, 8)
    if len(start) < 8:
        raise ValueError("it is cut short: a file of safetensors begins with the length of its header")
    length = struct.unpack("<Q", start)[0]
    if length > min(size - 8, MOST_HEADER_BYTES):
        raise ValueError(f"its header of {length} bytes is longer than the file or than {MOST_HEADER_BYTES} bytes")
    try:
        header = json.loads(read(8, 8 + length).decode(), object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ValueError("its header is not UTF-8: it is damaged") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"its header is not JSON ({error}): it is damaged") from error
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    header.pop("__metadata__", None)
    entries = {name: _entry(name, fields, 8 + length) for name, fields in header.items()}
    check_entries(entries, size)
    used = sum(entry.end - entry.begin for entry in entries.values())
    if used != size - 8 - length:
        raise ValueError(f"its tensors have {used} bytes, and {size - 8 - length} follow its header: it is damaged")
    return Contents(form, entries, read)


def _unique(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header has a name twice")
    return found


def _entry(name: str, fields: Any, offset: int) -> Entry:
    try:
        dtype, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
        numbers = [*shape, begin, end]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its header says nothing legible of {ascii(name)[:200]}") from error
    if not isinstance(dtype, str) or not dtype.isalnum() or len(dtype) > 16:
        raise ValueError(f"its header has no legible type of {ascii(name)[:200]}")
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"its header has a number of {ascii(name)[:200]} that is negative or no integer")
    return Entry(dtype, tuple(shape), offset + begin, offset + end)
