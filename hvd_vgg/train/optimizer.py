"""SGD with momentum: one fused update for each variable."""

from typing import Any, Dict

import tensorflow as tf

Slots = Dict[str, Any]


def make_slots(weights: Dict[str, Any]) -> Slots:
    """Returns the momentum of each weight, `NAME/momentum`, zero variables of the same shape."""
    return {f"{name}/momentum": tf.Variable(tf.zeros_like(value)) for name, value in weights.items()}


def update(
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
