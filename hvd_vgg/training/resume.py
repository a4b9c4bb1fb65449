"""Continuing a run: from its newest whole checkpoint, and only if it is the same run."""

import contextlib
import dataclasses
from typing import Any, Dict, List, NoReturn, Optional, Tuple

from hvd_vgg.config import BITS, TrainConfig, allowed_changes, hyperparameters
from hvd_vgg.errors import CONFIGURATION, Failure
from hvd_vgg.parallel import comm
from hvd_vgg.parallel.consensus import run_on_root
from hvd_vgg.reporting import receipt
from hvd_vgg.run_dir import RunDir
from hvd_vgg.text import difference_table
from hvd_vgg.training import checkpoint
from hvd_vgg.training.checkpoint_copy import bring_back
from hvd_vgg.training.init_from import INIT_SHA256, init_weights
from hvd_vgg.training.kept_step import read_skipped_steps
from hvd_vgg.training.reporter import Reporter
from hvd_vgg.training.state import CHECKPOINT_FORMAT, State, TrainProgress, assign_variables, find_mismatch

# Flags that decide which record is due when: of an epoch in which one of them has changed nothing can be proved.
_ORDER = {"global_batch", "seed", "shuffle_block_records"}


def restore_state(
    state: State,
    config: TrainConfig,
    run: Dict[str, Any],
    arithmetic: Dict[str, str],
    reporter: Reporter,
    copy: Optional[RunDir] = None,
) -> Tuple[TrainProgress, List[str]]:
    """Brings `state` of all ranks to the newest checkpoint in --run_dir, or to rank 0's initial weights. Collective.

    Returns how far the run is, and the layers whose gradient is formed from gathered factors: as they were when it began.

    run: `run_fingerprint` of this run, which gets these layers; arithmetic: of `describe_arithmetic`; copy: of
    `open_copy_dir`. Damaged checkpoints newer than the one it continues from are renamed. Raises a collective
    Failure(CONFIGURATION) when no checkpoint is whole, or when the run is another.
    """
    run_dir = RunDir(config.run_dir)

    def restore() -> List[Any]:
        progress = _restore_root(state, config, run_dir, run, arithmetic, reporter, copy)
        # A checkpoint knows the steps skipped before it; a later one, which it was itself rewound to, is kept beside it.
        progress.skipped_steps = sorted({*progress.skipped_steps, *read_skipped_steps(run_dir)})
        return [dataclasses.asdict(progress), run["exchange"]]

    found = run_on_root(restore)
    comm.broadcast_variables(list(state.variables().values()))
    fields, factored = comm.broadcast_json(found)
    return TrainProgress(**fields), factored


def _restore_root(
    state: State,
    config: TrainConfig,
    run_dir: RunDir,
    run: Dict[str, Any],
    arithmetic: Dict[str, str],
    reporter: Reporter,
    copy: Optional[RunDir] = None,
) -> TrainProgress:
    checkpoint.clean(run_dir)
    if copy:
        checkpoint.clean(copy)
    found, faults = checkpoint.newest(run_dir, copy)
    if found is None:
        _check_none_was_saved(run_dir)
        if config.init_from:
            init_weights(state, config, run[INIT_SHA256], reporter)
        return TrainProgress()
    if found.meta.get("format") != CHECKPOINT_FORMAT:
        raise Failure(
            CONFIGURATION,
            f"{found.path} was written by another version of hvd_vgg, whose log this one does not continue: use that "
            f"version, or another --run_dir",
        )
    before = found.meta["run"]
    if config.exchange == "auto":
        run["exchange"] = before["exchange"]
    # What only the bits of sums depend on.
    free = {"exchange", "device_batch"} if {before["reproducible"], config.reproducible} != {BITS} else set()
    changed = [key for key in {**before, **run} if before.get(key) != run.get(key) and key not in free]
    refused = [key for key in changed if key not in allowed_changes(config)]
    if refused:
        _refuse(refused, find_mismatch(state.variables(), found), found, run, run_dir)
    assign_variables(state.variables(), found)
    for path, reason in faults.items():
        try:
            renamed = checkpoint.set_aside(path)
        except OSError as error:
            reporter.say(f"{path} is damaged ({reason}), and cannot be renamed ({error.strerror})")
            continue
        reporter.say(f"{path} is damaged ({reason}): renamed to {renamed.name}")
        reporter.event("checkpoint_damaged", file=path.name, reason=reason, renamed=renamed.name)
    if copy and found.path.parent == copy.checkpoints:
        found = bring_back(found, run_dir, copy, reporter)
    with contextlib.suppress(OSError):  # it may have been killed before `best` could name it
        checkpoint.point_to_best(found.path, found.meta.get("best", []))
    for key in changed:
        reporter.say(f"--{key} was {before.get(key)}, is {run.get(key)} from here on")
        reporter.event("config_changed", flag=key, before=before.get(key), after=run.get(key))
    _compare_arithmetic(found.meta["arithmetic"], arithmetic, config, reporter)
    reporter.say(f"continuing from step {found.meta['step']}: {found.path}")
    reporter.event("resume", **{"from": found.meta["step"]}, checkpoint=found.path.name)
    fields = [field.name for field in dataclasses.fields(TrainProgress)]
    progress = TrainProgress(**{name: found.meta[name] for name in fields if name in found.meta})
    if _ORDER & set(changed):
        progress.coverage = []
    return progress


def _compare_arithmetic(before: Dict[str, str], now: Dict[str, str], config: TrainConfig, reporter: Reporter) -> None:
    """Says and logs what of `describe_arithmetic` has changed, which decides the bits and is no reason to refuse."""
    changed: Dict[str, Any] = {name: now.get(name) for name in {**before, **now} if before.get(name) != now.get(name)}
    if changed and config.reproducible == BITS:
        table = difference_table({name: before.get(name) for name in changed}, changed, ("until now", "here"))
        reporter.say(f"equal to rounding only from here, not in every bit, since this computes otherwise:\n{table}")
        reporter.event("arithmetic_changed", before={name: before.get(name) for name in changed}, after=changed)


def _check_none_was_saved(run_dir: RunDir) -> None:
    """Raises Failure(CONFIGURATION) where checkpoints in the log are gone: a run never starts over silently."""
    saved = [line.data["file"] for line in receipt.read_log(run_dir.log) if line.kind == "checkpoint"]
    if saved:
        raise Failure(
            CONFIGURATION,
            f"{run_dir.checkpoints} holds no checkpoint, but according to the log {saved[-1]} was saved: restore it "
            f"from a copy, or start over in another --run_dir",
        )


def _refuse(keys: List[str], mismatch: str, found: checkpoint.Checkpoint, run: Dict[str, Any], run_dir: RunDir) -> NoReturn:
    """Raises Failure(CONFIGURATION) with what differs, and what of it --allow_config_change may admit."""
    before, own = found.meta["run"], f"the run's own flags (--flagfile={run_dir.flags})"
    table = difference_table({k: before.get(k) for k in keys}, {k: run.get(k) for k in keys}, ("checkpoint", "command"))
    if INIT_SHA256 in keys:
        fix = "Weights of another --init_from are another run: use another --run_dir, or the file that this run began with"
    elif "train_data_sha256" in keys:
        fix = "Another data set is another run: use another --run_dir, or the data that this run began with"
    elif mismatch:
        fix = f"Another network is another run: use another --run_dir, or {own}"
    elif set(keys) <= set(hyperparameters()):
        fix = f"Use {own}, another --run_dir, or allow a flag to change by name: --allow_config_change={','.join(keys)}"
    else:  # --label_base, or what another version of hvd_vgg has written
        fix = f"Use {own}, or another --run_dir"
    raise Failure(CONFIGURATION, f"{found.path} is of another run:\n{table}\n{fix}")


def require_checkpoints(config: TrainConfig, copy: Optional[RunDir] = None) -> None:
    """Raises Failure(CONFIGURATION) unless there are checkpoints, or copies, or none, as --resume says; for rank 0."""
    run_dir, resume = RunDir(config.run_dir), config.resume
    if resume not in ("required", "never"):
        return
    found = run_dir.list_checkpoints() or (copy.list_checkpoints() if copy else [])
    if resume == "required" and not found:
        raise Failure(CONFIGURATION, f"--resume=required, but {run_dir.checkpoints} holds no checkpoint")
    if resume == "never" and found:
        raise Failure(
            CONFIGURATION,
            f"--resume=never, but {found[0].parent} holds {len(found)} checkpoints, which are never "
            f"overwritten: use another --run_dir or --checkpoint_copy_dir",
        )
