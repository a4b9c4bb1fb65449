"""Whether two runs are the same, and where they part: `hvd-vgg verify-run A --same_as=B`.

What logs and checkpoints say is compared; that B's are as B left them is for `hvd-vgg verify-run B` to say.
"""

from typing import Any, Dict, Iterator, Mapping, NamedTuple, Optional, Sequence, Set

from hvd_vgg.commands.history import PASS, UNKNOWN, Attempt, Findings, History, read_history
from hvd_vgg.config import ModelConfig, fingerprint
from hvd_vgg.flags import format_value
from hvd_vgg.models.architecture import layers_of
from hvd_vgg.reporting import receipt
from hvd_vgg.run_dir import RunDir, checkpoint_step
from hvd_vgg.text import plural
from hvd_vgg.training import checkpoint


class Course(NamedTuple):
    """What a run has trained; of what it trained more than once, the last time.

    losses: by step, or "skipped"; states: `state_sha256` by the step of an evaluation.
    """

    losses: Dict[int, Any]
    states: Dict[int, Any]

    @property
    def end(self) -> int:
        """The number of updates."""
        return max(self.losses, default=-1) + 1

    def until(self, end: int) -> "Course":
        """Returns what is of the first `end` updates."""
        losses = {step: loss for step, loss in self.losses.items() if step < end}
        return Course(losses, {step: state for step, state in self.states.items() if step <= end})


def compare_runs(
    run: RunDir, other: RunDir, weights: bool = True, histories: Optional[Sequence[History]] = None
) -> Findings:
    """Yields how two runs differ and where they part, in one sentence; returns what is equal if they do not.

    A run that has not come as far as the other is the same so far. weights: whether to compare those of checkpoints,
    which are read where they differ; histories: of the logs, if they have been read.
    """
    if histories is None:
        histories = [read_history(receipt.read_log(each.log)) for each in (run, other)]
    courses = [_read_course(history) for history in histories]
    end = min(course.end for course in courses)
    if not end:
        pairs = zip((run, other), histories, courses)
        return UNKNOWN, "; ".join(_why_nothing(each, history) for each, history, course in pairs if not course.end)
    mine, theirs = (course.until(end) for course in courses)
    states = sorted({*mine.states} & {*theirs.states})
    saved = sorted(_saved_steps(run, end) & _saved_steps(other, end)) if weights else []
    losses = _differences("losses part at step {} ({} and {})", mine.losses, theirs.losses)
    scored = ({step: course.states[step] for step in states} for course in (mine, theirs))
    faults = [
        *_differences("{} is {} and {}", *(_settings(history.attempts[-1]) for history in histories)),
        next(losses, ""),
        next(_differences("state SHA-256 differs at step {} ({:.16} and {:.16})", *scored), ""),
        next(filter(None, (_compare_checkpoints(run, other, step) for step in saved)), ""),
    ]
    if any(faults):
        computed = (history.attempts[-1].start.data.get("arithmetic") or {} for history in histories)
        yield "; ".join(filter(None, [*faults, *_differences("{} is {} and {}", *computed)]))  # why it may be so
    last = f" (the last at step {states[-1]})" if states else ""
    text = f"losses of {plural(end, 'step')}, state SHA-256 at {plural(len(states), 'evaluation')}{last} and weights and "
    text += f"momentum of {plural(len(saved), 'checkpoint')} are equal"
    if courses[0].end != courses[1].end:
        text = f"so far: {text}; the run ends at step {courses[0].end}, the other at step {courses[1].end}"
    return PASS if states or saved else UNKNOWN, text


def _why_nothing(run: RunDir, history: History) -> str:
    """Returns why a log has nothing that a run trained."""
    if not any(line.kind for line in history.lines):
        return f"{run.path} has no log that can be read"
    if any(line.kind == "train" for line in history.lines) and not history.select("train"):
        return f"the log of {run.path} has updates, but not the start, with its configuration, that they belong to"
    return f"{run.path} has trained nothing yet"


def _read_course(history: History) -> Course:
    course = Course({}, {})
    for attempt in history.attempts:
        for line in [attempt.start, *attempt.lines]:
            if line.kind in ("start", "rewind"):  # what came after this step is trained again
                course = course.until(line.step if line.kind == "start" else int(line.data["to"]))
            elif line.kind == "train":
                newest = ["skipped" if loss is None else loss for loss in line.data["train.losses"]]
                course.losses.update(zip(range(line.step - len(newest), line.step), newest))
            elif line.kind == "evaluation":
                course.states[line.step] = line.data["eval.state_sha256"]
    return course


def _settings(attempt: Attempt) -> Dict[str, Any]:
    """Returns the flags and data that decide a run; of its length, however it was given, the log has the steps."""
    flags = {f"--{name}": format_value(value) for name, value in fingerprint(attempt.config).items() if name != "epochs"}
    return {**flags, **{f"{split} data": row["sha256"] for split, row in attempt.start.data["data"].items()}}


def _differences(text: str, mine: Mapping[Any, Any], theirs: Mapping[Any, Any]) -> Iterator[str]:
    """Yields `text` with the key and both values, in the order of keys, where they differ."""
    for key in sorted({*mine, *theirs}):
        values = mine.get(key, "missing"), theirs.get(key, "missing")
        if values[0] != values[1]:
            yield text.format(key, *values)


def _saved_steps(run: RunDir, end: int) -> Set[int]:
    return {step for step in map(checkpoint_step, run.list_checkpoints()) if step is not None and step <= end}


def _compare_checkpoints(run: RunDir, other: RunDir, step: int) -> str:
    """Returns what differs first, in the order of the network: weights, then moments, then momentum; "" if all agree.

    Of the headers alone as long as nothing differs.
    """
    paths = run.checkpoint(step), other.checkpoint(step)
    if len({receipt.checkpoint_row(path)["sha256"] for path in paths}) == 1:
        return ""
    mine, theirs = (checkpoint.load(path) for path in paths)
    shape = {name: mine.meta["run"][name] for name in ("model", "width", "image_size", "num_classes", "head")}
    layers = layers_of(ModelConfig(**shape))
    weights = [name for layer in layers for name in layer.weights]
    kinds = dict.fromkeys(weights, "weights")
    kinds.update((name, "moving moments") for layer in layers for name in layer.moments)
    kinds.update((f"{name}/momentum", "momentum") for name in weights)
    order = [*kinds, *sorted({*mine.tensors, *theirs.tensors})]
    digests = [{name: checkpoint.tensor_digest(each.tensors[name]) for name in each.tensors} for each in (mine, theirs)]
    first = next(name for name in order if digests[0].get(name) != digests[1].get(name))
    kind = kinds.get(first, "other state")
    return f"{kind} first differ{'s' if kind == 'other state' else ''} in {first} (checkpoint of step {step})"
