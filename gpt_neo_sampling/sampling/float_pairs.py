"""Numbers as the sum of two float32, with some 40 bits: for a TPU, which has no float64.

A pair is (high, low), low at most about 2⁻²³ of high. All is written so that a compiler which contracts a product and a
sum into one rounding changes nothing: products are of halves of 12 bits, which have no rounding. Nor may one of the two
numbers of a `two_sum` be a constant that XLA knows, which it adds and subtracts as if there were no rounding.
"""

import math

import numpy as np

from gpt_neo_sampling._compat import tf

Pair = tuple[tf.Tensor, tf.Tensor]
# How far numbers here are from the real ones, in parts of them; of a logarithm that is below 1, in all. (The most that
# was seen is 1.7e-10, and 1e-11 of sums.)
PAIR_ERROR_BOUND = 5e-10

_LN2_4 = math.log(2) / 4
_LN2_4_A = 355 / 2048  # 9 bits
_LN2_4_B = float(np.float32(round((_LN2_4 - _LN2_4_A) * 2**26) / 2**26))  # 12 bits
_LN2_4_C = _LN2_4 - _LN2_4_A - _LN2_4_B
_FARTHEST = 86.0  # e⁻⁸⁶ is 2⁻¹²⁴


def _halves(x: tf.Tensor) -> Pair:
    """(high, low) of a float32, of 12 bits each."""
    high = tf.bitcast(tf.bitwise.bitwise_and(tf.bitcast(x, tf.int32), tf.constant(-4096)), tf.float32)
    return high, x - high


def two_sum(a: tf.Tensor, b: tf.Tensor) -> Pair:
    """a + b."""
    total = a + b
    b_there = total - a
    return total, (a - (total - b_there)) + (b - b_there)


def add(a: Pair, b: Pair) -> Pair:
    high, low = two_sum(a[0], b[0])
    return high, low + (a[1] + b[1])


def negative(a: Pair) -> Pair:
    return -a[0], -a[1]


def times(a: Pair, b: tf.Tensor) -> Pair:
    """A pair times a float32."""
    (a1, a2), (b1, b2) = _halves(a[0]), _halves(b)
    return two_sum(a1 * b1, (a1 * b2 + a2 * b1) + (a2 * b2 + a[1] * b))


def product(a: Pair, b: Pair) -> Pair:
    high, low = times(a, b[0])
    return two_sum(high, low + a[0] * b[1])


def quotient(a: Pair, b: Pair) -> Pair:
    """a/b; NaN where b is 0."""
    first = a[0] / b[0]
    rest = add(a, negative(times(b, first)))
    return two_sum(first, (rest[0] + rest[1]) / b[0])


def exp_of_minus(d: tf.Tensor) -> Pair:
    """e⁻ᵈ of a float32 d ≥ 0; 0 beyond 86."""
    near = d <= _FARTHEST
    d = tf.where_v2(near, d, 0.0)
    n = tf.floor(d * (1 / _LN2_4) + 0.5)
    y = d - n * _LN2_4_A  # exact, as is the product
    y, low = two_sum(y, n * -_LN2_4_B)
    y, low = -y, n * _LN2_4_C - low  # e^(y + low), |y| < 0.09
    y1, y2 = _halves(y)
    square = y1 * y1 * 0.5  # exact
    series = 1 / 6 + y * (1 / 24 + y * (1 / 120 + y * (1 / 720 + y * (1 / 5040))))
    rest = (y + y1) * y2 * 0.5 + y * y * y * series + low * (1.0 + y * (1.0 + y * (0.5 + y / 6)))
    # 1 + y, not by `two_sum`: XLA takes (y + 1) − 1 for y
    coarse = tf.floor(y * 2.0**23 + 0.5) * 2.0**-23
    high, low = 1.0 + coarse, y - coarse
    high, more = two_sum(high, square)
    high, low = two_sum(high, more + low + rest)
    n = tf.cast(n, tf.int32)
    quarter = tf.bitwise.bitwise_and(n, tf.constant(3))
    high, low = product((high, low), _root(quarter))
    scale = tf.bitwise.left_shift(127 - tf.bitwise.right_shift(n, tf.constant(2)), tf.constant(23))
    scale = tf.where_v2(near, tf.bitcast(scale, tf.float32), 0.0)
    return high * scale, low * scale


def _root(quarter: tf.Tensor) -> Pair:
    """2^(−quarter/4), quarter from 0 to 3."""
    roots = [2.0 ** (-i / 4) for i in range(4)]
    highs = [float(np.float32(r)) for r in roots]
    lows = [float(np.float32(r - h)) for r, h in zip(roots, highs, strict=True)]

    def choose(values: list[float]) -> tf.Tensor:
        even = tf.where_v2(quarter > 1, np.float32(values[2]), np.float32(values[0]))
        odd = tf.where_v2(quarter > 1, np.float32(values[3]), np.float32(values[1]))
        return tf.where_v2(tf.equal(tf.bitwise.bitwise_and(quarter, tf.constant(1)), 0), even, odd)

    return choose(highs), choose(lows)


def log_of(a: Pair) -> Pair:
    """log a of a pair from 1 up."""
    first = tf.maximum(tf.math.log(a[0]), 0.0)
    high, low = product(a, exp_of_minus(first))
    off = (high - 1.0) + low
    return two_sum(first, off - 0.5 * off * off)


def minus_log(x: tf.Tensor) -> Pair:
    """−log x of a float32 in (2⁻¹²⁰, 1]."""
    small = x < 2.0**-60  # whose last bits would be lost
    x = tf.where_v2(small, x * 2.0**60, x)
    first = tf.maximum(-tf.math.log(x), 0.0)
    high, low = exp_of_minus(first)
    off = ((x - high) - low) / x
    high, low = two_sum(first, -(off + 0.5 * off * off))
    shift = 60 * math.log(2)
    rest = shift - float(np.float32(shift))
    return add((high, low), (tf.where_v2(small, np.float32(shift), 0.0), tf.where_v2(small, np.float32(rest), 0.0)))
