"""`hvd-vgg doctor` on ranks that are of unequal speed, and on ranks that were told what ends them."""

import pytest
from support import changed

# Rank 1 needs 0.3 s for a record: more than Horovod's limit for all of its part, a fifth of it for a block.
PROGRAM = changed("""
import time
from hvd_vgg.data import survey
from hvd_vgg.run.health import launched_rank

survey._BLOCK, decodes = 4, survey._decodes
survey._decodes = lambda *what: (time.sleep(0.3 * launched_rank()), decodes(*what))[1]
""")


FLAGS = ["doctor", "--num_classes=10", "--model=vgg11", "--width=0.125", "--image_size=32", "--global_batch=32"]


@pytest.mark.fault(tier=3)
def test_a_slow_rank_is_no_stall(launch, data, tmp_path):
    flags = [*FLAGS, "--full", "--input_threads=1", f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}"]
    limits = {"HOROVOD_STALL_CHECK_TIME_SECONDS": "1", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "6"}
    ended = launch(2, *flags, program=PROGRAM, **limits)
    assert ended.code == 0, ended.out + ended.err
    for split in ("train", "validation"):
        assert f"every record of {split} is read and decoded" in ended.out


@pytest.mark.parametrize("command", ["doctor", "train"])
def test_gloo_under_mpirun_is_named_before_it_ends_the_ranks(launch, data, tmp_path, command):
    """They would end by signal 11, and doctor with them."""
    gloo = {"HOROVOD_CPU_OPERATIONS": "gloo"}
    ended = launch(2, command, *FLAGS[1:], f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", **gloo)
    assert ended.code == 78, ended.out + ended.err
    assert "HOROVOD_CPU_OPERATIONS=gloo ends all ranks of mpirun" in ended.out + ended.err
