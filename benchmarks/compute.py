"""Images/s of a full update of VGG16 (224 pixels, 1000 classes, synthetic images) on one rank: ours, and others' beside it.

    python benchmarks/compute.py [--batch=8] [--rounds=3] [--precisions=float32,bfloat16] [--tf_cnn_benchmarks=DIR]
        [--horovod_examples=DIR] [--legacy_python=PATH] [--torch_python=PATH] [--results=FILE]

    ours     the train step of hvd-vgg: float32 weights and updates, computing in each of --precisions. A CPU takes more
             than fifty times as long in float16 as in float32, minutes an update
    keras    `fit` of keras.applications.VGG16, SGD with momentum: float32, and the policy mixed_bfloat16
    tf_cnn   tf_cnn_benchmarks.py --model=vgg16, from the directory it lies in, by --legacy_python
    horovod  tensorflow2_synthetic_benchmark.py --model VGG16 of Horovod's examples/tensorflow2, by --legacy_python
    torch    the same network in torch.nn, by --torch_python: float32, and autocast to bfloat16
    matmul   the machine: TensorFlow's product of two square matrices, the best of three sizes

Every turn is a process of its own, which may use every core; ways take turns, --rounds times, so that what disturbs the
machine disturbs all of them. What other processes and the hypervisor took of the CPU in a turn is measured, and a turn in
which it was more than --calm is not counted; some is harmless, for a process that starts leaves cores idle. A turn makes
--warmup updates that are not counted (tracing, first touch of memory) and then --updates that are. --legacy_python is a
Python with TensorFlow, Horovod and Keras 2 (from TensorFlow 2.16 on: tf_keras), which the two scripts need; ways whose path
is not given are left out. The scripts are run as they are.

With --results the turns are kept in FILE, one JSON object a line, and the table is of all turns in it: rounds can be run in
several parts.
"""

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

SIZE, CLASSES = 224, 1000
RATE, MOMENTUM, WEIGHT_DECAY = 1e-4, 0.9, 1e-4


def parse():
    """Returns the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2, help="updates of a turn that are not counted")
    parser.add_argument("--updates", type=int, default=4, help="updates of a turn that are")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precisions", default="float32,bfloat16", help="of ours: float32, bfloat16, float16")
    parser.add_argument("--ways", help="only these, such as ours,torch")
    parser.add_argument("--tf_cnn_benchmarks", type=Path, help="the directory of tf_cnn_benchmarks.py")
    parser.add_argument("--horovod_examples", type=Path, help="the directory of tensorflow2_synthetic_benchmark.py")
    parser.add_argument("--legacy_python", help="a Python with TensorFlow, Horovod and Keras 2, for these two")
    parser.add_argument("--torch_python", help="a Python with PyTorch")
    parser.add_argument("--calm", type=float, default=0.3, help="most of the CPU that others may take in a counted turn")
    parser.add_argument("--results", type=Path, help="file that keeps the turns")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name, known in (("ways", list(WAYS)), ("precisions", ["float32", "bfloat16", "float16"])):
        unknown = sorted(set((getattr(options, name) or known[0]).split(",")) - set(known))
        if unknown:
            parser.error(f"--{name}: {', '.join(unknown)}: expected some of {', '.join(known)}")
    for name in ("batch", "warmup", "updates", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}={getattr(options, name)}: expected at least 1")
    return options


def timed(update, options):
    """Returns images/s of `update()`, which returns when its update is made."""
    for _ in range(options.warmup):
        update()
    began = time.perf_counter()
    for _ in range(options.updates):
        update()
    return options.batch * options.updates / (time.perf_counter() - began)


def ours(precision, options):
    """Returns images/s of the train step, as the trainer of one rank calls it."""
    import numpy as np
    import tensorflow as tf

    from hvd_vgg.config import TrainConfig
    from hvd_vgg.models import vgg
    from hvd_vgg.models.architecture import vgg_layers
    from hvd_vgg.parallel import cost
    from hvd_vgg.parallel.init import start
    from hvd_vgg.train.optimizer import make_slots
    from hvd_vgg.train.train_step import make_train_step, step_inputs

    device = start()
    config = TrainConfig(
        global_batch=options.batch, device_batch=options.batch, weight_decay=WEIGHT_DECAY, precision=precision
    )
    factored = [choice.layer for choice in cost.choose(config, 1) if choice.method == "factored"]
    weights = vgg.initial_weights(vgg_layers("vgg16", 1.0, SIZE, CLASSES), 1)
    slots = make_slots(weights, precision)
    run = make_train_step(weights, slots, config, device.data_format, factored)
    random = np.random.default_rng(0)
    arguments = (
        tf.constant(random.integers(0, 256, (options.batch, SIZE, SIZE, 3)), tf.uint8),
        tf.constant(random.integers(0, CLASSES, options.batch), tf.int32),
        *step_inputs(config, 0, 0, RATE),
    )
    return timed(lambda: float(run(*arguments).gradient_norm), options)


def keras(precision, options):
    """Returns images/s of `fit`, from the ends of its batches."""
    import keras
    import tensorflow as tf

    ends = []

    class Clock(keras.callbacks.Callback):
        """Notes the time of each batch's end."""

        def on_train_batch_end(self, batch, logs=None):
            ends.append(time.perf_counter())

    keras.mixed_precision.set_global_policy({"float32": "float32", "bfloat16": "mixed_bfloat16"}[precision])
    model = keras.applications.VGG16(weights=None, classes=CLASSES)
    sgd = keras.optimizers.SGD(RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    model.compile(sgd, "sparse_categorical_crossentropy", jit_compile=False)
    images = tf.random.normal([options.batch, SIZE, SIZE, 3])
    labels = tf.random.uniform([options.batch], 0, CLASSES, tf.int32)
    data = tf.data.Dataset.from_tensors((images, labels)).repeat()
    model.fit(data, steps_per_epoch=options.warmup + options.updates, verbose=0, callbacks=[Clock()])
    return options.batch * options.updates / (ends[-1] - ends[options.warmup - 1])


def tf_cnn(precision, options):
    """Returns images/s as tf_cnn_benchmarks prints them; its momentum is Nesterov's."""
    flags = {
        "model": "vgg16",
        "device": "cpu",
        "data_format": "NHWC",
        "batch_size": options.batch,
        "num_warmup_batches": options.warmup,
        "num_batches": options.updates,
        "optimizer": "momentum",
        "weight_decay": WEIGHT_DECAY,
        "init_learning_rate": RATE,
    }
    script = str(options.tf_cnn_benchmarks / "tf_cnn_benchmarks.py")
    command = [sys.executable, script, *(f"--{name}={value}" for name, value in flags.items())]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    found = re.search(r"total images/sec: ([\d.]+)", done.stdout)
    return float(found.group(1)) if found else sys.exit(done.stdout)


def horovod(precision, options):
    """Returns images/s of Horovod's example, whose optimizer has neither momentum nor weight decay."""
    import runpy

    words = ["--model", "VGG16", "--no-cuda", "--batch-size", str(options.batch), "--num-iters", "1"]
    words += ["--num-warmup-batches", str(options.warmup - 1)]  # it makes one more before them
    words += ["--num-batches-per-iter", str(options.updates)]
    script = str(options.horovod_examples / "tensorflow2_synthetic_benchmark.py")
    sys.argv = [script, *words]
    return float(runpy.run_path(script)["img_sec_mean"])  # it prints one digit after the point


def torch(precision, options):
    """Returns images/s of the same network in PyTorch, channels last."""
    import torch
    from torch import nn

    torch.set_num_threads(os.cpu_count())
    parts, inputs = [], 3
    for count, outputs in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
        for _ in range(count):
            parts += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(True)]
            inputs = outputs
        parts.append(nn.MaxPool2d(2))
    parts += [nn.Flatten(), nn.Linear(7 * 7 * 512, 4096), nn.ReLU(True), nn.Dropout()]
    parts += [nn.Linear(4096, 4096), nn.ReLU(True), nn.Dropout(), nn.Linear(4096, CLASSES)]
    model = nn.Sequential(*parts).to(memory_format=torch.channels_last)
    sgd = torch.optim.SGD(model.parameters(), RATE, MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
    images = torch.randn(options.batch, 3, SIZE, SIZE).to(memory_format=torch.channels_last)
    labels = torch.randint(0, CLASSES, (options.batch,))

    def update():
        sgd.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        sgd.step()
        return loss.item()

    return timed(update, options)


def matmul(precision, options):
    """Returns GFLOP/s of a product of square matrices, the best of twenty runs of three sizes."""
    import tensorflow as tf

    product, rates = tf.function(tf.matmul), []
    for side in (1024, 2048, 4096):
        a = tf.cast(tf.random.normal([side, side]), precision)
        for _ in range(20):
            began = time.perf_counter()
            float(product(a, a)[0, 0])
            rates.append(2 * side**3 / 1e9 / (time.perf_counter() - began))
    return max(rates)


# Each way: its function, its precisions (none: those of --precisions), the options whose paths it needs, the last of which
# is the Python that runs it.
WAYS = {
    "matmul": (matmul, ["float32", "bfloat16"], []),
    "ours": (ours, [], []),
    "keras": (keras, ["float32", "bfloat16"], []),
    "tf_cnn": (tf_cnn, ["float32"], ["tf_cnn_benchmarks", "legacy_python"]),
    "horovod": (horovod, ["float32"], ["horovod_examples", "legacy_python"]),
    "torch": (torch, ["float32", "bfloat16"], ["torch_python"]),
}


def drive(options):
    """Runs the ways in turn and prints the table."""
    turns, chosen = [], []
    if options.results and options.results.exists():
        turns = [json.loads(line) for line in options.results.read_text().splitlines()]
    for way in options.ways.split(",") if options.ways else WAYS:
        _, precisions, needs = WAYS[way]
        missing = [f"--{name}" for name in needs if not getattr(options, name)]
        if missing:
            print(f"{way}: left out, without {' and '.join(missing)}")
            continue
        chosen += [(way, precision) for precision in precisions or options.precisions.split(",")]
    for number in range(options.rounds):
        for way, precision in chosen:
            used = others()
            rate, software = run(way, precision, options)
            if number == 0:
                print(f"{way} {precision}: {software}", flush=True)
            taken = [after - before for before, after in zip(used, others())]
            turn = {"way": way, "precision": precision, "batch": options.batch, "rate": rate, "others": taken[0] / taken[1]}
            turn["software"] = software
            print(f"round {number}: {way} {precision} {rate:.2f}, others {turn['others']:.0%}", flush=True)
            turns.append(turn)
            if options.results:
                with options.results.open("a") as out:
                    out.write(json.dumps(turn) + "\n")
    turns = [turn for turn in turns if turn["batch"] == options.batch]
    # The machine's rate is the best of many short runs, which a disturbed turn has too.
    calm = [turn for turn in turns if turn["others"] <= options.calm or turn["way"] == "matmul"]
    report(calm, options)
    print(f"{len(turns) - len(calm)} turns left out: others took more than {options.calm:.0%} of the CPU")


def others():
    """Returns the CPU seconds that were taken from this script and its processes since the machine started, and all."""
    numbers = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    counted = [int(number) / os.sysconf("SC_CLK_TCK") for number in numbers]
    own = os.times()
    idle = counted[3] + counted[4]
    return sum(counted) - idle - sum(own[:4]), sum(counted)


def run(way, precision, options):
    """Runs one turn in its own process; returns its rate and versions."""
    python = (WAYS[way][2] and getattr(options, WAYS[way][2][-1])) or sys.executable
    command = [python, sys.argv[0], f"--worker={way},{precision}"]
    for name in ("batch", "warmup", "updates", "tf_cnn_benchmarks", "horovod_examples"):
        if getattr(options, name):
            command.append(f"--{name}={getattr(options, name)}")
    # A Horovod of one rank without a launcher; Keras 2 for the scripts that were written for it.
    own = {"HOROVOD_CONTROLLER": "gloo", "HOROVOD_CPU_OPERATIONS": "gloo"} if way == "horovod" else {}
    own.update({"TF_USE_LEGACY_KERAS": "1"} if "legacy_python" in WAYS[way][2] else {})
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **own}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}")
    told = json.loads(done.stdout.splitlines()[-1])
    return told["rate"], told["software"]


def versions():
    """Returns the versions of this Python and of what is installed in it that decides a way's rate, in one line."""
    found = [f"Python {sys.version.split()[0]}"]
    for name in ("tensorflow", "tensorflow-cpu", "keras", "tf-keras", "horovod", "torch"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return ", ".join(found)


def gflop_per_image():
    """Returns the floating-point operations of an update for one image, in 1e9."""
    from hvd_vgg.models.architecture import training_flops, vgg_layers

    return training_flops(vgg_layers("vgg16", 1.0, SIZE, CLASSES), SIZE) / 1e9


def report(turns, options):
    """Prints the table: medians with their spread, ratios to ours in float32, shares of the matrix multiplication's rate."""
    rates = {}
    for turn in turns:
        rates.setdefault((turn["way"], turn["precision"]), []).append(turn["rate"])
    base = statistics.median(rates[("ours", "float32")]) if ("ours", "float32") in rates else None
    print(
        f"\nVGG16 at {SIZE}, batch {options.batch}, {gflop_per_image():.2f} GFLOP an image, {os.cpu_count()} cores; "
        f"{options.warmup} updates of warm-up, {options.updates} counted"
    )
    print(f"{'':18s} {'turns':>5s} {'images/s (min..max)':>22s} {'of ours float32':>16s} {'of matmul':>10s}")
    for (way, precision), found in rates.items():
        middle, spread = statistics.median(found), f"({min(found):.2f}..{max(found):.2f})"
        if way == "matmul":
            print(f"{way + ' ' + precision:18s} {len(found):5d} {middle:8.0f} GFLOP/s ({min(found):.0f}..{max(found):.0f})")
            continue
        ratio = f"{middle / base:.2f}" if base else "-"
        machine = rates.get(("matmul", precision))
        share = f"{middle * gflop_per_image() / statistics.median(machine):.0%}" if machine else "-"
        print(f"{way + ' ' + precision:18s} {len(found):5d} {middle:8.2f} {spread:>13s} {ratio:>16s} {share:>10s}")


def main():
    """Drives, or is one turn."""
    options = parse()
    if not options.worker:
        drive(options)
        return
    way, precision = options.worker.split(",")
    print(json.dumps({"rate": WAYS[way][0](precision, options), "software": versions()}), flush=True)


if __name__ == "__main__":
    main()
