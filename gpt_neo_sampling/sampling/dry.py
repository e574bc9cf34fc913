"""DRY, "Don't Repeat Yourself": a penalty for the tokens that would continue a repeated sequence."""

import numpy as np

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling._types import RowValue
from gpt_neo_sampling.mesh.ops import cwise_broadcast, dim_of, scatter_max, size_of, take
from gpt_neo_sampling.sampling.penalties import adjust, import_number, rows_so_far, whole_power

_MOST = 1e30  # of a penalty: far below every other logit, and not the lowest number, which would count as masked


def dry_penalty(
    logits: mtf.Tensor,
    ids: mtf.Tensor,
    position: RowValue,
    multiplier: RowValue,
    base: RowValue = 1.75,
    allowed_length: RowValue = 2,
    breakers: mtf.Tensor | None = None,
    dim: mtf.Dimension | None = None,
) -> mtf.Tensor:
    """Makes tokens less likely that would continue a sequence which the row has already.

    For each token t, n is the length of the longest sequence that the row ends with and that is followed by t further
    ahead in it (the two may overlap), with no breaker in the sequence. Where n is at least the allowed length, and t is
    no breaker, t loses multiplier · base^(n − allowed_length) of its logit. By p-e-w, text-generation-webui's pull
    request 5677, and llama.cpp's `dry` sampler. The two agree but for:

    - The length: text-generation-webui counts no more than 50 tokens of a sequence, llama.cpp all, with an exponent
      that stops where the power would overflow. Here all count, as in llama.cpp, and a penalty is at most 10³⁰:
      no entry becomes a masked one.
    - Breakers: text-generation-webui takes a text's last token, llama.cpp each token that holds the text and each
      sequence of tokens that does. Here they are single tokens of the caller's choice.
    - How far back they look: `repetition_penalty_range`, `dry_penalty_last_n`. Here it is the whole row.

    The power is made by squaring in float32, in a fixed order, so it has the same bits on every backend.

    Args:
      logits: mtf.Tensor, any float dtype; computed in float32.
      ids: int32 mtf.Tensor [logits.shape − dim, length].
      position: an int, or an int32 tensor, scalar or [logits.shape − dim]: how many of the ids the row has.
      multiplier: a finite number of at least 0, or a float32 tensor, scalar or [logits.shape − dim]; 0 changes nothing.
      base: the same of at least 1.
      allowed_length: an int of at least 1, or an int32 tensor, scalar or [logits.shape − dim].
        A row of a tensor that is out of range becomes NaN, hence invalid.
      breakers: float32 mtf.Tensor [dim], 1.0 for tokens at which a sequence ends; None for none.
      dim: mtf.Dimension of logits; the last by default.

    Returns:
      mtf.Tensor like logits. No gradient flows through it.

    Raises:
      ValueError: for a number out of range, ids of other rows, or a tensor of the wrong shape.
    """
    dim, mesh = dim_of(logits, dim), logits.mesh
    ids, position, rows = rows_so_far(logits, ids, position, dim)
    multiplier = import_number(logits, multiplier, dim, "dry_multiplier", 0.0, "finite number of at least 0")
    base = import_number(logits, base, dim, "dry_base", 1.0, "finite number of at least 1")
    least = import_number(logits, allowed_length, dim, "dry_allowed_length", 1, "whole number of at least 1", tf.int32)
    breaks = mtf.zeros(mesh, ids.shape) if breakers is None else take(breakers, ids, dim)
    n_matched = mtf.slicewise(
        _matched, [ids, position, breaks], ids.shape, tf.float32, splittable_dims=rows.dims, grad_function=0
    )
    length = ids.shape[-1].size

    def penalty(n: tf.Tensor, multiplier: tf.Tensor, base: tf.Tensor, least: tf.Tensor) -> tf.Tensor:
        n = tf.cast(n, tf.int32)
        found = tf.logical_and(n >= least, multiplier > 0)  # not 0 times an infinite power
        product = multiplier * whole_power(base, n - least, length)
        return tf.where_v2(found, tf.minimum(product, _MOST), 0.0)

    def penalise(
        x: tf.Tensor, penalty: tf.Tensor, multiplier: tf.Tensor, base: tf.Tensor, least: tf.Tensor
    ) -> tf.Tensor:
        valid = (multiplier >= 0) & (multiplier < np.inf) & (base >= 1) & (base < np.inf) & (least >= 1)
        return x - tf.where_v2(valid, penalty, np.nan)

    # the longest sequence has the largest penalty
    penalties = cwise_broadcast(penalty, [n_matched, multiplier, base, least], ids.shape, tf.float32)
    penalties = scatter_max(penalties, ids, rows + dim, dim)
    return adjust(penalise, logits, penalties, multiplier, base, least)


def _matched(ids: tf.Tensor, position: tf.Tensor, breaks: tf.Tensor) -> tf.Tensor:
    """How long a sequence the row ends with and has ahead of each id, too: float32 [rows, length]; 0 for breakers."""
    length = size_of(ids, -1)
    at = tf.range(length)
    position = tf.minimum(position, length)[..., tf.newaxis]
    breaks = breaks > 0.5

    def step(
        back: tf.Tensor, shifted: tf.Tensor, open_: tf.Tensor, count: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
        """Whether the id `back` ahead of each is the row's own `back`-th last."""
        shifted = tf.roll(shifted, 1, -1)
        # not by a gather, which takes a TPU ten times as long
        last = tf.reduce_sum(tf.where_v2(tf.equal(at, position - back), ids, 0), -1, keepdims=True)
        open_ = open_ & tf.equal(shifted, last) & (at >= back)
        return back + 1, shifted, open_, count + tf.cast(open_, tf.float32)

    unlike_any = tf.where_v2(breaks, tf.int32.min, ids)
    start = tf.constant(1), unlike_any, (at < position) & tf.logical_not(breaks), tf.zeros(ids.shape)
    return tf.while_loop(lambda back, _, open_, __: tf.reduce_any(open_), step, start)[-1]
