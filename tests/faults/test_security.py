"""What a run must not let out or in: secrets, ports, wide permissions. What code may not use: unit/test_structure.py."""

import contextlib
import os
import stat
from collections import Counter
from pathlib import Path

from oracles import injected_ranks, start
from support import wait_for

CANARY = "canary-6b1f0c"
OPEN_MPI_PORTS = 1  # btl_tcp's, for each of IPv4 and IPv6


def listeners(pid):
    """Returns `tcp` or `tcp6` for each port on which the process accepts connections."""
    inodes = set()
    for handle in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            target = os.readlink(handle)
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.append(table)
    return found


def test_run_keeps_secrets_ports_and_files_to_itself(tmp_path, data):
    started = start(tmp_path, data, 2, "sleep@1:3:3", HVD_VGG_CANARY_SECRET=CANARY, HVD_VGG_API_TOKEN=CANARY)
    wait_for(lambda: "step 3/" in started.out.read_text())
    pids = started.alive()
    assert len(pids) >= 3
    for pid in pids:
        assert CANARY.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    ranks = injected_ranks(started)
    assert len(ranks) == 2
    # Open MPI's own transport listens on each rank, for its job's processes; nothing of Python's or Horovod's does.
    for rank in ranks:
        opened = listeners(rank)
        assert max(Counter(opened).values(), default=0) <= OPEN_MPI_PORTS, opened
    ended = started.wait(code=0)
    assert CANARY not in ended.out + ended.err
    for path in (tmp_path / "run").rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode & 0o027 == 0, (path, oct(mode))
        assert path.is_dir() or CANARY.encode() not in path.read_bytes(), path
