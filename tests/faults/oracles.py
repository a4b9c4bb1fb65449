"""How the tests of faults judge: what a run left behind, held against one that nothing happened to."""

import json
import sys
from collections import Counter

from support import ROOT, TINY, Started, command_line

from hvd_vgg.commands.verify import FAIL, check
from hvd_vgg.data.sampler import positions
from hvd_vgg.train import checkpoint

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
WORKER = [sys.executable, str(ROOT / "tests" / "worker.py")]


def start(out, data, ranks, *arguments, **environment):
    """Starts the run of these tests in out/run; arguments: faults first (tests/worker.py), then more flags."""
    out.mkdir(exist_ok=True)
    faults = [argument for argument in arguments if "@" in argument]
    flags = [f"--data_dir={data}", f"--run_dir={out / 'run'}", *FLAGS, *[a for a in arguments if "@" not in a]]
    return Started(command_line(ranks, [str(out), *faults, "train", *flags], WORKER), out, **environment)


def blamed(out):
    """BLAME: returns (rank, step, phase, exit code) of the one rank that says that it ended the job."""
    (path,) = (out / "run" / "faults").glob("fatal.rank*.jsonl")
    (line,) = path.read_text().splitlines()
    told = json.loads(line)
    return told["rank"], told["step"], told["phase"], told["code"]


def events(out):
    """Returns the events in the run's log, in order."""
    rows = [json.loads(line[5:]) for line in (out / "run" / "dllogger.json").read_text().splitlines()]
    return [row["data"] for row in rows if row["type"] == "LOG" and row["step"] == "EVENT"]


def newest(out):
    """LOADS: returns the newest checkpoint, which must be whole."""
    found, faults = checkpoint.newest(out / "run")
    assert not faults
    return found


def assert_true(run_dir):
    """LOG: all that a run claims of itself and that can be computed again from its lines holds, a start after another."""
    failed = [f"{claim.what}: {claim.why}" for claim in check(run_dir) if claim.verdict == FAIL]
    assert not failed


def assert_exact(out, ranks, undisturbed):
    """EXACT: the weights and momentum of a run that nothing happened to, bit for bit, and every record as often.

    ranks: on how many the run was, at most.
    """
    assert_true(out / "run")
    found, wanted = newest(out), newest(undisturbed)
    assert found.meta["step"] == wanted.meta["step"] == STEPS
    assert found.tensors.keys() == wanted.tensors.keys()
    for name, tensor in wanted.tensors.items():
        assert (found.tensors[name] == tensor).all(), name
    seen = {}
    for rank in range(ranks):
        for line in (out / f"ids.rank{rank}").read_text().splitlines():
            at, *ids = map(int, line.split())
            seen.setdefault(rank, {})[at] = ids
    stream = [record for at in range(STEPS) for rank in range(ranks) for record in seen[rank][at]]
    assert Counter(stream) == Counter(positions(0, 32 * STEPS, RECORDS, SEED).ids.tolist())


def assert_goes_on(out, data, undisturbed, step=None):
    """Starts the run again, undisturbed from where it stands (after `step` updates, where given), to its exact end."""
    found = newest(out).meta["step"] if (out / "run" / "checkpoints").exists() and newest(out) else 0
    assert step is None or found == step
    ended = start(out, data, 2).wait()
    assert ended.code == 0, ended.out + ended.err
    assert f"steps {found} to {STEPS}" in ended.out
    assert_exact(out, 2, undisturbed)
