"""Two checkouts of this package side by side: images/s of the same training, in turn.

    python benchmarks/checkouts.py --before=COMMIT_OR_DIR --data_dir=CIFAR10 [--ranks=2] [--steps=120] [--rounds=5] [FLAGS]

A round trains configs/vgg_cifar10.flags with the one and with the other, in the other order every second round, without
evaluating or saving; images/s are those of result.json. A ratio is of one round. Other flags go to both.
"""

import contextlib
import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

import measure


@contextlib.contextmanager
def checkout(place):
    """Yields the directory of a checkout: `place` itself, or for a commit a temporary copy of its files."""
    if (Path(place) / "hvd_vgg").is_dir():
        yield Path(place).resolve()
        return
    measure.require("git")
    archive = subprocess.run(["git", "-C", measure.ROOT, "archive", place], capture_output=True, check=False)
    if archive.returncode:
        measure.refuse(f"--before={place}: neither a checkout nor a commit: {archive.stderr.decode().strip()}")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
            files.extractall(folder)  # noqa: S202
        yield Path(folder)


def images_per_second(place, run_dir, options, flags):
    """Trains with the package in `place` and returns images/s."""
    recipe = [f"--flagfile={measure.ROOT}/configs/vgg_cifar10.flags", "--eval_every_epochs=0", "--save_every_steps=0"]
    own = [f"--data_dir={options.data_dir}", f"--run_dir={run_dir}", f"--steps={options.steps}"]
    command = [*measure.mpirun(options.ranks), *measure.TRAINER, "train", *recipe, *own, *flags]
    measure.output_of(command, env={"PYTHONPATH": str(place)}, cwd=run_dir.parent)
    return json.loads((run_dir / "result.json").read_text())["fps"]


def main():
    """Runs the rounds and prints the table."""
    parser = measure.command_line(__doc__, rounds=5)
    parser.add_argument("--before", required=True, help="the other checkout: a commit, or a directory")
    parser.add_argument("--data_dir", type=Path, required=True, help="TFRecords of ten classes, 32 by 32 pixels")
    parser.add_argument("--ranks", type=measure.positive, default=2)
    parser.add_argument("--steps", type=measure.positive, default=120, help="updates of a training")
    options, flags = parser.parse_known_args()
    options.data_dir = options.data_dir.resolve()
    rates = {"before": [], "after": []}
    with checkout(options.before) as before, tempfile.TemporaryDirectory() as folder:
        places = [("before", before), ("after", measure.ROOT)]
        for number in range(options.rounds):
            for name, place in places[:: 1 if number % 2 else -1]:
                rates[name].append(images_per_second(place, Path(folder) / f"{name}-{number}", options, flags))
                print(f"round {number + 1}: {name} {rates[name][-1]:.1f} images/s", flush=True)
    title = f"{options.rounds} rounds of {options.steps} updates on {options.ranks} ranks"
    rows = [
        (name, measure.spread(own, ".1f"), measure.spread(measure.ratios(own, rates["before"]), ".3f"))
        for name, own in rates.items()
    ]
    measure.print_table(title, ("checkout", "images/s", "relative to before"), rows)


if __name__ == "__main__":
    measure.run(main)
