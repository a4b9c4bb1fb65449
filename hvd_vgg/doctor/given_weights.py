"""The file or run that a run is to begin with. Needs no TensorFlow."""

from pathlib import Path

from hvd_vgg.config import TrainConfig
from hvd_vgg.errors import Failure
from hvd_vgg.reporting.findings import Finding, failure, ok
from hvd_vgg.training.weights import read_flags


def check_given_weights(config: TrainConfig) -> Finding:
    """Checks that the weights of --init_from can be read, and are of the network to train: by names and shapes alone."""
    try:
        flags = read_flags(Path(config.init_from))
    except Failure as error:
        return failure("weights", error.message, "name a file of weights, or the directory of a run, by --init_from")
    model, width = flags["model"], flags["width"]
    text = f"--init_from={config.init_from} is of {model} at width {width:g}"
    if config.model not in (model, f"{model}_bn"):
        return failure("weights", text, f"train that network, --model={model}, or begin with others")
    if width != config.width:
        return failure("weights", text, f"train that network, --width={width:g}, or begin with others")
    return ok("weights", text)
