"""Bytes and seconds of each way a gradient can cross the network; what `auto` chooses.

A dense layer's gradient is X^T D over the rows of the global batch, X its inputs [G, K] and D its output gradients [G, N].
Summing the products of P ranks by a ring sends 2 (P-1)/P * K*N numbers from each rank; gathering the factors' rows sends
(P-1)/P * G * (K+N) and gives the same to rounding (sufficient factors: Xie et al., arXiv 1512.06216). Gathering is cheaper
while G < 2 K N / (K + N), whatever P.
"""

from typing import Dict, List, NamedTuple, Optional

from hvd_vgg.config import ExchangeConfig
from hvd_vgg.models.architecture import DENSE, macs_per_image, vgg_layers

BYTES = {"float32": 4, "float16": 2}
_MB = 1e6
# The backward pass takes two of the three thirds of an update: it forms two products for each one of the forward pass.
_BACKWARD = 2 / 3


class Choice(NamedTuple):
    """How one layer's gradient crosses: `method` is allreduce or factored; bytes sent by each rank in an update, each way.

    `factored_bytes` is None for a convolution, whose gradient is no product of two small factors.
    """

    layer: str
    method: str
    allreduce_bytes: float
    factored_bytes: Optional[float]

    @property
    def sent(self) -> float:
        """Bytes that each rank sends in an update by the chosen method."""
        gathered = self.method == "factored" and self.factored_bytes is not None
        return self.factored_bytes if gathered else self.allreduce_bytes  # type: ignore[return-value]


class Link(NamedTuple):
    """What a plan assumes: ranks, ranks on each host, the rate of a host's link, one rank's rate without exchange."""

    ranks: int
    ranks_per_host: int
    gbit: float
    fps_per_rank: float


class Prediction(NamedTuple):
    """Seconds an update takes, and scaling efficiency, when nothing overlaps and when all does."""

    seconds_apart: float
    seconds_overlapped: float
    efficiency_apart: float
    efficiency_overlapped: float


def allreduce_bytes(numbers: int, ranks: int, wire_dtype: str) -> float:
    """Returns the bytes each rank sends to sum `numbers` over ranks by a ring."""
    return 2 * (ranks - 1) / ranks * numbers * BYTES[wire_dtype]


def factored_bytes(inputs: int, outputs: int, global_batch: int, ranks: int, wire_dtype: str) -> float:
    """Returns the bytes each rank sends to gather the rows of a dense layer's two factors."""
    return (ranks - 1) / ranks * global_batch * (inputs + outputs) * BYTES[wire_dtype]


def choose(config: ExchangeConfig, ranks: int) -> List[Choice]:
    """Returns the choice for every layer of the network, in order, for --exchange, --global_batch and --wire_dtype."""
    choices = []
    for layer in vgg_layers(config.model, config.width, config.image_size, config.num_classes):
        summed = allreduce_bytes(layer.parameters, ranks, config.wire_dtype)
        if layer.name not in DENSE:
            choices.append(Choice(layer.name, "allreduce", summed, None))
            continue
        gathered = factored_bytes(layer.kernel[0], layer.kernel[1], config.global_batch, ranks, config.wire_dtype)
        # By numbers, which hold for one rank too: what a run does must not depend on how many there are.
        crossover = 2 * layer.kernel[0] * layer.kernel[1] / (layer.kernel[0] + layer.kernel[1])
        cheaper = "factored" if config.global_batch < crossover else "allreduce"
        choices.append(Choice(layer.name, cheaper if config.exchange == "auto" else config.exchange, summed, gathered))
    return choices


def sent(choices: List[Choice]) -> float:
    """Returns the bytes that each rank sends in an update."""
    return sum(choice.sent for choice in choices)


def table(choices: List[Choice]) -> str:
    """Returns the choices as a table for people, in MB; layers that can only be summed are one row."""
    convolutions = [choice for choice in choices if choice.factored_bytes is None]
    total = sum(choice.allreduce_bytes for choice in choices)
    rows = [f"{'layer':14s} {'allreduce MB':>13s} {'factored MB':>12s}  method"]
    rows.append(f"{'convolutions':14s} {sent(convolutions) / _MB:13.1f} {'-':>12s}  allreduce")
    for choice in choices:
        if choice.factored_bytes is not None:
            summed, gathered = choice.allreduce_bytes / _MB, choice.factored_bytes / _MB
            rows.append(f"{choice.layer:14s} {summed:13.1f} {gathered:12.1f}  {choice.method}")
    rows.append(f"{'all':14s} {total / _MB:13.1f} {'':12s}  {sent(choices) / _MB:.1f} MB as chosen")
    return "\n".join(rows)


def as_log(choices: List[Choice]) -> Dict[str, str]:
    """Returns the choices of dense layers as the run's log holds them: `exchange.fc1: factored, 37.400 MB`."""
    dense = [choice for choice in choices if choice.factored_bytes is not None]
    return {f"exchange.{choice.layer}": f"{choice.method}, {choice.sent / _MB:.3f} MB" for choice in dense}


def predict(config: ExchangeConfig, link: Link) -> Prediction:
    """Returns the time of an update by a model of two lines: computing takes images / rate, sending takes bytes / rate.

    The ring visits the ranks of a host in turn, so that a host's link carries in each direction what one rank sends.
    """
    choices = choose(config, link.ranks)
    own = config.global_batch / link.ranks / link.fps_per_rank
    compute = own * (1 + _extra_compute(config, choices) * (link.ranks - 1))
    hosts = -(-link.ranks // link.ranks_per_host)
    sending = sent(choices) * 8 / (link.gbit * 1e9) if hosts > 1 else 0.0
    apart = compute + sending
    overlapped = compute * (1 - _BACKWARD) + max(compute * _BACKWARD, sending)
    return Prediction(apart, overlapped, own / apart, own / overlapped)


def _extra_compute(config: ExchangeConfig, choices: List[Choice]) -> float:
    """Returns what part of an update's work each other rank adds where gradients are formed from all ranks' rows."""
    of = vgg_layers(config.model, config.width, config.image_size, config.num_classes)
    factored = {choice.layer for choice in choices if choice.method == "factored"}
    again = sum(macs_per_image(layer, config.image_size) for layer in of if layer.name in factored)
    return again / (3 * sum(macs_per_image(layer, config.image_size) for layer in of))
