"""Every flag, once: its default, unit, range and meaning; and the frozen Config that a run is made of."""

import dataclasses
import difflib
import math
import re
import textwrap
from pathlib import Path
from typing import Any, Dict, FrozenSet, List, Optional, Sequence, Set, Tuple

from absl import flags

from hvd_vgg.run.health import USAGE, Failure


def flag(default: Any, group: str, text: str, unit: str = "", **limits: Any) -> Any:
    """Declares one field of Config, which is one flag.

    `limits`: `choices`, `at_least`, `above`, `at_most`, `below`; and `learned=True` where the value decides what is
    learned (a checkpoint goes on only under the same one).
    """
    return dataclasses.field(default=default, metadata={"group": group, "text": text, "unit": unit, **limits})


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run is: with the data, everything that decides its result. One field, one flag."""

    data_dir: str = flag(
        "./imagenet_tfrecord", "Data", "Directory (or link to one) with train-?????-of-????? and validation-*.", "path"
    )
    num_classes: int = flag(1000, "Data", "Classes; labels outside them are an error.", at_least=2, learned=True)
    label_base: str = flag(
        "auto",
        "Data",
        "The label of the first class: 1 (ImageNet's own files, 0 is background), 0, or auto: found in the data.",
        choices=("auto", "0", "1"),
    )
    image_size: int = flag(224, "Data", "Height and width the network sees.", "pixels", at_least=32, learned=True)
    augment: str = flag(
        "crop",
        "Data",
        "none; flip; shift: pad by an eighth, random crop, flip; crop: random-resized crop of area 0.08 to 1, flip.",
        choices=("none", "flip", "shift", "crop"),
        learned=True,
    )
    shuffle_block_records: int = flag(
        1,
        "Data",
        "Where random reads are slow: blocks of so many consecutive records are permuted as wholes, then the records within "
        "windows of 16384 // this many blocks, two at least. Storage is asked for whole blocks, a window ahead, on each "
        "host; two windows of ImageNet are 3.6 GB of its page cache. 1: all records, freely.",
        "records",
        at_least=1,
        at_most=2**31,
        learned=True,
    )

    bad_records_allowed: int = flag(
        0,
        "Data",
        "Bad records (checksum, features, label or image) that a run may go on without, of each split: in training another "
        "takes the place of each, the same on any ranks; in evaluation each counts as a miss. More, and so by default the "
        "first, end the run. A run may be started again with another number.",
        "records",
        at_least=0,
    )

    model: str = flag("vgg16", "Model", "The network.", choices=("vgg11", "vgg13", "vgg16", "vgg19"), learned=True)
    width: float = flag(1.0, "Model", "Factor on the width of every layer.", above=0.0, at_most=4.0, learned=True)
    dropout: float = flag(
        0.5, "Model", "Share of each hidden dense layer's outputs dropped.", at_least=0.0, below=1.0, learned=True
    )

    global_batch: int = flag(
        256, "Recipe", "Images an update, over all ranks: more ranks never change it.", "images", at_least=1, learned=True
    )
    epochs: float = flag(
        90.0, "Recipe", "Length of the run, when --steps is 0.", "epochs", above=0.0, at_most=1e5, learned=True
    )
    steps: int = flag(
        0,
        "Recipe",
        "Length of the run; 0: as many as --epochs needs.",
        "updates",
        at_least=0,
        at_most=99_999_999,
        learned=True,
    )
    optimizer: str = flag("momentum", "Recipe", "SGD with momentum.", choices=("momentum", "nesterov"), learned=True)
    lr: float = flag(0.01, "Recipe", "Learning rate after warm-up, for the mean gradient.", above=0.0, learned=True)
    lr_schedule: str = flag(
        "step",
        "Recipe",
        "constant; step: divided by 10 at each of --lr_step_epochs; cosine: to 0 at the end.",
        choices=("constant", "step", "cosine"),
        learned=True,
    )
    lr_step_epochs: Tuple[float, ...] = flag(
        (30.0, 60.0), "Recipe", "When `step` divides, separated by commas.", "epochs", learned=True
    )
    warmup_epochs: float = flag(
        0.0, "Recipe", "The learning rate rises linearly over these.", "epochs", at_least=0.0, learned=True
    )
    momentum: float = flag(0.9, "Recipe", "Momentum.", at_least=0.0, below=1.0, learned=True)
    weight_decay: float = flag(
        1e-4, "Recipe", "L2 penalty of all weights and biases, added to the gradient.", at_least=0.0, learned=True
    )
    seed: int = flag(1, "Recipe", "Initial weights, order, crops and dropout are functions of it.", at_least=0, learned=True)

    run_dir: str = flag("./run", "Run", "Where checkpoints, logs and results go; made if absent.", "path")
    resume: str = flag(
        "auto",
        "Run",
        "auto: go on from the newest checkpoint in --run_dir, if any; required: there must be one; never: there must "
        "be none.",
        choices=("auto", "required", "never"),
    )
    allow_config_change: str = flag(
        "",
        "Run",
        "Flags that may differ from those of the checkpoint to go on from, separated by commas: lr,weight_decay.",
    )
    hang_seconds: float = flag(
        0.0,
        "Run",
        "A rank that takes longer for an update is taken for hung: it writes its last words and ends the job with 75. 0: 20 "
        "times the median update, 60 at least. The start, evaluating and saving may take 10 times as long.",
        "seconds",
        at_least=0.0,
    )
    eval_every_epochs: float = flag(
        1.0, "Run", "Evaluate this often, and at the end; 0: at the end only.", "epochs", at_least=0.0
    )
    save_every_steps: int = flag(
        1000,
        "Run",
        "Checkpoint this often too; always at the end and at an evaluation better than all before.",
        "updates",
        at_least=0,
    )
    keep_checkpoints: int = flag(3, "Run", "Newest checkpoints kept; the best is kept beside them.", at_least=1)
    log_every_steps: int = flag(20, "Run", "One log line for this many.", "updates", at_least=1)
    stop_at_top1: float = flag(
        0.0, "Run", "End when an evaluation reaches this acc@1; 0: never.", "fraction", at_least=0.0, at_most=1.0
    )
    on_nonfinite: str = flag(
        "stop",
        "Run",
        "When a loss or gradient is not finite, which is never applied: stop: end with 81; rewind: go back to the newest "
        "checkpoint and skip that step's records. Either way the step is kept for `hvd-vgg replay`.",
        choices=("stop", "rewind"),
    )
    max_rewinds: int = flag(2, "Run", "Steps that --on_nonfinite=rewind skips at most, over all starts.", at_least=1)
    profile_steps: str = flag(
        "",
        "Run",
        "FIRST:LAST, such as 100:110: profile these updates (TensorFlow's profile of --profile_ranks, Horovod's timeline as "
        "rank 0 sees all) into --run_dir/profile.",
        "updates",
    )
    profile_ranks: Tuple[float, ...] = flag(
        (0.0,), "Run", "Ranks whose TensorFlow is profiled, separated by commas.", at_least=0
    )
    console: str = flag(
        "auto",
        "Run",
        "What rank 0 prints: bar (a terminal); lines (a log file); dllogger: DLLogger's lines; auto: bar or lines.",
        choices=("auto", "bar", "lines", "dllogger"),
    )

    device_batch: int = flag(
        32, "Device", "Images a device holds at once; a rank's larger part is worked through in turn.", "images", at_least=1
    )
    precision: str = flag(
        "float32",
        "Device",
        "What the network is computed in. Weights, updates, softmax and sums over micro-batches and ranks are float32 "
        "always; float16 scales its loss and skips an update whose gradient overflows (a loss that does ends the run).",
        choices=("float32", "bfloat16", "float16"),
        learned=True,
    )
    xla: bool = flag(False, "Device", "Compile a rank's forward and backward pass by XLA; for GPUs.")
    device_tflops: float = flag(
        0.0, "Device", "A device's peak, to print what share of it training reaches; 0: not known.", "TFLOP/s", at_least=0.0
    )
    input_threads: int = flag(
        0,
        "Device",
        "Threads of a rank that read and decode images; 0: its part of the host's cores, one of them left to Horovod if "
        "there are more than two. They decode at most A = 2 + ceil(8 threads / images a rank) batches ahead; 4 more are "
        "read ahead into the page cache. Images are the same for any number.",
        "threads",
        at_least=0,
        at_most=1024,
    )
    exchange: str = flag(
        "auto",
        "Device",
        "How dense layers' gradients cross the network: allreduce sums products, factored gathers rows, auto takes what is "
        "fewer bytes for each layer. The result is the same to rounding.",
        choices=("auto", "allreduce", "factored"),
    )
    wire_dtype: str = flag(
        "float32",
        "Device",
        "What crosses it; float16 halves the bytes and rounds, by sums that depend on the number of ranks.",
        choices=("float32", "float16"),
        learned=True,
    )
    drift_every_steps: int = flag(
        500, "Device", "Compare all ranks' weights this often, exactly; 0: never.", "updates", at_least=0
    )


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(Config):
    """A run's Config, taken from its directory, and which of its checkpoints to evaluate."""

    checkpoint: str = flag("best", "Evaluate", "best, newest, or the path of a .safetensors file of this package.")


@dataclasses.dataclass(frozen=True)
class ReplayConfig(Config):
    """The Config of a run as it was at a step that was not finite, and which step that is."""

    step: int = flag(-1, "Replay", "The step to repeat; -1: the latest that was not finite.", at_least=-1)


@dataclasses.dataclass(frozen=True)
class VerifyConfig:
    """What `verify-run` holds against what."""

    run_dir: str = flag("./run", "Verify", "The run's directory.", "path")
    data_dir: str = flag(
        "", "Verify", "The run's data: its newest and its best checkpoint are evaluated again; none: they are not.", "path"
    )
    hits_tolerance: int = flag(
        0,
        "Verify",
        "Hits by which an evaluation here may differ from the run's: on unlike processors rounding alone moves a few.",
        "records",
        at_least=0,
    )


@dataclasses.dataclass(frozen=True)
class PlanConfig(Config):
    """A run's Config and the cluster it is planned for."""

    ranks: int = flag(8, "Plan", "Ranks of the job.", "ranks", at_least=1)
    ranks_per_host: int = flag(1, "Plan", "Ranks that share a host and its link.", "ranks", at_least=1)
    gbit: float = flag(25.0, "Plan", "Rate of a host's link.", "Gbit/s", above=0.0)
    fps_per_rank: float = flag(150.0, "Plan", "What a rank trains alone, without exchange.", "images/s", above=0.0)
    sweep_ranks: Tuple[float, ...] = flag(
        (), "Plan", "Also efficiency at these numbers of ranks, with the images of a rank held fixed.", "ranks", at_least=1
    )
    out: str = flag("", "Plan", "Draw the sweep into this file (.png, .svg, .pdf; needs matplotlib).", "path")


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig(Config):
    """A run's Config, and how to measure it; --steps is the updates measured for each row."""

    ranks: Tuple[float, ...] = flag(
        (), "Benchmark", "Measure on these numbers of the ranks started; none: on all.", "ranks", at_least=1
    )
    out: str = flag("", "Benchmark", "Write what was measured into this file, as JSON.", "path")


# Unknown keys are refused, never learned: who adds a host's key must have it from its administrator.
RSH_AGENT = "ssh -o BatchMode=yes -o ConnectTimeout=5 -o StrictHostKeyChecking=yes"


@dataclasses.dataclass(frozen=True)
class DoctorConfig(Config):
    """The Config of the run to come, and what else to look at."""

    full: bool = flag(False, "Doctor", "Read, check and decode every record; keeps the index for the run.")
    collectives: bool = flag(
        False, "Doctor", "Sum and gather gradients of the network's own shapes: right, how fast, and as `plan` assumes?"
    )
    hostfile: str = flag(
        "", "Doctor", "Before mpirun, without it: does each host of this file answer, and can it connect back?", "path"
    )
    rsh_agent: str = flag(RSH_AGENT, "Doctor", "What reaches another host, as for `launch`.")
    network: str = flag("", "Doctor", "With --hostfile: networks or interfaces that hosts speak over, as for `launch`.")
    join_seconds: float = flag(
        8.0, "Doctor", "How long a rank waits for all others to have started and be reached.", "seconds", above=0.0
    )
    gbit: float = flag(
        0.0,
        "Doctor",
        "Rate of a host's link, as given to `plan`; 0: not known, nothing is compared.",
        "Gbit/s",
        at_least=0.0,
    )
    out: str = flag("", "Doctor", "Write what was found into this file, as JSON.", "path")


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """How a command is started on many ranks."""

    ranks: int = flag(
        0, "Ranks", "How many; 0: one for each slot of --hostfile, or for each device that TensorFlow sees here.", at_least=0
    )
    hostfile: str = flag(
        "",
        "Ranks",
        "Hosts, one a line: `name slots=N` for N ranks on it. Each must have this Python, the data and the run directory "
        "under the same paths. None: all ranks are on this host.",
        "path",
    )
    rsh_agent: str = flag(
        RSH_AGENT,
        "Ranks",
        "What reaches another host, called as `AGENT HOST COMMAND`; cut at spaces. A host of unknown key is refused.",
    )
    network: str = flag(
        "",
        "Ranks",
        "Networks or interfaces that hosts speak over, where they have several: 10.1.0.0/16 or eth1. MPI keeps to them; "
        "NCCL too where all are names (NCCL_SOCKET_IFNAME, unless that is set): it knows no networks.",
    )
    export_env: str = flag(
        "",
        "Ranks",
        "Names of further environment variables for ranks on other hosts, separated by commas. They get PATH, "
        "LD_LIBRARY_PATH, PYTHONPATH, TMPDIR, TZ, LANG, LC_*, OMP_NUM_THREADS, XLA_FLAGS, HOROVOD_*, TF_*, NCCL_*, CUDA_*, "
        "UCX_*, GLOO_* and Iluvatar's UMD_*, CRT_* and DRT_*, but nothing called token, key, secret, pass or cred.",
    )
    max_restarts: int = flag(
        3,
        "Supervision",
        "How often `train` is started again that hung (75), was preempted (80) or was killed by a signal (128 and its "
        "number), on the hosts that still answer. Two ends at the same step with no new checkpoint are the last.",
        at_least=0,
    )
    grace_seconds: float = flag(
        60.0,
        "Supervision",
        "On SIGTERM, SIGINT, SIGHUP or SIGUSR1 to the launcher all ranks save and leave; after so long they are ended.",
        "seconds",
        above=0.0,
    )
    time_limit_seconds: float = flag(
        0.0,
        "Supervision",
        "After so long, restarts included, all ranks save and leave, and the exit code is 75; 0: never.",
        "seconds",
        at_least=0.0,
    )
    dry_run: bool = flag(False, "Supervision", "Print the command, start nothing.")


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """What `make-demo-data` draws."""

    data_dir: str = flag("./demo_data", "Data", "Directory to write the shards into; made if absent.", "path")
    train_images: int = flag(4000, "Data", "Images to train on.", "images", at_least=10)
    validation_images: int = flag(1000, "Data", "Images to evaluate on.", "images", at_least=10)
    shards: int = flag(4, "Data", "Files of the train split; the validation split has half as many.", at_least=1)
    image_size: int = flag(80, "Data", "Mean height and width; drawn from 0.75 to 1.25 of it.", "pixels", at_least=32)
    seed: int = flag(1, "Data", "The pictures are a function of it.", at_least=0)
    console: str = flag("auto", "Run", "Progress as a bar or as lines.", choices=("auto", "bar", "lines"))


@dataclasses.dataclass(frozen=True)
class _Illegal:
    """The text of a flag that its type cannot hold, kept so that all such flags are reported together."""

    text: str
    expected: str


class _Parser(flags.ArgumentParser):
    """Parses by a field's type and never raises."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind = kind

    def parse(self, argument: Any) -> Any:
        if not isinstance(argument, str):
            return argument
        try:
            if self.kind is int:
                return int(argument)
            if self.kind is float:
                return float(argument)
            if self.kind is str:
                return argument
            return tuple(float(part) for part in argument.split(",") if part.strip())
        except ValueError:
            name = {int: "a whole number", float: "a number"}.get(self.kind, "numbers separated by commas")
            return _Illegal(argument, name)


class _Switch(flags.BooleanParser):
    """Parses true and false, and never raises."""

    def parse(self, argument: Any) -> Any:
        try:
            return super().parse(argument)
        except ValueError:
            return _Illegal(argument, "true or false")


def parse(kind: Any, argv: Sequence[str]) -> Any:
    """Returns `kind` (Config or a sibling) from the flags in `argv` (no program name), flag files included.

    Raises Failure(USAGE) with every illegal flag, value and combination in one message.
    """
    values = flags.FlagValues()
    for field in dataclasses.fields(kind):
        if field.type is bool:
            default: Any = field.default
            switch = flags.BooleanFlag(field.name, default, field.metadata["text"])
            switch.parser = _Switch()
            flags.DEFINE_flag(switch, values)
        else:
            flags.DEFINE(_Parser(field.type), field.name, field.default, field.metadata["text"], flag_values=values)
    _check_flag_files(argv)
    try:
        left = values([""] + list(argv), known_only=True)[1:]
    except flags.Error as error:
        raise Failure(USAGE, f"flags: {error}") from error
    names = [field.name for field in dataclasses.fields(kind)]
    errors = [_unknown(argument, names) for argument in left]
    chosen = {name: values[name].value for name in names}
    for name, value in chosen.items():
        if isinstance(value, _Illegal):
            errors.append(f"--{name}={value.text}: expected {value.expected}")
    legal = {name: value for name, value in chosen.items() if not isinstance(value, _Illegal)}
    config = kind(**legal)
    errors.extend(validate(config))
    if errors:
        raise Failure(USAGE, f"{len(errors)} illegal flag(s):\n" + "\n".join(f"  {error}" for error in errors))
    return config


def _check_flag_files(argv: Sequence[str]) -> None:
    """Raises Failure(USAGE) for a flag file that reads another: whoever sends one would choose what else is read here."""
    for at, word in enumerate(argv):
        name, equals, path = word.partition("=")
        if name.lstrip("-") != "flagfile" or not name.startswith("-"):
            continue
        path = path if equals else "".join(argv[at + 1 : at + 2])
        try:
            lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise Failure(USAGE, f"--flagfile={path} cannot be read: {error}") from error
        for number, line in enumerate(lines, start=1):
            if re.match(r"\s*--?flagfile\b", line):
                text = f"--flagfile={path}, line {number}: a flag file reads no other; give each its own --flagfile"
                raise Failure(USAGE, text)


def _unknown(argument: str, names: Sequence[str]) -> str:
    name = argument.lstrip("-").split("=")[0]
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean --{close[0]}?" if close else "; --help lists the flags"
    return f"{argument}: no such flag{hint}"


def validate(config: Any) -> List[str]:
    """Returns every illegal value and combination of `config`, one line each; empty when it can run."""
    errors = []
    for field in dataclasses.fields(config):
        value, limits = getattr(config, field.name), field.metadata
        for number in value if isinstance(value, tuple) else (value,):
            expected = _violated(number, limits)
            if expected:
                errors.append(f"--{field.name}={_text(value)}: expected {expected}")
    if isinstance(config, Config):
        errors.extend(_conflicts(config))
    for name in getattr(config, "export_env", "").split(","):
        if name and not name.isidentifier():
            errors.append(f"--export_env={config.export_env}: {name!r} is no name of a variable; values do not belong here")
    if isinstance(config, (LaunchConfig, DoctorConfig)) and not config.rsh_agent.strip():
        errors.append("--rsh_agent: expected a command, found nothing")
    if isinstance(config, DoctorConfig) and not config.hostfile:
        for name, value, none in (("network", config.network, ""), ("rsh_agent", config.rsh_agent, RSH_AGENT)):
            if value != none:
                errors.append(f"--{name}={value} needs --hostfile; ranks get it from hvd-vgg launch --{name}={value} doctor")
    if isinstance(config, DemoConfig) and config.shards > min(config.train_images, 2 * config.validation_images - 1):
        errors.append(f"--shards={config.shards}: expected at least one image for each shard of both splits")
    return errors


def _violated(value: Any, limits: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    if "choices" in limits and value not in limits["choices"]:
        return "one of " + ", ".join(limits["choices"])
    if "at_least" in limits and value < limits["at_least"]:
        return f"at least {limits['at_least']}"
    if "above" in limits and value <= limits["above"]:
        return f"more than {limits['above']}"
    if "at_most" in limits and value > limits["at_most"]:
        return f"at most {limits['at_most']}"
    if "below" in limits and value >= limits["below"]:
        return f"less than {limits['below']}"
    return ""


def _conflicts(config: Config) -> List[str]:
    errors = []
    steps = config.lr_step_epochs
    if any(later <= earlier for earlier, later in zip((0.0,) + steps, steps)):
        errors.append(f"--lr_step_epochs={_text(steps)}: expected rising numbers above 0")
    if config.lr_schedule == "step" and not steps:
        errors.append("--lr_schedule=step needs --lr_step_epochs")
    if config.optimizer == "nesterov" and config.momentum == 0:
        errors.append("--optimizer=nesterov needs --momentum above 0")
    if not config.steps and config.warmup_epochs >= config.epochs:
        errors.append(f"--warmup_epochs={_text(config.warmup_epochs)}: expected less than --epochs={_text(config.epochs)}")
    for name in ("profile_ranks", "sweep_ranks", "ranks"):
        value = getattr(config, name, ())
        if isinstance(value, tuple) and any(number != int(number) for number in value if math.isfinite(number)):
            errors.append(f"--{name}={_text(value)}: expected whole numbers")
    if isinstance(config, BenchmarkConfig):
        if config.steps == 1:
            errors.append("--steps=1: expected at least 2 updates to measure, or 0 for the usual number")
        if config.profile_steps:
            errors.append("--profile_steps is for train")
        if config.console == "dllogger":
            errors.append("--console=dllogger is for train; --out writes what was measured")
    if isinstance(config, PlanConfig):
        if config.global_batch < config.ranks:
            errors.append(
                f"--global_batch={config.global_batch}: expected at least one image for each of --ranks={config.ranks}"
            )
        if config.out and Path(config.out).suffix not in (".png", ".svg", ".pdf"):
            errors.append(f"--out={config.out}: expected a name that ends in .png, .svg or .pdf")
        if config.out and not config.sweep_ranks:
            errors.append("--out needs --sweep_ranks")
    if config.profile_steps and not profiled_steps(config):
        errors.append(
            f"--profile_steps={config.profile_steps}: expected FIRST:LAST, two whole numbers, the first not larger"
        )
    for name in allowed_changes(config) - set(learned()):
        errors.append(f"--allow_config_change={config.allow_config_change}: {name} is not among {', '.join(learned())}")
    for name in ("data_dir", "run_dir"):
        if not getattr(config, name):
            errors.append(f"--{name}: expected a path, found nothing")
    return errors


def total_steps(config: Config, records: int) -> int:
    """Returns the updates of the run over a data set of `records`: ceil(epochs * records / global_batch)."""
    return config.steps or max(1, math.ceil(config.epochs * records / config.global_batch - 1e-9))


def learned() -> List[str]:
    """Returns the names of the flags that decide what is learned, which --allow_config_change may name."""
    return [field.name for field in dataclasses.fields(Config) if field.metadata.get("learned")]


def allowed_changes(config: Config) -> Set[str]:
    """Returns the names in --allow_config_change."""
    return {name.strip() for name in config.allow_config_change.split(",") if name.strip()}


def profiled_steps(config: Config) -> range:
    """Returns the updates to profile, first and last included; empty for none, or where the text means none."""
    first, _, last = config.profile_steps.partition(":")
    return range(int(first), int(last) + 1) if first.isdecimal() and last.isdecimal() else range(0)


def epochs_to_steps(epochs: float, config: Config, records: int) -> int:
    """Returns the first step whose batch begins at or after `epochs` of the stream."""
    return math.ceil(epochs * records / config.global_batch - 1e-9)


def evaluation_steps(config: Config, records: int, total: int) -> FrozenSet[int]:
    """Returns the numbers of updates after which to evaluate; the last is the end of the run."""
    if not config.eval_every_epochs:
        return frozenset([total])
    count = int(total * config.global_batch / (records * config.eval_every_epochs)) + 1
    each = (epochs_to_steps(n * config.eval_every_epochs, config, records) for n in range(1, count + 1))
    return frozenset({done for done in each if 0 < done < total} | {total})


def identity(config: Config) -> Dict[str, Any]:
    """Returns the fields that decide what is learned; a checkpoint goes on only under equal ones.

    The length of the run is one of them only under `cosine`: with the other schedules a longer run begins as the
    shorter one did, and may continue it.
    """
    chosen = {name: getattr(config, name) for name in learned()}
    if config.lr_schedule != "cosine":
        del chosen["epochs"], chosen["steps"]
    if config.lr_schedule != "step":
        del chosen["lr_step_epochs"]
    return {name: list(value) if isinstance(value, tuple) else value for name, value in chosen.items()}


def to_flag_file(config: Any) -> str:
    """Returns `config` as a flag file with every flag, grouped; parsing it gives `config` again."""
    lines = []
    for group, fields in _groups(type(config)):
        lines.append(f"# {group}")
        lines.extend(f"--{field.name}={_text(getattr(config, field.name))}" for field in fields)
    return "\n".join(lines) + "\n"


def describe(kind: Any, usage: str) -> str:
    """Returns the text of --help: `usage`, then every flag by group with its default, unit and meaning."""
    lines = [usage.rstrip(), "", "Flags (--flagfile=FILE reads more of them from a file; a later one wins):"]
    for group, fields in _groups(kind):
        lines += ["", f"{group}:"]
        for field in fields:
            unit = f"  [{field.metadata['unit']}]" if field.metadata["unit"] else ""
            choices = f"  ({'|'.join(field.metadata['choices'])})" if "choices" in field.metadata else ""
            lines.append(f"  --{field.name}={_text(field.default)}{unit}{choices}")
            lines.extend(textwrap.wrap(field.metadata["text"], 100, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines) + "\n"


def _groups(kind: Any) -> List[Tuple[str, List[Any]]]:
    groups: Dict[str, List[Any]] = {}
    for field in dataclasses.fields(kind):
        groups.setdefault(field.metadata["group"], []).append(field)
    return list(groups.items())


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(_text(part) for part in value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        text = repr(value)
        return text[:-2] if text.endswith(".0") else text
    return str(value)


def find_flag_file(folder: Path) -> Optional[Path]:
    """Returns the flag file in what a run left, or None."""
    path = folder / "flags.txt"
    return path if path.is_file() else None


def nonfinite_folder(run_dir: Path, step: int) -> Path:
    """Returns where a run keeps a step that was not finite; step -1: the latest that there is, or else no folder's name."""
    place = run_dir / "nonfinite"
    if step >= 0:
        return place / f"step-{step:08d}"
    return max(place.glob("step-????????"), default=place / "step-none")
