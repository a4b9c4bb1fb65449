"""What each ingredient of a recipe costs: images/s and memory of a full update on synthetic images, with it and without.

    python benchmarks/ingredients.py [--model=vgg16] [--width=1] [--size=224] [--batch=64]
        [--ways=plain,label_smoothing,no_decay,clip_norm,lars,ema,mixup,cutmix,batch_norm,small_groups]
        [--rounds=3] [--warmup=1] [--updates=2]

Micro-batches are of 32 images, and so are the groups of mixing and of BatchNorm; `small_groups` is BatchNorm over groups of
8, four of which stand beside each other as channels. Every turn is a process of its own, one rank on every core; ways take
turns, --rounds times. A turn makes --warmup updates that are not counted (tracing, first touch of memory) and then --updates
that are. Ratios are of one round. Memory is the most that the process has held at once. Augmentations of single images are
measured by augment.py.
"""

import json
import resource
import time

import measure

CLASSES, MICRO_BATCH = 1000, 32
WAYS = {
    "plain": {},
    "label_smoothing": {"label_smoothing": 0.1},
    "no_decay": {"no_decay": ["bias", "norm"]},
    "clip_norm": {"clip_norm": 1.0},
    "lars": {"optimizer": "lars"},
    "ema": {"ema_decay": 0.9999},
    "mixup": {"mixup": 0.2},
    "cutmix": {"cutmix": 1.0},
    "batch_norm": {"norm_batch": MICRO_BATCH},
    "small_groups": {"norm_batch": MICRO_BATCH // 4},
}


def work(options):
    """One turn: prints [images/s, GB] as JSON."""
    import numpy as np
    import tensorflow as tf

    from hvd_vgg.config import TrainConfig
    from hvd_vgg.parallel import comm, cost
    from hvd_vgg.parallel.init import join, take_device
    from hvd_vgg.training.state import initial_state
    from hvd_vgg.training.train_step import make_train_step, step_inputs

    flags = {name: tuple(value) if isinstance(value, list) else value for name, value in WAYS[options.way].items()}
    model = f"{options.model}_bn" if "norm_batch" in flags else options.model
    shape = {"width": options.width, "image_size": options.size, "global_batch": options.batch, "num_classes": CLASSES}
    config = TrainConfig(model=model, device_batch=MICRO_BATCH, mix_batch=MICRO_BATCH, **shape, **flags)
    join()
    device = take_device(config)
    step = make_train_step(initial_state(config), config, device, cost.factored_layers(config, 1))
    random = np.random.default_rng(0)
    images = tf.constant(random.integers(0, 256, (options.batch, options.size, options.size, 3)), tf.uint8)
    labels = tf.constant(random.integers(0, CLASSES, options.batch), tf.int32)
    inputs = step_inputs(config, 0, 0, 1e-4)
    for update in range(options.warmup + options.updates):
        if update == options.warmup:
            began = time.perf_counter()
        float(step(images, labels, *inputs).gradient_norm)
    rate = options.batch * options.updates / (time.perf_counter() - began)
    print(json.dumps([rate, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6]))
    comm.shutdown()


def main():
    """Runs the turns and prints the table."""
    parser = measure.command_line(__doc__, batch=64, size=224, rounds=3, warmup=1, updates=2)
    parser.add_argument("--model", default="vgg16", help="without BatchNorm: vgg11 to vgg19")
    parser.add_argument("--width", type=float, default=1.0, help="of the network's layers")
    parser.add_argument("--ways", type=measure.some_of(WAYS), default=list(WAYS), help=",".join(WAYS))
    options = parser.parse_args()
    if options.batch % MICRO_BATCH:
        measure.refuse(f"--batch={options.batch}: expected a multiple of {MICRO_BATCH}")
    found = {way: [] for way in options.ways}
    for _ in range(options.rounds):
        for way in options.ways:
            found[way].append(json.loads(measure.output_of(measure.worker(options, way=way)).splitlines()[-1]))
    rates, memory = ({way: [row[column] for row in rows] for way, rows in found.items()} for column in (0, 1))
    against = {way: measure.spread(measure.ratios(rates[way], rates.get("plain"))) for way in options.ways}
    measure.print_table(
        f"{options.model} at width {options.width:g}, {options.size} pixels, {options.batch} images an update",
        ["", "images/s", "of plain", "GB"],
        [[way, measure.spread(rates[way], ".1f"), against[way], f"{max(memory[way]):.2f}"] for way in options.ways],
    )


measure.run(main, work)
