"""Flags and variables that work, but hardly as meant: what scripts for other trainers set, and recipes that cannot be right.

Among them what the vendor's own script for VGG16 got wrong: 2 of 8 devices in use, a constant learning rate, flags that do
nothing.
"""

import os
import re
from typing import Dict, List, Mapping, Optional

from hvd_vgg.config import TrainConfig
from hvd_vgg.environment import SECRET_NAME, launched_rank
from hvd_vgg.parallel.mpi import UNSET_GLOO, gloo_under_mpi_error
from hvd_vgg.reporting.findings import Finding, failure, ok, warning
from hvd_vgg.text import plural

_BUILD_TIME = "is read when Horovod is built, never when it runs"
_OURS = "has no effect: the package sets threads itself (see --input_threads)"
# Variables of the vendor's and of others' scripts: what they do here.
_VARIABLES = {
    "IX_NUM_CUDA_VISIBLE_DEVICES": "has no effect: it is a count of the vendor's shell; ranks are what mpirun -np says",
    "HOROVOD_GPU_ALLREDUCE": _BUILD_TIME,
    "HOROVOD_GPU_OPERATIONS": _BUILD_TIME,
    "HOROVOD_GPU": _BUILD_TIME,
    "HOROVOD_WITH_TENSORFLOW": _BUILD_TIME,
    "HOROVOD_NCCL_HOME": _BUILD_TIME,
    "TF_NUM_INTRAOP_THREADS": _OURS,
    "TF_NUM_INTEROP_THREADS": _OURS,
    "TF_USE_LEGACY_KERAS": "has no effect: no Keras is used",
    "TF_FORCE_GPU_ALLOW_GROWTH": "has no effect: memory is taken as it is needed always",
    "HOROVOD_USE_GLOOGPU": "is known to no published Horovod",
    "UMD_WAITAFTERLAUNCH": "seems to wait after each kernel; the vendor sets it for many devices in one process",
    "CUDA_LAUNCH_BLOCKING": "waits after each kernel: for debugging",
    "UMD_ENABLEPROFILE": "profiles, which costs time",
    "TF_CUDNN_DETERMINISTIC": "takes slower convolutions",
}
# Of the vendor's scripts; what they do is published nowhere.
_UNKNOWN = re.compile(r"(UMD|CRT|DRT)_|NCCL_(FORCESYNC_DISABLE|USE_DIRECT|USE_HIGHPRIORITYWARP)$")
# How devices and links are driven: what may differ between hosts, and seldom should.
_LINKS = ("NCCL_", "UMD_", "CRT_", "DRT_", "UCX_")
_OFF = {"TF_CUDNN_USE_AUTOTUNE": "keeps TensorFlow from trying which convolution is fastest"}


def check_environment(environ: Mapping[str, str]) -> List[Finding]:
    """Looks at variables that do nothing here, or something else than was meant."""
    found = [
        warning("environment", f"{name}={environ[name]} {what}", f"unset {name}")
        for name, what in _VARIABLES.items()
        if environ.get(name, "0") not in ("", "0")
    ]
    for name, what in _OFF.items():
        if environ.get(name) == "0":
            found.append(warning("environment", f"{name}=0 {what}", f"unset {name}"))
    ends = gloo_under_mpi_error(environ)
    if ends:
        say = warning if launched_rank() is None else failure
        found.append(say("environment", ends, UNSET_GLOO))
    unknown = [
        f"{name}={environ[name]}"
        for name in sorted(link_variables(environ))
        if _UNKNOWN.match(name) and name not in _VARIABLES
    ]
    if unknown:
        text = f"{', '.join(unknown)}: of the vendor's own scripts; what they do is published nowhere"
        found.append(ok("environment", text))
    return found


def link_variables(environ: Mapping[str, str]) -> Dict[str, str]:
    """Returns the variables by which devices and links are driven, which training does not compare."""
    return {name: value for name, value in environ.items() if name.startswith(_LINKS) and not SECRET_NAME.search(name)}


def check_rank_count(here: int, ranks: int, alone: bool, mask: Optional[str]) -> List[Finding]:
    """Compares the devices that TensorFlow sees on this host with its ranks; mask: CUDA_VISIBLE_DEVICES, if set."""
    if not here:
        return []
    seen = f"TensorFlow sees {plural(here, 'device')}" + (f" (CUDA_VISIBLE_DEVICES={mask})" if mask else "")
    if alone:
        return [ok("ranks", f"{seen}: to use all start {plural(here, 'rank')}, mpirun -np {here} hvd-vgg doctor first")]
    if ranks > here:
        return [failure("ranks", f"{seen}, and {ranks} ranks were started on this host", f"start {here}: one a device")]
    if ranks < here:
        text = f"{seen}, and {plural(ranks, 'rank')} on this host: {here - ranks} would idle"
        return [warning("ranks", text, f"start {here} ranks on this host (-np, slots=)")]
    return [ok("ranks", f"{seen}, one a rank")]


def check_visible_devices(nodes: int, seen: int, mask: Optional[str]) -> List[Finding]:
    """Compares the host's device nodes with the devices that TensorFlow sees; mask: CUDA_VISIBLE_DEVICES, if set."""
    if not nodes or seen == nodes:
        return []
    said = "CUDA_VISIBLE_DEVICES is not set" if mask is None else f"CUDA_VISIBLE_DEVICES={mask}"
    if not seen:
        text = f"TensorFlow sees none of {plural(nodes, 'device')} of this host ({said})"
        if mask in ("", "-1"):
            return [warning("ranks", text, "right if it is to train on the CPU; else unset CUDA_VISIBLE_DEVICES")]
        return [failure("ranks", text, "see vendor and driver; TensorFlow without GPU support sees none either")]
    text = f"TensorFlow sees {seen} of {plural(nodes, 'device')} of this host ({said})"
    fix = (
        "unset CUDA_VISIBLE_DEVICES to use all, unless a scheduler set it"
        if mask
        else "the vendor's tool lists them; see driver"
    )
    return [warning("ranks", text, fix)]


def check_flags(config: TrainConfig, ranks: int, devices: int) -> List[Finding]:
    """Looks at the training flags; ranks: of the job, 1 where it runs alone; devices: of this rank's host."""
    found = []

    def warn(text: str, fix: str) -> None:
        found.append(warning("flags", text, fix))

    default = TrainConfig()
    if config.steps and config.epochs != default.epochs:
        warn(f"--epochs={config.epochs:g} has no effect beside --steps={config.steps}", "give one of them")
    if config.lr_schedule != "step" and config.lr_step_epochs != default.lr_step_epochs:
        warn(f"--lr_step_epochs has no effect under --lr_schedule={config.lr_schedule}", "leave it out")
    if config.global_batch < ranks:
        text = f"--global_batch={config.global_batch} is less than {ranks} ranks"
        found.append(failure("flags", text, "a larger --global_batch, or fewer ranks"))
    elif config.global_batch % ranks:
        text = f"--global_batch={config.global_batch} does not divide by {ranks} ranks: some wait for others at each update"
        warn(text, f"--global_batch={config.global_batch // ranks * ranks} (it changes what is learned), or other ranks")
    if config.max_rewinds != default.max_rewinds and config.on_nonfinite != "rewind":
        warn(f"--max_rewinds={config.max_rewinds} has no effect without --on_nonfinite=rewind", "leave it out")
    if config.precision == "float16" and not devices:
        warn("--precision=float16 is slower than float32 on CPUs, which have no arithmetic for it", "bfloat16, or float32")
    if config.xla and not devices:
        warn("--xla compiles for GPUs; here are none", "leave it out")
    if config.profile_ranks != default.profile_ranks and not config.profile_steps:
        warn("--profile_ranks has no effect without --profile_steps", "leave it out")
    if config.profile_steps and max(config.profile_ranks, default=0) >= ranks:
        warn(f"--profile_ranks names rank {max(config.profile_ranks):.0f} of {plural(ranks, 'rank')}", "0 is the first")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if config.input_threads > cores:
        warn(
            f"--input_threads={config.input_threads} is more than this host's {plural(cores, 'core')}",
            "leave it out: automatic",
        )
    return found or [
        ok("flags", f"{config.model}, {config.global_batch} images an update, lr {config.lr:g} by {config.lr_schedule}")
    ]


def check_schedule(config: TrainConfig, records: int) -> List[Finding]:
    """Looks whether the learning rate falls in the run to come; records: to train on, about; 0 where nobody knows."""
    if config.lr_schedule == "constant":
        text = f"--lr_schedule=constant keeps {config.lr:g} to the end: it stops short of a recipe's accuracy"
        return [warning("flags", text, "--lr_schedule=step or cosine")]
    epochs = config.steps * config.global_batch / records if config.steps and records else config.epochs
    if config.lr_schedule != "step" or (config.steps and not records) or config.lr_step_epochs[0] < epochs:
        return []
    text = f"all of --lr_step_epochs are at or after the end, epoch {epochs:.3g}: the learning rate never falls"
    return [warning("flags", text, "smaller --lr_step_epochs, or a longer run")]
