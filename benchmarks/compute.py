"""Images/s of a full update of VGG16 (1000 classes, synthetic images) in one process on the CPU: ours beside others.

    python benchmarks/compute.py [--batch=8] [--rounds=3] [--precisions=float32,bfloat16] [--tf_cnn_benchmarks=DIR]
        [--horovod_examples=DIR] [--legacy_python=PATH] [--torch_python=PATH]
        [--reproducible=rounding] [--device_batch=0]

    ours     the train step of hvd-vgg: float32 weights and updates, computing in each of --precisions. A CPU takes more
             than fifty times as long in float16 as in float32, minutes an update. With --reproducible=bits operations use
             one thread each: give a --device_batch that leaves a micro-batch for each core
    keras    `fit` of keras.applications.VGG16, SGD with momentum: float32, and the policy mixed_bfloat16
    tf_cnn   tf_cnn_benchmarks.py --model=vgg16, from the directory it lies in, by --legacy_python: float32
    horovod  tensorflow2_synthetic_benchmark.py --model VGG16 of Horovod's examples/tensorflow2, by --legacy_python: float32
    torch    the same network in torch.nn, by --torch_python: float32, and autocast to bfloat16
    matmul   the machine: TensorFlow's product of two square matrices, the best of three sizes: float32, bfloat16

Every turn is a process of its own, which may use every core; ways take turns, --rounds times, so that what disturbs the
machine disturbs all of them. A way that has not one of --precisions is left out in it, and a turn that computed in another
ends the benchmark. A turn makes --warmup updates that are not counted (tracing, first touch of memory) and then --updates
that are. Ratios are of one round. --legacy_python is a Python with TensorFlow, Horovod and Keras 2 (from TensorFlow 2.16 on:
tf_keras), which the two scripts need. The scripts are run as they are, and only at 224 pixels.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import measure

CLASSES = 1000
RATE, MOMENTUM, WEIGHT_DECAY = 1e-4, 0.9, 1e-4


def timed(update, options):
    """Returns images/s of `update()`, which returns when its update is made."""
    for _ in range(options.warmup):
        update()
    began = time.perf_counter()
    for _ in range(options.updates):
        update()
    return options.batch * options.updates / (time.perf_counter() - began)


def ours(precision, options):
    """Returns images/s of the train step, as the trainer of one rank calls it, and the type its convolutions compute in."""
    import numpy as np
    import tensorflow as tf

    from hvd_vgg.config import TrainConfig
    from hvd_vgg.parallel import cost
    from hvd_vgg.parallel.init import join, take_device
    from hvd_vgg.training.state import initial_state
    from hvd_vgg.training.train_step import make_train_step, step_inputs

    batch, size = options.batch, options.size
    shape = {"global_batch": batch, "device_batch": options.device_batch or batch, "image_size": size}
    config = TrainConfig(**shape, weight_decay=WEIGHT_DECAY, precision=precision, reproducible=options.reproducible)
    join()
    device, factored = take_device(config), cost.factored_layers(config, 1)
    step = make_train_step(initial_state(config), config, device, factored)
    random = np.random.default_rng(0)
    inputs = (
        tf.constant(random.integers(0, 256, (batch, size, size, 3)), tf.uint8),
        tf.constant(random.integers(0, CLASSES, batch), tf.int32),
        *step_inputs(config, 0, 0, RATE),
    )
    rate = timed(lambda: float(step(*inputs).gradient_norm), options)
    graph = tf.function(step).get_concrete_function(*inputs).graph.as_graph_def()
    nodes = (node for function in graph.library.function for node in function.node_def)
    (computed,) = {tf.DType(node.attr["T"].type).name for node in nodes if node.op == "Conv2D"}
    return rate, computed


def keras(precision, options):
    """Returns images/s of `fit`, from the ends of its batches, and the type its layers compute in."""
    import keras
    import tensorflow as tf

    ends = []
    clock = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: ends.append(time.perf_counter()))
    keras.mixed_precision.set_global_policy({"float32": "float32", "bfloat16": "mixed_bfloat16"}[precision])
    shape = [options.size, options.size, 3]
    model = keras.applications.VGG16(weights=None, input_shape=shape, classes=CLASSES)
    sgd = keras.optimizers.SGD(RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    model.compile(sgd, "sparse_categorical_crossentropy", jit_compile=False)
    labels = tf.random.uniform([options.batch], 0, CLASSES, tf.int32)
    data = tf.data.Dataset.from_tensors((tf.random.normal([options.batch, *shape]), labels)).repeat()
    model.fit(data, steps_per_epoch=options.warmup + options.updates, verbose=0, callbacks=[clock])
    return options.batch * options.updates / (ends[-1] - ends[options.warmup - 1]), model.layers[1].compute_dtype


def tf_cnn(precision, options):
    """Returns images/s as tf_cnn_benchmarks prints them; its momentum is Nesterov's."""
    flags = ["--model=vgg16", "--device=cpu", "--data_format=NHWC", "--nouse_fp16", "--optimizer=momentum"]
    flags += [f"--weight_decay={WEIGHT_DECAY}", f"--init_learning_rate={RATE}", f"--batch_size={options.batch}"]
    flags += [f"--num_warmup_batches={options.warmup}", f"--num_batches={options.updates}"]
    printed = measure.output_of([sys.executable, Path(options.tf_cnn_benchmarks, "tf_cnn_benchmarks.py"), *flags])
    return float(re.search(r"total images/sec: ([\d.]+)", printed)[1]), "float32"


def horovod(precision, options):
    """Returns images/s of Horovod's example, whose optimizer has neither momentum nor weight decay."""
    import runpy

    words = ["--model", "VGG16", "--no-cuda", "--batch-size", str(options.batch), "--num-iters", "1"]
    words += ["--num-warmup-batches", str(options.warmup - 1)]  # it makes one more before them
    words += ["--num-batches-per-iter", str(options.updates)]
    script = str(Path(options.horovod_examples, "tensorflow2_synthetic_benchmark.py"))
    sys.argv = [script, *words]
    return float(runpy.run_path(script)["img_sec_mean"]), "float32"  # it prints one digit after the point


def torch(precision, options):
    """Returns images/s of the same network in PyTorch, channels last, and the type of its outputs."""
    import torch
    from torch import nn

    torch.set_num_threads(os.cpu_count())
    parts, inputs = [], 3
    for outputs in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        parts += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(True)] if outputs else [nn.MaxPool2d(2)]
        inputs = outputs or inputs
    parts += [nn.Flatten(), nn.Linear((options.size // 32) ** 2 * 512, 4096), nn.ReLU(True), nn.Dropout()]
    parts += [nn.Linear(4096, 4096), nn.ReLU(True), nn.Dropout(), nn.Linear(4096, CLASSES)]
    model = nn.Sequential(*parts).to(memory_format=torch.channels_last)
    sgd = torch.optim.SGD(model.parameters(), RATE, MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
    images = torch.randn(options.batch, 3, options.size, options.size).to(memory_format=torch.channels_last)
    labels, computed = torch.randint(0, CLASSES, (options.batch,)), set()

    def update():
        sgd.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(images)
            loss = nn.functional.cross_entropy(logits, labels)
        computed.add(str(logits.dtype).split(".")[1])
        loss.backward()
        sgd.step()
        return loss.item()

    return timed(update, options), *computed


def matmul(precision, options):
    """Returns GFLOP/s of a product of square matrices, the best of twenty runs of three sizes, and its type."""
    import tensorflow as tf

    product, rates = tf.function(tf.matmul), []
    for side in (options.matmul_side // 4, options.matmul_side // 2, options.matmul_side):
        a = tf.cast(tf.random.normal([side, side]), precision)
        for _ in range(20):
            began = time.perf_counter()
            float(product(a, a)[0, 0])
            rates.append(2 * side**3 / 1e9 / (time.perf_counter() - began))
    return max(rates), product(a, a).dtype.name


# Each way: its function, its precisions, the options whose paths it needs, the last of which is the Python that runs it.
WAYS = {
    "matmul": (matmul, ["float32", "bfloat16"], []),
    "ours": (ours, ["float32", "bfloat16", "float16"], []),
    "keras": (keras, ["float32", "bfloat16"], []),
    "tf_cnn": (tf_cnn, ["float32"], ["tf_cnn_benchmarks", "legacy_python"]),
    "horovod": (horovod, ["float32"], ["horovod_examples", "legacy_python"]),
    "torch": (torch, ["float32", "bfloat16"], ["torch_python"]),
}


def chosen(options):
    """Yields the ways and precisions that take turns, and prints which are left out."""
    for way in options.ways:
        _, precisions, needs = WAYS[way]
        missing = [f"without --{name}" for name in needs if not getattr(options, name)]
        missing += ["only at 224 pixels"] * (way in ("tf_cnn", "horovod") and options.size != 224)
        for precision in options.precisions:
            reasons = missing + [f"no {precision}"] * (precision not in precisions)
            if reasons:
                print(f"{way}, {precision}: {', '.join(reasons)}: left out")
            else:
                yield way, precision


def run_turn(way, precision, options):
    """Makes one turn in its own process; returns what it found."""
    needs, environment = WAYS[way][2], {"CUDA_VISIBLE_DEVICES": "-1"}
    if way == "horovod":  # one rank without a launcher
        environment.update(HOROVOD_CONTROLLER="gloo", HOROVOD_CPU_OPERATIONS="gloo")
    if "legacy_python" in needs:
        environment["TF_USE_LEGACY_KERAS"] = "1"
    python = getattr(options, needs[-1]) if needs else sys.executable
    command = measure.worker(options, python, way=way, precision=precision)
    process = measure.start(command, env=environment, stdout=subprocess.PIPE)
    printed, _ = process.communicate()
    turn = json.loads(printed.splitlines()[-1]) if process.returncode == 0 else {}
    if turn.get("computed", precision) != precision or not turn:
        measure.refuse(f"{way}, {precision}: failed, or computed in another precision: {printed}", 1)
    return turn


def work(options):
    """One turn: prints its rate, the type it computed in, and its software."""
    try:
        rate, computed = WAYS[options.way][0](options.precision, options)
    except ImportError as error:
        print(json.dumps({"missing": str(error)}))
        return
    software = measure.software("tensorflow", "tensorflow-cpu", "keras", "tf-keras", "horovod", "torch")
    print(json.dumps({"rate": rate, "computed": computed, "software": software}))


def main():
    """Lets the ways take turns and prints the table."""
    parser = measure.command_line(__doc__, rounds=3, batch=8, size=224, warmup=2, updates=4)
    parser.add_argument("--precisions", type=measure.some_of(WAYS["ours"][1]), default="float32,bfloat16")
    parser.add_argument("--ways", type=measure.some_of(WAYS), default=",".join(WAYS), help="only these")
    parser.add_argument("--tf_cnn_benchmarks", help="the directory of tf_cnn_benchmarks.py")
    parser.add_argument("--horovod_examples", help="the directory of tensorflow2_synthetic_benchmark.py")
    parser.add_argument("--legacy_python", help="a Python with TensorFlow, Horovod and Keras 2, for these two")
    parser.add_argument("--torch_python", help="a Python with PyTorch")
    parser.add_argument("--reproducible", choices=("bits", "rounding"), default="rounding", help="for ours")
    parser.add_argument("--device_batch", type=int, default=0, help="images in a micro-batch of ours; 0: all of --batch")
    parser.add_argument("--matmul_side", type=measure.positive, default=4096, help="rows of the largest matrix")
    options = parser.parse_args()
    from hvd_vgg.models.architecture import training_flops, vgg_layers

    rates, rows = {pair: [] for pair in chosen(options)}, []
    for number in range(options.rounds):
        for pair in list(rates):
            turn = run_turn(*pair, options)
            if "missing" in turn:
                print(f"{', '.join(pair)}: not installed ({turn['missing']}): left out")
                del rates[pair]
                continue
            rates[pair].append(turn["rate"])
            print(f"round {number + 1}: {', '.join(pair)}: {turn['rate']:.2f}; {turn['software']}", flush=True)
    gflop = training_flops(vgg_layers("vgg16", 1.0, options.size, CLASSES), options.size) / 1e9
    for (way, precision), own in rates.items():
        per_image, unit = (1, " GFLOP/s") if way == "matmul" else (gflop, "")
        of_matmul = measure.ratios([rate * per_image for rate in own], rates.get(("matmul", precision)))
        of_ours = [] if way == "matmul" else measure.ratios(own, rates.get(("ours", "float32")))
        rows.append((way, precision, measure.spread(own) + unit, measure.spread(of_ours), measure.spread(of_matmul, ".0%")))
    title = (
        f"VGG16 at {options.size} pixels, {gflop:.2f} GFLOP an image, {options.rounds} rounds of {options.updates} updates "
    )
    head = ("way", "precision", "images/s", "relative to ours in float32", "of matmul's rate")
    measure.print_table(f"{title}of {options.batch} images", head, rows)


if __name__ == "__main__":
    measure.run(main, work)
