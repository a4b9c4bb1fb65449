"""Bytes and seconds of each way to exchange VGG16's gradients, between hosts made of network namespaces.

    sudo env PATH="$PATH" python benchmarks/exchange.py [--hosts=2] [--mbit=300] [--images=1] [--rounds=3] [--quick]
    sudo env PATH="$PATH" python benchmarks/exchange.py --hosts=2 --mbit=500 --efficiency=0.68
    python benchmarks/exchange.py --hosts=2 --shared

Needs root and iproute2 (`ip`, `tc`). Makes --hosts namespaces joined by a bridge, each with a link of --mbit in either
direction, runs one rank of full VGG16 at 224 pixels on each through mpirun, and removes them whatever happens. All ways run
in one job, in turn, --rounds times, so that what disturbs the machine disturbs all of them:

    local      updates from each rank's own gradient: no exchange
    horovod    what Horovod documents: DistributedGradientTape
    allreduce  --exchange=allreduce
    factored   --exchange=factored
    factored16 --exchange=factored --wire_dtype=float16

Prints megabytes sent by a rank in an update (the interface's counter), seconds of an update, efficiency (local / way), and
what `hvd-vgg plan` predicts from the local time and the rate that the link has when it is busy both ways. --images is per
rank; above --device_batch they are worked through in turn, and `horovod`, whose bytes do not depend on them, is left out.
--efficiency searches for the images a rank at which `horovod` has that efficiency, and measures there. --shared puts all
ranks on this host instead, to speak through its memory; no root is needed then, and no bytes are counted.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from namespaces import NETWORK, Hosts, missing

WAYS = ["local", "horovod", "allreduce", "factored", "factored16"]


def parse():
    """Returns the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--mbit", type=float, default=300)
    parser.add_argument("--images", type=int, default=1, help="per rank")
    parser.add_argument("--device_batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2, help="updates in a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--efficiency", type=float, help="search for the images at which horovod has it, such as 0.68")
    parser.add_argument("--shared", action="store_true", help="--hosts ranks on this host, through its memory")
    parser.add_argument("--quick", action="store_true", help="2 hosts, 1 image, 1 update a turn, 2 rounds: 5 minutes")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.hosts, options.images, options.steps, options.rounds = 2, 1, 1, 2
    return options


def drive(options):
    """Makes the hosts, searches if asked, runs the job in them, prints the table."""
    if not options.shared and (missing() or not shutil.which("tc")):
        sys.exit(f"benchmarks/exchange.py needs {missing() or 'tc'}, or --shared")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as made:
        launcher = ["mpirun", "-np", str(options.hosts), "--bind-to", "none", "--oversubscribe"]
        if not options.shared:
            hosts = made.enter_context(Hosts(options.hosts, Path(folder), options.mbit))
            launcher = hosts.on(1, [*launcher, *between(hosts)])
        if options.efficiency:
            options.images = options.device_batch = search(options, launcher, folder)
        result = run_job(options, launcher, folder)
        report(result["turns"], result["mbit"], options)


def between(hosts):
    """Returns mpirun's options to start a rank on each host."""
    words = ["-H", ",".join(hosts.addresses), "--mca", "plm_rsh_agent", str(hosts.agent)]
    words += ["--mca", "plm_rsh_no_tree_spawn", "1"]
    words += ["--mca", "oob_tcp_if_include", f"{NETWORK}.0/24", "--mca", "btl_tcp_if_include", f"{NETWORK}.0/24"]
    return words + ["--mca", "btl", "self,tcp", "--mca", "pml", "ob1"]


def run_job(options, launcher, folder):
    """Runs the ways by mpirun; returns what rank 0 measured."""
    out = Path(folder) / "result.json"
    command = list(launcher)
    for name in ("PATH", "PYTHONPATH", "HOROVOD_CYCLE_TIME", "HOROVOD_FUSION_THRESHOLD", "HOROVOD_TIMELINE"):
        command += ["-x", name] if name in os.environ else []
    command += ["-x", f"EXCHANGE_RESULT={out}", sys.executable, sys.argv[0], "--worker"]
    for name in ("hosts", "mbit", "images", "device_batch", "steps", "rounds", "ways"):
        command.append(f"--{name}={getattr(options, name)}")
    command += ["--shared"] if options.shared else []
    consent = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    subprocess.run(command, check=True, env={**os.environ, **consent, "TF_CPP_MIN_LOG_LEVEL": "3"})
    return json.loads(out.read_text())


def search(options, launcher, folder):
    """Returns the images a rank at which `horovod` comes nearest to the efficiency wanted; prints each trial."""
    trial = argparse.Namespace(**{**vars(options), "ways": "local,horovod", "steps": 1, "rounds": 1})
    tried = {}
    images, low, high = options.images, 0, 128
    while images not in tried and len(tried) < 6:
        trial.images = trial.device_batch = images
        turns = run_job(trial, launcher, folder)["turns"]
        local, exchanged = (turns[way][0][0] for way in ("local", "horovod"))
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


def make_steps(config, options):
    """Returns for each way a function (images, labels, position, keys, lr) that makes one update of shared weights."""
    import horovod.tensorflow as hvd
    import tensorflow as tf

    from hvd_vgg.models import vgg
    from hvd_vgg.models.architecture import DENSE, vgg_layers
    from hvd_vgg.parallel import comm, exchange
    from hvd_vgg.train.optimizer import apply_update, make_slots
    from hvd_vgg.train.train_step import StepMetrics, apply_dropout, dropout_mask, make_train_step, top_k_correct

    weights = vgg.initial_weights(vgg_layers("vgg16", 1.0, 224, 1000), 1)
    slots = make_slots(weights)

    def ours(factored, wire_dtype):
        chosen = dataclasses.replace(config, wire_dtype=wire_dtype)
        return make_train_step(weights, slots, chosen, "NHWC", factored)

    def local(*arguments):
        # Traced while the ranks do not speak: the same graph without its messages.
        spoken, in_parts = comm.sum_gradients, exchange._sum_in_chunks
        comm.sum_gradients = lambda tensors, name: list(tensors)
        exchange._sum_in_chunks = lambda kernel, name: kernel
        try:
            return without(*arguments)
        finally:
            comm.sum_gradients, exchange._sum_in_chunks = spoken, in_parts

    @tf.function
    def horovod(images, labels, position, keys, lr):
        def dropout(x, layer):
            kept = dropout_mask(tf.shape(x)[0], x.shape[1], config.dropout, keys[layer], position)
            return apply_dropout(x, kept, config.dropout)

        with tf.GradientTape() as tape:
            logits = vgg.logits(weights, "vgg16", vgg.normalized(images), "NHWC", dropout)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        gradients = hvd.DistributedGradientTape(tape).gradient(loss, list(weights.values()))
        norm = tf.sqrt(2.0 * tf.add_n([tf.nn.l2_loss(gradient) for gradient in gradients]))
        apply_update(weights, slots, dict(zip(weights, gradients)), lr, "momentum", 0.9, config.weight_decay)
        hits = [top_k_correct(logits, labels, k) for k in (1, 5)]
        return StepMetrics(loss, *hits, norm, tf.constant(1.0), tf.constant(0.0))

    without = ours([], "float32")
    steps = {
        "local": local,
        "horovod": horovod,
        "allreduce": ours([], "float32"),
        "factored": ours(DENSE, "float32"),
        "factored16": ours(DENSE, "float16"),
    }
    wanted = [way for way in options.ways.split(",") if way != "horovod" or options.images <= options.device_batch]
    return {way: steps[way] for way in wanted}


def work(options):
    """Runs the ways in turn on one rank; rank 0 writes bytes and seconds of each turn."""
    import numpy as np
    import tensorflow as tf

    from hvd_vgg.config import TrainConfig
    from hvd_vgg.data.sampler import slice_bounds
    from hvd_vgg.parallel import comm
    from hvd_vgg.parallel.init import start
    from hvd_vgg.seeds import dropout_keys

    start()
    tf.config.threading.set_intra_op_parallelism_threads(max(1, (os.cpu_count() or 1) // options.hosts))
    config = TrainConfig(global_batch=options.images * options.hosts, device_batch=options.device_batch)
    random = np.random.default_rng(comm.rank())
    low, _ = slice_bounds(config.global_batch, comm.rank(), comm.size())
    arguments = (
        tf.constant(random.integers(0, 256, (options.images, 224, 224, 3)), tf.uint8),
        tf.constant(random.integers(0, 1000, options.images), tf.int32),
        tf.constant(low, tf.int64),
        tf.constant(dropout_keys(1, 0, 2)),
        tf.constant(1e-4),
    )
    counter = Path("/sys/class/net/eth0/statistics/tx_bytes")
    turns = {}
    mbit = 0.0 if options.shared else measure_link(options)

    def bytes_sent():
        return 0 if options.shared else int(counter.read_text())

    steps = make_steps(config, options)
    for turn in range(-1, options.rounds):  # the first traces and is not counted
        for way, run in steps.items():
            comm.barrier()
            sent, began = bytes_sent(), time.perf_counter()
            for _ in range(options.steps):
                float(run(*arguments).gradient_norm)
            comm.barrier()
            seconds, sent = (time.perf_counter() - began) / options.steps, bytes_sent() - sent
            most = max(int(text) for text in comm.gather_bytes(str(sent).encode()))
            if comm.is_root():
                print(f"round {turn}: {way:10s} {seconds:7.2f} s  {most / options.steps / 1e6:8.1f} MB", flush=True)
                if turn >= 0:
                    turns.setdefault(way, []).append([seconds, most / options.steps])
    if comm.is_root():
        Path(os.environ["EXCHANGE_RESULT"]).write_text(json.dumps({"turns": turns, "mbit": mbit}))
    comm.shutdown()


def measure_link(options):
    """Returns the Mbit/s that a link carries while it is busy both ways, which is how a ring uses it."""
    from hvd_vgg.parallel import comm

    data = bytes(int(options.mbit / 8 * 1e6))  # one second's worth at the nominal rate
    rates = []
    for _ in range(4):
        comm.barrier()
        began = time.perf_counter()
        comm.gather_bytes(data)
        rates.append((options.hosts - 1) * len(data) * 8 / 1e6 / (time.perf_counter() - began))
    return sorted(rates[1:])[1]


def report(turns, mbit, options):
    """Prints the table of medians with their spread and what the plan says."""
    from hvd_vgg.config import TrainConfig
    from hvd_vgg.parallel import cost

    local = statistics.median(seconds for seconds, _ in turns["local"])
    place = f"{options.mbit:g} Mbit/s ({mbit:.0f} when busy both ways)" if mbit else "one host's memory"
    print(
        f"\n{options.hosts} {'ranks' if options.shared else 'hosts'}, {place}, {options.images} images a rank, "
        f"{options.steps} updates a turn, {options.rounds} rounds"
    )
    print(f"{'':10s} {'MB sent':>9s} {'of plan':>8s} {'seconds (min..max)':>24s} {'efficiency':>10s}  plan, seconds")
    for way, rows in turns.items():
        seconds, sent = [row[0] for row in rows], statistics.median(row[1] for row in rows)
        flags = {"exchange": "factored" if way.startswith("factored") else "allreduce"}
        flags["wire_dtype"] = "float16" if way.endswith("16") else "float32"
        config = TrainConfig(global_batch=options.images * options.hosts, **flags)
        middle, share, bracket = statistics.median(seconds), "", ""
        if mbit and way != "local":
            found = cost.predict(config, cost.Link(options.hosts, 1, mbit / 1000, options.images / local))
            share = f"{sent / cost.sent(cost.choose(config, options.hosts)):.3f}"
            bracket = f"{found.seconds_overlapped:.2f} .. {found.seconds_apart:.2f}"
        print(
            f"{way:10s} {sent / 1e6:9.1f} {share:>8s} {middle:10.2f} ({min(seconds):.2f}..{max(seconds):.2f})".ljust(54)
            + f" {local / middle:10.1%}  {bracket}"
        )


if __name__ == "__main__":
    chosen = parse()
    work(chosen) if chosen.worker else drive(chosen)
