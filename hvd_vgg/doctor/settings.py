"""Flags and environment variables that are accepted but hardly do what was meant, and devices that are left idle.

Among them what the vendor's own script for VGG16 gets wrong: 2 of 8 devices in use, a constant learning rate, flags without
effect.
"""

from typing import Dict, Iterator, List, Mapping, Optional, Tuple

from hvd_vgg.config import BITS, TrainConfig, reference_points, unused_hyperparameters
from hvd_vgg.data.sampler import most_ranks, too_many_ranks
from hvd_vgg.environment import DEVICE_MASKS, SECRET_NAME, device_masks, launched_rank, leftover_error
from hvd_vgg.parallel.cores import share_of_cores
from hvd_vgg.parallel.mpi import UNSET_GLOO, gloo_under_mpi_error
from hvd_vgg.reporting.findings import Finding, failure, ok, warning
from hvd_vgg.text import plural
from hvd_vgg.training.schedule import rate_factor

# Variables in the vendor's and others' scripts, and what they do here.
_VARIABLES = {
    **dict.fromkeys(
        ("HOROVOD_GPU", "HOROVOD_GPU_ALLREDUCE", "HOROVOD_GPU_OPERATIONS", "HOROVOD_NCCL_HOME", "HOROVOD_WITH_TENSORFLOW"),
        "is read when Horovod is built, never when it runs",
    ),
    **dict.fromkeys(
        ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"),
        "has no effect: the package sets threads itself (see --input_threads)",
    ),
    "IX_NUM_CUDA_VISIBLE_DEVICES": "has no effect: only the vendor's shell scripts read it; mpirun -np sets the ranks",
    "TF_FORCE_GPU_ALLOW_GROWTH": "has no effect: memory growth is always on",
    "HOROVOD_USE_GLOOGPU": "is unknown to all published versions of Horovod",
    "UMD_WAITAFTERLAUNCH": "seems to wait after each kernel; the vendor sets it for several devices in one process",
    "CUDA_LAUNCH_BLOCKING": "waits after each kernel: for debugging",
    "UMD_ENABLEPROFILE": "profiles, which takes time",
    "TF_CUDNN_DETERMINISTIC": "selects slower convolutions",
    "TF_XLA_FLAGS": "may compile operations, whose bits then depend on what is computed beside them",
}
# Variables that control devices and links: they may differ between hosts, and rarely should.
LINKS = ("NCCL_", "UMD_", "CRT_", "DRT_", "UCX_")


def check_environment(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Checks for variables that have no effect, or another one than was meant."""
    effects = {name: effect for name, effect in _VARIABLES.items() if environ.get(name, "0") not in ("", "0")}
    if environ.get("TF_CUDNN_USE_AUTOTUNE") == "0":
        effects["TF_CUDNN_USE_AUTOTUNE"] = "keeps TensorFlow from finding the fastest convolution"
    if environ.get("TF_ENABLE_ONEDNN_OPTS") == "0":
        effects["TF_ENABLE_ONEDNN_OPTS"] = "switches off the fastest convolutions of CPUs, above all those in 16 bits"
    for name, effect in effects.items():
        yield warning("environment", f"{name}={environ[name]} {effect}", f"unset {name}")
    if leftover_error(environ):
        yield failure("environment", leftover_error(environ), "unset it")
    error = gloo_under_mpi_error(environ)
    if error:
        yield (warning if launched_rank() is None else failure)("environment", error, UNSET_GLOO)


def link_variables(environ: Mapping[str, str]) -> Dict[str, str]:
    """Returns the variables that control devices and links, which training does not compare between ranks."""
    return {name: value for name, value in environ.items() if name.startswith(LINKS) and not SECRET_NAME.search(name)}


def _masks(mask: Optional[str], corex: Optional[str]) -> Dict[str, str]:
    return {name: value for name, value in zip(DEVICE_MASKS, (mask, corex)) if value is not None}


def check_rank_count(
    devices: int, ranks: int, alone: bool, mask: Optional[str], corex: Optional[str] = None
) -> List[Finding]:
    """Compares the devices that TensorFlow sees on this host with its ranks.

    alone: without a launcher; mask: CUDA_VISIBLE_DEVICES, if set; corex: COREX_VISIBLE_DEVICES.
    """
    if not devices:
        return []
    masks = device_masks(_masks(mask or None, corex))
    text = f"TensorFlow sees {plural(devices, 'device')}" + (f" ({masks})" if masks else "")
    if alone:
        start = f"mpirun -np {devices} hvd-vgg doctor"
        return [ok("ranks", f"{text}: to use all, start {plural(devices, 'rank')}; try first: {start}")]
    if ranks == devices:
        return [ok("ranks", f"{text}, one per rank")]
    text += f", but this host runs {plural(ranks, 'rank')}"
    if ranks > devices:
        return [failure("ranks", text, f"start {devices}, one per device")]
    text += f": {plural(devices - ranks, 'device')} would idle"
    return [warning("ranks", text, f"start {devices} ranks on this host (-np, slots=)")]


def check_visible_devices(nodes: int, visible: int, mask: Optional[str], corex: Optional[str] = None) -> List[Finding]:
    """Compares the host's device nodes with the devices that TensorFlow sees.

    mask: CUDA_VISIBLE_DEVICES, if set; corex: COREX_VISIBLE_DEVICES.
    """
    if not nodes or visible == nodes:
        return []
    masks = _masks(mask, corex)
    variable = device_masks(masks) or "CUDA_VISIBLE_DEVICES is not set"
    text = f"TensorFlow sees {visible or 'none'} of {plural(nodes, 'device')} on this host ({variable})"
    if visible:
        some = " and ".join(name for name, value in masks.items() if value not in ("", "all"))
        fix = f"unset {some} to use all, unless a scheduler set it"
        return [warning("ranks", text, fix if some else "compare with the vendor's tool; see driver")]
    empty = " and ".join(name for name, value in masks.items() if value in ("", "-1"))
    if empty:
        return [warning("ranks", text, f"unset {empty}, unless you want to train on the CPU")]
    return [failure("ranks", text, "see vendor and driver; a TensorFlow without GPU support sees none either")]


def check_flags(config: TrainConfig, ranks: int, devices: int) -> List[Finding]:
    """Checks the training flags for a job of `ranks`, on a host with `devices` GPUs."""
    found = [warning("flags", problem, fix) for problem, fix in _questionable_flags(config, ranks, devices)]
    text, _, fix = too_many_ranks(config, ranks).partition(": ")
    if text:
        found.append(failure("flags", text, fix))
    lr = rate_factor(config) * config.lr
    text = f"{config.model}, {config.global_batch} images per update, lr {lr:g}, schedule {config.lr_schedule}"
    return found or [ok("flags", text)]


def _questionable_flags(config: TrainConfig, ranks: int, devices: int) -> Iterator[Tuple[str, str]]:
    """Yields what a flag does not do or does badly, and a fix."""
    default, batch = TrainConfig(), config.global_batch
    if config.steps and config.epochs != default.epochs:
        yield f"--epochs={config.epochs:g} has no effect with --steps={config.steps}", "give only one of them"
    for name, reason in unused_hyperparameters(config).items():
        if getattr(config, name) != getattr(default, name):
            yield f"--{name} has no effect {reason}", "omit it"
    points = reference_points(config.reference_curve)
    if points and not config.steps and points[0][0] > config.epochs:
        yield f"--reference_curve has no effect: it begins after the last of {config.epochs:g} epochs", "omit it"
    parts, shared = most_ranks(config), "groups" if config.group_batch > 1 else "images"
    if config.reproducible == BITS:
        shared = "micro-batches"
    if parts > ranks and parts % ranks:
        text = f"the {parts} {shared} of --global_batch={batch} are not divisible by {ranks} ranks"
        fix = "use another number of ranks, or another --global_batch or --device_batch (which is another run)"
        yield f"{text}: in each update some wait for others", fix
    if config.link_flops_per_byte != default.link_flops_per_byte and config.exchange != "auto":
        yield f"--link_flops_per_byte has no effect with --exchange={config.exchange}", "omit it"
    if config.max_rewinds != default.max_rewinds and config.on_nonfinite != "rewind":
        yield f"--max_rewinds={config.max_rewinds} has no effect without --on_nonfinite=rewind", "omit it"
    if config.xla and not devices:
        yield "--xla compiles for GPUs, and this host has none", "omit it"
    if config.profile_ranks != default.profile_ranks and not config.profile_steps:
        yield "--profile_ranks has no effect without --profile_steps", "omit it"
    last = max(config.profile_ranks, default=0)
    if config.profile_steps and last >= ranks:
        yield f"--profile_ranks names rank {last:.0f} of {plural(ranks, 'rank')}", "ranks are counted from 0"
    cores = share_of_cores(1)
    if config.input_threads > cores:
        text = f"--input_threads={config.input_threads} exceeds the {plural(cores, 'core')} that a rank may use"
        yield text, "omit it: the default fits the host"


def check_schedule(config: TrainConfig, records: int) -> List[Finding]:
    """Checks that the learning rate decays during the run; records: about how many to train on, 0 if unknown."""
    if config.lr_schedule == "constant":
        lr = rate_factor(config) * config.lr
        text = f"--lr_schedule=constant keeps {lr:g} to the end: a recipe's accuracy needs a rate that decays"
        return [warning("flags", text, "--lr_schedule=step, cosine or polynomial")]
    epochs = config.steps * config.global_batch / records if config.steps and records else config.epochs
    if config.lr_schedule != "step" or (config.steps and not records) or config.lr_step_epochs[0] < epochs:
        return []
    text = f"all of --lr_step_epochs are at or after the end, epoch {epochs:.3g}: the learning rate never decays"
    return [warning("flags", text, "smaller --lr_step_epochs, or a longer run")]
