import os
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from hvd_vgg.model import vgg
from hvd_vgg.model.layers import layers
from hvd_vgg.parallel import comm, exchange
from hvd_vgg.run import machine
from hvd_vgg.run.health import CONFIGURATION, DATA, Failure


def test_sums_of_integers_are_exact_beyond_what_floats_hold():
    values = np.array([2**60 + comm.rank(), -(2**59), 0], np.int64)
    expected = [comm.size() * 2**60 + sum(range(comm.size())), -comm.size() * 2**59, 0]
    assert comm.sum_over_ranks(values).tolist() == expected
    assert comm.sum_over_ranks(np.array([0.5])).tolist() == [0.5 * comm.size()]


def test_gather_keeps_order_and_lengths_even_of_nothing():
    assert comm.gather(b"x" * comm.rank()) == [b"x" * rank for rank in range(comm.size())]
    assert comm.gather(b"") == [b""] * comm.size()
    assert comm.from_root(b"root" if comm.is_root() else b"other") == b"root"


def test_variables_become_rank_0s():
    variables = [tf.Variable([1.0 * comm.rank(), 2.0]), tf.Variable([[7.0 + comm.rank()]])]
    comm.broadcast_variables(variables)
    assert [variable.numpy().tolist() for variable in variables] == [[0.0, 2.0], [[7.0]]]


def test_a_failure_on_one_rank_is_raised_on_all_with_its_rank():
    last = comm.size() - 1

    def fail_on_last():
        if comm.rank() == last:
            raise Failure(DATA, "broken")
        return 1

    with pytest.raises(Failure) as raised:
        comm.together(fail_on_last)
    assert (raised.value.code, raised.value.message, raised.value.agreed) == (DATA, f"rank {last}: broken", True)
    assert comm.together(comm.rank) == comm.rank()


def test_a_failure_on_all_ranks_is_told_once():
    def fail():
        raise Failure(DATA, "the same")

    with pytest.raises(Failure) as raised:
        comm.together(fail)
    assert raised.value.message == "the same"


def test_disagreement_is_raised_on_all_with_both_values():
    comm.agree("x", {"a": 1})
    with pytest.raises(Failure) as raised:
        comm.agree("the flags", {"lr": 0.1 * (1 + min(comm.rank(), 1)), "same": 3})
    assert raised.value.code == CONFIGURATION
    assert raised.value.message.split("\n")[1].split() == ["rank", "0", "rank", "1"]
    assert raised.value.message.split("\n")[2].split() == ["lr", "0.1", "0.2"]
    assert "same" not in raised.value.message.split("Start all ranks")[0]


def test_gradients_of_all_layers_are_summed_over_ranks():
    weights = vgg.initial_weights(layers("vgg11", 0.125, 32, 10), 1)

    @tf.function
    def summed(factor):
        return exchange.sum_gradients({name: factor * value for name, value in weights.items()}, "float32", 1.0)

    factor = sum(range(1, comm.size() + 1))
    for name, value in summed(tf.constant(1.0 + comm.rank())).items():
        np.testing.assert_allclose(value, factor * weights[name].numpy(), rtol=1e-6)


def test_one_core_is_left_to_horovod_where_there_are_more_than_two():
    assert [comm.threads_for_input(threads) for threads in (1, 2, 3, 8)] == [1, 2, 2, 7]


def test_a_rank_that_is_bound_uses_the_cores_it_is_bound_to():
    """mpirun itself is not."""
    whole = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(whole)})
        assert machine._launchers_cores(Path("/")) == len(whole)
        assert machine.share_of_cores(comm.size()) == 1
    finally:
        os.sched_setaffinity(0, whole)
    assert machine.share_of_cores(comm.size()) == max(1, len(whole) // comm.size())
