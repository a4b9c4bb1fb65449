"""How fast a process indexes records, headers and labels, from the page cache.

    python benchmarks/index.py [--records=160000] [--bytes=110000]

Writes sparse shards of records as far apart as ImageNet's (110 kB on average) into a temporary directory: a header, an
Example whose image is a hole in the file, the label behind it. The data's checksums are not written; indexing does not
read them. Prints records/s of nine rounds and the size of an index of ImageNet's 1,281,167 records.
"""

import argparse
import os
import statistics
import struct
import tempfile
import time
from pathlib import Path

import crc32c

from hvd_vgg.data.index import join, scan_shard

GOAL_PER_SECOND = 200_000
IMAGENET_RECORDS = 1_281_167


def varint(value: int) -> bytes:
    """Returns a protocol buffer's variable-length integer."""
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def field(number: int, size: int) -> bytes:
    """Returns the tag and length of a length-delimited field."""
    return varint(number << 3 | 2) + varint(size)


def write_sparse_shard(path: Path, count: int, size: int) -> None:
    """Writes `count` records whose images are `size` zero bytes that take no room on disk."""
    name, label_name = b"image/encoded", b"image/class/label"
    value = field(1, size)  # of BytesList
    feature = field(1, len(value) + size) + value  # BytesList of Feature
    entry = field(1, len(name)) + name + field(2, len(feature) + size) + feature
    before = field(1, len(entry) + size) + entry
    label_feature = field(3, 3) + b"\x0a\x01\x05"
    label_entry = field(1, len(label_name)) + label_name + field(2, len(label_feature)) + label_feature
    after = field(1, len(label_entry)) + label_entry
    features = len(before) + size + len(after)
    head = field(1, features) + before
    length = len(head) + size + len(after)
    packed = struct.pack("<Q", length)
    plain = crc32c.crc32c(packed)
    crc = struct.pack("<I", ((plain >> 15 | plain << 17) + 0xA282EAD8) & 0xFFFFFFFF)
    with open(path, "wb") as file:
        for number in range(count):
            start = number * (12 + length + 4)
            os.pwrite(file.fileno(), packed + crc + head, start)
            os.pwrite(file.fileno(), after + b"\0\0\0\0", start + 12 + len(head) + size)


def main() -> None:
    """Prints the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=160_000)
    parser.add_argument("--bytes", type=int, default=110_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"train-{number:05d}-of-00008" for number in range(8)]
        for path in paths:
            write_sparse_shard(path, options.records // len(paths), options.bytes)
        index = join(paths, [scan_shard(path) for path in paths])  # fills the page cache
        rates = []
        for _ in range(9):
            began = time.perf_counter()
            for path in paths:
                scan_shard(path)
            rates.append(index.records / (time.perf_counter() - began))
        median = statistics.median(rates)
        print(
            f"{median:,.0f} records/s (median of 9; {min(rates):,.0f} to {max(rates):,.0f}), "
            f"{median / GOAL_PER_SECOND:.2f} of the goal of {GOAL_PER_SECOND:,}; "
            f"ImageNet in {IMAGENET_RECORDS / median:.1f} s on one process"
        )
        size = sum(column.nbytes for column in (index.offsets, index.lengths, index.labels)) / index.records
        print(f"an index of {IMAGENET_RECORDS:,} records takes {size * IMAGENET_RECORDS / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
