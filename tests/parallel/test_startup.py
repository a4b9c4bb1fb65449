"""What ranks that have joined refuse before they train."""

import socket

import pytest

from hvd_vgg.config import TrainConfig
from hvd_vgg.environment import JOB_PARAMETER
from hvd_vgg.errors import CONFIGURATION, USAGE, Failure
from hvd_vgg.launcher.jobs import own_token
from hvd_vgg.parallel import comm, init
from hvd_vgg.parallel.consensus import run_on_all_ranks
from hvd_vgg.training.startup import claim_run_dir, placement_error, require_hosts


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


def test_startup_refuses_ranks_on_another_number_of_hosts(monkeypatch):
    """These ranks are all on this host; those that `launch` has started again may be on fewer than asked for."""
    monkeypatch.delenv(f"OMPI_MCA_{JOB_PARAMETER}", raising=False)
    require_hosts(0)
    require_hosts(1)
    with pytest.raises(Failure) as raised:
        require_hosts(2)
    assert (raised.value.code, raised.value.collective) == (CONFIGURATION, True)
    found = f"found {comm.size()} ranks on 1 host ({socket.gethostname()}): "
    assert raised.value.message.startswith(f"--expect_hosts=2, but {found}")
    assert "`hvd-vgg launch --hostfile=FILE` places ranks itself" in raised.value.message
    assert placement_error(-1)[1].startswith("correct the flag")
    token = own_token("0123456789abcdef")
    for name in (token, f"{token}.0"):  # of a dry run, whose token ends in a clock's ticks; of a first start
        monkeypatch.setenv(f"OMPI_MCA_{JOB_PARAMETER}", name)
        with pytest.raises(Failure):
            require_hosts(2)
    monkeypatch.setenv(f"OMPI_MCA_{JOB_PARAMETER}", f"{token}.10")
    require_hosts(2)
