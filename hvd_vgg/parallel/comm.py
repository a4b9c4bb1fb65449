"""The ranks of a run: who they are, and everything they say to each other. The only importer of horovod and mpi4py.

Every function that communicates must be called by all ranks in the same order. What is said outside the training step
goes through Horovod too, and by the CPU: under `horovodrun --gloo` mpi4py sees a world of one rank.
"""

import ctypes
import hashlib
import json
import os
import re
import socket
import sys
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, TypeVar

import numpy as np
import tensorflow as tf

from hvd_vgg import __version__
from hvd_vgg.data import images
from hvd_vgg.run import advice, hosts, machine, network, output, receipt, watch
from hvd_vgg.run.health import CONFIGURATION, Failure, difference, launched_rank, launched_size

try:
    import horovod.tensorflow as hvd
except ImportError as error:
    raise Failure(
        CONFIGURATION,
        f"Horovod cannot be imported under TensorFlow {tf.__version__} and {sys.executable}: {error}. Make the "
        f'environment with launch/environment.sh, or use this host\'s own (README, "Your own TensorFlow")',
    ) from error

T = TypeVar("T")

# What launchers set for each rank, what only changes what is printed, and what must not be printed.
_NOT_COMPARED = re.compile(
    r"^HOROVOD_(RANK|SIZE|LOCAL_|CROSS_|HOSTNAME|GLOO_|LOG_|TIMELINE)|^TF_CPP_|^TF2_BEHAVIOR|TOKEN|KEY|SECRET|PASS|CRED"
)

# Open MPI 4 sends what follows a large message's first 128 kB over TCP in one piece, and its leave for the other side's
# message waits behind it: both directions of a link are then used one after the other. In pieces of 256 kB an allreduce of
# 64 MB is 1.5 times faster between 2 hosts, 1.6 times between 4 (README, "How gradients cross the network").
_TCP_FRAGMENT_BYTES = 256 * 1024


class Device(NamedTuple):
    """What this rank computes on: `kind` GPU or CPU, the layout, the CPU threads to compute and to decode images with."""

    kind: str
    data_format: str
    threads: int
    input_threads: int


# The ranks that speak to each other: all of them, but for `among`.
_members: Any = hvd.global_process_set
_subsets: Dict[int, Any] = {}
_BUSY = b"busy"  # what ranks inside `among` tell those that wait


def start(
    input_threads: int = 0,
    timeline: bool = False,
    subsets: Sequence[int] = (),
    hang_seconds: float = 0.0,
    precision: str = "float32",
) -> Device:
    """Joins the run and takes this rank's device; the first call of every rank.

    input_threads: 0 for as many as fit; timeline: that one may be asked for; subsets: the numbers of ranks that `among`
    may be asked for; hang_seconds: how long an update may take, 0 for the usual; precision: what will be computed in.

    Raises an agreed Failure(CONFIGURATION) when there are more ranks on a host than devices, or these do not know the
    precision; one that is not agreed where Horovod finds other ranks than the launcher started.
    """
    join(timeline, subsets, hang_seconds)
    return together(lambda: take_device(input_threads, precision))


def join(timeline: bool = False, subsets: Sequence[int] = (), hang_seconds: float = 0.0) -> None:
    """Joins the run as `start` does, without taking a device.

    Raises Failure(CONFIGURATION) where Horovod finds other ranks than the launcher started, could not exchange as it is
    told to, or the host does not know its own name.
    """
    if launched_rank() is None and hvd.gloo_built():
        # Without a launcher there is nothing for MPI to find, and Open MPI may fail to start a world of one.
        os.environ.update(HOROVOD_CONTROLLER="gloo", HOROVOD_CPU_OPERATIONS="gloo")
        if not hosts.leads_here(socket.gethostname()):  # Gloo would abort the process
            raise Failure(
                CONFIGURATION,
                f"this host's name, {socket.gethostname()}, leads to no address of it: add the line "
                f"`127.0.1.1 {socket.gethostname()}` to /etc/hosts",
            )
    elif launched_rank() is not None and advice.gloo_under_mpi(os.environ):
        raise Failure(CONFIGURATION, f"{advice.gloo_under_mpi(os.environ)}: {advice.UNSET_GLOO}")
    if timeline:
        os.environ.setdefault("HOROVOD_TIMELINE", "DYNAMIC")
    # Horovod's own default is to wait for ever. Its inspector names the tensor and the ranks that are missing; the watchdog
    # of `run.watch` ends the job sooner, unless it is itself what hangs.
    longest = watch.LONGER * (hang_seconds or watch.LEAST_SECONDS)
    os.environ.setdefault("HOROVOD_STALL_CHECK_TIME_SECONDS", str(max(1, round(min(60.0, longest / 2 / watch.LONGER)))))
    os.environ.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", str(max(2, round(longest))))
    os.environ.setdefault("OMPI_MCA_btl_tcp_rdma_pipeline_frag_size", str(_TCP_FRAGMENT_BYTES))
    here, texts = network.interfaces(), network.mpi_texts(os.environ)
    os.environ.update(network.without_bridges(os.environ, here, texts, network.routes()))
    hvd.init(process_sets=[_first_ranks(count) for count in subsets if count < (launched_size() or 1)])
    started = launched_size()
    if started is not None and started != size():
        mine, seen = describe(), size()
        hvd.shutdown()  # each may be rank 0 here: who speaks for all is the launcher's to say
        raise Failure(
            CONFIGURATION,
            f"the launcher started {started} processes, but Horovod sees {seen}: each would train alone and write over "
            f"the others. Horovod is {mine['horovod']} and uses {mine['controller']}: start it with the launcher of the "
            f"MPI it was built with, or without MPI by horovodrun --gloo",
        )


def take_device(input_threads: int = 0, precision: str = "float32") -> Device:
    """Makes this rank's device the only one that TensorFlow uses; after `join`, before TensorFlow computes.

    Raises Failure(CONFIGURATION) when there are more ranks on this host than devices, or these do not know the precision.
    """
    threads = machine.share_of_cores(hvd.local_size())
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    # Never fewer than 4, whatever TF_NUM_INTEROP_THREADS says: with 1 or 2 a run of Horovod can wait for ever for a
    # thread to issue a collective that the other ranks are already in.
    tf.config.threading.set_inter_op_parallelism_threads(max(4, threads))
    input_threads = input_threads or threads_for_input(threads)
    devices = tf.config.list_physical_devices("GPU")
    if not devices:
        if not cpu_convolves(precision):
            raise Failure(
                CONFIGURATION,
                f"--precision={precision}: TensorFlow {tf.__version__} cannot convolve in it on a CPU; use float32",
            )
        return Device("CPU", "NHWC", threads, input_threads)
    if hvd.local_size() > len(devices):
        tf.config.set_visible_devices([], "GPU")  # the ranks tell each other by the CPU
        raise Failure(
            CONFIGURATION,
            f"{hvd.local_size()} ranks on this host, but TensorFlow sees {len(devices)} devices "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}): start one rank a device",
        )
    mine = devices[hvd.local_rank()]
    tf.config.set_visible_devices(mine, "GPU")
    tf.config.experimental.set_memory_growth(mine, True)
    return Device("GPU", "NCHW", threads, input_threads)


def cpu_convolves(precision: str) -> bool:
    """Says whether this TensorFlow can compute convolutions in `precision` on a CPU.

    In bfloat16 those of 2.6 come out as float32, or end the process where oneDNN is on; of 2.12 they are right.
    """
    return precision != "bfloat16" or [int(part) for part in re.findall(r"\d+", tf.__version__)[:2]] >= [2, 12]


def threads_for_input(threads: int) -> int:
    """Returns how many of a rank's CPU threads may decode: one is left to Horovod's own where there are more than two."""
    return threads - 1 if threads > 2 else threads


def _first_ranks(count: int) -> Any:
    return _subsets.setdefault(count, hvd.ProcessSet(range(count)))


def among(count: int, action: Callable[[], None]) -> None:
    """Runs `action` on the first `count` ranks, which are all there are inside; all ranks must call.

    The others wait for as long as it takes, if `action` says `still_among` now and then: Horovod takes a rank for lost that
    waits longer than HOROVOD_STALL_SHUTDOWN_TIME_SECONDS. An agreed Failure of `action` is raised on all ranks.
    """
    global _members
    failed: Optional[Failure] = None
    if int(hvd.rank()) < count:
        _members = _first_ranks(count) if count < size() else hvd.global_process_set
        try:
            action()
        except Failure as failure:
            if not failure.agreed:
                raise
            failed = failure
        finally:
            _members = hvd.global_process_set
        told = gather(json.dumps([[failed.code, failed.message]] if failed else []).encode())[0]
    else:
        told = _BUSY
        while told == _BUSY:
            told = gather(b"")[0]
    for code, message in json.loads(told.decode()):
        raise failed or Failure(code, message, agreed=True)


def still_among() -> None:
    """Tells the ranks that wait for those of `among` that these get on; all inside must call, between the same updates."""
    global _members
    inside = _members
    if inside is hvd.global_process_set:
        return
    _members = hvd.global_process_set
    try:
        gather(_BUSY)
    finally:
        _members = inside


def start_timeline(path: str) -> None:
    """Begins Horovod's timeline of all ranks in the file `path`; rank 0 alone, after `start(timeline=True)`."""
    hvd.start_timeline(path, mark_cycles=True)


def stop_timeline() -> None:
    """Ends the timeline begun."""
    hvd.stop_timeline()


def rank() -> int:
    """Returns this process's number, 0 .. size() - 1."""
    return int(_members.rank())


def size() -> int:
    """Returns the number of ranks."""
    return int(_members.size())


def local_size() -> int:
    """Returns the number of ranks on this host."""
    return int(hvd.local_size())


def rank_if_joined() -> Optional[int]:
    """Returns this rank's number, or None before `start` and after `leave`."""
    return rank() if hvd.is_initialized() else None


def is_root() -> bool:
    """Says whether this is rank 0, which alone writes files and prints."""
    return rank() == 0


def describe() -> Dict[str, str]:
    """Returns what must be the same on all ranks besides the configuration: code, versions, how ranks communicate."""
    import horovod

    built = [name for name in ("mpi", "gloo", "nccl") if getattr(hvd, f"{name}_built")()]
    return {
        "hvd_vgg": f"{__version__} ({receipt.code()['sha256'][:16]})",
        "python": ".".join(map(str, sys.version_info[:3])),
        "tensorflow": tf.__version__,
        "horovod": f"{horovod.__version__} ({', '.join(built)})",
        "controller": "mpi" if hvd.mpi_enabled() else "gloo",
        "mpi": mpi_version() or "none",
        "numpy": np.__version__,
        "images": images.LIBRARY,
    }


def carriers(device: str) -> Dict[str, str]:
    """Returns what carries `sums` and `gathers` of tensors on TensorFlow's `device`: NCCL, mpi or gloo; all ranks call.

    It is tried, for Horovod is built for devices one operation at a time (HOROVOD_GPU_ALLREDUCE, HOROVOD_GPU_ALLGATHER):
    one that it is not built for TensorFlow runs on the CPU, copying there and back.
    """
    watch.collective("carriers")
    with tf.device(device):
        one = tf.ones([1])
        tried = {
            "sums": hvd.grouped_allreduce([one], op=hvd.Sum, name="carrier_sums", process_set=_members)[0],
            "gathers": hvd.allgather(one, name="carrier_gathers", process_set=_members),
        }
    without = "mpi" if hvd.mpi_enabled() else "gloo"
    return {kind: "NCCL" if "GPU" in result.device and hvd.nccl_built() else without for kind, result in tried.items()}


def mpi_version() -> Optional[str]:
    """Returns what the MPI that Horovod uses calls itself, such as `Open MPI v4.1.8`; None where it uses none."""
    if not hvd.mpi_enabled():
        return None
    text, length = ctypes.create_string_buffer(10_000), ctypes.c_int()  # more than any MPI's MPI_MAX_LIBRARY_VERSION_STRING
    try:
        ctypes.CDLL(None).MPI_Get_library_version(text, ctypes.byref(length))
    except AttributeError:  # it is not among the symbols that all see
        return "unknown"
    return text.value.decode(errors="replace").split(",")[0].strip()


def environment() -> Dict[str, str]:
    """Returns the variables that change how TensorFlow and Horovod compute and exchange, without the launcher's own."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("TF_", "XLA_", "HOROVOD_", "NVIDIA_TF32_OVERRIDE")) and not _NOT_COMPARED.search(name)
    }


def sum_over_ranks(values: np.ndarray) -> np.ndarray:
    """Returns the sum over ranks of `values`, int64 or float64, any shape: equal on all ranks."""
    watch.collective("sum_over_ranks")
    with tf.device("/CPU:0"):
        return np.asarray(hvd.allreduce(tf.constant(values), op=hvd.Sum, name="sum_over_ranks", process_set=_members))


def gather_numbers(values: Sequence[float]) -> np.ndarray:
    """Returns every rank's `values`, float64 [ranks, len(values)], on all ranks; each must bring as many."""
    watch.collective("gather_numbers")
    with tf.device("/CPU:0"):
        return np.asarray(hvd.allgather(tf.constant([values], tf.float64), name="gather_numbers", process_set=_members))


def swap(first: int, second: int, numbers: int) -> np.ndarray:
    """Lets two ranks send each other `numbers` float32, each its own rank; returns what came, empty on other ranks.

    All ranks call: it is Horovod's alltoall on the CPU, by MPI or Gloo, in which only two have something to say.
    """
    watch.collective("swap")
    splits = np.zeros(size(), np.int32)
    if rank() in (first, second):
        splits[second if rank() == first else first] = numbers
    with tf.device("/CPU:0"):
        mine = tf.fill([int(splits.sum())], float(rank()))
        received, _ = hvd.alltoall(mine, tf.constant(splits), name="swap", process_set=_members)
    return np.asarray(received)


def gather(data: bytes) -> List[bytes]:
    """Returns every rank's `data`, in order of rank, on all ranks."""
    watch.collective("gather")
    with tf.device("/CPU:0"):
        sizes = np.asarray(hvd.allgather(tf.constant([len(data)], tf.int64), name="gather_sizes", process_set=_members))
        if not sizes.sum():
            return [b""] * len(sizes)
        rows = np.asarray(
            hvd.allgather(tf.constant(np.frombuffer(data, np.uint8)), name="gather_data", process_set=_members)
        )
    ends = np.cumsum(sizes).tolist()
    return [rows[start:end].tobytes() for start, end in zip([0] + ends[:-1], ends)]


def from_root(data: Optional[bytes]) -> bytes:
    """Returns rank 0's `data` on all ranks; what others pass is ignored."""
    return gather(data or b"" if is_root() else b"")[0]


def broadcast_variables(variables: Sequence[Any]) -> None:
    """Overwrites the variables of all ranks with rank 0's."""
    watch.collective("broadcast_variables")
    if size() > 1:
        hvd.broadcast_variables(list(variables), root_rank=0, process_set=_members)


def sum_gradients(tensors: Sequence[Any], name: str) -> List[Any]:
    """Returns the sums over ranks of `tensors`, sent as one message called `name`; for use inside a tf.function."""
    if size() == 1:
        return list(tensors)
    return list(hvd.grouped_allreduce(list(tensors), op=hvd.Sum, name=name, process_set=_members))


def gather_rows(tensor: Any, name: str, rows: int) -> Any:
    """Returns all ranks' rows [rows, ...] in order of rank, sent as `name`; for use inside a tf.function.

    Ranks may hold different numbers of rows. Not to be differentiated: Horovod's gradient of allgather is an average over
    ranks (its issue 2654), so callers stay outside of tapes.
    """
    gathered = hvd.allgather(tensor, name=name, process_set=_members) if size() > 1 else tensor
    return tf.ensure_shape(gathered, [rows, *tensor.shape[1:]])


def any_rank(here: bool) -> bool:
    """Says whether `here` holds on any rank; the same on all."""
    return bool(sum_over_ranks(np.array([here], np.int64))[0])


def together(action: Callable[[], T]) -> T:
    """Returns `action()`, which must not communicate; if it fails on any rank, all ranks raise one agreed Failure.

    The agreed failure lists each distinct message once, with the ranks that raised it unless all did.
    """
    mine: Optional[Failure] = None
    value: Any = None
    try:
        value = action()
    except Failure as failure:
        mine = failure
    told = gather(json.dumps([mine.code, mine.message]).encode() if mine else b"")
    failed: Dict[str, List[int]] = {}
    codes = []
    for number, text in enumerate(told):
        if text:
            code, message = json.loads(text.decode())
            codes.append(code)
            failed.setdefault(message, []).append(number)
    if failed:
        lines = [
            message if len(ranks) == len(told) or ranks == [0] else f"rank {', '.join(map(str, ranks))}: {message}"
            for message, ranks in failed.items()
        ]
        raise Failure(int(codes[0]), "\n".join(lines), agreed=True)
    return value


def agree(what: str, mine: Dict[str, Any]) -> None:
    """Raises an agreed Failure(CONFIGURATION) with the differing fields unless `mine` is equal on all ranks."""
    text = json.dumps(mine, sort_keys=True)
    digests = gather(hashlib.sha256(text.encode()).digest())
    if len(set(digests)) == 1:
        return
    told = gather(text.encode())
    first = next(number for number, digest in enumerate(digests) if digest != digests[0])
    lines = difference(json.loads(told[0].decode()), json.loads(told[first].decode()), ("rank 0", f"rank {first}"))
    raise Failure(
        CONFIGURATION,
        f"ranks disagree about {what}:\n{lines}\nStart all ranks with the same flags, software and data",
        agreed=True,
    )


def leave() -> None:
    """Leaves the run in order; all ranks, when nothing more will be said. A process that then hangs is ended."""
    watch.leaving()
    if hvd.is_initialized():
        hvd.shutdown()
    watch.end()


def abort(code: int) -> None:
    """Ends all ranks at once with `code`; for the rank that failed, after it has said why. Does not return.

    MPI ends the other ranks, and mpirun exits with `code`. Under Gloo this process exits with `code`, and the launcher
    ends the others and exits with 1.
    """
    for stream in (sys.stdout, sys.stderr):
        output.say("", stream, end="")  # what Python still holds
    if hvd.is_initialized() and hvd.mpi_enabled() and size() > 1:
        try:
            import mpi4py

            mpi4py.rc.initialize = mpi4py.rc.finalize = False  # MPI is Horovod's to start and end
            from mpi4py import MPI
        except Exception:  # not there, or for another MPI; mpirun ends the others all the same when this process exits
            os._exit(code)
        MPI.COMM_WORLD.Abort(code)
    os._exit(code)
