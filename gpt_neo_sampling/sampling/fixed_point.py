"""Sampling weights whose bits do not depend on the backend.

exp, log and even multiply-and-add differ in their last bits between backends (XLA's
exp differs from TensorFlow's own in one result of four). Here softmax and entmax
weights are computed in 64-bit integers alone, which have the same bits on every
backend and in any order of additions. It is slow: `categorical` uses it only where
a fast draw is ambiguous.

Numbers are fixed-point: Q30 is an integer in units of 2⁻³⁰. None is
negative or reaches 2⁶³ in any step whose result is used.
"""

import functools
import math
from collections.abc import Callable, Sequence

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling._types import LaidOut
from gpt_neo_sampling.mesh.ops import laid_out_cond, laid_out_while_loop
from gpt_neo_sampling.mesh.sharded_rows import any_of

_ONE = 1 << 30
_FARTHEST = 127.0  # this far below the largest score, a weight counts as 0
_SCALE_BITS = 5  # of the power of two that entmax's scores are scaled by
_DELTA_BITS = 28  # of entmax's threshold, Q24: up to 16; it is at most the logarithm of the vocabulary's size
_CANDIDATES = 1024  # entries of a shard among which entmax's threshold is searched
_LOG2_E = round(math.log2(math.e) * _ONE)
_EXP2 = [round(math.log(2) ** k / math.factorial(k) * _ONE) for k in range(11)]
_EXP2[-1] += 2 * _ONE - sum(_EXP2)  # 2¹ is 2: a score of 0 weighs just 1
_LOG2 = [round(2 / math.log(2) / (2 * k + 1) * _ONE) for k in range(10)]


def _int(value: int) -> tf.Tensor:
    return tf.constant(value, tf.int64)


def _shift_right(x: tf.Tensor, bits: int | tf.Tensor) -> tf.Tensor:
    return tf.bitwise.right_shift(x, _int(bits) if isinstance(bits, int) else bits)


def _shift_left(x: tf.Tensor, bits: int | tf.Tensor) -> tf.Tensor:
    return tf.bitwise.left_shift(x, _int(bits) if isinstance(bits, int) else bits)


def _polynomial(coefficients: Sequence[int], x: tf.Tensor) -> tf.Tensor:
    """Σ coefficients[k]·xᵏ, all Q30."""
    result = tf.fill(tf.shape(x), _int(coefficients[-1]))
    for c in reversed(coefficients[:-1]):
        result = _shift_right(result * x, 30) + _int(c)
    return result


def _exp2_parts(t: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """(m, i) with 2⁻ᵗ = m·2⁻ⁱ⁻¹, t Q30: m Q30 in (1, 2], i whole."""
    fraction = tf.bitwise.bitwise_and(t, _int(_ONE - 1))
    return _polynomial(_EXP2, _int(_ONE) - fraction), _shift_right(t, 30)


def _to_float32(t: tf.Tensor) -> tf.Tensor:
    """2⁻ᵗ as float32, t Q30; 0 below the normal numbers."""
    m, i = _exp2_parts(t)
    bits = _shift_left(126 - tf.minimum(i, 126), 23) + _shift_right(m, 7) - _int(1 << 23)
    return tf.where_v2(i < 126, tf.bitcast(tf.cast(bits, tf.int32), tf.float32), 0.0)


def _to_q40(t: tf.Tensor) -> tf.Tensor:
    """2⁻ᵗ as Q40, t Q30."""
    m, i = _exp2_parts(t)
    return _shift_right(_shift_left(m, 9), tf.minimum(i, 62))


def _entmax_exponent(
    y: tf.Tensor, eps: tf.Tensor, divide: Callable[[tf.Tensor, tf.Tensor], tf.Tensor] = tf.floordiv
) -> tuple[tf.Tensor, tf.Tensor]:
    """(t, inside): [1 − εy]₊^(1/ε) is 2⁻ᵗ inside the support; y and ε Q24, y ≥ 0, t Q30. See `_quotient` for `divide`.

    With x = εy below 1/2, −log₂(1 − x) is s·P(s²), s = x/(2 − x), and out of s
    comes x/ε = y: a small logarithm has too few bits to be divided by a small ε.
    Else a power of two brings 1 − x to m in [1, 2), and s is (m − 1)/(m + 1).
    """
    x = eps * y  # Q48
    inside = x < _int(1 << 48)
    x = tf.where_v2(inside, x, _int(0))
    base, places = _int(1 << 48) - x, tf.zeros_like(x)
    for bits in (32, 16, 8, 4, 2, 1):  # shifts the leading one to its place
        small = base < _int(1 << (49 - bits))
        base = tf.where_v2(small, _shift_left(base, bits), base)
        places += tf.where_v2(small, _int(bits), _int(0))
    near = x < _int(1 << 47)
    x, m = _shift_right(x, 18), _shift_right(base, 18)
    divisor = tf.where_v2(near, _int(2 * _ONE) - x, m + _int(_ONE))
    s = divide(_shift_left(tf.where_v2(near, x, m - _int(_ONE)), 30), divisor)
    series = _polynomial(_LOG2, _shift_right(s * s, 30))
    log2_m = _shift_right(s * series, 30)
    dividend = tf.where_v2(near, _shift_left(series, 30), _shift_left(_shift_left(places, 30) - log2_m, 24))
    quotient = divide(dividend, tf.where_v2(near, divisor, tf.maximum(eps, _int(1))))
    return tf.where_v2(near, _shift_right(quotient * y, 24), quotient), inside


def _distance(z: tf.Tensor, scale: tf.Tensor | None = None) -> tf.Tensor:
    """−z·2^scale as Q24, of float32 z ≤ 0 (what is not, NaN too, counts as 0)."""
    far = tf.where_v2(z <= 0, -z, 0.0)
    if scale is not None:
        far *= tf.bitcast(tf.cast(_shift_left(scale + 127, 23), tf.int32), tf.float32)
    return tf.cast(tf.minimum(far, _FARTHEST) * 2.0**24, tf.int64)  # powers of two: no rounding but down


def softmax_weights(z: tf.Tensor) -> tf.Tensor:
    """exp(z).

    Args:
      z: float32 tf.Tensor, scores less the largest one, so none above 0.

    Returns:
      float32 tf.Tensor of z's shape, within 2⁻²² of exp(z), relatively; 0 for z
      below −87 or so.
    """
    return _to_float32(_softmax_exponent(_distance(z)))


def _softmax_exponent(distance: tf.Tensor) -> tf.Tensor:
    return _shift_right(distance * _int(_LOG2_E), 24)


def _scale_exponent(
    scale: tf.Tensor, eps: tf.Tensor, divide: Callable[[tf.Tensor, tf.Tensor], tf.Tensor] = tf.floordiv
) -> tf.Tensor:
    """n/ε, Q30: scores times 2ⁿ give weights that 2^(−n/ε) makes p; nothing is left of them where that has no room."""
    return divide(_shift_left(scale, 54), tf.maximum(eps, _shift_left(tf.maximum(scale, _int(1)), 18)))


def _halves_of_sum(p: tf.Tensor) -> tf.Tensor:
    """[2, rows, 1]: halves of Σp, Q40, which float32 adds without rounding (over 64 shards at most)."""
    total = tf.minimum(tf.reduce_sum(p, -1, keepdims=True), _int(1 << 41))
    halves = [_shift_right(total, 18), tf.bitwise.bitwise_and(total, _int((1 << 18) - 1))]
    return tf.cast(tf.stack(halves), tf.float32)


def _above_1(halves: tf.Tensor) -> tf.Tensor:
    """Whether Σp is above 1."""
    halves = tf.cast(halves, tf.int64)
    return _shift_left(halves[0], 18) + halves[1] > _int(1 << 40)


def entmax_weights(
    mesh_impl: mtf.MeshImpl, z: LaidOut, epsilon: LaidOut, sum_over_shards: Callable[[LaidOut], LaidOut]
) -> LaidOut:
    """The α-entmax of scores, but for a factor: [1 + ε(2ⁿz − δ)]₊^(1/ε), which is p·2^(n/ε).

    n, and then δ as a multiple of 2⁻²⁴, are the largest at which these, taken for p,
    still sum to more than 1, found bit by bit. With n = 0 alone the base would have
    few bits left in rows that are nearly flat; so it is in (1/2, 1] for the largest
    score, if n is not 0.

    Args:
      mesh_impl: mtf.MeshImpl.
      z: laid-out float32 [rows, entries], scores less the largest one of their
        row, so none above 0.
      epsilon: laid-out float32 [rows, 1]: α − 1, in [0, 1].
      sum_over_shards: a function from a laid-out float32 tensor to its sum over
        the processors that share a row.

    Returns:
      laid-out float32 like z.
    """
    slicewise = mesh_impl.slicewise
    # exact: α is in [1, 2], so ε is a multiple of 2⁻²³
    eps = slicewise(lambda e: tf.cast(e * 2.0**24, tf.int64), epsilon)

    def exponent(z: tf.Tensor, eps: tf.Tensor, scale: tf.Tensor, delta: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return _entmax_exponent(_distance(z, scale) + delta, eps)

    def total(z: tf.Tensor, eps: tf.Tensor, scale: tf.Tensor, delta: tf.Tensor) -> tf.Tensor:
        t, inside = exponent(z, eps, scale, delta)
        return _halves_of_sum(tf.where_v2(inside, _to_q40(t + _scale_exponent(scale, eps)), _int(0)))

    def choose(sums: tf.Tensor, now: tf.Tensor, trial: tf.Tensor) -> tf.Tensor:
        return tf.where_v2(_above_1(sums), trial, now)

    def find(z: LaidOut) -> tuple[LaidOut, ...]:
        """(n, δ)"""

        def body(bit: tf.Tensor, *found: LaidOut) -> tuple[tf.Tensor, LaidOut, LaidOut]:
            one, in_scale = _int(1), bit >= _DELTA_BITS
            steps = [
                tf.where_v2(in_scale, _shift_left(one, tf.maximum(bit - _DELTA_BITS, 0)), _int(0)),
                tf.where_v2(in_scale, _int(0), _shift_left(one, bit)),
            ]
            trial = [slicewise(lambda f, step=step: f + step, f) for f, step in zip(found, steps, strict=True)]
            sums = sum_over_shards(slicewise(total, z, eps, *trial))
            scale, delta = (slicewise(choose, sums, f, t) for f, t in zip(found, trial, strict=True))
            return bit - 1, scale, delta

        zeros = slicewise(tf.zeros_like, eps)
        start = (_int(_DELTA_BITS + _SCALE_BITS - 1), zeros, zeros)
        return laid_out_while_loop(mesh_impl, lambda bit, *_: bit >= 0, body, start)[1:]

    if z.slice_shape[-1] <= 2 * _CANDIDATES:
        found = find(z)
    else:  # as a rule, few entries are in the support
        nearest = slicewise(lambda z: tf.math.top_k(z, _CANDIDATES)[0], z)

        def may_count(nearest: tf.Tensor, eps: tf.Tensor) -> tf.Tensor:
            near = tf.logical_or(_int(1 << 48) - eps * _distance(nearest[:, -1:]) > 0, tf.equal(eps, _int(0)))
            return tf.cast(near, tf.float32)

        too_few = any_of(mesh_impl, slicewise(may_count, nearest, eps))
        found = laid_out_cond(mesh_impl, too_few, lambda: find(z), lambda: find(nearest))

    def weights(z: tf.Tensor, eps: tf.Tensor, scale: tf.Tensor, delta: tf.Tensor) -> tf.Tensor:
        t, inside = exponent(z, eps, scale, delta)
        return tf.where_v2(inside, _to_float32(t), 0.0)

    return slicewise(weights, z, eps, *found)


# --- For a TPU core's program -----------------------------------------------------------------------
#
# A TPU has no 64-bit types: numbers are pairs of 32 bits, and a division alone takes its compiler a minute. So
# quotients are corrected estimates; what is evaluated stands in one loop, whose last round gives the weights; and the
# search begins with bounds from a β that floating point found.


def _quotient(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    """x // y for 0 ≤ x < 2⁶⁰ and 0 < y, exact below 2³⁸; a quotient above that is wrong by less than one in 2¹⁶."""
    divisor = tf.cast(y, tf.float32)
    quotient = tf.zeros_like(x)
    for _ in range(2):  # the second leaves an error of 1
        quotient += tf.cast(tf.floor(tf.cast(x - quotient * y, tf.float32) / divisor), tf.int64)
    rest = x - quotient * y
    return quotient + tf.where_v2(rest >= y, _int(1), tf.where_v2(rest < 0, _int(-1), _int(0)))


def entmax_weights_near(
    mesh_impl: mtf.MeshImpl,
    z: LaidOut,
    epsilon: LaidOut,
    beta: LaidOut,
    sum_over_shards: Callable[[LaidOut], LaidOut],
    largest_of: Callable[[LaidOut], tf.Tensor],
) -> LaidOut:
    """`entmax_weights`, searched for near a β of `entmax_solver`.

    p = [β + εz]₊^(1/ε), so 2ⁿβ = 1 − εδ. The search by bits begins at the first bit in which bounds on δ differ. If
    what it finds may lie outside of them, it begins again, at the first bit of all.

    Args:
      mesh_impl, z, epsilon, sum_over_shards: as for `entmax_weights`.
      beta: laid-out float32 [rows, 1]; if it is wrong, the search is only slower.
      largest_of: a function from laid-out float32 [rows, 1] to the largest on all processors that must take equally
        many rounds, a scalar tf.Tensor.

    Returns:
      laid-out float32 like z, with the bits of `entmax_weights`.
    """
    slicewise = mesh_impl.slicewise
    first_of_all = _DELTA_BITS + _SCALE_BITS - 1
    eps = slicewise(lambda e: tf.cast(e * 2.0**24, tf.int64), epsilon)

    def bounds(epsilon: tf.Tensor, beta: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """n, the lower bound on δ, and the first bit that is not known of them."""
        beta = tf.where_v2(beta > 0, tf.minimum(beta, 1.0), 1.0)
        exponent = tf.bitwise.right_shift(tf.bitcast(beta, tf.int32), tf.constant(23)) - 127
        scale = tf.clip_by_value(-1 - exponent, 0, (1 << _SCALE_BITS) - 1)
        base = beta * tf.bitcast(tf.bitwise.left_shift(scale + 127, tf.constant(23)), tf.float32)
        delta = 2.0**24 * (1.0 - base) / epsilon
        margin = 2.0**24 * 4e-7 / epsilon + 2.0**-21 * delta + 8.0
        most = float((1 << _DELTA_BITS) - 128)
        low, high = (tf.cast(tf.clip_by_value(d, 0.0, most), tf.int32) for d in (delta - margin, delta + margin))
        differ = tf.cast(tf.bitwise.bitwise_xor(low, high), tf.float32)
        first_bit = tf.bitwise.right_shift(tf.bitcast(differ, tf.int32), tf.constant(23)) - 127
        next_scale = tf.logical_or(base < 0.5 + 4e-6, tf.logical_and(scale > 0, base > 1 - 4e-6))
        exact = tf.logical_and(epsilon > 0, tf.logical_not(next_scale))
        first_bit = tf.where_v2(exact, tf.maximum(first_bit, 0), first_of_all)
        return tf.cast(scale, tf.int64), tf.cast(low, tf.int64), tf.cast(first_bit, tf.float32)

    def known(scale: tf.Tensor, delta: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        shift = tf.cast(first_bit + 1, tf.int64)
        whole = first_bit < _DELTA_BITS
        none = tf.zeros_like(scale)
        return tf.where_v2(whole, scale, none), tf.where_v2(whole, _shift_left(_shift_right(delta, shift), shift), none)

    def evaluate(
        bit: tf.Tensor, z: tf.Tensor, eps: tf.Tensor, scale: tf.Tensor, delta: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Weights, and halves of Σp; at the last bit of all weights are those of p·2^(n/ε)."""
        t, inside = _entmax_exponent(_distance(z, scale) + delta, eps, _quotient)
        t += tf.where_v2(bit < 0, _int(0), _scale_exponent(scale, eps, _quotient))
        weights = tf.where_v2(inside, _to_float32(t), 0.0)
        return weights, _halves_of_sum(tf.where_v2(inside, _to_q40(t), _int(0)))

    def choose(
        sums: tf.Tensor, scale: tf.Tensor, delta: tf.Tensor, more_scale: tf.Tensor, more_delta: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        above = _above_1(sums)
        return tf.where_v2(above, more_scale, scale), tf.where_v2(above, more_delta, delta)

    def may_be_outside(eps: tf.Tensor, scale: tf.Tensor, delta: tf.Tensor) -> tf.Tensor:
        """Float32: 1.0 unless p was seen to sum to more than 1 there, to no more at the next δ, and at the next n."""
        unknown = _shift_left(_int(2), tf.cast(tf.minimum(first_bit, _DELTA_BITS - 1), tf.int64)) - _int(1)
        found = tf.bitwise.bitwise_and(delta, unknown)
        lowest = tf.logical_and(tf.equal(found, _int(0)), scale + delta > _int(0))
        outside = tf.logical_or(lowest, tf.equal(found, unknown))
        return tf.cast(tf.logical_or(outside, eps * delta >= _int(1 << 47)), tf.float32)

    def body(
        bit: tf.Tensor, again: tf.Tensor, scale: LaidOut, delta: LaidOut, _: LaidOut
    ) -> tuple[tf.Tensor, tf.Tensor, LaidOut, LaidOut, LaidOut]:
        position, in_scale = tf.cast(bit, tf.int64), bit >= _DELTA_BITS
        one, zero = _int(1), _int(0)
        scale_step = tf.where_v2(in_scale, _shift_left(one, tf.maximum(position - _DELTA_BITS, zero)), zero)
        in_delta = tf.logical_and(bit >= 0, tf.logical_not(in_scale))
        delta_step = tf.where_v2(in_delta, _shift_left(one, tf.maximum(position, zero)), zero)
        more_scale = slicewise(lambda s: s + scale_step, scale)
        more_delta = slicewise(lambda d: d + delta_step, delta)
        weights, sums = slicewise(functools.partial(evaluate, bit), z, eps, more_scale, more_delta)
        scale, delta = slicewise(choose, sum_over_shards(sums), scale, delta, more_scale, more_delta)
        outside = largest_of(slicewise(may_be_outside, eps, scale, delta))
        begin_again = tf.logical_and(tf.equal(bit, 0), tf.logical_and(outside > again, first_bit < first_of_all))
        keep = tf.where_v2(begin_again, zero, one)
        scale, delta = (slicewise(lambda x: x * keep, x) for x in (scale, delta))
        bit = tf.where_v2(begin_again, first_of_all, bit - 1)
        return bit, tf.where_v2(begin_again, 1.0, again), scale, delta, weights

    scale, low, first_bits = slicewise(bounds, epsilon, beta)
    first_bit = tf.cast(largest_of(first_bits), tf.int32)
    start = (first_bit, tf.constant(0.0), *slicewise(known, scale, low), slicewise(tf.zeros_like, z))
    *_, weights = laid_out_while_loop(mesh_impl, lambda bit, *_: bit >= -1, body, start)
    return weights
