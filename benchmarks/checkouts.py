"""Two checkouts of this package side by side: images/s of the same training, in turn.

    git worktree add /tmp/before COMMIT
    python benchmarks/checkouts.py --before=/tmp/before --data_dir=CIFAR10 [--ranks=2] [--steps=120] [--rounds=5] [FLAGS]

Shows what a change costs or gains, such as all that watches, proves and saves a run. A round trains with the one and then
with the other, in the other order every second round; images/s are those of result.json (steady updates; evaluation and
saving apart). Prints the median of the ratios after / before of the rounds, with their spread. Other flags go to both.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent


def fps(checkout, run_dir, options, flags):
    """Trains with the package in `checkout`; returns images/s."""
    mpirun = ["mpirun", "-np", str(options.ranks), "--oversubscribe", "--bind-to", "none", sys.executable, "-m", "hvd_vgg"]
    consent = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if os.getuid() == 0 else {}
    train = [
        "train",
        f"--flagfile={HERE / 'configs' / 'vgg_cifar10.flags'}",
        "--eval_every_epochs=0",
        "--save_every_steps=0",
    ]
    own = [f"--data_dir={options.data_dir}", f"--run_dir={run_dir}", f"--steps={options.steps}"]
    environment = {**os.environ, **consent, "PYTHONPATH": str(checkout)}
    subprocess.run(
        [*mpirun, *train, *own, *flags], env=environment, cwd=run_dir.parent, check=True, stdout=subprocess.DEVNULL
    )
    return json.loads((run_dir / "result.json").read_text())["fps"]


def main():
    """Runs the rounds and prints the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="the other checkout")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=5)
    options, flags = parser.parse_known_args()
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            pair = [("before", options.before), ("after", HERE)]
            found = {
                name: fps(checkout, Path(folder) / f"{name}-{number}", options, flags)
                for name, checkout in (pair if number % 2 else pair[::-1])
            }
            ratios.append(found["after"] / found["before"])
            print(f"round {number + 1}: before {found['before']:.1f}, after {found['after']:.1f} images/s", flush=True)
    print(f"after / before: {statistics.median(ratios):.3f} (median; {min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
