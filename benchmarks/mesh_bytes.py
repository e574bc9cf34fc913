"""Bytes that a decoding step sends between processors, counted in the compiled TPU program.

    python benchmarks/mesh_bytes.py [--json]

Compiles the decode loop for `SimdMeshImpl` with XLA (see tests/simd.py) and adds
up the operands of the all-reduces in the loop's body: what one processor hands
over in one step, for 8 rows. First the sampler alone, with the vocabulary split
four ways; then the whole step of the bundled model on each layout.
"""

import argparse
import json
import sys

import common

common.use_tests()

from helpers_model import features  # noqa: E402
from simd import UNAVAILABLE, SimdProgram, constant_weights  # noqa: E402

from gpt_neo_sampling._compat import mtf, tf  # noqa: E402
from gpt_neo_sampling.checkpoint import open_checkpoint  # noqa: E402
from gpt_neo_sampling.generation.generator import DEMO_FOLDER  # noqa: E402
from gpt_neo_sampling.mesh.ops import cwise_broadcast  # noqa: E402
from gpt_neo_sampling.sample import sample_autoregressive  # noqa: E402

BATCH, LENGTH = 8, 32
WAYS = {
    "softmax": {},
    "top-k 40": dict(sampling_keep_top_k=40),
    "entmax 1.3": dict(sampling_use_entmax=True),
}
VOCABULARIES = (1024, 16384, 131072)
LAYOUTS = [
    ("x:4", "batch:x"),
    ("x:4", "vocab:x"),
    ("x:4", "heads:x"),
    ("x:4", "intermediate_expanded:x"),
    ("x:4", "embd:x"),
    ("x:4", "memory_length:x"),
    ("x:4", "heads:x,vocab:x,intermediate_expanded:x"),
    ("x:2,y:2", "embd:y,batch:x"),
    ("x:2,y:2", "batch:x,heads:y,vocab:y"),
    ("x:2,y:2", "batch:x,heads:y,vocab:y,intermediate_expanded:y"),
    ("x:2,y:2", "batch:x,memory_length:y,embd:y"),
]


def sent(program):
    """{"step": bytes of every step, "round": of each round of entmax's solver, "rare": of an ambiguous draw}."""
    found = [c for c in program.collectives() if c.loops]
    assert all(c.opcode == "all-reduce" for c in found)
    return {
        "step": sum(c.bytes for c in found if (c.loops, c.branches) == (1, 0)),
        "round": sum(c.bytes for c in found if c.loops > 1 and c.branches == 0),
        "rare": sum(c.bytes for c in found if c.branches),
        "all-reduces": sum((c.loops, c.branches) == (1, 0) for c in found),
    }


def sampler(way, size):
    def build(mesh, ids):
        batch, length, vocab = (mtf.Dimension(*d) for d in (("batch", BATCH), ("sequence", LENGTH), ("vocab", size)))

        def model(mtf_features, other_features, params, mesh, variable_dtype, context=None):
            at = context.position if context.mode == "incremental" else mtf.zeros(mesh, mtf.Shape([batch]), tf.int32)
            entry = mtf.range(mesh, vocab, tf.int32)
            logits = cwise_broadcast(
                lambda at, v: 3 * tf.sin(tf.cast(at * 17 + v, tf.float32)), [at, entry], output_dtype=tf.float32
            )
            return mtf.reshape(logits, [batch, mtf.Dimension("sequence", 1), vocab]), None, None

        ids = mtf.import_tf_tensor(mesh, ids, mtf.Shape([batch, length]))
        return sample_autoregressive(ids, {"vocab_dim": vocab}, {}, model=model, seed=1, **WAYS[way])

    return sent(SimdProgram(build, [(tf.int32, (BATCH, LENGTH))], "x:4", "vocab:x"))


def whole_step(mesh_shape, layout):
    with open_checkpoint(DEMO_FOLDER) as checkpoint:
        params = {**checkpoint.params, "mode": "predict"}
        shapes = {name: checkpoint.shape(name) for name in checkpoint.names()}

    def build(mesh, ids, *weights):
        shape, other = features(mesh, params, BATCH, LENGTH)
        with constant_weights(dict(zip(shapes, weights))):
            return sample_autoregressive(mtf.import_tf_tensor(mesh, ids, shape), other, params, seed=1)

    inputs = [(tf.int32, (BATCH, LENGTH))] + [(tf.float32, shape) for shape in shapes.values()]
    return sent(SimdProgram(build, inputs, mesh_shape, layout))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if UNAVAILABLE:
        sys.exit(f"mesh_bytes: {UNAVAILABLE}")
    results = {"sampler": {}, "step": {}}
    print("sampler alone, vocabulary split four ways, bytes a row and step", file=sys.stderr)
    for way in WAYS:
        for size in VOCABULARIES:
            found = sampler(way, size)
            results["sampler"][f"{way}, {size}"] = found
            if not args.json:
                step, each_round, rare = (found[k] / BATCH for k in ("step", "round", "rare"))
                print(f"{way:12} V={size:7,}  step {step:8.1f}  solver's round {each_round:6.1f}  ambiguous draw "
                      f"{rare:8.1f}  (the row itself: {size * 4:9,})", flush=True)  # fmt: skip
    print("bundled model, whole step of softmax sampling, bytes for 8 rows", file=sys.stderr)
    for mesh_shape, layout in LAYOUTS:
        found = whole_step(mesh_shape, layout)
        results["step"][f"{mesh_shape} {layout}"] = found
        if not args.json:
            count = found["all-reduces"]
            print(f"{mesh_shape:8} {layout:50} {found['step']:8,} bytes in {count:3} all-reduces", flush=True)
    if args.json:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
