"""Checkpoints: written whole or not at all, verified when read, and free of anything about ranks.

`RUN_DIR/checkpoints/step-00001000.safetensors` holds the variables of `training.state.State` by name. Its metadata hold, as
JSON, the step and what the run is, with `sha256` over all tensors and `state_sha256`, and another SHA-256 over that JSON.
`best` beside it holds the name of such a file, and so does `best_average`, of the best average of weights. All functions are
for rank 0 alone.
"""

import contextlib
import errno
import hashlib
import json
import shutil
import struct
from pathlib import Path
from typing import Any, Dict, Iterable, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from safetensors import SafetensorError, safe_open

from hvd_vgg import storage
from hvd_vgg.errors import CONFIGURATION, NOT_WRITTEN, Failure
from hvd_vgg.run_dir import DISK_FULL, RunDir, atomic_write_text, checkpoint_step

BEST, BEST_AVERAGE = "best", "best_average"  # files that hold the name of a checkpoint
AVERAGE_SUFFIX = "/average"  # of a variable's name: its moving average
META_KEY, _CHECKSUM = "hvd_vgg", "hvd_vgg_sha256"
MOST_HEADER_BYTES = 100_000_000  # of the safetensors library
_TYPES = {"float32": "F32", "int32": "I32"}
# Of a run's progress what decides what comes next. The rest depends on when processes started, stopped and looked.
STATE_PROGRESS = ("step", "skipped_steps", "bad_records")

Tensors = Dict[str, np.ndarray]


class Checkpoint(NamedTuple):
    """What a file holds: `tensors` by name, and `meta` (`step`, progress, and what the run is)."""

    path: Path
    tensors: Tensors
    meta: Dict[str, Any]


def save(run_dir: RunDir, tensors: Tensors, meta: Dict[str, Any], keep: int, best: Sequence[str]) -> Path:
    """Writes the checkpoint of `meta["step"]`, points those of BEST and BEST_AVERAGE that are in `best` to it, and prunes
    all but the newest `keep`.

    Written under another name, synced to disk, read back and compared, then renamed: a crash at any moment leaves the
    previous ones whole. If the disk or a quota is full, those older than the newest whole one are removed first. Raises
    Failure(NOT_WRITTEN).
    """
    path = run_dir.checkpoint(meta["step"])
    try:
        bad = [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]
        if bad:
            raise OSError(f"{bad[0]} is not finite")
        try:
            write(path, tensors, meta)
        except OSError as error:
            if error.errno not in DISK_FULL or not _make_room(run_dir, path):
                raise
            write(path, tensors, meta)
        point_to_best(path, best)
        _prune(run_dir, keep, path)
    except OSError as error:
        raise Failure(
            NOT_WRITTEN,
            f"the checkpoint {path} cannot be written: {error.strerror or error}. The previous ones are whole; make room, "
            f"then start again to continue from the newest",
        ) from error
    return path


def write(path: Path, tensors: Tensors, meta: Dict[str, Any]) -> None:
    """Writes one file for `load`, whole or not at all; raises OSError, before it writes if there is too little room."""
    temporary = path.with_suffix(".safetensors.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
        needed, free = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(path.parent).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"it takes {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free")
        digest = tensors_sha256(tensors.items())
        text = json.dumps({**meta, "sha256": digest, "state_sha256": state_sha256(digest, meta)})
        metadata = {META_KEY: text, _CHECKSUM: _checksum(text)}
        _write_safetensors(temporary, tensors, metadata)
        with safe_open(str(temporary), framework="numpy") as file:  # one tensor at a time: memory may be short
            if file.metadata() != metadata or tensors_sha256((name, file.get_tensor(name)) for name in tensors) != digest:
                raise OSError("what was read back is not what was written")
        storage.replace(temporary, path)
        storage.sync_directory(path.parent)
    except (OSError, SafetensorError, ValueError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()  # if it fills the disk, the log has no room either
        raise error if isinstance(error, OSError) else OSError(str(error)) from error


def _write_safetensors(path: Path, tensors: Tensors, metadata: Dict[str, str]) -> None:
    """Writes a safetensors file (its format: huggingface.co/docs/safetensors) and syncs it to disk.

    The library's own writer copies everything and holds the GIL meanwhile, for which training would wait; this does neither.
    """
    header: Dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {"dtype": _TYPES[str(tensor.dtype)], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(_bytes(tensor))
        file.flush()
        storage.sync(file.fileno(), path)


def _bytes(tensor: np.ndarray) -> memoryview:
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data


def load(path: Path) -> Checkpoint:
    """Returns the checkpoint in `path`; raises ValueError with what is wrong with the file.

    Raises Failure(LOST_RANK) where storage does not come back: the file may be whole.
    """
    try:
        storage.require_readable(path)
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            meta = json.loads(metadata.get(META_KEY, "null"))
            if not isinstance(meta, dict):
                raise ValueError("not a checkpoint of hvd_vgg")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise ValueError(str(error)) from error
    is_whole = tensors_sha256(tensors.items()) == meta.pop("sha256", None)
    if not is_whole or metadata.get(_CHECKSUM) != _checksum(metadata[META_KEY]):
        raise ValueError("its contents do not match the checksum written with them")
    meta.pop("state_sha256", None)  # of what is returned
    if checkpoint_step(path) not in (None, meta["step"]):
        raise ValueError(f"its contents are of step {meta['step']}")
    return Checkpoint(path, tensors, meta)


def newest(run_dir: RunDir, copy: Optional[RunDir] = None) -> Tuple[Optional[Checkpoint], Dict[Path, str]]:
    """Returns (the newest whole checkpoint of a run, or None if there are no files; what is wrong with newer ones).

    copy: the run's --checkpoint_copy_dir, used for what the first directory lacks, or has damaged; where it cannot be read,
    a warning, as long as the first directory holds a whole checkpoint. Raises Failure(CONFIGURATION) if there are files but
    none is whole: a run never starts over silently. Raises Failure(LOST_RANK) where storage does not come back, rather than
    return an older one.
    """
    faults: Dict[Path, str] = {}
    own, copies, no_copies = run_dir.list_checkpoints(), [], None  # the last: why copies cannot be read
    try:
        copies = copy.list_checkpoints() if copy else []
    except Failure as failure:
        no_copies = failure
    for name in sorted({path.name for path in (*own, *copies)}, reverse=True):
        unread = None
        for path in (path for path in (*own, *copies) if path.name == name and not (no_copies and path in copies)):
            try:
                found = load(path)
            except ValueError as error:
                faults[path] = str(error)
            except Failure as failure:
                if path in own:
                    unread = failure
                else:
                    no_copies = failure
            else:
                if no_copies:
                    text = f"the copies of checkpoints cannot be used: {no_copies.message}"
                    storage.warn_once("copies", f"{text}. The run continues from {found.path}")
                return found, faults
        if unread:
            raise unread
    if no_copies:
        fix = "mend it, or start without --checkpoint_copy_dir if it holds no checkpoint of this run"
        raise Failure(no_copies.code, f"{run_dir.checkpoints} holds no whole checkpoint, and {no_copies.message}: {fix}")
    for place in [run_dir, copy] if copy else [run_dir]:
        with contextlib.suppress(OSError):
            faults.update(dict.fromkeys(sorted(place.checkpoints.glob("step-*.bad")), "set aside as damaged"))
    if faults:
        lines = "\n".join(f"  {path if copy else path.name}: {text}" for path, text in faults.items())
        raise Failure(
            CONFIGURATION,
            f"no checkpoint in {run_dir.checkpoints} is whole:\n{lines}\nRestore one from a copy, or start over in another "
            f"--run_dir",
        )
    return None, faults


def best(run_dir: RunDir, name: str = BEST) -> Optional[Path]:
    """Returns the file that BEST or BEST_AVERAGE names, or None if it names none, or something else than a checkpoint."""
    try:
        path = run_dir.checkpoints / storage.read_bytes(run_dir.checkpoints / name).decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return path if path.parent == run_dir.checkpoints and checkpoint_step(path) is not None else None


def point_to_best(path: Path, names: Sequence[str]) -> None:
    """Points the files `names`, of BEST and BEST_AVERAGE, at the checkpoint `path`; on disk when this returns."""
    for name in names:
        atomic_write_text(path.with_name(name), path.name + "\n")
    if names:
        storage.sync_directory(path.parent)


def set_aside(path: Path) -> Path:
    """Renames a damaged checkpoint, so that it is not read again, and returns its new name; it is never removed."""
    return path.replace(path.with_name(f"{path.name}.bad"))


def clean(run_dir: RunDir) -> None:
    """Removes what a killed save left behind."""
    with contextlib.suppress(OSError):  # it is in nobody's way
        for path in run_dir.checkpoints.glob("step-*.safetensors.tmp"):
            path.unlink()


def averaged(averages: Mapping[str, Any], names: Iterable[str]) -> Dict[str, Any]:
    """Returns the averages of the variables `names`, under their names; KeyError without."""
    return {name: averages[f"{name}{AVERAGE_SUFFIX}"] for name in names}


def averaged_name(name: str) -> str:
    """Returns the name of the variable of which `name` is the average; "" where it is none."""
    return name[: -len(AVERAGE_SUFFIX)] if name.endswith(AVERAGE_SUFFIX) else ""


def tensors_sha256(tensors: Iterable[Tuple[str, np.ndarray]]) -> str:
    """Returns a SHA-256 over names, types, shapes and bytes, whatever the order of the tensors."""
    return _checksum("".join(sorted(f"{name} {tensor_digest(tensor)}\n" for name, tensor in tensors)))


def tensor_digest(tensor: np.ndarray) -> str:
    """Returns type, shape and the SHA-256 of the bytes of a tensor."""
    return f"{tensor.dtype} {tensor.shape} {hashlib.sha256(_bytes(tensor)).hexdigest()}"


def state_sha256(digest: str, progress: Mapping[str, Any]) -> str:
    """Returns the one number of a run's state: a SHA-256 over its tensors and what of its progress decides what comes next.

    digest: `tensors_sha256` of all variables; progress: fields of TrainProgress, of which STATE_PROGRESS counts. Two
    runs of one configuration that have it in common are equal in every bit from there on.
    """
    kept = {name: progress.get(name) for name in STATE_PROGRESS}
    # A run that has been rewound knows of steps that it will skip.
    kept["skipped_steps"] = [step for step in progress.get("skipped_steps", []) if step < progress["step"]]
    return _checksum(json.dumps([digest, kept], sort_keys=True))


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _make_room(run_dir: RunDir, path: Path) -> bool:
    """Removes the checkpoints older than the newest whole one up to `path`, but the best; says whether it removed any."""
    try:
        there = run_dir.list_checkpoints()
        whole = next((each for each in there if each.name <= path.name and _is_whole(each)), None)
        if whole is not None:
            _prune(run_dir, 1, whole)
        return len(run_dir.list_checkpoints()) < len(there)
    except Failure:
        return False  # what there is cannot be read at the moment


def _is_whole(path: Path) -> bool:
    try:
        load(path)
    except ValueError:
        return False
    return True


def _prune(run_dir: RunDir, keep: int, written: Path) -> None:
    """Removes the checkpoints up to `written` beyond its newest `keep`, but never the best ones."""
    # Later steps are from before a rewind, and will be written again.
    try:
        candidates = [path for path in run_dir.list_checkpoints() if path.name <= written.name]
        spared = [best(run_dir, name) for name in (BEST, BEST_AVERAGE)]
    except Failure:
        return  # what there is, or which is the best, is not known at the moment
    for path in candidates[keep:]:
        if path not in spared:
            with contextlib.suppress(OSError):  # what was written is whole all the same
                path.unlink()
