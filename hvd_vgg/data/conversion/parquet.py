"""Data sets of Hugging Face in Parquet: a row an image, columns image {bytes, path} and label. Read by pyarrow.

pyarrow is imported here alone, for those who need it. What its files say of classes, as JSON, is read and never evaluated.
"""

import json
import re
import threading
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from hvd_vgg import storage
from hvd_vgg.data.formats.layout import shorten
from hvd_vgg.data.formats.shard_file import MAX_RECORD_BYTES, Shard, data_failure, regular_file_size, unreadable_file
from hvd_vgg.errors import CONFIGURATION, Failure

_WORDS = {"train": ("train",), "validation": ("validation", "valid", "val")}
_NUMBERED = re.compile(r"(?P<name>.*-)(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})(?P<rest>.*)\.parquet")
_GROUP_BYTES = 2**32  # of a row group, which is read as a whole
_reading = threading.local()  # the row group that each thread reads from


class Columns(NamedTuple):
    """Where a file has its images and labels, and the names of classes that its metadata have."""

    image: str
    label: str
    classes: Tuple[str, ...]


def find(folder: Path, split: str) -> List[Path]:
    """Returns the files of a split, in order of name; none where there are none.

    They are named SPLIT-*.parquet, in the directory or in `data`, or are all those in a directory of the split's name.
    Raises Failure(DATA) where one of a numbered set is missing.
    """
    try:
        for word in _WORDS[split]:
            for root in (folder, folder / "data"):
                found = sorted(root.glob(f"{word}-*.parquet")) or sorted((root / word).glob("*.parquet"))
                if found:
                    _require_complete(root, found)
                    return found
    except OSError as error:
        raise unreadable_file(folder, error) from error
    return []


def _require_complete(root: Path, paths: Sequence[Path]) -> None:
    sets: Dict[Tuple[str, int], List[int]] = {}
    for match in filter(None, (_NUMBERED.fullmatch(path.name) for path in paths)):
        sets.setdefault((match["name"], int(match["count"])), []).append(int(match["number"]))
    for (name, count), numbers in sets.items():
        missing = [f"{name}{number:05d}-of-{count:05d}" for number in range(count) if number not in set(numbers)]
        if missing:
            raise data_failure(f"{root} lacks {len(missing)} of its {count} files: {shorten(missing)}. Download them")
        if len(numbers) > count:
            raise data_failure(f"{root} has {len(numbers)} files {name}*-of-{count:05d}; expected {count}. Move others away")


def open_file(path: Path) -> Any:
    """Returns pyarrow's ParquetFile; raises Failure(DATA), or Failure(CONFIGURATION) where pyarrow is missing."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise Failure(CONFIGURATION, f"{path.name} is read by pyarrow: {error}; pip install pyarrow") from error
    try:
        size = regular_file_size(path, storage.retrying(path, path.stat))
        if size == 0:
            raise data_failure(f"{path} is empty (0 bytes); expected Parquet. Download it again")
        return storage.retrying(path, lambda: parquet.ParquetFile(path, page_checksum_verification=True))
    except Failure:
        raise
    except Exception as error:  # pyarrow's own and Python's, a dozen kinds for damaged bytes
        raise _damaged(path, error) from error


def find_columns(path: Path, image: str, label: str) -> Columns:
    """Returns the columns of images and labels: those named, else what the metadata call so, else `image` and `label`.

    Raises Failure(DATA) where a column is missing or holds something else.
    """
    file = open_file(path)
    try:
        schema, features = file.schema_arrow, _features(file)
    except Exception as error:
        raise _damaged(path, error) from error
    kinds = {name: each.get("_type") for name, each in features.items() if isinstance(each, dict)}
    image, label = image or _only(kinds, "Image", "image"), label or _only(kinds, "ClassLabel", "label")
    for name in (image, label):
        if name not in schema.names:
            has = shorten([ascii(each)[1:-1][:64] for each in schema.names])
            raise data_failure(
                f"{path} has no column {name}; it has {has or 'none'}. Name them with --image_feature and --label_feature"
            )
    from pyarrow import types

    kind = schema.field(image).type
    inner = [kind.field(i) for i in range(kind.num_fields)] if types.is_struct(kind) else []
    binary = next((field.type for field in inner if field.name == "bytes"), kind)
    if not (types.is_binary(binary) or types.is_large_binary(binary)):
        raise data_failure(f"{path}: column {image} is {str(kind)[:64]}; expected image {{bytes, path}}, or bytes")
    if not types.is_integer(schema.field(label).type):
        raise data_failure(f"{path}: column {label} is {str(schema.field(label).type)[:64]}; expected integers")
    names = (features.get(label) or {}).get("names") if isinstance(features.get(label), dict) else None
    classes = tuple(names) if isinstance(names, list) and all(isinstance(each, str) for each in names) else ()
    return Columns(image, label, classes)


def _features(file: Any) -> Dict[str, Any]:
    """Returns what Hugging Face's `datasets` notes of the columns; nothing where there is nothing of that form."""
    try:
        noted = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])["info"]["features"]
        return noted if isinstance(noted, dict) else {}
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}


def _only(kinds: Dict[str, Any], kind: str, default: str) -> str:
    found = [name for name, each in kinds.items() if each == kind]
    return found[0] if len(found) == 1 else default


def scan(path: Path, columns: Columns) -> Shard:
    """Returns the rows of a file: their numbers as offsets, no lengths, and their labels; images are not read.

    Raises Failure(DATA) where the file is damaged, has no rows, or a row has no label.
    """
    file = open_file(path)
    try:
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        largest = max((group.total_byte_size for group in groups), default=0)
        if largest > _GROUP_BYTES:
            text = f"it has a row group of {largest / 1e9:.1f} GB, which would be read as a whole"
            raise data_failure(f"{path}: {text}; expected at most {_GROUP_BYTES / 1e9:.1f}. Write it with smaller groups")
        column = file.read(columns=[columns.label], use_threads=False).column(0)
        rows = sum(group.num_rows for group in groups)
        if column.null_count or len(column) != rows or not rows:
            found = f"{len(column) - column.null_count} labels for {rows} rows"
            raise data_failure(f"{path} has {found}; expected a label for each, and at least one row")
        labels = column.to_numpy().astype(np.int64)
    except Failure:
        raise
    except Exception as error:
        raise _damaged(path, error) from error
    worst = int(np.argmax((labels < -(2**31)) | (labels >= 2**31)))
    if not -(2**31) <= labels[worst] < 2**31:
        raise data_failure(f"{row_place(path, worst)}: label {labels[worst]}; expected one that a class has")
    return Shard(np.arange(rows, dtype=np.int64), np.zeros(rows, np.uint32), labels.astype(np.int32))


def row_place(path: Path, row: int) -> str:
    """Returns where a row is, for messages."""
    return f"{path}, row {row}"


def read(path: Path, columns: Columns, row: int) -> Tuple[bytes, str]:
    """Returns (encoded image, its file's name, or "" if there is none) of a row. May be called on any thread.

    Each thread keeps the row group that it reads from. Raises ValueError where the row cannot be used, Failure(DATA) where
    the file cannot be read.
    """
    try:
        first, images = _group_of(path, columns, row)
        value = images[row - first].as_py()
    except Failure:
        raise
    except MemoryError as error:
        raise _no_memory(path, error) from error
    except OSError as error:
        if error.errno:  # of the system, rather than of pyarrow about the file's contents
            raise unreadable_file(path, error) from error
        raise ValueError(_reason(error)) from error
    except Exception as error:
        raise ValueError(_reason(error)) from error
    encoded, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, "")
    if not isinstance(encoded, bytes) or not 0 < len(encoded) <= MAX_RECORD_BYTES:
        has = f"{len(encoded)} bytes" if isinstance(encoded, bytes) else "no bytes; it names a file, which is not read"
        raise ValueError(f"its image has {has}; expected 1 to {MAX_RECORD_BYTES} bytes")
    return encoded, name if isinstance(name, str) else ""


def _group_of(path: Path, columns: Columns, row: int) -> Tuple[int, Any]:
    """Returns the first row of the row group that holds a row, and the images of the group."""
    held: Optional[Tuple[Path, int, int, Any]] = getattr(_reading, "group", None)
    if held is None or held[0] != path or not held[1] <= row < held[2]:
        _reading.group = None  # before another takes memory too
        opened = getattr(_reading, "file", None)
        if opened is None or opened[0] != path:
            opened = _reading.file = path, open_file(path)
        counts = [opened[1].metadata.row_group(number).num_rows for number in range(opened[1].metadata.num_row_groups)]
        ends = np.cumsum(counts)
        group = int(np.searchsorted(ends, row, side="right"))
        table = opened[1].read_row_group(group, columns=[columns.image], use_threads=False)
        if table.num_rows != counts[group]:
            raise ValueError(f"its row group has {table.num_rows} rows; expected {counts[group]}")
        held = _reading.group = path, int(ends[group]) - counts[group], int(ends[group]), table.column(0)
    return held[1], held[3]


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:200].encode("unicode_escape").decode()  # it may quote the file
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _no_memory(path: Path, error: Exception) -> Failure:
    text = f"{path}: no memory for one of its row groups, which each thread reads as a whole ({_reason(error)})"
    return Failure(CONFIGURATION, f"{text}: choose fewer --input_threads, or free memory")


def _damaged(path: Path, error: Exception) -> Failure:
    if isinstance(error, MemoryError):
        return _no_memory(path, error)
    if isinstance(error, OSError) and error.errno:
        return unreadable_file(path, error)
    return data_failure(f"{path} is no whole Parquet file ({_reason(error)}). Download it again")
