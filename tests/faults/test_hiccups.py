"""Storage that hiccups, blocks or is damaged (F40, F41), and the second copies of checkpoints (F42).

The kernel's answers are put in by a library of the test, tests/programs/storage.c. What needs no ranks is in
tests/unit/test_storage.py and tests/unit/test_damage.py.
"""

import errno
import json
import os
import shutil
import subprocess

import pytest
from oracles import STEPS, assert_exact, assert_goes_on, assert_same_state, blamed, events, newest, result, run, start
from support import ROOT, example, full, picture, wait_for, write_data, write_shard

from hvd_vgg.data.index import scan_shard
from hvd_vgg.run_dir import RunDir
from hvd_vgg.training import checkpoint

FOR_EVER = 10**9


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    """Returns a function: the environment in which storage answers as these words of storage.c say."""
    assert shutil.which("gcc"), "gcc is missing: it compiles tests/programs/storage.c"
    library = tmp_path_factory.mktemp("storage") / "storage.so"
    source = ROOT / "tests" / "programs" / "storage.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-o", library, source, "-ldl"], check=True)
    return lambda *words: {"LD_PRELOAD": str(library), "STORAGE": ",".join(words)}


@pytest.mark.fault("F40")
def test_storage_that_hiccups_changes_nothing(tmp_path, data, undisturbed, storage):
    """Reads fail three times in a row, or are short, and nothing of what a file system may lack is there."""
    words = ["read:116:60:3", "part", f"sync:{errno.EINVAL}", f"lock:{errno.ENOLCK}", f"rename:{errno.EBUSY}"]
    ended = run(tmp_path, data, 2, **storage(*words))
    assert_exact(tmp_path, 2, undisturbed)
    told = [line for line in ended.err.splitlines() if line.startswith("hvd-vgg: warning")]
    assert sum("could not be read for " in line and "(Stale file handle, ESTALE)" in line for line in told) in (1, 2, 3, 4)
    assert sum("does not sync directories" in line for line in told) == 1
    assert sum("cannot be renamed over" in line for line in told) == 1
    assert "cannot be locked" in ended.out
    assert not list((tmp_path / "run").glob("**/*.tmp")) and not (tmp_path / "run" / "faults").exists()


@pytest.mark.parametrize("number", [errno.EIO, errno.ETIMEDOUT, errno.EINTR, errno.ENOTCONN])
@pytest.mark.parametrize("first", [1, 20, 200], ids=["first", "indexing", "training"])
@pytest.mark.fault("F40", tier=3)
def test_reads_that_fail_for_a_moment_change_nothing(tmp_path, undisturbed, storage, number, first):
    run(tmp_path, write_data(tmp_path / "data"), 2, **storage(f"read:{number}:{first}:4", "rank:1"))
    assert_exact(tmp_path, 2, undisturbed)


@pytest.mark.fault("F40", tier=3)
def test_reads_that_stay_failed_end_with_75(tmp_path, data, undisturbed, storage):
    """Rank 1 alone is blamed; started again the run goes on."""
    ended = run(tmp_path, data, 2, code=75, **storage(f"read:{errno.EIO}:120:{FOR_EVER}", "rank:1"))
    assert "cannot be read: Input/output error, EIO, in 8 attempts over" in ended.err and "Traceback" not in ended.err
    assert (blamed(tmp_path)[0], blamed(tmp_path)[3]) == (1, 75)
    assert_goes_on(tmp_path, data, undisturbed)


@pytest.mark.fault("F40", tier=3)
def test_indexing_that_stays_failed_ends_with_75(tmp_path, storage):
    data = write_data(tmp_path / "data")
    ended = run(tmp_path, data, 2, code=75, **storage(f"read:{errno.ESTALE}:1:{FOR_EVER}", "rank:1"))
    assert ended.err.count("hvd-vgg: ") == 1 and "cannot be read: Stale file handle, ESTALE" in ended.err


@pytest.mark.fault("F40", tier=3)
def test_mount_that_blocks_is_in_the_hang_report(tmp_path, data, undisturbed, storage):
    run(tmp_path, data, 2, "--hang_seconds=6", code=75, **storage("block:90:1000", "rank:1"))
    (line,) = (tmp_path / "run" / "faults" / "hang.rank1.jsonl").read_text().splitlines()
    (reading,) = json.loads(line)["reading"]
    assert reading.startswith(str(data / "train-0000"))
    assert_goes_on(tmp_path, data, undisturbed)


@pytest.mark.fault("F41", tier=3)
def test_shard_rewritten_in_use_is_named(tmp_path):
    """In place by records of other sizes; read by ranks that opened it before."""
    data = write_data(tmp_path / "data")
    started = start(tmp_path, data, 2, *[f"sleep@0:{step}:1" for step in range(2, STEPS)])
    wait_for(lambda: "step 2/" in started.out.read_text())
    shard = data / "train-00001-of-00003"
    count = len(scan_shard(shard).offsets)
    write_shard(tmp_path / "other", [example(picture(i, 1, 44, 48), i % 10 + 1) for i in range(count)])
    with open(shard, "r+b") as file:
        file.write((tmp_path / "other").read_bytes())
    ended = started.wait(code=65)
    assert f"{shard}, record 0, offset 0: it has " in ended.err
    assert "when it was indexed: the shard was replaced or rewritten. Restore it as it was" in ended.err


@pytest.mark.fault("F41", tier=3)
def test_mended_images_have_names_in_doctor_and_training(tmp_path, launch):
    data = write_data(tmp_path / "data")
    shard = data / "train-00001-of-00003"
    whole = picture(7, 8, 80, 96)
    middle = len(whole) // 2
    write_shard(
        shard, [example(whole[:middle] + bytes(40) + whole[middle + 40 :] if i == 3 else whole, 8) for i in range(20)]
    )
    ended = run(tmp_path, data, 2, "--steps=8")
    lines = [line for line in ended.err.splitlines() if "Corrupt JPEG" in line]
    assert 1 <= len(lines) <= 2 and all(f"{shard}, record 3, offset " in line for line in lines)
    flags = ["--num_classes=10", "--image_size=32", "--model=vgg11", "--width=0.125", "--global_batch=8", "--device_batch=4"]
    ended = launch(2, "doctor", "--full", f"--data_dir={data}", f"--run_dir={tmp_path / 'doctor'}", *flags)
    (line,) = [line for line in (ended.out + ended.err).splitlines() if "Corrupt JPEG" in line]
    assert line.startswith("warning  data") and f"{shard}, record 3, offset " in line


# ---- a second copy of each checkpoint


def gone(run_dir):
    shutil.rmtree(run_dir / "checkpoints")


def damaged(run_dir):
    for path in RunDir(run_dir).list_checkpoints():
        path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("harm", [shutil.rmtree, *full(gone, damaged)], ids=lambda harm: harm.__name__)
@pytest.mark.fault("F42")
def test_copies_take_the_place_of_checkpoints(tmp_path, data, undisturbed, harm):
    """Killed at step 6; whatever became of the first directory, the run ends as if nothing had happened."""
    flag = f"--checkpoint_copy_dir={tmp_path / 'copy'}"
    run(tmp_path, data, 2, "kill@1:6", flag, "--keep_checkpoints=2", code=137)
    copies = RunDir(tmp_path / "copy").list_checkpoints()
    assert 1 <= len(copies) <= 3
    harm(tmp_path / "run")
    ended = run(tmp_path, data, 2, flag)
    (used,) = events(tmp_path / "run", "checkpoint_copy_used")
    assert used["file"] == str(copies[0]) and used["step"] in (5, 6)
    assert f"holds no whole checkpoint as new as the copy {copies[0]}, which is used" in ended.out
    assert result(tmp_path / "run")["state_sha256"] == result(undisturbed / "run")["state_sha256"]
    assert_same_state(newest(tmp_path), newest(undisturbed))
    copy = checkpoint.newest(RunDir(tmp_path / "copy"))[0]
    assert copy.meta["step"] == STEPS
    assert_same_state(copy, newest(undisturbed))
    if harm is not shutil.rmtree:  # the log goes on
        assert_exact(tmp_path, 2, undisturbed)


@pytest.mark.fault("F42", tier=3)
def test_copies_that_fail_end_no_run(tmp_path, data, undisturbed):
    """A file is in the way, for a while; each copy that fails is told."""
    place = tmp_path / "copy"
    place.write_text("in the way")
    started = start(
        tmp_path, data, 2, *[f"sleep@0:{step}:0.5" for step in range(3, STEPS)], f"--checkpoint_copy_dir={place}"
    )
    wait_for(lambda: "step 5/" in started.out.read_text())
    place.unlink()
    ended = started.wait(code=0)
    assert "warning: no copies of checkpoints at present: " in ended.out
    failed = events(tmp_path / "run", "copy_failed")
    assert failed and ended.out.count("warning: no copy of the checkpoint of step ") == len(failed)
    assert len(failed) + len(events(tmp_path / "run", "checkpoint_copy")) == len(events(tmp_path / "run", "checkpoint"))
    assert checkpoint.newest(RunDir(place))[0].meta["step"] == STEPS
    assert_exact(tmp_path, 2, undisturbed)


@pytest.mark.fault("F42", tier=3)
def test_copies_that_cannot_be_listed_end_no_run(tmp_path, data, undisturbed):
    """A loop of links is in their place when the run starts again."""
    flag = f"--checkpoint_copy_dir={tmp_path / 'copy'}"
    run(tmp_path, data, 2, "kill@1:6", flag, code=137)
    shutil.rmtree(tmp_path / "copy" / "checkpoints")
    (tmp_path / "copy" / "checkpoints").symlink_to("checkpoints")
    ended = run(tmp_path, data, 2, flag)
    assert ended.err.count("warning on ") == 1 and "the copies of checkpoints cannot be used: " in ended.err
    assert len(events(tmp_path / "run", "copy_failed")) >= STEPS - 6
    assert_exact(tmp_path, 2, undisturbed)


@pytest.mark.fault("F42", tier=3)
def test_copy_that_blocks_ends_no_run(tmp_path, data, undisturbed):
    """The end of the run waits for it in bounds."""
    place = RunDir(tmp_path / "copy")
    place.checkpoints.mkdir(parents=True)
    os.mkfifo(place.checkpoints / "best.tmp")  # opening it waits for a reader
    ended = run(tmp_path, data, 2, f"--checkpoint_copy_dir={place.path}", "--hang_seconds=6")
    assert f"warning: {place.checkpoints} blocks: the copy that is being written there is given up" in ended.out
    assert_exact(tmp_path, 2, undisturbed)


@pytest.mark.fault("F42", tier=3)
def test_two_jobs_with_one_directory_of_copies(tmp_path, data):
    flag = f"--checkpoint_copy_dir={tmp_path / 'copy'}"
    first = start(tmp_path / "first", data, 0, "sleep@0:2:1000", flag)
    wait_for(lambda: "step 1/" in first.out.read_text())
    ended = run(tmp_path / "second", data, 0, flag, code=78)
    assert f"{flag} is in use by another job" in ended.err
    first.process.terminate()
