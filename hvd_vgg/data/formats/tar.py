"""Images in tar archives, read where they lie: shards of WebDataset, and the archives of ILSVRC2012.

WebDataset (https://github.com/webdataset/webdataset): members that follow each other and share a name up to the first dot
of its last part are one sample, here NAME.jpg (or .jpeg, .png) and NAME.cls, the label as text. Left out, as by its library,
is what has no such name, or is called __NAME__ or lies in such a directory; and what macOS adds to archives (._NAME).
"""

import io
import itertools
import re
import tarfile
from typing import Iterator, List, NamedTuple, Sequence, Tuple

from hvd_vgg.data.formats.shard_file import MAX_RECORD_BYTES, OpenShard, Shard, data_failure, place, require_plain, shown
from hvd_vgg.errors import Failure
from hvd_vgg.text import plural
from hvd_vgg.watchdog import watchdog

HEADER_BYTES = tarfile.BLOCKSIZE  # before each member's data
_HEADER_LIMIT = 2**14  # bytes of a long name or an extended header; some versions of tarfile search it in quadratic time
# Zeros that end an archive: two blocks, filled up to a multiple of 10,240 bytes. More of them are a hole in a copy.
_MAX_END_BYTES = 2**16
_KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # of a sample, and the extension: webdataset.tariterators.base_plus_ext
_LEFT_OUT = re.compile(r"__[^/]*__(/|$)|(.*/)?\._")
_IMAGES = ("jpg", "jpeg", "png")
_OTHERS = ("webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")  # images that training does not read
_LABEL_BYTES = 32  # more than any label has digits
_EXPECTED = "Expected NAME.jpg (or .jpeg, .png) and NAME.cls, one after the other"


class Member(NamedTuple):
    """A regular file in an archive."""

    name: str
    offset: int  # of its data, in bytes
    size: int  # bytes


class _Stretch(io.RawIOBase):
    """Bytes [start, start + size) of a file, as a stream for tarfile."""

    def __init__(self, file: OpenShard, start: int, size: int) -> None:
        super().__init__()
        self.file, self.start, self.size, self.position = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence])
        return self.position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.size - self.position)
        count = left if size < 0 else min(size, left)
        if count > _HEADER_LIMIT:  # nothing but headers is read through this
            raise tarfile.ReadError(f"a header of {count} bytes")
        data = self.file.read(count, self.start + self.position)
        self.position += len(data)
        return data


def members(file: OpenShard, start: int = 0, size: int = -1) -> Iterator[Member]:
    """Yields the regular files of the archive at bytes [start, start + size) of a file, in order; -1: all of the file.

    Raises Failure(DATA) where the archive is damaged or cut off, which tarfile alone would take for its end, or has anything
    but files and directories; OSError.
    """
    size = file.size if size < 0 else size
    end = 0  # of what was read
    try:
        # Latin-1 has a character for each byte: no name is refused, and none is altered.
        archive = tarfile.open(fileobj=_Stretch(file, start, size), mode="r:", encoding="latin-1")  # noqa: SIM115
        for count in itertools.count():
            member = archive.next()
            if member is None:
                break
            _require_file(file, member)
            if member.size < 0 or archive.offset <= end:
                raise tarfile.ReadError(f"{member.name[:64]!a} has {member.size} bytes")
            if archive.offset > size:
                raise tarfile.ReadError(f"{member.name[:64]!a} has {member.size} bytes, and the archive ends at {size}")
            end = archive.offset
            if member.isreg():
                yield Member(member.name, start + member.offset_data, member.size)
            archive.members = []  # type: ignore[attr-defined]  # else all of them are kept
            if not count % 4096:
                watchdog.heartbeat(phase="start")
    except (OSError, Failure, GeneratorExit):
        raise
    except Exception as error:  # whatever tarfile makes of a damaged header: tarfile.TarError, ValueError, RecursionError
        raise _damaged(file, start + end, f"{type(error).__name__}: {str(error)[:200]}") from error
    _require_end(file, start + end, start + size)


def _require_file(file: OpenShard, member: tarfile.TarInfo) -> None:
    """Raises Failure(DATA) for a link, a device or a sparse file, which would be missing among the samples."""
    if member.isdir() or (member.isreg() and not member.issparse()):
        return
    what = "a link" if member.islnk() or member.issym() else "a sparse file" if member.issparse() else "of another kind"
    raise data_failure(
        f"{shown(file.path)}, offset {member.offset}: {member.name!a} is {what}; expected files and directories. Write the "
        f"archive anew: tar --format=ustar --dereference --hard-dereference -cf ..."
    )


def _require_end(file: OpenShard, offset: int, stop: int) -> None:
    """Raises Failure(DATA) unless the bytes [offset, stop) are those that end an archive."""
    found = file.read(min(stop - offset, _MAX_END_BYTES + 1), offset)
    if len(found) < HEADER_BYTES:
        raise _damaged(file, offset, f"expected another member or the end of the archive, found {len(found)} bytes")
    if found.strip(b"\0"):
        raise _damaged(file, offset, "expected another member or the end of the archive, found no intact header")
    if len(found) > _MAX_END_BYTES:
        raise _damaged(file, offset, f"{file.zeros_around(offset)}, more than end an archive: a copy that was cut off?")


def _damaged(file: OpenShard, offset: int, reason: str) -> Failure:
    require_plain(file.path, file.read(HEADER_BYTES, 0), "a plain tar archive")
    return data_failure(f"{shown(file.path)}, offset {offset}: not a whole tar archive ({reason}). Copy the file again")


def scan(file: OpenShard) -> Shard:
    """Returns the index of a shard of WebDataset; raises Failure(DATA) naming the sample that lacks a part; OSError."""
    records: List[Tuple[int, int, int]] = []
    for key, sample in itertools.groupby(_parts(file), lambda part: part[0]):
        parts = list(sample)
        images = [member for _, extension, member in parts if extension in _IMAGES]
        labels = [member for _, extension, member in parts if extension == "cls"]
        if not images and not labels:
            _require_no_sample(file, key, parts)
            continue
        number = len(records)
        if len(images) != 1 or len(labels) != 1:
            where = place(file.path, number, (images or labels)[0].offset)
            found = f"{plural(len(images), 'image')} and {plural(len(labels), 'label')}"
            raise data_failure(f"{where}: sample {key!a} has {found}. {_EXPECTED}")
        _require_readable(file, number, images[0])
        records.append((images[0].offset, images[0].size, _read_label(file, number, labels[0])))
    if not records:
        raise data_failure(f"{shown(file.path)} has no sample. {_EXPECTED}")
    return Shard.of_records(records)


def _require_no_sample(file: OpenShard, key: str, parts: Sequence[Tuple[str, str, Member]]) -> None:
    """Raises Failure(DATA) where members without an image and a label are yet no others than such as README.md."""
    odd = [member for _, extension, member in parts if extension.rpartition(".")[2] in (*_IMAGES, *_OTHERS, "cls")]
    if odd:
        where = f"{shown(file.path)}, offset {odd[0].offset}"
        reason = f"{odd[0].name!a} belongs to no sample: the name of one, here {key!a}, ends at the first dot"
        raise data_failure(f"{where}: {reason}. {_EXPECTED}, of JPEG or PNG")


def _parts(file: OpenShard) -> Iterator[Tuple[str, str, Member]]:
    """Yields (key of its sample, extension in lower case, member) for the members that belong to samples."""
    for member in members(file):
        match = _KEY.fullmatch(member.name)
        if match and not _LEFT_OUT.match(member.name):
            yield match[1], match[2].lower(), member


def _require_readable(file: OpenShard, number: int, member: Member) -> None:
    where = place(file.path, number, member.offset)
    if not 0 < member.size <= MAX_RECORD_BYTES:
        limit = f"expected 1 to {MAX_RECORD_BYTES}, one image"
        raise data_failure(f"{where}: {member.name!a} has {member.size} bytes; {limit}. Leave it out")
    if read_header(file.read(HEADER_BYTES, member.offset - HEADER_BYTES)).size != member.size:
        raise data_failure(f"{where}: the header of {member.name!a} holds no size. Write the archive in the format ustar")


def _read_label(file: OpenShard, number: int, member: Member) -> int:
    text = file.read(min(member.size, _LABEL_BYTES), member.offset)
    if member.size > _LABEL_BYTES or not text.strip().isdigit() or int(text) >= 2**31:
        shown = f"{text.decode('latin-1')!a}{'...' if member.size > _LABEL_BYTES else ''}"
        where = place(file.path, number, member.offset)
        raise data_failure(f"{where}: {member.name!a} holds {shown}; expected a label, one integer from 0. Correct it")
    return int(text)


def read_header(header: bytes) -> Member:
    """Returns the member that a header of 512 bytes describes, its size -1 where it is none."""
    try:
        found = tarfile.TarInfo.frombuf(header, "latin-1", "strict")
        return Member(found.name, HEADER_BYTES, found.size)
    except (tarfile.TarError, ValueError):
        return Member("", HEADER_BYTES, -1)


def could_be_index(shard: Shard, size: int) -> bool:
    """Returns whether `scan` could have made `shard` of a file of `size` bytes."""
    ends = shard.offsets + shard.lengths
    return bool(shard.offsets[0] >= HEADER_BYTES and (shard.offsets[1:] > ends[:-1]).all() and ends[-1] <= size)
