"""Masks: logits in, and out again without what may not be drawn."""

from collections.abc import Callable

import numpy as np

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling._types import FLOAT32_MAX, RowValue, is_int, is_real
from gpt_neo_sampling.mesh.ops import cwise_broadcast, dim_of, import_rows, take
from gpt_neo_sampling.sampling import cutoffs
from gpt_neo_sampling.sampling.defaults import MOST_TO_KEEP
from gpt_neo_sampling.sampling.top_k import top_k

MOST_OF_TOP_H = 100  # entries that transformers' top_h looks at


def mask_value(dtype: tf.DType) -> float:
    """What a masked logit becomes: the lowest finite number of its dtype.

    Its probability is exactly 0 under softmax and entmax, and unlike −inf it
    passes through every mesh's collectives.
    """
    return dtype.min


def top_k_mask(
    logits: mtf.Tensor,
    k: RowValue,
    dim: mtf.Dimension | None = None,
    *,
    max_top_k: int | None = None,
    masked: float | None = None,
) -> mtf.Tensor:
    """Masks all but the k largest logits (Fan, Lewis, Dauphin 2018, arXiv 1805.04833).

    Exactly k survive: among equal logits at the border those of lower index.

    Args:
      logits: mtf.Tensor, float32, bfloat16 or float16.
      k: an int of at least 1, or an int32 tensor, scalar or [logits.shape − dim],
        whose values below 1 mean no mask. A k of dim.size or more changes nothing.
      dim: mtf.Dimension of logits; the last by default.
      max_top_k: an int, needed for a tensor k: the largest value that it may
        take, apart from those that change nothing. A row above it becomes NaN,
        hence invalid.
      masked: a number: what the rest become; by default `mask_value(logits.dtype)`.

    Returns:
      mtf.Tensor like logits. A NaN stays NaN. The gradient flows through the survivors.

    Raises:
      ValueError: for an int k below 1, a tensor k without max_top_k or of the
        wrong shape, or a `dim` that logits lack.

    Example (`run` is defined in the docstring of `models.utils`):

        >>> run(lambda x: mtf.softmax(top_k_mask(x, 2), x.shape[-1]), [[0.0, 1.0, 1.0, 1.0]])
        array([[0. , 0.5, 0.5, 0. ]], dtype=float32)
    """
    dim = dim_of(logits, dim)
    imported = _import_k(logits, k, dim, max_top_k)
    if imported is None:
        return logits
    k, k_max = imported
    logits = _keep_first(logits, dim, _largest(logits, dim, k_max), k, masked)
    return logits + mtf.cast(_asked_too_many(k, k_max, dim), logits.dtype) if k_max < dim.size else logits


_Largest = tuple[mtf.Tensor, mtf.Tensor, mtf.Tensor]


def _largest(logits: mtf.Tensor, dim: mtf.Dimension, k_max: int) -> _Largest:
    """(the logits, finite, for comparing; the largest of them and their indices, [logits.shape − dim, top_k])."""
    lowest = mask_value(logits.dtype)

    def comparable(x: tf.Tensor) -> tf.Tensor:
        # −inf counts as masked: it could not travel between shards. −0.0 becomes
        # 0.0: XLA's sort tells them apart.
        x = tf.where_v2(x < lowest, tf.constant(lowest, x.dtype), x)
        return tf.where_v2(tf.equal(x, 0), tf.zeros_like(x), x)

    finite_logits = mtf.cwise(comparable, [logits], name="comparable")
    return finite_logits, *top_k(mtf.stop_gradient(finite_logits), dim, mtf.Dimension("top_k", k_max))


def _keep_first(
    logits: mtf.Tensor, dim: mtf.Dimension, largest: _Largest, k: mtf.Tensor, masked: float | None
) -> mtf.Tensor:
    """Masks all but the first k of the largest; a k below 1, or of dim.size and more, is no mask."""
    finite_logits, values, indices = largest
    k_dim = values.shape[-1]
    border = cwise_broadcast(lambda k: tf.clip_by_value(k - 1, 0, k_dim.size - 1), [k])
    border = mtf.broadcast(border, logits.shape - dim)
    value, index = take(values, border, k_dim), take(indices, border, k_dim)

    def keep(x: tf.Tensor, value: tf.Tensor, index: tf.Tensor, entry: tf.Tensor, k: tf.Tensor) -> tf.Tensor:
        below = tf.logical_or(x < value, tf.logical_and(tf.equal(x, value), entry > index))
        return tf.logical_or(tf.logical_not(below), tf.logical_or(k < 1, k >= dim.size))

    entry = mtf.range(logits.mesh, dim, tf.int32)
    kept = cwise_broadcast(keep, [finite_logits, value, index, entry, k], logits.shape, tf.bool, name="top_k_keep")
    return mask_out(logits, kept, masked)


def top_k_candidates(
    logits: mtf.Tensor, k: RowValue, dim: mtf.Dimension | None = None, *, max_top_k: int | None = None
) -> tuple[mtf.Tensor, mtf.Tensor] | None:
    """The entries that `top_k_mask` keeps, without the others.

    Args:
      logits, k, dim, max_top_k: as for `top_k_mask`.

    Returns:
      (values, indices): mtf.Tensors [logits.shape − dim, top_k], of the dtype of
      logits and int32, in order. From a row's own k on, values are −inf; a row
      without mask has as many as there is room for; one with NaN, +inf or a k above
      max_top_k has NaN for all its values. For a number k of dim.size or more, None.
    """
    dim = dim_of(logits, dim)
    imported = _import_k(logits, k, dim, max_top_k)
    if imported is None:
        return None
    k, k_max = imported
    k_dim = mtf.Dimension("top_k", k_max)
    values, indices = top_k(logits, dim, k_dim)
    at = mtf.range(logits.mesh, k_dim, tf.int32)

    def keep(x: tf.Tensor, k: tf.Tensor, at: tf.Tensor) -> tf.Tensor:
        kept = tf.logical_or(at < k, k < 1)
        return tf.where_v2(tf.logical_or(kept, tf.is_nan(x)), x, tf.constant(-np.inf, x.dtype))

    values = cwise_broadcast(keep, [values, k, at], values.shape)
    return values + mtf.cast(_asked_too_many(k, k_max, dim), values.dtype) if k_max < dim.size else values, indices


def has_no_top_k(k: mtf.Tensor, dim: mtf.Dimension) -> mtf.Tensor:
    """float32 mtf.Tensor like k, an mtf.Tensor as for `top_k_mask`: 1.0 where it means no mask, else 0.0."""
    return mtf.cwise(lambda k: tf.cast(tf.logical_or(k < 1, k >= dim.size), tf.float32), [k], tf.float32)


def _import_k(
    logits: mtf.Tensor, k: RowValue, dim: mtf.Dimension, max_top_k: int | None
) -> tuple[mtf.Tensor, int] | None:
    """(k as an int32 mtf.Tensor, the largest it may be); None for a number that masks nothing."""
    if is_int(k):
        if k < 1:
            raise ValueError(f"top-k: k={k}; at least 1 is needed")
        if k >= dim.size:
            return None
        k_max = int(k)
    else:
        if is_real(k) or isinstance(k, (bool, str)) or k is None:
            raise ValueError(f"top-k: k={k!r}; a whole number of at least 1 is needed")
        if not is_int(max_top_k) or max_top_k < 1:
            raise ValueError(f"top-k: a tensor k needs max_top_k, an int of at least 1; got {max_top_k}")
        k_max = min(int(max_top_k), dim.size)
    return import_rows(logits.mesh, k, tf.int32, logits.shape - dim, "top-k"), k_max


def _asked_too_many(k: mtf.Tensor, k_max: int, dim: mtf.Dimension) -> mtf.Tensor:
    """float32, like k: NaN where that is above what it may be, 0 elsewhere."""
    return cwise_broadcast(
        lambda k: tf.where_v2(tf.logical_and(k > k_max, k < dim.size), np.nan, 0.0), [k], output_dtype=tf.float32
    )


def top_n_sigma_mask(
    logits: mtf.Tensor, top_n_sigma: RowValue, dim: mtf.Dimension | None = None, *, masked: float | None = None
) -> mtf.Tensor:
    """Masks entries more than n standard deviations below the largest (Tang et al. 2024, arXiv 2411.07641).

    Kept are those of x ≥ max x − n · σ, where σ² is the mean squared distance of the row's logits from their mean,
    masked ones left out. What is kept does not depend on the temperature.

    Args:
      top_n_sigma: as for the nucleus mask, but any finite number from 0 on; 0 masks nothing, as in llama.cpp.
      logits, dim, masked: as for the nucleus mask. Returns and raises the same.
    """
    return _mask_below(logits, "top_n_sigma", top_n_sigma, dim, masked, cutoffs.sigma_cut, neutral=0, most=FLOAT32_MAX)


def top_h_mask(
    logits: mtf.Tensor, top_h: RowValue, dim: mtf.Dimension | None = None, *, masked: float | None = None
) -> mtf.Tensor:
    """Masks all but the likeliest entries that have a part of the entropy (Potraghloo et al. 2025, arXiv 2509.02510).

    Of the 100 likeliest entries, normalised among themselves, the most that come first whose −p·log p sum to at most
    top_h of all 100's; and the likeliest always. transformers' top_h, cap included. Sums that differ by 10⁻¹² of the
    entropy count as equal, and among equal entries those of lower index come first.

    Args:
      top_h: as for the nucleus mask; 0 masks nothing, 1 all but the 100 likeliest.
      logits, dim, masked: as for the nucleus mask. Returns and raises the same.
    """
    dim = dim_of(logits, dim)
    if _masks_nothing("top_h", top_h, neutral=0):
        return logits
    rows, lowest = logits.shape - dim, mask_value(logits.dtype)
    part = mtf.broadcast(import_rows(logits.mesh, top_h, tf.float32, rows, "top_h"), rows)

    def count(values: tf.Tensor, part: tf.Tensor) -> tf.Tensor:
        below = tf.cast(tf.maximum(values - values[..., :1], -1000.0), tf.float64)  # finite, and exp of it 0
        weights = tf.exp(below)
        total = tf.reduce_sum(weights, -1, keepdims=True)
        entropy = tf.cumsum((tf.log(total) - below) * weights, -1)  # times the total
        most = tf.cast(part, tf.float64)[..., tf.newaxis] * entropy[..., -1:] * (1 + 1e-12)
        kept = tf.maximum(tf.reduce_sum(tf.cast(entropy <= most, tf.int32), -1), 1)
        return tf.where_v2(tf.logical_or(part <= 0, values[..., 0] <= lowest), 0, kept)

    def wrong(values: tf.Tensor, part: tf.Tensor) -> tf.Tensor:
        valid = tf.logical_and(part >= 0, part <= 1)
        return tf.where_v2(tf.logical_and(valid, tf.logical_not(tf.is_nan(values[..., 0]))), 0.0, np.nan)

    def of_rows(fn: Callable[..., tf.Tensor], dtype: tf.DType) -> mtf.Tensor:
        return mtf.slicewise(fn, [values, part], rows, dtype, splittable_dims=rows.dims, grad_function=0)

    largest = _largest(logits, dim, min(MOST_OF_TOP_H, dim.size))
    values = largest[1]
    kept = _keep_first(logits, dim, largest, of_rows(count, tf.int32), masked)
    return kept + mtf.cast(of_rows(wrong, tf.float32), logits.dtype)


def top_p_mask(
    logits: mtf.Tensor,
    top_p: RowValue,
    dim: mtf.Dimension | None = None,
    *,
    masked: float | None = None,
    min_tokens_to_keep: RowValue = 1,
) -> mtf.Tensor:
    """Masks all but the nucleus (Holtzman et al. 2020, arXiv 1904.09751).

    That is the smallest set of the likeliest entries whose probabilities sum to at least p. Among equal entries
    at its border those of lower index are in it; the likeliest entry always is.

    Args:
      logits: mtf.Tensor, float32, bfloat16 or float16; −inf and the lowest number have probability 0.
      top_p: a number from 0 to 1, or a float32 tensor, scalar or [logits.shape − dim]; 1 masks nothing, 0 all but the
        likeliest entry. Where a tensor's value is out of range the row becomes NaN, hence invalid.
      dim: mtf.Dimension of logits; the last by default.
      masked: a number: what the rest become; by default `mask_value(logits.dtype)`.
      min_tokens_to_keep: a whole number from 1 to 100, or an int32 tensor, scalar or [logits.shape − dim]: so many of
        the likeliest entries are kept in any case, of equal ones those of lower index; but none of probability 0.

    Returns:
      mtf.Tensor like logits. A row that holds NaN or +inf becomes NaN. The gradient flows through the survivors.

    Raises:
      ValueError: for a number out of range, a tensor of the wrong shape, or a `dim` that logits lack.

    Example (`run` is defined in the docstring of `models.utils`):

        >>> run(lambda x: mtf.softmax(top_p_mask(mtf.log(x), 0.7), x.shape[-1]), [[0.25, 0.5, 0.125, 0.125]]).round(3)
        array([[0.333, 0.667, 0.   , 0.   ]], dtype=float32)
    """
    return _mask_below(logits, "top_p", top_p, dim, masked, cutoffs.nucleus_cut, neutral=1, at_least=min_tokens_to_keep)


def min_p_mask(
    logits: mtf.Tensor,
    min_p: RowValue,
    dim: mtf.Dimension | None = None,
    *,
    masked: float | None = None,
    min_tokens_to_keep: RowValue = 1,
) -> mtf.Tensor:
    """Masks entries less than min_p times as likely as the likeliest (Nguyen et al. 2024, arXiv 2407.01082).

    Kept are those of p ≥ min_p · max p, which is x − max x ≥ log(min_p).

    Args:
      min_p: as for the nucleus mask; 0 masks nothing, 1 all but the likeliest entry and those that equal it.
      logits, dim, masked, min_tokens_to_keep: as for the nucleus mask. Returns and raises the same.
    """
    return _mask_below(logits, "min_p", min_p, dim, masked, cutoffs.min_p_cut, neutral=0, at_least=min_tokens_to_keep)


def typical_p_mask(
    logits: mtf.Tensor,
    typical_p: RowValue,
    dim: mtf.Dimension | None = None,
    *,
    masked: float | None = None,
    min_tokens_to_keep: RowValue = 1,
) -> mtf.Tensor:
    """Masks all but the locally typical entries (Meister et al. 2023, arXiv 2202.00666).

    Those are the smallest set whose probabilities sum to at least typical_p, beginning with the entries whose
    information is the nearest to the entropy H = −Σ p·log p: by |−log p − H|, rounded to float32, and among equal ones
    by index. The likeliest entry need not be among them.

    Args:
      typical_p: as for the nucleus mask, but above 0; 1 masks nothing.
      min_tokens_to_keep: as for the nucleus mask, but of the entries that come first here.
      logits, dim, masked: as for the nucleus mask. Returns and raises the same.
    """
    return _mask_below(
        logits, "typical_p", typical_p, dim, masked, cutoffs.typical_p_cut, neutral=1, excluded=0,
        at_least=min_tokens_to_keep,
    )  # fmt: skip


def epsilon_mask(
    logits: mtf.Tensor,
    epsilon_cutoff: RowValue,
    dim: mtf.Dimension | None = None,
    *,
    masked: float | None = None,
    min_tokens_to_keep: RowValue = 1,
) -> mtf.Tensor:
    """Masks entries of probability below epsilon_cutoff (Hewitt et al. 2022, arXiv 2210.15191).

    The likeliest entry, and those that equal it, always stay.

    Args:
      epsilon_cutoff: as for the nucleus mask, but below 1; 0 masks nothing.
      logits, dim, masked, min_tokens_to_keep: as for the nucleus mask. Returns and raises the same.
    """
    return _mask_below(
        logits, "epsilon_cutoff", epsilon_cutoff, dim, masked, cutoffs.epsilon_cut, neutral=0, excluded=1,
        at_least=min_tokens_to_keep,
    )  # fmt: skip


def eta_mask(
    logits: mtf.Tensor,
    eta_cutoff: RowValue,
    dim: mtf.Dimension | None = None,
    *,
    masked: float | None = None,
    min_tokens_to_keep: RowValue = 1,
) -> mtf.Tensor:
    """Masks entries of a probability that is low for the row's entropy H (Hewitt et al. 2022, arXiv 2210.15191).

    Kept are those of p ≥ min(η, √η · exp(−H)), where η is eta_cutoff and H = −Σ p·log p; and the likeliest entry, with
    those that equal it.

    Args:
      eta_cutoff: as for the nucleus mask, but below 1; 0 masks nothing.
      logits, dim, masked, min_tokens_to_keep: as for the nucleus mask. Returns and raises the same.
    """
    return _mask_below(
        logits, "eta_cutoff", eta_cutoff, dim, masked, cutoffs.eta_cut, neutral=0, excluded=1,
        at_least=min_tokens_to_keep,
    )  # fmt: skip


def mirostat_mask(
    logits: mtf.Tensor, mu: RowValue, dim: mtf.Dimension | None = None, *, masked: float | None = None
) -> mtf.Tensor:
    """Masks entries of a surprise, −log2 p, above mu bits: Mirostat 2 (Basu et al. 2021, arXiv 2007.14966).

    The likeliest entry, and those that equal it, always stay. A loop draws a token from what is left, and then moves mu
    by the surprise that the token has there (`information.surprise`): mu ← mu − η · (surprise − τ).

    Args:
      mu: a number, or a float32 tensor, scalar or [logits.shape − dim]; +inf masks nothing. A row of NaN becomes NaN.
      logits, dim, masked: as for the nucleus mask. Returns the same.

    Raises:
      ValueError: for the number NaN, a tensor of the wrong shape, or a `dim` that logits lack.
    """
    dim = dim_of(logits, dim)
    if is_real(mu):
        if np.isnan(mu):
            raise ValueError(f"mu={mu}; a number is needed")
        if mu == np.inf:
            return logits
    mu = import_rows(logits.mesh, mu, tf.float32, logits.shape - dim, "mu")
    masked = mask_value(logits.dtype) if masked is None else masked
    return cutoffs.mask_below(logits, mu, dim, cutoffs.mirostat_cut, masked)


def xtc_mask(
    logits: mtf.Tensor,
    xtc_probability: RowValue,
    xtc_threshold: RowValue,
    uniform_bits: mtf.Tensor,
    dim: mtf.Dimension | None = None,
    *,
    masked: float | None = None,
) -> mtf.Tensor:
    """Masks, in some of the steps, the likeliest entries, so that a less likely one is drawn ("exclude top choices").

    By p-e-w, as in llama.cpp. A row is chosen with a chance of xtc_probability. It loses all entries of probability
    xtc_threshold and more but the least likely of them; of equal ones the last stays. Where fewer than two are that
    likely, nothing changes.

    Args:
      logits: mtf.Tensor, float32, bfloat16 or float16; −inf and the lowest number have probability 0.
      xtc_probability: a number from 0 to 1, or a float32 tensor, scalar or [logits.shape − dim]; 0 masks nothing, 1
        chooses every row.
      xtc_threshold: the same; above 0.5 it masks nothing, 0 all but the least likely entry.
      uniform_bits: int32 mtf.Tensor [logits.shape − dim]: 32 random bits, as from `random.counter_bits`. Read as an
        unsigned u, they choose the rows of u · 2⁻³² < xtc_probability.
      dim: mtf.Dimension of logits; the last by default.
      masked: a number: what masked entries become; by default `mask_value(logits.dtype)`.

    Returns:
      mtf.Tensor like logits. A row becomes NaN where a tensor's value is out of range, and where it is chosen and holds
      NaN or +inf; one that is not chosen stays as it is. The gradient flows through the survivors.

    Raises:
      ValueError: for a number out of range, a tensor of the wrong shape, bits of another dtype, or a `dim` that logits
        lack.
    """
    dim = dim_of(logits, dim)
    rows = logits.shape - dim
    never = _masks_nothing("xtc_probability", xtc_probability, neutral=0)
    _masks_nothing("xtc_threshold", xtc_threshold, neutral=0)
    if never or (is_real(xtc_threshold) and xtc_threshold > 0.5):
        return logits
    if not isinstance(uniform_bits, mtf.Tensor) or uniform_bits.dtype != tf.int32:
        raise ValueError(f"uniform_bits={uniform_bits!r}; an int32 mtf.Tensor {rows} is needed")

    def of_rows(bits: tf.Tensor, probability: tf.Tensor, threshold: tf.Tensor) -> tf.Tensor:
        """The threshold; 1 for a row that is not chosen."""
        valid = [tf.logical_and(x >= 0, x <= 1) for x in (probability, threshold)]
        threshold = tf.where_v2(_is_below(bits, probability), threshold, 1.0)
        return tf.where_v2(tf.logical_and(*valid), threshold, np.nan)

    if is_real(xtc_probability):  # by NumPy: TensorFlow's cast may take the least numbers for 0
        xtc_probability = np.asarray(xtc_probability, np.float32)
    options = [
        import_rows(logits.mesh, uniform_bits, tf.int32, rows, "uniform_bits"),
        import_rows(logits.mesh, xtc_probability, tf.float32, rows, "xtc_probability"),
        import_rows(logits.mesh, xtc_threshold, tf.float32, rows, "xtc_threshold"),
    ]
    threshold = cwise_broadcast(of_rows, options, output_dtype=tf.float32, name="xtc_threshold")
    masked = mask_value(logits.dtype) if masked is None else masked
    return cutoffs.mask_above(logits, threshold, dim, cutoffs.xtc_cut, masked)


def _is_below(bits: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
    """Whether int32 bits, read as an unsigned u, are u · 2⁻³² < a float32 number from 0 to 1: without rounding.

    By halves of 16 bits, which float32 holds, as it does all products and differences here.
    """
    low = tf.cast(tf.bitwise.bitwise_and(bits, tf.constant(0xFFFF)), tf.float32)
    high = tf.cast(
        tf.bitwise.bitwise_and(tf.bitwise.right_shift(bits, tf.constant(16)), tf.constant(0xFFFF)), tf.float32
    )
    scaled = number * 2.0**16
    whole = tf.floor(scaled)
    below = tf.logical_or(high < whole, tf.logical_and(tf.equal(high, whole), low < (scaled - whole) * 2.0**16))
    # some backends take the least numbers for 0, but not their bits
    return tf.where_v2(tf.equal(bits, 0), tf.bitcast(number, tf.int32) > 0, below)


def _masks_nothing(name: str, option: RowValue, neutral: float, excluded: float | None = None, most: float = 1) -> bool:
    """Whether an option is the neutral number; raises ValueError for a number that is out of range."""
    if not is_real(option):
        return False
    if not 0 <= option <= most or option == excluded:
        allowed = "number from 0 to 1" if most == 1 else "finite number of at least 0"
        but = "" if excluded is None else f", but not {excluded},"
        raise ValueError(f"{name}={option}; a {allowed}{but} is needed")
    return bool(option == neutral)


def _mask_below(
    logits: mtf.Tensor,
    name: str,
    option: RowValue,
    dim: mtf.Dimension | None,
    masked: float | None,
    find_cut: cutoffs.FindCut,
    neutral: float,
    excluded: float | None = None,
    most: float = 1,
    at_least: RowValue = 1,
) -> mtf.Tensor:
    """`option` is from 0 to `most`, but not the number that is `excluded`; `neutral` masks nothing."""
    dim = dim_of(logits, dim)
    if is_real(at_least) and not (is_int(at_least) and 1 <= at_least <= MOST_TO_KEEP):
        raise ValueError(f"min_tokens_to_keep={at_least!r}; a whole number from 1 to {MOST_TO_KEEP} is needed")
    if _masks_nothing(name, option, neutral, excluded, most):
        return logits

    def check(option: tf.Tensor, *at_least: tf.Tensor) -> tf.Tensor:
        valid = tf.logical_and(option >= 0, option <= most)
        if excluded is not None:
            valid = tf.logical_and(valid, tf.not_equal(option, excluded))
        for n in at_least:
            valid = tf.logical_and(valid, tf.logical_and(n >= 1, n <= MOST_TO_KEEP))
        return tf.where_v2(valid, option, np.nan)

    rows = logits.shape - dim
    masked = mask_value(logits.dtype) if masked is None else masked
    option = import_rows(logits.mesh, option, tf.float32, rows, name)
    if is_int(at_least) and at_least == 1:
        return cutoffs.mask_below(logits, mtf.cwise(check, [option]), dim, find_cut, masked)
    n = import_rows(logits.mesh, at_least, tf.int32, rows, "min_tokens_to_keep")
    option = cwise_broadcast(check, [option, n])
    most_to_keep = int(at_least) if is_int(at_least) else MOST_TO_KEEP
    return cutoffs.mask_below(logits, option, dim, find_cut, masked, n, most_to_keep)


def padding_mask(
    logits: mtf.Tensor, size: int, dim: mtf.Dimension | None = None, *, masked: float | None = None
) -> mtf.Tensor:
    """Masks the entries from `size` on: a vocabulary padded to fit its mesh.

    Args:
      logits: mtf.Tensor.
      size: int, the entries that stay.
      dim: mtf.Dimension of logits; the last by default.
      masked: what they become, by default `mask_value`.

    Returns:
      mtf.Tensor like logits.
    """
    dim = dim_of(logits, dim)
    if size >= dim.size:
        return logits
    entry = mtf.range(logits.mesh, dim, tf.int32)
    kept = cwise_broadcast(lambda x, at: tf.broadcast_to(at < size, x.shape), [logits, entry], logits.shape, tf.bool)
    return mask_out(logits, kept, masked)


def mask_out(logits: mtf.Tensor, kept: mtf.Tensor, masked: float | None = None) -> mtf.Tensor:
    """logits where the bool mtf.Tensor `kept`, of their shape, is true, else `masked`, by default `mask_value`."""
    low = mask_value(logits.dtype) if masked is None else masked

    def mask(x: tf.Tensor, kept: tf.Tensor) -> tf.Tensor:
        return tf.where_v2(kept, x, tf.constant(low, x.dtype))

    def gradient(op: mtf.Operation, dy: mtf.Tensor) -> list[mtf.Tensor | None]:
        keep = lambda kept, dy: tf.where_v2(kept, dy, tf.zeros_like(dy))  # noqa: E731
        return [mtf.cwise(keep, [op.inputs[1], dy], dy.dtype), None]

    return mtf.cwise(mask, [logits, kept], grad_function=gradient, name="mask")
