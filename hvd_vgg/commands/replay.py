"""The `replay` command: a step that was not finite, again, from what the run kept of it."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from hvd_vgg.config import ReplayConfig
from hvd_vgg.data.index import Index, check_labels, find_shards, join, scan_shard
from hvd_vgg.data.loader import load_records
from hvd_vgg.data.sampler import Positions, sample_seeds, slice_bounds
from hvd_vgg.environment import launched_rank
from hvd_vgg.errors import CONFIGURATION, NOT_FINITE, USAGE, Failure
from hvd_vgg.parallel import comm, cost
from hvd_vgg.parallel.consensus import require_equal, run_on_all_ranks
from hvd_vgg.parallel.init import start
from hvd_vgg.reporting.console import Console
from hvd_vgg.run_dir import nonfinite_folder
from hvd_vgg.text import plural
from hvd_vgg.train import checkpoint
from hvd_vgg.train.nonfinite import diagnose, load_report
from hvd_vgg.train.state import State, assign_variables, initial_state
from hvd_vgg.train.train_step import make_train_step
from hvd_vgg.watchdog import watchdog


def replay(config: ReplayConfig) -> None:
    """Repeats a step and says whether it is not finite again, and where first; all ranks call.

    Raises a collective Failure(NOT_FINITE) if it is, Failure(CONFIGURATION) or Failure(DATA) where it cannot be repeated.
    """
    watchdog.start(None, launched_rank() or 0, config.hang_seconds)
    device = start(config.input_threads, hang_seconds=config.hang_seconds, precision=config.precision)
    console = Console(config.console, comm.is_root())
    flags = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("data_dir", "run_dir")}
    require_equal("the flags", json.loads(json.dumps(flags)))
    folder = nonfinite_folder(Path(config.run_dir), config.step)
    report = run_on_all_ranks(lambda: load_report(folder))
    batch, now = report["batch"], report["step"]
    index = run_on_all_ranks(lambda: _open_records(folder, config, report["label_base"], len(batch)))
    low, high = slice_bounds(config.global_batch, comm.rank(), comm.size())
    ids, epochs = (np.array([row[name] for row in batch[low:high]], np.int64) for name in ("drawn_as", "epoch"))
    seeds = sample_seeds(config.seed, Positions(ids, epochs))
    rows = load_records(index, config, report["label_base"], np.arange(low, high), seeds, device.input_threads)

    run = initial_state(config)
    run_on_all_ranks(lambda: _load_state(run, folder) if comm.is_root() else None)
    comm.broadcast_variables(list(run.variables().values()))
    factored = [choice.layer for choice in cost.choose(config, comm.size()) if choice.way == "factored"]
    train_step = make_train_step(run.weights, run.slots, config, device.data_format, factored)
    console.say(
        f"step {now} of {config.run_dir}: loss {report['loss']}, gradient norm {report['gradient_norm']}\n  {report['told']}"
    )
    examined = diagnose(now, run, train_step, *rows[:2], report["lr"], config, device.data_format)
    again = f"repeated on {plural(comm.size(), 'rank')}, {examined.seen}"
    if examined.repeated:
        faults = [row for found in examined.ranks for row in found["at_fault"]]
        raise Failure(NOT_FINITE, f"{again}: not finite again. {examined}.\n{_blame(faults, batch)}", collective=True)
    console.say(
        f"{again}: finite, not reproduced. Neither these weights nor these records make it: a fault of the hardware is "
        f"likely, or of the software on the rank named above"
    )
    comm.shutdown()


def _blame(faults: "list[int]", batch: "list[dict]") -> str:
    """Returns what to suspect: single records, or what all have in common."""
    if len(faults) == len(batch):
        return "Every record of the batch does this: the weights are at fault, not the data. Try a lower --lr"
    if not faults:
        return "No record does this alone: try a lower --lr"
    shown = "\n".join(f"  record {batch[row]['record']}: {batch[row].get('where')}" for row in faults[:10])
    more = f"\n  and {len(faults) - 10} more" if len(faults) > 10 else ""
    return f"{len(faults)} of the {plural(len(batch), 'record')} of the batch do this alone:\n{shown}{more}"


def _open_records(folder: Path, config: ReplayConfig, label_base: int, rows: int) -> Index:
    paths = find_shards(str(folder), "records")
    index = join(paths, [scan_shard(path) for path in paths])
    check_labels(index, label_base, config.num_classes)
    if not index.records == rows == config.global_batch:
        raise Failure(
            CONFIGURATION,
            f"{folder} holds {index.records} records and a report of {rows}; expected --global_batch={config.global_batch} "
            f"of both",
        )
    if config.global_batch < comm.size():
        raise Failure(USAGE, f"{plural(rows, 'record')} leave nothing to do for some of {comm.size()} ranks: start fewer")
    return index


def _load_state(run: State, folder: Path) -> None:
    path = folder / "state.safetensors"
    try:
        found = checkpoint.load(path)
    except ValueError as error:
        raise Failure(CONFIGURATION, f"{path}: {error}") from error
    assign_variables(run.variables(), found)
