"""What the trainer costs beside its step: an update in `hvd-vgg train` against the bare step function in a loop.

    python benchmarks/loop.py [--data_dir=DIR] [--sizes=vgg16-224,...] [--rounds=N] [TRAIN'S FLAGS]
    python benchmarks/loop.py --before=COMMIT_OR_DIR [--pairs=5] [the same]

    vgg16-224  VGG16 at 224 pixels, 8 images an update
    vgg16-64   VGG16 at an eighth of its width, 64 pixels, 16 images an update
    vgg11-32   VGG11 at a quarter of its width, 32 pixels, 128 images an update

Each size is a process of its own, one rank. In it the trainer makes as many updates as it logs in one line; then the same
compiled step is called as often in a bare loop, on the same records from a pipeline of its own; and so on in turn. The first
turn of each is warm-up. Of an update's wall time `step` is the call of the step, `input` the wait for the batch, `rest` what
is left: what the trainer does beside. Without --data_dir pictures are drawn by `hvd-vgg make-demo-data` and removed again.

With --before a process of this checkout and one of another, by its own loop.py, take turns, --pairs times, in the other
order every second time; what is compared are the medians of each process. `the trainer adds`: its rest less the bare loop's.
"""

import contextlib
import json
import re
import statistics
import sys
import tempfile
import time

import measure
from checkouts import checkout

SIZES = {
    "vgg16-224": (3, "--model=vgg16 --image_size=224 --global_batch=8 --augment=crop --log_every_steps=6"),
    "vgg16-64": (20, "--model=vgg16 --width=0.125 --image_size=64 --global_batch=16 --augment=none"),
    "vgg11-32": (20, "--model=vgg11 --width=0.25 --image_size=32 --global_batch=128 --device_batch=128 --augment=none"),
}
# No learning that matters, and nothing but updates.
COMMON = "--lr=1e-5 --lr_schedule=constant --warmup_epochs=0 --eval_every_epochs=0 --save_every_steps=0 --hang_seconds=600"


class AllTurnsMade(Exception):
    """The evaluation that ends a run is not measured."""


def work(rounds, updates, flags):
    """One size: trains, with a bare loop between the trainer's turns; prints ms an update of each turn as JSON.

    Other checkouts' drivers start it too (--before): its arguments stay.
    """
    from hvd_vgg.config import TrainConfig
    from hvd_vgg.data.loader import train_batches
    from hvd_vgg.flags import parse_flags
    from hvd_vgg.parallel import comm
    from hvd_vgg.train.loop import fit
    from hvd_vgg.train.train_step import step_inputs
    from hvd_vgg.train.trainer import Trainer

    turns, spent = {"trainer": [], "bare": []}, {}

    def timed(part, call, *inputs):
        began = time.perf_counter()
        result = call(*inputs)
        spent[part] += time.perf_counter() - began
        return result

    @contextlib.contextmanager
    def turn(way):
        spent.update(step=0.0, input=0.0)
        began = time.perf_counter()
        yield
        total = time.perf_counter() - began
        parts = {"total": total, **spent, "rest": total - sum(spent.values())}
        turns[way].append({name: 1000 * seconds / updates for name, seconds in parts.items()})

    class MeasuredTrainer(Trainer):
        """A trainer whose batches come in turns; between them the bare loop makes as many updates."""

        def batches(self):
            config, data, step = self.config, self.data, self.train_step
            steps = range(self.total_steps)
            own = super().batches()
            other = train_batches(data.train, config, data.label_base, steps, 0, 1, self.device.input_threads)
            inputs = step_inputs(config, 0, 0, config.lr)
            self.train_step = lambda *inputs: timed("step", step, *inputs)
            for _ in range(rounds + 1):
                with turn("trainer"):  # it asks for the next batch when it is through with the one before
                    for _ in range(updates):
                        yield timed("input", next, own)
                with turn("bare"):
                    for _ in range(updates):
                        batch = timed("input", next, other)
                        timed("step", step, batch.images, batch.labels, *inputs)
            raise AllTurnsMade

    with contextlib.suppress(AllTurnsMade), MeasuredTrainer(
        parse_flags(TrainConfig, [*flags, f"--steps={(rounds + 2) * updates}"])
    ) as trainer:
        fit(trainer)
    comm.shutdown()
    print(json.dumps({way: found[1:] for way, found in turns.items()}))


def run_size(place, rounds, flags):
    """Runs a size in the checkout `place`; returns what its worker printed."""
    every = re.findall(r"--log_every_steps=(\d+)", " ".join(["--log_every_steps=20", *flags]))[-1]
    command = [sys.executable, place / "benchmarks" / "loop.py", "--worker", rounds, every, *flags]
    return measure.output_of(command, env={"PYTHONPATH": str(place)})


def column(turns, part):
    """Returns one part of all turns of a way."""
    return [turn[part] for turn in turns]


def medians(printed):
    """Returns {way: {part: ms an update}} of what a worker printed, of this checkout or of one up to 42164a1."""
    last = printed.splitlines()[-1]
    if last.startswith("{"):
        return {
            way: {part: statistics.median(column(turns, part)) for part in turns[0]}
            for way, turns in json.loads(last).items()
        }
    lines = re.findall(r"^(trainer|bare) +ms an update: (.*)", printed, re.MULTILINE)
    return {way: {part: float(ms) for part, ms in re.findall(r"(\w+) ([\d.]+) \(", line)} for way, line in lines}


def compare(before, sizes, options):
    """Prints the table of two checkouts."""
    rows = []
    for name, (rounds, flags) in sizes.items():
        found = {"before": [], "after": []}
        places = [("before", before), ("after", measure.ROOT)]
        for number in range(options.pairs):
            for which, place in places[:: 1 if number % 2 else -1]:
                found[which].append(
                    medians(run_size(place, rounds, flags + [f"--run_dir={options.folder}/{number}{which}{name}"]))
                )
                print(f"pair {number + 1}: {name} {which}: {found[which][-1]}", flush=True)
        totals = {which: column(column(each, "trainer"), "total") for which, each in found.items()}
        for which, each in found.items():
            trainer, bare = column(each, "trainer"), column(each, "bare")
            adds = [own["rest"] - other["rest"] for own, other in zip(trainer, bare)]
            row = [name, which, measure.spread(totals[which]), measure.spread(column(bare, "total")), measure.spread(adds)]
            row.append(measure.spread(measure.ratios(column(trainer, "total"), column(bare, "total")), ".3f"))
            rows.append([*row, measure.spread(measure.ratios(totals[which], totals["before"]), ".3f")])
    head = ["size", "checkout", "trainer", "bare loop", "the trainer adds", "trainer / bare", "trainer, of before"]
    measure.print_table(f"ms an update, {options.pairs} pairs of processes", head, rows)


def main():
    """Runs each size and prints the table."""
    parser = measure.command_line(__doc__)
    parser.add_argument("--data_dir", help="TFRecords of at most 1000 classes")
    parser.add_argument("--sizes", type=measure.some_of(SIZES), default=",".join(SIZES))
    parser.add_argument(
        "--rounds", type=measure.positive, help="turns of each that count; else 3 of the largest, 20 of others"
    )
    parser.add_argument("--before", help="another checkout: a commit, or a directory")
    parser.add_argument("--pairs", type=measure.positive, default=5, help="processes of each checkout, with --before")
    options, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        options.folder, data = folder, options.data_dir or f"{folder}/data"
        if not options.data_dir:
            measure.output_of([*measure.TRAINER, "make-demo-data", f"--data_dir={data}"])
        sizes = {
            name: (
                options.rounds or SIZES[name][0],
                [*COMMON.split(), *SIZES[name][1].split(), f"--data_dir={data}", *flags],
            )
            for name in options.sizes
        }
        if options.before:
            compare(stack.enter_context(checkout(options.before)), sizes, options)
            return
        rows = []
        for name, (rounds, own) in sizes.items():
            turns = json.loads(run_size(measure.ROOT, rounds, [*own, f"--run_dir={folder}/{name}"]).splitlines()[-1])
            parts = [("trainer", "total"), ("trainer", "step"), ("trainer", "input"), ("trainer", "rest"), ("bare", "total")]
            cells = [measure.spread(column(turns[way], part)) for way, part in [*parts, ("bare", "rest")]]
            ratio = measure.ratios(column(turns["trainer"], "total"), column(turns["bare"], "total"))
            rows.append([name, rounds, *cells, measure.spread(ratio, ".3f")])
    head = ["size", "turns", "trainer: total", "its step", "its input", "its rest", "bare: total", "its rest"]
    measure.print_table("ms an update", [*head, "trainer / bare, of one turn"], rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    else:
        measure.run(main)
