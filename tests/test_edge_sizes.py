"""Extreme sizes: a vocabulary of one, a length of one, a batch of 1,024, and logits of 8 bits."""

import numpy as np
import pytest
import reference
from helpers_checkpoint import TINY, bfloat16_rounded, random_weights
from helpers_loop import TABLE, Bigram, bigram_logits, check, loops, prompts_of
from helpers_model import features, reference_config
from helpers_model import random_weights as model_weights
from programs import MeshRunner, Program, dims

from gpt_neo_sampling import TextGenerator
from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling.checkpoint import write_mesh_tf_checkpoint
from gpt_neo_sampling.models.utils import (
    entmax,
    entmax_cross_entropy_with_logits,
    epsilon_mask,
    eta_mask,
    min_p_mask,
    sample_categorical,
    softmax,
    top_k_mask,
    top_p_mask,
    typical_p_mask,
)
from gpt_neo_sampling.sample import sample_autoregressive
from gpt_neo_sampling.sampling.categorical import score_draw
from gpt_neo_sampling.sampling.controls import SamplingOptions
from gpt_neo_sampling.sampling.next_token import next_token
from gpt_neo_sampling.sampling.penalties import repetition_penalty, tokens_mask

HALF_OF_ALL = {"top_p": 0.5, "min_p": 0.5, "typical_p": 0.5, "epsilon_cutoff": 0.5, "eta_cutoff": 0.5}
PENALTIES = {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.5}
slow = pytest.mark.slow
MASKS = (top_p_mask, min_p_mask, typical_p_mask, epsilon_mask, eta_mask)


@pytest.mark.parametrize("split", ["", "batch:x", "vocab:x"])
def test_padding_is_not_drawn_from_a_row_of_nothing(split):
    """Of a vocabulary of 5, padded to 8, whose logits are all −inf, or all as low as they can be."""
    x = np.full((4, 8), -np.inf, np.float32)
    x[1, 3], x[3, :5] = 0, np.finfo(np.float32).min
    x[:, 5:] = 3
    ways = [{}, {"temperature": 0}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5},
            {"use_entmax": True, "entmax_alpha": 1.3}]  # fmt: skip

    def build(mesh, x):
        b, v = dims(batch=4, vocab=8)
        logits = mtf.import_tf_tensor(mesh, x, mtf.Shape([b, v]))
        return [next_token(logits, v, SamplingOptions(vocab_size=5, **way), 1, None, 0) for way in ways]

    for way, token in zip(ways, MeshRunner("x:2" if split else "", split)(build, x)):
        np.testing.assert_array_equal(token[:3], [-1, 3, -1], str(way))
        assert 0 <= token[3] < 5, way


@pytest.mark.parametrize("dtype", [tf.float32, pytest.param(tf.bfloat16, marks=slow)], ids=lambda dtype: dtype.name)
def test_operations_on_a_vocabulary_of_one(dtype):
    """The one entry has all the mass, whatever its logit; rows of −inf, NaN or +inf have none."""
    x = np.array([0, -1e30, 1e30, -np.inf, np.nan, np.inf], np.float32)[:, np.newaxis]
    ones, numbers = np.full(6, 1, np.float32), np.array([0, 0, 0, -1, -1, -1])
    b, v, s = dims(batch=6, vocab=1, samples=3)

    def build(mesh, x):
        logits = mtf.cast(mtf.import_tf_tensor(mesh, x, mtf.Shape([b, v])), dtype)
        ids, u = mtf.zeros(mesh, [b], tf.int32), mtf.import_tf_tensor(mesh, ones * 0.999, mtf.Shape([b]))
        alpha = mtf.import_tf_tensor(mesh, ones * 1.5, mtf.Shape([b]))
        masked = [mask(logits, 0.5) for mask in MASKS] + [top_k_mask(logits, 1), tokens_mask(logits, [7], v)]
        masked.append(repetition_penalty(logits, mtf.zeros(mesh, [b, v], tf.int32), 1.5, v))
        p = [softmax(logits), entmax(logits, 1.3), entmax(logits, alpha), entmax(logits, 2)]
        loss = entmax_cross_entropy_with_logits(logits, ids, v)
        drawn = [sample_categorical(p[1], seed=1), score_draw(mtf.cast(logits, tf.float32), u, u, v)]
        drawn += [score_draw(mtf.cast(logits, tf.float32), u, u, v, alpha)]
        many = sample_categorical(p[0], seed=1, samples_dim=s)
        return [mtf.cast(t, tf.float32) for t in (*masked, *p, loss, *drawn, many)]

    *out, many = MeshRunner()(build, x)
    masked, p, loss, drawn = out[:8], out[8:12], out[12], out[13:]
    for got in masked:
        np.testing.assert_array_equal(got[:3], x[:3].astype(dtype.as_numpy_dtype).astype(np.float32))
    for got in p:
        np.testing.assert_array_equal(got[:, 0], [1, 1, 1, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(loss[:3], 0)
    for got in (*drawn, *many.T):
        np.testing.assert_array_equal(got, numbers)


@pytest.mark.parametrize(
    "mesh",
    [{}, pytest.param(dict(mesh_shape="x:2", layout="vocab:x", devices="cpu:0,cpu:1"), marks=slow)],
    ids=["one device", "x:2"],
)
def test_a_model_of_one_token(tmp_path, mesh):
    """It is always drawn, with every option; a split vocabulary is padded."""
    params = {**TINY, "n_vocab": 1, "n_ctx": 4, "padding_id": 1, "eos_id": 0}
    write_mesh_tf_checkpoint(tmp_path / "model", params, random_weights(params))
    generator = TextGenerator.from_pretrained(tmp_path / "model", **mesh)
    options = [dict(do_sample=False), dict(top_k=1, entmax_alpha=1.5, **HALF_OF_ALL, **PENALTIES)]
    for more in options[: 1 if mesh else None]:
        samples = generator.generate([[0], [0, 0, 0]], max_new_tokens=3, eos_token_id=-1, return_logprobs=True, **more)
        assert [s.tokens for s in samples] == [[0, 0, 0], [0]]
        assert [s.logprobs + s.draw_logprobs for s in samples] == [[0.0] * 6, [0.0] * 2]
    assert generator.generate([[]], max_new_tokens=3)[0].finish_reason == "stop"  # the one token stops
    (score,) = generator.score([[0, 0, 0]])
    assert (score.logprobs, score.perplexity) == ([None, 0.0, 0.0], 1.0)
    assert all(step.probabilities.tolist() == [1.0] for step in generator.inspect([0], top_k=1, min_p=0.5))


@slow
def test_a_context_of_one_and_of_two(tmp_path, caplog):
    """With one position the prompt fills it; with two it gets one token, the same as in a longer context."""
    weights = random_weights(TINY)
    generators = {}
    for n_ctx in (1, 2, TINY["n_ctx"]):
        folder = tmp_path / str(n_ctx)
        params = {**TINY, "n_ctx": n_ctx, "eos_id": -1}
        write_mesh_tf_checkpoint(folder, params, {**weights, "wpe": weights["wpe"][:n_ctx]})
        generators[n_ctx] = TextGenerator.from_pretrained(folder)
    one, two, many = generators.values()
    options = dict(seed=1, max_new_tokens=1, return_logprobs=True)
    assert [s.tokens for s in one.generate([[3], [4]], **options)] == [[], []]
    assert "stops at its end" in caplog.text
    with pytest.raises(ValueError, match="at least 2 are needed"):
        one.score([[3]])
    want = many.generate([[3], [4]], **options)
    assert [s.tokens for s in two.generate([[3], [4]], **options)] == [s.tokens for s in want]
    for a, b in zip(two.score([[3, 4]]), many.score([[3, 4]])):
        assert a.logprobs[1] == pytest.approx(b.logprobs[1], abs=1e-5)
    assert [s.tokens for s in two.generate([[3, 4]], **options)] == [[]]


def test_one_prompt_token_one_step_and_a_memory_of_two():
    """The loop with the transformer at its smallest: one row, one greedy token, against float64."""
    params = {**TINY, "mode": "predict"}
    weights = model_weights(params)

    def build(mesh, ids):
        shape, other = features(mesh, params, 1, 2)
        ids = mtf.import_tf_tensor(mesh, ids, shape)
        cut = dict(max_length=2, max_prompt_length=1, prompt_lengths=[1], max_steps=1, stop_at_token=None)
        return [sample_autoregressive(ids, other, params, temperature=0, **cut),
                sample_autoregressive(ids, other, params, temperature=0, **{**cut, "max_length": 1})]  # fmt: skip

    run = Program(build, [(tf.int32, (1, 2))], weights)
    for token in range(params["n_vocab"]):
        logits = reference.gpt_neo_forward(weights, np.array([[token]]), **reference_config(params))
        drawn, full = run([[token, 9]])
        assert drawn.tolist() == [[token, logits[0, -1].argmax()]]
        assert full.tolist() == [[token, params["padding_id"]]]


class HalfBigram(Bigram):
    def __call__(self, *args, **kwargs):
        logits, *rest = super().__call__(*args, **kwargs)
        return mtf.cast(logits, tf.bfloat16), *rest


@slow
def test_1024_rows_of_bfloat16_logits():
    """Each row against the simulation, and 8-bit logits with every control as the same numbers in float32."""
    length, table = 6, bfloat16_rounded(TABLE)
    prompts = prompts_of(np.random.default_rng(0).integers(1, length + 1, 1024), length)
    controls = dict(temperature=0.8, sampling_keep_top_k=50, top_p=0.95, min_p=0.001, typical_p=0.98, **PENALTIES)
    cases = {"softmax": dict(seed=3), "entmax": dict(seed=3, sampling_use_entmax=True, entmax_alpha=1.3),
             "controls": dict(seed=3, epsilon_cutoff=1e-4, eta_cutoff=1e-4, **controls)}  # fmt: skip
    half = {name: dict(options, model=HalfBigram()) for name, options in cases.items()}
    whole = {name + " float32": dict(options, model=Bigram()) for name, options in cases.items()}
    out = loops({**half, **whole}, Bigram(), table=table, batch=1024, length=length)(prompts)
    for name in cases:
        np.testing.assert_array_equal(out[name], out[name + " float32"])
    logits_of = bigram_logits(table)
    check(out["softmax"], prompts, logits_of, seed=3, at_least=2000)
    check(out["entmax"], prompts, logits_of, seed=3, alpha=1.3, temperature=1.0, at_least=2000)


@slow
def test_1024_prompts_of_a_request():
    """More prompts than a graph has rows: each draws what it draws alone."""
    generator = TextGenerator.from_pretrained()
    prompts = [[i] for i in range(1024)]
    samples = generator.generate(prompts, max_new_tokens=2, seed=5, eos_token_id=-1)
    assert len(samples) == 1024 and all(len(s.tokens) == 2 for s in samples)
    for some in ([0], [31, 32, 1023]):
        alone = generator.generate([prompts[i] for i in some], max_new_tokens=2, seed=5, stream=some, eos_token_id=-1)
        assert alone == [samples[i] for i in some]
