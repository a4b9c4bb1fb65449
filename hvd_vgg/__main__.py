"""hvd-vgg COMMAND [--flags]: the table of commands, and the single exit path of a process."""

import os
import sys

if __name__ == "__main__":  # python -m hvd_vgg, or this file by its path, which is how `launch` starts ranks
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        del sys.path[0]  # the current directory, or this one: a queue.py in it would take the place of Python's own
    sys.path.insert(0, __file__.rsplit(os.sep, 2)[0])
    import hvd_vgg  # noqa: F401 (this very package, wherever else there may be one)

    del sys.path[0]

from hvd_vgg.environment import leave_out_current_directory

leave_out_current_directory()  # before other modules are imported

import dataclasses
import importlib
import logging
import re
import shutil
import time
import traceback
import types
import warnings
from pathlib import Path
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

from hvd_vgg import __version__
from hvd_vgg.colours import RED, is_terminal, prefix
from hvd_vgg.environment import PROGRAM, launched_rank, library_path_hint, not_importable
from hvd_vgg.errors import BUG, CONFIGURATION, DONE, LOST_RANK, STOPPED, USAGE, Failure
from hvd_vgg.run_dir import RunDir
from hvd_vgg.streams import clear_bar, ensure_std_streams, write_line
from hvd_vgg.watchdog import watchdog

try:
    from hvd_vgg import config as configs
    from hvd_vgg.flags import describe_flags, parse_flags
except ImportError as error:  # absl-py, which reads the flags of all commands, doctor's too
    write_line(f"hvd-vgg: {error} ({sys.executable}): install it, or use launch/environment.sh", sys.stderr)
    sys.exit(CONFIGURATION)

USAGE_TEXT = f"""hvd-vgg {__version__}: trains VGG networks on ImageNet-style TFRecords with TensorFlow and Horovod.

  hvd-vgg train [--flagfile=FILE] [--flags]           train and evaluate; leaves everything in --run_dir
  hvd-vgg evaluate --run_dir=DIR [--flags]            score a checkpoint of a run on the validation records; --weights=FILE:
                                                      any weights
  hvd-vgg predict --weights=FILE IMAGE ... [--flags]  name the likeliest classes of images, or of directories of them
  hvd-vgg export RUN_DIR --to=FORM --out=PATH         write a run's best network as SavedModel, ONNX, Keras' .h5, state of
                                                      torchvision or safetensors; checked, with a model card
  hvd-vgg replay RUN_DIR [--step=N] [--flags]         repeat a step of a run that was not finite
  hvd-vgg verify-run RUN_DIR [--data_dir=DIR]         check what a run claims against what it left behind; --same_as=DIR:
                                                      and whether it is the same run as another
  hvd-vgg report RUN_DIR ... [--out=FILE.html]        draw a page of a run, or of several side by side; --watch: renew it
  hvd-vgg benchmark [--flags]                         measure throughput without input, with it, and on fewer ranks
  hvd-vgg plan --ranks=N --gbit=X [--flags]           predict what exchanging gradients costs on a cluster
  hvd-vgg doctor [--flagfile=FILE] [--flags]          check whether this host, or these ranks, can train, and what to do
  hvd-vgg prepare --source=DIR --out=DIR [--flags]    convert a data set, such as ILSVRC2012's archives, to TFRecords
  hvd-vgg inspect DATA_DIR [--out=FILE.png] [--flags] look at a data set: classes, sizes, bad and duplicate records; a sheet
                                                      of images as training sees them
  hvd-vgg acceptance --ranks=N [--flags]              try a new host or cluster from end to end; leaves evidence to send
  hvd-vgg make-demo-data --data_dir=DIR [--flags]     generate a small synthetic data set

  hvd-vgg launch --ranks=N [--flags] COMMAND ...      start any of them on many ranks; stops and restarts runs

Each runs alone or on many ranks, which only change how fast it goes:

  hvd-vgg launch --ranks=8 train --flagfile=configs/vgg16_imagenet.flags --data_dir=/data/imagenet

hvd-vgg COMMAND --help lists a command's flags. Exit codes: 0 done, 64 usage, 65 data, or a claim of a run does not hold,
70 error in the program, 74 a result could not be written, 75 hung or lost a rank, 78 configuration, 80 stopped on request,
81 not finite, or ranks drifted apart.
"""


class Command(NamedTuple):
    """A command: its configuration, the function that runs it as MODULE:FUNCTION, and the head of its --help.

    watched: whether the watchdog is started, since the command sends heartbeats.
    """

    config: Any
    target: str
    usage: str
    watched: bool = False


# Modules are imported when their command runs: --help and a wrong flag answer at once.
COMMANDS = {
    "train": Command(
        configs.TrainConfig,
        "hvd_vgg.training.loop:train",
        "hvd-vgg train [--flagfile=FILE] [--flags]: train and evaluate on all ranks.",
        watched=True,
    ),
    "evaluate": Command(
        configs.EvaluateConfig,
        "hvd_vgg.commands.evaluate:evaluate_run",
        "hvd-vgg evaluate --run_dir=DIR [--flags]: score a checkpoint. All flags default to the run's own.\n"
        "hvd-vgg evaluate --weights=FILE [--flags]: score weights without a run, of any kind that --init_from reads; the "
        "flags of network and pixels default to the file's own.",
        watched=True,
    ),
    "predict": Command(
        configs.PredictConfig,
        "hvd_vgg.commands.predict:predict",
        "hvd-vgg predict --weights=FILE_OR_RUN_DIR IMAGE ... [--flags], alone or on many ranks: print the likeliest classes "
        "of each image, or write them with --out. Directories are searched for images; behind -- all words are images. The "
        "flags of network and pixels default to those of the weights. Exit code 65 if a file is no image: it is named and "
        "passed over.",
        watched=True,
    ),
    "replay": Command(
        configs.ReplayConfig,
        "hvd_vgg.commands.replay:replay",
        "hvd-vgg replay RUN_DIR [--step=N] [--flags]: repeat a step whose loss or gradient was not finite, from the weights "
        "and records that the run kept of it, on any number of ranks; 81: it is not finite again, 0: it is finite. All "
        "flags default to the run's own.",
        watched=True,
    ),
    "verify-run": Command(
        configs.VerifyConfig,
        "hvd_vgg.commands.verify:verify_run",
        "hvd-vgg verify-run RUN_DIR [--data_dir=DIR] [--same_as=DIR]: recompute what the raw logs of a run allow, report "
        "which of its claims hold, and where it parts from another run. Exit code 0: all that can be checked; 65: one does "
        "not, or the runs differ. Needs no TensorFlow without --data_dir.",
    ),
    "benchmark": Command(
        configs.BenchmarkConfig,
        "hvd_vgg.commands.benchmark:benchmark",
        "hvd-vgg benchmark [--out=FILE] [--flagfile=FILE] [--flags], or on many ranks and fewer of them:\n"
        "hvd-vgg launch --ranks=4 benchmark --ranks=1,2,4 [--flags]: images/s of training on images that "
        "stay on the device, that come from the host, and of --data_dir if it exists, to show the bottleneck. "
        "Each rank keeps its images, --global_batch / ranks started, on any number of --ranks.",
    ),
    "plan": Command(
        configs.PlanConfig,
        "hvd_vgg.commands.plan:plan",
        "hvd-vgg plan --ranks=N --ranks_per_host=N --gbit=X --fps_per_rank=X [--out=FILE] [--flagfile=FILE] [--flags]: "
        "bytes, seconds and scaling efficiency of each way to exchange gradients. Needs no TensorFlow.",
    ),
    "doctor": Command(
        configs.DoctorConfig,
        "hvd_vgg.doctor.runner:doctor",
        "hvd-vgg doctor [--hostfile=FILE] [--full] [--collectives] [--out=FILE] [--flagfile=FILE] [--flags]: alone or on "
        "all the ranks to come, with the flags of the run to come. Exit code 78 if anything would fail.",
    ),
    "acceptance": Command(
        configs.AcceptanceConfig,
        "hvd_vgg.commands.acceptance:acceptance",
        "hvd-vgg acceptance [--ranks=N | --hostfile=FILE] [--data_dir=DIR] [--run_dir=DIR] [--flagfile=FILE] [--flags]: "
        "try a new host or cluster on one, half and all ranks: doctor with collectives, throughput in 32 and 16 bits, runs "
        "that must end equal in every bit, a checkpoint; one directory of results, with a verdict. Not under `launch`.",
    ),
    "make-demo-data": Command(
        configs.DemoConfig,
        "hvd_vgg.commands.demo_data:make_demo_data",
        "hvd-vgg make-demo-data [--flags]: generate a synthetic data set.",
    ),
    "prepare": Command(
        configs.PrepareConfig,
        "hvd_vgg.commands.prepare:prepare",
        "hvd-vgg prepare --source=DIR --out=DIR [--flags], alone or on many ranks: convert ILSVRC2012's archives, class "
        "directories of images, WebDataset, tensorflow-datasets, Parquet of Hugging Face or TFRecords to TFRecords in "
        "ImageNet's layout. Images stay as they are unless --shorter_side encodes them anew. The same command goes on with "
        "what was begun. Needs no TensorFlow on one rank.",
    ),
    "inspect": Command(
        configs.InspectConfig,
        "hvd_vgg.commands.inspect:inspect",
        "hvd-vgg inspect DATA_DIR [--out=SHEET.png] [--json=FILE] [--flagfile=FILE] [--flags], or on many ranks: read and "
        "decode every record of both splits; report layout, classes, image sizes and formats, bad records, duplicates "
        "within and between the splits; draw images before and after augmentation. Exit code 65 if records are bad.",
    ),
    "runs": Command(
        configs.RunsConfig,
        "hvd_vgg.commands.runs:list_runs",
        "hvd-vgg runs [DIR]: the runs below DIR, a line each, the newest at the end: training, stopped, done, or failed and "
        "why; updates, epochs, accuracy of the best evaluation (result.json has that of the last), images/s, time since the "
        "last line. Needs no TensorFlow.",
    ),
    "report": Command(
        configs.ReportConfig,
        "hvd_vgg.commands.report:report",
        "hvd-vgg report RUN_DIR [RUN_DIR ...] [--out=report.html] [--watch]: draw one page of a run: result and proof, "
        "curves, where the time went, restarts and faults; of several runs side by side, with what differs and where they "
        "part. Damaged and unfinished ones too. Needs matplotlib, and no TensorFlow.",
    ),
    "export": Command(
        configs.ExportConfig,
        "hvd_vgg.commands.export:export",
        "hvd-vgg export RUN_DIR|FILE --to=savedmodel|keras_h5|onnx|torch|safetensors --out=PATH [--flags]: write a network "
        "for other programs, run it by theirs where that is installed, print the largest difference of its logits, and "
        "leave a model card beside it. Not under `launch`.",
    ),
}
# What the first word after a command is, where it is no flag.
POSITIONAL = {"export": "weights", "replay": "run_dir", "verify-run": "run_dir", "inspect": "data_dir", "runs": "dir"}

LAUNCH_USAGE = """hvd-vgg launch [--flags] train|evaluate|predict|replay|verify-run|benchmark|doctor|... [ITS FLAGS]
hvd-vgg launch [--flags] -- PROGRAM [ITS ARGUMENTS]

Starts a command, or any program, on many ranks with Open MPI's mpirun, whose command line is printed. The command's flags
are checked first. Ctrl-C or SIGTERM makes all ranks save and exit in order; Ctrl-C again kills them. A run that failed for
an external reason is restarted; RUN_DIR/restarts.jsonl records every start and end. The exit code is the command's;
80 when it was stopped, 75 after --time_limit_seconds, 128 plus the signal's number when one killed a rank.

  hvd-vgg launch --ranks=8 train --flagfile=configs/vgg16_imagenet.flags --data_dir=/data/imagenet
  hvd-vgg launch --hostfile=hosts.txt --max_restarts=20 train --flagfile=configs/vgg16_imagenet.flags
"""
# Python's words where a limit of threads is reached.
_NO_THREAD = re.compile(r"can't start new thread|unable to start watchdog thread")
# In an error of Horovod's: a fault of the program or of the machine, rather than a rank that is gone.
_NOT_A_LOST_RANK = re.compile(r"Mismatched|OOM|out of memory|ResourceExhausted")
_CONTINUES = "; the same command continues from the newest checkpoint"  # of `train` alone


def main() -> None:
    """Runs the command line and exits with the codes of `hvd_vgg.errors`."""
    ensure_std_streams()
    sys.dont_write_bytecode = True  # else TensorFlow leaves .pyc files of generated code in $TMPDIR
    if any(option.startswith("error") for option in sys.warnoptions):  # PYTHONWARNINGS=error; TensorFlow warns when imported
        warnings.simplefilter("default")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Nothing here uses Keras, but Horovod imports it, and would want tf_keras, or what that backend runs on.
    for name in ("TF_USE_LEGACY_KERAS", "KERAS_BACKEND"):
        os.environ.pop(name, None)
    # Where TensorBoard is not installed, TensorFlow before 2.16 warns of it on every rank; a run reports it once itself.
    logging.getLogger().addFilter(lambda record: "missing TensorBoard" not in record.getMessage())
    sys.exit(run(sys.argv[1:]))


def run(argv: List[str]) -> int:
    """Runs one command on this rank and returns its exit code; a failure of this rank alone ends all ranks."""
    try:
        if not argv or argv[0] in ("-h", "--help", "help"):
            print(USAGE_TEXT, end="")
            return DONE
        if sys.flags.optimize > 1:
            text = "without docstrings, which PYTHONOPTIMIZE=2 or python -OO leaves out, TensorFlow cannot be imported"
            raise Failure(CONFIGURATION, f"{text}: unset it, or set PYTHONOPTIMIZE=1")
        if argv[0] == "launch":
            return _launch(argv[1:])
        if argv[0] not in COMMANDS:
            raise Failure(USAGE, f"{argv[0]}: no such command; expected one of {', '.join(COMMANDS)}, launch")
        command = COMMANDS[argv[0]]
        if {"-h", "--help"} & set(argv[1:]):
            print(describe_flags(command.config, command.usage), end="")
            return DONE
        config = _parse_command(argv)
    except Failure as failure:
        return _refuse(failure)
    except ImportError as error:
        return _refuse(_missing(error))
    except KeyboardInterrupt:
        return STOPPED
    # A fifth of the time that importing TensorFlow and Horovod takes. Another program's process might want them.
    ended = run_command(argv[0], config, unused=("matplotlib", "scipy"))
    return ended.code if ended else DONE


def run_command(name: str, config: Any, unused: Sequence[str] = (), **arguments: Any) -> Optional[Failure]:
    """Runs a command with its configuration on this rank; returns how it failed, which has been reported, or None.

    unused: packages that are not loaded with the command's modules, though TensorFlow or Keras would.
    arguments: more of them, which only a program can give.
    """
    try:
        from hvd_vgg.parallel.cores import thread_limit, threads_refusal  # here, for psutil may be missing

        if name == "train":
            watchdog.exit_when_asked()
        if COMMANDS[name].watched:
            refusal = threads_refusal(Path("/"), 1)
            if refusal:
                raise Failure(CONFIGURATION, refusal)
            watchdog.start(Path(config.run_dir) if name == "train" else None, launched_rank() or 0, config.hang_seconds)
        module, function = COMMANDS[name].target.split(":")
        with not_importable(*unused):
            command = getattr(importlib.import_module(module), function)
        command(config, **arguments)
        return None
    except Failure as failure:
        return _end(failure)
    except KeyboardInterrupt:
        return _end(Failure(STOPPED, f"interrupted{_CONTINUES if name == 'train' else ''}"))
    except SystemExit as error:
        return _end(
            Failure(BUG, f"the program exited early, with {error.code!r}: please report it with the run's flags.txt")
        )
    except ImportError as error:
        return _end(_missing(error))
    except Exception as error:
        if isinstance(error, BrokenPipeError) and "hvd_vgg.parallel.comm" not in sys.modules:
            # Whoever read the plan has enough; Python would complain again when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return None
        if isinstance(error, RuntimeError) and _NO_THREAD.search(str(error)):
            limit = thread_limit(Path("/"))[1] or "is memory short?"
            return _end(Failure(CONFIGURATION, f"{error} ({limit}): raise the limit, or start fewer ranks on this host"))
        # What Horovod's operations report when a rank is gone is the transport's own text, but Horovod is named in it, or in
        # the stack of the operation.
        text, raised_by = f"{type(error).__name__} {error}", type(error).__module__
        from_operation = raised_by.startswith(("tensorflow", "horovod")) and "horovod" in text.lower()
        if from_operation and not _NOT_A_LOST_RANK.search(text):
            reason = str(error).strip().split("\n")[0][:200]
            message = f"another rank is gone ({reason}){_CONTINUES if name == 'train' else ''}"
            return _end(Failure(LOST_RANK, message), blamed=False)
        write_line(traceback.format_exc(), sys.stderr, end="")
        return _end(Failure(BUG, "an error of the program, above: please report it with the run's flags.txt"))
    finally:
        clear_bar()


def _missing(error: ImportError) -> Failure:
    if not isinstance(error, ModuleNotFoundError):  # it is there, but what it needs is not
        text = f"{str(error).strip().splitlines()[-1]} ({sys.executable}){library_path_hint(str(error))}"
        return Failure(CONFIGURATION, f"{text}: a module cannot be loaded; hvd-vgg doctor says more")
    return Failure(CONFIGURATION, f"{error} ({sys.executable}): install it, or use launch/environment.sh")


def _launch(argv: List[str]) -> int:
    """Runs `hvd-vgg launch`; wrong flags of the command are reported before anything is started."""
    from hvd_vgg.launcher.supervisor import LaunchSpec, launch

    startable = [name for name in COMMANDS if name not in ("plan", "acceptance", "runs", "export", "report")]
    cut = next((index for index, word in enumerate(argv) if word in (*startable, "--")), len(argv))
    own, inner = argv[:cut], argv[cut:]
    if {"-h", "--help"} & set(own):
        print(describe_flags(configs.LaunchConfig, LAUNCH_USAGE), end="")
        return DONE
    if len(inner) < 1 + (inner[:1] == ["--"]):
        raise Failure(USAGE, f"nothing to launch: expected {', '.join(startable)}, or -- PROGRAM, after launch's own flags")
    config = parse_flags(configs.LaunchConfig, own)
    if inner[0] == "--":
        return launch(config, LaunchSpec(inner[1:]))
    if {"-h", "--help"} & set(inner):
        return run(inner)
    started = _parse_command(inner)
    # Under mpirun a process cannot tell a terminal from a file, nor how wide it is; here one can.
    terminal = is_terminal(sys.stdout)
    console = ["--console=bar" if terminal else "--console=lines"] * (getattr(started, "console", "") == "auto")
    if terminal:
        os.environ.setdefault("COLUMNS", str(shutil.get_terminal_size().columns))
    end = inner.index("--") if "--" in inner else len(inner)  # behind it are no flags
    program = [*PROGRAM, *inner[:end], *console, *inner[end:]]
    run_dir = Path(started.run_dir) if inner[0] == "train" else None
    # `benchmark` gives each rank its images, however many there are.
    shared = isinstance(started, configs.StepConfig) and not isinstance(started, configs.BenchmarkConfig)
    check = (*PROGRAM, "doctor", *inner[1:], "--host_only", "--join_seconds=60") if run_dir and config.check_hosts else ()
    return launch(config, LaunchSpec(program, run_dir, started if shared else None, check))


def _parse_command(argv: List[str]) -> Any:
    """Returns the configuration of a command line.

    `evaluate` and `replay` take the flags of the run as their defaults; with weights, theirs are.
    """
    name, given = argv[0], argv[1:]
    if name in POSITIONAL and given and not given[0].startswith("-"):
        given = [f"--{POSITIONAL[name]}={given[0]}", *given[1:]]
    kind = COMMANDS[name].config
    shared = configs.TrainConfig if issubclass(kind, configs.ModelConfig) else None
    config = parse_flags(kind, given, shared=shared)
    weights = getattr(config, "weights", "") or (name == "predict" and config.run_dir)
    if weights and issubclass(kind, configs.ScoringConfig):
        return _parse_with_weights(kind, given, shared, Path(weights))
    if name not in ("evaluate", "replay"):
        return config
    run_dir = RunDir(config.run_dir)
    path = run_dir.flags if name == "evaluate" else run_dir.nonfinite_step(config.step).flags
    if not path.is_file():
        return config
    # Where the run is now, and where this prints and writes to, is not what the run was told.
    own = parse_flags(configs.TrainConfig, [f"--flagfile={path}"])
    here = {"run_dir": config.run_dir, "console": config.console, "predictions_file": ""}
    return parse_flags(kind, given, dataclasses.replace(own, **here), shared)


def _parse_with_weights(kind: Any, given: List[str], shared: Any, path: Path) -> Any:
    """Returns the configuration of a command line whose defaults are the flags of weights; refuses what contradicts them."""
    from hvd_vgg.training.weights import read_flags, require_classes, require_own_flags  # here: NumPy may be missing

    found = read_flags(path)
    require_classes(found, path)
    config = parse_flags(kind, given, types.SimpleNamespace(**found), shared)
    require_own_flags(config, found, path)
    return config


def _say(message: str) -> None:
    """Prints why this rank ends."""
    write_line(f"{prefix('hvd-vgg:', RED, sys.stderr)} {message}", sys.stderr)


def _refuse(failure: Failure) -> int:
    """Ends a rank that has not joined the others: all find the same, so rank 0 reports it."""
    if not launched_rank():
        _say(failure.message)
    else:
        # The launcher kills all ranks when the first one exits, which must not be before rank 0 has reported. Where rank 0
        # found nothing wrong (another host, another file), this one reports after all.
        time.sleep(3)
        _say(f"rank {launched_rank()}: {failure.message}")
    return failure.code


def _end(failure: Failure, blamed: bool = True) -> Failure:
    """Reports the failure of a rank that may have joined others, and has it leave them, or ends them.

    blamed: whether it began here; otherwise another rank has ended first.
    """
    if not failure.collective and blamed:
        watchdog.record_fatal(failure.code, failure.message)
    comm, rank = _joined()
    if rank is None:  # it failed before Horovod was initialised, or when it no longer was
        _refuse(failure)
        return failure
    if failure.collective:
        if comm.is_root():
            _say(failure.message)
        watchdog.heartbeat(phase="saving")  # rank 0 may still be writing a checkpoint
        comm.barrier()  # nobody leaves before rank 0 has reported
        comm.shutdown()
        return failure
    where = f"rank {rank}: " if comm.size() > 1 else ""
    _say(f"{where}{failure.message}")
    comm.abort(failure.code)
    return failure


def _joined() -> Tuple[Any, Any]:
    """Returns (parallel.comm if it has been imported, this rank if it has joined the others)."""
    comm = sys.modules.get("hvd_vgg.parallel.comm")
    return comm, comm.rank_or_none() if comm else None


if __name__ == "__main__":
    main()
