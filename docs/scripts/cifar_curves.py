"""Draws docs/cifar10.png: a run of configs/vgg16_bn_cifar10.flags, and the same recipe in PyTorch beside it.

    python docs/scripts/cifar_curves.py RUN_DIR [PEER.jsonl ...] [--out=docs/cifar10.png]

RUN_DIR is the run's; each PEER.jsonl what benchmarks/peer_cifar.py printed. Prints the table of docs/benchmarks.md: the mean
training loss of each epoch and acc@1. Needs matplotlib.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def read_run(run_dir):
    """Returns ({epoch: mean training loss}, {epoch: acc@1}) of a run from its log."""
    rows = [json.loads(line[len("DLLL ") :]) for line in (Path(run_dir) / "dllogger.json").read_text().splitlines()]
    logged = [(row["step"], row["data"]) for row in rows if row["type"] == "LOG" and len(row["step"]) == 2]
    losses = [loss for _, data in logged for loss in data.get("train.losses", [])]
    parameters = next(row["data"] for row in rows if row["type"] == "LOG" and row["step"] == "PARAMETER")
    records, batch = 50_000, parameters["global_batch"]
    bounds = [-(-epoch * records // batch) for epoch in range(len(losses) * batch // records + 1)]
    means = {epoch + 1: sum(losses[low:high]) / (high - low) for epoch, (low, high) in enumerate(zip(bounds, bounds[1:]))}
    return means, {round(step[1] * batch / records): data["eval.acc@1"] for step, data in logged if "eval.acc@1" in data}


def read_peer(path):
    """Returns the same of a peer from the lines that it printed."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return {row["epoch"]: row["train.loss"] for row in rows}, {row["epoch"]: row["acc@1"] for row in rows}


def main():
    """Draws, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir")
    parser.add_argument("peers", nargs="*")
    parser.add_argument("--out", default="docs/cifar10.png")
    options = parser.parse_args()
    curves = [("hvd_vgg", *read_run(options.run_dir))]
    curves += [(f"PyTorch, {Path(path).stem}", *read_peer(path)) for path in options.peers]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2))
    for (name, *values), style in zip(curves, ("-o", "--s", "--^", "--v")):
        for axis, points in zip(axes, values):
            axis.plot(list(points), list(points.values()), style, label=name, markersize=3, linewidth=1)
    for axis, title in zip(axes, ("training loss (mean of the epoch)", "acc@1 of 10,000 validation images")):
        axis.set(xlabel="epoch", title=title)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(options.out, dpi=100, metadata={"Software": None})
    print("| epoch | " + " | ".join(f"{name}: loss | acc@1" for name, *_ in curves) + " |")
    print("|---" * (1 + 2 * len(curves)) + "|")
    for epoch in curves[0][1]:
        cells = [f"{values.get(epoch):.4f}" if epoch in values else "" for _, *both in curves for values in both]
        print(f"| {epoch} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
