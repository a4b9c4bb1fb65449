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

import contextlib
import json
import re
import tempfile
import time

import measure

SIZES = {
    "vgg16-224": (3, "--model=vgg16 --image_size=224 --global_batch=8 --device_batch=4 --augment=crop --log_every_steps=6"),
    "vgg16-64": (20, "--model=vgg16 --width=0.125 --image_size=64 --global_batch=16 --device_batch=4 --augment=none"),
    "vgg11-32": (20, "--model=vgg11 --width=0.25 --image_size=32 --global_batch=128 --device_batch=16 --augment=none"),
}
# No learning that matters, and nothing but updates.
COMMON = "--lr=1e-5 --lr_schedule=constant --warmup_epochs=0 --eval_every_epochs=0 --save_every_steps=0 --hang_seconds=600"


class AllTurnsMade(Exception):
    """The evaluation that ends a run is not measured."""


def work(options):
    """One size: trains, with a bare loop between the trainer's turns; prints ms an update of each turn as JSON."""
    from hvd_vgg.config import TrainConfig
    from hvd_vgg.data.loader import train_batches
    from hvd_vgg.flags import parse_flags
    from hvd_vgg.parallel import comm
    from hvd_vgg.training.loop import fit
    from hvd_vgg.training.train_step import step_inputs
    from hvd_vgg.training.trainer import Trainer

    updates = options.updates
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
            for _ in range(options.turns + 1):
                with turn("trainer"):  # it asks for the next batch when it is through with the one before
                    for _ in range(updates):
                        yield timed("input", next, own)
                with turn("bare"):
                    for _ in range(updates):
                        batch = timed("input", next, other)
                        timed("step", step, batch.images, batch.labels, *inputs)
            raise AllTurnsMade

    with contextlib.suppress(AllTurnsMade), MeasuredTrainer(
        parse_flags(TrainConfig, [*options.words, f"--steps={(options.turns + 2) * updates}"])
    ) as trainer:
        fit(trainer)
    comm.shutdown()
    print(json.dumps({way: found[1:] for way, found in turns.items()}))


def main():
    """Runs each size and prints the table."""
    parser = measure.command_line(__doc__)
    parser.add_argument("--data_dir", help="TFRecords of at most 1000 classes")
    parser.add_argument("--sizes", type=measure.some_of(SIZES), default=",".join(SIZES))
    parser.add_argument(
        "--rounds", type=measure.positive, help="turns of each that count; else 3 of the largest, 20 of others"
    )
    options, flags = parser.parse_known_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = options.data_dir or f"{folder}/data"
        if not options.data_dir:
            measure.output_of([*measure.TRAINER, "make-demo-data", f"--data_dir={data}"])
        for name in options.sizes:
            rounds, own = options.rounds or SIZES[name][0], SIZES[name][1].split()
            words = [*COMMON.split(), *own, f"--data_dir={data}", f"--run_dir={folder}/{name}", *flags]
            updates = re.findall(r"--log_every_steps=(\d+)", " ".join(["--log_every_steps=20", *words]))[-1]
            printed = measure.output_of(measure.worker(options, turns=rounds, updates=int(updates), words=words))
            turns = json.loads(re.findall(r"^{.*", printed, re.MULTILINE)[-1])
            for way, own in turns.items():
                parts = [measure.spread(turn[part] for turn in own) for part in ("total", "step", "input", "rest")]
                ratio = measure.ratios(*([turn["total"] for turn in each] for each in (own, turns["bare"])))
                rows.append([f"{name}, {way}", rounds, *parts, measure.spread(ratio, ".3f")])
    measure.print_table(
        "ms an update", ["loop", "turns", "total", "step", "input", "rest", "relative to bare, of one turn"], rows
    )


if __name__ == "__main__":
    measure.run(main, work)
