"""Rows that give their place to the next as they end: the samples, and the file, are those of batches."""

import json
import signal

import numpy as np
import pytest
from helpers_checkpoint import MESH_TF, spoiled

from gpt_neo_sampling import InvalidDistributionError, TextGenerator, generate_file
from gpt_neo_sampling.generation import generator as generator_module
from gpt_neo_sampling.generation import prompts_file
from gpt_neo_sampling.mesh.devices import device_mesh

LINES = [
    {"prompt": "Emma was", "max_new_tokens": 1},  # ends at its first step
    {"prompt": "It was", "temperature": 0.7, "seed": 5, "max_new_tokens": 30},
    {"prompt": "She was very " + "much " * 60},
    {"prompt_ids": [5] * 256},  # fills the context: no token
    {"prompt": "Mr.", "top_k": 3, "max_new_tokens": 9},
    {"prompt": "Elinor", "temperature": 1.5},
    {"prompt_ids": [5] * 250, "max_new_tokens": 9},  # is cut
    {"prompt": "Her sister", "temperature": 0.3},
]
OPTIONS = dict(
    max_new_tokens=14, num_return_sequences=2, top_k=40, stop_strings=[",", "."], return_logprobs=True, seed=4
)


@pytest.fixture(scope="module")
def demo():
    return TextGenerator.from_pretrained()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def few_rows_in(patched):
    """Eight for sixteen samples: two are replaced at once."""
    for module in (generator_module, prompts_file):
        patched.setattr(module, "MAX_BATCH", 8)


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    few_rows_in(monkeypatch)


@pytest.fixture(scope="module")
def whole(demo, source):
    """What an undisturbed run writes."""
    with pytest.MonkeyPatch.context() as patched:
        few_rows_in(patched)
        generate_file(demo, source, source.with_name("whole"), **OPTIONS)
    return source.with_name("whole").read_bytes()


def test_a_file_is_that_of_batches(demo, source, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "replaces_rows", False)
    monkeypatch.setattr(prompts_file, "MAX_BATCH", 32)  # one graph
    monkeypatch.setattr(generator_module, "MAX_BATCH", 32)
    generate_file(demo, source, tmp_path / "batches", **OPTIONS)
    lengths = set()
    for line, expected in zip(whole.splitlines(), (tmp_path / "batches").read_bytes().splitlines(), strict=True):
        line, expected = json.loads(line), json.loads(expected)
        for sample, in_batch in zip(line["samples"], expected["samples"]):
            lengths.add(len(sample["tokens"]))
            for name in ("logprobs", "draw_logprobs"):
                np.testing.assert_allclose(sample.pop(name), in_batch.pop(name), rtol=0, atol=1e-5)
        assert line == expected
    assert {0, 1, 6} < lengths and len(lengths) > 6


def test_a_killed_run_goes_on_to_the_same_bytes(demo, source, whole, tmp_path, monkeypatch):
    """Log-probabilities too, though other rows stand beside each other."""
    append, output = prompts_file._append, tmp_path / "out"
    for n_writes in (1, 4):
        writes = [append] * n_writes

        def write_or_die(*args):
            writes.pop()(*args)  # an IndexError once there are none left

        with monkeypatch.context() as patched, pytest.raises(IndexError):
            patched.setattr(prompts_file, "_append", write_or_die)
            generate_file(demo, source, output, **OPTIONS)
        assert 0 < len(output.read_bytes().splitlines()) < len(LINES)
    generate_file(demo, source, output, **OPTIONS)
    assert output.read_bytes() == whole


def test_ctrl_c_keeps_the_rows_that_have_ended(demo, source, whole, tmp_path, monkeypatch):
    output, generate_each = tmp_path / "out", demo.generate_each

    def interrupted(*args, streamer, **options):
        left = iter(range(40))

        def interrupt(*token):
            streamer(*token)
            if next(left, None) is None:
                signal.raise_signal(signal.SIGINT)

        return generate_each(*args, streamer=interrupt, **options)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt, match=r"[1-7] of 8 prompts are done"):
        patched.setattr(demo, "generate_each", interrupted)
        generate_file(demo, source, output, **OPTIONS)
    generate_file(demo, source, output, **OPTIONS)
    assert output.read_bytes() == whole


def test_the_order_in_which_prompts_begin_changes_nothing(demo):
    """The longest last: its states are as long as all rows' from the start."""
    prompts = ["Emma was", "It was", [5] * 250, "She was very " + "much " * 60, "Elinor", "Mr."]
    found = []
    for wanted in (range(6), [0, 5, 4, 1, 3, 2]):
        samples = [pair for pairs in demo.generate_each(prompts, wanted, **OPTIONS) for pair in pairs]
        assert len(samples) == 12
        found.append(dict(samples))
    assert found[0] == found[1]


def test_on_one_cpu_alone():
    assert device_mesh().is_one_cpu() and device_mesh(devices="cpu:0").is_one_cpu()
    assert not device_mesh("x:2", "batch:x", "cpu:0,cpu:1").is_one_cpu()


@pytest.mark.parametrize("folder, dtype", [("variants", "float32"), ("global", "bfloat16")])
def test_every_model(folder, dtype):
    """`variants` has learned keys in each row's memory."""
    generator = TextGenerator.from_pretrained(MESH_TF / folder, dtype=dtype)
    prompts, options = [[2], [4, 5], [6, 7, 3], [1, 9], [8], [3]] * 2, dict(seed=3, max_new_tokens=6)
    expected = [s.tokens for s in generator.generate(prompts, **options)]
    found = dict(pair for pairs in generator.generate_each(prompts, range(12), **options) for pair in pairs)
    assert [found[index].tokens for index in range(12)] == expected


def test_a_row_without_a_distribution_makes_room(tmp_path):
    """The weight is read at position 6."""
    generator = TextGenerator.from_pretrained(spoiled(tmp_path / "model", "wpe", (6, 2), np.nan))
    prompts, options = [[2, 3, 4], [4, 5], [6]] * 6, dict(seed=1, max_new_tokens=[4, 9, 5] * 6, eos_token_id=-1)
    with pytest.raises(InvalidDistributionError) as error:
        generator.generate(prompts, **options)
    found = dict(pair for pairs in generator.generate_each(prompts, range(18), **options) for pair in pairs)
    failed = [index for index in range(18) if isinstance(found[index], InvalidDistributionError)]
    assert failed == list(range(1, 18, 3)) and {found[index].step for index in failed} == {5}
    for index, expected in enumerate(error.value.samples):
        assert index in failed or found[index].tokens == expected.tokens


def test_the_state_of_a_control_lasts_from_segment_to_segment(demo, tmp_path):
    """Of mirostat, whose bar each token moves: what batches draw, rows that replace one another draw too."""
    options = dict(mirostat=2, mirostat_tau=2.5, mirostat_eta=0.6, temperature=1.2, max_new_tokens=20, seed=4)
    texts = ["Emma was", "It was", "She had", "Her sister", "Mr. Darcy", "The", "He", "They were", "In a", "At last"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    generate_file(demo, tmp_path / "in.jsonl", tmp_path / "out.jsonl", **options)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    want = demo.generate(texts, **options)
    assert [line["samples"][0]["tokens"] for line in lines] == [sample.tokens for sample in want]
    plain = demo.generate(texts, **{**options, "mirostat_eta": 0})
    assert [sample.tokens for sample in plain] != [sample.tokens for sample in want]
