"""What a run takes from --init_from, and what frozen layers and rates of layers change in an update."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from hvd_vgg.config import BLOCKS, TrainConfig
from hvd_vgg.errors import CONFIGURATION, Failure
from hvd_vgg.models import vgg
from hvd_vgg.models.architecture import layers_to_train, training_flops
from hvd_vgg.models.batch_norm import fold
from hvd_vgg.parallel import comm, cost
from hvd_vgg.training.backward import forward, make_backward, step_keys
from hvd_vgg.training.init_from import choose_layers, resize_grid
from hvd_vgg.training.optimizer import apply_update
from hvd_vgg.training.state import initial_state
from hvd_vgg.training.sums import make_layout
from hvd_vgg.weights.source import Source, expected_shapes, network_flags

SMALL = TrainConfig(
    model="vgg11_bn", width=0.0625, image_size=64, num_classes=10, global_batch=8, device_batch=8, norm_batch=4, dropout=0.0
)
FROZEN = dataclasses.replace(SMALL, train_only=("block1", "block3_conv1", "block4", "fc2", "predictions"))


def source_of(config, *without, **more):
    """Returns the weights of a network as a file would hold them, drawn; without: beginnings of names that it lacks."""
    random = np.random.default_rng(5)
    shapes = {name: shape for name, shape in expected_shapes(config).items() if not name.startswith(without)}
    tensors = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return Source(Path("w.safetensors"), "drawn", {**tensors, **more}, network_flags(shapes), ["extra"], "0" * 64)


@pytest.mark.parametrize("model", sorted(BLOCKS))
@pytest.mark.parametrize(("width", "size", "head"), [(1.0, 224, "flattened"), (0.25, 64, "flattened"), (0.5, 224, "pooled")])
def test_network_flags_are_those_of_its_shapes(model, width, size, head):
    config = TrainConfig(model=model, width=width, image_size=size, head=head, num_classes=7)
    shapes = expected_shapes(config)
    found = network_flags(shapes)
    expected = {"model": model, "width": width, "num_classes": 7, "head": head, "image_size": size}
    assert found == {name: expected[name] for name in found} and ("image_size" in found) == (head == "flattened")
    assert set(network_flags({n: s for n, s in shapes.items() if n.startswith("block")})) == {"model", "width"}
    with pytest.raises(ValueError, match="which no VGG network has"):
        network_flags({name: shape for name, shape in shapes.items() if not name.startswith("block5")})
    with pytest.raises(ValueError, match=r"block2_conv1/bias has the shape \[3\], expected \[\d+\]"):
        network_flags({**shapes, "block2_conv1/bias": (3,)})


def test_init_takes_all_layers_that_fit():
    taken = choose_layers(source_of(SMALL), SMALL)
    assert set(taken.tensors) == set(expected_shapes(SMALL)) and taken[1:] == ("", [], ["extra"])


@pytest.mark.parametrize(
    ("without", "changes", "new", "unused"),
    [
        ((), {"num_classes": 5}, ["predictions (5 classes, the file has 10)"], ["predictions"]),
        (("fc", "pred"), {}, [f"{name} (the file has none)" for name in ("fc1", "fc2", "predictions")], []),
        ((), {"head": "pooled"}, ["predictions (the file's has 256 inputs, expected 32)"], ["fc1", "fc2", "predictions"]),
        ((), {"init_layers": ("block", "fc")}, ["predictions (not in --init_layers)"], ["predictions"]),
    ],
)
def test_init_leaves_what_does_not_fit_new(without, changes, new, unused):
    """Said by name; all else is the file's."""
    config = dataclasses.replace(SMALL, **changes)
    source = source_of(SMALL, *without)
    taken = choose_layers(source, config)
    assert (taken.new, taken.unused) == (new, [*unused, "extra"])
    left_out = {each.split(" ")[0] for each in new}
    assert set(taken.tensors) == {name for name in expected_shapes(config) if name.split("/")[0] not in left_out}
    assert all((tensor == source.tensors[name]).all() for name, tensor in taken.tensors.items())


def test_init_resizes_the_grid_of_fc1():
    config = dataclasses.replace(SMALL, image_size=96)
    source = source_of(SMALL)
    taken = choose_layers(source, config)
    assert taken.resized == "fc1, from a grid of 2 x 2 (64 pixels) to 3 x 3 (96 pixels)" and not taken.new
    assert (taken.tensors["fc1/kernel"] == resize_grid(source.tensors["fc1/kernel"], 2, 3)).all()


@pytest.mark.parametrize(("before", "after"), [(7, 1), (1, 7), (7, 5), (5, 7), (7, 7), (2, 4)])
def test_resize_grid_keeps_sums(before, after):
    """And so what a map that is the same everywhere leads to; with the same grid it changes nothing."""
    kernel = np.random.default_rng(1).normal(size=(before * before * 3, 4)).astype(np.float32)
    resized = resize_grid(kernel, before, after)
    sums = [each.reshape(-1, 3, 4).sum(axis=0, dtype=np.float64) for each in (kernel, resized)]
    np.testing.assert_allclose(*sums, rtol=0, atol=1e-5)
    assert resized.shape == (after * after * 3, 4) and (before != after or (resized == kernel).all())
    if (before, after) == (2, 4):  # each cell becomes four, of a quarter each
        cells = resized.reshape(4, 4, 3, 4)
        assert (cells[:2, 2:] == kernel.reshape(2, 2, 3, 4)[0, 1] / 4).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "vgg16_bn"}, "is of vgg11_bn: expected --model=vgg11_bn"),
        ({"model": "vgg11"}, "is of vgg11_bn: expected --model=vgg11_bn"),
        ({"width": 0.125}, r"block1_conv1/kernel has the shape \[3, 3, 3, 4\]; expected .* the file's is 0.0625"),
        ({"init_layers": ("fc3",)}, "nothing of it is taken"),
    ],
)
def test_init_refuses_another_network(changes, message):
    with pytest.raises(Failure, match=message) as raised:
        choose_layers(source_of(SMALL), dataclasses.replace(SMALL, **changes))
    assert raised.value.code == CONFIGURATION


def test_init_adds_batch_norm():
    """To convolutions without it; not to frozen ones, whose moments would stay as they begin."""
    plain = source_of(dataclasses.replace(SMALL, model="vgg11"))
    taken = choose_layers(plain, SMALL)
    assert taken.new == ["BatchNorm (the file has none)"] and set(taken.tensors) == set(plain.tensors)
    choose_layers(plain, dataclasses.replace(SMALL, train_only=("block",)))
    with pytest.raises(Failure, match="whose moments block1_conv1 would keep as they begin"):
        choose_layers(plain, dataclasses.replace(SMALL, train_only=("block2", "block3", "block4", "block5", "fc")))


def test_init_refuses_half_a_layer():
    source = source_of(SMALL)
    del source.tensors["block2_conv1/moving_mean"]
    with pytest.raises(Failure, match="block2_conv1/moving_mean is missing"):
        choose_layers(source, SMALL)


def test_frozen_layers_cost_no_gradient_message_or_momentum():
    """Nor floating-point operations, nor are they among what is exchanged."""
    state, layers = initial_state(FROZEN), layers_to_train(FROZEN)
    frozen = {layer.name for layer in layers if not layer.trained}
    assert frozen == {"block2_conv1", "block3_conv2", "block5_conv1", "block5_conv2", "fc1"}
    assert {name.split("/")[0] for name in state.frozen} == frozen
    assert set(state.network()) == set(expected_shapes(FROZEN))
    assert {name for name in state.slots if name.endswith("momentum")} == {f"{name}/momentum" for name in state.weights}
    layout = make_layout(state, [], FROZEN, "CPU", comm.WORLD)
    sent = {part.weight for message in layout.messages for part in message.parts}
    assert sent == set(state.trained()) and state.slots["gradient_limits"].shape == [len(sent)]
    assert {choice.layer for choice in cost.choose(FROZEN, 2)} == {layer.name for layer in layers} - frozen
    whole = training_flops(layers_to_train(SMALL), 64)
    last = training_flops(layers_to_train(dataclasses.replace(SMALL, train_only=("predictions",))), 64)
    passes = [1 + layer.trained + (number > 0) for number, layer in enumerate(layers)]
    assert last < training_flops(layers, 64) < whole and passes[:3] == [2, 2, 3]


def test_frozen_batch_norm_uses_and_keeps_its_moments():
    """The outputs are those of the folded network where all is frozen but dense layers, as in evaluation."""
    config = dataclasses.replace(SMALL, train_only=("fc", "predictions"))
    state, random = initial_state(config), np.random.default_rng(2)
    for name, variable in state.frozen.items():
        variable.assign(random.uniform(0.5, 1.5, variable.shape) if "kernel" not in name else variable)
    images, labels = random.integers(0, 256, (8, 64, 64, 3), np.uint8), np.arange(8, dtype=np.int32)
    for data_format in ("NHWC", *(["NCHW"] if tf.config.list_physical_devices("GPU") else [])):
        passed = forward(state, config, data_format, tf.constant(images), tf.constant(labels), [], None)
        expected = vgg.logits(fold(state.network()), config.model, tf.constant(images), data_format)
        np.testing.assert_allclose(passed.logits, expected, rtol=1e-4, atol=1e-5)
        assert not passed.moments


def test_frozen_layers_leave_the_gradients_of_others():
    """Without BatchNorm, whose frozen layers normalize otherwise, they are those of a run that trains all."""
    plain = dataclasses.replace(SMALL, model="vgg11")
    found = []
    for config in (plain, dataclasses.replace(plain, train_only=FROZEN.train_only)):
        state, random = initial_state(config), np.random.default_rng(2)
        images, labels = random.integers(0, 256, (8, 64, 64, 3), np.uint8), np.arange(8, dtype=np.int32)
        backward = make_backward(state, config, "NHWC", [])
        keys = tf.constant(step_keys(config, 0))
        part = backward(tf.constant(images), tf.constant(labels), tf.constant(0, tf.int64), keys)
        found.append(dict(zip(state.weights, part.gradients)))
    assert set(found[1]) < set(found[0])
    for name, gradient in found[1].items():
        np.testing.assert_allclose(gradient, found[0][name], rtol=1e-5, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("optimizer", ["momentum", "nesterov", "lars"])
def test_lr_multipliers_are_rates_of_layers(optimizer):
    """The longest name that fits counts; a layer moves as in a run with that rate."""
    config = dataclasses.replace(
        SMALL, optimizer=optimizer, lr_multipliers=("block:0.5", "block1:2", "predictions:4"), weight_decay=0.01
    )
    factors = {"block1_conv1": 2.0, "block2_conv1": 0.5, "block5_conv2": 0.5, "fc1": 1.0, "predictions": 4.0}
    gradients = {name: tf.cast(tf.fill(each.shape, 0.1), tf.float32) for name, each in initial_state(config).weights.items()}

    def moved(config, lr):
        state = initial_state(config)
        for _ in range(3):
            apply_update(state.weights, state.slots, gradients, tf.constant(lr), config)
        return {name: weight.numpy() for name, weight in state.weights.items()}

    found = moved(config, 0.25)
    for layer, factor in factors.items():
        expected = moved(dataclasses.replace(config, lr_multipliers=()), 0.25 * factor)
        for name in (f"{layer}/kernel", f"{layer}/bias"):
            np.testing.assert_array_equal(found[name], expected[name])
