"""NaN and infinities, in weights and in logits: no token, and an error that says where and why."""

import json
import pickle

import numpy as np
import pytest
from helpers_checkpoint import MESH_TF, spoiled

from gpt_neo_sampling import InvalidDistributionError, TextGenerator, generate_file
from gpt_neo_sampling._compat import tf
from gpt_neo_sampling.cli import main as cli
from gpt_neo_sampling.mesh.ops import cwise_broadcast, row_index

PROMPTS, OPTIONS = [[2, 3, 4], [4, 5], [6]], dict(seed=1, max_new_tokens=9, eos_token_id=-1)
WHY = "the logits hold NaN or +inf, or every token is masked"


slow = pytest.mark.slow


@pytest.fixture(scope="module")
def tokens():
    """The tokens of the model without NaN."""
    return [s.tokens for s in TextGenerator.from_pretrained(MESH_TF / "global").generate(PROMPTS, **OPTIONS)]


SPLIT = dict(mesh_shape="x:2", layout="vocab:x", devices="cpu:0,cpu:1")


@pytest.mark.parametrize("value, mesh", [(np.nan, {}), pytest.param(np.inf, SPLIT, marks=slow)])
def test_a_weight_that_is_not_finite_is_named(tmp_path, tokens, value, mesh):
    """It is read at position 6; the first row has ended by then, and the last does not get there."""
    model = spoiled(tmp_path / "model", "wpe", (6, 2), value)
    streamed, limits = [], [4, 9, 5]
    with pytest.raises(InvalidDistributionError) as error:
        TextGenerator.from_pretrained(model, **mesh).generate(
            PROMPTS, streamer=lambda *args: streamed.append(args), **{**OPTIONS, "max_new_tokens": limits}
        )
    assert str(error.value) == f"prompt 1, sample 1, step 5: {WHY} (the weight wpe holds NaN or infinite numbers)"
    assert (error.value.sample, error.value.step) == (1, 5)
    assert [s and s.tokens for s in error.value.samples] == [tokens[0][:4], None, tokens[2][:5]]
    assert [token for index, token, *_ in streamed if index == 1] == tokens[1][:5]
    again = pickle.loads(pickle.dumps(error.value))
    assert str(again) == str(error.value) and again.sample == 1


@pytest.mark.parametrize(
    "value, options",
    [
        (-np.inf, dict(do_sample=False)),
        pytest.param(np.nan, dict(top_k=9, top_p=0.9), marks=slow),
        pytest.param(np.inf, dict(entmax_alpha=1.3), marks=slow),
    ],
)
def test_infinite_logits_of_every_row(tmp_path, value, options):
    """One entry of the last bias makes all logits infinite or NaN."""
    generator = TextGenerator.from_pretrained(spoiled(tmp_path / "model", "ln_f/b", 0, value))
    with pytest.raises(InvalidDistributionError, match=r"^prompt 0, sample 0, step 0: .*\(the weight ln_f/b holds NaN"):
        generator.generate(PROMPTS[1:], num_return_sequences=2, **{**OPTIONS, **options})


@slow
def test_a_processor_that_spoils_one_row(tokens):
    """The third of six rows fails at its eighth token; no weight is blamed, and the other rows are unchanged."""

    def spoil(logits, ids, position):
        def tf_fn(x, position, row):
            return tf.where_v2(tf.logical_and(tf.equal(row, 2), tf.equal(position, 9)), np.inf, x)

        return cwise_broadcast(tf_fn, [logits, position, row_index(ids.mesh, position.shape)], logits.shape)

    generator = TextGenerator.from_pretrained(MESH_TF / "global")
    options = dict(OPTIONS, num_return_sequences=2, logits_processors=[spoil], stream=[0, 1, 2])
    with pytest.raises(InvalidDistributionError) as error:
        generator.generate(PROMPTS, **options)
    assert str(error.value) == f"prompt 1, sample 2, step 7: {WHY} (all weights are finite)"
    samples = error.value.samples
    assert [i for i, sample in enumerate(samples) if sample is None] == [2]
    assert [samples[0].tokens, samples[4].tokens] == [tokens[0], tokens[2]]
    (tmp := generator.checkpoint).close()
    del generator._no_distribution
    with pytest.raises(InvalidDistributionError, match=rf"the weights cannot be read: {tmp.folder} is closed"):
        generator.generate(PROMPTS, **options)


@slow
def test_lines_of_a_file_go_on(tmp_path, capsys):
    """Only the second line reaches position 6; its two samples are counted from 0."""
    model = spoiled(tmp_path / "model", "wpe", 6, np.nan)
    records = [{"prompt_ids": p, "max_new_tokens": n} for p, n in zip(PROMPTS, (2, 7, 5))]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    message = f"the prompt of line 2: sample 0, step 5: {WHY} (the weight wpe holds NaN or infinite numbers)"
    with pytest.raises(InvalidDistributionError) as error:
        generate_file(TextGenerator.from_pretrained(model), source, output, seed=1, num_return_sequences=2)
    assert str(error.value) == message
    written = output.read_bytes()
    assert sorted(json.loads(line)["index"] for line in written.splitlines()) == [0, 2]
    output = tmp_path / "again.jsonl"
    args = ["generate", "--model", model, "--prompts-file", source, "--output", output, "--seed", 1, "--num-samples", 2]
    assert cli.main([str(a) for a in args]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.splitlines()[-1].endswith(f"error: {message}")
    assert output.read_bytes() == written
