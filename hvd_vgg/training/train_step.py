"""One update: forward and backward pass in micro-batches, exchange of gradients, update of the weights.

With G the global batch and P ranks, rank r computes on its n of the G images, in micro-batches of at most --device_batch:

    loss = sum over its images of the cross-entropy, and d(loss / G) / dw             `make_backward`
    sums over its micro-batches, which leave for the other ranks with the last one    `accumulate`
    gradient of each weight = sum over ranks: exactly that of the mean loss over G    `gradients_of`
    (and the moments of BatchNorm: the mean over its groups of images)
    update, unless the loss of any rank, the gradient or a moment is not finite       `apply_gradients`

So no average of averages occurs, and ranks may hold different numbers of images. Under --reproducible=bits the global batch
is cut into the same micro-batches on any number of ranks, and their gradients are summed in fixed point, without an order.
"""

import functools
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import tensorflow as tf

from hvd_vgg.config import StepConfig
from hvd_vgg.models.batch_norm import updated_moment
from hvd_vgg.parallel import comm, fixed_point
from hvd_vgg.parallel.init import Device
from hvd_vgg.training.average import update_averages
from hvd_vgg.training.backward import Backward, make_backward, step_keys
from hvd_vgg.training.clock import time_after
from hvd_vgg.training.optimizer import (
    GRADIENT_LIMITS,
    LOSS_SCALE,
    apply_update,
    clip_gradients,
    global_norm,
    next_loss_scale,
    set_loss_scale,
)
from hvd_vgg.training.state import State
from hvd_vgg.training.sums import Layout, Sums, exchange_when, exchanged_parts, gradients_of, make_add, make_layout, nothing


class StepMetrics(NamedTuple):
    """What one update amounts to on one rank.

    losses: float32 [micro-batches], each summed over its images. top1, top5: int64, over this rank's images. gradient_norm:
    float32, of the global gradient before clipping. loss_scale: float32, factor of the next update's loss; 1 but for
    --precision=float16. passes: int32, how often it was computed: a second time where a gradient exceeded its limit in fixed
    point. exchange_seconds: float64, from when this rank's gradients were ready until those of all ranks had arrived.
    finite: bool, whether training may continue: every rank's loss is finite and so are gradient and moments, or float16's
    loss scale can still be halved.
    """

    losses: Any
    top1: Any
    top5: Any
    gradient_norm: Any
    loss_scale: Any
    passes: Any
    exchange_seconds: Any
    finite: Any


def make_train_step(
    state: State,
    config: StepConfig,
    device: Device,
    factored: Sequence[str],
    group: comm.Group = comm.WORLD,
    local_sums: Optional[Callable[..., Sums]] = None,
) -> Callable[..., StepMetrics]:
    """Returns the function of one update: (images, labels, position, keys, lr) -> StepMetrics. Collective over the group.

    images: uint8 [n, h, w, 3] and labels: int32 [n], this rank's part of the global batch, which begins at `position` of it
    (int64 scalar); keys: of `step_keys`; lr: float32 scalar. factored: the dense layers whose gradient is
    formed from gathered factors; local_sums: of `make_local_sums`, if that was called before. Only the network is computed
    in --precision: weights, loss, sums and update are float32.

    An update that is not `finite` is not applied, and none is applied after it: whenever that is noticed, the state is that
    before it, on all ranks.
    """
    layout = make_layout(state, factored, config, device.kind, group)
    accumulated = local_sums or make_local_sums(state, config, device, factored, group)
    with tf.device("/CPU:0"):  # control flow is decided on the host
        stopped = tf.Variable(False)

    @tf.function(jit_compile=False, autograph=False)
    def train_step(images: Any, labels: Any, position: Any, keys: Any, lr: Any) -> StepMetrics:
        inputs = images, labels, position, keys
        sums, limits, passes = _within_limits(accumulated, inputs, state.slots.get(GRADIENT_LIMITS))
        seconds = time_after(exchanged_parts(sums)) - sums.ready if comm.size(group) > 1 else sums.ready
        gradients = gradients_of(sums, limits, layout)
        norm, scale, finite = apply_gradients(state, gradients, sums.tally, stopped, lr, config, limits)
        return StepMetrics(sums.losses, sums.top1, sums.top5, norm, scale, passes, seconds, finite)

    return _without_dispatch(train_step)


def make_local_sums(
    state: State, config: StepConfig, device: Device, factored: Sequence[str], group: comm.Group = comm.WORLD
) -> Callable[..., Sums]:
    """Returns the part of `make_train_step` that does not change the state, with the arguments of `accumulate`."""
    layout = make_layout(state, factored, config, device.kind, group)
    return accumulate(make_backward(state, config, device.data_format, factored), layout, device.micro_batches)


def accumulate(backward: Callable[..., Backward], layout: Layout, at_a_time: int) -> Callable[..., Sums]:
    """Returns the function (images, labels, position, keys, limits, send) -> Sums: `backward` over any number of images.

    It goes through micro-batches of at most --device_batch, `at_a_time` of them side by side, all in the same compiled loop.
    limits: of `fixed_point`, int32 [weights + moments], [0] for floats; send: bool scalar, whether what is exchanged is sent
    with the last micro-batch, message by message while that is still being computed. Collective over the group if so.
    """
    device_batch, size = layout.config.device_batch, layout.config.image_size
    signature = [  # of any number of images: a rank's own is no part of what it computes
        tf.TensorSpec([None, size, size, 3], tf.uint8),
        tf.TensorSpec([None], tf.int32),
        tf.TensorSpec([], tf.int64),
        tf.TensorSpec([None], tf.uint64),
        tf.TensorSpec([len(layout.shapes) if layout.integers else 0], tf.int32),
        tf.TensorSpec([], tf.bool),
    ]

    @tf.function(input_signature=signature, jit_compile=False, autograph=False)
    def accumulated(images: Any, labels: Any, position: Any, keys: Any, limits: Any, send: Any) -> Sums:
        count, add = tf.shape(images)[0], make_add(layout, limits)
        last = (count - 1) // device_batch

        def add_micro_batch(number: Any, sums: Sums) -> Any:
            low = number * device_batch
            high = tf.minimum(low + device_batch, count)
            part = backward(images[low:high], labels[low:high], position + tf.cast(low, tf.int64), keys)
            return number + 1, exchange_when(send & tf.equal(number, last), add(sums, part), limits, layout)

        start = (tf.constant(0), nothing(layout))
        shapes = tf.nest.map_structure(lambda tensor: tf.TensorShape([size or None for size in tensor.shape]), start)
        _, sums = tf.while_loop(
            lambda number, _: number <= last, add_micro_batch, start, shapes, parallel_iterations=at_a_time
        )
        return sums

    return accumulated


def _within_limits(local_sums: Any, inputs: Sequence[Any], limits: Any) -> Tuple[Sums, Any, Any]:
    """Returns the sums of all ranks in which no gradient exceeds its limit, these limits, and the passes it took, mostly 1.

    inputs: the first of `accumulate`'s; limits: int32 [weights + moments], None where sums are in floats, which have none.
    """
    if limits is None:
        return local_sums(*inputs, tf.zeros([0], tf.int32), tf.constant(True)), None, tf.constant(1)

    def attempt(passes: Any, _: Any, limits: Any, __: Any) -> Any:
        sums = local_sums(*inputs, limits, tf.constant(True))
        with tf.control_dependencies(exchanged_parts(sums)), tf.device("/CPU:0"):  # before any is sent again
            tally = tf.identity(sums.tally[:, :-1])
            raised = tf.where(fixed_point.exceeded(tally), fixed_point.next_limits(limits, tally), limits)
        return passes + 1, limits, raised, sums

    # A loop rather than a branch: the graph has the network once. It begins with sums of nothing.
    specs = local_sums.get_concrete_function().structured_outputs
    empty = tf.nest.map_structure(lambda spec: tf.zeros([0, *spec.shape[1:]][: spec.shape.rank], spec.dtype), specs)
    start = [tf.constant(0), tf.zeros_like(limits), tf.identity(limits), empty]
    any_length = tf.nest.map_structure(lambda tensor: tf.TensorShape([None, *tensor.shape[1:]][: tensor.shape.rank]), start)
    passes, used, _, sums = tf.while_loop(
        lambda passes, used, needed, _: tf.reduce_any(used != needed), attempt, start, any_length, parallel_iterations=1
    )
    return tf.nest.map_structure(lambda tensor, spec: tf.ensure_shape(tensor, spec.shape), sums, specs), used, passes


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


def apply_gradients(
    state: State,
    gradients: Dict[str, Any],
    tally: Any,
    stopped: Any,
    lr: Any,
    config: StepConfig,
    limits: Any = None,
) -> Tuple[Any, Any, Any]:
    """Updates the state, in a tf.function; returns (gradient norm, loss scale, finite) as in StepMetrics.

    gradients: of `gradients_of`; tally: as in Sums, of all ranks; stopped: a bool variable, set by the first update that is
    not finite, after which none is applied; limits: those that the gradients were summed in, if any.
    """
    weights, moments, slots, averages = state.weights, state.moments, state.slots, state.averages
    norm = global_norm([gradients[name] for name in weights])
    # A variance overflows before anything else does: outputs divided by it are 0, and so finite.
    sound = tf.reduce_all(tf.math.is_finite(tf.concat([gradients[name] for name in moments], 0))) if moments else True
    with tf.device("/CPU:0"):
        finite, gradient_finite = fixed_point.is_finite(tally)[-1] & sound, tf.math.is_finite(norm)
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
        apply_update(weights, slots, clip_gradients(gradients, norm, config.clip_norm), lr, config)
        for name, moment in moments.items():
            moment.assign(updated_moment(moment, gradients[name]))
        if averages:
            update_averages(averages, state.trained(), config.ema_decay)
        if limits is not None:
            slots[GRADIENT_LIMITS].assign(fixed_point.next_limits(limits, tally[:, :-1]))

    tf.cond(continues & gradient_finite, update, lambda: None)
    if LOSS_SCALE in slots:
        tf.cond(continues, lambda: set_loss_scale(slots, scale, good_steps), lambda: None)
    return norm, scale, finite


def step_inputs(config: StepConfig, step: int, low: int, lr: float) -> Tuple[Any, Any, Any]:
    """Returns (position, keys, lr): what a train step takes beside images and labels, for a part that begins at `low`."""
    return _constant(low, tf.int64), tf.constant(step_keys(config, step)), _constant(lr, tf.float32)


# Making a tensor takes longer than finding it: the position is the same in every update, the rate in most.
_constant = functools.lru_cache(maxsize=16)(tf.constant)
