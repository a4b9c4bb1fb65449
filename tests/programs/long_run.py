"""Writes the log of a run of 90 epochs of ImageNet by the package's own writer, to measure what reads it.

    python tests/programs/long_run.py RUN_DIR

256 images an update, 450,000 updates, a line every 50, an evaluation an epoch, on 8 ranks. The numbers are made up.
"""

import dataclasses
import math
import random
import sys
from datetime import timedelta
from pathlib import Path

from hvd_vgg.config import TrainConfig
from hvd_vgg.flags import to_flag_file
from hvd_vgg.provenance import describe_process
from hvd_vgg.reporting.log import RunLog
from hvd_vgg.run_dir import RunDir
from hvd_vgg.training.schedule import learning_rate

RECORDS, VALIDATION, EPOCHS, EVERY, RANKS = 1_281_167, 50_000, 90, 50, 8
UPDATE_SECONDS = 0.12


def write(run: RunDir, updates: int, config: TrainConfig) -> None:
    """Writes the log of `updates` updates; its clock is that of the run, not of this program."""
    run.path.mkdir(parents=True, exist_ok=True)
    run.flags.write_text(to_flag_file(config))
    log, draw, evaluated = RunLog(run.path, False, None), random.Random(1), 0
    clock, opened = [0.0], log.times()[0]
    log.times = lambda: (opened + timedelta(seconds=clock[0]), clock[0])
    log.log("PARAMETER", dataclasses.asdict(config))
    data = {"train": {"records": RECORDS, "sha256": "t" * 64}, "validation": {"records": VALIDATION, "sha256": "v" * 64}}
    start = {"step": 0, "steps": updates, "skipped_steps": [], "ranks": RANKS, "hosts": ["a"] * 4 + ["b"] * 4}
    log.event("start", **describe_process(), **start, checkpoint=None, data=data)
    for step in range(EVERY, updates + 1, EVERY):
        seconds = [UPDATE_SECONDS * draw.uniform(0.95, 1.1) for _ in range(EVERY)]
        clock[0] += sum(seconds)
        epoch = step * config.global_batch / RECORDS
        losses = [7 * math.exp(-epoch / 20) + draw.uniform(0, 0.5) for _ in range(EVERY)]
        top1 = 0.75 * (1 - math.exp(-epoch / 15))
        row = {"train.loss": sum(losses) / EVERY, "train.losses": losses, "train.acc@1": top1, "train.acc@5": top1 + 0.2}
        row.update({"train.gradient_norm": draw.uniform(0.5, 2), "train.lr": learning_rate(step - 1, config, RECORDS)})
        row.update({"train.fps": config.global_batch * EVERY / sum(seconds), "train.input_share": draw.uniform(0, 0.05)})
        row.update({"train.network_share": 0.1, "train.straggler_share": draw.uniform(0, 0.1)})
        row.update({"train.input_shares": [0.01] * RANKS, "train.exchange_shares": [0.1] * RANKS})
        row.update({"train.update_seconds": seconds, "train.input_seconds": [0.001] * EVERY})
        log.log((int(epoch), step), row)
        if int(epoch) > evaluated or step == updates:
            evaluated, hits = int(epoch), int(top1 * VALIDATION)
            clock[0] += 30
            counts = {"eval.top1_hits": hits, "eval.top5_hits": hits + 100, "eval.records": VALIDATION}
            shares = {"eval.loss": losses[0], "eval.acc@1": hits / VALIDATION, "eval.acc@5": (hits + 100) / VALIDATION}
            log.log((evaluated, step), {**counts, **shares, "eval.state_sha256": f"{step:064x}"})
    log.log((), {"eval.acc@1": top1})
    log.close()


if __name__ == "__main__":
    write(RunDir(Path(sys.argv[1])), int(sys.argv[2]) if len(sys.argv) > 2 else 450_000, TrainConfig())
