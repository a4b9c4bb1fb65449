"""Bytes and seconds of each way to exchange VGG16's gradients, between hosts made of network namespaces.

    sudo env PATH="$PATH" python benchmarks/exchange.py [--hosts=2] [--mbit=300] [--images=1] [--rounds=3] [--quick]
    sudo env PATH="$PATH" python benchmarks/exchange.py --hosts=2 --mbit=500 --efficiency=0.68
    python benchmarks/exchange.py --hosts=2 --shared

Needs root and iproute2 (`ip`, `tc`). Makes --hosts namespaces joined by a bridge, each with a link of --mbit in either
direction, runs one rank of VGG16 on each by mpirun, and removes them whatever happens. All ways run in one job, in turn,
--rounds times, so that what disturbs the machine disturbs all of them, in float32:

    local       updates from each rank's own gradient: no exchange
    horovod     what Horovod documents: DistributedGradientTape
    allreduce   --exchange=allreduce
    factored    --exchange=factored
    factored16  --exchange=factored --wire_dtype=float16 --reproducible=rounding

Prints megabytes sent by a rank in an update (the interface's counter), seconds of an update, efficiency (the time of `local`
over that of the way, in one round), and what `hvd-vgg plan` predicts from the local time and the rate that the link has when
it is busy both ways: from "all overlaps" to "nothing does". --images is per rank; above --device_batch they are worked
through in turn, in parts of equal size, and `horovod`, whose bytes do not depend on them, is left out. --efficiency searches
for the images a rank at which `horovod` has that efficiency, and measures there. --shared puts all ranks on this host
instead, where they communicate through its memory; no root is needed then, and no bytes are counted.
"""

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import measure
from namespaces import Hosts, missing

WAYS = ("local", "horovod", "allreduce", "factored", "factored16")


def main():
    """Makes the hosts, searches if asked, runs the job in them and prints the table."""
    parser = measure.command_line(__doc__, rounds=3, images=1, size=224, steps=2)
    parser.add_argument("--hosts", type=measure.positive, default=2)
    parser.add_argument("--mbit", type=float, default=300.0, help="rate of a host's link, each way")
    parser.add_argument("--device_batch", type=measure.positive, default=8)
    parser.add_argument("--width", type=float, default=1.0, help="multiplier on the width of every layer")
    parser.add_argument("--ways", type=measure.some_of(WAYS), default=",".join(WAYS), help="these beside local")
    parser.add_argument("--efficiency", type=float, help="search for the images at which horovod has it, such as 0.68")
    parser.add_argument("--shared", action="store_true", help="--hosts ranks on this host, through its memory")
    parser.add_argument("--quick", action="store_true", help="2 hosts, 1 image, 1 update a turn, 2 rounds: 5 minutes")
    options = parser.parse_args()
    if options.quick:
        options.hosts, options.images, options.steps, options.rounds = 2, 1, 1, 2
    options.ways = ["local", *(way for way in options.ways if way != "local")]
    measure.require("mpirun")
    if not options.shared and missing(("ip", "tc")):
        measure.refuse(f"needs {missing(('ip', 'tc'))}, or --shared")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        options.out = f"{folder}/result.json"
        hosts = None if options.shared else stack.enter_context(Hosts(options.hosts, Path(folder), options.mbit))
        launcher = hosts.mpirun() if hosts else measure.mpirun(options.hosts)
        if options.efficiency:
            options.images = options.device_batch = search(options, launcher)
        report(options, **run_job(options, launcher))


def run_job(options, launcher):
    """Runs the ways on all ranks; returns what rank 0 measured."""
    if options.images > options.device_batch and "horovod" in options.ways:
        options.ways.remove("horovod")
        print(f"horovod: --images={options.images} is above --device_batch={options.device_batch}: left out")
    job = measure.start([*launcher, *measure.worker(options)])
    if job.wait():
        measure.refuse(f"the job ended with {job.returncode}, as said above", 1)
    return json.loads(Path(options.out).read_text())


def search(options, launcher):
    """Returns the images a rank at which `horovod` comes nearest to the efficiency wanted; prints each trial."""
    trial = argparse.Namespace(**{**vars(options), "ways": ["local", "horovod"], "steps": 1, "rounds": 1})
    tried, images, low, high = {}, options.images, 0, 128
    while images not in tried and len(tried) < 6:
        trial.images = trial.device_batch = images
        seconds = run_job(trial, launcher)["seconds"]
        local, exchanged = seconds["local"][0], seconds["horovod"][0]
        tried[images] = local / exchanged
        print(f"search: {images} images a rank: horovod {tried[images]:.1%} of local updates", flush=True)
        if abs(tried[images] - options.efficiency) < 0.03:
            break
        low, high = (images, high) if tried[images] < options.efficiency else (low, images)
        # As the plan has it: a third of computing, which grows with the images, comes before anything can be sent.
        sending = exchanged - local / 3
        guess = round(images * sending / local / (1 / options.efficiency - 1 / 3))
        images = guess if low < guess < high else (low + high) // 2
    return min(tried, key=lambda count: abs(tried[count] - options.efficiency))


def config_of(options, way="local"):
    """Returns the configuration of a way."""
    from hvd_vgg.config import TrainConfig

    images = options.images
    device_batch = next(count for count in range(min(images, options.device_batch), 0, -1) if images % count == 0)
    shape = {"image_size": options.size, "width": options.width, "device_batch": device_batch}
    exchange = "factored" if way.startswith("factored") else "allreduce"
    wire = {"wire_dtype": "float16", "reproducible": "rounding"} if way == "factored16" else {}
    # An operation uses a host's share of the cores in every way.
    threads = max(1, (os.cpu_count() or 1) // options.hosts)
    return TrainConfig(global_batch=images * options.hosts, **shape, **wire, exchange=exchange, compute_threads=threads)


class Alone:
    """A process set of this rank alone, within which nothing is sent."""

    @staticmethod
    def size():
        return 1


def make_step(way, state, device, options):
    """Returns the function (images, labels, position, keys, lr) -> gradient norm that updates the weights in a way."""
    import horovod.tensorflow as hvd
    import tensorflow as tf

    from hvd_vgg.config import DENSE
    from hvd_vgg.models import vgg
    from hvd_vgg.parallel import comm
    from hvd_vgg.training.backward import draw_dropout_masks
    from hvd_vgg.training.optimizer import GRADIENT_LIMITS, apply_update
    from hvd_vgg.training.train_step import make_train_step

    weights, slots = state.weights, state.slots
    config, names = config_of(options, way), list(weights)
    if way != "horovod":
        group, factored = comm.Group(Alone) if way == "local" else comm.WORLD, DENSE if config.exchange == "factored" else []
        own = {name: slot for name, slot in slots.items() if config.reproducible == "bits" or name != GRADIENT_LIMITS}
        step = make_train_step(state._replace(slots=own), config, device, factored, group)
        return lambda *inputs: step(*inputs).gradient_norm

    def mean_gradients(images, labels, position, keys):
        masks = draw_dropout_masks(weights, config, images, position, keys)
        with tf.GradientTape() as tape:
            logits = vgg.logits(weights, "vgg16", images, "NHWC", masks=masks, dropout=config.dropout)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        return hvd.DistributedGradientTape(tape).gradient(loss, list(weights.values()))

    @tf.function
    def step(images, labels, position, keys, lr):
        gradients = mean_gradients(images, labels, position, keys)
        apply_update(weights, slots, dict(zip(names, gradients)), lr, config)
        return tf.sqrt(2.0 * tf.add_n([tf.nn.l2_loss(gradient) for gradient in gradients]))

    return step


def work(options):
    """Runs the ways in turn on one rank; rank 0 writes seconds and bytes of each turn."""
    import numpy as np
    import tensorflow as tf

    from hvd_vgg.parallel import comm, init
    from hvd_vgg.training.state import initial_state
    from hvd_vgg.training.train_step import step_inputs

    init.join()
    # Each host would compute on all cores of this machine.
    device = init.take_device(config_of(options))._replace(micro_batches=1)
    random = np.random.default_rng(comm.rank())
    inputs = (
        tf.constant(random.integers(0, 256, (options.images, options.size, options.size, 3)), tf.uint8),
        tf.constant(random.integers(0, 1000, options.images), tf.int32),
        *step_inputs(config_of(options), 0, options.images * comm.rank(), 1e-4),
    )
    counter = Path("/dev/null" if options.shared else "/sys/class/net/eth0/statistics/tx_bytes")
    found = {"mbit": 0 if options.shared else measure_link(options), "seconds": {}, "sent": {}}
    state = initial_state(config_of(options))
    steps = {way: make_step(way, state, device, options) for way in options.ways}
    for turn in range(-1, options.rounds):  # the first traces and is not counted
        for way, step in steps.items():
            comm.barrier()
            sent, began = int(counter.read_text() or 0), time.perf_counter()
            for _ in range(options.steps):
                float(step(*inputs))
            comm.barrier()
            seconds = (time.perf_counter() - began) / options.steps
            sent = comm.gather_numbers([int(counter.read_text() or 0) - sent]).max() / options.steps
            if comm.is_root():
                print(f"round {turn + 1}: {way:10s} {seconds:7.2f} s  {sent / 1e6:8.1f} MB", flush=True)
            if turn >= 0:
                found["seconds"].setdefault(way, []).append(seconds)
                found["sent"].setdefault(way, []).append(sent)
    if comm.is_root():
        Path(options.out).write_text(json.dumps(found))
    comm.shutdown()


def measure_link(options):
    """Returns the Mbit/s that a link carries while it is busy both ways, which is how a ring uses it. Collective."""
    from hvd_vgg.parallel import comm

    data = bytes(int(options.mbit / 8 * 1e6))  # one second's worth at the nominal rate
    rates = []
    for _ in range(4):
        comm.barrier()
        began = time.perf_counter()
        comm.gather_bytes(data)
        rates.append((options.hosts - 1) * len(data) * 8 / 1e6 / (time.perf_counter() - began))
    return statistics.median(rates[1:])


def report(options, seconds, sent, mbit):
    """Prints the table and what the plan says."""
    from hvd_vgg.parallel import cost

    local, rows = statistics.median(seconds["local"]), []
    for way, own in seconds.items():
        config, share, predicted = config_of(options, way), "-", "-"
        if mbit and way != "local":
            plan = cost.predict(config, cost.Cluster(options.hosts, 1, mbit / 1000, options.images / local))
            share = f"{statistics.median(sent[way]) / cost.sent(cost.choose(config, options.hosts)):.3f}"
            predicted = f"{plan.seconds_overlapped:.2f} to {plan.seconds_apart:.2f}"
        megabytes = measure.spread([each / 1e6 for each in sent[way]], ".1f") if mbit else "-"
        efficiency = measure.spread(measure.ratios(seconds["local"], own), ".1%")
        rows.append((way, megabytes, share, measure.spread(own), efficiency, predicted))
    place = f"hosts, {options.mbit:g} Mbit/s ({mbit:.0f} when busy both ways)" if mbit else "ranks of one host"
    title = f"VGG16, {options.hosts} {place}, {options.images} images a rank"
    head = ("way", "MB sent by a rank", "of the plan's", "seconds of an update", "efficiency", "plan, seconds")
    measure.print_table(f"{title}, {options.rounds} rounds of {options.steps} updates", head, rows)


if __name__ == "__main__":
    measure.run(main, work)
