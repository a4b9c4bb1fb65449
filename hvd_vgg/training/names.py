"""The names of the classes that weights score. Needs no TensorFlow."""

import contextlib
from pathlib import Path
from typing import List, Optional

from hvd_vgg.data.classes import imagenet_names, printable, read_names, with_words
from hvd_vgg.errors import USAGE, Failure
from hvd_vgg.run_dir import RunDir
from hvd_vgg.training.weights import own_meta


def known_names(weights: Path, num_classes: int, names_file: str = "") -> List[str]:
    """Returns the name of each class that a network scores, in order, "" where unknown; [] where all are.

    weights: the directory of a run, or a file, which may be a checkpoint of a run. The names are those in `names_file`, else
    in that run's classes.txt, else in the file itself, else ImageNet's if there are 1000. Those that are not as many as the
    classes are passed over, but of `names_file`, for which Failure(USAGE) is raised.
    """
    imagenet = imagenet_names()
    names = read_names(Path(names_file)) if names_file else _names_with(weights)
    if names is None:
        return imagenet if num_classes == len(imagenet) else []
    if len(names) == num_classes:
        return with_words(names, imagenet)
    if not names_file:
        return []
    text = f"{names_file} has {len(names)} lines; the network has {num_classes} classes. Expected a name on a line for each"
    raise Failure(USAGE, f"{text}: name such a file by --names_file")


def _names_with(weights: Path) -> Optional[List[str]]:
    """Returns the names that come with weights, of any number; [] where they cannot be read, None where there are none."""
    runs = [weights, weights.parent.parent] if weights.parent.name == "checkpoints" else [weights]
    for path in (RunDir(run).classes for run in runs):
        if path.is_file():
            with contextlib.suppress(Failure):
                return read_names(path)
            return []
    own = None
    if weights.is_file():
        with contextlib.suppress(Failure):
            own = (own_meta(weights) or {}).get("class_names")
    return [printable(str(name)) for name in own] if isinstance(own, list) else None
