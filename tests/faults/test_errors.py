"""Every error a user can cause: one message that names the place, the documented exit code, no traceback, nobody left."""

import json
import os
import re
import signal
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from support import ROOT, TINY, Started, command_line, example, picture, wait_for, write_data, write_shard

from hvd_vgg.data import records
from hvd_vgg.train import checkpoint

FLAGS = [*TINY, "--steps=4", "--global_batch=8"]
SHARD = "train-00001-of-00003"


def rewrite(path, change):
    """Replaces record 2 of a shard by what `change` makes of it."""
    offsets, lengths, _ = records.scan_shard(path)
    whole = path.read_bytes()
    rows = [whole[o : o + n] for o, n in zip(offsets.tolist(), lengths.tolist())]
    rows[2] = change(rows[2])
    write_shard(path, rows)


def cut_jpeg(_):
    return example(picture(0, 1)[:300], 1)


def flip_byte(path, record, into):
    """Damages one byte of a record; `into` is an offset into its data, negative for its header."""
    offsets, _, _ = records.scan_shard(path)
    data = bytearray(path.read_bytes())
    data[int(offsets[record]) + into] ^= 1
    path.write_bytes(bytes(data))


def absurd(_):
    data = bytearray(picture(0, 1))
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", 13000, 13000)
    return example(bytes(data), 1)


# Each case: what is done to the data, what the message must hold ({shard}: the path of the damaged shard).
CASES = {
    "no directory": (lambda d: d.rename(d.with_name("elsewhere")), ["is not a directory", "--data_dir", "make-demo-data"]),
    "no shards": (lambda d: [path.unlink() for path in d.iterdir()], ["has no shard train-", "train-00000-of-01024"]),
    "missing shard": (lambda d: (d / SHARD).unlink(), ["lacks 1 of the 3 train shards: " + SHARD]),
    "dangling link": (
        lambda d: ((d / SHARD).unlink(), (d / SHARD).symlink_to("gone")),
        ["{shard} cannot be read: No such file"],
    ),
    "a directory in place of a shard": (lambda d: ((d / SHARD).unlink(), (d / SHARD).mkdir()), ["{shard} ", "directory"]),
    "empty shard": (lambda d: (d / SHARD).write_bytes(b""), ["{shard} is empty (0 bytes)"]),
    "truncated shard": (
        lambda d: (d / SHARD).write_bytes((d / SHARD).read_bytes()[:-7]),
        ["{shard}, record ", "offset ", "the file ends at byte"],
    ),
    "corrupt header": (
        lambda d: flip_byte(d / SHARD, 3, -12),
        ["{shard}, record 3, offset ", "the checksum of the record's length"],
    ),
    "bad CRC": (lambda d: flip_byte(d / SHARD, 3, 300), ["{shard}, record 3, offset ", "the checksum of its "]),
    "cut JPEG": (
        lambda d: rewrite(d / SHARD, cut_jpeg),
        ["{shard}, record 2, offset ", "the image (300 bytes) cannot be decoded"],
    ),
    "no image at all": (
        lambda d: rewrite(d / SHARD, lambda _: example(b"some text", 1)),
        ["{shard}, record 2, offset ", "neither a JPEG nor a PNG"],
    ),
    "absurd header": (
        lambda d: rewrite(d / SHARD, absurd),
        ["{shard}, record 2, offset ", "claims this height and width", "13000"],
    ),
    "no label": (
        lambda d: rewrite(d / SHARD, lambda _: example(picture(0, 1), None)),
        ["{shard}, record 2, offset ", "image/class/label is missing; it has image/encoded"],
    ),
    "no image feature": (
        lambda d: rewrite(d / SHARD, lambda _: example(None, 1)),
        ["{shard}, record 2, offset ", "image/encoded is missing; it has image/class/label"],
    ),
    "label out of range": (
        lambda d: rewrite(d / SHARD, lambda _: example(picture(0, 1), 11)),
        ["{shard}, record 2, offset ", "label 11 is outside 1..10", "--num_classes=10"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_data_ends_all_ranks_with_65_and_one_message(launch, tmp_path, case):
    data = write_data(tmp_path / "data")
    damage, told = CASES[case]
    damage(data)
    ended = launch(2, "train", f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *FLAGS, "--steps=40")
    assert ended.code == 65, ended.out + ended.err
    messages = [line for line in ended.err.splitlines() if line.startswith("hvd-vgg: ")]
    assert len(messages) == 1, ended.err
    for part in told:
        assert part.format(shard=data / SHARD) in messages[0]
    assert "Traceback" not in ended.err + ended.out


def test_a_bad_validation_record_is_named_by_evaluation(launch, tmp_path):
    data = write_data(tmp_path / "data")
    shard = data / "validation-00001-of-00002"
    flip_byte(shard, 4, 300)
    ended = launch(2, "train", f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *FLAGS)
    assert ended.code == 65, ended.err
    assert ended.err.count(f"{shard}, record 4, offset ") == 1
    assert ended.err.count("hvd-vgg: ") == 1
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(("launcher", "code"), [(["horovodrun"], 65), (["horovodrun", "--gloo"], 1)], ids=["mpi", "gloo"])
def test_bad_data_under_horovodrun(launch, tmp_path, launcher, code):
    data = write_data(tmp_path / "data")
    flip_byte(data / SHARD, 3, 300)
    flags = [f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *FLAGS, "--steps=40"]
    program = [*launcher, "-np", "2", sys.executable, "-m", "hvd_vgg"]
    ended = launch(0, "train", *flags, program=program, PYTHONPATH=str(ROOT))
    assert ended.code == code, ended.out + ended.err
    assert f"{data / SHARD}, record 3, offset " in ended.out + ended.err
    # The launcher itself has a traceback under Gloo; what ranks say it marks with their number.
    assert not [line for line in (ended.out + ended.err).splitlines() if "]<std" in line and "Traceback" in line]


def test_a_rank_that_is_killed_under_gloo_is_told_as_such_by_the_others(tmp_path, data):
    flags = [f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *FLAGS, "--steps=100000"]
    program = ["horovodrun", "--gloo", "-np", "2", sys.executable, "-m", "hvd_vgg"]
    started = Started([*program, "train", *flags], tmp_path, PYTHONPATH=str(ROOT))
    log = tmp_path / "run" / "dllogger.json"
    wait_for(lambda: log.exists() and "train.loss" in log.read_text()[5000:])
    ranks = [pid for pid in started.alive() if b"HOROVOD_RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    ranks = [pid for pid in ranks if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(sys.executable.encode())]
    assert ranks, started.out.read_text() + started.err.read_text()
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
    ended = started.wait()
    assert ended.code == 1
    assert "another rank has gone" in ended.out + ended.err
    assert "an error of the program" not in ended.out + ended.err


def test_a_loss_that_is_not_finite_ends_all_ranks_with_81_and_names_the_step(launch, tmp_path, data):
    run_dir = tmp_path / "run"
    flags = [f"--data_dir={data}", *FLAGS, "--steps=400", "--lr=300"]

    def first_bad(run, *more):
        ended = launch(2, "train", *flags, f"--run_dir={run}", *more)
        assert ended.code == 81, ended.out + ended.err
        (message,) = [line for line in ended.err.splitlines() if line.startswith("hvd-vgg: ")]
        assert "not finite" in message
        return int(message.split("step ")[1].split(":")[0])

    step = first_bad(run_dir, "--log_every_steps=1", "--save_every_steps=1")
    assert first_bad(tmp_path / "rarely", "--log_every_steps=50") == step
    newest, _ = checkpoint.newest(run_dir)
    assert newest.meta["step"] <= step
    assert all(np.isfinite(value).all() for value in newest.tensors.values())


def test_resume_never_required_and_another_run_are_refused_with_78(launch, tmp_path, data):
    base = [f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *FLAGS]
    ended = launch(2, "train", *base, "--resume=required")
    assert (ended.code, "holds no checkpoint" in ended.err) == (78, True)
    assert launch(2, "train", *base).code == 0
    ended = launch(2, "train", *base, "--resume=never")
    assert ended.code == 78
    assert "never overwritten" in ended.err
    ended = launch(2, "train", *base, "--lr=0.07", "--seed=5")
    assert ended.code == 78
    assert re.search(r"^ +checkpoint +command$", ended.err, re.M)
    assert re.search(r"^ +lr +0\.05 +0\.07$", ended.err, re.M)
    assert re.search(r"^ +seed +1 +5$", ended.err, re.M)
    assert "--allow_config_change=lr,seed" in ended.err
    assert "Traceback" not in ended.err
    ended = launch(2, "train", *base, "--lr=0.07", "--seed=5", "--allow_config_change=lr")
    assert ended.code == 78
    assert re.search(r"^ +seed +1 +5$", ended.err, re.M) and " lr " not in ended.err
    ended = launch(2, "train", *base, "--lr=0.07", "--steps=6", "--allow_config_change=lr")
    assert ended.code == 0, ended.err
    assert "--lr was 0.05, is 0.07 from here on" in ended.out
    assert (
        '{"event": "config_changed", "flag": "lr", "before": 0.05, "after": 0.07}'
        in (tmp_path / "run" / "dllogger.json").read_text()
    )


def test_all_checkpoints_damaged_never_starts_over(launch, tmp_path, data):
    run_dir = tmp_path / "run"
    base = [f"--data_dir={data}", f"--run_dir={run_dir}", *FLAGS, "--save_every_steps=2"]
    assert launch(2, "train", *base).code == 0
    paths = sorted((run_dir / "checkpoints").glob("step-*"))
    assert len(paths) == 2
    paths[-1].write_bytes(paths[-1].read_bytes()[:-9])
    ended = launch(2, "train", *base)
    assert ended.code == 0
    assert "steps 2 to 4" in ended.out
    assert f"set aside as {paths[-1].name}.bad" in ended.out
    for path in paths:
        path.write_bytes(path.read_bytes()[:-9])
    ended = launch(2, "train", *base)
    assert ended.code == 78
    assert all(f"{path.name}:" in ended.err for path in paths)


def test_ranks_with_different_flags_are_told_apart(launch, tmp_path, data):
    flags = " ".join([f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *FLAGS])
    script = tmp_path / "each.sh"
    script.write_text(f"exec python -m hvd_vgg train {flags} --lr=0.0$((1 + OMPI_COMM_WORLD_RANK))\n")
    ended = launch(2, program=["bash", str(script)])
    assert ended.code == 78, ended.err
    assert re.search(r"^ +rank 0 +rank 1\n +lr +0\.01 +0\.02$", ended.err, re.M)


def test_a_run_dir_that_cannot_be_made_is_refused(launch, tmp_path, data):
    (tmp_path / "file").write_text("")
    ended = launch(2, "train", f"--data_dir={data}", f"--run_dir={tmp_path / 'file' / 'run'}", *FLAGS)
    assert ended.code == 78
    assert ended.err.count("cannot be made or written") == 1


def test_two_jobs_on_one_run_directory_are_refused(launch, tmp_path, data):
    """F23: the second is told who holds it, the first goes on."""
    flags = [f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *FLAGS]
    worker = [sys.executable, str(ROOT / "tests" / "worker.py"), str(tmp_path)]
    first = Started(command_line(2, ["sleep@0:2:1000", "train", *flags], worker), tmp_path)
    try:
        wait_for(lambda: "step 2/" in first.out.read_text())
        ended = launch(1, "train", *flags)
        assert ended.code == 78, ended.out + ended.err
        assert "is in use by another job" in ended.err and '"process": ' in ended.err
        assert first.process.poll() is None
    finally:
        first.process.terminate()
    first.wait()
    assert launch(2, "train", *flags).code == 0  # a lock dies with its holder


def test_evaluating_what_is_no_run_is_refused(launch, tmp_path, data):
    ended = launch(2, "evaluate", f"--data_dir={data}", f"--run_dir={tmp_path}")
    assert ended.code == 78
    assert "has no best checkpoint" in ended.err


def test_the_written_flag_file_is_the_same_run(launch, tmp_path, data):
    first, second = tmp_path / "first", tmp_path / "second"
    assert launch(2, "train", f"--data_dir={data}", f"--run_dir={first}", *FLAGS, "--lr=0.0123").code == 0
    assert launch(1, "train", f"--flagfile={first / 'flags.txt'}", f"--run_dir={second}").code == 0
    rows = []
    for run in (first, second):
        lines = [json.loads(line[5:]) for line in (run / "dllogger.json").read_text().splitlines()]
        rows.append([line["data"]["train.loss"] for line in lines if line["type"] == "LOG" and "train.loss" in line["data"]])
    np.testing.assert_allclose(rows[0], rows[1], rtol=1e-5)
