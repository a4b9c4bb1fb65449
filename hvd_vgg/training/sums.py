"""What micro-batches add up to, on one rank and over all."""

from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import tensorflow as tf

from hvd_vgg.config import BITS, StepConfig
from hvd_vgg.parallel import comm, exchange, fixed_point
from hvd_vgg.training.backward import Backward, summed_names
from hvd_vgg.training.clock import time_after
from hvd_vgg.training.state import State


class Sums(NamedTuple):
    """Some micro-batches of one rank, in order; once they have been exchanged, the last four are those of all ranks.

    losses: float32 [micro-batches], each summed over its images; top1, top5: int64, hits; magnitudes: float32
    [micro-batches, weights + moments + 1], the largest of the gradient of each weight, of each moment and of the loss (of
    the loss alone where sums are in floats); ready: when all were computed, in seconds, float64. tally: `fixed_point.tally`
    of the magnitudes, zeros before the exchange; totals: the sum of each message, [elements]; inputs [rows, K],
    output_gradients [rows, N]: of each factored layer.
    """

    losses: Any
    top1: Any
    top5: Any
    magnitudes: Any
    ready: Any
    tally: Any
    totals: List[Any]
    inputs: List[Any]
    output_gradients: List[Any]


class Layout(NamedTuple):
    """How gradients and moments are summed. shapes: of the weights and moments that are trained, by name; integers: type of
    sums in fixed point, None for floats.
    """

    shapes: Dict[str, Any]
    factored: Sequence[str]
    messages: List[exchange.Message]
    integers: Optional[Any]
    config: StepConfig
    group: comm.Group


def make_layout(state: State, factored: Sequence[str], config: StepConfig, device: str, group: comm.Group) -> Layout:
    """Returns the layout for what is summed of `state`, on a device of kind `device`, CPU or GPU."""
    shapes = {name: variable.shape for name, variable in state.trained().items()}
    # TensorFlow adds 32-bit integers on the host, even those of a GPU.
    integers = None if config.reproducible != BITS else tf.int64 if device == "GPU" else tf.int32
    messages = exchange.messages({name: shapes[name] for name in summed_names(shapes, factored)})
    return Layout(shapes, factored, messages, integers, config, group)


def nothing(layout: Layout) -> Sums:
    """Returns the sums of no micro-batch."""
    dtype, width = layout.integers or tf.float32, 1 + (len(layout.shapes) if layout.integers else 0)
    wide = tf.int64 if layout.integers else tf.float32
    types = [wide if message.name == exchange.MOMENTS else dtype for message in layout.messages]
    totals = [tf.zeros([sum(message.sizes)], each) for message, each in zip(layout.messages, types)]
    inputs, outputs = ([tf.zeros([0, layout.shapes[f"{name}/kernel"][side]]) for name in layout.factored] for side in (0, 1))
    hits, ready = tf.constant(0, tf.int64), tf.constant(0.0, tf.float64)
    magnitudes, tally = tf.zeros([0, width]), tf.zeros([3, width], tf.int64)
    return Sums(tf.zeros([0]), hits, hits, magnitudes, ready, tally, totals, inputs, outputs)


def make_add(layout: Layout, limits: Any) -> Callable[[Sums, Backward], Sums]:
    """Returns the function that adds a micro-batch to sums.

    limits: of `fixed_point`, int32 [weights + moments], [0] for floats.
    """
    scales = []
    if layout.integers:
        of = dict(zip(layout.shapes, tf.unstack(fixed_point.scales(limits))))
        scales = [
            fixed_point.spread([of[part.weight] for part in message.parts], message.sizes) for message in layout.messages
        ]

    def add(sums: Sums, part: Backward) -> Sums:
        gradients = dict(zip(summed_names(layout.shapes, layout.factored), part.gradients))
        packed = [exchange.pack(message, gradients) for message in layout.messages]
        measured = [part.loss]
        if layout.integers:
            packed = [
                fixed_point.encode_wide(values, scale)
                if message.name == exchange.MOMENTS
                else fixed_point.encode(values, scale, layout.integers)
                for message, values, scale in zip(layout.messages, packed, scales)
            ]
            measured = [gradients.get(name, tf.constant(0.0)) for name in layout.shapes] + measured
        totals = [total + values for total, values in zip(sums.totals, packed)]
        magnitudes = tf.concat([sums.magnitudes, [fixed_point.magnitudes(measured)]], 0)
        inputs = [tf.concat(rows, 0) for rows in zip(sums.inputs, part.inputs)]
        outputs = [tf.concat(rows, 0) for rows in zip(sums.output_gradients, part.output_gradients)]
        losses = tf.concat([sums.losses, [part.loss]], 0)
        hits = sums.top1 + part.top1, sums.top5 + part.top5
        return Sums(losses, *hits, magnitudes, sums.ready, sums.tally, totals, inputs, outputs)

    return add


def exchange_when(leaves: Any, sums: Sums, limits: Any, layout: Layout) -> Sums:
    """Returns the sums of all ranks if `leaves`, bool scalar, else `sums`. Collective over the layout's group if so.

    Each message is sent as soon as what it holds has been computed. limits: of `make_add`.
    """
    config, group = layout.config, layout.group
    wire, scale, rows = config.wire_dtype, float(config.global_batch), config.global_batch

    def when(exchanged: Callable[[Any], Any], tensor: Any) -> Any:
        return tf.cond(leaves, lambda: exchanged(tensor), lambda: tensor)

    def total(message: exchange.Message) -> Callable[[Any], Any]:
        dtype = ("int64" if layout.integers else "float32") if message.name == exchange.MOMENTS else wire
        return lambda packed: exchange.sum_message(packed, message.name, dtype, scale, group)

    def factor(name: str, scale: float) -> Callable[[Any], Any]:
        return lambda mine: exchange.gather_rows(mine, name, rows, wire, scale, group)

    def tally(_: Any) -> Any:
        of_loss = tf.constant(fixed_point.limits_of(0, 1))
        return comm.sum_tensor(fixed_point.tally(sums.magnitudes, tf.concat([limits, of_loss], 0)), "tally", group)

    def ready(before: Any) -> Any:
        return time_after([sums.magnitudes, *exchanged_parts(sums)]) if comm.size(group) > 1 else before

    with tf.device("/CPU:0"):
        told, at = when(tally, sums.tally), when(ready, sums.ready)
    return sums._replace(
        ready=at,
        tally=told,
        totals=[when(total(message), packed) for message, packed in zip(layout.messages, sums.totals)],
        inputs=[when(factor(f"inputs_{name}", 1.0), mine) for name, mine in zip(layout.factored, sums.inputs)],
        output_gradients=[
            when(factor(f"outputs_{name}", scale), mine) for name, mine in zip(layout.factored, sums.output_gradients)
        ],
    )


def exchanged_parts(sums: Sums) -> List[Any]:
    """Returns the tensors of which all ranks need those of all."""
    return [sums.tally, *sums.totals, *sums.inputs, *sums.output_gradients]


def gradients_of(sums: Sums, limits: Any, layout: Layout) -> Dict[str, Any]:
    """Returns the gradient of each weight and each moment over the global batch, by name, from the exchanged sums.

    limits: as they had.
    """
    summed = {name: layout.shapes[name] for name in summed_names(layout.shapes, layout.factored)}
    gradients = exchange.unpack(layout.messages, sums.totals, summed)
    if layout.integers:
        inverses = dict(zip(layout.shapes, tf.unstack(fixed_point.inverse_scales(limits, sums.tally[:, :-1]))))
        for name, total in gradients.items():
            decode = fixed_point.decode_wide if exchange.is_moment(name) else fixed_point.decode
            gradients[name] = decode(total, inverses[name])
    for name, inputs, outputs in zip(layout.factored, sums.inputs, sums.output_gradients):
        gradients.update(exchange.product(name, inputs, outputs))
    return {name: gradients[name] for name in layout.shapes}
