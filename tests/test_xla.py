"""The library under XLA on one device: what it gives there is what it gives without.

(jit_compile=True; several devices are test_simd.py's subject.)
"""

import numpy as np
import pytest
from helpers_cases import (
    BATCH,
    DECODED,
    DRAWS,
    ENTMAX,
    KS,
    LIKELY_MASKS,
    LOWEST,
    MASKS,
    MODEL,
    NEW_TOKENS,
    PENALTIES,
    SIZES,
    STOP,
    assert_same,
)
from programs import XlaProgram


@pytest.mark.parametrize(
    "case, atol",
    [(DRAWS, 0), (ENTMAX, 1e-6), (MASKS, 0), (LIKELY_MASKS, 0), (PENALTIES, 0), (DECODED, 0), (MODEL, 0)],
    ids=str,
)
def test_same_with_xla_and_without(case, atol):
    assert_same(XlaProgram(case.build, case.inputs)(*case.arrays), case.single, atol)


# --- What is compared is worth comparing ----------------------------------------------------


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


def test_likely_masks_keep_some():
    for name, kept in LIKELY_MASKS.single.items():
        spread = kept[-2:] if "own" in name else kept[[0, 2, 3, 4, 5, 6]]
        assert np.all((spread > LOWEST).any(1) & (spread == LOWEST).any(1)), name


def test_loops_draw_end_and_meet_invalid_rows():
    for name, ids in DECODED.single.items():
        assert len(np.unique(ids)) > 10, name
        assert (ids == -1).any() == name.startswith("hard"), name
        assert (ids == STOP).any() != ("never_end" in name), name


def test_the_bundled_model_writes_new_tokens():
    written = (MODEL.single["tokens"] > 0).sum(1) - (MODEL.arrays[0] > 0).sum(1)
    np.testing.assert_array_equal(written, NEW_TOKENS)
