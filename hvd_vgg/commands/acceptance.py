"""The `acceptance` command: tries a new host or cluster from end to end, and leaves one directory of evidence to send.

Each stage is a command of this package as a user would type it. It is shown while it runs, and kept in logs/. What they
wrote is then judged by `hvd_vgg.commands.acceptance_report`. Nothing here imports TensorFlow.
"""

import dataclasses
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen
from typing import Any, Dict, List, NamedTuple, Optional

from hvd_vgg.commands.acceptance_report import Bundle, assess, format_page
from hvd_vgg.config import RSH_AGENT, AcceptanceConfig, BatchConfig, LaunchConfig
from hvd_vgg.doctor.driver import find_accelerators
from hvd_vgg.doctor.packages import this_host
from hvd_vgg.environment import PROGRAM, nested_refusal
from hvd_vgg.errors import CONFIGURATION, DATA, DONE, STOPPED, Failure
from hvd_vgg.flags import to_flag_file
from hvd_vgg.launcher.hostfile import read_hostfile
from hvd_vgg.launcher.mpirun import STOP_SIGNALS
from hvd_vgg.launcher.parent_death import dies_with
from hvd_vgg.launcher.supervisor import LaunchSpec, rank_count
from hvd_vgg.provenance import code_fingerprint, instruction_sets, processor_name
from hvd_vgg.reporting.findings import FAILURE, worst
from hvd_vgg.run_dir import atomic_write_text, writing
from hvd_vgg.streams import write_line
from hvd_vgg.text import format_duration, plural

_LOG_BYTES = 200_000  # of each stage, the newest: the directory is to be sent by mail
# A rate at which no network diverges; equality of states asks for nothing more.
_SHORT_RUN = ("--lr=1e-4", "--lr_schedule=constant", "--eval_every_epochs=0", "--save_every_steps=0", "--log_every_steps=1")


class Stage(NamedTuple):
    """A command to run: its name in the results, what it does, and its words as a user types them.

    needed: where it fails, nothing after it can work.
    """

    name: str
    text: str
    words: List[str]
    needed: bool = False


def acceptance(config: AcceptanceConfig) -> None:
    """Runs all stages, prints the verdict and leaves --run_dir. Raises Failure.

    With the code of the first stage that failed, DATA where all ended well but one result is not as it should be,
    CONFIGURATION if --run_dir is not empty, and STOPPED on a signal to stop, in which case the verdict is on what there is.
    """
    refusal = nested_refusal(os.environ)
    if refusal:
        raise Failure(CONFIGURATION, refusal)
    hosts = read_hostfile(config.hostfile) if config.hostfile else []
    ranks = rank_count(_launch_config(config), LaunchSpec([], shared=config), hosts)
    bundle, stop = Bundle(Path(config.run_dir).absolute()), _Stop()
    if config.dry_run:
        plan = stages(config, ranks, bundle, bundle.path / "work")
        print(*(f"+ {shlex.join(stage.words)}" for stage in plan), sep="\n")
        return
    _make_directory(bundle)
    began, results = time.monotonic(), []  # type: float, List[Dict[str, Any]]
    # Drawn pictures and checkpoints, gigabytes; in --run_dir, because all hosts must see them.
    with writing(bundle.path, CONFIGURATION):
        directory = tempfile.TemporaryDirectory(prefix="work-", dir=bundle.path)
    try:
        work = Path(directory.name)
        plan = stages(config, ranks, bundle, work)
        _write(bundle.flags, to_flag_file(_network_flags(config, work)))
        for number, stage in enumerate(plan, 1):
            write_line(f"== {number} of {len(plan)}: {stage.text}", sys.stdout)
            results.append(_run(stage, bundle, stop))
            write_line(f"== {stage.name}: {_ended(results[-1])}", sys.stdout)
            if stop.requested or (results[-1]["code"] != DONE and stage.needed):
                break
        _keep_runs(bundle, work)
    finally:
        _clean_up(directory)
    facts = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(time.monotonic() - began, 1),
        "code": code_fingerprint(),
        "machine": _machine(ranks, len(hosts)),
        "flags": dataclasses.asdict(config),
        "stages": results,
    }
    findings = assess(bundle, facts, len(plan))
    facts.update(verdict=worst(findings), findings=[finding._asdict() for finding in findings])
    _write(bundle.results, json.dumps(facts, indent=1) + "\n")
    page = format_page(bundle, facts, findings)
    _write(bundle.page, page)
    write_line(page, sys.stdout, end="")
    if stop.requested:
        raise Failure(STOPPED, f"stopped on request; {bundle.path} has what was measured until then")
    if worst(findings) == FAILURE:
        code = next((result["code"] for result in results if result["code"] != DONE), DATA)
        raise Failure(code, f"not accepted, see above; {bundle.path} has the results")


def stages(config: AcceptanceConfig, ranks: int, bundle: Bundle, work: Path) -> List[Stage]:
    """Returns what is run, in order, on `ranks` ranks, half of them and one."""
    counts = rank_counts(ranks)
    flagfile, drawn, real = f"--flagfile={bundle.flags}", f"--data_dir={work / 'data'}", bool(config.data_dir)
    on = f"on {' and '.join(map(str, counts))} rank{'s' if ranks > 1 else ''}"

    def launch(count: int, *words: str) -> List[str]:
        own = ["hvd-vgg", "launch", *_launch_flags(_launch_config(config), count)]
        if config.gloo:
            own = ["horovodrun", "--gloo", "-np", str(count), "hvd-vgg"]
        return [*own, *words[:1], flagfile, *words[1:]]

    images = config.global_batch
    pictures = [f"--train_images={max(10, 4 * images)}", f"--validation_images={max(10, images)}", "--shards=4"]
    planned = [
        Stage(
            "data",
            f"draw {5 * images} pictures",
            ["hvd-vgg", "make-demo-data", drawn, *pictures, f"--image_size={max(32, round(1.75 * config.image_size))}"],
            needed=True,
        ),
        Stage(
            "doctor",
            f"check {plural(ranks, 'rank')}: software, devices, links, collectives, data",
            launch(
                ranks, "doctor", *["--collectives"] * (ranks > 1), f"--out={bundle.doctor}", f"--run_dir={work / 'doctor'}",
                f"--gbit={config.gbit}", "--join_seconds=120",
            ),
            needed=True,
        ),
    ]  # fmt: skip
    for precision in precisions(config):
        measured = [f"--ranks={','.join(map(str, counts))}", f"--steps={config.updates}", f"--precision={precision}"]
        measured += [f"--out={bundle.benchmark(precision)}", f"--device_tflops={config.device_tflops}"]
        kind = "read from --data_dir" if real else "drawn"
        planned.append(
            Stage(
                f"benchmark-{precision}",
                f"{config.updates} updates in {precision} {on}: images on the device, from the host, {kind}",
                launch(ranks, "benchmark", *measured, f"--run_dir={work / 'benchmark'}"),
            )
        )
    for count in counts:
        trained = [drawn, "--label_base=auto", f"--run_dir={work / f'ranks-{count}'}", *_SHORT_RUN]
        where, half = f"on {plural(count, 'rank')}", config.equal_steps // 2
        if count == ranks:  # in two starts, which must not show
            begun = launch(count, "train", *trained, f"--steps={half}")
            planned.append(Stage(f"train-{count}-begin", f"train {half} steps {where}", begun))
            where += ", continued from a checkpoint"
        whole = launch(count, "train", *trained, f"--steps={config.equal_steps}")
        planned.append(Stage(f"train-{count}", f"train {config.equal_steps} steps {where}", whole))
    last = work / f"ranks-{ranks}"
    planned.append(Stage("verify", "check what the last run claims", ["hvd-vgg", "verify-run", str(last), drawn]))
    for count in counts[:-1]:
        same = f"--same_as={work / f'ranks-{count}'}"
        words = ["hvd-vgg", "verify-run", str(last), same]
        planned.append(Stage(f"equal-{count}", f"compare the run with that on {plural(count, 'rank')}", words))
    return planned


def rank_counts(ranks: int) -> List[int]:
    """Returns the numbers of ranks that are compared: one, half and all."""
    return sorted({1, max(1, ranks // 2), ranks})


def precisions(config: AcceptanceConfig) -> List[str]:
    """Returns the types that are measured: --precision, and the 16-bit one that the devices here compute fast."""
    half = config.half_precision
    if half == "auto":
        on_cpu = find_accelerators(this_host()).vendor == "CPU"
        half = "float16" if not on_cpu else "bfloat16" if "bf16" in instruction_sets(Path("/")) else "none"
    return list(dict.fromkeys([config.precision] + [half] * (half != "none")))


class _Stop:
    """Handler of the signals that stop a launcher: passes a request to stop to the command that is running."""

    def __init__(self) -> None:
        self.requested, self.process = False, None  # type: bool, Optional[Popen[bytes]]
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self)

    def __call__(self, number: int, frame: Any) -> None:
        self.requested = True
        self.watch(self.process)

    def watch(self, process: "Optional[Popen[bytes]]") -> None:
        """Names the command that is running, or None."""
        self.process = process
        if self.requested and process:
            process.terminate()  # the launcher has its ranks save and exit


def _run(stage: Stage, bundle: Bundle, stop: _Stop) -> Dict[str, Any]:
    """Runs a stage, prints and keeps what it prints; returns its command, exit code and seconds."""
    printed, began = bytearray(), time.monotonic()
    command = [part for word in stage.words for part in (PROGRAM if word == "hvd-vgg" else [word])]
    with Popen(  # noqa: S603
        command, stdout=PIPE, stderr=STDOUT, start_new_session=True, preexec_fn=dies_with(os.getpid())
    ) as process:
        stop.watch(process)
        for line in process.stdout or ():
            printed += line
            write_line(line.decode(errors="replace"), sys.stdout, end="")
        process.wait()
        stop.watch(None)
    _write(bundle.log(stage.name), f"+ {shlex.join(stage.words)}\n{printed[-_LOG_BYTES:].decode(errors='replace')}")
    code = process.returncode if process.returncode >= 0 else 128 - process.returncode
    return {"stage": stage.name, "command": stage.words, "code": code, "seconds": round(time.monotonic() - began, 1)}


def _clean_up(directory: "tempfile.TemporaryDirectory[str]") -> None:
    """Deletes the directory; says what is left of it, as where a file server keeps a file that a process still has open."""
    try:
        directory.cleanup()
    except OSError as error:
        write_line(f"hvd-vgg: {directory.name} is not needed any more and cannot be deleted: {error}", sys.stderr)


def _make_directory(bundle: Bundle) -> None:
    try:
        str(bundle.path).encode()
    except UnicodeEncodeError as error:
        text = f"--run_dir={os.fsencode(bundle.path)!r}: expected a path in UTF-8, for results that can be read elsewhere"
        raise Failure(CONFIGURATION, text) from error
    with writing(bundle.path, CONFIGURATION):
        bundle.path.mkdir(parents=True, exist_ok=True)
        if any(bundle.path.iterdir()):
            raise Failure(CONFIGURATION, f"--run_dir={bundle.path} is not empty: name a new directory for the results")
        bundle.log("").parent.mkdir()


def _keep_runs(bundle: Bundle, work: Path) -> None:
    """Copies what is small of each run: all but checkpoints, events and the index of the data."""
    for run in sorted(work.glob("ranks-*")):
        kept = bundle.path / "runs" / run.name
        kept.mkdir(parents=True)
        for name in ("flags.txt", "dllogger.json", "result.json", "receipt.json", "restarts.jsonl"):
            if (run / name).is_file():
                with writing(kept / name):
                    shutil.copyfile(run / name, kept / name)
        sizes = [path.stat().st_size for path in (run / "checkpoints").glob("step-*")]
        _write(kept / "checkpoint_bytes.txt", f"{max(sizes, default=0)}\n")


def _network_flags(config: AcceptanceConfig, work: Path) -> BatchConfig:
    """Returns the flags that all stages share."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(BatchConfig)}
    return BatchConfig(**{**values, "data_dir": config.data_dir or str(work / "data"), "run_dir": str(work / "run")})


def _launch_config(config: AcceptanceConfig) -> LaunchConfig:
    names = ("ranks", "hostfile", "rsh_agent", "network", "export_env")
    limit = 60 * config.stage_minutes
    return LaunchConfig(**{name: getattr(config, name) for name in names}, max_restarts=0, time_limit_seconds=limit)


def _launch_flags(config: LaunchConfig, ranks: int) -> List[str]:
    words = [f"--ranks={ranks}", "--max_restarts=0", f"--time_limit_seconds={config.time_limit_seconds}"]
    chosen = {name: getattr(config, name) for name in ("hostfile", "network", "export_env")}
    chosen["rsh_agent"] = config.rsh_agent if config.rsh_agent != RSH_AGENT else ""
    return words + [f"--{name}={value}" for name, value in chosen.items() if value]


def _machine(ranks: int, hosts: int) -> Dict[str, Any]:
    accelerators = find_accelerators(this_host())
    driver = accelerators.listing.driver if accelerators.listing else ""
    return {
        "ranks": ranks,
        "hosts": max(1, hosts),
        "vendor": accelerators.vendor,
        "driver": driver,
        "processor": processor_name(Path("/")),
        "instructions": instruction_sets(Path("/")),
    }


def _ended(result: Dict[str, Any]) -> str:
    how = "done" if result["code"] == DONE else f"ended with {result['code']}"
    return f"{how}, {format_duration(result['seconds'])}"


def _write(path: Path, text: str) -> None:
    with writing(path):
        atomic_write_text(path, text)
