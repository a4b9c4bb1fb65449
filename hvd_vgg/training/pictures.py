"""What TensorBoard is given of a run beside its scalars, where its package is there; rank 0 alone, of no other's concern."""

from pathlib import Path
from typing import Callable, List

import numpy as np

from hvd_vgg.config import TrainConfig, hyperparameters, unused_hyperparameters
from hvd_vgg.data.sheet import draw_sheet, encode_png, sheet_datasets, sheet_rows
from hvd_vgg.errors import DATA, Failure
from hvd_vgg.reporting.confusion_image import draw_confusions
from hvd_vgg.reporting.tensorboard import Events, has_tensorboard
from hvd_vgg.training.dataset import Splits
from hvd_vgg.training.names import known_names
from hvd_vgg.training.reporter import Reporter

_RECORDS, _EPOCHS = 4, 4  # of the sheet
_TRIED = 32  # records, of which so many are sound


def show_start(config: TrainConfig, data: Splits, first_step: int, reporter: Reporter) -> None:
    """Writes the hyperparameters and, at the start of a run, a sheet of training samples; for rank 0.

    Raises Failure where storage does not come back, as training would.
    """
    unused = unused_hyperparameters(config)
    chosen = {name: getattr(config, name) for name in hyperparameters() if name not in unused}

    def sheet(events: Events) -> None:
        datasets = sheet_datasets(config, data.train, data.label_base, config.seed)
        names = known_names(Path(config.run_dir), config.num_classes)
        rows = sheet_rows(*datasets, _RECORDS, _EPOCHS, names, _TRIED, stored=False)
        if rows:
            text = (
                "Records of the training data, with their classes by numbers from 0, what training makes of them in its "
                "first epochs, and what evaluation does."
            )
            events.image("training samples", draw_sheet(rows), 0, text)

    actions: List[Callable[[Events], None]] = [lambda events: events.hyperparameters(chosen)]
    _show(reporter, [*actions, *([sheet] if not first_step else [])])


def show_end(pairs: np.ndarray, records: np.ndarray, step: int, reporter: Reporter) -> None:
    """Writes the confusion matrix, and that the run is complete; for rank 0. As `draw_confusions` takes them."""
    text = (
        "Rows are labels, columns the likeliest classes, by their numbers from 0; the darker, the larger the share of the "
        "row's records (percent where it is written)."
    )

    def matrix(events: Events) -> None:
        events.image("confusion matrix", encode_png(draw_confusions(pairs, records)), step, text)

    _show(reporter, [matrix, lambda events: events.ended()])


def _show(reporter: Reporter, actions: List[Callable[[Events], None]]) -> None:
    """Calls each action with the events, if TensorBoard is there. What it raises is said, once, and ends nothing."""
    if not reporter.events or not has_tensorboard():
        return
    for action in actions:
        try:
            action(reporter.events)
        except Failure as failure:
            if failure.code != DATA:  # which training names
                raise
        except Exception as error:  # of a package that is none of ours, or not the version that fits another
            reporter.say(f"tensorboard/ lacks something: {type(error).__name__}: {str(error)[:200]}")
