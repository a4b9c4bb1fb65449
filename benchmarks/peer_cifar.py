"""The recipe of configs/vgg16_bn_cifar10.flags in plain PyTorch: acc@1 after each epoch, to be laid beside ours.

    python benchmarks/peer_cifar.py --data_dir=DIR [--epochs=8] [--seed=1] [--flagfile=FILE] [--set=FLAG=VALUE,...]
        [--images=N] [--quality=Q]

Runs in an environment with torch, NumPy and Pillow, and without TensorFlow or this package: nothing of ours is in it but the
flag file, of which it knows the flags of that config and a few more, and the records, which it reads by lines of its own.
Network, initial weights, augmentation, statistics by groups, schedule and update are the config's; what is drawn is torch's.
--epochs says after how many of the config's to stop, --set which flags to change. Prints a line of JSON after each epoch;
flip is acc@1 from an image and its mirror image, as by --eval_flip.

DIR holds TFRecords, or CIFAR-10's binary version (data_batch_1.bin to test_batch.bin), whose pixels were never compressed;
--quality=75 makes JPEGs of these first, with colours at half resolution.
"""

import argparse
import io
import json
import math
import struct
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

BLOCKS = {"vgg11_bn": (1, 1, 2, 2, 2), "vgg13_bn": (2, 2, 2, 2, 2), "vgg16_bn": (2, 2, 3, 3, 3), "vgg19_bn": (2, 2, 4, 4, 4)}
# What it does as the config says, or what decides nothing here: how often to evaluate, save and log.
KNOWN = {
    "num_classes",
    "image_size",
    "augment",
    "model",
    "norm_batch",
    "width",
    "dropout",
    "label_smoothing",
    "global_batch",
}
KNOWN |= {"device_batch", "epochs", "optimizer", "lr", "lr_schedule", "warmup_epochs", "weight_decay", "momentum"}
KNOWN |= {"eval_every_epochs", "save_every_steps", "log_every_steps", "random_erasing", "cutmix", "precision"}
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def read_flags(path):
    """Returns the flags of a flag file that are numbers or words."""
    lines = [line.strip() for line in Path(path).read_text().splitlines()]
    return dict(line[2:].split("=", 1) for line in lines if line.startswith("--"))


def records_of(path):
    """Yields the contents of a TFRecord file; checksums are not looked at."""
    data, at = path.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        yield data[at + 12 : at + 12 + length]
        at += length + 16


def varint(data, at):
    """Returns (value, position behind it) of a number in protobuf's encoding."""
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 128:
            return value, at


def fields(data):
    """Yields (number, contents) of the fields of a protobuf message that are numbers or bytes."""
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        value, at = varint(data, at)
        if key % 8 == 2:
            value, at = data[at : at + value], at + value
        yield key >> 3, value


def read_split(data_dir, split, most):
    """Returns (images uint8 [n, 32, 32, 3], labels as they are) of the first `most` records."""
    images, labels = [], []
    for record in (record for path in sorted(Path(data_dir).glob(f"{split}-*")) for record in records_of(path)):
        features = {}
        for _, entry in fields(dict(fields(record))[1]):
            name, feature = (value for _, value in fields(entry))
            features[bytes(name)] = [value for _, values in fields(feature) for _, value in fields(values)]
        images.append(np.asarray(Image.open(io.BytesIO(features[b"image/encoded"][0])).convert("RGB")))
        (label,) = features[b"image/class/label"]
        labels.append(label if isinstance(label, int) else varint(label, 0)[0])
        if len(labels) == most:
            break
    return np.stack(images), np.array(labels)


def read_binary(data_dir, split, most):
    """Returns the same from CIFAR-10's binary version: a byte for the label, then red, green and blue, each 32 x 32."""
    names = {"train": "data_batch_*.bin", "validation": "test_batch.bin"}
    rows = [np.fromfile(path, np.uint8).reshape(-1, 3073) for path in sorted(Path(data_dir).glob(names[split]))]
    rows = np.concatenate(rows)[: most or None]
    return np.ascontiguousarray(rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), rows[:, 0].astype(np.int64)


def compressed(images, quality):
    """Returns images as JPEGs of that quality give them back, with colours at half resolution."""
    out = np.empty_like(images)
    for row, image in enumerate(images):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling="4:2:0")
        out[row] = np.asarray(Image.open(file))
    return out


class GroupNorm(nn.BatchNorm2d):
    """BatchNorm of one group at a time; its moving moments take the mean over the groups of an update."""

    groups = ()

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        found = torch.zeros(self.num_features), torch.zeros(self.num_features)
        self.groups = [*self.groups, found]
        return functional.batch_norm(x, *found, self.weight, self.bias, True, 1.0, self.eps)

    def end_update(self):
        """Moves the moments."""
        for moving, new in zip((self.running_mean, self.running_var), zip(*self.groups)):
            moving.lerp_(sum(new) / len(new), self.momentum)
        self.groups = ()


def make_network(flags):
    """Returns VGG with BatchNorm for 32 pixels, with the initial deviations of hvd_vgg/models/architecture.py."""

    def scaled(units):
        return max(4, 4 * round(units * float(flags.get("width", 1)) / 4))

    layers, inputs = [], 3
    for count, channels in zip(BLOCKS[flags["model"]], (64, 128, 256, 512, 512)):
        for _ in range(count):
            convolution = nn.Conv2d(inputs, scaled(channels), 3, padding=1)
            inputs = scaled(channels)
            nn.init.normal_(convolution.weight, std=(2 / (9 * inputs)) ** 0.5)
            layers += [convolution, GroupNorm(inputs), nn.ReLU(True)]
        layers.append(nn.MaxPool2d(2))
    layers.append(nn.Flatten())
    hidden, classes = scaled(4096), int(flags["num_classes"])
    for outputs, full in ((hidden, 7 * 7 * 512), (hidden, 4096), (classes, 4096)):
        dense = nn.Linear(inputs, outputs)
        nn.init.normal_(dense.weight, std=0.01 * (full / inputs) ** 0.5)
        layers += [dense, nn.ReLU(True), nn.Dropout(float(flags["dropout"]))]
        inputs = outputs
    network = nn.Sequential(*layers[:-2])
    for layer in network:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.zeros_(layer.bias)
    return network.to(memory_format=torch.channels_last)


def normalized(images):
    """Returns uint8 images [n, 32, 32, 3] as a network takes them."""
    scaled = (images.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(DEVIATION)
    return torch.from_numpy(scaled).permute(0, 3, 1, 2)


def augmented(images, random):
    """Returns them shifted by up to 4 pixels, black where nothing was, and flipped or not."""
    padded = np.pad(images, [(0, 0), (4, 4), (4, 4), (0, 0)])
    out = np.empty_like(images)
    tops, lefts = random.integers(0, 9, (2, len(images)))
    for row, (top, left, flip) in enumerate(zip(tops, lefts, random.integers(0, 2, len(images)))):
        image = padded[row, top : top + 32, left : left + 32]
        out[row] = image[:, ::-1] if flip else image
    return out


def erase(images, chance, random):
    """Fills a rectangle of some images with the mean colour, in place (hvd_vgg/data/augment.py)."""
    for row in np.flatnonzero(random.random(len(images)) < chance):
        for _ in range(10):
            area, ratio = 1024 * random.uniform(0.02, 0.33), math.exp(random.uniform(math.log(0.3), math.log(3.3)))
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if height < 32 and width < 32:
                top, left = random.integers(0, 33 - height), random.integers(0, 33 - width)
                images[row, top : top + height, left : left + width] = (124, 116, 104)
                break


def cut_and_mix(inputs, targets, alpha, random):
    """Gives each of a group's images a box of its neighbour, and its target the box's share of the neighbour's, in place."""
    height, width = inputs.shape[2:]
    half = math.sqrt(1 - random.beta(alpha, alpha)) / 2
    y, x = random.integers(0, height), random.integers(0, width)
    top, bottom = max(0, int(y - half * height)), min(height, int(y + half * height))
    left, right = max(0, int(x - half * width)), min(width, int(x + half * width))
    inputs[:, :, top:bottom, left:right] = inputs.roll(1, 0)[:, :, top:bottom, left:right]
    targets.lerp_(targets.roll(1, 0), (bottom - top) * (right - left) / (height * width))


def learning_rate(step, flags, records, total):
    """Returns the rate of an update: warm-up, then half a cosine to 0, as hvd_vgg/training/schedule.py."""
    lr, warmup = float(flags["lr"]), math.ceil(float(flags["warmup_epochs"]) * records / int(flags["global_batch"]))
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


@torch.no_grad()
def accuracies(network, images, labels):
    """Returns acc@1 by the moving moments, and from the mean of the posteriors of an image and its mirror image."""
    network.eval()
    hits = np.zeros(2)
    for low in range(0, len(labels), 250):
        inputs, wanted = normalized(images[low : low + 250]), torch.from_numpy(labels[low : low + 250])
        logits, mirrored = network(inputs), network(inputs.flip(3))
        hits += [int((each.argmax(1) == wanted).sum()) for each in (logits, logits.softmax(1) + mirrored.softmax(1))]
    network.train()
    return hits / len(labels)


def main():
    """Trains and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True)
    config = Path(__file__).parent.parent / "configs" / "vgg16_bn_cifar10.flags"
    for name, default in (("epochs", 8), ("seed", 1), ("flagfile", str(config)), ("set", ""), ("images", 0), ("quality", 0)):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    options = parser.parse_args()
    flags = read_flags(options.flagfile)
    flags.update(each.split("=", 1) for each in options.set.split(",") if each)
    if {*flags} - KNOWN:
        parser.error(f"{options.flagfile}: this script does not know what {', '.join(sorted({*flags} - KNOWN))} does")
    read = read_binary if (Path(options.data_dir) / "test_batch.bin").exists() else read_split
    (images, labels), (test_images, test_labels) = (
        read(options.data_dir, split, options.images) for split in ("train", "validation")
    )
    if options.quality:
        images, test_images = compressed(images, options.quality), compressed(test_images, options.quality)
    first = labels.min()  # 1 where labels are those of ImageNet's files
    labels, test_labels = labels - first, test_labels - first
    batch, group, records = int(flags["global_batch"]), int(flags["norm_batch"]), len(labels)
    classes = int(flags["num_classes"])
    torch.manual_seed(options.seed)
    random = np.random.default_rng(options.seed)
    network = make_network(flags)
    momentum, decay = float(flags.get("momentum", 0.9)), float(flags["weight_decay"])
    sgd = torch.optim.SGD(network.parameters(), float(flags["lr"]), momentum, weight_decay=decay, nesterov=True)
    total, smoothing = math.ceil(float(flags["epochs"]) * records / batch), float(flags.get("label_smoothing", 0))
    erasing, alpha = float(flags.get("random_erasing", 0)), float(flags.get("cutmix", 0))
    half = torch.autocast("cpu", torch.bfloat16, enabled=flags.get("precision") == "bfloat16")
    stream, step, began, losses = np.array([], np.int64), 0, time.monotonic(), []
    for epoch in range(1, options.epochs + 1):
        while step < math.ceil(epoch * records / batch):
            if len(stream) < batch:  # epochs are laid end to end
                stream = np.concatenate([stream, *(random.permutation(records) for _ in range(-(-batch // records)))])
            ids, stream = stream[:batch], stream[batch:]
            shown = augmented(images[ids], random)
            if erasing:
                erase(shown, erasing, random)
            inputs, targets = normalized(shown), functional.one_hot(torch.from_numpy(labels[ids]), classes).float()
            sgd.zero_grad()
            for part in range(0, batch, group):
                seen, wanted = inputs[part : part + group], targets[part : part + group]
                if alpha:
                    cut_and_mix(seen, wanted, alpha, random)
                with half:
                    logits = network(seen)
                loss = functional.cross_entropy(logits.float(), wanted, reduction="sum", label_smoothing=smoothing) / batch
                loss.backward()
                losses.append(loss.item())
            sgd.param_groups[0]["lr"] = learning_rate(step, flags, records, total)
            sgd.step()
            for layer in network:
                if isinstance(layer, GroupNorm):
                    layer.end_update()
            step += 1
        mean = sum(losses) * batch / group / len(losses)
        plain, flipped = accuracies(network, test_images, test_labels)
        row = {"epoch": epoch, "acc@1": plain, "flip": flipped, "train.loss": mean}
        print(json.dumps({**row, "step": step, "seconds": round(time.monotonic() - began, 1)}), flush=True)
        losses = []


if __name__ == "__main__":
    main()
