"""Tar archives: WebDataset's rule of what belongs together, and that none that is damaged ends early in silence."""

import gzip
import io
import random
import subprocess
import tarfile

import pytest
from support import failure_of

from hvd_vgg.data.formats import tar
from hvd_vgg.data.formats.layout import WEBDATASET, Layout
from hvd_vgg.data.formats.shard_file import OpenShard
from hvd_vgg.data.index import join, load_cache, save_cache, scan_shard
from hvd_vgg.data.reader import BadRecord, read_image
from hvd_vgg.errors import DATA, Failure

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
SAMPLES = [(f"{i:04d}", bytes([i + 1]) * (300 + 700 * i), i) for i in range(3)]


def member(name, data=b"", **more):
    """Returns a member of an archive; more: its other fields."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in more.items():
        setattr(info, key, value)
    return info, data


def write_tar(path, *members, kind="ustar"):
    with tarfile.open(path, "w", format=FORMATS[kind], errors="surrogateescape") as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return path


def sample(name, image=b"image", label=b"3", extension="jpg"):
    return member(f"{name}.{extension}", image), member(f"{name}.cls", label)


def samples():
    return [each for name, image, label in SAMPLES for each in sample(name, image, str(label).encode())]


def scan(path):
    return scan_shard(path, Layout(WEBDATASET, path.parent))


def read(path):
    """Returns [(image, label)] of a shard."""
    index = join([path], [scan(path)], Layout(WEBDATASET, path.parent))
    return [read_image(index, record) for record in range(index.records)]


def test_scan_reads_what_webdataset_wrote(layouts):
    """The same images in the same order as ImageFolder has them."""
    found = [each for path in sorted((layouts / "webdataset").glob("*-train-*.tar")) for each in read(path)]
    files = {path.read_bytes(): path.parts for path in (layouts / "folders" / "train").rglob("*.*")}
    classes = sorted(path.name for path in (layouts / "folders" / "train").iterdir())
    assert len(found) == len(files) == 18
    assert all(classes[label] in files[image] for image, label in found)


@pytest.mark.parametrize("kind", FORMATS)
def test_scan_groups_as_webdataset_does(tmp_path, kind):
    """By directory and name up to the first dot, whatever else is there; long names and others than ASCII."""
    folder, deep = "a.b/c", "/".join(["directory-" * 4] * 5)
    more = [] if kind == "ustar" else [*sample(deep + "/n" * 90), *sample("n" * 300, label=b"7")]
    path = write_tar(
        tmp_path / "a.tar",
        member("__meta__", b"9"),
        member("__info__/x.jpg", b"9"),
        member("README", b"9"),
        member("dataset.json", b"{}"),
        member(folder, type=tarfile.DIRTYPE),
        member(f"{folder}/1.cls", b" 5\n"),
        member(f"{folder}/LICENSE", b"9"),
        member(f"{folder}/._1.jpg", b"9"),
        member(f"{folder}/1.seg.jpg", b"9"),
        member(f"{folder}/1.JPEG", b"one"),
        member(f"{folder}/1.json", b"{}"),
        *sample("d/1", b"two", b"2147483647"),
        *sample("1", b"three", b"0", "png"),
        *sample("1b", b"four"),
        *sample("h\xe9\u4f8b", b"five") if kind != "ustar" else sample("x", b"five"),
        *more,
        kind=kind,
    )
    expected = [(b"one", 5), (b"two", 2**31 - 1), (b"three", 0), (b"four", 3), (b"five", 3)]
    assert read(path) == expected + [(b"image", 3), (b"image", 7)] * bool(more)


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ([member("b.jpg", b"x")], "sample 'b' has 1 image and 0 labels. Expected NAME.jpg"),
        ([member("b.cls", b"1"), member("c.txt", b"x")], "sample 'b' has 0 images and 1 label."),
        ([*sample("b"), member("b.png", b"x")], "sample 'b' has 2 images and 1 label."),
        ([member("b.jpg", b"x"), *sample("c"), member("b.cls", b"1")], "sample 'b' has 1 image and 0 labels."),
        (sample("b", label=b"n0144"), "'b.cls' holds 'n0144'; expected a label, one integer from 0"),
        (sample("b", label=b""), "'b.cls' holds ''"),
        (sample("b", label=b"-1"), "'b.cls' holds '-1'"),
        (sample("b", label=b"2147483648"), "'b.cls' holds '2147483648'"),
        (sample("b", label=b"5" + b" " * 40), "'b.cls' holds '5  "),
        (sample("b", b""), "'b.jpg' has 0 bytes; expected 1 to"),
        ([member("b.jpg", type=tarfile.SYMTYPE, linkname="0000.jpg"), member("b.cls", b"1")], "'b.jpg' is a link"),
        ([member("b.jpg", type=tarfile.LNKTYPE, linkname="0000.jpg")], "--hard-dereference"),
        ([member("b.jpg", type=tarfile.FIFOTYPE)], "'b.jpg' is of another kind"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_scan_names_a_sample_that_lacks_a_part(tmp_path, members, told):
    path = write_tar(tmp_path / "a.tar", *sample("a"), *members)
    message = failure_of(lambda: scan(path))
    assert f"{path}, " in message and "offset" in message and told in message


def test_scan_refuses_sparse_members(tmp_path):
    """Their bytes are not where the archive has them."""
    with open(tmp_path / "b.jpg", "wb") as file:
        file.seek(2**20)
        file.write(b"x")
    subprocess.run(["tar", "--sparse", "-cf", "a.tar", "b.jpg"], check=True, cwd=tmp_path)
    assert "'b.jpg' is a sparse file" in failure_of(lambda: scan(tmp_path / "a.tar"))


def test_scan_refuses_a_size_that_only_pax_has(tmp_path):
    """As of members above 8 GB: the header before the data, which is compared at each reading, lacks it."""
    path = write_tar(tmp_path / "a.tar", member("b.jpg", b"x" * 9, pax_headers={"size": "9"}), kind="pax")
    data = bytearray(path.read_bytes())
    header = tarfile.TarInfo.frombuf(bytes(data[1024:1536]), "latin-1", "strict")
    header.size = 0
    data[1024:1536] = header.tobuf(tarfile.USTAR_FORMAT)
    path.write_bytes(data[:2048] + write_tar(tmp_path / "b.tar", member("b.cls", b"1")).read_bytes())
    assert "the header of 'b.jpg' holds no size" in failure_of(lambda: scan(path))


def test_members_of_an_archive_in_an_archive(layouts):
    """Where they lie in the whole file."""
    file = OpenShard(layouts / "ilsvrc" / "ILSVRC2012_img_train.tar")
    classes = list(tar.members(file))
    assert sorted(each.name for each in classes) == ["n01440764.tar", "n01443537.tar", "n01484850.tar"]
    inner = [each for one in classes for each in tar.members(file, one.offset, one.size)]
    images = {path.read_bytes() for path in (layouts / "folders" / "train").rglob("*.*")}
    assert {file.read(each.size, each.offset) for each in inner} == images and len(inner) == 18


def test_scan_tells_a_compressed_archive(tmp_path):
    """With the command that unpacks it."""
    path = write_tar(tmp_path / "a.tar", *samples())
    expected = read(path)
    packed = tmp_path / "packed" / "a.tar"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(path.read_bytes()))
    message = failure_of(lambda: scan(packed))
    assert f"{packed} is compressed with gzip; expected a plain tar archive." in message
    (tmp_path / "PLAIN").mkdir()
    subprocess.run(["bash", "-c", message.rpartition(": ")[2]], check=True, cwd=tmp_path)
    assert read(tmp_path / "PLAIN" / "a.tar") == expected


@pytest.mark.parametrize("kind", FORMATS)
def test_scan_tells_wherever_an_archive_is_cut(tmp_path, kind):
    """Also between two samples, where tarfile sees an end; but for the zeros after the first block that ends it."""
    path = write_tar(tmp_path / "a.tar", *samples(), kind=kind)
    whole, expected = path.read_bytes(), read(path)
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    for cut in [*range(512, end + 512, 512), *range(100, end, 777)]:
        path.write_bytes(whole[:cut])
        message = failure_of(lambda: scan(path))
        assert f"{path}, offset " in message and "not a whole tar archive" in message
    for cut in (end + 512, end + 1024, len(whole)):
        path.write_bytes(whole[:cut])
        assert read(path) == expected


def test_scan_tells_what_follows_an_end(tmp_path):
    """A second archive, which no reader of tar looks at, and a hole: both are fewer records than were written."""
    path = write_tar(tmp_path / "a.tar", *samples())
    whole = path.read_bytes()
    path.write_bytes(whole * 2)
    assert "expected another member or the end of the archive" in failure_of(lambda: scan(path))
    path.write_bytes(whole + bytes(2**17))
    assert "zeros from offset" in failure_of(lambda: scan(path))
    path.write_bytes(bytes(10240))
    assert f"{path} has no sample" in failure_of(lambda: scan(path))


def test_scan_reads_no_header_of_megabytes(tmp_path):
    info, _ = member("x" * 20000)
    path = write_tar(tmp_path / "a.tar", (info, b""), *samples(), kind="gnu")
    assert "a header of 20480 bytes" in failure_of(lambda: scan(path))


@pytest.mark.parametrize("size", [-512, -1024, -(2**40)])
def test_scan_ends_where_sizes_are_negative(tmp_path, size):
    """Which would lead tarfile back to a header that it has read."""
    path = write_tar(tmp_path / "a.tar", *samples())
    data = bytearray(path.read_bytes())
    info = tarfile.TarInfo.frombuf(bytes(data[:512]), "latin-1", "strict")
    info.size = size
    data[:512] = info.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(data)
    assert "not a whole tar archive" in failure_of(lambda: scan(path))


def test_read_image_names_a_member_that_changed(tmp_path):
    path = write_tar(tmp_path / "a.tar", *samples())
    index = join([path], [scan(path)], Layout(WEBDATASET, tmp_path))
    offset = int(index.offsets[1])
    assert index.where(1) == f"{path}, record 1, offset {offset - 512}"
    data = bytearray(path.read_bytes())
    data[offset - 512 :] = data[offset:]
    path.write_bytes(data)
    message = failure_of(lambda: read_image(index, 1), BadRecord)
    assert "no member of 1000 bytes is there, as when it was indexed" in message


def test_cache_of_an_archive(tmp_path):
    path = write_tar(tmp_path / "a.tar", *samples())
    layout = Layout(WEBDATASET, tmp_path)
    index, cache = join([path], [scan(path)], layout), tmp_path / "cache.npz"
    save_cache(cache, index)
    assert load_cache(cache, [path], layout)[0].unchanged
    assert load_cache(cache, [path]) == {}  # of TFRecords
    save_cache(cache, index._replace(offsets=index.offsets[::-1].copy()))
    assert load_cache(cache, [path], layout) == {}
    save_cache(cache, index._replace(lengths=index.lengths + 2**20))
    assert load_cache(cache, [path], layout) == {}


def mutate(draw, data, headers):
    """Returns a mutated archive, and the bytes that are not as they were, as a range."""
    data, kind = bytearray(data), draw.choice(["flip", "flip", "cut", "zero", "swap", "header"])
    at = draw.randrange(len(data.rstrip(b"\0")))
    if kind == "flip":
        data[at] ^= 1 << draw.randrange(8)
        return data, range(at, at + 1)
    if kind == "header":
        at = draw.choice(headers) + draw.randrange(512)
        data[at] ^= 1 << draw.randrange(8)
        return data, range(at, at + 1)
    if kind == "cut":
        return data[:at], range(at, len(data))
    if kind == "zero":
        at = at // 512 * 512
        data[at : at + 512] = bytes(512)
        return data, range(at, at + 512)
    a, b = draw.sample(headers, 2)
    data[a : a + 512], data[b : b + 512] = data[b : b + 512], data[a : a + 512]
    return data, range(0)


@pytest.mark.parametrize("kind", FORMATS)
def test_scan_of_mutated_archives_loses_nothing(tmp_path, kind):
    """250 in all: each is refused, or has the same records, and labels but for those whose own bytes changed."""
    draw, told = random.Random(f"{kind}7"), 0
    name = "{}" if kind == "ustar" else "long/" * 24 + "{}"
    parts = [each for key, image, label in SAMPLES for each in sample(name.format(key), image, b"%d" % label)]
    path = write_tar(tmp_path / "a.tar", *parts, member("README", b"text"), kind=kind)
    whole, expected = path.read_bytes(), scan(path)
    headers = [at for at in range(0, len(whole), 512) if tar.read_header(whole[at : at + 512]).size >= 0]
    labels = [each.offset for each in tar.members(OpenShard(path)) if each.name.endswith(".cls")]
    for number in range(84 if kind == "ustar" else 83):
        data, changed = mutate(draw, whole, headers)
        path = tmp_path / f"{number}.tar"
        path.write_bytes(data)
        try:
            found = scan(path)
        except Failure as failure:
            assert failure.code == DATA and str(path) in failure.message
            told += 1
            continue
        assert (found.offsets == expected.offsets).all() and (found.lengths == expected.lengths).all()
        assert all(labels[i] in changed for i in range(3) if found.labels[i] != expected.labels[i])
    assert told > 20


@pytest.mark.parametrize("extensions", [("v2.jpg", "v2.cls"), ("webp", "json"), ("x.cls",)])
def test_scan_loses_no_sample_of_another_kind(tmp_path, extensions):
    """Which WebDataset would pass on, and nobody here would miss."""
    others = [member(f"odd.{extension}", b"1") for extension in extensions]
    write_tar(tmp_path / "x.tar", *sample("a"), *others)
    message = failure_of(lambda: scan(tmp_path / "x.tar"))
    assert f"odd.{extensions[0]}' belongs to no sample" in message and "ends at the first dot" in message
