"""Writes mixing.npz: mixup and CutMix by torchvision, and moving averages of weights by timm.

python tests/reference/make_mixing.py    # with torch, torchvision and timm; none of them is needed by the tests
"""

from pathlib import Path

import numpy as np
import timm.utils
import torch
from torchvision.transforms import v2

ROWS, SIZE, CLASSES, STEPS, DECAY = 4, 12, 5, 20, 0.09


class MixUp(v2.MixUp):
    """Keeps what it has drawn."""

    def make_params(self, inputs):
        self.drawn = super().make_params(inputs)
        return self.drawn


class CutMix(v2.CutMix):
    """Keeps what it has drawn."""

    def make_params(self, inputs):
        self.drawn = super().make_params(inputs)
        return self.drawn


def main():
    torch.manual_seed(1)
    images, labels = torch.randn(ROWS, 3, SIZE, SIZE), torch.randint(CLASSES, (ROWS,))
    found = {"images": images.permute(0, 2, 3, 1), "labels": labels}
    for number in range(3):
        mixup, cutmix = MixUp(alpha=0.4, num_classes=CLASSES), CutMix(alpha=1.0, num_classes=CLASSES)
        mixed, targets = mixup(images, labels)
        found.update({f"mixup{number}_images": mixed.permute(0, 2, 3, 1), f"mixup{number}_targets": targets})
        found[f"mixup{number}_share"] = torch.tensor(mixup.drawn["lam"])
        mixed, targets = cutmix(images, labels)
        found.update({f"cutmix{number}_images": mixed.permute(0, 2, 3, 1), f"cutmix{number}_targets": targets})
        left, top, right, bottom = cutmix.drawn["box"]
        found[f"cutmix{number}_box"] = torch.tensor([top, left, bottom, right])
    logits = torch.randn(ROWS, CLASSES)
    loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none")
    found.update(logits=logits, loss=loss(logits, found["mixup0_targets"]))
    layer = torch.nn.Linear(3, 2)
    average = timm.utils.ModelEmaV3(layer, decay=DECAY)
    found["weights"], found["averages"] = [layer.weight.detach().clone()], [average.module.weight.detach().clone()]
    for _ in range(STEPS):
        with torch.no_grad():
            layer.weight += torch.randn(2, 3)
        average.update(layer)
        found["weights"].append(layer.weight.detach().clone())
        found["averages"].append(average.module.weight.detach().clone())
    arrays = {name: torch.stack(value) if isinstance(value, list) else value for name, value in found.items()}
    np.savez_compressed(Path(__file__).with_name("mixing.npz"), **{name: value.numpy() for name, value in arrays.items()})


if __name__ == "__main__":
    main()
