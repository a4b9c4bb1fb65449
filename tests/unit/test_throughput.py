import itertools

import pytest

from hvd_vgg.models.architecture import training_flops, vgg_layers
from hvd_vgg.reporting.throughput import (
    Bottleneck,
    StepTime,
    Throughput,
    find_bottleneck,
    format_table,
    limiting_part,
    mean_shares,
    per_host,
    per_rank,
    slowest,
    steady_from,
    watchdog,
)


def test_throughput_counts_steady_updates_alone(monkeypatch):
    """Neither the warm-up nor what is excluded counts, but for fps_wall."""
    clock = [100.0]
    monkeypatch.setattr(watchdog, "active_seconds", lambda: clock[0])
    measured = Throughput()
    assert measured.summary(30)["fps"] is None
    spent = itertools.chain([(1.0, 9.0), (1.0, 4.0)], itertools.repeat((0.1, 0.2)))

    def batches():
        for wait, _ in itertools.islice(spent, 12):
            clock[0] += wait
            yield wait

    for number, wait in enumerate(measured.timed(batches())):
        clock[0] += {0: 9.0, 1: 4.0}.get(number, 0.2)
        assert measured.input_seconds[-1] == pytest.approx(wait)
        measured.end_update()
        with measured.exclude("evaluation" if number % 2 else "saving"):
            clock[0] += 50.0
    measured.exchange_seconds.extend([0.05] * 12)
    summary = measured.summary(30)
    assert (summary["fps_updates"], summary["warm_up_updates"], summary["steady"]) == (10, 2, True)
    assert summary["fps"] == pytest.approx(100)
    assert summary["warm_up_seconds"] == pytest.approx(15)
    assert summary["fps_standard_deviation"] == pytest.approx(0, abs=1e-6)
    assert summary["fps_wall"] == pytest.approx(12 * 30 / (15 + 3 + 600))
    assert measured.excluded_seconds == {
        "evaluation": pytest.approx(300),
        "saving": pytest.approx(300),
        "profiling": 0,
        "rewinding": 0,
    }
    assert measured.last(10) == pytest.approx((3.0, 1.0, 0.5))
    assert StepTime(*measured.last(10)).compute == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("seconds", "first", "found"),
    [
        ([], 0, False),
        ([5.0], 1, False),
        ([5.0, 1.0], 1, True),
        ([1.0] * 8, 0, True),
        ([9.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 2, True),
        ([9.0, 1.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 3, True),  # one quick update among slow ones is not yet steady
        ([1.0, 1.0, 1.0, 1.0, 9.0, 1.0, 1.0, 1.0, 1.0, 1.0], 0, True),  # a hiccup is part of the run
        ([9.0] + [1.0, 1.05, 0.95, 1.08] * 4, 1, True),
        ([64.0, 32.0, 16.0, 8.0, 4.0, 2.0, 1.0, 0.5], 2, False),  # never steady: a third is left out
        ([3.0] * 40 + [1.0] * 60, 20, False),  # slow for long: that is no warm-up
        ([3.0] * 20 + [1.0] * 60, 20, True),
    ],
)
def test_steady_from_finds_the_first_steady_update(seconds, first, found):
    assert steady_from(seconds) == (first, found)


def test_throughput_counts_slow_input_as_no_warm_up():
    measured = Throughput()
    measured.input_seconds = [0.2] + [0.3] * 49 + [0.0] * 50  # the first half comes from cold storage
    measured.total_seconds = [5.2] + [0.4] * 49 + [0.1] * 50
    summary = measured.summary(10)
    assert (summary["warm_up_updates"], summary["steady"]) == (1, True)
    assert summary["fps"] == pytest.approx(990 / (0.4 * 49 + 0.1 * 50))


@pytest.mark.parametrize(
    ("times", "cause", "ranks"),
    [
        ([StepTime(10, 0.1, 0.0)], "compute", ()),
        ([StepTime(10, 7.0, 0.0)], "input", ()),
        ([StepTime(10, 0.4, 0.0)], "compute", ()),  # handing over
        ([StepTime(10, 3.0, 0.0)], "input", ()),  # a pipeline that works ahead is waited for: faster computing gains nothing
        ([StepTime(10, 4.5, 0.1), StepTime(10, 3.5, 0.6)], "input", ()),
        ([StepTime(10, 0.9, 6.0), StepTime(10, 1.0, 6.5)], "input", ()),
        ([StepTime(10, 0.1, 3.0), StepTime(10, 0.1, 3.0)], "compute", ()),
        ([StepTime(10, 0.1, 6.0), StepTime(10, 0.1, 6.5)], "network", ()),
        ([StepTime(10, 0.1, 6.0), StepTime(10, 5.0, 1.0), StepTime(10, 0.1, 6.1)], "input", (1,)),
        ([StepTime(10, 0.1, 6.0), StepTime(10, 0.1, 5.9), StepTime(10, 0.2, 1.0)], "compute", (2,)),
        ([StepTime(10, 0.1, 6.0), StepTime(10, 5.0, 1.0)], "input", (1,)),
        ([StepTime(10, 0.1, 4.0), StepTime(10, 0.1, 3.1)], "compute", ()),  # busy longer by less than a tenth
        (
            [StepTime(10, 0.1, 1.1), StepTime(10, 0.1, 1.0), StepTime(10, 0.1, 6.0), StepTime(10, 0.1, 6.1)],
            "compute",
            (1, 0),
        ),
        ([StepTime(10, 0.1, 1.0), StepTime(10, 0.1, 1.0), StepTime(10, 0.1, 6.0)], "compute", ()),  # most are slow: all are
    ],
)
def test_find_bottleneck_names_cause_and_ranks(times, cause, ranks):
    assert find_bottleneck(times) == Bottleneck(cause, ranks)
    assert find_bottleneck(times).rank == (ranks[0] if ranks else None)


def test_mean_shares_are_of_all_ranks_together():
    """Of 40 s: 6 s of input, twice the least exchange of 2 s, 6 s for the straggler, and the rest."""
    shares = mean_shares([StepTime(10, 1.0, 2.0), StepTime(30, 5.0, 8.0)])
    assert shares == pytest.approx({"input": 0.15, "compute": 0.6, "network": 0.1, "straggler_wait": 0.15})


def test_slowest_rank_need_not_be_a_straggler():
    rows = per_rank([StepTime(10, 0.1, 6.0), StepTime(10, 0.1, 5.5), StepTime(10, 0.1, 5.9)], ["a"] * 3, [100] * 3)
    assert find_bottleneck([StepTime(10, 0.1, 6.0), StepTime(10, 0.1, 5.5), StepTime(10, 0.1, 5.9)]).rank is None
    assert (slowest(rows)["rank"], limiting_part(slowest(rows))) == (1, "network")
    rows = per_rank([StepTime(10, 0.1, 1.0), StepTime(10, 0.8, 0.9)], ["a"] * 2, [100, 100])
    assert [limiting_part(row) for row in rows] == ["compute", "input"]


def test_format_table_of_a_small_and_a_large_job():
    """Every rank of the small one; hosts, and the slowest three ranks, of the large one."""
    times = [StepTime(10, 1.0, 3.0), StepTime(10, 4.0, 1.0)]
    rows = per_rank(times, ["a", "b"], [100, 90])
    assert [(row["fps"], row["fps_alone"]) for row in rows] == [(10, pytest.approx(100 / 7)), (9, 10)]
    assert [(row["input"], row["compute"], row["network"], row["straggler_wait"]) for row in rows] == [
        (0.1, 0.6, 0.1, 0.2),
        (0.4, 0.5, 0.1, 0.0),
    ]
    assert [(row["host"], row["ranks"], row["fps"]) for row in per_host(rows)] == [("a", 1, 10), ("b", 1, 9)]
    assert len(format_table(rows).splitlines()) == 1 + 2 + 2
    many = per_rank([*times] * 16, [f"host{rank // 8}" for rank in range(32)], [100] * 32)
    lines = format_table(many).splitlines()
    assert len(lines) == 1 + 4 + 3
    assert lines[1].split()[:4] == ["all", "8", "host0", "80.0"]
    assert [line.split()[0] for line in lines[5:]] == ["1", "3", "5"]


def test_training_flops_of_vgg16_as_counted_by_hand():
    assert training_flops(vgg_layers("vgg16", 1.0, 224, 1000), 224) == pytest.approx(92.65e9, rel=1e-3)
