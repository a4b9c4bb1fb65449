"""HDF5 files of Keras, also within its .keras archives: where the bytes of each tensor are. Needs no TensorFlow."""

import json
import re
import struct
import zipfile
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

from hvd_vgg.weights.child import run_child
from hvd_vgg.weights.contents import Contents, Entry, check_entries, file_reader

SIGNATURE = b"\x89HDF\r\n\x1a\n"
MEMBER = "model.weights.h5"  # of a .keras archive
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a member of a ZIP archive: signature, lengths of its name and extra field
_TYPES = {"<f2": "F16", "<f4": "F32", "<f8": "F64"}
_MOST_SECONDS = 300.0  # a list takes a fraction of one; loading libraries from slow storage some


def read_contents(path: Path, begin: int, size: int) -> Contents:
    """Returns what is in the HDF5 file that is `size` bytes of `path` from `begin` on.

    Raises ValueError with what is wrong with it.
    """
    try:
        found = json.loads(run_child("hdf5_child", [str(begin), str(size)], path, _MOST_SECONDS))
    except json.JSONDecodeError as error:
        raise ValueError("it cannot be read: it is damaged") from error
    if "error" in found:
        raise ValueError("".join(letter if letter.isprintable() else " " for letter in found["error"])[:300])
    entries = {}
    for name, dtype, shape, offset in found["datasets"]:
        code = _TYPES.get(dtype, dtype)
        length = int(dtype[2:]) if code in _TYPES.values() else 0
        for side in shape:
            length *= side
        start = -1 if offset is None else int(offset)
        entries[name] = Entry(code, tuple(shape), start, start + length)
    check_entries(entries, size)
    order = found["order"]
    if order is not None:
        return Contents("legacy .h5", entries, file_reader(path, begin), _legacy_layers(order, entries))
    return Contents(".weights.h5", entries, file_reader(path, begin), _layers(found["names"], entries))


def archive_members(path: Path) -> List[zipfile.ZipInfo]:
    """Returns what is in a ZIP archive. Raises ValueError with what is wrong with it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, struct.error, ValueError) as error:
        raise ValueError(f"it begins as a ZIP archive and is none ({error}): it is cut short or damaged") from error


def member_bounds(path: Path) -> Tuple[int, int]:
    """Returns the first byte and the length of MEMBER in a .keras archive. Raises ValueError with what is wrong with it."""
    members = [info for info in archive_members(path) if info.filename == MEMBER]
    if len(members) != 1:
        raise ValueError(f"it is a ZIP archive with {len(members)} files {MEMBER}: expected one, as in .keras of Keras")
    (info,) = members
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise ValueError(f"its {MEMBER} is compressed: expected it stored, as Keras writes it")
    header = file_reader(path)(info.header_offset, info.header_offset + _LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
        raise ValueError(f"its {MEMBER} is not where its directory says: it is damaged")
    _, name, extra = _LOCAL_HEADER.unpack(header)
    begin = info.header_offset + _LOCAL_HEADER.size + name + extra
    if begin + info.file_size > path.stat().st_size:
        raise ValueError(f"its {MEMBER} is cut short")
    return begin, info.file_size


def _legacy_layers(order: Sequence[str], entries: Dict[str, Entry]) -> List[Tuple[str, List[str]]]:
    """Returns the layers of a legacy file: a kernel begins one (a model within a model is one group of all its weights)."""
    layers: List[Tuple[str, List[str]]] = []
    for name in order:
        if name not in entries:
            raise ValueError(f"its list of weights names {ascii(name)[:200]}, which it does not have")
        if len(entries[name].shape) > 1 or not layers:
            layers.append((name, [name]))
        else:
            layers[-1][1].append(name)
    return layers


def _layers(names: Dict[str, str], entries: Dict[str, Entry]) -> List[Tuple[str, List[str]]]:
    """Returns the layers of a file of Keras 3, or of Keras 2 with `.weights.h5`: groups with `vars/0`, `vars/1`.

    In the order in which they were made, of which the numbers at the end of their names speak: conv2d, conv2d_1, conv2d_10.
    The optimizer's variables are left out.
    """
    groups: Dict[str, List[str]] = {}
    for name in sorted(entries, key=_by_numbers):
        group, _, last = name.rpartition("/")
        if last.isdecimal() and group.endswith("vars") and not group.startswith("optimizer/"):
            groups.setdefault(group, []).append(name)
    # A later Keras writes the layer's own name beside its weights.
    return [(f"{group} {names.get(f'{group}/', '')}", members) for group, members in groups.items()]


def _by_numbers(name: str) -> List[Any]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
