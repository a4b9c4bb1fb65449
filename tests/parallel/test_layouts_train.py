"""All ranks train from each layout in turn; with whole runs: tests/faults/test_layouts.py."""

import numpy as np

from hvd_vgg.config import TrainConfig
from hvd_vgg.data.loader import train_batches
from hvd_vgg.data.sampler import part_bounds
from hvd_vgg.parallel import comm
from hvd_vgg.parallel.init import Device
from hvd_vgg.reporting.console import Console
from hvd_vgg.training import checkpoint
from hvd_vgg.training.dataset import open_data
from hvd_vgg.training.state import initial_state, reset_state
from hvd_vgg.training.train_step import make_train_step, step_inputs

# 18 records in batches of 7, in micro-batches of 2, 2, 2 and 1.
SHAPE = dict(model="vgg11", width=0.0625, image_size=32, num_classes=3, global_batch=7, device_batch=2, augment="crop")
STEPS = 4


def test_every_layout_trains_to_the_same_bits(tmp_path, layouts):
    """Weights and momentum, and what each record's loss was."""
    config = TrainConfig(**SHAPE, optimizer="nesterov")
    state, low = initial_state(config), part_bounds(config, comm.rank(), comm.size())[0]
    train_step = make_train_step(state, config, Device("CPU", "NHWC", 1, 1, 2, 1), ["fc1"])
    found, before = {}, checkpoint.tensors_sha256((name, np.asarray(each)) for name, each in state.variables().items())
    for kind in ("imagenet", "tfds", "webdataset", "folders"):
        reset_state(state, config)
        splits = open_data(TrainConfig(**SHAPE, data_dir=str(layouts / kind)), tmp_path, Console("lines", False))
        assert (splits.train.records, splits.validation.records) == (18, 9) and splits.label_base == (kind == "imagenet")
        losses = []
        batches = train_batches(splits.train, config, splits.label_base, range(STEPS), comm.rank(), comm.size(), 1)
        for step, batch in enumerate(batches):
            losses += train_step(*batch[:2], *step_inputs(config, step, low, 0.05)).losses.numpy().ravel().tolist()
        tensors = ((name, np.asarray(each)) for name, each in state.variables().items())
        found[kind] = losses, checkpoint.tensors_sha256(tensors)
        comm.barrier()  # rank 0 keeps the index while others go on
    assert all(each == found["imagenet"] for each in found.values())
    assert len(set(found["imagenet"][0])) >= STEPS and found["imagenet"][1] != before
