"""Bad data (F24 to F28, and data sets that differ between ranks of F32), records that replace bad ones, and mutations.

Every message names the file and where in it, what was expected and what was found; all ranks exit with 65, without a
traceback, and no process is left.
"""

import io
import json
import os
import random
import re
import struct
import subprocess
import sys

import numpy as np
import pytest
from oracles import (
    INJECT,
    RECORDS,
    SEED,
    STEPS,
    assert_same_run,
    assert_same_state,
    assert_true,
    blamed,
    events,
    ids_by_step,
    log_rows,
    newest,
    result,
    run,
)
from PIL import Image
from support import ROOT, TINY, example, full, picture, write_data, write_shard

from hvd_vgg.data.formats.layout import find_shards
from hvd_vgg.data.formats.tfrecord import masked_crc
from hvd_vgg.data.index import join, save_cache, scan_shard
from hvd_vgg.data.sampler import positions, replacement_record
from hvd_vgg.run_dir import RunDir
from hvd_vgg.training import checkpoint

FLAGS = [*TINY, "--steps=4", "--global_batch=8", "--device_batch=2"]
SHARD = "train-00001-of-00003"


def rows_of(path):
    """Returns the records of a shard."""
    offsets, lengths, *_ = scan_shard(path)
    whole = path.read_bytes()
    return [whole[o : o + n] for o, n in zip(offsets.tolist(), lengths.tolist())]


def rewrite(path, change, record=2):
    """Replaces a record of a shard by what `change` makes of it."""
    rows = rows_of(path)
    rows[record] = change(rows[record])
    write_shard(path, rows)


def flip_byte(path, record, into):
    """Damages one byte of a record; `into` is an offset into its data, negative for its header."""
    offsets, *_ = scan_shard(path)
    data = bytearray(path.read_bytes())
    data[int(offsets[record]) + into] ^= 1
    path.write_bytes(bytes(data))


def cut(path, record, more):
    """Ends a shard so many bytes behind where a record's header begins."""
    offsets, *_ = scan_shard(path)
    os.truncate(path, int(offsets[record]) - 12 + more)


def index_of(folder, split="train"):
    paths = find_shards(str(folder), split)
    return join(paths, [scan_shard(path) for path in paths])


def keep_index(folder, split="train"):
    """Leaves the index beside the data as a run does, and returns it."""
    index = index_of(folder, split)
    save_cache(folder / f".hvd_vgg_index_{split}.npz", index)
    return index


def jpeg(mode="RGB", size=(48, 40), **more):
    file = io.BytesIO()
    Image.effect_noise(size, 60).convert(mode).save(file, **{"format": "JPEG", **more})
    return file.getvalue()


def claiming(data, height, width):
    """Returns a JPEG whose header says another size."""
    start = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2")) + 5
    return data[:start] + struct.pack(">HH", height, width) + data[start + 4 :]


def bomb(_):
    small = claiming(jpeg("L", (16, 16), optimize=True), 13000, 13000)
    assert len(small) < 691
    return example(small, 1)


def instead(encoded, label):
    return lambda d: rewrite(d / SHARD, lambda _: example(encoded, label))


def replaced_by(make):
    def change(folder):
        (folder / SHARD).unlink()
        make(folder / SHARD)

    return change


# Each case: what is done to the data, what the message must hold ({shard}: the path of the damaged shard).
AT = ["{shard}, record 2, offset "]
CASES = {
    "no directory": (lambda d: d.rename(d.with_name("elsewhere")), ["is not a directory", "--data_dir", "make-demo-data"]),
    "no shards": (lambda d: [path.unlink() for path in d.iterdir()], ["has no shard train-", "train-00000-of-01024"]),
    "F24 cut between records once indexed": (
        lambda d: (keep_index(d), cut(d / SHARD, 20, 0)),
        ["{shard}: expected 24 records in ", "found the first 20 of them in ", "remove the .hvd_vgg_index_*"],
    ),
    "F24 cut in a header": (
        lambda d: cut(d / SHARD, 20, 5),
        ["{shard}, record 20, offset ", "expected a header of 12 bytes, but the file ends at byte "],
    ),
    "F24 empty": (lambda d: (d / SHARD).write_bytes(b""), ["{shard} is empty (0 bytes); expected at least one record"]),
    "F24 missing": (lambda d: (d / SHARD).unlink(), ["lacks 1 of its 3 train shards: " + SHARD]),
    "F24 extra": (
        lambda d: (d / "train-00003-of-00003").write_bytes((d / SHARD).read_bytes()),
        ["has shards that are none of its 3 train shards: train-00003-of-00003. Move them away"],
    ),
    "F24 junk appended": (
        lambda d: (d / SHARD).write_bytes((d / SHARD).read_bytes() + b"8 bytes."),
        ["{shard}, record 24, offset ", "expected a header of 12 bytes, but the file ends at byte "],
    ),
    "cut in a record": (
        lambda d: cut(d / SHARD, 20, 300),
        ["{shard}, record 20, offset ", " bytes of data and a checksum, but the file ends at byte "],
    ),
    "corrupt header": (
        lambda d: flip_byte(d / SHARD, 3, -12),
        ["{shard}, record 3, offset ", "the checksum of the record's length"],
    ),
    "dangling link": (replaced_by(lambda path: path.symlink_to("gone")), ["{shard} cannot be read: No such file"]),
    "a directory in place of a shard": (replaced_by(lambda path: path.mkdir()), ["{shard} is a directory; expected"]),
    "a FIFO in place of a shard": (replaced_by(os.mkfifo), ["{shard} is a FIFO; expected a regular file"]),
    "F26 truncated": (
        instead(picture(0, 1)[:300], 1),
        [*AT, "the image (300 bytes) cannot be decoded", "a whole JPEG or PNG"],
    ),
    "F26 header of 13000 x 13000": (
        lambda d: rewrite(d / SHARD, bomb),
        [*AT, "claims this height and width; expected 1 to ", "13000 by 13000"],
    ),
    "F27 label -1": (instead(picture(0, 1), -1), [*AT, "label -1 is outside 1..10", "--num_classes=10"]),
    "F27 label >= classes": (instead(picture(0, 1), 11), [*AT, "label 11 is outside 1..10", "--num_classes=10"]),
    "F27 no label": (instead(picture(0, 1), None), [*AT, "image/class/label is missing; it has image/encoded"]),
    "F27 no image": (instead(None, 1), [*AT, "image/encoded is missing; it has image/class/label"]),
    "F27 junk Example": (
        lambda d: rewrite(d / SHARD, lambda _: b"\x0b junk with a checksum of its own"),
        [*AT, "not a tf.train.Example", "Expected a tf.train.Example with image/encoded"],
    ),
}

# One is run on every change: they differ in the message, which the index finds without ranks.
FIRST = ("F27 label >= classes",)


def message_of(ended, code=65):
    """Returns the one message of a run that failed as it should."""
    assert ended.code == code, ended.out + ended.err
    assert "Traceback" not in ended.err + ended.out
    assert ended.err.count("hvd-vgg: ") == 1, ended.err
    return ended.err[ended.err.index("hvd-vgg: ") :]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.fault(*re.findall(r"^F\d\d", case), tier=1 if case in FIRST else 3))
        for case in CASES
    ],
)
def test_bad_data_ends_all_ranks_with_one_message(launch, tmp_path, case):
    data = write_data(tmp_path / "data")
    damage, parts = CASES[case]
    damage(data)
    message = message_of(launch(2, "train", f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *FLAGS, "--steps=40"))
    for part in parts:
        assert part.format(shard=data / SHARD) in message


@pytest.mark.fault("F25")
def test_byte_that_flips_during_the_run_is_noticed(launch, tmp_path):
    """After the index was made, and after a first look at the record may have been good."""
    data = write_data(tmp_path / "data")
    offset = int(keep_index(data).offsets[25 + 3])
    (tmp_path / "flip").write_text(f"{offset + 300} {data / SHARD}")
    flags = [f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *FLAGS, "--steps=100"]
    message = message_of(launch(2, str(tmp_path), "flip@0:2", "train", *flags, program=INJECT))
    assert f"{data / SHARD}, record 3, offset {offset - 12}: the checksum of its " in message
    assert "Copy the shard again, or go on without: --bad_records_allowed=1" in message
    rank, step, phase, code = blamed(tmp_path)
    assert (rank in (0, 1), 2 <= step < 20, phase, code) == (True, True, "update", 65)


@pytest.mark.fault(tier=3)
def test_bad_validation_record_is_named_by_evaluation(launch, tmp_path):
    data = write_data(tmp_path / "data")
    shard = data / "validation-00001-of-00002"
    flip_byte(shard, 4, 300)
    message = message_of(launch(2, "train", f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *FLAGS))
    assert f"{shard}, record 4, offset " in message


@pytest.mark.parametrize(("launcher", "code"), [(["horovodrun"], 65), (["horovodrun", "--gloo"], 1)])
@pytest.mark.fault(tier=3)
def test_bad_data_under_horovodrun(launch, tmp_path, launcher, code):
    data = write_data(tmp_path / "data")
    flip_byte(data / SHARD, 3, 300)
    flags = [f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *FLAGS, "--steps=40"]
    program = [*launcher, "-np", "2", sys.executable, "-m", "hvd_vgg"]
    ended = launch(0, "train", *flags, program=program, PYTHONPATH=str(ROOT), code=code)
    assert f"{data / SHARD}, record 3, offset " in ended.out + ended.err
    # The launcher itself has a traceback under Gloo; what ranks say it marks with their number.
    assert not [line for line in (ended.out + ended.err).splitlines() if "]<std" in line and "Traceback" in line]


@pytest.mark.fault("F32")
@pytest.mark.parametrize("other", ["a shard of another size", *full("a shard less")])
def test_rank_that_sees_another_data_set_is_refused(launch, tmp_path, other):
    write_data(tmp_path / "data0")
    write_data(tmp_path / "data1", shards=2 if other == "a shard less" else 3)
    if other == "a shard of another size":
        rewrite(tmp_path / "data1" / SHARD, lambda _: example(picture(0, 1), 1))
    flags = " ".join([f"--run_dir={tmp_path / 'run'}", *FLAGS])
    script = tmp_path / "each.sh"
    script.write_text(f"exec python -m hvd_vgg train {flags} --data_dir={tmp_path}/data$OMPI_COMM_WORLD_RANK\n")
    message = message_of(launch(2, program=["bash", str(script)]), 78)
    assert "ranks disagree about the train shards" in message
    sizes = [path.stat().st_size if path.exists() else None for path in (tmp_path / f"data{r}" / SHARD for r in range(2))]
    assert re.search(rf"{SHARD} +{sizes[0]} +{sizes[1]}\n", message)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.fault("F28")
def test_uneven_shards_and_fewer_than_ranks(tmp_path):
    """Shards of 40 and 37 records on 3 ranks, 3 epochs, an evaluation after each."""
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "validation"):
        rows = [example(picture(i, i % 10 + 1), i % 10 + 1) for i in range(77)]
        write_shard(data / f"{split}-00000-of-00002", rows[:40])
        write_shard(data / f"{split}-00001-of-00002", rows[40:])
    run(tmp_path, data, 3, "--steps=0", "--epochs=3", "--eval_every_epochs=1")
    ids = ids_by_step(tmp_path, 3)
    assert list(ids) == list(range(8))  # 3 * 77 records in batches of 32
    stream = [record for step in ids for record in ids[step]]
    for epoch in range(3):
        assert sorted(stream[77 * epoch : 77 * (epoch + 1)]) == list(range(77))
    for rank in range(3):
        assert len((tmp_path / f"ids.rank{rank}").read_text().splitlines()) == 8
    evaluated = [row["data"]["eval.records"] for row in log_rows(tmp_path / "run") if "eval.records" in row["data"]]
    assert len(evaluated) >= 3 and set(evaluated) == {77}


# ---- records that replace bad ones


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    """Data of which 3 training records are bad, each otherwise, and 2 of the validation; the ids of the 3 as they come.

    The first two are in the first two batches of 32, the last is not.
    """
    data = write_data(tmp_path_factory.mktemp("spoilt") / "data")
    stream = positions(0, RECORDS, RECORDS, SEED).ids.tolist()
    bad = [stream[5], stream[40], stream[70]]
    index = keep_index(data)

    def place(record):
        shard = int(np.searchsorted(index.starts, record, side="right")) - 1
        return index.paths[shard], record - int(index.starts[shard])

    path, number = place(bad[1])
    rewrite(path, lambda _: example(picture(0, 1)[:300], int(index.labels[bad[1]])), number)
    path, number = place(bad[0])
    flip_byte(path, number, 300)
    index = keep_index(data)
    index.labels[bad[2]] = index.labels[bad[2]] % 10 + 1  # what the index says, not the record
    save_cache(data / ".hvd_vgg_index_train.npz", index)
    flip_byte(data / "validation-00000-of-00002", 3, 300)
    rewrite(data / "validation-00001-of-00002", lambda _: example(b"some text", 1))
    return data, bad


def bad_events(out, split="train"):
    return [event for event in events(out / "run", "bad_record") if f"/{split}-0" in event["where"]]


@pytest.mark.fault(tier=3)
def test_bad_records_are_replaced_by_the_same_on_any_ranks(launch, tmp_path, spoilt):
    """And after a restart on another number of ranks; evaluation counts bad ones as missed."""
    data, bad = spoilt
    flags = ["--bad_records_allowed=3", "--save_every_steps=0"]

    def replacement(record, epoch):
        tries = (replacement_record(RECORDS, SEED, epoch, record, attempt) for attempt in range(8))
        return next(by for by in tries if by not in bad)

    one, two, parts = (tmp_path / name for name in ("one", "two", "parts"))
    run(one, data, 1, *flags)
    plan = positions(0, 32 * STEPS, RECORDS, SEED)
    wanted = [replacement(i, e) if i in bad else i for i, e in zip(plan.ids.tolist(), plan.epochs.tolist())]
    assert [record for ids in ids_by_step(one, 1).values() for record in ids] == wanted
    first = bad_events(one)
    assert [(event["record"], event["step"], event["replaced_by"]) for event in first] == [
        (record, step, replacement(record, 0)) for step, record in enumerate(bad)
    ]
    for event, reason in zip(first, ("the checksum of its ", "cannot be decoded", "its label is ")):
        assert reason in event["reason"] and f"{data}/train-0000" in event["where"]
    missed = bad_events(one, "validation")  # at the one evaluation, at the end
    assert [(event["record"], event["replaced_by"]) for event in missed] == [(3, None), (20, None)]
    assert "bad_records_allowed=3" in (one / "run" / "flags.txt").read_text()
    found = result(one / "run")
    assert (found["records_evaluated"], found["bad_records_evaluated"]) == (37, 2)

    run(two, data, 2, *flags)
    assert_same_run(two, one)
    run(parts, data, 2, *flags, "--steps=2")
    assert newest(parts).meta["bad_records"] == bad[:2]
    run(parts, data, 1, *flags)
    assert_same_state(newest(parts), newest(one))
    for out in (one, two, parts):
        assert newest(out).meta["bad_records"] == bad
        assert bad_events(out) == first
        assert_true(out / "run")

    for ranks in (0, 3):
        ended = launch(ranks, "evaluate", f"--run_dir={one / 'run'}", code=0)
        assert f"({found['top1_hits']} and {found['top5_hits']} of 37 records, each once" in ended.out
        assert "(2 bad records counted as missed)" in ended.out
    message = message_of(launch(2, "evaluate", f"--run_dir={one / 'run'}", "--bad_records_allowed=1"))
    assert "2 bad records; expected at most --bad_records_allowed=1" in message
    assert f"{data}/validation-00000-of-00002, record 3, " in message


@pytest.mark.fault(tier=3)
def test_more_bad_records_than_allowed_end_the_run(tmp_path, spoilt):
    """Over restarts, with a list; nothing is saved that was trained on more, nor counted that was only decoded ahead."""
    data, bad = spoilt
    index = index_of(data)
    for ranks in (2, 1):  # the second goes on after two of the three
        message = message_of(run(tmp_path, data, ranks, "--bad_records_allowed=2", code=65))
        assert "3 bad records; expected at most --bad_records_allowed=2:" in message
        assert all(index.where(record) in message for record in bad)
        saved = [checkpoint.load(path).meta for path in RunDir(tmp_path / "run").list_checkpoints()]
        assert sorted((meta["step"], meta["bad_records"]) for meta in saved) == [(1, bad[:1]), (2, bad[:2])]
    run(tmp_path, data, 1, "--bad_records_allowed=3")
    assert newest(tmp_path).meta["bad_records"] == bad


# ---- images and mutations, read as a run reads them, in a process of their own


def read_all(folder):
    """Returns {shard: the message that refused it, or None} and by how many bytes memory grew; fails if the reader does."""
    program = [sys.executable, str(ROOT / "tests" / "programs" / "read_shards.py"), str(folder)]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout[-500:] + ended.stderr[-3000:]
    rows = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [name for name, _, _ in rows] == sorted(path.name for path in folder.iterdir())
    return {name: message for name, message, _ in rows}, rows[-1][2]


@pytest.mark.fault("F26")
def test_images_that_are_bad_or_unusual(tmp_path):
    """Refused by name before they take memory, or read as documented."""
    buffer = io.BytesIO()
    Image.effect_noise((48, 40), 60).convert("RGBA").save(buffer, "PNG")
    png = buffer.getvalue()
    good = {"JPEG": jpeg(), "PNG": png, "CMYK": jpeg("CMYK"), "gray": jpeg("L"), "progressive": jpeg(progressive=True)}
    # As few bytes as an image of its size can take: far from the fewest that are let through.
    good["plain"] = io.BytesIO()
    Image.new("L", (2000, 2000), 127).save(good["plain"], "JPEG", progressive=True, optimize=True)
    good["plain"] = good["plain"].getvalue()
    refused = {
        "truncated": (jpeg()[:400], "cannot be decoded"),
        "truncated PNG": (png[:-400], "cannot be decoded"),
        "empty": (b"", "must hold one byte string that is not empty"),
        "text": (b"some text\x1b[2J", "neither a JPEG nor a PNG; it begins with b'some tex'"),
        "GIF": (b"GIF89a and more", "neither a JPEG nor a PNG"),
        "13000 x 13000": (claiming(jpeg("L", (16, 16), optimize=True), 13000, 13000), "claims this height and width"),
        "8000 x 8000": (claiming(jpeg("L", (16, 16), optimize=True), 8000, 8000), "claims this height and width"),
        "0 x 9": (claiming(jpeg(), 0, 9), ""),
        "PNG of 9999 x 9999": (png[:16] + struct.pack(">II", 9999, 9999) + png[24:], "claims this height and width"),
    }
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shard(folder / "0 first", [example(jpeg(), 1)])
    for name, data in {**good, **{name: data for name, (data, _) in refused.items()}}.items():
        write_shard(folder / name, [example(jpeg(), 1), example(data, 1)])
    found, grown = read_all(folder)
    assert {name: found[name] for name in ["0 first", *good]} == dict.fromkeys(["0 first", *good])
    for name, (_, reason) in refused.items():
        assert found[name] and f"{folder / name}, record 1, offset " in found[name] and reason in found[name], name
    assert all(message.isprintable() for message in found.values() if message)
    assert grown < 100e6


def framed(data, length=None):
    """Returns a record of a TFRecord file whose checksums hold, though its length may be another."""
    header = struct.pack("<Q", len(data) if length is None else length)
    return b"".join([header, struct.pack("<I", masked_crc(header)), data, struct.pack("<I", masked_crc(data))])


def mutated(draw, encoded):
    """Returns the bytes of a shard of one record, changed so that what is wrong reaches the parser or the decoder."""
    kind = draw.randrange(7)
    if kind in (0, 1):  # the image, mostly its headers
        image = bytearray(encoded)
        for _ in range(draw.choice([1, 2, 8])):
            image[draw.randrange(draw.choice([40, 300, len(image)]))] = draw.randrange(256)
        return framed(example(bytes(image), 1))
    data = bytearray(example(encoded, 1))
    if kind in (2, 3):  # the Example, mostly what it is made of
        for _ in range(draw.choice([1, 2, 8])):
            data[draw.choice([draw.randrange(12), -draw.randrange(1, 60), draw.randrange(len(data))])] = draw.randrange(256)
    if kind == 4:
        del data[draw.randrange(len(data)) :]
    if kind == 5:
        at, count = draw.randrange(len(data)), draw.choice([1, 7, 200])
        data[at : at + draw.choice([0, count])] = draw.randbytes(count)
    if kind < 6:
        return framed(bytes(data))
    if draw.random() < 0.5:  # the frame, with a checksum that fits its length, or as it is
        return framed(bytes(data), draw.choice([0, 1, len(data) - 1, len(data) + 1, 2**26 + 1, 2**32, 2**63, 2**64 - 1]))
    whole = bytearray(framed(bytes(data)))
    whole[draw.choice([draw.randrange(12), -draw.randrange(1, 5)])] ^= 1 << draw.randrange(8)
    return bytes(whole)


def test_mutated_records_are_accepted_or_refused_by_name(tmp_path):
    """500 of them, in one process whose memory does not grow."""
    draw, folder = random.Random(7), tmp_path / "shards"
    folder.mkdir()
    png = io.BytesIO()
    Image.effect_noise((48, 40), 60).save(png, "PNG")
    bases = [jpeg(), jpeg("L"), jpeg("CMYK"), jpeg(progressive=True), png.getvalue()]
    write_shard(folder / "0 first", [example(jpeg(), 1)])
    for number in range(500):
        (folder / f"{number:03d}").write_bytes(mutated(draw, draw.choice(bases)))
    found, grown = read_all(folder)
    refused = {name: message for name, message in found.items() if message}
    for name, message in refused.items():
        # A length that is one too short leaves a byte, and the label is whole where it is not the last of the map's fields.
        rest = r"record 1, offset [1-9]\d*: expected a header of 12 bytes, but the file ends at byte "
        where = rf"data: {re.escape(str(folder / name))}(, record 0, offset 0: |, {rest}| is empty)"
        assert re.match(where, message), message
        assert message.isprintable()
    # Both happen, and the parser's, the frame's and the decoder's refusals are among them.
    assert 50 < len(refused) < 450
    for part in ("not a tf.train.Example", "is missing", "cannot be decoded", "checksum", "the file ends at byte", "label "):
        assert any(part in message for message in refused.values()), part
    assert grown < 100e6
