"""Checkpoints: written whole or not at all, checked when read, and free of anything about ranks.

`RUN_DIR/checkpoints/step-00001000.safetensors` holds the weights and momentum by name and, as JSON in its metadata, the
step and what the run is, with a SHA-256 over all tensors. `newest` and `best` beside it hold the name of such a file.
Only rank 0 calls what is here.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Tuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hvd_vgg.run.health import CONFIGURATION, NOT_WRITTEN, Failure

_NAME = re.compile(r"^step-(\d{8})\.safetensors$")
_KEY = "hvd_vgg"

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


def save(run_dir: Path, tensors: Tensors, meta: Dict[str, Any], keep: int, best: bool) -> Path:
    """Writes the checkpoint of `meta["step"]`, points to it, removes those beyond the newest `keep` and the best.

    Written under another name, read back and compared, put on disk, then renamed: a crash at any moment leaves the
    previous ones whole. Raises Failure(NOT_WRITTEN).
    """
    place = folder(run_dir)
    path = place / f"step-{meta['step']:08d}.safetensors"
    try:
        write(path, tensors, meta)
        _point(place, "newest", path)
        if best:
            _point(place, "best", path)
        _prune(run_dir, keep, path)
    except (OSError, SafetensorError, ValueError) as error:
        raise Failure(
            NOT_WRITTEN,
            f"the checkpoint {path} cannot be written: {error}. The previous ones are whole; make room, then start again "
            f"to go on from the newest",
        ) from error
    return path


def write(path: Path, tensors: Tensors, meta: Dict[str, Any]) -> None:
    """Writes one file for `load`, whole or not at all; raises OSError, SafetensorError or ValueError."""
    temporary = path.with_suffix(".safetensors.tmp")
    digest = _digest(tensors.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, temporary, metadata={_KEY: json.dumps({**meta, "sha256": digest})})
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    with safe_open(str(temporary), framework="numpy") as file:  # one tensor at a time: memory may be short
        if _digest((name, file.get_tensor(name)) for name in tensors) != digest:
            raise OSError("what was read back is not what was written")
    temporary.replace(path)
    _sync_directory(path.parent)


def load(path: Path) -> Checkpoint:
    """Returns the checkpoint in `path`; raises ValueError saying what is wrong with the file."""
    try:
        with safe_open(str(path), framework="numpy") as file:
            meta = json.loads((file.metadata() or {}).get(_KEY, "null"))
            if not isinstance(meta, dict):
                raise ValueError("not a checkpoint of hvd_vgg")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise ValueError(str(error)) from error
    if _digest(tensors.items()) != meta.pop("sha256", None):
        raise ValueError("its contents do not have the checksum written with them")
    return Checkpoint(path, tensors, meta)


def newest(run_dir: Path) -> Optional[Checkpoint]:
    """Returns the newest whole checkpoint of a run, None when there are no files.

    Raises Failure(CONFIGURATION) when there are files but none is whole: a run never starts over in silence.
    """
    faults = []
    for path in existing(run_dir):
        try:
            return load(path)
        except ValueError as error:
            faults.append(f"  {path.name}: {error}")
    if faults:
        raise Failure(
            CONFIGURATION,
            f"no checkpoint in {folder(run_dir)} is whole:\n" + "\n".join(faults) + "\nRestore one from a copy, or begin "
            "anew in another --run_dir",
        )
    return None


def pointed(run_dir: Path, name: str) -> Optional[Path]:
    """Returns the file that `newest` or `best` names, or None; a name that is no checkpoint's is as good as none."""
    try:
        found = (folder(run_dir) / name).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return folder(run_dir) / found if _NAME.match(found) else None


def clean(run_dir: Path) -> None:
    """Removes what a killed save left behind."""
    if folder(run_dir).is_dir():
        for path in folder(run_dir).glob("step-*.safetensors.tmp"):
            path.unlink()


def _digest(tensors: Iterable[Tuple[str, np.ndarray]]) -> str:
    """Returns a SHA-256 over names, types, shapes and bytes, whatever the order of the tensors."""
    each = []
    for name, tensor in tensors:
        value = np.ascontiguousarray(tensor)
        bytes_digest = hashlib.sha256(value.reshape(-1).view(np.uint8).data).hexdigest()
        each.append(f"{name} {value.dtype} {value.shape} {bytes_digest}\n")
    return hashlib.sha256("".join(sorted(each)).encode()).hexdigest()


def _point(place: Path, name: str, path: Path) -> None:
    temporary = place / f"{name}.tmp"
    with open(temporary, "w", encoding="ascii") as file:
        file.write(path.name + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(place / name)
    _sync_directory(place)


def _sync_directory(place: Path) -> None:
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _prune(run_dir: Path, keep: int, written: Path) -> None:
    best = pointed(run_dir, "best")
    # Those with a later step than the one just written were damaged, and were passed over when the run went on.
    upto = [path for path in existing(run_dir) if path.name <= written.name]
    for path in upto[keep:]:
        if path != best:
            path.unlink()
