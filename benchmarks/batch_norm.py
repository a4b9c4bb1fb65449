"""What BatchNorm costs: images/s and memory of a full update on synthetic images, with it and without, in one process.

    python benchmarks/batch_norm.py [--model=vgg16] [--width=1] [--size=224] [--batch=64] [--ways=plain,one,several]
        [--rounds=3] [--warmup=1] [--updates=2]

    plain    the network without BatchNorm, in micro-batches of 32 images
    one      with BatchNorm, a group of 32 images a micro-batch
    several  with BatchNorm, 4 groups of 8 images a micro-batch, which stand beside each other as channels

Every turn is a process of its own, one rank on every core; ways take turns, --rounds times. A turn makes --warmup updates
that are not counted (tracing, first touch of memory) and then --updates that are. Ratios are of one round. Memory is the
most that the process has held at once.
"""

import json
import resource
import time

import measure

CLASSES, MICRO_BATCH = 1000, 32
WAYS = {"plain": ("", MICRO_BATCH), "one": ("_bn", MICRO_BATCH), "several": ("_bn", MICRO_BATCH // 4)}


def work(options):
    """One turn: prints [images/s, GB] as JSON."""
    import numpy as np
    import tensorflow as tf

    from hvd_vgg.config import TrainConfig
    from hvd_vgg.parallel import comm, cost
    from hvd_vgg.parallel.init import join, take_device
    from hvd_vgg.training.state import initial_state
    from hvd_vgg.training.train_step import make_train_step, step_inputs

    suffix, group = WAYS[options.way]
    shape = {"width": options.width, "image_size": options.size, "global_batch": options.batch, "num_classes": CLASSES}
    config = TrainConfig(model=options.model + suffix, norm_batch=group, device_batch=MICRO_BATCH, **shape)
    join()
    device = take_device(config)
    step = make_train_step(initial_state(config), config, device, cost.factored_layers(config, 1))
    random = np.random.default_rng(0)
    inputs = (
        tf.constant(random.integers(0, 256, (options.batch, options.size, options.size, 3)), tf.uint8),
        tf.constant(random.integers(0, CLASSES, options.batch), tf.int32),
        *step_inputs(config, 0, 0, 1e-4),
    )
    for update in range(options.warmup + options.updates):
        if update == options.warmup:
            began = time.perf_counter()
        float(step(*inputs).gradient_norm)
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
