"""The training loop with a trainer that only notes what it is asked to do: what happens, and in which order."""

import types

import pytest

from hvd_vgg.errors import STOPPED, Failure
from hvd_vgg.training import loop
from hvd_vgg.training.metrics import NonFiniteStep
from hvd_vgg.training.schedule import Cadence


class FakeTrainer:
    """Twelve updates; evaluations at 6 and 12, a log line every 3, a checkpoint every 4."""

    total_steps = 12

    def __init__(self, first=0, evaluated=0, scores=(5, 7), target=99, stop_at=None, nonfinite=(), overdue=()):
        self.overdue = overdue
        self.progress = types.SimpleNamespace(step=first, evaluated=evaluated, best=-1)
        self.cadence = Cadence(first, frozenset({6, 12}), 3, 4, 0, stop_poll_steps=1)
        self.scores, self.target, self.stop_at, self.nonfinite = list(scores), target, stop_at, list(nonfinite)
        self.done = []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.done.append("exit")

    def evaluation_missed(self):
        return self.progress.step in self.cadence.evaluation_steps and self.progress.evaluated < self.progress.step

    def target_reached(self):
        return self.progress.best >= self.target

    def batches(self):
        return ((step, f"batch {step}") for step in range(self.progress.step, self.total_steps))

    def update(self, step, batch):
        assert batch == f"batch {step}"
        self.done.append(step)
        self.progress.step = step + 1

    def end_update(self):
        self.done.append("end")

    def any_stop_requested(self):
        return self.progress.step == self.stop_at

    def log_metrics(self):
        self.done.append("log")
        if self.nonfinite and self.progress.step > self.nonfinite[0]:
            raise NonFiniteStep(self.nonfinite.pop(0), float("nan"), 1.0)

    def save_overdue(self):
        return self.progress.step in self.overdue

    def check_replicas(self):
        self.done.append("check")

    def evaluate(self):
        self.done.append("evaluate")
        score, self.progress.evaluated = self.scores.pop(0), self.progress.step
        improved, self.progress.best = score > self.progress.best, max(score, self.progress.best)
        return improved

    def save(self, best=False):
        self.done.append("save best" if best else "save")

    def write_result(self):
        self.done.append("result")

    def stop(self):
        self.done.append("stop")
        raise Failure(STOPPED, "stopped", collective=True)

    def rewind_or_stop(self, error):
        self.done.append(f"rewind {error.step}")
        self.progress = types.SimpleNamespace(step=4, evaluated=0, best=-1)

    def finish(self):
        self.done.append("finish")


def train(monkeypatch, trainer):
    """Returns what the loop had `trainer` do, without the updates after which nothing was due."""
    monkeypatch.setattr(loop, "Trainer", lambda config, on_log: trainer)
    monkeypatch.setattr(loop, "rewind_or_stop", FakeTrainer.rewind_or_stop)
    loop.train(None)
    return [what for what in trainer.done if what != "end"]


def test_loop_logs_evaluates_and_saves_in_order(monkeypatch):
    """Weights are compared before they are scored or saved; the result follows the save; the end is one of both."""
    expected = [0, 1, "log", 2, "log", 3, "log", "save", 4, 5, "log", "evaluate", "save best", "result"]
    expected += [6, 7, "log", "save", 8, "log", 9, 10, 11, "log", "evaluate", "save best", "finish", "exit"]
    assert train(monkeypatch, FakeTrainer()) == expected


def test_loop_ends_the_timing_of_each_update_once(monkeypatch):
    """Every update ends either by a log line or by end_update."""
    trainer = FakeTrainer()
    train(monkeypatch, trainer)
    assert trainer.done.count("end") + trainer.done.count("log") == 12


def test_loop_checks_replicas_before_scores_and_checkpoints(monkeypatch):
    """A checkpoint of drifted weights would look whole."""
    trainer = FakeTrainer()
    trainer.cadence = trainer.cadence._replace(check_every_steps=5)
    done = train(monkeypatch, trainer)
    for position, what in enumerate(done):
        if what in ("evaluate", "save"):
            assert "check" in done[position - 2 : position]
    assert done[done.index(4) + 1 : done.index(5)] == ["log", "check"]


def test_loop_saves_when_time_is_over_at_a_log_line(monkeypatch):
    """As at a step at which that is due: replicas are compared first. Between log lines nobody asks for the time."""
    done = train(monkeypatch, FakeTrainer(overdue=(3, 5)))
    assert done[done.index(2) : done.index(5) + 1] == [2, "log", "check", "save", 3, "log", "save", 4, 5]


def test_loop_stops_on_request_at_a_polled_step(monkeypatch):
    """Between log lines too: the metrics so far are reported, and replicas compared, before the checkpoint."""
    trainer = FakeTrainer(stop_at=5)
    with pytest.raises(Failure) as raised:
        train(monkeypatch, trainer)
    assert raised.value.code == STOPPED
    assert trainer.done[-6:] == [4, "log", "check", "save", "stop", "exit"]


def test_loop_stop_request_does_not_skip_what_is_due(monkeypatch):
    """At a step that is evaluated, the score and its checkpoint come before the stop."""
    trainer = FakeTrainer(stop_at=6)
    with pytest.raises(Failure):
        train(monkeypatch, trainer)
    assert trainer.done[-7:] == ["log", "check", "evaluate", "save best", "result", "stop", "exit"]


def test_loop_rewinds_after_a_nonfinite_step(monkeypatch):
    """Nothing after the step that was not finite is logged, scored or saved; the loop starts again from the checkpoint."""
    done = train(monkeypatch, FakeTrainer(nonfinite=[7], scores=(5, 5, 7)))
    cut = done.index("rewind 7")
    assert done[cut - 4 : cut + 6] == ["result", 6, 7, "log", "rewind 7", 4, 5, "log", "evaluate", "save best"]
    assert done[-2:] == ["finish", "exit"]


def test_loop_ends_when_the_target_is_reached(monkeypatch):
    """The checkpoint that reached it is saved, and no more is trained."""
    done = train(monkeypatch, FakeTrainer(target=5))
    assert done[-5:] == ["log", "evaluate", "save best", "finish", "exit"]
    assert max(what for what in done if isinstance(what, int)) == 5


def test_loop_makes_up_a_missed_evaluation_on_resume(monkeypatch):
    """A run stopped before its evaluation scores the checkpoint first, and saves the score with it."""
    done = train(monkeypatch, FakeTrainer(first=6))
    assert done[:3] == ["evaluate", "save best", 6]
    assert train(monkeypatch, FakeTrainer(first=6, evaluated=6))[0] == 6


def test_loop_of_a_complete_run_only_finishes(monkeypatch):
    """Nothing is left to train."""
    assert train(monkeypatch, FakeTrainer(first=12, evaluated=12)) == ["finish", "exit"]
