"""The manifest of a prepared data set: read field by field, and compared with what is there."""

import copy
import json
import random

import pytest
from support import failure_of

from hvd_vgg.data import manifest
from hvd_vgg.data.manifest import Manifest, ShardEntry, SplitEntry

SHARDS = tuple(ShardEntry(f"train-{number:05d}-of-00002", 100 + number, f"{number:064x}", 3) for number in range(2))
MADE = Manifest(
    "1.2.3",
    {"path": "/data", "sha256": "0" * 64},
    {"seed": 1},
    ("a", "b"),
    {"train": SplitEntry(6, (2, 4), SHARDS, 1, 0, 2)},
)
SIZES = {shard.name: shard.bytes for shard in SHARDS}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "manifest.json").write_text(manifest.dump(MADE))
    return tmp_path


def test_manifest_is_read_as_it_was_written(folder):
    assert manifest.read(folder) == MADE
    assert manifest.dump(manifest.read(folder)) == manifest.dump(MADE)


@pytest.mark.parametrize("text", ["", "{}", '{"shards": []}', "\x00"])
def test_manifest_of_another_program_is_none(tmp_path, text):
    """It stays without effect."""
    assert manifest.read(tmp_path) is None
    (tmp_path / "manifest.json").write_text(text)
    assert manifest.read(tmp_path) is None
    manifest.check_shards(tmp_path, "train", {"a": 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=2), "format 2 of 'hvd-vgg prepare', expected 1"),
        (lambda m: m.update(version=1), "version is int, expected text"),
        (lambda m: m.update(classes="ab"), "classes is str, expected an array"),
        (lambda m: m.update(classes=["a"]), "train counts 2 classes, 1 have names"),
        (lambda m: m.update(splits=[]), "splits is list, expected an object"),
        (lambda m: m["splits"]["train"].update(records=7), "train has 7 records, 6 in its shards, 6 in its classes"),
        (lambda m: m["splits"]["train"].update(refused=-1), "train refused is -1"),
        (lambda m: m["splits"]["train"].update(refused=True), "train refused is True"),
        (lambda m: m["splits"]["train"]["shards"][1].update(sha256="x"), "train shard 1: sha256 is 'x'"),
        (lambda m: m["splits"]["train"]["shards"][1].update(name="../x"), "train shard 1: name is '../x'"),
        (lambda m: m["splits"]["train"]["shards"][1].pop("bytes"), "train shard 1: bytes is None, expected a number from 0"),
    ],
)
def test_manifest_that_is_damaged_is_one_message(folder, change, message):
    fields = json.loads((folder / "manifest.json").read_text())
    change(fields)
    (folder / "manifest.json").write_text(json.dumps(fields))
    found = failure_of(lambda: manifest.read(folder))
    assert f"manifest.json is damaged: {message}" in found and "remove it to read the shards without it" in found


def test_manifest_mutations_are_told():
    """Each is read, or refused with a reason."""
    whole, rng, came = manifest.dump(MADE).encode(), random.Random(1), set()
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            manifest.parse(bytes(data[: rng.choice((len(data), rng.randrange(len(data))))]))
            came.add("read")
        except ValueError as error:
            came.add("refused" if str(error) else "silent")
    assert came == {"read", "refused"}


@pytest.mark.parametrize(
    ("change", "records", "message"),
    [
        (
            {"train-00001-of-00002": 7},
            None,
            "train-00001-of-00002 has 7 bytes and 3 records; manifest.json says 101 bytes and 3",
        ),
        ({}, {SHARDS[0].name: 3, SHARDS[1].name: 2}, "train-00001-of-00002 has 101 bytes and 2 records; manifest.json says"),
        ({"train-00002-of-00003": 7}, None, "train-00002-of-00003 is not in manifest.json"),
    ],
)
def test_manifest_names_the_shard_that_differs(folder, change, records, message):
    assert message in failure_of(lambda: manifest.check_shards(folder, "train", {**SIZES, **change}, records))


def test_manifest_wants_all_shards_of_a_split(folder):
    """Unless flags name some of them."""
    some = {SHARDS[0].name: SHARDS[0].bytes}
    assert "lacks train-00001-of-00002" in failure_of(lambda: manifest.check_shards(folder, "train", some))
    manifest.check_shards(folder, "train", {**some, "mine": 1}, whole=False)
    manifest.check_shards(folder, "validation", some)  # which is from elsewhere
    manifest.check_shards(folder, "train", SIZES, dict.fromkeys(SIZES, 3))


def test_manifest_digests_show_other_bytes(folder):
    paths = [folder / shard.name for shard in SHARDS]
    for path in paths:
        path.write_bytes(b"abc")
    other = copy.deepcopy(MADE.splits["train"].shards[0])._replace(sha256=manifest.file_sha256(paths[0]))
    made = MADE._replace(splits={"train": MADE.splits["train"]._replace(shards=(other, SHARDS[1]))})
    (folder / "manifest.json").write_text(manifest.dump(made))
    (text,) = manifest.wrong_digests(manifest.read(folder).splits.get("train"), paths)
    assert "train-00001-of-00002: its SHA-256 is ba7816bf" in text and "Copy the shard again" in text
    assert manifest.wrong_digests(manifest.read(folder).splits.get("validation"), paths) == []
