""".pth files, which are pickles: read by torch itself, as nothing but weights, where it is installed."""

import struct
import sys
import zipfile
from pathlib import Path

from hvd_vgg.weights.child import run_child
from hvd_vgg.weights.contents import Contents
from hvd_vgg.weights.safetensors_file import read_contents as read_safetensors

PICKLE = b"\x80\x02"  # what .pth files of torch before 1.6 begin with; later ones are ZIP archives
_MOST_SECONDS = 600.0
CONVERT = (
    "python -c \"import sys, torch, safetensors.torch as s; d = torch.load(sys.argv[1], map_location='cpu', "
    "weights_only=True); d = d.get('state_dict', d.get('model', d)); s.save_file({k: v.clone().contiguous() for k, v in "
    'd.items()}, sys.argv[2])" FILE.pth FILE.safetensors'
)


def require_checksums(path: Path) -> None:
    """Raises ValueError for an archive of torch's whose members are not as their checksums say: torch compares none.

    A changed bit in the pickle can make a tensor another part of the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
            if not stored or sum(member.file_size for member in members) > path.stat().st_size:
                raise ValueError("its members are compressed, or overlap, as in no archive that torch writes")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, struct.error) as error:
        raise ValueError(f"it begins as a ZIP archive and is none ({error}): it is cut short or damaged") from error
    if damaged is not None:
        raise ValueError(f"the checksum of its member {damaged!a} does not match: the file is damaged")


def read_contents(path: Path, python: str = sys.executable) -> Contents:
    """Returns what is in a .pth file. Raises ValueError with what is wrong with it.

    python: the interpreter that has torch.
    """
    size = path.stat().st_size
    try:
        data = memoryview(run_child("torch_child", [str(size)], path, _MOST_SECONDS, python))
    except ValueError as error:
        if str(error).endswith("no torch"):
            text = "it is a pickle, which torch alone may read, and torch is not installed: convert it where torch is"
            raise ValueError(f"{text}, {CONVERT}") from error
        raise
    return read_safetensors(lambda begin, end: bytes(data[begin:end]), len(data), ".pth")
