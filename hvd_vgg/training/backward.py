"""The forward and backward pass of one micro-batch."""

from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import tensorflow as tf

from hvd_vgg.config import DENSE, StepConfig, has_batch_norm
from hvd_vgg.models import vgg
from hvd_vgg.models.architecture import BETA, GAMMA, MOVING_MEAN, MOVING_VARIANCE
from hvd_vgg.models.batch_norm import normalize_by_moments, normalize_groups
from hvd_vgg.models.dropout import dropout_mask
from hvd_vgg.models.vgg import NormFunction
from hvd_vgg.seeds import dropout_keys, mixing_key
from hvd_vgg.training.loss import top_k_correct
from hvd_vgg.training.mixing import Mixing, Targets, draw_step_mixing, mix_batch
from hvd_vgg.training.optimizer import LOSS_SCALE
from hvd_vgg.training.state import State


class Backward(NamedTuple):
    """Sums over one rank's images, in float32 where not said otherwise.

    loss; top1, top5: int64; gradients: of the weights that are summed over ranks, then the moments of BatchNorm, of which
    the sum over the global batch is the mean over its groups; inputs [n, K] and output_gradients [n, N] of each factored
    layer, whose product is the gradient of its kernel [K, N].
    """

    loss: Any
    top1: Any
    top5: Any
    gradients: List[Any]
    inputs: List[Any]
    output_gradients: List[Any]


def summed_names(names: Iterable[str], factored: Sequence[str]) -> List[str]:
    """Returns those of the weights and moments `names` that are summed over ranks: of the layers not in `factored`."""
    return [name for name in names if name.split("/")[0] not in factored]


def make_normalize(state: State, config: StepConfig, data_format: str) -> Tuple[NormFunction, Dict[str, Any]]:
    """Returns (BatchNorm in training, for `vgg.logits`; the moments that it finds, by name, as `Backward` has them).

    Frozen layers are normalized by their moving moments.
    """
    moments: Dict[str, Any] = {}
    one_group = config.device_batch == config.norm_batch  # parts are whole groups
    share = config.norm_batch / config.global_batch

    def normalize(x: Any, name: str) -> Any:
        if f"{name}/{GAMMA}" in state.frozen:
            return normalize_by_moments(state.frozen, name, x, data_format)
        gamma, beta, bias = (state.weights[f"{name}/{part}"] for part in (GAMMA, BETA, "bias"))
        normal, sums = normalize_groups(x, gamma, beta, config.norm_batch, one_group, data_format)
        moments[f"{name}/{MOVING_MEAN}"] = share * (sums.means + tf.cast(sums.groups, tf.float32) * bias)
        moments[f"{name}/{MOVING_VARIANCE}"] = share * sums.variances
        return normal

    return normalize, moments


class Forward(NamedTuple):
    """A forward pass of n images: logits [n, classes] and losses [n], float32; `Targets`; moments of BatchNorm by name."""

    logits: Any
    losses: Any
    targets: Targets
    moments: Dict[str, Any]


def forward(
    state: State,
    config: StepConfig,
    data_format: str,
    images: Any,
    labels: Any,
    masks: List[Any],
    mixing: Optional[Mixing],
    **hooks: Any,
) -> Forward:
    """Returns the forward pass of one micro-batch as training has it; hooks: `dense_layer` and `observe` of `vgg.logits`."""
    images, targets = mix_batch(images, labels, mixing, config.mix_batch, config.pixel_normalization)
    normalize, moments = make_normalize(state, config, data_format) if has_batch_norm(config.model) else (None, {})
    network = state.network(), config.model, images, data_format, config.pixel_normalization, config.precision
    logits = vgg.logits(*network, masks, config.dropout, normalize=normalize, **hooks)
    return Forward(logits, targets.cross_entropy(logits, config.label_smoothing), targets, moments)


def make_backward(state: State, config: StepConfig, data_format: str, factored: Sequence[str]) -> Callable[..., Backward]:
    """Returns the forward and backward pass of one micro-batch: (images, labels, position, keys) -> Backward.

    Gradients are those of the sum of losses / --global_batch. Under --xla the pass is compiled by XLA.
    """
    weights, loss_scale = state.weights, state.slots.get(LOSS_SCALE)
    summed = summed_names(weights, factored)

    def backward(images: Any, labels: Any, masks: List[Any], mixing: Optional[Mixing]) -> Backward:
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
            passed = forward(state, config, data_format, images, labels, masks, mixing, dense_layer=dense)
            loss = tf.reduce_sum(passed.losses)
            objective = loss / config.global_batch * (1.0 if loss_scale is None else loss_scale)
        found = tape.gradient(objective, sources, unconnected_gradients="zero")  # BatchNorm's biases
        gradients = [tf.cast(gradient, tf.float32) for gradient in found]
        if loss_scale is not None:
            gradients = [gradient * (1 / loss_scale) for gradient in gradients]
        correct = [top_k_correct(passed.logits, passed.targets.main_label(), k) for k in (1, 5)]
        factor_inputs = [tf.cast(inputs[name], tf.float32) for name in factored]
        sums, outputs = gradients[: len(summed)], gradients[len(summed) :]
        sums += [passed.moments[name] for name in state.moments]
        return Backward(loss, correct[0], correct[1], sums, factor_inputs, outputs)

    compiled = tf.function(backward, jit_compile=True, autograph=False) if config.xla else backward

    def draw_and_run(images: Any, labels: Any, position: Any, keys: Any) -> Backward:
        # Numbers are drawn outside of what XLA compiles: its generator yields the same ones in another order.
        masks = draw_dropout_masks(state.network(), config, images, position, keys)
        return compiled(images, labels, masks, draw_step_mixing(config, images, position, keys[-1]))

    return draw_and_run


def step_keys(config: StepConfig, step: int) -> np.ndarray:
    """Returns the keys of all that a step draws, uint64: of the masks of dropout, and of mixing where there is any."""
    keys = dropout_keys(config.seed, step, len(DENSE) - 1)
    return np.append(keys, mixing_key(config.seed, step)) if config.mixes else keys


def draw_dropout_masks(weights: vgg.Weights, config: StepConfig, images: Any, position: Any, keys: Any) -> List[Any]:
    """Returns the dropout mask, bool [n, units], of each hidden dense layer for `images` from `position` on."""
    return [
        dropout_mask(tf.shape(images)[0], weights[f"{name}/bias"].shape[0], config.dropout, keys[layer], position)
        for layer, name in enumerate(vgg.dense_names(weights)[:-1] if config.dropout else [])
    ]
