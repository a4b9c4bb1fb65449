"""Images a second from storage where nothing is in memory yet: `--shuffle_block_records` beside the full permutation.

    python benchmarks/storage.py --data_dir=DIR [--blocks=1,256,4096] [--images=8192] [--rounds=3] [--threads=2]

The input pipeline of training makes batches, without a network behind it. Before each turn the kernel is asked to forget
the shards (POSIX_FADV_DONTNEED), so that all is read from storage; the ways take turns. A ratio is to the first of
--blocks, in the same round. DIR should hold more than --images and a window of 16,384 records: else what is read ahead at
the start is all there is.

How slow random reads are is the storage's: of a local disk that is fast, a control group can make a slow one, as in

    mkdir /sys/fs/cgroup/blkio/slow
    echo 254:0 200 >/sys/fs/cgroup/blkio/slow/blkio.throttle.read_iops_device   # the disk's numbers (lsblk), reads a second
    echo $$ >/sys/fs/cgroup/blkio/slow/cgroup.procs
"""

import os
import time

import measure


def forget(index):
    """Asks the kernel to drop the shards from its page cache; what was written must be on disk."""
    for path in index.paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def images_per_second(index, options, block):
    """Returns images/s over --images from the start of a stream."""
    from hvd_vgg.config import TrainConfig
    from hvd_vgg.data.loader import train_batches

    shape = {"global_batch": options.batch, "device_batch": options.batch, "image_size": options.size}
    config = TrainConfig(**shape, augment="crop", shuffle_block_records=block)
    forget(index)
    began, made = time.perf_counter(), 0
    for batch in train_batches(index, config, 0, range(options.images // options.batch), 0, 1, options.threads):
        made += len(batch.ids)
    return made / (time.perf_counter() - began)


def main():
    """Lets the ways take turns and prints the table."""
    parser = measure.command_line(__doc__, rounds=3, images=8192, batch=256, size=224, threads=2)
    parser.add_argument("--data_dir", required=True, help="TFRecords train-?????-of-?????, of JPEG")
    parser.add_argument(
        "--blocks", type=measure.list_of(int), default="1,256,4096", help="values of --shuffle_block_records"
    )
    options = parser.parse_args()
    if options.images % options.batch:
        parser.error(f"--images={options.images}: expected a multiple of --batch={options.batch}")
    from hvd_vgg.data.formats.layout import find_shards
    from hvd_vgg.data.index import join, scan_shard

    paths = find_shards(options.data_dir, "train")
    index = join(paths, [scan_shard(path) for path in paths])
    print(f"{index.records} records in {len(paths)} shards, {sum(path.stat().st_size for path in paths) / 1e9:.2f} GB")
    rates = {block: [] for block in options.blocks}
    for number in range(options.rounds):
        for block, own in rates.items():
            own.append(images_per_second(index, options, block))
            print(f"round {number + 1}: block {block}: {own[-1]:.1f} images/s", flush=True)
    first = rates[options.blocks[0]]
    rows = [(block, measure.spread(own, ".0f"), measure.spread(measure.ratios(own, first))) for block, own in rates.items()]
    title = f"{options.rounds} rounds of {options.images} images of {options.size} pixels, {options.threads} threads"
    measure.print_table(title, ("--shuffle_block_records", "images/s", "relative"), rows)


if __name__ == "__main__":
    measure.run(main)
