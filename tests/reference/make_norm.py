"""Writes norm.npz: what torch.nn.BatchNorm2d and torchvision's VGG11-BN do with groups of images, in float64.

Run in an environment with torch and torchvision, which the project does not need: python tests/reference/make_norm.py
"""

from pathlib import Path

import numpy as np
import torch
import torchvision
from torch.nn import functional
from torchvision.models import vgg

GROUP, GROUPS, UPDATES = 4, 3, 3
# VGG11's table at width 1/32, as `scale_width` rounds it, for 10 classes at 32 pixels; M is pooling.
NARROW, HIDDEN, CLASSES = (4, "M", 4, "M", 8, 8, "M", 16, 16, "M", 16, 16, "M"), 128, 10
NAMES = [f"block{block}_conv{conv}" for block, count in enumerate((1, 1, 2, 2, 2), 1) for conv in range(1, count + 1)]
STEPS, LR, MOMENTUM, DECAY = 20, 0.02, 0.9, 5e-4
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def mean_moments(norms, forward, groups):
    """Returns (outputs of `forward` for each group, {norm: (mean, variance)}, each the mean over groups)."""
    outputs, found = [], {norm: [] for norm in norms}
    for norm in norms:
        norm.momentum = 1.0  # its buffers are then the statistics of the group alone
    for group in groups:
        outputs.append(forward(group))
        for norm in norms:
            found[norm].append((norm.running_mean.clone(), norm.running_var.clone()))
    return torch.cat(outputs), {norm: [sum(each) / len(rows) for each in zip(*rows)] for norm, rows in found.items()}


def batch_norm(random):
    """One BatchNorm: its outputs and gradients for a batch, its moving moments after some updates of others."""
    norm = torch.nn.BatchNorm2d(5, dtype=torch.float64)
    norm.weight.data, norm.bias.data = (torch.tensor(random.normal(size=5).astype(np.float32)).double() for _ in range(2))
    # Means of about a deviation: float32 has no more digits of what is left after subtracting a larger one.
    shift, spread = random.normal(size=(1, 1, 5, 1, 1)), 10 ** random.uniform(-2, 2, (1, 1, 5, 1, 1))
    x = (spread * (shift + random.normal(size=(UPDATES, GROUPS * GROUP, 5, 4, 3)))).astype(np.float32)
    upstream = random.normal(size=x.shape[1:]).astype(np.float32)
    moving = [torch.zeros(5).double(), torch.ones(5).double()]
    for update in range(UPDATES):
        images = torch.tensor(x[update]).double().requires_grad_()
        outputs, found = mean_moments([norm], norm, images.split(GROUP))
        moving = [0.9 * old + 0.1 * new for old, new in zip(moving, found[norm])]
        if update == 0:
            first = outputs.detach()
            gradients = torch.autograd.grad(outputs, [images, norm.weight, norm.bias], torch.tensor(upstream).double())
    names = ("outputs", "gradient_x", "gradient_gamma", "gradient_beta", "moving_mean", "moving_variance")
    arrays = dict(zip(names, (each.numpy() for each in (first, *gradients, *moving))))
    return {**arrays, "x": x, "upstream": upstream, "gamma": norm.weight.data.numpy(), "beta": norm.bias.data.numpy()}


def narrow_network():
    network = vgg.VGG(vgg.make_layers(list(NARROW), batch_norm=True), CLASSES, init_weights=False)
    linear, relu = torch.nn.Linear, torch.nn.ReLU
    network.avgpool = torch.nn.Identity()
    network.classifier = torch.nn.Sequential(
        linear(NARROW[-2], HIDDEN), relu(), linear(HIDDEN, HIDDEN), relu(), linear(HIDDEN, CLASSES)
    )
    return network.double()


def by_name(network):
    """Returns ({name in this project: parameter}, {convolution: BatchNorm})."""
    convolutions = [layer for layer in network.features if isinstance(layer, torch.nn.Conv2d)]
    norms = [layer for layer in network.features if isinstance(layer, torch.nn.BatchNorm2d)]
    found = {}
    for name, convolution, norm in zip(NAMES, convolutions, norms):
        parts = convolution.weight, convolution.bias, norm.weight, norm.bias
        found.update({f"{name}/{part}": each for part, each in zip(("kernel", "bias", "gamma", "beta"), parts)})
    for name, layer in zip(("fc1", "fc2", "predictions"), network.classifier[::2]):
        found.update({f"{name}/kernel": layer.weight, f"{name}/bias": layer.bias})
    return found, dict(zip(NAMES, norms))


def in_our_order(name, value):
    """Returns a kernel as [height, width, in, out] or [in, out]; all else as it is."""
    value = value.detach().numpy()
    return value if value.ndim < 2 else value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def network(random):
    """A narrow VGG11-BN: loss, logits and gradients of the first update, weights and moments after all, then evaluation."""
    net = narrow_network()
    weights, norms = by_name(net)
    for name, weight in weights.items():
        deviation = (2 / (weight[0].numel() if weight.ndim > 1 else 1)) ** 0.5
        start = {"gamma": 1.0, "kernel": 0.0, "bias": 0.0, "beta": 0.0}[name.split("/")[1]]
        drawn = start + random.normal(size=weight.shape) * (deviation if weight.ndim > 1 else 0.1)
        weight.data = torch.tensor(drawn.astype(np.float32)).double()
    images = random.integers(0, 256, (GROUPS * GROUP, 32, 32, 3)).astype(np.uint8)
    labels = random.integers(0, CLASSES, len(images)).astype(np.int32)
    arrays = {f"initial/{name}": in_our_order(name, weight).astype(np.float32) for name, weight in weights.items()}
    pixels = torch.tensor((images / 255 - MEAN) / DEVIATION).permute(0, 3, 1, 2)
    moving = {name: (torch.zeros(norm.num_features), torch.ones(norm.num_features)) for name, norm in norms.items()}
    optimizer = torch.optim.SGD(net.parameters(), LR, MOMENTUM, weight_decay=DECAY, nesterov=True)
    losses = []
    for step in range(STEPS):
        logits, found = mean_moments(list(norms.values()), net, pixels.split(GROUP))
        loss = functional.cross_entropy(logits, torch.tensor(labels).long())
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            arrays["train_logits"] = logits.detach().numpy()
            arrays.update({f"gradient/{name}": in_our_order(name, weight.grad) for name, weight in weights.items()})
        optimizer.step()
        pairs = {name: zip(moving[name], found[norm]) for name, norm in norms.items()}
        moving = {name: tuple(0.9 * old + 0.1 * new for old, new in pair) for name, pair in pairs.items()}
    arrays.update({f"final/{name}": in_our_order(name, weight) for name, weight in weights.items()})
    for name, norm in norms.items():
        norm.running_mean, norm.running_var = moving[name]
        arrays.update({f"final/{name}/moving_mean": moving[name][0], f"final/{name}/moving_variance": moving[name][1]})
    arrays["evaluated_logits"] = net.eval()(pixels).detach().numpy()
    return {**arrays, "images": images, "labels": labels, "losses": np.array(losses)}


def main():
    """Writes it beside this file."""
    torch.set_num_threads(1)
    random = np.random.default_rng(20)
    arrays = {f"batch_norm/{name}": value for name, value in batch_norm(random).items()}
    arrays.update({f"network/{name}": value for name, value in network(random).items()})
    for depth in (11, 13, 16, 19):
        weights = torchvision.models.get_model_weights(f"vgg{depth}_bn").DEFAULT
        arrays[f"parameters/vgg{depth}_bn"] = np.array(weights.meta["num_params"])
    hyperparameters = {"group": GROUP, "steps": STEPS, "lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY}
    arrays.update({f"hyperparameters/{name}": np.array(value) for name, value in hyperparameters.items()})
    # As float32, whose rounding is far below what is compared: half the size.
    small = {
        name: np.asarray(each, np.float32 if np.asarray(each).dtype == np.float64 else None) for name, each in arrays.items()
    }
    np.savez_compressed(Path(__file__).with_name("norm.npz"), **small)


if __name__ == "__main__":
    main()
