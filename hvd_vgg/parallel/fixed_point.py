"""Sums of float32 that do not depend on their order: 32-bit integers in fixed point, which have the bytes of float32.

Each value of a tensor is multiplied by a power of two, 2^(31 - E), and rounded. E is such that the largest magnitudes of the
tensor in all summands add up to less than 2^E, its limit. So no sum of summands overflows, and as rounding moves a value by
half a unit at most,

    |sum in fixed point - exact sum| <= summands / 2 * 2^(E - 31)

for each element, before the sum is converted to float32. This holds for at most 4095 summands
(config.MOST_MICRO_BATCHES): their rounding is less than what a tally rounds up, and what it rounds up is little.

E follows the sums of largest magnitudes of the steps before: it is state, as momentum is. A step in which a tensor
reaches its limit is computed again under the next limit (`exceeded`, `next_limits`). A tally says how near it came:
integers that are added over summands as the values are, and that count every Inf and NaN.

All functions are for use inside a tf.function. Limits are int32 [tensors], in 1/64 of an exponent that is biased by 126.
"""

from typing import Any, Sequence

import numpy as np
import tensorflow as tf

_PARTS = 64  # of a limit's unit: without need a limit falls by a power of two in this many steps
_MARGIN = 2  # exponents between what a step needed and the next limit
_BIAS = 126
# A lower limit's scale would be no float32. At the highest, 2^128, sums are no float32 any more.
_LOWEST, _HIGHEST = 32, 254
_FIRST_EXPONENT = -30  # of gradients of a mean loss; whichever is larger is raised within a step
_LIMIT_UNITS = 20  # a tally counts magnitudes in 2^-20 of the limit, rounded up
_WIDE = 2.0**31
_MOST_UNITS = 2.0**50  # of one summand: 2^30 times the limit, and 4095 of them are an int64


def first_limits(tensors: int) -> np.ndarray:
    """Returns the limits before the first step: 2^-30, so that it is computed again under those that it needs."""
    return limits_of(_FIRST_EXPONENT, tensors)


def limits_of(exponent: int, tensors: int) -> np.ndarray:
    """Returns the limits, int32 [tensors], of 2^exponent."""
    return np.full(tensors, (_BIAS + exponent) * _PARTS, np.int32)


def magnitudes(tensors: Sequence[Any]) -> Any:
    """Returns the largest magnitude in each of `tensors`, float32: float32 [tensors], NaN where one is NaN."""
    return tf.stack([tf.reduce_max(tf.abs(tensor)) for tensor in tensors])


def tally(magnitudes: Any, limits: Any) -> Any:
    """Returns what to add over all summands and ranks, int64 [3, tensors]; magnitudes: float32 [summands, tensors].

    Rows: the magnitudes in 2^-20 of their limits, rounded up; how many are Inf; how many are NaN.
    """
    units = tf.math.ceil(tf.cast(magnitudes, tf.float64) * _power_of_two(_LIMIT_UNITS - _exponents(limits), tf.float64))
    finite = tf.where(tf.math.is_finite(magnitudes), tf.minimum(units, _MOST_UNITS), tf.zeros_like(units))
    odd = [tf.cast(each(magnitudes), tf.float64) for each in (tf.math.is_inf, tf.math.is_nan)]
    return tf.reduce_sum(tf.cast(tf.stack([finite, *odd]), tf.int64), 1)


def is_finite(tally: Any) -> Any:
    """Returns whether all values of each tensor are finite, bool [tensors]."""
    return tally[1] + tally[2] == 0


def exceeded(tally: Any) -> Any:
    """Returns whether each tensor has reached its limit, bool [tensors]."""
    return tally[0] >= 2**_LIMIT_UNITS


def next_limits(limits: Any, tally: Any) -> Any:
    """Returns the limits for the step after one with this tally, or for the same step once more."""
    exponents = tf.bitwise.right_shift(tf.bitcast(tf.cast(tally[0], tf.float64), tf.int64), 52) - 1023
    needed = _ceiling(limits) + tf.cast(exponents, tf.int32) + 1 - _LIMIT_UNITS
    wanted = tf.maximum((needed + _MARGIN) * _PARTS, limits - 1)
    return tf.clip_by_value(wanted, _LOWEST * _PARTS, _HIGHEST * _PARTS)


def scales(limits: Any) -> Any:
    """Returns what each tensor's values are multiplied by, float32 [tensors]."""
    return _power_of_two(31 - _exponents(limits), tf.float32)


def inverse_scales(limits: Any, tally: Any) -> Any:
    """Returns what each tensor's sum is multiplied by, float32 [tensors]; NaN or Inf if one of its values was that."""
    inverse = _power_of_two(_exponents(limits) - 31, tf.float32)
    inverse = tf.where(exceeded(tally) | (tally[1] > 0), tf.fill(tf.shape(inverse), np.float32(np.inf)), inverse)
    return tf.where(tally[2] > 0, tf.fill(tf.shape(inverse), np.float32(np.nan)), inverse)


def encode(values: Any, scale: Any, dtype: Any) -> Any:
    """Returns float32 values as integers of `dtype`, int32 or int64, which hold 32 bits."""
    return tf.cast(tf.round(values * scale), dtype)


def decode(total: Any, inverse_scale: Any) -> Any:
    """Returns a sum of encoded values as float32."""
    return tf.cast(total, tf.float32) * inverse_scale


def encode_wide(values: Any, scale: Any) -> Any:
    """Returns float32 values as int64 with 31 bits more than `encode` has: for a few values of very unlike magnitudes."""
    with tf.device("/CPU:0"):  # devices compute no float64
        return tf.cast(tf.round(tf.cast(values, tf.float64) * tf.cast(scale, tf.float64) * _WIDE), tf.int64)


def decode_wide(total: Any, inverse_scale: Any) -> Any:
    """Returns a sum of values of `encode_wide` as float32."""
    with tf.device("/CPU:0"):
        return tf.cast(tf.cast(total, tf.float64) * (tf.cast(inverse_scale, tf.float64) / _WIDE), tf.float32)


def spread(numbers: Sequence[Any], sizes: Sequence[int]) -> Any:
    """Returns each of `numbers`, scalars, as often as its tensor has elements: [elements]; a lone one as it is."""
    if len(numbers) == 1:
        return numbers[0]
    return tf.concat([tf.fill([size], number) for number, size in zip(numbers, sizes)], 0)


def _ceiling(limits: Any) -> Any:
    return -(-limits // _PARTS)


def _exponents(limits: Any) -> Any:
    """Returns E of each limit."""
    return _ceiling(limits) - _BIAS


def _power_of_two(exponents: Any, dtype: Any) -> Any:
    """Returns 2^exponents, made of the bits of floats, not computed."""
    if dtype == tf.float32:
        return tf.bitcast(tf.bitwise.left_shift(exponents + 127, 23), dtype)
    return tf.bitcast(tf.bitwise.left_shift(tf.cast(exponents, tf.int64) + 1023, 52), dtype)
