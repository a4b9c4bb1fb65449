"""A run is its configuration and its seed: the same records, losses and weights on any number of ranks."""

import os
import signal
import sys

import numpy as np
import pytest
from oracles import (
    FLAGS,
    RECORDS,
    SEED,
    STEPS,
    assert_same_run,
    assert_same_weights,
    ids_by_step,
    injected_ranks,
    losses,
    newest,
    result,
    run,
    start,
)
from support import ROOT, TINY, full, wait_for

from hvd_vgg.data.sampler import positions


def planned(block=1):
    """Returns {step: ids} as the sampler has them."""
    return {step: positions(32 * step, 32 * step + 32, RECORDS, SEED, block).ids.tolist() for step in range(STEPS)}


def test_undisturbed_run_learns_and_reads_what_is_planned(undisturbed):
    """Else all the comparisons with it would show little."""
    assert ids_by_step(undisturbed, 2) == planned()
    found = losses(undisturbed / "run")
    assert list(found) == list(range(1, STEPS + 1)) and abs(found[STEPS] - found[1]) > 1e-3
    tensors = newest(undisturbed).tensors
    assert min(np.linalg.norm(value) for name, value in tensors.items() if name.endswith("momentum")) > 0


@pytest.mark.parametrize(
    ("ranks", "device_batch", "exchange"),
    [
        *[(0, 32, "allreduce"), (3, 4, "factored")],
        *full((2, 4, "factored"), (3, 4, "allreduce"), (2, 32, "allreduce"), (4, 32, "factored"), (1, 32, "factored")),
        *full((2, 32, "factored")),
        *full((4, 4, "factored"), (1, 4, "factored"), (3, 32, "factored"), (1, 4, "allreduce"), (4, 32, "allreduce")),
    ],
)
@pytest.mark.fault("F31")
def test_ranks_micro_batches_and_exchange_change_nothing(tmp_path, data, undisturbed, ranks, device_batch, exchange):
    flags = [f"--device_batch={device_batch}", f"--exchange={exchange}", "--drift_every_steps=3", "--save_every_steps=0"]
    run(tmp_path, data, ranks, *flags)
    assert_same_run(tmp_path, ranks, undisturbed, 2)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.fault(tier=3)
def test_ranks_change_less_than_a_low_precisions_rounding(tmp_path, data, undisturbed, precision):
    """What ranks change is less than twice what the precision itself changes against float32."""
    flags = [f"--precision={precision}", "--drift_every_steps=3"]
    run(tmp_path / "0", data, 0, *flags)
    wanted, exact = newest(tmp_path / "0").tensors, newest(undisturbed).tensors
    kernels = [name for name in exact if name.endswith("/kernel")]  # biases begin at 0: all gradient
    assert (precision == "float16") == ("loss_scale" in wanted)

    def distances(one, other):
        return np.array([np.linalg.norm(one[name] - other[name]) for name in kernels])

    rounding = distances(wanted, exact)
    assert (rounding > 0).all() and (rounding < [0.1 * np.linalg.norm(exact[name]) for name in kernels]).all()
    for ranks in (2, 4):
        out = tmp_path / str(ranks)
        run(out, data, ranks, *flags)
        assert ids_by_step(out, ranks) == planned()
        found = [list(losses(each / "run").values()) for each in (out, tmp_path / "0")]
        np.testing.assert_allclose(*found, rtol=0.02)
        assert (distances(newest(out).tensors, wanted) <= 2 * rounding).all(), ranks


@pytest.mark.parametrize("ranks", [0, 2])
@pytest.mark.fault(tier=3)
def test_shuffled_blocks_and_input_threads_on_ranks(tmp_path, data, ranks):
    """The order is the sampler's, which knows of no ranks and no threads."""
    run(tmp_path, data, ranks, "--shuffle_block_records=8", f"--input_threads={1 + ranks}")
    assert ids_by_step(tmp_path, ranks) == planned(8)


@pytest.mark.fault(tier=3)
def test_float16_run_goes_on_with_its_loss_scale(tmp_path, data):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, data, 1, "--precision=float16")
    run(parts, data, 1, "--precision=float16", "--steps=4")
    assert newest(parts).tensors["loss_scale/good_steps"] in (3, 4)
    run(parts, data, 2, "--precision=float16")
    for name in ("loss_scale", "loss_scale/good_steps"):
        assert newest(parts).tensors[name] == newest(whole).tensors[name]


@pytest.mark.fault(tier=3)
def test_run_goes_on_in_another_precision_where_allowed(tmp_path, data):
    """The loss scale, which it had none of, begins at its first value."""
    run(tmp_path, data, 2, "--steps=4")
    run(tmp_path, data, 2, "--precision=float16", "--allow_config_change=precision")
    assert newest(tmp_path).tensors["loss_scale"] in (65536.0, 32768.0)
    assert newest(tmp_path).tensors["loss_scale/good_steps"] in (STEPS - 5, STEPS - 4)


@pytest.mark.fault(tier=3)
def test_another_seed_is_another_run(tmp_path, data, undisturbed):
    run(tmp_path, data, 2, "--seed=2")
    assert ids_by_step(tmp_path, 2) != planned()
    with pytest.raises(AssertionError):
        assert_same_weights(newest(tmp_path), newest(undisturbed), 1e-2)


@pytest.mark.fault("F21")
def test_killed_on_two_ranks_and_resumed_on_one(tmp_path, data, undisturbed):
    """It is the run that was never killed: records, losses and weights, from whichever step it was killed at."""
    started = start(tmp_path, data, 2, "--save_every_steps=2")
    ids = tmp_path / "ids.rank1"
    wait_for(lambda: ids.exists() and len(ids.read_text().splitlines()) >= 5)
    os.kill(injected_ranks(started)[1], signal.SIGKILL)
    ended = started.wait(code=137)
    before, found = ids_by_step(tmp_path, 2), newest(tmp_path)
    resumed_at = found.meta["step"] if found else 0
    for rank in (0, 1):
        (tmp_path / f"ids.rank{rank}").unlink()
    ended = run(tmp_path, data, 1, "--save_every_steps=2")
    assert f"steps {resumed_at} to {STEPS}" in ended.out
    assert {**{step: before[step] for step in range(resumed_at)}, **ids_by_step(tmp_path, 1)} == planned()
    assert_same_weights(newest(tmp_path), newest(undisturbed))
    np.testing.assert_allclose(*(list(losses(out / "run").values()) for out in (tmp_path, undisturbed)), rtol=1e-5)


@pytest.mark.parametrize(
    "launcher",
    [["horovodrun", "-np", "2"], *full(["horovodrun", "--gloo", "-np", "2"], ["mpirun", "-np", "4", "--oversubscribe"])],
    ids=" ".join,
)
def test_launchers_give_the_same_losses(launch, tmp_path, data, undisturbed, launcher):
    flags = [f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *FLAGS]
    launch(0, "train", *flags, program=[*launcher, sys.executable, "-m", "hvd_vgg"], PYTHONPATH=str(ROOT), code=0)
    np.testing.assert_allclose(*(list(losses(out / "run").values()) for out in (tmp_path, undisturbed)), rtol=1e-5)


@pytest.mark.fault(tier=3)
def test_one_inter_op_thread_does_not_hang_a_run(tmp_path, data, undisturbed):
    run(tmp_path, data, 2, TF_NUM_INTEROP_THREADS="1", TF_NUM_INTRAOP_THREADS="1")
    np.testing.assert_allclose(*(list(losses(out / "run").values()) for out in (tmp_path, undisturbed)), rtol=1e-5)


def test_evaluation_gives_the_same_integers_on_ranks(launch, tmp_path, data):
    """On 2 after training in batches of 5, on 3 by the command."""
    flags = [f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *TINY, "--steps=20", "--device_batch=5"]
    ended = launch(2, "train", *flags, code=0)
    found = result(tmp_path / "run")
    assert found["records_evaluated"] == 37
    ended = launch(3, "evaluate", f"--run_dir={tmp_path / 'run'}", code=0)
    assert f"({found['top1_hits']} and {found['top5_hits']} of 37 records, each once" in ended.out
