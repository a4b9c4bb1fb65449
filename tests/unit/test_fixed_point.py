"""Sums in fixed point: no order, a bound for their error, and no number that is not finite is lost."""

import math

import numpy as np
import pytest
import tensorflow as tf

from hvd_vgg.config import MOST_MICRO_BATCHES
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


def tally_of(numbers, limits):
    """The tally of tensors' values, each [summands, size], under limits."""
    rows = [fixed_point.magnitudes([tf.constant(each[row]) for each in numbers]) for row in range(len(numbers[0]))]
    return fixed_point.tally(tf.stack(rows), limits)


def limits_for(*numbers):
    """The limits, int32 [tensors], that hold all summands of each tensor."""
    limits = tf.constant(first_limits(len(numbers)))
    for _ in range(5):
        limits = next_limits(limits, tally_of(numbers, limits))
    assert not exceeded(tally_of(numbers, limits)).numpy().any()
    return limits


def exponent(limits):
    """E of the module's docstring, of the one limit."""
    return -(-int(limits[0]) // 64) - 126


def encoded(numbers, limits, dtype=tf.int32):
    """Each row of `numbers` [summands, size] as integers."""
    return encode(tf.constant(numbers), scales(limits)[0], dtype)


def decoded(total, limits, numbers):
    return decode(total, inverse_scales(limits, tally_of([numbers], limits))[0]).numpy()


@pytest.mark.parametrize("summands", [1, *SUMMANDS])
@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_fixed_point_round_trip_is_exact_to_half_a_unit(kind, summands):
    numbers = values(kind, summands)
    limits = limits_for(numbers)
    unit = 2.0 ** (exponent(limits) - 31)
    integers = encoded(numbers, limits).numpy()
    assert np.abs(integers * unit - numbers.astype(np.float64)).max() <= unit / 2
    assert np.abs(integers.astype(np.int64).sum(axis=0)).max() < 2**31
    found = decoded(tf.constant(integers), limits, numbers)
    assert (found == (integers * unit).astype(np.float32)).all()
    exact = np.abs(integers) < 2**24  # as float32 holds them
    assert (encode(tf.constant(found), scales(limits)[0], tf.int32).numpy() == integers)[exact].all()


@pytest.mark.parametrize("dtype", [tf.int32, tf.int64])
@pytest.mark.parametrize("summands", SUMMANDS)
@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_fixed_point_sums_have_no_order_and_no_grouping(kind, summands, dtype):
    numbers = values(kind, summands)
    limits = limits_for(numbers)
    integers = encoded(numbers, limits, dtype)

    def total(order, groups):
        parts = [tf.add_n(tf.unstack(tf.gather(integers, rows))) for rows in np.array_split(order, groups)]
        return decoded(tf.add_n(parts), limits, numbers).tobytes()

    expected = total(np.arange(summands), 1)
    random = np.random.default_rng(1)
    assert {total(random.permutation(summands), groups) for groups in (1, 2, 3, 7, 8)} == {expected}


@pytest.mark.parametrize("summands", SUMMANDS)
@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_fixed_point_error_is_within_its_bound(kind, summands):
    """summands / 2 * 2^(E - 31), and the rounding of the result to float32."""
    numbers = values(kind, summands)
    limits = limits_for(numbers)
    found = decoded(tf.reduce_sum(encoded(numbers, limits), 0), limits, numbers)
    exact = numbers.astype(np.float64).sum(axis=0)
    bound = summands / 2 * 2.0 ** (exponent(limits) - 31)
    assert (np.abs(found - exact) <= bound + np.spacing(np.abs(found)) / 2).all()
    assert bound < 1e-3 * np.abs(numbers).max()


@pytest.mark.parametrize("summands", [1, 2, *SUMMANDS, 1024, MOST_MICRO_BATCHES])
@pytest.mark.parametrize("sign", [1, -1])
def test_fixed_point_sum_just_within_its_limit_does_not_overflow(summands, sign):
    """Though every summand is rounded up, by half a unit."""
    limits = tf.constant(fixed_point.limits_of(0, 1))
    unit = 2.0**-31
    # As many units as a tally admits, and half a unit more or less.
    most = (2**20 - 1) // summands * 2.0**-20
    for value in (most, most - unit / 2, most / 2 + unit / 2):
        numbers = np.full((summands, 1), sign * value, np.float32)
        tally = fixed_point.tally(tf.abs(numbers), limits)
        if exceeded(tally).numpy()[0]:
            continue
        total = tf.reduce_sum(encoded(numbers, limits, tf.int64), 0)
        assert abs(int(total[0])) < 2**31
        found = decode(total, inverse_scales(limits, tally)[0]).numpy()[0]
        assert found == pytest.approx(float(numbers.astype(np.float64).sum()), abs=(summands + 1) * unit, rel=1e-6)
    assert not exceeded(fixed_point.tally(np.full((summands, 1), most, np.float32), limits)).numpy()[0]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("size", [1, 2, 7, 16, 17, 1000, 100_003])
def test_fixed_point_value_that_is_not_finite_is_counted(size, odd):
    """Wherever it is, in any summand, and alone in its tensor."""
    limits = tf.constant(fixed_point.limits_of(3, 2))
    for place in {0, 1, size // 2, size - 2, size - 1} & set(range(size)):
        numbers = np.random.default_rng(size).normal(size=size).astype(np.float32)
        finite = tally_of([numbers[np.newaxis]] * 2, limits)
        numbers[place] = odd
        tally = finite + tally_of([numbers[np.newaxis], np.ones((1, 3), np.float32)], limits)  # of two ranks
        assert fixed_point.is_finite(tally).numpy().tolist() == [False, True]
        inverse = inverse_scales(limits, tally).numpy()
        assert (math.isnan(inverse[0]) if math.isnan(odd) else inverse[0] == math.inf) and math.isfinite(inverse[1])
        for total in (0, 5, -5):
            assert not np.isfinite(decode(tf.constant(total), inverse[0]).numpy())
        assert not exceeded(tally).numpy().any()  # which a second pass would not mend


@pytest.mark.parametrize("magnitude", [1e-44, 1e-38, 3e-20, 1e-3, 0.99999994, 1.0, 7.0, 1e19])
def test_fixed_point_limits_are_raised_until_values_fit(magnitude):
    """From the first ones: at once where they are 2^30 times larger or less. These values never exceed them again."""
    numbers = np.array([[magnitude, -magnitude / 3], [0, magnitude / 2]], np.float32)
    limits, passes = tf.constant(first_limits(1)), 1
    while exceeded(tally_of([numbers], limits)).numpy()[0]:
        limits, passes = next_limits(limits, tally_of([numbers], limits)), passes + 1
    assert passes == (1 if magnitude < 2.0**-31 else 2 if magnitude < 2.0**3 else 4)
    for _ in range(200):
        limits = next_limits(limits, tally_of([numbers], limits))
        assert not exceeded(tally_of([numbers], limits)).numpy()[0]


def test_fixed_point_limits_fall_by_one_exponent_in_64_steps():
    """Down to two exponents above what is needed."""
    large, small = (np.full((2, 3), value, np.float32) for value in (1000.0, 1.0))
    limits = limits_for(large)
    exponents = []
    for _ in range(64 * 12):
        exponents.append(exponent(limits.numpy()))
        assert not exceeded(tally_of([small], limits)).numpy()[0]
        limits = next_limits(limits, tally_of([small], limits))
    # 1000 twice is below 2^11, and 1 twice below 2^2.
    assert set(np.diff(exponents)) == {0, -1} and exponents[0] == 13 and exponents[-1] == 4
    assert max(exponents.count(each) for each in range(5, 13)) == 64


def test_fixed_point_limits_fall_with_the_most_summands():
    """Though each counts as a unit at least, however small it is."""
    limits, magnitudes = tf.constant(fixed_point.limits_of(-20, 1)), np.full((MOST_MICRO_BATCHES, 1), 1e-12, np.float32)
    for _ in range(64 * 8):
        limits = next_limits(limits, fixed_point.tally(magnitudes, limits))
    assert exponent(limits.numpy()) <= -25  # 4095 of 1e-12 are below 2^-27


def test_fixed_point_limits_have_ends():
    """Zeros and denormals ask for no lower one, floats whose sum is none for no higher; those are infinite."""
    zero, denormal = (np.full((2, 1), value, np.float32) for value in (0.0, 1e-44))
    limits = tf.constant([LOWEST] * 2)
    assert next_limits(limits, tally_of([zero, denormal], limits)).numpy().tolist() == [LOWEST] * 2
    most = np.full((4, 1), 3.4028235e38, np.float32)
    limits = tf.constant([HIGHEST])
    assert next_limits(limits, tally_of([most], limits)).numpy().tolist() == [HIGHEST]
    assert np.isinf(decoded(tf.constant([1]), limits, most)).all()
    for ends in ([LOWEST], [HIGHEST]):
        scale = float(scales(tf.constant(ends))[0])
        inverse = float(inverse_scales(tf.constant(ends), tally_of([zero], tf.constant(ends)))[0])
        assert 0 < scale < math.inf and scale * inverse == 1
    assert encoded(np.zeros((8, 4), np.float32), tf.constant([LOWEST])).numpy().tolist() == [[0] * 4] * 8


def test_fixed_point_exceeds_each_tensor_for_itself():
    """Only those that need it are raised."""
    one, ten = np.ones((1, 1), np.float32), np.full((1, 1), 100.0, np.float32)
    limits = limits_for(one, ten)
    tally = tally_of([ten, ten], limits)
    assert exceeded(tally).numpy().tolist() == [True, False]
    raised = next_limits(limits, tally)
    assert int(raised[0]) > int(limits[0]) and int(raised[1]) <= int(limits[1])


def test_fixed_point_spread_gives_each_element_its_number():
    numbers = tf.unstack(tf.constant([1.0, 2.0, 3.0]))
    assert spread(numbers, [2, 1, 3]).numpy().tolist() == [1, 1, 2, 3, 3, 3]
    assert spread(numbers[:1], [5]).numpy().tolist() == 1
