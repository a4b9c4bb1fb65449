"""How a data set lies on disk: which files are the shards of a split, and how records are found in them.

Nothing above the readers of records knows which layout a data set has: a record is its number in the split.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from hvd_vgg import storage
from hvd_vgg.config import DataConfig
from hvd_vgg.data.example import STANDARD, Features
from hvd_vgg.data.shard_file import data_failure, regular_file_size, unreadable_file

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
# Downloads of ILSVRC2012, which are archives of archives.
_ILSVRC_TAR = re.compile(r"ILSVRC2012_img_\w+\.tar")


class Layout(NamedTuple):
    """What is known of a split beside its shards."""

    kind: str  # a value of --data_format
    root: Path  # the directory of the data set, or the one that holds a directory for each class
    features: Features = STANDARD  # of TFRecords
    label_base: Optional[int] = None  # of the first class; None: to be found from the labels
    classes: Tuple[str, ...] = ()  # their names in order of their labels, where the layout has them

    def key(self, path: Path) -> str:
        """Returns the name that a shard is cached and compared under."""
        return path.name


Found = Tuple[Layout, List[Path]]


def find_split(config: DataConfig, split: str) -> Found:
    """Returns the layout and the shards of a split, in order, by looking into --data_dir.

    Raises Failure(DATA) where the directory, the split, or one of a numbered set of shards is missing, or several match.
    """
    folder, pattern = Path(config.data_dir), config.train_pattern if split == "train" else config.validation_pattern
    names = _list(folder, split)
    if pattern:
        return _by_pattern(config, folder, pattern)
    kinds = _FINDERS if config.data_format == "auto" else [config.data_format]
    found = {kind: _FINDERS[kind](folder, split) for kind in kinds}
    present = [kind for kind in kinds if found[kind]]
    if len(present) > 1:
        shown = ", ".join(f"{TITLES[kind]} (--data_format={kind})" for kind in present)
        raise data_failure(f"{folder} has {split} data in several layouts: {shown}. Choose one with --data_format")
    if not present:
        raise _no_split(folder, split, names, config.data_format)
    layout, paths = found[present[0]]  # type: ignore[misc]
    if layout.kind in (IMAGENET, TFDS):
        layout = layout._replace(features=_features(config, layout.features))
    return layout, paths


def find_shards(data_dir: str, split: str) -> List[Path]:
    """Returns the shards `split`-?????-of-????? of a complete set in one directory, in order of number.

    Raises Failure(DATA) where the directory, the set, or a member of it is missing, or a shard is of another set.
    """
    folder = Path(data_dir)
    found = _complete(folder, split, [folder / name for name in _list(folder, split)], split)
    if not found:
        raise _no_split(folder, split, _list(folder, split), IMAGENET)
    return found


def shard_bytes(paths: Sequence[Path], layout: Optional[Layout] = None) -> Dict[str, int]:
    """Returns each shard's size in bytes, by name, 0 for directories; raises Failure(DATA) for what is no regular file."""
    try:
        if layout and layout.kind == FOLDERS:
            return {path.name: 0 for path in paths}
        return {path.name: regular_file_size(path, storage.retrying(path, path.stat)) for path in paths}
    except OSError as error:
        raise unreadable_file(Path(str(error.filename)), error) from error


def _list(folder: Path, split: str) -> List[str]:
    """Returns the names in a data set's directory, sorted."""
    try:
        if not storage.retrying(folder, folder.is_dir):
            raise data_failure(
                f"{folder} is not a directory (now in {Path.cwd()}); expected TFRecords {split}-?????-of-????? in it. Name "
                f"another with --data_dir, or draw a data set to try: hvd-vgg make-demo-data"
            )
        return storage.retrying(folder, lambda: sorted(path.name for path in folder.iterdir()))
    except OSError as error:
        raise unreadable_file(folder, error) from error


def _no_split(folder: Path, split: str, names: List[str], data_format: str) -> Exception:
    shards = sorted({match["name"] for match in map(_NUMBERED.fullmatch, names) if match})
    has = f"it has {shorten(shards or list(map(ascii, names))) or 'nothing'}"
    archives = list(filter(_ILSVRC_TAR.fullmatch, names))
    if archives:
        return data_failure(f"{folder} has {shorten(archives)}, archives of archives. Convert them with hvd-vgg prepare")
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


def shorten(names: Sequence[str]) -> str:
    """Returns the first five of `names` for a message."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _roots(folder: Path, split: str) -> List[Path]:
    """Returns the directories that shards of a split may be in: the data set's, and one of the split's own."""
    return [folder, *(folder / word for word in _WORDS.get(split, ()) if (folder / word).is_dir())]


def _complete(folder: Path, split: str, paths: Sequence[Path], prefix: str) -> List[Path]:
    """Returns those of `paths` that are numbered as `prefix`-?????-of-?????, in order; raises where one is missing."""
    matches = {path: _NUMBERED.fullmatch(path.name) for path in paths}
    own = {path: match for path, match in matches.items() if match and match["name"] == prefix}
    if not own:
        return []
    ((count, _),) = Counter(int(match["count"]) for match in own.values()).most_common(1)
    expected = [f"{prefix}-{number:05d}-of-{count:05d}" for number in range(count)]
    by_name = {path.name: path for path in own}
    twice = sorted({path.name for path in own if by_name[path.name] != path})
    if twice:
        raise data_failure(f"{folder} has {shorten(twice)} twice, in it and in a directory of its own. Move one away")
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


def _files(folder: Path, split: str) -> List[Path]:
    return [root / name for root in _roots(folder, split) for name in _list(root, split)]


def _find_imagenet(folder: Path, split: str) -> Optional[Found]:
    paths = _complete(folder, split, _files(folder, split), split)
    return (Layout(IMAGENET, folder), paths) if paths else None


def _find_tfds(folder: Path, split: str) -> Optional[Found]:
    files = [folder / name for name in _list(folder, split)]
    names = {match["name"] for match in (_NUMBERED.fullmatch(path.name) for path in files) if match}
    own = sorted(name for name in names if name.endswith(f"-{split}.tfrecord"))
    if len(own) > 1:
        raise data_failure(f"{folder} has several data sets: {shorten(own)}. Choose one by --train_pattern")
    if not own:
        return None
    paths = _complete(folder, split, files, own[0])
    return Layout(TFDS, folder, _TFDS_FEATURES, 0, _read_classes(folder / "label.labels.txt")), paths


def _read_classes(path: Path) -> Tuple[str, ...]:
    """Returns the lines of a file of class names; nothing where there is none."""
    try:
        return tuple(storage.read_bytes(path).decode("utf-8", "replace").split("\n")[:-1])
    except OSError:
        return ()


def _find_webdataset(folder: Path, split: str) -> Optional[Found]:
    words = "|".join(_WORDS.get(split, (split,)))
    named = re.compile(rf"(.*[-_.])?({words})([-_.0-9].*)?\.tar")
    tars = [path for path in _files(folder, split) if path.suffix == ".tar" and not _ILSVRC_TAR.fullmatch(path.name)]
    paths = [path for path in tars if path.parent != folder or named.fullmatch(path.name)]
    return _webdataset(folder, paths) if paths else None


def _webdataset(folder: Path, paths: Sequence[Path]) -> Found:
    """Returns the shards in order of name; raises where a number between the first and the last is missing."""
    matches = [match for match in (_TAR.fullmatch(path.name) for path in paths) if match]
    for name, digits in sorted({(match["name"], len(match["number"])) for match in matches}):
        numbers = {int(match["number"]) for match in matches if match["name"] == name and len(match["number"]) == digits}
        missing = [f"{name}{number:0{digits}d}.tar" for number in range(min(numbers), max(numbers)) if number not in numbers]
        if missing:
            raise data_failure(f"{folder} lacks {len(missing)} of its shards: {shorten(missing)}. Copy them there")
    return Layout(WEBDATASET, folder, STANDARD, 0, _read_classes(folder / "classes.txt")), sorted(paths)


def _find_folders(folder: Path, split: str) -> Optional[Found]:
    roots = _roots(folder, split)[1:]
    found = [root for root in roots if _class_names(root)]
    if len(found) > 1:
        raise data_failure(f"{folder} has both {found[0]} and {found[1]}. Choose one by --validation_pattern")
    train = folder / "train"
    return _folders(found[0], train if train.is_dir() and _class_names(train) else found[0]) if found else None


def _folders(root: Path, train: Path) -> Found:
    """Returns the directories of classes below `root`; their labels are those of the directories below `train`."""
    names, classes = _class_names(root), _class_names(train)
    unknown = sorted(set(names).difference(classes))
    if unknown:
        raise data_failure(f"{root} has classes that {train} lacks: {shorten(unknown)}. Move them away")
    return Layout(FOLDERS, root, STANDARD, 0, tuple(classes)), [root / name for name in names]


def _class_names(root: Path) -> List[str]:
    """Returns the directories below `root`, sorted as torchvision's ImageFolder does, without hidden ones."""
    return [name for name in _list(root, root.name) if not name.startswith(".") and (root / name).is_dir()]


def _by_pattern(config: DataConfig, folder: Path, pattern: str) -> Found:
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise data_failure(f"{folder} has nothing that matches {pattern}. Correct --train_pattern or --validation_pattern")
    if len(paths) == 1 and paths[0].is_dir():
        train = sorted(folder.glob(config.train_pattern or "train"))
        return _folders(paths[0], train[0] if len(train) == 1 and train[0].is_dir() else paths[0])
    kind = config.data_format
    if kind == "auto":
        kind = WEBDATASET if all(path.suffix == ".tar" for path in paths) else IMAGENET
    if kind == WEBDATASET:
        return _webdataset(folder, paths)
    if kind == FOLDERS:
        raise data_failure(f"{folder}: {pattern} matches {len(paths)} files; expected one directory with one for each class")
    for prefix in {match["name"] for match in (_NUMBERED.fullmatch(path.name) for path in paths) if match}:
        _complete(folder, pattern, paths, prefix)
    tfds = kind == TFDS
    features = _features(config, _TFDS_FEATURES if tfds else STANDARD)
    classes = _read_classes(folder / "label.labels.txt") if tfds else ()
    return Layout(kind, folder, features, 0 if tfds else None, classes), paths


def _features(config: DataConfig, default: Features) -> Features:
    image, label = config.image_feature.encode(), config.label_feature.encode()
    return default._replace(image=image or default.image, label=label or default.label)


_FINDERS: Dict[str, Callable[[Path, str], Optional[Found]]] = {
    IMAGENET: _find_imagenet,
    TFDS: _find_tfds,
    WEBDATASET: _find_webdataset,
    FOLDERS: _find_folders,
}
