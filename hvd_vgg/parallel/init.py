"""Joining the run: Horovod, this rank's device, and Open MPI's settings."""

import ctypes
import os
import re
import socket
import sys
from typing import Dict, NamedTuple, Optional, Sequence

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from hvd_vgg import __version__
from hvd_vgg.config import BITS, ComputeConfig
from hvd_vgg.environment import device_masks, launched_rank, launched_size, leftover_error, runs_alone
from hvd_vgg.errors import CONFIGURATION, Failure
from hvd_vgg.parallel import comm, network
from hvd_vgg.parallel.consensus import run_on_all_ranks
from hvd_vgg.parallel.cores import share_of_cores
from hvd_vgg.parallel.mpi import UNSET_GLOO, foreign_mpiexec_error, gloo_under_mpi_error, loaded_mpi_libraries
from hvd_vgg.provenance import code_fingerprint
from hvd_vgg.watchdog import MIN_HANG_SECONDS, SLOW_PHASE_FACTOR, watchdog

# What need not be equal: what launchers and operators set for each rank; what Kubernetes tells of services, which a pod that
# is older than one lacks; what only changes what is printed or written; what has no effect; and what must not be printed.
_NOT_COMPARED = re.compile(
    r"^HOROVOD_(RANK|SIZE|LOCAL_|CROSS_|HOSTNAME|GLOO_|LOG_|TIMELINE|AUTOTUNE_LOG|THREAD_AFFINITY)|^TF_(CONFIG|JOB_|TASK_)"
    r"|_SERVICE_(HOST|PORT)|_PORT(_\d+_(TCP|UDP|SCTP)|$)|^TF_(CPP_|DUMP_|NUM_INT)|^TF2_BEHAVIOR|TOKEN|KEY|SECRET|PASS|CRED"
)
# Open MPI 4 sends all but the first 128 kB of a large message over TCP in one piece, and its acknowledgement of the other
# side's message queues behind it, so the two directions of a link take turns. In pieces of 256 kB an allreduce of 64 MB is
# 1.5 times faster between 2 hosts, and 1.6 times between 4 (docs/distributed.md, "Open MPI over TCP").
_TCP_FRAGMENT_BYTES = 256 * 1024
# Each that is computed side by side needs its own memory for activations.
_MOST_MICRO_BATCHES = 8


class Device(NamedTuple):
    """What this rank computes on.

    kind: GPU or CPU; data_format: its layout; cores: CPU cores of this rank; threads: that one operation may use on a CPU;
    micro_batches: how many are computed side by side; input_threads: CPU threads that decode images.
    """

    kind: str
    data_format: str
    cores: int
    threads: int
    micro_batches: int
    input_threads: int


def start() -> Device:
    """Joins the run and takes this rank's device, with the defaults of `join` and `take_device`. Collective.

    For programs without a configuration; commands call `training.startup.join_ranks`.
    """
    join()
    return run_on_all_ranks(take_device)


def start_without_device() -> int:
    """Joins the run and returns how many CPU threads of this rank may read and decode. Collective.

    For commands that look at data alone: they take no device, so that there may be more ranks than devices.
    """
    join()
    cores = share_of_cores(hvd.local_size())
    _allow_collectives(cores)
    tf.config.set_visible_devices([], "GPU")
    return threads_for_input(cores)


def join(timeline: bool = False, hang_seconds: float = 0.0, group_sizes: Sequence[int] = ()) -> Dict[int, comm.Group]:
    """Joins the run; the first call of every rank. Collective.

    timeline: whether Horovod's may be started later; hang_seconds: how long an update may take, 0 for the default.

    Returns for each of `group_sizes` the group of that many first ranks; sizes of all ranks or more give `comm.WORLD`.
    Raises Failure(CONFIGURATION), on this rank alone, where Horovod finds another number of ranks than the launcher started,
    cannot exchange as it is configured to, or the host's name does not resolve to it.
    """
    if leftover_error(os.environ):
        raise Failure(CONFIGURATION, f"{leftover_error(os.environ)}: unset it, or start ranks by a launcher")
    if runs_alone() and hvd.gloo_built():
        # Without a launcher there is nothing for MPI to find, and Open MPI may fail to start a world of one.
        os.environ.update(HOROVOD_CONTROLLER="gloo", HOROVOD_CPU_OPERATIONS="gloo")
        if not network.is_local_address(socket.gethostname()):  # Gloo would abort the process
            raise Failure(
                CONFIGURATION,
                f"this host's name, {socket.gethostname()}, does not resolve to an address of it: add the line "
                f"`127.0.1.1 {socket.gethostname()}` to /etc/hosts",
            )
    elif launched_rank() is not None:
        foreign = foreign_mpiexec_error(os.environ, loaded_mpi_libraries())
        if gloo_under_mpi_error(os.environ):
            raise Failure(CONFIGURATION, f"{gloo_under_mpi_error(os.environ)}: {UNSET_GLOO}")
        if foreign:
            raise Failure(CONFIGURATION, f"{foreign}: start the ranks by `hvd-vgg launch`, or by Open MPI's mpirun")
    if timeline:
        os.environ.setdefault("HOROVOD_TIMELINE", "DYNAMIC")
    # By default Horovod waits for ever. Its stall inspector names the tensor and the missing ranks. It counts the time in
    # which a job was suspended, so that it ends none that has a watchdog, which does not, and SIGALRM behind that.
    longest = SLOW_PHASE_FACTOR * (hang_seconds or MIN_HANG_SECONDS)
    check_seconds = max(1, round(min(60.0, longest / 2 / SLOW_PHASE_FACTOR)))
    os.environ.setdefault("HOROVOD_STALL_CHECK_TIME_SECONDS", str(check_seconds))
    shutdown_seconds = 0 if watchdog.thread else max(2, round(longest))
    os.environ.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", str(shutdown_seconds))
    os.environ.setdefault("OMPI_MCA_btl_tcp_rdma_pipeline_frag_size", str(_TCP_FRAGMENT_BYTES))
    here, texts = network.interfaces(), network.mpi_parameter_files(os.environ)
    os.environ.update(network.exclude_bridges(os.environ, here, texts, network.routes()))
    smaller = [count for count in group_sizes if count < (launched_size() or 1)]
    groups = {count: comm.Group(hvd.ProcessSet(range(count))) for count in smaller}
    hvd.init(process_sets=[group.process_set for group in groups.values()])
    started = launched_size()
    if started is not None and started != comm.size():
        mine, seen = describe_software(""), comm.size()
        hvd.shutdown()  # every process may be rank 0 here; only the launcher's rank says which one reports
        raise Failure(
            CONFIGURATION,
            f"the launcher started {started} processes, but Horovod sees {seen}: each would train alone and overwrite the "
            f"others' files. Horovod is {mine['horovod']} and uses {mine['controller']}: start it with the launcher of the "
            f"MPI it was built with, or without MPI by horovodrun --gloo",
        )
    missing = [count for count in group_sizes if count < comm.size() and count not in groups]
    if missing:
        raise Failure(CONFIGURATION, f"the launcher gives no number of ranks, so that no group of {missing[0]} can be made")
    return {count: groups.get(count, comm.WORLD) for count in group_sizes}


def take_device(config: Optional[ComputeConfig] = None) -> Device:
    """Makes this rank's device the only one that TensorFlow uses; after `join`, before TensorFlow computes.

    Under --reproducible=bits TensorFlow computes in a deterministic way from here on. Raises Failure(CONFIGURATION) when
    there are more ranks on this host than devices, or they do not support the precision.
    """
    config = config or ComputeConfig()
    bits, cores = config.reproducible == BITS, share_of_cores(hvd.local_size())
    threads = config.compute_threads or (1 if bits else cores)
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    _allow_collectives(cores)
    if bits:
        _compute_deterministically()
    input_threads = config.input_threads or threads_for_input(cores)
    devices = tf.config.list_physical_devices("GPU")
    if not devices:
        if not cpu_convolves(config.precision):
            raise Failure(
                CONFIGURATION,
                f"--precision={config.precision}: TensorFlow {tf.__version__} cannot convolve in it on a CPU; use float32",
            )
        side_by_side = min(max(1, cores // threads), _MOST_MICRO_BATCHES) if bits else 1
        return Device("CPU", "NHWC", cores, threads, side_by_side, input_threads)
    if hvd.local_size() > len(devices):
        tf.config.set_visible_devices([], "GPU")  # the failure is exchanged on the CPU
        raise Failure(
            CONFIGURATION,
            f"{hvd.local_size()} ranks on this host, but TensorFlow sees {len(devices)} devices "
            f"({device_masks(os.environ) or 'CUDA_VISIBLE_DEVICES=unset'}): start one rank per device",
        )
    mine = devices[hvd.local_rank()]
    tf.config.set_visible_devices(mine, "GPU")
    tf.config.experimental.set_memory_growth(mine, True)
    return Device("GPU", "NCHW", cores, threads, 1, input_threads)


def _allow_collectives(cores: int) -> None:
    # Never fewer than 4, whatever TF_NUM_INTEROP_THREADS says: with 1 or 2 Horovod can wait for ever for a thread to
    # enqueue a collective that the other ranks are already in.
    tf.config.threading.set_inter_op_parallelism_threads(max(4, cores))


def _compute_deterministically() -> None:
    """Has operations choose implementations whose results do not vary from call to call, or fail where there is none."""
    enable = getattr(tf.config.experimental, "enable_op_determinism", None)
    if enable:
        enable()
    else:  # before TensorFlow 2.9 it is the environment that decides
        os.environ.update(TF_DETERMINISTIC_OPS="1", TF_CUDNN_DETERMINISTIC="1")


def cpu_convolves(precision: str) -> bool:
    """Returns whether this TensorFlow can compute convolutions in `precision` on a CPU.

    In bfloat16 those of 2.6 come out as float32, or end the process where oneDNN is on; of 2.12 they are right.
    """
    return precision != "bfloat16" or [int(part) for part in re.findall(r"\d+", tf.__version__)[:2]] >= [2, 12]


def threads_for_input(threads: int) -> int:
    """Returns how many of a rank's CPU threads may decode: one is left to Horovod's own where there are more than two."""
    return threads - 1 if threads > 2 else threads


def describe_software(image_library: str) -> Dict[str, str]:
    """Returns what must be the same on all ranks besides the configuration: code, versions, how ranks communicate."""
    import horovod

    built = [name for name in ("mpi", "gloo", "nccl") if getattr(hvd, f"{name}_built")()]
    return {
        "hvd_vgg": f"{__version__} ({code_fingerprint()['sha256'][:16]})",
        "python": ".".join(map(str, sys.version_info[:3])),
        "tensorflow": tf.__version__,
        "horovod": f"{horovod.__version__} ({', '.join(built)})",
        "controller": "mpi" if hvd.mpi_enabled() else "gloo",
        "mpi": mpi_version() or "none",
        "numpy": np.__version__,
        "images": image_library,
    }


def transports(device: str) -> Dict[str, str]:
    """Returns what carries `sums` and `gathers` of tensors on TensorFlow's `device`: NCCL, mpi or gloo; all ranks call.

    Determined by trying, since device support is a build option of each operation of Horovod (HOROVOD_GPU_ALLREDUCE,
    HOROVOD_GPU_ALLGATHER): TensorFlow runs one that lacks it on the CPU, and copies there and back.
    """
    watchdog.note_collective("transports")
    with tf.device(device):
        one = tf.ones([1])
        tried = {
            "sums": hvd.grouped_allreduce([one], op=hvd.Sum, name="transport_of_sums")[0],
            "gathers": hvd.allgather(one, name="transport_of_gathers"),
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


def compared_environment() -> Dict[str, str]:
    """Returns the variables that change how TensorFlow and Horovod compute and exchange, without the launcher's own."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("TF_", "XLA_", "HOROVOD_", "NVIDIA_TF32_OVERRIDE")) and not _NOT_COMPARED.search(name)
    }
