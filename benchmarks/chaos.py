"""A run that is disturbed until it ends, held against the same run left alone.

    python benchmarks/chaos.py --data_dir=DIR [--faults=20] [--ranks=1,2,3] [--seed=N] [--steps=480]

Trains a small network, and after a random number of updates injects one of these faults, each time it is started:

    kill      SIGKILL to a random rank                                              137
    term      SIGTERM to a random rank: all stop                                    80
    freeze    SIGSTOP to a random rank: the watchdog ends the job                   75 (alone: SIGKILL after a while)
    full      fills the file system that checkpoints go to, then SIGKILL (as root, on a file system of its own)
    damage    SIGKILL, then a byte of the newest checkpoint is changed

Then starts it again, on a random number of --ranks, until all faults are done and the run has come to its end. Exits with 1
unless every bit of the end is that of the undisturbed run, on the first of --ranks. Prints for each fault how long the job
took to end and to train again, the updates done twice, and the most bytes that the run directory held. Faults are a function
of --seed but for their exact moment.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure

from hvd_vgg.reporting.receipt import read_log
from hvd_vgg.run_dir import RunDir

SAVE_EVERY_STEPS, HANG_SECONDS, LIMIT_SECONDS = 4, 8, 180
SIGNALS = {"term": signal.SIGTERM, "freeze": signal.SIGSTOP}  # the others: SIGKILL
FLAGS = (
    "--num_classes=10 --image_size=32 --model=vgg11 --width=0.125 --global_batch=32 --device_batch=6 --augment=crop "
    "--lr_schedule=constant --lr=0.01 "
    f"--eval_every_epochs=0 --save_every_steps={SAVE_EVERY_STEPS} --keep_checkpoints=2 --log_every_steps=1 "
    f"--hang_seconds={HANG_SECONDS}"
).split()


def start(ranks, run_dir, options):
    """Starts the run on `ranks`."""
    flags = [*FLAGS, f"--steps={options.steps}", f"--data_dir={options.data_dir}", f"--run_dir={run_dir}"]
    command = [*measure.mpirun(ranks), *measure.TRAINER, "train", *flags]
    with open(run_dir.parent / "console.txt", "a") as console:
        return measure.start(command, stdout=console, stderr=subprocess.STDOUT)


def pid_of(rank):
    """Returns the process of a rank, or None."""
    import psutil

    for process in measure.processes():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("OMPI_COMM_WORLD_RANK") == str(rank):
                return process.pid
    return None


def updates_logged(run_dir):
    """Returns (time, update) of the log's lines of updates so far."""
    return [(line.timestamp, line.step) for line in read_log(RunDir(run_dir).log) if line.kind == "train"]


def bytes_in(folder):
    """Returns the bytes of all files in a directory that others write to."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def inject(kind, ranks, filler, choose):
    """Injects one fault into the running job."""
    pid = pid_of(choose.randrange(ranks))
    if kind == "full":
        with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(1_000_000)):
                pass
        time.sleep(1)
    with contextlib.suppress(OSError, TypeError):  # it may have ended, or not be there yet
        os.kill(pid, SIGNALS.get(kind, signal.SIGKILL))
        if kind == "freeze" and ranks == 1:
            time.sleep(2)
            os.kill(pid, signal.SIGKILL)


def damage(path):
    """Changes a bit of a file."""
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def disturb(options, run_dir):
    """Runs to the end through all faults; returns a row for each fault, and the most bytes that the run directory held."""
    choose, filler = random.Random(options.seed), run_dir.parent.parent / "filler"  # noqa: S311
    kinds = ["kill", "term", "freeze", "damage"] + ["full"] * (os.getuid() == 0)
    rows, most, pending = [], 0, None
    while True:
        ranks, kind = choose.choice(options.ranks), choose.choice(kinds)
        due, earlier = choose.randint(1, 2 * SAVE_EVERY_STEPS), len(updates_logged(run_dir))
        job, injected, deadline = start(ranks, run_dir, options), None, time.time() + LIMIT_SECONDS
        where = f"fault {len(rows) + 1}, {kind}, seed {options.seed}"
        while job.poll() is None:
            done = updates_logged(run_dir)[earlier:]
            if pending and done:
                pending["again"] = done[0][0] - pending["injected"]
                pending["twice"] = max(0, pending["reached"] - done[0][1] + 1)  # a full disk keeps lines from the log
                pending = None
            if injected is None and len(done) >= due and len(rows) < options.faults:
                injected, deadline = time.time(), time.time() + LIMIT_SECONDS
                inject(kind, ranks, filler, choose)
            most = max(most, bytes_in(run_dir))
            if time.time() > deadline:
                measure.refuse(f"{where}: hangs for {LIMIT_SECONDS} s", 1)
            time.sleep(0.05)
        ended = time.time()
        filler.unlink(missing_ok=True)
        while measure.processes():
            if time.time() > ended + 5:
                measure.refuse(f"{where}: processes left: {measure.processes()}", 1)
            time.sleep(0.1)
        if job.returncode == 0:
            if len(rows) < options.faults:
                measure.refuse(f"the run ended after {len(rows)} of {options.faults} faults: give it more --steps", 1)
            return rows, most
        if injected is None:
            console = (run_dir.parent / "console.txt").read_text()[-2000:]
            measure.refuse(f"{where}: ended by itself with {job.returncode}:\n{console}", 1)
        files = RunDir(run_dir).list_checkpoints()
        if kind == "damage" and len(files) > 1:  # a run that has but one would, rightly, refuse to start over
            damage(files[0])
        reached = max((update for _, update in updates_logged(run_dir)[earlier:]), default=0)
        pending = {"injected": injected, "ended": ended - injected, "reached": reached}
        rows.append(pending)
        print(f"{len(rows)}: {kind}, {ranks} ranks, exit {job.returncode}, ended after {ended - injected:.1f} s", flush=True)


def undisturbed(ranks, folder, options):
    """Returns the state_sha256 at the end of the run that nothing happens to, on `ranks`."""
    run_dir = folder / f"undisturbed-{ranks}" / "run"
    run_dir.mkdir(parents=True)
    code = start(ranks, run_dir, options).wait(LIMIT_SECONDS)
    if code:
        console = (run_dir.parent / "console.txt").read_text()[-2000:]
        measure.refuse(f"the undisturbed run ended with {code}: {console}", 1)
    return final_state(run_dir)


def final_state(run_dir):
    """Returns the state_sha256 of a run that has come to its end."""
    return json.loads(RunDir(run_dir).result.read_text())["state_sha256"]


@contextlib.contextmanager
def file_system(folder):
    """Yields a directory: as root a small file system, which a fault can fill."""
    disk = folder / "disk"
    disk.mkdir()
    if os.getuid():
        yield disk
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "hvd_vgg_chaos", disk], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def main():
    """Disturbs a run, prints the table and compares its end with the undisturbed one."""
    parser = measure.command_line(__doc__)
    parser.add_argument("--data_dir", required=True, help="records of ten classes, such as hvd-vgg make-demo-data draws")
    parser.add_argument("--faults", type=measure.positive, default=20)
    ranks = measure.list_of(measure.positive)
    parser.add_argument("--ranks", type=ranks, default="1,2,3", help="numbers of ranks to choose from at each start")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="the faults; else the time")
    parser.add_argument("--steps", type=measure.positive, default=480)
    options = parser.parse_args()
    measure.require("mpirun")
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder, file_system(Path(folder)) as disk:
        expected = undisturbed(options.ranks[0], Path(folder), options)
        run_dir = disk / "job" / "run"
        run_dir.mkdir(parents=True)
        rows, most = disturb(options, run_dir)
        found, size = final_state(run_dir), RunDir(run_dir).list_checkpoints()[0].stat().st_size
    twice = [row["twice"] for row in rows if "twice" in row]
    table = {
        "faults": len(rows),
        "seconds until the job has ended": measure.spread([row["ended"] for row in rows], ".1f"),
        "seconds until it trains again": measure.spread([row["again"] for row in rows if "again" in row], ".1f"),
        "updates done twice": f"{sum(twice)}, at most {max(twice, default=0)} for a fault",
        "most MB in the run directory": f"{most / 1e6:.1f}; a checkpoint has {size / 1e6:.1f}",
        "state SHA-256 at the end, and undisturbed": f"{found:.16}, {expected:.16}",
    }
    title = f"{options.steps} updates on {options.ranks} ranks, a checkpoint every {SAVE_EVERY_STEPS}, seed {options.seed}"
    measure.print_table(title, ("what", "found"), table.items())
    sys.exit(found != expected)


if __name__ == "__main__":
    measure.run(main)
