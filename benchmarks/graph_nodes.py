"""Nodes that a sampling step adds to the TensorFlow graph as processors are added. A section of run.py.

    python benchmarks/graph_nodes.py

The vocabulary is split over 1, 2, 4 and 8 processors. Nodes in the bodies of
functions count. Beside it mtf's own ring all-reduce of 1,024 elements, whose
nodes grow with the square.
"""

import json

import common

PROCESSORS = (1, 2, 4, 8)
WAYS = {
    "softmax": {},
    "top-k 40": {"top_k": 40},
    "entmax 1.3": {"use_entmax": True, "entmax_alpha": 1.3},
}
RING = "mtf's ring all-reduce"
BATCH, VOCAB, ELEMENTS = 8, 8192, 1024
LARGEST_GROWTH = 1.1  # the exponent: 1 is linear


def count(graph):
    from_functions = graph.as_graph_def().library.function
    return len(graph.get_operations()) + sum(len(f.node_def) for f in from_functions)


def step_nodes(processors, options):
    from gpt_neo_sampling._compat import PlacementMeshImpl, mtf, tf
    from gpt_neo_sampling.sampling.next_token import SamplingOptions, next_token

    def built(is_drawn):
        with tf.Graph().as_default() as graph:
            mesh = mtf.Mesh(mtf.Graph(), "mesh")
            batch, vocab = mtf.Dimension("batch", BATCH), mtf.Dimension("vocab", VOCAB)
            held = tf.placeholder(tf.float32, [BATCH, VOCAB])
            output = mtf.import_tf_tensor(mesh, held, mtf.Shape([batch, vocab]))
            if is_drawn:
                seed, step = (mtf.constant(mesh, n, mtf.Shape([]), tf.int32) for n in (1, 0))
                stream = mtf.range(mesh, batch, tf.int32)
                output = next_token(output, vocab, SamplingOptions(**options), seed, stream, step)
            devices = [""] if processors == 1 else [f"cpu:{i}" for i in range(processors)]
            impl = PlacementMeshImpl(f"x:{processors}", "vocab:x", devices)
            mtf.Lowering(mesh.graph, {mesh: impl}, autostack=False)
            return count(graph)

    return built(True) - built(False)


def ring_nodes(processors):
    from gpt_neo_sampling._compat import mtf, tf

    with tf.Graph().as_default() as graph:
        parts = [tf.placeholder(tf.float32, [ELEMENTS]) for _ in range(processors)]
        before = count(graph)
        mtf.placement_mesh_impl.allreduce_ring(parts, [f"cpu:{i}" for i in range(processors)])
        return count(graph) - before


def growth(nodes):
    """The exponent of growth, over the processors that have any nodes."""
    sizes, nodes = zip(*((n, count) for n, count in zip(PROCESSORS, nodes) if count))
    return common.log_log_slope(sizes, nodes)


def section(stem):
    counts = common.child_json("graph_nodes.py")
    print(f"{'nodes of a step':24}" + "".join(f"{n:>9}" for n in PROCESSORS) + "   exponent")
    results = {}
    for way, nodes in counts.items():
        results[way] = {"nodes": nodes, "growth": growth(nodes)}
        verdict, counted = "", "".join(f"{n:9,}" for n in nodes)
        if way != RING:
            results[way]["met"] = results[way]["growth"] <= LARGEST_GROWTH
            verdict = "met" if results[way]["met"] else f"NOT MET, at most {LARGEST_GROWTH}"
        print(f"{way:24}{counted}   {results[way]['growth']:.2f} {verdict}", flush=True)
    return results


def main():
    from gpt_neo_sampling._compat import quiet_logging

    with quiet_logging():
        counts = {way: [step_nodes(n, options) for n in PROCESSORS] for way, options in WAYS.items()}
        counts[RING] = [ring_nodes(n) for n in PROCESSORS]
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
