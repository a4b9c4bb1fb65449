"""Bytes and seconds of each way a gradient can cross the network; what `auto` chooses.

A dense layer's gradient is X^T D over the rows of the global batch, X its inputs [G, K] and D its output gradients [G, N].
Summing the products of P ranks by a ring sends 2 (P-1)/P * K*N numbers from each rank; gathering the factors' rows sends
(P-1)/P * G * (K+N) and gives the same to rounding (Xie et al., arXiv 1512.02728, sufficient factors). Gathering is cheaper
while G < 2 K N / (K + N), whatever P.
"""

from typing import Dict, List, NamedTuple, Optional

from hvd_vgg.model.layers import DENSE, Layer

BYTES = {"float32": 4, "float16": 2}
_MB = 1e6


class Choice(NamedTuple):
    """How one layer's gradient crosses: `way` is allreduce or factored; bytes sent by each rank in an update, each way.

    `factored_bytes` is None for a convolution, whose gradient is no product of two small factors.
    """

    layer: str
    way: str
    allreduce_bytes: float
    factored_bytes: Optional[float]

    @property
    def sent_bytes(self) -> float:
        """Bytes that each rank sends in an update the way chosen."""
        if self.way == "factored" and self.factored_bytes is not None:
            return self.factored_bytes
        return self.allreduce_bytes


def allreduce_bytes(numbers: int, ranks: int, wire_dtype: str) -> float:
    """Returns the bytes each rank sends to sum `numbers` over ranks by a ring."""
    return 2 * (ranks - 1) / ranks * numbers * BYTES[wire_dtype]


def factored_bytes(inputs: int, outputs: int, global_batch: int, ranks: int, wire_dtype: str) -> float:
    """Returns the bytes each rank sends to gather the rows of a dense layer's two factors."""
    return (ranks - 1) / ranks * global_batch * (inputs + outputs) * BYTES[wire_dtype]


def choose(layers: List[Layer], exchange: str, global_batch: int, ranks: int, wire_dtype: str) -> List[Choice]:
    """Returns the choice for every layer, in order.

    exchange: allreduce or factored for all dense layers, or auto: the cheaper in bytes for each.
    """
    choices = []
    for layer in layers:
        summed = allreduce_bytes(layer.parameters, ranks, wire_dtype)
        if layer.name not in DENSE:
            choices.append(Choice(layer.name, "allreduce", summed, None))
            continue
        gathered = factored_bytes(layer.kernel[0], layer.kernel[1], global_batch, ranks, wire_dtype)
        cheaper = "factored" if gathered < summed else "allreduce"
        choices.append(Choice(layer.name, cheaper if exchange == "auto" else exchange, summed, gathered))
    return choices


def sent_bytes(choices: List[Choice]) -> float:
    """Returns the bytes that each rank sends in an update."""
    return sum(choice.sent_bytes for choice in choices)


def table(choices: List[Choice]) -> str:
    """Returns the choices as a table for people, in MB; layers that can only be summed in one row."""
    rows = [f"{'layer':14s} {'allreduce MB':>13s} {'factored MB':>12s}  way"]
    convolutions = [choice for choice in choices if choice.factored_bytes is None]
    rows.append(f"{'convolutions':14s} {sent_bytes(convolutions) / _MB:13.1f} {'-':>12s}  allreduce")
    for choice in choices:
        if choice.factored_bytes is not None:
            summed, gathered = choice.allreduce_bytes / _MB, choice.factored_bytes / _MB
            rows.append(f"{choice.layer:14s} {summed:13.1f} {gathered:12.1f}  {choice.way}")
    total = sum(choice.allreduce_bytes for choice in choices)
    rows.append(f"{'sent a rank':14s} {total / _MB:13.1f} {sent_bytes(choices) / _MB:12.1f}  as chosen")
    return "\n".join(rows)


def as_log(choices: List[Choice]) -> Dict[str, str]:
    """Returns the choices of dense layers as the log and run hold them: `exchange.fc1: factored 37.4 MB`."""
    return {
        f"exchange.{choice.layer}": f"{choice.way} {choice.sent_bytes / _MB:.3f} MB"
        for choice in choices
        if choice.factored_bytes is not None
    }


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


# The backward pass takes two of the three thirds of an update: it forms two products for each one of the forward pass.
_BACKWARD = 2 / 3
# Forming fc1-fc3's gradients from all rows instead of a rank's own costs 0.247 of an update's 92.65 GFLOP an image, for
# each other rank (VGG16 at 224 pixels).
_EXTRA_COMPUTE = 0.2473 / 92.65


def predict(choices: List[Choice], global_batch: int, link: Link) -> Prediction:
    """Returns the time of an update by a model of two lines: computing takes B / fps, sending takes bytes / rate.

    The ring visits the ranks of a host in turn, so that a host's link carries in each direction what one rank sends.
    """
    own = global_batch / link.ranks / link.fps_per_rank
    factored = any(choice.way == "factored" for choice in choices)
    compute = own * (1 + _EXTRA_COMPUTE * (link.ranks - 1) * factored)
    hosts = -(-link.ranks // link.ranks_per_host)
    sending = sent_bytes(choices) * 8 / (link.gbit * 1e9) if hosts > 1 else 0.0
    apart = compute + sending
    overlapped = compute * (1 - _BACKWARD) + max(compute * _BACKWARD, sending)
    return Prediction(apart, overlapped, own / apart, own / overlapped)
