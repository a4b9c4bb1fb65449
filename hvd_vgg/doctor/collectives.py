"""Whether the ranks' sums and gathers are correct, and how fast: 16 MB always, whole gradients with --collectives.

What is sent are small whole numbers, whose sums are exact in every precision on the wire: each result must equal NumPy's in
every bit. All functions are collective except `assess_*`, `pattern` and `expected_sum`.
"""

import functools
import math
import time
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import tensorflow as tf

from hvd_vgg.config import DENSE, DoctorConfig
from hvd_vgg.data.sampler import part_bounds
from hvd_vgg.doctor.report import Report
from hvd_vgg.models.architecture import Layer, layers_to_train
from hvd_vgg.parallel import comm, cost, exchange
from hvd_vgg.parallel.init import mpi_version, transports
from hvd_vgg.reporting.findings import Finding, failure, ok, warning

# A prime, so that parts that are swapped, or added to their neighbours, differ from what was sent.
_PERIOD = 251
_LATENCY_REPEATS, _REPEATS, _LINK_BYTES, _PAIR_BYTES = 30, 3, 16_000_000, 4_000_000
_COLLECTIVES_SECONDS = 600.0
# Slower by this factor than `plan` assumes, or than other links, is worth a warning.
_SLOWER = 2.0
# Bytes/s per rank below which devices of one host do not exchange directly: 4 lanes of PCI Express 3.0 carry twice this.
_DEVICE_RATE = 2e9


class Exchange(NamedTuple):
    """One kind of exchange: its name, bytes that each rank sent, number of messages, seconds, names of wrong results."""

    name: str
    sent_bytes: float
    messages: int
    seconds: float
    wrong: List[str]


def check_links(report: Report, config: DoctorConfig, device: str, hosts: Sequence[str]) -> None:
    """Adds to the report what a short measurement and --collectives find; hosts: the host name of each rank."""
    latency, gbit = 0.0, None if comm.local_size() == comm.size() else config.gbit
    with report.time_limit("link", "the ranks did not exchange a few MB"):
        carriers = transports(device)  # NCCL, mpi or gloo for `sums` and `gathers`
        report.findings += assess_transports(carriers, device)
        if comm.size() > 1:
            latency, sums = measure_link(device, carriers["sums"])
            report.findings.append(assess_exchange("link", sums, latency, gbit, device))
            report.findings += check_pairs(hosts)
    if config.collectives:
        with report.time_limit("collectives", "--collectives did not end", _COLLECTIVES_SECONDS):
            report.findings += check_collectives(config, device, carriers, latency, gbit)


def measure_link(device: str, carrier: str) -> Tuple[float, Exchange]:
    """Sums a number and 16 MB over all ranks on this rank's device; returns the seconds of the one and all of the other."""
    numbers = _LINK_BYTES // 4
    latency, _ = _measure_sums({"doctor_one/number": (1,)}, "float32", device, _LATENCY_REPEATS)
    seconds, wrong = _measure_sums({"doctor_large/numbers": (numbers,)}, "float32", device, _REPEATS)
    name = f"sums by {carrier}, one number in {latency * 1e3:.2g} ms"
    return latency, Exchange(name, cost.allreduce_bytes(numbers, comm.size(), "float32"), 1, seconds, wrong)


def assess_transports(carriers: Mapping[str, str], device: str) -> List[Finding]:
    """Returns a warning if what ranks exchange is copied from the device to its host and back."""
    copied = [kind for kind, carrier in carriers.items() if "GPU" in device and carrier != "NCCL"]
    text = f"{' and '.join(copied)} of device tensors are not exchanged by NCCL, for which Horovod was not built: unless its"
    # The time is scaled up from the one published record of such a build.
    text += " MPI accepts device memory, they are copied through the host (sums: about 0.85 s per update of VGG16)"
    fix = "use a Horovod built with NCCL (HOROVOD_GPU_OPERATIONS=NCCL), or the vendor's newer wheel"
    return [warning("link", text, fix)] if copied else []


def check_pairs(hosts_of_ranks: Sequence[str]) -> List[Finding]:
    """Has each host and the next send each other 4 MB, one pair at a time.

    A host with a slow link slows down everybody's sums; only pairs show which one it is.
    """
    hosts = list(dict.fromkeys(hosts_of_ranks))
    if len(hosts) == 1:
        return []
    path = "mpi" if mpi_version() else "gloo"
    rates, found = {}, []
    for pair in list(zip(hosts, [*hosts[1:], hosts[0]]))[: 1 if len(hosts) == 2 else None]:
        one, other = (hosts_of_ranks.index(host) for host in pair)
        sendrecv = functools.partial(comm.sendrecv, one, other)
        rates[pair] = _PAIR_BYTES * 8e-9 / min(_seconds(functools.partial(sendrecv, _PAIR_BYTES // 4), _REPEATS))
        sender = {one: [other], other: [one]}.get(comm.rank(), [])
        if not np.array_equal(sendrecv(_PERIOD), np.repeat(np.asarray(sender, np.float32), _PERIOD)):
            text = f"what ranks {one} and {other} send each other by {path} arrives wrong"
            found.append(failure("link", text, "compare the hosts' software; leave one of them out"))
    return [*found, assess_pairs(rates, path)]


def assess_pairs(rates: Mapping[Tuple[str, str], float], path: str) -> Finding:
    """Returns what the rates between pairs of hosts mean, in Gbit/s each way."""
    slowest, fastest = min(rates, key=rates.__getitem__), max(rates, key=rates.__getitem__)
    text = f"between hosts by {path}, from CPU memory, each way {rates[fastest]:.2g} Gbit/s"
    if len(rates) > 1:
        text += f" ({' and '.join(fastest)}) to {rates[slowest]:.2g} ({' and '.join(slowest)})"
    slow = [pair for pair, rate in rates.items() if rate * _SLOWER < rates[fastest]]
    if not slow:
        return ok("link", text)
    shared = set.intersection(*map(set, slow)) if len(slow) > 1 else set()
    text += f"; less than half of the fastest: {', '.join(' and '.join(pair) for pair in slow)}"
    fix = f"check the link of {' and '.join(shared) or 'these hosts'}: cable, port, its rate, other jobs"
    return warning("link", text, fix)


def check_collectives(
    config: DoctorConfig, device: str, carriers: Mapping[str, str], latency_seconds: float, gbit: Optional[float]
) -> List[Finding]:
    """Sums gradients of the network's own shapes in each type that training sends, and gathers rows of its dense layers."""
    if comm.size() == 1:
        return [warning("collectives", "not checked: one rank exchanges nothing", "start all ranks of the job to come")]
    layers = [layer for layer in layers_to_train(config) if layer.trained]
    exchanged = [
        *(sum_all(config, layers, device, carriers["sums"], dtype) for dtype in ("float32", "int32")),
        sum_limits(sum(len(layer.weights) + len(layer.moments) for layer in layers), device, carriers["sums"]),
        gather_all(config, layers, device, carriers["gathers"]),
    ]
    return [assess_exchange("collectives", each, latency_seconds, gbit, device) for each in exchanged]


def sum_all(config: DoctorConfig, layers: Sequence[Layer], device: str, carrier: str, dtype: str) -> Exchange:
    """Sums every gradient of the network; dtype: float32, or int32 as `--reproducible=bits` sends them."""
    names = [(layer, name) for layer in layers for name in layer.weights]
    shapes = {name: layer.kernel if name.endswith("kernel") else layer.kernel[-1:] for layer, name in names}
    wire_dtype = config.wire_dtype if dtype == "float32" else "float32"  # of the same four bytes
    seconds, wrong = _measure_sums(shapes, wire_dtype, device, _REPEATS, dtype)
    sent = sum(cost.allreduce_bytes(layer.parameters, comm.size(), wire_dtype) for layer in layers)
    # An upper bound: layers that share a message are counted separately.
    messages = sum(-(-layer.parameters // exchange.CHUNK_ELEMENTS) for layer in layers)
    kind = wire_dtype if dtype == "float32" else dtype
    return Exchange(f"sums of gradients of {config.model} in {kind} by {carrier}", sent, messages, seconds, wrong)


def sum_limits(tensors: int, device: str, carrier: str) -> Exchange:
    """Sums three int64 for each weight and moment: magnitudes and counts, which `--reproducible=bits` sends first."""
    count, name = 3 * tensors, "doctor_limits"
    with tf.device(device):
        mine = tf.constant(pattern(count, comm.rank()).astype(np.int64))

    def expected(_: str) -> np.ndarray:
        return expected_sum(count, comm.size())

    seconds, wrong = _measure(lambda: {name: comm.sum_tensor(mine, name)}, expected, device, _REPEATS)
    sent = 2 * cost.allreduce_bytes(count, comm.size(), "float32")  # of eight bytes each
    return Exchange(f"sums of {count} numbers in int64 by {carrier}", sent, 1, seconds, wrong)


def gather_all(config: DoctorConfig, layers: Sequence[Layer], device: str, carrier: str) -> Exchange:
    """Gathers the dense layers' rows of the global batch."""
    names = {layer: (f"{layer} inputs", f"{layer} outputs") for layer in DENSE}
    widths = {name: width for layer in layers if layer.name in DENSE for name, width in zip(names[layer.name], layer.kernel)}

    def rows_of(rank: int, name: str) -> np.ndarray:
        low, high = part_bounds(config, rank, comm.size())
        return pattern((high - low) * widths[name], rank).reshape(high - low, widths[name])

    def gather() -> Dict[str, Any]:
        results: Dict[str, Any] = {}
        for name, rows in mine.items():
            message = name.replace(" ", "_")  # TensorFlow's names have no spaces
            results[name] = exchange.gather_rows(rows, message, config.global_batch, config.wire_dtype, 1.0)
        return results

    def expected(name: str) -> np.ndarray:
        return np.concatenate([rows_of(rank, name) for rank in range(comm.size())])

    with tf.device(device):
        mine = {name: tf.constant(rows_of(comm.rank(), name)) for name in widths}
    seconds, wrong = _measure(gather, expected, device, _REPEATS)
    sent = sum(choice.factored_bytes or 0.0 for choice in cost.choose(config, comm.size()))
    return Exchange(f"gathers of rows of its dense layers by {carrier}", sent, len(widths), seconds, wrong)


def _measure_sums(
    shapes: Mapping[str, Tuple[int, ...]], wire_dtype: str, device: str, repeats: int, dtype: str = "float32"
) -> Tuple[float, List[str]]:
    """Returns what `_measure` does of sums of float32 or int32 of these shapes; names are `NAME_OF_MESSAGE/NAME`."""
    with tf.device(device):
        numbers: Dict[str, np.ndarray] = {
            name: pattern(math.prod(shape), comm.rank()).astype(dtype) for name, shape in shapes.items()
        }
        mine = {name: tf.constant(numbers[name], shape=shape) for name, shape in shapes.items()}

    def expected(name: str) -> np.ndarray:
        return expected_sum(math.prod(shapes[name]), comm.size())

    return _measure(lambda: exchange.sum_gradients(mine, wire_dtype, 1.0), expected, device, repeats)


def _measure(
    exchange_all: Callable[[], Dict[str, Any]], expected: Callable[[str], np.ndarray], device: str, repeats: int
) -> Tuple[float, List[str]]:
    """Returns the median seconds of an exchange, compiled for `device`, and the names of results that are wrong.

    Tensors are on the device before and after: the times include no copies from and to the host, except Horovod's own.
    """

    @tf.function
    def compiled() -> Any:
        with tf.device(device):
            results = exchange_all()
            return results, tf.add_n([tf.reshape(value, [-1])[-1] for value in results.values()])

    results: Dict[str, Any] = {}

    def once() -> None:
        results.clear()  # frees the memory for the next results
        new, last = compiled()
        last.numpy()
        results.update(new)

    seconds = float(np.median(_seconds(once, repeats)))
    wrong = [name for name, value in results.items() if not np.array_equal(value.numpy().ravel(), expected(name).ravel())]
    return seconds, wrong


def pattern(count: int, rank: int) -> np.ndarray:
    """Returns what a rank sends: float32 [count], whole numbers from -5 to 5, another sequence on each rank.

    Sums over up to 400 ranks are exact in float16 too.
    """
    period = (np.arange(_PERIOD) * (2 * rank + 3) + rank * rank) % 11 - 5
    return np.resize(period.astype(np.float32), count)


def expected_sum(count: int, ranks: int) -> np.ndarray:
    """Returns NumPy's sum of `pattern` over ranks."""
    return np.resize(np.sum([pattern(_PERIOD, rank) for rank in range(ranks)], axis=0), count)


def _seconds(action: Callable[[], Any], repeats: int) -> List[float]:
    """Returns the slowest rank's seconds of each repeat, after a warm-up; all ranks start together.

    Slow actions are repeated less often: all ranks see the same times, so they stop together.
    """
    seconds: List[float] = []
    while len(seconds) <= repeats and sum(seconds) < 20:
        comm.barrier()
        started = time.monotonic()
        action()
        seconds.append(float(comm.gather_numbers([time.monotonic() - started]).max()))
    return seconds[1:] or seconds


def assess_exchange(about: str, one: Exchange, latency_seconds: float, gbit: Optional[float], device: str) -> Finding:
    """Returns what an exchange's results and time mean, as a finding `about` link or collectives.

    gbit: Gbit/s between hosts as given to `plan`, 0 if unknown, None for a single host. The latency of each message is
    allowed for, although messages may overlap.
    """
    if one.wrong:
        fix = "do not train like this: try another path (NCCL_P2P_DISABLE=1, NCCL_SHM_DISABLE=1, MPI's own)"
        return failure(about, f"{one.name}: wrong: {', '.join(one.wrong)}", fix)
    rate = one.sent_bytes / one.seconds
    text = f"{one.name}: correct; {one.sent_bytes / 1e6:.1f} MB per rank in {one.seconds:.3g} s, {rate / 1e9:.3g} GB/s"
    fix, long = "", one.sent_bytes >= _LINK_BYTES  # the time of shorter messages is mostly latency
    if gbit is None:
        text += "; `plan` neglects traffic inside a host"
        if "GPU" in device and long and rate < _DEVICE_RATE:
            text += ": less than half of what four lanes of PCI Express 3.0 carry"
            fix = "check that devices reach each other: the vendor's topology, NCCL_P2P_DISABLE, NCCL_SHM_DISABLE, staging"
    elif gbit:
        assumed, latency = one.sent_bytes * 8 / (gbit * 1e9), one.messages * latency_seconds
        text += f"; `plan` with --gbit={gbit:g} assumes {assumed:.3g} s; latencies add up to {latency:.2g} s"
        if one.seconds > _SLOWER * assumed + latency:
            fix = "find what is slow: interface, NCCL_NET, staging, processor; or plan with the measured rate"
    if gbit is not None and long:
        text += f"; for `plan`: --gbit={rate * 8 / 1e9:.3g}"
    return warning(about, text, fix) if fix else ok(about, text)
