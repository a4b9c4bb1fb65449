"""The state of a run: weights, momentum, and how far it is; made, restored and saved by all ranks as one."""

import hashlib
import json
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence

import numpy as np

from hvd_vgg.config import Config, identity
from hvd_vgg.data import records
from hvd_vgg.model import vgg
from hvd_vgg.model.layers import layers
from hvd_vgg.parallel import comm
from hvd_vgg.run.health import CONFIGURATION, NOT_FINITE, Failure, difference
from hvd_vgg.run.log import Console
from hvd_vgg.train import checkpoint, optimizer


class State(NamedTuple):
    """The variables of a run by name, on this rank."""

    weights: vgg.Weights
    slots: optimizer.Slots

    def variables(self) -> Dict[str, Any]:
        """Returns all variables by name."""
        return {**self.weights, **self.slots}


class Position(NamedTuple):
    """How far a run is: updates made, seconds they took over all starts, most top-1 hits of an evaluation so far.

    skipped_steps: those that are passed without an update.
    """

    step: int
    seconds: float
    best_top1: int
    skipped_steps: Sequence[int] = ()


def initial(config: Config) -> State:
    """Returns the state before the first update: a function of the configuration, the same on every rank."""
    of = layers(config.model, config.width, config.image_size, config.num_classes)
    weights = vgg.initial_weights(of, config.seed)
    return State(weights, optimizer.make_slots(weights, config.precision))


def what_run(config: Config, train_index: records.Index, label_base: int) -> Dict[str, Any]:
    """Returns what must be equal for a checkpoint to go on: configuration and data, as JSON can hold it."""
    digest = hashlib.sha256(train_index.lengths.tobytes() + train_index.labels.tobytes()).hexdigest()
    data = {"train_records": train_index.records, "train_data_sha256": digest, "label_base": label_base}
    return {**identity(config), **data}


def restore(state: State, resume: str, run_dir: Path, expected: Dict[str, Any], console: Console) -> Position:
    """Brings `state` of all ranks to where the run in `run_dir` stands, or to rank 0's initial weights; all ranks call.

    Raises an agreed Failure(CONFIGURATION) as --resume says, when no checkpoint is whole, or when the run is another.
    """

    def find() -> Position:
        if not comm.is_root():
            return Position(0, 0.0, -1)
        checkpoint.clean(run_dir)
        _require(resume, run_dir)
        found = checkpoint.newest(run_dir)
        if found is None:
            return Position(0, 0.0, -1)
        skipped = [path.name for path in checkpoint.existing(run_dir) if path.name > found.path.name]
        if skipped:
            console.say(f"not whole, passed over: {', '.join(skipped)}")
        changed = difference(found.meta["run"], expected)
        if changed:
            raise Failure(
                CONFIGURATION,
                f"{found.path} is of another run (expected: the checkpoint's, found: this command's):\n{changed}\n"
                f"Use the run's own flags (--flagfile={run_dir}/flags.txt) or another --run_dir",
            )
        assign(state.variables(), found)
        console.say(f"going on from step {found.meta['step']}: {found.path}")
        return Position(**{name: found.meta[name] for name in Position._fields if name in found.meta})

    position = comm.together(find)
    comm.broadcast_variables(list(state.variables().values()))
    return Position(*json.loads(comm.from_root(json.dumps(position).encode()).decode()))


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


def check_identical(names: List[str], checksums: np.ndarray, step: int) -> None:
    """Raises an agreed Failure(NOT_FINITE) naming the first weight that is not the same on all ranks; all ranks call.

    checksums: int64 [names], this rank's. Named are the ranks that differ from most, all of them where there is no most.
    """
    told = np.stack([np.frombuffer(each, np.int64) for each in comm.gather(checksums.tobytes())])
    differs = (told != told[0]).any(axis=0)
    if differs.any():
        first = int(np.argmax(differs))
        values, counts = np.unique(told[:, first], return_counts=True)
        most = values[counts == counts.max()]
        usual = most[0] if len(most) == 1 else None  # on a tie nobody can say who is right
        odd = [rank for rank, value in enumerate(told[:, first]) if value != usual]
        raise Failure(
            NOT_FINITE,
            f"step {step}: {names[first]} ({int(differs.sum())} of {len(names)} weights) is not the same on all ranks: "
            f"{', '.join(f'rank {rank}' for rank in odd)} differ(s). Replicas that drift apart no longer train one network "
            f"(unlike processors, or a fault of memory?): go on from a checkpoint of before, or use --exchange=allreduce",
            agreed=True,
        )


def assign(variables: Dict[str, Any], found: checkpoint.Checkpoint) -> None:
    """Copies a checkpoint's tensors into the variables of the same names; Failure(CONFIGURATION) where they do not fit."""
    for name, variable in variables.items():
        tensor = found.tensors.get(name)
        if tensor is None or tensor.shape != tuple(variable.shape):
            raise Failure(
                CONFIGURATION,
                f"{found.path}: {name} is {tensor.shape if tensor is not None else 'not there'}, expected "
                f"{tuple(variable.shape)}: it is of another network",
            )
        variable.assign(tensor)


def save(state: State, position: Position, what: Dict[str, Any], run_dir: Path, keep: int, best: bool) -> None:
    """Writes a checkpoint, on rank 0; all ranks must call. Raises an agreed Failure(NOT_WRITTEN)."""

    def write() -> None:
        if comm.is_root():
            tensors = {name: np.asarray(variable) for name, variable in state.variables().items()}
            checkpoint.save(run_dir, tensors, {**position._asdict(), "run": what}, keep, best)

    comm.together(write)
