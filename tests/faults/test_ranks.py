"""Ranks of unequal speed under `hvd-vgg doctor`, and ranks told to use what ends them."""

import pytest
from support import changed, full

# Rank 1 needs 0.3 s for a record: more than Horovod's limit for all of its part, a fifth of it for a block.
SLOW = changed("""
import time
from hvd_vgg.doctor import dataset
from hvd_vgg.environment import launched_rank

dataset._BLOCK, check_record = 4, dataset._check_record
dataset._check_record = lambda *args: (time.sleep(0.3 * launched_rank()), check_record(*args))[1]
""")
FLAGS = ["--num_classes=10", "--model=vgg11", "--width=0.125", "--image_size=32", "--global_batch=32", "--device_batch=8"]


@pytest.mark.fault(tier=3)
def test_slow_rank_is_no_stall(launch, data, tmp_path):
    flags = [*FLAGS, "--full", "--input_threads=1", f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}"]
    limits = {"HOROVOD_STALL_CHECK_TIME_SECONDS": "1", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "6"}
    ended = launch(2, "doctor", *flags, program=SLOW, **limits, code=0)
    for split in ("train", "validation"):
        assert f"every record of {split} is read and decoded" in ended.out


@pytest.mark.parametrize("command", ["train", *full("doctor")])
def test_gloo_under_mpirun_is_refused(launch, data, tmp_path, command):
    """It would end the ranks by signal 11, and doctor with them."""
    flags = [*FLAGS, f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}"]
    ended = launch(2, command, *flags, HOROVOD_CPU_OPERATIONS="gloo", code=78)
    assert "HOROVOD_CPU_OPERATIONS=gloo ends all ranks of mpirun" in ended.out + ended.err
