"""How each layer's gradient crosses the network."""

from typing import Any, Dict

from hvd_vgg.model import vgg
from hvd_vgg.parallel import comm


def sum_gradients(gradients: Dict[str, Any]) -> Dict[str, Any]:
    """Returns the gradients summed over ranks, by name; for use inside a tf.function on all ranks.

    Dense kernels go alone: each is final long before the convolutions' gradients are, and a large one must neither wait
    for them nor be copied into a common buffer with them.
    """
    kernels = [f"{layer}/kernel" for layer in vgg.DENSE]
    groups = [[name] for name in reversed(kernels)]
    groups.append([name for name in gradients if name not in kernels])
    summed: Dict[str, Any] = {}
    for group in groups:
        message = group[0].replace("/", "_") if len(group) == 1 else "others"
        tensors = comm.sum_gradients([gradients[name] for name in group], f"gradient_{message}")
        summed.update(zip(group, tensors))
    return {name: summed[name] for name in gradients}
