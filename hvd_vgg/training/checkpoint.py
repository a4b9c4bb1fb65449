"""Checkpoints: written whole or not at all, checked when read, and free of anything about ranks.

`RUN_DIR/checkpoints/step-00001000.safetensors` holds the weights and momentum by name and, as JSON in its metadata, the
step and what the run is, with a SHA-256 over all tensors and another over that JSON. `best` beside it holds the name of such
a file. Only rank 0 calls what is here.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import struct
from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Tuple

import numpy as np
from safetensors import SafetensorError, safe_open

from hvd_vgg.errors import CONFIGURATION, NOT_WRITTEN, Failure
from hvd_vgg.run_dir import DISK_FULL, atomic_write_text

_NAME = re.compile(r"^step-(\d{8})\.safetensors$")
_KEY, _CHECKSUM = "hvd_vgg", "hvd_vgg_sha256"
_TYPES = {"float32": "F32", "int32": "I32"}
Tensors = Dict[str, np.ndarray]


class Checkpoint(NamedTuple):
    """What a file holds: `tensors` by name, `meta` (`step` and what the run is)."""

    path: Path
    tensors: Tensors
    meta: Dict[str, Any]


def folder(run_dir: Path) -> Path:
    """Returns where a run keeps its checkpoints."""
    return run_dir / "checkpoints"


def existing(run_dir: Path) -> List[Path]:
    """Returns the checkpoint files of a run, newest first, whole or not."""
    if not folder(run_dir).is_dir():
        return []
    found = {path.name: path for path in folder(run_dir).iterdir() if _NAME.match(path.name)}
    return [found[name] for name in sorted(found, reverse=True)]  # steps have leading zeros


def step_of(path: Path) -> int:
    """Returns the updates of which a checkpoint's name speaks."""
    return int(path.name[len("step-") :].split(".")[0])


def save(run_dir: Path, tensors: Tensors, meta: Dict[str, Any], keep: int, best: bool) -> Path:
    """Writes the checkpoint of `meta["step"]`, points to it if `best`, removes those beyond the newest `keep` and the best.

    Written under another name, put on disk, read back and compared, then renamed: a crash at any moment leaves the previous
    ones whole. Where the disk or a quota is full, those older than the newest whole one are removed before. Raises
    Failure(NOT_WRITTEN).
    """
    path = folder(run_dir) / f"step-{meta['step']:08d}.safetensors"
    try:
        odd = [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]
        if odd:
            raise OSError(f"{odd[0]} is not finite")
        try:
            write(path, tensors, meta)
        except OSError as error:
            if error.errno not in DISK_FULL or not _make_room(run_dir, path):
                raise
            write(path, tensors, meta)
        if best:
            point_to_best(path)
        _prune(run_dir, keep, path)
    except OSError as error:
        raise Failure(
            NOT_WRITTEN,
            f"the checkpoint {path} cannot be written: {error.strerror or error}. The previous ones are whole; make room, "
            f"then start again to go on from the newest",
        ) from error
    return path


def write(path: Path, tensors: Tensors, meta: Dict[str, Any]) -> None:
    """Writes one file for `load`, whole or not at all; raises OSError, before it writes where there is too little room."""
    temporary = path.with_suffix(".safetensors.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
        needed, free = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(path.parent).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"it takes {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free")
        digest = _digest(tensors.items())
        text = json.dumps({**meta, "sha256": digest})
        metadata = {_KEY: text, _CHECKSUM: _checksum(text)}
        _write(temporary, tensors, metadata)
        with safe_open(str(temporary), framework="numpy") as file:  # one tensor at a time: memory may be short
            if file.metadata() != metadata or _digest((name, file.get_tensor(name)) for name in tensors) != digest:
                raise OSError("what was read back is not what was written")
        temporary.replace(path)
        _sync_directory(path.parent)
    except (OSError, SafetensorError, ValueError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()  # where it fills the disk, the log has no room either
        raise error if isinstance(error, OSError) else OSError(str(error)) from error


def _write(path: Path, tensors: Tensors, metadata: Dict[str, str]) -> None:
    """Writes a safetensors file (its format: huggingface.co/docs/safetensors) and puts it on disk.

    The library's own writer copies all of it and holds Python's lock meanwhile, for which training would wait; this does
    neither.
    """
    header: Dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name, tensor in tensors.items():
        end = at + tensor.nbytes
        header[name] = {"dtype": _TYPES[str(tensor.dtype)], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(_bytes(tensor))
        file.flush()
        os.fsync(file.fileno())


def _bytes(tensor: np.ndarray) -> memoryview:
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data


def load(path: Path) -> Checkpoint:
    """Returns the checkpoint in `path`; raises ValueError saying what is wrong with the file."""
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            meta = json.loads(metadata.get(_KEY, "null"))
            if not isinstance(meta, dict):
                raise ValueError("not a checkpoint of hvd_vgg")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise ValueError(str(error)) from error
    if metadata.get(_CHECKSUM) != _checksum(metadata[_KEY]) or _digest(tensors.items()) != meta.pop("sha256", None):
        raise ValueError("its contents do not have the checksum written with them")
    if _NAME.match(path.name) and meta["step"] != step_of(path):
        raise ValueError(f"what is in it is of step {meta['step']}")
    return Checkpoint(path, tensors, meta)


def newest(run_dir: Path) -> Tuple[Optional[Checkpoint], Dict[Path, str]]:
    """Returns (the newest whole checkpoint of a run, or None when there are no files; what is wrong with newer ones).

    Raises Failure(CONFIGURATION) when there are files but none is whole: a run never starts over in silence.
    """
    faults: Dict[Path, str] = {}
    for path in existing(run_dir):
        try:
            return load(path), faults
        except ValueError as error:
            faults[path] = str(error)
    faults.update(dict.fromkeys(sorted(folder(run_dir).glob("step-*.bad")), "set aside as damaged"))
    if faults:
        lines = "\n".join(f"  {path.name}: {text}" for path, text in faults.items())
        raise Failure(
            CONFIGURATION,
            f"no checkpoint in {folder(run_dir)} is whole:\n{lines}\nRestore one from a copy, or begin anew in another "
            f"--run_dir",
        )
    return None, faults


def best(run_dir: Path) -> Optional[Path]:
    """Returns the file that `best` names, or None; a name that is no checkpoint's is as good as none."""
    try:
        found = (folder(run_dir) / "best").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return folder(run_dir) / found if _NAME.match(found) else None


def point_to_best(path: Path) -> None:
    """Lets `best` name the checkpoint `path`, on disk when this returns."""
    atomic_write_text(path.with_name("best"), path.name + "\n")
    _sync_directory(path.parent)


def set_aside(path: Path) -> Path:
    """Renames a damaged checkpoint so that it is not met again, and returns its new name; it is never removed."""
    return path.replace(path.with_name(f"{path.name}.bad"))


def clean(run_dir: Path) -> None:
    """Removes what a killed save left behind."""
    if folder(run_dir).is_dir():
        for path in folder(run_dir).glob("step-*.safetensors.tmp"):
            path.unlink()


def _digest(tensors: Iterable[Tuple[str, np.ndarray]]) -> str:
    """Returns a SHA-256 over names, types, shapes and bytes, whatever the order of the tensors."""
    each = []
    for name, tensor in tensors:
        each.append(f"{name} {tensor.dtype} {tensor.shape} {hashlib.sha256(_bytes(tensor)).hexdigest()}\n")
    return hashlib.sha256("".join(sorted(each)).encode()).hexdigest()


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _sync_directory(place: Path) -> None:
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _make_room(run_dir: Path, path: Path) -> bool:
    """Removes the checkpoints older than the newest whole one up to `path`, but the best; says whether it did."""
    there = existing(run_dir)
    whole = next((each for each in there if each.name <= path.name and _is_whole(each)), None)
    if whole is not None:
        _prune(run_dir, 1, whole)
    return len(existing(run_dir)) < len(there)


def _is_whole(path: Path) -> bool:
    try:
        load(path)
    except ValueError:
        return False
    return True


def _prune(run_dir: Path, keep: int, written: Path) -> None:
    """Removes the checkpoints up to `written` beyond its newest `keep`, but never the one that `best` names."""
    spared = best(run_dir)
    # Any of a later step are of before a rewind, and will be written again.
    upto = [path for path in existing(run_dir) if path.name <= written.name]
    for path in upto[keep:]:
        if path != spared:
            with contextlib.suppress(OSError):  # what was written is whole all the same
                path.unlink()
