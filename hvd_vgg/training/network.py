"""A network with weights from a file or a run, the same on all ranks, for evaluation and prediction."""

from pathlib import Path
from typing import Callable, Iterable, NamedTuple, Tuple

from hvd_vgg.config import ScoringConfig
from hvd_vgg.data.formats.layout import shorten
from hvd_vgg.models.vgg import Weights
from hvd_vgg.parallel import comm
from hvd_vgg.parallel.consensus import run_on_root
from hvd_vgg.training.checkpoint import Checkpoint
from hvd_vgg.training.state import assign_variables, initial_network
from hvd_vgg.training.weights import read_weights
from hvd_vgg.weights.source import Source


class Loaded(NamedTuple):
    """What was loaded: its kind, such as `checkpoint of step 7`, and lines about it, both for people."""

    kind: str
    text: str


def load_network(config: ScoringConfig, path: str, average: bool) -> Tuple[Weights, Loaded]:
    """Returns the variables of the network of `config`, by name, as `read_weights` finds them, and what it has found.

    Rank 0 alone reads. Collective; raises a collective Failure(CONFIGURATION).
    """
    source = run_on_root(lambda: read_weights(Path(path), average))
    network = make_network(config, lambda _: Checkpoint(source.path, source.tensors, {}))
    of = "the average of weights, " * average
    kind, lines = comm.broadcast_json([f"{of}{source.kind}", _describe(config, source)] if source else None)
    return network, Loaded(kind, lines)


def _describe(config: ScoringConfig, source: Source) -> str:
    network = f"{config.model} at width {config.width:g}, {config.num_classes} classes"
    pixels = f"{config.evaluated_size} pixels, --pixel_normalization={config.pixel_normalization}, --resize={config.resize}"
    unused = f"\nunused in it: {shorten(source.unused)}" if source.unused else ""
    return f"{source.path}: {source.kind}; {network}, {pixels}; SHA-256 {source.sha256[:16]}{unused}"


def make_network(config: ScoringConfig, read: Callable[[Iterable[str]], Checkpoint]) -> Weights:
    """Returns the variables of the network of `config`, by name, equal on all ranks: what `read` returns on rank 0.

    read: is given their names, and called on rank 0 alone. Collective; raises a collective Failure(CONFIGURATION) where what
    it returns does not fit.
    """
    weights, moments = initial_network(config, seed=0)
    network = {**weights, **moments}
    run_on_root(lambda: assign_variables(network, read(network)))
    comm.broadcast_variables(list(network.values()))
    return network
