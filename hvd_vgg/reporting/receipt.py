"""The receipt of a run, `receipt.json`: facts and digests that the contents of its directory can be compared with.

It has the configuration, digests of data and code, packages, every start, restart, epoch and evaluation, and the SHA-256 of
log, result and checkpoints, and of the log at each start. It proves integrity, not authenticity: whoever can rewrite the
directory can rewrite it too. To prove a run to others, give them the receipt's SHA-256 when the run ends, or the data.

A checkpoint's digests stand for the file, but only its header is read: `sha256`, of its tensors, and `state_sha256`, of them
and the run's progress, are stored there; `header_sha256` is of the header, which also has names, shapes and configuration.
"""

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

from hvd_vgg import storage
from hvd_vgg.run_dir import RunDir, atomic_write_text, writing

ABOUT = "Integrity, not authenticity: whoever can rewrite the directory can rewrite this file. Check: hvd-vgg verify-run."
_HEADER_LIMIT = 100_000_000  # bytes, that of the safetensors library


class LogLine(NamedTuple):
    """A line of the log."""

    number: int  # from 1
    kind: str  # METADATA, PARAMETER, train, evaluation, end (of a run), the name of an event, or "" if it cannot be read
    digest: Dict[str, Any]  # bytes and sha256 of the log up to the end of this line
    epoch: int  # -1 where the line has none
    step: int  # updates made by then; -1 where the line does not say
    data: Dict[str, Any]
    timestamp: float  # seconds since 1970 by the clock that its process found, and monotonic from there on
    began: float  # when its process opened the log: equal in all its lines


def read_log(path: Path) -> List[LogLine]:
    """Returns the lines of dllogger.json; [] if there is none."""
    lines, sha256, size = [], hashlib.sha256(), 0
    for number, text in enumerate(storage.read_bytes(path).splitlines(keepends=True) if path.exists() else [], 1):
        sha256.update(text)
        size += len(text)
        digest = {"bytes": size, "sha256": sha256.hexdigest()}
        try:
            lines.append(_parse_line(number, text, digest))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError):
            lines.append(LogLine(number, "", digest, -1, -1, {}, 0.0, 0.0))
    return lines


def _parse_line(number: int, text: bytes, digest: Dict[str, Any]) -> LogLine:
    if not text.startswith(b"DLLL ") or not text.endswith(b"\n"):
        raise ValueError("torn, or not a line of DLLogger's")
    row = json.loads(text[5:])
    data, timestamp = row.get("data", {}), float(row["timestamp"])
    kind, epoch, done = row["type"], -1, data.get("step", -1)
    if kind == "LOG":
        kind, epoch, done = kind_of(row.get("step"), data)
    return LogLine(number, str(kind), digest, epoch, done, data, timestamp, timestamp - float(row["elapsedtime"]))


def kind_of(step: Any, data: Dict[str, Any]) -> Tuple[str, int, int]:
    """Returns kind, epoch and step, as in LogLine, of a line that is logged as `RunLog.log` has it."""
    if isinstance(step, str):
        return data["event"] if step == "EVENT" else step, -1, data.get("step", -1)
    if not step:
        return "end", -1, data.get("step", -1)
    epoch, done = map(int, step)
    return "train" if "train.loss" in data else "evaluation", epoch, done


def read_json_lines(path: Path, length: Optional[int] = None) -> List[Dict[str, Any]]:
    """Returns the objects, one a line, in the first `length` bytes of a file or in all of it, without what a kill tore."""
    rows = []
    for text in path.read_bytes()[:length].splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(text))
    return [row for row in rows if isinstance(row, dict)]


def read(run: RunDir) -> Optional[Dict[str, Any]]:
    """Returns the receipt of a run; None if there is none that can be read."""
    try:
        found = json.loads(run.receipt.read_bytes())
    except (OSError, RecursionError, ValueError):  # RecursionError: nested as none of ours is
        return None
    return found if isinstance(found, dict) and isinstance(found.get("starts"), list) else None


def checkpoint_row(path: Path) -> Dict[str, Any]:
    """Returns file, bytes and digests of a checkpoint, reading its header only. Raises OSError, ValueError."""
    with open(path, "rb") as file:
        length = file.read(8)
        header = file.read(min(int.from_bytes(length, "little"), _HEADER_LIMIT))
    try:
        meta = json.loads(json.loads(header)["__metadata__"]["hvd_vgg"])
        digests = {name: str(meta[name]) for name in ("sha256", "state_sha256")}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError("not a checkpoint of hvd_vgg") from error
    digests["header_sha256"] = hashlib.sha256(length + header).hexdigest()
    return {"file": path.name, "bytes": path.stat().st_size, **digests}


def file_row(path: Path, length: Optional[int] = None) -> Optional[Dict[str, Any]]:
    """Returns bytes and sha256 of a file, or of its first `length` bytes; None if it is missing."""
    data = path.read_bytes()[:length] if path.is_file() else None
    return None if data is None else {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def sync(path: Path) -> None:
    """Puts what was written to a file on disk: digests of it must not outlive it in a power cut."""
    with contextlib.suppress(FileNotFoundError):
        handle = os.open(path, os.O_RDWR)
        try:
            storage.sync(handle, path)
        finally:
            os.close(handle)


def write(run: RunDir) -> None:
    """Writes the receipt of a run as it is now, whole or not at all. Rank 0 only. Raises Failure(NOT_WRITTEN)."""
    earlier = (read(run) or {"starts": []})["starts"]
    with writing(run.receipt):
        sync(run.log)
        found = content(run, read_log(run.log))
        found["starts"][: len(earlier)] = earlier  # as they were: evidence of the log as it was then
        atomic_write_text(run.receipt, json.dumps(found, indent=1) + "\n")


def content(run: RunDir, lines: List[LogLine], restarts_bytes: Optional[int] = None) -> Dict[str, Any]:
    """Returns the receipt of a run whose log has `lines`; restarts_bytes: of restarts.jsonl to read; None: all."""
    starts, evaluations = [line for line in lines if line.kind == "start"], _evaluations(lines)
    parameters = next((line.data for line in reversed(lines) if line.kind == "PARAMETER"), {})
    return {
        "about": ABOUT,
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "configuration": parameters,
        "seed": parameters.get("seed"),
        **{name: starts[-1].data.get(name) if starts else None for name in ("data", "code", "packages", "environment")},
        "init_from": next((line.data for line in reversed(lines) if line.kind == "init_from"), None),
        "epochs": [{"line": line.number, **line.data} for line in lines if line.kind == "coverage"],
        "state_sha256": evaluations[-1]["eval.state_sha256"] if evaluations else None,
        "evaluations": evaluations,
        "starts": [{"timestamp": line.timestamp, **line.data, "log": line.digest} for line in starts],
        "restarts": read_json_lines(run.restarts, restarts_bytes),
        "checkpoints": list(_checkpoints(run)),
        "files": {
            "dllogger.json": lines[-1].digest if lines else None,  # up to what was read: it may grow meanwhile
            "restarts.jsonl": file_row(run.restarts, restarts_bytes),
            "result.json": file_row(run.result),
        },
    }


def _checkpoints(run: RunDir) -> Iterator[Dict[str, Any]]:
    for path in reversed(run.list_checkpoints()):
        with contextlib.suppress(FileNotFoundError, ValueError):  # pruned meanwhile, or damaged: the next start reports that
            yield checkpoint_row(path)


def _evaluations(lines: List[LogLine]) -> List[Dict[str, Any]]:
    """Returns every evaluation with the digest of the checkpoint that the same process then saved of its step, or None."""
    rows: List[Dict[str, Any]] = []
    newest: Dict[str, Any] = {}
    for line in lines:
        if line.kind == "evaluation":
            names = ("eval.top1_hits", "eval.top5_hits", "eval.records", "eval.loss", "eval.state_sha256")
            averages = [name for name in line.data if name.startswith("eval.average_")]
            counts = {name: line.data.get(name) for name in (*names, *averages)}
            newest = {"line": line.number, "step": line.step, **counts, "checkpoint_sha256": None}
            rows.append(newest)
        elif line.kind == "start":
            newest = {}
        elif line.kind == "checkpoint" and line.step == newest.get("step"):
            newest["checkpoint_sha256"] = line.data["sha256"]
    return rows
