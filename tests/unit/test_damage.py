"""Damage is told as damage: zeros, foreign files, shards that were rewritten, images that the decoder mends."""

import bz2
import ctypes
import errno
import gzip
import lzma
import os
import platform
import threading
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from support import example, failure_of, picture, write_shard

from hvd_vgg import storage
from hvd_vgg.config import ImageConfig
from hvd_vgg.data import mended
from hvd_vgg.data.index import scan_shard, scan_split, unseen_labels
from hvd_vgg.data.loader import BatchSpec, Dataset, load_batches
from hvd_vgg.data.reader import BadRecord, read_record


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Tells again what other tests have had told."""
    monkeypatch.setattr(storage, "_told", set())
    monkeypatch.setattr(mended, "_known", {})


def shard_of(folder, *pictures):
    """Returns the one training shard in `folder`, of 5 records of about 2 kB or of `pictures`."""
    path = folder / "train-00000-of-00001"
    write_shard(path, [example(each, i % 10 + 1) for i, each in enumerate(pictures or map(picture, range(5), range(5)))])
    return path


def zero(path, first, end):
    with open(path, "r+b") as file:
        file.seek(first)
        file.write(bytes(end - first))


@pytest.mark.fault("F41")
@pytest.mark.parametrize("more", [0, 20], ids=["at a record", "within one"])
def test_scan_shard_names_zeros_to_the_end(tmp_path, more):
    """A file whose space was reserved, and whose copy ended early."""
    path = shard_of(tmp_path)
    first, size = int(scan_shard(path).offsets[3]) - 12, path.stat().st_size
    for filled in (size, size + 3 * 2**20):
        os.truncate(path, first + more)
        os.truncate(path, filled)
        message = failure_of(lambda: scan_shard(path))
        if more:  # the label of the record is among what is lost
            assert f"record 3, offset {first}: the checksum of its " in message
        assert (
            f"with zeros from offset {first + more}" in message
            if more
            else f"zeros from offset {first} to the end" in message
        )
        assert f"to the end at {filled}" in message and "Copy the shard again" in message


@pytest.mark.fault("F41")
def test_scan_shard_names_zeros_inside(tmp_path):
    """Which take the place of headers."""
    path = shard_of(tmp_path)
    offsets, size = scan_shard(path).offsets, path.stat().st_size
    zero(path, int(offsets[2]) - 12, int(offsets[3]) + 100)
    message = failure_of(lambda: scan_shard(path))
    assert (
        f"{path}, record 2, offset {offsets[2] - 12}: zeros from offset {offsets[2] - 12} to {offsets[3] + 100}" in message
    )
    assert f"of {size} bytes, where a record was expected" in message


@pytest.mark.fault("F41")
def test_read_record_names_zeros_in_its_data(tmp_path):
    path = shard_of(tmp_path)
    index = scan_split(str(tmp_path), "train")
    first = int(index.offsets[1]) + 500
    zero(path, first, first + 200)
    message = failure_of(lambda: read_record(index, 1), BadRecord)
    assert f"damaged, with zeros from offset {first} to {first + 200}. Copy the shard again" in message
    zero(path, 0, path.stat().st_size)
    assert f"{path}, record 0, offset 0: zeros from offset 0 to the end" in failure_of(lambda: scan_shard(path))


@pytest.mark.fault("F41")
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (gzip.compress, "compressed with gzip"),
        (zlib.compress, "compressed with zlib"),
        (lambda data: zlib.compress(data, 0), "compressed with zlib"),
        (bz2.compress, "compressed with bzip2"),
        (lzma.compress, "compressed with xz"),
        (lambda data: b"\x28\xb5\x2f\xfd" + data, "compressed with zstd"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS"),
        (lambda data: b"<!DOCTYPE html><html>404", "a web page"),
    ],
    ids=["gzip", "zlib", "zlib stored", "bzip2", "xz", "zstd", "lfs", "html"],
)
def test_scan_shard_says_what_a_foreign_file_is(tmp_path, change, told):
    path = shard_of(tmp_path)
    path.write_bytes(change(path.read_bytes()))
    message = failure_of(lambda: scan_shard(path))
    assert f"{path} is {told}" in message and "expected a plain TFRecord file. " in message
    assert (f" < {path} > PLAIN/{path.name}" in message) == ("compressed" in told)


def test_scan_shard_takes_a_long_first_record_for_a_record(tmp_path):
    """Whose length begins as compressed data do."""
    length = 0x8B1F  # little-endian: 1f 8b
    path = shard_of(tmp_path, bytes(length - len(example(bytes(length - 200), 1)) + length - 200))
    assert path.read_bytes()[:2] == b"\x1f\x8b"
    assert scan_shard(path).lengths.tolist() == [length]


@pytest.mark.fault("F41")
def test_shard_rewritten_with_size_and_time_kept_is_named(tmp_path):
    """So that no index notices: as another was written there, not as damaged."""
    path = shard_of(tmp_path)
    index, status = scan_split(str(tmp_path), "train"), path.stat()
    path.unlink()
    shard_of(tmp_path, picture(9, 9), picture(8, 8, 48, 48), *map(picture, range(3), range(3)))
    os.truncate(path, status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    message = failure_of(lambda: read_record(index, 2))
    assert "when it was indexed: the shard was replaced or rewritten. Restore it" in message
    assert "remove the .hvd_vgg_index_* beside it or in the run directory; then start again" in message


def test_unseen_labels(tmp_path):
    def split(name, labels):
        write_shard(tmp_path / f"{name}-00000-of-00001", [example(picture(0, 1), label) for label in labels])
        return scan_split(str(tmp_path), name)

    train = split("train", [1, 2, 3])
    assert unseen_labels(train, split("validation", [1, 3, 3])) == ""
    text = unseen_labels(train, split("validation", [0, 1, 0, 2]))
    assert text == (
        "the splits begin at different labels, train at 1 and validation at 0; validation has 1 label that train never has: "
        "0 (2 of 4 records)"
    )
    assert unseen_labels(train, split("validation", [4, 5])).startswith(
        "validation has 2 labels that train never has: 4, 5 (2"
    )


# ---- images that the decoder mends


def damaged(kind):
    """Returns a JPEG with a part of its data lost."""
    whole = picture(3, 3, 80, 96)
    middle = len(whole) // 2
    return {
        "whole": whole,
        "zeros": whole[:middle] + bytes(40) + whole[middle + 40 :],
        "other bytes": whole[:middle] + bytes(range(1, 41)) + whole[middle + 40 :],
        "ends early": whole[:middle] + b"\xff\xd9",
        "bytes behind": whole[:-2] + bytes(40) + whole[-2:],
        "zeros in a comment": whole[:2] + b"\xff\xfe\x00\x42" + bytes(64) + whole[2:],
    }[kind]


@pytest.mark.fault("F41")
@pytest.mark.parametrize("kind", ["zeros", "other bytes", "ends early", "bytes behind"])
def test_decoder_message_of_a_mended_image(capfd, kind):
    assert mended.decoder_message(damaged(kind)).startswith(("Corrupt JPEG data: ", "Premature end"))
    assert mended.decoder_message(damaged("whole")) == mended.decoder_message(damaged("zeros in a comment")) == ""
    assert capfd.readouterr() == ("", "")


def test_decoder_messages_pass_on_what_others_print(capfd):
    with mended.decoder_messages() as messages:
        os.write(2, b"of another library\nCorrupt JPEG data: some\nand more")
        assert messages == []
    assert messages == ["Corrupt JPEG data: some"]
    os.write(2, b"!\n")
    assert capfd.readouterr().err == "of another library\nand more!\n"


@pytest.mark.fault("F41")
def test_loader_names_mended_records_once(tmp_path, capfd):
    """On several threads and in three epochs, all decoded at once: the decoder's own lines are left of those alone."""
    kinds = ["whole", "zeros", "whole", "other bytes", "zeros in a comment", "ends early", "whole", "zeros"] * 3
    path = shard_of(tmp_path, *map(damaged, kinds))
    index = scan_split(str(tmp_path), "train")
    ids = np.arange(len(kinds))
    specs = [BatchSpec(ids, ids * 0, np.zeros([len(ids), 2], np.int64), ids)] * 3
    list(load_batches(Dataset(index, 1, 32, ImageConfig(augment="none"), True), specs, len(ids), 4))
    text = capfd.readouterr().err
    bad = [number for number, kind in enumerate(kinds) if kind in ("zeros", "other bytes", "ends early")]
    assert [text.count(f"{path}, record {number}, offset ") for number in bad] == [1] * len(bad)
    assert text.count("the JPEG decoder mended the image") == len(bad)
    own = text.count("Corrupt JPEG data") - text.count('("Corrupt JPEG data')  # lines of several threads may be one
    seen_late = sum(kind in ("other bytes", "ends early") for kind in kinds)  # holes are seen beforehand
    assert own <= seen_late * len(specs)
    capfd.readouterr()
    list(load_batches(Dataset(index, 1, 32, ImageConfig(augment="none"), True), specs, len(ids), 4))
    assert capfd.readouterr().err == ""  # from now on they are known


def test_loader_suspects_no_whole_image(data, capfd):
    """Nothing else that a decoding thread does is taken for a message: no image is decoded twice."""
    index = scan_split(str(data), "train")
    ids = np.arange(75)
    specs = [BatchSpec(ids, ids * 0, np.zeros([75, 2], np.int64), ids)] * 3
    list(load_batches(Dataset(index, 1, 32, ImageConfig(augment="none"), True), specs, 75, 4))
    assert mended._known == {}
    assert capfd.readouterr().err == ""


def load(path, kinds, epochs, threads=4):
    """Loads images of these kinds, all in one batch, so often; returns the images."""
    shard_of(path, *map(damaged, kinds))
    index, ids = scan_split(str(path), "train"), np.arange(len(kinds))
    specs = [BatchSpec(ids, ids * 0, np.zeros([len(ids), 2], np.int64), ids)] * epochs
    return [
        batch.images.numpy()
        for batch in load_batches(Dataset(index, 1, 32, ImageConfig(augment="none"), True), specs, len(ids), threads)
    ]


@pytest.mark.fault("F41")
def test_loader_leaves_stderr_in_its_place(tmp_path, capfd):
    """Whatever ends the process may say why at any moment, while any number of threads decode known images."""
    load(tmp_path, ["zeros"] * 8, 1)
    places, stop, place = set(), threading.Event(), os.fstat(2)

    def look():
        while not stop.is_set():
            now = os.fstat(2)
            places.add((now.st_dev, now.st_ino))

    watcher = threading.Thread(target=look)
    watcher.start()
    load(tmp_path, ["zeros"] * 8, 20)
    stop.set()
    watcher.join()
    assert places == {(place.st_dev, place.st_ino)}
    assert capfd.readouterr().err.count("Corrupt JPEG data") == 8  # once each, with its name


@pytest.mark.fault("F41")
def test_loader_decodes_no_neighbour_of_a_mended_image_again(tmp_path, capfd):
    load(tmp_path, ["whole", "zeros", "whole", "other bytes", "whole"], 2)
    assert {record for (_, record), found in mended._known.items()} == {1, 3}
    assert all(mended._known.values())


def refused(number):
    def call(*arguments, **named):
        raise OSError(number, os.strerror(number))

    return call


def no_thread(thread):
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize(
    ("place", "name", "instead"),
    [
        (os, "pipe", refused(errno.EMFILE)),
        (mended, "_own_descriptors", lambda: False),
        (mended.threading.Thread, "start", None),
    ],
    ids=["no descriptor is left", "seccomp", "no thread is left"],
)
@pytest.mark.fault("F41")
def test_loader_names_mended_records_where_nothing_is_caught(tmp_path, monkeypatch, capfd, place, name, instead):
    """The images are the same; the decoder's own lines stand beside the named ones."""
    kinds = ["whole", "zeros", "other bytes", "ends early"]
    expected = load(tmp_path, kinds, 2)
    capfd.readouterr()
    monkeypatch.setattr(storage, "_told", set())
    monkeypatch.setattr(mended, "_known", {})
    start = threading.Thread.start
    instead = instead or (lambda thread: no_thread(thread) if thread.name == "mended" else start(thread))
    monkeypatch.setattr(place, name, instead)
    assert all((a == b).all() for a, b in zip(load(tmp_path, kinds, 2), expected))
    named = [line for line in capfd.readouterr().err.splitlines() if "mended the image (its own line is above)" in line]
    assert [sum(f", record {number}, offset " in line for line in named) for number in range(4)] == [0, 1, 1, 1]


@pytest.mark.fault("F41")
def test_decoder_message_where_unshare_is_refused(monkeypatch, capfd):
    """As the seccomp filters of container engines do, which know close_range, if the kernel does."""
    real = mended._libc
    none = ctypes.c_uint(0xFFFFFFFF)
    if real.syscall(mended._CLOSE_RANGE, none, none, 0):
        assert platform.release() < "5.9", "this kernel should know close_range"
    monkeypatch.setattr(mended, "_libc", SimpleNamespace(unshare=lambda flags: -1, syscall=real.syscall))
    place = os.fstat(2)
    assert mended.decoder_message(damaged("zeros")).startswith(("Corrupt JPEG data: ", mended._PRINTED))
    assert os.fstat(2).st_ino == place.st_ino
    if not real.syscall(mended._CLOSE_RANGE, none, none, 0):
        assert capfd.readouterr().err == ""


@pytest.mark.fault("F41")
def test_decoder_messages_where_no_file_can_be_made(monkeypatch, capfd):
    """Doctor then looks at each image again whose thread has written."""
    monkeypatch.setattr(mended.tempfile, "TemporaryFile", refused(errno.ENOSPC))
    with mended.decoder_messages() as messages:
        os.write(2, b"Corrupt JPEG data: some\n")
    assert messages == [mended._PRINTED]
    assert capfd.readouterr().err == "Corrupt JPEG data: some\n"


def test_mended_images_need_no_memfd(monkeypatch, tmp_path, capfd):
    """Which Python lacks where it was built with an old C library, as conda's was."""
    monkeypatch.delattr(os, "memfd_create", raising=False)
    load(tmp_path, ["zeros", "other bytes"], 2)
    with mended.decoder_messages() as messages:
        os.write(2, b"Corrupt JPEG data: some\n")
    assert messages == ["Corrupt JPEG data: some"]


def test_mended_images_are_counted_by_thread(capfd):
    """What one thread prints is not put down to an image that another decodes."""
    stop = threading.Event()

    def print_on():
        while not stop.is_set():
            os.write(2, b"Corrupt JPEG data: of another image\n")

    printer = threading.Thread(target=print_on)
    printer.start()
    found = [mended.decoder_message(damaged(kind)) for kind in ["whole", "ends early"] * 20]
    stop.set()
    printer.join()
    assert [bool(each) for each in found] == [False, True] * 20
    capfd.readouterr()
