"""BatchNorm over groups, against torch.nn.BatchNorm2d and torchvision's VGG11-BN (tests/reference/make_norm.py).

The reference is float64; TensorFlow's fused BatchNorm computes in float32 alone, with 6e-8 of rounding in each number and
sums of a group's values in an order of its own: hence 1e-6 of the norm for one layer, and what is stated for networks.
"""

import numpy as np
import pytest
import tensorflow as tf
from support import ROOT

from hvd_vgg.config import TrainConfig
from hvd_vgg.models import vgg
from hvd_vgg.models.architecture import count_parameters, vgg_layers
from hvd_vgg.models.batch_norm import fold, normalize_groups, updated_moment
from hvd_vgg.parallel import comm
from hvd_vgg.parallel.init import Device
from hvd_vgg.seeds import dropout_keys
from hvd_vgg.training.backward import make_backward
from hvd_vgg.training.state import initial_state
from hvd_vgg.training.train_step import make_train_step

REFERENCE = dict(np.load(ROOT / "tests" / "reference" / "norm.npz"))
GROUP, STEPS = int(REFERENCE["hyperparameters/group"]), int(REFERENCE["hyperparameters/steps"])
SHAPE = dict(model="vgg11_bn", width=1 / 32, image_size=32, num_classes=10, norm_batch=GROUP, dropout=0.0)


class OneRank:
    """As Horovod's modules say it of one rank alone."""

    rank, size, local_rank, local_size = (staticmethod(lambda value=value: value) for value in (0, 1, 0, 1))


def part_of(prefix):
    """Returns what of the reference has names that begin so, by the rest of the name."""
    return {name[len(prefix) :]: value for name, value in REFERENCE.items() if name.startswith(prefix)}


def distance(found, expected):
    """Returns the norm of the difference over the norm, as float64."""
    found, expected = (np.asarray(each, np.float64) for each in (found, expected))
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def make_state(config):
    """Returns the reference network's state before its first update."""
    state = initial_state(config)
    for name, value in part_of("network/initial/").items():
        state.weights[name].assign(value)
    return state


def make_config(**more):
    rest = {name: float(REFERENCE[f"hyperparameters/{name}"]) for name in ("lr", "momentum", "weight_decay")}
    return TrainConfig(**{**SHAPE, **rest, "global_batch": 12, "optimizer": "nesterov", **more})


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("one_group", [True, False])
def test_normalize_groups_is_torchs(one_group, data_format):
    """Group by group: outputs, gradients, and moving moments after three updates."""
    wanted = part_of("batch_norm/")
    moving, jit = [tf.zeros([5]), tf.ones([5])], data_format == "NCHW" and not tf.config.list_physical_devices("GPU")

    @tf.function(jit_compile=jit, autograph=False)  # without XLA a CPU normalizes NHWC alone
    def update(x, upstream):
        gamma, beta = tf.constant(wanted["gamma"]), tf.constant(wanted["beta"])
        with tf.GradientTape() as tape:
            tape.watch([x, gamma, beta])
            parts = tf.split(x, 3) if one_group else [x]
            found = [normalize_groups(part, gamma, beta, GROUP, one_group, data_format) for part in parts]
            outputs = tf.concat([normal for normal, _ in found], 0)
            objective = tf.reduce_sum(outputs * upstream)
        sums = [tf.add_n([getattr(sums, name) for _, sums in found]) for name in ("means", "variances", "groups")]
        return outputs, tape.gradient(objective, [x, gamma, beta]), sums

    axes = (0, 1, 3, 4, 2) if data_format == "NHWC" else (0, 1, 2, 3, 4)
    x, upstream = wanted["x"].transpose(axes), wanted["upstream"][np.newaxis].transpose(axes)[0]
    for number, images in enumerate(x):
        outputs, gradients, (means, variances, groups) = update(tf.constant(images), tf.constant(upstream))
        assert int(groups) == 3
        moving = [updated_moment(old, new / 3) for old, new in zip(moving, (means, variances))]
        if number == 0:
            back = (0, 3, 1, 2) if data_format == "NHWC" else (0, 1, 2, 3)
            assert distance(outputs.numpy().transpose(back), wanted["outputs"]) < 1e-6
            assert distance(gradients[0].numpy().transpose(back), wanted["gradient_x"]) < 1e-5
            assert distance(gradients[1], wanted["gradient_gamma"]) < 1e-6
            assert distance(gradients[2], wanted["gradient_beta"]) < 1e-6
    for found, name in zip(moving, ("moving_mean", "moving_variance")):
        assert distance(found, wanted[name]) < 1e-6


def test_initial_state_and_parameters_are_torchvisions():
    """Of its networks with 1000 classes; gamma and variances begin with 1, beta and means with 0."""
    for model, count in part_of("parameters/").items():
        assert count_parameters(vgg_layers(model, 1.0, 224, 1000)) == count
    assert part_of("parameters/")["vgg16_bn"] == 138_365_992
    state = initial_state(make_config())
    assert len(state.moments) == 2 * 8 and not set(state.moments) & {*state.weights, *state.slots}
    for name, value in state.network().items():
        wanted = {"gamma": 1.0, "moving_variance": 1.0, "beta": 0.0, "bias": 0.0, "moving_mean": 0.0}.get(name.split("/")[1])
        assert wanted is None or (value.numpy() == wanted).all()
    plain = initial_state(make_config(model="vgg11"))
    assert not plain.moments and set(plain.weights) == {name for name in state.weights if name.endswith(("kernel", "bias"))}
    assert all((value.numpy() == state.weights[name].numpy()).all() for name, value in plain.weights.items())


@pytest.mark.parametrize("device_batch", [4, 8, 12])
def test_backward_is_torchvisions_network_by_groups(device_batch):
    """1, 2 and 3 groups a micro-batch: loss, gradients, and moments from where they begin."""
    config, wanted = make_config(device_batch=device_batch), part_of("network/")
    state = make_state(config)
    backward = tf.function(make_backward(state, config, "NHWC", []), autograph=False)
    images, labels = tf.constant(wanted["images"]), tf.constant(wanted["labels"])
    loss, sums = 0.0, dict.fromkeys(state.network(), 0.0)
    for low in range(0, 12, device_batch):
        part = slice(low, low + device_batch)
        found = backward(images[part], labels[part], tf.constant(low, tf.int64), tf.constant(dropout_keys(1, 0, 2)))
        loss += float(found.loss) / 12
        sums = {name: sums[name] + value.numpy() for name, value in zip(sums, found.gradients)}
    assert loss == pytest.approx(wanted["losses"][0], rel=1e-6)
    for name, gradient in part_of("network/gradient/").items():
        if name.startswith("block") and name.endswith("bias"):
            assert not sums[name].any() and np.abs(gradient).max() < 1e-9  # it cancels: exactly here, to rounding in torch
        else:
            assert distance(sums[name], gradient) < 1e-4, name  # of the first layers 1e-5: through all others


def test_fold_is_evaluation_with_moving_moments():
    """By the plain network, whose logits are torchvision's; without moments the weights are as they were."""
    config, wanted = make_config(), part_of("network/")
    state = make_state(config)
    for name, value in part_of("network/final/").items():
        state.network()[name].assign(value)
    folded = fold(state.network())
    assert list(folded) == [name for name in state.weights if name.endswith(("kernel", "bias"))]
    logits = vgg.logits(folded, "vgg11_bn", tf.constant(wanted["images"]), "NHWC")
    assert distance(logits, wanted["evaluated_logits"]) < 1e-5
    assert fold(folded) == folded


def test_training_is_torchs_for_20_steps():
    """Losses, what weights have moved by, and moments, with Nesterov momentum and decay, in micro-batches of 2 groups and 1.

    To 1e-4: each update is rounded, and goes into all after it (6e-6 at most on the processor that this was written on).
    """
    config, wanted = make_config(device_batch=8), part_of("network/")
    state, losses = make_state(config), []
    step = make_train_step(state, config, Device("CPU", "NHWC", 1, 1, 1, 1), ["fc1"], comm.Group(OneRank))
    images, labels = tf.constant(wanted["images"]), tf.constant(wanted["labels"])
    for number in range(STEPS):
        keys = tf.constant(dropout_keys(1, number, 2))
        losses.append(step(images, labels, tf.constant(0, tf.int64), keys, tf.constant(config.lr)).losses.numpy().sum() / 12)
    np.testing.assert_allclose(losses, wanted["losses"], rtol=1e-4)
    initial = part_of("network/initial/")
    for name, value in part_of("network/final/").items():
        found = state.network()[name].numpy()
        assert distance(found, value) < 1e-5, name
        if not (name.startswith("block") and name.endswith("bias")):  # which only decays, by less than its last digits show
            before = initial.get(name, np.zeros_like(value))
            assert distance(found - before, value - before) < 1e-4, name


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_low_precision_normalizes_in_float32(precision):
    """Statistics of values that have no square in float16 are exact; outputs are of the type that came in."""
    x = tf.constant(np.random.default_rng(1).normal(300, 200, (8, 2, 2, 3)), precision)
    ones = tf.ones([3])
    for one_group in (True, False):
        normal, sums = normalize_groups(x, ones, 0 * ones, 8 if one_group else 4, one_group, "NHWC")
        assert normal.dtype == precision and {sums.means.dtype, sums.variances.dtype} == {tf.float32}
        groups = tf.cast(x, tf.float64).numpy().reshape(1 if one_group else 2, -1, 3)
        assert distance(sums.means, groups.mean(1).sum(0)) < 1e-6
        assert distance(sums.variances, groups.var(1, ddof=1).sum(0)) < 1e-6
    state = initial_state(make_config(precision=precision))
    assert {value.dtype for value in state.network().values()} == {tf.float32}
