"""SGD with momentum, one fused update for each variable; the loss scale of float16."""

from typing import Any, Dict, Tuple

import tensorflow as tf

from hvd_vgg.config import BITS, ComputeConfig
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


def apply_update(
    weights: Dict[str, Any], slots: Slots, gradients: Dict[str, Any], lr: Any, kind: str, momentum: float, decay: float
) -> None:
    """Applies one update to `weights` and `slots` in place; for use inside a tf.function.

    v = momentum * v + (g + decay * w); w -= lr * v, or w -= lr * (g + decay * w + momentum * v) for `nesterov`
    (Sutskever et al., 2013, in the form of torch.optim.SGD, whose learning rate is outside the momentum).
    """
    for name, weight in weights.items():
        gradient = gradients[name] + decay * weight if decay else gradients[name]
        tf.raw_ops.ResourceApplyMomentum(
            var=weight.handle,
            accum=slots[f"{name}/momentum"].handle,
            lr=lr,
            grad=gradient,
            momentum=tf.constant(momentum, tf.float32),
            use_nesterov=kind == "nesterov",
        )
