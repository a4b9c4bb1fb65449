"""One update against what it should be, computed plainly: absolute scales, not only equality with itself."""

import dataclasses
import math

import numpy as np
import pytest
import tensorflow as tf

from hvd_vgg.config import TrainConfig
from hvd_vgg.data.sampler import slice_bounds
from hvd_vgg.models import vgg
from hvd_vgg.models.architecture import vgg_layers
from hvd_vgg.parallel import comm
from hvd_vgg.parallel.init import cpu_convolves
from hvd_vgg.seeds import dropout_keys
from hvd_vgg.training.nonfinite import diagnose
from hvd_vgg.training.optimizer import LOSS_SCALE, make_slots
from hvd_vgg.training.state import initial_state
from hvd_vgg.training.train_step import Backward, exchange_gradients, make_train_step


def skip_unless_computed(precision):
    if not cpu_convolves(precision):
        pytest.skip(f"capability: convolutions in {precision} need a newer TensorFlow")


@pytest.mark.parametrize("factored", [[], ["fc1", "fc2", "predictions"], ["fc2"]])
def test_train_step_is_that_of_the_mean_loss(factored):
    """Over the whole global batch, on any number of ranks."""
    config = TrainConfig(
        model="vgg11", width=0.125, image_size=32, num_classes=10, global_batch=13, device_batch=3, dropout=0.0, lr=0.1
    )
    weights = vgg.initial_weights(vgg_layers("vgg11", 0.125, 32, 10), 1)
    before = {name: tf.identity(value) for name, value in weights.items()}
    random = np.random.default_rng(3)
    images = random.integers(0, 256, (13, 32, 32, 3), np.uint8)
    labels = random.integers(0, 10, 13).astype(np.int32)

    with tf.GradientTape() as tape:
        tape.watch(list(before.values()))
        logits = vgg.logits(before, "vgg11", images, "NHWC")
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        mean = tf.reduce_mean(losses)
    gradients = dict(zip(before, tape.gradient(mean, list(before.values()))))
    top1 = int((logits.numpy().argmax(axis=1) == labels).sum())

    low, high = slice_bounds(13, comm.rank(), comm.size())
    train_step = make_train_step(weights, make_slots(weights), config, "NHWC", factored)
    keys = tf.constant(dropout_keys(1, 0, 2))
    sums = train_step(
        tf.constant(images[low:high]), tf.constant(labels[low:high]), tf.constant(low, tf.int64), keys, tf.constant(0.1)
    )
    loss = comm.sum_over_ranks(np.array([float(sums.loss)]))[0] / 13
    np.testing.assert_allclose(loss, float(mean), rtol=1e-5)
    assert comm.sum_over_ranks(np.array([int(sums.top1)], np.int64))[0] == top1
    norm = np.sqrt(sum(np.sum(np.square(gradient)) for gradient in gradients.values()))
    np.testing.assert_allclose(float(sums.gradient_norm), norm, rtol=1e-4)
    for name, value in weights.items():
        expected = before[name] - 0.1 * (gradients[name] + 1e-4 * before[name])
        moved = np.linalg.norm(expected - before[name])
        assert np.linalg.norm(value.numpy() - expected) <= 1e-3 * moved, name


@pytest.mark.parametrize("factored", [[], ["fc1", "fc2", "predictions"]])
def test_train_step_skips_a_float16_overflow(factored):
    """And the next ones train."""
    config = TrainConfig(model="vgg11", width=0.125, image_size=32, num_classes=10, global_batch=8, precision="float16")
    weights = vgg.initial_weights(vgg_layers("vgg11", 0.125, 32, 10), 1)
    slots = make_slots(weights, config.precision)
    train_step = make_train_step(weights, slots, config, "NHWC", factored)
    keys, random = tf.constant(dropout_keys(1, 0, 2)), np.random.default_rng(3)
    images = random.integers(0, 256, (8, 32, 32, 3), np.uint8)
    low, high = slice_bounds(8, comm.rank(), comm.size())
    arguments = [tf.constant(images[low:high]), tf.range(low, high), tf.constant(low, tf.int64), keys]

    slots[LOSS_SCALE].assign(2.0**40 if comm.rank() == 0 else 2.0**10)  # it overflows on one rank only
    before = {name: value.numpy() for name, value in {**weights, **slots}.items()}
    sums = train_step(*arguments, tf.constant(0.01))
    assert math.isfinite(float(sums.loss)) and not math.isfinite(float(sums.gradient_norm))
    assert float(sums.loss_scale) == (2.0**39 if comm.rank() == 0 else 2.0**9)
    for name, value in {**weights, **slots}.items():
        assert name == LOSS_SCALE or (value.numpy() == before[name]).all()

    slots[LOSS_SCALE].assign(2.0**10)
    assert math.isfinite(float(train_step(*arguments, tf.constant(0.01)).gradient_norm))
    assert (weights["fc1/kernel"].numpy() != before["fc1/kernel"]).any()


@pytest.mark.parametrize(
    ("kind", "within"), [({"xla": True}, 1e-5), ({"precision": "bfloat16"}, 0.2), ({"precision": "float16"}, 0.1)]
)
def test_train_step_in_xla_and_low_precision(kind, within):
    """The same update to rounding."""
    skip_unless_computed(kind.get("precision", "float32"))
    config = TrainConfig(model="vgg11", width=0.0625, image_size=32, num_classes=10, global_batch=11, device_batch=3, lr=0.1)
    random = np.random.default_rng(3)
    images, labels = random.integers(0, 256, (11, 32, 32, 3), np.uint8), random.integers(0, 10, 11).astype(np.int32)
    low, high = slice_bounds(11, comm.rank(), comm.size())
    found = []
    for chosen in (config, dataclasses.replace(config, **kind)):
        weights = vgg.initial_weights(vgg_layers("vgg11", 0.0625, 32, 10), 1)
        before = {name: value.numpy() for name, value in weights.items()}
        train_step = make_train_step(weights, make_slots(weights), chosen, "NHWC", ["fc1"])
        keys, mine = tf.constant(dropout_keys(1, 0, 2)), (tf.constant(images[low:high]), tf.constant(labels[low:high]))
        train_step(*mine, tf.constant(low, tf.int64), keys, tf.constant(config.lr))
        assert {value.dtype for value in weights.values()} == {tf.float32}
        found.append({name: value.numpy() - before[name] for name, value in weights.items()})
    for name, moved in found[0].items():
        assert np.linalg.norm(found[1][name] - moved) <= within * np.linalg.norm(moved), name


def test_train_step_infinite_loss_of_one_rank_stops_all():
    """Though its gradient is finite."""
    config = TrainConfig(model="vgg11", width=0.0625, image_size=32, num_classes=10, global_batch=8, dropout=0.0)
    weights = vgg.initial_weights(vgg_layers("vgg11", 0.0625, 32, 10), 1)
    slots = make_slots(weights)
    train_step = make_train_step(weights, slots, config, "NHWC", ["fc1"])
    low, high = slice_bounds(8, comm.rank(), comm.size())
    images = np.random.default_rng(3).integers(0, 256, (8, 32, 32, 3), np.uint8)[low:high]
    labels = np.full(high - low, 0 if comm.rank() == 1 else 1, np.int32)
    rest = tf.constant(low, tf.int64), tf.constant(dropout_keys(1, 0, 2)), tf.constant(0.01)
    bias = weights["predictions/bias"]
    bias.assign([-3e38] + [3e38] * 9)  # whose difference is no float32
    before = {name: value.numpy() for name, value in {**weights, **slots}.items()}

    sums = train_step(tf.constant(images), tf.constant(labels), *rest)
    assert math.isfinite(float(sums.loss)) == (comm.rank() != 1)
    assert math.isfinite(float(sums.gradient_norm)) and not bool(sums.finite)
    assert all((value.numpy() == before[name]).all() for name, value in {**weights, **slots}.items())

    bias.assign(tf.zeros([10]))
    before["predictions/bias"] = bias.numpy()
    assert bool(train_step(tf.constant(images), tf.constant(labels), *rest).finite)  # but it is held, as all after the first
    assert all((value.numpy() == before[name]).all() for name, value in {**weights, **slots}.items())


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_diagnose_finds_rank_layer_and_records(precision):
    """That are not finite first."""
    skip_unless_computed(precision)
    config = TrainConfig(
        model="vgg11", width=0.0625, image_size=32, num_classes=10, global_batch=9, device_batch=2, precision=precision
    )
    run = initial_state(config)
    before = {name: value.numpy() for name, value in run.variables().items()}
    # Black images make block1_conv1 negative, and so 0 behind its ReLU; white ones make it overflow.
    run.weights["block1_conv1/kernel"].assign(tf.fill([3, 3, 3, 4], 3e38 if precision != "float16" else 6e4))
    low, high = slice_bounds(9, comm.rank(), comm.size())
    images = np.zeros((9, 32, 32, 3), np.uint8)
    images[[4, 7]] = 255
    mine = tf.constant(images[low:high]), tf.zeros([high - low], tf.int32)
    train_step = make_train_step(run.weights, run.slots, config, "NHWC", [])
    found = diagnose(0, run, train_step, *mine, 0.01, config, "NHWC")
    assert found.repeated and "First the outputs of block1_conv1 on rank " in str(found)
    assert sorted(row for rank in found.ranks for row in rank["at_fault"]) == [4, 7]
    low, high = found.ranks[found.rank]["slice"]
    assert low <= 4 < high
    if precision != "float16":  # which halves its scale and goes on
        assert not found.finite
        assert all((run.variables()[name].numpy() == before[name]).all() for name in before if "block1_conv1" not in name)


@pytest.mark.parametrize("factored", [["fc1", "fc2"], []])
def test_exchange_gradients_sums_over_ranks(factored):
    """Gradients are summed, factors gathered and multiplied; one rank's loss that is not finite is known to all."""
    config = TrainConfig(model="vgg11", width=0.0625, image_size=32, num_classes=10, global_batch=2 * comm.size())
    names = ["block1_conv1/kernel", *(f"{name}/kernel" for name in ("fc1", "fc2") if name not in factored)]
    one = float(comm.rank() + 1)
    total = comm.size() * (comm.size() + 1) / 2
    rows = [tf.fill([2, 3], one) for _ in factored]
    outputs = [tf.fill([2, 4], 2.0) for _ in factored]

    @tf.function(autograph=False)
    def exchanged(loss):
        local = Backward(loss, 0, 0, [tf.fill([3, 4], one) for _ in names], rows, outputs)
        return exchange_gradients(local, names, factored, config, comm.WORLD)

    gradients, finite, seconds = exchanged(tf.constant(1.0))
    assert bool(finite) and float(seconds) >= 0
    for name in names:
        assert (gradients[name].numpy() == total).all()
    for name in factored:
        assert (gradients[f"{name}/kernel"].numpy() == 2 * 2 * total).all()
        assert (gradients[f"{name}/bias"].numpy() == 2 * 2 * comm.size()).all()
    assert not bool(exchanged(tf.constant(math.inf if comm.rank() == comm.size() - 1 else 1.0))[1])
