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
        run_on_all_ranks(lambda: init.take_device(precision="bfloat16"))
    assert (raised.value.code, raised.value.collective) == (CONFIGURATION, True)
    assert raised.value.message.startswith("--precision=bfloat16: TensorFlow")


def test_startup_refuses_more_ranks_than_images():
    with pytest.raises(Failure) as raised:
        run_on_all_ranks(lambda: claim_run_dir(TrainConfig(global_batch=1)))
    assert (raised.value.code, raised.value.collective) == (USAGE, True)
    assert f"has fewer images than the {comm.size()} ranks" in raised.value.message
