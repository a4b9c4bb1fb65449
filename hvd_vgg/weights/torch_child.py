"""Reads a .pth file by torch, in a process of its own: python -m hvd_vgg.weights.torch_child MOST < FILE > SAFETENSORS.

By torch's own loading of nothing but weights, in a process of its own, since torch and TensorFlow in one have libraries in
common. Prints the state dict as safetensors, of at most MOST bytes; with what is wrong instead it ends with exit code 1.
"""

import json
import os
import struct
import sys
from typing import Any, Dict

from hvd_vgg.weights.limits import limit_this_process

_TYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64"}
_MOST_CPU_SECONDS, _MORE_MEMORY = 600, 2**30


def state_of(loaded: Any) -> Dict[str, Any]:
    """Returns the state dict that was loaded, or that is under one of the names that programs keep it by."""
    for name in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = loaded[name]
    if not isinstance(loaded, dict):
        raise ValueError(f"it holds a {type(loaded).__name__}: expected a state dict of tensors by name")
    return loaded


def main() -> None:
    """Reads standard input and writes standard output."""
    most, out = int(sys.argv[1]), sys.stdout.buffer
    try:
        import torch
    except ImportError:
        sys.exit("no torch")
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < (2, 6):
        sys.exit(f"torch {torch.__version__} could be made to run code by a file (CVE-2025-32434): install 2.6 or later")
    # The file's bytes, the tensors, and what one of them is copied to.
    limit_this_process(4 * most + _MORE_MEMORY, _MOST_CPU_SECONDS)
    try:
        with os.fdopen(0, "rb") as file:
            state = state_of(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises of many kinds for a file that is none
        if type(error).__name__ == "UnpicklingError":  # whose text advises to load it all the same
            sys.exit(
                "torch refuses it as weights alone: it is damaged, or holds more than tensors by name, such as a program"
            )
        sys.exit(f"torch says: {' '.join(str(error).split())[:200]}")
    tensors, header, offset = [], {}, 0
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            continue
        size = tensor.numel() * tensor.element_size()
        if size > tensor.untyped_storage().nbytes() or offset + size > most:
            sys.exit("its tensors have more bytes than the file")
        kind = str(tensor.dtype).split(".")[-1]
        header[name] = {
            "dtype": _TYPES.get(kind, kind.replace("_", "")),
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
        tensors.append(tensor)
    text = json.dumps(header).encode()
    out.write(struct.pack("<Q", len(text)) + text)
    for tensor in tensors:
        out.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


if __name__ == "__main__":
    main()
