"""When the sums of an update travel, beside its backward pass: from a profile that `hvd-vgg train --profile_steps` has left.

    mpirun -np 2 ... hvd-vgg train ... --exchange=allreduce --profile_steps=6:7 --run_dir=DIR
    python benchmarks/timeline.py --run_dir=DIR [--out=FILE.png]

Of rank 0's last profiled update: when each block of convolutions was computed by the backward pass of the last micro-batch,
when the first rank handed its message over, and when that was sent, in ms from the beginning of that pass. The two clocks
are set by sums that both saw begin, to a millisecond or so. --out: a picture of it.
"""

import json
import re
from pathlib import Path

import measure

FILTER = "Conv2DBackpropFilter"


def read_horovod(path):
    """Returns {message: [(handed over, begun, ended) of each update, in ms]}, of gradients, and of Python's sums as ""."""
    text = path.read_text().rstrip().rstrip(",").rstrip("]").rstrip().rstrip(",")
    events = json.loads(text + "]")
    names = {each["pid"]: each["args"]["name"] for each in events if "name" in each.get("args", {})}
    found, open_calls = {}, {}
    for event in events:
        message = re.search(r"gradient_(\w+?)(?:_\d+of\d+)?$|^HorovodAllreduce()$", names.get(event.get("pid"), ""))
        if not message or event["ph"] not in "BE":
            continue
        stack = open_calls.setdefault(event["pid"], [])
        if event["ph"] == "B":
            stack.append((event["name"], event["ts"] / 1e3))
            continue
        name, begun = stack.pop()
        if name == "NEGOTIATE_ALLREDUCE":
            found.setdefault(message[1] or "", []).append([begun])
        elif name == "ALLREDUCE":
            found[message[1] or ""][-1] += [begun, event["ts"] / 1e3]
    return found


def read_tensorflow(folder):
    """Returns [(operation, name, begun, ended)] in ms, in order."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    space, found = xplane_pb2.XSpace(), []
    (path,) = folder.glob("plugins/profile/*/*.xplane.pb")
    space.ParseFromString(path.read_bytes())
    for plane in space.planes:
        for line in plane.lines:
            for event in line.events:
                name, _, operation = plane.event_metadata[event.metadata_id].name.rpartition(":")
                begun = line.timestamp_ns / 1e6 + event.offset_ps / 1e9
                found.append((operation, name, begun, begun + event.duration_ps / 1e9))
    return sorted(found, key=lambda event: event[2])


def backward_pass(operations, blocks):
    """Returns {block: (begun, ended)} of the newest backward pass; blocks: convolutions of each, from the first block on."""
    filters = [event for event in operations if FILTER in event[0]][-sum(blocks) :]
    found = {}
    for block in range(len(blocks), 0, -1):
        own, filters = filters[: blocks[block - 1]], filters[blocks[block - 1] :]
        found[f"block{block}"] = own[0][2], own[-1][3]
    return found


def main():
    """Prints a row for each block."""
    parser = measure.command_line(__doc__)
    parser.add_argument("--run_dir", required=True, type=Path)
    parser.add_argument("--out", help="of the picture; needs matplotlib")
    options = parser.parse_args()
    from hvd_vgg.config import BLOCKS, TrainConfig
    from hvd_vgg.flags import parse_flags

    config = parse_flags(TrainConfig, [f"--flagfile={options.run_dir / 'flags.txt'}"], shared=TrainConfig)
    profile = options.run_dir / "profile"
    messages, operations = read_horovod(profile / "horovod_timeline.json"), read_tensorflow(profile / "rank0")
    computed = backward_pass(operations, BLOCKS[config.model])
    start = computed[max(computed)][0]
    # Sums that Python asks for, of metrics, as both saw them begin: Horovod when the first rank asked, perhaps another one.
    eager = [event[2] for event in operations if event[0].strip() == "HorovodAllreduce"]
    shift = max(seen[0] - begun for seen, begun in zip(reversed(messages.pop("")), reversed(eager)))
    rows = []
    for name in sorted(computed, reverse=True):
        sent = [each - shift - start for each in messages[name][-1]]
        rows.append([name, *(f"{each - start:.0f}" for each in computed[name]), *(f"{each:.0f}" for each in sent[:3])])
    head = ("ms", "computed from", "to", "handed over", "sent from", "to")
    measure.print_table(f"{config.model} at {config.image_size} pixels, {options.run_dir}", head, rows)
    if options.out:
        draw(rows, options.out)


def draw(rows, path):
    """Draws the table."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        measure.refuse(f"--out needs matplotlib: {error}")
    figure, axes = pyplot.subplots(figsize=(7, 2.2))
    for place, (_, begun, ended, _, sent, arrived) in enumerate(rows):
        for low, high, colour, label in (
            (begun, ended, "0.6", "backward pass"),
            (sent, arrived, "tab:blue", "sum over ranks"),
        ):
            axes.barh(place, float(high) - float(low), left=float(low), color=colour, height=0.6, label=label, alpha=0.8)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("ms from the beginning of the last micro-batch's backward pass through convolutions")
    axes.legend(*[each[:2] for each in axes.get_legend_handles_labels()], loc="best", fontsize="small")
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    measure.run(main)
