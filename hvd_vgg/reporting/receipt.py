"""The receipt of a run: `receipt.json`, by which what is in its directory can be held against what was there.

It holds the configuration, the data's digests, the code's and packages' versions, every start with its hosts, every restart,
every epoch's coverage, every evaluation with the checkpoint's digest; and the SHA-256 of the log, the result and the
checkpoints at the time of writing, the log's also as it was at each start. It is made of what the log says: `write` may be
called at any time, and a run that was killed is as good as one that was not.

It proves integrity, not authenticity: whoever can rewrite the whole directory can rewrite the receipt too. To prove a run to
someone else, give them the receipt's own SHA-256 when it ends, or the data to evaluate again (`hvd-vgg verify-run`).

A checkpoint's digests: `sha256` is over its tensors and is written in the file's own header; `header_sha256` is over that
header, which also has the names, shapes, position and configuration. The two stand for the whole file, and to write them
takes no reading of it.
"""

import hashlib
import json
import os
import struct
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional

from hvd_vgg.errors import NOT_WRITTEN, Failure
from hvd_vgg.run_dir import atomic_write_text, write_error

ABOUT = (
    "Integrity, not authenticity: whoever can rewrite this whole directory can rewrite this file. Check it by "
    "hvd-vgg verify-run RUN_DIR [--data_dir=DIR]."
)
_HEADER_LIMIT = 100_000_000  # bytes, as the safetensors library has it


class LogLine(NamedTuple):
    """A line of the log; `kind` is METADATA, LOG, or "" for one that cannot be read."""

    number: int  # from 1
    kind: str
    step: Any  # [epoch, update], "PARAMETER", "EVENT" or []
    data: Dict[str, Any]
    timestamp: float  # seconds since 1970
    began: float  # when the process that wrote it began to log: the same on all its lines, whatever becomes of the clock
    end: int  # bytes of the log up to the end of this line

    @property
    def event(self) -> str:
        """The event's name, or ""."""
        return str(self.data.get("event", "")) if self.step == "EVENT" else ""


def read_log(path: Path) -> List[LogLine]:
    """Returns the lines of dllogger.json, or [] where there is none."""
    lines, end = [], 0
    for number, text in enumerate(path.read_bytes().splitlines(keepends=True) if path.exists() else [], 1):
        end += len(text)
        try:
            if not text.startswith(b"DLLL ") or not text.endswith(b"\n"):
                raise ValueError("torn, or not DLLogger's")
            row = json.loads(text[5:])
            kind, step, data = row["type"], row.get("step"), row.get("data", {})
            if not isinstance(data, dict):
                raise ValueError("no data")
            timestamp = float(row["timestamp"])
            lines.append(LogLine(number, str(kind), step, data, timestamp, timestamp - float(row["elapsedtime"]), end))
        except (ValueError, KeyError, TypeError):
            lines.append(LogLine(number, "", None, {}, 0.0, 0.0, end))
    return lines


def read_json_lines(path: Path, length: Optional[int] = None) -> List[Dict[str, Any]]:
    """Returns the objects, one a line, in the first `length` bytes of a file, or all, without what a kill left torn."""
    rows = []
    for text in path.read_bytes()[:length].splitlines() if path.exists() else []:
        try:
            row = json.loads(text)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def read(run_dir: Path) -> Optional[Dict[str, Any]]:
    """Returns the receipt in a run directory, or None where there is none that can be read."""
    try:
        found = json.loads((run_dir / "receipt.json").read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("starts"), list) else None


def checkpoint_row(path: Path) -> Dict[str, Any]:
    """Returns file, bytes, sha256 and header_sha256 of a checkpoint, from its header; OSError, ValueError."""
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _HEADER_LIMIT + 1
        if length > _HEADER_LIMIT:
            raise ValueError("not a safetensors file")
        header = file.read(length)
    try:
        meta = json.loads(json.loads(header)["__metadata__"]["hvd_vgg"])
        digest = str(meta["sha256"])
    except (KeyError, TypeError) as error:
        raise ValueError("not a checkpoint of hvd_vgg") from error
    bytes_there, header_digest = path.stat().st_size, hashlib.sha256(start + header).hexdigest()
    return {"file": path.name, "bytes": bytes_there, "sha256": digest, "header_sha256": header_digest}


def file_row(path: Path, length: Optional[int] = None) -> Optional[Dict[str, Any]]:
    """Returns the bytes of a file and their SHA-256, of the first `length` of it; None where it is not, or is shorter."""
    if not path.is_file():
        return None
    data = path.read_bytes()[:length]
    if length is not None and len(data) < length:
        return None
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def sync(path: Path) -> None:
    """Puts on disk what was written to a file: what it is later held against must not outlive it in a power cut."""
    if path.exists():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())


def write(run_dir: Path) -> None:
    """Writes the receipt of what is in a run directory now, whole or not at all; rank 0 alone. Failure(NOT_WRITTEN)."""
    path = run_dir / "receipt.json"
    try:
        sync(run_dir / "dllogger.json")
        atomic_write_text(path, json.dumps(_content(run_dir), indent=1) + "\n")
    except OSError as error:
        raise Failure(NOT_WRITTEN, write_error(path, error)) from error


def _checkpoints(run_dir: Path) -> Iterator[Dict[str, Any]]:
    for path in sorted((run_dir / "checkpoints").glob("step-*.safetensors")):
        try:
            yield checkpoint_row(path)
        except (FileNotFoundError, ValueError):
            continue  # pruned while this was written, or damaged since: when the run goes on, that is told


def _content(run_dir: Path) -> Dict[str, Any]:
    log = run_dir / "dllogger.json"
    lines = read_log(log)
    known, starts = read(run_dir), [line for line in lines if line.event == "start"]
    # What an earlier receipt says of a start stays as it was: the log can be held against it later.
    kept: List[Any] = known["starts"] if known else []
    rows = [{"timestamp": line.timestamp, **line.data, "log": file_row(log, line.end)} for line in starts[len(kept) :]]
    return {
        "about": ABOUT,
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **from_log(lines),
        "starts": [*kept, *rows],
        "restarts": read_json_lines(run_dir / "restarts.jsonl"),
        "checkpoints": list(_checkpoints(run_dir)),
        "files": {
            "dllogger.json": file_row(log, lines[-1].end) if lines else None,  # what was read above: it may have grown
            **{name: file_row(run_dir / name) for name in ("restarts.jsonl", "result.json")},
        },
    }


def from_log(lines: List[LogLine]) -> Dict[str, Any]:
    """Returns the part of a receipt that is a function of the log."""
    parameters = [line.data for line in lines if line.step == "PARAMETER"]
    starts = [line.data for line in lines if line.event == "start"]
    return {
        "configuration": parameters[-1] if parameters else {},
        "seed": parameters[-1].get("seed") if parameters else None,
        **{name: starts[-1].get(name) if starts else None for name in ("data", "code", "packages", "environment")},
        "epochs": [{"line": line.number, **line.data} for line in lines if line.event == "coverage"],
        "evaluations": _evaluations(lines),
    }


def _evaluations(lines: List[LogLine]) -> List[Dict[str, Any]]:
    """Returns every evaluation with the digest of the checkpoint that was then saved of the same step, or None."""
    rows: List[Dict[str, Any]] = []
    newest: Dict[str, Any] = {}
    for line in lines:
        if line.event == "start":
            newest = {}
        elif line.event == "checkpoint" and line.data["step"] == newest.get("step"):
            newest["checkpoint_sha256"] = line.data["sha256"]
        elif "eval.records" in line.data and line.step:
            counts = {
                name: line.data.get(name) for name in ("eval.top1_hits", "eval.top5_hits", "eval.records", "eval.loss")
            }
            newest = {"line": line.number, "step": line.step[1], **counts, "checkpoint_sha256": None}
            rows.append(newest)
    return rows
