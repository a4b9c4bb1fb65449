"""The state dict of torchvision's VGG networks: written without torch as safetensors, and by torch itself as .pth."""

from pathlib import Path
from typing import Sequence

from safetensors import SafetensorError
from safetensors.numpy import save_file

from hvd_vgg.config import POOLED
from hvd_vgg.errors import CONFIGURATION, Failure
from hvd_vgg.export.network import Network
from hvd_vgg.weights.torch_names import to_torchvision


def refusal(network: Network) -> str:
    """Returns why torchvision has no such network; "" where it has."""
    return "torchvision's VGG networks have fc1 and fc2, which --head=pooled lacks" if network.config.head == POOLED else ""


def is_torchvisions(network: Network) -> bool:
    """Returns whether torchvision's own functions make a network of these shapes, rather than its class alone."""
    return network.config.width == 1 and network.config.image_size == 224


def write(network: Network, path: Path) -> None:
    """Writes the state as safetensors; raises OSError."""
    try:
        save_file(to_torchvision(network.tensors), str(path), {"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error


def require_written(path: Path, missing: Sequence[str]) -> None:
    """Raises Failure(CONFIGURATION) where there was no torch to write `path`."""
    if not path.exists():
        advice = "--check_python=PYTHON names an interpreter that has torch, and --out=NAME.safetensors needs none"
        raise Failure(CONFIGURATION, f"{path.name} is written by torch, which is missing: {'; '.join(missing)}. {advice}")


def use(network: Network, name: str) -> str:
    """Returns how the file is loaded, Markdown."""
    config = network.config
    load = f'safetensors.torch.load_file("{name}")'
    if not name.endswith(".safetensors"):
        load = f'torch.load("{name}", weights_only=True)'
    make = f"network = torchvision.models.{config.model}(num_classes={config.num_classes})"
    note = ""
    if not is_torchvisions(network):
        make = "network = ...  # torchvision.models.vgg.VGG of these widths, with avgpool and classifier of these shapes"
        note = (
            f"\n\ntorchvision's own `{config.model}()` has width 1 and 224 pixels, this network width {config.width:g} and "
            f"{config.image_size} pixels: make a `torchvision.models.vgg.VGG(make_layers(...))` with `avgpool = "
            f"AdaptiveAvgPool2d({config.image_size // 32})` and linear layers of the shapes in the file."
        )
    return f"```python\n{make}\nnetwork.load_state_dict({load}, strict=True)\n```{note}"
