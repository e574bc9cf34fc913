"""GPUs, without one: what they have kernels for, what XLA compiles there, and that tokens stay the same."""

import contextlib

import gpu_registry
import hlo_text
import numpy as np
import programs
import pytest
import tpu_samplers
from simd import UNAVAILABLE

from gpt_neo_sampling._compat import PlacementMeshImpl, mtf, probe_devices, quiet_logging, tensorflow, tf
from gpt_neo_sampling.checkpoint import open_checkpoint
from gpt_neo_sampling.generation.decode_graph import DEMO_FOLDER, Model, ProgramKey, variable_dtype_of
from gpt_neo_sampling.generation.export import export_saved_model
from gpt_neo_sampling.generation.session import DecodeProgram, WatchedProgram
from gpt_neo_sampling.mesh import gpu
from gpt_neo_sampling.sampling.controls import History, SamplingOptions
from gpt_neo_sampling.sampling.next_token import next_token

FEW = 8  # numbers a row, that may lie in host memory
BATCH, VOCAB, LENGTH = 8, 50257, 512
INPUTS = [(tf.float32, (BATCH, VOCAB)), (tf.int32, (BATCH, LENGTH)), (tf.int32, ()), (tf.int32, (BATCH,))]


def step_of(sampler):
    """A function from (mesh, logits, ids, seed, stream), of INPUTS, to the tokens of one step."""

    def build(mesh, logits, ids, seed, stream):
        batch, vocab, length = programs.dims(batch=BATCH, vocab=VOCAB, length=LENGTH)
        rows = mtf.Shape([batch])
        history = History(
            mtf.import_tf_tensor(mesh, ids, rows + length),
            mtf.constant(mesh, LENGTH, rows, tf.int32),
            mtf.constant(mesh, LENGTH // 2, rows, tf.int32),
        )
        logits = mtf.import_tf_tensor(mesh, logits, rows + vocab)
        seed, stream = mtf.import_tf_tensor(mesh, seed, mtf.Shape([])), mtf.import_tf_tensor(mesh, stream, rows)
        return next_token(logits, vocab, SamplingOptions(**tpu_samplers.SAMPLERS[sampler]), seed, stream, 3, history)

    return build


@contextlib.contextmanager
def graph_on(device):
    probe_devices()
    with tf.Graph().as_default(), quiet_logging(), tf.device(device), tf.variable_scope("", reuse=tf.AUTO_REUSE):
        yield


@pytest.mark.parametrize("sampler", tpu_samplers.SAMPLERS)
def test_a_gpu_has_every_samplers_kernels(sampler):
    """A step is compiled, of operations that XLA has for GPUs; nothing beside it is large and on the host."""
    with graph_on("gpu:0"):
        holders = [tf.placeholder(*of) for of in INPUTS]
        report = gpu_registry.report([programs.lowered(step_of(sampler), *holders)], few=FEW * BATCH)
    assert (report.no_kernel, report.on_host, report.not_compilable) == ({}, {}, {})
    assert report.compiled > report.launched


def test_without_xla_a_gpu_runs_the_operations(monkeypatch):
    """One by one: each has a kernel, and those that compute with integers do so on the host."""
    monkeypatch.setattr(tf.test, "is_built_with_xla", lambda: False)
    with graph_on("gpu:0"):
        holders = [tf.placeholder(*of) for of in INPUTS]
        report = gpu_registry.report([programs.lowered(step_of("top-p"), *holders)], few=FEW * BATCH)
    assert (report.no_kernel, report.compiled) == ({}, 0)
    assert {op for op, _ in report.on_host} >= {"Min", "Max", "Sum"}


MANY = "top_k top_p typical_p repetition_penalty frequency_penalty min_new_tokens"
PER_CALL = {"Slice(int32[8,96])": 2, "ConcatV2(int32[4,96], int32[4,96])": 1}


@pytest.mark.parametrize(
    "program, mesh_shape, layout, options, no_kernel, on_host",
    [
        (DecodeProgram, "", "", {}, {}, {}),
        # the caller's function, which is called on the CPU
        (WatchedProgram, "", "", {"greedy": True}, {"PyFunc(int32[8], int32[8], int32[])": 1}, {}),
        # mtf cuts up the prompts, and puts together what is returned: once a call
        (DecodeProgram, "x:2", "batch:x", {}, {}, PER_CALL),
        pytest.param(
            DecodeProgram, "", "",
            {"batch": 4, "samples": 2, "steps": frozenset(MANY.split()), "arrays": frozenset({"logit_bias"}),
             "max_top_k": 64, "return_logprobs": True, "no_repeat_ngram_size": 3, "n_stop_tokens": 2}, {}, {},
            marks=pytest.mark.slow),
        pytest.param(DecodeProgram, "", "", {"steps": frozenset(["entmax_alpha"])}, {}, {}, marks=pytest.mark.slow),
        pytest.param(DecodeProgram, "x:2", "vocab:x,heads:x", {}, {}, {}, marks=pytest.mark.slow),
        pytest.param(DecodeProgram, "x:2,y:2", "memory_length:x,embd:y", {}, {}, {}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_gpu_has_the_decode_loops_kernels(program, mesh_shape, layout, options, no_kernel, on_host):
    """The bundled model's graph, its pass over the prompts included; what is placed elsewhere is named here."""
    size = mtf.convert_to_shape(mesh_shape).size
    names = [""] if size == 1 else [f"gpu:{i}" for i in range(size)]
    with open_checkpoint(DEMO_FOLDER) as checkpoint:
        params = dict(checkpoint.params, mode="predict", use_tpu=False)
    model = Model(params, params["n_vocab"], PlacementMeshImpl(mesh_shape, layout, names), variable_dtype_of(None))
    with graph_on("gpu:0" if size == 1 else None):
        results = program(ProgramKey(**{"batch": 8, "prompt_length": 32, "length": 96, **options}), model).results
        report = gpu_registry.report(results, few=FEW * 8)
    assert {str(found): n for found, n in report.no_kernel.items()} == no_kernel
    assert {str(found): n for found, n in report.on_host.items()} == on_host
    assert report.not_compilable == {}
    assert report.compiled > 0


@pytest.mark.parametrize("program", [DecodeProgram, WatchedProgram])
def test_jit_compile_on_a_cpu_beside_a_gpu(monkeypatch, program):
    """What is compiled is for the CPU too, and carries integers as such."""
    monkeypatch.setattr(tensorflow.config, "get_visible_devices", lambda kind=None: ["a GPU"])
    with open_checkpoint(DEMO_FOLDER) as checkpoint:
        params = dict(checkpoint.params, mode="predict", use_tpu=False)
    impl = PlacementMeshImpl("", "", [""])
    model = Model(params, params["n_vocab"], impl, variable_dtype_of(None), jit_compile=True)
    with graph_on("cpu:0"):
        ids = program(ProgramKey(batch=1, prompt_length=32, length=48), model).results[0]
    assert ids.dtype == tf.int32


@pytest.mark.parametrize(
    "scope, devices, gpus, expected",
    [
        ("", [""], 0, False),
        ("", [""], 1, True),  # TensorFlow's choice
        ("cpu:0", [""], 1, False),
        ("gpu:0", [""], 0, True),
        (None, ["/device:GPU:0", "/device:GPU:1"], 2, True),
        (None, ["cpu:0", "gpu:0"], 1, False),
        (None, ["/job:worker/replica:0/task:1/device:GPU:3"], 0, True),
    ],
)
def test_which_meshes_are_gpus(monkeypatch, scope, devices, gpus, expected):
    monkeypatch.setattr(tensorflow.config, "get_visible_devices", lambda kind=None: ["a GPU"] * gpus)
    impl = PlacementMeshImpl([("x", len(devices))], [], devices)
    with tf.Graph().as_default(), tf.device(scope):
        assert gpu.on_gpu(impl) == gpu.compiles_rows(impl) == expected
        assert not gpu.on_gpu(mtf.simd_mesh_impl.SimdMeshImpl([], []))


def test_who_decides_what_is_compiled(monkeypatch):
    on_cpu, on_gpu = (PlacementMeshImpl([], [], [device]) for device in ("cpu:0", "gpu:0"))

    def compiled():
        with tf.Graph().as_default():
            return gpu.compiles_rows(on_cpu), gpu.compiles_rows(on_gpu)

    assert compiled() == (False, True)
    monkeypatch.setenv(gpu.COMPILE, "0")
    assert compiled() == (False, False)
    monkeypatch.setenv(gpu.COMPILE, "1")
    assert compiled() == (True, True)
    with gpu.portable():
        assert compiled() == (False, False)
    monkeypatch.setenv(gpu.COMPILE, "yes")
    with pytest.raises(ValueError, match="^GPT_NEO_SAMPLING_XLA=yes; allowed: 0 .* or 1 "):
        compiled()


def test_an_exported_model_needs_no_xla(monkeypatch, tmp_path):
    monkeypatch.setenv(gpu.COMPILE, "1")
    export_saved_model(tmp_path / "model", batch=1, length=8)
    assert gpu_registry.COMPILED.encode() not in (tmp_path / "model" / "saved_model.pb").read_bytes()


SMALL = {"vocab": 1000, "steps": 4}


@pytest.mark.parametrize(
    "sampler, mesh_shape, layout",
    [
        ("softmax", "x:2,y:2", "batch:x,vocab:y"),
        ("top-p", "", ""),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                *((sampler, "", "") for sampler in tpu_samplers.SAMPLERS if sampler != "top-p"),
                *((sampler, "x:2", "batch:x") for sampler in ("entmax", "many")),
                *((sampler, "x:2,y:2", "batch:x,vocab:y") for sampler in ("entmax", "many")),
            ]
        ),
    ],
)
def test_compiled_rows_draw_the_same(monkeypatch, sampler, mesh_shape, layout):
    """On CPUs, where XLA is made to compile them."""
    build, inputs = tpu_samplers.sampler(sampler, on_cpu=True, **SMALL)
    logits, ids = tpu_samplers.gaussian(vocab=1000), np.random.default_rng(1).integers(0, 1000, (8, 512))
    arrays = logits, ids.astype(np.int32), 7, np.arange(8, dtype=np.int32)
    plain = programs.Program(build, inputs)(*arrays)
    monkeypatch.setenv(gpu.COMPILE, "1")
    program = programs.Program(build, inputs, runner=programs.MeshRunner(mesh_shape, layout))
    functions = program.graph.as_graph_def().library.function
    assert any(node.attr[gpu_registry.COMPILED].b for f in functions for node in f.node_def)
    np.testing.assert_array_equal(program(*arrays), plain)


# Kernels on the path of every step in XLA:CPU's program with TensorFlow 2.21, rare branches left out: a stand-in for a
# GPU's, which XLA fuses by other rules.
KERNELS = {"softmax": 35, "top-k": 49, "top-p": 98, "min-p": 48, "epsilon": 49, "typical": 106, "eta": 55, "entmax": 42,
           "greedy": 5, "penalties": 43}  # fmt: skip


@pytest.mark.skipif(UNAVAILABLE is not None, reason=UNAVAILABLE or "")
@pytest.mark.parametrize(
    "sampler", ["softmax", *(pytest.param(s, marks=pytest.mark.slow) for s in KERNELS if s != "softmax")]
)
def test_a_compiled_step_has_few_kernels(sampler):
    specs = [tf.TensorSpec(shape, dtype) for dtype, shape in INPUTS]
    function = programs.compiled(lambda *tensors: programs.lowered(step_of(sampler), *tensors))
    text = function.experimental_get_compiler_ir(*specs)(stage="optimized_hlo")
    assert sum(kernel.branches == 0 for kernel in hlo_text.kernels(text)) <= 1.1 * KERNELS[sampler]
