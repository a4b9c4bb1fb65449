"""Makes the pictures that the README and docs/ show.

    python docs/scripts/pictures.py report RUN_DIR                    # docs/report.png
    python docs/scripts/pictures.py efficiency                        # docs/efficiency.png
    python docs/scripts/pictures.py cifar10 RUN_DIR [PEER.jsonl ...]  # docs/cifar10.png

--out=FILE replaces where a picture goes. Outside the test command.

report      the top of the page of `hvd-vgg report` at 1200 pixels, light, of a run of `bash launch/quickstart.sh`; its path,
            which the page names, should be one for everybody. Needs Chromium (--chromium=/usr/bin/chromium), Pillow and
            matplotlib.
efficiency  scaling efficiency against ranks: what the tables of README.md and docs/benchmarks.md have as measured, and what
            `hvd-vgg plan` predicts for other numbers of hosts. Needs this package, matplotlib and Pillow. To be made again
            when those tables change; --mbit: what the README's links carry while they are busy both ways, which
            benchmarks/exchange.py prints.
cifar10     a run of configs/vgg16_bn_cifar10.flags, and beside it the same recipe in PyTorch: each PEER.jsonl is what
            benchmarks/peer_cifar.py printed. Prints the table of docs/benchmarks.md: the mean training loss of each epoch
            and acc@1. Needs matplotlib and Pillow.
"""

import argparse
import dataclasses
import io
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).resolve().parent.parent
SCREEN = (1200, 1228)  # pixels; it ends below the first row of figures
TAPE, ALLREDUCE, FACTORED, HALF = range(4)
WAYS = (  # what the tables call a way, how the picture does, its colour and marker
    ("Horovod", "Horovod's DistributedGradientTape", "#a83a08", "s"),
    ("allreduce", "--exchange=allreduce", "#7a45d6", "^"),
    ("factored", "--exchange=factored", "#0a58ca", "o"),
    ("float16", "the same, float16 on the wire", "#146c2e", "D"),
)


def save(image, out):
    """Writes an image with a palette, which takes a third of the bytes."""
    palette = image.convert("RGB").quantize(255, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    palette.save(out, optimize=True)
    print(f"{out}: {image.width} x {image.height}, {Path(out).stat().st_size / 1e3:.0f} kB")


def save_figure(figure, out):
    """Writes a figure of matplotlib."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=125)
    save(Image.open(file), out)


# ---- the page of a run


def report(options):
    """Takes a picture of the top of a run's page."""
    with tempfile.TemporaryDirectory() as folder:
        page, shot = Path(folder) / "report.html", Path(folder) / "report.png"
        command = [sys.executable, "-m", "hvd_vgg", "report", options.run_dir, f"--out={page}"]
        subprocess.run(command, check=True, cwd=DOCS.parent)  # noqa: S603
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        # Higher than the picture: Chromium takes the height of its own bars, which it does not draw, from the page's.
        window = [f"--window-size={SCREEN[0]},{SCREEN[1] + 300}", f"--screenshot={shot}"]
        subprocess.run([options.chromium, *flags, *window, page.as_uri()], check=True, capture_output=True)  # noqa: S603
        save(Image.open(shot).crop((0, 0, *SCREEN)), options.out)


# ---- efficiency against ranks


def rows_of(text, heading):
    """Returns the cells of the rows of the table whose head begins with `heading`."""
    lines = text[text.index(f"| {heading} |") :].split("\n\n")[0].splitlines()
    return [[cell.strip(" *") for cell in line.strip("| ").split("|")] for line in [lines[0], *lines[2:]]]


def seconds_of(cell):
    """Returns median, smallest and largest of a cell such as `1.94 (1.84 to 2.12)`."""
    numbers = [float(each) for each in re.findall(r"[\d.]+", cell)]
    return numbers if len(numbers) == 3 else numbers * 3


def way_of(cell):
    """Returns the way that a cell names: the last of WAYS whose name is in it."""
    return max(way for way, (name, *_) in enumerate(WAYS) if name in cell)


def hosts_measured():
    """Returns hosts, images a rank, Mbit/s, seconds of an update without exchange, and {way: efficiencies} of the README."""
    text = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    block = text[text.index("<!-- results: begin") : text.index("<!-- results: end")]
    command = dict(re.findall(r"--(\w+)=(\d+)", block[block.index("benchmarks/exchange.py") :]))
    _, alone, *rows = rows_of(block, "exchange of gradients")
    local = seconds_of(alone[2])[0]
    ways = {}
    for name, _, seconds, share in rows:
        ways[way_of(name)] = [float(share.rstrip(" %")) / 100, *(local / each for each in seconds_of(seconds)[1:])]
    return *(int(command[name]) for name in ("hosts", "images", "mbit")), local, ways


def ranks_measured():
    """Returns {way: {ranks: efficiencies}} of the ranks of one host, from docs/benchmarks.md."""
    head, *rows = rows_of((DOCS / "benchmarks.md").read_text(encoding="utf-8"), "ranks | rounds")
    found = {way_of(name): {1: [1.0] * 3} for name in head[3:]}
    for row in rows:
        local = seconds_of(row[2])[0]
        for name, cell in zip(head[3:], row[3:]):
            found[way_of(name)][int(row[0])] = [local / each for each in seconds_of(cell)]
    return found


def draw_measured(axes, way, points, width=0.0):
    """Draws efficiencies, of the median time, the smallest and the largest, by ranks; width: of the line between them."""
    middle, most, least = zip(*points.values())
    spread = [[a - b for a, b in zip(middle, least)], [a - b for a, b in zip(most, middle)]]
    spread = [[max(0.0, each) for each in side] for side in spread]
    _, label, colour, marker = WAYS[way]
    style = {"color": colour, "marker": marker, "markersize": 5, "linewidth": width, "elinewidth": 1.5, "capsize": 3}
    axes.errorbar(list(points), middle, spread, label=label, **style)


def predicted(way, images, local, mbit, sweep):
    """Returns what `hvd-vgg plan` predicts for numbers of hosts of one rank: efficiencies without overlap, and with all."""
    from hvd_vgg.config import PlanConfig
    from hvd_vgg.parallel import cost

    exchange = "allreduce" if way == ALLREDUCE else "factored"
    config = PlanConfig(exchange=exchange, wire_dtype="float16" if way == HALF else "float32")
    found = []
    for ranks in sweep:
        cluster = cost.Cluster(ranks, 1, mbit / 1000, images / local)
        found.append(cost.predict(dataclasses.replace(config, global_batch=images * ranks, ranks=ranks), cluster))
    return [each.efficiency_apart for each in found], [each.efficiency_overlapped for each in found]


def efficiency(options):
    """Draws measured and predicted efficiency against ranks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4), constrained_layout=True)
    left, right = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": (2, 3)})
    for way, points in ranks_measured().items():
        draw_measured(left, way, points, width=1.5)
    left.set(
        title="Ranks of one host, 2 images each", xlabel="ranks (measured)", ylabel="scaling efficiency", ylim=(0, 1.08)
    )
    hosts, images, mbit, local, ways = hosts_measured()
    sweep = [1, 2, 4, 8, 16, 32, 64]
    for way in (ALLREDUCE, FACTORED, HALF):
        band = predicted(way, images, local, options.mbit, sweep)
        right.fill_between(sweep, *band, color=WAYS[way][2], alpha=0.18, linewidth=0)
    for number, (way, each) in enumerate(ways.items()):  # beside each other: two are nearly the same
        draw_measured(right, way, {hosts * 1.06 ** (number - 1.5): each})
    title = f"Hosts with links of {mbit} Mbit/s, {images} images each"
    right.set(title=title, xlabel=f"hosts of one rank (points: measured on {hosts}; bands: predicted)")
    for axes, ticks in ((left, [1, 2, 4]), (right, sweep)):
        axes.set_xscale("log")
        axes.set_xticks(ticks, [str(each) for each in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.set_major_formatter("{x:.0%}")
    left.legend(loc="lower left", fontsize=9)
    save_figure(figure, options.out)


# ---- CIFAR-10


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


def cifar10(options):
    """Draws curves of loss and accuracy, and prints them as a table."""
    from matplotlib.figure import Figure

    curves = [("hvd_vgg", *read_run(options.run_dir))]
    curves += [(f"PyTorch, {Path(path).stem.replace('_', ' ')}", *read_peer(path)) for path in options.peers]
    figure = Figure(figsize=(9.6, 3.4), constrained_layout=True)
    both = figure.subplots(1, 2)
    for (name, *values), style, colour in zip(
        curves, ("-o", "--s", "--^", "--v"), ("#0a58ca", "#a83a08", "#146c2e", "#7a45d6")
    ):
        for axes, points in zip(both, values):
            axes.plot(list(points), list(points.values()), style, color=colour, label=name, markersize=4, linewidth=1.2)
    for axes, title in zip(both, ("training loss (mean of the epoch)", "acc@1 of 10,000 validation images")):
        axes.set(xlabel="epoch", title=title)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend()
    save_figure(figure, options.out)
    print("| epoch | " + " | ".join(f"{name}: loss | acc@1" for name, *_ in curves) + " |")
    print("|---" * (1 + 2 * len(curves)) + "|")
    for epoch in curves[0][1]:
        cells = [f"{values.get(epoch):.4f}" if epoch in values else "" for _, *both in curves for values in both]
        print(f"| {epoch} | " + " | ".join(cells) + " |")


def main():
    """Makes the picture that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pictures = parser.add_subparsers(dest="picture", required=True)
    makers = {"report": report, "efficiency": efficiency, "cifar10": cifar10}
    for name in makers:
        own = pictures.add_parser(name)
        own.add_argument("--out", default=str(DOCS / f"{name}.png"))
        if name != "efficiency":
            own.add_argument("run_dir")
    pictures.choices["report"].add_argument("--chromium", default="/usr/bin/chromium")
    pictures.choices["efficiency"].add_argument("--mbit", type=float, default=371.0)
    pictures.choices["cifar10"].add_argument("peers", nargs="*")
    options = parser.parse_args()
    makers[options.picture](options)


if __name__ == "__main__":
    main()
