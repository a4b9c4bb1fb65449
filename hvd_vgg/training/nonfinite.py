"""Locates where a non-finite step went wrong: on which rank, in which layer, for which records."""

import socket
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import tensorflow as tf

from hvd_vgg.config import StepConfig
from hvd_vgg.data.sampler import part_bounds
from hvd_vgg.models.architecture import GAMMA
from hvd_vgg.parallel import comm
from hvd_vgg.text import plural
from hvd_vgg.training.backward import draw_dropout_masks, forward
from hvd_vgg.training.metrics import NonFiniteStep, global_losses
from hvd_vgg.training.mixing import draw_step_mixing
from hvd_vgg.training.optimizer import LOSS_SCALE
from hvd_vgg.training.state import State
from hvd_vgg.training.train_step import StepMetrics, step_inputs


class FiniteReport(NamedTuple):
    """What of one pass over n images is finite, bool: `weights` [frozen + weights], the `outputs` of each layer for each
    image [layers, n], the `moments` of BatchNorm [moments], each image's loss [n], the `gradients` of the sum of losses
    [weights].
    """

    weights: Any
    outputs: Any
    moments: Any
    losses: Any
    gradients: Any


class Diagnosis(NamedTuple):
    """A step that was computed again on all ranks, from the same weights, without applying it; equal on all ranks.

    again: the loss and gradient norm it has now; finite: whether both are; ranks: for each, its `host`, its `slice` of the
    global batch, what was not finite first in its part (`first`, None for nothing; `order`: how early that is), and which
    records are so on their own (`at_fault`, positions in the global batch).
    """

    again: NonFiniteStep
    finite: bool
    ranks: List[Dict[str, Any]]

    @property
    def rank(self) -> Optional[int]:
        """The rank whose part was not finite earliest on the way from the weights to the gradients; None if none was."""
        odd = [rank for rank, found in enumerate(self.ranks) if found["first"] is not None]
        return min(odd, key=lambda rank: self.ranks[rank]["order"]) if odd else None

    @property
    def repeated(self) -> bool:
        """Whether anything was not finite this time."""
        return not self.finite or self.rank is not None

    def __str__(self) -> str:
        if not self.repeated:
            return (
                "Computed again from the same weights and records, everything is finite: possibly a transient hardware fault"
            )
        if self.rank is None:
            return "Finite on each rank, not finite in the sums over micro-batches and ranks"
        found, others = self.ranks[self.rank], [r for r in self.ranks if r["first"] is not None]
        low, high = found["slice"]
        where = f"rank {self.rank} on {found['host']}" if len(self.ranks) > 1 else "the one rank"
        spread = "" if len(self.ranks) == 1 else f"; {len(others)} of {len(self.ranks)} ranks are affected"
        records = plural(high - low, "record")
        return f"First {found['first']} on {where}, in {len(found['at_fault'])} of its {records}{spread}"


def make_finite_check(state: State, config: StepConfig, data_format: str) -> Callable[..., FiniteReport]:
    """Returns the function (images, labels, position, keys) -> FiniteReport: a pass as in training, which changes nothing.

    Its arguments are those of a train step, of at most --device_batch images.
    """
    weights, used = state.weights, {**state.frozen, **state.weights}
    normalized = sum(name.endswith(f"/{GAMMA}") for name in used)

    @tf.function(jit_compile=False, autograph=False)
    def finite_check(images: Any, labels: Any, position: Any, keys: Any) -> FiniteReport:
        masks = draw_dropout_masks(used, config, images, position, keys)
        mixing = draw_step_mixing(config, images, position, keys[-1])
        outputs: List[Any] = []
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(list(weights.values()))
            passed = forward(state, config, data_format, images, labels, masks, mixing, observe=outputs.append)
            objective = tf.reduce_sum(passed.losses) / config.global_batch * state.slots.get(LOSS_SCALE, 1.0)
        gradients = tape.gradient(objective, list(weights.values()), unconnected_gradients="zero")
        sound = [tf.reduce_all(tf.math.is_finite(passed.moments[name])) for name in state.moments]
        # Check pre-activations: fused kernels of a layer and its ReLU turn NaN into 0. -Inf is fine: ReLU maps it to 0.
        for layer in range(normalized, len(outputs) - 1):
            x = outputs[layer]
            outputs[layer] = tf.where(tf.math.is_inf(x) & (x < 0), tf.zeros_like(x), x)
        return FiniteReport(
            tf.stack([tf.reduce_all(tf.math.is_finite(weight)) for weight in used.values()]),
            tf.stack([tf.reduce_all(tf.math.is_finite(x), list(range(1, x.shape.rank))) for x in outputs]),
            tf.stack(sound) if sound else tf.zeros([0], tf.bool),
            tf.math.is_finite(passed.losses),
            tf.stack([tf.reduce_all(tf.math.is_finite(gradient)) for gradient in gradients]),
        )

    return finite_check


def diagnose(
    step: int,
    state: State,
    train_step: Callable[..., StepMetrics],
    images: Any,
    labels: Any,
    lr: float,
    config: StepConfig,
    data_format: str,
) -> Diagnosis:
    """Returns the diagnosis of `step`, given the images and labels of this rank's part. Collective.

    If the step is finite this time it is applied, unless `train_step` has seen one before that was not.
    """
    low, high = part_bounds(config, comm.rank(), comm.size())
    inputs = step_inputs(config, step, low, lr)
    check = make_finite_check(state, config, data_format)
    first, rows = _first_nonfinite(check, state, images, labels, low, inputs[1], config.device_batch, config.group_batch)
    mine = {"host": socket.gethostname(), "slice": [low, high], "first": first and first[1], "order": first and first[0]}
    mine["at_fault"] = [low + row for row in rows]
    metrics = train_step(images, labels, *inputs)
    loss = float(global_losses([metrics.losses.numpy()])[0] / config.global_batch)
    numbers = comm.gather_numbers([float(metrics.gradient_norm), float(metrics.finite)])
    again = NonFiniteStep(step, loss, float(numbers[:, 0].max()))
    return Diagnosis(again, bool(numbers[:, 1].all()), comm.gather_json(mine))


def _first_nonfinite(
    check: Callable[..., FiniteReport],
    state: State,
    images: Any,
    labels: Any,
    position: int,
    keys: Any,
    device_batch: int,
    group: int,
) -> Tuple[Optional[Tuple[int, str]], List[int]]:
    """Returns (order and name of what is not finite first in this rank's part, or None; the rows that are so alone).

    group: how many rows are computed together at least.
    """

    def part(low: int, high: int) -> FiniteReport:
        found = check(images[low:high], labels[low:high], tf.constant(position + low, tf.int64), keys)
        return FiniteReport(*(np.asarray(each) for each in found))

    rows, names, trained = len(labels), [*state.frozen, *state.weights], list(state.weights)
    parts = [part(low, min(low + device_batch, rows)) for low in range(0, rows, device_batch)]
    outputs = np.concatenate([each.outputs for each in parts], axis=1)
    losses = np.concatenate([each.losses for each in parts])
    moments, gradients = (np.all([getattr(each, kind) for each in parts], axis=0) for kind in ("moments", "gradients"))
    layers = sorted({name.split("/")[0] for name in names})  # forward order, as their names have it
    found = [(f"the weights {name}", whole) for name, whole in zip(names, parts[0].weights)]
    for layer, row in zip(layers, outputs):
        found.append((f"the outputs of {layer}", row.all()))
        found += [(f"the statistics of {n}", whole) for n, whole in zip(state.moments, moments) if n.split("/")[0] == layer]
    found.append(("the loss", losses.all()))
    found += [(f"the gradient of {name}", whole) for name, whole in zip(reversed(trained), gradients[::-1])]
    first = next((number for number, (_, whole) in enumerate(found) if not whole), None)
    if first is None:
        return None, []
    each_row = np.concatenate([outputs, [losses]])
    # BatchNorm spreads what one row has over its group: only the first layer that is not finite tells rows apart.
    alone = each_row.all(axis=0) if group == 1 else each_row[np.argmin(each_row.all(axis=1))]
    if alone.all():  # gradients and statistics are of a batch: each row's own are needed, or those of its group
        each_group = [part(row, row + group) for row in range(0, rows, group)]
        alone = np.repeat([each.gradients.all() and each.moments.all() for each in each_group], group)
    return (first, found[first][0]), np.flatnonzero(~alone).tolist()
