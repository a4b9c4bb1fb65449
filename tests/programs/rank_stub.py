"""Takes the place of a rank of hvd-vgg where only its end matters: `rank_stub.py HOW [FLAGS OF train]`.

wait: waits for SIGUSR1, then exits as a rank that was asked to stop; deaf: ignores all requests; die: rank 1 kills itself,
the others wait; progress: the same after writing a checkpoint; silent: rank 1 exits with 0 without MPI_Finalize, the others
wait; CODE: exits with it; memory: rank 1 joins the memory cgroup $STUB_CGROUP and takes more than it allows.
"""

import os
import signal
import sys
import time
from pathlib import Path

how = sys.argv[1]
rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
run_dir = Path(next((flag.split("=", 1)[1] for flag in sys.argv if flag.startswith("--run_dir=")), "."))


def leave_in_order(number, frame):
    """Exits as ranks do that agreed on a step: all at once."""
    time.sleep(float(os.environ.get("STUB_LEAVE_SECONDS", "0.5")))
    os._exit(80)


if how == "deaf":
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
else:
    signal.signal(signal.SIGUSR1, leave_in_order)
print(f"rank {rank} is here", flush=True)
print(f"a word of rank {rank}", file=sys.stderr, flush=True)
if how.isdigit():
    time.sleep(0.5)
    os._exit(int(how))
if how == "progress" and rank == 0:
    place = run_dir / "checkpoints"
    place.mkdir(exist_ok=True)
    (place / f"step-{len(list(place.iterdir())) + 1:08d}.safetensors").touch()
if how in ("die", "progress", "memory") and rank == 1:
    time.sleep(1)
    if how == "memory":
        Path(os.environ["STUB_CGROUP"], "cgroup.procs").write_text(str(os.getpid()))
        taken = [b"x" * 10_000_000 for _ in range(100)]
    os.kill(os.getpid(), signal.SIGKILL)
if how == "silent":
    from mpi4py import MPI

    MPI.COMM_WORLD.Barrier()
    if rank == 1:
        os._exit(0)
time.sleep(300)
