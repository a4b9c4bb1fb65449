"""Mixup and CutMix: each image is mixed with its neighbour in a fixed group of consecutive positions of the global batch.

Zhang et al., mixup (arXiv 1710.09412); Yun et al., CutMix (arXiv 1905.04899); drawn and paired as torchvision's
references/classification/transforms.py does for a device's batch, here for a group of --mix_batch images, which one rank
computes whole: so neither message nor result depends on ranks.
"""

from typing import Any, NamedTuple, Optional, Tuple

import tensorflow as tf

from hvd_vgg.config import StepConfig
from hvd_vgg.models.dropout import uniform_rows
from hvd_vgg.models.vgg import normalized
from hvd_vgg.training.loss import cross_entropy

_TRIES = 16  # of a Beta variate: with alpha 1, where half fail, all do in 1 of 65536 groups, which then takes 1/2


class Mixing(NamedTuple):
    """How each of n groups is mixed; share: of its own label in a row's target, float32 [n].

    blend: of its own pixels outside the box, float32 [n]; top, left, bottom, right: the box, in which all pixels are the
    neighbour's, float32 [n], whole numbers.
    """

    share: Any
    blend: Any
    top: Any
    left: Any
    bottom: Any
    right: Any


class Targets(NamedTuple):
    """What n rows are to be taken for: `label` with `share`, `other` with the rest; labels int32 [n], share float32 [n].

    Without mixing share is None.
    """

    label: Any
    other: Any
    share: Any

    def cross_entropy(self, logits: Any, smoothing: float) -> Any:
        """Returns the loss of each row, float32 [n], as `loss.cross_entropy` does: linear in the target."""
        own = cross_entropy(logits, self.label, smoothing)
        if self.share is None:
            return own
        return self.share * own + (1 - self.share) * cross_entropy(logits, self.other, smoothing)

    def main_label(self) -> Any:
        """Returns the label with the larger share of each row, int32 [n]."""
        return self.label if self.share is None else tf.where(self.share >= 0.5, self.label, self.other)


def draw_step_mixing(config: StepConfig, images: Any, position: Any, key: Any) -> Optional[Mixing]:
    """Returns how `images` from `position` of the global batch on are mixed; None without --mixup and --cutmix."""
    if not config.mixes:
        return None
    group = config.mix_batch
    return draw_mixing(tf.shape(images)[0] // group, position // group, key, config.mixup, config.cutmix, config.image_size)


def mix_batch(images: Any, labels: Any, mixing: Optional[Mixing], group: int, normalization: str) -> Tuple[Any, Targets]:
    """Returns what the network is trained on: (images, Targets); with `mixing` images are float32 and normalized.

    images: uint8 [n, height, width, 3]; labels: int32 [n]; normalization: of `vgg.normalized`.
    """
    if mixing is None:
        return images, Targets(labels, labels, None)
    return mix(normalized(images, normalization), labels, mixing, group)


def draw_mixing(groups: Any, first: Any, key: Any, mixup: float, cutmix: float, size: int) -> Mixing:
    """Returns how `groups` groups (int32 scalar) from group `first` of a step's (int64 scalar) are mixed.

    key: of the step, uint64 scalar; mixup, cutmix: alpha of the Beta distribution (alpha, alpha) of each share, 0 for never;
    with both a group has one or the other with equal chance; size: height and width of the images, pixels.
    """
    draws = uniform_rows(groups, 3 + 2 * _TRIES, key, first)
    cuts = draws[:, 0] < (0.5 if mixup else 1.0) if cutmix else tf.zeros([groups], tf.bool)
    tries = tf.reshape(draws[:, 3:], [groups, _TRIES, 2])
    drawn = [_beta(tries, alpha) if alpha else tf.ones([groups]) for alpha in (mixup, cutmix)]
    # The box has 1 - share of the image's area before it is cut at the borders; its sides are even numbers of pixels.
    half = tf.floor(size * 0.5 * tf.sqrt(1 - drawn[1]))
    half = tf.where(cuts, half, tf.zeros_like(half))
    centre = tf.floor(size * draws[:, 1:3])
    low, high = (tf.clip_by_value(centre + sign * half[:, None], 0.0, float(size)) for sign in (-1, 1))
    area = tf.reduce_prod(high - low, axis=1) / (size * size)
    blend = tf.where(cuts, tf.ones_like(area), drawn[0])
    return Mixing(tf.where(cuts, 1 - area, blend), blend, low[:, 0], low[:, 1], high[:, 0], high[:, 1])


def _beta(tries: Any, alpha: float) -> Any:
    """Returns Beta(alpha, alpha) variates, alpha at most 1, float32 [n], of uniform ones, [n, tries, 2].

    By Joehnk's method: of x = u^(1/alpha), y = v^(1/alpha), x / (x + y) for the first pair whose sum is at most 1 (Devroye,
    Non-Uniform Random Variate Generation, section IX.3.5).
    """
    powers = tries ** (1 / alpha)
    total = tf.reduce_sum(powers, axis=2)
    fits = (total > 0) & (total <= 1)
    shares = tf.math.divide_no_nan(powers[:, :, 0], total)
    first = tf.reduce_min(tf.where(fits, tf.range(_TRIES), _TRIES), axis=1)
    # Behind the last try stands what is taken where none fits.
    return tf.gather(tf.pad(shares, [[0, 0], [0, 1]], constant_values=0.5), first, axis=1, batch_dims=1)


def mix(images: Any, labels: Any, mixing: Mixing, group: int) -> Any:
    """Returns (mixed images, Targets) of whole groups of `group` rows: row i with row i - 1 of its group, 0 with the last.

    images: float32 [n, height, width, 3], normalized; labels: int32 [n].
    """
    height, width = images.shape[1:3]
    rows, columns = (tf.range(float(side)) for side in (height, width))
    inside = [
        (line >= low[:, None]) & (line < high[:, None])
        for line, low, high in ((rows, mixing.top, mixing.bottom), (columns, mixing.left, mixing.right))
    ]
    box = inside[0][:, None, :, None, None] & inside[1][:, None, None, :, None]
    own = tf.reshape(images, [-1, group, height, width, 3])
    other = tf.roll(own, 1, 1)
    blend = mixing.blend[:, None, None, None, None]
    mixed = tf.where(box, other, blend * own + (1 - blend) * other)
    others = tf.reshape(tf.roll(tf.reshape(labels, [-1, group]), 1, 1), [-1])
    return tf.reshape(mixed, [-1, height, width, 3]), Targets(labels, others, tf.repeat(mixing.share, group))
