"""How the tests of faults judge: what a run left behind, compared with a run that nothing happened to."""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from support import ROOT, TINY, Started, command_line

from hvd_vgg.commands.same_run import compare_runs
from hvd_vgg.commands.verify import FAIL, check
from hvd_vgg.data.sampler import positions
from hvd_vgg.run_dir import RunDir
from hvd_vgg.training import checkpoint

# 75 records in batches of 32: steps cross from epoch to epoch. At ten times this rate, where rounding decides which way a
# ReLU or a maximum goes, 10 updates make 1e-3 of it in the loss.
STEPS, RECORDS, SEED = 12, 75, 1
FLAGS = [
    *TINY,
    f"--steps={STEPS}",
    f"--seed={SEED}",
    "--augment=crop",
    "--dropout=0.5",
    "--lr=0.005",
    "--save_every_steps=1",
]
INJECT = [sys.executable, str(ROOT / "tests" / "programs" / "inject.py")]


def start(out, data, ranks, *arguments, **environment):
    """Starts the run of these tests in out/run; arguments: faults (tests/programs/inject.py) and more flags."""
    out.mkdir(exist_ok=True)
    faults = [argument for argument in arguments if "@" in argument]
    flags = [f"--data_dir={data}", f"--run_dir={out / 'run'}", *FLAGS, *[a for a in arguments if "@" not in a]]
    return Started(command_line(ranks, [str(out), *faults, "train", *flags], INJECT), out, **environment)


def run(out, data, ranks, *arguments, code=0, **environment):
    """Runs it to its end, which must be `code`, and returns how it ended."""
    return start(out, data, ranks, *arguments, **environment).wait(code=code)


def injected_ranks(started):
    """Returns the processes of a started run's ranks."""
    lines = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in started.alive()}
    return [pid for pid, words in lines.items() if words[1:2] == [INJECT[1].encode()]]


def blamed(out):
    """Returns (rank, step, phase, exit code) of the one rank that reports that it ended the job."""
    (path,) = (out / "run" / "faults").glob("fatal.rank*.jsonl")
    (line,) = path.read_text().splitlines()
    report = json.loads(line)
    return report["rank"], report["step"], report["phase"], report["code"]


def log_rows(run_dir):
    """Returns the rows of a run's log."""
    rows = [json.loads(line[5:]) for line in (run_dir / "dllogger.json").read_text().splitlines()]
    return [row for row in rows if row["type"] == "LOG"]


def losses(run_dir):
    """Returns {updates done: loss}."""
    return {row["step"][1]: row["data"]["train.loss"] for row in log_rows(run_dir) if "train.loss" in row["data"]}


def events(run_dir, name=""):
    """Returns the events in a run's log, in order; name: those of one kind."""
    rows = [row["data"] for row in log_rows(run_dir) if row["step"] == "EVENT"]
    return [row for row in rows if name in ("", row["event"])]


def result(run_dir):
    """Returns the run's result.json."""
    return json.loads((run_dir / "result.json").read_text())


def ids_by_step(out, ranks):
    """Returns {step: ids in the order of the global batch}; of a step trained twice the last."""
    parts = []
    for rank in range(max(1, ranks)):
        rows = [list(map(int, line.split())) for line in (out / f"ids.rank{rank}").read_text().splitlines()]
        parts.append({row[0]: row[1:] for row in rows})
    common = set.intersection(*(set(part) for part in parts))
    return {step: [record for part in parts for record in part[step]] for step in sorted(common)}


def newest(out):
    """Returns the newest checkpoint, which must be whole and finite."""
    found, faults = checkpoint.newest(RunDir(out / "run"))
    assert not faults
    assert not found or all(np.isfinite(value).all() for value in found.tensors.values())
    return found


def assert_true(run_dir):
    """Asserts that all that a run claims, and that can be computed from its log, holds."""
    failed = [f"{each.subject}: {each.text}" for each in check(run_dir) if each.verdict == FAIL]
    assert not failed


def assert_exact(out, ranks, undisturbed):
    """Asserts the weights and momentum of the undisturbed run, bit for bit, and that every record was read as often.

    ranks: on how many the run was, at most.
    """
    assert_true(out / "run")
    assert not list(compare_runs(RunDir(out / "run"), RunDir(undisturbed / "run")))
    found, wanted = newest(out), newest(undisturbed)
    assert found.meta["step"] == wanted.meta["step"] == STEPS
    assert found.tensors.keys() == wanted.tensors.keys()
    for name, tensor in wanted.tensors.items():
        assert (found.tensors[name] == tensor).all(), name
    ids = ids_by_step(out, ranks)
    assert list(ids) == list(range(STEPS))
    stream = [record for step in ids for record in ids[step]]
    assert Counter(stream) == Counter(positions(0, 32 * STEPS, RECORDS, SEED).ids.tolist())


def assert_same_state(found, wanted):
    """Asserts that two checkpoints have the same step, weights and momentum, and whatever else is restored, in every bit."""
    assert found.tensors.keys() == wanted.tensors.keys()
    assert [name for name, tensor in wanted.tensors.items() if found.tensors[name].tobytes() != tensor.tobytes()] == []
    assert [found.meta[name] for name in checkpoint.STATE_PROGRESS] == [
        wanted.meta[name] for name in checkpoint.STATE_PROGRESS
    ]


def assert_same_run(out, wanted):
    """Asserts that two runs are the same in every bit: losses of all steps, and state at evaluations and at the end."""
    assert_true(out / "run")
    assert not list(compare_runs(RunDir(out / "run"), RunDir(wanted / "run")))
    assert result(out / "run")["state_sha256"] == result(wanted / "run")["state_sha256"]


def assert_goes_on(out, data, undisturbed, step=None):
    """Starts the run again, undisturbed from where it stands (after `step` updates, where given), to its exact end."""
    found = newest(out).meta["step"] if (out / "run" / "checkpoints").exists() and newest(out) else 0
    assert step is None or found == step
    ended = run(out, data, 2)
    assert f"steps {found} to {STEPS}" in ended.out
    assert_exact(out, 2, undisturbed)


def times(out):
    """Returns (what, step, began, ended) as rank 0's processes have noted them, apart from the package."""
    rows = [line.split() for line in (out / "times").read_text().splitlines()]
    return [(what, int(step), float(began), float(ended)) for what, step, began, ended in rows]


def measured_goodput(out):
    """Returns the seconds of updates that count, and of all until the last evaluation, from those times."""
    updates, first, at, between = {}, None, 0.0, 0.0
    for what, step, began, ended in times(out):
        if what in ("process", "starting"):
            first, at, between = first or began, ended, 0.0
        elif what == "update":
            updates[step], at, between = ended - at - between, ended, 0.0  # of a step made twice the last
        else:
            between += ended - began
    last = max(ended for what, _, _, ended in times(out) if what == "evaluate")
    return sum(updates.values()), last - first
