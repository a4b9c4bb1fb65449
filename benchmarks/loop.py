"""What the trainer costs beside its step: an update in `hvd-vgg train` against the bare step function in a loop.

    python benchmarks/loop.py [--data_dir=DIR] [--sizes=vgg16-224,...] [--rounds=N] [TRAIN'S FLAGS]

    vgg16-224  VGG16 at 224 pixels, 8 images an update
    vgg16-64   VGG16 at an eighth of its width, 64 pixels, 16 images an update
    vgg11-32   VGG11 at a quarter of its width, 32 pixels, 128 images an update

Each size is a process of its own, one rank. In it the trainer makes as many updates as it logs in one line; then the same
compiled step is called as often in a bare loop, on the same records from a pipeline of its own; and so on in turn. The first
turn of each is warm-up. Of an update's wall time `step` is the call of the step, `input` the wait for the batch, `rest` what
is left: what the trainer does beside. Without --data_dir pictures are drawn by `hvd-vgg make-demo-data` and removed again.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, List

SIZES = {
    "vgg16-224": (3, "--model=vgg16 --image_size=224 --global_batch=8 --augment=crop --log_every_steps=6"),
    "vgg16-64": (20, "--model=vgg16 --width=0.125 --image_size=64 --global_batch=16 --augment=none"),
    "vgg11-32": (20, "--model=vgg11 --width=0.25 --image_size=32 --global_batch=128 --device_batch=128 --augment=none"),
}
# No learning that matters, and nothing apart from updates.
COMMON = "--lr=1e-5 --lr_schedule=constant --warmup_epochs=0 --eval_every_epochs=0 --save_every_steps=0 --hang_seconds=600"


class Through(Exception):
    """All turns are made; the evaluation that ends a run is none of them."""


class Turns:
    """Turns of the trainer and of the bare loop: ms an update in all, of its step, and of waiting for its batch."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.found: Dict[str, List[Dict[str, float]]] = {"trainer": [], "bare": []}
        self.now = {"total": 0.0, "step": 0.0, "input": 0.0}

    def timed(self, what, call, *arguments):
        """Returns `call(*arguments)` and adds its seconds to `what` of this turn."""
        began = time.perf_counter()
        result = call(*arguments)
        self.now[what] += time.perf_counter() - began
        return result

    def step(self, call):
        """Returns the step `call`, timed."""
        return lambda *arguments: self.timed("step", call, *arguments)

    def taken(self, way, make):
        """Yields what `make()` does as a turn of `way`."""
        self.now = {"total": 0.0, "step": 0.0, "input": 0.0}
        began = time.perf_counter()
        yield from make()
        self.now["total"] = time.perf_counter() - began
        self.found[way].append({name: 1000 * seconds / self.size for name, seconds in self.now.items()})

    def some(self, batches):
        """Yields the next batches of a turn; the wait for each is timed."""
        for _ in range(self.size):
            yield self.timed("input", next, batches)


def work(rounds: int, size: int, flags: List[str]) -> None:
    """One size: trains, with a bare loop between the trainer's turns, and prints what was found."""
    from hvd_vgg.config import TrainConfig
    from hvd_vgg.flags import parse_flags
    from hvd_vgg.parallel import comm
    from hvd_vgg.training import loop
    from hvd_vgg.training.loop import train
    from hvd_vgg.training.train_step import step_inputs

    turns = Turns(size)
    make_step, batches_of = loop._make_train_step, loop._batches

    def bare(job, batches):
        arguments = step_inputs(job.config, 0, 0, job.config.lr)
        for batch in turns.some(batches):
            job.train_step(*batch[:2], *arguments)
        return ()

    def in_turn(job, steps):
        own, other = batches_of(job, steps), batches_of(job, steps)
        for _ in range(rounds + 1):
            # The trainer asks for the next batch when it is through with the one before.
            yield from turns.taken("trainer", lambda: turns.some(own))
            list(turns.taken("bare", lambda: bare(job, other)))
        raise Through

    loop._make_train_step = lambda *arguments: turns.step(make_step(*arguments))
    loop._batches = in_turn
    try:
        train(parse_flags(TrainConfig, [*flags, f"--steps={(rounds + 2) * size}"]))
    except Through:
        comm.shutdown()
    report({way: found[1:] for way, found in turns.found.items()})


def report(found: Dict[str, List[Dict[str, float]]]) -> None:
    """Prints ms an update of both, and how much longer the trainer's takes."""
    for way, turns in found.items():
        parts = {name: [turn[name] for turn in turns] for name in ("total", "step", "input")}
        parts["rest"] = [turn["total"] - turn["step"] - turn["input"] for turn in turns]
        print(f"{way:8s} ms an update: " + ", ".join(f"{name} {spread(ms, '.2f')}" for name, ms in parts.items()))
    pairs = list(zip(found["trainer"], found["bare"]))
    longer = [100 * (own["total"] / bare["total"] - 1) for own, bare in pairs]
    beside = [100 * (own["total"] - own["step"] - own["input"]) / own["step"] for own, _ in pairs]
    print(
        f"an update of the trainer takes {spread(longer, '.1f')} % longer; its rest is {spread(beside, '.1f')} % of its step"
    )


def spread(values: List[float], form: str) -> str:
    """Returns median (smallest to largest) of `values`."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main() -> None:
    """Starts each size and shows what it prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data_dir", help="TFRecords of at most 1000 classes")
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--rounds", type=int, default=0, help="turns of each that count; 0: 3 of the largest, else 20")
    if sys.argv[1:2] == ["--worker"]:
        work(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
        return
    options, flags = parser.parse_known_args()
    chosen = options.sizes.split(",")
    if set(chosen) - set(SIZES) or options.rounds < 0:
        parser.error(f"expected --sizes of {', '.join(SIZES)}, and --rounds from 0 up")
    with tempfile.TemporaryDirectory() as folder:
        data = options.data_dir or f"{folder}/data"
        if not options.data_dir:
            drawn = [sys.executable, "-m", "hvd_vgg", "make-demo-data", f"--data_dir={data}"]
            subprocess.run(drawn, check=True, stdout=subprocess.DEVNULL)
        for name in chosen:
            rounds, own = SIZES[name]
            run_dir = Path(folder) / name
            words = [*COMMON.split(), *own.split(), f"--data_dir={data}", f"--run_dir={run_dir}", *flags]
            every = next((word.split("=")[1] for word in words[::-1] if word.startswith("--log_every_steps=")), "20")
            command = [sys.executable, __file__, "--worker", str(options.rounds or rounds), every, *words]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                sys.exit(f"{name} ended with {done.returncode}:\n{done.stdout}")
            print(f"{name}:", *done.stdout.splitlines()[-3:], sep="\n  ", flush=True)


if __name__ == "__main__":
    main()
