"""Every benchmark runs, at toy size; says in a line what it lacks; and ends its workers when it is ended."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import checkouts
import measure
import namespaces
import pytest
from support import ROOT, TINY, Started, command_line, full, wait_for

# Of each benchmark: its options, where DATA is a directory of records, and how rows of its table begin.
SMOKE = {
    "index": ("--records=64 --rounds=2", []),
    "storage": ("--data_dir=DATA --blocks=1,8 --images=32 --batch=16 --size=32 --rounds=2", ["1", "8"]),
    "layouts": ("--data_dir=DATA --images=40 --shards=3 --rounds=2", ["imagenet", "tfds", "webdataset", "folders"]),
    "wire_dtype": ("", ["float32", "float16"]),
    "saving": ("--rounds=1 --batch=1 --size=32 --width=0.05", ["foreground: the loop waits, seconds"]),
    "loop": (
        "--data_dir=DATA --sizes=vgg11-32 --rounds=1 --num_classes=10 --width=0.05 --global_batch=8 --log_every_steps=3",
        ["vgg11-32, trainer", "vgg11-32, bare"],
    ),
    "input": (
        "--data_dir=DATA --images=64 --size=32 --rounds=1 --ways=decode,train,evaluate,tf_cnn,tf_data,pillow",
        ["decode", "train", "evaluate", "tf_data", "pillow"],
    ),
    "augment": (
        "--data_dir=DATA --images=8 --size=32 --rounds=1",
        ["bare, hvd_vgg", "random_erasing, hvd_vgg", "color_jitter, hvd_vgg, pillow", "auto_augment, hvd_vgg"],
    ),
    "cores": (
        "--data_dir=DATA --images=32 --size=32 --rounds=1 --shorter_sides=0,36 --recipes=bare,pillow --device=500",
        ["as they are, bare", "36, bare", "36, pillow"],
    ),
    "compute": (
        f"--size=32 --batch=1 --warmup=1 --updates=1 --matmul_side=64 --rounds=1 --torch_python={sys.executable} "
        "--precisions=bfloat16 --ways=matmul,ours,keras,torch,tf_cnn",
        ["matmul", "ours", "keras"],
    ),
    "ingredients": (
        "--model=vgg11 --width=0.05 --size=32 --batch=32 --rounds=1 --warmup=1 --updates=1 --ways=plain,small_groups",
        ["plain", "small_groups"],
    ),
    "chaos": ("--data_dir=DATA --faults=1 --ranks=1 --steps=80 --seed=1", ["faults"]),
    "finetune": (
        "--data_dir=DATA --pretrain=2 --updates=2 --rounds=1 --width=0.0625 --weights_updates=1",
        ["frozen", "slower", "scratch"],
    ),
    "fixed_point": (
        "--data_dir=DATA --sums=2,3 --num_classes=10 --model=vgg11 --width=0.05 --image_size=32",
        ["2, kernel", "3, bias"],
    ),
    "prepare": (
        "--data_dir=DATA --images=24 --shorter_side=24 --rounds=1",
        ["cp", "cat", "pass", "libjpeg_turbo", "pillow", "encode", "train", "train_small"],
    ),
    "pages": ("--epochs=1 --ranks=2 --rounds=1", ["5,005"]),
    "doctor": ("--cases=unreachable --hosts=2 --rounds=1", ["unreachable"]),
    "exchange": (
        "--size=32 --width=0.05 --mbit=1000 --steps=1 --rounds=1 --ways=horovod,factored16",
        ["local", "horovod", "factored16"],
    ),
    "checkouts": (
        f"--before={ROOT} --rounds=1 --ranks=1 train --data_dir=DATA --steps=6 --width=0.05 --global_batch=8",
        ["images/s"],
    ),
}
NEED_HOSTS = ("doctor", "exchange")
# What they start has tests of its own.
SLOW = (
    "augment",
    "chaos",
    "checkouts",
    "compute",
    "cores",
    "exchange",
    "finetune",
    "ingredients",
    "input",
    "prepare",
    "saving",
)
SLOW += ("pages", "wire_dtype")


def command(name, options, data):
    """Returns the command of a benchmark; skips the test where there are no hosts for it."""
    if name in NEED_HOSTS and "--shared" not in options and namespaces.missing(("ip", "tc")):
        pytest.skip(f"capability: network namespaces: {namespaces.missing(('ip', 'tc'))}")
    words = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *options.replace("DATA", str(data)).split()]
    return command_line(2, [], words) if name == "wire_dtype" else words


@pytest.mark.parametrize("name", [*(name for name in SMOKE if name not in SLOW), *full(*SLOW)])
def test_benchmark_runs_at_toy_size(tmp_path, data, name):
    """The table has the rows asked for, and nothing is left."""
    options, rows = SMOKE[name]
    ended = Started(command(name, options, data), tmp_path).wait()
    assert ended.code == 0, ended.out + ended.err
    for row in rows:
        assert f"\n| {row} | " in ended.out, (row, ended.out + ended.err)
    assert f"{measure.machine().split(';')[0]}; load" in ended.out
    if name == "compute":
        assert "torch, bfloat16: not installed (No module named 'torch'): left out" in ended.out
        assert "tf_cnn, bfloat16: without --tf_cnn_benchmarks" in ended.out and "no bfloat16" in ended.out


@pytest.mark.fault(tier=3)
def test_timeline_of_a_profiled_run(launch, tmp_path, data):
    """The sum of block5 is handed over first, well before that of block1."""
    flags = [f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *TINY, "--steps=4", "--profile_steps=2:2"]
    flags += ["--width=0.5", "--image_size=96"]  # the pass takes 150 ms or so: clocks are set to one, ranks differ by tens
    launch(2, "train", *flags, "--exchange=allreduce", code=0)
    ended = Started([sys.executable, str(ROOT / "benchmarks/timeline.py"), f"--run_dir={tmp_path / 'run'}"], tmp_path).wait(
        code=0
    )
    rows = [line.strip("| ").split(" | ") for line in ended.out.splitlines() if line.startswith("| block")]
    assert [row[0] for row in rows] == [f"block{number}" for number in (5, 4, 3, 2, 1)]
    handed_over = [float(row[3]) for row in rows]
    assert min(handed_over) == handed_over[0] < handed_over[-1], ended.out


def test_benchmark_exists_for_every_smoke_test():
    """And the reverse: no benchmark is without one; that of the timeline has a test of its own."""
    programs = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "measure.run(main" in path.read_text()}
    assert programs == {*SMOKE, "timeline"}


@pytest.mark.parametrize(
    ("name", "options", "programs", "lacking"),
    [
        ("exchange", "", ["ip", "tc"], "needs mpirun, not found on PATH"),
        ("exchange", "", ["mpirun", "ip"], "needs tc (Debian: apt-get install iproute2), or --shared"),
        ("doctor", "", ["mpirun"], "needs ip (Debian: apt-get install iproute2)"),
        ("chaos", "--data_dir=DATA", [], "needs mpirun, not found on PATH"),
        ("checkouts", "--before=0000000 loop", [], "needs git, not found on PATH"),
        ("storage", "--data_dir=/nowhere", [], "/nowhere"),
    ],
    ids=["mpirun", "tc", "ip", "chaos", "git", "data"],
)
def test_benchmark_says_what_it_lacks(tmp_path, data, name, options, programs, lacking):
    """In one line, and ends with 78, or 65 for data."""
    for program in programs:
        (tmp_path / program).symlink_to("/bin/true")
    words = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *options.replace("DATA", str(data)).split()]
    ended = Started(words, tmp_path, PATH=str(tmp_path)).wait()
    assert ended.code == (65 if name == "storage" else measure.CONFIGURATION), ended.out + ended.err
    (line,) = ended.err.splitlines()
    assert line.startswith(f"{name}.py: ") and lacking in line, line


def test_hosts_need_root(monkeypatch):
    """Which is said first."""
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    assert namespaces.missing().startswith("root")


def count_with(variable, started):
    """Returns how many of the processes started have an environment variable."""
    count = 0
    for pid in started.alive():
        with contextlib.suppress(OSError):
            count += variable in Path(f"/proc/{pid}/environ").read_bytes()
    return count


@pytest.mark.parametrize(
    ("name", "options", "number"),
    [
        ("exchange", "--width=0.05 --size=32 --rounds=1000", signal.SIGTERM),
        *full(("exchange", "--width=0.05 --size=32 --rounds=1000 --shared", signal.SIGHUP)),
        ("input", "--data_dir=DATA --images=64 --size=32 --rounds=1000 --ways=decode,train", signal.SIGINT),
        ("chaos", "--data_dir=DATA --ranks=2 --steps=100000", signal.SIGTERM),
    ],
    ids=["hosts", "shared", "pipes", "chaos"],
)
def test_benchmark_ends_its_workers(tmp_path, data, name, options, number):
    """Whatever it has started; the hosts of exchange.py are gone too."""
    started = Started(command(name, options, data), tmp_path)
    variable = b"HVD_VGG_TEST" if name == "input" else b"OMPI_COMM_WORLD_RANK="  # which the ranks of a job have
    wait_for(lambda: count_with(variable, started) > 1 or started.process.poll() is not None)
    os.kill(started.process.pid, number)
    ended = started.wait()
    assert ended.code == 128 + number, ended.out + ended.err
    assert "Traceback" not in ended.err
    assert f"hvgg{started.process.pid}" not in subprocess.run(["ip", "link"], capture_output=True, text=True).stdout


def test_checkouts_reads_what_loop_printed_before():
    """Up to 42164a1 it was no table."""
    printed = "vgg16-64:\n  trainer  ms an update: total 18.18 (17.25 to 23.81), rest 1.03 (0.79 to 5.47)\n"
    assert checkouts.figures(printed) == {"vgg16-64, trainer, total": 18.18, "vgg16-64, trainer, rest": 1.03}
    table = "| loop | turns | total |\n| --- | --- | --- |\n| vgg16-64, trainer | 20 | 18.18 (17.25 to 23.81) |\n"
    assert checkouts.figures(table) == {"vgg16-64, trainer, turns": 20.0, "vgg16-64, trainer, total": 18.18}


def test_checkouts_takes_a_commit():
    """Its files are copied; the repository is left as it is."""
    if subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, check=False).returncode:
        with pytest.raises(SystemExit):
            checkouts.checkout("HEAD").__enter__()
        return
    with checkouts.checkout("HEAD") as place:
        assert (place / "hvd_vgg" / "__init__.py").is_file() and place != ROOT
    assert not place.exists()
