"""Lists what is in an HDF5 file, in a process of its own: python -m hvd_vgg.weights.hdf5_child BEGIN SIZE < FILE.

libhdf5 may crash, hang or take all memory on a damaged file, and follows links into others. So it runs here, under limits,
and reads structure alone; the bytes of tensors are read by the process that asked. The file is what standard input is, from
BEGIN on for SIZE bytes. Prints one JSON object: `datasets`, lists of name, NumPy's type, shape and first byte (null where it
is not stored in one piece); `order`, names of weights as a legacy file of Keras orders them, or null; `names`, of layers by
their groups, as Keras 3 writes them; or `error`.
"""

import io
import json
import os
import sys
from typing import Any, Dict, List, Optional

from hvd_vgg.weights.limits import limit_this_process

_MOST_OBJECTS, _MOST_DEPTH = 5000, 12
_MOST_MEMORY = 2**30  # bytes
_MOST_CPU_SECONDS = 60


class Window(io.RawIOBase):
    """A part of standard input, which is a file, as a file."""

    def __init__(self, begin: int, size: int) -> None:
        super().__init__()
        self._begin, self._size, self._position = begin, size, 0

    def readable(self) -> bool:
        """It can be read."""
        return True

    def seekable(self) -> bool:
        """It can be positioned."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """Sets the position, and returns it."""
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def tell(self) -> int:
        """Returns the position."""
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Reads as much as `buffer` holds, or there is."""
        count = max(0, min(len(buffer), self._size - self._position))
        data = os.pread(0, count, self._begin + self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


class Walk:
    """All datasets of a file, each name once; every link is one within it."""

    def __init__(self, h5py: Any) -> None:
        self.h5py = h5py
        self.datasets: List[List[Any]] = []
        self.names: Dict[str, str] = {}
        self.weight_names: Dict[str, List[str]] = {}
        self._objects = 0

    def group(self, group: Any, prefix: str, depth: int) -> None:
        """Lists a group whose members' names begin with `prefix`. Raises ValueError."""
        if depth > _MOST_DEPTH:
            raise ValueError("its groups are nested too deeply")
        if "weight_names" in group.attrs:
            self.weight_names[prefix] = texts(group.attrs["weight_names"])
        if isinstance(group.attrs.get("name"), str):
            self.names[prefix] = group.attrs["name"]
        for name in group:
            self._objects += 1
            if self._objects > _MOST_OBJECTS:
                raise ValueError(f"it has more than {_MOST_OBJECTS} groups and datasets")
            if not isinstance(group.get(name, getlink=True), self.h5py.HardLink):
                raise ValueError(f"{prefix}{name} is a link to something elsewhere, which is not followed")
            member = group[name]
            if isinstance(member, self.h5py.Group):
                self.group(member, f"{prefix}{name}/", depth + 1)
            elif isinstance(member, self.h5py.Dataset):
                self.dataset(member, f"{prefix}{name}")

    def dataset(self, dataset: Any, name: str) -> None:
        """Lists a dataset. Raises ValueError where its bytes are, or may be, in another file."""
        made = dataset.id.get_create_plist()
        layout, contiguous = made.get_layout(), self.h5py.h5d.CONTIGUOUS
        if layout not in (contiguous, self.h5py.h5d.CHUNKED, self.h5py.h5d.COMPACT):
            raise ValueError(f"{name} is a virtual dataset, whose numbers are elsewhere")
        if made.get_external_count():
            raise ValueError(f"{name} has its numbers in another file, which is not opened")
        if dataset.shape is None:
            return
        whole = layout == contiguous and not made.get_nfilters()
        offset = dataset.id.get_offset() if whole else None
        self.datasets.append([name, dataset.dtype.str, list(dataset.shape), offset])


def texts(values: Any) -> List[str]:
    """Returns an attribute's list of names."""
    return [value.decode(errors="replace") if isinstance(value, bytes) else str(value) for value in list(values)]


def legacy_order(file: Any, walk: Walk) -> Optional[List[str]]:
    """Returns the names of all weights in the order of a legacy file of Keras; None of others."""
    prefix = "model_weights/" if "model_weights" in file else ""
    root = file["model_weights"] if prefix else file
    if "layer_names" not in root.attrs:
        return None
    layers = [f"{prefix}{layer}/" for layer in texts(root.attrs["layer_names"])]
    return [f"{layer}{weight}" for layer in layers for weight in walk.weight_names.get(layer, [])]


def listing(begin: int, size: int) -> Dict[str, Any]:
    """Returns what is printed."""
    try:
        import h5py
    except ImportError as error:
        return {"error": f"HDF5 is read by h5py, which cannot be imported ({error}): install h5py"}
    limit_this_process(_MOST_MEMORY, _MOST_CPU_SECONDS)
    try:
        with h5py.File(Window(begin, size), "r") as file:
            walk = Walk(h5py)
            walk.group(file, "", 0)
            return {"datasets": walk.datasets, "order": legacy_order(file, walk), "names": walk.names}
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, MemoryError, RecursionError) as error:
        text = str(error.args[0] if error.args else type(error).__name__)
        return {"error": text if isinstance(error, ValueError) else f"HDF5 says: {text}"}


if __name__ == "__main__":
    print(json.dumps(listing(int(sys.argv[1]), int(sys.argv[2]))))
