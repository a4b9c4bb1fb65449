"""What ranks that have joined refuse before they train."""

import pytest

from hvd_vgg.config import TrainConfig
from hvd_vgg.errors import CONFIGURATION, USAGE, Failure
from hvd_vgg.parallel import comm, init
from hvd_vgg.parallel.consensus import run_on_all_ranks
from hvd_vgg.training.startup import claim_run_dir


def test_startup_refuses_a_precision_that_cpus_lack(monkeypatch):
    """As TensorFlow 2.6 on CPUs does bfloat16."""
    monkeypatch.setattr(init, "cpu_convolves", lambda precision: precision != "bfloat16")
    with pytest.raises(Failure) as raised:
        run_on_all_ranks(lambda: init.take_device(TrainConfig(precision="bfloat16", reproducible="rounding")))
    assert (raised.value.code, raised.value.collective) == (CONFIGURATION, True)
    assert raised.value.message.startswith("--precision=bfloat16: TensorFlow")


@pytest.mark.parametrize("reproducible", ["bits", "rounding"])
def test_startup_refuses_more_ranks_than_images(reproducible):
    with pytest.raises(Failure) as raised:
        run_on_all_ranks(lambda: claim_run_dir(TrainConfig(global_batch=1, device_batch=1, reproducible=reproducible)))
    assert (raised.value.code, raised.value.collective) == (USAGE, True)
    assert f"has fewer images than the {comm.size()} ranks" in raised.value.message


def test_startup_refuses_more_ranks_than_micro_batches():
    """And says how many can run, and what a new run would need."""
    with pytest.raises(Failure) as raised:
        run_on_all_ranks(lambda: claim_run_dir(TrainConfig(global_batch=64, device_batch=64)))
    assert (raised.value.code, raised.value.collective) == (USAGE, True)
    enough = 64 // comm.size()
    assert f"fewer than the {comm.size()} ranks" in raised.value.message
    assert raised.value.message.endswith(f"start at most 1, or begin a new run with --device_batch={enough}")
