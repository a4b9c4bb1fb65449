"""The `evaluate` command: scores checkpoints of a run, or any weights, on the validation records."""

from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Sequence, Tuple

from hvd_vgg.colours import BOLD
from hvd_vgg.config import EvaluateConfig, EvaluationConfig
from hvd_vgg.data.classes import class_names, imagenet_names, with_words
from hvd_vgg.data.formats.layout import FOLDERS, IMAGENET, TITLES
from hvd_vgg.data.formats.shard_file import data_failure
from hvd_vgg.data.index import Index, check_labels, data_digest, find_label_base
from hvd_vgg.errors import CONFIGURATION, NOT_WRITTEN, Failure
from hvd_vgg.models.vgg import Weights
from hvd_vgg.parallel import comm
from hvd_vgg.parallel.consensus import run_on_all_ranks, run_on_root
from hvd_vgg.parallel.init import Device
from hvd_vgg.reporting.console import Console
from hvd_vgg.run_dir import RunDir, check_out
from hvd_vgg.text import plural
from hvd_vgg.training import checkpoint
from hvd_vgg.training.confusions import confused_pairs, most_confused
from hvd_vgg.training.dataset import choose_label_base, open_split
from hvd_vgg.training.evaluate import Evaluation, evaluate, make_eval_step
from hvd_vgg.training.names import known_names
from hvd_vgg.training.network import load_network, make_network
from hvd_vgg.training.predictions import gather_outcome, worst_classes, write_predictions
from hvd_vgg.training.reporter import Reporter
from hvd_vgg.training.startup import join_ranks


class Subject(NamedTuple):
    """What to evaluate: checkpoint `best`, `newest`, or a path; average: not the weights, but their average."""

    checkpoint: str
    average: bool = False

    @property
    def of(self) -> str:
        """What a line about the average begins with."""
        return "average of weights, " if self.average else ""


class Opened(NamedTuple):
    """A checkpoint to evaluate: its network, what it is called, its step, and the label of its first class."""

    network: Weights
    text: str
    step: int
    label_base: int


class Score(NamedTuple):
    """The evaluation of the checkpoint of `step`, the digest of the data, and the label of its first class."""

    step: int
    result: Evaluation
    data_sha256: str
    label_base: int


def evaluate_run(config: EvaluateConfig) -> None:
    """Evaluates a checkpoint of the run in --run_dir, or --weights, on the validation split. Collective."""
    device, console, index = _open(config)
    if config.predictions_file:  # before the work
        run_on_root(lambda: check_out(config.predictions_file, NOT_WRITTEN, "--predictions_file"))
    if config.weights:
        network, source = load_network(config, config.weights, config.average)
        console.say(source.text)
        label_base = choose_label_base(config, find_label_base(index.labels, config.num_classes), index)
        console.say(f"labels from {label_base} (--label_base overrides)")
        text = source.kind
    else:
        network, text, _, label_base = _open_subject(config, Subject(config.checkpoint, config.average), index)
    names = run_on_root(lambda: _names(config, index, label_base)) or []
    result = _evaluate(config, network, label_base, index, device, console, text)
    outcome = gather_outcome(result, index, label_base, config.num_classes)
    console.say(worst_classes(outcome.counts, names))
    confused = most_confused(confused_pairs(outcome.pairs), outcome.counts, names)
    if confused:
        console.say(confused)
    run_on_root(lambda: write_predictions(config, outcome, index))
    comm.shutdown()


def _open(config: EvaluationConfig) -> Tuple[Device, Console, Index]:
    """Joins the ranks and opens the validation split. Collective."""
    device, console, _ = join_ranks(config)
    index = open_split(config, "validation", Path(config.run_dir), console)
    console.say(f"{index.records} records to evaluate; {TITLES[index.layout.kind]} (--data_format={index.layout.kind})")
    return device, console, index


def _names(config: EvaluateConfig, index: Index, label_base: int) -> List[str]:
    """Returns the names of the classes: those of the data, else those that are known of the weights."""
    names = class_names(index, label_base, config.num_classes)
    return with_words(names, imagenet_names()) or known_names(Path(config.weights or config.run_dir), config.num_classes)


def score(config: EvaluationConfig, subjects: Sequence[Subject]) -> List[Score]:
    """Evaluates checkpoints of the run in --run_dir on the validation split, and prints each score. Collective.

    Raises a collective Failure(CONFIGURATION) where there is none, or it does not fit.
    """
    device, console, index = _open(config)
    scores = []
    for subject in subjects:
        network, text, step, label_base = _open_subject(config, subject, index)
        result = _evaluate(config, network, label_base, index, device, console, text)
        scores.append(Score(step, result, data_digest(index), label_base))
    comm.shutdown()
    return scores


def _open_subject(config: EvaluationConfig, subject: Subject, index: Index) -> Opened:
    """Reads a checkpoint of the run on rank 0. Collective; raises Failure as `score` and `_require_same_classes` do."""
    found = run_on_root(lambda: _load(subject, RunDir(config.run_dir)))
    meta = comm.broadcast_json(found.meta if found else None)
    run_on_all_ranks(lambda: _require_same_classes(config, meta, index))
    label_base = choose_label_base(config, meta["run"]["label_base"], index)
    network = make_network(config, lambda names: _average(found, names) if subject.average else found)
    return Opened(network, f"{subject.of}step {meta['step']}", meta["step"], label_base)


def _evaluate(
    config: EvaluationConfig,
    network: Weights,
    label_base: int,
    index: Index,
    device: Device,
    console: Console,
    subject: str,
) -> Evaluation:
    """Evaluates a network on a split, and prints the result as that of `subject`. Collective."""
    run_on_all_ranks(lambda: check_labels(index, label_base, config.num_classes))
    eval_step = make_eval_step(network, config, device.data_format)
    result = evaluate(eval_step, index, config, label_base, device, Reporter(None, console))
    console.say(
        f"{subject}: {console.paint(result.accuracy(), BOLD)}  "
        f"({result.top1} and {result.top5} of {result.records} records, each once, on {plural(comm.size(), 'rank')})"
    )
    return result


def _require_same_classes(config: EvaluationConfig, meta: Dict[str, Any], index: Index) -> None:
    """Raises Failure(DATA) where labels may not mean what they meant in training: other directories, or another layout."""
    layout, trained, path = index.layout, meta.get("data_format", IMAGENET), RunDir(config.run_dir).classes
    if layout.kind == FOLDERS and path.exists():
        names = class_names(index, 0, len(layout.classes))
        before = list(filter(None, path.read_text(encoding="utf-8").split("\n")))
        if names != before:
            raise data_failure(
                f"{layout.root} has {len(names)} class directories, the run had {len(before)} ({path}), or others: their "
                f"order decides the labels. Put the run's train directory beside it; its class directories may be empty"
            )
    if layout.label_base is None and trained != layout.kind and config.label_base == "auto":
        raise data_failure(
            f"{layout.root}: {TITLES[layout.kind]}; the run was trained on {TITLES.get(trained, trained)}. Say whether its "
            f"labels count from 1 or 0: --label_base=1 (as hvd-vgg prepare writes them) or --label_base=0"
        )


def _load(subject: Subject, run_dir: RunDir) -> checkpoint.Checkpoint:
    pointer = checkpoint.BEST_AVERAGE if subject.average else checkpoint.BEST
    known = {"best": checkpoint.best(run_dir, pointer), "newest": next(iter(run_dir.list_checkpoints()), None)}
    path = known.get(subject.checkpoint, Path(subject.checkpoint))
    if path is None:
        which = f"{subject.checkpoint} checkpoint{' of an average' * subject.average}"
        ema = " with --ema_decay" * subject.average
        raise Failure(
            CONFIGURATION,
            f"{run_dir.checkpoints} has no {which}: is --run_dir a run's{ema}, and has it been evaluated yet? "
            f"--checkpoint=newest needs no evaluation",
        )
    return load_checkpoint(path)


def _average(found: checkpoint.Checkpoint, names: Iterable[str]) -> checkpoint.Checkpoint:
    """Returns the averages in a checkpoint in the place of the variables `names`; Failure(CONFIGURATION) without."""
    try:
        return found._replace(tensors=checkpoint.averaged(found.tensors, names))
    except KeyError as error:
        raise Failure(CONFIGURATION, f"{found.path} holds no average of its weights: the run has no --ema_decay") from error


def load_checkpoint(path: Path) -> checkpoint.Checkpoint:
    """Returns the checkpoint in `path`; raises Failure(CONFIGURATION) if it is not whole."""
    try:
        return checkpoint.load(path)
    except ValueError as error:
        raise Failure(CONFIGURATION, f"{path}: {error}") from error
