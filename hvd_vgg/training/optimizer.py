"""SGD with momentum and LARS, one fused update for each variable; clipping by norm; the loss scale of float16."""

from typing import Any, Dict, Iterable, Sequence, Tuple

import tensorflow as tf

from hvd_vgg.config import BITS, LARS, ComputeConfig, UpdateConfig, multipliers
from hvd_vgg.parallel import fixed_point

Slots = Dict[str, Any]
LOSS_SCALE, _GOOD_STEPS = "loss_scale", "loss_scale/good_steps"
GRADIENT_LIMITS = "gradient_limits"  # of `fixed_point`
# What only some runs have: the flag and its value.
OPTIONAL_STATE = {
    LOSS_SCALE: ("precision", "float16"),
    _GOOD_STEPS: ("precision", "float16"),
    GRADIENT_LIMITS: ("reproducible", BITS),
}
# The dynamic scale of Micikevicius et al., "Mixed Precision Training" (2018), with the constants of torch.amp.GradScaler:
# halved when a gradient overflows, doubled after so many updates without.
_FIRST_SCALE, _GROWTH_STEPS = 65536.0, 2000
_GROUP_OF = {"bias": "bias", "gamma": "norm", "beta": "norm"}  # of weights, in the words of config.WEIGHT_GROUPS


def make_slots(weights: Dict[str, Any], moments: Dict[str, Any], config: ComputeConfig) -> Slots:
    """Returns the momentum of each weight, `NAME/momentum`, zero variables of its shape; for float16 the loss scale too; for
    --reproducible=bits the limits of what is summed over ranks, int32 [weights + moments].
    """
    slots = {f"{name}/momentum": tf.Variable(tf.zeros_like(value)) for name, value in weights.items()}
    if config.precision == "float16":
        slots[LOSS_SCALE] = tf.Variable(_FIRST_SCALE)
        slots[_GOOD_STEPS] = tf.Variable(0)
    if config.reproducible == BITS:
        with tf.device("/CPU:0"):
            slots[GRADIENT_LIMITS] = tf.Variable(fixed_point.first_limits(len(weights) + len(moments)))
    return slots


def next_loss_scale(slots: Slots, finite: Any) -> Tuple[Any, Any]:
    """Returns what `set_loss_scale` is to keep after an update whose gradient was `finite` (bool scalar) or not."""
    good = tf.where(finite, slots[_GOOD_STEPS] + 1, 0)
    grows = good == _GROWTH_STEPS
    factor = tf.where(finite, tf.where(grows, 2.0, 1.0), 0.5)
    return slots[LOSS_SCALE] * factor, tf.where(grows, 0, good)


def set_loss_scale(slots: Slots, scale: Any, good_steps: Any) -> None:
    """Keeps the loss scale in `slots`, and how many updates in a row it has served."""
    slots[LOSS_SCALE].assign(scale)
    slots[_GOOD_STEPS].assign(good_steps)


def global_norm(tensors: Iterable[Any]) -> Any:
    """Returns the L2 norm of all numbers of the tensors together, a scalar of their type."""
    return tf.sqrt(2.0 * tf.add_n([tf.nn.l2_loss(tensor) for tensor in tensors]))


def clip_gradients(gradients: Dict[str, Any], norm: Any, most: float) -> Dict[str, Any]:
    """Returns gradients, by name, whose `norm` is at most `most`: times min(1, most / (norm + 1e-6)), as in PyTorch's
    clip_grad_norm_ (TensorFlow's clip_by_global_norm has no 1e-6); unchanged if `most` is 0.
    """
    if not most:
        return gradients
    factor = tf.minimum(most / (norm + 1e-6), 1.0)
    return {name: gradient * factor for name, gradient in gradients.items()}


def apply_update(weights: Dict[str, Any], slots: Slots, gradients: Dict[str, Any], lr: Any, config: UpdateConfig) -> None:
    """Applies one update to `weights` and `slots` in place, in the type of each weight; for use inside a tf.function.

    With d = g + decay * w, v = momentum * v + d; w -= lr * v, or w -= lr * (d + momentum * v) for `nesterov` (Sutskever et
    al., 2013, in the form of torch.optim.SGD, whose learning rate is outside the momentum). For `lars` v = momentum * v +
    lr * ratio * d; w -= v (You et al., arXiv 1708.03888, algorithm 1, with the rate inside the momentum), where those of
    --lars_skip have a ratio of 1 and no decay. The rate is that of --lr_multipliers.
    """
    factors = multipliers(config.lr_multipliers)
    for name, weight in weights.items():
        fitting = [beginning for beginning in factors if name.startswith(beginning)]
        rate = tf.cast(factors[max(fitting, key=len)] * lr if fitting else lr, weight.dtype)
        skipped = config.optimizer == LARS and _is_among(config.lars_skip, name)
        decay = 0.0 if skipped or _is_among(config.no_decay, name) else config.weight_decay
        gradient = gradients[name] + decay * weight if decay else gradients[name]
        if config.optimizer == LARS:
            ratio = 1.0 if skipped else _trust_ratio(weight, gradients[name], decay, config.lars_eta)
            gradient, rate = rate * ratio * gradient, tf.ones_like(rate)
        tf.raw_ops.ResourceApplyMomentum(
            var=weight.handle,
            accum=slots[f"{name}/momentum"].handle,
            lr=rate,
            grad=gradient,
            momentum=tf.constant(config.momentum, weight.dtype),
            use_nesterov=config.optimizer == "nesterov",
        )


def _is_among(groups: Sequence[str], name: str) -> bool:
    """Returns whether the weight of this name is in one of the groups, of config.WEIGHT_GROUPS."""
    return _GROUP_OF.get(name.split("/")[-1]) in groups


def _trust_ratio(weight: Any, gradient: Any, decay: float, eta: float) -> Any:
    """Returns LARS' factor of the rate, eta |w| / (|g| + decay |w|), a scalar; 1 where either norm is 0, as MLPerf has it.

    Others add a small number to the denominator (MLPerf 1e-7, timm 1e-8), which cannot be 0 here.
    """
    of_weight, of_gradient = global_norm([weight]), global_norm([gradient])
    ratio = eta * of_weight / (of_gradient + decay * of_weight)
    return tf.where((of_weight > 0) & (of_gradient > 0), ratio, tf.ones_like(ratio))
