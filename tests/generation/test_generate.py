"""TextGenerator: golden tokens, options, sizes, and bad requests."""

import collections
import concurrent.futures
import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import reference
from conftest import DATA

from gpt_neo_sampling import CheckpointError, InvalidDistributionError, TextGenerator
from gpt_neo_sampling._compat import tf
from gpt_neo_sampling.generation import generator as generate
from gpt_neo_sampling.generation import session as graphs

MESH_TF = DATA / "gpt_neo_checkpoints"
slow = pytest.mark.slow  # each size of graph, and set of options' names, costs seconds


@pytest.fixture(scope="module")
def tiny():
    return TextGenerator.from_pretrained(MESH_TF / "local")


@pytest.fixture(scope="module")
def demo():
    return TextGenerator.from_pretrained()


@pytest.mark.parametrize("name", ["global", "local", "padding_outside", "rotary"])
def test_golden_greedy_tokens_of_mesh_tf_checkpoints(name):
    golden = np.load(MESH_TF / name / "golden.npz")
    lengths = golden["lengths"]
    prompts = [row[:n].tolist() for row, n in zip(golden["prompts"], lengths)]
    samples = TextGenerator.from_pretrained(MESH_TF / name).generate(
        prompts, max_new_tokens=20, do_sample=False, eos_token_id=-1
    )
    for sample, prompt, row, n in zip(samples, prompts, golden["greedy_fast"], lengths):
        assert sample.prompt_tokens == prompt
        assert sample.tokens == row[n : n + 20].tolist()
        assert sample.text is None


def test_golden_greedy_tokens_of_a_hugging_face_folder():
    golden = np.load(DATA / "hf_gpt_neo_tiny" / "golden.npz")
    prompts = [golden[f"prompt{i}"].ravel().tolist() for i in range(3)]
    samples = TextGenerator.from_pretrained(DATA / "hf_gpt_neo_tiny").generate(
        prompts, max_new_tokens=30, temperature=0
    )
    for i, sample in enumerate(samples):
        assert prompts[i] + sample.tokens == golden[f"greedy{i}"].ravel().tolist()


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=0.8, top_k=5),
        pytest.param(dict(temperature=1.0, entmax_alpha=1.5), marks=slow),
        pytest.param(dict(), marks=slow),
        pytest.param(dict(entmax_alpha=1.3), marks=slow),
    ],
)
def test_sampled_tokens_are_those_of_numpy(tiny, options):
    """Every token against an independent forward pass, distribution and draw in float64.

    A token may differ only where the float64 draw lies within rounding of a
    border: none does at this seed.
    """
    prompt, n_new, seed = [5, 17, 101], 12, 20261122
    weights = {name: tiny.checkpoint.read(name).astype(np.float64) for name in tiny.checkpoint.names()}
    params = tiny.params
    (sample,) = tiny.generate(prompt, max_new_tokens=n_new, seed=seed, eos_token_id=-1, **options)
    ids = list(prompt)
    for step in range(n_new):
        logits = reference.gpt_neo_forward(
            weights,
            np.array([ids]),
            n_head=params["n_head"],
            attention_types=params["attention_types"],
            local_attention_radius=params["local_attention_radius"],
        )[0, -1]
        alpha = options.get("entmax_alpha", 1.0)
        scaled = logits / options.get("temperature", 1.0 if "entmax_alpha" in options else 0.9)
        if "top_k" in options:
            scaled = np.where(reference.top_k_keep(scaled, options["top_k"], -1), scaled, -np.inf)
        p = reference.entmax(scaled, alpha, -1) if alpha > 1 else reference.softmax(scaled, -1)
        words = reference.threefry2x32(np.uint32(seed), np.uint32(0), np.uint32(step), np.uint32(0))
        u1, u2 = (float(reference.bits_to_uniform(w)) for w in words)
        ids.append(int(reference.two_level_draw(p, u1, u2)))
    assert sample.tokens == ids[len(prompt) :]


@pytest.mark.parametrize(
    "dtype, bytes_a_weight",
    [
        pytest.param(None, 4, marks=slow),
        pytest.param("float32", 4, marks=slow),
        ("bfloat16", 2),
        pytest.param(tf.bfloat16, 2, marks=slow),
    ],
)
def test_dtype(dtype, bytes_a_weight):
    """Weights are held so, in one copy; greedy tokens are near-best in bfloat16, and the golden ones in float32."""
    generator = TextGenerator.from_pretrained(MESH_TF / "rotary", dtype=dtype)
    golden, checkpoint = np.load(MESH_TF / "rotary" / "golden.npz"), generator.checkpoint
    prompts = [row[:n].tolist() for row, n in zip(golden["prompts"], golden["lengths"])]
    samples = generator.generate(prompts, max_new_tokens=10, do_sample=False, eos_token_id=-1)
    variables = [v for v in generator._graphs._loaded.session.graph.get_collection("variables")]
    n_weights = sum(np.prod(checkpoint.shape(n)) for n in checkpoint.names())
    assert sum(v.dtype.size * v.shape.num_elements() for v in variables) == bytes_a_weight * n_weights
    weights = {n: checkpoint.read(n) for n in checkpoint.names()}
    options = {k: generator.params[k] for k in ("n_head", "attention_types", "rotary_emb")}
    for prompt, sample in zip(prompts, samples):
        ids = prompt + sample.tokens
        logits = reference.gpt_neo_forward(weights, np.array([ids]), **options)[0, len(prompt) - 1 : -1]
        missed = logits.max(-1) - np.take_along_axis(logits, np.array(sample.tokens)[:, None], -1)[:, 0]
        assert missed.max() < (1e-4 if bytes_a_weight == 4 else 0.05 * np.std(logits))


@pytest.mark.parametrize(
    "name, options, all_prompts",
    [
        ("local", dict(top_p=0.9, repetition_penalty=1.2), [[[5, 7, 11]], [[5, 7, 11], [7]]]),
        pytest.param("rotary", dict(top_k=5), [[[5, 7, 11]]], marks=slow),
        pytest.param("variants", dict(entmax_alpha=1.3), [[[5, 7, 11], [7]]], marks=slow),
    ],
)
def test_jit_compile(name, options, all_prompts):
    """The same tokens, in one program and, with a streamer, step by step."""
    plain, compiled = (TextGenerator.from_pretrained(MESH_TF / name, jit_compile=jit) for jit in (False, True))
    request = dict(max_new_tokens=6, seed=3, return_logprobs=True, **options)
    for prompts in all_prompts:
        wanted = plain.generate(prompts, **request)
        for streamer in (None, lambda *token: None):
            samples = compiled.generate(prompts, **request, streamer=streamer)
            assert [s.tokens for s in samples] == [s.tokens for s in wanted]
            assert all(np.allclose(a.logprobs, b.logprobs, atol=1e-5) for a, b in zip(samples, wanted))
    assert n_compiled(compiled) == 2 * len(all_prompts)


def n_compiled(generator):
    """How many programs of a generator's graphs XLA compiles."""
    graph = generator._graphs._loaded.session.graph.as_graph_def()
    nodes = [*graph.node, *(n for f in graph.library.function for n in f.node_def)]
    return sum(n.attr["_XlaMustCompile"].b for n in nodes)


def test_bfloat16_is_compiled_for_one_row_alone():
    generator = TextGenerator.from_pretrained(MESH_TF / "global", dtype="bfloat16", jit_compile=True)
    for n_rows, expected in ((2, 0), (1, 1)):
        generator.generate([[5]] * n_rows, max_new_tokens=2, seed=1)
        assert n_compiled(generator) == expected


def test_what_jit_compile_refuses():
    with pytest.raises(ValueError, match="jit_compile=1; True or False is needed"):
        TextGenerator.from_pretrained(jit_compile=1)
    with pytest.raises(ValueError, match="jit_compile: the mesh has 2 processors; a program is compiled for one"):
        TextGenerator.from_pretrained(jit_compile=True, mesh_shape="x:2", devices="cpu:0,cpu:1")


def test_ctrl_c_within_one_of_tensorflows_scopes(tiny):
    """That scope fails to close, with an error of its own; the next call works."""
    request = dict(max_new_tokens=3, seed=1)
    (before,) = tiny.generate([5, 7], **request)

    def interrupted(logits, ids, position):
        tf.get_default_graph()._add_device_to_stack("cpu:0")  # as `tf.device` does
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.generate([5, 7], logits_processors=[interrupted], **request)
    (after,) = tiny.generate([5, 7], **request)
    assert after.tokens == before.tokens


def test_a_dtype_that_is_not_allowed():
    with pytest.raises(ValueError, match="dtype='float16'; allowed: float32, bfloat16"):
        TextGenerator.from_pretrained(MESH_TF / "local", dtype="float16")


def test_same_seed_same_text_other_seed_other_text_no_seed_fresh_text(demo):
    def text(seed):
        return demo.generate("She had been", max_new_tokens=24, seed=seed, eos_token_id=-1)[0].text

    assert text(7) == text(7)
    assert len({text(seed) for seed in range(5)}) == 5
    # Chance of a false alarm: two equal texts of 24 tokens, far below 1e-9.
    assert text(None) != text(None)


@slow
def test_a_row_does_not_depend_on_the_others(demo):
    prompts = ["Emma", "Mr. Knightley was", "It was", "a", "The", "Elinor could", "No", "Captain Wentworth"]
    options = dict(max_new_tokens=8, seed=3, eos_token_id=-1)
    eight = demo.generate(prompts, **options)
    three = demo.generate(prompts[:3], **options)
    assert [s.tokens for s in three] == [s.tokens for s in eight[:3]]


def test_num_return_sequences_stand_together_and_differ(tiny):
    samples = tiny.generate([[5, 6], [7]], num_return_sequences=3, max_new_tokens=16, seed=1, eos_token_id=-1)
    assert [s.prompt_tokens for s in samples] == [[5, 6]] * 3 + [[7]] * 3
    assert len({tuple(s.tokens) for s in samples}) == 6


@slow
def test_a_request_larger_than_a_graph_goes_through_in_parts(tiny, monkeypatch):
    prompts = [[i + 1, i + 2] for i in range(7)]  # the last part has fewer
    whole = tiny.generate(prompts, max_new_tokens=4, seed=5)
    monkeypatch.setattr(generate, "MAX_BATCH", 4)
    assert tiny.generate(prompts, max_new_tokens=4, seed=5) == whole


def test_tokens_end_with_the_stop_token(tiny):
    prompt = [5, 17, 101]
    free = tiny.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=-1)[0].tokens
    assert len(free) == 20
    stop = free[7]
    stopped = tiny.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=stop)[0].tokens
    assert stopped == free[: free.index(stop) + 1]


def test_padding_in_a_prompt_is_a_token_like_any_other(tiny):
    """0 is this model's padding id."""
    prompt = [5, 0, 17, 0]
    weights = {name: tiny.checkpoint.read(name).astype(np.float64) for name in tiny.checkpoint.names()}
    expected = reference.greedy_decode(
        weights,
        [prompt],
        6,
        tiny.params["n_ctx"],
        n_head=tiny.params["n_head"],
        attention_types=tiny.params["attention_types"],
        local_attention_radius=tiny.params["local_attention_radius"],
    )
    assert prompt + tiny.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=-1)[0].tokens == expected[0]


def test_an_empty_prompt_is_the_models_first_token(demo):
    first = demo.checkpoint.generation_defaults["eos_token_id"]
    (empty,), (explicit,) = (
        demo.generate(prompt, max_new_tokens=6, seed=1, eos_token_id=-1) for prompt in ("", [first])
    )
    assert empty.prompt_tokens == [first]
    assert empty.tokens == explicit.tokens


def test_the_contexts_end_stops_generation_with_a_note(tiny, caplog):
    n_ctx = tiny.params["n_ctx"]
    (sample,) = tiny.generate([7] * (n_ctx - 3), max_new_tokens=10, eos_token_id=-1, seed=0)
    assert len(sample.tokens) == 3
    assert "context" in caplog.text
    assert tiny.generate([7] * n_ctx, max_new_tokens=1)[0].tokens == []


def test_text_is_that_of_the_new_tokens(demo):
    prompt = "It is a truth universally acknowledged, that"
    (sample,) = demo.generate(prompt, max_new_tokens=12, seed=2, eos_token_id=-1)
    assert demo.tokenizer.decode(sample.prompt_tokens) == prompt
    assert demo.tokenizer.decode(sample.prompt_tokens + sample.tokens) == prompt + sample.text


@slow
def test_mixed_requests_keep_the_number_of_graphs_and_nodes_bounded(monkeypatch):
    monkeypatch.setattr(graphs, "MAX_PROGRAMS", 2)
    generator = TextGenerator.from_pretrained(MESH_TF / "local")
    before = generator.generate([[3, 4]], max_new_tokens=3, seed=1)
    nodes = []
    for options in (dict(do_sample=False), dict(top_k=5), {}):
        after = generator.generate([[3, 4]], max_new_tokens=3, seed=1, **options)
        assert len(generator._graphs._loaded.programs) <= 2
        nodes.append(len(generator._graphs._loaded.session.graph.get_operations()))
    assert nodes[-1] < 1.5 * max(nodes[:2])
    assert after == before


def test_the_same_request_builds_nothing_more(tiny):
    def size():
        tiny.generate([[4, 5, 6]], max_new_tokens=5, temperature=0.5, top_k=3, seed=1)
        return len(tiny._graphs._loaded.session.graph.get_operations())

    assert size() == size()


RESIDENT_SET = r"""
import re
from gpt_neo_sampling.generation.generator import TextGenerator
TextGenerator.from_pretrained().generate("The family of Dashwood", max_new_tokens=64)
print(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
"""


@slow
def test_resident_set_of_64_new_tokens():
    """Peak memory in its own process. (ru_maxrss would include pytest's memory at the start.)"""
    done = subprocess.run([sys.executable, "-c", RESIDENT_SET], stdout=subprocess.PIPE, text=True, check=True)
    assert int(done.stdout) < 1.5 * 2**20  # in kB


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(temperature=-0.1), "temperature=-0.1"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(temperature="hot"), "temperature='hot'"),
        (dict(temperature=0.5, do_sample=False), "greedy"),
        (dict(top_k=-1), "top_k=-1; a whole number from 0"),
        (dict(top_k=2.5), "top_k=2.5"),
        (dict(entmax_alpha=0.9), "from 1"),
        (dict(entmax_alpha=2.1), "to 2"),
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(num_return_sequences=0), "num_return_sequences=0"),
        (dict(seed=2**32), "seed=4294967296"),
        (dict(seed=1.5), "seed=1.5"),
        (dict(eos_token_id=[1, -2]), "eos_token_id=-2"),
        (dict(pad_token_id=-2), "pad_token_id=-2"),
        (dict(top_p=1.01), "top_p=1.01; a number from 0 to 1"),
        (dict(typical_p=0), "typical_p=0; a number above 0 to 1"),
        (dict(min_p=True), "min_p=True; a number"),
        (dict(temperature=1e39), "temperature=1e+39; a finite number of at least 0"),
        (dict(repetition_penalty=1e-60), "repetition_penalty=1e-60; a finite number above 0"),
        (dict(top_k=2**31), "top_k=2147483648; a whole number from 0 to 2147483647"),
        (dict(logit_bias={3: 1e39}), "logit_bias={3: 1e+39}"),
        (dict(bad_words_ids=5), "bad_words_ids=5; a list"),
        (dict(epsilon_cutoff=1), "epsilon_cutoff=1; a number from 0 to below 1"),
        (dict(eta_cutoff=1 - 1e-12), "to below 1"),
        (dict(do_sample="no"), "do_sample='no'; True or False"),
        (dict(do_sample=True, temperature=0), "do_sample=True with temperature=0"),
        (dict(return_logprobs=1), "return_logprobs=1"),
        (dict(stream=2**31 - 1, num_return_sequences=2), "pass the largest stream"),
        (dict(min_new_tokens=9, max_new_tokens=5), "min_new_tokens=9 is more than max_new_tokens=5"),
        (dict(eos_token_id=127), "eos_token_id=127; a whole number from -1 to 126"),
        (dict(eos_token_id=[-1, 5]), "eos_token_id=-1; a whole number from 0"),
        (dict(logits_processors=print), "a list of functions"),
        (dict(logits_processors=[type("L", (), {"__call__": print, "__hash__": None})()]), "unhashable"),
        (dict(logit_bias={3: True}), "logit_bias={3: True}"),
        (dict(num_return_sequences=2**31), "num_return_sequences=2147483648"),
        (dict(repetition_penalty=0), "repetition_penalty=0; a finite number above 0"),
        (dict(presence_penalty=float("inf")), "presence_penalty=inf; a finite number"),
        (dict(no_repeat_ngram_size=-1), "no_repeat_ngram_size=-1"),
        (dict(min_new_tokens=-1), "min_new_tokens=-1"),
        (dict(logit_bias={127: 1}), "token id=127; a whole number from 0 to 126"),
        (dict(logit_bias={3: float("nan")}), "logit_bias={3: nan}"),
        (dict(logit_bias=[3]), "logit_bias=[3]; a dict"),
        (dict(bad_words_ids=[[1], []]), "bad_words_ids: []; lists of at least one token id"),
        (dict(bad_words_ids=[[1, 127]]), "bad_words_ids: token id=127; a whole number from 0 to 126"),
        (dict(bad_words="a"), "need a tokenizer"),
        (dict(bad_words=""), "bad_words=''; a text or a list of texts"),
        (dict(sequence_bias=3), "sequence_bias=3; a dict {(1, 2): -3.0}"),
        (dict(sequence_bias={(1, 2): float("nan")}), "sequence_bias: nan for [1, 2]; a finite number"),
        (dict(sequence_bias=[[5, 1.0]]), "sequence_bias: 5; sequences of at least one token id"),
        (dict(sequence_bias=[[[5, 6], 1.0], [(5, 6), 2.0]]), "sequence_bias has [5, 6] twice"),
        (dict(suppress_tokens=list(range(127))), "all 127 tokens are masked by suppress_tokens; some"),
        (
            dict(
                logit_bias={5: float("-inf")},
                bad_words_ids=[[6], [7, 8]],
                allowed_token_ids=[5, 6, 9],
                suppress_tokens=9,
            ),
            "all 127 tokens are masked by logit_bias and bad_words_ids and allowed_token_ids and suppress_tokens",
        ),
        (dict(forced_eos_token_id=[3, 4], suppress_tokens=[4, 3, 5]), "suppress_tokens has all of forced_eos_token_id"),
        (dict(suppress_tokens="x"), "suppress_tokens='x'; a list of token ids"),
        (dict(begin_suppress_tokens=[127]), "begin_suppress_tokens: token id=127; a whole number from 0 to 126"),
        (dict(allowed_token_ids=[]), "allowed_token_ids=[]; a list of token ids"),
        (dict(forced_eos_token_id=-1), "forced_eos_token_id: token id=-1; a whole number"),
        (dict(exponential_decay_length_penalty=1.5), "exponential_decay_length_penalty=1.5; a pair (start, factor)"),
        (dict(exponential_decay_length_penalty=(1, 0)), "exponential_decay_length_penalty=(1, 0); a pair"),
        (dict(exponential_decay_length_penalty=(True, 1.2)), "exponential_decay_length_penalty=(True, 1.2); a pair"),
        (
            dict(exponential_decay_length_penalty=(2**24, 2)),
            "=(16777216, 2); a pair (start, factor), a whole number below",
        ),
        (dict(exponential_decay_length_penalty=(float("inf"), 2)), "exponential_decay_length_penalty=(inf, 2); a pair"),
        (dict(exponential_decay_length_penalty=(float("nan"), 2)), "exponential_decay_length_penalty=(nan, 2); a pair"),
        (dict(do_sample=False, dry_base=2), "dry_base=2 without dry_multiplier, which it belongs to"),
        (dict(exponential_decay_length_penalty=(1.5, 2)), "exponential_decay_length_penalty=(1.5, 2); a pair"),
        (dict(min_length=4, min_new_tokens=2), "min_length=4 with min_new_tokens=2; leave one out"),
        (dict(min_length=80, max_new_tokens=5), "min_length=80 is more than a prompt of"),
        (dict(prefix_allowed_tokens_fn=5), "prefix_allowed_tokens_fn=5; a function"),
        (dict(renormalize_logits=1), "renormalize_logits=1; True or False"),
        (dict(dry_base=2), "dry_base=2 without dry_multiplier, which it belongs to"),
        (dict(dry_sequence_breakers=[5]), "dry_sequence_breakers=[5] without dry_multiplier"),
        (dict(dry_multiplier=1, dry_sequence_breakers=["x"]), "dry_sequence_breakers need a tokenizer"),
        (dict(dry_multiplier=1, dry_sequence_breakers=""), "dry_sequence_breakers=''; texts or token ids, and no text"),
        (dict(xtc_threshold=0.2), "xtc_threshold=0.2 without xtc_probability"),
        (dict(min_tokens_to_keep=2), "min_tokens_to_keep=2 without top_p or min_p or typical_p or"),
        (dict(min_tokens_to_keep=101, top_p=0.5), "min_tokens_to_keep=101; a whole number from 1 to 100"),
        (dict(mirostat=1), "mirostat=1 is not built; 2"),
        (dict(mirostat=2, top_k=40), "mirostat=2 with top_k=40; mirostat takes the place of all masks: leave one out"),
        (dict(mirostat=3), "mirostat=3; a whole number from 0 to 2"),
        (dict(mirostat_tau=-1, mirostat=2), "mirostat_tau=-1; a finite number of at least 0"),
        (dict(dynatemp_range=-1), "dynatemp_range=-1; a finite number of at least 0"),
        (dict(stop_strings=["a", ""]), "stop_strings=['a', '']"),
        (dict(stop_strings="a"), "need a tokenizer"),
        (dict(temperature=[1, 1]), "temperature has 2 values for 1 prompt;"),
        (dict(top_p=["high"]), "top_p='high'"),
        (dict(stream=[None]), "stream"),
        (dict(do_sample=False, top_p=0.5), "top_p=0.5 with do_sample=False"),
    ],
)
def test_bad_options_are_named(tiny, options, message):
    with pytest.raises(ValueError) as error:
        tiny.generate([1, 2, 3], **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("text", "no tokenizer.json"),
        ([], "no prompts or texts"),
        ([[127]], "token id 127 is outside the vocabulary; 0 to 126"),
        ([[-1]], "token id -1"),
        ([[1.5]], "token id 1.5"),
        ([[5] * 49], "at most 48"),
        (b"bytes", "prompts or texts: b'bytes'; a str"),
        ({"a": 1}, "prompts or texts: {'a': 1}"),
        (None, "prompts or texts: None"),
        ([None], "a prompt or text: None"),
        ([[True]], "token id True"),
    ],
)
def test_bad_prompts_are_named(tiny, prompts, message):
    with pytest.raises(ValueError) as error:
        tiny.generate(prompts)
    assert message in str(error.value)


def test_a_model_option_that_is_not_supported_is_named(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(MESH_TF / "rotary", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "moe_layers": [1]}))
    with pytest.raises(ValueError, match=r"moe_layers=\[1\] is not supported"):
        TextGenerator.from_pretrained(folder)


def test_a_tokenizer_that_does_not_fit_or_read(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(MESH_TF / "global", folder)
    shutil.copy(generate.DEMO_FOLDER / "tokenizer.json", folder)
    with pytest.raises(ValueError, match=r"token id \d+ is outside the vocabulary; 0 to 126 are allowed"):
        TextGenerator.from_pretrained(folder).generate("The family")
    (folder / "tokenizer.json").write_text(json.dumps({"model": 3}))
    with pytest.raises(CheckpointError, match="cannot be read as a tokenizer"):
        TextGenerator.from_pretrained(folder)


def test_the_bundled_model_is_what_its_card_says(demo):
    assert 2_000_000 <= sum(np.prod(demo.checkpoint.shape(n)) for n in demo.checkpoint.names()) <= 3_000_000
    for size in ("n_vocab", "n_ctx", "n_embd", "n_head"):
        assert demo.params[size] % 8 == 0
    assert sum(f.stat().st_size for f in generate.DEMO_FOLDER.iterdir()) <= 8 * 2**20


def test_text_without_a_tokenizer_names_the_datasets(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(MESH_TF / "global", folder, copy_function=shutil.copyfile)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "datasets": ["pile"]}))
    (folder / "dataset_configs").mkdir()
    (folder / "dataset_configs" / "pile.json").write_text(json.dumps({"tokenizer_path": "gpt2"}))
    with pytest.raises(ValueError, match="its dataset config names gpt2, which is not downloaded.*give token ids"):
        TextGenerator.from_pretrained(folder).generate("text")


# --- A value for each prompt, and what came out ------------------------------------------


@pytest.fixture
def mixed():
    """(prompts, options that each has its own of)."""
    rng = np.random.default_rng(3)
    return [rng.integers(2, 127, n).tolist() for n in (3, 9, 1, 5, 4)], dict(
        temperature=[0.5, None, 0, 1.5, 1],
        top_k=[None, 5, None, 90, 3],
        top_p=[0.9, None, None, 0.5, None],
        entmax_alpha=[None, None, None, 1.5, None],
        repetition_penalty=[None, 1.5, None, None, 0.5],
        max_new_tokens=[9, 3, 12, 1, 7],
        min_new_tokens=[None, 3, None, None, None],
        seed=[1, 2, 3, 4, 4],
        stream=[7, 0, 0, 5, -2],
    )


def test_each_prompt_has_its_own_options_in_any_order(tiny, mixed):
    prompts, options = mixed
    together = tiny.generate(prompts, **options)
    assert [len(sample.tokens) for sample in together] == options["max_new_tokens"]
    assert tiny.generate(prompts[::-1], **{name: column[::-1] for name, column in options.items()}) == together[::-1]


@slow
@pytest.mark.parametrize("i", [1, 2, 3])
def test_each_prompt_has_its_own_options_as_if_alone(tiny, mixed, i):
    prompts, options = mixed
    together = tiny.generate(prompts, **options)
    assert tiny.generate(prompts[i], **{name: column[i] for name, column in options.items()}) == together[i : i + 1]


@slow
def test_more_samples_than_a_batch_takes(tiny):
    n, options = generate.MAX_BATCH + 3, dict(max_new_tokens=5, seed=6, return_logprobs=True)
    samples = tiny.generate([[5, 6], [7]], num_return_sequences=n, **options)
    assert len({tuple(s.tokens) for s in samples}) > n
    for i in (0, 1, n - 1, n, 2 * n - 1):
        assert tiny.generate([[5, 6], [7]][i // n], stream=np.array(i), **options)[0].tokens == samples[i].tokens


@slow
def test_log_probabilities_are_those_of_score(demo):
    prompt = "It was the duty of"
    (sample,) = demo.generate(prompt, max_new_tokens=20, seed=1, temperature=0.5, top_k=20, return_logprobs=True)
    (score,) = demo.score([sample.prompt_tokens + sample.tokens])
    n = len(sample.prompt_tokens)
    np.testing.assert_allclose(sample.logprobs, score.logprobs[n:], atol=2e-5)
    (greedy,) = demo.generate(prompt, max_new_tokens=5, do_sample=False, return_logprobs=True)
    assert greedy.draw_logprobs == [0.0] * 5 and demo.generate(prompt, max_new_tokens=5)[0].logprobs is None


@slow
def test_samples_beside_one_without_a_distribution(tiny):
    """All tokens of one prompt are masked: the error has the samples of the others."""
    banned, options = [[t] for t in range(127) if t != 9], dict(seed=1, max_new_tokens=3, eos_token_id=-1)
    with pytest.raises(InvalidDistributionError, match="sample 0, step 0: .* every token is masked") as error:
        tiny.generate([[5, 9], [5, 6]], bad_words_ids=banned, no_repeat_ngram_size=1, **options)
    assert error.value.sample == 0 and error.value.samples == [None, None]
    with pytest.raises(InvalidDistributionError) as error:
        tiny.generate(
            [[5, 9], [5, 6]], bad_words_ids=banned, no_repeat_ngram_size=1, **{**options, "max_new_tokens": 1}
        )
    assert error.value.samples[0] is None and error.value.samples[1].tokens == [9]


@slow
def test_stop_tokens_and_finish_reasons(tiny):
    prompt, options = [5, 17, 101], dict(seed=1, max_new_tokens=29)
    (whole,) = tiny.generate(prompt, eos_token_id=-1, **options)
    stops = [whole.tokens[12], whole.tokens[6]]
    (stopped,) = tiny.generate(prompt, eos_token_id=stops, **options)
    end = min(whole.tokens.index(t) for t in stops) + 1
    assert (stopped.tokens, stopped.finish_reason) == (whole.tokens[:end], "stop")
    unused, *_ = set(range(127)) - set(whole.tokens)
    (last,) = tiny.generate(prompt, eos_token_id=[whole.tokens[-1], unused], **options)
    assert last.finish_reason == "stop" and whole.finish_reason == "length"
    never = set(whole.tokens) - set(stops)
    (later,) = tiny.generate(
        prompt, eos_token_id=stops, min_new_tokens=20, bad_words_ids=[[t] for t in never], **options
    )
    assert len(later.tokens) >= 20 and not set(later.tokens[:20]) & set(stops) and not set(later.tokens) & never


# --- A function that says what may come next ----------------------------------------------


def test_a_prefix_function_is_asked_about_each_sample(tiny):
    """With the sample's index and its ids so far; not about rows that have ended, nor those that fill a batch."""
    asked = collections.defaultdict(list)

    def next_of(index, ids):
        asked[index].append(ids.tolist())
        return [10 + index] if len(ids) < 4 else [20 + index, 7]

    samples = tiny.generate(
        [[5, 6], [5], [8, 9, 5]], num_return_sequences=2, prefix_allowed_tokens_fn=next_of, max_new_tokens=[6, 2, 4],
        eos_token_id=7, seed=3,
    )  # fmt: skip
    assert sorted(asked) == list(range(6))
    for index, sample in enumerate(samples):
        new = sample.tokens
        assert [ids[len(sample.prompt_tokens) :] for ids in asked[index]] == [new[:n] for n in range(len(new))]
        n_first = max(0, 4 - len(sample.prompt_tokens))
        assert new[:n_first] == [10 + index] * min(n_first, len(new))
        assert set(new[n_first:]) <= {20 + index, 7}
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}


def test_a_prefix_function_holds_for_greedy_decoding_and_inspect(tiny):
    allowed = [3, 50, 51]
    sample = tiny.generate([[5, 6]], prefix_allowed_tokens_fn=lambda *_: allowed, do_sample=False, max_new_tokens=3)[0]
    steps = tiny.inspect([5, 6], prefix_allowed_tokens_fn=lambda *_: allowed, do_sample=False)
    assert set(sample.tokens) <= set(allowed)
    assert [step.name for step in steps] == ["model", "prefix_allowed_tokens_fn", "argmax"]
    assert np.flatnonzero(steps[1].probabilities).tolist() == allowed


def test_another_prefix_function_takes_the_same_graph(tiny):
    graphs = set()
    for allowed in ([3], [50], {51}):
        sample = tiny.generate([[5, 6]], prefix_allowed_tokens_fn=lambda *_: allowed, max_new_tokens=3)[0]  # noqa: B023
        assert set(sample.tokens) == set(allowed)
        graphs.add(tuple(map(id, tiny._graphs._loaded.programs.values())))
    assert len(graphs) == 1


@pytest.mark.parametrize(
    "found, message",
    [([], "gave \\[\\] for row 0; a list of at least one id"), ([127], "gave 127 for row 0; token ids from 0 to 126"),
     (5, "gave 5 for row 0; a list of"), ([True], "gave True for row 0")],
)  # fmt: skip
def test_what_a_prefix_function_gives_is_checked(tiny, found, message):
    with pytest.raises(ValueError, match=f"prefix_allowed_tokens_fn {message}"):
        tiny.generate([[5, 6]], prefix_allowed_tokens_fn=lambda *_: found, max_new_tokens=2)


def test_an_error_of_a_prefix_function_is_raised(tiny):
    def fails(index, ids):
        raise KeyError("my own")

    with pytest.raises(KeyError, match="my own"):
        tiny.generate([[5, 6]], prefix_allowed_tokens_fn=fails, max_new_tokens=2, streamer=print)
    with pytest.raises(SystemExit, match="enough"):
        tiny.generate([[5, 6]], prefix_allowed_tokens_fn=lambda *_: sys.exit("enough"), max_new_tokens=2)
    with pytest.raises(ValueError, match="generate_each has no prefix_allowed_tokens_fn"):
        list(tiny.generate_each([[5, 6]], [0], prefix_allowed_tokens_fn=fails))
    compiled = TextGenerator(tiny.checkpoint, jit_compile=True)
    with pytest.raises(ValueError, match="prefix_allowed_tokens_fn needs jit_compile=False"):
        compiled.generate([[5, 6]], prefix_allowed_tokens_fn=fails)


def test_each_thread_gets_its_own_error_of_a_prefix_function(tiny):
    def fails(index, ids):
        time.sleep(0.002)
        raise KeyError(int(ids[0]))

    def errors(token):
        found = []
        for _ in range(8):
            with pytest.raises(KeyError) as error:
                tiny.generate([[token]], prefix_allowed_tokens_fn=fails, max_new_tokens=2)
            found.append(error.value.args[0])
        return found

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert [set(found) for found in pool.map(errors, [5, 6])] == [{5}, {6}]


def test_a_row_may_switch_off_what_others_have(tiny):
    """A number that belongs to a control is no mistake where that is given, were it as what changes nothing."""
    options = dict(max_new_tokens=6, seed=2, stream=[4, 4], temperature=1.5)
    own = dict(xtc_probability=[0, 1.0], xtc_threshold=0.01, dry_multiplier=[2.0, 0], dry_allowed_length=1)
    both = tiny.generate([[5, 6], [5, 6]], **options, **own)
    dry = tiny.generate([[5, 6]], **{**options, "stream": 4}, dry_multiplier=2.0, dry_allowed_length=1)
    xtc = tiny.generate([[5, 6]], **{**options, "stream": 4}, xtc_probability=1.0, xtc_threshold=0.01)
    assert [sample.tokens for sample in both] == [dry[0].tokens, xtc[0].tokens]
