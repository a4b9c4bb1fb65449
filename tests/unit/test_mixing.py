"""Mixup, CutMix and moving averages against torchvision's and timm's; what is drawn, and for whom."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from hvd_vgg.config import TrainConfig
from hvd_vgg.flags import validate
from hvd_vgg.seeds import mixing_key
from hvd_vgg.training.average import make_averages, update_averages
from hvd_vgg.training.checkpoint import averaged
from hvd_vgg.training.mixing import Mixing, draw_mixing, mix, mix_batch

REFERENCE = np.load(Path(__file__).parent.parent / "reference" / "mixing.npz")
IMAGES, LABELS = tf.constant(REFERENCE["images"]), tf.constant(REFERENCE["labels"].astype(np.int32))
DECAY = 0.09  # of the reference: below what the ramp of an early average allows


def targets_of(targets, classes=5):
    own, other = (tf.one_hot(each, classes) for each in (targets.label, targets.other))
    return targets.share[:, None] * own + (1 - targets.share[:, None]) * other


def draw(groups, first=0, mixup=0.0, cutmix=0.0, size=224, step=3):
    return draw_mixing(
        tf.constant(groups), tf.constant(first, tf.int64), tf.constant(mixing_key(1, step)), mixup, cutmix, size
    )


@pytest.mark.parametrize("number", range(3))
def test_mixup_is_torchvisions(number):
    share = REFERENCE[f"mixup{number}_share"].astype(np.float32).reshape(1)
    zero = tf.zeros([1])
    mixed, targets = mix(IMAGES, LABELS, Mixing(tf.constant(share), tf.constant(share), zero, zero, zero, zero), 4)
    np.testing.assert_allclose(mixed, REFERENCE[f"mixup{number}_images"], atol=1e-6)
    np.testing.assert_allclose(targets_of(targets), REFERENCE[f"mixup{number}_targets"], atol=1e-6)


@pytest.mark.parametrize("number", range(3))
def test_cutmix_is_torchvisions(number):
    """Pixels are copies, equal in every bit; the share is what the box leaves of the image."""
    top, left, bottom, right = (tf.constant([float(each)]) for each in REFERENCE[f"cutmix{number}_box"])
    share = 1 - (bottom - top) * (right - left) / 144
    mixed, targets = mix(IMAGES, LABELS, Mixing(share, tf.ones([1]), top, left, bottom, right), 4)
    np.testing.assert_array_equal(mixed, REFERENCE[f"cutmix{number}_images"])
    np.testing.assert_allclose(targets_of(targets), REFERENCE[f"cutmix{number}_targets"], atol=1e-6)


def test_mixed_loss_is_torchs():
    share = tf.constant(REFERENCE["mixup0_share"].astype(np.float32).reshape(1))
    zero = tf.zeros([1])
    _, targets = mix(IMAGES, LABELS, Mixing(share, share, zero, zero, zero, zero), 4)
    loss = targets.cross_entropy(tf.constant(REFERENCE["logits"]), 0.1)
    np.testing.assert_allclose(loss, REFERENCE["loss"], rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.4, 1.0])
def test_mixup_shares_are_of_a_beta_distribution(alpha):
    """Mean 1/2, variance 1 / (4 (2 alpha + 1)), fourth central moment from that of Beta; 40,000 draws, 5 deviations."""
    share = draw(40_000, mixup=alpha).share.numpy().astype(np.float64)
    variance = 1 / (4 * (2 * alpha + 1))
    fourth = 3 * variance**2 * (2 * alpha + 1) / (2 * alpha + 3)
    assert abs(share.mean() - 0.5) < 5 * (variance / len(share)) ** 0.5
    assert abs(share.var() - variance) < 5 * ((fourth - variance**2) / len(share)) ** 0.5
    assert share.min() >= 0 and share.max() <= 1


def test_cutmix_boxes_are_those_of_the_paper():
    """Whole pixels within the image, whose area is what the share of the label says; many are cut at a border."""
    mixing = draw(20_000, cutmix=1.0, size=32)
    top, left, bottom, right, share = (each.numpy() for each in (*mixing[2:], mixing.share))
    assert (mixing.blend.numpy() == 1).all() and (top >= 0).all() and (bottom <= 32).all() and (top <= bottom).all()
    assert all((each == np.round(each)).all() for each in (top, left, bottom, right))
    np.testing.assert_allclose(share, 1 - (bottom - top) * (right - left) / 32**2, atol=1e-6)
    assert (top == 0).mean() > 0.2 and abs((bottom - top).mean() - (right - left).mean()) < 0.3


def test_mixing_of_both_kinds_is_even():
    cuts = (draw(10_000, mixup=0.2, cutmix=1.0).blend.numpy() == 1).mean()
    assert 0.47 < cuts < 0.53


def test_mixing_is_a_function_of_step_and_group():
    """Whichever rank computes a group draws the same for it; another step draws otherwise."""
    both = dict(mixup=0.3, cutmix=1.0)
    whole, part, other = draw(8, **both), draw(3, first=5, **both), draw(8, step=4, **both)
    for all_groups, some in zip(whole, part):
        np.testing.assert_array_equal(all_groups[5:], some)
    assert not np.array_equal(whole.share, other.share)


def test_without_mixing_images_are_not_touched():
    images, targets = mix_batch("bytes", LABELS, None, 4, "imagenet")
    assert images == "bytes" and targets.share is None and targets.main_label() is LABELS


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (dict(mixup=0.2, mix_batch=24), "--device_batch=32: expected a multiple of --mix_batch=24"),
        (dict(cutmix=1.0, global_batch=48), "--global_batch=48: expected a multiple of --mix_batch=32"),
        (dict(mixup=1.5), "--mixup=1.5: expected at most 1.0"),
    ],
)
def test_mixing_conflicts(flags, error):
    assert error in validate(TrainConfig(**flags))
    assert not validate(TrainConfig(mix_batch=24))  # without effect


def test_average_is_timms():
    """From the first update on where the decay is below the ramp of an early average."""
    weight = tf.Variable(REFERENCE["weights"][0])
    averages = make_averages({"a": weight})
    for value, expected in zip(REFERENCE["weights"][1:], REFERENCE["averages"][1:]):
        weight.assign(value)
        update_averages(averages, {"a": weight}, DECAY)
        np.testing.assert_allclose(averaged(averages, ["a"])["a"], expected, rtol=1e-5, atol=1e-6)


def test_average_forgets_the_initial_weights():
    """As TensorFlow's does: the decay of update n is at most (1 + n) / (10 + n)."""
    weight, updates = tf.Variable(1.0), tf.Variable(0.0)
    averages, theirs = make_averages({"a": weight}), tf.train.ExponentialMovingAverage(0.999, num_updates=updates)
    theirs.apply([weight])  # begins with the weight
    for number in range(5):
        weight.assign(2.0 * number)
        updates.assign(number)
        theirs.apply([weight])
        update_averages(averages, {"a": weight}, 0.999)
        assert float(averages["a/average"]) == pytest.approx(float(theirs.average(weight)), rel=1e-6)
