import math

import numpy as np
import pytest
import tensorflow as tf

from hvd_vgg.config import TrainConfig
from hvd_vgg.train.optimizer import LOSS_SCALE, apply_update, make_slots, next_loss_scale, set_loss_scale
from hvd_vgg.train.schedule import epochs_to_steps, learning_rate
from hvd_vgg.train.train_step import apply_dropout, dropout_mask, top_k_correct


def kept(rows, units, rate, key, position):
    return dropout_mask(rows, units, rate, tf.constant(np.uint64(key)), tf.constant(position, tf.int64)).numpy()


def test_a_rows_dropout_mask_does_not_depend_on_the_batch_it_is_in():
    key = 2**63 + 12345
    for units in (10, 16, 4096):
        whole = kept(24, units, 0.5, key, 100)
        parts = [kept(high - low, units, 0.5, key, 100 + low) for low, high in ((0, 11), (11, 22), (22, 24))]
        assert (np.concatenate(parts) == whole).all()
        assert units < 4096 or len({row.tobytes() for row in whole}) == 24


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_drops_its_share_and_keeps_the_mean(rate, precision):
    ones = tf.ones([256, 4096], precision)
    dropped = tf.cast(apply_dropout(ones, kept(256, 4096, rate, 7, 0), rate), tf.float32).numpy()
    assert (dropped == 0).mean() == pytest.approx(rate, abs=0.002)
    assert dropped.mean() == pytest.approx(1, abs=0.006)
    assert len(np.unique(dropped)) == 2


def test_hits_are_exact_and_ties_and_nan_and_padding_never_count():
    logits = np.array(
        [[5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5], [1, 1, 1, 1, 1, 1], [np.nan] * 6, [9, 0, 0, 0, 0, 0]], np.float32
    )

    def count(labels, k):
        return int(top_k_correct(tf.constant(logits), tf.constant(labels, tf.int32), k))

    assert [count([0, 0, 0, 0, 0], k) for k in (1, 5)] == [2, 2]
    assert [count([1, 1, 0, 0, 0], k) for k in (1, 2, 4, 5)] == [1, 2, 2, 3]
    assert count([-1, -1, -1, -1, -1], 5) == 0


@pytest.mark.parametrize("kind", ["momentum", "nesterov"])
def test_updates_are_those_of_the_formula(kind):
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


def test_step_schedule_divides_by_ten_at_each_epoch():
    config = TrainConfig(global_batch=256)
    records = 1_281_167
    at30, at60 = (epochs_to_steps(epoch, config, records) for epoch in (30, 60))
    rates = [learning_rate(s, config, records) for s in (0, at30 - 1, at30, at60 - 1, at60, 450_410)]
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001])
    assert at30 * 256 >= 30 * records > (at30 - 1) * 256


def test_cosine_schedule_falls_to_nothing_and_warm_up_rises_to_the_rate():
    config = TrainConfig(lr=0.4, lr_schedule="cosine", epochs=10, warmup_epochs=1, global_batch=10)
    rates = [learning_rate(s, config, 100) for s in range(100)]
    assert rates[:10] == pytest.approx([0.04 * (s + 1) for s in range(10)])
    assert rates[10] == pytest.approx(0.4)
    assert rates[55] == pytest.approx(0.2)
    assert rates[99] == pytest.approx(0.2 * (1 + math.cos(math.pi * 89 / 90)))
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))


def test_constant_schedule_is_constant():
    config = TrainConfig(lr=0.3, lr_schedule="constant", warmup_epochs=0)
    assert {learning_rate(s, config, 100) for s in range(50)} == {0.3}


def test_the_loss_scale_is_halved_by_an_overflow_and_doubled_after_2000_good_updates():
    slots = make_slots({"a/kernel": tf.Variable([1.0])}, "float16")
    assert make_slots({"a/kernel": tf.Variable([1.0])}).keys() == {"a/kernel/momentum"}

    def adapt(finite):
        set_loss_scale(slots, *next_loss_scale(slots, tf.constant(finite)))
        return float(slots[LOSS_SCALE])

    assert [adapt(False), adapt(False)] == [32768.0, 16384.0]
    assert {adapt(True) for _ in range(1999)} == {16384.0}
    assert [adapt(True), adapt(True)] == [32768.0, 32768.0]
    assert adapt(False) == 16384.0
