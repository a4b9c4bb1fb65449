"""One update against what it should be, computed plainly: absolute scales, not only equality with itself."""

import dataclasses
import math

import numpy as np
import pytest
import tensorflow as tf

from hvd_vgg.config import BITS, ROUNDING, TrainConfig
from hvd_vgg.data.sampler import part_bounds
from hvd_vgg.models import vgg
from hvd_vgg.models.architecture import vgg_layers
from hvd_vgg.parallel import comm, fixed_point
from hvd_vgg.parallel.init import Device, cpu_convolves
from hvd_vgg.seeds import dropout_keys
from hvd_vgg.training.backward import Backward
from hvd_vgg.training.nonfinite import diagnose
from hvd_vgg.training.optimizer import GRADIENT_LIMITS, LOSS_SCALE, make_slots
from hvd_vgg.training.state import State, initial_state
from hvd_vgg.training.sums import exchange_when, gradients_of, make_add, make_layout, nothing
from hvd_vgg.training.train_step import make_train_step

DEVICE = Device("CPU", "NHWC", 2, 1, 2, 1)


def skip_unless_computed(precision):
    if not cpu_convolves(precision):
        pytest.skip(f"capability: convolutions in {precision} need a newer TensorFlow")


@pytest.mark.parametrize("reproducible", [BITS, ROUNDING])
@pytest.mark.parametrize("factored", [[], ["fc1", "fc2", "predictions"], ["fc2"]])
def test_train_step_is_that_of_the_mean_loss(factored, reproducible):
    """Over the whole global batch, on any number of ranks."""
    shape = dict(model="vgg11", width=0.125, image_size=32, num_classes=10, global_batch=13, device_batch=3)
    config = TrainConfig(**shape, dropout=0.0, lr=0.1, reproducible=reproducible)
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

    low, high = part_bounds(config, comm.rank(), comm.size())
    train_step = make_train_step(State(weights, {}, {}, make_slots(weights, {}, config), {}), config, DEVICE, factored)
    keys = tf.constant(dropout_keys(1, 0, 2))
    sums = train_step(
        tf.constant(images[low:high]), tf.constant(labels[low:high]), tf.constant(low, tf.int64), keys, tf.constant(0.1)
    )
    loss = comm.sum_over_ranks(np.array([sums.losses.numpy().astype(np.float64).sum()]))[0] / 13
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
    config = TrainConfig(model="vgg11", width=0.125, image_size=32, num_classes=10, global_batch=8, device_batch=2)
    config = dataclasses.replace(config, precision="float16")
    weights = vgg.initial_weights(vgg_layers("vgg11", 0.125, 32, 10), 1)
    slots = make_slots(weights, {}, config)
    train_step = make_train_step(State(weights, {}, {}, slots, {}), config, DEVICE, factored)
    keys, random = tf.constant(dropout_keys(1, 0, 2)), np.random.default_rng(3)
    images = random.integers(0, 256, (8, 32, 32, 3), np.uint8)
    low, high = part_bounds(config, comm.rank(), comm.size())
    arguments = [tf.constant(images[low:high]), tf.range(low, high), tf.constant(low, tf.int64), keys]

    slots[LOSS_SCALE].assign(2.0**40 if comm.rank() == 0 else 2.0**10)  # it overflows on one rank only
    before = {name: value.numpy() for name, value in {**weights, **slots}.items()}
    sums = train_step(*arguments, tf.constant(0.01))
    assert np.isfinite(sums.losses).all() and not math.isfinite(float(sums.gradient_norm))
    assert float(sums.loss_scale) == (2.0**39 if comm.rank() == 0 else 2.0**9)
    for name, value in {**weights, **slots}.items():
        assert name == LOSS_SCALE or (value.numpy() == before[name]).all()

    slots[LOSS_SCALE].assign(2.0**10)
    assert math.isfinite(float(train_step(*arguments, tf.constant(0.01)).gradient_norm))
    assert (weights["fc1/kernel"].numpy() != before["fc1/kernel"]).any()


@pytest.mark.parametrize(
    ("kind", "within"),
    [({"xla": True, "reproducible": ROUNDING}, 1e-5), ({"precision": "bfloat16"}, 0.2), ({"precision": "float16"}, 0.1)],
)
def test_train_step_in_xla_and_low_precision(kind, within):
    """The same update to rounding."""
    skip_unless_computed(kind.get("precision", "float32"))
    config = TrainConfig(model="vgg11", width=0.0625, image_size=32, num_classes=10, global_batch=11, device_batch=3, lr=0.1)
    random = np.random.default_rng(3)
    images, labels = random.integers(0, 256, (11, 32, 32, 3), np.uint8), random.integers(0, 10, 11).astype(np.int32)
    low, high = part_bounds(config, comm.rank(), comm.size())
    found = []
    for chosen in (config, dataclasses.replace(config, **kind)):
        weights = vgg.initial_weights(vgg_layers("vgg11", 0.0625, 32, 10), 1)
        before = {name: value.numpy() for name, value in weights.items()}
        slots = make_slots(weights, {}, chosen)
        if LOSS_SCALE in slots:  # TensorFlow 2.6 adds up in float16, which overflows by the first scale
            slots[LOSS_SCALE].assign(2.0**10)
        train_step = make_train_step(State(weights, {}, {}, slots, {}), chosen, DEVICE, ["fc1"])
        keys, mine = tf.constant(dropout_keys(1, 0, 2)), (tf.constant(images[low:high]), tf.constant(labels[low:high]))
        train_step(*mine, tf.constant(low, tf.int64), keys, tf.constant(config.lr))
        assert {value.dtype for value in weights.values()} == {tf.float32}
        found.append({name: value.numpy() - before[name] for name, value in weights.items()})
    for name, moved in found[0].items():
        assert np.linalg.norm(found[1][name] - moved) <= within * np.linalg.norm(moved), name


def test_train_step_infinite_loss_of_one_rank_stops_all():
    """Though its gradient is finite."""
    shape = dict(model="vgg11", width=0.0625, image_size=32, num_classes=10, global_batch=8, device_batch=2)
    config = TrainConfig(**shape, dropout=0.0)
    weights = vgg.initial_weights(vgg_layers("vgg11", 0.0625, 32, 10), 1)
    slots = make_slots(weights, {}, config)
    train_step = make_train_step(State(weights, {}, {}, slots, {}), config, DEVICE, ["fc1"])
    low, high = part_bounds(config, comm.rank(), comm.size())
    images = np.random.default_rng(3).integers(0, 256, (8, 32, 32, 3), np.uint8)[low:high]
    labels = np.full(high - low, 0 if comm.rank() == 1 else 1, np.int32)
    rest = tf.constant(low, tf.int64), tf.constant(dropout_keys(1, 0, 2)), tf.constant(0.01)
    bias = weights["predictions/bias"]
    bias.assign([-3e38] + [3e38] * 9)  # whose difference is no float32
    before = {name: value.numpy() for name, value in {**weights, **slots}.items()}

    sums = train_step(tf.constant(images), tf.constant(labels), *rest)
    assert np.isfinite(sums.losses).all() == (comm.rank() != 1)
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
    low, high = part_bounds(config, comm.rank(), comm.size())
    images = np.zeros((9, 32, 32, 3), np.uint8)
    images[[4, 7]] = 255
    mine = tf.constant(images[low:high]), tf.zeros([high - low], tf.int32)
    train_step = make_train_step(run, config, DEVICE, [])
    found = diagnose(0, run, train_step, *mine, 0.01, config, "NHWC")
    assert found.repeated and "First the outputs of block1_conv1 on rank " in str(found)
    assert sorted(row for rank in found.ranks for row in rank["at_fault"]) == [4, 7]
    low, high = found.ranks[found.rank]["slice"]
    assert low <= 4 < high
    if precision != "float16":  # which halves its scale and goes on
        assert not found.finite
        assert all((run.variables()[name].numpy() == before[name]).all() for name in before if "block1_conv1" not in name)


@pytest.mark.parametrize(
    "fault", [*(pytest.param(each, marks=pytest.mark.fault(tier=3)) for each in ("nan", "variance")), "variance_first"]
)
def test_diagnose_of_batch_norm_finds_records_or_statistics(monkeypatch, fault):
    """NaN of one image is in all outputs of its group; a variance that is infinite leaves all outputs finite."""
    shape = dict(model="vgg11_bn", width=0.0625, image_size=32, num_classes=10, global_batch=12, device_batch=4)
    config = TrainConfig(**shape, norm_batch=2)
    run = initial_state(config)
    images = np.random.default_rng(3).integers(0, 255, (12, 32, 32, 3), np.uint8)
    if fault == "nan":
        normalized = vgg.normalized
        images[[5, 10]] = 255

        def with_nan(pixels, precision):
            return tf.where(tf.reduce_all(pixels == 255, [1, 2, 3], True), math.nan, normalized(pixels, precision))

        monkeypatch.setattr(vgg, "normalized", with_nan)
    else:
        run.weights["block2_conv1/kernel"].assign(1e25 * run.weights["block2_conv1/kernel"])
    if fault == "variance_first":  # of what is infinite behind it
        run.weights["block2_conv1/beta"].assign(0 * run.weights["block2_conv1/beta"] + 3e38)
    before = {name: value.numpy() for name, value in run.variables().items()}
    low, high = part_bounds(config, comm.rank(), comm.size())
    mine = tf.constant(images[low:high]), tf.zeros([high - low], tf.int32)
    found = diagnose(0, run, make_train_step(run, config, DEVICE, []), *mine, 0.01, config, "NHWC")
    assert found.repeated and not found.finite
    assert all((run.variables()[name].numpy() == value).all() for name, value in before.items())
    at_fault = sorted(row for rank in found.ranks for row in rank["at_fault"])
    if fault == "nan":
        assert "First the outputs of block1_conv1 on rank " in str(found) and at_fault == [5, 10]
    else:
        assert "First the statistics of block2_conv1/moving_variance on rank " in str(found) and at_fault == list(range(12))


def test_train_step_beyond_its_limits_is_computed_again():
    """The first one, and any whose gradients are larger than those before: in the same bits as within larger limits."""
    config = TrainConfig(model="vgg11", width=0.0625, image_size=32, num_classes=10, global_batch=11, device_batch=3)
    run, random = initial_state(config), np.random.default_rng(3)
    train_step = make_train_step(run, config, DEVICE, ["fc1"])
    low, high = part_bounds(config, comm.rank(), comm.size())
    images = random.integers(0, 256, (11, 32, 32, 3), np.uint8)[low:high]
    labels = random.integers(0, 10, 11).astype(np.int32)[low:high]
    rest = tf.constant(low, tf.int64), tf.constant(dropout_keys(1, 0, 2)), tf.constant(0.01)

    def update():
        """Returns the passes of an update from the initial state, and the bytes of the state after it, limits aside."""
        for name, value in initial_state(config).variables().items():
            if name != GRADIENT_LIMITS:
                run.variables()[name].assign(value)
        passes = int(train_step(tf.constant(images), tf.constant(labels), *rest).passes)
        kept = {name: value for name, value in run.variables().items() if name != GRADIENT_LIMITS}
        return passes, b"".join(value.numpy().tobytes() for value in kept.values())

    assert run.slots[GRADIENT_LIMITS].numpy().tolist() == fixed_point.first_limits(22).tolist()
    passes, first = update()
    assert passes == 2 and len(set(comm.gather_bytes(first))) == 1
    limits = run.slots[GRADIENT_LIMITS].numpy()
    assert update() == (1, first)
    run.slots[GRADIENT_LIMITS].assign(np.where(np.arange(22) == 3, limits - 3 * 64, limits))  # a convolution's bias
    assert update() == (2, first)


@pytest.mark.parametrize("reproducible", [BITS, ROUNDING])
@pytest.mark.parametrize("factored", [["fc1", "fc2"], []])
def test_exchange_sums_over_ranks(factored, reproducible):
    """Gradients are summed, factors gathered and multiplied; what is not finite on one rank is known to all."""
    shape = dict(model="vgg11", width=0.0625, image_size=32, num_classes=10, global_batch=2 * comm.size(), device_batch=2)
    config, names = TrainConfig(**shape, reproducible=reproducible), ["block1_conv1", "fc1", "fc2"]
    weights = {f"{name}/{kind}": tf.zeros(size) for name in names for kind, size in (("kernel", [3, 4]), ("bias", [4]))}
    layout = make_layout(State(weights, {}, {}, {}, {}), factored, config, "CPU", comm.WORLD)
    one, last = float(comm.rank() + 1), comm.rank() == comm.size() - 1
    total = comm.size() * (comm.size() + 1) / 2
    rows = [tf.fill([2, 3], one) for _ in factored]
    outputs = [tf.fill([2, 4], 2.0) for _ in factored]
    limits = tf.constant(fixed_point.limits_of(4, len(weights)) if reproducible == BITS else [], tf.int32)

    @tf.function(autograph=False)
    def exchanged(loss, leaves, odd):
        summed = [name for name in weights if name.split("/")[0] not in factored]
        gradients = [tf.fill(weights[name].shape, one) for name in summed]
        gradients[0] += odd
        local = Backward(loss, tf.constant(1, tf.int64), tf.constant(2, tf.int64), gradients, rows, outputs)
        sums = exchange_when(leaves, make_add(layout, limits)(nothing(layout), local), limits, layout)
        return sums, gradients_of(sums, limits, layout)

    def of_all(loss, odd):
        return exchanged(tf.constant(loss), tf.constant(True), tf.constant(odd))

    sums, gradients = of_all(1.0, 0.0)
    assert fixed_point.is_finite(sums.tally).numpy().all() and float(sums.ready) > 0
    assert sums.losses.numpy().tolist() == [1.0] and (int(sums.top1), int(sums.top5)) == (1, 2)
    for name in names:
        if name not in factored:
            assert all((gradients[f"{name}/{kind}"].numpy() == total).all() for kind in ("kernel", "bias"))
    for name in factored:
        assert (gradients[f"{name}/kernel"].numpy() == 2 * 2 * total).all()
        assert (gradients[f"{name}/bias"].numpy() == 2 * 2 * comm.size()).all()
    sums, _ = of_all(math.inf if last else 1.0, 0.0)
    assert not bool(fixed_point.is_finite(sums.tally)[-1])
    for odd in (math.nan, math.inf, -math.inf):
        _, gradients = of_all(1.0, odd if last else 0.0)
        assert not np.isfinite(gradients["block1_conv1/kernel"]).any()
        assert all(np.isfinite(value).all() for name, value in gradients.items() if name != "block1_conv1/kernel")
    kept, _ = exchanged(tf.constant(1.0), tf.constant(False), tf.constant(0.0))  # not the last micro-batch: nothing is sent
    expected = one
    if reproducible == BITS:
        expected = int(fixed_point.encode(one, fixed_point.scales(limits)[0], tf.int32))
    assert all((kept_total.numpy() == expected).all() for kept_total in kept.totals)
