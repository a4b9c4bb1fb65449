"""`hvd-vgg prepare` is killed, its disk is full, its sources are damaged; what training and doctor make of its manifest."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import raw_sets
from support import ROOT, TINY, Started, command_line, full, small_disk_at

from hvd_vgg.data import manifest

# Images that take some milliseconds each, so that a start is in the midst of them for a while.
SLOW = ["--shorter_side=100", "--train_shards=30", "--validation_shards=9", "--input_threads=1", "--console=lines"]


def files_of(out):
    """Returns the contents of all files below a directory, by name."""
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def flags(source, out, *more):
    return ["prepare", f"--source={source}", f"--out={out}", *more]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """ILSVRC2012's archives of 63 images of 480 by 360 pixels."""
    size = {"size": (480, 360)}
    rows = {
        "train": [
            (w, f"{w}_{i}.JPEG", raw_sets.encode(100 * n + i, **size))
            for n, w in enumerate(raw_sets.WNIDS)
            for i in range(17)
        ],
        "validation": [
            (raw_sets.WNIDS[i % 3], f"ILSVRC2012_val_{i:08d}.JPEG", raw_sets.encode(1000 + i, **size)) for i in range(12)
        ],
    }
    root = tmp_path_factory.mktemp("archives")
    raw_sets.write_ilsvrc(root, rows)
    return root


@pytest.fixture(scope="module")
def undisturbed_set(tmp_path_factory, pictures):
    """What a start that nothing happens to makes of them."""
    out = tmp_path_factory.mktemp("prepared") / "out"
    Started(command_line(0, flags(pictures, out, *SLOW)), out.parent).wait(code=0)
    return files_of(out)


def pids_of_ranks(started):
    """Returns the processes of a started command that do the work: itself, or the ranks."""
    found = []
    for pid in started.alive():
        try:
            if b"OMPI_COMM_WORLD_RANK=" in Path(f"/proc/{pid}/environ").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return found or [started.process.pid]


def kill_at_some_moment(started, out, rng):
    """Kills a rank once some more shards are whole, or a while after; returns whether it was still running."""
    whole = len(list(out.glob("*-of-*"))) + rng.randrange(4)
    while len(list(out.glob("*-of-*"))) < whole or not (out / ".prepare").exists():
        if started.process.poll() is not None:
            break
        time.sleep(0.001)
    time.sleep(rng.random() * 0.03)
    running = started.process.poll() is None
    if running:
        os.kill(rng.choice(pids_of_ranks(started)), signal.SIGKILL)
    started.process.wait()
    started.end()
    return running


@pytest.mark.fault("F44")
@pytest.mark.parametrize(("ranks", "kills"), [(0, 4), (2, 1), *full((0, 10), (2, 10))])
def test_prepare_killed_ends_in_the_same_files(tmp_path, pictures, undisturbed_set, ranks, kills):
    """By SIGKILL at random moments, and started again each time; every byte is that of an undisturbed start on one rank."""
    out, rng, killed = tmp_path / "out", random.Random(ranks + kills), 0
    for _ in range(kills):
        started = Started(command_line(ranks, flags(pictures, out, *SLOW)), tmp_path)
        killed += kill_at_some_moment(started, out, rng)
    ended = Started(command_line(ranks, flags(pictures, out, *SLOW)), tmp_path).wait(code=0)
    assert killed, "never in time"
    assert ("are whole: going on with the others" in ended.out) or "is finished" in ended.out or kills == 1
    assert files_of(out) == undisturbed_set


@pytest.mark.fault("F44")
def test_prepare_ends_on_request_and_goes_on(tmp_path, pictures, undisturbed_set):
    """Ctrl-C; no traceback."""
    out = tmp_path / "out"
    started = Started(command_line(0, flags(pictures, out, *SLOW)), tmp_path)
    while not list(out.glob("*-of-*")) and started.process.poll() is None:
        time.sleep(0.001)
    os.kill(started.process.pid, signal.SIGINT)
    ended = started.wait()
    assert ended.code in (0, 80) and "Traceback" not in ended.err, ended.err
    Started(command_line(0, flags(pictures, out, *SLOW)), tmp_path).wait(code=0)
    assert files_of(out) == undisturbed_set


@pytest.mark.fault("F44", tier=3)
def test_prepare_under_launch_is_the_same(launch, tmp_path, pictures, undisturbed_set):
    """On 3 ranks, of which one has nothing to do at the end."""
    launch(0, "launch", "--ranks=3", *flags(pictures, tmp_path / "out", *SLOW), code=0)
    assert files_of(tmp_path / "out") == undisturbed_set


@pytest.mark.fault("F44")
@pytest.mark.parametrize(("arguments", "code"), [(["--source=/nowhere"], 65), (["--source=s", "--out=s/x"], 64)])
def test_prepare_that_cannot_begin_is_one_message(launch, tmp_path, arguments, code):
    """And leaves nothing."""
    ended = launch(0, "prepare", *arguments, code=code)
    assert ended.err.count("hvd-vgg: ") == 1 and "Traceback" not in ended.err
    assert "Name the directory to convert with --source" in ended.err or "expected a directory outside --source" in ended.err
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.fixture
def small_disk(tmp_path):
    """A directory on a file system of 20 MB, which can be made larger."""
    with small_disk_at(tmp_path / "disk", "20m") as disk:
        yield disk


@pytest.mark.fault("F44")
def test_prepare_on_a_full_disk_is_one_message(launch, tmp_path, small_disk):
    """Told before, where it can be known; else when it happens; and the command goes on where there is more room."""
    noise = [np.random.default_rng(seed).integers(0, 2, (1000, 1000), np.uint8) * 255 for seed in range(24)]
    rows = {"train": [("a", f"{number}.JPEG", png_of(image)) for number, image in enumerate(noise)]}
    raw_sets.write_folders(tmp_path / "set", rows)
    command = flags(tmp_path / "set", small_disk / "out", "--splits=train", "--train_shards=12", "--console=lines")
    ended = launch(0, *command, code=74)
    assert "No space left on device" in ended.err and "Traceback" not in ended.err and ended.err.count("hvd-vgg: ") == 1
    assert ended.err.rstrip().endswith("The same command goes on where this one ended")
    whole = {path: path.stat().st_mtime_ns for path in small_disk.glob("out/*-of-*")}
    assert whole and not list(small_disk.rglob("*.tmp"))

    ended = launch(0, *command, code=74)
    assert " MB are to be written to" in ended.err and " MB are free: make room" in ended.err

    subprocess.run(["mount", "-o", "remount,size=90m", small_disk], check=True)
    launch(0, *command, code=0)
    assert {path: path.stat().st_mtime_ns for path in whole} == whole
    assert manifest.read(small_disk / "out").splits["train"].converted == 24


def png_of(image):
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).convert("1").save(file, "PNG")
    return file.getvalue()


@pytest.mark.fault("F44")
@pytest.mark.parametrize("count", [40, *full(250)])
@pytest.mark.parametrize("kind", ["parquet", "ilsvrc"])
def test_prepare_survives_mutated_sources(tmp_path, kind, count):
    """Parquet and archives, changed at random: each is told, is refused in part, or is read; none ends the process."""
    write = {"parquet": raw_sets.write_parquet, "ilsvrc": raw_sets.write_ilsvrc}[kind]
    write(tmp_path / "set", raw_sets.images(train=2, validation=1))
    program = [
        sys.executable,
        str(ROOT / "tests" / "programs" / "mutate_sources.py"),
        str(tmp_path / "set"),
        str(count),
        "7",
    ]
    ended = Started(program, tmp_path, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'programs'}").wait()
    lines = ended.out.splitlines()
    assert ended.code == 0 and len(lines) == count + 1, f"{lines[-2:]}\n{ended.err}"
    assert all(word in ended.out for word in (" failure data: ", " read ")), lines[-1]


@pytest.mark.fault("F44", tier=3)
def test_prepared_shard_that_was_replaced_is_named(launch, tmp_path, pictures):
    """By training, though every record in it is whole; by doctor where its size and records are the same."""
    data = tmp_path / "data"
    launch(0, *flags(pictures, data, "--train_shards=3", "--validation_shards=2", "--shorter_side=64"), code=0)
    run = ["--num_classes=3", f"--data_dir={data}", *TINY[1:], f"--run_dir={tmp_path / 'run'}", "--steps=2"]
    launch(0, "train", *run, code=0)
    first, second = (data / f"train-0000{number}-of-00003" for number in range(2))
    kept = second.read_bytes()
    second.write_bytes(first.read_bytes() + kept)
    ended = launch(0, "train", *run, "--steps=4", "--resume=auto", code=65)
    assert f"{second} has " in ended.err and "manifest.json says" in ended.err, ended.err

    second.write_bytes(kept)
    made = manifest.read(data)
    shards = list(made.splits["train"].shards)
    shards[1] = shards[1]._replace(sha256="0" * 64)
    split = made.splits["train"]._replace(shards=tuple(shards))
    (data / "manifest.json").write_text(manifest.dump(made._replace(splits={**made.splits, "train": split})))
    ended = launch(0, "doctor", "--full", *run)
    assert f"{second}: its SHA-256 is" in ended.out + ended.err
