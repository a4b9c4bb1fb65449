import numpy as np
import pytest
import tensorflow as tf

from hvd_vgg.config import BLOCKS
from hvd_vgg.models import vgg
from hvd_vgg.models.architecture import count_parameters, vgg_layers
from hvd_vgg.parallel.init import cpu_convolves


@pytest.mark.parametrize(
    ("model", "count"),
    [("vgg11", 132_863_336), ("vgg13", 133_047_848), ("vgg16", 138_357_544), ("vgg19", 143_667_240)],
)
def test_count_parameters_gives_the_published_numbers(model, count):
    assert count_parameters(vgg_layers(model, 1.0, 224, 1000)) == count


def random_images(count):
    return tf.cast(tf.random.stateless_uniform([count, 64, 64, 3], [5, 6], 0, 256, tf.int32), tf.uint8)


def test_logits_names_and_shapes_are_those_of_keras():
    """Of its VGG16, with the same weights, where fc1 sees 2 by 2 pixels."""
    keras = tf.keras.applications.VGG16(weights=None, classifier_activation=None, input_shape=(64, 64, 3), classes=10)
    layers = vgg_layers("vgg16", 1.0, 64, 10)
    weights = vgg.initial_weights(layers, 3)
    theirs = {layer.name: layer for layer in keras.layers if layer.weights}
    assert [layer.name for layer in layers] == list(theirs)
    for name, layer in theirs.items():
        kernel, bias = weights[f"{name}/kernel"], weights[f"{name}/bias"]
        assert (tuple(layer.kernel.shape), tuple(layer.bias.shape)) == (tuple(kernel.shape), tuple(bias.shape))
        bias.assign(tf.random.stateless_normal(bias.shape, [1, 2]) * 0.1)
        layer.set_weights([kernel.numpy(), bias.numpy()])
    images = random_images(2)
    ours, expected = vgg.logits(weights, "vgg16", images, "NHWC").numpy(), keras(vgg.normalized(images, "imagenet")).numpy()
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("model", list(BLOCKS))
def test_logits_are_the_same_with_channels_first(model):
    """This TensorFlow computes NCHW on CPU through oneDNN; fc1's rows must keep their order."""
    weights = vgg.initial_weights(vgg_layers(model, 0.125, 64, 10), 1)
    images = random_images(3)
    try:
        first = tf.function(lambda x: vgg.logits(weights, model, x, "NCHW"))(images)
    except (tf.errors.UnimplementedError, tf.errors.InvalidArgumentError) as error:
        assert "NCHW" in str(error) or "NHWC" in str(error), error
        pytest.skip("capability: convolutions in NCHW need a GPU in this TensorFlow")
    np.testing.assert_allclose(first, vgg.logits(weights, model, images, "NHWC"), rtol=1e-4, atol=1e-6)


def test_cpu_convolves_is_right_about_bfloat16():
    images, kernel = tf.ones([1, 4, 4, 3], "bfloat16"), tf.ones([3, 3, 3, 2], "bfloat16")
    right = tf.nn.conv2d(images, kernel, 1, "SAME").dtype == "bfloat16"
    assert right == cpu_convolves("bfloat16") and cpu_convolves("float32") and cpu_convolves("float16")


def test_initial_weights_follow_the_seed_and_the_recipe():
    """Deviations are torchvision's, each layer has draws of its own, biases are 0."""
    layers = vgg_layers("vgg16", 1.0, 224, 1000)
    assert [layer.deviation for layer in layers[-3:]] == [0.01, 0.01, 0.01]
    assert layers[0].deviation == (2 / (9 * 64)) ** 0.5
    small = vgg_layers("vgg11", 0.25, 32, 10)
    a, b, other = (vgg.initial_weights(small, seed) for seed in (1, 1, 2))
    for layer in small:
        kernel = a[f"{layer.name}/kernel"].numpy()
        assert (kernel == b[f"{layer.name}/kernel"].numpy()).all()
        assert (kernel != other[f"{layer.name}/kernel"].numpy()).any()
        assert kernel.std() == pytest.approx(layer.deviation, rel=0.12)
        assert not a[f"{layer.name}/bias"].numpy().any()
    assert len({a[f"{layer.name}/kernel"].numpy().flat[0] / layer.deviation for layer in small}) == len(small)


def test_fc1_outputs_vary_as_much_in_a_narrow_network():
    """As in one of full width."""
    deviations = []
    for width, size in ((1.0, 224), (0.125, 64)):
        fc1 = next(layer for layer in vgg_layers("vgg16", width, size, 10) if layer.name == "fc1")
        deviations.append(fc1.deviation * fc1.kernel[0] ** 0.5)
    assert deviations[0] == pytest.approx(deviations[1])


def test_normalized_uses_imagenets_mean_and_deviation():
    pixels = np.array([[[[0, 128, 255]]]], np.uint8)
    expected = (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(vgg.normalized(tf.constant(pixels), "imagenet"), expected, rtol=1e-5, atol=1e-6)
