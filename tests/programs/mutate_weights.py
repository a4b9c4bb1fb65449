"""Reads mutated files of weights: mutate_weights.py FILE COUNT SEED; of a .pth file by a Python that has torch.

Of each mutation, in which bytes of FILE are changed in one of several ways, prints a line: refused, with the message; same;
data, where the bytes of tensors were changed, and no others are read otherwise; or other, where a tensor is read otherwise
whose bytes were not changed. What is raised beside a Failure of one line ends the program, as a crash does.
"""

import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

from hvd_vgg.errors import CONFIGURATION, Failure
from hvd_vgg.weights import files, hdf5
from hvd_vgg.weights.contents import read_tensor


def places(path):
    """Returns where in a file the bytes of each tensor are, by the names of this package: (first, end)."""
    contents, plan, _ = files._examine(path)
    if path.suffix == ".pth":  # torch hands the tensors over by themselves
        data, found = path.read_bytes(), {}
        for name, piece in plan.pieces.items():
            tensor = read_tensor(contents, piece.name).tobytes()
            assert data.count(tensor) == 1, f"{piece.name}: expected random numbers"
            found[name] = (data.index(tensor), data.index(tensor) + len(tensor))
        return found
    begin = hdf5.member_bounds(path)[0] if path.suffix == ".keras" else 0
    entries = {name: contents.entries[piece.name] for name, piece in plan.pieces.items()}
    return {name: (begin + entry.begin, begin + entry.end) for name, entry in entries.items()}


def mutate(data, structure, rng):
    """Returns data with a bit flipped, a byte replaced, cut off, or a stretch of it copied, zeroed or filled with 255.

    structure: positions outside tensors, which nine of ten changes begin at.
    """
    data, way = bytearray(data), rng.randrange(7)
    first = rng.choice(structure) if rng.random() < 0.9 else rng.randrange(len(data))
    stretch = min(len(data) - first, rng.choice((1, 1, 2, 4, 8, 8, 64, 512)))
    if way <= 1:
        data[first] ^= 1 << rng.randrange(8)
    elif way == 2:
        data[first] = rng.choice((0, 1, 127, 128, 255, *b'0189"{}[],-'))
    elif way == 3:
        del data[first:]
    elif way == 4:
        data[first : first + stretch] = bytes(stretch)
    elif way == 5:
        data[first : first + stretch] = b"\xff" * stretch
    else:
        source = rng.choice(structure)
        moved = data[source : source + stretch]
        data[first : first + len(moved)] = moved
    return bytes(data)


def outcome(path, before, after, original, where):
    """Returns what reading a mutated file comes to."""
    path.write_bytes(after)
    try:
        found = files.read_file(path).tensors
    except Failure as failure:
        text = failure.message.replace(str(path), "FILE")
        assert failure.code == CONFIGURATION and text.startswith("FILE") and text.isprintable() and len(text) < 1000, text
        return f"refused {text}"
    differing = {name for name in {*found, *original} if name not in found or name not in original}
    differing |= {name for name in {*found} - differing if found[name].tobytes() != original[name].tobytes()}
    hit = {name for name, (first, end) in where.items() if before[first:end] != after[first:end]}
    return "same" if not differing else f"data {sorted(differing)}" if differing <= hit else f"other {sorted(differing)}"


def main():
    path, count, rng = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    before, original, where, came = path.read_bytes(), files.read_file(path).tensors, places(path), Counter()
    inside = {position for first, end in where.values() for position in range(first, end)}
    structure = [position for position in range(len(before)) if position not in inside]
    with tempfile.TemporaryDirectory() as place:
        changed = Path(place) / path.name
        for number in range(count):
            after = mutate(before, structure, rng)
            text = outcome(changed, before, after, original, where)
            came[text.split()[0]] += 1
            print(number, text, flush=True)
    print("came", dict(came))


if __name__ == "__main__":
    main()
