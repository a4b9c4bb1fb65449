import os

import numpy as np
import pytest
import tensorflow as tf

from hvd_vgg.errors import CONFIGURATION, DATA, Failure
from hvd_vgg.models import vgg
from hvd_vgg.models.architecture import vgg_layers
from hvd_vgg.parallel import comm, cores, exchange
from hvd_vgg.parallel.consensus import require_equal, run_on_all_ranks
from hvd_vgg.parallel.cores import share_of_cores
from hvd_vgg.parallel.init import threads_for_input


def test_sum_over_ranks_of_integers_is_exact():
    """Beyond what floats hold."""
    values = np.array([2**60 + comm.rank(), -(2**59), 0], np.int64)
    expected = [comm.size() * 2**60 + sum(range(comm.size())), -comm.size() * 2**59, 0]
    assert comm.sum_over_ranks(values).tolist() == expected
    assert comm.sum_over_ranks(np.array([0.5])).tolist() == [0.5 * comm.size()]


def test_gather_keeps_order_and_lengths():
    """Even of nothing; and rank 0's bytes reach all."""
    assert comm.gather_bytes(b"x" * comm.rank()) == [b"x" * rank for rank in range(comm.size())]
    assert comm.gather_bytes(b"") == [b""] * comm.size()
    assert comm.broadcast_bytes(b"root" if comm.is_root() else b"other") == b"root"


def test_gather_on_root_reaches_rank_0_alone():
    """In order of rank, of other lengths, one of them none."""
    parts = [bytes([rank]) * 1000 * rank for rank in range(comm.size())]
    assert comm.gather_bytes_on_root(parts[comm.rank()]) == (parts if comm.is_root() else [])


def test_broadcast_variables_are_rank_0s():
    """On all ranks."""
    variables = [tf.Variable([1.0 * comm.rank(), 2.0]), tf.Variable([[7.0 + comm.rank()]])]
    comm.broadcast_variables(variables)
    assert [variable.numpy().tolist() for variable in variables] == [[0.0, 2.0], [[7.0]]]


def test_run_on_all_ranks_names_the_rank_that_failed():
    """All raise one collective Failure."""
    last = comm.size() - 1

    def fail_on_last():
        if comm.rank() == last:
            raise Failure(DATA, "broken")
        return 1

    with pytest.raises(Failure) as raised:
        run_on_all_ranks(fail_on_last)
    assert (raised.value.code, raised.value.message, raised.value.collective) == (DATA, f"rank {last}: broken", True)
    assert run_on_all_ranks(comm.rank) == comm.rank()


def test_run_on_all_ranks_lists_a_message_once():
    """If all ranks fail alike."""

    def fail():
        raise Failure(DATA, "the same")

    with pytest.raises(Failure) as raised:
        run_on_all_ranks(fail)
    assert raised.value.message == "the same"


def test_require_equal_shows_both_values():
    """On all ranks."""
    require_equal("x", {"a": 1})
    with pytest.raises(Failure) as raised:
        require_equal("the flags", {"lr": 0.1 * (1 + min(comm.rank(), 1)), "same": 3})
    assert raised.value.code == CONFIGURATION
    assert raised.value.message.split("\n")[1].split() == ["rank", "0", "rank", "1"]
    assert raised.value.message.split("\n")[2].split() == ["lr", "0.1", "0.2"]
    assert "same" not in raised.value.message.split("Start all ranks")[0]


def test_sum_gradients_sums_all_layers():
    """In one message per block."""
    weights = vgg.initial_weights(vgg_layers("vgg11", 0.125, 32, 10), 1)

    @tf.function
    def summed(factor):
        return exchange.sum_gradients({name: factor * value for name, value in weights.items()}, "float32", 1.0)

    factor = sum(range(1, comm.size() + 1))
    for name, value in summed(tf.constant(1.0 + comm.rank())).items():
        np.testing.assert_allclose(value, factor * weights[name].numpy(), rtol=1e-6)


def test_messages_go_by_their_names_whatever_the_graph():
    """In a loop and a branch of a graph that is another on each rank."""

    @tf.function(autograph=False)
    def exchanged(value, last):
        for _ in range(3 * comm.rank()):
            value = tf.identity(value) + tf.random.stateless_uniform([2], [1, 2], 0, 1, tf.int32)  # of zeros

        def step(number, _):
            messages = (comm.sum_tensor, lambda *rest: comm.gather_rows(*rest, 2 * comm.size()))
            names = ("the_sum", "the_rows")

            def send():
                with tf.name_scope(f"of_rank_{comm.rank()}"):
                    found = [message(value, name) for message, name in zip(messages, names)]
                return tf.concat(found, 0)

            return number + 1, tf.cond(tf.equal(number, last), send, lambda: tf.zeros([2 * comm.size() + 2], tf.int32))

        start = (tf.constant(0), tf.zeros([2 * comm.size() + 2], tf.int32))
        return tf.while_loop(lambda number, _: number <= last, step, start)[1]

    found = exchanged(tf.constant([1, 2]) * (comm.rank() + 1), tf.constant(2)).numpy().tolist()
    factors = range(1, comm.size() + 1)
    rows = [factor * value for factor in factors for value in (1, 2)]
    assert found == [sum(factors), 2 * sum(factors), *rows]


def test_threads_for_input_leave_a_core_to_horovod():
    """If there are more than two."""
    assert [threads_for_input(threads) for threads in (1, 2, 3, 8)] == [1, 2, 2, 7]


def test_share_of_cores_of_a_bound_rank():
    """mpirun itself is not."""
    whole = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(whole)})
        assert cores._launcher_cores() == len(whole)
        assert share_of_cores(comm.size()) == 1
    finally:
        os.sched_setaffinity(0, whole)
    assert share_of_cores(comm.size()) == max(1, len(whole) // comm.size())
