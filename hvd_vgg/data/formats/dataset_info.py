"""What lies beside the shards of a data set and describes them: names of classes, shards, numbers of records.

None of it is needed: what is missing or damaged is as good as absent.
"""

import json
from pathlib import Path
from typing import Any, Dict, List, Tuple

from hvd_vgg.data.formats.shard_file import OpenShard

_MAX_BYTES = 2**24  # the most that is read of such a file


def class_names(path: Path) -> Tuple[str, ...]:
    """Returns the lines of a file of class names; none where there is no such file. Raises OSError; Failure(DATA)."""
    lines = [line.strip() for line in _read_text(path).split("\n")]
    return tuple(lines if lines[-1] else lines[:-1])


def tfds_records(folder: Path) -> Dict[str, List[int]]:
    """Returns the records of each shard, as tensorflow-datasets' dataset_info.json has them; 0: unknown.

    By what precedes `-?????-of-?????` in the names of a split's shards.
    """
    info = _read_json(folder / "dataset_info.json")
    return {
        f"{_get(info, 'name')}-{_get(split, 'name')}.tfrecord": [_number(count) for count in _items(split, "shardLengths")]
        for split in _items(info, "splits")
    }


def webdataset_records(folder: Path, split: str) -> Dict[str, int]:
    """Returns the records of the shards of a split, by name, as timm's _info.json has them; 0: unknown."""
    own = _get(_get(_read_json(folder / "_info.json"), "splits"), split)
    names, counts = _items(own, "filenames"), [_number(count) for count in _items(own, "shard_lengths")]
    return dict(zip(map(str, names), counts if len(counts) == len(names) else [0] * len(names)))


def _read_text(path: Path) -> str:
    try:
        return OpenShard(path).read(_MAX_BYTES, 0).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except (ValueError, RecursionError):
        return None


def _get(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def _items(value: Any, name: str) -> List[Any]:
    found = _get(value, name)
    return found if isinstance(found, list) else []


def _number(value: Any) -> int:
    """Returns a number of records, which JSON of protocol buffers has as text; 0 for anything else."""
    text = str(value)
    return int(text) if text.isdecimal() and len(text) < 12 else 0
