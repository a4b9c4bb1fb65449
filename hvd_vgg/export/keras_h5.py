"""The legacy .h5 that keras.applications' VGG16 and VGG19 load in Keras 2 and 3: `VGG16(weights=PATH, classes=N)`."""

from pathlib import Path

from hvd_vgg.config import POOLED
from hvd_vgg.export.network import Network
from hvd_vgg.weights.keras import to_keras_h5

_NETWORKS = {"vgg16": "VGG16", "vgg19": "VGG19"}


def refusal(network: Network) -> str:
    """Returns why Keras has no such network; "" where it has. BatchNorm is folded."""
    config = network.config
    if config.model.split("_")[0] not in _NETWORKS:
        return f"Keras has VGG16 and VGG19, not {config.model}"
    if config.width != 1:
        return f"Keras' VGG16 and VGG19 have width 1, and this network {config.width:g}"
    return "Keras' VGG16 and VGG19 have fc1 and fc2, which --head=pooled lacks" if config.head == POOLED else ""


def write(network: Network, path: Path) -> None:
    """Writes the file, of a network without BatchNorm; raises OSError, Failure(CONFIGURATION) without h5py."""
    to_keras_h5(network.tensors, path)


def use(network: Network, name: str) -> str:
    """Returns how the file is loaded, Markdown, with what the network expects of pixels, which the file cannot say."""
    config = network.config
    size = config.image_size
    shape = "" if size == 224 else f", input_shape=({size}, {size}, 3)"
    make = f'network = keras.applications.{_NETWORKS[config.model]}(weights="{name}", classes={config.num_classes}{shape})'
    if network.normalization == "caffe":
        prepare = f"x = keras.applications.{config.model}.preprocess_input(rgb_pixels)  # float32 from 0 to 255"
        note = ""
    else:
        prepare = "x = ((rgb_pixels / 255 - mean) / deviation)[..., ::-1]  # float32, blue first"
        note = (
            f"\n\nIts pixels are **not** those of `preprocess_input`: they are normalized as `{network.normalization}`, "
            f"below, and then put in the order blue, green, red. The file cannot say so."
        )
    return f"```python\n{make}\n{prepare}\nprobabilities = network.predict(x)\n```{note}"


def warning(network: Network) -> str:
    """Returns what a user of the file must know that it cannot say; "" where there is nothing."""
    if network.normalization == "caffe":
        return ""
    return (
        f"the file cannot say what its pixels are: normalized as {network.normalization}, then blue, green, red; not those "
        f"of keras.applications' preprocess_input"
    )
