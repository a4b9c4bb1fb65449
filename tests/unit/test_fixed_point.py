"""Sums in fixed point: no order, a bound for their error, and no number that is not finite is lost."""

import math

import numpy as np
import pytest
import tensorflow as tf

from hvd_vgg.parallel import fixed_point
from hvd_vgg.parallel.fixed_point import decode, encode, exceeded, first_limits, inverse_scales, next_limits, scales, spread

LOWEST, HIGHEST = 32 * 64, 254 * 64
SUMMANDS = [8, 64, 256]
ODD = [math.nan, -math.nan, math.inf, -math.inf]


def values(kind, summands, size=1000):
    """Float32 [summands, size], like gradients: most far below 1, or with one in some thousands far larger than the rest."""
    random = np.random.default_rng(summands)
    numbers = random.normal(size=(summands, size)) if kind == "normal" else random.standard_t(1.5, size=(summands, size))
    return (numbers * 1e-4).astype(np.float32)


@tf.function(autograph=False)
def largest(*tensors):
    return fixed_point.largest(tensors)


def limits_for(*tensors):
    """The limits, int32 [tensors], that hold all values of each tensor."""
    return next_limits(tf.constant(first_limits(len(tensors))), largest(*map(tf.constant, tensors)))


def exponent(limits):
    """E of the module's docstring, of the one limit."""
    return -(-int(limits[0]) // 64) - 126


def encoded(numbers, limits, dtype=tf.int32):
    """Each row of `numbers` [summands, size] as integers."""
    return encode(tf.constant(numbers), scales(limits, len(numbers))[0], dtype)


def decoded(total, limits, summands, of):
    return decode(total, inverse_scales(limits, summands, of)[0]).numpy()


@pytest.mark.parametrize("summands", [1, *SUMMANDS])
@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_fixed_point_round_trip_is_exact_to_half_a_unit(kind, summands):
    numbers = values(kind, summands)
    limits = limits_for(numbers)
    unit = 2.0 ** (exponent(limits) + (summands - 1).bit_length() - 31)
    integers = encoded(numbers, limits).numpy()
    assert np.abs(integers * unit - numbers.astype(np.float64)).max() <= unit / 2
    assert np.abs(integers.astype(np.int64).sum(axis=0)).max() < 2**31
    found = decoded(tf.constant(integers), limits, summands, largest(tf.constant(numbers)))
    assert (found == (integers * unit).astype(np.float32)).all()
    exact = np.abs(integers) < 2**24  # as float32 holds them
    assert (encode(tf.constant(found), scales(limits, summands)[0], tf.int32).numpy() == integers)[exact].all()


@pytest.mark.parametrize("dtype", [tf.int32, tf.int64])
@pytest.mark.parametrize("summands", SUMMANDS)
@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_fixed_point_sums_have_no_order_and_no_grouping(kind, summands, dtype):
    numbers = values(kind, summands)
    limits, of = limits_for(numbers), largest(tf.constant(numbers))
    integers = encoded(numbers, limits, dtype)

    def total(order, groups):
        parts = [tf.add_n(tf.unstack(tf.gather(integers, rows))) for rows in np.array_split(order, groups)]
        return decoded(tf.add_n(parts), limits, summands, of).tobytes()

    expected = total(np.arange(summands), 1)
    random = np.random.default_rng(1)
    assert {total(random.permutation(summands), groups) for groups in (1, 2, 3, 7, 8)} == {expected}


@pytest.mark.parametrize("summands", SUMMANDS)
@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_fixed_point_error_is_within_its_bound(kind, summands):
    """summands / 2 * 2^(E + c - 31), and the rounding of the result to float32."""
    numbers = values(kind, summands)
    limits = limits_for(numbers)
    found = decoded(tf.reduce_sum(encoded(numbers, limits), 0), limits, summands, largest(tf.constant(numbers)))
    exact = numbers.astype(np.float64).sum(axis=0)
    bound = summands / 2 * 2.0 ** (exponent(limits) + (summands - 1).bit_length() - 31)
    assert (np.abs(found - exact) <= bound + np.spacing(np.abs(found)) / 2).all()
    assert bound < 1e-3 * np.abs(numbers).max()


@pytest.mark.parametrize("summands", [2, *SUMMANDS, 1024])
@pytest.mark.parametrize("sign", [1, -1])
def test_fixed_point_sum_of_the_largest_values_does_not_overflow(summands, sign):
    """All of them just below the limit, or so near that they might round up to it, which is to exceed it."""
    for below in (1, 2, 2**9, 2**17):
        value = np.float32(sign) * np.float32(1 - below * 2.0**-24)
        numbers = np.full((summands, 1), value, np.float32)
        limits = tf.constant(fixed_point.limits_of(0.5, 1))  # of values below 1
        if bool(exceeded(limits, largest(tf.constant(numbers)))):
            limits = next_limits(limits, largest(tf.constant(numbers)))
        found = decoded(tf.reduce_sum(encoded(numbers, limits), 0), limits, summands, largest(tf.constant(numbers)))
        assert found[0] == pytest.approx(summands * float(value), rel=1e-5)


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("size", [1, 2, 7, 16, 17, 1000, 100_003])
def test_fixed_point_value_that_is_not_finite_is_the_largest(size, odd):
    """Wherever it is, on any rank, and alone in its tensor."""
    for place in {0, 1, size // 2, size - 2, size - 1} & set(range(size)):
        numbers = np.random.default_rng(size).normal(size=size).astype(np.float32)
        finite = largest(tf.constant(numbers), tf.constant(numbers))
        numbers[place] = odd
        found = largest(tf.constant(numbers), tf.ones([3]))
        assert fixed_point.is_finite(found).numpy().tolist() == [False, True]
        everyones = tf.maximum(found, finite)  # as all ranks and micro-batches are joined
        assert fixed_point.is_finite(everyones).numpy().tolist() == [False, True]
        limits = tf.constant(fixed_point.limits_of(8.0, 2))
        inverse = inverse_scales(limits, 8, everyones).numpy()
        assert (math.isnan(inverse[0]) if math.isnan(odd) else inverse[0] == math.inf) and math.isfinite(inverse[1])
        for total in (0, 5, -5):
            assert not np.isfinite(decode(tf.constant(total), inverse[0]).numpy())
        assert not bool(exceeded(limits, found))  # which a second pass would not mend


@pytest.mark.parametrize("magnitude", [1e-44, 1e-38, 3e-20, 1e-3, 0.99999994, 1.0, 7.0, 3e38])
def test_fixed_point_limits_are_raised_at_once(magnitude):
    """From the lowest to one that these values never exceed again."""
    numbers = tf.constant([magnitude, -magnitude / 3], tf.float32)
    limits = tf.constant(first_limits(1))
    assert bool(exceeded(limits, largest(numbers))) == (magnitude >= 2.0**-94)
    limits = next_limits(limits, largest(numbers))
    for _ in range(200):
        assert not bool(exceeded(limits, largest(numbers)))
        limits = next_limits(limits, largest(numbers))


def test_fixed_point_limits_fall_by_one_exponent_in_64_steps():
    """Down to one exponent above the largest value."""
    large, small = largest(tf.constant([1000.0])), largest(tf.constant([1.0]))
    limits = next_limits(tf.constant(first_limits(1)), large)
    exponents = []
    for _ in range(64 * 12):
        exponents.append(exponent(limits.numpy()))
        assert not bool(exceeded(limits, small))
        limits = next_limits(limits, small)
    # 1000 is below 2^10, and 1 below 2^1; the limit is one more.
    assert exponents == [max(2, 11 - step // 64) for step in range(64 * 12)]


def test_fixed_point_limits_have_ends():
    """Zeros and denormals ask for no lower one than the first, the largest floats and what is not finite for no higher."""
    zero, denormal, most = (tf.constant([value], tf.float32) for value in (0.0, 1e-44, 3.4028235e38))
    start = tf.constant(first_limits(3))
    assert start.numpy().tolist() == [LOWEST] * 3
    limits = next_limits(start, largest(zero, denormal, most))
    assert limits.numpy().tolist() == [LOWEST, LOWEST, HIGHEST]
    assert next_limits(limits, largest(zero, denormal, most)).numpy().tolist() == [LOWEST, LOWEST, HIGHEST]
    assert not bool(exceeded(start[:2], largest(zero, denormal)))
    assert next_limits(start, largest(*(tf.constant([odd]) for odd in ODD[:3]))).numpy().tolist() == [HIGHEST] * 3
    for ends in ([LOWEST], [HIGHEST]):
        for summands in (1, 8, 256, 2**20):
            scale = float(scales(tf.constant(ends), summands)[0])
            inverse = float(inverse_scales(tf.constant(ends), summands, largest(zero))[0])
            assert 0 < scale < math.inf and scale * inverse == 1
    assert encoded(np.zeros((8, 4), np.float32), limits_for(np.zeros(4, np.float32))).numpy().tolist() == [[0] * 4] * 8


def test_fixed_point_exceeds_by_any_one_tensor():
    """Each has its own limit, and only those that need it are raised."""
    one, ten = tf.constant([1.0]), tf.constant([10.0])
    limits = next_limits(tf.constant(first_limits(2)), largest(one, ten))
    assert not bool(exceeded(limits, largest(one, ten)))
    assert bool(exceeded(limits, largest(ten, ten)))
    raised = next_limits(limits, largest(ten, ten))
    assert int(raised[0]) > int(limits[0]) and int(raised[1]) == int(limits[1])


def test_fixed_point_spread_is_by_element():
    numbers = tf.unstack(tf.constant([1.0, 2.0, 3.0]))
    assert spread(numbers, [2, 1, 3]).numpy().tolist() == [1, 1, 2, 3, 3, 3]
    assert spread(numbers[:1], [5]).numpy().tolist() == 1
