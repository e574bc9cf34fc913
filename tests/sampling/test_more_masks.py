"""What the masks' table in test_masks.py does not show: which rows XTC chooses."""

import numpy as np
import pytest
from programs import MeshRunner, dims

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling.sampling.masks import xtc_mask


def imported(mesh, x, *shape):
    return mtf.import_tf_tensor(mesh, x, mtf.Shape(shape))


# --- XTC -----------------------------------------------------------------------------------

CHANCES = np.float32([0, 2**-149, 2**-33, 2**-32, 3 * 2**-33, 0.1, 0.5, 1 - 2**-24, 1])


@pytest.mark.parametrize("mesh", [("", ""), ("x:2", "batch:x")], ids=lambda mesh: mesh[1] or "one device")
def test_xtc_chooses_rows_by_exact_comparison(mesh):
    """u · 2⁻³² < p in whole numbers, at p's own border and beside it, for a tensor and for a number."""
    chances = np.repeat(CHANCES, 6)
    border = [int(p) if p.is_integer() else int(p) + 1 for p in (float(c) * 2.0**32 for c in chances)]
    apart = [-2, -1, 0, 1, -(2**32), 2**32] * len(CHANCES)
    u = np.array([max(0, min(2**32 - 1, b + d)) for b, d in zip(border, apart)], np.uint32)
    want = [int(n) < b for n, b in zip(u, border)]
    assert 0.3 < np.mean(want) < 0.7
    b, v = dims(batch=len(u), vocab=4)

    def build(mesh, bits, chances):
        x = mtf.zeros(mesh, mtf.Shape([b, v]))
        bits = imported(mesh, bits, b)
        by_row = xtc_mask(x, imported(mesh, chances, b), 0.2, bits)
        return by_row, [xtc_mask(x, float(p), 0.2, bits) for p in CHANCES]

    by_row, by_number = MeshRunner(*mesh)(build, u.view(np.int32), chances)
    # of four equal ones the last stays
    np.testing.assert_array_equal(by_row == 0, np.where(np.array(want)[:, np.newaxis], np.arange(4) == 3, True))
    for i, p in enumerate(CHANCES):
        np.testing.assert_array_equal(by_number[i][chances == p], by_row[chances == p])


def test_xtc_leaves_other_rows_as_they_are(single):
    """Invalid ones too, whatever the rows beside them; but not those of a number out of range."""
    b, v = dims(batch=6, vocab=8)
    x = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
    x[1, 3], x[2, 5], x[3] = np.nan, np.inf, -np.inf
    bits = np.int32([-1, -1, -1, -1, -1, 0])
    chances = np.float32([0.5, 0.5, 0, 1, 1.5, 0.5])
    thresholds = np.float32([0.01, 0.01, 0.01, 0.01, 0.01, 1.5])

    def build(mesh, x, bits, chances, thresholds):
        return xtc_mask(imported(mesh, x, b, v), *(imported(mesh, t, b) for t in (chances, thresholds, bits)))

    got = single(build, x, bits, chances, thresholds)
    np.testing.assert_array_equal(got[:4], x[:4])
    assert np.isnan(got[4:]).all()


def test_xtc_at_the_threshold(single):
    """An entry of just that probability is at it, up to 0.5."""
    b, v = dims(batch=3, vocab=4)
    x = np.float32([[0, 0, -np.inf, -np.inf], [0, 0, 0, 0], [0, 0, 0, 0]])
    thresholds = np.float32([0.5, 0.25, 0.25 + 2**-25])

    def build(mesh, x, thresholds):
        x, bits = imported(mesh, x, b, v), mtf.zeros(mesh, mtf.Shape([b]), tf.int32)
        return xtc_mask(x, 1, imported(mesh, thresholds, b), bits)

    kept = single(build, x, thresholds) == x
    np.testing.assert_array_equal(kept, [[False, True, True, True], [False] * 3 + [True], [True] * 4])


def test_xtc_numbers():
    """The chance 0 and thresholds above 0.5 build nothing; what is out of range, or no bits, is named."""
    with tf.Graph().as_default():
        mesh = mtf.Mesh(mtf.Graph(), "mesh")
        b, v = dims(batch=4, vocab=8)
        x, bits = mtf.ones(mesh, mtf.Shape([b, v])), mtf.zeros(mesh, mtf.Shape([b]), tf.int32)
        assert xtc_mask(x, 0, 0.1, bits) is x and xtc_mask(x, 1, 0.51, bits) is x
        with pytest.raises(ValueError, match="xtc_probability=1.5; a number from 0 to 1 is needed"):
            xtc_mask(x, 1.5, 0.1, bits)
        with pytest.raises(ValueError, match="uniform_bits=0.5; an int32 mtf.Tensor"):
            xtc_mask(x, 0.5, 0.1, 0.5)
        with pytest.raises(ValueError, match="uniform_bits has shape"):
            xtc_mask(x, 0.5, 0.1, mtf.zeros(mesh, mtf.Shape([v]), tf.int32))
