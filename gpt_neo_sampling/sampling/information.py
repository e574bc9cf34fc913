"""How much information a row's distribution holds: a token's surprise, and the entropy.

What is made of these numbers decides which tokens are drawn, so their bits must not depend on layout or backend.
Float64 sums, rounded to float32, see to that on CPUs; but of a TPU core's pairs of float32 one in a hundred would be
rounded the other way. So numbers are rounded to multiples of a step, larger than float32's but far too small to
matter, and those that pairs leave in doubt are computed in emulated float64.
"""

import functools
import math

import numpy as np

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling._types import LaidOut
from gpt_neo_sampling.mesh.ops import MeshOperation, dim_of, finite, import_rows
from gpt_neo_sampling.mesh.sharded_rows import ShardedRows, spread_rows
from gpt_neo_sampling.mesh.xla import is_core_program, kept_together
from gpt_neo_sampling.sampling import float_pairs
from gpt_neo_sampling.sampling.core_cutoffs import or_exact
from gpt_neo_sampling.sampling.core_rows import FAR, joined, sums_of
from gpt_neo_sampling.sampling.cutoffs import Softmax, is_top_zero
from gpt_neo_sampling.sampling.float_pairs import PAIR_ERROR_BOUND, Pair

_BITS_STEP = 2.0**-16  # of a surprise
EVENNESS_STEP = 2.0**-20
_MOST_STEPS = 2.0**22  # that a pair is rounded to
_LARGE = 2.0**20  # a surprise of no step


def surprise(logits: mtf.Tensor, token: mtf.Tensor, dim: mtf.Dimension | None = None) -> mtf.Tensor:
    """−log2 p of a token of each row, p = softmax(logits): in bits, in multiples of 2⁻¹⁶ below 256.

    Its bits are the same on every layout and backend.

    Args:
      logits: mtf.Tensor, float32, bfloat16 or float16; −inf and the lowest number have probability 0.
      token: int32 mtf.Tensor [logits.shape − dim].
      dim: mtf.Dimension of logits; the last by default.

    Returns:
      float32 mtf.Tensor [logits.shape − dim]. +inf for a token of probability 0; NaN for one below 0 or from dim.size
      on, and where the row holds NaN or +inf. No gradient flows through it.

    Raises:
      ValueError: for a token of another dtype or shape, or a `dim` that logits lack.

    Example (`run` is defined in the docstring of `models.utils`):

        >>> token = lambda x: mtf.constant(x.mesh, 1, x.shape[:1], tf.int32)
        >>> run(lambda x: surprise(mtf.log(x), token(x)), [[0.75, 0.25], [0.5, 0.5]])
        array([2., 1.], dtype=float32)
    """
    dim = dim_of(logits, dim)
    rows = logits.shape - dim
    if not isinstance(token, mtf.Tensor) or token.dtype != tf.int32:
        raise ValueError(f"token={token!r}; an int32 mtf.Tensor {rows} is needed")
    return _SurpriseOperation(logits, dim, import_rows(logits.mesh, token, tf.int32, rows, "token")).outputs[0]


def evenness(logits: mtf.Tensor, dim: mtf.Dimension | None = None) -> mtf.Tensor:
    """The entropy of softmax(logits) as a part of the largest that so many entries can have, ln n.

    Its bits are the same on every layout and backend.

    Args:
      logits, dim: as for `surprise`. Masked entries do not count.

    Returns:
      float32 mtf.Tensor [logits.shape − dim], multiples of 2⁻²⁰ from 0 to 1. −1 where fewer than two entries count, NaN
      where the row holds NaN or +inf. No gradient flows through it.

    Raises:
      ValueError: for a `dim` that logits lack.
    """
    return _EvennessOperation(logits, dim_of(logits, dim)).outputs[0]


class _RowOperation(MeshOperation):
    """float32 numbers of rows: by `exact`, and on a core by `in_pairs` where that leaves no doubt."""

    def __init__(self, logits: mtf.Tensor, dim: mtf.Dimension, *others: mtf.Tensor) -> None:
        """others: mtf.Tensors, their dims among [logits.shape − dim]."""
        rows = logits.shape - dim
        super().__init__([logits, *others], [(rows, tf.float32)], type(self).__name__.strip("_"))
        self._dim = dim

    def lower(self, lowering: mtf.Lowering) -> None:
        mesh_impl = lowering.mesh_impl(self)
        logits, *others = self.inputs
        rest = logits.shape - self._dim
        rows = ShardedRows(mesh_impl, logits.shape, self._dim, whole_groups=False)
        x = mesh_impl.slicewise(lambda x: tf.cast(rows.to_rows(x), tf.float32), lowering.tensors[logits])
        on_core = is_core_program(mesh_impl)
        softmax = Softmax(rows, x, float(logits.dtype.min), top_is_zero=on_core and is_top_zero(logits))
        others = [spread_rows(lowering, other, rest) for other in others]
        found = self.in_pairs(softmax, *others) if on_core else self.exact(softmax, *others)
        slice_shape = mesh_impl.slice_shape(rest)
        value = mesh_impl.slicewise(lambda x: tf.reshape(x, slice_shape), found)
        lowering.set_tensor_lowering(self.outputs[0], value)

    def exact(self, softmax: Softmax, *others: LaidOut) -> LaidOut:
        """Laid-out float32 [rows, 1], by float64 sums; others: laid-out [rows, 1]."""
        raise NotImplementedError

    def in_pairs(self, softmax: Softmax, *others: LaidOut) -> LaidOut:
        """Laid-out float32, one number a row."""
        raise NotImplementedError


class _SurpriseOperation(_RowOperation):
    def exact(self, softmax: Softmax, *others: LaidOut) -> LaidOut:
        (token,) = others
        return self._exact(softmax, token, self._entry_of(softmax, token))

    def _entry_of(self, softmax: Softmax, token: LaidOut) -> LaidOut:
        """Laid-out float32 [rows, 1]: the token's entry, finite."""
        rows = softmax.rows

        def look_up(x: tf.Tensor, token: tf.Tensor, pcoord: tf.Tensor | int = 0) -> tf.Tensor:
            at = token - pcoord * rows.entries
            held = tf.logical_and(at >= 0, at < rows.entries)
            entry = finite(tf.gather(x, tf.clip_by_value(at, 0, rows.entries - 1), batch_dims=1))
            return tf.where_v2(held, entry, 0.0)

        return rows.across_shards(rows.mesh_impl.slicewise(look_up, softmax.x, token, *rows.pcoords()), "SUM")

    def _exact(self, softmax: Softmax, token: LaidOut, entry: LaidOut) -> LaidOut:
        def value(total: tf.Tensor, top: tf.Tensor, entry: tf.Tensor, token: tf.Tensor) -> tf.Tensor:
            below = tf.cast(top, tf.float64) - tf.cast(entry, tf.float64)
            bits = (tf.log(total) + below) * (1 / math.log(2))
            near = tf.minimum(bits, _LARGE)
            bits = tf.where_v2(bits < _LARGE, tf.floor(near / _BITS_STEP + 0.5) * _BITS_STEP, bits)
            return self._checked(softmax, tf.cast(bits, tf.float32), entry, token, tf.is_nan(total))

        return softmax.rows.mesh_impl.slicewise(value, softmax.total, softmax.top, entry, token)

    def _checked(
        self, softmax: Softmax, bits: tf.Tensor, entry: tf.Tensor, token: tf.Tensor, invalid: tf.Tensor
    ) -> tf.Tensor:
        bits = tf.where_v2(entry <= softmax.lowest, np.inf, bits)
        outside = tf.logical_or(token < 0, token >= softmax.rows.size)
        return tf.where_v2(tf.logical_or(outside, invalid), np.nan, bits)

    def in_pairs(self, softmax: Softmax, *others: LaidOut) -> LaidOut:
        core, (flat_token,) = softmax.core, others
        token = core.of_rows(flat_token)

        def sums(x: tf.Tensor, top: tf.Tensor, token: tf.Tensor, *pcoord: tf.Tensor) -> tuple[tf.Tensor, ...]:
            here = tf.equal(core.entry_numbers(*pcoord), tf.cast(token, tf.float32))
            entry = tf.where_v2(here, finite(x), 0.0)
            invalid = tf.where_v2(x < np.inf, tf.zeros_like(x), 1.0)
            return sums_of([entry, invalid], [float_pairs.exp_of_minus(top - x)])

        def value(
            top: tf.Tensor, token: tf.Tensor, entry: tf.Tensor, invalid: tf.Tensor, *total: tf.Tensor
        ) -> tuple[tf.Tensor, ...]:
            log_total = float_pairs.log_of(joined(*total))
            nats = float_pairs.add(log_total, float_pairs.two_sum(top, -entry))
            per_bit = np.float32(1 / math.log(2))
            rest = tf.constant(1 / math.log(2) - float(per_bit), tf.float32)
            bits = float_pairs.product(float_pairs.two_sum(*nats), (tf.constant(per_bit), rest))
            bits, in_doubt = _rounded(bits, 2 * PAIR_ERROR_BOUND * (1.5 + bits[0]), _BITS_STEP)
            no_number = self._checked(softmax, tf.zeros_like(bits), entry, token, invalid > 0)
            is_number = tf.equal(no_number, 0.0)
            bits = tf.where_v2(is_number, bits, no_number)
            return kept_together(bits, tf.where_v2(is_number, in_doubt, 0.0), entry)

        entry, invalid, *total = core.slicewise(sums, core.x, core.top, token, *core.rows.pcoords())
        sums_found = *core.summed([entry, invalid]), *core.gathered(total)
        bits, in_doubt, entry = core.slicewise(value, core.top, token, *sums_found)

        def exact() -> LaidOut:
            flat_entry = core.slicewise(lambda e: tf.reshape(e, [-1, 1]), entry)
            return self._exact(softmax, flat_token, flat_entry)

        return or_exact(core, (bits, in_doubt), exact)[0]


class _EvennessOperation(_RowOperation):
    def exact(self, softmax: Softmax, *others: LaidOut) -> LaidOut:
        rows, slicewise = softmax.rows, softmax.rows.mesh_impl.slicewise

        def count(x: tf.Tensor) -> tf.Tensor:
            return tf.reduce_sum(tf.where_v2(x > softmax.lowest, 1.0, tf.zeros_like(x)), -1, keepdims=True)

        def value(total: tf.Tensor, depth: tf.Tensor, n: tf.Tensor) -> tf.Tensor:
            enough = tf.logical_and(n > 1, total > 0)
            most = tf.log(tf.cast(tf.maximum(n, 2.0), tf.float64))
            part = (tf.log(tf.where_v2(enough, total, tf.ones_like(total))) + depth) / most
            part = tf.floor(tf.minimum(part, 1.0) / EVENNESS_STEP + 0.5) * EVENNESS_STEP
            part = tf.where_v2(enough, tf.cast(part, tf.float32), -1.0)
            return tf.where_v2(tf.is_nan(total), np.nan, part)

        n = rows.across_shards(slicewise(count, softmax.x), "SUM")
        return slicewise(value, softmax.total, softmax.depth, n)

    def in_pairs(self, softmax: Softmax, *others: LaidOut) -> LaidOut:
        core = softmax.core

        def sums(x: tf.Tensor, top: tf.Tensor) -> tuple[tf.Tensor, ...]:
            there = tf.where_v2(x > core.lowest, 1.0, tf.zeros_like(x))
            invalid = tf.where_v2(x < np.inf, tf.zeros_like(x), 1.0)
            weights = float_pairs.exp_of_minus(top - x)
            return sums_of([there, invalid], [weights, float_pairs.times(weights, tf.minimum(top - x, FAR))])

        def value(n: tf.Tensor, invalid: tf.Tensor, *sums: tf.Tensor) -> tuple[tf.Tensor, ...]:
            enough, most = n > 1, tf.maximum(n, 2.0)
            total, depths = joined(*sums[:2]), joined(*sums[2:])
            entropy = float_pairs.add(float_pairs.log_of(total), float_pairs.quotient(depths, total))
            log_n = float_pairs.log_of((most, tf.zeros_like(most)))
            part = float_pairs.quotient(float_pairs.two_sum(*entropy), log_n)
            bound = 5 * PAIR_ERROR_BOUND * (1.0 + entropy[0]) / log_n[0]
            part, in_doubt = _rounded(part, bound, EVENNESS_STEP)
            part = tf.where_v2(enough, tf.minimum(part, 1.0), -1.0)
            part = tf.where_v2(invalid > 0, np.nan, part)
            return kept_together(part, tf.where_v2(tf.logical_and(enough, tf.equal(invalid, 0.0)), in_doubt, 0.0))

        counts_and_pairs = core.slicewise(sums, core.x, core.top)
        found = *core.summed(counts_and_pairs[:2]), *core.gathered(counts_and_pairs[2:])
        return or_exact(core, tuple(core.slicewise(value, *found)), functools.partial(self.exact, softmax))[0]


def _rounded(x: Pair, bound: tf.Tensor, step: float) -> tuple[tf.Tensor, tf.Tensor]:
    """(the nearest multiple of the step, a power of two, in float32; 1.0 where it may be another): of a pair from 0 up.

    bound: how far the pair may be off.
    """
    high, low = float_pairs.two_sum(x[0] / step, x[1] / step)
    whole = tf.floor(high)
    part = (high - whole) + low
    nearest = tf.floor(part + 0.5)
    doubt = tf.logical_or(tf.abs(part - nearest) + bound / step > 0.5, high > _MOST_STEPS)
    return (whole + nearest) * step, tf.where_v2(doubt, 1.0, 0.0)
