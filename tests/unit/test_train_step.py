"""The parts of an update, each alone, in one process: backward, accumulation, update."""

import math

import numpy as np
import pytest
import tensorflow as tf

from hvd_vgg.config import TrainConfig
from hvd_vgg.models import vgg
from hvd_vgg.models.dropout import apply_dropout, dropout_mask
from hvd_vgg.seeds import dropout_keys
from hvd_vgg.training.loss import top_k_correct
from hvd_vgg.training.optimizer import LOSS_SCALE, apply_update, make_slots, next_loss_scale, set_loss_scale
from hvd_vgg.training.state import initial_weights
from hvd_vgg.training.train_step import accumulate, apply_gradients, make_backward


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
    slots = make_slots(weights)
    for _ in range(5):
        g = random.normal(size=(4, 3))
        apply_update(weights, slots, {"a/kernel": tf.constant(g, tf.float32)}, tf.constant(0.1), kind, 0.9, 0.01)
        d = g + 0.01 * w
        v = 0.9 * v + d
        w = w - 0.1 * (d + 0.9 * v if kind == "nesterov" else v)
    np.testing.assert_allclose(weights["a/kernel"], w, rtol=1e-5)
    np.testing.assert_allclose(slots["a/kernel/momentum"], v, rtol=1e-5)


def test_loss_scale_halves_on_overflow_and_doubles_later():
    """After 2000 updates without an overflow."""
    slots = make_slots({"a/kernel": tf.Variable([1.0])}, "float16")
    assert make_slots({"a/kernel": tf.Variable([1.0])}).keys() == {"a/kernel/momentum"}

    def adapt(finite):
        set_loss_scale(slots, *next_loss_scale(slots, tf.constant(finite)))
        return float(slots[LOSS_SCALE])

    assert [adapt(False), adapt(False)] == [32768.0, 16384.0]
    assert {adapt(True) for _ in range(1999)} == {16384.0}
    assert [adapt(True), adapt(True)] == [32768.0, 32768.0]
    assert adapt(False) == 16384.0


TINY = dict(model="vgg11", width=0.0625, image_size=32, num_classes=10, global_batch=11, device_batch=4)


def make_parts(factored, **more):
    """Returns (config, weights, names of the weights that are summed, backward, images, labels, position, keys)."""
    config = TrainConfig(**{**TINY, **more})
    weights = initial_weights(config, 1)
    summed = [name for name in weights if name.split("/")[0] not in factored]
    backward = make_backward(weights, make_slots(weights), config, "NHWC", summed, factored)
    random = np.random.default_rng(3)
    images = tf.constant(random.integers(0, 256, (11, 32, 32, 3), np.uint8))
    labels = tf.constant(random.integers(0, 10, 11).astype(np.int32))
    return config, weights, summed, backward, images, labels, tf.constant(0, tf.int64), tf.constant(dropout_keys(1, 0, 2))


@pytest.mark.parametrize("factored", [[], ["fc2"], ["fc1", "fc2", "predictions"]])
def test_backward_is_the_gradient_of_the_summed_loss(factored):
    """Summed gradients, and the products of factors, are those of sum(loss) / global_batch computed plainly."""
    _, weights, summed, backward, images, labels, position, keys = make_parts(factored, dropout=0.0)
    with tf.GradientTape() as tape:
        logits = vgg.logits(weights, "vgg11", images, "NHWC")
        loss = tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        objective = loss / 11
    expected = dict(zip(weights, tape.gradient(objective, list(weights.values()))))
    found = tf.function(backward)(images, labels, position, keys)
    assert float(found.loss) == pytest.approx(float(loss), rel=1e-6)
    assert int(found.top1) == int((logits.numpy().argmax(axis=1) == labels.numpy()).sum())
    gradients = dict(zip(summed, found.gradients))
    for name, inputs, outputs in zip(factored, found.inputs, found.output_gradients):
        gradients[f"{name}/kernel"] = tf.matmul(inputs, outputs, transpose_a=True)
        gradients[f"{name}/bias"] = tf.reduce_sum(outputs, 0)
    for name, value in expected.items():
        np.testing.assert_allclose(gradients[name], value, rtol=1e-4, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("factored", [[], ["fc1", "fc2"]])
def test_accumulate_sums_micro_batches_in_order(factored):
    """4 + 4 + 3 images: sums are added from the first to the last, rows are laid end to end, in every bit."""
    config, weights, summed, backward, images, labels, position, keys = make_parts(factored, dropout=0.5)
    step = tf.function(accumulate(backward, weights, summed, factored, config.device_batch))
    found = step(images, labels, position, keys)
    parts = []
    for low, high in ((0, 4), (4, 8), (8, 11)):
        parts.append(tf.function(backward)(images[low:high], labels[low:high], tf.constant(low, tf.int64), keys))
    assert float(found.loss) == float(parts[0].loss + parts[1].loss + parts[2].loss)
    assert int(found.top5) == sum(int(part.top5) for part in parts)
    for number, gradient in enumerate(found.gradients):
        total = (parts[0].gradients[number] + parts[1].gradients[number]) + parts[2].gradients[number]
        np.testing.assert_allclose(gradient, total, rtol=1e-5, atol=1e-8)
    for number in range(len(factored)):
        rows = tf.concat([part.inputs[number] for part in parts], 0)
        np.testing.assert_allclose(found.inputs[number], rows, rtol=1e-5, atol=1e-7)
        assert found.output_gradients[number].shape[0] == 11


def test_accumulate_of_few_images_is_one_pass():
    """At most --device_batch images need no loop."""
    _, weights, summed, backward, images, labels, position, keys = make_parts([])
    graph = tf.function(accumulate(backward, weights, summed, [], 11)).get_concrete_function(images, labels, position, keys)
    assert not [operation.type for operation in graph.graph.get_operations() if "While" in operation.type]


@pytest.mark.parametrize(("losses_finite", "gradient"), [(True, math.inf), (False, 1.0), (True, math.nan)])
def test_apply_gradients_stops_at_the_first_nonfinite(losses_finite, gradient):
    """Neither it nor any later update is applied."""
    config, weights = TrainConfig(**TINY), {"a/kernel": tf.Variable([1.0, 2.0])}
    slots, stopped = make_slots(weights), tf.Variable(False)

    @tf.function
    def apply(value, finite):
        gradients = {"a/kernel": tf.fill([2], value)}
        return apply_gradients(weights, slots, gradients, finite, stopped, tf.constant(0.1), config)

    norm, scale, finite = apply(tf.constant(1.0), tf.constant(True))
    assert (float(norm), float(scale), bool(finite)) == (pytest.approx(math.sqrt(2)), 1.0, True)
    before = weights["a/kernel"].numpy().copy()
    assert (before < [1.0, 2.0]).all()
    assert not bool(apply(tf.constant(gradient), tf.constant(losses_finite))[2])
    assert bool(apply(tf.constant(1.0), tf.constant(True))[2])  # finite again, but held
    assert (weights["a/kernel"].numpy() == before).all()
