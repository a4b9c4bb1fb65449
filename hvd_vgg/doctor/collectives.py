"""Whether the ranks' sums and gathers are right, and how fast: a quick look always, all of a gradient on request.

What is sent are small whole numbers, whose sums are exact in every precision on the wire: each result is compared with
NumPy's and must be equal. All functions are collective.
"""

import functools
import time
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import tensorflow as tf

from hvd_vgg.config import DoctorConfig
from hvd_vgg.data.sampler import slice_bounds
from hvd_vgg.models.architecture import DENSE, vgg_layers
from hvd_vgg.parallel import comm, cost, exchange
from hvd_vgg.parallel.init import transports
from hvd_vgg.reporting.findings import Finding, failure, ok, warning

# A prime: parts that change places, or are summed with their neighbours, do not look alike.
_PERIOD = 251
_LATENCIES, _REPEATS, _QUICK_BYTES, _PAIR_BYTES = 30, 3, 16_000_000, 4_000_000
# Clocks of hosts this far apart make logs and checkpoints lie.
_CLOCK_SECONDS = 1.0
# How much slower than `plan` assumes, or than other links, is worth a warning.
_SLOWER = 2.0
# Bytes/s a rank below which devices of one host do not exchange directly: PCI Express 3.0 carries twice this by 4 lanes.
_DEVICE_RATE = 2e9
# Shorter messages tell of latencies, not of a link's rate.
_RATE_BYTES = 16_000_000
STAGED = (
    "are not exchanged by NCCL, for which Horovod was not built: unless its MPI takes a device's memory, they are copied "
    "through the host (sums: about 0.85 s an update of VGG16, scaled up from the one published record of such a build)"
)


class Rates(NamedTuple):
    """What a quick look measured, the same on all ranks: seconds of a small sum, bytes/s each sends in a large one."""

    latency_seconds: float
    bytes_per_second: float


class Exchanged(NamedTuple):
    """One exchange: what by what, the bytes that each rank sent, its seconds, and those of its messages' latencies alone."""

    what: str
    sent_bytes: float
    seconds: float
    latency_seconds: float


def check_clocks() -> List[Finding]:
    """Compares this rank's clock with rank 0's, to within the time that a gather takes; nothing on one rank."""
    if comm.size() == 1:
        return []
    apart = []
    for _ in range(5):
        comm.gather_numbers([0.0])  # all leave it at nearly the same time
        apart.append(comm.gather_numbers([time.time()])[:, 0])
    mine = np.array(apart)[:, comm.rank()] - np.array(apart)[:, 0]
    least = float(mine[np.argmin(np.abs(mine))])
    if abs(least) > _CLOCK_SECONDS:
        text = f"the clock is {least:+.0f} s from rank 0's"
        return [warning("clocks", text, "let NTP or chrony set the clocks of all hosts")]
    return [ok("clocks", "within a second of each other")]


def check_link(device: str, gbit: Optional[float]) -> List[Finding]:
    """Sums a number and 16 MB over all ranks on this rank's device: right, and how fast.

    gbit: Gbit/s of a host's link as `plan` is told, None where nobody said.
    """
    carriers = transports(device)
    found, path = check_transports(device, carriers), carriers["sums"]
    if comm.size() == 1:
        return found
    rates, right = measure_rates(device)
    if not right:
        text = f"a sum of {_QUICK_BYTES // 1_000_000} MB over ranks by {path} is wrong"
        return [*found, failure("link", text, "--collectives tells which; compare hosts' software, NCCL_DEBUG=INFO")]
    text = f"by {path} a number is summed in {rates.latency_seconds * 1e3:.2g} ms, 16 MB at"
    text += f" {rates.bytes_per_second / 1e9:.2g} GB/s a rank"
    if gbit and comm.local_size() < comm.size() and rates.bytes_per_second * 8e-9 * _SLOWER < gbit:
        text += f", {rates.bytes_per_second * 8e-9:.2g} Gbit/s where --gbit={gbit:g}"
        return [*found, warning("link", text, "--collectives measures all of a gradient; see interfaces, NCCL_DEBUG=INFO")]
    return [*found, ok("link", text)]


def check_transports(device: str, carriers: Mapping[str, str]) -> List[Finding]:
    """Looks whether what ranks exchange is copied from a device to its host and back; carriers: `comm.carriers` of it."""
    copied = [kind for kind, carrier in carriers.items() if "GPU" in device and carrier != "NCCL"]
    if not copied:
        return []
    fix = "a Horovod with NCCL (HOROVOD_GPU_OPERATIONS=NCCL), or the vendor's newer wheel"
    return [warning("link", f"{' and '.join(copied)} of a device {STAGED}", fix)]


def check_pairs(names: Sequence[str], path: str) -> List[Finding]:
    """Lets each host and the next swap 4 MB, one pair at a time; names: of each rank's host, by rank; path: mpi or gloo.

    A host whose link is slow slows all ranks' sums alike; only pairs tell whose it is.
    """
    hosts = list(dict.fromkeys(names))
    if len(hosts) == 1:
        return []
    pairs = list(zip(hosts, [*hosts[1:], hosts[0]]))[: 1 if len(hosts) == 2 else None]
    rates, found = {}, []
    for pair in pairs:
        one, other = (names.index(host) for host in pair)
        swap = functools.partial(comm.sendrecv, one, other)
        rates[pair] = _PAIR_BYTES * 8e-9 / min(_seconds(functools.partial(swap, _PAIR_BYTES // 4), _REPEATS))
        sender = {one: [other], other: [one]}.get(comm.rank(), [])
        if not np.array_equal(swap(_PERIOD), np.repeat(np.asarray(sender, np.float32), _PERIOD)):
            text = f"what ranks {one} and {other} send each other by {path} comes wrong"
            found.append(failure("link", text, "compare the hosts' software; leave one of them out"))
    return [*found, *assess_pairs(rates, path)]


def assess_pairs(rates: Mapping[Tuple[str, str], float], path: str) -> List[Finding]:
    """Returns what the rates of pairs of hosts mean, Gbit/s each way; path: what carries it."""
    slowest, fastest = min(rates, key=rates.__getitem__), max(rates, key=rates.__getitem__)
    text = f"between hosts by {path}, from memory of the CPU, each way {rates[fastest]:.2g} Gbit/s"
    if len(rates) == 1:
        return [ok("link", text)]
    text += f" ({' and '.join(fastest)}) to {rates[slowest]:.2g} ({' and '.join(slowest)})"
    slow = [pair for pair, rate in rates.items() if rate * _SLOWER < rates[fastest]]
    if not slow:
        return [ok("link", text)]
    both = [host for host in slow[0] if len(slow) > 1 and all(host in pair for pair in slow)]
    text += f"; less than half of the fastest: {', '.join(' and '.join(pair) for pair in slow)}"
    return [
        warning("link", text, f"see the link of {both[0] if both else 'these hosts'}: cable, port, its rate, other jobs")
    ]


def measure_rates(device: str) -> Tuple[Rates, bool]:
    """Returns the rates, and whether the large sum was right on this rank.

    What is sent lies on the device before, and what comes stays there: copies to and from the host are not in the times,
    but for those that Horovod makes itself.
    """
    with tf.device(device):
        small, large = (tf.constant(pattern(number, comm.rank())) for number in (1, _QUICK_BYTES // 4))

    @tf.function
    def summed(value: Any) -> Any:
        with tf.device(device):
            total = comm.sum_gradients([value], f"doctor_{value.shape[0]}")[0]
            return total, total[-1]

    latency = _median_seconds(lambda: summed(small)[1].numpy(), _LATENCIES)
    seconds = _median_seconds(lambda: summed(large)[1].numpy(), _REPEATS)
    right = np.array_equal(summed(large)[0].numpy(), expected_sum(_QUICK_BYTES // 4, comm.size()))
    sent = cost.allreduce_bytes(_QUICK_BYTES // 4, comm.size(), "float32")
    return Rates(latency, sent / seconds), right


def check_collectives(config: DoctorConfig, device: str) -> List[Finding]:
    """Sums gradients of the network's own shapes, and gathers the dense layers' rows, as training does: right, how fast."""
    if comm.size() == 1:
        return [warning("collectives", "one rank exchanges nothing: not looked at", "start all ranks of the job to come")]
    shapes = vgg_layers(config.model, config.width, config.image_size, config.num_classes)
    dense = [layer for layer in shapes if layer.name in DENSE]
    latency, carriers = measure_rates(device)[0].latency_seconds, transports(device)
    gbit = 0.0 if comm.local_size() == comm.size() else config.gbit or None

    seconds, wrong = sum_all(config, device)
    sent = sum(cost.allreduce_bytes(layer.parameters, comm.size(), config.wire_dtype) for layer in shapes)
    # At the most: layers that share one are counted apart.
    messages = sum(-(-layer.parameters * 4 // exchange.CHUNK_BYTES) for layer in shapes)
    what = f"sums of gradients of {config.model} by {carriers['sums']}"
    sums = Exchanged(what, sent, seconds, messages * latency)
    found = [_wrong(what, wrong) if wrong else assess_exchange(sums, gbit, device)]

    seconds, wrong = gather_all(config, device)
    sent = sum(choice.factored_bytes or 0.0 for choice in cost.choose(config, comm.size()))
    what = f"gathers of the rows of its dense layers by {carriers['gathers']}"
    gathers = Exchanged(what, sent, seconds, 2 * len(dense) * latency)
    return [*found, _wrong(what, wrong) if wrong else assess_exchange(gathers, gbit, device)]


def sum_all(config: DoctorConfig, device: str) -> Tuple[float, List[str]]:
    """Returns the median seconds of summing every gradient of the network, and the names of those that came out wrong."""
    shapes: Dict[str, Tuple[int, ...]] = {}
    for layer in vgg_layers(config.model, config.width, config.image_size, config.num_classes):
        shapes[f"{layer.name}/kernel"], shapes[f"{layer.name}/bias"] = layer.kernel, layer.kernel[-1:]
    with tf.device(device):
        mine = {
            name: tf.constant(pattern(int(np.prod(shape)), comm.rank()).reshape(shape)) for name, shape in shapes.items()
        }

    @tf.function
    def summed() -> Any:
        with tf.device(device):
            sums = exchange.sum_gradients(mine, config.wire_dtype, 1.0)
            return sums, tf.add_n([tf.reshape(value, [-1])[-1] for value in sums.values()])

    results: Dict[str, Any] = {}

    def once() -> None:
        results.clear()  # its memory is needed
        sums, last = summed()
        last.numpy()
        results.update(sums)

    seconds = _median_seconds(once, _REPEATS)
    wrong = [
        name
        for name, value in results.items()
        if not np.array_equal(value.numpy().ravel(), expected_sum(int(np.prod(shapes[name])), comm.size()))
    ]
    return seconds, wrong


def gather_all(config: DoctorConfig, device: str) -> Tuple[float, List[str]]:
    """Returns the median seconds of gathering the dense layers' rows of the global batch, and the names of wrong ones."""
    dense = [
        layer
        for layer in vgg_layers(config.model, config.width, config.image_size, config.num_classes)
        if layer.name in DENSE
    ]
    bounds = [slice_bounds(config.global_batch, rank, comm.size()) for rank in range(comm.size())]
    rows = bounds[comm.rank()][1] - bounds[comm.rank()][0]

    def part(rank: int, count_of_rows: int, width: int) -> np.ndarray:
        return pattern(count_of_rows * width, rank).reshape(count_of_rows, width)

    with tf.device(device):
        mine = {layer.name: [tf.constant(part(comm.rank(), rows, width)) for width in layer.kernel] for layer in dense}

    @tf.function
    def gathered() -> Any:
        with tf.device(device):
            pairs = {
                name: exchange.gather_factors(name, x, d, config.global_batch, config.wire_dtype, 1.0)
                for name, (x, d) in mine.items()
            }
            return pairs, tf.add_n([value[-1, -1] for pair in pairs.values() for value in pair])

    results: Dict[str, Any] = {}

    def once() -> None:
        pairs, last = gathered()
        last.numpy()
        results.update(pairs)

    seconds = _median_seconds(once, _REPEATS)
    wrong = []
    for layer in dense:
        for what, width, value in zip(("inputs", "outputs"), layer.kernel, results[layer.name]):
            expected = np.concatenate([part(rank, high - low, width) for rank, (low, high) in enumerate(bounds)])
            if not np.array_equal(value.numpy(), expected):
                wrong.append(f"{layer.name} {what}")
    return seconds, wrong


def pattern(numbers: int, rank: int) -> np.ndarray:
    """Returns what a rank sends: float32 [numbers], whole, -5 to 5, another sequence on each rank.

    Sums over 400 ranks are exact in float16 too.
    """
    period = (np.arange(_PERIOD) * (2 * rank + 3) + rank * rank) % 11 - 5
    return np.resize(period.astype(np.float32), numbers)


def expected_sum(numbers: int, ranks: int) -> np.ndarray:
    """Returns NumPy's sum of `pattern` over ranks."""
    return np.resize(np.sum([pattern(_PERIOD, rank) for rank in range(ranks)], axis=0), numbers)


def _median_seconds(action: Callable[[], Any], repeats: int) -> float:
    return float(np.median(_seconds(action, repeats)))


def _seconds(action: Callable[[], Any], repeats: int) -> List[float]:
    """Returns the slowest rank's seconds of each repeat, all ranks beginning together; once before, to warm up.

    What takes long is not repeated as often: the ranks agree on that by what all know.
    """
    seconds: List[float] = []
    while len(seconds) <= repeats and sum(seconds) < 20:
        comm.barrier()
        began = time.monotonic()
        action()
        seconds.append(float(comm.gather_numbers([time.monotonic() - began]).max()))
    return seconds[1:] or seconds


def assess_exchange(one: Exchanged, gbit: Optional[float], device: str) -> Finding:
    """Returns what a right exchange's time means.

    gbit: of a host's link as `plan` is told, None where nobody said, 0 where all ranks are on one host. Latencies are
    allowed for in full, though messages may overlap.
    """
    rate = one.sent_bytes / one.seconds
    text = f"{one.what}: right; {one.sent_bytes / 1e6:.1f} MB a rank in {one.seconds:.3g} s, {rate / 1e9:.3g} GB/s"
    telling = one.sent_bytes >= _RATE_BYTES
    if gbit == 0:
        text += "; `plan` takes what stays inside a host for nothing"
        if "GPU" in device and telling and rate < _DEVICE_RATE:
            fix = "see whether devices reach each other: the vendor's topology, NCCL_P2P_DISABLE, NCCL_SHM_DISABLE, staging"
            return warning("collectives", f"{text}: less than half of what four lanes of PCI Express 3.0 carry", fix)
        return ok("collectives", text)
    if gbit is None:
        return ok("collectives", f"{text}; for `plan`: --gbit={rate * 8 / 1e9:.3g}" if telling else text)
    assumed = one.sent_bytes * 8 / (gbit * 1e9)
    text += f"; `plan` with --gbit={gbit:g} assumes {assumed:.3g} s, and its messages wait up to {one.latency_seconds:.2g} s"
    if one.seconds <= _SLOWER * assumed + one.latency_seconds:
        return ok("collectives", text)
    fix = "find what is slow: interface, NCCL_NET, staging, processor"
    return warning("collectives", text, fix + (f"; or plan with --gbit={rate * 8 / 1e9:.3g}" if telling else ""))


def _wrong(what: str, names: List[str]) -> Finding:
    fix = "do not train so: try another path (NCCL_P2P_DISABLE=1, NCCL_SHM_DISABLE=1, MPI's own)"
    return failure("collectives", f"{what}: wrong: {', '.join(names)}", fix)
