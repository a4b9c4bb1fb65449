"""The manifest of a prepared data set: what `prepare` wrote, which training and doctor compare with what is there.

A manifest.json of another program is none: a manifest says that `hvd-vgg prepare` made it.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from hvd_vgg import storage
from hvd_vgg.data.formats.layout import IMAGENET
from hvd_vgg.data.formats.shard_file import OpenShard, data_failure, unreadable_file
from hvd_vgg.data.index import Index

NAME = "manifest.json"
FORMAT = 1
MADE_BY = "hvd-vgg prepare"
_ADVICE = "Restore it from where the data came from, or remove it to read the shards without it"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_READ_BYTES = 2**22


class ShardEntry(NamedTuple):
    """A shard as it was written."""

    name: str
    bytes: int
    sha256: str  # hexadecimal
    records: int


class SplitEntry(NamedTuple):
    """A split as it was written; `classes`: records of each class, in order of the labels from 1."""

    records: int
    classes: Tuple[int, ...]
    shards: Tuple[ShardEntry, ...]
    converted: int  # images that were made RGB JPEGs
    resized: int
    refused: int  # records that were left out


class Manifest(NamedTuple):
    """What `prepare` wrote, of what, by which version and flags."""

    version: str  # of hvd_vgg
    source: Mapping[str, str]  # its path, layout and digest
    flags: Mapping[str, Any]
    classes: Tuple[str, ...]  # names in order of the labels; empty where unknown
    splits: Mapping[str, SplitEntry]


NONE = Manifest("", {}, {}, (), {})  # of a data set without one


def dump(manifest: Manifest) -> str:
    """Returns the text of a manifest: the same for the same contents."""
    splits = {
        name: {**split._asdict(), "classes": list(split.classes), "shards": [shard._asdict() for shard in split.shards]}
        for name, split in manifest.splits.items()
    }
    fields = {
        "format": FORMAT,
        "made_by": MADE_BY,
        **manifest._asdict(),
        "classes": list(manifest.classes),
        "splits": splits,
    }
    return json.dumps(fields, indent=1) + "\n"


def read(folder: Path) -> Optional[Manifest]:
    """Returns the manifest in a directory; None where there is none, or one of another program.

    Raises Failure(DATA) where it is damaged, or cannot be read.
    """
    path = folder / NAME
    try:
        data = storage.read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unreadable_file(path, error) from error
    if MADE_BY.encode() not in data:
        return None
    try:
        return parse(data)
    except (ValueError, RecursionError) as error:  # JSON's and UTF-8's errors are ValueErrors
        raise data_failure(f"{path} is damaged: {str(error)[:200]}. {_ADVICE}") from error


def parse(data: bytes) -> Manifest:
    """Returns the manifest that `data` holds; raises ValueError saying which field is wrong."""
    fields = _mapping(json.loads(data), "the manifest")
    if fields.get("made_by") != MADE_BY or fields.get("format") != FORMAT:
        raise ValueError(
            f"format {fields.get('format')!r:.40} of {fields.get('made_by')!r:.40}, expected {FORMAT}, {MADE_BY}"
        )
    classes = tuple(_text(name, "a class's name") for name in _list(fields, "classes"))
    source = {name: _text(value, f"source {name}") for name, value in _mapping(fields.get("source"), "source").items()}
    splits = {name: _parse_split(name, value) for name, value in _mapping(fields.get("splits"), "splits").items()}
    for name, split in splits.items():
        if classes and len(split.classes) != len(classes):
            raise ValueError(f"{name} counts {len(split.classes)} classes, {len(classes)} have names")
    return Manifest(_text(fields.get("version"), "version"), source, _mapping(fields.get("flags"), "flags"), classes, splits)


def _parse_split(name: str, value: Any) -> SplitEntry:
    fields = _mapping(value, name)
    shards = tuple(_parse_shard(f"{name} shard {i}", each) for i, each in enumerate(_list(fields, "shards")))
    counts = tuple(_count(count, f"{name} classes") for count in _list(fields, "classes"))
    numbers = [_count(fields.get(key), f"{name} {key}") for key in ("records", "converted", "resized", "refused")]
    records = sum(shard.records for shard in shards)
    if not numbers[0] == records == sum(counts):
        raise ValueError(f"{name} has {numbers[0]} records, {records} in its shards, {sum(counts)} in its classes")
    return SplitEntry(numbers[0], counts, shards, *numbers[1:])


def _parse_shard(what: str, value: Any) -> ShardEntry:
    fields = _mapping(value, what)
    name, digest = _text(fields.get("name"), f"{what}: name"), _text(fields.get("sha256"), f"{what}: sha256")
    if not _SHA256.fullmatch(digest):
        raise ValueError(f"{what}: sha256 is {digest[:80]!r}")
    if not name or "/" in name:
        raise ValueError(f"{what}: name is {name[:80]!r}")
    size, records = _count(fields.get("bytes"), f"{what}: bytes"), _count(fields.get("records"), f"{what}: records")
    return ShardEntry(name, size, digest, records)


def _mapping(value: Any, what: str) -> Dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {type(value).__name__}, expected an object")
    return value


def _list(fields: Dict[str, Any], name: str) -> List[Any]:
    if not isinstance(fields.get(name), list):
        raise ValueError(f"{name} is {type(fields.get(name)).__name__}, expected an array")
    return list(fields[name])


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is {type(value).__name__}, expected text")
    return value


def _count(value: Any, what: str) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{what} is {value!r:.40}, expected a number from 0")
    return value


def check_index(folder: Path, split: str, index: Index, sizes: Mapping[str, int], whole: bool) -> None:
    """Compares the shards of an index, and how many records they have, as `check_shards` does; sizes: by `Layout.key`."""
    entry = _read_split(folder, split) if index.layout.kind == IMAGENET else None
    if entry:
        records = dict(zip(map(index.layout.key, index.paths), np.diff(index.starts).tolist()))
        _compare_shards(folder, split, entry, sizes, records, whole)
        if whole:
            _compare_classes(folder, split, entry.classes, index)


def _read_split(folder: Path, split: str) -> Optional[SplitEntry]:
    """Returns what the manifest in a directory says of a split; None without one, or if the split is from elsewhere."""
    manifest = read(folder)
    return manifest.splits.get(split) if manifest else None


def _compare_classes(folder: Path, split: str, written: Sequence[int], index: Index) -> None:
    """Raises Failure(DATA) where a class has another number of records than the manifest says."""
    found = np.bincount(np.clip(index.labels, 0, len(written) + 1), minlength=len(written) + 2)[1 : len(written) + 1]
    odd = np.flatnonzero(found != np.array(written))
    if len(odd):
        text = f"{split} has {found[odd[0]]} records of label {odd[0] + 1}; {NAME} says {written[odd[0]]}"
        raise data_failure(f"{folder}: {text} (another split's shards, or edited?). {_ADVICE}")


def check_shards(
    folder: Path, split: str, sizes: Mapping[str, int], records: Optional[Mapping[str, int]] = None, whole: bool = True
) -> None:
    """Raises Failure(DATA) naming the first shard that is not as the manifest in `folder` says; does nothing without one.

    sizes: of the shards in bytes, by name; records: of each, where they are known; whole: whether they must be all shards of
    the split.
    """
    entry = _read_split(folder, split)
    if entry:
        _compare_shards(folder, split, entry, sizes, records, whole)


def _compare_shards(
    folder: Path,
    split: str,
    entry: SplitEntry,
    sizes: Mapping[str, int],
    records: Optional[Mapping[str, int]],
    whole: bool,
) -> None:
    written = {shard.name: shard for shard in entry.shards}
    missing = sorted(set(written).difference(sizes)) if whole else []
    if missing:
        raise data_failure(f"{folder} lacks {missing[0]} of {NAME}. Copy it there")
    for name, size in sizes.items():
        shard = written.get(name)
        if shard is None:
            if whole:
                raise data_failure(f"{folder / name} is not in {NAME}, which lists all {split} shards. {_ADVICE}")
            continue
        found = {"bytes": size, "records": records[name] if records else shard.records}
        expected = {"bytes": shard.bytes, "records": shard.records}
        if found != expected:
            texts = [" and ".join(f"{number} {noun}" for noun, number in each.items()) for each in (found, expected)]
            text = f"{folder / name} has {texts[0]}; {NAME} says {texts[1]} (cut off or replaced?)"
            raise data_failure(f"{text}. Copy the shard again")


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, hexadecimal; raises Failure(DATA) where it cannot be read."""
    value = hashlib.sha256()
    try:
        file = OpenShard(path)
        for offset in range(0, file.size, _READ_BYTES):
            value.update(file.read(_READ_BYTES, offset))
    except OSError as error:
        raise unreadable_file(path, error) from error
    return value.hexdigest()


def wrong_digests(entry: Optional[SplitEntry], paths: Sequence[Path]) -> List[str]:
    """Returns what to say of those shards whose SHA-256 is not that of the manifest, reading all of them.

    entry: of their split. Shards that it does not list are passed over. Raises Failure(DATA) where a shard cannot be read.
    """
    written = {shard.name: shard.sha256 for shard in entry.shards} if entry else {}
    found = [(path, file_sha256(path)) for path in paths if path.name in written]
    return [
        f"data: {path}: its SHA-256 is {value}, {NAME} says {written[path.name]}: damaged or replaced. Copy the shard again"
        for path, value in found
        if value != written[path.name]
    ]
