"""Two checkouts of this package side by side: images/s of training, or what another benchmark prints, in turn.

    python benchmarks/checkouts.py --before=COMMIT_OR_DIR [--rounds=5] [--ranks=2] train --data_dir=CIFAR10 [ITS FLAGS]
    python benchmarks/checkouts.py --before=COMMIT_OR_DIR [--rounds=5] loop [ITS OPTIONS]
    python benchmarks/checkouts.py --before=COMMIT_OR_DIR [--rounds=5] input --data_dir=DIR [ITS OPTIONS]

    train  configs/vgg_cifar10.flags without evaluating or saving, 120 updates; images/s are those of result.json
    loop   the table of each checkout's own benchmarks/loop.py: ms an update
    input  the table of each checkout's own benchmarks/input.py; `decode` is the same in both and shows the noise

A round runs the one and then the other, in the other order every second round. Ratios are of one round. Other checkouts may
be as old as 42164a1.
"""

import argparse
import contextlib
import io
import json
import re
import subprocess
import sys
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


def run(place, options):
    """Runs what is to be compared with the package in `place`; returns {name: number}."""
    environment = {"PYTHONPATH": str(place)}
    if options.what != "train":
        command = [sys.executable, place / "benchmarks" / f"{options.what}.py", *options.words]
        return figures(measure.output_of(command, env=environment))
    with tempfile.TemporaryDirectory() as run_dir:
        recipe = (
            f"--flagfile={measure.ROOT}/configs/vgg_cifar10.flags --eval_every_epochs=0 --save_every_steps=0 --steps=120"
        )
        train = [*measure.mpirun(options.ranks), *measure.TRAINER, "train", *recipe.split(), *options.words]
        measure.output_of([*train, f"--run_dir={run_dir}"], env=environment)
        return {"images/s": json.loads((Path(run_dir) / "result.json").read_text())["fps"]}


def figures(printed):
    """Returns {"row, column": number} of a benchmark's tables, and of the lines that loop.py printed up to 42164a1."""
    found, head, size = {}, [], ""
    for line in printed.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if cells and not head:
            head = cells
        numbers = [re.match(r"[\d.]+", cell) for cell in cells]
        found.update({f"{cells[0]}, {name}": float(number[0]) for name, number in zip(head, numbers) if number})
        size = line[:-1] if re.fullmatch(r"\S+:", line) else size
        way = re.match(r" *(trainer|bare) +ms an update: ", line)
        parts = re.findall(r"(\w+) ([\d.]+) \(", line) if way else []
        found.update({f"{size}, {way[1]}, {part}": float(number) for part, number in parts})
    return found


def main():
    """Runs the rounds and prints the table."""
    parser = measure.command_line(__doc__, rounds=5, ranks=2)
    parser.add_argument("--before", required=True, help="the other checkout: a commit, or a directory")
    parser.add_argument("what", choices=("train", "loop", "input"))
    parser.add_argument("words", nargs=argparse.REMAINDER, help="its options, the same for both")
    options = parser.parse_args()
    found, rows = {"before": [], "after": []}, []
    with checkout(options.before) as before:
        places = [("before", before), ("after", measure.ROOT)]
        for number in range(options.rounds):
            for name, place in places[:: 1 if number % 2 else -1]:
                found[name].append(run(place, options))
                print(f"round {number + 1}: {name}: {found[name][-1]}", flush=True)
    for figure in found["after"][0]:
        if figure in found["before"][0]:
            before, after = ([each[figure] for each in found[name]] for name in ("before", "after"))
            cells = measure.spread(before, ".4g"), measure.spread(after, ".4g")
            rows.append((figure, *cells, measure.spread(measure.ratios(after, before), ".3f")))
    title = f"{options.what} {' '.join(options.words)}: {options.rounds} rounds, before: {options.before}"
    measure.print_table(title, ("figure", "before", "after", "after / before"), rows)


if __name__ == "__main__":
    measure.run(main)
