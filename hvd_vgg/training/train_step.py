"""One update: forward and backward pass in micro-batches, exchange of gradients, update of the weights.

With G the global batch and P ranks, rank r computes on its n of the G images, in micro-batches of at most --device_batch:

    loss = sum over its images of the cross-entropy, and d(loss / G) / dw             `make_backward`, `accumulate`
    gradient of each weight = sum over ranks: exactly that of the mean loss over G    `exchange_gradients`
    update, unless the loss of any rank or the gradient is not finite                 `apply_gradients`

So no average of averages occurs, and ranks may hold different numbers of images.
"""

import functools
import math
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple

import tensorflow as tf

from hvd_vgg.config import StepConfig
from hvd_vgg.models import vgg
from hvd_vgg.models.architecture import DENSE
from hvd_vgg.models.dropout import dropout_mask
from hvd_vgg.parallel import comm, exchange
from hvd_vgg.seeds import dropout_keys
from hvd_vgg.training.loss import top_k_correct
from hvd_vgg.training.optimizer import LOSS_SCALE, Slots, apply_update, next_loss_scale, set_loss_scale

# Sent beside the gradients of the first block, which leave last: 0, or NaN if this rank's loss is not finite. A loss may be
# infinite where its gradient is finite: where only the label's logit is -Inf.
_NAN_FLAG = "block1/nan_flag"


class StepMetrics(NamedTuple):
    """Scalars of one update on one rank.

    loss: float32, top1, top5: int64, all three summed over this rank's images. gradient_norm: float32, of the global
    gradient. loss_scale: float32, factor of the next update's loss; 1 but for --precision=float16. exchange_seconds:
    float64, from when this rank's gradients were ready until those of all ranks had arrived. finite: bool, whether training
    may continue: every rank's loss is finite and so is the gradient, or float16's loss scale can still be halved.
    """

    loss: Any
    top1: Any
    top5: Any
    gradient_norm: Any
    loss_scale: Any
    exchange_seconds: Any
    finite: Any


class Backward(NamedTuple):
    """Sums over one rank's images, in float32 where not said otherwise.

    loss; top1, top5: int64; gradients: of the weights that are summed over ranks; inputs [n, K] and output_gradients
    [n, N] of each factored layer, whose product is the gradient of its kernel [K, N].
    """

    loss: Any
    top1: Any
    top5: Any
    gradients: List[Any]
    inputs: List[Any]
    output_gradients: List[Any]


def make_train_step(
    weights: vgg.Weights,
    slots: Slots,
    config: StepConfig,
    data_format: str,
    factored: Sequence[str],
    group: comm.Group = comm.WORLD,
) -> Callable[..., StepMetrics]:
    """Returns the function of one update: (images, labels, position, keys, lr) -> StepMetrics. Collective over the group.

    images: uint8 [n, h, w, 3] and labels: int32 [n], this rank's part of the global batch, which begins at `position` of it
    (int64 scalar); keys: `seeds.dropout_keys`, uint64 [2]; lr: float32 scalar. factored: the dense layers whose gradient is
    formed from gathered factors. Only the network is computed in --precision: weights, loss, sums and update are float32.

    An update that is not `finite` is not applied, and none is applied after it: whenever that is noticed, the weights and
    slots are those before it, on all ranks.
    """
    summed = [name for name in weights if name.split("/")[0] not in factored]
    backward = make_backward(weights, slots, config, data_format, summed, factored)
    local_sums = accumulate(backward, weights, summed, factored, config.device_batch)
    with tf.device("/CPU:0"):  # control flow is decided on the host
        stopped = tf.Variable(False)

    @tf.function(jit_compile=False, autograph=False)
    def train_step(images: Any, labels: Any, position: Any, keys: Any, lr: Any) -> StepMetrics:
        local = local_sums(images, labels, position, keys)
        gradients, losses_finite, seconds = exchange_gradients(local, summed, factored, config, group)
        norm, scale, finite = apply_gradients(weights, slots, gradients, losses_finite, stopped, lr, config)
        return StepMetrics(local.loss, local.top1, local.top5, norm, scale, seconds, finite)

    return _without_dispatch(train_step)


def _without_dispatch(function: Any) -> Callable[..., Any]:
    """Returns a tf.function without the search for the graph of its arguments' shapes, which takes a third of a millisecond.

    It is traced once, for the shapes that it is called with first: a rank's part of the global batch never changes.
    """
    graphs: List[Any] = []

    def call(*tensors: Any) -> Any:
        if not graphs:
            graphs.append(function.get_concrete_function(*tensors))
        return graphs[0](*tensors)

    return call


def make_backward(
    weights: vgg.Weights,
    slots: Slots,
    config: StepConfig,
    data_format: str,
    summed: Sequence[str],
    factored: Sequence[str],
) -> Callable[..., Backward]:
    """Returns the forward and backward pass of one micro-batch: (images, labels, position, keys) -> Backward.

    Gradients are those of the sum of losses / --global_batch. Under --xla the pass is compiled by XLA.
    """
    loss_scale = slots.get(LOSS_SCALE)

    def backward(images: Any, labels: Any, masks: List[Any]) -> Backward:
        inputs: Dict[str, Any] = {}
        # Zero probes: d(loss)/d(probe) equals d(loss)/d(output), which is what is gathered.
        widths = {name: weights[f"{name}/bias"].shape[0] for name in factored}
        probes = {name: tf.zeros([tf.shape(images)[0], width], config.precision) for name, width in widths.items()}

        def dense(weights: vgg.Weights, x: Any, name: str) -> Any:
            inputs[name] = x
            outputs = vgg.dense(weights, x, name)
            return outputs + probes[name] if name in probes else outputs

        with tf.GradientTape(watch_accessed_variables=False) as tape:
            sources = [weights[name] for name in summed] + list(probes.values())
            tape.watch(sources)
            logits = vgg.logits(weights, config.model, images, data_format, config.precision, masks, config.dropout, dense)
            loss = tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
            objective = loss / config.global_batch * (1.0 if loss_scale is None else loss_scale)
        gradients = [tf.cast(gradient, tf.float32) for gradient in tape.gradient(objective, sources)]
        if loss_scale is not None:
            gradients = [gradient * (1 / loss_scale) for gradient in gradients]
        correct = [top_k_correct(logits, labels, k) for k in (1, 5)]
        factor_inputs = [tf.cast(inputs[name], tf.float32) for name in factored]
        sums, outputs = gradients[: len(summed)], gradients[len(summed) :]
        return Backward(loss, correct[0], correct[1], sums, factor_inputs, outputs)

    compiled = tf.function(backward, jit_compile=True, autograph=False) if config.xla else backward

    def draw_and_run(images: Any, labels: Any, position: Any, keys: Any) -> Backward:
        # Masks are drawn outside of what XLA compiles: its generator yields the same numbers in another order.
        return compiled(images, labels, draw_dropout_masks(weights, config, images, position, keys))

    return draw_and_run


def draw_dropout_masks(weights: vgg.Weights, config: StepConfig, images: Any, position: Any, keys: Any) -> List[Any]:
    """Returns the dropout mask, bool [n, units], of each hidden dense layer for `images` from `position` on."""
    return [
        dropout_mask(tf.shape(images)[0], weights[f"{name}/bias"].shape[0], config.dropout, keys[layer], position)
        for layer, name in enumerate(DENSE[:-1] if config.dropout else [])
    ]


def accumulate(
    backward: Callable[..., Backward],
    weights: vgg.Weights,
    summed: Sequence[str],
    factored: Sequence[str],
    device_batch: int,
) -> Callable[..., Backward]:
    """Returns `backward` over any number of images: in micro-batches of at most `device_batch`, one after another."""
    widths = [weights[f"{name}/kernel"].shape[side] for side in (0, 1) for name in factored]

    def accumulated(images: Any, labels: Any, position: Any, keys: Any) -> Backward:
        count = images.shape[0]
        if count <= device_batch:
            return backward(images, labels, position, keys)

        def add_micro_batch(low: Any, sums: List[Any], factors: List[Any]) -> Any:
            high = tf.minimum(low + device_batch, count)
            part = backward(images[low:high], labels[low:high], position + tf.cast(low, tf.int64), keys)
            rows = [*part.inputs, *part.output_gradients]
            factors = [array.write(low // device_batch, row) for array, row in zip(factors, rows)]
            return high, [a + b for a, b in zip(sums, [part.loss, part.top1, part.top5, *part.gradients])], factors

        zeros = [tf.constant(0.0), tf.constant(0, tf.int64), tf.constant(0, tf.int64)]
        zeros += [tf.zeros_like(weights[name]) for name in summed]
        size = -(-count // device_batch)
        arrays = [tf.TensorArray(tf.float32, size, infer_shape=False, element_shape=[None, width]) for width in widths]
        # One at a time: micro-batches exist because only one fits.
        start = [tf.constant(0), zeros, arrays]
        _, sums, arrays = tf.while_loop(lambda low, *_: low < count, add_micro_batch, start, parallel_iterations=1)
        factors = [tf.ensure_shape(array.concat(), [count, width]) for array, width in zip(arrays, widths)]
        loss, top1, top5, *gradients = sums
        return Backward(loss, top1, top5, gradients, factors[: len(factored)], factors[len(factored) :])

    return accumulated


def exchange_gradients(
    local: Backward, summed: Sequence[str], factored: Sequence[str], config: StepConfig, group: comm.Group
) -> Tuple[Dict[str, Any], Any, Any]:
    """Returns the gradient of each weight over the global batch, by name; whether every rank's loss is finite (bool); and
    the seconds of exchange (float64). Collective, in a tf.function.
    """
    wire, scale = config.wire_dtype, float(config.global_batch)
    ready = _time_after([*local.gradients, *local.inputs, *local.output_gradients])
    nan_flag = tf.where(tf.math.is_finite(local.loss), 0.0, math.nan)
    gradients = exchange.sum_gradients({**dict(zip(summed, local.gradients)), _NAN_FLAG: nan_flag}, wire, scale, group)
    losses_finite = tf.math.is_finite(gradients.pop(_NAN_FLAG))
    factors = {
        name: exchange.gather_factors(name, inputs, outputs, config.global_batch, wire, scale, group)
        for name, inputs, outputs in zip(factored, local.inputs, local.output_gradients)
    }
    seconds = _time_after([*gradients.values(), *(row for pair in factors.values() for row in pair)]) - ready
    for name, pair in factors.items():
        gradients.update(exchange.product(name, *pair))
    return gradients, losses_finite, seconds


def apply_gradients(
    weights: vgg.Weights,
    slots: Slots,
    gradients: Dict[str, Any],
    losses_finite: Any,
    stopped: Any,
    lr: Any,
    config: StepConfig,
) -> Tuple[Any, Any, Any]:
    """Updates weights and slots, in a tf.function; returns (gradient norm, loss scale, finite) as in StepMetrics.

    losses_finite: bool scalar, equal on all ranks; stopped: a bool variable, set by the first update that is not finite,
    after which none is applied.
    """
    norm = tf.sqrt(2.0 * tf.add_n([tf.nn.l2_loss(gradient) for gradient in gradients.values()]))
    with tf.device("/CPU:0"):
        finite, gradient_finite = losses_finite, tf.math.is_finite(norm)
        scale = tf.constant(1.0)
        if LOSS_SCALE not in slots:
            finite &= gradient_finite
        else:
            # What overflows in float16 on one rank is infinite in the sum of all ranks: all skip the same update.
            scale, good_steps = next_loss_scale(slots, gradient_finite)
            finite &= scale >= 1
        continues = finite & ~stopped
        stopped.assign(~continues)

    def update() -> None:
        apply_update(weights, slots, gradients, lr, config.optimizer, config.momentum, config.weight_decay)

    tf.cond(continues & gradient_finite, update, lambda: None)
    if LOSS_SCALE in slots:
        tf.cond(continues, lambda: set_loss_scale(slots, scale, good_steps), lambda: None)
    return norm, scale, finite


def _time_after(tensors: List[Any]) -> Any:
    """Returns the time in seconds, float64, at which all `tensors` had been computed."""
    with tf.device("/CPU:0"), tf.control_dependencies(tensors):
        return tf.timestamp()


def step_inputs(config: StepConfig, step: int, low: int, lr: float) -> Tuple[Any, Any, Any]:
    """Returns (position, keys, lr): what a train step takes beside images and labels, for a part that begins at `low`."""
    keys = dropout_keys(config.seed, step, len(DENSE) - 1)
    return _constant(low, tf.int64), tf.constant(keys), _constant(lr, tf.float32)


# Making a tensor takes longer than finding it: the position is the same in every update, the rate in most.
_constant = functools.lru_cache(maxsize=16)(tf.constant)
