"""Writes recipe.npz: 20 updates of a small network by PyTorch and timm in float64, and rates of PyTorch's schedulers.

    python tests/reference/make_recipe.py    # in an environment with torch and timm

tests/unit/test_recipe.py compares with it.

The network: logits = tanh(gamma (x W1 + b1) + beta) W2 + b2; the loss: the mean of torch's CrossEntropyLoss. Of each run of
RUNS: `RUN/losses` [20], before each update; `RUN/norms` [20], of the gradient before clipping; and after the updates of KEPT
all weights, in order of name, end to end: `RUN/weights` [5, weights].
"""

from pathlib import Path

import numpy as np
import torch
from timm.optim import Lars
from torch.optim import SGD, lr_scheduler

STEPS, KEPT = 20, (1, 2, 5, 10, 20)
DECAY, MOMENTUM, LR = 0.02, 0.9, 0.3
NORM, BIAS = ("norm/gamma", "norm/beta"), ("one/bias", "two/bias")
# What each run has: optimizer, names without decay, smoothing, clipping, schedule.
RUNS = {
    "momentum": dict(kind="momentum"),
    "nesterov": dict(kind="nesterov", plain=(*BIAS, *NORM), smoothing=0.1, schedule="cosine"),
    "norm_without_decay": dict(kind="momentum", plain=NORM, smoothing=0.3, schedule="polynomial"),
    "clipped": dict(kind="momentum", clip=0.3, schedule="cosine"),
    "lars": dict(kind="timm", plain=(*BIAS, *NORM), smoothing=0.1, lr=0.5),
    "lars_of_rising_rates": dict(kind="mlperf", plain=(*BIAS, *NORM), schedule="cosine", lr=0.5),
}
ETA, WARMUP, START, FLOOR, POWER = 0.3, 5, 0.1, 0.03, 2.0  # START, FLOOR: shares of the rate


def rates(schedule, peak, steps=STEPS, warmup=WARMUP):
    """Returns the rate of each update by PyTorch's schedulers.

    The warm-up is LinearLR's from its second value on, so that its last is the peak. The floor of `polynomial`, which
    PolynomialLR lacks, is added to what it has for the rest.
    """
    if not schedule:
        return [peak] * steps

    def run(rate, make, count):
        optimizer = SGD([torch.zeros(1)], lr=rate)
        scheduler, found = make(optimizer), []
        for _ in range(count):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    rising = run(peak, lambda o: lr_scheduler.LinearLR(o, START, 1.0, warmup), warmup + 1)[1:]
    rest, low = steps - warmup, FLOOR * peak
    if schedule == "cosine":
        return rising + run(peak, lambda o: lr_scheduler.CosineAnnealingLR(o, rest, low), rest)
    falling = run(peak - low, lambda o: lr_scheduler.PolynomialLR(o, rest, POWER), rest)
    return rising + [low + rate for rate in falling]


class LarsWithRateInside:
    """MLPerf's form, restated: v = momentum v + rate ratio (g + decay w); w -= v. timm has the rate outside of v."""

    def __init__(self, weights, plain):
        self.weights, self.plain, self.v = weights, plain, {name: torch.zeros_like(w) for name, w in weights.items()}

    def step(self, rate):
        for name, w in self.weights.items():
            g, ratio, decay = w.grad, 1.0, 0.0
            if name not in self.plain:
                decay = DECAY
                if w.norm() > 0 and g.norm() > 0:
                    ratio = ETA * w.norm() / (g.norm() + decay * w.norm())
            self.v[name] = MOMENTUM * self.v[name] + rate * ratio * (g + decay * w)
            with torch.no_grad():
                w -= self.v[name]


def train(first, x, labels, kind, plain=(), smoothing=0.0, clip=0.0, schedule="", lr=LR):
    """Returns (losses, gradient norms, weights) as the head of this file has them."""
    weights = {name: torch.tensor(value, requires_grad=True) for name, value in first.items()}
    groups = [
        {"params": [w for name, w in weights.items() if name not in plain], "weight_decay": DECAY},
        {"params": [w for name, w in weights.items() if name in plain], "weight_decay": 0.0},
    ]
    if kind == "mlperf":
        optimizer = LarsWithRateInside(weights, plain)
    elif kind == "timm":
        optimizer = Lars(groups, lr=lr, momentum=MOMENTUM, trust_coeff=ETA, eps=0.0)
    else:
        optimizer = SGD(groups, lr=lr, momentum=MOMENTUM, nesterov=kind == "nesterov")
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=smoothing)
    losses, norms, kept = [], [], []
    for step, rate in enumerate(rates(schedule, lr), 1):
        for w in weights.values():
            w.grad = None
        hidden = weights["norm/gamma"] * (x @ weights["one/kernel"] + weights["one/bias"]) + weights["norm/beta"]
        loss = criterion(torch.tanh(hidden) @ weights["two/kernel"] + weights["two/bias"], labels)
        loss.backward()
        losses.append(loss.item())
        norms.append(float(torch.nn.utils.clip_grad_norm_(weights.values(), clip or float("inf"))))
        if kind == "mlperf":
            optimizer.step(rate)
        else:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        if step in KEPT:
            kept.append(np.concatenate([weights[name].detach().numpy().ravel() for name in sorted(weights)]))
    return losses, norms, kept


def main():
    random = np.random.default_rng(15)
    shapes = {"one/kernel": (4, 6), "one/bias": (6,), "norm/gamma": (6,), "norm/beta": (6,)}
    shapes.update({"two/kernel": (6, 3), "two/bias": (3,)})
    first = {name: random.normal(size=shape) for name, shape in shapes.items()}
    first["norm/beta"][:] = 0
    x, labels = random.normal(size=(16, 4)), random.integers(0, 3, 16)
    arrays = {"x": x, "labels": labels, **{f"first/{name}": value for name, value in first.items()}}
    for name, options in RUNS.items():
        found = train(first, torch.tensor(x), torch.tensor(labels), **options)
        arrays.update({f"{name}/{part}": np.array(value) for part, value in zip(("losses", "norms", "weights"), found)})
    for schedule in ("cosine", "polynomial"):
        arrays[f"rates/{schedule}"] = np.array(rates(schedule, 0.4, 60, 12))
    # Single losses, and the gradient of their sum to the logits.
    logits = torch.tensor(10 * random.normal(size=(7, 5)), requires_grad=True)
    arrays["logits"], of_logits = logits.detach().numpy().copy(), random.integers(0, 5, 7)
    arrays["labels_of_logits"] = of_logits
    for smoothing in (0.0, 0.1, 0.5):
        logits.grad = None
        losses = torch.nn.CrossEntropyLoss(label_smoothing=smoothing, reduction="none")(logits, torch.tensor(of_logits))
        losses.sum().backward()
        arrays[f"smoothing/{smoothing}/losses"] = losses.detach().numpy()
        arrays[f"smoothing/{smoothing}/gradient"] = logits.grad.numpy().copy()
    np.savez(Path(__file__).with_name("recipe.npz"), **arrays)


if __name__ == "__main__":
    main()
