"""The cutoffs of a TPU core's program, run as CPU replicas: what pairs of float32 make clear, and what not."""

import functools

import numpy as np
import pytest
import reference
import simd
from programs import ONE_DEVICE, dims
from sampling.test_masks import MASKS, assert_kept, tied_rows, xtc_always
from sampling.test_more_masks import OPTIONS

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling.sampling import core_cutoffs, float_pairs
from gpt_neo_sampling.sampling.masks import (
    epsilon_mask,
    eta_mask,
    min_p_mask,
    mirostat_mask,
    top_p_mask,
    typical_p_mask,
)

pytestmark = pytest.mark.skipif(simd.UNAVAILABLE is not None, reason=simd.UNAVAILABLE or "")

ROWS, SIZE = 200, 520
ON_CORE = [top_p_mask, typical_p_mask, min_p_mask, epsilon_mask, eta_mask, mirostat_mask, xtc_always]
by_mask = pytest.mark.parametrize("mask", ON_CORE, ids=lambda mask: mask.__name__)
split = pytest.mark.parametrize("layout", ["vocab:x", pytest.param("batch:x", marks=pytest.mark.slow)])


def _doubt_as_nan(find):
    """Rows in doubt become NaN, and are no longer in doubt."""

    def found(core, *args):
        *ends, in_doubt = find(core, *args)
        least, last = ends[0] if len(ends) == 1 else ends
        least = core.slicewise(lambda least, doubt: tf.where_v2(doubt > 0, np.nan, least), least, in_doubt)
        none = core.slicewise(tf.zeros_like, in_doubt)
        return ([least, last], none) if len(ends) == 1 else (least, last, none)

    return found


@functools.cache
def program(mask, layout, what, rows=ROWS, size=SIZE):
    """what: "fast", where rows in doubt become NaN; or "exact", where all are taken to be in doubt."""
    with pytest.MonkeyPatch.context() as patch:
        if what == "exact":
            patch.setattr(core_cutoffs, "laid_out_cond", lambda mesh_impl, flag, if_set, if_not: if_set())
            patch.setattr(core_cutoffs, "probability_ends", _exact_probability_ends)
            patch.setattr(core_cutoffs, "xtc_ends_in_doubt", _always_in_doubt)
        else:
            for name in ("mass_ends", "depth_ends", "xtc_ends_in_doubt"):
                patch.setattr(core_cutoffs, name, _doubt_as_nan(getattr(core_cutoffs, name)))

        def build(mesh, x, option):
            b, v = dims(batch=rows, vocab=size)
            x, option = (
                mtf.import_tf_tensor(mesh, x, mtf.Shape([b, v])),
                mtf.import_tf_tensor(mesh, option, mtf.Shape([b])),
            )
            return mask(x, option, v)

        return simd.SimdProgram(build, [(tf.float32, (rows, size)), (tf.float32, (rows,))], "x:4", layout)


_probability_ends, _depth_ends = core_cutoffs.probability_ends, core_cutoffs.depth_ends


def _exact_probability_ends(*args):
    """With every row in doubt that has a cut."""

    def in_doubt(core, option, *args):
        least, last, doubt = _depth_ends(core, option, *args)
        flag = core.slicewise(lambda doubt, option, last: tf.where_v2(last > 0, 1.0, doubt) * tf.where_v2(
            tf.reshape(option, [-1, 1, 1]) > 0, 1.0, 0.0), doubt, option, last)  # fmt: skip
        return least, last, flag

    core_cutoffs.depth_ends = in_doubt
    try:
        return _probability_ends(*args)
    finally:
        core_cutoffs.depth_ends = _depth_ends


def _always_in_doubt(*args, find=core_cutoffs.xtc_ends_in_doubt):
    core, least, last, doubt = args[0], *find(*args)
    return least, last, core.slicewise(tf.ones_like, doubt)


def bfloat16_rows(rng):
    """Of numbers that bfloat16 has: ties by the dozen."""
    x = (2 * rng.standard_normal((ROWS, SIZE))).astype(np.float32)
    return (x.view(np.uint32) & 0xFFFF0000).view(np.float32)


@by_mask
@split
def test_what_is_clear_and_what_is_not(mask, layout):
    """Both ways keep what the definition does; where the fast one leaves no doubt, the same to the last tie."""
    definition, options, *_ = MASKS[mask]
    rng = np.random.default_rng(5)
    fast, exact = program(mask, layout, "fast"), program(mask, layout, "exact")
    gaussian = (np.float32([[2.0], [0.5]]).repeat(ROWS // 2, 0) * rng.standard_normal((ROWS, SIZE))).astype(np.float32)
    for x, most_in_doubt in ((gaussian, 0.02), (bfloat16_rows(rng), 0.05), (tied_rows(ROWS, SIZE), 0.3)):
        option = rng.choice(options, ROWS).astype(np.float32)
        got, want = fast(x, option), exact(x, option)
        assert_kept(want, x, definition, option[:, np.newaxis])
        in_doubt = np.isnan(got).all(1)
        assert in_doubt.mean() <= most_in_doubt
        np.testing.assert_array_equal(got[~in_doubt], want[~in_doubt])


@pytest.mark.parametrize("mask", OPTIONS, ids=lambda mask: mask.__name__)
@split
def test_at_least_so_many_are_kept(mask, layout):
    rng, definition = np.random.default_rng(7), MASKS[mask][0]

    def build(mesh, x, option, n):
        b, v = dims(batch=ROWS, vocab=SIZE)
        x, option, n = (
            mtf.import_tf_tensor(mesh, t, mtf.Shape(shape)) for t, shape in ((x, [b, v]), (option, [b]), (n, [b]))
        )
        return mask(x, option, v, min_tokens_to_keep=n)

    program = simd.SimdProgram(
        build, [(tf.float32, (ROWS, SIZE)), (tf.float32, (ROWS,)), (tf.int32, (ROWS,))], "x:4", layout
    )
    gaussian = (2 * rng.standard_normal((ROWS, SIZE))).astype(np.float32)
    for x in (gaussian, bfloat16_rows(rng), tied_rows(ROWS, SIZE)):
        option = rng.choice(OPTIONS[mask], ROWS).astype(np.float32)
        n = rng.choice([1, 2, 3, 7, 40, 100], ROWS).astype(np.int32)
        one = ONE_DEVICE(build, x, option, n)
        np.testing.assert_array_equal(program(x, option, n), one)
        assert_kept(
            one, x, lambda x, o, n=n: reference.at_least(definition, x, o, n[:, np.newaxis]), option[:, np.newaxis]
        )


@pytest.mark.slow
@by_mask
def test_few_rows_of_a_vocabulary_are_in_doubt(mask):
    """Of Gaussian ones, σ = 2. (Of typical_p some more: an entry far above the mean may be next to one below it.)"""
    rows, size = 256, 50304
    got = program(mask, "batch:x", "fast", rows, size)(
        2 * np.random.default_rng(6).standard_normal((rows, size)), np.full(rows, MASKS[mask][1][1])
    )
    assert np.isnan(got).all(1).sum() <= (3 if mask is typical_p_mask else 2)


# --- Pairs ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["operation by operation", "compiled", "on a core"])
def test_pairs(how):
    """(XLA has rules of its own for sums with constants, and jaxlib's has others than TensorFlow's.)"""
    from gpt_neo_sampling._compat import tensorflow

    def run(function, *args):
        def build(mesh, *args):
            rows = mtf.Shape(dims(row=args[0].shape.as_list()[0]))
            args = [mtf.import_tf_tensor(mesh, a, rows) for a in args]
            return mtf.slicewise(
                function, args, [rows] * 2, [tf.float32] * 2, splittable_dims=rows.dims, grad_function=0
            )

        if how == "on a core":
            parts = simd.SimdProgram(build, [(tf.float32, a.shape) for a in args], "x:2", "")(*args)
        else:
            with tf.Graph().as_default(), tf.Session() as session:
                compiled = tensorflow.function(function, jit_compile=how == "compiled", autograph=False)
                parts = session.run(compiled(*(tf.constant(a) for a in args)))
        return sum(np.asarray(part, np.float64) for part in parts)

    rng = np.random.default_rng(0)
    d = np.concatenate([rng.uniform(0, 60, 10000), np.exp2(rng.uniform(-40, 0, 1000)), [0]]).astype(np.float32)
    bound = float_pairs.PAIR_ERROR_BOUND
    np.testing.assert_allclose(run(float_pairs.exp_of_minus, d), np.exp(-d.astype(np.float64)), rtol=bound)
    high = np.exp(rng.uniform(0, 11, 10000)).astype(np.float32)
    low = (high * rng.uniform(-1, 1, 10000) * 2.0**-25).astype(np.float32)
    whole = high.astype(np.float64) + low
    np.testing.assert_allclose(
        run(lambda h, w: float_pairs.log_of((h, w)), high, low), np.log(whole), rtol=bound, atol=bound
    )
    ratio = run(lambda h, w: float_pairs.quotient((h, w), (h[::-1], w[::-1])), high, low)
    np.testing.assert_allclose(ratio, whole / whole[::-1], rtol=bound)
    x = np.exp(-rng.uniform(0, 80, 10000)).astype(np.float32)
    np.testing.assert_allclose(run(float_pairs.minus_log, x), -np.log(x.astype(np.float64)), rtol=bound, atol=bound)
