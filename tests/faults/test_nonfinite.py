"""F29, F30 and what follows a step that is not finite: it is never applied, it is kept, repeated, and may be skipped.

F31, that gradients are summed to the true mean whatever the number of ranks, is `test_an_update_is_that_of_the_mean_loss...`
of tests/parallel/test_step.py, on 2 and 3 ranks, and `test_ranks_micro_batches_and_exchange_make_the_same_run` of
test_equality.py.
"""

import json
import sys

import numpy as np
import pytest
from oracles import assert_true
from support import ROOT, TINY
from test_equality import assert_same_weights

from hvd_vgg.config import TrainConfig
from hvd_vgg.data.index import find_shards, join, scan_shard
from hvd_vgg.data.loader import load_records, train_batches
from hvd_vgg.data.reader import read_record
from hvd_vgg.data.sampler import Positions, positions, sample_seeds
from hvd_vgg.flags import parse_flags
from hvd_vgg.training import checkpoint

# Steps 4 to 7 are one window: what happens at 5 is noticed when 8 are done.
FLAGS = [*TINY, "--augment=crop", "--dropout=0.5", "--width=0.25", "--steps=10", "--lr=0.005"]
FLAGS += ["--log_every_steps=8", "--save_every_steps=4", "--drift_every_steps=0"]
BAD = 5


def poisoned(what):
    return [sys.executable, str(ROOT / "tests" / "poison.py"), what]


def train(launch, data, run_dir, ranks, what, *more):
    flags = [f"--data_dir={data}", f"--run_dir={run_dir}", *FLAGS, *more]
    return launch(ranks, "train", *flags, program=poisoned(what) if what else None)


def events(run_dir, name):
    rows = [json.loads(line[5:]) for line in (run_dir / "dllogger.json").read_text().splitlines()]
    return [row["data"] for row in rows if row["type"] == "LOG" and row["data"].get("event") == name]


def message(ended):
    assert "Traceback" not in ended.out + ended.err
    (line,) = [line for line in ended.err.splitlines() if line.startswith("hvd-vgg: ")]
    return line


def newest(run_dir):
    found = checkpoint.newest(run_dir)[0]
    assert all(np.isfinite(value).all() for value in found.tensors.values())
    return found


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, data):
    """(how a run of 2 ranks ended whose rank 1 has NaN at step 5, its directory)."""
    from support import Started, command_line

    out = tmp_path_factory.mktemp("stopped")
    flags = ["train", f"--data_dir={data}", f"--run_dir={out / 'run'}", *FLAGS]
    return Started(command_line(2, flags, poisoned(f"nan@1:{BAD}x1-9")), out).wait(), out / "run"


@pytest.mark.fault("F29")
def test_nan_on_one_rank_ends_all_at_its_step_and_is_told_by_rank_and_layer(stopped, data):
    """F29."""
    ended, run_dir = stopped
    assert ended.code == 81, ended.out + ended.err
    for part in (
        f"step {BAD}: loss nan",
        "First the outputs of predictions on rank 1 ",
        "in 16 of its 16 records",
        "of 2 ranks 1 met",
    ):
        assert part in message(ended)
    assert f"hvd-vgg replay {run_dir} --step={BAD}" in message(ended)
    (event,) = events(run_dir, "nonfinite")
    assert (event["step"], event["rank"], event["first"]) == (BAD, 1, "the outputs of predictions")
    assert newest(run_dir).meta["step"] == 4
    assert not (run_dir / "faults").exists()  # no rank failed alone, none hung


@pytest.mark.fault("F29")
def test_the_kept_step_is_its_records_as_they_lie_and_the_state_before_it(stopped, launch, tmp_path, data):
    """F29: the bad update was not applied, nor the two after it that were already made when it was noticed."""
    _, run_dir = stopped
    folder = run_dir / "nonfinite" / f"step-{BAD:08d}"
    report = json.loads((folder / "report.json").read_text())
    ids = positions(32 * BAD, 32 * BAD + 32, 75, 1).ids.tolist()
    assert [row["record"] for row in report["batch"]] == ids
    assert [rank["slice"] for rank in report["ranks"]] == [[0, 16], [16, 32]]
    assert [rank["at_fault"] for rank in report["ranks"]] == [[], list(range(16, 32))]

    def contents(index, chosen):
        return [read_record(index, record) for record in chosen]

    paths, kept = find_shards(str(data), "train"), folder / "records-00000-of-00001"
    whole = join(paths, [scan_shard(path) for path in paths])
    alone = join([kept], [scan_shard(kept)])
    assert contents(alone, range(32)) == contents(whole, ids)
    config = parse_flags(TrainConfig, [f"--flagfile={folder / 'flags.txt'}"])
    trained = next(train_batches(whole, config, 1, range(BAD, BAD + 1), 0, 1, 2))
    drawn_as, epochs = (np.array([row[name] for row in report["batch"]]) for name in ("drawn_as", "epoch"))
    seeds = sample_seeds(config.seed, Positions(drawn_as, epochs))
    again = load_records(alone, config, 1, np.arange(32), seeds, 2)
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(trained[:2], again[:2]))

    ended = train(launch, data, tmp_path / "run", 2, "", f"--steps={BAD}")
    assert ended.code == 0, ended.err
    assert_same_weights(checkpoint.load(folder / "state.safetensors"), newest(tmp_path / "run"))


def test_a_replay_of_what_came_from_outside_is_finite(stopped, launch):
    _, run_dir = stopped
    ended = launch(1, "replay", str(run_dir))
    assert ended.code == 0, ended.out + ended.err
    assert "First the outputs of predictions on rank 1 " in ended.out
    assert "repeated on 1 rank" in ended.out and "not reproduced" in ended.out


@pytest.mark.fault(tier=3)
@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / "report.json").write_text("{}"), "a field is missing or holds something else"),
        (lambda folder: (folder / "report.json").unlink(), "report.json cannot be read"),
        (lambda folder: (folder / "state.safetensors").write_bytes(b"no weights"), "state.safetensors: "),
    ],
)
def test_a_replay_of_what_is_damaged_is_refused(stopped, launch, tmp_path, damage, told):
    _, run_dir = stopped
    copy = tmp_path / "run" / "nonfinite" / f"step-{BAD:08d}"
    copy.mkdir(parents=True)
    for path in (run_dir / "nonfinite" / f"step-{BAD:08d}").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    damage(copy)
    ended = launch(0, "replay", f"--run_dir={tmp_path / 'run'}", f"--step={BAD}")
    assert ended.code == 78, ended.out + ended.err
    assert told in message(ended)


def test_a_replay_of_a_step_that_was_not_kept_is_refused(launch, tmp_path):
    ended = launch(0, "replay", str(tmp_path / "run"))
    assert (ended.code, "has kept no such step: none was not finite" in message(ended)) == (78, True)
    (tmp_path / "run" / "nonfinite" / "step-00000040").mkdir(parents=True)
    ended = launch(0, "replay", str(tmp_path / "run"), "--step=7")
    assert (ended.code, "has kept no such step: it has kept 40; --step names one" in message(ended)) == (78, True)


@pytest.mark.fault(tier=3)
def test_a_rate_that_diverges_is_reproduced_on_other_ranks_and_blamed_on_the_weights(launch, tmp_path, data):
    ended = train(launch, data, tmp_path / "run", 2, "", "--lr=1e30")
    assert ended.code == 81, ended.out + ended.err
    assert "step 1: loss nan" in message(ended) and "of 2 ranks 2 met" in message(ended)
    for ranks in (1, 3):
        ended = launch(ranks, "replay", str(tmp_path / "run"))
        assert ended.code == 81, ended.out + ended.err
        assert "not finite again. First the outputs of block" in message(ended)
        assert "the weights are at fault" in ended.err


@pytest.fixture(scope="module")
def skipping(tmp_path_factory, data):
    """The final checkpoint of a run of one rank that skips step 5 from the start, undisturbed."""
    from support import Started, command_line

    out = tmp_path_factory.mktemp("skipping")
    (out / "run" / "nonfinite").mkdir(parents=True)
    (out / "run" / "nonfinite" / "skipped.json").write_text(f"[{BAD}]")
    ended = Started(command_line(1, ["train", f"--data_dir={data}", f"--run_dir={out / 'run'}", *FLAGS]), out).wait()
    assert ended.code == 0, ended.out + ended.err
    return newest(out / "run")


REWIND = "--on_nonfinite=rewind"


@pytest.mark.parametrize(
    ("ranks", "save_every_steps"),
    [(2, 4), *(pytest.param(*each, marks=pytest.mark.fault(tier=3)) for each in [(1, 4), (2, 0)])],
)
def test_a_rewound_run_is_the_run_that_skipped_the_step(launch, tmp_path, data, skipping, ranks, save_every_steps):
    """With --save_every_steps=0 it goes back to the initial weights."""
    run_dir = tmp_path / "run"
    ended = train(launch, data, run_dir, ranks, f"nan@{ranks - 1}:{BAD}", REWIND, f"--save_every_steps={save_every_steps}")
    assert ended.code == 0, ended.out + ended.err
    found = newest(run_dir)
    assert (found.meta["step"], found.meta["skipped_steps"]) == (10, [BAD])
    assert_same_weights(found, skipping)
    (event,) = events(run_dir, "rewind")
    assert (event["from"], event["to"], event["skipped_steps"]) == (BAD, save_every_steps, [BAD])
    assert event["records"] == positions(32 * BAD, 32 * BAD + 32, 75, 1).ids.tolist()
    assert "a passing fault" in events(run_dir, "nonfinite")[0]["told"]  # it happened once only
    assert_true(run_dir)


@pytest.mark.fault(tier=3)
def test_a_rewound_run_that_is_killed_before_its_next_checkpoint_still_skips_the_step(launch, tmp_path, data, skipping):
    run_dir = tmp_path / "run"
    # Step 7 is met first when 5 is not yet known to be bad, and again after the rewind.
    ended = train(launch, data, run_dir, 2, f"nan@1:{BAD},kill@1:7x2-2", REWIND)
    assert ended.code == 137, ended.out + ended.err
    assert newest(run_dir).meta["step"] == 4 and len(events(run_dir, "rewind")) == 1
    ended = train(launch, data, run_dir, 1, "", REWIND)
    assert ended.code == 0, ended.out + ended.err
    assert newest(run_dir).meta["skipped_steps"] == [BAD]
    assert_same_weights(newest(run_dir), skipping)
    assert_true(run_dir)


def test_no_more_steps_are_skipped_than_allowed(launch, tmp_path, data):
    run_dir = tmp_path / "run"
    ended = train(launch, data, run_dir, 2, "nan@1:3x1-9,nan@1:6x1-9", REWIND, "--max_rewinds=1")
    assert ended.code == 81, ended.out + ended.err
    assert "step 6: loss nan" in message(ended)
    assert "--max_rewinds=1" in ended.err and "steps 3 were already" in ended.err
    assert newest(run_dir).meta["skipped_steps"] == [3]
    assert_true(run_dir)


@pytest.mark.fault("F30")
def test_a_weight_that_drifts_on_one_rank_is_told_within_the_steps_asked_for(launch, tmp_path, data):
    """F30."""
    run_dir = tmp_path / "run"
    ended = train(launch, data, run_dir, 3, "drift@1:5", "--drift_every_steps=3", "--save_every_steps=0")
    assert ended.code == 81, ended.out + ended.err
    told = message(ended)
    assert int(told.split("step ")[1].split(":")[0]) in (5, 6, 7, 8)
    assert " is not the same on all ranks: rank 1 differ" in told
    assert checkpoint.newest(run_dir)[0] is None
