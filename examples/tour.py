# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A tour of gpt_neo_sampling
#
# From a prompt to text, what each control does to the next token, entmax beside softmax, the same tokens on a mesh of
# four devices, and the decode loop around a model of your own. It takes a minute on two CPU cores and downloads
# nothing: the small model, trained on Jane Austen's novels, comes with the package.
#
# In a clone of the repository, `pip install '.[notebook]'` installs what the cells need. `tour.py`, beside this
# notebook, is its source, and `make notebook` makes the one of the other.

# %%
import pathlib
import tempfile

import gpt_neo_sampling
from gpt_neo_sampling import TextGenerator

generator = TextGenerator.from_pretrained()  # or a folder with a GPT-Neo
print(gpt_neo_sampling.__version__, "·", generator.params["n_layer"], "layers,", generator.params["n_vocab"], "tokens")

# %% [markdown]
# ## Sampling
#
# The options have the names of Hugging Face's `generate`. `temperature` below 1 prefers likely tokens, `top_k` rules
# out all but so many. The first call builds a graph, which takes a few seconds; calls of a similar size use it again.

# %%
options = dict(temperature=0.7, top_k=40, max_new_tokens=40, seed=1)
(sample,) = generator.generate("The family of Dashwood", **options)
print("The family of Dashwood" + sample.text)

# %% [markdown]
# The same seed gives the same text, alone or in a batch. A sample also has the log-probability of each of its tokens:
# by the model alone (`logprobs`), and as it was drawn, after temperature and top-k (`draw_logprobs`).

# %%
prompts = ["The family of Dashwood", "Emma", "Mr. Darcy"]
for prompt, sample in zip(prompts, generator.generate(prompts, return_logprobs=True, **options)):
    mean = sum(sample.logprobs) / len(sample.logprobs)
    as_drawn = sum(sample.draw_logprobs) / len(sample.draw_logprobs)
    print(f"{mean:6.2f} nats a token, {as_drawn:5.2f} as drawn | {(prompt + sample.text).splitlines()[0]}")

# %% [markdown]
# ## What each control does
#
# `inspect` gives the distribution of the next token, and what each step makes of it. The entropy says how spread out it
# is; 2 to the entropy is how many equally likely tokens would be as hard to guess.

# %%
steps = generator.inspect("Mr. Darcy looked", temperature=0.7, top_k=40, top_p=0.9)
for step in steps:
    print(f"{step.label:16} {step.support:5,} tokens left, {step.entropy:.2f} bits, like {step.effective_size:.0f}")

# %% [markdown]
# As a picture: each step's probabilities by rank, the likeliest tokens before and after, and how many are left. This is
# what `gpt-neo-sampling inspect --plot` draws.

# %%
from IPython.display import Image, display

from gpt_neo_sampling.inspection import plot, token_text

with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "chain.png"
    plot(steps, lambda i: token_text(generator.tokenizer, i), path, title="Next token after “Mr. Darcy looked”")
    display(Image(path.read_bytes(), width=800))

# %% [markdown]
# ## Softmax beside entmax
#
# Softmax gives every token some probability, however little. Entmax gives most of them exactly 0, and decides by itself
# how many: few where the model is sure, more where it is not. α says how far it goes: 1 is softmax, 2 is sparsemax.

# %%
from matplotlib import pyplot

figure, planes = pyplot.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
for plane, prompt in zip(planes, ["Frank Church", "She was"]):
    for alpha in (1, 1.3, 1.6, 2):
        last = generator.inspect(prompt, temperature=1.0, entmax_alpha=alpha)[-1]
        by_rank = sorted(last.probabilities[last.probabilities > 0], reverse=True)
        plane.plot(range(1, len(by_rank) + 1), by_rank, label=f"α = {alpha}: {last.support:,} tokens")
    plane.set(xscale="log", yscale="log", ylim=(1e-5, 1.3), xlabel="rank", title=f"after “{prompt}”")
    plane.legend(frameon=False, fontsize="small")
planes[0].set_ylabel("probability")
pyplot.show()

# %% [markdown]
# ## A mesh of four devices
#
# A mesh is a grid of devices, here two by two, all of them virtual devices of this CPU. The layout says which dimension
# is split along which axis: each half of the batch is computed in one row of the grid, and within a row each device has
# half of the vocabulary and of the attention heads. Where the work is done does not change what comes out.

# %%
on_mesh = TextGenerator.from_pretrained(
    mesh_shape="x:2,y:2", layout="batch:x,vocab:y,heads:y", devices=["cpu:0", "cpu:1", "cpu:2", "cpu:3"]
)
one_device, four_devices = (g.generate(prompts[:2], **options) for g in (generator, on_mesh))
for a, b in zip(one_device, four_devices):
    print("the same tokens:", a.tokens == b.tokens)
on_mesh.close()

# %% [markdown]
# ## A model of your own
#
# The loop, `sample_autoregressive`, runs any model with GPT-Neo's signature, on mesh-tensorflow tensors, whose
# dimensions have names. This one continues a row with the sum of its last two tokens, modulo 10, nine times out of
# ten. It keeps no states and so is handed the whole row in each step, which `slow_sampling` says.

# %%
import mesh_tensorflow as mtf  # after gpt_neo_sampling, which makes it work with current TensorFlow
import numpy as np
import tensorflow.compat.v1 as tf

tf.logging.set_verbosity(tf.logging.WARN)  # in a notebook mesh-tensorflow would print how many operations there are

batch, length, vocab = mtf.Dimension("batch", 3), mtf.Dimension("length", 16), mtf.Dimension("vocab", 10)


def model(mtf_features, other_features, params, mesh, variable_dtype, context=None):
    ids = mtf_features["inputs"]
    total = mtf.mod(ids + mtf.shift(ids, 1, ids.shape[-1], wrap=False), 10)  # [batch, length]
    likely = mtf.one_hot(total, other_features["vocab_dim"])  # [batch, length, vocab]
    return mtf.log(0.9 * likely + 0.1 / 9 * (1 - likely)), None, None  # logits, and no losses


def draw(seed):
    prompts = np.zeros([3, 16], np.int32)
    prompts[:, :2] = 1
    on = gpt_neo_sampling.device_mesh()
    with tf.Graph().as_default(), on.place():
        mesh = mtf.Mesh(mtf.Graph(), "mesh")
        tokens = gpt_neo_sampling.sample_autoregressive(
            mtf.import_tf_tensor(mesh, prompts, [batch, length]),
            other_features={"vocab_dim": vocab},
            params={"slow_sampling": True},
            prompt_lengths=[2, 2, 2],
            stop_at_token=None,
            temperature=1.0,
            model=model,
            seed=seed,
        )
        lowering = mtf.Lowering(mesh.graph, {mesh: on.impl()})
        with on.session() as session:
            return session.run(lowering.export_to_tf_tensor(tokens))


print(draw(seed=1))

# %% [markdown]
# Each row follows the rule for a while, then a token in ten is drawn otherwise, and the row goes on from there. A row
# draws by its own stream of random numbers, so the three rows differ, and `draw(seed=1)` gives these three again.
#
# From here: [docs/sampling.md](../docs/sampling.md) on choosing controls,
# [docs/own-models.md](../docs/own-models.md) on models that keep states, [docs/meshes.md](../docs/meshes.md) on shapes
# and layouts.
