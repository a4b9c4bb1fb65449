"""The state of a run: weights, moving moments, momentum, average, and its progress. It is equal on all ranks."""

import dataclasses
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple

import numpy as np
import tensorflow as tf

from hvd_vgg.config import ModelConfig, StepConfig, TrainConfig, fingerprint
from hvd_vgg.data.index import Index, data_digest
from hvd_vgg.errors import CONFIGURATION, Failure
from hvd_vgg.models import vgg
from hvd_vgg.models.architecture import layers_of, layers_to_train
from hvd_vgg.parallel import comm, cost
from hvd_vgg.training import checkpoint
from hvd_vgg.training.average import UPDATES, make_averages
from hvd_vgg.training.checkpoint import Checkpoint, averaged, averaged_name
from hvd_vgg.training.checkpoint_writer import CheckpointWriter
from hvd_vgg.training.optimizer import OPTIONAL_STATE, Slots, make_slots

# Of a run's checkpoints and log; a run is continued only in the format that it began with.
CHECKPOINT_FORMAT = 5


class State(NamedTuple):
    """The variables of a run by name, on this rank.

    weights: of the layers that are trained; moments: of their BatchNorm; frozen: weights and moments of the others;
    averages: of `make_averages`; each is empty without.
    """

    weights: vgg.Weights
    moments: vgg.Weights
    frozen: vgg.Weights
    slots: Slots
    averages: Dict[str, Any]

    def trained(self) -> vgg.Weights:
        """Returns the variables that an update changes, by name, beside the momentum."""
        return {**self.weights, **self.moments}

    def network(self) -> vgg.Weights:
        """Returns the variables that evaluation needs, by name."""
        return {**self.frozen, **self.weights, **self.moments}

    def averaged_network(self) -> vgg.Weights:
        """Returns the averages of `network`, under the same names; nothing without averages."""
        return averaged(self.averages, self.network()) if self.averages else {}

    def variables(self) -> Dict[str, Any]:
        """Returns all variables by name."""
        return {**self.network(), **self.slots, **self.averages}


@dataclasses.dataclass
class TrainProgress:
    """How far a run is, as its checkpoints keep it.

    step: updates made; seconds: that they took, over all starts; best_top1: most hits of an evaluation so far, -1 before the
    first; best_average_top1: the same of the average; evaluated: the step of the newest evaluation; coverage:
    `Coverage.state()`; bad_records: ids; skipped_steps: by --on_nonfinite=rewind. What decides what comes next is named in
    `checkpoint.STATE_PROGRESS`.
    """

    step: int = 0
    seconds: float = 0.0
    best_top1: int = -1
    best_average_top1: int = -1
    evaluated: int = 0
    coverage: List[int] = dataclasses.field(default_factory=list)
    bad_records: List[int] = dataclasses.field(default_factory=list)
    skipped_steps: List[int] = dataclasses.field(default_factory=list)


def initial_network(config: ModelConfig, seed: int) -> Tuple[vgg.Weights, vgg.Weights]:
    """Returns (weights, moments) before the first update, as variables: a function of the network and the seed."""
    layers = layers_of(config)
    return vgg.initial_weights(layers, seed), vgg.initial_moments(layers)


def initial_state(config: StepConfig) -> State:
    """Returns the state before the first update: a function of the configuration, equal on every rank."""
    weights, moments = initial_network(config, config.seed)
    averages = make_averages({**weights, **moments}) if config.ema_decay else {}
    layers = {layer.name for layer in layers_to_train(config) if layer.trained}
    frozen = {name: each for name, each in {**weights, **moments}.items() if name.split("/")[0] not in layers}
    weights, moments = ({name: each for name, each in part.items() if name not in frozen} for part in (weights, moments))
    return State(weights, moments, frozen, make_slots(weights, moments, config), averages)


def reset_state(state: State, config: StepConfig) -> None:
    """Resets `state` to what it was before the first update."""
    for variable, value in zip(state.variables().values(), initial_state(config).variables().values()):
        variable.assign(value)


def assign_variables(variables: Dict[str, Any], found: Checkpoint) -> None:
    """Copies a checkpoint's tensors into the variables of the same names; Failure(CONFIGURATION) where they do not fit.

    What the run had no use for until then, such as the loss scale under another precision, stays as it is; an average begins
    with the variable that it is of.
    """
    mismatch = find_mismatch(variables, found)
    if mismatch:
        raise Failure(CONFIGURATION, f"{found.path}: {mismatch}: it is of another network")
    for name, variable in variables.items():
        source = name if name in found.tensors else averaged_name(name)
        if source in found.tensors:
            variable.assign(found.tensors[source])


def find_mismatch(variables: Dict[str, Any], found: Checkpoint) -> str:
    """Returns the first of `variables` that a checkpoint lacks, or has in another shape; "" where all fit."""
    for name, variable in variables.items():
        flag, value = OPTIONAL_STATE.get(name, ("", None))
        run = found.meta.get("run", {})  # a kept step names no run
        if run.get(flag) != value or ((averaged_name(name) or name == UPDATES) and not run.get("ema_decay")):
            continue
        tensor, shape = found.tensors.get(name), tuple(variable.shape)
        if tensor is None or tensor.shape != shape:
            return f"{name} is {tensor.shape if tensor is not None else 'missing'}, expected {shape}"
    return ""


def save_state(
    state: State, progress: TrainProgress, run: Dict[str, Any], writer: CheckpointWriter, best: Sequence[str]
) -> None:
    """Starts writing a checkpoint, on rank 0; waits only for the copy of the variables.

    best: as for `checkpoint.save`; run: what else it keeps: `run` of `run_fingerprint`, and `arithmetic`.
    """
    if comm.is_root():
        tensors = {name: np.asarray(variable) for name, variable in state.variables().items()}
        writer.begin(tensors, {**dataclasses.asdict(progress), "format": CHECKPOINT_FORMAT, **run, "best": [*best]}, best)


def state_sha256(state: State, progress: TrainProgress) -> str:
    """Returns `checkpoint.state_sha256` of a run as it is; takes seconds for a gigabyte."""
    tensors = ((name, np.asarray(variable)) for name, variable in state.variables().items())
    return checkpoint.state_sha256(checkpoint.tensors_sha256(tensors), dataclasses.asdict(progress))


def run_fingerprint(config: TrainConfig, train_index: Index, label_base: int) -> Dict[str, Any]:
    """Returns what must be equal for a checkpoint to be continued: configuration and data, as JSON can hold it."""
    digest = data_digest(train_index)
    data = {"train_records": train_index.records, "train_data_sha256": digest, "label_base": label_base}
    return {**fingerprint(config), "exchange": cost.factored_layers(config, comm.size()), **data}


def make_checksums(variables: Dict[str, Any]) -> Callable[[], Any]:
    """Returns the function () -> int64 [variables]: of each variable of 32 bits, in order, the sum of its bits as integers.

    Exact, whatever the order of summing: equal variables have equal sums, and any one number that differs changes its sum.
    """

    @tf.function(jit_compile=False, autograph=False)
    def checksums() -> Any:
        bits = [tf.cast(tf.bitcast(variable, tf.int32), tf.int64) for variable in variables.values()]
        return tf.stack([tf.reduce_sum(each) for each in bits])

    return checksums
