"""A step whose loss or gradient is not finite: where it went wrong, what is kept of it, and whether the run goes on.

`RUN_DIR/nonfinite/step-00000123/` holds all that `hvd-vgg replay` needs to repeat a step: the records of its global batch
in their order, as they lie in the data (`records-00000-of-00001`), the weights and momentum before it
(`state.safetensors`), the flags (`flags.txt`) and what was found (`report.json`, written last).
`RUN_DIR/nonfinite/skipped.json` holds the steps that the run passes without an update since it was rewound.
"""

import json
import math
import socket
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import tensorflow as tf

from hvd_vgg.config import StepConfig, TrainConfig
from hvd_vgg.data.loader import train_batches
from hvd_vgg.data.reader import write_records
from hvd_vgg.data.sampler import positions, slice_bounds
from hvd_vgg.errors import CONFIGURATION, NOT_FINITE, NOT_WRITTEN, Failure
from hvd_vgg.flags import to_flag_file
from hvd_vgg.models.architecture import DENSE
from hvd_vgg.parallel import comm
from hvd_vgg.parallel.consensus import run_on_all_ranks
from hvd_vgg.parallel.init import Device
from hvd_vgg.reporting.console import Console
from hvd_vgg.reporting.log import RunLog
from hvd_vgg.run_dir import atomic_write_text, nonfinite_folder
from hvd_vgg.seeds import dropout_keys
from hvd_vgg.text import plural
from hvd_vgg.train import checkpoint
from hvd_vgg.train.dataset import Splits
from hvd_vgg.train.schedule import learning_rate
from hvd_vgg.train.state import State, TrainProgress
from hvd_vgg.train.train_step import FiniteReport, StepMetrics, make_finite_check


class NonFinite(NamedTuple):
    """A step that was not finite, as training saw it: the mean loss and the gradient's norm over all ranks."""

    step: int
    loss: float
    gradient_norm: float

    def __str__(self) -> str:
        return f"step {self.step}: loss {self.loss:g}, gradient norm {self.gradient_norm:g}"


class NonFiniteStep(NamedTuple):
    """A step that was not finite in a run that has skipped others before."""

    seen: NonFinite
    skipped_steps: List[int]


class Diagnosis(NamedTuple):
    """A step computed again on all ranks, from the same weights, without applying it; the same on all ranks.

    seen: the numbers of all ranks; sound: they are finite; ranks: for each, its `host`, its `slice` of the global batch,
    what was not finite first in its part (`first`, None for nothing; `order`: how early that is) and which records are so
    alone (`at_fault`, places in the global batch).
    """

    seen: NonFinite
    sound: bool
    ranks: List[Dict[str, Any]]

    @property
    def rank(self) -> Optional[int]:
        """The rank whose part was not finite earliest on the way from the weights to the gradients; None for no rank's."""
        odd = [rank for rank, found in enumerate(self.ranks) if found["first"] is not None]
        return min(odd, key=lambda rank: self.ranks[rank]["order"]) if odd else None

    @property
    def repeated(self) -> bool:
        """Whether anything was not finite this time."""
        return not self.sound or self.rank is not None

    def __str__(self) -> str:
        if not self.repeated:
            return "Computed again from the same weights and records, all of it is finite: a passing fault, of hardware?"
        if self.rank is None:
            return "Finite on each rank, not finite in the sums of micro-batches and ranks"
        found, others = self.ranks[self.rank], [r for r in self.ranks if r["first"] is not None]
        low, high = found["slice"]
        where = f"rank {self.rank} on {found['host']}" if len(self.ranks) > 1 else "the one rank"
        spread = "" if len(self.ranks) == 1 else f"; of {len(self.ranks)} ranks {len(others)} met anything"
        return (
            f"First {found['first']} on {where}, in {len(found['at_fault'])} of its {plural(high - low, 'record')}{spread}"
        )


def diagnose(
    now: int,
    run: State,
    train_step: Callable[..., StepMetrics],
    images: Any,
    labels: Any,
    lr: float,
    config: StepConfig,
    data_format: str,
) -> Diagnosis:
    """Returns step `now` computed again; all ranks call, each with the images and labels of its part.

    A sound update is applied, unless `train_step` has met one that was not.
    """
    low, high = slice_bounds(config.global_batch, comm.rank(), comm.size())
    keys = tf.constant(dropout_keys(config.seed, now, len(DENSE) - 1))
    look = make_finite_check(run.weights, run.slots, config, data_format)
    place, rows = _first_nonfinite(look, list(run.weights), images, labels, low, keys, config)
    mine = {"host": socket.gethostname(), "slice": [low, high], "first": place and place[1], "order": place and place[0]}
    mine["at_fault"] = [low + row for row in rows]
    sums = train_step(images, labels, tf.constant(low, tf.int64), keys, tf.constant(lr, tf.float32))
    numbers = comm.gather_numbers([float(sums.loss), float(sums.gradient_norm), float(sums.sound)])
    seen = NonFinite(now, float(numbers[:, 0].sum() / config.global_batch), float(numbers[:, 1].max()))
    ranks = comm.gather_json(mine)
    return Diagnosis(seen, bool(numbers[:, 2].all()), ranks)


def _first_nonfinite(
    look: Callable[..., FiniteReport],
    names: List[str],
    images: Any,
    labels: Any,
    position: int,
    keys: Any,
    config: TrainConfig,
) -> Tuple[Optional[Tuple[int, str]], List[int]]:
    """Returns (order and name of what is not finite first in this rank's part, or None; the rows that are so alone)."""

    def part(low: int, high: int) -> FiniteReport:
        found = look(images[low:high], labels[low:high], tf.constant(position + low, tf.int64), keys)
        return FiniteReport(*(np.asarray(each) for each in found))

    rows, held = len(labels), config.device_batch
    parts = [part(low, min(low + held, rows)) for low in range(0, rows, held)]
    outputs = np.concatenate([each.outputs for each in parts], axis=1)
    losses = np.concatenate([each.losses for each in parts])
    gradients = np.all([each.gradients for each in parts], axis=0)
    layers = list(dict.fromkeys(name.split("/")[0] for name in names))
    places = [f"the weights {name}" for name in names] + [f"the outputs of {layer}" for layer in layers] + ["the loss"]
    places += [f"the gradient of {name}" for name in reversed(names)]
    finite = np.concatenate([parts[0].weights, outputs.all(axis=1), [losses.all()], gradients[::-1]])
    if finite.all():
        return None, []
    alone = outputs.all(axis=0) & losses
    if alone.all():  # gradients are sums over a batch
        alone = np.array([part(row, row + 1).gradients.all() for row in range(rows)])
    first = int(np.argmin(finite))
    return (first, places[first]), np.flatnonzero(~alone).tolist()


def stop_or_rewind(
    met: NonFiniteStep,
    run: State,
    train_step: Callable[..., StepMetrics],
    data: Splits,
    config: TrainConfig,
    device: Device,
    log: Optional[RunLog],
    console: Console,
) -> List[int]:
    """Finds out and keeps what made a step not finite; all ranks call, while `run` is what it was before that step.

    Returns the record ids of the step when the run is to go on without it; it then must be restored. Raises an agreed
    Failure(NOT_FINITE) when it is to end.
    """
    (seen, skipped), run_dir, size = met, Path(config.run_dir), comm.size()
    batches = train_batches(
        data.train, config, data.label_base, range(seen.step, seen.step + 1), comm.rank(), size, device.input_threads
    )
    batch = next(batches)
    lr = learning_rate(seen.step, config, data.train.records)
    examined = diagnose(seen.step, run, train_step, *batch[:2], lr, config, device.data_format)
    ids = np.concatenate(
        [np.frombuffer(part, np.int64) for part in comm.gather_bytes(batch.ids.numpy().astype(np.int64).tobytes())]
    )
    report = _report(seen, examined, ids, data, config, lr)
    folder = nonfinite_folder(run_dir, seen.step)
    kept = comm.broadcast_json(_save_step(folder, report, run, data, ids, config) if comm.is_root() else "")
    kept = kept or f"Repeat it on any number of ranks: hvd-vgg replay {run_dir} --step={seen.step}"
    if log:
        log.event("nonfinite", **{name: value for name, value in report.items() if name not in ("batch", "ranks")})
    told = f"{seen}: not finite, so not applied. {examined}. {kept}"
    if config.on_nonfinite == "stop":
        raise Failure(
            NOT_FINITE,
            f"{told}\nThe newest checkpoint is from before: try a lower --lr or a longer --warmup_epochs in another "
            f"--run_dir, or --on_nonfinite=rewind to skip these records",
            collective=True,
        )
    if len(skipped) >= config.max_rewinds:
        steps = ", ".join(map(str, skipped))
        raise Failure(
            NOT_FINITE,
            f"{told}\nNo more than --max_rewinds={config.max_rewinds} steps are skipped, and steps {steps} were already: "
            f"try a lower --lr or a longer --warmup_epochs in another --run_dir",
            collective=True,
        )
    run_on_all_ranks(lambda: _write_skipped(run_dir, sorted({*skipped, seen.step})) if comm.is_root() else None)
    console.say(f"{told}\nrewinding: its {plural(len(ids), 'record')} will be skipped")
    return list(ids.tolist())


def _report(
    seen: NonFinite, examined: Diagnosis, ids: np.ndarray, data: Splits, config: TrainConfig, lr: float
) -> Dict[str, Any]:
    start = seen.step * config.global_batch
    at = positions(start, start + len(ids), data.train.records, config.seed, config.shuffle_block_records)
    return {
        "step": seen.step,
        "loss": _json_number(seen.loss),
        "gradient_norm": _json_number(seen.gradient_norm),
        "loss_again": _json_number(examined.seen.loss),
        "gradient_norm_again": _json_number(examined.seen.gradient_norm),
        "not_finite_again": examined.repeated,
        "rank": examined.rank,
        "first": None if examined.rank is None else examined.ranks[examined.rank]["first"],
        "told": str(examined),
        "lr": lr,
        "seed": config.seed,
        "label_base": data.label_base,
        "ranks": examined.ranks,
        "batch": [
            # A record that stands in for a bad one is cropped and flipped as that one would have been.
            {"record": record, "drawn_as": drawn_as, "epoch": epoch, "where": data.train.where(record)}
            for record, drawn_as, epoch in zip(ids.tolist(), at.ids.tolist(), at.epochs.tolist())
        ],
    }


def _json_number(value: float) -> Any:
    """Returns a number as JSON can hold it."""
    return value if math.isfinite(value) else str(value)


def _save_step(folder: Path, report: Dict[str, Any], run: State, data: Splits, ids: np.ndarray, config: TrainConfig) -> str:
    """Writes what is kept of a step, on rank 0; returns why it cannot, or nothing: the step is what matters."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").unlink(missing_ok=True)
        write_records(folder / "records-00000-of-00001", data.train, ids.tolist())
        tensors = {name: np.asarray(variable) for name, variable in run.variables().items()}
        checkpoint.write(folder / "state.safetensors", tensors, {"step": report["step"]})
        atomic_write_text(folder / "flags.txt", to_flag_file(config))
        atomic_write_text(folder / "report.json", json.dumps(report, indent=1) + "\n")
    except OSError as error:
        return f"It cannot be kept for a replay in {folder}: {error.strerror or error}"
    except Failure as failure:
        return f"It cannot be kept for a replay: {failure.message}"
    return ""


def load_report(folder: Path) -> Dict[str, Any]:
    """Returns a report with the fields that a replay rests on checked; raises Failure(CONFIGURATION)."""
    path = folder / "report.json"
    if not folder.is_dir():
        names = sorted(each.name for each in folder.parent.glob("step-????????"))
        kept = ", ".join(name[len("step-") :].lstrip("0") or "0" for name in names)
        told = f"it has kept {kept}; --step names one" if kept else "none was not finite, or --run_dir is no run's"
        raise Failure(CONFIGURATION, f"{folder.parent.parent} has kept no such step: {told}")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Failure(
            CONFIGURATION,
            f"{path} cannot be read ({error}): expected what a run with a step that is not finite leaves in its "
            f"nonfinite/step-????????; --step names another",
        ) from error

    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62

    try:
        batch, lr = report["batch"], report["lr"]
        sound = whole(report["step"]) and report["label_base"] in (0, 1) and isinstance(lr, (int, float)) and bool(batch)
        sound = sound and isinstance(report["told"], str)
        sound = sound and all(whole(row[name]) for row in batch for name in ("record", "drawn_as", "epoch"))
    except (KeyError, TypeError):
        sound = False
    if not sound:
        raise Failure(CONFIGURATION, f"{path} is no report of a step: a field is missing or holds something else")
    return dict(report)


def with_skipped_steps(position: TrainProgress, run_dir: Path) -> TrainProgress:
    """Returns `position` with the steps that the run in `run_dir` was rewound to skip; all ranks call.

    A checkpoint knows those from before it; what it was itself rewound to is kept beside it.
    """
    found = run_on_all_ranks(lambda: _read_skipped(run_dir) if comm.is_root() else [])
    told = comm.broadcast_json(found)
    return position._replace(skipped_steps=sorted({*position.skipped_steps, *told}))


def _read_skipped(run_dir: Path) -> List[int]:
    path = run_dir / "nonfinite" / "skipped.json"
    try:
        steps = json.loads(path.read_text(encoding="ascii"))
        if not (isinstance(steps, list) and all(type(each) is int and each >= 0 for each in steps)):
            raise ValueError("it is no list of steps")
        return steps
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise Failure(CONFIGURATION, f"{path}: {error}. Expected the steps that this run skips, such as [5, 12]") from error


def _write_skipped(run_dir: Path, steps: List[int]) -> None:
    path = run_dir / "nonfinite" / "skipped.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, json.dumps(steps) + "\n")
    except OSError as error:
        raise Failure(NOT_WRITTEN, f"{path} cannot be written ({error.strerror}), so the run cannot be rewound") from error
