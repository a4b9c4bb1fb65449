"""How each layer's gradient crosses the network: sums of products, or gathered factors.

All functions are for use inside a tf.function, on all ranks, outside of gradient tapes. Every message has a name and a
static shape, so that Horovod negotiates it once and finds it in its response cache afterwards.
"""

from typing import Any, Dict, List, Tuple

import tensorflow as tf

from hvd_vgg.models.architecture import DENSE
from hvd_vgg.parallel import comm

# A larger gradient is sent in parts: messages are sent one at a time, and a convolution's gradient that becomes ready
# behind fc1's 411 MB would wait for all of it.
CHUNK_BYTES = 32 * 2**20


def sum_gradients(
    gradients: Dict[str, Any], wire_dtype: str, scale: float, group: comm.Group = comm.WORLD
) -> Dict[str, Any]:
    """Returns the gradients summed over ranks, by name.

    Each block of convolutions is a message, so that the last blocks' travel while the first ones' are being computed; each
    dense kernel is one or several of its own, and dense biases are one.
    scale: what float16 on the wire is multiplied by, so that a mean over the global batch does not vanish in it.
    """
    messages: Dict[str, List[str]] = {}
    for name in gradients:
        layer, kind = name.split("/")
        message = layer.split("_")[0] if layer not in DENSE else f"{layer}_kernel" if kind == "kernel" else "dense_biases"
        messages.setdefault(message, []).append(name)
    summed: Dict[str, Any] = {}
    for message, names in messages.items():
        tensors = [_to_wire(gradients[name], wire_dtype, scale) for name in names]
        if len(names) == 1 and tensors[0].shape.rank == 2:
            sums = [_sum_in_chunks(tensors[0], f"gradient_{message}", group)]
        else:
            sums = comm.sum_gradients(tensors, f"gradient_{message}", group)
        summed.update(zip(names, (_from_wire(tensor, wire_dtype, scale) for tensor in sums)))
    return {name: summed[name] for name in gradients}


def _sum_in_chunks(kernel: Any, name: str, group: comm.Group) -> Any:
    rows = kernel.shape[0]
    count = -(-rows * kernel.shape[1] * kernel.dtype.size // CHUNK_BYTES)
    if count == 1 or comm.size(group) == 1:
        return comm.sum_gradients([kernel], name, group)[0]
    sizes = [rows // count + (part < rows % count) for part in range(count)]
    parts = tf.split(kernel, sizes)
    return tf.concat([comm.sum_gradients([part], f"{name}_{i}", group)[0] for i, part in enumerate(parts)], 0)


def gather_factors(
    layer: str,
    inputs: Any,
    outputs: Any,
    global_batch: int,
    wire_dtype: str,
    scale: float,
    group: comm.Group = comm.WORLD,
) -> Tuple[Any, Any]:
    """Returns the rows of all ranks of a dense layer's inputs [G, K] and of its output gradients [G, N].

    inputs: this rank's rows [n, K] of the layer's inputs; outputs: of its output gradients [n, N]; ranks may hold different
    numbers of rows. The inputs are sent as soon as they are there, which is in the forward pass.
    """
    x = comm.gather_rows(_to_wire(inputs, wire_dtype, 1.0), f"inputs_{layer}", global_batch, group)
    d = comm.gather_rows(_to_wire(outputs, wire_dtype, scale), f"outputs_{layer}", global_batch, group)
    return _from_wire(x, wire_dtype, 1.0), _from_wire(d, wire_dtype, scale)


def product(layer: str, x: Any, d: Any) -> Dict[str, Any]:
    """Returns the gradient of a dense layer's kernel and bias over the global batch, by name, from `gather_factors`."""
    return {f"{layer}/kernel": tf.matmul(x, d, transpose_a=True), f"{layer}/bias": tf.reduce_sum(d, 0)}


def _to_wire(tensor: Any, wire_dtype: str, scale: float) -> Any:
    return tensor if wire_dtype == "float32" else tf.cast(tensor * scale, wire_dtype)


def _from_wire(tensor: Any, wire_dtype: str, scale: float) -> Any:
    return tensor if wire_dtype == "float32" else tf.cast(tensor, tf.float32) * (1 / scale)
