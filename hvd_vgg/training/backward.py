"""The forward and backward pass of one micro-batch."""

from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Sequence

import tensorflow as tf

from hvd_vgg.config import StepConfig
from hvd_vgg.models import vgg
from hvd_vgg.models.architecture import DENSE
from hvd_vgg.models.dropout import dropout_mask
from hvd_vgg.training.loss import cross_entropy, top_k_correct
from hvd_vgg.training.optimizer import LOSS_SCALE, Slots


class Backward(NamedTuple):
    """Sums over one rank's images, in float32 where not said otherwise.

    loss; top1, top5: int64; gradients: of the weights that are summed over ranks; inputs [n, K] and output_gradients
    [n, N] of each factored layer, whose product is the gradient of its kernel [K, N].
    """

    loss: Any
    top1: Any
    top5: Any
    gradients: List[Any]
    inputs: List[Any]
    output_gradients: List[Any]


def summed_weights(weights: Iterable[str], factored: Sequence[str]) -> List[str]:
    """Returns the names of the weights whose gradients are summed over ranks: those of the layers not in `factored`."""
    return [name for name in weights if name.split("/")[0] not in factored]


def make_backward(
    weights: vgg.Weights,
    slots: Slots,
    config: StepConfig,
    data_format: str,
    factored: Sequence[str],
) -> Callable[..., Backward]:
    """Returns the forward and backward pass of one micro-batch: (images, labels, position, keys) -> Backward.

    Gradients are those of the sum of losses / --global_batch. Under --xla the pass is compiled by XLA.
    """
    loss_scale, summed = slots.get(LOSS_SCALE), summed_weights(weights, factored)

    def backward(images: Any, labels: Any, masks: List[Any]) -> Backward:
        inputs: Dict[str, Any] = {}
        # Zero probes: d(loss)/d(probe) equals d(loss)/d(output), which is what is gathered.
        widths = {name: weights[f"{name}/bias"].shape[0] for name in factored}
        probes = {name: tf.zeros([tf.shape(images)[0], width], config.precision) for name, width in widths.items()}

        def dense(weights: vgg.Weights, x: Any, name: str) -> Any:
            inputs[name] = x
            outputs = vgg.dense(weights, x, name)
            return outputs + probes[name] if name in probes else outputs

        with tf.GradientTape(watch_accessed_variables=False) as tape:
            sources = [weights[name] for name in summed] + list(probes.values())
            tape.watch(sources)
            logits = vgg.logits(weights, config.model, images, data_format, config.precision, masks, config.dropout, dense)
            loss = tf.reduce_sum(cross_entropy(logits, labels, config.label_smoothing))
            objective = loss / config.global_batch * (1.0 if loss_scale is None else loss_scale)
        gradients = [tf.cast(gradient, tf.float32) for gradient in tape.gradient(objective, sources)]
        if loss_scale is not None:
            gradients = [gradient * (1 / loss_scale) for gradient in gradients]
        correct = [top_k_correct(logits, labels, k) for k in (1, 5)]
        factor_inputs = [tf.cast(inputs[name], tf.float32) for name in factored]
        sums, outputs = gradients[: len(summed)], gradients[len(summed) :]
        return Backward(loss, correct[0], correct[1], sums, factor_inputs, outputs)

    compiled = tf.function(backward, jit_compile=True, autograph=False) if config.xla else backward

    def draw_and_run(images: Any, labels: Any, position: Any, keys: Any) -> Backward:
        # Masks are drawn outside of what XLA compiles: its generator yields the same numbers in another order.
        return compiled(images, labels, draw_dropout_masks(weights, config, images, position, keys))

    return draw_and_run


def draw_dropout_masks(weights: vgg.Weights, config: StepConfig, images: Any, position: Any, keys: Any) -> List[Any]:
    """Returns the dropout mask, bool [n, units], of each hidden dense layer for `images` from `position` on."""
    return [
        dropout_mask(tf.shape(images)[0], weights[f"{name}/bias"].shape[0], config.dropout, keys[layer], position)
        for layer, name in enumerate(DENSE[:-1] if config.dropout else [])
    ]
