"""Images a second from storage where nothing is in memory yet: `--shuffle_block_records` beside the full permutation.

    python benchmarks/storage.py --data_dir=DIR [--blocks=1,256,4096] [--images=8192] [--rounds=3] [--threads=2]

The input pipeline of training makes batches of 256 images of 224 pixels, without a network behind it. Before each turn
the kernel is asked to forget the shards (POSIX_FADV_DONTNEED), so that all is read from storage; the ways take turns. A
ratio is to block 1, the full permutation, of the same round. DIR should hold more than --images and a window of 16,384
records: else what is read ahead at the start is all there is.

How slow random reads are is the storage's: of a local disk that is fast, a control group can make a slow one, as in

    mkdir /sys/fs/cgroup/blkio/slow
    echo 254:0 200 >/sys/fs/cgroup/blkio/slow/blkio.throttle.read_iops_device   # the disk's numbers (lsblk), reads a second
    echo $$ >/sys/fs/cgroup/blkio/slow/cgroup.procs
"""

import argparse
import os
import statistics
import sys
import time
from typing import Any, Dict, List

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from hvd_vgg.config import TrainConfig
from hvd_vgg.data.index import find_shards, join, scan_shard
from hvd_vgg.data.loader import train_batches

BATCH, SIZE, SEED = 256, 224, 1


def forget(index: Any) -> None:
    """Asks the kernel to drop the shards from its page cache; what was written must be on disk."""
    for path in index.paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def once(index: Any, options: argparse.Namespace, block: int) -> float:
    """Returns images/s over --images from the start of a stream."""
    config = TrainConfig(
        data_dir=options.data_dir,
        global_batch=BATCH,
        device_batch=BATCH,
        image_size=SIZE,
        augment="crop",
        seed=SEED,
        shuffle_block_records=block,
    )
    forget(index)
    began, made = time.perf_counter(), 0
    for batch in train_batches(index, config, 0, range(options.images // BATCH), 0, 1, options.threads):
        made += len(batch.ids)
    return made / (time.perf_counter() - began)


def main() -> None:
    """Lets the ways take turns and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="TFRecords train-?????-of-?????, of JPEG")
    parser.add_argument(
        "--blocks", default="1,256,4096", help="values of --shuffle_block_records, the first to compare with"
    )
    parser.add_argument("--images", type=int, default=8192, help=f"a turn; a multiple of {BATCH}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="that decode")
    options = parser.parse_args()
    if options.images % BATCH or options.images <= 0 or options.rounds < 1:
        parser.error(f"--images={options.images} --rounds={options.rounds}: expected a multiple of {BATCH}, and 1 or more")
    paths = find_shards(options.data_dir, "train")
    index = join(paths, [scan_shard(path) for path in paths])
    print(f"{index.records} records in {len(paths)} shards, {sum(path.stat().st_size for path in paths) / 1e9:.2f} GB")
    blocks = [int(block) for block in options.blocks.split(",")]
    rates: Dict[int, List[float]] = {block: [] for block in blocks}
    for _ in range(options.rounds):
        for block in blocks:
            rates[block].append(once(index, options, block))
            print(f"block {block}: {rates[block][-1]:.1f} images/s", file=sys.stderr)
    print(f"\n{options.rounds} rounds of {options.images} images; median (smallest to largest)")
    print("| --shuffle_block_records | images/s | relative |\n|---|---|---|")
    for block, own in rates.items():
        ratios = [mine / base for mine, base in zip(own, rates[blocks[0]])]
        print(f"| {block} | {spread(own, '.0f')} | {spread(ratios, '.2f')} |")


def spread(values: List[float], form: str) -> str:
    """Returns median (smallest to largest) of `values`."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    main()
