"""What is told about drawn tokens beside them: log-probabilities of the likeliest, ranks, and those of the prompt."""

import functools
import json

import numpy as np
import pytest
import reference
from conftest import DATA
from helpers_loop import BATCH, INFINITE, LENGTH, NAN, NOTHING, TIES, VOCAB, Bigram, bigram_logits, loops, prompts_of
from programs import MeshRunner

from gpt_neo_sampling import InvalidDistributionError, TextGenerator, generate_file
from gpt_neo_sampling.cli import main as cli
from gpt_neo_sampling.generation import generator as generator_module
from gpt_neo_sampling.generation import prompts_file

PROMPT, TOP = 5, 7
PROMPTS = prompts_of([PROMPT] * BATCH)
ANSWERS = dict(seed=3, stop_at_token=None, return_logprobs=True, top_logprobs=TOP)
CASES = {
    "softmax": dict(temperature=1.3),
    "greedy": dict(temperature=0),
    "top_k": dict(sampling_keep_top_k=3, max_steps=4, remove_partial_sequences=True),
    "shorter": dict(max_length=LENGTH - 2, top_p=0.9, repetition_penalty=1.3),
    "padded": dict(params={"n_vocab": VOCAB - 3}),
}


@functools.cache
def out(mesh_shape="", layout=""):
    """Of a model with many equal logits."""
    told = {name: {**ANSWERS, **options} for name, options in CASES.items()}
    plain = {f"plain {name}": {**ANSWERS, **options, "return_logprobs": False, "top_logprobs": 0}
             for name, options in CASES.items()}  # fmt: skip
    return loops({**told, **plain}, Bigram(), table=TIES, runner=MeshRunner(mesh_shape, layout))(PROMPTS)


@pytest.mark.parametrize(
    "mesh_shape, layout", [("", ""), pytest.param("x:2,y:2", "batch:x,vocab:y", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", CASES)
def test_ranks_and_the_likeliest(name, mesh_shape, layout):
    ids, logprobs, draw_logprobs, ranks, top_ids, top_logprobs = out(mesh_shape, layout)[name]
    np.testing.assert_array_equal(ids, out(mesh_shape, layout)[f"plain {name}"])
    assert ranks.shape == ids.shape and top_ids.shape == top_logprobs.shape == (*ids.shape, TOP)
    options, logits_of = CASES[name], bigram_logits(TIES)
    begin = 0 if "remove_partial_sequences" in options else PROMPT
    end = begin + options.get("max_steps", options.get("max_length", LENGTH) - PROMPT)
    vocab = options.get("params", {}).get("n_vocab", VOCAB)
    for row in range(BATCH):
        tokens = PROMPTS[row, :PROMPT].tolist()
        for at in range(begin, end):
            x = logits_of(tokens)[:vocab].astype(np.float64)
            order, log_p = np.argsort(-x, kind="stable"), np.log(reference.softmax(x))
            token = ids[row, at]
            assert ranks[row, at] == 1 + order.tolist().index(token)
            np.testing.assert_array_equal(top_ids[row, at], order[:TOP])
            np.testing.assert_allclose(top_logprobs[row, at], log_p[order[:TOP]], atol=2e-6)
            tokens.append(int(token))
        elsewhere = np.r_[0:begin, end:LENGTH]
        assert not any(x[row, elsewhere].any() for x in (ranks, top_ids, top_logprobs))
    if name == "greedy":
        assert (ranks[:, begin:end] == 1).all()
    in_top = ranks <= TOP
    same = np.take_along_axis(top_logprobs, np.minimum(np.maximum(ranks - 1, 0), TOP - 1)[..., None], -1)[..., 0]
    np.testing.assert_array_equal(np.where(in_top, same, 0), np.where(in_top, logprobs, 0))


def test_a_row_without_a_distribution_has_no_likeliest():
    """Nor a rank: its model gives NaN, +inf or −inf alone after some tokens."""
    prompts = prompts_of([PROMPT] * BATCH)
    prompts[:3, PROMPT - 1] = NAN, INFINITE, NOTHING
    told = loops({"all": {**ANSWERS, "params": {"spoiled": True}, "max_steps": 1}}, Bigram())(prompts)["all"]
    ids, _, _, ranks, top_ids, top_logprobs = (x[:, PROMPT] for x in told)
    assert (ids[:3] == -1).all() and (ids[3:] >= 0).all()
    assert not ranks[:3].any() and not top_ids[:3].any() and np.isnan(top_logprobs[:3]).all()
    assert (ranks[3:] > 0).all() and np.isfinite(top_logprobs[3:]).all()


@pytest.mark.parametrize(
    "options, message",
    [(dict(top_logprobs=-1), "top_logprobs=-1; a whole number from 0 to"),
     (dict(top_logprobs=VOCAB + 1), f"top_logprobs={VOCAB + 1}; a whole number from 0 to {VOCAB} "),
     (dict(return_logprobs=False), "top_logprobs=7 needs return_logprobs=True")],
)  # fmt: skip
def test_loops_that_cannot_answer(options, message):
    with pytest.raises(ValueError, match=message):
        loops({"bad": {**ANSWERS, **options}}, Bigram(), batch=1)


# --- TextGenerator, files and the command ------------------------------------------------------

OPTIONS = dict(top_logprobs=4, return_prompt_logprobs=True, max_new_tokens=5, num_return_sequences=2, top_p=0.9)
TEXTS = ["Emma was", "She had no doubt", "A"]


@pytest.fixture(scope="module")
def demo():
    return TextGenerator.from_pretrained()


@pytest.fixture(scope="module")
def samples(demo):
    return demo.generate(TEXTS, seed=5, **OPTIONS)


def test_samples_have_their_answers(demo, samples):
    plain = demo.generate(TEXTS, seed=5, max_new_tokens=5, num_return_sequences=2, top_p=0.9, return_logprobs=True)
    for sample, without in zip(samples, plain, strict=True):
        assert (sample.tokens, sample.logprobs) == (without.tokens, without.logprobs)
        assert without.ranks is without.top_logprobs is without.prompt_logprobs is None
        assert "ranks" not in without.as_dict()
        assert len(sample.ranks) == len(sample.top_logprobs) == len(sample.tokens)
        for token, logprob, rank, top in zip(sample.tokens, sample.logprobs, sample.ranks, sample.top_logprobs):
            assert [p for _, p in top] == sorted((p for _, p in top), reverse=True) and len(top) == 4
            if rank <= 4:
                assert top[rank - 1] == (token, logprob)
            else:
                assert logprob <= top[-1][1]


def test_a_prompts_log_probabilities_are_its_score(demo, samples):
    scores = demo.score(TEXTS[:2])
    for sample, score in zip(samples[::2], scores):
        assert sample.prompt_logprobs == score.logprobs
    assert samples[0].prompt_logprobs == samples[1].prompt_logprobs
    assert samples[4].prompt_logprobs == [None]  # of one token
    assert len(samples[4].prompt_tokens) == 1


def test_a_prompt_that_has_no_distribution():
    generator = TextGenerator.from_pretrained(DATA / "hf_gpt_neo_tiny")
    generator._logprobs = lambda rows: [np.full(len(row) - 1, np.nan) for row in rows]
    with pytest.raises(InvalidDistributionError, match="prompt 0: the logits hold NaN") as error:
        generator.generate([[5, 6], [7]], max_new_tokens=1, return_prompt_logprobs=True, eos_token_id=-1)
    assert error.value.samples[0] is None and error.value.samples[1].prompt_logprobs == [None]


def test_a_file_has_them_too(demo, tmp_path, monkeypatch):
    """In batches and through the pool, of rows that replace one another."""
    lines = [{"prompt": text} for text in TEXTS]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {}
    for most_rows in (32, 2):
        for module in (generator_module, prompts_file):
            monkeypatch.setattr(module, "MAX_BATCH", most_rows)
        generate_file(demo, tmp_path / "in.jsonl", tmp_path / f"{most_rows}.jsonl", seed=5, **OPTIONS)
        found[most_rows] = [json.loads(line) for line in (tmp_path / f"{most_rows}.jsonl").read_text().splitlines()]
    for batched, pooled in zip(found[32], found[2], strict=True):
        for one, other in zip(batched["samples"], pooled["samples"], strict=True):
            assert one.keys() == other.keys() >= {"ranks", "top_logprobs", "prompt_logprobs"}
            assert (one["tokens"], one["ranks"]) == (other["tokens"], other["ranks"])
            for a, b in zip(one["top_logprobs"], other["top_logprobs"], strict=True):
                np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_command_prints_them(capfd, demo, samples, monkeypatch):
    monkeypatch.setattr(TextGenerator, "from_pretrained", lambda *args, **kwargs: demo)
    line = [
        "generate",
        *TEXTS,
        "--seed",
        "5",
        "--max-new-tokens",
        "5",
        "--num-samples",
        "2",
        "--top-p",
        "0.9",
        "--json",
    ]
    assert cli.main([*line, "--top-logprobs", "4", "--prompt-logprobs"]) == 0
    printed = json.loads(capfd.readouterr().out)["samples"]
    assert printed == json.loads(json.dumps([sample.as_dict() for sample in samples]))
    assert cli.main(["generate", "a", "--top-logprobs", "4"]) == 2
    assert "--top-logprobs needs --json or --output" in capfd.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [(dict(top_logprobs="x"), "top_logprobs='x'; a whole number from 0 to 1024"),
     (dict(top_logprobs=5000), "top_logprobs=5000; a whole number from 0 to 1024"),
     (dict(return_prompt_logprobs=1), "return_prompt_logprobs=1; True or False")],
)  # fmt: skip
def test_what_cannot_be_answered(demo, options, message):
    with pytest.raises(ValueError, match=message):
        demo.generate("a", **options)
