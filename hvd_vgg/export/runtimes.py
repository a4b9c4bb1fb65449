"""Runs an export by the library that it is for: a program of its own, for any Python that has NumPy and that library.

    python runtimes.py REQUEST.json

It imports nothing of hvd_vgg. REQUEST.json says what to load and where the images lie; logits are left beside it, a file for
each library, and the last line printed is JSON: their names and versions, and the modules that are missing. TensorFlow's own
process never meets Keras or torch in this way.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any, Dict, List

import numpy as np

Request = Dict[str, Any]
_TYPES = {"F32": np.float32, "I64": np.int64}


def normalized(images: Any, request: Request) -> Any:
    """Returns float32 RGB images [n, height, width, 3] of uint8 ones, as a user of the library normalizes them."""
    mean, deviation = (np.array(request[name], np.float32) for name in ("mean", "deviation"))
    return (images.astype(np.float32) / np.float32(255) - mean) / deviation


def run_onnx(images: Any, request: Request, modules: List[Any]) -> Any:
    """Returns the logits by onnxruntime."""
    session = modules[0].InferenceSession(request["path"], providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": images})[0]


def run_torch(images: Any, request: Request, modules: List[Any]) -> Any:
    """Returns the logits by torchvision's network, which has loaded the state strictly."""
    torch, vision = modules
    state = read_state(request["path"], torch)
    network = torchvision_network(torch, vision.models, request, state)
    network.load_state_dict(state, strict=True)
    with torch.no_grad():
        x = torch.from_numpy(np.ascontiguousarray(normalized(images, request).transpose(0, 3, 1, 2)))
        return network.eval()(x).numpy()


def torchvision_network(torch: Any, models: Any, request: Request, state: Dict[str, Any]) -> Any:
    """Returns torchvision's own network, or one of its class where the width or size is another."""
    if request["width"] == 1 and request["image_size"] == 224:
        return getattr(models, request["model"])(num_classes=request["num_classes"])
    table = models.vgg.cfgs[{"vgg11": "A", "vgg13": "B", "vgg16": "D", "vgg19": "E"}[request["model"].split("_")[0]]]
    kernels = {
        int(name.split(".")[1]): value for name, value in state.items() if name.startswith("features.") and value.ndim == 4
    }
    convolutions = iter([kernels[number].shape[0] for number in sorted(kernels)])  # a file need not be in order
    features = models.vgg.make_layers(
        [each if each == "M" else next(convolutions) for each in table], batch_norm=request["model"].endswith("_bn")
    )
    network = models.vgg.VGG(features, init_weights=False)
    network.avgpool = torch.nn.AdaptiveAvgPool2d(request["image_size"] // 32)
    for number in (0, 3, 6):
        outputs, inputs = state[f"classifier.{number}.weight"].shape
        network.classifier[number] = torch.nn.Linear(inputs, outputs)
    return network


def read_state(path: str, torch: Any) -> Dict[str, Any]:
    """Returns the tensors of a .safetensors file, or of a .pth file by torch's own weights-only loading."""
    if not path.endswith(".safetensors"):
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    data = Path(path).read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    header.pop("__metadata__", None)
    state = {}
    for name, entry in header.items():
        low, high = entry["data_offsets"]
        flat = np.frombuffer(data[begin + low : begin + high], _TYPES[entry["dtype"]])
        state[name] = torch.from_numpy(flat.reshape(entry["shape"]).copy())
    return state


def save_torch(_: Any, request: Request, modules: List[Any]) -> None:
    """Writes the state of a .safetensors file by torch.save."""
    modules[0].save(read_state(request["state"], modules[0]), request["path"])


def run_keras(images: Any, request: Request, modules: List[Any]) -> Any:
    """Returns the logits of keras.applications' network, which has loaded the file by weights=PATH."""
    applications, size = modules[0].applications, request["image_size"]
    make = getattr(applications, request["model"].upper())
    shape, classes = (size, size, 3), request["num_classes"]
    network = make(weights=request["path"], classes=classes, input_shape=shape, classifier_activation=None)
    if request["normalization"] == "caffe":
        pixels = getattr(applications, request["model"]).preprocess_input(images.astype(np.float32))
    else:
        pixels = normalized(images, request)[..., ::-1]
    return np.asarray(network.predict(pixels, verbose=0))


# By what is asked for: the ways to do it, each with the modules that it needs.
RUNS: Dict[str, Any] = {
    "onnx": [(run_onnx, ["onnxruntime"])],
    "torch": [(run_torch, ["torch", "torchvision"])],
    "save_torch": [(save_torch, ["torch"])],
    "keras_h5": [(run_keras, ["keras"]), (run_keras, ["tf_keras"])],
}


def main(path: str) -> None:
    """Does what the request at `path` asks for, by each library that is here."""
    # The directory of this file has modules of hvd_vgg.export, which must not take the place of others.
    here = Path(__file__).resolve().parent
    sys.path[:] = [each for each in sys.path if Path(each or ".").resolve() != here]
    request = json.loads(Path(path).read_text(encoding="utf-8"))
    images = np.load(request["images"], allow_pickle=False) if request.get("images") else None
    done: Dict[str, str] = {}
    missing = []
    for number, (action, names) in enumerate(RUNS[request["kind"]]):
        try:
            modules = [importlib.import_module(name) for name in names]
        except ImportError as error:
            missing.append(f"{names[0]} ({error})")
            continue
        label = ", ".join(f"{name} {getattr(module, '__version__', '?')}" for name, module in zip(names, modules))
        logits = action(images, request, modules)
        done[label] = f"{path}.{number}.npy"
        if logits is not None:
            np.save(done[label], logits)
    print(json.dumps({"done": done, "missing": missing}))


if __name__ == "__main__":
    main(sys.argv[1])
