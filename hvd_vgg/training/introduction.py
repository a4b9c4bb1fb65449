"""What a run says before its first update: the network, the data, the ranks, the exchange."""

import dataclasses
import importlib.util
import socket
from typing import Any, Dict, List

from hvd_vgg.config import TrainConfig, profiled_steps
from hvd_vgg.data.formats.layout import TITLES
from hvd_vgg.data.index import data_digest
from hvd_vgg.data.sampler import part_bounds
from hvd_vgg.data.transforms import image_library
from hvd_vgg.models.architecture import count_parameters, layers_to_train
from hvd_vgg.parallel import comm, cost
from hvd_vgg.parallel.consensus import run_on_root
from hvd_vgg.parallel.init import Device, describe_software, mpi_version
from hvd_vgg.provenance import describe_process
from hvd_vgg.reporting import receipt
from hvd_vgg.run_dir import RunDir
from hvd_vgg.text import difference_table, plural
from hvd_vgg.training.dataset import Splits
from hvd_vgg.training.pictures import show_start
from hvd_vgg.training.precision import measure_precision
from hvd_vgg.training.reporter import Reporter
from hvd_vgg.training.result import write_class_names, write_run_files
from hvd_vgg.training.schedule import rate_factor
from hvd_vgg.training.state import TrainProgress


def introduce(
    config: TrainConfig,
    data: Splits,
    device: Device,
    arithmetic: Dict[str, str],
    factored: List[str],
    total_steps: int,
    progress: TrainProgress,
    reporter: Reporter,
) -> None:
    """Prints and logs what is about to be trained; writes flags, receipt and names of classes. Collective.

    arithmetic: of `describe_arithmetic`; factored: the layers whose gradient is formed from gathered factors. Raises a
    collective Failure(NOT_WRITTEN).
    """
    choices = cost.choose(config, comm.size(), factored)
    _warn_of_missing_packages(reporter)
    speed = measure_precision(config.precision, device.kind, device.data_format)
    if speed and speed.slower():
        reporter.say(f"warning: {speed.text()}: {speed.fix()}")
    _print_run(config, data, device, total_steps, progress, reporter)
    if comm.size() > 1:
        reporter.say(f"sent by each rank in an update, {config.wire_dtype} on the wire:\n{cost.table(choices)}")
    wanted, first = profiled_steps(config.profile_steps), progress.step
    if config.profile_steps and not range(max(first, wanted.start), min(total_steps, wanted.stop)):
        reporter.say(f"--profile_steps={config.profile_steps}: none of them is between {first} and {total_steps - 1}")
    base, peak = config.lr_base_batch, rate_factor(config) * config.lr
    scaled = f" ({config.lr:g} for --lr_base_batch={base}, times {rate_factor(config):g})" if base else ""
    reporter.say(f"steps {first} to {total_steps}, lr {peak:g}{scaled} for the mean gradient of {config.global_batch}")
    hosts = comm.gather_json(socket.gethostname())
    unlike = [(rank, each) for rank, each in enumerate(comm.gather_json(arithmetic)) if each != arithmetic]
    if unlike and comm.is_root():
        table = difference_table(arithmetic, unlike[0][1], ("rank 0", f"rank {unlike[0][0]}"))
        reporter.say(f"ranks compute on unlike processors or settings:\n{table}")
    run: Dict[str, Any] = {"ranks": comm.size(), "device": device.kind, "steps": total_steps, "first_step": first}
    software = describe_software(image_library(config.resize))
    reporter.row("PARAMETER", {**dataclasses.asdict(config), **software, **run, **cost.as_log(choices)})
    path = RunDir(config.run_dir).checkpoint(first)
    row = receipt.checkpoint_row(path) if comm.is_root() and path.exists() else None
    splits = {"train": data.train, "validation": data.validation}
    digests = {name: {"records": index.records, "sha256": data_digest(index)} for name, index in splits.items()}
    start = {"step": first, "steps": total_steps, "skipped_steps": progress.skipped_steps, "ranks": comm.size()}
    process = describe_process()
    process["packages"]["mpi"] = mpi_version()
    reporter.event("start", **process, **start, arithmetic=arithmetic, hosts=hosts, checkpoint=row, data=digests)
    run_on_root(lambda: write_run_files(config, reporter.console))
    run_on_root(lambda: write_class_names(config, data.train, data.label_base, first))
    run_on_root(lambda: show_start(config, data, first, reporter))


def _print_run(
    config: TrainConfig, data: Splits, device: Device, total_steps: int, progress: TrainProgress, reporter: Reporter
) -> None:
    layers = layers_to_train(config)
    trained = [layer for layer in layers if layer.trained]
    parameters = f"{count_parameters(layers):,} parameters"
    if len(trained) < len(layers):
        names = ", ".join(layer.name for layer in layers if not layer.trained)
        parameters += f", {count_parameters(trained):,} of them trained; frozen: {names}"
    reporter.say(f"{config.model} at width {config.width:g}, {config.image_size} pixels: {parameters}")
    reporter.say(
        f"{data.train.records} records to train on, {data.validation.records} to evaluate; {TITLES[data.train.layout.kind]} "
        f"(--data_format={data.train.layout.kind}); labels from {data.label_base} "
        f"({'0 is background' if data.label_base else 'no background'}; --label_base overrides)"
    )
    side_by_side = f", {device.micro_batches} at a time" if device.micro_batches > 1 else ""
    slices = [part_bounds(config, rank, comm.size()) for rank in range(comm.size())]
    parts = sorted({high - low for low, high in slices}, reverse=True)
    reporter.say(
        f"{plural(comm.size(), 'rank')} on {device.kind}, {plural(device.threads, 'CPU thread')} per operation, "
        f"{device.input_threads} to decode images; {config.global_batch} images per update: "
        f"{' or '.join(map(str, parts))} per rank, in micro-batches of at most {config.device_batch}{side_by_side}; "
        f"reproducible to {config.reproducible}"
    )
    busy = device.threads * min(device.micro_batches, -(-parts[0] // config.device_batch))
    if device.kind == "CPU" and busy < device.cores:
        reporter.say(
            f"{busy} of {device.cores} cores of each rank compute: a new run with --compute_threads, a smaller "
            f"--device_batch or more ranks would use more"
        )


def _warn_of_missing_packages(reporter: Reporter) -> None:
    optional = {
        "dllogger": "dllogger.json and DLLogger's lines are written without it, in its formats",
        "tensorboard": "tensorboard/ is written without it, numbers alone, and can be viewed where it is installed",
    }
    if comm.size() > 1 and mpi_version():
        optional["mpi4py"] = "a rank that fails exits, and mpirun is left to notice it and end the others"
    for name, effect in optional.items():
        if importlib.util.find_spec(name) is None:
            reporter.say(f"{name} is not installed: {effect}")
