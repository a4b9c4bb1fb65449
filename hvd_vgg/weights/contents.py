"""What a file of weights contains: names, shapes, and where the bytes of each tensor are. Needs no TensorFlow.

Whatever wrote a file, its tensors are read as plain bytes at places that are checked first: inside the file, as long as
their shape says, and no two in one place. So no file can make this package allocate more than it is long.
"""

import math
import os
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple

import numpy as np

from hvd_vgg import storage

Shape = Tuple[int, ...]
# By the names of safetensors. bfloat16 is the upper half of a float32.
_TYPES: Dict[str, Any] = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
TYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_MOST_NAME = 200  # characters
_MOST_RANK = 8


class Entry(NamedTuple):
    """A tensor of a file: its type as in safetensors, and its bytes from `begin` to before `end`; -1: not plain bytes."""

    dtype: str
    shape: Shape
    begin: int
    end: int


class Contents(NamedTuple):
    """Of a file: form, what kind of file it is; entries by their names in it; read: returns bytes from begin to before end.

    layers: of Keras' files the names of each layer's weights, in order, by a name of the layer that is unique.
    """

    form: str
    entries: Dict[str, Entry]
    read: Callable[[int, int], bytes]
    layers: Sequence[Tuple[str, Sequence[str]]] = ()


def check_entries(entries: Dict[str, Entry], size: int) -> None:
    """Raises ValueError where names or shapes are impossible, or bytes are outside a file of `size` bytes or shared."""
    for name, entry in entries.items():
        if not name.isprintable() or len(name) > _MOST_NAME:
            raise ValueError(f"the name of a tensor is longer than {_MOST_NAME} characters, or cannot be printed")
        if len(entry.shape) > _MOST_RANK or any(side < 0 for side in entry.shape):
            raise ValueError(f"{name} has an impossible shape")
        if entry.begin < 0 or entry.dtype not in _TYPES:
            continue  # refused where it is used
        if not 0 <= entry.begin <= entry.end <= size:
            raise ValueError(f"{name} has bytes outside the file, which is {size} bytes long: it is cut short or damaged")
        needed = math.prod(entry.shape) * _TYPES[entry.dtype].itemsize
        if needed != entry.end - entry.begin:
            raise ValueError(f"{name} has {entry.end - entry.begin} bytes, and its shape {list(entry.shape)} needs {needed}")
    placed = sorted((entry.begin, entry.end, name) for name, entry in entries.items() if 0 <= entry.begin < entry.end)
    for (_, end, name), (begin, _, other) in zip(placed, placed[1:]):
        if begin < end:
            raise ValueError(f"{name} and {other} have bytes in common: the file is damaged")


def read_tensor(contents: Contents, name: str) -> np.ndarray:
    """Returns a tensor as float32, in the shape that it has in the file. Raises ValueError where its type is another."""
    dtype, shape, begin, end = contents.entries[name]
    if dtype not in _TYPES:
        raise ValueError(f"{name} is of type {dtype}: expected {', '.join(TYPE_NAMES.values())}")
    if begin < 0:
        raise ValueError(f"{name} is not stored as plain bytes in one piece: expected it as Keras writes it, not compressed")
    data = contents.read(begin, end)
    if len(data) != end - begin:
        raise ValueError(f"it ends within {name}: it is cut short")
    values = np.frombuffer(data, _TYPES[dtype])
    if dtype == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):  # what is too large for float32 is Inf, which is refused
        return values.astype(np.float32).reshape(shape)


def file_reader(path: Path, offset: int = 0) -> Callable[[int, int], bytes]:
    """Returns `Contents.read` of a file whose positions are counted from `offset`."""

    def read(begin: int, end: int) -> bytes:
        handle = os.open(path, os.O_RDONLY)
        try:
            return storage.pread_all(handle, end - begin, offset + begin)
        finally:
            os.close(handle)

    return lambda begin, end: storage.retrying(path, lambda: read(begin, end))


def types_of(contents: Contents, names: Sequence[str]) -> List[str]:
    """Returns the types of tensors other than float32, each once."""
    found = {contents.entries[name].dtype for name in names} - {"F32"}
    return sorted(TYPE_NAMES.get(dtype, dtype) for dtype in found)
