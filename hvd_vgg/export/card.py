"""The model card beside an export, in Markdown: what the network expects, how good it is, and where it comes from."""

import re
from typing import Sequence

from hvd_vgg.export.network import Network
from hvd_vgg.models.pixels import NORMALIZATIONS
from hvd_vgg.provenance import describe_process

_MOST_CLASSES = 1000  # that are listed


def model_card(
    network: Network, trained: str, title: str, use: str, checks: Sequence[str], command: str, files: Sequence[str]
) -> str:
    """Returns the text of the card.

    network: as it is written; trained: the model that it was trained as; use: how the export is loaded, Markdown; checks:
    what it was checked by; command: that made it; files: lines with the names and SHA-256 of what was written.
    """
    config = network.config
    origin = "trained with hvd_vgg" if network.state_sha256 else network.source.kind
    sections = [
        f"# {title}",
        f"{config.model} of {config.num_classes} classes, {origin}."
        + (f" It was trained as {trained}; BatchNorm is folded into the convolutions." if trained != config.model else "")
        + (" The weights are the moving average of the run's." if network.average else ""),
        "## To load it\n\n" + use,
        "## Images\n\n" + pixels_text(network),
        "## Accuracy\n\n" + accuracy_text(network),
        "## Where it comes from\n\n" + _origin(network, command, files),
        "## Checked\n\n" + "\n".join(f"- {check}" for check in checks),
        "## Licence\n\nNot stated: that of the weights is for their owner to say, and may depend on the data.",
        "## Classes\n\n" + _classes(network),
    ]
    return "\n\n".join(sections) + "\n"


def pixels_text(network: Network) -> str:
    """Returns what the network expects of images, Markdown."""
    config = network.config
    mean, deviation = NORMALIZATIONS[network.normalization]
    size = f"{config.image_size} by {config.image_size} pixels"
    filters = {"opencv": "bilinear, not antialiased (OpenCV)", "pillow": "bilinear, antialiased (Pillow)"}
    numbers = [", ".join(f"{value:.7g}" for value in values) for values in (mean, deviation)]
    lines = [f"- {size}, RGB."]
    if network.crop:
        lines.append(
            f"- Evaluated on the central square of {network.crop:g} of the shorter side ({config.image_size} of "
            f"{round(config.image_size / network.crop)} pixels), resized {filters[network.resize]}."
        )
    else:
        lines.append(f"- Evaluated on the whole image, resized {filters[network.resize]}, whatever its proportions.")
    lines.append(
        f"- Normalized as `{network.normalization}`: (value - mean) / deviation of values from 0 to 1; mean {numbers[0]}; "
        f"deviation {numbers[1]}."
    )
    return "\n".join(lines)


def accuracy_text(network: Network) -> str:
    """Returns the run's evaluation of these weights for people."""
    found = network.evaluation()
    if found is None:
        return "Not known: no receipt of a run beside the weights has an evaluation of them."
    flags, records = found.flags, found.records
    counts = f"{found.top1} and {found.top5} of {records} validation records"
    text = f"acc@1 {found.top1 / records:.4f}, acc@5 {found.top5 / records:.4f}: {counts}"
    if flags.get("data_dir"):
        text += f" of {flags['data_dir']}"
    if flags.get("eval_size") not in (None, 0, network.config.image_size):
        text += f", at {flags['eval_size']} pixels"
    if flags.get("eval_flip"):
        text += ", with --eval_flip"
    if flags.get("precision"):
        text += f", with --precision={flags['precision']}"
    return f"{text}, by the run itself."


def _origin(network: Network, command: str, files: Sequence[str]) -> str:
    software = describe_process()
    versions = ", ".join(f"{name} {version}" for name, version in software["packages"].items())
    lines = [
        f"Weights: `{network.source.path.resolve()}` ({network.source.kind}), SHA-256 `{network.source.sha256}`",
        *([f"State of the run: `{network.state_sha256}`"] if network.state_sha256 else []),
        *files,
        f"Command: `{command}`",
        f"Code: hvd_vgg {software['code']['version']}, SHA-256 `{software['code']['sha256']}`",
        f"Versions: {versions}",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _classes(network: Network) -> str:
    if not network.class_names:
        return f"{network.config.num_classes}; their names are not known. Outputs are in order of the labels."
    escaped = [re.sub(r"([\\`*_<>#|])", r"\\\1", name) for name in network.class_names[:_MOST_CLASSES]]
    names = [f"{label}. {name}" for label, name in enumerate(escaped)]
    left = len(network.class_names) - len(names)
    return "In order of the outputs, from 0:\n\n" + "\n".join(names) + (f"\n\nand {left} more." if left else "")
