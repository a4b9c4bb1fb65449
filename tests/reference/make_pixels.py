"""Writes pixels.npz: small images, and what torch and torchvision make of them, for tests/unit/test_augment.py.

    PYTHON tests/reference/make_pixels.py

PYTHON has torch, torchvision and Pillow, which are no part of this project's environment; the versions are in the file.
"""

import io
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomErasing, autoaugment
from torchvision.transforms import functional as F  # noqa: N812

SIDE, BINS = 32, 31
# Of TrivialAugment: bins of its magnitudes, and signs.
CASES = {
    **{name: [(4, 1), (17, -1), (30, 1)] for name in ("ShearX", "ShearY", "TranslateX", "TranslateY")},
    "Rotate": [(1, 1), (11, -1), (20, 1), (20, -1), (30, 1)],  # 20 are 90 degrees
    **{name: [(8, 1), (8, -1), (30, 1), (30, -1)] for name in ("Brightness", "Color", "Contrast", "Sharpness")},
    "Posterize": [(8, 1), (17, 1), (30, 1)],
    "Solarize": [(1, 1), (17, 1), (30, 1)],
    "AutoContrast": [(0, 1)],
    "Equalize": [(0, 1)],
}
JITTERS = (
    [("brightness", 1.4), ("contrast", 0.6), ("saturation", 1.3)],
    [("saturation", 0.6), ("brightness", 0.7), ("contrast", 1.4)],
)


def natural(height, width, seed):
    """An image with smooth shades, edges and some noise: uint8 [height, width, 3]."""
    random, (y, x) = np.random.default_rng(seed), np.mgrid[:height, :width]
    planes = [
        128 + 70 * np.sin(x / (5 + c) + seed) + 50 * np.cos(y / (7 - c)) + 60 * (x + c * y > width) - 30 for c in range(3)
    ]
    return np.clip(np.stack(planes, -1) + random.normal(0, 2, (height, width, 3)), 0, 255).astype(np.uint8)


def operations(found, images):
    """Adds TrivialAugment's magnitudes, and its operations and colour jitter on each image."""
    space = autoaugment.TrivialAugmentWide()._augmentation_space(BINS)
    for name, (magnitudes, signed) in space.items():
        found[f"magnitudes/{name}"] = np.append(magnitudes.double().numpy().reshape(-1), float(signed))
    for number, image in enumerate(map(Image.fromarray, images)):
        for name, cases in CASES.items():
            magnitudes = space[name][0].reshape(-1)
            for chosen, sign in cases:
                changed = autoaugment._apply_op(
                    image, name, sign * float(magnitudes[chosen]), InterpolationMode.BILINEAR, None
                )
                found[f"operation/{name}/{chosen}/{sign}/{number}"] = np.asarray(changed)
        for steps in JITTERS:
            changed = image
            for kind, factor in steps:
                changed = getattr(F, f"adjust_{kind}")(changed, factor)
            found[f"jitter/{' '.join(f'{kind} {factor}' for kind, factor in steps)}/{number}"] = np.asarray(changed)


def resizing(found):
    """Adds encoded images, random crops of them, and what evaluation makes of them."""
    for kind, options in (("PNG", {}), ("JPEG", {"quality": 92})):
        file = io.BytesIO()
        Image.fromarray(natural(75, 100, 3)).save(file, kind, **options)
        found[f"encoded/{kind}"] = np.frombuffer(file.getvalue(), np.uint8)
        image = Image.open(io.BytesIO(file.getvalue())).convert("RGB")
        for top, left, height, width in ((0, 0, 75, 100), (3, 10, 60, 61), (20, 30, 16, 20)):
            changed = F.resized_crop(image, top, left, height, width, [32, 32])
            found[f"crop/{kind}/{top} {left} {height} {width}"] = np.asarray(changed)
        for size, shorter in ((32, 36), (48, 54), (64, 64), (96, 109)):
            changed = F.center_crop(F.resize(image, shorter), [size, size])
            found[f"centre/{kind}/{size} {shorter}"] = np.asarray(changed)


def erasing(found):
    """Adds rectangles that are drawn for an image of 64 by 64: top, left, height, width."""
    torch.manual_seed(1)
    image = torch.zeros(3, 64, 64)
    found["erased"] = np.array(
        [RandomErasing.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(4000)], np.int8
    )


def pooling(found):
    """Adds feature maps [height, width, channels], and their means on a grid of 7 by 7."""
    random = np.random.default_rng(5)
    for height, width in ((9, 10), (14, 8), (5, 7), (1, 3)):
        x = random.normal(size=(height, width, 2))
        pooled = torch.nn.AdaptiveAvgPool2d(7)(torch.from_numpy(x).permute(2, 0, 1)[None])[0].permute(1, 2, 0)
        found[f"pooled/{height} {width}"], found[f"unpooled/{height} {width}"] = pooled.numpy(), x


def main():
    """Writes the file beside this program."""
    flat = (natural(SIDE, SIDE, 2) // 4 + 90).astype(np.uint8)  # of little contrast
    images = [natural(SIDE, SIDE, 1), flat]
    found = {"images": np.stack(images)}
    operations(found, images)
    resizing(found)
    erasing(found)
    pooling(found)
    software = f"torch {torch.__version__}, torchvision {torchvision.__version__}, Pillow {PIL.__version__}"
    found["software"] = np.array(software)
    np.savez_compressed(Path(__file__).with_name("pixels.npz"), **found)


if __name__ == "__main__":
    main()
