"""Joining the ranks of a command: Horovod, this rank's device, and that all ranks run the same thing."""

import dataclasses
import socket
from pathlib import Path
from typing import IO, Dict, NamedTuple, Optional, Sequence, Tuple

from hvd_vgg.config import ComputeConfig, TrainConfig
from hvd_vgg.data.sampler import too_many_ranks
from hvd_vgg.data.transforms import image_library
from hvd_vgg.environment import is_restarted
from hvd_vgg.errors import CONFIGURATION, NOT_WRITTEN, USAGE, Failure
from hvd_vgg.parallel import comm
from hvd_vgg.parallel.consensus import require_equal, run_on_all_ranks
from hvd_vgg.parallel.init import Device, compared_environment, describe_software, join, take_device
from hvd_vgg.reporting.console import Console
from hvd_vgg.run_dir import check_out, lock_run_dir
from hvd_vgg.text import plural

# Flags that may differ between ranks: a host may keep its files elsewhere, and rank 0 alone prints.
OWN_FLAGS = (
    *("data_dir", "run_dir", "checkpoint_copy_dir", "console", "out", "json", "metrics_file", "predictions_file"),
    *("weights", "names_file", "init_from"),
)


class Session(NamedTuple):
    """What a rank has after it joined: its device, the console, and the groups of ranks that were asked for, by size."""

    device: Device
    console: Console
    groups: Dict[int, comm.Group]


def join_ranks(config: ComputeConfig, timeline: bool = False, group_sizes: Sequence[int] = ()) -> Session:
    """Joins the ranks and takes this rank's device; the first call of a command that computes. Collective.

    timeline: whether Horovod's timeline may be started later; group_sizes: of the groups of first ranks to make. Raises a
    collective Failure(CONFIGURATION) unless flags, software and environment are equal on all ranks; and as `init.join` and
    `init.take_device` do.
    """
    groups = join(timeline, config.hang_seconds, group_sizes)
    device = run_on_all_ranks(lambda: take_device(config))
    flags = {name: value for name, value in dataclasses.asdict(config).items() if name not in OWN_FLAGS}
    require_equal("the flags", flags)
    require_equal("the software", describe_software(image_library(config.resize)))
    require_equal("the environment", compared_environment())
    return Session(device, Console(config.console, comm.is_root()), groups)


def require_hosts(expected: int) -> None:
    """Raises a collective Failure(CONFIGURATION) unless the ranks are on `expected` hosts; 0: on any number. Collective."""
    error, fix = placement_error(expected)
    if error:
        raise Failure(CONFIGURATION, f"{error}: {fix}", collective=True)


def placement_error(expected: int) -> Tuple[str, str]:
    """Returns what is wrong if the ranks are not on `expected` hosts, and a fix; "" and "" otherwise. Collective.

    A host is what the launcher takes for one: a pod is. Ranks that `hvd-vgg launch` has started again are where they can be.
    """
    if not expected or is_restarted():
        return "", ""
    first = comm.gather_json(socket.gethostname() if comm.local_rank() == 0 else "")
    hosts = list(filter(None, first))
    if len(hosts) == expected:
        return "", ""
    names = ", ".join(hosts[:8]) + (", ..." if len(hosts) > 8 else "")
    text = f"--expect_hosts={expected}, but found {plural(len(first), 'rank')} on {plural(len(hosts), 'host')} ({names})"
    if len(hosts) > expected:
        return text, "correct the flag, or give the launcher fewer hosts"
    fix = "`hvd-vgg launch --hostfile=FILE` places ranks itself; a plain mpirun of Open MPI 5 passes over the host file that"
    return text, f"{fix} Kubernetes' operators name for Open MPI 4 (docs/kubernetes.md)"


def claim_run_dir(config: TrainConfig) -> Optional[IO[str]]:
    """Returns the run directory's lock on rank 0; raises Failure where this number of ranks cannot run."""
    refusal = too_many_ranks(config, comm.size())
    if refusal:
        raise Failure(USAGE, refusal)
    if config.profile_steps and max(config.profile_ranks, default=0) >= comm.size():
        raise Failure(USAGE, f"--profile_ranks: expected numbers below {comm.size()}, the number of ranks")
    if not comm.is_root():
        return None
    run_dir = Path(config.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(CONFIGURATION, f"--run_dir={run_dir} cannot be created or written: {error.strerror}") from error
    if config.predictions_file:  # it is written when the run ends
        check_out(config.predictions_file, NOT_WRITTEN, "--predictions_file")
    return lock_run_dir(run_dir)
