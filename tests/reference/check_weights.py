"""Compares logits of full-size networks of torchvision, timm and Keras with this package's, of the weights they wrote.

    python tests/reference/check_weights.py images FOLDER DATA_DIR    # where this package is: 64 images to evaluate
    python tests/reference/check_weights.py torch FOLDER              # where torch, torchvision, timm and safetensors are
    python tests/reference/check_weights.py keras FOLDER              # where Keras 3 and tf_keras are
    python tests/reference/check_weights.py compare FOLDER            # where this package is

Names of networks, or of files for the last, may follow. The last prints, by file, the largest difference of a logit,
relative to the largest logit of the original, and whether the weights are the same in every bit after they were written
back. Weights are random; those with BatchNorm are trained for 20 updates, so that their moments are not those of the first
batch. FOLDER takes 4.5 GB.
"""

import gc
import sys
from pathlib import Path

import numpy as np

IMAGES, BATCH = 64, 16
TORCHVISION = ("vgg11", "vgg16", "vgg16_bn", "vgg19")
TIMM = ("vgg16", "vgg16_bn")
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def write_images(folder, data_dir):
    """Writes the first images of a data set's validation split, as they are evaluated, to images.npy."""
    from hvd_vgg.config import DataConfig
    from hvd_vgg.data.formats.layout import find_split
    from hvd_vgg.data.index import join, scan_shard
    from hvd_vgg.data.reader import read_image
    from hvd_vgg.data.transforms import eval_image

    layout, paths = find_split(DataConfig(data_dir=data_dir), "validation")
    index = join(paths, [scan_shard(path, layout) for path in paths], layout)
    images = np.zeros((IMAGES, 224, 224, 3), np.uint8)
    for number, image in enumerate(images):
        eval_image(read_image(index, number)[0], 0.875, "pillow", image)
    np.save(folder / "images.npy", images)


def train(network, images):
    """Trains a network of torch for 20 updates of 8 images of 64 pixels."""
    import torch

    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    network.train()
    for step in range(20):
        part = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(step))[:8]]
        loss = torch.nn.functional.cross_entropy(network(part), torch.arange(8) * 100 + step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def write_torch(folder, *names):
    """Writes NAME.safetensors and NAME.npy, its logits, of each network, or of those that are named."""
    import timm
    import torch
    import torchvision
    from safetensors.torch import save_file

    images = torch.from_numpy(np.load(folder / "images.npy")).permute(0, 3, 1, 2).float() / 255
    mean, deviation = (torch.tensor(each).view(1, 3, 1, 1) for each in (MEAN, DEVIATION))
    images = (images - mean) / deviation
    made = {f"torchvision-{name}": getattr(torchvision.models, name) for name in TORCHVISION}
    made.update({f"timm-{name}": lambda name=name: timm.create_model(name) for name in TIMM})
    for number, (name, make) in enumerate(made.items()):
        if names and name not in names:
            continue
        torch.manual_seed(number)
        network = make()
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.dim() == 1:  # biases are 0 at first
                    parameter.add_(0.1 * torch.randn_like(parameter))
        if name.endswith("_bn"):
            train(network, torch.nn.functional.interpolate(images, size=64, mode="area"))
        with torch.no_grad():
            logits = torch.cat([network.eval()(part) for part in images.split(BATCH)])
        save_file(network.state_dict(), str(folder / f"{name}.safetensors"))
        np.save(folder / f"{name}.npy", logits.numpy())
        print(name, flush=True)


def write_keras(folder, *names):
    """Writes the files and NAME.npy, logits, of each network, or of those that are named: VGG16 by Keras 3, VGG19 by 2."""
    import keras
    import tf_keras

    for library, name, file in ((keras, "VGG16", "keras-VGG16.weights.h5"), (tf_keras, "VGG19", "keras-VGG19.h5")):
        if names and name not in names:
            continue
        library.utils.set_random_seed(1)
        network = getattr(library.applications, name)(weights=None, classifier_activation=None)
        random = np.random.default_rng(1)
        network.set_weights(
            [value if value.ndim > 1 else random.normal(0, 0.1, value.shape) for value in network.get_weights()]
        )
        network.save_weights(folder / file)
        x = library.applications.vgg16.preprocess_input(np.load(folder / "images.npy").astype(np.float32))
        np.save(folder / f"keras-{name}.npy", network.predict(x, batch_size=BATCH, verbose=0))
        print(name, flush=True)


def same_again(path, source):
    """Returns whether weights are the same in every bit after they were written as their library has them."""
    from safetensors import safe_open

    from hvd_vgg.weights.files import read_file
    from hvd_vgg.weights.keras import to_keras_h5
    from hvd_vgg.weights.torch_names import to_torchvision

    if path.suffix == ".h5":
        again = path.with_name("again.h5")
        to_keras_h5(source.tensors, again)
        found = read_file(again).tensors
        again.unlink()
        return all(found[name].tobytes() == tensor.tobytes() for name, tensor in source.tensors.items())
    written = to_torchvision(source.tensors)
    theirs = {"pre_logits.fc1": "classifier.0", "pre_logits.fc2": "classifier.3", "head.fc": "classifier.6"}
    with safe_open(str(path), framework="numpy") as file:
        names = [name for name in file.keys() if not name.endswith("num_batches_tracked")]  # noqa: SIM118 (not a mapping)
        renamed = {name: theirs.get(name.rpartition(".")[0], name.rpartition(".")[0]) for name in names}
        return all(
            file.get_tensor(name).tobytes() == written[f"{renamed[name]}.{name.rpartition('.')[2]}"].tobytes()
            for name in names
        )


def compare(folder, *names):
    """Prints a line for each file, or for those that are named."""
    import tensorflow as tf

    from hvd_vgg.models import vgg
    from hvd_vgg.models.batch_norm import fold
    from hvd_vgg.weights.files import read_file

    images = np.load(folder / "images.npy")
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.h5")]):
        if names and path.name not in names:
            continue
        source = read_file(path)
        weights = fold({name: tf.constant(tensor) for name, tensor in source.tensors.items()})
        flags = source.flags
        parts = [images[first : first + BATCH] for first in range(0, len(images), BATCH)]
        ours = np.concatenate(
            [vgg.logits(weights, flags["model"], part, "NHWC", flags["pixel_normalization"]) for part in parts]
        )
        theirs = np.load(folder / f"{path.name.split('.')[0]}.npy")
        difference, largest = np.abs(ours - theirs).max(), np.abs(theirs).max()
        same = "the same" if same_again(path, source) else "NOT THE SAME"
        print(f"{path.name}: {source.kind}: {len(images)} images, largest difference {difference / largest:.1e} of ", end="")
        print(f"{largest:.3g}; written back {same}", flush=True)
        del weights, source
        gc.collect()


if __name__ == "__main__":
    actions = {"images": write_images, "torch": write_torch, "keras": write_keras, "compare": compare}
    actions[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
