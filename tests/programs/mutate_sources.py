"""Reads mutated sources of `hvd-vgg prepare` to the end, in one process: mutate_sources.py FOLDER COUNT SEED.

FOLDER is a data set of raw_sets.py. Of each mutation, in which one of its files is changed in one of several ways, prints a
line: what came of it. A Failure, or a record that is refused, is told; anything else that is raised ends the program, as a
crash does.
"""

import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from hvd_vgg.config import PrepareConfig
from hvd_vgg.data.conversion import pictures, shard_writer
from hvd_vgg.data.conversion.pictures import Encoding
from hvd_vgg.data.conversion.sources import find_source, select
from hvd_vgg.data.index import join
from hvd_vgg.errors import Failure


def mutate(data, rng):
    """Returns data with bits flipped, bytes replaced, cut off, or a stretch of it moved, zeroed or filled with 255."""
    data, way, size = bytearray(data), rng.randrange(6), len(data)
    # Half of the changes are near the end, where Parquet has its footer, or in headers.
    first = rng.randrange(max(0, size - 900), size) if rng.random() < 0.5 else rng.randrange(size)
    stretch = min(size - first, rng.choice((1, 2, 4, 8, 64, 512, 4096)))
    if way == 0:
        data[first] ^= 1 << rng.randrange(8)
    elif way == 1:
        data[first] = rng.choice((0, 1, 127, 128, 255))
    elif way == 2:
        del data[first:]
    elif way == 3:
        data[first : first + stretch] = bytes(stretch)
    elif way == 4:
        data[first : first + stretch] = b"\xff" * stretch
    else:
        source = rng.randrange(size)
        data[first : first + stretch] = data[source : source + stretch]
    return bytes(data)


def look(root):
    """Returns how many records of both splits are read and refused, or the Failure's message."""
    config, refused, read = PrepareConfig(source=str(root), out="/nowhere"), 0, 0
    try:
        found = []
        for name in config.splits:
            source = find_source(config, name)
            shards = [source.scan(number) for number in range(len(source.paths))]
            found.append((name, source, join(source.paths, shards, source.layout)))
        selection = select(config, found)
        for split in selection.splits:
            for record in split.ids.tolist():
                try:
                    shard_writer.encode_record(split, record, Encoding(shorter_side=16), selection.classes)
                    read += 1
                except ValueError as error:
                    assert str(error)
                    refused += 1
    except Failure as failure:
        assert failure.message.startswith("data: ") and "Traceback" not in failure.message
        return f"failure {failure.message}"
    return f"refused {refused}" if refused else f"read {read}"


def main():
    folder, count, rng = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    files, came = sorted(path for path in folder.rglob("*") if path.is_file()), Counter()
    with tempfile.TemporaryDirectory() as place, pictures.quiet():
        for number in range(count):
            root = Path(place) / str(number)
            shutil.copytree(folder, root)
            path = root / rng.choice(files).relative_to(folder)
            path.write_bytes(mutate(path.read_bytes(), rng) or b"x")
            text = look(root)
            came[text.split()[0]] += 1
            print(number, path.name, text, flush=True)
            shutil.rmtree(root)
    print("came", dict(came))


if __name__ == "__main__":
    main()
