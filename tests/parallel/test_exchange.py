"""Both ways to exchange a dense layer's gradient, against float64 on the whole batch."""

import numpy as np
import pytest
import tensorflow as tf

from hvd_vgg.data.sampler import slice_bounds
from hvd_vgg.errors import NOT_FINITE, Failure
from hvd_vgg.models import vgg
from hvd_vgg.models.architecture import vgg_layers
from hvd_vgg.parallel import comm, exchange
from hvd_vgg.parallel.consensus import check_replicas
from hvd_vgg.training.state import make_checksums

ROWS, INPUTS, OUTPUTS = 29, 96, 40


def factors():
    """The whole batch's inputs (as after ReLU and dropout) and output gradients (of a mean), and this rank's rows."""
    random = np.random.default_rng(1)
    x = np.maximum(random.normal(size=(ROWS, INPUTS)), 0).astype(np.float32)
    d = (random.normal(size=(ROWS, OUTPUTS)) * 1e-3 / ROWS).astype(np.float32)
    low, high = slice_bounds(ROWS, comm.rank(), comm.size())
    return x, d, slice(low, high)


def relative_error(found, wanted):
    return np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted)


def exchanged(way, wire_dtype):
    x, d, mine = factors()

    @tf.function
    def run(x, d):
        if way == "factored":
            inputs = exchange.gather_rows(x, "inputs_fc1", ROWS, wire_dtype, 1.0)
            return exchange.product("fc1", inputs, exchange.gather_rows(d, "outputs_fc1", ROWS, wire_dtype, float(ROWS)))
        local = {"fc1/kernel": tf.matmul(x, d, transpose_a=True), "fc1/bias": tf.reduce_sum(d, 0)}
        return exchange.sum_gradients(local, wire_dtype, float(ROWS))

    return run(tf.constant(x[mine]), tf.constant(d[mine]))


@pytest.mark.parametrize("way", ["factored", "allreduce"])
@pytest.mark.parametrize(("wire_dtype", "bound"), [("float32", 5e-7), ("float16", 1e-3)])
def test_exchange_gradient_is_that_of_the_whole_batch(way, wire_dtype, bound):
    """By sums and by factors, within each wire dtype's rounding."""
    x, d, _ = factors()
    found = exchanged(way, wire_dtype)
    assert relative_error(found["fc1/kernel"], x.astype(np.float64).T @ d.astype(np.float64)) < bound
    assert relative_error(found["fc1/bias"], d.astype(np.float64).sum(axis=0)) < bound


def test_exchange_gives_every_rank_the_same_gradient():
    """In every bit."""
    for way in ("factored", "allreduce"):
        told = comm.gather_bytes(exchanged(way, "float32")["fc1/kernel"].numpy().tobytes())
        assert len(set(told)) == 1


def test_exchange_sends_a_large_kernel_in_parts(monkeypatch):
    """And the sum is the same."""
    monkeypatch.setattr(exchange, "CHUNK_ELEMENTS", 250)  # 96 * 40: 16 parts
    sent = []
    original = comm.sum_tensor
    monkeypatch.setattr(comm, "sum_tensor", lambda tensor, name, group: sent.append(name) or original(tensor, name, group))
    x, d, _ = factors()
    assert relative_error(exchanged("allreduce", "float32")["fc1/kernel"], x.T @ d) < 1e-6
    assert len([name for name in sent if "kernel" in name]) == 16
    assert len(set(sent)) == len(sent)


@pytest.mark.parametrize(("odd", "of"), [("kernel", 22), ("moving_variance", 54)])
def test_check_replicas_names_layer_and_rank(odd, of):
    """Of weights or moments that differ."""
    layers = vgg_layers("vgg11" if odd == "kernel" else "vgg11_bn", 0.125, 32, 10)
    weights = {**vgg.initial_weights(layers, 1), **vgg.initial_moments(layers)}
    checksums = make_checksums(weights)
    check_replicas(list(weights), checksums().numpy(), 7)
    last = comm.size() - 1
    if comm.rank() == last:
        values = weights[f"block3_conv1/{odd}"].numpy()
        values.flat[5] = np.nextafter(values.flat[5], np.float32(2))
        weights[f"block3_conv1/{odd}"].assign(values)
    with pytest.raises(Failure) as raised:
        check_replicas(list(weights), checksums().numpy(), 7)
    assert (raised.value.code, raised.value.collective) == (NOT_FINITE, True)
    assert f"step 7: block3_conv1/{odd} (1 of {of} weights)" in raised.value.message
    assert (f": rank {last} differ(s)" if comm.size() > 2 else "rank 0, rank 1 differ(s)") in raised.value.message
