"""Meshes: their descriptions, wrong ones, and the same tokens on all."""

import numpy as np
import pytest
import reference
from helpers_model import config, random_weights
from test_cli import main

from gpt_neo_sampling import DeviceMesh, MeshError, TextGenerator, device_mesh
from gpt_neo_sampling._compat import mtf, tensorflow
from gpt_neo_sampling.checkpoint import write_mesh_tf_checkpoint

PROMPTS = [[1, 2, 3], [36], [5, 6]]
# Greedy, softmax, top-k and entmax: each prompt is continued in all ways, by one graph.
WAYS = dict(temperature=[0, 1, 1.3, 1], top_k=[None, None, 4, None], entmax_alpha=[None, None, None, 1.3])
N_WAYS = 4
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)


def write_model(folder, weights=None, **sizes):
    params = config(["global", "local"], **{"n_ctx": 48, "local_attention_radius": 5, **sizes})
    del params["mode"]
    write_mesh_tf_checkpoint(folder, params, random_weights(params, seed=1) if weights is None else weights(params))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a model of 37 tokens, which no small mesh divides."""
    return write_model(tmp_path_factory.mktemp("mesh") / "model", n_vocab=37)


def cpus(n):
    return ",".join(f"cpu:{i}" for i in range(n))


def generator(folder, mesh_shape=None, layout=None):
    devices = cpus(mtf.convert_to_shape(mesh_shape).size) if mesh_shape else None
    return TextGenerator.from_pretrained(folder, mesh_shape=mesh_shape, layout=layout, devices=devices)


def tokens(generator, prompts=PROMPTS):
    """The tokens of each prompt with each of WAYS, grouped by way."""
    repeated = {name: np.repeat(np.array(values, object), len(prompts)).tolist() for name, values in WAYS.items()}
    samples = generator.generate(prompts * N_WAYS, max_new_tokens=12, seed=7, eos_token_id=-1, **repeated)
    return [sample.tokens for sample in samples]


@pytest.fixture(scope="module")
def single(model):
    """The tokens on one device."""
    return tokens(generator(model))


# --- descriptions

DEVICES = ("/device:CPU:0", "/device:CPU:1")
X2 = [("x", 2)]


@pytest.mark.parametrize(
    ("mesh_shape", "layout", "devices", "dims", "rules", "names"),
    [
        (None, None, None, [], {}, ("",)),
        ("", "", None, [], {}, ("",)),
        (None, None, "cpu:0", [], {}, DEVICES[:1]),
        (None, None, ["cpu:1"], [], {}, DEVICES[1:]),
        ("x:2", None, "cpu:0,cpu:1", X2, {}, DEVICES),
        (" x:2 , y : 1,", " batch : x,vocab:y ", " cpu:0, CPU:1 ", [("x", 2), ("y", 1)], {"batch": "x", "vocab": "y"},
         DEVICES),
        (mtf.Shape([mtf.Dimension("x", 2)]), mtf.LayoutRules([("vocab", "x")]), ["cpu:0", "cpu:1"], X2,
         {"vocab": "x"}, DEVICES),
        ([["x", 2]], [["vocab", "x"], ["heads", "x"]], ("cpu:0", "cpu:1"), X2, {"vocab": "x", "heads": "x"}, DEVICES),
        ((("x", "2"),), {("vocab", "x")}, "cpu:0,cpu:1", X2, {"vocab": "x"}, DEVICES),
        (["x:2"], ["vocab:x"], "cpu:0,cpu:1", X2, {"vocab": "x"}, DEVICES),
        ({"x": np.int64(2)}, {"vocab": "x"}, "cpu:1,cpu:0", X2, {"vocab": "x"}, DEVICES[::-1]),
        ("x:2", "vocab:x", ["/device:CPU:0", "/job:localhost/replica:0/task:0/device:CPU:1"], X2, {"vocab": "x"},
         DEVICES),
        ("x:2", "vocab:x", ["/cpu:0", "/device:cpu:1"], X2, {"vocab": "x"}, DEVICES),
    ],
)  # fmt: skip
def test_what_a_description_comes_to(mesh_shape, layout, devices, dims, rules, names):
    mesh = device_mesh(mesh_shape, layout, devices)
    assert isinstance(mesh, DeviceMesh)
    assert [(d.name, d.size) for d in mesh.shape.dims] == dims
    assert mesh.layout == rules
    assert mesh.devices == names
    assert mesh.cluster is None
    assert mesh.size == len(names)
    assert {dim: mesh.parts(dim) for dim in rules} == {dim: dict(dims)[axis] for dim, axis in rules.items()}
    assert mesh.parts("embd") == 1


def test_devices_of_a_cluster():
    two = "a:1,b:2"
    names = tuple(f"/job:worker/replica:0/task:{i}/device:CPU:0" for i in range(2))
    assert device_mesh("x:2", "batch:x", cluster=two).devices == names
    assert device_mesh("x:2", None, "worker:0/cpu:0,worker:1/CPU:0", two).devices == names
    assert device_mesh("x:2", None, names, two).devices == names
    assert device_mesh("x:2", None, ["/job:worker/task:0/cpu:0", "worker/task:1/device:CPU:0"], two).devices == names
    assert device_mesh(None, None, "worker:1/gpu:3", two).devices == ("/job:worker/replica:0/task:1/device:GPU:3",)
    assert device_mesh(cluster="a:1").devices == names[:1]


def test_auto_takes_the_gpus_that_are_there(monkeypatch):
    def see(n):
        monkeypatch.setattr(tensorflow.config, "get_visible_devices", lambda kind=None: ["a GPU"] * n)

    see(4)
    mesh = device_mesh(devices="auto")
    assert (str(mesh.shape), mesh.layout) == ("Shape[all=4]", {"batch": "all"})
    assert mesh.devices == tuple(f"/device:GPU:{i}" for i in range(4))
    mesh = device_mesh("x:2,y:2", "vocab:y", "auto")
    assert (mesh.shape.to_string, mesh.layout) == ("Shape[x=2, y=2]", {"vocab": "y"})
    assert device_mesh(None, "vocab:all", "auto").layout == {"vocab": "all"}
    see(1)
    assert device_mesh(devices="auto").devices == ("/device:GPU:0",)
    assert device_mesh(None, None, "gpu:0").devices == ("/device:GPU:0",)
    with pytest.raises(MeshError, match="there is no gpu:1; TensorFlow sees 1 GPU$"):
        device_mesh("x:2", None, "gpu:0,gpu:1")


# --- wrong descriptions

SHAPE_FORM = "is not an axis and its size; allowed: such as x:2,y:2"
LAYOUT_FORM = "is not a dimension and its axis; allowed: such as batch:x,vocab:y"
DEVICE_FORM = "is not a device; allowed: cpu:0, gpu:1, in a cluster worker:1/cpu:0"
TWO = "cpu:0,cpu:1"


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (["x"], f"mesh shape 'x': 'x' {SHAPE_FORM}"),
        (["x:2,y"], f"mesh shape 'x:2,y': 'y' {SHAPE_FORM}"),
        (["x:0"], f"mesh shape 'x:0': 'x:0' {SHAPE_FORM}"),
        (["x:-2"], f"mesh shape 'x:-2': 'x:-2' {SHAPE_FORM}"),
        (["x:2.5"], f"mesh shape 'x:2.5': 'x:2.5' {SHAPE_FORM}"),
        (["2:x"], f"mesh shape '2:x': '2:x' {SHAPE_FORM}"),
        (["x:2:3"], f"mesh shape 'x:2:3': 'x:2:3' {SHAPE_FORM}"),
        (["x=2"], f"mesh shape 'x=2': 'x=2' {SHAPE_FORM}"),
        ([3], f"mesh shape 3 {SHAPE_FORM}"),
        ([[3]], f"mesh shape [3]: 3 {SHAPE_FORM}"),
        ([[["x", 2, 3]]], f"mesh shape [['x', 2, 3]]: ['x', 2, 3] {SHAPE_FORM}"),
        ([[("x", 2.0)]], f"mesh shape [('x', 2.0)]: ('x', 2.0) {SHAPE_FORM}"),
        ([[(None, 2)]], f"mesh shape [(None, 2)]: (None, 2) {SHAPE_FORM}"),
        ([{"x": 0}], f"mesh shape {{'x': 0}}: ('x', 0) {SHAPE_FORM}"),
        (["x:2,x:2"], "mesh shape 'x:2,x:2' has the axis x more than once"),
        (["x:2,y:2,x:3"], "mesh shape 'x:2,y:2,x:3' has the axis x more than once"),
        (["x:2", "batch", TWO], f"layout 'batch': 'batch' {LAYOUT_FORM}"),
        (["x:2", "batch:x:y", TWO], f"layout 'batch:x:y': 'batch:x:y' {LAYOUT_FORM}"),
        (["x:2", "batch=x", TWO], f"layout 'batch=x': 'batch=x' {LAYOUT_FORM}"),
        (["x:2", 3, TWO], f"layout 3 {LAYOUT_FORM}"),
        (["x:2", [["batch"]], TWO], f"layout [['batch']]: ['batch'] {LAYOUT_FORM}"),
        (["x:2", {"batch": 2}, TWO], f"layout {{'batch': 2}}: ('batch', 2) {LAYOUT_FORM}"),
        (["x:2", "batch:y", TWO], "layout batch:y splits along y, but the axes of the mesh are x"),
        (["x:2,y:1", "vocab:x,batch:z", TWO], "layout batch:z splits along z, but the axes of the mesh are x, y"),
        ([None, "batch:x"],
         "layout batch:x splits along x, but the mesh has no axes (give a mesh shape, such as x:2)"),
        (["x:2,y:1", "batch:x,batch:y", TWO],
         "layout 'batch:x,batch:y' names batch twice; a dimension is split along at most one axis"),
        (["x:2,y:2", None, TWO],
         "mesh shape x:2,y:2 has 4 processors, but 2 devices are named (cpu:0, cpu:1); "
         "name 4, or give a mesh shape for 2, such as x:2"),
        (["x:2", None, "cpu:0,cpu:1,cpu:2"],
         "mesh shape x:2 has 2 processors, but 3 devices are named (cpu:0, cpu:1, cpu:2); "
         "name 2, or give a mesh shape for 3, such as x:3"),
        (["x:2", None, "cpu:3"],
         "mesh shape x:2 has 2 processors, but 1 device is named (cpu:3); "
         "name 2, or give a mesh shape for 1, such as x:1"),
        ([None, None, TWO],
         "mesh shape (none) has 1 processor, but 2 devices are named (cpu:0, cpu:1); "
         "name 1, or give a mesh shape for 2, such as x:2"),
        (["x:2"], "mesh shape x:2 has 2 processors, but no devices are named; name 2, such as cpu:0,cpu:1"),
        (["x:2,y:500"],
         "mesh shape x:2,y:500 has 1000 processors, but no devices are named; name 1000, such as cpu:0,…,cpu:999"),
        (["x:2", None, "cpu:0,cpu:0"],
         "devices: cpu:0 is named more than once; each processor needs its own device"),
        (["x:2", None, ["cpu:1", "/device:CPU:1"]],
         "devices: cpu:1 is named more than once; each processor needs its own device"),
        (["x:2", None, "cpu:0,tpu:0"], f"devices: 'tpu:0' {DEVICE_FORM}"),
        (["x:2", None, "cpu:0,cpu"], f"devices: 'cpu' {DEVICE_FORM}"),
        (["x:2", None, "cpu:0,"], f"devices: '' {DEVICE_FORM}"),
        ([None, None, ""], f"devices: '' {DEVICE_FORM}"),
        ([None, None, [3]], f"devices: 3 {DEVICE_FORM}"),
        ([None, None, 3], "devices 3; allowed: a list such as cpu:0,cpu:1"),
        ([None, None, []], "devices []; allowed: a list such as cpu:0,cpu:1"),
        (["x:2", None, "cpu:0,gpu:99"], "devices: there is no gpu:99; TensorFlow sees 0 GPUs"),
        ([None, None, "auto"], "devices auto: TensorFlow sees no GPU here; name CPUs, as in cpu:0,cpu:1"),
        ([None, None, "worker:1/cpu:0"], "devices: 'worker:1/cpu:0': there is no cluster (see --cluster)"),
        ([None, None, None, "a:1,b:2"], "a cluster of 2 machines needs a mesh shape, such as x:2"),
        (["x:3", None, None, "a:1,b:2"],
         "mesh shape x:3 has 3 processors, but 2 devices are named (worker:0/cpu:0, worker:1/cpu:0); "
         "name 3, or give a mesh shape for 2, such as x:2"),
        (["x:2", None, TWO, "a:1,b:2"], "devices: 'cpu:0': it needs a machine, as in worker:1/cpu:0"),
        (["x:2", None, "worker:0/cpu:0,worker:2/cpu:0", "a:1,b:2"],
         "devices: 'worker:2/cpu:0' is on worker:2; the cluster has worker:0, worker:1"),
        (["x:2", None, "worker:0/cpu:0,/job:worker/replica:0/task:0/device:CPU:0", "a:1,b:2"],
         "devices: worker:0/cpu:0 is named more than once; each processor needs its own device"),
        ([None, None, "worker:0cpu:0", "a:1,b:2"], f"devices: 'worker:0cpu:0' {DEVICE_FORM}"),
        (["x:2", None, "auto", "a:1,b:2"],
         "devices auto sees only this machine; in a cluster name each device, as in worker:1/gpu:0"),
    ],
)  # fmt: skip
def test_a_wrong_description_is_named(monkeypatch, description, message):
    monkeypatch.setattr(tensorflow.config, "get_visible_devices", lambda kind=None: [])
    with pytest.raises(MeshError) as error:
        device_mesh(*description)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("mesh_shape", "layout", "message"),
    [
        ("x:3", "heads:x",
         "layout heads:x splits heads=4 over x:3, which does not divide it; allowed sizes of x: 1, 2, 4"),
        ("y:2,x:3", "batch:y,embd:x",
         "layout embd:x splits embd=16 over x:3, which does not divide it; allowed sizes of x: 1, 2, 4, 8, 16"),
        ("x:5", "embed_sequence:x",
         "layout embed_sequence:x splits embed_sequence=48 over x:5, which does not divide it; "
         "allowed sizes of x: 1, 2, 3, 4, 6, 8, 12, 16, 24, 48"),
        ("x:3", "intermediate_expanded:x",
         "layout intermediate_expanded:x splits intermediate_expanded=64 over x:3, which does not divide it; "
         "allowed sizes of x: 1, 2, 4, 8, 16, 32, 64"),
        ("x:5", "memory_length:x",
         "layout memory_length:x splits memory_length=48 over x:5, which does not divide it; "
         "allowed sizes of x: 1, 2, 3, 4, 6, 8, 12, 16, 24, 48"),
        ("x:2", "sequence:x",
         "layout sequence:x: the model has no dimension sequence to split; it has batch, vocab, memory_length, embd, "
         "heads, intermediate_expanded, embed_sequence"),
    ],
)  # fmt: skip
def test_a_layout_that_does_not_fit_the_model_is_named(model, mesh_shape, layout, message):
    with pytest.raises(MeshError) as error:
        generator(model, mesh_shape, layout)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("dims", "tensor"),
    [
        (("vocab", "embd"), "vocab, embd"),
        (("embd", "heads"), "embd, heads"),
        (("batch", "vocab"), "batch, vocab"),
        (("embd", "intermediate_expanded"), "embd, intermediate_expanded"),
        (("batch", "memory_length"), "batch, heads, memory_length"),
        (("heads", "memory_length"), "batch, heads, memory_length"),
        (("embed_sequence", "embd"), "embed_sequence, embd"),
    ],
)
def test_two_dimensions_of_a_tensor_need_an_axis_each(model, dims, tensor):
    first, second = dims
    for layout in (f"{first}:x,{second}:x", f"{second}:x,{first}:x"):
        with pytest.raises(MeshError) as error:
            generator(model, "x:2", layout)
        assert str(error.value) == (
            f"layout {first}:x,{second}:x splits {first} and {second} along the same axis x, but "
            f"a tensor [{tensor}] has both; split them along different axes, or only one of them"
        )
    generator(model, "x:2,y:2", f"{first}:x,{second}:y")


@pytest.mark.parametrize(
    "layout", ["heads:x,vocab:x,intermediate_expanded:x", "memory_length:x,embd:x", "vocab:x,memory_length:x"]
)
def test_other_dimensions_may_share_an_axis(model, layout):
    generator(model, "x:2", layout)


# --- tokens


@pytest.mark.parametrize(
    ("mesh_shape", "layout"),
    [
        ("x:2", "vocab:x"),
        pytest.param("x:3", "batch:x", marks=slow),
        pytest.param("x:3", "vocab:x", marks=slow),
        pytest.param("x:1,y:2", "vocab:x,embd:x,heads:y", marks=slow),
    ],
)
def test_sizes_that_do_not_divide_change_no_token(model, single, mesh_shape, layout):
    """(Three prompts in four ways are twelve rows, rounded up to sixteen, and to eighteen over three.)"""
    assert tokens(generator(model, mesh_shape, layout)) == single


@slow
def test_padding_is_never_drawn(tmp_path):
    """Logits are about −50, those of padding 0, and one shard is all padding."""

    def weights(params):
        w = random_weights(params, seed=3)
        # the last layer norm's offset meets each token's row: −50 or so, and the rest tells them apart
        w["ln_f/b"] = np.full(params["n_embd"], -50 / params["n_embd"], np.float32)
        w["wte"] = 1 + 0.05 * w["wte"]
        sizes = {"n_head": params["n_head"], "attention_types": ["global", "local"], "local_attention_radius": 5}
        logits = reference.gpt_neo_forward(w, np.array([[1, 2, 0, 4, 3]]), **sizes)
        assert -70 < logits.min() < logits.max() < -30 and np.ptp(logits[0, -1]) > 0.5
        return w

    folder = write_model(tmp_path / "far_below", weights, n_vocab=5)
    prompts = [[1, 2], [0], [4, 3]]
    drawn = tokens(generator(folder, "x:4", "vocab:x"), prompts)
    assert drawn == tokens(generator(folder), prompts)
    assert {t for row in drawn for t in row} <= set(range(5))
    for way in range(1, N_WAYS):  # greedy tokens may be the same
        assert len({t for row in drawn[way * len(prompts) :][: len(prompts)] for t in row}) > 1


@slow
def test_a_row_does_not_depend_on_how_many_there_are(model):
    """With entmax. The rows of a request are numbered, so samples of one prompt are rows like any other."""
    one, options = generator(model), dict(entmax_alpha=1.3, max_new_tokens=12, seed=7, eos_token_id=-1)

    def drawn(prompts, **more):
        return [s.tokens for s in one.generate(prompts, **options, **more)]

    assert drawn(PROMPTS + [[9], [8, 8, 8, 8], [7, 6], [0], [30, 31]])[:3] == drawn(PROMPTS)
    copies = drawn([[4, 5]], num_return_sequences=8)
    assert copies == drawn([[4, 5]] * 8)
    assert copies[:3] == drawn([[4, 5]], num_return_sequences=3)
    assert len(set(map(tuple, copies))) > 1


# --- the command


def command(model, *args):
    prompts = [" ".join(map(str, p)) for p in PROMPTS]
    return ["generate", "--model", model, "--prompt-ids", *prompts, "--max-new-tokens", 12, "--seed", 7, *args]


@slow
def test_the_commands_output_is_that_of_one_device(capfd, model):
    args = ["--temperature", 1, "--num-samples", 2]
    status, out, _ = main(capfd, *command(model, *args))
    assert status == 0
    on_mesh = ["--mesh-shape", "x:2", "--layout", "vocab:x,heads:x", "--devices", "cpu:0,cpu:1"]
    assert main(capfd, *command(model, *args, *on_mesh))[:2] == (0, out)
    assert len(out.splitlines()) == 6
