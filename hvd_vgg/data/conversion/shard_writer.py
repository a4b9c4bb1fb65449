"""Shards as `prepare` writes them: whole or not at all, and what is noted of each so that a killed command goes on.

OUT/.prepare holds, until all is done, `plan.json` (what is made of which source), of each shard a `SHARD.json` written
before the shard gets its name, and the shards that are being written.
"""

import contextlib
import hashlib
import json
import re
import threading
import uuid
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

from hvd_vgg import storage
from hvd_vgg.data.conversion.pictures import Encoding, Picture, make_picture
from hvd_vgg.data.conversion.sources import Split, file_name
from hvd_vgg.data.formats.example import example_parts
from hvd_vgg.data.formats.tfrecord import frame_parts
from hvd_vgg.data.manifest import ShardEntry
from hvd_vgg.data.sampler import slice_bounds

FOLDER = ".prepare"
_BUFFER_BYTES = 2**20
_HALF_WRITTEN = re.compile(r"(text|(train|validation)-[0-9]{5}-of-[0-9]{5})\.[0-9a-f]{32}\.tmp")


class Stopped(Exception):
    """Writing was given up, since another shard failed or the command ends."""


class Task(NamedTuple):
    """A shard to be written."""

    name: str
    split: Split
    ids: np.ndarray  # int64 [records]


class Note(NamedTuple):
    """What was written into a shard."""

    entry: ShardEntry
    resized: int
    converted: List[Dict[str, str]]  # of each image that was made an RGB JPEG: record, file, reason
    refused: List[Dict[str, Any]]  # of each record that was left out: the same, and its label

    def dump(self) -> Dict[str, Any]:
        """Returns it as JSON has it."""
        return {**self._asdict(), "entry": self.entry._asdict()}

    @classmethod
    def load(cls, fields: Dict[str, Any]) -> "Note":
        """Returns what `dump` returned; raises KeyError, TypeError or ValueError for anything else."""
        note = cls(ShardEntry(**fields["entry"]), int(fields["resized"]), list(fields["converted"]), list(fields["refused"]))
        if not all(isinstance(value, int) and value >= 0 for value in (note.entry.bytes, note.entry.records)):
            raise ValueError("no counts")
        return note


def tasks(split: Split, shards: int) -> List[Task]:
    """Returns the shards of a split: shard s of S holds `slice_bounds(N, s, S)` of its N records."""
    bounds = [slice_bounds(len(split.ids), number, shards) for number in range(shards)]
    return [
        Task(f"{split.name}-{number:05d}-of-{shards:05d}", split, split.ids[low:high])
        for number, (low, high) in enumerate(bounds)
    ]


def encode_record(split: Split, record: int, encoding: Encoding, classes: Sequence[str]) -> Tuple[List[bytes], Picture, str]:
    """Returns (framed Example in parts, its image, the name of the image's file) of a record.

    Raises ValueError saying why it is refused; Failure where the source cannot be read.
    """
    encoded, name, synset = split.read(record)
    picture = make_picture(encoded, name, encoding)
    name, label = file_name(split.name, record, name, picture.format), int(split.labels[record])
    features: Dict[str, Union[int, bytes]] = {
        "image/encoded": picture.encoded,
        "image/format": picture.format.encode(),
        "image/height": picture.height,
        "image/width": picture.width,
        "image/channels": picture.channels,
        "image/colorspace": picture.colorspace.encode(),
        "image/filename": name.encode("utf-8", "surrogateescape"),
        "image/class/label": label,
    }
    synset = classes[label - 1].encode("utf-8", "surrogateescape") if classes else synset
    if synset:
        features["image/class/synset"] = synset
    return frame_parts(example_parts(features)), picture, name


def write_shard(
    out: Path, task: Task, encoding: Encoding, classes: Sequence[str], stop: threading.Event, done: Callable[[int], None]
) -> Note:
    """Writes a shard and its note, both on disk when it returns; calls `done(records so far)` after each record.

    Raises OSError where it cannot be written, and leaves nothing of it; Failure where the source cannot be read; Stopped
    when `stop` is set.
    """
    temporary = out / FOLDER / f"{task.name}.{uuid.uuid4().hex}.tmp"  # two jobs never write to one file
    digest, size, resized = hashlib.sha256(), 0, 0
    converted: List[Dict[str, str]] = []
    refused: List[Dict[str, Any]] = []
    try:
        with open(temporary, "wb", buffering=_BUFFER_BYTES) as file:
            for number, record in enumerate(task.ids.tolist()):
                if stop.is_set():
                    raise Stopped
                try:
                    parts, picture, name = encode_record(task.split, record, encoding, classes)
                except ValueError as error:
                    label = int(task.split.labels[record])
                    refused.append({**_place(task.split, record), "label": label, "reason": str(error)})
                else:
                    for part in parts:
                        file.write(part)
                        digest.update(part)
                        size += len(part)
                    resized += picture.resized
                    if picture.converted:
                        converted.append({**_place(task.split, record), "file": name, "reason": picture.converted})
                done(number + 1)
            file.flush()
            storage.sync(file.fileno(), temporary)
        entry = ShardEntry(task.name, size, digest.hexdigest(), len(task.ids) - len(refused))
        note = Note(entry, resized, converted, refused)
        write_text(out, f"{FOLDER}/{task.name}.json", json.dumps(note.dump()))
        storage.replace(temporary, out / task.name)
        return note
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()  # on a full disk half a shard takes the space of others


def _place(split: Split, record: int) -> Dict[str, str]:
    return {"split": split.name, "record": split.where(record)}


def read_note(out: Path, task: Task) -> Optional[Note]:
    """Returns the note of a shard that is whole; None where the shard has to be written."""
    try:
        note = Note.load(json.loads((out / FOLDER / f"{task.name}.json").read_bytes()))
        whole = note.entry.name == task.name and (out / task.name).stat().st_size == note.entry.bytes
        return note if whole and note.entry.records + len(note.refused) == len(task.ids) else None
    except (OSError, KeyError, TypeError, ValueError, RecursionError):
        return None


def is_half_written(path: Path) -> bool:
    """Returns whether a file of OUT/.prepare is what a killed start left of a shard or a text, by its name."""
    return bool(_HALF_WRITTEN.fullmatch(path.name))


def write_text(out: Path, name: str, text: str) -> None:
    """Writes the file `name` below `out`, whole or not at all, on disk when it returns. Raises OSError.

    Whoever may read the shards may read it: `run_dir.atomic_write_text` is for what a group alone may see.
    """
    path, temporary = out / name, out / FOLDER / f"text.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
            file.flush()
            storage.sync(file.fileno(), path)
        storage.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
