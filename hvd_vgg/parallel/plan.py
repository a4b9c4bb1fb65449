"""What exchanging gradients would cost on a cluster: the numbers of `hvd-vgg plan`, which it prints and draws."""

import dataclasses
import math
from typing import Dict, Iterator, List, NamedTuple, Tuple

from hvd_vgg.config import PlanConfig, TrainConfig
from hvd_vgg.flags import format_value
from hvd_vgg.parallel import cost

ASSUMPTIONS = """\
Predictions range from no overlap to full overlap of the exchange with the backward pass. Assumed: computing takes
images / rate, two thirds of it in the backward pass; products of gathered factors add their multiplications; messages take
bytes / bandwidth of a host's link, in one ring through all ranks, those of a host next to each other. Not counted: traffic
within a host, the processor time of sending, stragglers.
"""


class Forecast(NamedTuple):
    """What a method would cost on the ranks planned for: bytes that each rank sends in an update, and the time.

    fps: images/s of all ranks, with no overlap and with full overlap.
    """

    method: str
    sent: float
    predicted: cost.Prediction
    fps: Tuple[float, float]


class Plan(NamedTuple):
    """What was asked and what follows. link_flops_per_byte: that was planned with, given or this cluster's.

    choices: of this exchange, by layer; sweep: the predictions of each method, by its name, on each of `sweep_ranks`.
    """

    config: PlanConfig
    link_flops_per_byte: float
    choices: List[cost.Choice]
    forecasts: List[Forecast]
    advice: List[str]
    sweep_ranks: Tuple[int, ...]
    sweep: Dict[str, List[cost.Prediction]]

    @property
    def hosts(self) -> int:
        """How many hosts the ranks need."""
        return -(-self.config.ranks // self.config.ranks_per_host)

    @property
    def images_per_rank(self) -> float:
        """Images of each rank in an update, which the sweep holds fixed."""
        return self.config.global_batch / self.config.ranks


def make_plan(config: PlanConfig, sweep_ranks: Tuple[int, ...]) -> Plan:
    """Returns the predictions for --ranks, and for each number of `sweep_ranks` at the same images per rank."""
    flops_per_byte = cost.link_flops_per_byte(config, _cluster(config))
    advice = [_exchange_advice(config, flops_per_byte), _saving_advice(config.save_seconds, config.failure_hours)]
    used = config.link_flops_per_byte or flops_per_byte
    asked, config = config, dataclasses.replace(config, link_flops_per_byte=used)
    sweep: Dict[str, List[cost.Prediction]] = {name: [] for name in _methods(config)} if sweep_ranks else {}
    for ranks in sweep_ranks:
        batch = max(ranks, round(config.global_batch / config.ranks * ranks))
        for name, method in _methods(dataclasses.replace(config, ranks=ranks, global_batch=batch)).items():
            sweep[name].append(cost.predict(method, _cluster(method)))
    choices = cost.choose(config, config.ranks)
    return Plan(asked, used, choices, list(_forecasts(config)), list(filter(None, advice)), sweep_ranks, sweep)


def powers_of_two(ranks: int) -> Tuple[int, ...]:
    """Returns 1, 2, 4, ... below `ranks`, and `ranks`: a sweep where none was asked for."""
    return (*(2**power for power in range((ranks - 1).bit_length())), ranks)


def efficiency_range(found: cost.Prediction) -> str:
    """Returns the scaling efficiencies of a prediction, without and with overlap, for people."""
    return f"{found.efficiency_apart:.1%} .. {found.efficiency_overlapped:.1%}"


def _forecasts(config: PlanConfig) -> Iterator[Forecast]:
    for name, method in _methods(config).items():
        found = cost.predict(method, _cluster(method))
        low, high = (config.fps_per_rank * config.ranks * each for each in found[2:])
        yield Forecast(name, cost.sent(cost.choose(method, config.ranks)), found, (low, high))


def _methods(config: PlanConfig) -> Dict[str, PlanConfig]:
    """Returns what to compare, by name: allreduce of everything, and this configuration's exchange with both wire dtypes."""
    flags = {
        "allreduce of everything": ("allreduce", "float32"),
        f"ours ({config.exchange}), float32": (config.exchange, "float32"),
        f"ours ({config.exchange}), float16": (config.exchange, "float16"),
    }
    return {name: dataclasses.replace(config, exchange=each, wire_dtype=dtype) for name, (each, dtype) in flags.items()}


def _cluster(config: PlanConfig) -> cost.Cluster:
    return cost.Cluster(config.ranks, config.ranks_per_host, config.gbit, config.fps_per_rank)


def _exchange_advice(config: PlanConfig, flops_per_byte: float) -> str:
    """Returns which --link_flops_per_byte to train with, where `auto` would choose otherwise without it; else "".

    flops_per_byte: this cluster's.
    """

    def choices(value: float) -> List[List[cost.Choice]]:
        methods = _methods(dataclasses.replace(config, link_flops_per_byte=value)).values()
        return [cost.choose(method, config.ranks) for method in methods]

    other, wanted = config.link_flops_per_byte or TrainConfig.link_flops_per_byte, choices(flops_per_byte)
    if choices(other) == wanted:
        return ""
    rounded = (float(f"{flops_per_byte:.{digits}g}") for digits in range(3, 18))  # 17 digits are exact
    value = next(each for each in rounded if choices(each) == wanted)
    return (
        f"Train with --link_flops_per_byte={format_value(value)}, which is this cluster's: with {format_value(other)} "
        "auto chooses otherwise."
    )


def _saving_advice(save_seconds: float, failure_hours: float) -> str:
    """Returns how often to save; "" where one of the two is unknown.

    With C the cost of a save and M the mean time between failures, saving every T loses about C/T of the time to saves and
    T/2M to updates that are made again. The sum is least at T = sqrt(2CM), where it is sqrt(2C/M): the best to first order,
    for C much less than M (J. W. Young, Communications of the ACM 17(9), 1974).
    """
    if not save_seconds or not failure_hours:
        return ""
    seconds = math.sqrt(2 * save_seconds * 3600 * failure_hours)
    lost = math.sqrt(2 * save_seconds / (3600 * failure_hours))
    return (
        f"Save with --save_every_minutes={format_value(float(f'{seconds / 60:.3g}'))}: sqrt(2 x {save_seconds:g} s a save x "
        f"{failure_hours:g} h between failures), to first order (Young 1974); saves and lost updates take {lost:.1%} then."
    )
