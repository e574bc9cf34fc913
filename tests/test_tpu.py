"""What a TPU runs, by its own compiler and without one: what each sampler costs there, and which tokens it draws.

The tokens are those of the program in the types that a TPU has (the compiler makes pairs of float32 of float64), run as
CPU replicas. The chip's own exp and log are not simulated. (make test-tpu; other tests' environment lacks libtpu.)
"""

import functools
import json
import pathlib

import numpy as np
import pytest
import simd
import tpu_compiler
import tpu_samplers
from programs import ONE_DEVICE, Program

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling.mesh.ops import computed_once, force_allreduce, take
from gpt_neo_sampling.models.utils import biasmask_attn_weights
from gpt_neo_sampling.sampling.categorical import draw_uniforms

UNAVAILABLE = simd.UNAVAILABLE or tpu_compiler.UNAVAILABLE
pytestmark = pytest.mark.skipif(UNAVAILABLE is not None, reason=UNAVAILABLE or "")

TABLE = json.loads((pathlib.Path(__file__).parent / "data" / "tpu_costs.json").read_text())
CORES, BATCH, STEPS = 4, tpu_samplers.BATCH, tpu_samplers.STEPS
HALF = BATCH // 2
SEED, STREAM = 1, np.arange(BATCH, dtype=np.int32)
SIGMAS = (2, 2, 0.3, 8)
# entries, and those of them that the vocabulary has: groups of 786 as in GPT-Neo's padded one, and of two entries
FULL, SMALL = (tpu_samplers.VOCAB, None), (120, 113)

layouts = pytest.mark.parametrize("layout", tpu_samplers.LAYOUTS)
samplers_on_layouts = pytest.mark.parametrize(
    "name, layout",
    [
        # the compiler takes a minute for many, all controls in one program
        pytest.param(
            name, layout, marks=[pytest.mark.xdist_group(name), *[pytest.mark.slow] * (name == "many" and i > 0)]
        )
        for name in tpu_samplers.SAMPLERS
        for i, layout in enumerate(tpu_samplers.LAYOUTS)
    ],
)
samplers = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in tpu_samplers.SAMPLERS]
)


@functools.cache
def core_program(name, layout, size=FULL):
    return tpu_samplers.core_program(name, layout, vocab=size[0], vocab_size=size[1])


@functools.cache
def tpu_program(name, layout, size=FULL):
    return tpu_compiler.TpuProgram(core_program(name, layout, size).hlo, CORES, keep_own_types=True)


def on_tpu(name, layout, size):
    program = core_program(name, layout, size)
    return simd.Replicas(program, tpu_compiler.runnable_on_cpu(tpu_program(name, layout, size).in_own_types))


@functools.cache
def on_one_device(name, size):
    """Tokens of each of `cases`, without XLA."""
    build, inputs = tpu_samplers.sampler(name, vocab=size[0], vocab_size=size[1], on_cpu=True)
    program = Program(build, inputs)
    tokens = [program(*case) for case in cases(*size)]
    program.close()
    return tokens


# --- Tokens ----------------------------------------------------------------------------------


@functools.cache
def cases(vocab, vocab_size=None):
    """Inputs of a program: many rows, and those in which a draw or a cutoff may be in doubt."""
    rng = np.random.default_rng(1)
    ids = rng.integers(0, vocab_size or vocab, (BATCH, tpu_samplers.LENGTH)).astype(np.int32)
    spread = [sigma * rng.standard_normal((BATCH, vocab)) for sigma in SIGMAS]
    rounded = np.round(rng.standard_normal((BATCH, vocab)), 1)  # entries by the hundred are equal
    borders = list(at_borders(vocab_size or vocab, vocab))
    if vocab == tpu_samplers.VOCAB:
        borders = borders[:2]  # branches take seconds there
    seeds = [SEED] * (1 + len(borders)) + list(range(SEED + 1, SEED + 2 + len(spread)))
    every = [extreme(vocab, rng), *borders, rounded, *spread]
    return [(logits.astype(np.float32), ids, seed, STREAM) for logits, seed in zip(every, seeds, strict=True)]


def extreme(vocab, rng):
    rows = np.zeros((BATCH, vocab))
    rows[1, vocab // 3] = 1e30
    rows[2] = -np.inf
    rows[3] = rng.standard_normal(vocab)
    rows[3, 5] = np.nan
    rows[4] = 1e30 * rng.standard_normal(vocab)
    rows[5] = np.sort(3 * rng.standard_normal(vocab))
    rows[6] = -np.sort(3 * rng.standard_normal(vocab))
    rows[7] = np.where(rng.random(vocab) < 0.1, rng.standard_normal(vocab), -np.inf)
    return rows


def at_borders(used, vocab):
    """Yields logits of which, at temperature 0.9, one step's draws lie at a border to float32's precision.

    The entries of two groups, or of one, have the uniform's mass and the rest of it.
    """
    for u1, u2 in uniforms():
        rows = np.full((BATCH, vocab), -np.inf)
        for row in range(BATCH):
            first, last, u = (0, used - 1, u1[row]) if row < HALF else (0, 1, u2[row])
            rows[row, first], rows[row, last] = 0.9 * np.log(u), 0.9 * np.log1p(-u)
        yield rows


@functools.cache
def uniforms():
    """float64 [STEPS, 2, BATCH] that the programs draw with."""

    def build(mesh):
        rows = mtf.Shape([mtf.Dimension("batch", BATCH)])
        stream = mtf.import_tf_tensor(mesh, STREAM, rows)
        return [list(draw_uniforms(mesh, rows, SEED, stream, step)) for step in range(STEPS)]

    return np.array(ONE_DEVICE(build)).astype(np.uint32) * 2.0**-32


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.xdist_group(name), *[pytest.mark.slow] * (name == "many")])
        for name in tpu_samplers.SAMPLERS
    ],
)
@layouts
def test_tokens_are_those_of_one_device(name, layout):
    assert_same_tokens(name, layout, FULL)


@samplers_on_layouts
def test_tokens_of_a_small_padded_vocabulary(name, layout):
    assert_same_tokens(name, layout, SMALL)


def assert_same_tokens(name, layout, size):
    program = on_tpu(name, layout, size)
    for at, (case, want) in enumerate(zip(cases(*size), on_one_device(name, size))):
        np.testing.assert_array_equal(program(*case), want, f"case {at}")


@pytest.mark.slow
@samplers
@layouts
def test_tokens_of_many_rows(name, layout):
    """Where float64 stands for exactness, a TPU has some 48 bits of it: 6,400 draws, 800 cutoffs."""
    rng = np.random.default_rng(2)
    build, inputs = tpu_samplers.sampler(name, on_cpu=True)
    one_device, tpu = Program(build, inputs), on_tpu(name, layout, FULL)
    differ = 0
    for seed in range(100):
        spread = rng.choice([0.5, 1, 2, 4], (BATCH, 1))
        logits = (spread * rng.standard_normal((BATCH, FULL[0]))).astype(np.float32)
        case = logits, np.zeros((BATCH, tpu_samplers.LENGTH), np.int32), seed, STREAM
        differ += (one_device(*case) != tpu(*case)).sum()
    one_device.close()
    assert differ == 0


def test_what_is_compared_is_worth_comparing():
    tokens = np.array(on_one_device("softmax", FULL))
    assert (tokens[0, [2, 3]] == -1).all()  # rows of −inf, and with a NaN
    assert len(np.unique(tokens)) > 200
    at_border = np.array(on_one_device("softmax", SMALL))[1 : 1 + STEPS]
    assert {0, SMALL[1] - 1} == set(at_border[:, :HALF].flat) and {0, 1} == set(at_border[:, HALF:].flat)


# --- Costs -----------------------------------------------------------------------------------


@samplers_on_layouts
def test_costs_are_the_tables(name, layout):
    """Cycles and kernels within 10% of tests/data/tpu_costs.json (`benchmarks/tpu.py --write-table` writes it)."""
    costs, table = tpu_program(name, layout).table(), TABLE[f"{name}, {layout}"]
    assert costs.keys() == table.keys()
    for place, found in costs.items():
        for what, is_now, was in zip(("cycles", "kernels with cycles", "kernels without"), found, table[place]):
            assert abs(is_now - was) <= max(0.1 * was, 1), f"{place}: {is_now} {what}, {was} in the table"


def test_a_mask_of_all_positions_is_not_computed_in_each_step():
    size = 256

    def build(mesh, x):
        queries, keys, rows = (mtf.Dimension(name, size) for name in ("queries", "keys", "rows"))
        x, steps = mtf.import_tf_tensor(mesh, x, mtf.Shape([rows, keys])), mtf.zeros(mesh, [rows], tf.int32)
        mask = biasmask_attn_weights(mesh, queries, keys, mtf.VariableDType(tf.float32))

        def loop(mask):
            def body(step, x):
                return step + 1, force_allreduce(x + take(mask, step, queries))

            return mtf.while_loop(lambda step, _: mtf.reduce_all(mtf.less(step, size)), body, [steps, x])[1]

        return [loop(force_allreduce(mask)), loop(computed_once(mask))]

    program = simd.CoreProgram(build, [(tf.float32, (size, size))], "x:4", "rows:x")
    compiled = tpu_compiler.TpuProgram(program.hlo, CORES)
    in_loops = [k for k in compiled.kernels if k.loops and k.source.startswith("biasmask_attn_weights")]
    assert len(in_loops) == 1, "of the first loop alone"


# --- The tool itself -------------------------------------------------------------------------


def test_high_half_of_a_product():
    text = """HloModule m

ENTRY main {
  pnum = s32[] parameter(0)
  a = u32[3]{0} parameter(1)
  b = u32[3]{0} parameter(2)
  ROOT high = u32[3]{0} mulhi(a, b)
}
"""
    from jaxlib import _hlo

    hlo = _hlo.hlo_module_from_text(text).as_serialized_hlo_module_proto()
    a, b = np.array([2**32 - 1, 2**31, 3], np.uint32), np.array([2**32 - 1, 6, 5], np.uint32)
    ((high,),) = simd._Executable(tpu_compiler.runnable_on_cpu(hlo), 1)(a, b)
    np.testing.assert_array_equal(high, [2**32 - 2, 3, 0])


def test_float64_in_a_tpus_own_types():
    """Two float32, right to some 48 bits: `simd.Replicas` runs them as they are written."""

    def build(mesh, x):
        rows = mtf.Shape([mtf.Dimension("rows", 1000)])

        def exp(x):
            exact = tf.exp(-tf.cast(x, tf.float64))
            high = tf.cast(exact, tf.float32)
            return high, tf.cast(exact - tf.cast(high, tf.float64), tf.float32)

        x = mtf.import_tf_tensor(mesh, x, rows)
        return mtf.slicewise(exp, [x], [rows] * 2, [tf.float32] * 2, rows.dims, grad_function=0)

    program = simd.CoreProgram(build, [(tf.float32, (1000,))], "x:4", "rows:x")
    own_types = tpu_compiler.TpuProgram(program.hlo, CORES, keep_own_types=True).in_own_types
    x = np.random.default_rng(0).uniform(0, 10, 1000).astype(np.float32)
    high, low = simd.Replicas(program, tpu_compiler.runnable_on_cpu(own_types))(x)
    np.testing.assert_allclose(high + np.float64(low), np.exp(-np.float64(x)), rtol=1e-13)


def test_the_harness_is_one_kernel():
    for layout in tpu_samplers.LAYOUTS:
        program = core_program(tpu_samplers.EMPTY, layout)
        costs = tpu_compiler.TpuProgram(program.hlo, CORES).table()
        assert {place: kernels for place, (_, *kernels) in costs.items()} == {"1 loops, 0 branches": [1, 0]}
