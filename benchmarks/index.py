"""How fast one process indexes records, headers and labels, from the page cache.

    python benchmarks/index.py [--records=160000] [--bytes=110000] [--rounds=9]

Writes sparse shards of records as far apart as ImageNet's (110 kB on average) into a temporary directory: an image is a hole
in its file. The checksums of data are not written, for indexing does not read them. Prints records/s and the size of an
index of ImageNet's 1,281,167 records.
"""

import os
import struct
import tempfile
import time
from pathlib import Path

import measure

IMAGENET_RECORDS = 1_281_167
SHARDS = 8


def field(number, content):
    """Returns a length-delimited field of a protocol buffer."""
    length, size = b"", len(content)
    while size >= 0x80:
        length += bytes([size & 0x7F | 0x80])
        size >>= 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + content


def example(image):
    """Returns a serialised tf.train.Example of an image, then a label."""
    features = ((b"image/encoded", field(1, field(1, image))), (b"image/class/label", field(3, b"\x0a\x01\x05")))
    return field(1, b"".join(field(1, field(1, name) + field(2, feature)) for name, feature in features))


def write_sparse_shard(path, count, size):
    """Writes `count` records whose images are `size` zero bytes that take no room on disk."""
    from hvd_vgg.data.formats.tfrecord import FOOTER_BYTES, masked_crc

    image = bytes(size)
    head, _, tail = example(image).partition(image)
    length = struct.pack("<Q", len(head) + size + len(tail))
    head = length + struct.pack("<I", masked_crc(length)) + head
    with open(path, "wb") as file:
        for _ in range(count):
            file.write(head)
            file.seek(size, os.SEEK_CUR)
            file.write(tail + bytes(FOOTER_BYTES))


def main():
    """Prints the table."""
    parser = measure.command_line(__doc__, rounds=9)
    parser.add_argument("--records", type=measure.positive, default=160_000)
    parser.add_argument("--bytes", type=measure.positive, default=110_000, help="of an image")
    options = parser.parse_args()
    from hvd_vgg.data.index import join, scan_shard

    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"train-{number:05d}-of-{SHARDS:05d}" for number in range(SHARDS)]
        for path in paths:
            write_sparse_shard(path, -(-options.records // SHARDS), options.bytes)
        index, rates = join(paths, [scan_shard(path) for path in paths]), []  # fills the page cache
        for _ in range(options.rounds):
            began = time.perf_counter()
            for path in paths:
                scan_shard(path)
            rates.append(index.records / (time.perf_counter() - began))
    bytes_each = sum(column.nbytes for column in (index.offsets, index.lengths, index.labels)) / index.records
    seconds, megabytes = [IMAGENET_RECORDS / rate for rate in rates], f"{bytes_each * IMAGENET_RECORDS / 1e6:.1f}"
    row = [measure.spread(rates, ",.0f"), measure.spread(seconds, ".1f"), megabytes]
    title = f"{options.rounds} rounds over {index.records:,} records of {options.bytes:,} bytes, one process"
    measure.print_table(title, ("records/s", "ImageNet's 1,281,167: seconds", "MB of its index"), [row])


if __name__ == "__main__":
    measure.run(main)
