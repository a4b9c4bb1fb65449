"""The arithmetic of the recipe in float64 against PyTorch's and timm's, as tests/reference/make_recipe.py wrote it down."""

import numpy as np
import pytest
import tensorflow as tf
from support import ROOT

from hvd_vgg.config import LARS, TrainConfig
from hvd_vgg.training.loss import cross_entropy
from hvd_vgg.training.optimizer import apply_update, clip_gradients, global_norm
from hvd_vgg.training.schedule import learning_rate, rate_factor

REFERENCE = np.load(ROOT / "tests" / "reference" / "recipe.npz")
KEPT = (1, 2, 5, 10, 20)
# 100 records in batches of 10 are epochs of 10 updates. The rates are those of the script.
BASE = dict(momentum=0.9, weight_decay=0.02, lr=0.3, lr_schedule="constant", global_batch=10, epochs=2.0)
WARM = dict(warmup_epochs=0.5, warmup_lr=0.03, lr_min=0.009)
LARS_FLAGS = dict(optimizer=LARS, lars_eta=0.3, lr=0.5)
RUNS = {
    "momentum": {},
    "nesterov": dict(optimizer="nesterov", no_decay=("bias", "norm"), label_smoothing=0.1, lr_schedule="cosine", **WARM),
    "norm_without_decay": dict(no_decay=("norm",), label_smoothing=0.3, lr_schedule="polynomial", **WARM),
    "clipped": dict(clip_norm=0.3, lr_schedule="cosine", **WARM),
    "lars": dict(label_smoothing=0.1, **LARS_FLAGS),
    "lars_of_rising_rates": dict(lr_schedule="cosine", **{**WARM, "warmup_lr": 0.05, "lr_min": 0.015}, **LARS_FLAGS),
}


def assert_close(found, wanted):
    """Requires the norm of the difference to be at most 1e-6 of the norm; rounding alone leaves 1e-13."""
    found = np.array(found)
    assert found.dtype == np.float64
    assert np.linalg.norm(found - wanted) <= 1e-6 * np.linalg.norm(wanted)


@pytest.mark.parametrize("run", RUNS)
def test_recipe_of_20_updates(run):
    """Losses, gradient norms before clipping, and weights, along 20 updates of a small network."""
    config = TrainConfig(**{**BASE, **RUNS[run]})
    names = sorted(name[len("first/") :] for name in REFERENCE if name.startswith("first/"))
    weights = {name: tf.Variable(REFERENCE[f"first/{name}"]) for name in names}
    slots = {f"{name}/momentum": tf.Variable(tf.zeros_like(weight)) for name, weight in weights.items()}
    x, labels = tf.constant(REFERENCE["x"]), tf.constant(REFERENCE["labels"], tf.int32)

    @tf.function
    def update(lr):
        with tf.GradientTape() as tape:
            hidden = weights["norm/gamma"] * (x @ weights["one/kernel"] + weights["one/bias"]) + weights["norm/beta"]
            logits = tf.tanh(hidden) @ weights["two/kernel"] + weights["two/bias"]
            loss = tf.reduce_mean(cross_entropy(logits, labels, config.label_smoothing))
        gradients = dict(zip(names, tape.gradient(loss, list(weights.values()))))
        norm = global_norm(gradients.values())
        apply_update(weights, slots, clip_gradients(gradients, norm, config.clip_norm), lr, config)
        return loss, norm

    losses, norms, kept = [], [], []
    for step in range(20):
        loss, norm = update(tf.constant(learning_rate(step, config, 100), tf.float64))
        losses.append(loss.numpy())
        norms.append(norm.numpy())
        if step + 1 in KEPT:
            kept.append(np.concatenate([weights[name].numpy().ravel() for name in names]))
    for part, found in (("losses", losses), ("norms", norms), ("weights", kept)):
        assert_close(found, REFERENCE[f"{run}/{part}"])


@pytest.mark.parametrize("schedule", ["cosine", "polynomial"])
@pytest.mark.parametrize("base", [0, 5, 40])
def test_learning_rates_are_torchs(schedule, base):
    """60 updates, 12 of them warm-up; with --lr_base_batch the flags' rates are those of that batch."""
    scale = base / 10 if base else 1
    rates = dict(lr=0.4 * scale, lr_min=0.012 * scale, warmup_lr=0.04 * scale)
    more = dict(lr_schedule=schedule, epochs=6.0, warmup_epochs=1.2, lr_base_batch=base)
    config = TrainConfig(**{**BASE, **rates, **more})
    assert rate_factor(config) == pytest.approx(1 / scale)
    assert_close([learning_rate(step, config, 100) for step in range(60)], REFERENCE[f"rates/{schedule}"])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_cross_entropy_is_torchs(smoothing):
    """Of each image, and its gradient."""
    logits = tf.constant(REFERENCE["logits"])
    with tf.GradientTape() as tape:
        tape.watch(logits)
        losses = cross_entropy(logits, tf.constant(REFERENCE["labels_of_logits"], tf.int32), smoothing)
    assert_close(losses, REFERENCE[f"smoothing/{smoothing}/losses"])
    assert_close(tape.gradient(losses, logits), REFERENCE[f"smoothing/{smoothing}/gradient"])


def test_cross_entropy_smoothed_has_its_least_at_the_target():
    """For 1000 classes and 0.1 the loss is never below 1.0148, whatever the network: it is not comparable with others."""
    target = np.full((1, 1000), 0.0001)
    target[0, 3] = 0.9001
    loss = cross_entropy(tf.constant(np.log(target)), tf.constant([3]), 0.1)
    assert float(loss[0]) == pytest.approx(1.0148, abs=1e-4)


@pytest.mark.parametrize(("weight", "gradient"), [(0.0, 2.0), (2.0, 0.0), (0.0, 0.0)])
def test_lars_ratio_without_a_norm_is_one(weight, gradient):
    """A kernel of zeros, or a gradient of zeros, as MLPerf has it; in float32."""
    weights, slots = {"a/kernel": tf.Variable([weight])}, {"a/kernel/momentum": tf.Variable([0.0])}
    config = TrainConfig(optimizer=LARS, weight_decay=0.25)
    apply_update(weights, slots, {"a/kernel": tf.constant([gradient])}, tf.constant(0.5), config)
    assert weights["a/kernel"].numpy() == [np.float32(weight - 0.5 * (gradient + 0.25 * weight))]


def test_clip_gradients_leaves_small_ones_alone():
    """In every bit; and a run that does not clip has the very tensors."""
    gradients = {"a": tf.constant([0.3, 0.1]), "b": tf.constant(0.2)}
    assert clip_gradients(gradients, global_norm(gradients.values()), 0.0) is gradients
    clipped = clip_gradients(gradients, global_norm(gradients.values()), 0.4)
    assert all((clipped[name].numpy() == gradient.numpy()).all() for name, gradient in gradients.items())
