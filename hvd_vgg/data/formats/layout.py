"""How a data set lies on disk: which files are the shards of a split, and how records are found in them.

Nothing above the readers of records knows which layout a data set has: a record is its number in the split.
"""

import os
import re
import shlex
from collections import Counter
from pathlib import Path
from types import MappingProxyType
from typing import Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from hvd_vgg import storage
from hvd_vgg.config import DataConfig
from hvd_vgg.data.formats import dataset_info
from hvd_vgg.data.formats.example import STANDARD, Features
from hvd_vgg.data.formats.shard_file import IMAGE_SUFFIXES, UNPACK, data_failure, regular_file_size, unreadable_file
from hvd_vgg.errors import USAGE, Failure

IMAGENET, TFDS, WEBDATASET, FOLDERS = "imagenet", "tfds", "webdataset", "folders"  # of --data_format
TITLES = {
    IMAGENET: "TFRecords in ImageNet's layout",
    TFDS: "TFRecords of tensorflow-datasets",
    WEBDATASET: "tar shards of WebDataset",
    FOLDERS: "a directory of images for each class",
}
_TFDS_FEATURES = Features(b"image", b"label", b"file_name")
# Directories of a split, and the words in names of its files.
_WORDS = {"train": ("train",), "validation": ("validation", "val")}
_NUMBERED = re.compile(r"(?P<name>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})")
_TAR = re.compile(r"(?P<name>.*?)(?P<number>[0-9]+)\.tar")
_MOST_SHARDS = 10**6
# Downloads of ILSVRC2012, which are archives of archives, and what they hold.
_ILSVRC_TAR = re.compile(r"ILSVRC2012_img_\w+\.tar|n[0-9]{8}\.tar")
_COMPRESSED = re.compile(r"(?P<plain>.+-[0-9]{5}-of-[0-9]{5}|.+\.tar)\.(?P<kind>gz|bz2|xz|zst)|(?P<tgz>.+)\.tgz")
_UNPACK = {"bz2": "bzip2 -dc", "xz": "xz -dc", "zst": "zstd -dc"}  # others: gzip


class Layout(NamedTuple):
    """What is known of a split beside its shards."""

    kind: str  # a value of --data_format
    root: Path  # the directory of the data set, or the one that holds a directory for each class
    features: Features = STANDARD  # of TFRecords
    label_base: Optional[int] = None  # of the first class; None: to be found from the labels
    classes: Tuple[str, ...] = ()  # their names in order of their labels, where the layout has them
    records: Mapping[str, int] = MappingProxyType({})  # of shards, by `key`, where the data set says how many they have

    def key(self, path: Path) -> str:
        """Returns the name that a shard is cached and compared under: its path below the data set's directory."""
        try:
            return path.relative_to(self.root.parent if self.kind == FOLDERS else self.root).as_posix()
        except ValueError:
            return path.name


Found = Tuple[Layout, List[Path]]


def find_split(config: DataConfig, split: str) -> Found:
    """Returns the layout and the shards of a split, in order, detected in --data_dir or as flags say.

    Raises Failure(DATA) where the directory, the split, or one of a numbered set of shards is missing, or several match;
    Failure(USAGE) for the name of a feature where records have none.
    """
    folder, pattern = Path(config.data_dir), config.train_pattern if split == "train" else config.validation_pattern
    try:
        layout, paths = _by_pattern(config, folder, split, pattern) if pattern else _detect(config, folder, split)
        if layout.kind in (IMAGENET, TFDS):
            layout = layout._replace(features=_features(config, layout.features))
        elif config.image_feature or config.label_feature:
            text = f"--image_feature and --label_feature are for TFRecords; {folder} has {TITLES[layout.kind]}"
            raise Failure(USAGE, f"{text}: leave them out")
        if layout.kind == TFDS:
            name = layout.features.label.decode().replace("/", "-")
            layout = layout._replace(classes=dataset_info.class_names(paths[0].with_name(f"{name}.labels.txt")))
        return layout._replace(classes=layout.classes or dataset_info.class_names(folder / "classes.txt")), paths
    except OSError as error:
        raise unreadable_file(Path(str(error.filename or folder)), error) from error


def _detect(config: DataConfig, folder: Path, split: str) -> Found:
    names = _list(folder, split)
    kinds = _FINDERS if config.data_format == "auto" else [config.data_format]
    found = {kind: _FINDERS[kind](config, folder, split) for kind in kinds}
    present = [kind for kind in kinds if found[kind]]
    if len(present) > 1:
        shown = ", ".join(f"{TITLES[kind]} (--data_format={kind})" for kind in present)
        raise data_failure(f"{folder} has {split} data in several layouts: {shown}. Choose one with --data_format")
    if not present:
        raise _no_split(folder, split, names, config.data_format)
    return found[present[0]]  # type: ignore[return-value]


def find_shards(data_dir: str, split: str) -> List[Path]:
    """Returns the shards `split`-?????-of-????? of a complete set in one directory, in order of number.

    Raises Failure(DATA) where the directory, the set, or a member of it is missing, or a shard is of another set.
    """
    folder = Path(data_dir)
    try:
        names = _list(folder, split)
    except OSError as error:
        raise unreadable_file(folder, error) from error
    found = _complete(folder, split, [folder / name for name in names], split)
    if not found:
        raise _no_split(folder, split, names, IMAGENET)
    return found


def shard_bytes(paths: Sequence[Path], layout: Optional[Layout] = None) -> Dict[str, int]:
    """Returns each shard's size in bytes, by name, 0 for directories; raises Failure(DATA) for what is no regular file."""
    try:
        if layout and layout.kind == FOLDERS:
            return {layout.key(path): 0 for path in paths}
        name = layout.key if layout else (lambda path: path.name)
        return {name(path): regular_file_size(path, storage.retrying(path, path.stat)) for path in paths}
    except OSError as error:
        raise unreadable_file(Path(str(error.filename)), error) from error


def _list(folder: Path, split: str) -> List[str]:
    """Returns the names in a data set's directory, sorted."""
    if not storage.retrying(folder, folder.is_dir):
        raise data_failure(
            f"{folder} is not a directory (now in {Path.cwd()}); expected TFRecords {split}-?????-of-????? in it. Name "
            f"another with --data_dir, or draw a data set to try: hvd-vgg make-demo-data"
        )
    return storage.retrying(folder, lambda: sorted(path.name for path in folder.iterdir()))


def _no_split(folder: Path, split: str, names: List[str], data_format: str) -> Failure:
    known = _known_otherwise(folder, split, names)
    if known:
        return data_failure(known)
    shards = sorted({match["name"] for match in map(_NUMBERED.fullmatch, names) if match})
    has = f"it has {shorten(shards or list(map(ascii, names))) or 'nothing'}"
    words = "/".join(_WORDS[split]) if split in _WORDS else split
    expected = {
        IMAGENET: f"ImageNet's layout, such as {split}-00000-of-01024",
        TFDS: f"shards such as imagenet2012-{split}.tfrecord-00000-of-01024",
        WEBDATASET: f"shards such as imagenet1k-{split}-0000.tar",
        FOLDERS: f"a directory {words} with a directory of images for each class",
    }
    if data_format in (TFDS, WEBDATASET, FOLDERS):
        what = f"no {split} data for --data_format={data_format}"
        return data_failure(f"{folder} has {what}; {has}. Expected {expected[data_format]}")
    missing = f"{folder} has no shard {split}-?????-of-?????; {has}. Expected {expected[IMAGENET]}"
    if data_format == IMAGENET:
        return data_failure(missing)
    others = "; ".join(expected[kind] for kind in (TFDS, WEBDATASET, FOLDERS))
    return data_failure(f"{missing}; {others}; or --{'train' if split == 'train' else 'validation'}_pattern")


def _known_otherwise(folder: Path, split: str, names: List[str]) -> str:
    """Returns what to say of a directory with data that is known, but not read as it is; "" where it has none."""
    below = [(root, name) for root in _roots(folder, split) for name in (names if root == folder else _list(root, split))]
    archives = [name for _, name in below if _ILSVRC_TAR.fullmatch(name)]
    if archives:
        return f"{folder} has {shorten(archives)}, archives of archives. Convert them with hvd-vgg prepare"
    for root, name in below:
        match = _COMPRESSED.fullmatch(name)
        if match and (root != folder or any(word in name for word in _WORDS.get(split, (split,)))):
            command, plain = _UNPACK.get(match["kind"] or "", "gzip -dc"), match["plain"] or f"{match['tgz']}.tar"
            text = f"{root / name} is compressed. {UNPACK}"
            return f"{text} {command} < {shlex.quote(str(root / name))} > PLAIN/{shlex.quote(plain)}"
    arrays = [name for name in names if ".array_record-" in name or ".riegeli-" in name]
    if arrays:
        convert = (
            f"tfds convert_format --dataset_version_dir={shlex.quote(str(folder))} --out_file_format=tfrecord --out_dir=DIR"
        )
        return f"{folder} has {shorten(arrays)}; expected TFRecords. Convert them: {convert}"
    if any(name.endswith(".parquet") for name in names) or list(folder.glob("data/*.parquet")):
        return f"{folder} has Parquet files. Convert them with hvd-vgg prepare"
    flat = [root / name for root, name in below if root != folder and name.lower().endswith(IMAGE_SUFFIXES)]
    if flat:
        text = f"{flat[0].parent} has images, but no directory for each class, which would tell their labels"
        return f"{text}. Sort them into one for each, as in {folder / 'train'}, or convert them with hvd-vgg prepare"
    inner = [name for name in _directories(folder) if (folder / name / "features.json").exists()]
    if inner:
        return f"{folder} has versions of a data set: {shorten(inner)}. Name one: --data_dir={folder / inner[-1]}"
    return ""


def shorten(names: Sequence[str]) -> str:
    """Returns the first five of `names` for a message."""
    return ", ".join(each if each.isprintable() else ascii(each) for each in names[:5]) + (", ..." if len(names) > 5 else "")


def _roots(folder: Path, split: str) -> List[Path]:
    """Returns the directories that shards of a split may be in: the data set's, and one of the split's own."""
    own = [folder / word for word in _WORDS.get(split, ())]
    return [folder, *(path for path in own if storage.retrying(path, path.is_dir))]


def _directories(folder: Path) -> List[str]:
    """Returns the directories below `folder`, sorted as torchvision's ImageFolder does, without hidden ones."""

    def directories() -> List[str]:
        with os.scandir(folder) as entries:
            seen = [entry for entry in entries if not entry.name.startswith(".")]
        dangling = [entry.path for entry in seen if entry.is_symlink() and not Path(entry.path).exists()]
        if dangling:  # a class on a disk that is not mounted: without it others would take its label
            raise data_failure(f"{ascii(dangling[0])[1:-1]} is a link to nothing. Mount what it leads to, or remove it")
        return sorted(entry.name for entry in seen if entry.is_dir())

    return storage.retrying(folder, directories)


def _complete(folder: Path, split: str, paths: Sequence[Path], prefix: str) -> List[Path]:
    """Returns those of `paths` that are numbered as `prefix`-?????-of-?????, in order; raises where one is missing."""
    matches = {path: _NUMBERED.fullmatch(path.name) for path in paths}
    own = {path: match for path, match in matches.items() if match and match["name"] == prefix}
    if not own:
        return []
    ((count, _),) = Counter(int(match["count"]) for match in own.values()).most_common(1)
    expected = [f"{prefix}-{number:05d}-of-{count:05d}" for number in range(count)]
    by_name = {path.name: path for path in own}
    _require_once(folder, list(own))
    others, missing = sorted(set(by_name).difference(expected)), [name for name in expected if name not in by_name]
    if others:
        raise data_failure(
            f"{folder} has shards that are none of its {count} {split} shards: {shorten(others)}. Move them away"
        )
    if missing:
        raise data_failure(
            f"{folder} lacks {len(missing)} of its {count} {split} shards: {shorten(missing)}. Copy them there, or name a "
            f"directory that has them all"
        )
    return [by_name[name] for name in expected]


def _require_once(folder: Path, paths: Sequence[Path]) -> None:
    """Raises Failure(DATA) where two of `paths` have one name: copies of a shard, whose records would count twice."""
    twice = sorted(name for name, count in Counter(path.name for path in paths).items() if count > 1)
    if twice:
        raise data_failure(f"{folder} has {shorten(twice)} in several directories. Move all but one away")


def _files(folder: Path, split: str) -> List[Path]:
    return [root / name for root in _roots(folder, split) for name in _list(root, split) if not name.startswith(".")]


def _find_imagenet(_: DataConfig, folder: Path, split: str) -> Optional[Found]:
    paths = _complete(folder, split, _files(folder, split), split)
    return (Layout(IMAGENET, folder), paths) if paths else None


def _find_tfds(_: DataConfig, folder: Path, split: str) -> Optional[Found]:
    files = [folder / name for name in _list(folder, split)]
    names = {match["name"] for match in (_NUMBERED.fullmatch(path.name) for path in files) if match}
    own = sorted(name for name in names if name.endswith(f"-{split}.tfrecord"))
    if len(own) > 1:
        raise data_failure(f"{folder} has several data sets: {shorten(own)}. Choose one by --train_pattern")
    if not own:
        return None
    paths = _complete(folder, split, files, own[0])
    return _tfds(folder, paths), paths


def _tfds(folder: Path, paths: Sequence[Path]) -> Layout:
    """Returns the layout of shards beside which is what tensorflow-datasets says of them, unless that was left behind."""
    counts = dataset_info.tfds_records(paths[0].parent)
    records: Dict[str, int] = {}
    for path in paths:
        match = _NUMBERED.fullmatch(path.name)
        own = counts.get(match["name"], []) if match else []
        if match and len(own) == int(match["count"]) and own[int(match["number"])]:
            records[path.relative_to(folder).as_posix()] = own[int(match["number"])]
    return Layout(TFDS, folder, _TFDS_FEATURES, 0, (), records)


def _find_webdataset(_: DataConfig, folder: Path, split: str) -> Optional[Found]:
    words = "|".join(_WORDS.get(split, (split,)))
    pattern = re.compile(rf"(.*[-_.])?({words})([-_.0-9].*)?\.tar")
    tars = [path for path in _files(folder, split) if path.suffix == ".tar" and not _ILSVRC_TAR.fullmatch(path.name)]
    paths = [path for path in tars if path.parent != folder or pattern.fullmatch(path.name)]
    if not paths:
        return None
    present = {path.name for path in paths}
    missing = [name for name in dataset_info.webdataset_records(folder, split) if name not in present]
    if missing:
        named = f"{len(missing)} of the {split} shards that its _info.json names: {shorten(missing)}"
        raise data_failure(f"{folder} lacks {named}. Copy them there")
    return _webdataset(folder, paths), paths


def _webdataset(folder: Path, paths: List[Path]) -> Layout:
    """Returns the layout of shards, sorted by name; raises where a number between the first and the last is missing."""
    paths.sort()
    _require_once(folder, paths)
    matches = [match for match in (_TAR.fullmatch(path.name) for path in paths) if match]
    for name, digits in sorted({(match["name"], len(match["number"])) for match in matches}):
        numbers = {int(match["number"]) for match in matches if match["name"] == name and len(match["number"]) == digits}
        between = range(min(numbers), max(numbers))
        missing = [f"{name}{number:0{digits}d}.tar" for number in between[:_MOST_SHARDS] if number not in numbers]
        if missing and len(between) < _MOST_SHARDS:  # other numbers count something else
            raise data_failure(f"{folder} lacks {len(missing)} of its shards: {shorten(missing)}. Copy them there")
    known = {name: count for split in _WORDS for name, count in dataset_info.webdataset_records(folder, split).items()}
    records = {path.relative_to(folder).as_posix(): known[path.name] for path in paths if known.get(path.name)}
    return Layout(WEBDATASET, folder, STANDARD, 0, (), records)


def _find_folders(config: DataConfig, folder: Path, split: str) -> Optional[Found]:
    roots = _roots(folder, split)[1:]
    found = [root for root in roots if _directories(root)]
    if len(found) > 1:
        raise data_failure(f"{folder} has both {found[0]} and {found[1]}. Choose one by --validation_pattern")
    return _folders(found[0], _train_root(config, folder) or found[0]) if found else None


def _train_root(config: DataConfig, folder: Path) -> Optional[Path]:
    """Returns the directory of the train split's class directories, whose order decides the labels, if there is one."""
    found = _glob(folder, config.train_pattern or "train", f"--train_pattern={config.train_pattern}")
    return found[0] if len(found) == 1 and storage.retrying(found[0], found[0].is_dir) else None


def _folders(root: Path, train: Path) -> Found:
    """Returns the directories of classes below `root`; their labels are those of the directories below `train`, if any."""
    names = _directories(root)
    classes = _directories(train) or names
    unknown = sorted(set(names).difference(classes))
    if unknown:
        raise data_failure(f"{root} has classes that {train} lacks: {shorten(unknown)}. Move them away")
    return Layout(FOLDERS, root, STANDARD, 0, tuple(classes)), [root / name for name in names]


def _by_pattern(config: DataConfig, folder: Path, split: str, pattern: str) -> Found:
    flag, kind = f"--{split}_pattern={pattern}", config.data_format
    _list(folder, split)
    paths = _glob(folder, pattern, flag)
    if not paths:
        raise data_failure(f"{folder} has nothing that matches {flag}. Correct it")
    if len(paths) == 1 and storage.retrying(paths[0], paths[0].is_dir):
        if kind not in ("auto", FOLDERS):
            raise data_failure(f"{flag} matches the directory {paths[0]}; --data_format={kind} expects files. Correct it")
        if not _directories(paths[0]):
            raise data_failure(f"{flag} matches {paths[0]}, which has no directory for each class. Correct it")
        train = None if split == "train" else _train_root(config, folder)
        return _folders(paths[0], train or paths[0])
    if kind == FOLDERS:
        raise data_failure(f"{flag} matches {len(paths)} files; expected one directory with one for each class. Correct it")
    names = [match["name"] for match in (_NUMBERED.fullmatch(path.name) for path in paths) if match]
    if kind == "auto":
        described = len(names) == len(paths) and paths[0].with_name("features.json").exists()
        kind = WEBDATASET if all(path.suffix == ".tar" for path in paths) else TFDS if described else IMAGENET
    if kind == WEBDATASET:
        return _webdataset(folder, paths), paths
    for prefix in sorted(set(names)):
        _complete(folder, split, paths, prefix)
    return (_tfds(folder, paths) if kind == TFDS else Layout(IMAGENET, folder)), paths


def _glob(folder: Path, pattern: str, flag: str) -> List[Path]:
    """Returns what matches a pattern below `folder`, sorted, without hidden names; raises Failure(USAGE) for no pattern."""
    try:
        found = storage.retrying(folder, lambda: sorted(folder.glob(pattern)))
    except (ValueError, NotImplementedError) as error:
        raise Failure(USAGE, f"{flag}: {error}") from error
    return [path for path in found if not path.name.startswith(".")]


def _features(config: DataConfig, default: Features) -> Features:
    image, label = config.image_feature.encode(), config.label_feature.encode()
    return default._replace(image=image or default.image, label=label or default.label)


_FINDERS: Dict[str, Callable[[DataConfig, Path, str], Optional[Found]]] = {
    IMAGENET: _find_imagenet,
    TFDS: _find_tfds,
    WEBDATASET: _find_webdataset,
    FOLDERS: _find_folders,
}
