"""F29, F30 and what follows a step that is not finite: it is never applied, it is kept, repeated, and may be skipped.

F31, that gradients are summed to the true mean whatever the number of ranks, is in tests/parallel/test_step.py, on 2 and 3
ranks, and in test_equality.py.
"""

import json

import numpy as np
import pytest
from oracles import assert_same_run, assert_same_state, assert_true, events, newest, run
from support import full

from hvd_vgg.config import TrainConfig
from hvd_vgg.data.formats.layout import find_shards
from hvd_vgg.data.index import join, scan_shard
from hvd_vgg.data.loader import load_records, train_batches
from hvd_vgg.data.reader import read_image
from hvd_vgg.data.sampler import Positions, positions, sample_seeds
from hvd_vgg.flags import parse_flags
from hvd_vgg.training import checkpoint

# Steps 4 to 7 are one window: what happens at 5 is noticed when 8 are done.
WINDOWS = ["--steps=10", "--log_every_steps=8", "--save_every_steps=4", "--drift_every_steps=0"]
BAD = 5
REWIND = "--on_nonfinite=rewind"


def message_of(ended):
    """Returns the one message of a run that ended with an error."""
    assert "Traceback" not in ended.out + ended.err
    (line,) = [line for line in ended.err.splitlines() if line.startswith("hvd-vgg: ")]
    return line


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, data):
    """(how a run of 2 ranks ended whose rank 1 has NaN at step 5, where it is)."""
    out = tmp_path_factory.mktemp("stopped")
    return run(out, data, 2, f"nan@1:{BAD}x1-9", *WINDOWS, code=81), out


@pytest.mark.fault("F29")
def test_nan_on_one_rank_ends_all_and_is_diagnosed(stopped, data):
    """By step, rank, layer and records."""
    ended, out = stopped
    for part in (
        f"step {BAD}: loss nan",
        "First the outputs of predictions on rank 1 ",
        "in 16 of its 16 records",
        "1 of 2 ranks are affected",
    ):
        assert part in message_of(ended)
    assert f"hvd-vgg replay {out / 'run'} --step={BAD}" in message_of(ended)
    (event,) = events(out / "run", "nonfinite")
    assert (event["step"], event["rank"], event["first"]) == (BAD, 1, "the outputs of predictions")
    assert newest(out).meta["step"] == 4
    assert not (out / "run" / "faults").exists()  # no rank failed alone, none hung


@pytest.mark.fault("F29")
def test_kept_step_has_its_records_and_the_state_before_it(stopped, tmp_path, data):
    """The bad update was not applied, nor the two after it that were already made when it was noticed."""
    folder = stopped[1] / "run" / "nonfinite" / f"step-{BAD:08d}"
    report = json.loads((folder / "report.json").read_text())
    ids = positions(32 * BAD, 32 * BAD + 32, 75, 1).ids.tolist()
    assert [row["record"] for row in report["batch"]] == ids
    assert [rank["slice"] for rank in report["ranks"]] == [[0, 16], [16, 32]]
    assert [rank["at_fault"] for rank in report["ranks"]] == [[], list(range(16, 32))]

    def contents(index, chosen):
        return [read_image(index, record) for record in chosen]

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

    run(tmp_path, data, 2, *WINDOWS, f"--steps={BAD}")
    tensors = newest(tmp_path).tensors
    assert all((checkpoint.load(folder / "state.safetensors").tensors[name] == tensors[name]).all() for name in tensors)


def test_replay_of_what_came_from_outside_is_finite(stopped, launch):
    ended = launch(1, "replay", str(stopped[1] / "run"), code=0)
    assert "First the outputs of predictions on rank 1 " in ended.out
    assert "repeated on 1 rank" in ended.out and "not reproduced" in ended.out


@pytest.mark.fault(tier=3)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "report.json").write_text("{}"), "a field is missing, or of another kind"),
        (lambda folder: (folder / "report.json").unlink(), "report.json cannot be read"),
        (lambda folder: (folder / "state.safetensors").write_bytes(b"no weights"), "state.safetensors: "),
    ],
)
def test_replay_of_what_is_damaged_is_refused(stopped, launch, tmp_path, damage, message):
    copy = tmp_path / "run" / "nonfinite" / f"step-{BAD:08d}"
    copy.mkdir(parents=True)
    for path in (stopped[1] / "run" / "nonfinite" / copy.name).iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    damage(copy)
    ended = launch(0, "replay", f"--run_dir={tmp_path / 'run'}", f"--step={BAD}", code=78)
    assert message in message_of(ended)


@pytest.mark.fault(tier=3)
def test_replay_of_a_step_that_was_not_kept_is_refused(launch, tmp_path):
    ended = launch(0, "replay", str(tmp_path / "run"))
    assert (ended.code, "has kept no such step: no step was not finite" in message_of(ended)) == (78, True)
    (tmp_path / "run" / "nonfinite" / "step-00000040").mkdir(parents=True)
    ended = launch(0, "replay", str(tmp_path / "run"), "--step=7")
    assert (ended.code, "has kept no such step: it kept 40; --step names one" in message_of(ended)) == (78, True)


@pytest.mark.parametrize(
    ("flags", "first"),
    [
        ([], "the outputs of block"),
        (
            ["--model=vgg11_bn", "--norm_batch=2", "--mixup=0.3", "--mix_batch=2", "--ema_decay=0.9", "--device_batch=8"],
            "the statistics of block1_conv1/moving_variance",
        ),
    ],
    ids=["plain", "batch_norm"],
)
@pytest.mark.fault("F29", tier=3)
def test_rate_that_diverges_is_reproduced_on_other_ranks(launch, tmp_path, data, flags, first):
    """And blamed on the weights; a log line for 50 updates names the same step as one for each."""
    flags = [*WINDOWS, "--lr=1e30", *flags]
    ended = run(tmp_path, data, 2, *flags, code=81)
    assert "step 1: loss" in message_of(ended) and "2 of 2 ranks are affected" in message_of(ended)
    ended = run(tmp_path / "each", data, 2, *flags, "--log_every_steps=1", code=81)
    assert "step 1: loss" in message_of(ended)
    for ranks in (1, 3):
        ended = launch(ranks, "replay", str(tmp_path / "run"), code=81)
        assert f"not finite again. First {first}" in message_of(ended)
        assert "the weights are at fault" in ended.err


@pytest.fixture(scope="module")
def skipping(tmp_path_factory, data):
    """The final checkpoint of a run of one rank that skips step 5 from the start, undisturbed."""
    out = tmp_path_factory.mktemp("skipping")
    (out / "run" / "nonfinite").mkdir(parents=True)
    (out / "run" / "nonfinite" / "skipped.json").write_text(f"[{BAD}]")
    run(out, data, 1, *WINDOWS)
    return newest(out)


@pytest.mark.parametrize(("ranks", "save_every_steps"), [(2, 4), *full((1, 4), (2, 0))])
def test_rewound_run_is_the_run_that_skipped_the_step(tmp_path, data, skipping, ranks, save_every_steps):
    """With --save_every_steps=0 it goes back to the initial weights; whatever --resume says, which its flags keep."""
    run(
        tmp_path,
        data,
        ranks,
        f"nan@{ranks - 1}:{BAD}",
        *WINDOWS,
        REWIND,
        "--resume=never",
        f"--save_every_steps={save_every_steps}",
    )
    found, run_dir = newest(tmp_path), tmp_path / "run"
    assert (found.meta["step"], found.meta["skipped_steps"]) == (10, [BAD])
    assert_same_state(found, skipping)
    (event,) = events(run_dir, "rewind")
    assert (event["from"], event["to"], event["skipped_steps"]) == (BAD, save_every_steps, [BAD])
    assert event["records"] == positions(32 * BAD, 32 * BAD + 32, 75, 1).ids.tolist()
    assert "transient hardware fault" in events(run_dir, "nonfinite")[0]["diagnosis"]  # it happened once only
    assert "--resume=never" in (run_dir / "flags.txt").read_text()
    assert_true(run_dir)


@pytest.mark.fault(tier=3)
def test_rewound_run_that_is_killed_still_skips_the_step(tmp_path, data, skipping):
    """Killed before its next checkpoint."""
    # Step 7 comes first when 5 is not yet known to be bad, and again after the rewind.
    run(tmp_path, data, 2, f"nan@1:{BAD}", "kill@1:7x2-2", *WINDOWS, REWIND, code=137)
    assert newest(tmp_path).meta["step"] == 4 and len(events(tmp_path / "run", "rewind")) == 1
    run(tmp_path, data, 1, *WINDOWS, REWIND)
    assert newest(tmp_path).meta["skipped_steps"] == [BAD]
    assert_same_state(newest(tmp_path), skipping)
    assert_true(tmp_path / "run")


@pytest.mark.fault(tier=3)
def test_rewinds_are_no_more_than_allowed(tmp_path, data):
    ended = run(tmp_path, data, 2, "nan@1:3x1-9", "nan@1:6x1-9", *WINDOWS, REWIND, "--max_rewinds=1", code=81)
    assert "step 6: loss nan" in message_of(ended)
    assert "--max_rewinds=1" in ended.err and "steps 3 already were" in ended.err
    assert newest(tmp_path).meta["skipped_steps"] == [3]
    assert_true(tmp_path / "run")


@pytest.mark.fault("F30")
def test_weight_that_drifts_on_one_rank_is_noticed(tmp_path, data):
    """Within the steps asked for, and before its average is looked at."""
    flags = ["--drift_every_steps=3", "--save_every_steps=0", "--ema_decay=0.9"]
    ended = run(tmp_path, data, 3, "drift@1:5", *WINDOWS, *flags, code=81)
    message = message_of(ended)
    assert int(message.split("step ")[1].split(":")[0]) in (5, 6, 7, 8)
    assert " is not the same on all ranks: rank 1 differ" in message and "average" not in message
    assert newest(tmp_path) is None


@pytest.mark.fault(tier=3)
def test_state_before_a_skipped_step_does_not_know_of_it(tmp_path, data):
    """A run that is rewound has the same evaluations before it as one that knew from the start."""
    flags = ["--steps=8", "--log_every_steps=2", "--eval_every_epochs=1.8", "--drift_every_steps=0"]
    rewound, told = tmp_path / "rewound", tmp_path / "told"
    run(rewound, data, 2, "nan@1:6", *flags, REWIND)
    (told / "run" / "nonfinite").mkdir(parents=True)
    (told / "run" / "nonfinite" / "skipped.json").write_text("[6]")
    run(told, data, 1, *flags, REWIND)
    assert newest(rewound).meta["skipped_steps"] == newest(told).meta["skipped_steps"] == [6]
    assert_same_run(rewound, told)
