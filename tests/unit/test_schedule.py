"""What is due when: the learning rate, and the cadence of the loop."""

import math

import pytest

from hvd_vgg.config import TrainConfig
from hvd_vgg.training.schedule import (
    Cadence,
    Due,
    epochs_to_steps,
    evaluation_steps,
    is_evaluation_step,
    learning_rate,
    make_cadence,
    stop_poll_steps,
    total_steps,
)


def due(**true):
    return Due(**{**dict.fromkeys(Due._fields, False), **true})


CADENCE = Cadence(
    first_step=0,
    evaluation_steps=frozenset({50, 120}),
    log_every_steps=20,
    save_every_steps=30,
    check_every_steps=70,
    stop_poll_steps=7,
)
TABLE = [
    (1, due()),
    (2, due(poll=True, log=True)),  # the first line comes early
    (7, due(poll=True)),
    (20, due(poll=True, log=True)),
    (30, due(poll=True, log=True, check_replicas=True, save=True)),  # weights are compared before they are saved
    (50, due(poll=True, log=True, check_replicas=True, evaluate=True)),  # and before they are evaluated
    (60, due(poll=True, log=True, check_replicas=True, save=True)),
    (70, due(poll=True, log=True, check_replicas=True)),
    (120, due(poll=True, log=True, check_replicas=True, evaluate=True, save=True)),
]


@pytest.mark.parametrize(("step", "expected"), TABLE, ids=[str(step) for step, _ in TABLE])
def test_cadence_due_is_a_function_of_the_step(step, expected):
    """Everything that the loop does beside updates follows from the step alone."""
    assert CADENCE.due(step) == expected


def test_cadence_first_log_counts_from_the_start_of_the_process():
    """A resumed run logs early too; periods count from the start of the run."""
    resumed = CADENCE._replace(first_step=101)
    assert resumed.due(103) == due(poll=True, log=True)
    assert not CADENCE.due(103).log
    assert resumed.due(140).log


def test_cadence_zero_means_never():
    """0 turns saving, comparing and the extra polls off; the end of the run is always evaluated."""
    cadence = make_cadence(TrainConfig(steps=10, save_every_steps=0, drift_every_steps=0, eval_every_epochs=0), 100, 0)
    cadence = cadence._replace(stop_poll_steps=0)
    assert {step for step in range(1, 11) if cadence.due(step) != due()} == {2, 10}
    assert cadence.due(10) == due(poll=True, log=True, evaluate=True)


def test_total_steps_is_the_ceiling_of_epochs():
    """ceil(epochs * records / global_batch), or --steps."""
    assert total_steps(TrainConfig(epochs=90, global_batch=256), 1_281_167) == 450_411
    assert total_steps(TrainConfig(epochs=2, global_batch=32), 75) == 5
    assert total_steps(TrainConfig(epochs=0.001, global_batch=32), 75) == 1
    assert total_steps(TrainConfig(epochs=2, steps=7), 75) == 7


def test_evaluation_steps_end_with_the_run():
    """One after each --eval_every_epochs of the stream, and the last update."""
    config = TrainConfig(epochs=2.5, global_batch=32, eval_every_epochs=1)
    assert evaluation_steps(config, 75) == {3, 5, 6}
    assert evaluation_steps(TrainConfig(steps=9, eval_every_epochs=0), 75) == {9}
    for every, batch, records in ((1, 32, 75), (0.1, 32, 75), (0.03, 7, 1000), (2.5, 64, 50), (1 / 3, 10, 30)):
        config = TrainConfig(epochs=7, global_batch=batch, eval_every_epochs=every)
        found = {step for step in range(-1, 1100) if is_evaluation_step(step, config, records)}
        assert found == evaluation_steps(config, records)


def test_learning_rate_step_divides_at_each_epoch():
    """--lr_schedule=step divides the rate by 10 at the first step of each of --lr_step_epochs."""
    config = TrainConfig(global_batch=256)
    records = 1_281_167
    at30, at60 = (epochs_to_steps(epoch, config, records) for epoch in (30, 60))
    rates = [learning_rate(s, config, records) for s in (0, at30 - 1, at30, at60 - 1, at60, 450_410)]
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001])
    assert at30 * 256 >= 30 * records > (at30 - 1) * 256


def test_learning_rate_cosine_falls_to_zero_after_warm_up():
    """The rate rises linearly over --warmup_epochs, then falls along half a cosine."""
    config = TrainConfig(lr=0.4, lr_schedule="cosine", epochs=10, warmup_epochs=1, global_batch=10)
    rates = [learning_rate(s, config, 100) for s in range(100)]
    assert rates[:10] == pytest.approx([0.04 * (s + 1) for s in range(10)])
    assert rates[10] == pytest.approx(0.4)
    assert rates[55] == pytest.approx(0.2)
    assert rates[99] == pytest.approx(0.2 * (1 + math.cos(math.pi * 89 / 90)))
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))


def test_learning_rate_constant_is_constant():
    """--lr_schedule=constant is --lr at every step."""
    config = TrainConfig(lr=0.3, lr_schedule="constant", warmup_epochs=0)
    assert {learning_rate(s, config, 100) for s in range(50)} == {0.3}


def test_stop_poll_steps_take_five_seconds():
    """At least every update; a later window says how fast updates have become."""
    assert [stop_poll_steps(0.5), stop_poll_steps(0.05), stop_poll_steps(20.0)] == [10, 100, 1]
