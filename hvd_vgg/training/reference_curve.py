"""Whether a run is on track: its acc@1 beside that of a published run of the same recipe, --reference_curve."""

import numpy as np

from hvd_vgg.config import TrainConfig, reference_points
from hvd_vgg.reporting.receipt import read_log
from hvd_vgg.run_dir import RunDir
from hvd_vgg.training.evaluate import Evaluation
from hvd_vgg.training.reporter import Reporter

_EVENT = "below_reference"
# Two published runs of MindCV's VGG16 ended 0.0008 apart; where the curve is steep one run may well be an epoch behind.
_FAR_BELOW = 0.05
# The first epochs, in which a network without BatchNorm leaves its plateau sooner or later, say little: this share of the
# curve's last epoch.
_EARLY = 0.1


def with_reference(result: Evaluation, config: TrainConfig, step: int, epoch: float) -> Evaluation:
    """Returns the evaluation after `step` updates, that is `epoch` epochs, with the acc@1 that the curve has there.

    It has one on the lines between its points, and none outside them. An evaluation comes with the first update that ends at
    or after its epoch: the last point is that of the update in which it lies.
    """
    points = reference_points(config.reference_curve)
    if not points or not points[0][0] <= epoch < points[-1][0] + epoch / max(1, step):
        return result
    epochs, accuracies = zip(*points)
    return result._replace(reference=float(np.interp(epoch, epochs, accuracies)))  # beyond the last point as at it


def warn_if_far_below(result: Evaluation, config: TrainConfig, step: int, epoch: float, reporter: Reporter) -> None:
    """Prints and logs, on rank 0, that acc@1 is far below the curve; once in a run, whose log knows of earlier starts."""
    difference, points = result.reference_difference(), reference_points(config.reference_curve)
    if difference is None or difference > -_FAR_BELOW or epoch < _EARLY * points[-1][0]:
        return
    if any(line.kind == _EVENT for line in read_log(RunDir(config.run_dir).log)):
        return
    reporter.event(_EVENT, step=step, **{"acc@1": result.top1 / result.records, "reference": result.reference})
    reporter.say(
        f"warning: acc@1 is {-difference:.4f} below --reference_curve at epoch {epoch:.1f}: this run is not on track to its "
        f"recipe's result; compare flags and data with the config's, and see whether the loss falls. Said once"
    )
