"""Dynamic temperature: hotter where a row's distribution is flat, colder where it is peaked."""

import numpy as np

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling._types import FLOAT32_MAX, RowValue, is_real
from gpt_neo_sampling.mesh.ops import cwise_broadcast, dim_of, import_rows
from gpt_neo_sampling.sampling.information import EVENNESS_STEP, evenness

_LEAST, _MOST = 2.0**-100, 2.0**100  # temperatures; what is beyond them has the same effect
_LEAST_LOG = -60.0  # the logarithm of a power that counts as 0: a TPU's float64 has float32's range
_STEPPED_EXPONENT = 1e9  # beyond which all parts below 1 give 0


def dynamic_temperature(
    logits: mtf.Tensor,
    temperature: RowValue,
    dynatemp_range: RowValue,
    dynatemp_exponent: RowValue,
    dim: mtf.Dimension | None = None,
) -> mtf.Tensor:
    """A temperature for each row by the entropy H of its distribution: llama.cpp's dynamic temperature.

    lo + (hi − lo) · (H / ln n) ** exponent, from lo = max(0, temperature − range) to hi = temperature + range, where
    H is in nats, of softmax(logits), and n the number of entries that are not masked. H / ln n is a multiple of 2⁻²⁰
    (`information.evenness`). The bits are the same on every layout and backend.

    Args:
      logits: mtf.Tensor, float32, bfloat16 or float16; −inf and the lowest number are masked.
      temperature, dynatemp_range, dynatemp_exponent: finite numbers from 0 on, or float32 tensors, scalar or
        [logits.shape − dim].
      dim: mtf.Dimension of logits; the last by default.

    Returns:
      float32 mtf.Tensor [logits.shape − dim]. The temperature itself where it is 0 (a greedy row), where the range is
      0, and where fewer than two entries are not masked; otherwise at least 2⁻¹⁰⁰, so that no row becomes greedy. NaN
      where a tensor's value is out of range, and where the range is above 0 and the row holds NaN or +inf. No gradient
      flows through it.

    Raises:
      ValueError: for a number out of range, a tensor of the wrong shape, or a `dim` that logits lack.

    Example (`run` is defined in the docstring of `models.utils`):

        >>> run(lambda x: dynamic_temperature(x, 1.0, 0.5, 1.0), [[0.0, 0.0, 0.0, 0.0], [0.0, -99.0, -99.0, -99.0]])
        array([1.5, 0.5], dtype=float32)
    """
    dim = dim_of(logits, dim)
    rows = logits.shape - dim
    options = []
    for name, value in (
        ("temperature", temperature),
        ("dynatemp_range", dynatemp_range),
        ("dynatemp_exponent", dynatemp_exponent),
    ):
        if is_real(value) and not 0 <= value <= FLOAT32_MAX:
            raise ValueError(f"{name}={value}; a finite number of at least 0 is needed")
        options.append(import_rows(logits.mesh, value, tf.float32, rows, name))

    def scaled(even: tf.Tensor, temperature: tf.Tensor, spread: tf.Tensor, exponent: tf.Tensor) -> tf.Tensor:
        low = tf.clip_by_value(temperature - spread, 0.0, _MOST)
        high = tf.minimum(temperature + spread, _MOST)
        power = _power(even, exponent)
        low, high = tf.cast(low, tf.float64), tf.cast(high, tf.float64)
        found = tf.maximum(tf.cast(low + (high - low) * power, tf.float32), _LEAST)
        found = tf.where_v2(tf.is_nan(even), np.nan, found)
        is_fixed = tf.logical_or(tf.logical_or(tf.equal(temperature, 0.0), tf.equal(spread, 0.0)), even < 0)
        found = tf.where_v2(is_fixed, temperature, found)
        valid = [tf.logical_and(v >= 0, v < np.inf) for v in (temperature, spread, exponent)]
        return tf.where_v2(tf.logical_and(tf.logical_and(*valid[:2]), valid[2]), found, np.nan)

    return cwise_broadcast(scaled, [evenness(logits, dim), *options], rows, tf.float32, name="dynamic_temperature")


def _power(base: tf.Tensor, exponent: tf.Tensor) -> tf.Tensor:
    """Float64 base ** exponent, of float32: the base a multiple of 2⁻²⁰ up to 1."""
    exact = tf.cast(tf.clip_by_value(base, EVENNESS_STEP, 1.0), tf.float64)
    log = tf.log(exact) * tf.cast(tf.minimum(exponent, _STEPPED_EXPONENT), tf.float64)
    power = tf.exp(tf.maximum(log, _LEAST_LOG))
    none = tf.logical_or(log < _LEAST_LOG, tf.logical_and(base <= 0, exponent >= 2.0**-126))
    return tf.where_v2(none, tf.zeros_like(power), power)
