"""The step of evaluation at other sizes, and with mirror images."""

import numpy as np
import pytest
import tensorflow as tf
from support import ROOT

from hvd_vgg.config import EvaluationConfig
from hvd_vgg.data.loader import Batch
from hvd_vgg.models import vgg
from hvd_vgg.models.architecture import vgg_layers
from hvd_vgg.models.pooling import average_to_inputs
from hvd_vgg.training.evaluate import make_eval_step, ranked_rows
from hvd_vgg.training.loss import top_k_correct

NETWORK = {"model": "vgg11", "width": 0.0625, "image_size": 64, "num_classes": 10}


def random_batch(size, n=6):
    random = np.random.default_rng(4)
    return random.integers(0, 256, (n, size, size, 3), np.uint8), np.array([3, 1, 9, -1, 0, 5], np.int32)


def test_pooling_is_torchs():
    """torch.nn.AdaptiveAvgPool2d(7) of larger and smaller maps (make_pixels.py); of 7 by 7 nothing is done."""
    with np.load(ROOT / "tests" / "reference" / "pixels.npz", allow_pickle=False) as reference:
        names = [name for name in reference if name.startswith("pooled/")]
        assert len(names) == 4
        for name in names:
            found = average_to_inputs(tf.constant(reference[f"un{name}"][np.newaxis]), 7 * 7 * 2)
            np.testing.assert_allclose(found.numpy()[0], reference[name], rtol=1e-12, atol=1e-14)
    same = tf.zeros([2, 7, 7, 2])
    assert average_to_inputs(same, 98) is same


def test_flipped_evaluation_averages_posteriors():
    """The loss is minus the logarithm of the label's mean posterior, and ranks are those of the mean."""
    weights = vgg.initial_weights(vgg_layers(*NETWORK.values()), 3)
    images, labels = random_batch(64)
    plain, flipped = (make_eval_step(weights, EvaluationConfig(**NETWORK, eval_flip=flip), "NHWC") for flip in (False, True))
    both = [tf.nn.softmax(vgg.logits(weights, "vgg11", each, "NHWC")).numpy() for each in (images, images[:, :, ::-1])]
    assert not np.allclose(*both, rtol=1e-3)
    for step, posterior in ((plain, both[0]), (flipped, (both[0] + both[1]) / 2)):
        loss, top1, top5, records, *_ = step(tf.constant(images), tf.constant(labels))
        assert float(loss) == pytest.approx(-np.log(posterior[np.arange(6), labels])[labels >= 0].sum(), rel=1e-5)
        expected = [int(top_k_correct(tf.constant(posterior), tf.constant(labels), k)) for k in (1, 5)]
        assert [int(top1), int(top5), int(records)] == [*expected, 5]


@pytest.mark.parametrize(("flip", "top"), [(False, 3), (True, 20)])
def test_eval_step_ranks_classes_by_their_posteriors(flip, top):
    """The posteriors of the likeliest classes; hits row by row, of which top1 and top5 are sums."""
    weights = vgg.initial_weights(vgg_layers(*NETWORK.values()), 3)
    images, labels = random_batch(64)
    both = [tf.nn.softmax(vgg.logits(weights, "vgg11", each, "NHWC")).numpy() for each in (images, images[:, :, ::-1])]
    posterior = (both[0] + both[1]) / 2 if flip else both[0]
    step = make_eval_step(weights, EvaluationConfig(**NETWORK, eval_flip=flip), "NHWC", top)
    scored = step(tf.constant(images), tf.constant(labels))
    classes, probabilities = scored.classes.numpy(), scored.probabilities.numpy()
    assert classes.shape == probabilities.shape == (6, min(top, 10))
    np.testing.assert_array_equal(classes, np.argsort(-posterior, axis=1, kind="stable")[:, :top])
    np.testing.assert_allclose(probabilities, -np.sort(-posterior, axis=1)[:, :top], rtol=1e-5)
    hits = scored.hits.numpy()
    assert hits.sum(axis=0).tolist() == [int(scored.top1), int(scored.top5)] and not hits[3].any()
    for k, column in ((1, 0), (5, 1)):
        expected = [label in row for label, row in zip(labels, np.argsort(-posterior, axis=1)[:, :k])]
        assert hits[:, column].tolist() == expected
    batch = Batch(images, labels, np.arange(60, 66), [])
    rows = ranked_rows(batch, scored)
    assert rows["record"].tolist() == [60, 61, 62, 64, 65] and (rows["classes"] == classes[labels >= 0]).all()


def test_eval_step_that_is_not_finite_misses_all():
    """Its probabilities are no numbers."""
    weights = vgg.initial_weights(vgg_layers(*NETWORK.values()), 3)
    weights["predictions/bias"].assign(np.full(10, np.nan, np.float32))
    images, labels = random_batch(64)
    scored = make_eval_step(weights, EvaluationConfig(**NETWORK), "NHWC")(tf.constant(images), tf.constant(labels))
    assert (int(scored.top1), int(scored.top5), int(scored.records)) == (0, 0, 5) and np.isnan(scored.probabilities).all()


@pytest.mark.parametrize("size", [96, 40])
def test_evaluation_at_another_size_averages_the_map(size):
    """Of 3 by 3 or 1 by 1 cells, to the 2 by 2 of 64 pixels: the same as a network of that size, with its cells repeated."""
    weights = vgg.initial_weights(vgg_layers(*NETWORK.values()), 3)
    images, labels = random_batch(size)
    step = make_eval_step(weights, EvaluationConfig(**NETWORK, eval_size=size), "NHWC")
    loss = step(tf.constant(images), tf.constant(labels))[0]
    cells, wide = size // 32, dict(weights)
    kernel = weights["fc1/kernel"].numpy().reshape(2, 2, -1, weights["fc1/kernel"].shape[1])
    spread = np.zeros((cells, cells, *kernel.shape[2:]), np.float32)
    for (i, j), part in zip(np.ndindex(2, 2), kernel.reshape(4, *kernel.shape[2:])):
        rows, columns = (slice(k * cells // 2, -(-(k + 1) * cells // 2)) for k in (i, j))
        spread[rows, columns] += part / spread[rows, columns, 0, 0].size
    wide["fc1/kernel"] = tf.constant(spread.reshape(-1, kernel.shape[-1]))
    logits = vgg.logits(wide, "vgg11", images, "NHWC").numpy()
    expected = tf.nn.sparse_softmax_cross_entropy_with_logits(np.maximum(labels, 0), logits).numpy()[labels >= 0].sum()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
