"""The decode loop in a mesh-tensorflow script of one's own, on a mesh of CPUs.

    python examples/sample_on_mesh.py [--mesh-shape x:2,y:2] [--layout batch:x,vocab:y,heads:y]

Builds what a GPT-Neo script builds (dimensions, features, a lowering) around
`sample_autoregressive`, with the bundled model's weights, and prints the text.
The layout changes where the work is done, not what comes out.
"""

# ruff: noqa: I001  (gpt_neo_sampling before mesh_tensorflow, which does not import alone)
import argparse

import numpy as np
from tokenizers import Tokenizer

import gpt_neo_sampling
import mesh_tensorflow as mtf
import tensorflow.compat.v1 as tf
from gpt_neo_sampling.generation.generator import DEMO_FOLDER
from gpt_neo_sampling.models.utils import biasmask_attn_weights


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh-shape", default="x:2,y:2")
    parser.add_argument("--layout", default="batch:x,vocab:y,heads:y")
    parser.add_argument("--prompt", nargs="+", default=["The family of Dashwood", "Emma"])
    parser.add_argument("--length", type=int, default=64, help="positions, prompt included")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    checkpoint = gpt_neo_sampling.open_checkpoint(DEMO_FOLDER)
    tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer_file))
    prompts = [tokenizer.encode(p).ids for p in args.prompt]
    ids = np.zeros([len(prompts), args.length], np.int32)
    for row, prompt in zip(ids, prompts):
        row[: len(prompt)] = prompt

    params = dict(checkpoint.params, mode="predict")
    mesh = mtf.Mesh(mtf.Graph(), "mesh")
    batch_dim = mtf.Dimension("batch", len(prompts))
    length_dim = mtf.Dimension("sequence", args.length)
    memory_dim = mtf.Dimension("memory_length", args.length)
    variable_dtype = mtf.VariableDType(tf.float32)
    other_features = {
        "embd_dim": mtf.Dimension("embd", params["n_embd"]),
        "vocab_dim": mtf.Dimension("vocab", params["n_vocab"]),
        "embed_sequence_dim": mtf.Dimension("embed_sequence", params["n_ctx"]),
        "memory_length_dim": memory_dim,
        "attn_bias": biasmask_attn_weights(mesh, length_dim, memory_dim, variable_dtype),
    }
    with tf.Graph().as_default():
        tokens = gpt_neo_sampling.sample_autoregressive(
            mtf.import_tf_tensor(mesh, ids, [batch_dim, length_dim]),
            other_features,
            params,
            stop_at_token=params["eos_id"],
            variable_dtype=variable_dtype,
            sampling_keep_top_k=40,
            seed=args.seed,
        )
        mesh_shape = mtf.convert_to_shape(args.mesh_shape)
        devices = [f"cpu:{i}" for i in range(mesh_shape.size)]
        mesh_impl = mtf.placement_mesh_impl.PlacementMeshImpl(mesh_shape, args.layout, devices)
        lowering = mtf.Lowering(mesh.graph, {mesh: mesh_impl}, autostack=False)
        out = lowering.export_to_tf_tensor(tokens)
        # virtual CPU devices exist only if the session is told of them
        with tf.Session(config=tf.ConfigProto(device_count={"CPU": len(devices)})) as session:
            for v in tf.global_variables():
                name = v.op.name.removeprefix("gpt2/")
                if name in checkpoint.names():
                    session.run(v.initializer, {v.initializer.inputs[1]: checkpoint.read(name)})
            session.run(lowering.copy_masters_to_slices())
            for row in session.run(out):
                print(tokenizer.decode(row.tolist()))
                print()


if __name__ == "__main__":
    main()
