"""Writes weights.zip: weights of narrow VGG networks as other libraries write them, and those libraries' logits for images.

Run where torch, torchvision, timm and safetensors are, and again where TensorFlow 2.16, its Keras 3 and tf_keras are; each
renews what it can make: python tests/reference/make_weights.py

Weights are few multiples of powers of two, so that they are exact in 16 bits too, and the archive is small.
"""

import importlib.util
import os
import tempfile
import zipfile
from pathlib import Path

import numpy as np

ARCHIVE = Path(__file__).with_name("weights.zip")
# The tables of VGG11, VGG16 and VGG19 at width 1/16, for 5 classes at 64 pixels.
BLOCKS = {"vgg11": (1, 1, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
CHANNELS, HIDDEN, CLASSES, PIXELS = (4, 8, 16, 32, 32), 256, 5, 64
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def rough(random, shape, deviation):
    """Returns numbers of about a deviation, each one of 15 multiples of a power of two."""
    step = 2.0 ** np.round(np.log2(deviation / 2))
    return (np.clip(np.round(2 * random.normal(size=shape)), -7, 7) * step).astype(np.float32)


def images():
    """Returns uint8 images, NHWC, of noise on coarse squares."""
    random = np.random.default_rng(1)
    coarse = np.kron(random.integers(0, 200, (4, 8, 8, 3)), np.ones((1, 8, 8, 1)))
    return (coarse + random.integers(0, 56, (4, PIXELS, PIXELS, 3))).astype(np.uint8)


def fill_torch(network):
    """Gives a network of torch its weights and moments."""
    import torch

    random = np.random.default_rng(2)
    for name, tensor in network.state_dict().items():
        shape = tuple(tensor.shape)
        if name.endswith("num_batches_tracked"):
            tensor.fill_(7)
            continue
        if len(shape) > 1:
            value = rough(random, shape, (2 / np.prod(shape[1:])) ** 0.5)
        elif name.endswith("running_var"):
            value = 0.5 + np.abs(rough(random, shape, 0.5))
        else:
            norm = name.endswith("weight")
            value = rough(random, shape, 0.1) + np.float32(norm)
        tensor.copy_(torch.from_numpy(value))
    return network.eval()


def torchvision_network(model, norm):
    """Returns torchvision's network, made narrow."""
    import torch
    from torchvision.models import vgg

    table = [each for convs, channels in zip(BLOCKS[model], CHANNELS) for each in (*[channels] * convs, "M")]
    network = vgg.VGG(vgg.make_layers(table, batch_norm=norm), CLASSES, init_weights=False)
    network.avgpool = torch.nn.Identity()
    linear, relu, drop = torch.nn.Linear, torch.nn.ReLU, torch.nn.Dropout
    inputs = CHANNELS[-1] * (PIXELS // 32) ** 2
    layers = (linear(inputs, HIDDEN), relu(), drop(), linear(HIDDEN, HIDDEN), relu(), drop(), linear(HIDDEN, CLASSES))
    network.classifier = torch.nn.Sequential(*layers)
    return fill_torch(network)


def timm_network(model):
    """Returns timm's network with BatchNorm, made narrow."""
    from timm.models import vgg

    table = [each for convs, channels in zip(BLOCKS[model], CHANNELS) for each in (*[channels] * convs, "M")]
    network = vgg.VGG(table, CLASSES, norm_layer=vgg.nn.BatchNorm2d)
    network.pre_logits = vgg.ConvMlp(CHANNELS[-1], HIDDEN, PIXELS // 32)
    network.head = vgg.ClassifierHead(HIDDEN, CLASSES, pool_type="avg")
    return fill_torch(network)


def write_torch(folder):
    """Writes what torchvision and timm make to `folder`."""
    import torch
    from safetensors.torch import save_file

    x = torch.from_numpy(images()).permute(0, 3, 1, 2).double() / 255
    mean, deviation = (torch.tensor(each).double().view(1, 3, 1, 1) for each in (MEAN, DEVIATION))
    plain, norm, timm = torchvision_network("vgg11", False), torchvision_network("vgg16", True), timm_network("vgg11")
    logits = {}
    networks = {"torchvision-vgg11": plain, "torchvision-vgg16_bn": norm, "timm-vgg11_bn": timm}
    for name, network in networks.items():
        save_file(network.state_dict(), str(folder / f"{name}.safetensors"))
    torch.save(plain.state_dict(), folder / "torchvision-vgg11.pth")
    nested = {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in plain.state_dict().items()}}
    torch.save(nested, folder / "torchvision-vgg11-nested.pth", _use_new_zipfile_serialization=False)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        values = {name: value.to(dtype) for name, value in plain.state_dict().items()}
        save_file(values, str(folder / f"torchvision-vgg11-{str(dtype).split('.')[1]}.safetensors"))
    with torch.no_grad():
        for name, network in networks.items():
            logits[name] = network.double()((x - mean) / deviation).numpy().astype(np.float32)
    np.savez(folder / "torch.npz", images=images(), **logits)


def keras_network(keras, model, top=True):
    """Returns the network of keras.applications, made narrow."""
    layers = keras.layers
    x = inputs = layers.Input((PIXELS, PIXELS, 3))
    for block, (convs, channels) in enumerate(zip(BLOCKS[model], CHANNELS), 1):
        for conv in range(1, convs + 1):
            name = f"block{block}_conv{conv}"
            x = layers.Conv2D(channels, (3, 3), activation="relu", padding="same", name=name)(x)
        x = layers.MaxPooling2D((2, 2), strides=(2, 2), name=f"block{block}_pool")(x)
    if top:
        x = layers.Flatten(name="flatten")(x)
        for name in ("fc1", "fc2"):
            x = layers.Dense(HIDDEN, activation="relu", name=name)(x)
        x = layers.Dense(CLASSES, name="predictions")(x)
    network = keras.Model(inputs, x, name=model)
    random = np.random.default_rng(3)
    shapes = [value.shape for value in network.get_weights()]
    network.set_weights(
        [rough(random, shape, (2 / np.prod(shape[:-1])) ** 0.5 if len(shape) > 1 else 0.1) for shape in shapes]
    )
    return network


def write_keras(folder):
    """Writes what Keras 2 and 3 make to `folder`."""
    import h5py
    import keras
    import tf_keras

    logits = {}
    for library, name in ((tf_keras, "keras2-vgg16"), (keras, "keras3-vgg16")):
        network = keras_network(library, "vgg16")
        network.save_weights(folder / f"{name}.weights.h5")
        network.save(folder / f"{name}.keras")
        x = library.applications.vgg16.preprocess_input(images().astype(np.float32))
        logits[name] = np.asarray(network(x))
    network = keras_network(tf_keras, "vgg16")
    network.save_weights(folder / "keras2-vgg16.h5", save_format="h5")
    network.compile("adam", "mse")
    network.save(folder / "keras2-vgg16-whole.h5", save_format="h5")
    network = keras_network(tf_keras, "vgg19", top=False)
    network.save_weights(folder / "keras2-vgg19-notop.h5", save_format="h5")
    # The names of the first files of keras.applications, which Keras 1 wrote.
    with h5py.File(folder / "keras2-vgg16.h5") as new, h5py.File(folder / "keras1-vgg16.h5", "w") as old:
        old.attrs["layer_names"] = new.attrs["layer_names"]
        for layer in new:
            group, names = old.create_group(layer), []
            for part, letter in (("kernel", "W"), ("bias", "b")):
                if f"{layer}/{part}:0" in new[layer]:
                    names.append(f"{layer}_{letter}_1:0")
                    group[names[-1]] = new[layer][f"{layer}/{part}:0"][()]
            group.attrs["weight_names"] = [name.encode() for name in names]
    np.savez(folder / "keras.npz", images=images(), **logits)


def main():
    """Renews the archive."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    made = {"torch": write_torch, "tf_keras": write_keras}
    with tempfile.TemporaryDirectory() as place:
        if ARCHIVE.exists():
            with zipfile.ZipFile(ARCHIVE) as archive:
                archive.extractall(place)
        for library, write in made.items():
            if importlib.util.find_spec(library):
                write(Path(place))
        with zipfile.ZipFile(ARCHIVE, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for path in sorted(Path(place).iterdir()):
                archive.write(path, path.name)
                print(path.name, path.stat().st_size, archive.getinfo(path.name).compress_size)


if __name__ == "__main__":
    main()
