"""A run that is disturbed until it ends, held against the same run left alone.

    python benchmarks/chaos.py --data_dir=DIR [--faults=20] [--ranks=1,2,3] [--seed=N] [--steps=480]

Trains a small network, and after a random number of updates does one of these to it, each time it is started:

    kill      SIGKILL to a random rank              137
    term      SIGTERM to a random rank: all stop    80
    freeze    SIGSTOP to a random rank: the watchdog ends the job  75 (alone: SIGKILL after a while)
    full      fills the file system that checkpoints go to, then SIGKILL (as root, on a file system of its own)
    damage    SIGKILL, then a byte of the newest checkpoint is changed

Then starts it again, on a random number of --ranks, until all faults are done and the run has come to its end. Exits with 1
unless the end is the undisturbed one: with one number in --ranks bit for bit, else within three times what another number
of ranks alone changes. Prints for each fault how long the job took to end and to train again, the updates done twice, and
the most bytes that the run directory held. Faults are a function of --seed but for their exact moment.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from hvd_vgg.run_dir import RunDir
from hvd_vgg.training import checkpoint

SAVE_EVERY_STEPS, HANG_SECONDS, LIMIT_SECONDS = 4, 8, 180
FLAGS = [
    "--num_classes=10",
    "--image_size=32",
    "--model=vgg11",
    "--width=0.125",
    "--global_batch=32",
    "--augment=crop",
    "--lr=0.0002",  # at a higher one training amplifies the rounding that tells numbers of ranks apart
    "--lr_schedule=constant",
    "--eval_every_epochs=0",
    f"--save_every_steps={SAVE_EVERY_STEPS}",
    "--keep_checkpoints=2",
    "--log_every_steps=1",
    f"--hang_seconds={HANG_SECONDS}",
]


def parse():
    """Returns the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, help="records of ten classes, such as hvd-vgg make-demo-data draws")
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--ranks", default="1,2,3", help="numbers of ranks to choose from at each start")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--steps", type=int, default=480)
    options = parser.parse_args()
    options.ranks = [int(number) for number in options.ranks.split(",")]
    return options


def start(ranks, run_dir, options, token):
    """Starts the run on `ranks`; the processes carry `token` in their environment."""
    mpirun = ["mpirun", "-np", str(ranks), "--oversubscribe", "--bind-to", "none"]
    command = [*mpirun, sys.executable, "-m", "hvd_vgg", "train", *FLAGS, f"--steps={options.steps}"]
    consent = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if os.getuid() == 0 else {}
    environment = {**os.environ, **consent, "HVD_VGG_CHAOS": token}
    flags = [f"--data_dir={options.data_dir}", f"--run_dir={run_dir}"]
    with open(run_dir.parent / "console.txt", "a") as console:
        return subprocess.Popen([*command, *flags], env=environment, stdout=console, stderr=console, start_new_session=True)


def processes(token):
    """Returns {process: its rank or None} of those that carry `token`."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"HVD_VGG_CHAOS={token}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                variables = dict(v.split(b"=", 1) for v in (entry / "environ").read_bytes().split(b"\0") if b"=" in v)
                rank = variables.get(b"OMPI_COMM_WORLD_RANK")
                found[int(entry.name)] = None if rank is None else int(rank)
    return found


def logged(run_dir):
    """Returns the log's lines so far: (time, update or None, event or None)."""
    rows = []
    with contextlib.suppress(OSError):
        for line in (run_dir / "dllogger.json").read_text().splitlines():
            with contextlib.suppress(ValueError):  # half a line
                row = json.loads(line[5:])
                if row["type"] == "LOG":
                    update = row["step"][1] if isinstance(row["step"], list) and row["step"] else None
                    rows.append((float(row["timestamp"]), update, row["data"].get("event")))
    return rows


def bytes_in(folder):
    """Returns the bytes of all files in a directory."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def fill(folder):
    """Fills the file system of `folder`; returns the file that does."""
    path = folder / "filler"
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"\0" * 1_000_000):
            pass
    return path


def strike(kind, ranks, disk, token, choose):
    """Does one fault to the running job; returns what is to be undone when it has ended."""
    victim = choose.randrange(ranks)
    mine = [process for process, rank in processes(token).items() if rank == victim]
    filler = fill(disk) if kind == "full" else None
    if filler:
        time.sleep(1)
    for process in mine[:1]:
        number = {"term": signal.SIGTERM, "freeze": signal.SIGSTOP}.get(kind, signal.SIGKILL)
        with contextlib.suppress(OSError):
            os.kill(process, number)
    if kind == "freeze" and ranks == 1:
        time.sleep(2)
        for process in mine[:1]:
            os.kill(process, signal.SIGKILL)
    return filler


def disturb(options, disk, run_dir):
    """Runs to the end through all faults; returns a row a fault and the most bytes that the run directory held."""
    choose = random.Random(options.seed)  # noqa: S311
    kinds = ["kill", "term", "freeze", "damage"] + ["full"] * (os.getuid() == 0)
    rows, most, number, pending = [], 0, 0, None
    while True:
        ranks, token = choose.choice(options.ranks), f"{os.getpid()}.{number}"
        number += 1
        earlier, began = len(logged(run_dir)), time.time()
        job, struck, filler = start(ranks, run_dir, options, token), None, None
        strikes = len(rows) < options.faults
        kind, updates = choose.choice(kinds), choose.randint(1, 2 * SAVE_EVERY_STEPS)
        while job.poll() is None:
            lines = logged(run_dir)[earlier:]
            done = [update for _, update, _ in lines if update is not None]
            if pending and done:
                pending["again"] = next(at for at, update, _ in lines if update is not None) - pending["struck"]
                pending["twice"] = max(0, pending["reached"] - done[0] + 1)  # a full disk keeps lines from the log
                pending = None
            if strikes and struck is None and len(done) >= updates:
                struck, filler = time.time(), strike(kind, ranks, disk, token, choose)
            most = max(most, bytes_in(run_dir))
            if time.time() - (struck or began) > LIMIT_SECONDS:
                raise SystemExit(f"fault {len(rows) + 1}, {kind}: hangs for {LIMIT_SECONDS} s; seed {options.seed}")
            time.sleep(0.05)
        if filler:
            filler.unlink()
        deadline = time.time() + 5
        while processes(token) and time.time() < deadline:
            time.sleep(0.1)
        left = list(processes(token))
        if left:
            raise SystemExit(f"fault {len(rows) + 1}, {kind}: processes left: {left}; seed {options.seed}")
        done = [update for _, update, _ in logged(run_dir)[earlier:] if update is not None]
        if struck is None or job.returncode == 0:
            if job.returncode == 0:
                if len(rows) < options.faults:
                    raise SystemExit(f"the run ended after {len(rows)} of {options.faults} faults: give it more --steps")
                return rows, most
            raise SystemExit(f"ended by itself with {job.returncode}; see {run_dir.parent / 'console.txt'}")
        if kind == "damage":
            files = RunDir(run_dir).list_checkpoints()
            if len(files) > 1:  # a run that has but one would, rightly, refuse to start over
                data = bytearray(files[0].read_bytes())
                data[-9] ^= 1
                files[0].write_bytes(bytes(data))
        pending = {"fault": kind, "ranks": ranks, "code": job.returncode, "ended": time.time() - struck, "struck": struck}
        pending.update(reached=max(done, default=0), again=None, twice=None)
        rows.append(pending)
        print(
            f"{len(rows):3}  {kind:7} {ranks} ranks  exit {job.returncode:4}  ended after {pending['ended']:.1f} s",
            flush=True,
        )


def apart(found, wanted):
    """Returns the norm of the difference of two checkpoints' kernels by that of one."""
    names = [name for name in wanted if name.endswith("/kernel")]
    norm = np.linalg.norm([np.linalg.norm(wanted[name]) for name in names])
    return float(np.linalg.norm([np.linalg.norm(found[name] - wanted[name]) for name in names]) / norm)


def undisturbed(ranks, folder, options):
    """Returns the final weights of the run that nothing happens to, on `ranks`."""
    run_dir = folder / f"undisturbed-{ranks}" / "run"
    run_dir.mkdir(parents=True)
    code = start(ranks, run_dir, options, f"{os.getpid()}.alone").wait(LIMIT_SECONDS)
    if code:
        raise SystemExit(f"the undisturbed run ended with {code}: {(run_dir.parent / 'console.txt').read_text()[-2000:]}")
    return checkpoint.newest(RunDir(run_dir))[0].tensors


@contextlib.contextmanager
def file_system(folder):
    """A small file system as root, else a plain directory."""
    disk = folder / "disk"
    disk.mkdir()
    mounted = os.getuid() == 0
    if mounted:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "hvd_vgg_chaos", disk], check=True)
    try:
        yield disk
    finally:
        if mounted:
            subprocess.run(["umount", "-l", disk], check=True)


def main():
    """Runs all and prints the table."""
    options = parse()
    print(f"seed {options.seed}, {options.faults} faults, on {options.ranks} ranks, {options.steps} updates", flush=True)
    with tempfile.TemporaryDirectory() as folder, file_system(Path(folder)) as disk:
        wanted = undisturbed(options.ranks[0], Path(folder), options)
        (disk / "job").mkdir()
        run_dir = disk / "job" / "run"
        run_dir.mkdir()
        rows, most = disturb(options, disk, run_dir)
        found = checkpoint.newest(RunDir(run_dir))[0]
        allowed = 0.0
        if len(options.ranks) > 1:
            allowed = 3 * apart(undisturbed(options.ranks[-1], Path(folder), options), wanted)
        difference = apart(found.tensors, wanted)
        size = RunDir(run_dir).list_checkpoints()[0].stat().st_size
    again = [row["again"] for row in rows if row["again"] is not None]
    ended = [row["ended"] for row in rows]
    twice = [row["twice"] for row in rows if row["twice"] is not None]
    print(f"{len(rows)} faults; the job ended {statistics.median(ended):.1f} s later (median; at most {max(ended):.1f})")
    print(f"training again {statistics.median(again):.1f} s after the fault (median; {min(again):.1f} to {max(again):.1f})")
    print(f"updates done twice: {sum(twice)}, at most {max(twice)} for a fault (a checkpoint every {SAVE_EVERY_STEPS})")
    print(f"most bytes in the run directory: {most / 1e6:.1f} MB (a checkpoint has {size / 1e6:.1f})")
    print(f"at update {found.meta['step']} kernels differ from the undisturbed run's by {difference:.2g} of their norm")
    print(f"  (allowed: {allowed:.2g}: {'none' if not allowed else 'three times what another number of ranks changes'})")
    sys.exit(not (found.meta["step"] == options.steps and difference <= allowed))


if __name__ == "__main__":
    main()
