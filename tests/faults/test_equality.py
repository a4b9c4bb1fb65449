"""A run is its configuration and its seed: the same records, losses and weights on any number of ranks."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support import ROOT, TINY, Started, command_line

from hvd_vgg.train import checkpoint

# 75 records in batches of 32: steps cross from epoch to epoch. Dropout and crop on.
STEPS = 10
# At ten times this rate, where rounding decides which way a ReLU or a maximum goes, 10 updates make 1e-3 of it in the loss.
SEED = 1
FLAGS = [*TINY, "--augment=crop", "--dropout=0.5", "--width=0.25", f"--steps={STEPS}", f"--seed={SEED}", "--lr=0.005"]
WORKER = [sys.executable, str(ROOT / "tests" / "worker.py")]


def log_rows(run_dir):
    text = (run_dir / "dllogger.json").read_text()
    rows = [json.loads(line[5:]) for line in text.splitlines()]
    return [row for row in rows if row["type"] == "LOG"]


def losses(run_dir):
    return {row["step"][1]: row["data"]["train.loss"] for row in log_rows(run_dir) if "train.loss" in row["data"]}


def ids_by_step(out, ranks):
    """Returns {step: ids in the order of the global batch}; a step trained twice keeps its last."""
    parts = []
    for rank in range(ranks):
        rows = [list(map(int, line.split())) for line in (out / f"ids.rank{rank}").read_text().splitlines()]
        parts.append({row[0]: row[1:] for row in rows})
    common = set.intersection(*(set(part) for part in parts))
    return {step: [record for part in parts for record in part[step]] for step in sorted(common)}


def train(launch, out, data, ranks, *more):
    """Trains, noting what is read, into out/run and returns (ids by step, losses by step, newest checkpoint)."""
    out.mkdir(exist_ok=True)
    flags = [f"--data_dir={data}", f"--run_dir={out / 'run'}", *FLAGS, *more]
    ended = launch(ranks, str(out), "train", *flags, program=WORKER)
    assert ended.code == 0, ended.out + ended.err
    return ids_by_step(out, max(1, ranks)), losses(out / "run"), checkpoint.newest(out / "run")[0]


def assert_same_run(found, wanted, tolerance=1e-5):
    assert found[0] == wanted[0]
    assert list(found[1]) == list(wanted[1])
    np.testing.assert_allclose(list(found[1].values()), list(wanted[1].values()), rtol=tolerance)
    assert_same_weights(found[2], wanted[2], tolerance)


def assert_same_weights(found, wanted, tolerance=1e-5):
    """Each kernel to `tolerance` of its norm; all biases, and all momentum, to 2000 times that of theirs (0.006 was seen).

    These are made of gradients. A maximum or a ReLU whose inputs differ in the last bit may go the other way, and moves a
    gradient by a whole term, which is much beside the few numbers of one bias.
    """
    assert found.tensors.keys() == wanted.tensors.keys()

    def apart(names):
        differences = [np.linalg.norm(found.tensors[name] - wanted.tensors[name]) for name in names]
        return np.linalg.norm(differences) / np.linalg.norm([np.linalg.norm(wanted.tensors[name]) for name in names])

    for kind in ("/bias", "/momentum"):
        assert apart([name for name in wanted.tensors if name.endswith(kind)]) <= 2000 * tolerance, kind
    for name in wanted.tensors:
        assert not name.endswith("/kernel") or apart([name]) <= tolerance, (name, apart([name]))


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, data):
    """The run of one rank with no micro-batches, to which all others are held."""
    out = tmp_path_factory.mktemp("one")

    def launch(ranks, *arguments, program):
        return Started(command_line(ranks, arguments, program), out).wait()

    return train(launch, out / "spy", data, 0, "--exchange=allreduce")


def test_the_reference_learns_something_and_reads_what_the_order_says(one_rank, data):
    ids, loss, found = one_rank
    from hvd_vgg.data.sampler import positions

    assert ids == {s: positions(32 * s, 32 * s + 32, 75, SEED).ids.tolist() for s in range(STEPS)}
    assert len(loss) == STEPS
    moved = [np.linalg.norm(value) for name, value in found.tensors.items() if name.endswith("momentum")]
    assert min(moved) > 0
    assert abs(loss[STEPS] - loss[1]) > 1e-3


@pytest.mark.parametrize(
    ("ranks", "device_batch", "exchange"),
    [
        *[(2, 4, "factored"), (4, 32, "factored")],
        *[(2, 32, "allreduce"), (3, 4, "allreduce")],
        *[
            pytest.param(*combination, marks=pytest.mark.fault(tier=3))
            for combination in [
                *[(1, 32, "factored"), (2, 32, "factored"), (3, 4, "factored"), (4, 4, "factored")],
                *[(1, 4, "factored"), (3, 32, "factored")],
                *[(1, 4, "allreduce"), (4, 32, "allreduce")],
            ]
        ],
    ],
)
@pytest.mark.fault("F31")
def test_ranks_micro_batches_and_exchange_make_the_same_run(launch, tmp_path, data, one_rank, ranks, device_batch, exchange):
    flags = [f"--device_batch={device_batch}", f"--exchange={exchange}", "--drift_every_steps=3"]
    assert_same_run(train(launch, tmp_path / "spy", data, ranks, *flags), one_rank)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.fault(tier=3)
def test_ranks_make_the_same_run_within_a_low_precisions_rounding(launch, tmp_path, data, one_rank, precision):
    """What ranks change is less than twice what the precision itself changes against float32."""
    flags = [f"--precision={precision}", "--drift_every_steps=3"]
    wanted = train(launch, tmp_path / "1", data, 0, *flags)
    kernels = [name for name in wanted[2].tensors if name.endswith("/kernel")]  # biases begin at 0: all gradient
    assert (precision == "float16") == ("loss_scale" in wanted[2].tensors)

    def distances(one, other):
        return [np.linalg.norm(one[2].tensors[name] - other[2].tensors[name]) for name in kernels]

    rounding = np.array(distances(wanted, one_rank))
    assert (rounding > 0).all() and (rounding < [0.1 * np.linalg.norm(one_rank[2].tensors[name]) for name in kernels]).all()
    for ranks in (2, 4):
        found = train(launch, tmp_path / f"{ranks}", data, ranks, *flags)
        assert found[0] == wanted[0]
        np.testing.assert_allclose(list(found[1].values()), list(wanted[1].values()), rtol=0.02)
        assert (np.array(distances(found, wanted)) <= 2 * rounding).all(), ranks


def test_blocks_and_input_threads_make_the_same_run_on_one_rank_and_two(launch, tmp_path, data):
    wanted = train(launch, tmp_path / "one", data, 1, "--shuffle_block_records=8", "--input_threads=1")
    assert_same_run(train(launch, tmp_path / "two", data, 2, "--shuffle_block_records=8", "--input_threads=3"), wanted)
    from hvd_vgg.data.sampler import positions

    assert wanted[0] == {s: positions(32 * s, 32 * s + 32, 75, SEED, 8).ids.tolist() for s in range(STEPS)}


@pytest.mark.fault(tier=3)
def test_a_float16_run_goes_on_with_its_loss_scale(launch, tmp_path, data):
    wanted = train(launch, tmp_path / "whole", data, 1, "--precision=float16")
    first = train(launch, tmp_path / "parts", data, 1, "--precision=float16", "--steps=4")
    assert first[2].tensors["loss_scale/good_steps"] in (3, 4)
    found = train(launch, tmp_path / "parts", data, 2, "--precision=float16")
    assert found[0] == {step: ids for step, ids in wanted[0].items() if step >= 4}  # what both ranks of it trained
    for name in ("loss_scale", "loss_scale/good_steps"):
        assert found[2].tensors[name] == wanted[2].tensors[name]


@pytest.mark.fault(tier=3)
def test_a_run_goes_on_in_another_precision_where_that_is_allowed(launch, tmp_path, data):
    """The loss scale, which it had none of, begins at its first value."""
    train(launch, tmp_path / "parts", data, 2, "--steps=4")
    found = train(launch, tmp_path / "parts", data, 2, "--precision=float16", "--allow_config_change=precision")
    assert found[2].tensors["loss_scale"] in (65536.0, 32768.0)
    assert found[2].tensors["loss_scale/good_steps"] in (STEPS - 5, STEPS - 4)


def test_another_seed_is_another_run(launch, tmp_path, data, one_rank):
    found = train(launch, tmp_path / "spy", data, 2, "--seed=2")
    with pytest.raises(AssertionError):
        assert_same_run(found, one_rank)
    with pytest.raises(AssertionError):
        assert_same_weights(found[2], one_rank[2], 1e-2)


@pytest.mark.fault("F21")
def test_killed_on_two_ranks_and_resumed_on_one_is_the_run_never_killed(launch, tmp_path, data, one_rank):
    out = tmp_path / "spy"
    out.mkdir()
    flags = [f"--data_dir={data}", f"--run_dir={out / 'run'}", *FLAGS, "--save_every_steps=2"]
    started = Started(command_line(2, [str(out), "train", *flags], WORKER), tmp_path)
    at = int(np.random.default_rng(int(time.time())).integers(3, 8))
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and started.process.poll() is None:
        steps = len((out / "ids.rank1").read_text().splitlines()) if (out / "ids.rank1").exists() else 0
        if steps >= at:
            break
        time.sleep(0.005)
    ranks = [pid for pid in started.alive() if b"worker.py" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[1]]
    assert len(ranks) == 2, f"killed at step {at}: {started.out.read_text()}"
    os.kill(ranks[1], signal.SIGKILL)
    ended = started.wait()
    assert ended.code == 137, ended.err
    found, _ = checkpoint.newest(out / "run")
    resumed_at = found.meta["step"] if found else 0
    before = ids_by_step(out, 2)

    after_out = tmp_path / "after"
    after_out.mkdir()
    ended = launch(1, str(after_out), "train", *flags, "--resume=auto", program=WORKER)
    assert ended.code == 0, ended.err
    assert f"steps {resumed_at} to {STEPS}" in ended.out
    after = ids_by_step(after_out, 1)
    assert list(after) == list(range(resumed_at, STEPS))
    whole = {**{step: before[step] for step in range(resumed_at)}, **after}
    assert whole == one_rank[0]
    stream = [record for step in range(STEPS) for record in whole[step]]
    for epoch in range(len(stream) // 75):
        assert sorted(stream[75 * epoch : 75 * (epoch + 1)]) == list(range(75))
    assert_same_weights(checkpoint.newest(out / "run")[0], one_rank[2])
    done = losses(out / "run")
    np.testing.assert_allclose([done[s] for s in sorted(done)], [one_rank[1][s] for s in sorted(done)], rtol=1e-5)


@pytest.mark.parametrize(
    "launcher",
    [
        ["horovodrun", "-np", "2"],
        pytest.param(["horovodrun", "--gloo", "-np", "2"], marks=pytest.mark.fault(tier=3)),
        pytest.param(["mpirun", "-np", "4", "--oversubscribe"], marks=pytest.mark.fault(tier=3)),
    ],
    ids=["horovodrun", "gloo", "mpirun4"],
)
def test_every_launcher_gives_the_same_losses(launch, tmp_path, data, one_rank, launcher):
    out = tmp_path / "run"
    flags = [f"--data_dir={data}", f"--run_dir={out}", *FLAGS]
    ended = launch(0, "train", *flags, program=[*launcher, sys.executable, "-m", "hvd_vgg"], PYTHONPATH=str(ROOT))
    assert ended.code == 0, ended.out + ended.err
    found = losses(out)
    np.testing.assert_allclose(list(found.values()), list(one_rank[1].values()), rtol=1e-5)


@pytest.mark.fault(tier=3)
def test_one_inter_op_thread_does_not_hang_a_run(launch, tmp_path, data, one_rank):
    flags = [f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *FLAGS]
    ended = launch(2, "train", *flags, TF_NUM_INTEROP_THREADS="1", TF_NUM_INTRAOP_THREADS="1")
    assert ended.code == 0, ended.out + ended.err
    np.testing.assert_allclose(list(losses(tmp_path / "run").values()), list(one_rank[1].values()), rtol=1e-5)


def test_evaluation_gives_the_same_integers_on_1_2_and_3_ranks(launch, tmp_path, data):
    flags = [f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *TINY, "--steps=20", "--device_batch=5"]
    ended = launch(2, "train", *flags)
    assert ended.code == 0, ended.err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    expected = f"({result['top1_hits']} and {result['top5_hits']} of 37 records, each once"
    assert result["records_evaluated"] == 37
    for ranks in (0, 2, 3):
        ended = launch(ranks, "evaluate", f"--run_dir={tmp_path / 'run'}")
        assert ended.code == 0, ended.err
        assert expected in ended.out
