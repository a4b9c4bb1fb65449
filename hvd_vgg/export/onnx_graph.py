"""ONNX, from the weights alone, by the onnx package's helpers (opset 13).

Input `images`, uint8 [n, height, width, 3] in RGB as decoders return them: the graph normalizes them itself. Outputs
`logits` and `probabilities`, float32 [n, classes].
"""

import json
import sys
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np

from hvd_vgg import __version__
from hvd_vgg.config import BLOCKS, DENSE, POOLED
from hvd_vgg.errors import CONFIGURATION, Failure
from hvd_vgg.export.network import Network
from hvd_vgg.models.architecture import BETA, GAMMA, MOVING_MEAN, MOVING_VARIANCE
from hvd_vgg.models.batch_norm import EPSILON
from hvd_vgg.models.pixels import NORMALIZATIONS

_OPSET, _IR_VERSION = 13, 7  # what onnxruntime 1.8 and later read
_MOST_BYTES = 2**31 - 2**20  # of a protobuf


def refusal(network: Network) -> str:
    """Returns why there can be no ONNX file of a network; "" where there can be one."""
    size = sum(value.nbytes for value in network.tensors.values())
    return f"an ONNX file holds at most 2 GB, and these weights are {size / 1e9:.1f} GB" if size > _MOST_BYTES else ""


def require_onnx() -> Any:
    """Returns the onnx package; raises Failure(CONFIGURATION) with the version to install where it is missing."""
    try:
        import onnx
    except ImportError as error:
        from google.protobuf import __version__ as protobuf

        # The newest that this protobuf and this Python allow; 1.19 would bring an ml_dtypes beside TensorFlow's.
        found = [int(part) for part in protobuf.split(".")[:3]]
        newest = "1.18.0" if found >= [4, 25, 1] and sys.version_info >= (3, 9) else "1.17.0"
        version = newest if found >= [3, 20, 2] else "1.12.0"
        text = f"--to=onnx writes by the onnx package ({error}): pip install --no-deps onnx=={version}"
        raise Failure(CONFIGURATION, f"{text}, the version that fits this environment's protobuf {protobuf}") from error
    return onnx


def write(network: Network, path: Path) -> None:
    """Writes the file; raises OSError, Failure(CONFIGURATION) without the onnx package."""
    onnx = require_onnx()
    nodes, initializers = _graph(network, onnx)
    helper, kind = onnx.helper, onnx.TensorProto
    size, classes = network.config.image_size, network.config.num_classes
    sides: List[Any] = ["height", "width"] if network.config.head == POOLED else [size, size]
    inputs = [helper.make_tensor_value_info("images", kind.UINT8, ["n", *sides, 3])]
    outputs = [helper.make_tensor_value_info(name, kind.FLOAT, ["n", classes]) for name in ("logits", "probabilities")]
    graph = helper.make_graph(nodes, network.config.model, inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", _OPSET)]
    model = helper.make_model(graph, producer_name="hvd_vgg", producer_version=__version__, opset_imports=opsets)
    model.ir_version = _IR_VERSION
    facts = {"weights_sha256": network.source.sha256, "resize": network.resize, "crop": repr(network.crop)}
    if network.class_names:
        facts["class_names"] = json.dumps(network.class_names)
    helper.set_model_props(model, facts)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def _graph(network: Network, onnx: Any) -> Tuple[List[Any], List[Any]]:
    """Returns the nodes in order, and the tensors that they use."""
    tensors: Dict[str, np.ndarray] = {}
    nodes: List[Any] = []

    def add(kind: str, name: str, *inputs: str, **attributes: Any) -> None:
        """Appends a node whose first input is the output of the one before."""
        before = nodes[-1].output[0] if nodes else "images"
        nodes.append(onnx.helper.make_node(kind, [before, *inputs], [name], name, **attributes))

    means, deviations = NORMALIZATIONS[network.normalization]
    scale = np.array([1 / (255 * deviation) for deviation in deviations], np.float32)
    shift = np.array([-mean / deviation for mean, deviation in zip(means, deviations)], np.float32)
    tensors["pixels/scale"], tensors["pixels/shift"] = scale.reshape(1, 3, 1, 1), shift.reshape(1, 3, 1, 1)
    add("Cast", "float", to=onnx.TensorProto.FLOAT)
    add("Transpose", "channels_first", perm=[0, 3, 1, 2])
    add("Mul", "scaled", "pixels/scale")
    add("Add", "normalized", "pixels/shift")
    for block, count in enumerate(BLOCKS[network.config.model], 1):
        for name in (f"block{block}_conv{conv}" for conv in range(1, count + 1)):
            tensors[f"{name}/kernel"] = network.tensors[f"{name}/kernel"].transpose(3, 2, 0, 1)
            tensors[f"{name}/bias"] = network.tensors[f"{name}/bias"]
            add("Conv", name, f"{name}/kernel", f"{name}/bias", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
            if f"{name}/{GAMMA}" in network.tensors:
                parts = [f"{name}/{part}" for part in (GAMMA, BETA, MOVING_MEAN, MOVING_VARIANCE)]
                tensors.update({part: network.tensors[part] for part in parts})
                add("BatchNormalization", f"{name}_norm", *parts, epsilon=EPSILON)
            add("Relu", f"{name}_relu")
        add("MaxPool", f"block{block}_pool", kernel_shape=[2, 2], strides=[2, 2])
    if network.config.head == POOLED:
        add("GlobalAveragePool", "mean")
    add("Flatten", "flat")
    for name in (each for each in DENSE if f"{each}/kernel" in network.tensors):
        kernel = network.tensors[f"{name}/kernel"]
        tensors[f"{name}/kernel"] = _channels_first(kernel, network) if name == DENSE[0] else kernel
        tensors[f"{name}/bias"] = network.tensors[f"{name}/bias"]
        last = name == DENSE[-1]
        add("Gemm", "logits" if last else name, f"{name}/kernel", f"{name}/bias")
        add(*(("Softmax", "probabilities") if last else ("Relu", f"{name}_relu")))
    named = [onnx.numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in tensors.items()]
    return nodes, named


def _channels_first(kernel: np.ndarray, network: Network) -> np.ndarray:
    """Returns fc1's kernel with its rows in order of channel, height, width."""
    side = network.config.image_size // 32
    return kernel.reshape(side, side, -1, kernel.shape[1]).transpose(2, 0, 1, 3).reshape(kernel.shape)


def use(network: Network, name: str) -> str:
    """Returns how the file is loaded, Markdown."""
    sides = "height, width" if network.config.head == POOLED else f"{network.config.image_size}, {network.config.image_size}"
    return (
        "```python\n"
        f'session = onnxruntime.InferenceSession("{name}")\n'
        f'logits, probabilities = session.run(None, {{"images": images}})  # uint8 [n, {sides}, 3], RGB\n'
        "```\n\n"
        "The graph normalizes the pixels itself. Its metadata hold the names of the classes, where known, and the crop."
    )
