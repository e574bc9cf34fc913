"""checkpoint/variables.py: weights in the variables of a script's own graph, held against the original's logits."""

import contextlib

import numpy as np
import pytest
from conftest import DATA

from gpt_neo_sampling import CheckpointError, _compat, device_mesh, load_weights, open_checkpoint
from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling.generation.decode_graph import Model

FOLDER = DATA / "gpt_neo_checkpoints" / "global"
SPLIT = ("x:2", "vocab:x,heads:x", "cpu:0,cpu:1")


@contextlib.contextmanager
def graph(on=None, extra=None, autostack=True, scope="gpt2", **params):
    """(checkpoint, lowering, session, logits) of the model, whose vocabulary of 127 is padded; `extra` is one more
    variable, in the model's scope and behind it, or outside and before it."""
    on = device_mesh(*(on or SPLIT))
    with open_checkpoint(FOLDER) as checkpoint, tf.Graph().as_default(), on.place():
        params = {**checkpoint.params, "mode": "predict", **params}
        model = Model(params, 128, on.impl(), mtf.VariableDType(tf.float32))
        ids = np.load(FOLDER / "golden.npz")["ids"]
        mesh, shape, other_features = model.inputs(*ids.shape)
        embd = mtf.Shape([mtf.Dimension("embd", params["n_embd"])])
        if extra and not scope:
            mtf.get_variable(mesh, extra, embd)
        logits = model.logits(mtf.import_tf_tensor(mesh, ids, shape), other_features)
        if extra and scope:
            with tf.variable_scope(scope):
                mtf.get_variable(mesh, extra, embd)
        lowering = mtf.Lowering(mesh.graph, {mesh: on.impl()}, autostack=autostack)
        with on.session() as session:
            yield checkpoint, lowering, session, lowering.export_to_tf_tensor(logits)


@pytest.mark.parametrize(
    "on, autostack", [(("", "", "cpu:0"), True), (SPLIT, True), pytest.param(SPLIT, False, marks=pytest.mark.slow)]
)
def test_logits(on, autostack):
    """The original's, whether each device has all of the weights or its slices, and whether mtf stacks them."""
    with graph(on, autostack=autostack) as (checkpoint, lowering, session, logits):
        is_stacked = any(isinstance(v, mtf.ops.StackedVariable) for v in lowering.variables)
        assert is_stacked == (autostack and on is SPLIT)
        assert load_weights(checkpoint, lowering, session) == []
        found = session.run(logits)
    np.testing.assert_allclose(found[..., :127], np.load(FOLDER / "golden.npz")["logits"], atol=2e-4)
    assert (found[..., 127:] == 0).all()


def test_variables_of_one_s_own():
    with graph(extra="head", autostack=False) as (checkpoint, lowering, session, logits):
        with pytest.raises(CheckpointError, match="global lacks head; strict=False leaves these as they are"):
            load_weights(checkpoint, lowering, session)
        assert load_weights(checkpoint, lowering, session, strict=False) == ["head"]
        session.run(logits)  # the others are there
    for scope in ("gpt2", ""):
        with graph(extra="head", scope=scope) as (checkpoint, lowering, session, _):  # it has the shape of ln_f/g
            with pytest.raises(CheckpointError, match="alone of a stack; lower with autostack=False"):
                load_weights(checkpoint, lowering, session, strict=False)


def test_variables_of_one_s_own_are_set_first():
    """As the docstring says; those outside the scope are nobody's business."""
    with graph(extra="head", autostack=False, scope="") as (checkpoint, lowering, session, logits):
        (head,) = [slices for v, slices in lowering.variables.items() if v.name == "head"]
        head = head.laid_out_tensor.tensor_list[0]
        session.run(tf.global_variables_initializer())
        session.run(lowering.copy_masters_to_slices())
        before = session.run(head)
        assert load_weights(checkpoint, lowering, session) == []
        np.testing.assert_array_equal(session.run(head), before)
        found = session.run(logits)
    np.testing.assert_allclose(found[..., :127], np.load(FOLDER / "golden.npz")["logits"], atol=2e-4)


def test_graphs_that_do_not_fit(monkeypatch):
    fewer = {"n_layer": 1, "attention_types": [[["global"], 1]]}
    with graph(**fewer) as (checkpoint, lowering, session, _):
        with pytest.raises(
            CheckpointError, match="the graph has no h1/attn/compute_output_bias/o_b, .* in the scope 'gpt2"
        ):
            load_weights(checkpoint, lowering, session)
        with pytest.raises(CheckpointError, match="the graph has no .* in the scope 'model'"):
            load_weights(checkpoint, lowering, session, scope="model")
    longer = np.load(FOLDER / "golden.npz")["ids"].shape[1] + 1
    with graph(n_ctx=longer) as (checkpoint, lowering, session, _):
        n_embd = checkpoint.params["n_embd"]
        with pytest.raises(
            CheckpointError, match=rf"wpe has the shape \[{longer - 1}, {n_embd}\], and \[{longer}, {n_embd}\]"
        ):
            load_weights(checkpoint, lowering, session)
    with graph(n_ctx=longer) as (checkpoint, lowering, session, _):  # that wpe has as many positions as wte tokens
        monkeypatch.setitem(checkpoint.params, "n_vocab", longer - 1)
        with pytest.raises(CheckpointError, match=f"wpe has the shape .{longer - 1}, {n_embd}"):
            load_weights(checkpoint, lowering, session)
    with graph() as (checkpoint, lowering, session, _):
        monkeypatch.setattr(_compat, "PlacementMeshImpl", type("Other", (), {}))
        with pytest.raises(ValueError, match="PlacementMeshImpl; load_weights needs a PlacementMeshImpl"):
            load_weights(checkpoint, lowering, session)
