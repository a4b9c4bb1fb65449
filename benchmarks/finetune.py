"""What weights to begin with are worth: acc@1 after the same updates, from given weights and from scratch.

    python benchmarks/finetune.py --data_dir=CIFAR10 [--updates=100] [--pretrain=6000] [--rounds=2] [--weights=FILE]

The classes of --data_dir are halved. A network learns the first half for --pretrain updates. On the other half, for
--updates updates, rows are: `frozen`, with its convolutions, frozen, under new dense layers; `slower`, with its convolutions
at a tenth of the rate; `scratch`, all of it new. With --weights, a file of VGG-16's convolutions for Caffe's pixels (as
`--init_from` takes), all classes are learned by VGG-16 at full width, with BatchNorm and a pooled head, for
--weights_updates updates: `given` and `scratch, VGG-16`.
Rounds differ in their seed and take turns. Every row is `hvd-vgg train` with the flags that are printed.
"""

import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import measure

COMMON = (
    "--image_size=32 --augment=shift --global_batch=64 --device_batch=32 --optimizer=nesterov --lr_schedule=cosine "
    "--eval_every_epochs=0 --save_every_steps=0 --console=lines"
)
SMALL = "--model=vgg11_bn --norm_batch=32 --lr=0.05 --weight_decay=0.0005 --dropout=0.3"
DENSE = "--init_layers=block --lr_multipliers=block:0.1"
FROZEN = "--init_layers=block --train_only=fc,predictions"


def hvd_vgg(*words):
    """Runs a command of the package, and ends the benchmark with its words where it fails."""
    ended = subprocess.run([sys.executable, "-m", "hvd_vgg", *words], capture_output=True, text=True)
    if ended.returncode:
        measure.refuse(f"hvd-vgg {shlex.join(words)}: {ended.stderr.strip()}", ended.returncode)


def train(run_dir, data_dir, seed, steps, *flags):
    """Returns acc@1 of a run."""
    words = shlex.split(" ".join((COMMON, *flags)))
    hvd_vgg("train", *words, f"--run_dir={run_dir}", f"--data_dir={data_dir}", f"--seed={seed}", f"--steps={steps}")
    return json.loads((run_dir / "result.json").read_text())["acc@1"]


def main():
    """Lets the ways take turns and prints the table."""
    parser = measure.command_line(__doc__, rounds=2)
    parser.add_argument("--data_dir", required=True, help="records with classes to halve")
    parser.add_argument("--num_classes", type=measure.positive, default=10, help="of --data_dir")
    parser.add_argument("--width", type=float, default=0.25, help="of the network that learns the first half")
    parser.add_argument("--pretrain", type=measure.positive, default=6000, help="updates on the first half")
    parser.add_argument("--updates", type=measure.positive, default=100, help="updates on the other half")
    parser.add_argument("--weights", help="file with VGG-16's convolutions")
    parser.add_argument("--weights_updates", type=measure.positive, default=100, help="updates of its rows")
    options = parser.parse_args()
    half = options.num_classes // 2
    small = f"{SMALL} --width={options.width} --num_classes={half}"
    ways = {"frozen": FROZEN, "slower": DENSE, "scratch": ""}
    of_16 = f"--model=vgg16_bn --norm_batch=32 --head=pooled --lr=0.02 --num_classes={options.num_classes}"
    of_16 += " --pixel_normalization=caffe --warmup_epochs=0.02"
    given = {"given": "--init_layers=block", "scratch, VGG-16": ""} if options.weights else {}
    found = {name: [] for name in (*ways, *given)}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name, classes in (("first", range(1, half + 1)), ("other", range(half + 1, 2 * half + 1))):
            chosen = f"--classes={','.join(map(str, classes))}"
            hvd_vgg("prepare", f"--source={options.data_dir}", f"--out={work / name}", chosen, "--console=lines")
        for seed in range(1, options.rounds + 1):
            before = work / f"{seed} before"
            train(before, work / "first", seed, options.pretrain, small)
            for name, flags in ways.items():
                source = f"--init_from={shlex.quote(str(before))}" if flags else ""
                run_dir = work / f"{seed} {name}"
                found[name].append(train(run_dir, work / "other", seed, options.updates, small, source, flags))
            for name, flags in given.items():
                source = f"--init_from={shlex.quote(options.weights)}" if flags else ""
                run_dir = work / f"{seed} {name}"
                more = of_16, source, flags
                found[name].append(train(run_dir, options.data_dir, seed, options.weights_updates, *more))
    rows = []
    for name, scores in found.items():
        steps, flags = (options.weights_updates, of_16) if name in given else (options.updates, small)
        rows.append([name, f"{steps}", measure.spread(scores, ".4f"), f"{flags} {({**ways, **given})[name]}"])
    measure.print_table(f"{options.rounds} rounds; all: {COMMON}", ("begins with", "updates", "acc@1", "flags"), rows)


if __name__ == "__main__":
    measure.run(main)
