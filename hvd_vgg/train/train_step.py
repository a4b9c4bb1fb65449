"""The compiled functions of training and evaluation: the only tf.functions, the only gradients."""

import math
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple

import tensorflow as tf

from hvd_vgg.config import ComputeConfig, StepConfig
from hvd_vgg.models import vgg
from hvd_vgg.models.architecture import DENSE
from hvd_vgg.parallel import exchange
from hvd_vgg.seeds import dropout_keys
from hvd_vgg.train.optimizer import LOSS_SCALE, Slots, apply_update, next_loss_scale, set_loss_scale

_NAN_FLAG = "block1/loss_mark"
_PHILOX = 1  # tf.random.Algorithm.PHILOX, as an attribute of the raw operation


class StepMetrics(NamedTuple):
    """Sums over samples of one rank: `loss` float32, hits int64. Of the global gradient: `gradient_norm`, float32.

    `loss_scale`, float32: what the next update's loss is multiplied by; 1 but for --precision=float16.
    `exchange_seconds`, float64: from when this rank's gradients and rows were ready until those of all ranks were there.
    `sound`, bool: every rank's loss is finite and so is the gradient, or float16's scale can still be halved.
    """

    loss: Any
    top1: Any
    top5: Any
    gradient_norm: Any
    loss_scale: Any
    exchange_seconds: Any
    sound: Any


# What stands for a step whose records are skipped.
SKIPPED_STEP = StepMetrics(0.0, 0, 0, 0.0, 1.0, 0.0, True)


class FiniteReport(NamedTuple):
    """What of one pass over n images is finite, bool: `weights` [weights], the `outputs` of each layer for each image
    [layers, n], each image's loss [n], the `gradients` of the sum of losses [weights].
    """

    weights: Any
    outputs: Any
    losses: Any
    gradients: Any


def make_train_step(
    weights: vgg.Weights, slots: Slots, config: StepConfig, data_format: str, factored: Sequence[str]
) -> Callable[..., StepMetrics]:
    """Returns the function of one update, called by all ranks: (images, labels, position, keys, lr) -> Sums.

    images uint8 [n, h, w, 3] and labels int32 [n]: this rank's part of the global batch, which begins at `position` of it
    (int64 scalar); keys: `order.dropout_keys`, uint64 [2]; lr: float32 scalar. Gradients are sums over samples divided by
    the global batch, summed over ranks; those of the dense layers `factored` are formed from gathered rows. Only the
    network is computed in --precision: weights, loss, sums over micro-batches and ranks, and the update are float32.

    An update that is not `sound` is not applied, and none is applied after it: whenever that is noticed, weights and slots
    are those before it, on all ranks.
    """
    loss_scale = slots.get(LOSS_SCALE)
    with tf.device("/CPU:0"):  # where it is decided what is computed next
        stopped = tf.Variable(False)
    summed = [name for name in weights if name.split("/")[0] not in factored]

    def sums_and_rows(images: Any, labels: Any, kept: List[Any]) -> Tuple[List[Any], List[Any]]:
        """Returns (loss, hits and summed gradients), (inputs and output gradients of each factored layer)."""
        inputs: Dict[str, Any] = {}
        # Nothing is added to a layer's outputs, but the gradient of this nothing is the outputs'.
        count = tf.shape(images)[0]
        probes = {name: tf.zeros([count, weights[f"{name}/bias"].shape[0]], config.precision) for name in factored}

        def dropout(x: Any, layer: int) -> Any:
            return apply_dropout(x, kept[layer], config.dropout)

        def dense(x: Any, name: str) -> Any:
            inputs[name] = x
            outputs = vgg.dense(low, x, name)
            return outputs + probes[name] if name in probes else outputs

        with tf.GradientTape(watch_accessed_variables=False) as tape:
            sources = [weights[name] for name in summed] + list(probes.values())
            tape.watch(sources)
            low = vgg.in_precision(weights, config.precision)
            normalized = vgg.normalized(images, config.precision)
            logits = vgg.logits(low, config.model, normalized, data_format, dropout if config.dropout else None, dense)
            loss = tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
            objective = loss / config.global_batch * (1.0 if loss_scale is None else loss_scale)
        gradients = [tf.cast(gradient, tf.float32) for gradient in tape.gradient(objective, sources)]
        if loss_scale is not None:
            gradients = [gradient * (1 / loss_scale) for gradient in gradients]
        sums = [loss, top_k_correct(logits, labels, 1), top_k_correct(logits, labels, 5), *gradients[: len(summed)]]
        return sums, [tf.cast(inputs[name], tf.float32) for name in factored] + gradients[len(summed) :]

    compiled = tf.function(sums_and_rows, jit_compile=True) if config.xla else sums_and_rows

    def one_pass(images: Any, labels: Any, position: Any, keys: Any) -> Tuple[List[Any], List[Any]]:
        # What to drop is drawn outside of what XLA compiles: its generator puts the same numbers in another order.
        return compiled(images, labels, _dropout_masks(weights, config, images, position, keys))

    def in_micro_batches(images: Any, labels: Any, position: Any, keys: Any) -> Tuple[List[Any], List[Any]]:
        count, held = images.shape[0], config.device_batch
        if count <= held:
            return one_pass(images, labels, position, keys)

        def body(low: Any, total: List[Any], rows: List[Any]) -> Any:
            high = tf.minimum(low + held, count)
            at = position + tf.cast(low, tf.int64)
            sums, new_rows = one_pass(images[low:high], labels[low:high], at, keys)
            rows = [array.write(low // held, row) for array, row in zip(rows, new_rows)]
            return high, [a + b for a, b in zip(total, sums)], rows

        zeros = [tf.constant(0.0), tf.constant(0, tf.int64), tf.constant(0, tf.int64)]
        zeros += [tf.zeros_like(weights[name]) for name in summed]
        widths = [weights[f"{name}/kernel"].shape[side] for side in (0, 1) for name in factored]
        rows = [
            tf.TensorArray(tf.float32, -(-count // held), infer_shape=False, element_shape=[None, width]) for width in widths
        ]
        # One at a time: micro-batches exist because only one fits.
        start = [tf.constant(0), zeros, rows]
        _, total, rows = tf.while_loop(lambda low, *_: low < count, body, start, parallel_iterations=1)
        return total, [tf.ensure_shape(array.concat(), [count, width]) for array, width in zip(rows, widths)]

    @tf.function(jit_compile=False)
    def train_step(images: Any, labels: Any, position: Any, keys: Any, lr: Any) -> StepMetrics:
        (loss, top1, top5, *parts), rows = in_micro_batches(images, labels, position, keys)
        ready = _clock_after(parts + rows)
        wire = (config.wire_dtype, float(config.global_batch))
        # A loss may be infinite where its gradient is finite: the logit of the label alone is -Inf. Beside the first block's
        # gradients, the last to be sent, goes a number that is 0, or NaN if this rank's loss is not finite.
        own_mark = tf.where(tf.math.is_finite(loss), 0.0, math.nan)
        gradients = exchange.sum_gradients({**dict(zip(summed, parts)), _NAN_FLAG: own_mark}, *wire)
        mark = gradients.pop(_NAN_FLAG)
        factors = {
            name: exchange.gather_factors(name, inputs, outputs, config.global_batch, *wire)
            for name, inputs, outputs in zip(factored, rows, rows[len(factored) :])
        }
        received = [factor for pair in factors.values() for factor in pair]
        exchange_seconds = _clock_after([*gradients.values(), *received]) - ready
        for name, pair in factors.items():
            gradients.update(exchange.product(name, *pair))
        norm = tf.sqrt(2.0 * tf.add_n([tf.nn.l2_loss(gradient) for gradient in gradients.values()]))
        with tf.device("/CPU:0"):
            finite, sound = tf.math.is_finite(norm), tf.math.is_finite(mark)
            scale = tf.constant(1.0)
            if loss_scale is None:
                sound &= finite
            else:
                # What overflows in float16 on one rank is infinite in the sum of all ranks: all skip the same update.
                scale, good_steps = next_loss_scale(slots, finite)
                sound &= scale >= 1
            goes_on = sound & ~stopped
            stopped.assign(~goes_on)

        def apply() -> None:
            apply_update(weights, slots, gradients, lr, config.optimizer, config.momentum, config.weight_decay)

        tf.cond(goes_on & finite, apply, lambda: None)
        if loss_scale is not None:
            tf.cond(goes_on, lambda: set_loss_scale(slots, scale, good_steps), lambda: None)
        return StepMetrics(loss, top1, top5, norm, scale, exchange_seconds, sound)

    return train_step


def make_finite_check(
    weights: vgg.Weights, slots: Slots, config: StepConfig, data_format: str
) -> Callable[..., FiniteReport]:
    """Returns the function (images, labels, position, keys) -> Finite: one pass as in training, which changes nothing.

    The arguments are those of a train step, of at most --device_batch images.
    """

    @tf.function(jit_compile=False)
    def look(images: Any, labels: Any, position: Any, keys: Any) -> FiniteReport:
        kept = _dropout_masks(weights, config, images, position, keys)
        outputs: List[Any] = []

        def dropout(x: Any, layer: int) -> Any:
            return apply_dropout(x, kept[layer], config.dropout)

        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(list(weights.values()))
            low, normalized = vgg.in_precision(weights, config.precision), vgg.normalized(images, config.precision)
            logits = vgg.logits(
                low, config.model, normalized, data_format, dropout if config.dropout else None, seen=outputs.append
            )
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            objective = tf.reduce_sum(losses) / config.global_batch * slots.get(LOSS_SCALE, 1.0)
        gradients = tape.gradient(objective, list(weights.values()))
        # Looked at before the ReLU: some kernels that compute a layer and its ReLU at once make 0 of NaN. What is -Inf there
        # is an innocent 0 behind it.
        outputs = [tf.where(tf.math.is_inf(x) & (x < 0), tf.zeros_like(x), x) for x in outputs[:-1]] + outputs[-1:]
        return FiniteReport(
            tf.stack([tf.reduce_all(tf.math.is_finite(weight)) for weight in weights.values()]),
            tf.stack([tf.reduce_all(tf.math.is_finite(x), list(range(1, x.shape.rank))) for x in outputs]),
            tf.math.is_finite(losses),
            tf.stack([tf.reduce_all(tf.math.is_finite(gradient)) for gradient in gradients]),
        )

    return look


def _dropout_masks(weights: vgg.Weights, config: StepConfig, images: Any, position: Any, keys: Any) -> List[Any]:
    """Returns what dropout keeps of the outputs of each hidden dense layer for `images`."""
    return [
        dropout_mask(tf.shape(images)[0], weights[f"{name}/bias"].shape[0], config.dropout, keys[layer], position)
        for layer, name in enumerate(DENSE[:-1] if config.dropout else [])
    ]


def step_inputs(config: StepConfig, step: int, low: int, lr: float) -> Tuple[Any, Any, Any]:
    """Returns (position, keys, lr), what `step` takes beside images and labels where the rank's part begins at `low`."""
    keys = dropout_keys(config.seed, step, len(DENSE) - 1)
    return tf.constant(low, tf.int64), tf.constant(keys), tf.constant(lr, tf.float32)


def _clock_after(tensors: List[Any]) -> Any:
    """Returns the time in seconds, float64, at which all `tensors` were there."""
    with tf.device("/CPU:0"), tf.control_dependencies(tensors):
        return tf.timestamp()


def make_checksums(weights: vgg.Weights) -> Callable[[], Any]:
    """Returns the function () -> int64 [weights]: of each weight, in order, the sum of its bits as integers.

    Exact, whatever the order of summing; equal weights have equal sums, and any one number that differs changes its sum.
    """

    @tf.function(jit_compile=False)
    def checksums() -> Any:
        bits = [tf.cast(tf.bitcast(weight, tf.int32), tf.int64) for weight in weights.values()]
        return tf.stack([tf.reduce_sum(each) for each in bits])

    return checksums


def make_eval_step(weights: vgg.Weights, config: ComputeConfig, data_format: str) -> Callable[..., Any]:
    """Returns the function (images, labels) -> (loss float32, top1, top5, records int64), sums over one batch.

    images uint8 [n, h, w, 3]; labels int32 [n], negative where the row only fills up the batch and counts for nothing.
    """

    @tf.function(jit_compile=False)
    def eval_step(images: Any, labels: Any) -> Any:
        low, normalized = vgg.in_precision(weights, config.precision), vgg.normalized(images, config.precision)
        logits = vgg.logits(low, config.model, normalized, data_format)
        real = labels >= 0
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.maximum(labels, 0), logits)
        loss = tf.reduce_sum(tf.where(real, losses, 0.0))
        records = tf.reduce_sum(tf.cast(real, tf.int64))
        return loss, top_k_correct(logits, labels, 1), top_k_correct(logits, labels, 5), records

    return eval_step


def top_k_correct(logits: Any, labels: Any, k: int) -> Any:
    """Returns how many labels, int64, are among the k largest logits [n, classes]; negative labels never are.

    A tie counts against the label, and so does NaN: a network whose outputs are all equal scores 0, not 1 as with
    tf.math.in_top_k.
    """
    own = tf.gather(logits, tf.maximum(labels, 0), axis=1, batch_dims=1)[:, tf.newaxis]
    lower = tf.reduce_sum(tf.cast(logits < own, tf.int32), axis=1)
    hit = (logits.shape[1] - 1 - lower < k) & (labels >= 0)
    return tf.reduce_sum(tf.cast(hit, tf.int64))


def dropout_mask(rows: Any, units: int, rate: float, key: Any, position: Any) -> Any:
    """Returns which outputs of a layer dropout keeps, bool [rows, units]: each with probability 1 - rate.

    Row i is a function of (key, position + i) alone, whatever batch it is computed in: a row takes its own run of Philox
    counters (Salmon et al., 2011), four numbers each.
    """
    counters = -(-units // 4)
    with tf.device("/CPU:0"):
        counter = tf.stack([tf.cast(position * counters, tf.uint64), tf.constant(0, tf.uint64)])
    draws = tf.raw_ops.StatelessRandomUniformV2(
        shape=[rows, counters * 4], key=tf.reshape(key, [1]), counter=counter, alg=_PHILOX
    )
    return draws[:, :units] >= rate


def apply_dropout(x: Any, kept: Any, rate: float) -> Any:
    """Returns x [n, units] where `kept`, scaled by 1 / (1 - rate), and 0 elsewhere."""
    return tf.where(kept, x * (1 / (1 - rate)), tf.zeros_like(x))
