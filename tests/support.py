"""What tests share: small real TFRecords, and starting real ranks under a hard time limit that leave nothing behind."""

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import pytest

from hvd_vgg.errors import DATA, Failure

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
LIMIT_SECONDS = 200  # ten times what any takes on an idle machine

# A run of a few seconds on records of `data`.
TINY = [
    "--num_classes=10",
    "--image_size=32",
    "--model=vgg11",
    "--width=0.125",
    "--global_batch=32",
    "--device_batch=8",
    "--lr=0.05",
    "--lr_schedule=constant",
    "--warmup_epochs=0",
    "--eval_every_epochs=0",
    "--save_every_steps=0",
    "--log_every_steps=1",
]


class Ended(NamedTuple):
    """How a started command ended."""

    code: int
    out: str
    err: str


STARTED: List["Started"] = []  # in this test


def environment_of_tests() -> Dict[str, str]:
    """Returns the environment for what a test starts: launchers are found first where the interpreter is.

    Open MPI's consent to root is for containers and CI.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMIX_"))}
    consent = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if os.getuid() == 0 else {}
    return {**inherited, **consent, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


class Started:
    """A command and all it starts, recognisable by a token in their environment."""

    def __init__(self, command: Sequence[str], cwd: Path, **environment: str) -> None:
        self.token = f"HVD_VGG_TEST_{uuid.uuid4().hex}"
        STARTED.append(self)
        self.out, self.err = cwd / f"{self.token}.out", cwd / f"{self.token}.err"
        with open(self.out, "w") as out, open(self.err, "w") as err:
            self.process = subprocess.Popen(
                command,
                cwd=cwd,
                env={**environment_of_tests(), self.token: "1", **environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                # Whoever starts tests in the background may have SIGINT ignored, and what they start would inherit it.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def alive(self) -> List[int]:
        """Returns the processes that carry the token, zombies aside."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and self.token.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def end(self) -> List[int]:
        """Ends what is left of it, after 5 seconds to end by itself; returns what was left."""
        deadline = time.monotonic() + 5
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.1)
        left = self.alive()
        for process in left:
            os.kill(process, signal.SIGKILL)
        return left

    def wait(self, limit_seconds: float = LIMIT_SECONDS, code: Optional[int] = None) -> Ended:
        """Returns how it ended; fails the test when it takes too long, leaves a process, or does not exit with `code`."""
        try:
            ended_with = self.process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {limit_seconds} s\n{self.out.read_text()}\n{self.err.read_text()}")
        finally:
            left = self.end()
        ended = Ended(ended_with, self.out.read_text(errors="replace"), self.err.read_text(errors="replace"))
        assert not left, f"processes left: {left}\n{ended.out}\n{ended.err}"
        assert code in (None, ended.code), f"exit code {ended.code}, expected {code}\n{ended.out}\n{ended.err}"
        return ended


def on_a_terminal(arguments: Sequence[str], columns: int = 80, **environment: str) -> str:
    """Returns what Python with some arguments prints to a pseudo-terminal, stdout and stderr together, with its codes."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    kept = {name: value for name, value in environment_of_tests().items() if name not in ("NO_COLOR", "COLUMNS")}
    everything = {**kept, "TERM": "xterm", **environment}
    command = [sys.executable, *arguments]
    with subprocess.Popen(command, stdin=its, stdout=its, stderr=its, cwd=ROOT, env=everything):
        os.close(its)
        read = b""
        with contextlib.suppress(OSError):  # EIO: no process has it open any more
            while part := os.read(ours, 65536):
                read += part
    os.close(ours)
    return read.decode()


def screen(printed: str) -> List[str]:
    """Returns the lines that a terminal shows in the end of what was printed, without colours."""
    printed = re.sub("\x1b\\[[0-9]*m", "", printed.replace("\r\n", "\n"))
    return [re.split("\r\x1b\\[K", line)[-1] for line in printed.split("\n")]


def wait_for(condition: Callable[[], bool], limit_seconds: float = 90) -> None:
    """Waits until `condition()` holds; fails the test when it does not within the limit."""
    deadline = time.monotonic() + limit_seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {limit_seconds} s")
        time.sleep(0.05)


def failure_of(action: Callable[[], object], kind: type = Failure) -> str:
    """Returns the message of the Failure(DATA) that `action` raises; of no other kind where one is given."""
    with pytest.raises(kind) as raised:
        action()
    assert raised.value.code == DATA
    return str(raised.value)


def order_of_writes(monkeypatch: pytest.MonkeyPatch) -> List[Tuple[str, str]]:
    """Returns a list that grows by ("fsync", name) and ("rename", new name) as this process puts files on disk."""
    events: List[Tuple[str, str]] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(handle: int) -> None:
        events.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))))
        fsync(handle)

    def noted_replace(path: Path, target: Path) -> Path:
        events.append(("rename", os.path.basename(target)))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    return events


Launch = Callable[..., Ended]


def full(*cases: Any) -> List[Any]:
    """Returns parameters for --all alone: what they add to the others is the full product."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.fault(tier=3)) for case in cases]


def changed(change: str) -> List[str]:
    """Returns the program `hvd-vgg` in whose process `change`, statements of Python, is done first."""
    run = "import sys\nfrom hvd_vgg import __main__\nsys.exit(__main__.run(sys.argv[1:]))\n"
    return [sys.executable, "-c", f"{textwrap.dedent(change)}\n{run}"]


def clock_library(folder: Path) -> Path:
    """Returns a library for LD_PRELOAD under which the host's clock can be set (tests/programs/set_clock.c)."""
    library = folder / "set_clock.so"
    source = ROOT / "tests" / "programs" / "set_clock.c"
    try:
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source)], check=True)
    except FileNotFoundError:
        pytest.fail("gcc is not installed: this test compiles a library")
    return library


def command_line(ranks: int, arguments: Sequence[str], program: Optional[Sequence[str]] = None) -> List[str]:
    """Returns the command that starts `hvd-vgg` (or `program`) with `arguments` on `ranks`; 0 ranks: without mpirun."""
    program = list(program or [sys.executable, "-m", "hvd_vgg"])
    launcher = ["mpirun", "-np", str(ranks), "--oversubscribe", "--bind-to", "none"] if ranks else []
    return [*launcher, *program, *arguments]


def write_shard(path: Path, examples: Sequence[bytes]) -> None:
    """Writes one TFRecord file with TensorFlow's own writer."""
    import tensorflow as tf

    with tf.io.TFRecordWriter(str(path)) as writer:
        for example in examples:
            writer.write(example)


def example(encoded: Optional[bytes], label: Optional[int], **more: object) -> bytes:
    """Returns a serialised tf.train.Example made by TensorFlow's own protobuf."""
    import tensorflow as tf

    features: Dict[str, object] = {}
    if encoded is not None:
        features["image/encoded"] = tf.train.Feature(bytes_list=tf.train.BytesList(value=[encoded]))
    if label is not None:
        features["image/class/label"] = tf.train.Feature(int64_list=tf.train.Int64List(value=[label]))
    features.update(more)
    return bytes(tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString())


def picture(seed: int, label: int, height: int = 40, width: int = 48) -> bytes:
    """Returns a JPEG whose colours tell its label, with noise."""
    import numpy as np
    import tensorflow as tf

    random = np.random.default_rng(seed)
    base = np.random.default_rng(label).integers(0, 200, (4, 4, 3))
    image = np.kron(base, np.ones((height // 4, width // 4, 1))) + random.integers(0, 55, (height, width, 3))
    return bytes(tf.io.encode_jpeg(image.astype(np.uint8)).numpy())


def write_data(folder: Path, train: int = 75, validation: int = 37, shards: int = 3) -> Path:
    """Writes both splits, labels 1..10, in unequal shards."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count, files in (("train", train, shards), ("validation", validation, 2)):
        rows = [example(picture(i, i % 10 + 1), i % 10 + 1) for i in range(count)]
        bounds = [0, *sorted({count * (k + 1) // files - k for k in range(files - 1)}), count]
        for number, (low, high) in enumerate(zip(bounds, bounds[1:])):
            write_shard(folder / f"{split}-{number:05d}-of-{files:05d}", rows[low:high])
    return folder


def survey_alone(folder: Path, split: str, config: Any) -> Any:
    """Returns the Survey of a split by this process alone, in blocks of 4 records."""
    import numpy as np

    from hvd_vgg.config import DataConfig
    from hvd_vgg.data.formats.layout import find_split
    from hvd_vgg.data.index import join, scan_shard
    from hvd_vgg.data.survey import ROW, Survey, survey_block

    layout, paths = find_split(DataConfig(data_dir=str(folder)), split)
    index = join(paths, [scan_shard(path, layout) for path in paths], layout)
    rows, bad, mended = np.zeros(index.records, ROW), [], []
    with ThreadPoolExecutor(2) as pool:
        for start in range(0, index.records, 4):
            texts = survey_block(index, start, config, rows[start : start + 4], pool)
            bad, mended = bad + texts[0], mended + texts[1]
    return Survey(index, rows, bad, mended)


@contextlib.contextmanager
def small_disk_at(path: Path, size: str, *unmount: str) -> Iterator[Path]:
    """Mounts a file system of `size`, such as 16m, at a directory that it makes; skips the test where that may not be."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "hvd_vgg_test", str(path)]
    made = subprocess.run(mount, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"capability: mounting a tmpfs ({made.stderr.strip()})")
    yield path
    subprocess.run(["umount", *unmount, str(path)], check=True)
