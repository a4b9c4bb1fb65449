"""What the benchmarks share: their command lines, the processes that they start, and their tables.

Peers import this in environments of their own, so that only the standard library is imported here.
"""

import argparse
import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRAINER = [sys.executable, "-m", "hvd_vgg"]
CONFIGURATION = 78  # the exit code of hvd_vgg.errors
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
GRACE_SECONDS = 10

sys.path.insert(0, str(ROOT))  # what is measured is the package of this checkout, whatever is installed


NUMBERS = {
    "rounds": "turns of each row of the table",
    "images": "of a turn, of each way",
    "batch": "images of an update",
    "size": "pixels of the images",
    "steps": "updates of a turn",
    "updates": "of a turn that are counted",
    "warmup": "updates of a turn that are not counted",
    "ranks": "of the job",
    "threads": "that decode",
}


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return super()._get_help_string(action) if action.default else action.help


def command_line(description, **defaults):
    """Returns a parser with some of NUMBERS as options, whose --help begins with a benchmark's docstring."""
    parser = argparse.ArgumentParser(description=description, formatter_class=_Help, allow_abbrev=False)
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=positive, default=default, help=NUMBERS[name])
    return parser


def positive(text):
    """Converts an option to an integer above 0."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected an integer of at least 1")
    return int(text)


def list_of(convert):
    """Returns the conversion of an option to a list: `convert` of each of its parts, which commas separate."""

    return lambda text: [convert(part) for part in text.split(",")]


def some_of(known):
    """Returns the conversion of an option to a list of names among `known`."""

    def name(text):
        if text not in known:
            raise argparse.ArgumentTypeError(f"{text}: expected some of {','.join(known)}")
        return text

    return list_of(name)


def refuse(message, code=CONFIGURATION):
    """Ends the benchmark with one line on stderr."""
    end_processes()  # before directories are removed that they write to
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(code)


def require(*programs):
    """Ends the benchmark with 78 unless all `programs` are found."""
    missing = [program for program in programs if not shutil.which(program)]
    if missing:
        refuse(f"needs {' and '.join(missing)}, not found on PATH")


def worker(options, python=sys.executable, **more):
    """Returns the command of a process that calls the benchmark's `work` with `options` and `more`."""
    return [python, sys.argv[0], "--worker", json.dumps({**vars(options), **more})]


def run(main, work=None):
    """Runs the `main` of a benchmark, or of a `worker` its `work`; when `main` ends, no process of it is left."""
    if sys.argv[1:2] == ["--worker"]:
        work(argparse.Namespace(**json.loads(sys.argv[2])))
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # What a worker leaves behind becomes this process's child, not init's, and is found.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    signals = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]

    def leave(number, _):
        for each in signals:  # a second Ctrl-C must not interrupt the cleaning up
            signal.signal(each, signal.SIG_IGN)
        end_processes()
        sys.exit(128 + number)

    for number in signals:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, leave)
    try:
        import psutil  # noqa: F401

        main()
    except ModuleNotFoundError as error:
        refuse(f"{error} ({sys.executable})")
    except Exception as error:
        if type(error).__name__ != "Failure":
            raise
        refuse(error.message, error.code)
    finally:
        end_processes()


def processes():
    """Returns what this process has started, directly or not, and is still running."""
    psutil, running = sys.modules.get("psutil"), []  # a peer's Python may not have it
    for process in psutil.Process().children(recursive=True) if psutil else []:
        with contextlib.suppress(psutil.NoSuchProcess):
            running += [process] * (process.status() != psutil.STATUS_ZOMBIE)
    return running


def end_processes():
    """Ends all processes that this one has started: by SIGTERM, and what is left after GRACE_SECONDS by SIGKILL."""
    for number, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
        deadline = time.monotonic() + seconds
        for process in processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)
        while processes() and time.monotonic() < deadline:
            time.sleep(0.05)


def start(command, **options):
    """Starts a command, away from the terminal's Ctrl-C; `env` adds to the environment that all ways have alike."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "ONEDNN_DEFAULT_FPMATH_MODE": "STRICT",  # else oneDNN may compute in bfloat16 what is asked for in float32
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        **options.pop("env", {}),
    }
    return subprocess.Popen(list(map(str, command)), env=environment, text=True, start_new_session=True, **options)


def output_of(command, **options):
    """Runs a command and returns what it printed; a failure ends the benchmark with that and the command's exit code."""
    process = start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    output, _ = process.communicate()
    if process.returncode:
        refuse(f"{' '.join(map(str, command))} ended with {process.returncode}:\n{output}", abs(process.returncode))
    return output


def mpirun(ranks, *options):
    """Returns the beginning of a command on `ranks` of this host."""
    require("mpirun")
    return ["mpirun", "-np", str(ranks), "--oversubscribe", "--bind-to", "none", *options]


def software(*packages):
    """Returns the versions of this Python and of those of `packages` that it has, in one line."""
    found = [f"Python {sys.version.split()[0]}"]
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return ", ".join(found)


def machine():
    """Returns this machine's processor, cores, memory and load in one line."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    name = model.group(1) if model else os.uname().machine
    return f"{name}, {os.cpu_count()} cores, {memory:.0f} GiB; load {load}"


def spread(values, form=".2f"):
    """Returns `median (smallest to largest)`, or the one value, formatted by `form`; `-` for no values."""
    values = list(values)
    if len(values) < 2:
        return f"{values[0]:{form}}" if values else "-"
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def ratios(values, base):
    """Returns the ratios of values to those of `base`, round by round; none where there is no base."""
    return [value / other for value, other in zip(values, base or [])]


def print_table(title, head, rows):
    """Prints a table in Markdown below its title, this machine and the software that measured."""
    rows = [list(map(str, row)) for row in rows]
    print(f"\n{title}" + "; median (smallest to largest)" * any("(" in cell for row in rows for cell in row))
    print(f"{machine()}; {software('tensorflow', 'tensorflow-cpu', 'horovod', 'numpy')}\n")
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |")
    sys.stdout.flush()
