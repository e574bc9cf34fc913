"""The library on SIMD meshes: a TPU's program, run as one XLA replica a core.

What comes out is held against a single device without XLA, and what travels
between the cores is counted in the compiled program.
"""

import functools

import numpy as np
import pytest
import simd
from helpers_cases import (
    BATCH,
    DRAWS,
    ENTMAX,
    LENGTH,
    LIKELY_MASKS,
    MASKS,
    MIXED_LOOP,
    MODEL,
    NEWER_LOOPS,
    NEWER_MASKS,
    OTHER_LOOPS,
    PENALTIES,
    TPU_MODEL,
    assert_same,
)
from helpers_model import config, features, incremental_logits, random_weights
from programs import Program, dims

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling.mesh.ops import cwise_broadcast, force_allreduce, write_at
from gpt_neo_sampling.models.utils import sample_categorical
from gpt_neo_sampling.sample import sample_autoregressive
from gpt_neo_sampling.sampling.core_draw import LARGEST_GROUP

pytestmark = pytest.mark.skipif(simd.UNAVAILABLE is not None, reason=simd.UNAVAILABLE or "")

slow = pytest.mark.slow
ROWS_AND_VOCAB, VOCAB = "x:2,y:2 batch:x,vocab:y", "x:8 vocab:x"
MODEL_SPLIT = "x:2,y:2 batch:x,vocab:y,heads:y,intermediate_expanded:y"
split = pytest.mark.parametrize("split", [ROWS_AND_VOCAB, pytest.param(VOCAB, marks=slow)])


@functools.cache
def program(case, split):
    """split: a mesh shape and a layout, separated by a space."""
    return simd.SimdProgram(case.build, case.inputs, *split.split())


@functools.cache
def on_simd(case, split):
    return case.values(program(case, split))


# --- The tool itself -------------------------------------------------------------------------


def test_tool_counts_what_travels_inside_and_outside_loops():
    def build(mesh, x):
        rows, split_dim = dims(row=5, split=16)
        x = mtf.import_tf_tensor(mesh, x, mtf.Shape([rows, split_dim]))
        total = force_allreduce(mtf.reduce_sum(x, reduced_dim=split_dim))  # 5 numbers, once
        steps = mtf.import_tf_tensor(mesh, tf.constant(0), mtf.Shape([]))

        def body(step, total):
            more = mtf.reduce_sum(mtf.square(x - total))  # one number, each time round
            return [step + 1, force_allreduce(total + more)]

        return mtf.while_loop(lambda step, _: mtf.less(step, 3), body, [steps, total])[1]

    x = np.arange(80, dtype=np.float32).reshape(5, 16) / 80
    program = simd.SimdProgram(build, [(tf.float32, x.shape)], "x:4", "split:x")
    want = x.sum(1)
    for _ in range(3):
        want = want + np.square(x - want[:, np.newaxis]).sum()
    np.testing.assert_allclose(program(x), want, rtol=1e-5)
    found = sorted((c.opcode, c.dtype, c.shape, c.bytes, c.loops, c.branches) for c in program.collectives())
    assert found == [("all-reduce", "f32", (), 4, 1, 0), ("all-reduce", "f32", (5,), 20, 0, 0)]


def test_tool_tells_cores_that_disagree():
    class ProcessorNumber(mtf.Operation):
        def __init__(self, mesh):
            super().__init__([], mesh=mesh, name="processor_number")
            self._outputs = [mtf.Tensor(self, mtf.Shape([]), tf.int32)]

        def lower(self, lowering):
            lowering.set_tensor_lowering(self.outputs[0], lowering.mesh_impl(self).laid_out_pnum())

    program = simd.SimdProgram(lambda mesh: ProcessorNumber(mesh).outputs[0], [], "x:4", "")
    with pytest.raises(AssertionError, match="processors 0 and 1 hold different values"):
        program()


def test_tool_refuses_other_collectives():
    def build(mesh, x):
        a, b, c, d = dims(a=4, b=8, c=4, d=8)
        return mtf.reshape(mtf.import_tf_tensor(mesh, x, mtf.Shape([a, b])), [c, d])

    with pytest.raises(NotImplementedError, match="tpu_ops.all_to_all"):
        simd.SimdProgram(build, [(tf.float32, (4, 8))], "x:4", "a:x,d:x")


@pytest.mark.parametrize(
    "line, found",
    [
        ("%a = f32[2]{0} add(%b, %c)", False),
        ('%a = (f32[2], s32[2]) custom-call(%b), custom_call_target="TopK"', False),
        ('%a = f32[2]{0} custom-call(%b), custom_call_target="xla_ffi_python_cpu_callback"', True),
        ("%a = ((f32[2]), token[]) infeed(%b)", True),
        ("%a = token[] outfeed(%b, %c)", True),
        ("%a = token[] send-done(%b)", True),
    ],
)
def test_tool_finds_calls_of_the_host(line, found):
    assert bool(simd.host_calls(line)) == found


# --- One device's values ------------------------------------------------------------------


@slow
@split
def test_draws(split):
    assert_same(on_simd(DRAWS, split), DRAWS.single)


@split
def test_a_fresh_seed_is_the_same_on_every_core(split):
    """(The program asserts it of the cores that hold the same rows.)"""

    def build(mesh):
        batch, vocab, samples = dims(batch=BATCH, vocab=64, samples=32)
        weights = mtf.ones(mesh, mtf.Shape([batch, vocab]))
        return [sample_categorical(weights, vocab, samples_dim=samples) for _ in range(2)]

    first, second = simd.SimdProgram(build, [], *split.split())()
    assert (first >= 0).all() and (first != second).any()


@split
def test_entmax(split):
    assert_same(on_simd(ENTMAX, split), ENTMAX.single, atol=1e-6)


@pytest.mark.parametrize(
    "case, split",
    [
        (MASKS, ROWS_AND_VOCAB),
        pytest.param(MASKS, VOCAB, marks=slow),
        pytest.param(LIKELY_MASKS, ROWS_AND_VOCAB, marks=slow),
        pytest.param(NEWER_MASKS, ROWS_AND_VOCAB, marks=slow),
        (PENALTIES, ROWS_AND_VOCAB),
        pytest.param(PENALTIES, VOCAB, marks=slow),
    ],
    ids=str,
)
def test_masks_and_penalties(case, split):
    assert_same(on_simd(case, split), case.single)


@pytest.mark.parametrize(
    "case, split",
    [
        (MIXED_LOOP, ROWS_AND_VOCAB),
        pytest.param(MIXED_LOOP, VOCAB, marks=slow),
        pytest.param(NEWER_LOOPS, ROWS_AND_VOCAB, marks=slow),
        pytest.param(OTHER_LOOPS, ROWS_AND_VOCAB, marks=slow),
        pytest.param(MODEL, MODEL_SPLIT, marks=slow),
    ],
    ids=str,
)
def test_decoding(case, split):
    """The tokens; and the program has no collectives but sums, and nothing that waits for the host."""
    assert_same(on_simd(case, split), case.single)
    compiled = program(case, split)
    assert {c.opcode for c in compiled.collectives()} == {"all-reduce"}
    assert simd.host_calls(compiled.hlo_text) == []


@pytest.mark.parametrize("layout", ["batch:x", "batch:x,length:y", "batch:x,inner:y"])
def test_rows_are_written_in_place(layout):
    """One in each row, none where the position is outside; and XLA has no pass over all of it."""
    x = np.random.default_rng(2).normal(size=(4, 16, 6)).astype(np.float32)
    x[1, 0, 0] = np.nan
    value, position = np.arange(24, dtype=np.float32).reshape(4, 6), np.array([3, 15, -1, 16], np.int32)

    def build(mesh, x, value, position):
        batch, length, inner = dims(batch=4, length=16, inner=6)
        x = mtf.import_tf_tensor(mesh, x, mtf.Shape([batch, length, inner]))
        value = mtf.import_tf_tensor(mesh, value, mtf.Shape([batch, inner]))
        position = mtf.import_tf_tensor(mesh, position, mtf.Shape([batch]))
        inside = mtf.import_tf_tensor(mesh, tf.constant([0, 3, 7, 15]), mtf.Shape([batch]))
        return write_at(x, value, position, length), write_at(x, value, inside, length, is_inside=True)

    inputs = [(tf.float32, x.shape), (tf.float32, value.shape), (tf.int32, position.shape)]
    program = simd.SimdProgram(build, inputs, "x:2,y:2", layout)
    want, want_inside = x.copy(), x.copy()
    want[0, 3], want[1, 15] = value[:2]
    want_inside[np.arange(4), [0, 3, 7, 15]] = value
    got = program(x, value, position)
    np.testing.assert_array_equal(got[0], want)
    np.testing.assert_array_equal(got[1], want_inside)
    assert "dynamic-update-slice(" in program.hlo_text


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param("batch:x,memory_length:y,embd:y", marks=slow),
        "batch:x,heads:y,vocab:y,intermediate_expanded:y",
    ],
)
def test_the_models_states_for_a_tpu(layout):
    """Logits step by step with `use_tpu` are those of one device without it, across the seam of a ring."""
    params = config(["global", "local"], n_ctx=136, local_attention_radius=100)
    weights, lengths = random_weights(params), np.array([1, 127, 128, 132], np.int32)
    ids = np.random.default_rng(5).integers(0, 32, (4, 136)).astype(np.int32)

    def build(mesh, ids, lengths, *weights, use_tpu=True):
        shape, other = features(mesh, params, 4, 136)
        ids, lengths = mtf.import_tf_tensor(mesh, ids, shape), mtf.import_tf_tensor(mesh, lengths, shape[:1])
        with simd.constant_weights(dict(zip(names, weights))):
            config = {**params, "use_tpu": use_tpu}
            return incremental_logits(ids, ids, lengths, other, config, 2, knows_lengths=True)[1]

    names = list(weights)
    arrays = [ids, lengths, *weights.values()]
    inputs = [(tf.as_dtype(a.dtype), a.shape) for a in arrays]
    want = Program(functools.partial(build, use_tpu=False), inputs)(*arrays)
    got = simd.SimdProgram(build, inputs, "x:2,y:2", layout)(*arrays)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_decoding_with_the_states_for_a_tpu():
    assert_same(TPU_MODEL.single, MODEL.single)
    assert_same(on_simd(TPU_MODEL, MODEL_SPLIT), MODEL.single)


# --- What travels ---------------------------------------------------------------------------

BYTES_BATCH, TOP_K = 8, 40
SAMPLERS = {
    "draw": dict(temperature=0.7),
    "top-k": dict(sampling_keep_top_k=TOP_K),
    "top-p": dict(top_p=0.9),
    "entmax": dict(sampling_use_entmax=True),
}


@functools.cache
def travels(sampler, size):
    """[(loops, branches, bytes)] of each collective in the body of a decode loop.

    The vocabulary is split four ways, and the model's logits cost nothing to send.
    """

    def build(mesh, ids):
        batch, length, vocab = dims(batch=BYTES_BATCH, sequence=LENGTH, vocab=size)

        def model(mtf_features, other_features, params, mesh, variable_dtype, context=None):
            at = context.position if context.mode == "incremental" else mtf.zeros(mesh, mtf.Shape([batch]), tf.int32)
            one = mtf.Dimension("sequence", 1)
            logits = cwise_broadcast(
                lambda at, v: 3 * tf.sin(tf.cast(at * 17 + v, tf.float32)),
                [at, mtf.range(mesh, vocab, tf.int32)],
                output_dtype=tf.float32,
            )
            return mtf.reshape(logits, [batch, one, vocab]), None, None

        ids = mtf.import_tf_tensor(mesh, ids, mtf.Shape([batch, length]))
        return sample_autoregressive(ids, {"vocab_dim": vocab}, {}, model=model, seed=1, **SAMPLERS[sampler])

    program = simd.SimdProgram(build, [(tf.int32, [BYTES_BATCH, LENGTH])], "x:4", "vocab:x")
    return sorted((c.loops, c.branches, c.bytes) for c in program.collectives() if c.loops)


samplers = pytest.mark.parametrize("sampler", [s if s == "draw" else pytest.param(s, marks=slow) for s in SAMPLERS])


@samplers
def test_bytes_of_a_step_do_not_grow_with_the_vocabulary(sampler):
    """Nor do those of branches, which are for rare draws."""
    # (up to 8 · 256 entries a shard, entmax is not sought among a few of them first, and the k largest are sorted)
    small = 16384 if sampler in ("entmax", "top-k") else 1024
    largest = 64 * LARGEST_GROUP  # beyond it a core draws as a CPU does
    assert travels(sampler, largest) == travels(sampler, small)


@samplers
def test_a_row_sends_little(sampler):
    """In a step: the draw's 2 numbers for each of 64 groups, entmax's largest score of each, top-k's k values and
    indices from each of 4 shards, top-p's sums over 384 buckets in 5 parts and 128 values and indices from each shard,
    and a few numbers more; 4 bytes each, with 50% to spare."""
    numbers = 2 * 64 + {"entmax": 64, "top-k": 2 * 4 * TOP_K, "top-p": 5 * 384 + 2 * 4 * 128}.get(sampler, 0)
    sent = [size for loops, branches, size in travels(sampler, 1024) if (loops, branches) == (1, 0)]
    assert sum(sent) < 1.5 * 4 * numbers * BYTES_BATCH
