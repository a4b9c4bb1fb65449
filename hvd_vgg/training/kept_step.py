"""What a run keeps of a step that was not finite, for `hvd-vgg replay`; and the steps that it skips from then on.

`RUN_DIR/nonfinite/step-00000123/` holds the images and labels of the step's global batch, in order
(`records-00000-of-00001`), the state before it (`state.safetensors`), the flags (`flags.txt`) and what was
found (`report.json`, written last). `RUN_DIR/nonfinite/skipped.json` holds the steps that --on_nonfinite=rewind skips.
"""

import json
import math
from typing import Any, Dict, List

import numpy as np

from hvd_vgg import storage
from hvd_vgg.config import TrainConfig
from hvd_vgg.data.reader import write_records
from hvd_vgg.data.sampler import positions
from hvd_vgg.errors import CONFIGURATION, NOT_WRITTEN, Failure
from hvd_vgg.flags import to_flag_file
from hvd_vgg.run_dir import RunDir, StepDir, atomic_write_text
from hvd_vgg.training import checkpoint
from hvd_vgg.training.dataset import Splits
from hvd_vgg.training.metrics import NonFiniteStep
from hvd_vgg.training.nonfinite import Diagnosis
from hvd_vgg.training.state import State


def make_report(
    error: NonFiniteStep, diagnosis: Diagnosis, ids: np.ndarray, data: Splits, config: TrainConfig, lr: float
) -> Dict[str, Any]:
    """Returns the report of a step as JSON can hold it; ids: int64 [global_batch], its records."""
    start = error.step * config.global_batch
    drawn = positions(start, start + len(ids), data.train.records, config.seed, config.shuffle_block_records)
    return {
        "step": error.step,
        "loss": _json_number(error.loss),
        "gradient_norm": _json_number(error.gradient_norm),
        "loss_again": _json_number(diagnosis.again.loss),
        "gradient_norm_again": _json_number(diagnosis.again.gradient_norm),
        "not_finite_again": diagnosis.repeated,
        "rank": diagnosis.rank,
        "first": None if diagnosis.rank is None else diagnosis.ranks[diagnosis.rank]["first"],
        "diagnosis": str(diagnosis),
        "lr": lr,
        "seed": config.seed,
        "label_base": data.label_base,
        "ranks": diagnosis.ranks,
        "batch": [
            # A record that replaces a bad one is cropped and flipped as that one would have been.
            {"record": record, "drawn_as": drawn_as, "epoch": epoch, "where": data.train.where(record)}
            for record, drawn_as, epoch in zip(ids.tolist(), drawn.ids.tolist(), drawn.epochs.tolist())
        ],
    }


def _json_number(value: float) -> Any:
    return value if math.isfinite(value) else str(value)


def save_step(
    folder: StepDir, report: Dict[str, Any], state: State, data: Splits, ids: np.ndarray, config: TrainConfig
) -> str:
    """Writes what is kept of a step, on rank 0; returns why it cannot, or "": the step itself matters more."""
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.report.unlink(missing_ok=True)
        write_records(folder.records, data.train, ids.tolist())
        tensors = {name: np.asarray(variable) for name, variable in state.variables().items()}
        checkpoint.write(folder.state, tensors, {"step": report["step"]})
        atomic_write_text(folder.flags, to_flag_file(config))
        atomic_write_text(folder.report, json.dumps(report, indent=1) + "\n")
    except OSError as error:
        return f"It cannot be kept for a replay in {folder.path}: {error.strerror or error}"
    except Failure as failure:
        return f"It cannot be kept for a replay: {failure.message}"
    return ""


def load_report(folder: StepDir) -> Dict[str, Any]:
    """Returns a report, with the fields that a replay needs checked; raises Failure(CONFIGURATION)."""
    path, run_dir = folder.report, folder.path.parent.parent
    if not folder.path.is_dir():
        kept = [int(each.name[len("step-") :]) for each in sorted(folder.path.parent.glob("step-????????"))]
        there = f"it kept {', '.join(map(str, kept))}; --step names one"
        fix = there if kept else "no step was not finite, or --run_dir is not a run's"
        raise Failure(CONFIGURATION, f"{run_dir} has kept no such step: {fix}")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Failure(
            CONFIGURATION,
            f"{path} cannot be read ({error}): expected what a run leaves of a step that was not finite in "
            f"nonfinite/step-????????; --step names another",
        ) from error
    if not _is_report(report):
        raise Failure(
            CONFIGURATION,
            f"{path} is not the report of a step, or of another version of hvd_vgg: a field is missing, or of another kind",
        )
    return dict(report)


def _is_report(report: Any) -> bool:
    def is_count(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62

    try:
        return bool(
            is_count(report["step"])
            and report["label_base"] in (0, 1)
            and isinstance(report["lr"], (int, float))
            and all(isinstance(report[name], (str, int, float)) for name in ("diagnosis", "loss", "gradient_norm"))
            and report["batch"]
            and all(is_count(row[name]) for row in report["batch"] for name in ("record", "drawn_as", "epoch"))
        )
    except (KeyError, TypeError):
        return False


def read_skipped_steps(run_dir: RunDir) -> List[int]:
    """Returns the steps that the run was rewound to skip; raises Failure(CONFIGURATION)."""
    path = run_dir.skipped_steps
    try:
        steps = json.loads(storage.read_bytes(path))
        if not (isinstance(steps, list) and all(type(each) is int and each >= 0 for each in steps)):
            raise ValueError("not a list of steps")
        return steps
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise Failure(CONFIGURATION, f"{path}: {error}. Expected the steps that this run skips, such as [5, 12]") from error


def write_skipped_steps(run_dir: RunDir, steps: List[int]) -> None:
    """Writes the steps that the run is to skip; raises Failure(NOT_WRITTEN)."""
    path = run_dir.skipped_steps
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, json.dumps(steps) + "\n")
    except OSError as error:
        raise Failure(NOT_WRITTEN, f"{path} cannot be written ({error.strerror}), so the run cannot be rewound") from error
