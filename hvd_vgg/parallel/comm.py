"""Ranks and their collectives on host data. The modules of this folder are the only importers of horovod and mpi4py.

Every function that communicates is collective: all ranks of the group must call it, in the same order. Host data go through
Horovod too, on the CPU: under `horovodrun --gloo` mpi4py would see a world of one rank.
"""

import json
import os
import sys
from typing import Any, List, NamedTuple, Optional, Sequence

import numpy as np
import tensorflow as tf

from hvd_vgg import streams
from hvd_vgg.environment import library_path_hint
from hvd_vgg.errors import CONFIGURATION, Failure
from hvd_vgg.watchdog import watchdog

try:
    import horovod.tensorflow as hvd
except (ImportError, OSError, tf.errors.OpError) as error:  # the last: TensorFlow loads Horovod's library
    reason = f"{error}{library_path_hint(str(error))}"
    raise Failure(
        CONFIGURATION,
        f"Horovod cannot be imported under TensorFlow {tf.__version__} and {sys.executable}: {reason}. Create the "
        f"environment with launch/environment.sh, or use this host's own (docs/compatibility.md)",
    ) from error


class Group(NamedTuple):
    """Ranks that communicate with each other: a process set of Horovod's."""

    process_set: Any


WORLD = Group(hvd.global_process_set)


def rank(group: Group = WORLD) -> int:
    """Returns this process's rank in the group, 0 .. size - 1; for members alone."""
    return int(group.process_set.rank())


def size(group: Group = WORLD) -> int:
    """Returns the number of ranks in the group."""
    return int(group.process_set.size())


def local_size() -> int:
    """Returns the number of ranks on this host."""
    return int(hvd.local_size())


def local_rank() -> int:
    """Returns this process's rank among those on this host, from 0."""
    return int(hvd.local_rank())


def is_root(group: Group = WORLD) -> bool:
    """Returns whether this is rank 0, which writes checkpoints and logs, and prints."""
    return rank(group) == 0


def rank_or_none() -> Optional[int]:
    """Returns this process's rank, or None before the ranks have joined and after `shutdown`."""
    return rank() if hvd.is_initialized() else None


def sum_over_ranks(values: np.ndarray, group: Group = WORLD) -> np.ndarray:
    """Returns the sum over ranks of `values`, int64 or float64, any shape: equal on all ranks. Collective."""
    watchdog.note_collective("sum_over_ranks")
    with tf.device("/CPU:0"):
        values = tf.constant(values)
        return np.asarray(hvd.allreduce(values, op=hvd.Sum, name="sum_over_ranks", process_set=group.process_set))


def any_rank(here: bool) -> bool:
    """Returns whether `here` holds on any rank; equal on all. Collective."""
    return bool(sum_over_ranks(np.array([here], np.int64))[0])


def gather_numbers(values: Sequence[float], group: Group = WORLD) -> np.ndarray:
    """Returns every rank's `values`, float64 [ranks, len(values)]; all ranks must pass equally many. Collective."""
    watchdog.note_collective("gather_numbers")
    with tf.device("/CPU:0"):
        row = tf.constant([values], tf.float64)
        return np.asarray(hvd.allgather(row, name="gather_numbers", process_set=group.process_set))


def gather_bytes(data: bytes, group: Group = WORLD) -> List[bytes]:
    """Returns every rank's `data`, in order of rank. Collective."""
    watchdog.note_collective("gather_bytes")
    with tf.device("/CPU:0"):
        length = tf.constant([len(data)], tf.int64)
        lengths = np.asarray(hvd.allgather(length, name="gather_lengths", process_set=group.process_set))
        if not lengths.sum():
            return [b""] * len(lengths)
        row = tf.constant(np.frombuffer(data, np.uint8))
        rows = np.asarray(hvd.allgather(row, name="gather_bytes", process_set=group.process_set))
    ends = np.cumsum(lengths).tolist()
    return [rows[start:end].tobytes() for start, end in zip([0] + ends[:-1], ends)]


def gather_bytes_on_root(data: bytes) -> List[bytes]:
    """Returns every rank's `data`, in order of rank, on rank 0, and nothing on others. Collective.

    It is Horovod's alltoall, in which all send to rank 0 alone: other ranks need no memory for it.
    """
    watchdog.note_collective("gather_bytes_on_root")
    if size() == 1:
        return [data]
    splits = np.zeros(size(), np.int32)
    splits[0] = len(data)
    with tf.device("/CPU:0"):
        row = tf.constant(np.frombuffer(data, np.uint8))
        rows, lengths = hvd.alltoall(row, tf.constant(splits), name="gather_bytes_on_root")
    ends = np.cumsum(np.asarray(lengths)).tolist() if is_root() else []
    return [np.asarray(rows)[start:end].tobytes() for start, end in zip([0, *ends[:-1]], ends)]


def gather_json(value: Any, group: Group = WORLD) -> List[Any]:
    """Returns every rank's `value`, in order of rank, as JSON brings it back. Collective."""
    return [json.loads(text.decode()) for text in gather_bytes(json.dumps(value).encode(), group)]


def broadcast_bytes(data: bytes) -> bytes:
    """Returns rank 0's `data` on all ranks; what others pass is ignored. Collective."""
    return gather_bytes(data if is_root() else b"")[0]


def broadcast_json(value: Any) -> Any:
    """Returns rank 0's `value` on all ranks, as JSON brings it back; what others pass is ignored. Collective."""
    return json.loads(broadcast_bytes(json.dumps(value).encode() if is_root() else b"").decode())


def barrier() -> None:
    """Returns when all ranks have called. Collective."""
    gather_bytes(b"")


def broadcast_variables(variables: Sequence[Any]) -> None:
    """Overwrites the variables of all ranks with rank 0's. Collective."""
    watchdog.note_collective("broadcast_variables")
    if size() > 1:
        hvd.broadcast_variables(list(variables), root_rank=0)


def sendrecv(first: int, second: int, count: int) -> np.ndarray:
    """Has two ranks send each other `count` float32, each its own rank; returns what arrived, empty on other ranks.

    Collective: it is Horovod's alltoall on the CPU, by MPI or Gloo, in which only two ranks have something to send.
    """
    watchdog.note_collective("sendrecv")
    splits = np.zeros(size(), np.int32)
    if rank() in (first, second):
        splits[second if rank() == first else first] = count
    with tf.device("/CPU:0"):
        received, _ = hvd.alltoall(tf.fill([int(splits.sum())], float(rank())), tf.constant(splits), name="sendrecv")
    return np.asarray(received)


# Names are sent as they are, without the scopes that an operation's name has: these contain numbers of functions, which may
# differ between ranks, and a message that ranks call differently arrives nowhere.


def sum_tensor(tensor: Any, name: str, group: Group = WORLD) -> Any:
    """Returns the sum over ranks of `tensor`, sent as the message `name`; for use in a tf.function. Collective."""
    if size(group) == 1:
        return tensor
    return hvd.allreduce(tensor, op=hvd.Sum, name=name, process_set=group.process_set, ignore_name_scope=True)


def gather_rows(tensor: Any, name: str, rows: int, group: Group = WORLD) -> Any:
    """Returns all ranks' rows [rows, ...] in order of rank, sent as `name`; inside a tf.function. Collective.

    Ranks may hold different numbers of rows. Not to be differentiated: Horovod's gradient of allgather is an average over
    ranks (its issue 2654), so callers stay outside of tapes.
    """
    if size(group) > 1:
        tensor = hvd.allgather(tensor, name=name, process_set=group.process_set, ignore_name_scope=True)
    return tf.ensure_shape(tensor, [rows, *tensor.shape[1:]])


def start_timeline(path: str) -> None:
    """Starts Horovod's timeline of all ranks in the file `path`; rank 0 alone, after `init.join(timeline=True)`."""
    hvd.start_timeline(path, mark_cycles=True)


def stop_timeline() -> None:
    """Stops the timeline; rank 0 alone."""
    hvd.stop_timeline()


def shutdown() -> None:
    """Leaves the run in order, when nothing more will be communicated; a process that hangs in it is killed. Collective."""
    watchdog.start_leaving()
    if hvd.is_initialized():
        hvd.shutdown()
    watchdog.stop()


def abort(code: int) -> None:
    """Ends all ranks at once with `code`; for the rank that failed, after it has reported why. Does not return.

    MPI ends the other ranks, and mpirun exits with `code`. Under Gloo this process exits with `code`, and the launcher ends
    the others and exits with 1.
    """
    for stream in (sys.stdout, sys.stderr):
        streams.write_line("", stream, end="")  # what Python still buffers
    if hvd.is_initialized() and hvd.mpi_enabled() and size() > 1:
        try:
            import mpi4py

            mpi4py.rc.initialize = mpi4py.rc.finalize = False  # Horovod starts and ends MPI
            from mpi4py import MPI
        except Exception:  # missing, or built for another MPI; mpirun ends the others anyway when this process exits
            os._exit(code)
        MPI.COMM_WORLD.Abort(code)
    os._exit(code)
