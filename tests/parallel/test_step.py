"""One update against what it should be, computed plainly: absolute scales, not only equality with itself."""

import numpy as np
import pytest
import tensorflow as tf

from hvd_vgg.config import Config
from hvd_vgg.data import order
from hvd_vgg.model import vgg
from hvd_vgg.model.layers import layers
from hvd_vgg.parallel import comm
from hvd_vgg.train import optimizer, step


@pytest.mark.parametrize("factored", [[], ["fc1", "fc2", "predictions"], ["fc2"]])
def test_an_update_is_that_of_the_mean_loss_over_the_whole_batch(factored):
    config = Config(
        model="vgg11", width=0.125, image_size=32, num_classes=10, global_batch=13, device_batch=3, dropout=0.0, lr=0.1
    )
    weights = vgg.initial_weights(layers("vgg11", 0.125, 32, 10), 1)
    before = {name: tf.identity(value) for name, value in weights.items()}
    random = np.random.default_rng(3)
    images = random.integers(0, 256, (13, 32, 32, 3), np.uint8)
    labels = random.integers(0, 10, 13).astype(np.int32)

    with tf.GradientTape() as tape:
        tape.watch(list(before.values()))
        logits = vgg.logits(before, "vgg11", vgg.normalized(images), "NHWC")
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        mean = tf.reduce_mean(losses)
    gradients = dict(zip(before, tape.gradient(mean, list(before.values()))))
    top1 = int((logits.numpy().argmax(axis=1) == labels).sum())

    low, high = order.slice_bounds(13, comm.rank(), comm.size())
    train_step = step.make_train_step(weights, optimizer.make_slots(weights), config, "NHWC", factored)
    keys = tf.constant(order.dropout_keys(1, 0, 2))
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
