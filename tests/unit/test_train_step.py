"""The parts of an update, each alone, in one process: backward, accumulation, update."""

import math

import numpy as np
import pytest
import tensorflow as tf

from hvd_vgg.config import BITS, ROUNDING, TrainConfig
from hvd_vgg.models import vgg
from hvd_vgg.models.dropout import apply_dropout, dropout_mask
from hvd_vgg.parallel import comm, fixed_point
from hvd_vgg.seeds import dropout_keys
from hvd_vgg.training.backward import make_backward, summed_names
from hvd_vgg.training.loss import top_k_correct
from hvd_vgg.training.optimizer import (
    GRADIENT_LIMITS,
    LOSS_SCALE,
    apply_update,
    make_slots,
    next_loss_scale,
    set_loss_scale,
)
from hvd_vgg.training.state import State, initial_network
from hvd_vgg.training.sums import gradients_of, make_layout
from hvd_vgg.training.train_step import accumulate, apply_gradients


def kept(rows, units, rate, key, position):
    return dropout_mask(rows, units, rate, tf.constant(np.uint64(key)), tf.constant(position, tf.int64)).numpy()


def test_dropout_mask_of_a_row_ignores_its_batch():
    """A row's mask is a function of its position in the global batch."""
    key = 2**63 + 12345
    for units in (10, 16, 4096):
        whole = kept(24, units, 0.5, key, 100)
        parts = [kept(high - low, units, 0.5, key, 100 + low) for low, high in ((0, 11), (11, 22), (22, 24))]
        assert (np.concatenate(parts) == whole).all()
        assert units < 4096 or len({row.tobytes() for row in whole}) == 24


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_drops_its_share_and_keeps_the_mean(rate, precision):
    """In float32 and bfloat16."""
    ones = tf.ones([256, 4096], precision)
    dropped = tf.cast(apply_dropout(ones, kept(256, 4096, rate, 7, 0), rate), tf.float32).numpy()
    assert (dropped == 0).mean() == pytest.approx(rate, abs=0.002)
    assert dropped.mean() == pytest.approx(1, abs=0.006)
    assert len(np.unique(dropped)) == 2


def test_top_k_correct_never_counts_ties_nan_or_padding():
    """And is exact for all else."""
    logits = np.array(
        [[5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5], [1, 1, 1, 1, 1, 1], [np.nan] * 6, [9, 0, 0, 0, 0, 0]], np.float32
    )

    def count(labels, k):
        return int(top_k_correct(tf.constant(logits), tf.constant(labels, tf.int32), k))

    assert [count([0, 0, 0, 0, 0], k) for k in (1, 5)] == [2, 2]
    assert [count([1, 1, 0, 0, 0], k) for k in (1, 2, 4, 5)] == [1, 2, 2, 3]
    assert count([-1, -1, -1, -1, -1], 5) == 0


@pytest.mark.parametrize("kind", ["momentum", "nesterov"])
def test_apply_update_is_the_formula(kind):
    """SGD with momentum, plain and Nesterov's."""
    random = np.random.default_rng(1)
    w, v = random.normal(size=(4, 3)), np.zeros((4, 3))
    weights = {"a/kernel": tf.Variable(tf.constant(w, tf.float32))}
    slots = make_slots(weights, {}, TrainConfig())
    for _ in range(5):
        g = random.normal(size=(4, 3))
        config = TrainConfig(optimizer=kind, momentum=0.9, weight_decay=0.01)
        apply_update(weights, slots, {"a/kernel": tf.constant(g, tf.float32)}, tf.constant(0.1), config)
        d = g + 0.01 * w
        v = 0.9 * v + d
        w = w - 0.1 * (d + 0.9 * v if kind == "nesterov" else v)
    np.testing.assert_allclose(weights["a/kernel"], w, rtol=1e-5)
    np.testing.assert_allclose(slots["a/kernel/momentum"], v, rtol=1e-5)


def test_loss_scale_halves_on_overflow_and_doubles_later():
    """After 2000 updates without an overflow."""
    weights = {"a/kernel": tf.Variable([1.0])}
    slots = make_slots(weights, {}, TrainConfig(precision="float16"))
    assert make_slots(weights, {}, TrainConfig(reproducible=ROUNDING)).keys() == {"a/kernel/momentum"}
    assert make_slots(weights, {}, TrainConfig(reproducible=BITS)).keys() == {"a/kernel/momentum", GRADIENT_LIMITS}

    def adapt(finite):
        set_loss_scale(slots, *next_loss_scale(slots, tf.constant(finite)))
        return float(slots[LOSS_SCALE])

    assert [adapt(False), adapt(False)] == [32768.0, 16384.0]
    assert {adapt(True) for _ in range(1999)} == {16384.0}
    assert [adapt(True), adapt(True)] == [32768.0, 32768.0]
    assert adapt(False) == 16384.0


TINY = dict(model="vgg11", width=0.0625, image_size=32, num_classes=10, global_batch=11, device_batch=4)


class OneRank:
    """A process set of one rank, for which nothing is sent and Horovod is not needed."""

    @staticmethod
    def size():
        return 1


def make_parts(factored, **more):
    """Returns (config, weights, backward, images, labels, position, keys)."""
    config = TrainConfig(**{**TINY, **more})
    weights, _ = initial_network(config, 1)
    backward = make_backward(State(weights, {}, {}, make_slots(weights, {}, config), {}), config, "NHWC", factored)
    random = np.random.default_rng(3)
    images = tf.constant(random.integers(0, 256, (11, 32, 32, 3), np.uint8))
    labels = tf.constant(random.integers(0, 10, 11).astype(np.int32))
    return config, weights, backward, images, labels, tf.constant(0, tf.int64), tf.constant(dropout_keys(1, 0, 2))


@pytest.mark.parametrize(("factored", "smoothing"), [([], 0.0), (["fc2"], 0.1), (["fc1", "fc2", "predictions"], 0.0)])
def test_backward_is_the_gradient_of_the_summed_loss(factored, smoothing):
    """Summed gradients, and the products of factors, are those of sum(loss) / global_batch computed plainly."""
    _, weights, backward, images, labels, position, keys = make_parts(factored, dropout=0.0, label_smoothing=smoothing)
    with tf.GradientTape() as tape:
        logits = vgg.logits(weights, "vgg11", images, "NHWC")
        target = (1 - smoothing) * tf.one_hot(labels, 10) + smoothing / 10
        loss = -tf.reduce_sum(target * tf.nn.log_softmax(logits))
        objective = loss / 11
    expected = dict(zip(weights, tape.gradient(objective, list(weights.values()))))
    found = tf.function(backward)(images, labels, position, keys)
    assert float(found.loss) == pytest.approx(float(loss), rel=1e-6)
    assert int(found.top1) == int((logits.numpy().argmax(axis=1) == labels.numpy()).sum())
    gradients = dict(zip(summed_names(weights, factored), found.gradients))
    for name, inputs, outputs in zip(factored, found.inputs, found.output_gradients):
        gradients[f"{name}/kernel"] = tf.matmul(inputs, outputs, transpose_a=True)
        gradients[f"{name}/bias"] = tf.reduce_sum(outputs, 0)
    for name, value in expected.items():
        np.testing.assert_allclose(gradients[name], value, rtol=1e-4, atol=1e-7, err_msg=name)


def make_sums(factored, reproducible, at_a_time=1, **more):
    """Returns (layout, function (low, high) -> Sums of these of 11 images, limits that they do not exceed)."""
    config, weights, backward, images, labels, _, keys = make_parts(factored, reproducible=reproducible, **more)
    layout = make_layout(State(weights, {}, {}, {}, {}), factored, config, "CPU", comm.Group(OneRank))
    accumulated = accumulate(backward, layout, at_a_time)
    bits = reproducible == BITS
    limits = tf.constant(fixed_point.first_limits(len(weights)) if bits else [], tf.int32)

    def sums(low, high, limits, order=range(11)):
        rows = [*order][low:high]
        part = tf.gather(images, rows), tf.gather(labels, rows)
        return accumulated(*part, tf.constant(low, tf.int64), keys, limits, tf.constant(False))

    if bits:
        for _ in range(3):
            tally = fixed_point.tally(sums(0, 11, limits).magnitudes[:, :-1], limits)
            limits = fixed_point.next_limits(limits, tally)
    return layout, lambda *chosen: sums(*chosen[:2], limits, *chosen[2:]), limits


def in_bits(sums):
    """Returns the bytes of all but `ready`, a time."""
    return [tensor.numpy().tobytes() for tensor in tf.nest.flatten(sums._replace(ready=()))]


@pytest.mark.parametrize("at_a_time", [1, 3])
@pytest.mark.parametrize("factored", [[], ["fc1", "fc2"]])
def test_accumulate_sums_micro_batches_in_order(factored, at_a_time):
    """4 + 4 + 3 images under rounding: sums are added from the first to the last, rows are laid end to end, in every bit."""
    _, sums, _ = make_sums(factored, ROUNDING, at_a_time, dropout=0.5)
    found, parts = sums(0, 11), [sums(low, high) for low, high in ((0, 4), (4, 8), (8, 11))]
    assert (found.losses.numpy() == [float(part.losses[0]) for part in parts]).all()
    assert int(found.top5) == sum(int(part.top5) for part in parts)
    assert found.magnitudes.numpy().tolist() == [part.magnitudes.numpy()[0].tolist() for part in parts]
    for number, total in enumerate(found.totals):
        first, second, third = (part.totals[number].numpy() for part in parts)
        assert (total.numpy() == (first + second) + third).all()
    for name in ("inputs", "output_gradients"):
        for number, rows in enumerate(getattr(found, name)):
            assert (rows.numpy() == tf.concat([getattr(part, name)[number] for part in parts], 0).numpy()).all()
            assert rows.shape[0] == 11


@pytest.mark.parametrize("at_a_time", [1, 3])
@pytest.mark.parametrize("factored", [[], ["fc1", "fc2"]])
def test_accumulate_in_fixed_point_has_no_order(factored, at_a_time):
    """Under bits the totals are exactly the integer sums of what each micro-batch is encoded as, in whatever order."""
    layout, sums, limits = make_sums(factored, BITS, at_a_time, dropout=0.0)
    found, parts = sums(0, 11), [sums(low, high) for low, high in ((0, 4), (4, 8), (8, 11))]
    assert {total.dtype for total in found.totals} == {tf.int32}
    for number, total in enumerate(found.totals):
        encoded = [part.totals[number].numpy().astype(np.int64) for part in parts]
        assert (total.numpy() == sum(encoded)).all()
    assert (found.magnitudes.numpy() == np.concatenate([part.magnitudes.numpy() for part in parts])).all()
    other = sums(0, 11, [4, 5, 6, 7, 0, 1, 2, 3, 8, 9, 10])
    assert [total.numpy().tobytes() for total in other.totals] == [total.numpy().tobytes() for total in found.totals]
    tally = fixed_point.tally(found.magnitudes, tf.concat([limits, fixed_point.first_limits(1)], 0))
    assert not fixed_point.exceeded(tally).numpy()[:-1].any()
    found = found._replace(tally=tally)

    _, in_floats, _ = make_sums(factored, ROUNDING, dropout=0.0)
    plain = gradients_of(in_floats(0, 11), limits, layout._replace(integers=None))
    for name, gradient in gradients_of(found, limits, layout).items():
        np.testing.assert_allclose(gradient, plain[name], rtol=1e-5, atol=1e-6 * np.abs(plain[name]).max(), err_msg=name)


@pytest.mark.parametrize("reproducible", [BITS, ROUNDING])
@pytest.mark.parametrize("factored", [[], ["fc1", "fc2"]])
def test_accumulate_of_a_micro_batch_ignores_the_others(factored, reproducible):
    """One goes through the loop as several do: alone it is in every bit what it adds to them."""
    _, sums, _ = make_sums(factored, reproducible, dropout=0.5)
    assert in_bits(sums(0, 4)) == in_bits(sums(0, 4))
    both, first, second = sums(0, 8), sums(0, 4), sums(4, 8)
    assert (both.losses.numpy() == [first.losses.numpy()[0], second.losses.numpy()[0]]).all()
    for number, total in enumerate(both.totals):
        assert (total.numpy() == first.totals[number].numpy() + second.totals[number].numpy()).all()
    for name in ("inputs", "output_gradients"):
        for number, rows in enumerate(getattr(both, name)):
            assert (rows.numpy()[:4] == getattr(first, name)[number].numpy()).all()
            assert (rows.numpy()[4:] == getattr(second, name)[number].numpy()).all()


@pytest.mark.parametrize("reproducible", [BITS, ROUNDING])
@pytest.mark.parametrize(("loss", "gradient"), [(1.0, math.inf), (math.inf, 1.0), (math.nan, 1.0), (1.0, math.nan)])
def test_apply_gradients_stops_at_the_first_nonfinite(loss, gradient, reproducible):
    """Neither it nor any later update is applied."""
    config, weights = TrainConfig(**TINY, reproducible=reproducible), {"a/kernel": tf.Variable([1.0, 2.0])}
    slots, stopped = make_slots(weights, {}, config), tf.Variable(False)

    @tf.function
    def apply(value, loss):
        gradients = {"a/kernel": tf.fill([2], value)}
        limits = slots.get(GRADIENT_LIMITS)
        magnitudes = fixed_point.magnitudes([*([] if limits is None else gradients.values()), loss])
        tally = fixed_point.tally(magnitudes[tf.newaxis], tf.fill(tf.shape(magnitudes), 126 * 64))
        state = State(weights, {}, {}, slots, {})
        return apply_gradients(state, gradients, tally, stopped, tf.constant(0.1), config, limits)

    norm, scale, finite = apply(tf.constant(1.0), tf.constant(1.0))
    assert (float(norm), float(scale), bool(finite)) == (pytest.approx(math.sqrt(2)), 1.0, True)
    before = {name: variable.numpy().copy() for name, variable in {**weights, **slots}.items()}
    assert (before["a/kernel"] < [1.0, 2.0]).all()
    assert not bool(apply(tf.constant(gradient), tf.constant(loss))[2])
    assert bool(apply(tf.constant(1.0), tf.constant(1.0))[2])  # finite again, but held
    assert all((variable.numpy() == before[name]).all() for name, variable in {**weights, **slots}.items())
