"""The library under XLA on one device, and under TensorFlow's optimizer: what it gives there is what it gives without.

(jit_compile=True; several devices are test_simd.py's subject, models under XLA test_matrix.py's.)
"""

import collections

import numpy as np
import pytest
from helpers_cases import (
    BATCH,
    DRAWS,
    ENTMAX,
    KS,
    LIKELY,
    LIKELY_MASKS,
    LOWEST,
    MASKS,
    MIXED_LOOP,
    MODEL,
    NEW_TOKENS,
    NEWER_LOOPS,
    NEWER_MASKS,
    OTHER_LOOPS,
    PENALTIES,
    SIZES,
    STOP,
    assert_same,
)
from programs import Program, XlaProgram, dims

from gpt_neo_sampling._compat import mtf
from gpt_neo_sampling.sampling.masks import eta_mask

slow = pytest.mark.slow
ROUNDING = collections.defaultdict(float, {ENTMAX: 1e-6})  # how far values may differ


def cases(fast, further):
    return pytest.mark.parametrize("case", [*fast, *(pytest.param(case, marks=slow) for case in further)], ids=str)


@cases([MASKS, NEWER_MASKS, PENALTIES, MIXED_LOOP], [DRAWS, ENTMAX, LIKELY_MASKS, NEWER_LOOPS, OTHER_LOOPS])
def test_same_with_xla_and_without(case):
    assert_same(case.values(XlaProgram(case.build, case.inputs)), case.single, ROUNDING[case])


def test_invalid_rows_of_masks_by_probability():
    """XLA's maximum passes over NaN, and gives −inf for a row of nothing else."""
    x = np.array([[np.nan] * 4, [1, 2, np.nan, 3], [-np.inf] * 4, [LOWEST] * 4], np.float32)

    def build(mesh, x):
        x = mtf.import_tf_tensor(mesh, x, dims(batch=4, vocab=4))
        return [mask(x, value, x.shape.dims[1]) for mask, value in [*LIKELY.values(), (eta_mask, mtf.zeros(mesh, []))]]

    for y in XlaProgram(build, [(x.dtype, x.shape)])(x):
        np.testing.assert_array_equal(y, np.where(np.arange(4)[:, np.newaxis] < 2, np.nan, x))


@cases([MASKS, PENALTIES], [DRAWS, ENTMAX, LIKELY_MASKS, NEWER_MASKS, MIXED_LOOP, OTHER_LOOPS, MODEL])
def test_same_with_tensorflows_optimizer_and_without(case):
    """Programs of these tests do without it; TextGenerator's sessions have it."""
    assert_same(case.values(Program(case.build, case.inputs, optimized=True)), case.single, ROUNDING[case])


# --- What is compared is worth comparing ----------------------------------------------------


@slow
def test_draws_differ_and_invalid_rows_draw_nothing():
    for size in SIZES:
        one, many = DRAWS.single[f"{size} one"], DRAWS.single[f"{size} many"]
        assert (one[:BATCH] >= 0).all() and (one[BATCH:] == -1).all() and (many[BATCH:] == -1).all()
        assert len(np.unique(many)) > 80
        assert len(np.unique(DRAWS.single[f"{size} scores"])) > 4
    assert len(np.unique(DRAWS.single["threefry"])) == 2 * BATCH**2


def test_entmax_sums_to_one_and_invalid_rows_are_nan():
    for name, p in ENTMAX.single.items():
        invalid = BATCH - 2 if name == "invalid rows" else 0
        assert np.isnan(p[:invalid]).all(), name
        np.testing.assert_allclose(p[invalid:].sum(1), 1, rtol=0, atol=1e-5, err_msg=name)


def test_top_k_keeps_k_entries():
    available = (MASKS.arrays[0] > LOWEST).sum(1)
    for k in KS:
        np.testing.assert_array_equal((MASKS.single[f"top {k}"] > LOWEST).sum(1), np.minimum(k, available))


@slow
def test_likely_masks_keep_some():
    for name, kept in LIKELY_MASKS.single.items():
        spread = kept[-2:] if "own" in name else kept[[0, 2, 3, 4, 5, 6]]
        assert np.all((spread > LOWEST).any(1) & (spread == LOWEST).any(1)), name


@cases([MIXED_LOOP], [NEWER_LOOPS, OTHER_LOOPS])
def test_loops_draw_end_and_meet_invalid_rows(case):
    for name, ids in case.single.items():
        if ":" in name:  # not tokens
            continue
        assert len(np.unique(ids)) > (9 if name.startswith("hard") else 10), name
        assert (ids == -1).any() == name.startswith("hard"), name
        assert (ids == STOP).any() != ("never_end" in name), name


@slow
def test_the_bundled_model_writes_new_tokens():
    written = (MODEL.single["tokens"] > 0).sum(1) - (MODEL.arrays[0] > 0).sum(1)
    np.testing.assert_array_equal(written, NEW_TOKENS)
