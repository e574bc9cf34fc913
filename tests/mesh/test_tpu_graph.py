"""The decode loop inside TPU code, as GPT-Neo's TPUEstimator model function has it.

The graph is built under `tpu.replicate` for four cores of a made-up topology and
looked at. What such a program computes is what test_simd.py runs.
"""

import numpy as np
import pytest
from helpers_cases import TableModel
from programs import dims

from gpt_neo_sampling._compat import mtf, quiet_logging, tf
from gpt_neo_sampling.sample import sample_autoregressive

CORES, BATCH, LENGTH, WORDS = 4, 4, 8, 512
WAITS_FOR_HOST = ("PyFunc", "PyFuncStateless", "EagerPyFunc", "Print", "PrintV2", "Assert")
MOVES_DATA = ("AllToAll", "CollectivePermute", "XlaAllReduce", "CrossReplicaSum")


def assignment():
    from tensorflow.core.protobuf.tpu import topology_pb2
    from tensorflow.python.tpu import device_assignment, topology

    places = np.array([[x, y, 0, 0] for x in range(2) for y in range(2)])
    proto = topology_pb2.TopologyProto(
        mesh_shape=[2, 2, 1, 1],
        num_tasks=1,
        num_tpu_devices_per_task=CORES,
        device_coordinates=places.ravel().tolist(),
    )
    made_up = topology.Topology(serialized=proto.SerializeToString())
    return device_assignment.device_assignment(made_up, computation_shape=[1, 1, 1, 1], num_replicas=CORES)


@pytest.fixture(scope="module", params=["softmax", "top-k", "masks by mass", "entmax"])
def operations(request):
    """All operations under tpu.replicate, including those of loop bodies and branches."""
    from tensorflow.python.tpu import tpu

    options = {
        "softmax": {},
        "top-k": dict(sampling_keep_top_k=5),
        "masks by mass": dict(top_p=0.9, min_p=0.01, typical_p=0.9, epsilon_cutoff=1e-4, eta_cutoff=1e-4),
        "entmax": dict(sampling_use_entmax=True),
    }
    with tf.Graph().as_default() as graph, quiet_logging():
        cores = assignment()
        impl = mtf.simd_mesh_impl.SimdMeshImpl(
            mtf.convert_to_shape("x:2,y:2"), mtf.convert_to_layout_rules("batch:x,vocab:y"), None, cores
        )

        def one_core(ids, table):
            mesh = mtf.Mesh(mtf.Graph(), "mesh")
            batch, length, row, vocab = dims(batch=BATCH, sequence=LENGTH, row=WORDS, vocab=WORDS)
            tokens = sample_autoregressive(
                mtf.import_tf_tensor(mesh, ids, mtf.Shape([batch, length])),
                {"vocab_dim": vocab},
                {},
                model=TableModel(mtf.import_tf_tensor(mesh, table, mtf.Shape([row, vocab]))),
                **options[request.param],
            )
            tokens = mtf.anonymize(tokens)
            lowering = mtf.Lowering(mesh.graph, {mesh: impl}, autostack=False)
            return lowering.export_to_tf_tensor(tokens)

        ids = tf.placeholder(tf.int32, [BATCH, LENGTH])
        table = tf.placeholder(tf.float32, [WORDS, WORDS])
        (tokens, *_), *_ = tpu.replicate(one_core, [[ids, table]] * CORES, device_assignment=cores)
        assert tokens.shape.as_list() == [BATCH, LENGTH]
        top = [op.node_def for op in graph.get_operations() if "_tpu_replicate" in op.node_def.attr]
        return top + [node for f in graph.as_graph_def().library.function for node in f.node_def]


def test_cores_talk_by_all_reduce_alone(operations):
    assert {node.op for node in operations if node.op in MOVES_DATA} == {"CrossReplicaSum"}


def test_nothing_waits_for_the_host(operations):
    assert not [node.op for node in operations if node.op in WAITS_FOR_HOST]
    assert not [node.name for node in operations if "_xla_outside_compilation" in node.attr]


def test_the_loop_is_in_it(operations):
    assert sum(node.op in ("While", "StatelessWhile") for node in operations) >= 1
    assert sum(node.op in ("If", "StatelessIf") for node in operations) >= 1
