"""Goodput of logs made by hand, whose seconds are known; and what a clock that is set does to them."""

import pytest

from hvd_vgg.reporting.goodput import PARTS, Goodput, describe
from hvd_vgg.reporting.receipt import LogLine


class Log:
    """Lines of a log; `clock` is the host's, `now` the time since it booted."""

    def __init__(self):
        self.lines, self.now, self.clock_ahead, self.began = [], 5000.0, 1e9, 0.0

    def add(self, kind, after, step=-1, **data):
        self.now += after
        self.lines.append(LogLine(0, kind, {}, -1, step, data, self.now + self.clock_ahead, 0.0))

    def start(self, after, step, age=3.0, boot="a"):
        boot = {"id": boot, "seconds": self.now + after + age}
        self.add("start", after + age, step, process_seconds=age, boot=boot)

    def train(self, step, *seconds, rest=0.0):
        self.add("train", sum(seconds) + rest, step, **{"train.update_seconds": list(seconds)})

    def parts(self):
        found = Goodput(self.lines).report()
        seconds = found["goodput_seconds"]
        assert list(seconds) == list(PARTS) and min(seconds.values()) >= 0
        assert found["goodput"] == pytest.approx(seconds["training"] / sum(seconds.values()))
        return {name: pytest.approx(value) for name, value in seconds.items() if value > 1e-6}


@pytest.fixture
def log():
    """A run that was killed 7 s after its line of step 4, with a checkpoint of step 2, and started again 10 s later."""
    log = Log()
    log.start(0, 0)
    log.train(2, 1.0, 0.5, rest=2.0)
    log.train(4, 0.5, 0.25, rest=0.125)
    return log


EXPECTED = {"training": 2.25 + 0.5, "recomputed": 0.75, "starting": 3 + 2 + 3 + 4, "saving": 0.125, "restarting": 17.0}


def again(log):
    log.start(17.0, 2)
    log.train(3, 0.75, rest=4.0)
    log.train(4, 0.5)


def test_goodput_counts_updates_once(log):
    """What was made again after the kill, and what reached no line, is lost."""
    again(log)
    assert log.parts() == EXPECTED


@pytest.mark.parametrize("seconds", [-3600.0, 86400.0])
def test_goodput_does_not_depend_on_the_hosts_clock(log, seconds):
    """Set between the two starts, or in the first one after its last line."""
    log.clock_ahead += seconds
    again(log)
    assert log.parts() == EXPECTED


def test_goodput_between_hosts_is_never_negative(log):
    """Another host has another boot, and a clock that is an hour behind."""
    log.clock_ahead -= 3600
    log.start(17.0, 2, boot="b")
    assert "restarting" not in log.parts()


def test_goodput_tells_evaluation_saving_and_stops_apart(log):
    log.add("evaluation", 5.0, 4)
    log.add("checkpoint", 0.5, 4)  # by another thread: nothing waits for it
    log.add("throughput", 1.0, 4)
    log.add("stopped", 0.25, 4)
    log.start(100.0, 4)
    log.train(5, 0.5, rest=1.0)
    expected = {"training": 2.75, "starting": 9.0, "saving": 0.125 + 1.75, "evaluation": 5.0, "stopped": 100.0}
    assert log.parts() == expected
    assert describe(Goodput(log.lines).report()) == (
        "2.3% of 1 min 59 s; the rest: stopped 1 min 40 s, starting 9 s, evaluation 5 s, saving 2 s"
    )


def test_goodput_after_a_rewind(log):
    """The updates since the last line, and those after the checkpoint, are made again."""
    log.add("rewind", 4.0, to=2, update_seconds=[0.5, 0.5])
    log.train(4, 0.5, 0.5)
    assert log.parts() == {"training": 2.5, "recomputed": 1.75, "starting": 5.0, "saving": 0.125, "rewinding": 3.0}


def test_goodput_of_a_suspended_job(log):
    """A night is part of the wall time, and of no update."""
    log.add("suspended", 0.0, 4, seconds=30000.0)
    log.train(6, 0.5, 0.5, rest=30001.0)
    assert log.parts() == {"training": 3.25, "starting": 5.0, "saving": 1.125, "suspended": 30000.0}


def test_goodput_of_lines_that_are_written_late(log):
    """By 0.25 s, once: the next line comes as much sooner after it, and the updates count in full."""
    log.train(6, 0.5, 0.5, rest=0.25)
    log.train(8, 0.5, 0.5, rest=-0.25)
    assert log.parts() == {"training": 4.25, "starting": 5.0, "saving": 0.125}
    log.train(9, 0.5, rest=-0.25)  # the first line of all was late
    assert log.parts() == {"training": 4.75, "starting": 4.875}


def test_goodput_of_no_or_a_damaged_log():
    """Lines without a start, as of another version, are no time."""
    line = LogLine(1, "train", {}, 0, 2, {"train.update_seconds": [1.0]}, 5.0, 0.0)
    for lines in ([], [line]):
        assert Goodput(lines).report()["goodput"] is None
