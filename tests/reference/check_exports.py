"""Exports networks of full width in every form, and runs each by its own library, in environments of their own.

    python tests/reference/check_exports.py --data_dir=DIR --torch=PYTHON --keras=PYTHON --onnxruntime=PYTHON [--images=N]
        [--image_size=32] [--models=vgg16_bn,vgg19]

Each PYTHON is the interpreter of an environment with torch and torchvision, with Keras 3 (and tf_keras, which is Keras 2),
or with onnxruntime. The networks have random weights of torchvision's shapes and moments, and 1000 classes; the images
are the validation records of --data_dir. Prints what `hvd-vgg export` prints: the largest relative difference of logits of
each. The exit code is 1 if one is above 1e-4, or was not checked. Takes up to 2 GB of memory, and of disk in a directory of
its own.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from hvd_vgg.config import TrainConfig, fingerprint
from hvd_vgg.models.architecture import layers_of
from hvd_vgg.run_dir import RunDir
from hvd_vgg.training import checkpoint

# Of each network the flags, and the forms to write it in.
CASES = [
    ({"model": "vgg16"}, ["savedmodel", "onnx", "torch", "keras_h5", "safetensors"]),
    ({"model": "vgg16", "pixel_normalization": "caffe", "resize": "pillow"}, ["savedmodel", "keras_h5"]),
    ({"model": "vgg16_bn"}, ["savedmodel", "onnx", "onnx folded", "torch", "keras_h5", "safetensors"]),
    ({"model": "vgg11"}, ["onnx", "torch"]),
    ({"model": "vgg19"}, ["onnx", "torch", "keras_h5"]),
    ({"model": "vgg16_bn", "head": "pooled"}, ["savedmodel", "onnx", "safetensors"]),
]
ENDINGS = {"savedmodel": "", "onnx": ".onnx", "torch": ".safetensors", "keras_h5": ".h5", "safetensors": ".safetensors"}


def write_run(folder, flags):
    """Writes a run's directory with a best checkpoint of random weights, whose activations keep their size."""
    config, random, tensors = TrainConfig(**flags), np.random.default_rng(17), {}
    for layer in layers_of(config):
        for name in (*layer.weights, *layer.moments):
            shape = layer.kernel if name.endswith("/kernel") else layer.kernel[-1:]
            scale = 0.1 if len(shape) == 1 else np.float32((2 / np.prod(shape[:-1])) ** 0.5)
            tensors[name] = random.standard_normal(shape, np.float32) * np.float32(scale)
            if name.endswith(("/gamma", "/moving_variance")):
                tensors[name] = random.uniform(0.5, 2, shape).astype(np.float32)
    meta = {"step": 1, "run": fingerprint(config), "eval_crop": config.eval_crop}
    checkpoint.save(RunDir(folder), tensors, meta, 1, [checkpoint.BEST])


def main():
    """Runs all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True)
    for name in ("torch", "keras", "onnxruntime"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--models", default="", help="of the cases, those of these models, separated by commas")
    options = parser.parse_args()
    pythons = {"torch": options.torch, "keras_h5": options.keras, "onnx": options.onnxruntime}
    bad = 0
    for flags, forms in CASES:
        if options.models and flags["model"] not in options.models.split(","):
            continue
        with tempfile.TemporaryDirectory(prefix="check_exports.") as folder:
            write_run(Path(folder) / "run", {**flags, "image_size": options.image_size})
            for form in forms:
                to, *folded = form.split()
                out = Path(folder) / f"{form.replace(' ', '_')}{ENDINGS[to]}"
                command = [sys.executable, "-m", "hvd_vgg", "export", f"{folder}/run", f"--to={to}", f"--out={out}"]
                command += [f"--data_dir={options.data_dir}", f"--check_images={options.images}"]
                command += ["--fold_batch_norm"] * len(folded) + [f"--check_python={pythons.get(to)}"] * (to in pythons)
                ended = subprocess.run(command, capture_output=True, text=True, check=False)
                lines = [line.strip() for line in ended.stdout.splitlines() if "relative" in line or "signature" in line]
                bad += bool(ended.returncode or not lines)
                print(" ".join(f"{name}={value}" for name, value in flags.items()), f"--to={form}", flush=True)
                for line in lines or [ended.stdout + ended.stderr]:
                    print(f"    {line}", flush=True)
                for path in [out, *out.rglob("*")] if out.exists() else []:
                    if path.is_file():
                        path.unlink()  # a gigabyte each
    sys.exit(int(bad > 0))


if __name__ == "__main__":
    main()
