"""How each layer's gradient crosses the network: sums of products, or gathered factors.

All functions are for use inside a tf.function, on all ranks, outside of gradient tapes. Every message has a name and a
static shape, so that Horovod negotiates it once and finds it in its response cache afterwards.
"""

from typing import Any, Dict, List, Mapping, NamedTuple, Sequence

import tensorflow as tf

from hvd_vgg.config import DENSE
from hvd_vgg.models.architecture import MOVING_MEAN, MOVING_VARIANCE
from hvd_vgg.parallel import comm

# A larger gradient of a dense layer is summed and sent in parts, here of 32 MB: messages are sent one at a time, and what is
# ready behind fc1's 411 MB would wait for all of it.
CHUNK_ELEMENTS = 8 * 2**20
MOMENTS = "moments"  # the message of BatchNorm's, which float16 could not hold


class Part(NamedTuple):
    """The elements [low, high) of the gradient of `weight`, in the order of memory."""

    weight: str
    low: int
    high: int


class Message(NamedTuple):
    """What is summed over ranks in one message."""

    name: str
    parts: List[Part]

    @property
    def sizes(self) -> List[int]:
        """The elements of each part."""
        return [part.high - part.low for part in self.parts]


def messages(shapes: Mapping[str, Any]) -> List[Message]:
    """Returns the messages in which gradients and moments of these static shapes, by name, are summed over ranks.

    Each block of convolutions is one, so that the last blocks' travel while the first ones' are being computed; dense biases
    are one, and so are moments; each dense kernel is as many as its size needs.
    """
    found: Dict[str, List[Part]] = {}
    for name, shape in shapes.items():
        layer, kind = name.split("/")
        size = shape.num_elements()
        if is_moment(name):
            found.setdefault(MOMENTS, []).append(Part(name, 0, size))
            continue
        if layer not in DENSE or kind == "bias":
            found.setdefault(layer.split("_")[0] if layer not in DENSE else "dense_biases", []).append(Part(name, 0, size))
            continue
        count = -(-size // CHUNK_ELEMENTS)
        bounds = [size * number // count for number in range(count + 1)]
        for number, (low, high) in enumerate(zip(bounds, bounds[1:])):
            found[f"{layer}_kernel_{number}"] = [Part(name, low, high)]
    return [Message(name, parts) for name, parts in found.items()]


def is_moment(name: str) -> bool:
    """Returns whether what has this name is a moment of BatchNorm."""
    return name.split("/")[1] in (MOVING_MEAN, MOVING_VARIANCE)


def pack(message: Message, gradients: Mapping[str, Any]) -> Any:
    """Returns what of `gradients`, by name, is in a message: [elements]."""
    flat = [tf.reshape(gradients[part.weight], [-1]) for part in message.parts]
    if len(flat) > 1:
        return tf.concat(flat, 0)
    low, high = message.parts[0][1:]
    return flat[0][low:high]  # the others are whole


def unpack(messages: Sequence[Message], packed: Sequence[Any], shapes: Mapping[str, Any]) -> Dict[str, Any]:
    """Returns the gradients of these static shapes, by name, that `pack` has put into messages."""
    parts: Dict[str, List[Any]] = {name: [] for name in shapes}
    for message, elements in zip(messages, packed):
        for part, piece in zip(message.parts, tf.split(elements, message.sizes)):
            parts[part.weight].append(piece)
    whole = {name: pieces[0] if len(pieces) == 1 else tf.concat(pieces, 0) for name, pieces in parts.items()}
    return {name: tf.reshape(gradient, shapes[name]) for name, gradient in whole.items()}


def sum_message(packed: Any, name: str, wire_dtype: str, scale: float, group: comm.Group = comm.WORLD) -> Any:
    """Returns the sums over ranks of `packed`, [elements], float32 or integers that 32 bits can hold, or 64.

    wire_dtype: of integers int64, else they are sent as int32; scale: what float16 on the wire is multiplied by, so that a
    mean over the global batch does not vanish in it.
    """
    name = f"gradient_{name}"
    if packed.dtype.is_integer:
        sent = tf.int64 if wire_dtype == "int64" else tf.int32
        return tf.cast(comm.sum_tensor(tf.cast(packed, sent), name, group), packed.dtype)
    return _from_wire(comm.sum_tensor(_to_wire(packed, wire_dtype, scale), name, group), wire_dtype, scale)


def sum_gradients(
    gradients: Dict[str, Any], wire_dtype: str, scale: float, group: comm.Group = comm.WORLD
) -> Dict[str, Any]:
    """Returns gradients summed over ranks, by name, in the messages and with the `scale` of training."""
    shapes = {name: gradient.shape for name, gradient in gradients.items()}
    sent = messages(shapes)
    summed = [sum_message(pack(message, gradients), message.name, wire_dtype, scale, group) for message in sent]
    return unpack(sent, summed, shapes)


def gather_rows(
    rows: Any, name: str, global_batch: int, wire_dtype: str, scale: float, group: comm.Group = comm.WORLD
) -> Any:
    """Returns the rows [G, width] of all ranks, in order of rank: a factor of a dense layer's gradient.

    rows: this rank's [n, width]; ranks may hold different numbers of them. scale: as for `sum_message`.
    """
    gathered = comm.gather_rows(_to_wire(rows, wire_dtype, scale), name, global_batch, group)
    return _from_wire(gathered, wire_dtype, scale)


def product(layer: str, x: Any, d: Any) -> Dict[str, Any]:
    """Returns the gradient of a dense layer's kernel and bias over the global batch, by name.

    x: the layer's inputs, float32 [G, K]; d: its output gradients [G, N].
    """
    return {f"{layer}/kernel": tf.matmul(x, d, transpose_a=True), f"{layer}/bias": tf.reduce_sum(d, 0)}


def _to_wire(tensor: Any, wire_dtype: str, scale: float) -> Any:
    return tensor if wire_dtype == "float32" else tf.cast(tensor * scale, wire_dtype)


def _from_wire(tensor: Any, wire_dtype: str, scale: float) -> Any:
    return tensor if wire_dtype == "float32" else tf.cast(tensor, tf.float32) * (1 / scale)
