"""Images that the JPEG decoder mends: it prints `Corrupt JPEG data` without a name, fills up what is lost, and goes on.

It prints to the process's stderr, which all threads and libraries share. So that is redirected only while an image is
decoded that is known or likely to be mended, and what others print meanwhile is passed on. Any other image is recognised
afterwards: the kernel counts what each thread writes.
"""

import contextlib
import os
import re
import threading
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

import numpy as np

from hvd_vgg.data.index import Index
from hvd_vgg.data.transforms import eval_image
from hvd_vgg.storage import warn_once

_MAX_NAMED = 20  # in one process; doctor names all
_ZEROS = bytes(24)  # in a row, which tables of a JPEG do not have, and no data of an image but of one colour
# The warnings of libjpeg (jerror.h). All but those of `Corrupt` and `Premature` are about a header that is odd.
_MESSAGE = re.compile(
    r"Corrupt JPEG data|Premature end of JPEG|Inconsistent progression|Invalid SOS param|Unknown Adobe|Application tr|"
    r"Warning: (unknown JPEG|thumbnail)"
)
_redirecting = threading.Lock()
_known: Dict[Tuple[Path, int], bool] = {}  # by a split's first shard and the record: whether it is mended
_thread = threading.local()


class _ThreadCounters:
    """The kernel's counters of the thread that makes it, open until the thread ends."""

    def __init__(self) -> None:
        self.handle = os.open("/proc/thread-self/io", os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            os.close(self.handle)


def count_writes() -> bytes:
    """Returns how often this thread has written to any file; "" where the kernel does not count. Takes 4 microseconds."""
    try:
        if not hasattr(_thread, "io"):
            _thread.io = _ThreadCounters()
        return os.pread(_thread.io.handle, 512, 0).partition(b"syscw: ")[2].partition(b"\n")[0]
    except OSError:
        return b""


@contextlib.contextmanager
def decoder_messages() -> Iterator[List[str]]:
    """Catches the decoder's messages, of all threads, in a list that is complete after the block; one block at a time.

    What else is written to stderr inside the block is passed on at its end.
    """
    messages: List[str] = []
    with _redirecting, open(os.memfd_create("stderr"), "w+b", buffering=0) as caught:
        stderr = os.dup(2)
        os.dup2(caught.fileno(), 2)
        try:
            yield messages
        finally:
            os.dup2(stderr, 2)
            lines = os.pread(caught.fileno(), 2**24, 0).splitlines(keepends=True)
            texts = [line.decode("utf-8", "replace").strip() for line in lines]
            messages += filter(_MESSAGE.match, texts)
            with contextlib.suppress(OSError):
                os.write(stderr, b"".join(line for line, text in zip(lines, texts) if not _MESSAGE.match(text)))
            os.close(stderr)


def decoder_message(encoded: bytes) -> str:
    """Returns what the decoder prints about an image, decoded whole; "" if nothing, or if it cannot be decoded."""
    with decoder_messages() as messages:
        before = count_writes()
        with contextlib.suppress(ValueError):
            eval_image(encoded, "none", np.empty([8, 8, 3], np.uint8))
        own = count_writes() != before or not before  # else another thread's image is meant
    return messages[0] if messages and own else ""


@contextlib.contextmanager
def naming_record(index: Index, record: int, encoded: bytes) -> Iterator[None]:
    """Has an image that is known or likely to be mended decoded inside the block without a nameless line."""
    mended = _known.get((index.paths[0], record))
    if mended is None and _has_hole(encoded):
        mended = name_if_mended(index, record, encoded)
    with decoder_messages() if mended else contextlib.nullcontext():
        yield


def name_if_mended(index: Index, record: int, encoded: bytes) -> bool:
    """Returns whether the decoder mends an image, whose record is named on stderr the first time."""
    key = index.paths[0], record
    if key not in _known:
        message = decoder_message(encoded)
        _known[key] = bool(message)
        if message:
            text = f"{index.where(record)}: {describe(message)}"
            if sum(_known.values()) <= _MAX_NAMED:
                warn_once(f"mended {index.where(record)}", f"{text}. hvd-vgg doctor --full names all such records")
            else:
                warn_once("mended", f"{text}. More such records are not named here: see hvd-vgg doctor --full")
    return _known[key]


def describe(message: str) -> str:
    """Returns what a message of the decoder means."""
    return f'the JPEG decoder mended the image ("{message}"): part of it may be grey or wrong'


def _has_hole(encoded: bytes) -> bool:
    """Returns whether the data of a JPEG's last scan have zeros where there would hardly be any."""
    if _ZEROS not in encoded:  # nearly all images
        return False
    scan = encoded.rfind(b"\xff\xda")
    return scan >= 0 and encoded.find(_ZEROS, scan, encoded.rfind(b"\xff\xd9")) >= 0
