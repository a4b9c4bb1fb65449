"""The `replay` command: a step that was not finite, again, from what the run kept of it."""

from typing import Any, Dict, List

import numpy as np

from hvd_vgg.commands.evaluate import load_checkpoint
from hvd_vgg.config import ReplayConfig
from hvd_vgg.data.index import Index, check_labels, scan_split
from hvd_vgg.data.loader import Batch, load_records
from hvd_vgg.data.sampler import Positions, part_bounds, sample_seeds, too_many_ranks
from hvd_vgg.errors import CONFIGURATION, NOT_FINITE, USAGE, Failure
from hvd_vgg.parallel import comm, cost
from hvd_vgg.parallel.consensus import run_on_all_ranks, run_on_root
from hvd_vgg.run_dir import RunDir, StepDir
from hvd_vgg.text import plural
from hvd_vgg.training.kept_step import load_report
from hvd_vgg.training.nonfinite import diagnose
from hvd_vgg.training.startup import join_ranks
from hvd_vgg.training.state import assign_variables, initial_state
from hvd_vgg.training.train_step import make_train_step


def replay(config: ReplayConfig) -> None:
    """Repeats a step and reports whether it is not finite again, and where first. Collective.

    Raises a collective Failure(NOT_FINITE) if it is, Failure(CONFIGURATION) or Failure(DATA) where it cannot be repeated.
    """
    device, console, _ = join_ranks(config)
    folder = RunDir(config.run_dir).nonfinite_step(config.step)
    report = run_on_all_ranks(lambda: load_report(folder))
    rows = _load_batch(folder, report, config, device.input_threads)
    state = initial_state(config)
    run_on_root(lambda: assign_variables(state.variables(), load_checkpoint(folder.state)))
    comm.broadcast_variables(list(state.variables().values()))
    factored = cost.factored_layers(config, comm.size())
    train_step = make_train_step(state, config, device, factored)
    console.say(
        f"step {report['step']} of {config.run_dir}: loss {report['loss']}, gradient norm {report['gradient_norm']}\n"
        f"  {report['diagnosis']}"
    )
    found = diagnose(report["step"], state, train_step, rows.images, rows.labels, report["lr"], config, device.data_format)
    again = f"repeated on {plural(comm.size(), 'rank')}, {found.again}"
    if found.repeated:
        faults = [row for rank in found.ranks for row in rank["at_fault"]]
        text = f"{again}: not finite again. {found}.\n{_blame(faults, report['batch'])}"
        raise Failure(NOT_FINITE, text, collective=True)
    console.say(
        f"{again}: finite, not reproduced. Neither these weights nor these records cause it: a hardware fault is likely, or "
        f"one of the software on the rank named above"
    )
    comm.shutdown()


def _load_batch(folder: StepDir, report: Dict[str, Any], config: ReplayConfig, threads: int) -> Batch:
    """Returns this rank's part of the step's global batch, with the crops and flips that it had. Collective."""
    batch, label_base = report["batch"], report["label_base"]
    index = run_on_all_ranks(lambda: _open_records(folder, config, label_base, len(batch)))
    low, high = part_bounds(config, comm.rank(), comm.size())
    ids, epochs = (np.array([row[name] for row in batch[low:high]], np.int64) for name in ("drawn_as", "epoch"))
    seeds = sample_seeds(config.seed, Positions(ids, epochs))
    return load_records(index, config, label_base, np.arange(low, high), seeds, threads)


def _blame(faults: List[int], batch: List[Dict[str, Any]]) -> str:
    """Returns what to suspect: single records, or what all have in common."""
    if len(faults) == len(batch):
        return "Every record of the batch does this: the weights are at fault, not the data. Try a lower --lr"
    if not faults:
        return "No record does this on its own: try a lower --lr"
    shown = "\n".join(f"  record {batch[row]['record']}: {batch[row].get('where')}" for row in faults[:10])
    more = f"\n  and {len(faults) - 10} more" if len(faults) > 10 else ""
    return f"{len(faults)} of the {plural(len(batch), 'record')} of the batch do this on their own:\n{shown}{more}"


def _open_records(folder: StepDir, config: ReplayConfig, label_base: int, rows: int) -> Index:
    index = scan_split(str(folder.path), "records")
    check_labels(index, label_base, config.num_classes)
    if not index.records == rows == config.global_batch:
        raise Failure(
            CONFIGURATION,
            f"{folder.path} holds {index.records} records and a report of {rows}; expected "
            f"--global_batch={config.global_batch} of both",
        )
    refusal = too_many_ranks(config, comm.size())
    if refusal:
        raise Failure(USAGE, refusal)
    return index
