"""How each layer's gradient crosses the network: sums of products, or gathered factors.

All functions are for use inside a tf.function, on all ranks, outside of gradient tapes. Every message has a name and a
static shape, so that Horovod negotiates it once and finds it in its response cache afterwards.
"""

from typing import Any, Dict, List, NamedTuple, Sequence

import tensorflow as tf

from hvd_vgg.models.architecture import DENSE
from hvd_vgg.parallel import comm

# A larger gradient is sent in parts: messages are sent one at a time, and a convolution's gradient that becomes ready
# behind fc1's 411 MB would wait for all of it.
CHUNK_BYTES = 32 * 2**20


class Message(NamedTuple):
    """Gradients that are sent together: `name`, and the names of their weights."""

    name: str
    weights: List[str]


def messages(names: Sequence[str]) -> List[Message]:
    """Returns the messages in which the gradients of the weights `names` are summed over ranks.

    Each block of convolutions is one, so that the last blocks' travel while the first ones' are being computed; each dense
    kernel is one, and dense biases are one.
    """
    found: Dict[str, List[str]] = {}
    for name in names:
        layer, kind = name.split("/")
        message = layer.split("_")[0] if layer not in DENSE else f"{layer}_kernel" if kind == "kernel" else "dense_biases"
        found.setdefault(message, []).append(name)
    return [Message(name, weights) for name, weights in found.items()]


def pack(tensors: Sequence[Any]) -> Any:
    """Returns the elements of `tensors` end to end, [elements]."""
    flat = [tf.reshape(tensor, [-1]) for tensor in tensors]
    return flat[0] if len(flat) == 1 else tf.concat(flat, 0)


def unpack(packed: Any, shapes: Sequence[Any]) -> List[Any]:
    """Returns the tensors of these static shapes that `pack` laid end to end."""
    parts = tf.split(packed, [shape.num_elements() for shape in shapes]) if len(shapes) > 1 else [packed]
    return [tf.reshape(part, shape) for part, shape in zip(parts, shapes)]


def sum_message(packed: Any, name: str, wire_dtype: str, scale: float, group: comm.Group = comm.WORLD) -> Any:
    """Returns the sums over ranks of `packed`, [elements], float32 or integers that 32 bits can hold.

    scale: what float16 on the wire is multiplied by, so that a mean over the global batch does not vanish in it.
    """
    if packed.dtype.is_integer:
        return tf.cast(_sum_in_chunks(tf.cast(packed, tf.int32), f"gradient_{name}", group), packed.dtype)
    return _from_wire(_sum_in_chunks(_to_wire(packed, wire_dtype, scale), f"gradient_{name}", group), wire_dtype, scale)


def _sum_in_chunks(packed: Any, name: str, group: comm.Group) -> Any:
    elements = packed.shape[0]
    count = -(-elements * packed.dtype.size // CHUNK_BYTES)
    if count == 1 or comm.size(group) == 1:
        return comm.sum_tensor(packed, name, group)
    parts = tf.split(packed, [elements // count + (part < elements % count) for part in range(count)])
    return tf.concat([comm.sum_tensor(part, f"{name}_{i}", group) for i, part in enumerate(parts)], 0)


def sum_gradients(
    gradients: Dict[str, Any], wire_dtype: str, scale: float, group: comm.Group = comm.WORLD
) -> Dict[str, Any]:
    """Returns gradients summed over ranks, by name, in the messages and with the `scale` of training."""
    summed: Dict[str, Any] = {}
    for message in messages(list(gradients)):
        tensors = [gradients[name] for name in message.weights]
        packed = sum_message(pack(tensors), message.name, wire_dtype, scale, group)
        summed.update(zip(message.weights, unpack(packed, [tensor.shape for tensor in tensors])))
    return {name: summed[name] for name in gradients}


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
