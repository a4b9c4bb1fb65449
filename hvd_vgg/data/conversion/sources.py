"""What `prepare` reads: every layout of training, ILSVRC2012's archives and Parquet, and which of their records it takes."""

import functools
import hashlib
import itertools
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from hvd_vgg import storage
from hvd_vgg.config import PrepareConfig
from hvd_vgg.data.conversion import ilsvrc, parquet
from hvd_vgg.data.formats.layout import FOLDERS, IMAGENET, TITLES, WEBDATASET, Layout, find_split, shard_bytes, shorten
from hvd_vgg.data.formats.shard_file import IMAGE_SUFFIXES, Shard, data_failure, unreadable_file
from hvd_vgg.data.index import Index, find_label_base, labels_outside, scan_shard
from hvd_vgg.data.reader import BadRecord, read_named_image
from hvd_vgg.errors import DATA, Failure
from hvd_vgg.seeds import PREPARING, raw_draws
from hvd_vgg.text import plural

ILSVRC, PARQUET = "ilsvrc", "parquet"  # of --data_format, which training does not read
_TITLES = {**TITLES, ILSVRC: "archives of ILSVRC2012", PARQUET: "Parquet of Hugging Face"}
_UNPACKED = "a directory of images with a list of labels"
_MOST_LABELS = 2**31 - 1


class Source(NamedTuple):
    """A split as it was found: what is scanned, how a record is read, and what the order of its records is."""

    title: str  # the layout, for people
    layout: Layout
    paths: List[Path]  # the file or directory of each part that is scanned
    scan: Callable[[int], Shard]  # of a part, by number
    read: Callable[[Index, int], Tuple[bytes, str, bytes]]  # as `read_named_image`
    where: Callable[[Index, int], str]  # a record's place, for messages
    sorted_by_class: bool
    note: str = ""  # what is to be said of it


class Split(NamedTuple):
    """The records of a split that are written; `origin` is the index of the source."""

    name: str
    source: Source
    origin: Index
    labels: np.ndarray  # int32 [records of the source]: as they are written, from 1; 0: of a class that is left out
    ids: np.ndarray  # int64 [records]: those that are written, in this order

    def read(self, record: int) -> Tuple[bytes, str, bytes]:
        """Returns (encoded image, file's name, class's name) of a record; raises ValueError saying why it is refused.

        Raises Failure where the source cannot be read at all.
        """
        try:
            return self.source.read(self.origin, record)
        except BadRecord as bad:
            if isinstance(bad.__cause__, OSError):  # of storage, and not of the image: it may be sound
                raise data_failure(f"{self.where(record)}: {bad.reason}. Start again when it can be read") from bad
            raise ValueError(bad.reason) from bad

    def where(self, record: int) -> str:
        """Returns a record's place in the source, for messages."""
        return self.source.where(self.origin, record)


class Selection(NamedTuple):
    """What is written: the splits, and the names of their classes in order of the labels, empty where unknown."""

    splits: List[Split]
    classes: Tuple[str, ...]
    num_classes: int
    label_base: int  # of the source

    def class_name(self, number: int) -> str:
        """Returns the name of a class by its number from 0, or its label where it has none."""
        return self.classes[number] if self.classes else str(number + 1)


def find_source(config: PrepareConfig, split: str) -> Source:
    """Returns a split of --source, detected, or as --data_format says.

    Raises Failure(DATA) where it is missing, or there in several layouts; Failure(CONFIGURATION) where a library is missing.
    """
    found = _find_source(config, split)
    if split == "validation" and config.validation_labels and found.title not in (_TITLES[ILSVRC], _UNPACKED):
        raise data_failure(f"{config.source} is {found.title}, which has labels of its own. Leave out --validation_labels")
    return found


def _find_source(config: PrepareConfig, split: str) -> Source:
    root, kind = Path(config.source), config.data_format
    try:
        if not storage.retrying(root, root.exists):
            raise data_failure(f"{root} is not there (now in {Path.cwd()}). Name the directory to convert with --source")
        if storage.retrying(root, root.is_file):
            return _of_file(config, root, split)
        found = _archives(config, root, split) if kind in ("auto", ILSVRC) else None
        rows = _parquet_files(config, root, split) if kind in ("auto", PARQUET) else []
    except OSError as error:
        raise unreadable_file(root, error) from error
    if kind == ILSVRC or (found and kind != "auto"):
        return found or _raise_missing(config, split, f"{root} has no {_archive_name(config, split)}")
    if kind == PARQUET:
        return _of_parquet(config, root, rows) if rows else _raise_missing(config, split, f"{root} has no {split}-*.parquet")
    try:
        other: Optional[Source] = _of_layout(config, split)
    except Failure as failure:
        flat = _flat_folder(config, root, split)
        if flat and not found and not rows:
            return flat
        if not found and not rows:
            twin = "validation" if split == "train" else "train"
            there = kind == "auto" and _parquet_files(config, root, twin)
            text = f"{root} has {twin}-*.parquet, but no {split}-*.parquet: copy it there"
            raise _missing(config, split, text if there else failure.message) from failure
        other = None
    kinds = [ILSVRC] * bool(found) + [PARQUET] * bool(rows) + [other.layout.kind for other in [other] if other]
    if len(kinds) > 1:
        shown = ", ".join(f"{_TITLES[each]} (--data_format={each})" for each in kinds)
        raise data_failure(f"{root} has {split} data in several layouts: {shown}. Choose one with --data_format")
    return found or other or _of_parquet(config, root, rows)


def _missing(config: PrepareConfig, split: str, message: str) -> Failure:
    prefix = "" if message.startswith("data: ") else "data: "
    others = [each for each in config.splits if each != split]
    return Failure(DATA, f"{prefix}{message}" + f". Or convert --splits={others[0]} alone" * bool(others))


def _raise_missing(config: PrepareConfig, split: str, message: str) -> Source:
    raise _missing(config, split, message)


def _archive_name(config: PrepareConfig, split: str) -> str:
    pattern = config.train_pattern if split == "train" else config.validation_pattern
    usual = ilsvrc.TRAIN_TAR if split == "train" else ilsvrc.VALIDATION_TAR
    return pattern if pattern and config.data_format == ILSVRC else usual


def _of_file(config: PrepareConfig, path: Path, split: str) -> Source:
    """Returns the split that is one file; --splits must name it alone."""
    if len(config.splits) > 1:
        raise data_failure(
            f"{path} is one file, and --splits={','.join(config.splits)} are two. Name a directory that has both, or the "
            f"split that the file is: --splits=train or --splits=validation"
        )
    if config.data_format == PARQUET or (config.data_format == "auto" and path.suffix == ".parquet"):
        return _of_parquet(config, path.parent, [path])
    if config.data_format == ILSVRC or (config.data_format == "auto" and path.name == _archive_name(config, split)):
        return _of_archive(config, path, split)
    layout, paths = find_split(config.of_file(path), split)
    return _from_layout(layout, paths)


def _archives(config: PrepareConfig, root: Path, split: str) -> Optional[Source]:
    path = root / _archive_name(config, split)
    if path.is_file():
        return _of_archive(config, path, split)
    others = [each for each in (ilsvrc.TRAIN_TAR, ilsvrc.VALIDATION_TAR) if (root / each).exists()]
    if others:
        raise _missing(config, split, f"{root} has {others[0]}, but no {path.name}: copy it there")
    return None


def _of_archive(config: PrepareConfig, path: Path, split: str) -> Source:
    train = path if split == "train" else path.parent / _archive_name(config, "train")
    parts = ilsvrc.find_class_tars(train) if train.is_file() else []
    wnids = tuple(part.wnid for part in parts)
    # Its images are members of a tar archive, as in shards of WebDataset.
    layout, where = Layout(WEBDATASET, path.parent, label_base=0, classes=wnids), Index.where
    if split == "train":
        scan = functools.partial(_scan_class, path, parts)
        return Source(_TITLES[ILSVRC], layout, [path] * len(parts), scan, read_named_image, where, True)
    labels = ilsvrc.read_labels(path, Path(config.validation_labels) if config.validation_labels else None, wnids)
    layout = layout._replace(classes=labels.classes)
    scan = functools.partial(_scan_validation, path, labels)
    return Source(_TITLES[ILSVRC], layout, [path], scan, read_named_image, where, False, _note(labels, wnids))


def _flat_folder(config: PrepareConfig, root: Path, split: str) -> Optional[Source]:
    """Returns the validation split where its images are unpacked into one directory, beside class directories."""
    folders = [root / name for name in ("validation", "val") if (root / name).is_dir()]
    if split != "validation" or config.data_format not in ("auto", FOLDERS) or not folders:
        return None
    if not any(path.suffix.lower() in IMAGE_SUFFIXES for path in folders[0].iterdir() if path.is_file()):
        return None
    try:
        wnids = find_split(config.data(FOLDERS), "train")[0].classes
    except Failure:
        wnids = ()
    labels = ilsvrc.read_labels(folders[0], Path(config.validation_labels) if config.validation_labels else None, wnids)
    layout = Layout(FOLDERS, folders[0], label_base=0, classes=labels.classes)
    scan = functools.partial(_scan_directory, folders[0], labels)
    return Source(_UNPACKED, layout, folders[:1], scan, read_named_image, Index.where, False, _note(labels, wnids))


def _note(labels: ilsvrc.Labels, wnids: Sequence[str]) -> str:
    """Returns what to say of labels that are numbers of the classes in a list, where train does not say which there are."""
    if wnids or not labels.classes:
        return ""
    count = plural(len(labels.classes), "class")
    return f"train is not there, so labels are numbers of the {count} that {labels.source} lists, sorted by WNID"


def _scan_directory(folder: Path, labels: ilsvrc.Labels, _: int) -> Shard:
    try:
        return ilsvrc.scan_directory(folder, labels)
    except OSError as error:
        raise unreadable_file(folder, error) from error


def _scan_class(path: Path, parts: Sequence[ilsvrc.ClassTar], number: int) -> Shard:
    return ilsvrc.scan_class(path, parts[number], number)


def _scan_validation(path: Path, labels: ilsvrc.Labels, _: int) -> Shard:
    return ilsvrc.scan_validation(path, labels)


def _parquet_files(config: PrepareConfig, root: Path, split: str) -> List[Path]:
    pattern = config.train_pattern if split == "train" else config.validation_pattern
    found = sorted(root.glob(pattern)) if pattern else parquet.find(root, split)
    return [path for path in found if path.suffix == ".parquet"]


def _of_parquet(config: PrepareConfig, root: Path, paths: List[Path]) -> Source:
    columns = parquet.find_columns(paths[0], config.image_feature, config.label_feature)
    layout = Layout(PARQUET, root, label_base=0, classes=columns.classes)

    def read(index: Index, record: int) -> Tuple[bytes, str, bytes]:
        return (*parquet.read(index.path_of(record), columns, int(index.offsets[record])), b"")

    def where(index: Index, record: int) -> str:
        return parquet.row_place(index.path_of(record), int(index.offsets[record]))

    return Source(_TITLES[PARQUET], layout, paths, lambda n: parquet.scan(paths[n], columns), read, where, False)


def _of_layout(config: PrepareConfig, split: str) -> Source:
    layout, paths = find_split(config.data(config.data_format), split)
    return _from_layout(layout, paths)


def _from_layout(layout: Layout, paths: List[Path]) -> Source:
    by_class = layout.kind == FOLDERS
    return Source(
        TITLES[layout.kind], layout, paths, lambda n: scan_shard(paths[n], layout), read_named_image, Index.where, by_class
    )


def select(config: PrepareConfig, found: Sequence[Tuple[str, Source, Index]]) -> Selection:
    """Returns which records are written, in which order and with which labels: a function of the source and the flags.

    Raises Failure(DATA) where a label is outside the classes, a class of --classes is unknown, or nothing is left.
    """
    base = _label_base(config, found)
    named = {source.layout.classes for _, source, _ in found if source.layout.classes}
    if len(named) > 1:
        text = f"{config.source}: the splits name their classes differently, so that a label means two things"
        raise data_failure(f"{text}. Convert each alone with --splits")
    names = next(iter(named), ())
    highest = max(int(index.labels.max()) for _, _, index in found) - base + 1
    count = len(names) or highest
    if names and highest > count and all(source.layout.kind == IMAGENET for _, source, _ in found):
        names, count = (), highest  # a classes.txt of something else
    for _, source, index in found:
        _check_labels(source, index, base, count)
    odd = [name for name in names if not name or "\n" in name]
    if odd:
        raise data_failure(f"{config.source} has a class named {odd[0]!a}; expected names of one line. Rename it")
    kept = _kept_classes(config, names, count)
    new = np.zeros(count, np.int32)
    new[kept] = np.arange(1, len(kept) + 1)
    splits = []
    for name, source, index in found:
        labels = new[index.labels - base]
        ids = _order(config, name, source, labels)
        if not len(ids):
            raise data_failure(f"{config.source} has no {name} record of the classes in --classes. Name others")
        splits.append(Split(name, source, index, labels, ids))
    return Selection(splits, tuple(names[number] for number in kept) if names else (), len(kept), base)


def _label_base(config: PrepareConfig, found: Sequence[Tuple[str, Source, Index]]) -> int:
    if config.label_base != "auto":
        return int(config.label_base)
    known = next((source.layout.label_base for _, source, _ in found if source.layout.label_base is not None), None)
    return find_label_base(np.concatenate([index.labels for *_, index in found]), _MOST_LABELS) if known is None else known


def _check_labels(source: Source, index: Index, base: int, count: int) -> None:
    outside = labels_outside(index, base, count)
    if len(outside):
        record = int(outside[0])
        raise data_failure(
            f"{source.where(index, record)}: label {index.labels[record]} is outside {base}..{base + count - 1} "
            f"({len(outside)} of {index.records} records are). Correct --label_base, or leave such records out"
        )


def _kept_classes(config: PrepareConfig, names: Sequence[str], count: int) -> List[int]:
    """Returns the numbers, from 0, of the classes of --classes, rising; all of them without it."""
    if not config.classes:
        return list(range(count))
    known = list(names) or [str(number + 1) for number in range(count)]
    numbers = {name: [number] for number, name in enumerate(known)}
    for number, name in enumerate(known):
        short = name.partition(",")[0].strip()
        if short != name and short not in known:
            numbers.setdefault(short, []).append(number)
    unknown = [name for name in config.classes if name not in numbers]
    if unknown:
        has = f"its {count} classes are {shorten(list(map(ascii, known)))}" if names else f"its labels are 1 to {count}"
        raise data_failure(f"{config.source} has no class {shorten(unknown)}; {has}. Correct --classes")
    several = [name for name in config.classes if len(numbers[name]) > 1]
    if several:
        raise data_failure(f"{config.source} has several classes {several[0]}. Leave them out of --classes")
    return sorted({numbers[name][0] for name in config.classes})


def _order(config: PrepareConfig, split: str, source: Source, labels: np.ndarray) -> np.ndarray:
    """Returns the records that are written, in their order, int64 [records].

    Those to train on of a source that is sorted by class are permuted, for some readers shuffle nearby records alone.
    """
    ids = np.flatnonzero(labels).astype(np.int64)
    if config.records_per_class:
        ids = ids[_rank_in_class(labels[ids]) < config.records_per_class]
    if split == "train" and source.sorted_by_class:
        ids = ids[np.argsort(raw_draws(len(ids), config.seed, PREPARING), kind="stable")]
    return ids


def _rank_in_class(labels: np.ndarray) -> np.ndarray:
    """Returns how many records before each have its label, int64 [records]."""
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    counts = np.diff(np.append(starts, len(labels)))
    ranks = np.empty(len(labels), np.int64)
    ranks[order] = np.arange(len(labels)) - np.repeat(starts, counts)
    return ranks


def digest(splits: Sequence[Split]) -> str:
    """Returns the SHA-256 of what is known of the sources without reading their images: names, sizes, labels, offsets."""
    value = hashlib.sha256()
    for split in splits:
        layout, paths = split.source.layout, list(dict.fromkeys(split.origin.paths))
        sizes: Dict[str, int] = shard_bytes(paths, layout)
        value.update(repr((split.name, layout.kind, layout.features, layout.classes, sorted(sizes.items()))).encode())
        arrays = (split.origin.starts, split.origin.offsets, split.origin.lengths, split.origin.labels, split.origin.names)
        for array in arrays:
            value.update(array.tobytes())
    return value.hexdigest()


def file_name(split: str, record: int, name: str, kind: str) -> str:
    """Returns the name of a record's file, without directories; one made of its number where the source has none."""
    return name.replace("\\", "/").rpartition("/")[2] or f"{split}_{record:08d}.{'png' if kind == 'PNG' else 'jpg'}"


def count_classes(labels: np.ndarray, num_classes: int) -> List[int]:
    """Returns the records of each class, from labels as they are written, from 1."""
    return np.bincount(labels, minlength=num_classes + 1)[1:].tolist() if len(labels) else [0] * num_classes


def spread_ids(ids: np.ndarray, most: int) -> List[int]:
    """Returns `most` of the records, or all if there are fewer, evenly spaced."""
    return list(itertools.islice(ids[:: max(1, len(ids) // most)].tolist(), most))
