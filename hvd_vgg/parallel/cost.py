"""Bytes and seconds of each method to exchange a gradient, and which one `auto` chooses.

A dense layer's gradient is X^T D over the rows of the global batch, X its inputs [G, K] and D its output gradients [G, N].
A ring allreduce of the products of P ranks sends 2 (P-1)/P * K*N numbers from each rank. An allgather of the factors' rows
sends (P-1)/P * G * (K+N), and the product of the gathered factors is the same gradient to rounding (sufficient factors:
Xie et al., arXiv 1512.06216). That product is over all G rows instead of a rank's own G/P: 2 (P-1)/P * G*K*N FLOPs more.

With w bytes per number (--wire_dtype), b bytes/s of a host's link and f FLOP/s of a rank, and without overlap, they take

    allreduce   (P-1)/P * 2 w K N / b                       seconds
    factored    (P-1)/P * (w G (K+N) / b + 2 G K N / f)     seconds

so that, with beta = f/b FLOPs per byte (--link_flops_per_byte), factored is faster, whatever P, while

    w G (K+N) + 2 G K N / beta < 2 w K N,     that is,      G < 2 w K N / (w (K+N) + 2 K N / beta)

or, where the product costs nothing, while G < 2 K N / (K+N). (The bias adds N numbers to K N.)
"""

import math
from typing import Dict, List, NamedTuple, Optional, Sequence

from hvd_vgg.config import DENSE, ExchangeConfig
from hvd_vgg.models.architecture import Layer, first_trained, layers_to_train, macs_per_image, training_flops

BYTES = {"float32": 4, "float16": 2}
_MB = 1e6


class Choice(NamedTuple):
    """How one layer's gradient is exchanged: `method`, and the bytes that each rank sends in an update by either method.

    method: allreduce or factored. factored_bytes: None for a convolution, whose gradient is not a product of small factors.
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


class Cluster(NamedTuple):
    """A cluster: ranks, ranks per host, bandwidth of a host's link, and images/s of one rank without exchange."""

    ranks: int
    ranks_per_host: int
    gbit: float
    fps_per_rank: float


class Prediction(NamedTuple):
    """Seconds per update and scaling efficiency: with no overlap, and with all of the exchange overlapped."""

    seconds_apart: float
    seconds_overlapped: float
    efficiency_apart: float
    efficiency_overlapped: float


def allreduce_bytes(numbers: int, ranks: int, wire_dtype: str) -> float:
    """Returns the bytes each rank sends in a ring allreduce of `numbers`."""
    return 2 * (ranks - 1) / ranks * numbers * BYTES[wire_dtype]


def factored_bytes(inputs: int, outputs: int, global_batch: int, ranks: int, wire_dtype: str) -> float:
    """Returns the bytes each rank sends in an allgather of the rows of a dense layer's two factors."""
    return (ranks - 1) / ranks * global_batch * (inputs + outputs) * BYTES[wire_dtype]


def choose(config: ExchangeConfig, ranks: int, factored: Optional[Sequence[str]] = None) -> List[Choice]:
    """Returns the choice for every layer that is trained, in order: its method is a function of `config`, whatever `ranks`.

    factored: the layers whose factors are gathered, where that was decided before.
    """
    layers = [layer for layer in layers_to_train(config) if layer.trained]
    if factored is None:
        factored = [layer.name for layer in layers if layer.name in DENSE and _gathers(config, layer)]
    choices = []
    for layer in layers:
        method = "factored" if layer.name in factored else "allreduce"
        gathered = None
        if layer.name in DENSE:
            gathered = factored_bytes(layer.kernel[0], layer.kernel[1], config.global_batch, ranks, config.wire_dtype)
        choices.append(Choice(layer.name, method, allreduce_bytes(layer.parameters, ranks, config.wire_dtype), gathered))
    return choices


def _gathers(config: ExchangeConfig, dense: Layer) -> bool:
    """Returns whether a dense layer's factors are gathered, by the inequality at the head of this module."""
    if config.exchange != "auto":
        return config.exchange == "factored"
    bytes_less = BYTES[config.wire_dtype] * (2 * dense.parameters - config.global_batch * sum(dense.kernel))
    flops_more = 2 * config.global_batch * math.prod(dense.kernel)
    # Without their common factor of (P-1)/P: what a run computes must not depend on P, not even for P = 1.
    return bytes_less * config.link_flops_per_byte > flops_more


def factored_layers(config: ExchangeConfig, ranks: int) -> List[str]:
    """Returns the layers whose gradient is exchanged by gathering factors."""
    return [choice.layer for choice in choose(config, ranks) if choice.method == "factored"]


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
    """Returns the choices of dense layers for the log: `exchange.fc1: factored, 37.400 MB`."""
    dense = [choice for choice in choices if choice.factored_bytes is not None]
    return {f"exchange.{choice.layer}": f"{choice.method}, {choice.sent / _MB:.3f} MB" for choice in dense}


def link_flops_per_byte(config: ExchangeConfig, cluster: Cluster) -> float:
    """Returns the FLOPs that a rank computes, at its rate of training, while its host's link carries one byte."""
    layers = layers_to_train(config)
    return training_flops(layers, config.image_size) * cluster.fps_per_rank / (cluster.gbit * 1e9 / 8)


def predict(config: ExchangeConfig, cluster: Cluster) -> Prediction:
    """Returns the time of an update, in which computing takes images / rate and sending takes bytes / bandwidth.

    The ring visits the ranks of a host in turn, so a host's link carries in each direction what one rank sends.
    """
    choices = choose(config, cluster.ranks)
    own = config.global_batch / cluster.ranks / cluster.fps_per_rank
    compute = own * (1 + _extra_compute(config, choices) * (cluster.ranks - 1))
    hosts = -(-cluster.ranks // cluster.ranks_per_host)
    sending = sent(choices) * 8 / (cluster.gbit * 1e9) if hosts > 1 else 0.0
    apart = compute + sending
    backward = _backward_share(config)
    overlapped = compute * (1 - backward) + max(compute * backward, sending)
    return Prediction(apart, overlapped, own / apart, own / overlapped)


def _backward_share(config: ExchangeConfig) -> float:
    """Returns the share of an update that is its backward pass: two thirds where all layers are trained.

    It computes a product for the weights of each layer that is trained, and one for its inputs from the first of these on,
    where the forward pass computes one.
    """
    layers = layers_to_train(config)
    first = first_trained(layers)
    macs = [macs_per_image(layer, config.image_size) for layer in layers]
    backward = sum(each * (layer.trained + (n >= first)) for n, (each, layer) in enumerate(zip(macs, layers)))
    return backward / (backward + sum(macs))


def _extra_compute(config: ExchangeConfig, choices: List[Choice]) -> float:
    """Returns the work that each further rank adds, as a fraction of an update: products are over the rows of all ranks."""
    layers = layers_to_train(config)
    macs = {layer.name: macs_per_image(layer, config.image_size) for layer in layers}
    flops = 2 * sum(macs[choice.layer] for choice in choices if choice.method == "factored")
    return flops / training_flops(layers, config.image_size)
