"""The decode loop in a mesh-tensorflow script of one's own, on a mesh of CPUs.

    python examples/sample_on_mesh.py [--mesh-shape x:2,y:2] [--layout batch:x,vocab:y,heads:y] [--model folder]

Builds what a GPT-Neo script builds (dimensions, features, a lowering) around `sample_autoregressive`, fills the weights
from a checkpoint, and prints the text. What it is doing goes to stderr. The layout changes where the work is done, not
what comes out.
"""

# ruff: noqa: E402, I001  (gpt_neo_sampling before mesh_tensorflow, which does not import alone)
import argparse
import sys
import time

BEGAN = time.monotonic()


def say(what):
    print(f"{time.monotonic() - BEGAN:5.1f} s  {what}", file=sys.stderr, flush=True)


if __name__ == "__main__" and "--help" not in sys.argv:
    say("importing TensorFlow")

import numpy as np

import gpt_neo_sampling
import mesh_tensorflow as mtf
import tensorflow.compat.v1 as tf
from gpt_neo_sampling.checkpoint.tokenizer import why_no_tokenizer
from gpt_neo_sampling.models.config import TENSORS, splittable_dims
from gpt_neo_sampling.models.utils import biasmask_attn_weights


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model's folder; by default the model that comes with the package")
    parser.add_argument("--mesh-shape", default="x:2,y:2", help="default: %(default)s")
    parser.add_argument("--layout", default="batch:x,vocab:y,heads:y", help="default: %(default)s")
    parser.add_argument("--prompt", nargs="+", default=["The family of Dashwood", "Emma"])
    parser.add_argument("--length", type=int, default=64, help="positions, prompt included; default: %(default)s")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)

    try:
        # a device for each processor of the mesh
        n_devices = mtf.convert_to_shape(args.mesh_shape).size
        on = gpt_neo_sampling.device_mesh(args.mesh_shape, args.layout, [f"cpu:{i}" for i in range(n_devices)])
        opened = gpt_neo_sampling.TextGenerator.from_pretrained(args.model)  # reads no weights yet
        checkpoint, tokenizer, params = opened.checkpoint, opened.tokenizer, dict(opened.params, mode="predict")
        if tokenizer is None:
            parser.error(why_no_tokenizer(checkpoint))
        prompts = [opened.encode(p) for p in args.prompt]
        sizes = dict(splittable_dims(params), batch=len(prompts), memory_length=args.length)
        on.check(sizes, TENSORS)
    except (OSError, ValueError) as e:
        parser.error(str(e))
    # a vocabulary that its axis does not divide is padded; the entries from params["n_vocab"] on are never drawn
    n_vocab = params["n_vocab"] + -params["n_vocab"] % on.parts("vocab")
    longest = max(map(len, prompts))
    if not longest < args.length <= params["n_ctx"]:
        parser.error(f"--length {args.length}: from {longest + 1} to {params['n_ctx']} is needed")
    ids = np.zeros([len(prompts), args.length], np.int32)
    for row, prompt in zip(ids, prompts):
        row[: len(prompt)] = prompt

    with tf.Graph().as_default(), on.place():
        say(f"building the loop for {n_devices} devices, {args.mesh_shape} with {args.layout}")
        mesh = mtf.Mesh(mtf.Graph(), "mesh")
        batch_dim = mtf.Dimension("batch", len(prompts))
        length_dim = mtf.Dimension("sequence", args.length)
        memory_dim = mtf.Dimension("memory_length", args.length)
        variable_dtype = mtf.VariableDType(tf.float32)
        other_features = {
            "embd_dim": mtf.Dimension("embd", params["n_embd"]),
            "vocab_dim": mtf.Dimension("vocab", n_vocab),
            "embed_sequence_dim": mtf.Dimension("embed_sequence", params["n_ctx"]),
            "memory_length_dim": memory_dim,
            "attn_bias": biasmask_attn_weights(mesh, length_dim, memory_dim, variable_dtype),
        }
        tokens = gpt_neo_sampling.sample_autoregressive(
            mtf.import_tf_tensor(mesh, ids, [batch_dim, length_dim]),
            other_features,
            params,
            stop_at_token=params["eos_id"],
            prompt_lengths=[len(p) for p in prompts],
            variable_dtype=variable_dtype,
            sampling_keep_top_k=40,
            seed=args.seed,
        )
        lowering = mtf.Lowering(mesh.graph, {mesh: on.impl()})
        out = lowering.export_to_tf_tensor(tokens)
        with on.session() as session:
            say(f"loading {len(checkpoint.names())} weights from {checkpoint.folder}")
            gpt_neo_sampling.load_weights(checkpoint, lowering, session)
            say(f"sampling {len(prompts)} rows of up to {args.length} tokens")
            rows = session.run(out)
    say("done")
    for row in rows:
        print(tokenizer.decode(row.tolist()))
        print()


if __name__ == "__main__":
    main()
