"""Which options of a model's generation_config.json take effect."""

import json
import shutil

import numpy as np
import pytest
from conftest import DATA
from helpers_checkpoint import make_hugging_face
from test_cli import main

from gpt_neo_sampling import TextGenerator, export_saved_model, generate_file
from gpt_neo_sampling.checkpoint import open_checkpoint
from gpt_neo_sampling.generation.generator import DEMO_FOLDER
from gpt_neo_sampling.generation.request import DEFAULT_NEW_TOKENS

slow = pytest.mark.slow  # each size of graph, and set of options' names, costs seconds


@pytest.fixture
def asking(tmp_path):
    """A function: the tiny Hugging Face model with this in its generation_config.json."""

    def make(**generation):
        folder = tmp_path / "asking"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(DATA / "hf_gpt_neo_tiny", folder, copy_function=shutil.copyfile)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": -1, **generation}))
        return TextGenerator.from_pretrained(folder)

    return make


# What GenerationConfig of transformers 4.57 and 5 makes of a file, and of one with arguments of generate beside it.
@pytest.mark.parametrize(
    ("file", "options", "temperature", "top_k", "top_p"),
    [
        ({}, {}, 0.9, 0, 1),  # the library's own, where the file has ids alone
        ({"repetition_penalty": 1.2, "max_new_tokens": 9}, {}, 0.9, 0, 1),
        ({}, {"entmax_alpha": 1.3}, 1, 0, 1),
        ({"do_sample": True}, {}, 1, 50, 1),
        ({"do_sample": True}, {"temperature": 0.7}, 0.7, 50, 1),
        ({"do_sample": True}, {"top_k": 0}, 1, 0, 1),
        ({"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 0.5}, {}, 0.8, 0, 0.5),
        ({"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 0.5}, {"top_p": 1, "top_k": 7}, 0.8, 7, 1),
        ({"do_sample": True, "temperature": None, "top_k": None}, {}, 1, 50, 1),  # as transformers 5; in 4 k is off
        ({"do_sample": True}, {"do_sample": False}, 0, 0, 1),
        ({"do_sample": False}, {}, 0, 0, 1),
        ({"do_sample": False}, {"do_sample": True}, 1, 50, 1),
        ({"do_sample": False, "temperature": 0.8}, {"do_sample": True}, 0.8, 50, 1),
        ({"do_sample": False}, {"temperature": 0.7}, 0.7, 50, 1),
        ({"temperature": 0.8}, {}, 0, 0, 1),
        ({"temperature": 0.8}, {"top_p": 0.5}, 0.8, 50, 0.5),
        ({"top_p": 0.5}, {"do_sample": True}, 1, 50, 0.5),
    ],
)
def test_what_is_drawn_from(asking, file, options, temperature, top_k, top_p):
    values = asking(**file).check([[5]], **options).values
    found = [values[name].item() for name in ("temperature", "top_k", "top_p")]
    assert found == [np.float32(temperature), top_k, top_p]


def test_a_file_that_samples_only_where_asked_says_so(asking, caplog):
    asking(do_sample=False, temperature=0.8)
    asking(do_sample=True, temperature=0.8)
    asking(repetition_penalty=1.2)
    assert caplog.text == ""
    asking(temperature=0.8, top_p=0.9)
    assert "no do_sample, so requests are greedy, as in transformers; " in caplog.text
    assert "(temperature, top_p)" in caplog.text


def test_options_of_an_old_config_are_named(tmp_path, caplog):
    """transformers reads these if there is no generation_config.json."""
    neutral = dict(top_k=50, max_length=20, num_beams=1, do_sample=False, bad_words_ids=None, min_length=0,
                   task_specific_params={"text-generation": {"do_sample": True}})  # fmt: skip
    odd = dict(temperature=0.7, typical_p=0, num_return_sequences=3, length_penalty=2.0)
    make_hugging_face(tmp_path / "m", {**neutral, **odd})
    assert "temperature" not in open_checkpoint(tmp_path / "m").generation_defaults
    assert "ignored: temperature=0.7, typical_p=0, num_return_sequences=3, length_penalty=2.0" in caplog.text
    caplog.clear()
    (tmp_path / "m" / "generation_config.json").write_text("{}")
    open_checkpoint(tmp_path / "m")
    open_checkpoint(make_hugging_face(tmp_path / "plain", neutral))
    assert caplog.text == ""


# All that GenerationConfig() of transformers 4.57 and 5 would write of its defaults, but for ids and sampling.
DEFAULTS = dict(
    max_length=20, max_new_tokens=None, min_length=0, min_new_tokens=None, early_stopping=False, max_time=None,
    stop_strings=None, num_beams=1, num_beam_groups=1, penalty_alpha=None, dola_layers=None, use_cache=True,
    cache_implementation=None, cache_config=None, return_legacy_cache=None, prefill_chunk_size=None,
    diversity_penalty=0.0, repetition_penalty=1.0, encoder_repetition_penalty=1.0, length_penalty=1.0,
    no_repeat_ngram_size=0, bad_words_ids=None, force_words_ids=None, renormalize_logits=False, constraints=None,
    forced_bos_token_id=None, forced_eos_token_id=None, remove_invalid_values=False,
    exponential_decay_length_penalty=None, suppress_tokens=None, begin_suppress_tokens=None, sequence_bias=None,
    token_healing=False, guidance_scale=None, low_memory=None, watermarking_config=None, num_return_sequences=1,
    output_attentions=False, output_hidden_states=False, output_scores=False, output_logits=None,
    return_dict_in_generate=False, encoder_no_repeat_ngram_size=0, decoder_start_token_id=None, is_assistant=False,
    num_assistant_tokens=20, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.4,
    prompt_lookup_num_tokens=None, max_matching_ngram_size=None, assistant_early_exit=None, assistant_lookbehind=10,
    target_lookbehind=10, compile_config=None, disable_compile=False, generation_kwargs={},
    _from_model_config=True, transformers_version="4.57.6",
)  # fmt: skip


def test_what_changes_nothing_is_passed_over(asking, caplog):
    other = dict(early_stopping=True, use_cache=False, output_scores=True, renormalize_logits=True, penalty_alpha=0.0,
                 decoder_start_token_id=0, prompt_lookup_num_tokens=3, low_memory=True)  # fmt: skip
    for file in (DEFAULTS, {**DEFAULTS, **other}):
        assert asking(**file).checkpoint.ignored_generation_options == {}
    assert caplog.text == ""


def test_words_that_are_banned(asking, caplog):
    def banned(model, **options):
        sequences = model.check([[5]], **options).sequences.get("bad_words_ids")
        if sequences is None:
            return []
        lasts = sequences.members[:, 0]
        return sorted([*sequences.before[i, : sequences.lengths[i]][::-1].tolist(), last]
                      for i, last in zip(lasts, sequences.last.tolist()) if last >= 0)  # fmt: skip

    model = asking(bad_words_ids=[[7], [8, 9], [12]])
    assert caplog.text == ""
    assert banned(model) == [[7], [8, 9], [12]]
    assert banned(model, bad_words_ids=[]) == []
    assert banned(model, bad_words_ids=[[3]]) == [[3]]


def test_min_length_counts_the_prompt(asking):
    def least(model, **options):
        values = model.check([[5] * 4, [5] * 12], **options).values
        return values["min_length"].tolist(), values["min_new_tokens"].tolist()

    model = asking(min_length=10)
    assert least(model) == ([10, 10], [0, 0])
    assert least(model, min_new_tokens=[None, 2]) == ([10, 0], [0, 2])  # as in transformers
    assert least(model, min_new_tokens=0) == ([0, 0], [0, 0])
    assert least(model, min_length=3) == ([3, 3], [0, 0])
    assert least(asking(min_length=10, min_new_tokens=3)) == ([0, 0], [3, 3])
    assert least(asking(min_new_tokens=3), min_length=6) == ([6, 6], [0, 0])


def test_inspect_counts_new_tokens_as_min_length_does(asking):
    model = asking(min_length=4)
    before, behind = (model.inspect([5, 6], new, eos_token_id=9, do_sample=False) for new in ([7], [7, 8]))
    assert before[-2].probabilities[9] == 0 < behind[-2].probabilities[9]


def test_number_of_samples(asking, tmp_path, capfd, monkeypatch):
    model = asking(num_return_sequences=3, max_new_tokens=2)
    request = model.check([[5], [6]])
    assert (request.num_return_sequences, request.values["stream"].tolist()) == (3, [0, 3])
    assert model.check([[5], [6]], num_return_sequences=1).num_return_sequences == 1
    (tmp_path / "in.jsonl").write_text('{"prompt_ids": [5]}\n')
    generate_file(model, tmp_path / "in.jsonl", tmp_path / "out.jsonl", seed=1)
    samples = json.loads((tmp_path / "out.jsonl").read_text())["samples"]
    assert len(samples) == 3
    monkeypatch.setattr(TextGenerator, "from_pretrained", lambda *args, **kwargs: model)
    status, out, err = main(capfd, "generate", "--prompt-ids", "5", "--seed", 1)
    assert (status, err) == (0, "5 \n")
    assert [list(map(int, line.split())) for line in out.splitlines()] == [s["tokens"] for s in samples]


def test_lines_of_a_file_have_the_models_number_of_samples(asking, tmp_path):
    """The model's default counts in the numbering of random streams too."""
    calls = []
    model = asking(num_return_sequences=3, max_new_tokens=2)
    model.generate = lambda prompts, **options: calls.append((options["num_return_sequences"], options["stream"])) or []
    (tmp_path / "in.jsonl").write_text('{"prompt_ids": [5]}\n{"prompt_ids": [5], "num_return_sequences": 1}\n' * 2)
    generate_file(model, tmp_path / "in.jsonl", tmp_path / "out.jsonl", seed=1)
    assert calls == [(3, [0, 4]), (1, [3, 7])]


def test_stop_strings(tmp_path, asking, caplog):
    """Strings that cannot occur in text are logged: with a special token, or without a tokenizer."""
    folder = shutil.copytree(DEMO_FOLDER, tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({"stop_strings": [" handsome", "<|endoftext|>"]}))
    model = TextGenerator.from_pretrained(folder)
    assert "are ignored, as no text holds a special token: '<|endoftext|>'" in caplog.text
    for given, used in ((None, (" handsome",)), ([], ()), ("x", ("x",))):
        assert model.check("Elizabeth", stop_strings=given).stop_strings == used
    caplog.clear()
    assert asking(stop_strings="x").check([5]).stop_strings == ()
    assert "are ignored, as there is no tokenizer: 'x'" in caplog.text


def test_the_command_tells_none_from_not_given(monkeypatch, capfd):
    calls = []

    def check(self, prompts, **options):
        calls.append([options[n] for n in ("stop_strings", "bad_words_ids", "num_return_sequences")])
        raise ValueError("seen")

    monkeypatch.setattr(TextGenerator, "check", check)
    for more in ([], ["--stop-strings", "--bad-words-ids"], ["--bad-words-ids", 7, 8, "--num-samples", 1]):
        assert main(capfd, "generate", "--prompt", "Emma", *more)[0] == 2
    assert calls == [[None, None, None], [[], [], None], [None, [[7], [8]], 1]]


def test_export_names_what_it_does_not_take_over(asking, tmp_path, caplog, monkeypatch):
    asking(do_sample=True, penalty_alpha=0.9)
    monkeypatch.setattr("gpt_neo_sampling.generation.export._write", lambda *args: None)  # which takes seconds
    monkeypatch.setattr("gpt_neo_sampling.generation.export._write_extras", lambda *args: None)
    export_saved_model(tmp_path / "saved", tmp_path / "asking", batch=1, length=8)
    assert "requests have to give them: do_sample=True, temperature=1.0, top_k=50, penalty_alpha=0.9" in caplog.text


def test_the_models_options_are_used_where_none_are_given(asking):
    plain, prompt = asking(), [5, 17, 101]
    options = dict(do_sample=True, temperature=0.7, top_k=5, max_new_tokens=12)
    drawn = plain.generate(prompt, seed=3, **options)
    hot = plain.generate(prompt, seed=3, **{**options, "temperature": 1.5})
    assert drawn != hot
    model = asking(**options, num_beams=1)
    assert model.generate(prompt, seed=3) == drawn
    assert model.generate(prompt, seed=3, temperature=1.5) == hot


@slow
def test_a_model_may_ask_for_greedy_tokens(asking):
    plain, prompt = asking(), [5, 17, 101]
    greedy = plain.generate(prompt, max_new_tokens=12, do_sample=False)
    assert asking(top_k=5, max_new_tokens=12).generate(prompt, do_sample=False) == greedy
    model = asking(do_sample=False, temperature=0.7, max_new_tokens=12)
    assert model.generate(prompt) == greedy
    options = dict(seed=3, temperature=0.7, top_k=5, max_new_tokens=12)
    assert model.generate(prompt, **options) == plain.generate(prompt, **options) != greedy


@slow
@pytest.mark.parametrize(
    ("file", "tokens"),
    [
        ({"do_sample": False, "bad_words_ids": [[139], [144]], "eos_token_id": [139, 13], "min_length": 8},
         [[29, 123, 110, 116, 29, 139], [71, 11, 71, 125, 140, 94, 190, 149, 30, 116, 94, 155], [127, 127, 13]]),
        ({"top_k": 5, "repetition_penalty": 1.3, "eos_token_id": 139},
         [[29, 139], [71, 144, 51, 191, 116, 85, 29, 161], [139]]),
    ],
)  # fmt: skip
def test_greedy_tokens_of_transformers(asking, file, tokens):
    """The tokens that its generate (4.57.6 and 5.24.0) gave for each prompt alone."""
    model = asking(**file, max_new_tokens=len(tokens[1]))
    assert [s.tokens for s in model.generate([[5, 17, 101, 7], [9], [200, 3, 3, 3, 3, 3]])] == tokens


@slow
def test_the_models_options_can_be_switched_off(asking):
    plain, prompt = asking(), [5, 17, 101]
    model = asking(do_sample=True, top_k=2, no_repeat_ngram_size=1, top_p=0.5, temperature=2.0)
    off = dict(top_k=0, no_repeat_ngram_size=0, top_p=1.0, temperature=0.9)
    options = dict(seed=3, max_new_tokens=20)
    assert model.generate(prompt, **options) != plain.generate(prompt, **options)
    assert model.generate(prompt, **options, **off) == plain.generate(prompt, **options)


@slow
def test_a_prompt_that_asks_for_nothing_is_greedy_beside_one_that_samples(asking):
    model, prompt = asking(do_sample=False, top_k=50), [5, 17, 101]
    options = dict(seed=3, max_new_tokens=12)
    greedy, sampled = model.generate([prompt, prompt], temperature=[None, 0.7], **options)
    assert [greedy] == model.generate(prompt, **options)
    assert [sampled] == model.generate(prompt, temperature=0.7, stream=1, **options)


@pytest.mark.parametrize(
    "bad",
    [dict(max_new_tokens=0), dict(max_new_tokens=2**40), dict(typical_p=0), dict(top_k=-1),
     dict(no_repeat_ngram_size=-1),
     dict(num_return_sequences=0), dict(bad_words_ids=[[211]]), dict(bad_words_ids=[[]]), dict(bad_words_ids=[7]),
     dict(stop_strings=["a", ""]), dict(stop_strings=5)],
)  # fmt: skip
def test_a_default_out_of_range_is_the_configs_fault(asking, bad):
    with pytest.raises(ValueError, match=f"generation_config.json: {min(bad)}(=| is |: token id=)"):
        asking(do_sample=True, **bad).generate([5])


@slow
def test_max_length_counts_the_prompt(asking):
    model = asking(max_length=10)
    assert len(model.generate([5] * 4)[0].tokens) == 6
    assert len(model.generate([5] * 4, max_new_tokens=9)[0].tokens) == 9
    with pytest.raises(ValueError, match="a prompt of 10 tokens leaves nothing of max_length=10"):
        model.generate([5] * 10)
    assert len(asking(max_length=10, max_new_tokens=3).generate([5] * 12)[0].tokens) == 3
    assert len(asking(top_k=0).generate([5] * 4)[0].tokens) == DEFAULT_NEW_TOKENS - 4  # the context ends


def test_what_is_not_built_is_named_once(asking, caplog):
    asking(penalty_alpha=0.9, length_penalty=1.2, num_beams=1, use_cache=False, transformers_version="5")
    assert caplog.text.count("\n") == 1
    assert "ignored: penalty_alpha=0.9, length_penalty=1.2" in caplog.text


def test_mirostat_and_dry_of_a_model(asking):
    """mirostat stands in place of the masks that a file leaves out; a request may switch DRY off."""
    model = asking(do_sample=True, mirostat=2)
    assert {"mirostat"} <= model.check([[5]]).steps and "top_k" not in model.check([[5]]).steps
    assert model.check([[5]], top_k=9).steps == {"top_k"}
    for own in (dict(mirostat=1), dict(mirostat=2, top_k=5), dict(mirostat=2, entmax_alpha=1.3)):
        with pytest.raises(ValueError, match=r"^the model's generation_config\.json: mirostat="):
            asking(do_sample=True, **own).check([[5]])
    model = asking(dry_multiplier=0.8, dry_sequence_breakers=[14])
    assert model.check([[5]]).arrays["dry_sequence_breakers"][14] == 1
    assert "dry_multiplier" not in model.check([[5]], dry_multiplier=0.0).steps
    assert "dry_sequence_breakers" not in asking(dry_sequence_breakers=[14]).check([[5]]).arrays
