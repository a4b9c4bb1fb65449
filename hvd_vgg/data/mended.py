"""Images that the JPEG decoder mends: it prints `Corrupt JPEG data` without a name, fills up what is lost, and goes on.

It prints to the process's stderr, which all threads and libraries share, and at which the reason of a failure must arrive
though the process ends in that moment. So in training that is never redirected: an image that is known or likely to be
mended is decoded in a thread with file descriptors of its own, whose stderr is a pipe. Any other image is recognised
afterwards: the kernel counts what each thread writes. Naming is a courtesy; where anything of it fails, the image is
decoded as any other, and the decoder's own line stays.
"""

import contextlib
import ctypes
import os
import re
import tempfile
import threading
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Tuple

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
_PRINTED = "its own line is above"  # in place of a message that could not be caught
_redirecting = threading.Lock()
_known: Dict[Tuple[Path, int], bool] = {}  # by a split's first shard and the record: whether it is mended
_thread = threading.local()
_libc = ctypes.CDLL(None)
# Of Linux: the flag of unshare(), the number of the system call close_range() on all processors, and its flag.
_CLONE_FILES, _CLOSE_RANGE, _CLOSE_RANGE_UNSHARE = 0x400, 436, 2


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

    What else is written to stderr inside the block is passed on at its end. Where nothing can be caught, messages stay on
    stderr, and the list says that there may be some. For doctor, which has nobody who ends the process meanwhile.
    """
    messages: List[str] = []
    with _redirecting, contextlib.ExitStack() as stack:
        try:
            caught = stack.enter_context(tempfile.TemporaryFile())
            stderr = os.dup(2)
        except OSError:
            messages.append(_PRINTED)
            yield messages
            return
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

    def decode() -> None:
        with contextlib.suppress(ValueError):
            eval_image(encoded, 0.0, "opencv", np.empty([8, 8, 3], np.uint8))

    before = count_writes()
    printed = _quietly(decode)
    if printed is None:  # and so it was by this thread
        return _PRINTED if count_writes() != before else ""
    return next(filter(_MESSAGE.match, printed.splitlines()), "")


def decode_and_name(index: Index, record: int, encoded: bytes, decode: Callable[[], None]) -> None:
    """Calls `decode`, which decodes an image and may raise; names the record where the decoder mends it.

    Without a nameless line, if it is known or likely to be mended.
    """
    mended = _known.get((index.paths[0], record))
    before, _thread.writes = getattr(_thread, "writes", b""), b""  # what is not an image's own is counted anew
    if mended is None and _has_hole(encoded):
        mended, before = name_if_mended(index, record, encoded), b""
    if mended:
        _quietly(decode)
        return
    before = before or count_writes()
    decode()
    after = count_writes()
    if after != before:
        name_if_mended(index, record, encoded)
    else:
        _thread.writes = after


def _quietly(action: Callable[[], None]) -> Optional[str]:
    """Calls `action` in a thread of its own and returns what was printed to stderr there; raises what it raises.

    Returns None, after calling it in this thread, where the kernel or a limit does not allow this.
    """
    errors: List[BaseException] = []
    called = False

    def call(write: int) -> None:
        nonlocal called
        if not _own_descriptors():
            return
        os.dup2(write, 2)  # of this thread alone
        called = True
        try:
            action()
        except BaseException as error:
            errors.append(error)

    printed = b""
    with contextlib.suppress(OSError, RuntimeError), _pipe() as (read, write):  # too many files, or threads
        thread = threading.Thread(target=call, args=[write], name="mended")
        thread.start()
        thread.join()
        with contextlib.suppress(BlockingIOError):  # nothing
            printed = os.read(read, 2**16)
    if errors:
        raise errors[0]
    if not called:
        action()
        return None
    return printed.decode("utf-8", "replace")


@contextlib.contextmanager
def _pipe() -> Iterator[Tuple[int, int]]:
    """Opens a pipe, (read, write), at which nobody waits: what it cannot hold, 64 kB, is dropped."""
    ends = os.pipe()
    try:
        for end in ends:
            os.set_blocking(end, False)
        yield ends
    finally:
        for end in ends:
            os.close(end)


def _own_descriptors() -> bool:
    """Gives the calling thread file descriptors of its own, copies of the process's; returns whether the kernel did.

    The seccomp filters of container engines refuse the first call and know the second, which is of Linux 5.9.
    """
    none = ctypes.c_uint(0xFFFFFFFF)  # of the descriptors that it closes
    return not _libc.unshare(_CLONE_FILES) or not _libc.syscall(_CLOSE_RANGE, none, none, _CLOSE_RANGE_UNSHARE)


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
    quoted = message if message == _PRINTED else f'"{message}"'
    return f"the JPEG decoder mended the image ({quoted}): part of it may be grey or wrong"


def _has_hole(encoded: bytes) -> bool:
    """Returns whether the data of a JPEG's last scan have zeros where there would hardly be any."""
    if _ZEROS not in encoded:  # nearly all images
        return False
    last = encoded.rfind(_ZEROS, 0, encoded.rfind(b"\xff\xd9"))
    # Those of most other images lie in their tables, soon before a scan: to look for the last scan first takes longer.
    return last >= 0 and encoded.find(b"\xff\xda", last) < 0 <= encoded.rfind(b"\xff\xda", 0, last)
