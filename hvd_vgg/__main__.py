"""hvd-vgg COMMAND [--flags]: one line of dispatch per command."""

import logging
import os
import re
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Callable, List, Tuple

from hvd_vgg import __version__
from hvd_vgg.environment import launched_rank
from hvd_vgg.errors import BUG, CONFIGURATION, DONE, LOST_RANK, STOPPED, USAGE, Failure
from hvd_vgg.streams import ensure_std_streams, write_line
from hvd_vgg.watchdog import watchdog

try:
    from hvd_vgg.config import (
        BenchmarkConfig,
        DemoConfig,
        DoctorConfig,
        EvaluateConfig,
        LaunchConfig,
        PlanConfig,
        ReplayConfig,
        TrainConfig,
        VerifyConfig,
    )
    from hvd_vgg.flags import describe_flags, parse_flags
    from hvd_vgg.run_dir import find_flag_file, nonfinite_folder
except ModuleNotFoundError as error:  # absl-py reads the flags, doctor's too
    write_line(f"hvd-vgg: {error} ({sys.executable}): install it, or use launch/environment.sh", sys.stderr)
    sys.exit(CONFIGURATION)
USAGE_TEXT = f"""hvd-vgg {__version__}: trains VGG networks on ImageNet-style TFRecords with TensorFlow and Horovod.

  hvd-vgg train [--flagfile=FILE] [--flags]           train and evaluate; leaves everything in --run_dir
  hvd-vgg evaluate --run_dir=DIR [--flags]            score a checkpoint of a run on the validation records
  hvd-vgg replay RUN_DIR [--step=N] [--flags]         repeat a step of a run that was not finite
  hvd-vgg verify-run RUN_DIR [--data_dir=DIR]         hold what a run claims against what it left behind
  hvd-vgg benchmark [--flags]                         measure throughput without input, with it, and on fewer ranks
  hvd-vgg plan --ranks=N --gbit=X [--flags]           predict what exchanging gradients costs on a cluster
  hvd-vgg doctor [--flagfile=FILE] [--flags]          say whether this host, or these ranks, can train, and what to do
  hvd-vgg make-demo-data --data_dir=DIR [--flags]     draw a small data set to try things with

  hvd-vgg launch --ranks=N [--flags] COMMAND ...      start any of them on many ranks; stops and restarts runs

Each runs alone or on many ranks, which only change how fast it goes:

  hvd-vgg launch --ranks=8 train --flagfile=configs/vgg16_imagenet.flags --data_dir=/data/imagenet

hvd-vgg COMMAND --help lists a command's flags. Exit codes: 0 done, 64 usage, 65 data, or what a run claims does not hold,
70 error in the program, 74 a result could not be written, 75 hung or lost a rank, 78 configuration, 80 stopped on request,
81 not finite, or ranks drifted apart.
"""


def _train(config: Any) -> None:
    watchdog.exit_when_asked()
    watchdog.start(Path(config.run_dir), launched_rank() or 0, config.hang_seconds)
    from hvd_vgg.train.loop import train

    train(config)


def _evaluate(config: Any) -> None:
    watchdog.start(None, launched_rank() or 0, config.hang_seconds)
    from hvd_vgg.train.loop import evaluate_run

    evaluate_run(config)


def _replay(config: Any) -> None:
    from hvd_vgg.commands.replay import replay

    replay(config)


def _benchmark(config: Any) -> None:
    from hvd_vgg.commands.benchmark import benchmark

    benchmark(config)


def _verify(config: Any) -> None:
    from hvd_vgg.commands.verify import verify_run

    if config.data_dir:
        watchdog.start(None, launched_rank() or 0, 0.0)
    verify_run(config)


def _make_demo_data(config: Any) -> None:
    from hvd_vgg.commands.demo_data import make_demo_data

    make_demo_data(config)


def _doctor(config: Any) -> None:
    from hvd_vgg.doctor.runner import doctor

    doctor(config)


def _plan(config: Any) -> None:
    from hvd_vgg.commands.plan import plan

    plan(config)


# What is imported above the commands must be quick: --help and a wrong flag answer at once.
COMMANDS: "dict[str, Tuple[Any, Callable[[Any], None], str]]" = {
    "train": (TrainConfig, _train, "hvd-vgg train [--flagfile=FILE] [--flags]: train and evaluate on all ranks."),
    "evaluate": (
        EvaluateConfig,
        _evaluate,
        "hvd-vgg evaluate --run_dir=DIR [--flags]: score a checkpoint. All flags default to the run's own.",
    ),
    "replay": (
        ReplayConfig,
        _replay,
        "hvd-vgg replay RUN_DIR [--step=N] [--flags]: repeat a step whose loss or gradient was not finite, from the weights "
        "and records that the run kept of it, on any number of ranks; 81: it is not finite again, 0: it is finite. All "
        "flags default to the run's own.",
    ),
    "verify-run": (
        VerifyConfig,
        _verify,
        "hvd-vgg verify-run RUN_DIR [--data_dir=DIR]: compute again what the raw logs of a run allow, and say which of its "
        "claims hold. Exit code 0: all that can be checked; 65: one does not. Needs no TensorFlow without --data_dir.",
    ),
    "benchmark": (
        BenchmarkConfig,
        _benchmark,
        "hvd-vgg benchmark [--out=FILE] [--flagfile=FILE] [--flags], or on many ranks and fewer of them:\n"
        "hvd-vgg launch --ranks=4 benchmark --ranks=1,2,4 [--flags]: images/s of training on images that "
        "lie on the device, that come from the host, and of --data_dir if it is there, so that you see which part limits. "
        "Each rank keeps its images, --global_batch / ranks started, on any number of --ranks.",
    ),
    "plan": (
        PlanConfig,
        _plan,
        "hvd-vgg plan --ranks=N --ranks_per_host=N --gbit=X --fps_per_rank=X [--flagfile=FILE] [--flags]: bytes, seconds "
        "and scaling efficiency of each way to exchange gradients. Needs no TensorFlow.",
    ),
    "doctor": (
        DoctorConfig,
        _doctor,
        "hvd-vgg doctor [--hostfile=FILE] [--full] [--collectives] [--out=FILE] [--flagfile=FILE] [--flags]: alone or on "
        "all the ranks to come, with the flags of the run to come. Exit code 78 if anything would fail.",
    ),
    "make-demo-data": (DemoConfig, _make_demo_data, "hvd-vgg make-demo-data [--flags]: draw a data set."),
}
LAUNCH_USAGE = """hvd-vgg launch [--flags] train|evaluate|replay|verify-run|benchmark|doctor|make-demo-data [ITS FLAGS]
hvd-vgg launch [--flags] -- PROGRAM [ITS ARGUMENTS]

Starts a command, or any program, on many ranks by Open MPI's mpirun, whose command line is printed. The command's flags
are checked first. Ctrl-C or SIGTERM makes all ranks save and leave in order; Ctrl-C again ends them. A run that failed for
no fault of its own is started again; RUN_DIR/restarts.jsonl tells of every start and end. The exit code is the command's;
80 when it was stopped, 75 after --time_limit_seconds, 128 and the signal's number when one killed a rank.

  hvd-vgg launch --ranks=8 train --flagfile=configs/vgg16_imagenet.flags --data_dir=/data/imagenet
  hvd-vgg launch --hostfile=hosts.txt --max_restarts=20 train --flagfile=configs/vgg16_imagenet.flags
"""
# What `launch` starts a command of this package with.
PROGRAM = [sys.executable, "-m", "hvd_vgg"]


def main() -> None:
    """Runs the command line and exits with the codes of hvd_vgg.run.health."""
    ensure_std_streams()
    sys.dont_write_bytecode = True  # TensorFlow would leave some in the temporary directory, of code that it makes up
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Where TensorBoard is not installed, TensorFlow before 2.16 warns of it on every rank; a run says it once itself.
    logging.getLogger().addFilter(lambda record: "missing TensorBoard" not in record.getMessage())
    sys.exit(run(sys.argv[1:]))


def run(argv: List[str]) -> int:
    """Runs one command on this rank and returns its exit code; on a failure of this rank alone it ends all ranks."""
    try:
        if not argv or argv[0] in ("-h", "--help", "help"):
            print(USAGE_TEXT, end="")
            return DONE
        if argv[0] == "launch":
            return _launch(argv[1:])
        if argv[0] not in COMMANDS:
            raise Failure(USAGE, f"{argv[0]}: no such command; expected one of {', '.join(COMMANDS)}, launch")
        kind, command, usage = COMMANDS[argv[0]]
        if {"-h", "--help"} & set(argv[1:]):
            print(describe_flags(kind, usage), end="")
            return DONE
        config = parse_flags(kind, _with_run_flags(argv))
    except Failure as failure:
        return _refuse(failure)
    except ImportError as error:
        return _refuse(_missing(error))
    except KeyboardInterrupt:
        return STOPPED
    try:
        command(config)
        return DONE
    except Failure as failure:
        return _end(failure)
    except KeyboardInterrupt:
        return _end(Failure(STOPPED, "interrupted; a run goes on from its newest checkpoint when started again"))
    except SystemExit as error:
        return _end(Failure(BUG, f"the program left early, with {error.code!r}: please report it with the run's flags.txt"))
    except ImportError as error:
        return _end(_missing(error))
    except Exception as error:
        if isinstance(error, BrokenPipeError) and "hvd_vgg.parallel.comm" not in sys.modules:
            # Whoever read the plan has enough; Python would complain again when it flushes at the end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return DONE
        # What Horovod's operations say when a rank is gone is the transport's own text, but they are always named in it.
        text = f"{type(error).__name__} {error}"
        if "Horovod" in text and not re.search(r"Mismatched|OOM|out of memory|ResourceExhausted", text):
            first = str(error).strip().split("\n")[0][:200]
            told = f"another rank has gone ({first}); the same command goes on from the newest checkpoint"
            return _end(Failure(LOST_RANK, told))
        write_line(traceback.format_exc(), sys.stderr, end="")
        return _end(Failure(BUG, "an error of the program, above: please report it with the run's flags.txt"))


def _missing(error: ImportError) -> Failure:
    return Failure(CONFIGURATION, f"{error} ({sys.executable}): install it, or use launch/environment.sh")


def _launch(argv: List[str]) -> int:
    """Runs `hvd-vgg launch`; wrong flags of the command to start are found before anything is."""
    from hvd_vgg.launcher.supervisor import LaunchSpec, launch

    startable = [name for name in COMMANDS if name != "plan"]
    cut = next((at for at, word in enumerate(argv) if word in (*startable, "--")), len(argv))
    own, inner = argv[:cut], argv[cut:]
    if {"-h", "--help"} & set(own):
        print(describe_flags(LaunchConfig, LAUNCH_USAGE), end="")
        return DONE
    if len(inner) < 1 + (inner[:1] == ["--"]):
        raise Failure(USAGE, f"nothing to launch: expected {', '.join(startable)}, or -- PROGRAM, after launch's own flags")
    config = parse_flags(LaunchConfig, own)
    if inner[0] == "--":
        return launch(config, LaunchSpec(inner[1:]))
    if {"-h", "--help"} & set(inner):
        return run(inner)
    started = parse_flags(COMMANDS[inner[0]][0], _with_run_flags(inner))
    # Under mpirun a process cannot tell a terminal from a file; here one can.
    console = ["--console=bar" if sys.stdout.isatty() else "--console=lines"] * (getattr(started, "console", "") == "auto")
    program = [*PROGRAM, *inner, *console]
    run_dir = Path(started.run_dir) if inner[0] == "train" else None
    return launch(config, LaunchSpec(program, run_dir, getattr(started, "global_batch", None)))


def _with_run_flags(argv: List[str]) -> List[str]:
    """Puts what a run left before the flags of `evaluate` and `replay`; a first argument without dashes is --run_dir."""
    command, given = argv[0], argv[1:]
    if command in ("replay", "verify-run") and given and not given[0].startswith("-"):
        given = [f"--run_dir={given[0]}", *given[1:]]
    if command == "replay":
        config = parse_flags(ReplayConfig, given)
        found = find_flag_file(nonfinite_folder(Path(config.run_dir), config.step))
    elif command == "evaluate":
        found = find_flag_file(Path(parse_flags(EvaluateConfig, given).run_dir))
    else:
        return given
    # Where the run printed to is not where this prints to.
    return [f"--flagfile={found}", "--console=auto"] * bool(found) + given


def _refuse(failure: Failure) -> int:
    """Ends a rank before it joined the others: all ranks find the same, so rank 0 speaks for them."""
    if not launched_rank():
        write_line(f"hvd-vgg: {failure.message}", sys.stderr)
    else:
        # The launcher ends all ranks when the first one leaves, which must not be before rank 0 has spoken. Where rank 0
        # found nothing wrong (another host, another file), this one speaks after all.
        time.sleep(3)
        write_line(f"hvd-vgg: rank {launched_rank()}: {failure.message}", sys.stderr)
    return failure.code


def _end(failure: Failure) -> int:
    """Ends a rank that may be among others."""
    if not failure.collective and failure.code != LOST_RANK:
        watchdog.record_fatal(failure.code, failure.message)
    comm = sys.modules.get("hvd_vgg.parallel.comm")
    rank = comm.rank_if_joined() if comm else None
    if not comm or rank is None:  # it failed before Horovod was there, or when it no longer was
        return _refuse(failure)
    if failure.collective:
        if comm.is_root():
            write_line(f"hvd-vgg: {failure.message}", sys.stderr)
        watchdog.heartbeat(phase="saving")  # rank 0 may have a checkpoint to write to its end
        comm.together(lambda: None)  # nobody leaves before rank 0 has spoken
        comm.leave()
        return failure.code
    where = f"rank {rank}: " if comm.size() > 1 else ""
    write_line(f"hvd-vgg: {where}{failure.message}", sys.stderr)
    comm.abort(failure.code)
    return failure.code


if __name__ == "__main__":
    main()
