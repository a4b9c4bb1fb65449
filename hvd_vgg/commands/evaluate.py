"""The `evaluate` command: scores checkpoints of a run on the validation records."""

from pathlib import Path
from typing import List, NamedTuple, Sequence

from hvd_vgg.config import EvaluateConfig, EvaluationConfig
from hvd_vgg.data.index import Index, check_labels
from hvd_vgg.errors import CONFIGURATION, Failure
from hvd_vgg.parallel import comm
from hvd_vgg.parallel.consensus import run_on_all_ranks, run_on_root
from hvd_vgg.parallel.init import Device
from hvd_vgg.reporting.console import Console
from hvd_vgg.run_dir import RunDir
from hvd_vgg.text import plural
from hvd_vgg.training import checkpoint
from hvd_vgg.training.dataset import open_split
from hvd_vgg.training.evaluate import Evaluation, evaluate, make_eval_step
from hvd_vgg.training.reporter import Reporter
from hvd_vgg.training.startup import join_ranks
from hvd_vgg.training.state import assign_variables, data_digest, initial_network


class Score(NamedTuple):
    """The evaluation of the checkpoint of `step`, and the digest of the data."""

    step: int
    result: Evaluation
    data_sha256: str


def evaluate_run(config: EvaluateConfig) -> None:
    """Evaluates a checkpoint of the run in --run_dir on the validation split. Collective."""
    score(config, [config.checkpoint])


def score(config: EvaluationConfig, checkpoints: Sequence[str]) -> List[Score]:
    """Evaluates checkpoints of the run in --run_dir on the validation split, and prints each score. Collective.

    checkpoints: `best`, `newest`, or paths. Raises a collective Failure(CONFIGURATION) where there is none, or it does not
    fit.
    """
    device, console, _ = join_ranks(config)
    index = open_split(config.data_dir, "validation", Path(config.run_dir), console)
    scores = [_score(config, name, index, device, console) for name in checkpoints]
    comm.shutdown()
    return scores


def _score(config: EvaluationConfig, name: str, index: Index, device: Device, console: Console) -> Score:
    found = run_on_root(lambda: _load(name, RunDir(config.run_dir)))
    meta = comm.broadcast_json(found.meta if found else None)
    label_base = meta["run"]["label_base"] if config.label_base == "auto" else int(config.label_base)
    run_on_all_ranks(lambda: check_labels(index, label_base, config.num_classes))
    weights, moments = initial_network(config, seed=0)
    run_on_root(lambda: assign_variables({**weights, **moments}, found))
    comm.broadcast_variables([*weights.values(), *moments.values()])
    eval_step = make_eval_step(weights, moments, config, device.data_format)
    result = evaluate(eval_step, index, config, label_base, device, Reporter(None, console))
    console.say(
        f"step {meta['step']}: {result.accuracy()}  "
        f"({result.top1} and {result.top5} of {result.records} records, each once, on {plural(comm.size(), 'rank')})"
    )
    return Score(meta["step"], result, data_digest(index))


def _load(name: str, run_dir: RunDir) -> checkpoint.Checkpoint:
    known = {"best": checkpoint.best(run_dir), "newest": next(iter(run_dir.list_checkpoints()), None)}
    path = known.get(name, Path(name))
    if path is None:
        raise Failure(
            CONFIGURATION,
            f"{run_dir.checkpoints} has no {name} checkpoint: is --run_dir a run's, and has it been evaluated yet? "
            f"--checkpoint=newest needs no evaluation",
        )
    return load_checkpoint(path)


def load_checkpoint(path: Path) -> checkpoint.Checkpoint:
    """Returns the checkpoint in `path`; raises Failure(CONFIGURATION) if it is not whole."""
    try:
        return checkpoint.load(path)
    except ValueError as error:
        raise Failure(CONFIGURATION, f"{path}: {error}") from error
