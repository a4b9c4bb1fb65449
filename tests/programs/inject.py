"""Runs hvd-vgg with faults on chosen ranks:

    inject.py OUT_DIR [FAULT@RANK:STEP[:SECONDS][xFIRST-LAST] ...] COMMAND FLAGS...

FAULT is a key of _FAULTS or _BATCH_FAULTS; it happens when STEP updates are done (0: at once), from the FIRST to the LAST
time that the rank gets there (default: the first). The record ids that a rank trains on go to OUT_DIR/ids.rankN, a line per
step; when rank 0 did what, by a monotonic clock, to OUT_DIR/times. The package has no switch for any of this: its functions
are replaced from outside, only those that a fault needs.
"""

import atexit
import ctypes
import importlib
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from patching import BEGAN, replace

from hvd_vgg.__main__ import run
from hvd_vgg.environment import launched_rank
from hvd_vgg.watchdog import Watchdog, watchdog


class Fault(NamedTuple):
    """A fault of this rank."""

    kind: str
    step: int
    seconds: float
    first: int
    last: int


RANK = launched_rank() or 0
OUT = Path(sys.argv[1])
_ARGUMENT = re.compile(r"(\w+)@(\d+):(\d+)(?::([\d.]+))?(?:x(\d+)-(\d+))?")
parsed = [_ARGUMENT.fullmatch(argument) for argument in sys.argv[2:]]
parsed = parsed[: parsed.index(None)]
mine = [
    Fault(kind, int(step), float(seconds or 0), int(first or 1), int(last or first or 1))
    for kind, rank, step, seconds, first, last in (match.groups() for match in parsed)
    if int(rank) == RANK
]
visits = {}
tensors = {}  # what compiled code and batches share: a variable that is NaN or 0, the state of the run


def fail(seconds):
    """Raises what no part of the package does."""
    raise RuntimeError("a fault of the test")


def hold_gil(seconds):
    """Waits for ever without releasing the GIL: PyDLL does not, as C extensions may not. No signal interrupts a mutex."""
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)


def flip_byte(seconds):
    """Damages a file as the line `OFFSET PATH` of OUT_DIR/flip says."""
    offset, path = (OUT / "flip").read_text().split(maxsplit=1)
    with open(path, "rb+") as file:
        file.seek(int(offset))
        byte = file.read(1)[0]
        file.seek(int(offset))
        file.write(bytes([byte ^ 1]))


def delayed(seconds):
    """Returns a wrapper that sleeps before each call."""
    return lambda call: lambda *arguments, **named: (time.sleep(seconds), call(*arguments, **named))[1]


def slow(module, name):
    """Returns a fault that makes each call of a function take longer."""
    return lambda seconds: replace(importlib.import_module(f"hvd_vgg.{module}"), name, delayed(seconds))


def hold_save(step):
    """Holds checkpoints back until `step` updates are done; notes in OUT_DIR/held that it did."""
    from hvd_vgg.training import checkpoint

    def wrap(save):
        def held(*arguments):
            while (watchdog.last[2] or 0) < step:
                (OUT / "held").touch()
                time.sleep(0.01)
            return save(*arguments)

        return held

    replace(checkpoint, "save", wrap)


def slow_evaluation(seconds):
    """Makes each batch of an evaluation take longer."""
    from hvd_vgg.training import evaluate

    replace(evaluate, "make_eval_step", lambda make: lambda *arguments: delayed(seconds)(make(*arguments)))


def slow_compute(seconds):
    """Makes each forward pass multiply large matrices whose product changes nothing."""
    from hvd_vgg.models import vgg

    def wrap(dense):
        def compute_more(weights, x, name):
            import tensorflow as tf

            if name == "fc1":
                kernel = tf.ones([1500, 1500]) * tf.reduce_sum(x)
                for _ in range(12):
                    kernel = tf.matmul(kernel, kernel) * 1e-6
                x += 1e-30 * tf.stop_gradient(tf.clip_by_value(tf.reduce_sum(kernel), -1.0, 1.0))
            return dense(weights, x, name)

        return compute_more

    replace(vgg, "dense", wrap)


def overflow(seconds):
    """Makes gradients infinite that no loss scale keeps finite, while the loss is finite."""
    from hvd_vgg.models import vgg

    def wrap(dense):
        import tensorflow as tf

        steep = tf.custom_gradient(lambda x: (x, lambda upstream: upstream * float("inf")))
        return lambda weights, x, name: dense(weights, steep(x), name)

    replace(vgg, "dense", wrap)


def sum_in_floats(seconds):
    """Sums over ranks in float32, whose result depends on their number."""
    from hvd_vgg.parallel import comm

    def wrap(sum_tensor):
        import tensorflow as tf

        return lambda tensor, *rest: tf.cast(sum_tensor(tf.cast(tensor, tf.float32), *rest), tensor.dtype)

    replace(comm, "sum_tensor", wrap)


def drop_by_rank(seconds):
    """Makes this rank draw other dropout masks."""
    from hvd_vgg import seeds

    replace(seeds, "dropout_keys", lambda keys: lambda seed, step, layers: keys(seed + 1, step, layers))


def forget_momentum(seconds):
    """Has a run go on from its weights alone."""
    from hvd_vgg.training import state

    def wrap(assign):
        return lambda variables, found: assign({n: v for n, v in variables.items() if not n.endswith("momentum")}, found)

    replace(state, "assign_variables", wrap)


def break_preprocessing(seconds):
    """Makes every record's image fail in a way that no part of the package foresees."""
    from hvd_vgg.data import loader

    loader.train_image = lambda *arguments: fail(0)  # there alone: the check of bits decodes an image of its own


def change_version(seconds):
    """Makes this rank report another TensorFlow."""
    from hvd_vgg.parallel import init

    replace(init, "describe_software", lambda describe: lambda *library: {**describe(*library), "tensorflow": "2.15.1"})


def send(number):
    """Returns a fault that sends this process a signal."""
    return lambda seconds: os.kill(os.getpid(), number)


_FAULTS = {
    "raise": fail,
    "kill": send(signal.SIGKILL),
    "term": send(signal.SIGTERM),
    "usr1": send(signal.SIGUSR1),
    "stop": send(signal.SIGSTOP),
    "segv": lambda seconds: ctypes.string_at(0),
    "exit": lambda seconds: sys.exit(0),
    "sleep": time.sleep,
    "hold_gil": hold_gil,
    "linger": lambda seconds: atexit.register(time.sleep, seconds),  # Python takes longer to exit
    "flip": flip_byte,
    "hold_save": hold_save,
    "slow_save": slow("training.checkpoint", "save"),  # writing a checkpoint, in the background
    "slow_snapshot": slow("training.state", "save_state"),  # beginning one, between two updates
    "slow_read": slow("data.reader", "read_record"),
    "slow_evaluation": slow_evaluation,
    "slow_compute": slow_compute,
    "overflow": overflow,
    "sum_in_floats": sum_in_floats,
    "drop_by_rank": drop_by_rank,
    "forget_momentum": forget_momentum,
    "preprocess": break_preprocessing,
    "version": change_version,
}
# nan: the outputs of the last layer are NaN in the step; drift: 1e-3 is added to one number of fc2/bias before the step;
# twice: the rank's first image takes the place of its second.
_BATCH_FAULTS = ("nan", "drift", "twice")


def due(kinds, step):
    """Yields this rank's faults of `kinds` that happen now, at `step`, and counts the visit."""
    for fault in mine:
        if fault.kind in kinds and fault.step == step:
            visits[fault] = visits.get(fault, 0) + 1
            if fault.first <= visits[fault] <= fault.last:
                yield fault


def heartbeat_with_faults(heartbeat):
    """Wraps the method that the trainer calls after each update."""

    def beat_and_fail(self, step=None, phase="update"):
        heartbeat(self, step, phase)
        if phase == "update" and step:
            for fault in due(_FAULTS, step):
                _FAULTS[fault.kind](fault.seconds)

    return beat_and_fail


def nan_variable():
    """Returns the variable that is NaN in the steps that `nan` names, and 0 in others."""
    import tensorflow as tf

    if "nan" not in tensors:
        with tf.init_scope(), tf.device("/CPU:0"):  # the first to ask may be a function that is being compiled
            tensors["nan"] = tf.Variable(0.0)
    return tensors["nan"]


def batches_with_faults(train_batches):
    """Wraps the loader: writes the ids of each batch, and does what is to happen before its step."""

    def noted(*arguments, **named):
        import tensorflow as tf

        steps = next(each for each in (*arguments, *named.values()) if isinstance(each, range))
        with open(OUT / f"ids.rank{RANK}", "a", buffering=1) as file:
            for step, batch in zip(steps, train_batches(*arguments, **named)):
                file.write(f"{step} {' '.join(map(str, batch.ids.numpy().tolist()))}\n")
                now = [fault.kind for fault in due(_BATCH_FAULTS, step)]
                nan_variable().assign(float("nan") if "nan" in now else 0.0)
                if "drift" in now:
                    bias = tensors["state"].weights["fc2/bias"]
                    bias.assign_add(1e-3 * tf.one_hot(2, bias.shape[0]))
                if "twice" in now:
                    batch = batch._replace(images=tf.concat([batch.images[:1], batch.images[:1], batch.images[2:]], 0))
                yield batch

    return noted


def dense_with_nan(dense):
    """Wraps a dense layer: the outputs of the last one are those plus a variable, 0 or NaN."""

    def poisoned(weights, x, name):
        import tensorflow as tf

        outputs = dense(weights, x, name)
        return outputs + tf.cast(nan_variable(), outputs.dtype) if name == "predictions" else outputs

    return poisoned


def keep_state(initial_state):
    """Wraps what makes the state of a run: `drift` needs it."""

    def kept(*arguments):
        made = initial_state(*arguments)
        tensors.setdefault("state", made)
        return made

    return kept


def note_times():
    """Notes in OUT_DIR/times, `WHAT STEP BEGAN ENDED` a line, when updates ended, and all that is done between them."""
    from hvd_vgg.reporting.throughput import Throughput
    from hvd_vgg.training.trainer import Trainer

    def noting(what, call):
        def noted(*arguments, **named):
            began = time.monotonic()
            try:
                return call(*arguments, **named)
            finally:
                line = f"{what} {watchdog.last[2] or 0} {began} {time.monotonic()}\n"
                with open(OUT / "times", "a") as file:
                    file.write(line)

        return noted

    Throughput.end_update = noting("update", Throughput.end_update)
    Trainer.__init__ = noting("starting", Trainer.__init__)
    for name in ("evaluate", "save", "write_result"):
        setattr(Trainer, name, noting(name, getattr(Trainer, name)))
    with open(OUT / "times", "a") as file:
        file.write(f"process 0 {BEGAN} {BEGAN}\n")


def main():
    """Does the faults of step 0, prepares the others, and runs the command."""
    sys.modules["matplotlib"] = None  # Keras would import it, an eighth of the time of a start
    from hvd_vgg.data import loader

    for fault in due(_FAULTS, 0):
        _FAULTS[fault.kind](fault.seconds)
    replace(loader, "train_batches", batches_with_faults)
    if RANK == 0 and "train" in sys.argv:
        note_times()
    Watchdog.heartbeat = heartbeat_with_faults(Watchdog.heartbeat)
    if any(fault.kind == "nan" for fault in mine):
        from hvd_vgg.models import vgg

        replace(vgg, "dense", dense_with_nan)
    if any(fault.kind == "drift" for fault in mine):
        from hvd_vgg.training import state

        replace(state, "initial_state", keep_state)
    return run(sys.argv[2 + len(parsed) :])


sys.exit(main())
