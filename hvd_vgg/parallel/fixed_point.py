"""Sums of float32 that do not depend on their order: 32-bit integers in fixed point, which have the bytes of float32.

Each value is multiplied by a power of two, its tensor's scale, and rounded. With a limit E every value is below 2^E in
magnitude, and the scale is 2^(31 - c - E) for at most 2^c summands, so that no sum of them overflows. Rounding moves a value
by half a unit at most, so

    |sum in fixed point - exact sum| <= summands / 2 * 2^(E + c - 31)

before the sum is converted to float32. E follows the largest value of the steps before: it is state, as momentum is. A step
in which a value reaches its limit is computed again under the next limit (`exceeded`, `next_limits`).

All functions are for use inside a tf.function. Limits are kept as int32 [tensors], in 1/64 of an exponent as float32's bits
have it (biased by 126 here: E + 126), and largest magnitudes as the bits of a float32: as integers they have the same order,
and Inf and NaN are the largest of all.
"""

from typing import Any, Sequence

import numpy as np
import tensorflow as tf

_PARTS = 64  # of a limit's unit: without need a limit falls by a power of two in this many steps
_MARGIN = 2  # exponents between the largest value of a step and the next limit
# A lower limit's scale would be no float32: what is below 2^(c - 126) is rounded to zero. No float32 needs a higher one.
_LOWEST, _HIGHEST = 32, 254
_NONFINITE = 255  # the exponent of Inf and NaN
# Values so few units of their last place below their limit count as having reached it: of 2^8 summands or more, a unit is so
# large that they would be rounded up to it, and if all were their sum would be 2^31. Enough for 2^23 summands.
_ROUNDED_UP = 2**15


def first_limits(tensors: int) -> np.ndarray:
    """Returns the limits before the first step: the lowest, so that it is computed again under those that it needs."""
    return np.full(tensors, _LOWEST * _PARTS, np.int32)


def limits_of(magnitude: float, tensors: int) -> np.ndarray:
    """Returns the limits, int32 [tensors], of tensors whose values are all below a magnitude."""
    exponent = int(np.float32(magnitude).view(np.int32)) >> 23
    return np.full(tensors, exponent * _PARTS, np.int32)


def largest(tensors: Sequence[Any]) -> Any:
    """Returns the bits of the largest magnitude in each of `tensors`, float32: int32 [tensors]; NaN counts as largest."""
    maxima = tf.stack([tf.reduce_max(tf.abs(tensor)) for tensor in tensors])
    with tf.device("/CPU:0"):
        return tf.bitwise.bitwise_and(tf.bitcast(maxima, tf.int32), 0x7FFFFFFF)


def is_finite(largest: Any) -> Any:
    """Returns whether these largest magnitudes are finite, bool."""
    return _exponents(largest) < _NONFINITE


def exceeded(limits: Any, largest: Any) -> Any:
    """Returns whether any finite value has reached its limit, or would when rounded, bool scalar."""
    reached = tf.bitwise.left_shift(_ceiling(limits) + 1, 23) - _ROUNDED_UP
    return tf.reduce_any((largest >= reached) & is_finite(largest))


def next_limits(limits: Any, largest: Any) -> Any:
    """Returns the limits for the step after one with these largest magnitudes, or for the same step once more."""
    wanted = (tf.minimum(_exponents(largest), _HIGHEST) + _MARGIN) * _PARTS
    return tf.clip_by_value(tf.maximum(wanted, limits - 1), _LOWEST * _PARTS, _HIGHEST * _PARTS)


def scales(limits: Any, summands: int) -> Any:
    """Returns what each tensor's values are multiplied by, float32 [tensors]."""
    return _power_of_two(_shifts(limits, summands))


def inverse_scales(limits: Any, summands: int, largest: Any) -> Any:
    """Returns what each tensor's sum is multiplied by, float32 [tensors]; NaN or Inf if one of its values was that."""
    return tf.where(is_finite(largest), _power_of_two(-_shifts(limits, summands)), tf.bitcast(largest, tf.float32))


def encode(values: Any, scale: Any, dtype: Any) -> Any:
    """Returns float32 values as integers of `dtype`, int32 or int64, which hold 32 bits."""
    return tf.cast(tf.round(values * scale), dtype)


def decode(total: Any, inverse_scale: Any) -> Any:
    """Returns a sum of encoded values as float32."""
    return tf.cast(total, tf.float32) * inverse_scale


def spread(numbers: Sequence[Any], sizes: Sequence[int]) -> Any:
    """Returns each of `numbers`, scalars, as often as its tensor has elements: [elements]; a lone one as it is."""
    if len(numbers) == 1:
        return numbers[0]
    return tf.concat([tf.fill([size], number) for number, size in zip(numbers, sizes)], 0)


def _exponents(largest: Any) -> Any:
    return tf.bitwise.right_shift(largest, 23)


def _ceiling(limits: Any) -> Any:
    return -(-limits // _PARTS)


def _shifts(limits: Any, summands: int) -> Any:
    return 31 - (summands - 1).bit_length() - (_ceiling(limits) - 126)


def _power_of_two(exponents: Any) -> Any:
    return tf.bitcast(tf.bitwise.left_shift(exponents + 127, 23), tf.float32)
