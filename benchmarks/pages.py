"""Size and time of the page that `hvd-vgg report` makes of a long log: 90 epochs of ImageNet.

    python benchmarks/pages.py [--epochs=90] [--ranks=8] [--rounds=3]

Writes a log as `hvd-vgg train` does on that many ranks: 256 images an update, a line every 20 updates (the default) with
each update's loss and seconds, an evaluation an epoch; numbers are drawn. Prints the log's size, the size of the page that
`hvd-vgg report` makes of it, and the seconds, processor seconds and memory that it takes. Needs matplotlib.
"""

import os
import random
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import measure

TRAIN, VALIDATION, BATCH = 1_281_167, 50_000, 256
FPS = 1500.0  # of all ranks
TOP1, TOP5 = 0.74, 0.92  # at the end


def train_line(draw, step, updates, ranks, total):
    """Returns a log line of the updates up to `step`."""
    losses = [draw.gauss(7.0 - 5.5 * (step / total) ** 0.3, 0.08) for _ in range(updates)]
    seconds = [BATCH / FPS * draw.uniform(0.98, 1.1) for _ in range(updates)]
    shares = {f"train.{name}_share": draw.uniform(0.0, 0.05) for name in ("input", "network", "straggler")}
    return {
        "train.loss": sum(losses) / updates,
        "train.losses": losses,
        "train.acc@1": TOP1 * (step / total) ** 0.3,
        "train.acc@5": TOP5 * (step / total) ** 0.3,
        "train.gradient_norm": draw.uniform(1.0, 3.0),
        "train.recomputed_updates": 0,
        "train.lr": 0.01 * (1 - step / total),
        "train.fps": updates * BATCH / sum(seconds),
        **shares,
        "train.input_shares": [round(draw.uniform(0.0, 0.05), 4) for _ in range(ranks)],
        "train.exchange_shares": [round(draw.uniform(0.0, 0.05), 4) for _ in range(ranks)],
        "train.slow_rank": -1,
        "train.update_seconds": seconds,
        "train.input_seconds": [draw.uniform(0.0002, 0.002) for _ in range(updates)],
    }


def rank_rows(ranks):
    """Returns where each rank's time went, as a line of throughput has it."""
    shares = {"input": 0.02, "compute": 0.93, "network": 0.04, "straggler_wait": 0.01}
    rates = {"fps": FPS / ranks, "fps_alone": 1.05 * FPS / ranks}
    return [{"rank": rank, "host": f"node{rank // 8}", **rates, **shares} for rank in range(ranks)]


def write_log(folder, epochs, ranks):
    """Writes dllogger.json of a run that is done; returns its updates."""
    from hvd_vgg.config import TrainConfig
    from hvd_vgg.reporting.log import RunLog

    config = TrainConfig(global_batch=BATCH, epochs=float(epochs))
    log, draw, clock = RunLog(folder, stdout=False, tensorboard=None), random.Random(1), 0.0  # noqa: S311
    opened, _ = log.times()
    log.times = lambda: (opened + timedelta(seconds=clock), clock)
    digest, total, every = "0" * 64, -(-epochs * TRAIN // BATCH), config.log_every_steps
    log.log("PARAMETER", vars(config))
    data = {"train": {"records": TRAIN, "sha256": digest}, "validation": {"records": VALIDATION, "sha256": digest}}
    hosts = [row["host"] for row in rank_rows(ranks)]
    log.event("start", step=0, steps=total, ranks=ranks, hosts=hosts, process_seconds=30.0, data=data)
    ends, step = [-(-epoch * TRAIN // BATCH) for epoch in range(1, epochs + 1)], 0
    while step < total:
        updates = min(every - step % every, ends[0] - step)
        step += updates
        clock += updates * BATCH / FPS
        line = train_line(draw, step, updates, ranks, total)
        log.log((step * BATCH // TRAIN, step), line)
        if step == ends[0]:
            ends.pop(0)
            hits = [int(VALIDATION * share * (step / total) ** 0.3) for share in (TOP1, TOP5)]
            found = {"loss": 1.0, "acc@1": hits[0] / VALIDATION, "acc@5": hits[1] / VALIDATION, "state_sha256": digest}
            found.update(top1_hits=hits[0], top5_hits=hits[1], records=VALIDATION)
            clock += 40.0
            log.log((step * BATCH // TRAIN, step), {f"eval.{name}": value for name, value in found.items()})
            log.event("throughput", step=step, fps=FPS, bottleneck="compute", slow_rank=None, by_rank=rank_rows(ranks))
    log.event("end")
    log.close()
    return total


def report_once(run_dir, out):
    """Makes a page in a process of its own; returns seconds of the clock, seconds of processors, and MB of memory."""
    began = time.perf_counter()
    process = measure.start([*measure.TRAINER, "report", run_dir, f"--out={out}"])
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = status  # it has been waited for
    if status:
        measure.refuse("report failed, as said above", 1)
    return time.perf_counter() - began, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def main():
    """Prints the table."""
    parser = measure.command_line(__doc__, rounds=3, ranks=8)
    parser.add_argument("--epochs", type=measure.positive, default=90)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        total, page = write_log(Path(folder), options.epochs, options.ranks), Path(folder) / "report.html"
        size = (Path(folder) / "dllogger.json").stat().st_size / 1e6
        rounds = list(zip(*(report_once(folder, page) for _ in range(options.rounds))))
        pages = page.stat().st_size / 1e6
    row = [f"{total:,}", f"{size:.1f}", f"{pages:.2f}", *(measure.spread(each, ".1f") for each in rounds)]
    head = ("updates", "MB of the log", "MB of the page", "seconds", "of processors", "MB of memory")
    measure.print_table(f"A page of {options.epochs} epochs of ImageNet on {options.ranks} ranks", head, [row])


if __name__ == "__main__":
    measure.run(main)
