"""The archives of ILSVRC2012, read without unpacking them: a tar of a tar a class, a flat tar, and what says its labels.

Labels are indexes of the sorted WNIDs, from 0. The ground truth of the development kit has numbers of its own instead, whose
meaning is in the kit's meta.mat.
"""

import io
import os
import re
import shlex
import tarfile
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

from hvd_vgg import storage
from hvd_vgg.data.formats import class_folders, tar
from hvd_vgg.data.formats.layout import shorten
from hvd_vgg.data.formats.shard_file import IMAGE_SUFFIXES, MAX_RECORD_BYTES, OpenShard, Shard, data_failure, unreadable_file
from hvd_vgg.errors import CONFIGURATION, Failure
from hvd_vgg.text import plural

TRAIN_TAR, VALIDATION_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_DEV_KIT = "ILSVRC2012_devkit_t12"
_META, _GROUND_TRUTH = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"
_WNID = re.compile(r"n[0-9]{8}")
_KIT_BYTES = 2**26  # of a file in the development kit, of which the largest has 1 MB
_LABELS_EXPECTED = (
    "Expected one of: Caffe's list (`NAME LABEL` a line, from 0 in WNID order), a WNID a line in order of the images' "
    "names, or the development kit (a directory or .tar.gz) with --validation_labels"
)


class ClassTar(NamedTuple):
    """The archive of a class within that of the train split."""

    wnid: str
    offset: int  # of its first byte, in bytes
    size: int  # bytes


class Labels(NamedTuple):
    """Labels of the validation archive, from 0: by the images' names, or as WNIDs in order of these names."""

    source: Path
    by_name: Dict[str, int]
    in_order: List[str]
    classes: Tuple[str, ...]  # the sorted WNIDs; empty where they are unknown


def find_class_tars(path: Path) -> List[ClassTar]:
    """Returns the archives in the train archive, by WNID; raises Failure(DATA) where there is anything else in it."""
    found: Dict[str, ClassTar] = {}
    try:
        for member in tar.members(OpenShard(path)):
            wnid, _, extension = member.name.rpartition("/")[2].partition(".")
            if extension != "tar" or wnid in found:
                what = "twice" if wnid in found else "in it"
                raise data_failure(f"{path} has {member.name[:64]!a} {what}; expected one WNID.tar for each class")
            found[wnid] = ClassTar(wnid, member.offset, member.size)
    except OSError as error:
        raise unreadable_file(path, error) from error
    if not found:
        raise data_failure(f"{path} has nothing in it; expected one WNID.tar for each class")
    return [found[wnid] for wnid in sorted(found)]


def scan_class(path: Path, part: ClassTar, label: int) -> Shard:
    """Returns the index of a class's images, in order of their names; raises Failure(DATA) as `_images` does."""
    found = _images(path, f"{path}, {part.wnid}.tar", part.offset, part.size)
    return Shard.of_records([(member.offset, member.size, label) for member in found])


def read_labels(path: Path, source: Optional[Path], wnids: Sequence[str]) -> Labels:
    """Returns what is known of the labels of the validation archive `path`.

    source: what --validation_labels names; None: the development kit beside the archive. wnids: those of the train split,
    sorted; empty where they are unknown. Raises Failure(DATA), or Failure(CONFIGURATION) where SciPy is needed and missing.
    """
    source = source or _kit_beside(path)
    try:
        if storage.retrying(source, source.is_dir) or source.name.endswith((".tar.gz", ".tgz", ".tar")):
            kit = _read_kit(source)
            truth = _ground_truth(source)
            odd = next((number for number in truth if number not in kit), None)
            if odd is not None:
                raise data_failure(f"{source}: {_GROUND_TRUTH} has {odd}, which {_META} lacks. Download the kit again")
            return Labels(source, {}, [kit[number] for number in truth], tuple(wnids or sorted(kit.values())))
        lines = storage.read_bytes(source).decode("utf-8", "replace").split("\n")
    except OSError as error:
        raise unreadable_file(source, error) from error
    rows = [line.split() for line in lines if line.strip()]
    if rows and all(len(row) == 2 and row[1].isdecimal() and len(row[1]) < 10 for row in rows):
        by_name = {name.rpartition("/")[2]: int(label) for name, label in rows}
        if len(by_name) < len(rows):
            raise data_failure(f"{source} has names twice ({len(rows)} lines, {len(by_name)} names). {_LABELS_EXPECTED}")
        lowest = min(by_name.values())
        if lowest:
            command = f"awk '{{print $1, $2 - {lowest}}}' {shlex.quote(str(source))} > val_from_0.txt"
            raise data_failure(
                f"{source} has labels from {lowest}; expected the number of each WNID in their order, from 0: {command}"
            )
        return Labels(source, by_name, [], tuple(wnids))
    odd_row = next((row for row in rows if len(row) != 1 or not _WNID.fullmatch(row[0])), None)
    if not rows or odd_row:
        text = " ".join(odd_row or ["nothing"])[:64]
        numbers = "; numbers of the development kit mean nothing without its meta.mat" * text.isdecimal()
        raise data_failure(f"{source} has {text!a}{numbers}. {_LABELS_EXPECTED}")
    return Labels(source, {}, [row[0] for row in rows], tuple(wnids or sorted({row[0] for row in rows})))


def scan_validation(path: Path, labels: Labels) -> Shard:
    """Returns the index of the validation archive, in order of the images' names; raises Failure(DATA)."""
    found = _images(path, str(path), 0, -1)
    numbers = _match(path, [member.name.rpartition("/")[2] for member in found], labels)
    return Shard.of_records([(member.offset, member.size, number) for member, number in zip(found, numbers)])


def scan_directory(folder: Path, labels: Labels) -> Shard:
    """Returns the index of an unpacked validation archive, as `class_folders.scan` does; raises Failure(DATA); OSError."""
    names = storage.retrying(folder, lambda: sorted(os.listdir(folder)))  # noqa: PTH208 (the names alone)
    names = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")]
    return class_folders.index_files(folder, names, _match(folder, names, labels), "Unpack it again")


def _match(path: Path, names: Sequence[str], labels: Labels) -> List[int]:
    """Returns the label of each image, given in order of their names; raises Failure(DATA) unless each has one."""
    known = len(labels.by_name) + len(labels.in_order)
    missing = [name for name in names if name not in labels.by_name] if labels.by_name else []
    if missing or known != len(names):
        lacks = f"lacks {len(missing)} of its images: {shorten(missing)}" if missing else f"has {plural(known, 'label')}"
        raise data_failure(f"{path} has {plural(len(names), 'image')}, and {labels.source} {lacks}. Expected one for each")
    number_of = {wnid: number for number, wnid in enumerate(labels.classes)}
    numbers = [labels.by_name[name] for name in names] if labels.by_name else [number_of.get(w, -1) for w in labels.in_order]
    most = len(labels.classes) or 2**31 - 1
    odd = next((i for i, number in enumerate(numbers) if not 0 <= number < most), None)
    if odd is not None:
        found_label = numbers[odd] if labels.by_name else labels.in_order[odd]
        text = f"label {found_label} of {names[odd]!a} is none of the {most} classes, sorted by WNID"
        raise data_failure(f"{labels.source}: {text}. Use the labels of this data set")
    return numbers


def _images(path: Path, where: str, start: int, size: int) -> List[tar.Member]:
    """Returns the images of an archive by name; raises Failure(DATA) for what is no image, is empty or of equal name."""
    try:
        found = list(tar.members(OpenShard(path), start, size))
    except OSError as error:
        raise unreadable_file(path, error) from error
    names = {member.name.rpartition("/")[2] for member in found}
    for member in found:
        if not member.name.lower().endswith(IMAGE_SUFFIXES):
            raise data_failure(f"{where} has {member.name[:64]!a}; expected images alone, named .JPEG. Download it again")
        if not 0 < member.size <= MAX_RECORD_BYTES:
            limit = f"expected 1 to {MAX_RECORD_BYTES}, one image"
            raise data_failure(f"{where}: {member.name[:64]!a} has {member.size} bytes; {limit}. Download it again")
    if not found or len(names) < len(found):
        text = f"has images of equal names ({len(found) - len(names)})" if found else "has no image"
        raise data_failure(f"{where} {text}. Download it again")
    return sorted(found, key=lambda member: member.name.rpartition("/")[2])


def _kit_beside(path: Path) -> Path:
    kits = [path.with_name(f"{_DEV_KIT}.tar.gz"), path.with_name(_DEV_KIT)]
    found = [kit for kit in kits if kit.exists()]
    if not found:
        raise data_failure(f"{path} has no labels, and {kits[0].name} is not beside it. {_LABELS_EXPECTED}")
    return found[0]


def _ground_truth(source: Path) -> List[int]:
    text = _kit_file(source, _GROUND_TRUTH).split()
    if not text or not all(word.isdigit() and len(word) < 10 for word in text):
        raise data_failure(f"{source}: {_GROUND_TRUTH} is damaged; expected a number a line. Download the kit again")
    return [int(word) for word in text]


def _read_kit(source: Path) -> Dict[int, str]:
    """Returns the WNIDs of the development kit by its own numbers."""
    data = _kit_file(source, _META)
    try:
        from scipy.io import loadmat
    except ImportError as error:
        text = f"the development kit's {_META} is read by SciPy: {error}; pip install scipy"
        raise Failure(CONFIGURATION, f"{text}, or name another list with --validation_labels") from error
    try:
        synsets = loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
        leaves = synsets[synsets["num_children"] == 0]
        kit = {int(number): str(wnid) for number, wnid in zip(leaves["ILSVRC2012_ID"], leaves["WNID"])}
    except Exception as error:  # its readers raise a dozen kinds for damaged bytes
        reason = f"{type(error).__name__}: {str(error)[:100]!a}"
        raise data_failure(f"{source}: {_META} is damaged ({reason}). Download the kit again") from error
    if not kit or not all(map(_WNID.fullmatch, kit.values())) or len(set(kit.values())) < len(kit):
        raise data_failure(f"{source}: {_META} has no WNIDs of classes. Download the kit again")
    return kit


def _kit_file(source: Path, name: str) -> bytes:
    """Returns a file of the development kit, which is a directory or an archive."""
    if storage.retrying(source, source.is_dir):
        path = next((path for path in (source / "data" / name, source / name) if path.exists()), None)
        if path is None:
            raise data_failure(f"{source} has no data/{name}. {_LABELS_EXPECTED}")
        return storage.read_bytes(path)
    try:
        with tarfile.open(fileobj=io.BytesIO(storage.read_bytes(source))) as archive:
            for member in archive:
                if member.isreg() and member.name.rpartition("/")[2] == name and member.size <= _KIT_BYTES:
                    file = archive.extractfile(member)
                    return file.read() if file else b""
    except OSError as error:
        if error.errno:
            raise
        raise _damaged_kit(source, error) from error
    except Exception as error:  # whatever tarfile and zlib make of damaged bytes
        raise _damaged_kit(source, error) from error
    raise data_failure(f"{source} has no {name} in it. {_LABELS_EXPECTED}")


def _damaged_kit(source: Path, error: Exception) -> Failure:
    reason = f"{type(error).__name__}: {str(error)[:100]!a}"
    return data_failure(f"{source} is no whole archive ({reason}). Download the kit again")
