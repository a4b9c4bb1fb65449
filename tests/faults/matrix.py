"""The faults that runs are put through, and the table of what came of each."""

import os
import platform

FAULTS = {
    "F01": "rank 1 raises",
    "F02": "rank 0 raises; a rank raises before it has joined",
    "F03": "rank 1 is killed (SIGKILL)",
    "F04": "rank 1 is killed by the out-of-memory killer, in a memory cgroup",
    "F05": "segmentation fault in native code",
    "F06": "rank 1 exits early with success",
    "F07": "a record cannot be preprocessed on rank 1",
    "F08": "rank 1 sleeps in Python",
    "F09": "rank 1 is frozen (SIGSTOP)",
    "F10": "rank 1 holds the GIL for ever",
    "F11": "SIGKILL to mpirun; to the launcher",
    "F12": "SIGTERM to the launcher",
    "F13": "SIGTERM or SIGUSR1 to one rank",
    "F14": "SIGTERM to mpirun; death while a checkpoint is written",
    "F15": "chaos: 20 random faults, another number of ranks at each start",
    "F16": "SIGKILL at 20 random moments of saving",
    "F17": "disk full, for a while and to the end",
    "F18": "checkpoint truncated, one bit flipped, foreign, all damaged; pointer torn or leading elsewhere",
    "F19": "crash between writing, renaming and pointing",
    "F20": "power loss: the order of write, fsync, rename",
    "F21": "killed on 2 ranks, resumed on 1",
    "F22": "resumed with other flags",
    "F23": "only rank 0 has the checkpoints; run_dir cannot be written; two jobs on one run_dir",
    "F24": "shard cut, empty, missing, extra, junk appended",
    "F25": "byte flipped in the middle of a shard",
    "F26": "images truncated, empty, PNG, text, CMYK, grey, 13000 x 13000 in the header",
    "F27": "label -1, beyond the classes, missing; junk Example",
    "F28": "uneven shards, fewer than ranks",
    "F29": "NaN on rank 1",
    "F30": "replicas drift apart",
    "F31": "the sum of gradients is the true mean",
    "F32": "versions, flags or data differ between ranks",
    "F33": "two hosts: wrong interface; link down in mid-run",
    "F34": "a host does not answer; its key is unknown",
    "F35": "slow rank",
    "F36": "root without consent; more ranks than slots",
    "F37": "dllogger, mpi4py, TensorBoard are not installed",
    "F38": "all processes of a job are stopped, and continued later",
    "F39": "the clock is set back or forward in mid-run",
    "F40": "reads fail for a while, or for good; no locks, no fsync of directories, no renaming over; a mount blocks",
    "F41": "zeros in a shard, compressed shards, shards rewritten in use, JPEGs that the decoder mends",
    "F42": "checkpoints gone or damaged, with copies in another directory; the copies' disk fails",
    "F43": "variables of schedulers and profiles; no HOME, no ssh; foreign modules and libraries; limits of threads",
    "F44": "prepare is killed; its disk is full; mutated archives and Parquet; a prepared shard is replaced",
}


_ABOUT = """# What runs are put through

Faults are put into real ranks from outside, by `tests/programs/inject.py`; the package has no switches for them. Every test
has a time limit, and fails when a process is left. Judged are: the exit code; that no process is left; who is blamed, in
`RUN_DIR/faults`; that the newest checkpoint loads; that the run, started again, ends with the weights of one that nothing
happened to, bit for bit on as many ranks, and has read every record as often; the log, by `hvd-vgg verify-run`.

Written by pytest's `--fault_table` in a run of tier {tier} on {machine} (`--fault=F03` renews single rows); seconds are
those of the tests together, with set-up. `bash launch/test.sh` runs tier 1 on every change; `bash launch/test.sh --all`
runs all and writes this file.

| id | fault | tests | tier | result | seconds |
|---|---|---|---|---|---|
"""


def table(faults, reports, ids, tiers, tier):
    """Returns Markdown: of each fault its tests, how they ended, and their seconds with set-up, in this session."""
    machine = f"{os.cpu_count()} cores, Python {platform.python_version()}"
    lines = []
    for fault, text in faults.items():
        mine = [report for report in reports if fault in ids.get(report.nodeid, [])]
        nodes = sorted({report.nodeid for report in mine})
        tests = sorted({node.split("[")[0].replace("tests/", "").replace("faults/", "") for node in nodes})
        failed = sorted({report.nodeid.split("::")[1] for report in mine if report.failed})
        skipped = sorted({report.longrepr[2] for report in mine if report.skipped})
        result = "failed: " + ", ".join(failed) if failed else "; ".join(skipped) or ("passed" if nodes else "not run")
        names = "<br>".join(f"`{name}`" for name in tests)
        of = ", ".join(map(str, sorted({tiers[node] for node in ids if fault in ids[node]})))
        count, seconds = len(nodes), sum(report.duration for report in mine)
        lines.append(f"| {fault} | {text} | {names} ({count}) | {of} | {result} | {seconds:.0f} |")
    return _ABOUT.format(machine=machine, tier=tier) + "\n".join(lines) + "\n"


def renew_rows(before, text, faults):
    """Returns the table `before` with the rows of `faults` from the table `text`; those that it lacks are its last."""
    rows = {line[:6]: line for line in text.splitlines() if line[2:5] in faults}
    kept = [rows.pop(line[:6], line) for line in before.splitlines()]
    return "".join(f"{line}\n" for line in [*kept, *rows.values()])
