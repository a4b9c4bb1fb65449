"""Every flag, once: its default, unit, range and meaning, in sections. A command's configuration is the sections it uses.

Sections are dataclasses that are combined by inheritance: a function asks for the section it needs, and may be given any
configuration that has it. What takes a ModelConfig takes a TrainConfig too, but cannot read its learning rate.
"""

import dataclasses
import glob
import math
import os
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Sequence, Set, Tuple

from hvd_vgg.flags import flag, format_value, hyperparameter, same_flag, words

BITS, ROUNDING = "bits", "rounding"  # of --reproducible
MOST_FEATURE_BYTES = 64  # of the name of a feature
MOST_MICRO_BATCHES = 4095  # for which sums in fixed point are made
_PLAIN = {"vgg11": (1, 1, 2, 2, 2), "vgg13": (2, 2, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
# Convolutions in each of the five blocks, which all end with 2x2 max pooling (Simonyan and Zisserman, arXiv 1409.1556, table
# 1, columns A, B, D and E). Those ending in _bn normalize the outputs of each before its ReLU.
BLOCKS = {**_PLAIN, **{f"{name}_bn": blocks for name, blocks in _PLAIN.items()}}
DENSE = ("fc1", "fc2", "predictions")
_DRAWN_CLASSES = 10  # of `make-demo-data`
# Weights that flags name as a group: biases; gamma and beta of BatchNorm.
WEIGHT_GROUPS = ("bias", "norm")
LARS = "lars"  # of --optimizer
FLATTENED, POOLED = "flattened", "pooled"  # of --head
_NORMALIZATIONS = ("auto", "imagenet", "caffe", "caffe_rounded")
TABLES = (".csv", ".jsonl")  # suffixes of files with predictions
DECAYING = ("cosine", "polynomial")  # of --lr_schedule: what depends on the length of the run


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network: what decides the shapes of its weights, and the images it takes."""

    num_classes: int = hyperparameter(1000, "Data", "Classes; a label outside them is an error.", at_least=2)
    image_size: int = hyperparameter(224, "Data", "Height and width of the network's input.", "pixels", at_least=32)
    model: str = hyperparameter("vgg16", "Model", "The network; those ending in _bn have BatchNorm.", choices=tuple(BLOCKS))
    width: float = hyperparameter(1.0, "Model", "Multiplier on the width of every layer.", above=0.0, at_most=4.0)
    head: str = hyperparameter(
        FLATTENED,
        "Model",
        "What follows the convolutions. flattened: VGG's fc1, fc2 and predictions, of the whole last feature map; pooled: "
        "predictions alone, of its mean (global average pooling), the same weights for any --image_size.",
        choices=(FLATTENED, POOLED),
    )


@dataclasses.dataclass(frozen=True)
class ExchangeConfig(ModelConfig):
    """The global batch of a network, and how its gradients are exchanged."""

    global_batch: int = hyperparameter(
        256,
        "Recipe",
        "Images per update, over all ranks; it does not change with the number of ranks.",
        "images",
        at_least=1,
    )
    train_only: Tuple[str, ...] = hyperparameter(
        (),
        "Model",
        "Layers to train, or what their names begin with, separated by commas: fc,predictions or block5,fc,predictions. The "
        "others are frozen: no gradient, exchange or momentum; BatchNorm uses and keeps its moving moments. Empty: all.",
    )
    exchange: str = hyperparameter(
        "auto",
        "Device",
        "How the gradients of dense layers are exchanged: allreduce sums them; factored gathers their factors; auto "
        "takes, layer by layer, whichever is faster by --link_flops_per_byte. The results are equal to rounding.",
        choices=("auto", "allreduce", "factored"),
    )
    link_flops_per_byte: float = flag(
        1000.0,
        "Device",
        "FLOPs (float32) that a rank computes while its host's link carries one byte. For --exchange=auto: each rank "
        "multiplies gathered factors of the whole global batch. `hvd-vgg plan` prints a cluster's own.",
        "FLOP/byte",
        above=0.0,
    )
    wire_dtype: str = hyperparameter(
        "float32",
        "Device",
        "Type of the numbers sent. float16 halves the bytes and rounds; its sums depend on the number of ranks.",
        choices=("float32", "float16"),
    )

    def conflicts(self) -> Iterator[str]:
        """Yields the combinations that cannot run."""
        yield from _unknown_layers(self, "train_only", self.train_only)


@dataclasses.dataclass(frozen=True)
class UpdateConfig:
    """One update of the weights, from its gradients."""

    dropout: float = hyperparameter(
        0.5,
        "Model",
        "Fraction of the outputs of each hidden dense layer that is dropped.",
        at_least=0.0,
        below=1.0,
    )
    norm_batch: int = hyperparameter(
        32,
        "Model",
        "Images whose statistics BatchNorm normalizes with in training: consecutive positions of the global batch, whole on "
        "one rank. Must divide --device_batch and --global_batch. Evaluation uses moving averages of all.",
        "images",
        at_least=2,
    )
    label_smoothing: float = hyperparameter(
        0.0,
        "Recipe",
        "Share of the target, such as 0.1, that is spread evenly over all classes, in training; evaluation's loss has none.",
        at_least=0.0,
        below=1.0,
    )
    mixup: float = hyperparameter(
        0.0,
        "Recipe",
        "Alpha of mixup, such as 0.2: each image is blended with its neighbour by a share drawn from Beta(alpha, alpha). 0: "
        "never.",
        at_least=0.0,
        at_most=1.0,
    )
    cutmix: float = hyperparameter(
        0.0,
        "Recipe",
        "Alpha of CutMix, such as 1: a box of each image is its neighbour's, its area drawn from Beta(alpha, alpha). With "
        "--mixup too, either has an equal chance. 0: never.",
        at_least=0.0,
        at_most=1.0,
    )
    mix_batch: int = hyperparameter(
        32,
        "Recipe",
        "Images that share a draw of --mixup and --cutmix and are mixed among each other: consecutive positions of the "
        "global batch, whole on one rank. Must divide --device_batch and --global_batch.",
        "images",
        at_least=2,
    )
    optimizer: str = hyperparameter(
        "momentum",
        "Recipe",
        "SGD with momentum, or Nesterov's; lars: a rate for each weight tensor by its norm, for batches of thousands.",
        choices=("momentum", "nesterov", LARS),
    )
    momentum: float = hyperparameter(0.9, "Recipe", "Momentum.", at_least=0.0, below=1.0)
    lr_multipliers: Tuple[str, ...] = hyperparameter(
        (),
        "Recipe",
        "LAYER:FACTOR pairs, separated by commas: block:0.1,predictions:10. The rate of layers whose name is or begins with "
        "LAYER is multiplied; of several that fit the longest counts. Empty: one rate for all.",
    )
    weight_decay: float = hyperparameter(
        1e-4,
        "Recipe",
        "L2 penalty on all weights and biases but those of --no_decay, added to the gradient.",
        at_least=0.0,
    )
    no_decay: Tuple[str, ...] = hyperparameter(
        (),
        "Recipe",
        "Weights without decay, separated by commas: bias, of all layers; norm, gamma and beta of BatchNorm.",
        choices=WEIGHT_GROUPS,
    )
    clip_norm: float = hyperparameter(
        0.0,
        "Recipe",
        "Gradients whose global norm is larger are scaled down to it; the norm in the log is that before. 0: never.",
        at_least=0.0,
    )
    lars_eta: float = hyperparameter(
        0.001, "Recipe", "Of --optimizer=lars: the trust coefficient, the factor of all its rates.", above=0.0
    )
    lars_skip: Tuple[str, ...] = hyperparameter(
        ("bias", "norm"),
        "Recipe",
        "Of --optimizer=lars: weights that have the plain rate and no decay, named as for --no_decay.",
        choices=WEIGHT_GROUPS,
    )
    ema_decay: float = hyperparameter(
        0.0,
        "Recipe",
        "Decay, such as 0.9999, of an exponential moving average of all weights, which is evaluated beside them and has a "
        "best checkpoint of its own; (1 + n) / (10 + n) in update n while that is less. 0: none.",
        at_least=0.0,
        below=1.0,
    )
    seed: int = hyperparameter(
        1,
        "Recipe",
        "Initial weights, order of records, augmentation and dropout are functions of it.",
        at_least=0,
    )
    xla: bool = flag(False, "Device", "Compile each rank's forward and backward pass with XLA; for GPUs.")

    def conflicts(self) -> Iterator[str]:
        """Yields the combinations that cannot run."""
        if self.optimizer == "nesterov" and self.momentum == 0:
            yield "--optimizer=nesterov needs --momentum above 0"


@dataclasses.dataclass(frozen=True)
class ImageConfig(ModelConfig):
    """What training makes of an image, and how it is resized."""

    augment: str = hyperparameter(
        "crop",
        "Data",
        "none; flip; shift: pad by an eighth, random crop, flip; crop: random-resized crop of area 0.08 to 1, flip.",
        choices=("none", "flip", "shift", "crop"),
    )
    auto_augment: str = hyperparameter(
        "none",
        "Data",
        "What is done to an image after crop and flip. trivial: one random operation of 14 (TrivialAugment, wide space).",
        choices=("none", "trivial"),
    )
    color_jitter: float = hyperparameter(
        0.0,
        "Data",
        "Strength x, such as 0.4, of random brightness, contrast and saturation, in random order: factors of max(0, 1 - x) "
        "to 1 + x. 0: none.",
        at_least=0.0,
        at_most=10.0,
    )
    pca_lighting: float = hyperparameter(
        0.0,
        "Data",
        "Standard deviation, such as 0.1, of the random amount of each principal component of ImageNet's colours that is "
        "added. 0: none.",
        at_least=0.0,
        at_most=10.0,
    )
    random_erasing: float = hyperparameter(
        0.0,
        "Data",
        "Probability, such as 0.1, that a random rectangle, of 0.02 to 0.33 of the image, is filled with the mean colour.",
        at_least=0.0,
        at_most=1.0,
    )
    pixel_normalization: str = hyperparameter(
        "auto",
        "Data",
        "What is made of RGB pixels first. imagenet: minus ImageNet's mean, divided by its deviation (torchvision, timm); "
        "caffe: minus Caffe's mean (keras.applications); caffe_rounded: as torchvision rounds "
        "that (IMAGENET1K_FEATURES). auto: what the weights of --init_from expect, else imagenet.",
        choices=_NORMALIZATIONS,
    )
    resize: str = hyperparameter(
        "opencv",
        "Data",
        "Bilinear filter of training and evaluation. opencv: OpenCV's. pillow: Pillow's, antialiased, for weights of "
        "torchvision and timm and for comparisons with them; two fifths fewer images/s are decoded.",
        choices=("opencv", "pillow"),
    )


@dataclasses.dataclass(frozen=True)
class ComputeConfig(ImageConfig):
    """Settings of every command that runs the network on images."""

    run_dir: str = flag("./run", "Run", "Directory for checkpoints, logs and results; created if missing.", "path")
    console: str = flag(
        "auto",
        "Run",
        "What rank 0 prints: bar (for a terminal); lines (for a log file); dllogger: DLLogger's lines; auto: bar or lines.",
        choices=("auto", "bar", "lines", "dllogger"),
    )
    hang_seconds: float = flag(
        0.0,
        "Run",
        "A rank whose update takes longer is considered hung: it writes a hang report and ends the job with 75. 0: 20 "
        "times the median update, at least 60. Starting, evaluating and saving may take 10 times as long.",
        "seconds",
        at_least=0.0,
    )
    device_batch: int = hyperparameter(
        32,
        "Device",
        "Images in a micro-batch, a multiple of --norm_batch and --mix_batch where they are used: a rank with a larger "
        "share of the global batch computes several in turn. With --reproducible=bits a rank computes whole micro-batches, "
        "so that there must be one for each rank, and on a CPU up to 8 side by side, which need their memory each.",
        "images",
        at_least=1,
    )
    reproducible: str = hyperparameter(
        BITS,
        "Device",
        "What is equal on any number of ranks. bits: every bit of the state, on processors and devices of one "
        "kind (docs/reproducibility.md). rounding: the result to float rounding; parts of the global batch differ by one "
        "image at most, or by a group of --norm_batch or --mix_batch.",
        choices=(BITS, ROUNDING),
    )
    compute_threads: int = flag(
        0,
        "Device",
        "CPU threads that one operation may use. 0: with --reproducible=bits 1, and a rank computes as many micro-batches "
        "side by side as it has cores, 8 at most; else the rank's share of the host's cores.",
        "threads",
        at_least=0,
        at_most=1024,
    )
    precision: str = hyperparameter(
        "float32",
        "Device",
        "Type the network is computed in. Weights, updates and softmax are always float32, and so are sums over "
        "micro-batches and ranks, or 32-bit fixed point; float16 scales its loss and skips an update whose gradient "
        "overflows (a loss that overflows ends the run).",
        choices=("float32", "bfloat16", "float16"),
    )
    input_threads: int = flag(
        0,
        "Device",
        "Threads per rank that read and decode images; 0: the rank's share of the host's cores, less one for Horovod if "
        "it has more than two. At most A = 2 + ceil(8 threads / images per rank) batches are decoded ahead; 4 more are "
        "read ahead into the page cache. Images do not depend on it.",
        "threads",
        at_least=0,
        at_most=1024,
    )


@dataclasses.dataclass(frozen=True)
class StepConfig(ExchangeConfig, UpdateConfig, ComputeConfig):
    """Everything that the compiled train step depends on."""

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with each other."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def group_batch(self) -> int:
        """Consecutive positions of the global batch that are computed together: whole groups of BatchNorm and mixing."""
        norm, mix = self.norm_batch if has_batch_norm(self.model) else 1, self.mix_batch if self.mixes else 1
        return norm * mix // math.gcd(norm, mix)

    def conflicts(self) -> Iterator[str]:
        """Yields the combinations that cannot run."""
        if self.reproducible == BITS and self.wire_dtype != "float32":
            yield f"--wire_dtype={self.wire_dtype} needs --reproducible={ROUNDING}: its sums depend on the number of ranks"
        if self.reproducible == BITS and self.global_batch > MOST_MICRO_BATCHES * self.device_batch:
            enough = -(-self.global_batch // MOST_MICRO_BATCHES)
            least = f"at least {enough}, so that there are {MOST_MICRO_BATCHES} micro-batches at most"
            yield f"--device_batch={self.device_batch}: expected {least}"
        groups = {"norm_batch": has_batch_norm(self.model), "mix_batch": self.mixes}
        for group in (name for name, used in groups.items() if used):
            for name in ("device_batch", "global_batch"):
                if getattr(self, name) % getattr(self, group):
                    yield f"--{name}={getattr(self, name)}: expected a multiple of --{group}={getattr(self, group)}"
        try:
            factors = multipliers(self.lr_multipliers)
        except ValueError as error:
            yield f"--lr_multipliers={format_value(self.lr_multipliers)}: {error}"
        else:
            yield from _unknown_layers(self, "lr_multipliers", tuple(factors))
        if self.reproducible == BITS and self.xla:
            yield f"--xla needs --reproducible={ROUNDING}: XLA has no deterministic gradient of max pooling"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The records, and what to do about bad ones."""

    data_dir: str = flag(
        "./imagenet_tfrecord",
        "Data",
        "Directory (or a link to one) with the records of both splits, in a layout of --data_format.",
        "path",
    )
    data_format: str = flag(
        "auto",
        "Data",
        "imagenet: TFRecords train-?????-of-?????; tfds: NAME-train.tfrecord-?????-of-?????, of tensorflow-datasets; "
        "webdataset: NAME-train-0000.tar; folders: train/CLASS/*.jpg; validation likewise, in train/ and validation/ too. "
        "auto: detected from the files.",
        choices=("auto", "imagenet", "tfds", "webdataset", "folders"),
    )
    train_pattern: str = flag(
        "",
        "Data",
        "Names of the shards to train on, below --data_dir, such as images-*.tfrecord, or of the directory that has one for "
        "each class; empty: those of the layout.",
    )
    validation_pattern: str = flag("", "Data", "As --train_pattern, for validation.")
    image_feature: str = flag("", "Data", "Feature of TFRecords that holds the encoded image; empty: the layout's.")
    label_feature: str = flag("", "Data", "Feature of TFRecords that holds the label; empty: the layout's.")
    label_base: str = flag(
        "auto",
        "Data",
        "Label of the first class: 1 (ImageNet's own files, where 0 is background), 0, or auto: the layout's, or found from "
        "the data.",
        choices=("auto", "0", "1"),
    )
    bad_records_allowed: int = flag(
        0,
        "Data",
        "Bad records (checksum, features, label or image) that a run may continue without, per split: in training each is "
        "replaced by another record, the same on any number of ranks; in evaluation each counts as a miss. One more ends "
        "the run. A run may be continued with another number.",
        "records",
        at_least=0,
    )

    def conflicts(self) -> Iterator[str]:
        """Yields the combinations that cannot run."""
        for name in ("train_pattern", "validation_pattern"):
            parts = Path(getattr(self, name)).parts
            if parts and (parts[0] == os.sep or ".." in parts):
                yield f"--{name}={getattr(self, name)}: expected names below --data_dir"
        for name in ("image_feature", "label_feature"):
            value = getattr(self, name)
            if len(os.fsencode(value)) > MOST_FEATURE_BYTES or not value.isprintable():
                yield f"--{name}={ascii(value)[:80]}: expected at most {MOST_FEATURE_BYTES} bytes, all of them printable"
            if value and self.data_format in ("webdataset", "folders"):
                yield f"--{name} is for TFRecords, not --data_format={self.data_format}"


@dataclasses.dataclass(frozen=True)
class TrainDataConfig(DataConfig):
    """The records to train on, and the order they are read in."""

    shuffle_block_records: int = hyperparameter(
        1,
        "Data",
        "For storage where random reads are slow: blocks of this many consecutive records are permuted as a whole, then "
        "the records within windows of 16384 // this many blocks, at least two. Each host reads whole blocks one window "
        "ahead; two windows of ImageNet take 3.6 GB of its page cache. 1: all records are permuted freely.",
        "records",
        at_least=1,
        at_most=2**31,
    )


@dataclasses.dataclass(frozen=True)
class RecipeConfig:
    """The length of a run and its learning rate."""

    epochs: float = hyperparameter(90.0, "Recipe", "Length of the run, when --steps is 0.", "epochs", above=0.0, at_most=1e5)
    steps: int = hyperparameter(
        0,
        "Recipe",
        "Length of the run; 0: as many as --epochs needs.",
        "updates",
        at_least=0,
        at_most=99_999_999,
    )
    lr: float = hyperparameter(0.01, "Recipe", "Learning rate after warm-up, for the mean gradient.", above=0.0)
    lr_schedule: str = hyperparameter(
        "step",
        "Recipe",
        "constant; step: divided by 10 at each of --lr_step_epochs; cosine, polynomial: to --lr_min at the end.",
        choices=("constant", "step", "cosine", "polynomial"),
    )
    lr_step_epochs: Tuple[float, ...] = hyperparameter(
        (30.0, 60.0),
        "Recipe",
        "Epochs at which --lr_schedule=step divides the rate, separated by commas.",
        "epochs",
    )
    lr_min: float = hyperparameter(
        0.0, "Recipe", "Learning rate at the end of --lr_schedule=cosine or polynomial.", at_least=0.0
    )
    lr_power: float = hyperparameter(2.0, "Recipe", "Exponent of --lr_schedule=polynomial; 1: a straight line.", above=0.0)
    lr_base_batch: int = hyperparameter(
        0,
        "Recipe",
        "The global batch that --lr, --lr_min and --warmup_lr are meant for: they are multiplied by --global_batch / this. "
        "0: they are as given.",
        "images",
        at_least=0,
    )
    warmup_epochs: float = hyperparameter(0.0, "Recipe", "Length of the linear warm-up.", "epochs", at_least=0.0)
    warmup_lr: float = hyperparameter(0.0, "Recipe", "Learning rate from which the warm-up rises.", at_least=0.0)

    def conflicts(self) -> Iterator[str]:
        """Yields the combinations that cannot run."""
        boundaries = self.lr_step_epochs
        if any(later <= earlier for earlier, later in zip((0.0,) + boundaries, boundaries)):
            yield f"--lr_step_epochs={format_value(boundaries)}: expected rising numbers above 0"
        if self.lr_schedule == "step" and not boundaries:
            yield "--lr_schedule=step needs --lr_step_epochs"
        decays, warms_up = self.lr_schedule in DECAYING, self.warmup_epochs > 0
        for name, rate, used in (("lr_min", self.lr_min, decays), ("warmup_lr", self.warmup_lr, warms_up)):
            if used and rate > self.lr:
                yield f"--{name}={format_value(rate)}: expected at most --lr={format_value(self.lr)}"
        if not self.steps and self.warmup_epochs >= self.epochs:
            warmup, epochs = format_value(self.warmup_epochs), format_value(self.epochs)
            yield f"--warmup_epochs={warmup}: expected less than --epochs={epochs}"


@dataclasses.dataclass(frozen=True)
class EvaluationImageConfig(ImageConfig):
    """What training and evaluation make of an image."""

    eval_crop: float = flag(
        0.875,
        "Data",
        "Side of the central square that is evaluated, relative to the image's shorter side. Only with --augment=crop.",
        "fraction",
        above=0.0,
        at_most=1.0,
    )
    eval_size: int = flag(
        0,
        "Data",
        "Height and width of the images that are evaluated; where they differ from --image_size, the last feature map is "
        "averaged to that of --image_size. Time and memory grow as its square. 0: --image_size. Only with --augment=crop.",
        "pixels",
        at_least=0,
        at_most=4096,
    )

    @property
    def evaluated_size(self) -> int:
        """Height and width of the images that are evaluated, in pixels."""
        return self.eval_size or self.image_size

    @property
    def evaluated_crop(self) -> float:
        """Side of the central square that is evaluated, relative to the shorter side; 0: the whole image is."""
        return self.eval_crop if self.augment == "crop" else 0.0

    def conflicts(self) -> Iterator[str]:
        """Yields the combinations that cannot run."""
        if 0 < self.eval_size < 32:
            yield f"--eval_size={self.eval_size}: expected at least 32 pixels, or 0 for --image_size"
        if self.augment != "crop":
            for name, value in (("eval_crop", self.eval_crop), ("eval_size", self.eval_size)):
                if value != EvaluationImageConfig.__dataclass_fields__[name].default:
                    why = f"--augment={self.augment} evaluates whole images, as it trains on them"
                    yield f"--{name}={format_value(value)} needs --augment=crop: {why}"


@dataclasses.dataclass(frozen=True)
class ScoringConfig(EvaluationImageConfig, ComputeConfig):
    """Everything that the scores of an image depend on, beside the weights."""

    eval_flip: bool = flag(
        False, "Data", "Evaluate each image and its mirror image, and average the probabilities; takes twice the time."
    )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig(DataConfig, ScoringConfig):
    """Everything that an evaluation depends on, beside the weights."""

    predictions_file: str = flag(
        "",
        "Run",
        "Keep what is predicted for each record, of a run by its last evaluation, in this file, NAME.csv or NAME.jsonl: "
        "record, place, label, hits, the 5 likeliest classes and their probabilities. Empty: none.",
        "path",
    )

    def conflicts(self) -> Iterator[str]:
        """Yields the combinations that cannot run."""
        yield from _table_conflicts("predictions_file", self.predictions_file)


@dataclasses.dataclass(frozen=True)
class BatchConfig(TrainDataConfig, StepConfig):
    """Everything that one rank's updates depend on, beside the learning rate."""


@dataclasses.dataclass(frozen=True)
class TrainConfig(RecipeConfig, BatchConfig, EvaluationConfig):
    """What a run is: with the data, everything that decides its result."""

    init_from: str = flag(
        "",
        "Model",
        "Weights to begin with: a file of this package, torchvision, timm or Keras, or the directory of a run, whose best "
        "checkpoint is taken. Layers that it lacks, and predictions of another number of classes, are new. A run that is "
        "continued takes nothing from it. Empty: none.",
        "path",
    )
    init_layers: Tuple[str, ...] = hyperparameter(
        (), "Model", "Layers to take from --init_from, named as for --train_only; the others are new. Empty: all."
    )
    resume: str = flag(
        "auto",
        "Run",
        "auto: continue from the newest checkpoint in --run_dir, if any; required: there must be one; never: there must "
        "be none.",
        choices=("auto", "required", "never"),
    )
    allow_config_change: str = flag(
        "",
        "Run",
        "Flags that may differ from those of the checkpoint to continue from, separated by commas: lr,weight_decay.",
    )
    eval_every_epochs: float = flag(
        1.0, "Run", "Evaluate this often, and at the end; 0: only at the end.", "epochs", at_least=0.0
    )
    save_every_steps: int = flag(
        1000,
        "Run",
        "Checkpoint this often; also at the end and at every evaluation better than all before.",
        "updates",
        at_least=0,
    )
    save_every_minutes: float = flag(
        0.0,
        "Run",
        "Checkpoint also at the first log line that is this long after the newest checkpoint; 0: never. `hvd-vgg plan` "
        "advises how long. What is learned does not depend on it.",
        "minutes",
        at_least=0.0,
    )
    expect_hosts: int = flag(
        0,
        "Run",
        "Hosts that the ranks must be on; on fewer or more the run is refused, but for a restart by `launch` on those that "
        "still answer. For jobs whose ranks a host file is to place, such as Kubernetes'. 0: any number.",
        "hosts",
        at_least=0,
    )
    keep_checkpoints: int = flag(
        3, "Run", "Newest checkpoints to keep; the best is kept as well, and that of the average.", at_least=1
    )
    checkpoint_copy_dir: str = flag(
        "",
        "Run",
        "Directory of this run alone, on another disk, for a second copy of each checkpoint; used at a restart where those "
        "in --run_dir are gone or damaged. A copy that fails is a warning. Empty: none.",
        "path",
    )
    log_every_steps: int = flag(20, "Run", "One log line per this many.", "updates", at_least=1)
    verbose: bool = flag(
        False, "Run", "Print at the end where the time of each rank went, too; the log and result.json have it in any case."
    )
    metrics_file: str = flag(
        "",
        "Run",
        "At each log line rank 0 rewrites this file, NAME.prom, in Prometheus' text format, for the textfile collector of a "
        "node exporter. Empty: none.",
        "path",
    )
    stop_at_top1: float = flag(
        0.0, "Run", "End when an evaluation reaches this acc@1; 0: never.", "fraction", at_least=0.0, at_most=1.0
    )
    reference_curve: str = flag(
        "",
        "Run",
        "EPOCH:ACC@1 pairs of a published run of this recipe, such as 10:0.30,20:0.42: evaluations are compared with the "
        "line through them, and a run far below it warns, once. What is learned does not depend on it. Empty: none.",
    )
    on_nonfinite: str = flag(
        "stop",
        "Run",
        "When a loss, gradient or moment of BatchNorm is not finite (such an update is never applied): stop: end with 81; "
        "rewind: return to the newest checkpoint and skip that step's records. Either way the step is kept for `hvd-vgg "
        "replay`.",
        choices=("stop", "rewind"),
    )
    max_rewinds: int = flag(2, "Run", "Most steps that --on_nonfinite=rewind skips, over all starts.", at_least=1)
    profile_steps: str = flag(
        "",
        "Run",
        "FIRST:LAST, such as 100:110: profile these updates into --run_dir/profile (TensorFlow's profile of "
        "--profile_ranks, Horovod's timeline of all ranks as rank 0 sees them).",
        "updates",
    )
    profile_ranks: Tuple[int, ...] = flag(
        (0,), "Run", "Ranks whose TensorFlow is profiled, separated by commas.", at_least=0
    )
    device_tflops: float = flag(
        0.0,
        "Device",
        "Peak of one device, to print what fraction of it training reaches; 0: unknown.",
        "TFLOP/s",
        at_least=0.0,
    )
    drift_every_steps: int = flag(
        500, "Device", "Compare the weights of all ranks this often, exactly; 0: never.", "updates", at_least=0
    )

    def conflicts(self) -> Iterator[str]:
        """Yields the combinations that cannot run."""
        if self.profile_steps and not profiled_steps(self.profile_steps):
            yield f"--profile_steps={self.profile_steps}: expected FIRST:LAST, two integers, the first not larger"
        if self.reference_curve and not reference_points(self.reference_curve):
            yield (
                f"--reference_curve={self.reference_curve}: expected EPOCH:ACC@1 pairs such as 10:0.30,20:0.42, with rising "
                f"epochs and fractions from 0 to 1"
            )
        if self.checkpoint_copy_dir and _is_inside(self.checkpoint_copy_dir, self.run_dir):
            yield f"--checkpoint_copy_dir={self.checkpoint_copy_dir}: expected a directory outside --run_dir"
        if self.metrics_file and Path(self.metrics_file).suffix != ".prom":
            yield f"--metrics_file={self.metrics_file}: expected a name that ends in .prom, which collectors read alone"
        yield from _unknown_layers(self, "init_layers", self.init_layers)
        if self.init_layers and not self.init_from:
            yield "--init_layers needs --init_from"
        for name in sorted(allowed_changes(self) - set(hyperparameters())):
            allowed = ", ".join(hyperparameters())
            yield f"--allow_config_change={self.allow_config_change}: {name} is not among {allowed}"


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(EvaluationConfig):
    """Which checkpoint of a run to evaluate, and on what; the defaults are the run's own flags."""

    checkpoint: str = flag("best", "Evaluate", "best, newest, or the path of a .safetensors file of this package.", "path")
    average: bool = flag(
        False, "Evaluate", "Evaluate the moving average of the weights (--ema_decay), and its own best checkpoint."
    )
    weights: str = flag(
        "",
        "Evaluate",
        "A file of weights, or the directory of a run, whose best checkpoint is meant; the flags of network and pixels "
        "default to its own. Nothing else is read of a run. Empty: the run in --run_dir.",
        "path",
    )

    def conflicts(self) -> Iterator[str]:
        """Yields the combinations that cannot run."""
        if self.weights and self.checkpoint != EvaluateConfig.__dataclass_fields__["checkpoint"].default:
            yield f"--checkpoint={self.checkpoint} is of --run_dir: leave it out with --weights={self.weights}"


@dataclasses.dataclass(frozen=True)
class PredictConfig(ScoringConfig):
    """Which images to predict the classes of, and by which weights."""

    images: Tuple[str, ...] = words("Predict", "Images (JPEG, PNG), or directories with images in and below them.", "IMAGE")
    weights: str = flag(
        "", "Predict", "As for `evaluate`: a file of weights, or the directory of a run. Empty: --run_dir.", "path"
    )
    average: bool = flag(
        False, "Predict", "Predict by the moving average of the weights (--ema_decay), and its own best checkpoint."
    )
    top: int = flag(5, "Predict", "How many classes of each image to name, the likeliest ones.", "classes", at_least=1)
    names_file: str = flag(
        "",
        "Predict",
        "Names of the classes, a line each, in order of their numbers; an ImageNet WNID gets its name. Empty: those of the "
        "run that the weights are of; else ImageNet's, of 1000 classes.",
        "path",
    )
    out: str = flag(
        "",
        "Predict",
        "Write path, rank, class, name and probability, a line for each class of each image, into this file, NAME.csv or "
        "NAME.jsonl, in place of printing them.",
        "path",
    )

    def conflicts(self) -> Iterator[str]:
        """Yields the combinations that cannot run."""
        yield from _table_conflicts("out", self.out)
        if self.console == "dllogger":
            yield "--console=dllogger is for train; --out writes what is predicted"


@dataclasses.dataclass(frozen=True)
class ReplayConfig(StepConfig):
    """Which non-finite step to repeat; the defaults are the flags it was kept with."""

    step: int = flag(-1, "Replay", "The step to repeat; -1: the latest that was not finite.", at_least=-1)


@dataclasses.dataclass(frozen=True)
class VerifyConfig:
    """What `verify-run` checks."""

    run_dir: str = flag("./run", "Verify", "The run's directory.", "path")
    data_dir: str = flag(
        "",
        "Verify",
        "The run's data: its newest and its best checkpoint are evaluated again. Empty: they are not.",
        "path",
    )
    same_as: str = flag("", "Verify", "Another run's directory: whether the two are the same, or where they part.", "path")
    hits_tolerance: int = flag(
        0,
        "Verify",
        "Hits by which an evaluation here may differ from the run's: on other processors rounding alone moves a few.",
        "records",
        at_least=0,
    )


@dataclasses.dataclass(frozen=True)
class PlanConfig(ExchangeConfig):
    """The network to train, and the cluster it is planned for."""

    ranks: int = flag(8, "Plan", "Ranks of the job.", "ranks", at_least=1)
    ranks_per_host: int = flag(1, "Plan", "Ranks that share a host and its link.", "ranks", at_least=1)
    gbit: float = flag(25.0, "Plan", "Bandwidth of a host's link.", "Gbit/s", above=0.0)
    fps_per_rank: float = flag(
        150.0,
        "Plan",
        "Throughput of one rank alone, without exchange, with the same --train_only.",
        "images/s",
        above=0.0,
    )
    link_flops_per_byte: float = flag(
        0.0, "Plan", "As for `train`; 0: this cluster's, from --gbit and --fps_per_rank.", "FLOP/byte", at_least=0.0
    )
    sweep_ranks: Tuple[int, ...] = flag(
        (), "Plan", "Also predict efficiency on these numbers of ranks, at the same images per rank.", "ranks", at_least=1
    )
    save_seconds: float = flag(
        0.0,
        "Plan",
        "Time that training waits for a checkpoint, `saving` of a run's goodput divided by its checkpoints; with "
        "--failure_hours: advise how often to save. 0: unknown.",
        "seconds",
        at_least=0.0,
    )
    failure_hours: float = flag(
        0.0, "Plan", "Mean time between failures of the whole job; 0: unknown.", "hours", at_least=0.0
    )
    out: str = flag(
        "",
        "Plan",
        "Draw the sweep into this picture (.png, .svg, .pdf), or all that is printed into this page (.html), which without "
        "--sweep_ranks has that of 1, 2, 4, ... ranks. Needs matplotlib.",
        "path",
    )

    def conflicts(self) -> Iterator[str]:
        """Yields the combinations that cannot run."""
        if self.global_batch < self.ranks:
            yield f"--global_batch={self.global_batch}: expected at least one image for each of --ranks={self.ranks}"
        if self.out and Path(self.out).suffix not in (".png", ".svg", ".pdf", ".html"):
            yield f"--out={self.out}: expected a name that ends in .png, .svg, .pdf or .html"
        elif self.out and Path(self.out).suffix != ".html" and not self.sweep_ranks:
            yield "--out of a picture needs --sweep_ranks"
        if (self.save_seconds > 0) != (self.failure_hours > 0):
            yield "--save_seconds and --failure_hours need each other"
        if self.save_seconds >= 3600 * self.failure_hours > 0:
            yield f"--save_seconds={format_value(self.save_seconds)}: expected less than --failure_hours"


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig(BatchConfig):
    """What to train, and how to measure it."""

    lr: float = same_flag(RecipeConfig, "lr")
    device_tflops: float = same_flag(TrainConfig, "device_tflops")
    steps: int = flag(0, "Benchmark", "Updates measured per row; 0: 30.", "updates", at_least=0, at_most=99_999_999)
    ranks: Tuple[int, ...] = flag(
        (), "Benchmark", "Measure on these numbers of the ranks started; empty: on all.", "ranks", at_least=1
    )
    out: str = flag(
        "", "Benchmark", "Write the measurements into this file: .json, or .html, a page with figures by matplotlib.", "path"
    )

    def conflicts(self) -> Iterator[str]:
        """Yields the combinations that cannot run."""
        if self.steps == 1:
            yield "--steps=1: expected at least 2 updates to measure, or 0 for the usual number"
        if self.console == "dllogger":
            yield "--console=dllogger is for train; --out writes the measurements"
        if self.out and Path(self.out).suffix not in (".json", ".html"):
            yield f"--out={self.out}: expected a name that ends in .json or .html"


# Unknown host keys are refused, never added automatically: a host's key has to come from its administrator.
RSH_AGENT = "ssh -o BatchMode=yes -o ConnectTimeout=5 -o StrictHostKeyChecking=yes"


@dataclasses.dataclass(frozen=True)
class DoctorConfig(TrainConfig):
    """The configuration of the run to come, and what else to check."""

    full: bool = flag(False, "Doctor", "Read, check and decode every record; keeps the index for the run.")
    collectives: bool = flag(
        False, "Doctor", "Sum and gather gradients of the network's own shapes: correct, how fast, and as `plan` assumes?"
    )
    host_only: bool = flag(
        False,
        "Doctor",
        "Check neither data nor links to other hosts: what `launch` runs on each host before it restarts a run.",
    )
    hostfile: str = flag(
        "",
        "Doctor",
        "Without mpirun, before it is used: does each host in this file answer, and can it connect back?",
        "path",
    )
    rsh_agent: str = flag(RSH_AGENT, "Doctor", "Remote shell to other hosts, as for `launch`.", "command")
    network: str = flag("", "Doctor", "With --hostfile: networks or interfaces between hosts, as for `launch`.")
    join_seconds: float = flag(
        8.0, "Doctor", "How long a rank waits for all others to start and be reached.", "seconds", above=0.0
    )
    gbit: float = flag(
        0.0,
        "Doctor",
        "Bandwidth of a host's link, as given to `plan`; 0: unknown, nothing is compared.",
        "Gbit/s",
        at_least=0.0,
    )
    out: str = flag("", "Doctor", "Write the findings into this file, as JSON.", "path")

    def conflicts(self) -> Iterator[str]:
        """Yields the combinations that cannot run."""
        if not self.hostfile:
            for name, value, default in (("network", self.network, ""), ("rsh_agent", self.rsh_agent, RSH_AGENT)):
                if value != default:
                    yield f"--{name}={value} needs --hostfile; ranks get it from hvd-vgg launch --{name}={value} doctor"


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """How a command is started on many ranks."""

    ranks: int = flag(
        0,
        "Ranks",
        "Number of ranks; 0: one for each slot of --hostfile, or each device TensorFlow sees here.",
        at_least=0,
    )
    hostfile: str = flag(
        "",
        "Ranks",
        "Hosts, one per line: `name slots=N` for N ranks on it. Each must have this Python, the data and the run "
        "directory under the same paths. Empty: all ranks are on this host.",
        "path",
    )
    rsh_agent: str = flag(
        RSH_AGENT,
        "Ranks",
        "Remote shell to other hosts, called as `AGENT HOST COMMAND`; split at spaces. A host with an unknown key is "
        "refused.",
        "command",
    )
    network: str = flag(
        "",
        "Ranks",
        "Networks or interfaces between hosts, where they have several: 10.1.0.0/16 or eth1. MPI keeps to them; so does "
        "NCCL if all are names (NCCL_SOCKET_IFNAME, unless it is set): it does not accept networks.",
    )
    export_env: str = flag(
        "",
        "Ranks",
        "Names of more environment variables for ranks on other hosts, separated by commas. They always get PATH, "
        "LD_LIBRARY_PATH, LD_PRELOAD, PYTHON*, TMPDIR, TZ, LANG, LC_*, TERM, COLUMNS, NO_COLOR, OMP_*, KMP_*, XLA_FLAGS, "
        "HOROVOD_*, TF_*, NCCL_*, CUDA_*, UCX_*, GLOO_* and Iluvatar's UMD_*, CRT_*, DRT_* and COREX_VISIBLE_DEVICES, but "
        "nothing named token, key, secret, pass or cred.",
    )
    max_restarts: int = flag(
        3,
        "Supervision",
        "How often `train` is restarted after it hung (75), was preempted (80) or was killed by a signal (128 plus its "
        "number), on the hosts that still answer. Two failures at the same step without a new checkpoint end it.",
        at_least=0,
    )
    check_hosts: bool = flag(
        True,
        "Supervision",
        "With several hosts, run `doctor --host_only` on each before a restart: devices, memory, run directory. A host that "
        "fails it is left out of that start; one with two faults of its own, for good. Slots beyond --ranks are spare.",
    )
    grace_seconds: float = flag(
        60.0,
        "Supervision",
        "On SIGTERM, SIGINT, SIGHUP or SIGUSR1 to the launcher all ranks save and exit; after this long they are killed.",
        "seconds",
        above=0.0,
    )
    time_limit_seconds: float = flag(
        0.0,
        "Supervision",
        "After this long, restarts included, all ranks save and exit, and the exit code is 75; 0: never.",
        "seconds",
        at_least=0.0,
    )
    dry_run: bool = flag(False, "Supervision", "Print the command; start nothing.")

    def conflicts(self) -> Iterator[str]:
        """Yields the combinations that cannot run."""
        for name in self.export_env.split(","):
            if name and not name.isidentifier():
                yield f"--export_env={self.export_env}: {name!r} is not a variable's name; values do not belong here"


@dataclasses.dataclass(frozen=True)
class AcceptanceConfig(BatchConfig):
    """The network, data and ranks that a host or cluster is tried with."""

    run_dir: str = flag("./acceptance", "Run", "Directory for the results; new or empty.", "path")
    data_dir: str = flag(
        "", "Data", "Shards to measure with, as for `train`; empty: pictures that are drawn for the purpose.", "path"
    )
    device_batch: int = same_flag(ComputeConfig, "device_batch", 16)  # so that 256 images are enough for 16 ranks
    half_precision: str = flag(
        "auto",
        "Acceptance",
        "16-bit type that is measured beside --precision. auto: float16 on GPUs; on CPUs bfloat16 if the processor has "
        "instructions for it, else none.",
        choices=("auto", "none", "bfloat16", "float16"),
    )
    updates: int = flag(200, "Acceptance", "Updates measured for each throughput.", "updates", at_least=2, at_most=100_000)
    equal_steps: int = flag(
        8, "Acceptance", "Steps trained on each number of ranks, to compare states.", "updates", at_least=2, at_most=100_000
    )
    stage_minutes: float = flag(
        120.0, "Acceptance", "A stage of ranks that takes longer is ended; not with --gloo.", "minutes", above=0.0
    )
    device_tflops: float = same_flag(TrainConfig, "device_tflops")
    gbit: float = same_flag(DoctorConfig, "gbit")
    ranks: int = same_flag(LaunchConfig, "ranks")
    hostfile: str = same_flag(LaunchConfig, "hostfile")
    rsh_agent: str = same_flag(LaunchConfig, "rsh_agent")
    network: str = same_flag(LaunchConfig, "network")
    export_env: str = same_flag(LaunchConfig, "export_env")
    gloo: bool = flag(
        False,
        "Ranks",
        "Start ranks by `horovodrun --gloo`, on this host, for a Horovod without MPI; no stage has a time limit.",
    )
    dry_run: bool = flag(False, "Acceptance", "Print the commands; start nothing.")

    def conflicts(self) -> Iterator[str]:
        """Yields the combinations that cannot run."""
        if self.reproducible != BITS:
            yield f"--reproducible={self.reproducible}: states on several numbers of ranks are equal under {BITS} alone"
        if self.console == "dllogger":
            yield "--console=dllogger is for train"
        if self.num_classes < _DRAWN_CLASSES:
            yield f"--num_classes={self.num_classes}: expected at least {_DRAWN_CLASSES}, those of drawn pictures"
        if self.label_base != "auto" and not self.data_dir:
            yield f"--label_base={self.label_base} needs --data_dir: labels of drawn pictures are known"
        if self.gloo and (self.hostfile or self.network or self.export_env):
            yield "--gloo is for the ranks of one host, without --hostfile, --network and --export_env"


@dataclasses.dataclass(frozen=True)
class InspectConfig(DataConfig, EvaluationImageConfig):
    """The data to look at, and what training makes of its images."""

    seed: int = same_flag(UpdateConfig, "seed")
    run_dir: str = same_flag(ComputeConfig, "run_dir")
    console: str = same_flag(ComputeConfig, "console")
    input_threads: int = same_flag(ComputeConfig, "input_threads")
    out: str = flag(
        "",
        "Inspect",
        "Draw a sheet into this file (.png): records as they are, as training sees them in its first epochs, and as "
        "evaluation does.",
        "path",
    )
    json: str = flag("", "Inspect", "Write all that is found into this file, as JSON.", "path")
    sheet_records: int = flag(
        8,
        "Inspect",
        "Rows of --out: the first records that training takes with this --seed, bad ones left out.",
        "records",
        at_least=1,
        at_most=100,
    )
    sheet_epochs: int = flag(
        4, "Inspect", "Epochs of --out whose training images are shown.", "epochs", at_least=1, at_most=20
    )

    def conflicts(self) -> Iterator[str]:
        """Yields the combinations that cannot run."""
        if self.out and Path(self.out).suffix != ".png":
            yield f"--out={self.out}: expected a name that ends in .png"
        if self.out and self.json and Path(self.out).absolute() == Path(self.json).absolute():
            yield f"--out={self.out} and --json={self.json}: expected two files"
        if self.console == "dllogger":
            yield "--console=dllogger is for train; --json writes what is found"


@dataclasses.dataclass(frozen=True)
class RunsConfig:
    """Where `runs` looks."""

    dir: str = flag("./runs", "Run", "Directory with runs, below which they may lie anywhere.", "path")


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Which runs `report` shows, and where it writes the page."""

    run_dirs: Tuple[str, ...] = words("Report", "Directories of runs; several are shown side by side.", "RUN_DIR")
    out: str = flag("report.html", "Report", "The page: a single file, which loads nothing.", "path")
    watch: bool = flag(False, "Report", "Renew the page while a run trains; end when none does.")
    watch_seconds: float = flag(30.0, "Report", "Time between renewals of --watch.", "s", at_least=1)

    def conflicts(self) -> Iterator[str]:
        if not self.run_dirs:
            yield "no RUN_DIR: expected hvd-vgg report RUN_DIR [RUN_DIR ...]"
        if Path(self.out).suffix != ".html":  # no file of a run has such a name, so that none can be overwritten
            yield f"--out={self.out}: expected a name that ends in .html"


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """What `make-demo-data` draws."""

    data_dir: str = flag("./demo_data", "Data", "Directory to write the shards into; created if missing.", "path")
    train_images: int = flag(4000, "Data", "Images to train on.", "images", at_least=10)
    validation_images: int = flag(1000, "Data", "Images to evaluate on.", "images", at_least=10)
    shards: int = flag(4, "Data", "Files of the train split; the validation split has half as many.", at_least=1)
    image_size: int = flag(80, "Data", "Mean height and width; drawn from 0.75 to 1.25 of it.", "pixels", at_least=32)
    seed: int = flag(1, "Data", "Seed of the generated images.", at_least=0)
    console: str = flag("auto", "Run", "Progress as a bar or as lines.", choices=("auto", "bar", "lines"))

    def conflicts(self) -> Iterator[str]:
        """Yields the combinations that cannot run."""
        if self.shards > min(self.train_images, 2 * self.validation_images - 1):
            yield f"--shards={self.shards}: expected at least one image for each shard of both splits"


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """What `prepare` reads, and what it makes of it."""

    source: str = flag(
        "./imagenet",
        "Data",
        "What to convert: a directory in a layout of --data_format, or one archive or Parquet file with --splits of one.",
        "path",
    )
    out: str = flag(
        "./imagenet_tfrecord", "Data", "Directory to write to; new, empty, or begun by the same command.", "path"
    )
    data_format: str = flag(
        "auto",
        "Data",
        "Layout of --source: those of training; ilsvrc: ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar; parquet: of "
        "Hugging Face, train-*.parquet and validation-*.parquet. auto: detected from the files.",
        choices=("auto", "imagenet", "tfds", "webdataset", "folders", "ilsvrc", "parquet"),
    )
    train_pattern: str = same_flag(DataConfig, "train_pattern")
    validation_pattern: str = same_flag(DataConfig, "validation_pattern")
    image_feature: str = flag(
        "", "Data", "Feature of TFRecords, or column of Parquet, that holds the encoded image; empty: the layout's."
    )
    label_feature: str = flag(
        "", "Data", "Feature of TFRecords, or column of Parquet, that holds the label; empty: the layout's."
    )
    label_base: str = same_flag(DataConfig, "label_base")
    validation_labels: str = flag(
        "",
        "Data",
        "Labels of ILSVRC2012_img_val.tar: Caffe's list (NAME LABEL, from 0 in WNID order), a list of WNIDs in order of the "
        "images' names, or the development kit (a directory or .tar.gz). Empty: the kit beside the archive.",
        "path",
    )
    splits: Tuple[str, ...] = flag(
        ("train", "validation"), "Data", "Splits to convert, separated by commas.", choices=("train", "validation")
    )
    train_shards: int = flag(
        1024, "Prepare", "Files of the train split; fewer if it has fewer records.", "files", at_least=1, at_most=99_999
    )
    validation_shards: int = flag(
        128, "Prepare", "Files of the validation split; fewer if it has fewer records.", "files", at_least=1, at_most=99_999
    )
    classes: Tuple[str, ...] = flag(
        (),
        "Prepare",
        "Names of the classes to keep, separated by commas, of a name with commas what precedes the first; labels are "
        "numbered anew. Empty: all.",
    )
    records_per_class: int = flag(
        0, "Prepare", "Records to keep of each class and split, the first ones; 0: all.", "records", at_least=0
    )
    shorter_side: int = flag(
        0,
        "Prepare",
        "Images whose shorter side is larger are resized to it (antialiased) and encoded anew; 0: their bytes stay.",
        "pixels",
        at_least=0,
        at_most=65_500,
    )
    quality: int = flag(
        90, "Prepare", "JPEG quality of images that --shorter_side encodes anew.", "of 100", at_least=1, at_most=100
    )
    rgb_jpeg: bool = flag(
        True,
        "Prepare",
        "Make RGB JPEGs of quality 100 of CMYK JPEGs, of PNGs whose name ends in .jpg or .jpeg, and of what is neither JPEG "
        "nor PNG. Otherwise the former stay as they are, and the last are refused.",
    )
    seed: int = flag(
        1, "Prepare", "The order of training records from sources that are sorted by class is a function of it.", at_least=0
    )
    bad_records_allowed: int = flag(
        0,
        "Prepare",
        "Records that may be refused, of all splits together. All others are written in any case; with more the exit code "
        "is 65, and the same command with a larger number ends the work.",
        "records",
        at_least=0,
    )
    input_threads: int = flag(
        0,
        "Prepare",
        "Threads per rank, each of which writes a file; 0: the rank's share of the host's cores. The files do not depend on "
        "it.",
        "threads",
        at_least=0,
        at_most=1024,
    )
    console: str = flag("auto", "Run", "Progress as a bar or as lines.", choices=("auto", "bar", "lines"))

    def data(self, data_format: str = "auto") -> DataConfig:
        """Returns what `layout.find_split` needs to look into --source."""
        names = ("train_pattern", "validation_pattern", "image_feature", "label_feature", "label_base")
        return DataConfig(data_dir=self.source, data_format=data_format, **{name: getattr(self, name) for name in names})

    def of_file(self, path: Path) -> DataConfig:
        """Returns what `layout.find_split` needs to find one file."""
        name = glob.escape(path.name)
        config = self.data(self.data_format)
        return dataclasses.replace(config, data_dir=str(path.parent), train_pattern=name, validation_pattern=name)

    def conflicts(self) -> Iterator[str]:
        """Yields the combinations that cannot run."""
        if _is_inside(self.out, self.source):
            yield f"--out={self.out}: expected a directory outside --source"
        if not self.splits:
            yield "--splits is empty: expected train, validation or both"
        if len(set(self.classes)) == 1:
            yield f"--classes={self.classes[0]}: expected at least two classes, as training does"
        own = ("auto", "ilsvrc", "parquet")
        yield from self.data("auto" if self.data_format in own else self.data_format).conflicts()
        if self.quality != PrepareConfig.__dataclass_fields__["quality"].default and not self.shorter_side:
            yield f"--quality={self.quality} needs --shorter_side: without it no image is encoded anew"
        if self.validation_labels and "validation" not in self.splits:
            yield "--validation_labels needs --splits with validation"


def layer_names(config: ModelConfig) -> List[str]:
    """Returns the names of a network's layers, in forward order."""
    blocks = enumerate(BLOCKS[config.model], start=1)
    convolutions = [f"block{block}_conv{number}" for block, count in blocks for number in range(1, count + 1)]
    return [*convolutions, *(DENSE if config.head == FLATTENED else DENSE[-1:])]


def fits_any(layer: str, beginnings: Iterable[str]) -> bool:
    """Returns whether the name of a layer begins with one of `beginnings`, as those of --train_only."""
    return any(layer.startswith(beginning) for beginning in beginnings)


def multipliers(pairs: Sequence[str]) -> Dict[str, float]:
    """Returns the factors of --lr_multipliers by what names of layers begin with; raises ValueError where one is none."""
    factors = {}
    for pair in pairs:
        name, _, text = pair.partition(":")
        try:
            factors[name] = float(text)
        except ValueError:
            factors[name] = math.nan
        if not (name and 0 < factors[name] < math.inf):
            raise ValueError(f"expected LAYER:FACTOR, such as block:0.1, with a factor above 0; found {pair}")
    if len(factors) < len(pairs):
        raise ValueError("expected each LAYER once")
    return factors


def _unknown_layers(config: ModelConfig, flag_name: str, beginnings: Tuple[str, ...]) -> Iterator[str]:
    names = layer_names(config) if config.model in BLOCKS else []
    for beginning in beginnings if names else ():
        if not any(name.startswith(beginning) for name in names):
            known = f"{names[0]} to {names[-len(DENSE) - 1]}, {', '.join(names[-len(DENSE) :])}"
            if config.head == POOLED:
                known = f"{names[0]} to {names[-2]}, {names[-1]} (--head={POOLED} has no others)"
            yield f"--{flag_name}: no layer of {config.model} begins with {beginning}; expected names of {known}"


def _table_conflicts(name: str, path: str) -> Iterator[str]:
    if path and Path(path).suffix not in TABLES:
        yield f"--{name}={path}: expected a name that ends in {' or '.join(TABLES)}"


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """The network to export, and the form to write it in."""

    weights: str = flag(
        "./run", "Export", "A run's directory, of which the best checkpoint is taken, or a file of weights.", "path"
    )
    to: str = flag(
        "savedmodel",
        "Export",
        "savedmodel: TensorFlow's, a directory; keras_h5: .h5 for VGG16(weights=PATH) of Keras 2 and 3; onnx: .onnx; torch: "
        "the state of torchvision's networks, .safetensors or .pth; safetensors: this package's own, for --weights and "
        "--init_from.",
        choices=("savedmodel", "keras_h5", "onnx", "torch", "safetensors"),
    )
    out: str = flag(
        "./export", "Export", "Directory of --to=savedmodel, or file of the others, to write; it must not exist yet.", "path"
    )
    average: bool = flag(
        False, "Export", "Export the moving average of the weights (--ema_decay), and its own best checkpoint."
    )
    fold_batch_norm: bool = flag(
        False,
        "Export",
        "Fold BatchNorm into the convolutions before it: the same network without it. --to=savedmodel and keras_h5 always "
        "do.",
    )
    data_dir: str = flag(
        "",
        "Export",
        "Data whose first validation records the export is checked on. Empty: those of the run, or drawn pictures where "
        "they cannot be read.",
        "path",
    )
    check_images: int = flag(
        8, "Export", "Images that the export is checked on; 0: it is not checked.", "images", at_least=0, at_most=1024
    )
    check_python: str = flag(
        "",
        "Export",
        "Python interpreter of another environment, in which the library that the export is for is installed. Empty: this "
        "one.",
        "path",
    )

    def conflicts(self) -> Iterator[str]:
        """Yields the combinations that cannot run."""
        endings = {"keras_h5": (".h5",), "onnx": (".onnx",), "torch": (".safetensors", ".pth", ".pt")}
        endings["safetensors"] = (".safetensors",)
        ending = Path(self.out).suffix
        if Path(self.out).absolute().name in ("", ".."):
            yield f"--out={self.out}: expected the name of what is to be written"
        elif ending not in endings.get(self.to, (ending,)):
            yield f"--out={self.out}: expected a name that ends in {' or '.join(endings[self.to])}, for --to={self.to}"
        elif self.to == "keras_h5" and self.out.endswith(".weights.h5"):
            yield f"--out={self.out}: names that end in .weights.h5 are another format to Keras 3: expected another .h5"


def has_batch_norm(model: str) -> bool:
    """Returns whether the convolutions of `model` are followed by BatchNorm."""
    return model.endswith("_bn")


def hyperparameters() -> List[str]:
    """Returns the names of the flags that decide what is learned; --allow_config_change may name them."""
    return [field.name for field in dataclasses.fields(TrainConfig) if field.metadata.get("hyperparameter")]


def allowed_changes(config: TrainConfig) -> Set[str]:
    """Returns the names in --allow_config_change."""
    return {name.strip() for name in config.allow_config_change.split(",") if name.strip()}


def _is_inside(path: str, folder: str) -> bool:
    """Returns whether a path is a directory or lies in it, whatever links lead there."""
    inner, outer = Path(os.path.realpath(path)), Path(os.path.realpath(folder))  # unlike resolve(), of a loop of links too
    return outer in (inner, *inner.parents)


def profiled_steps(text: str) -> range:
    """Returns the updates that --profile_steps names, first and last included; empty if `text` is empty or invalid."""
    first, _, last = text.partition(":")
    return range(int(first), int(last) + 1) if first.isdecimal() and last.isdecimal() else range(0)


def reference_points(text: str) -> List[Tuple[float, float]]:
    """Returns the (epoch, acc@1) pairs that --reference_curve names; empty if `text` is empty or invalid."""
    try:
        points = [(float(epoch), float(top1)) for epoch, top1 in (pair.split(":") for pair in text.split(","))]
    except ValueError:
        return []
    rising = all(before < after for (before, _), (after, _) in zip(points, points[1:]))
    valid = all(math.isfinite(epoch) and epoch >= 0 and 0 <= top1 <= 1 for epoch, top1 in points)
    return points if rising and valid else []


def unused_hyperparameters(config: TrainConfig) -> Dict[str, str]:
    """Returns the hyperparameters that decide nothing beside the others, each with what makes it so."""
    schedule, optimizer = f"with --lr_schedule={config.lr_schedule}", f"with --optimizer={config.optimizer}"
    unused = {
        "lr_step_epochs": schedule if config.lr_schedule != "step" else "",
        "lr_min": schedule if config.lr_schedule not in DECAYING else "",
        "lr_power": schedule if config.lr_schedule != "polynomial" else "",
        "warmup_lr": "" if config.warmup_epochs else "without --warmup_epochs",
        "norm_batch": "" if has_batch_norm(config.model) else f"with --model={config.model}",
        "dropout": "" if config.head == FLATTENED else f"with --head={config.head}",
        "mix_batch": "" if config.mixes else "without --mixup and --cutmix",
        "no_decay": "" if config.weight_decay else "with --weight_decay=0",
        "lars_eta": optimizer if config.optimizer != LARS else "",
        "lars_skip": optimizer if config.optimizer != LARS else "",
    }
    return {name: reason for name, reason in unused.items() if reason}


def fingerprint(config: TrainConfig) -> Dict[str, Any]:
    """Returns the values that decide what is learned, as JSON holds them; a checkpoint is continued only under equal ones.

    The length of the run is one of them only under `cosine` and `polynomial`: with the other schedules a longer run begins
    as the shorter one did, and may continue it.
    """
    unused = unused_hyperparameters(config)
    chosen = {name: getattr(config, name) for name in hyperparameters() if name not in unused}
    if config.lr_schedule not in DECAYING:
        del chosen["epochs"], chosen["steps"]
    del chosen["exchange"]  # the layers that it chooses are compared instead: `run_fingerprint`
    if config.reproducible != BITS:
        del chosen["device_batch"]
    return {name: sorted(value) if isinstance(value, tuple) else value for name, value in chosen.items()}  # in any order
