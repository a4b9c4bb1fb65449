"""The state of a run: weights, momentum, and how far it is; made, restored and saved by all ranks as one."""

import contextlib
import hashlib
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, NoReturn, Optional

import numpy as np

from hvd_vgg.config import StepConfig, TrainConfig, allowed_changes, fingerprint, hyperparameters
from hvd_vgg.data.index import Index
from hvd_vgg.errors import CONFIGURATION, Failure
from hvd_vgg.models import vgg
from hvd_vgg.models.architecture import vgg_layers
from hvd_vgg.parallel import comm
from hvd_vgg.parallel.consensus import run_on_all_ranks
from hvd_vgg.reporting import receipt
from hvd_vgg.reporting.console import Console
from hvd_vgg.reporting.log import RunLog
from hvd_vgg.text import difference_table
from hvd_vgg.train import checkpoint
from hvd_vgg.train.checkpoint_writer import CheckpointWriter
from hvd_vgg.train.optimizer import SCALE_STATE, Slots, make_slots

# Flags that decide which record is due when: of an epoch in which one has changed nothing can be proved.
_ORDER = {"global_batch", "seed", "shuffle_block_records"}


class State(NamedTuple):
    """The variables of a run by name, on this rank."""

    weights: vgg.Weights
    slots: Slots

    def variables(self) -> Dict[str, Any]:
        """Returns all variables by name."""
        return {**self.weights, **self.slots}


class TrainProgress(NamedTuple):
    """How far a run is, as its checkpoints keep it."""

    step: int = 0  # updates made
    seconds: float = 0.0  # that they took over all starts
    best_top1: int = -1  # most hits of an evaluation so far
    evaluated: int = 0  # the step of the newest evaluation
    coverage: List[int] = []  # noqa: RUF012 (never changed in place)
    bad_records: List[int] = []  # noqa: RUF012
    skipped_steps: List[int] = []  # noqa: RUF012


def initial_state(config: StepConfig) -> State:
    """Returns the state before the first update: a function of the configuration, the same on every rank."""
    of = vgg_layers(config.model, config.width, config.image_size, config.num_classes)
    weights = vgg.initial_weights(of, config.seed)
    return State(weights, make_slots(weights, config.precision))


def reset_state(state: State, config: StepConfig) -> None:
    """Brings `state` back to before the first update."""
    for variable, value in zip(state.variables().values(), initial_state(config).variables().values()):
        variable.assign(value)


def data_digest(index: Index) -> str:
    """Returns a SHA-256 over the lengths and labels of a split's records; contents are checked whenever they are read."""
    return hashlib.sha256(index.lengths.tobytes() + index.labels.tobytes()).hexdigest()


def run_fingerprint(config: TrainConfig, train_index: Index, label_base: int) -> Dict[str, Any]:
    """Returns what must be equal for a checkpoint to go on: configuration and data, as JSON can hold it."""
    digest = data_digest(train_index)
    data = {"train_records": train_index.records, "train_data_sha256": digest, "label_base": label_base}
    return {**fingerprint(config), **data}


def restore_state(
    state: State, config: TrainConfig, run_dir: Path, expected: Dict[str, Any], log: Optional[RunLog], console: Console
) -> TrainProgress:
    """Brings `state` of all ranks to where the run in `run_dir` stands, or to rank 0's initial weights; all ranks call.

    Damaged checkpoints newer than the one it continues from are set aside. Raises a collective Failure(CONFIGURATION) as
    --resume says, when no checkpoint is whole, or when the run is another.
    """

    def find() -> TrainProgress:
        if log is None:  # not rank 0
            return TrainProgress()
        checkpoint.clean(run_dir)
        _require(config.resume, run_dir)
        found, faults = checkpoint.newest(run_dir)
        if found is None:
            _check_none_was_saved(run_dir)
            return TrainProgress()
        changed = [key for key in {**found.meta["run"], **expected} if found.meta["run"].get(key) != expected.get(key)]
        refused = [key for key in changed if key not in allowed_changes(config)]
        if refused:
            _refuse_changes(refused, _misfit(state.variables(), found), found, expected, run_dir)
        assign_variables(state.variables(), found)
        if found.meta.get("best"):  # killed before it could be pointed to
            with contextlib.suppress(OSError):
                checkpoint.point_to_best(found.path)
        for path, reason in faults.items():
            aside = checkpoint.set_aside(path)
            console.say(f"{path.name} is damaged ({reason}): set aside as {aside.name}")
            log.event("checkpoint_damaged", file=path.name, reason=reason, renamed=aside.name)
        for key in changed:
            console.say(f"--{key} was {found.meta['run'].get(key)}, is {expected.get(key)} from here on")
            log.event("config_changed", flag=key, before=found.meta["run"].get(key), after=expected.get(key))
        console.say(f"going on from step {found.meta['step']}: {found.path}")
        log.event("resume", **{"from": found.meta["step"]}, checkpoint=found.path.name)
        position = TrainProgress(**{field: found.meta[field] for field in TrainProgress._fields if field in found.meta})
        return position._replace(coverage=[]) if _ORDER & set(changed) else position

    position = run_on_all_ranks(find)
    comm.broadcast_variables(list(state.variables().values()))
    return TrainProgress(*comm.broadcast_json(position))


def _check_none_was_saved(run_dir: Path) -> None:
    """Raises Failure(CONFIGURATION) where the log knows of checkpoints that are gone: a run never starts over in silence."""
    saved = [line.data["file"] for line in receipt.read_log(run_dir / "dllogger.json") if line.event == "checkpoint"]
    if saved:
        raise Failure(
            CONFIGURATION,
            f"{checkpoint.folder(run_dir)} holds no checkpoint, but by the log {saved[-1]} had been saved: restore it from "
            f"a copy, or begin anew in another --run_dir",
        )


def _refuse_changes(
    keys: List[str], misfit: str, found: checkpoint.Checkpoint, expected: Dict[str, Any], run_dir: Path
) -> NoReturn:
    """Raises Failure(CONFIGURATION) with what differs, and what of it --allow_config_change may admit."""
    run, own = found.meta["run"], f"the run's own flags (--flagfile={run_dir}/flags.txt)"
    table = difference_table({k: run.get(k) for k in keys}, {k: expected.get(k) for k in keys}, ("checkpoint", "command"))
    if "train_data_sha256" in keys:
        fix = "Another data set is another run: give another --run_dir, or the data that this run began with"
    elif misfit:
        fix = f"Another network is another run: give another --run_dir, or use {own}"
    elif set(keys) <= set(hyperparameters()):
        fix = f"Use {own}, another --run_dir, or allow a flag's change by name: --allow_config_change={','.join(keys)}"
    else:  # --label_base, or what another version of hvd_vgg has written
        fix = f"Use {own}, or another --run_dir"
    raise Failure(CONFIGURATION, f"{found.path} is of another run:\n{table}\n{fix}")


def _require(resume: str, run_dir: Path) -> None:
    found = checkpoint.existing(run_dir)
    if resume == "required" and not found:
        raise Failure(CONFIGURATION, f"--resume=required, but {checkpoint.folder(run_dir)} holds no checkpoint")
    if resume == "never" and found:
        raise Failure(
            CONFIGURATION,
            f"--resume=never, but {checkpoint.folder(run_dir)} holds {len(found)} checkpoints, which are never "
            f"overwritten: give another --run_dir",
        )


def assign_variables(variables: Dict[str, Any], found: checkpoint.Checkpoint) -> None:
    """Copies a checkpoint's tensors into the variables of the same names; Failure(CONFIGURATION) where they do not fit.

    The loss scale stays as it is where the run was of another precision till then and had none.
    """
    misfit = _misfit(variables, found)
    if misfit:
        raise Failure(CONFIGURATION, f"{found.path}: {misfit}: it is of another network")
    for name, variable in variables.items():
        if name in found.tensors:
            variable.assign(found.tensors[name])


def _misfit(variables: Dict[str, Any], found: checkpoint.Checkpoint) -> str:
    """Returns the first of `variables` that a checkpoint has not, or has in another shape; "" where all fit."""
    for name, variable in variables.items():
        if name in SCALE_STATE and found.meta["run"].get("precision") != "float16":
            continue
        tensor, shape = found.tensors.get(name), tuple(variable.shape)
        if tensor is None or tensor.shape != shape:
            return f"{name} is {tensor.shape if tensor is not None else 'not there'}, expected {shape}"
    return ""


def save_state(
    state: State, position: TrainProgress, what: Dict[str, Any], writer: Optional[CheckpointWriter], best: bool
) -> None:
    """Begins to write a checkpoint, on rank 0, which alone has a writer; waits for the copy of the variables only."""
    if writer:
        tensors = {name: np.asarray(variable) for name, variable in state.variables().items()}
        writer.begin(tensors, {**position._asdict(), "run": what, "best": best}, best)


def finish_save(writer: Optional[CheckpointWriter]) -> None:
    """Waits for the checkpoint begun last; all ranks must call. Raises a collective Failure(NOT_WRITTEN)."""

    def wait() -> None:
        failure = writer.wait() if writer else None
        if failure:
            raise failure

    run_on_all_ranks(wait)
