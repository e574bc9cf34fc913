"""Models whose output is not the token table, and configs that say what the tensors do not: the tensors are believed.

The head is −1 times the token table, so that each logit is that of the tied model, negated.
"""

import json
import logging

import numpy as np
import pytest
import reference
from helpers_checkpoint import HUGGING_FACE
from helpers_model import reference_config

from gpt_neo_sampling import CheckpointError, TextGenerator, convert_checkpoint, export_saved_model, open_checkpoint
from gpt_neo_sampling._compat import tensorflow, tf

WTE, HEAD = "transformer.wte.weight", "lm_head.weight"
IDS = [5, 17, 101, 3]


def write(folder, change=lambda tensors: None, **config):
    """The golden Hugging Face model with tensors changed."""
    from safetensors.numpy import load_file, save_file

    folder.mkdir()
    tensors = load_file(HUGGING_FACE / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = {**json.loads((HUGGING_FACE / "config.json").read_text()), **config}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in found.items() if v is not None}))
    return folder


def negated(tensors):
    tensors[HEAD] = -tensors[WTE]


def tied_logits(ids):
    with open_checkpoint(HUGGING_FACE) as checkpoint:
        weights = {name: checkpoint.read(name).astype(np.float64) for name in checkpoint.names()}
        return reference.gpt_neo_forward(weights, np.array([ids]), **reference_config(config_of(checkpoint.params)))[0]


def config_of(params):
    return {"padding_id": 0, **params, "attention_types": [[params["attention_types"], 1]]}


def greedy(ids, n):
    ids = list(ids)
    for _ in range(n):
        ids.append(int(np.argmin(tied_logits(ids)[-1])))
    return ids


@pytest.fixture(
    scope="module",
    params=[None, *(pytest.param(tied, marks=pytest.mark.slow) for tied in (True, False))],
    ids=lambda tied: f"tie_word_embeddings {tied}",
)
def folder(request, tmp_path_factory):
    return write(tmp_path_factory.mktemp("head") / "m", negated, tie_word_embeddings=request.param)


def test_a_head_of_its_own_is_used(folder):
    generator = TextGenerator.from_pretrained(folder)
    (score,) = generator.score([IDS])
    logits = -tied_logits(IDS)
    want = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(score.logprobs[1:], want[range(3), IDS[1:]], rtol=0, atol=2e-5)
    (sample,) = generator.generate([IDS], max_new_tokens=6, do_sample=False, eos_token_id=-1)
    assert IDS + sample.tokens == greedy(IDS, 6)
    model, *_ = generator.inspect(IDS, temperature=0.5)
    np.testing.assert_allclose(model.probabilities, np.exp(want[-1]), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_on_a_mesh_and_exported(tmp_path):
    folder = write(tmp_path / "m", negated)
    options = dict(max_new_tokens=6, seed=3, eos_token_id=-1)
    (want,) = TextGenerator.from_pretrained(folder).generate([IDS], **options)
    split = dict(mesh_shape="x:2", layout="vocab:x,heads:x", devices="cpu:0,cpu:1")
    assert TextGenerator.from_pretrained(folder, **split).generate([IDS], **options) == [want]
    export_saved_model(tmp_path / "saved", folder, batch=1, length=10)
    serve = tensorflow.saved_model.load(str(tmp_path / "saved")).signatures["serving_default"]
    feeds = dict(prompts=[IDS], prompt_lengths=[len(IDS)], temperature=0.9, seed=3, top_k=0, max_new_tokens=6,
                 eos_token_id=-1, stream=0)  # fmt: skip
    specs = serve.structured_input_signature[1]
    found = serve(**{name: tf.constant(value, specs[name].dtype) for name, value in feeds.items()})
    assert found["tokens"].numpy()[0, : len(IDS) + 6].tolist() == IDS + want.tokens


def test_converted_to_its_own_format_and_refused_by_the_other(tmp_path):
    folder = write(tmp_path / "m", negated)
    convert_checkpoint(folder, tmp_path / "same", to="huggingface")
    assert json.loads((tmp_path / "same" / "config.json").read_text())["tie_word_embeddings"] is False
    with open_checkpoint(folder) as a, open_checkpoint(tmp_path / "same") as b:
        assert a.names() == b.names() and "lm_head" in a.names()
        for name in a.names():
            np.testing.assert_array_equal(a.read(name), b.read(name))
    with pytest.raises(CheckpointError, match="no output table of its own .lm_head.; allowed: to='huggingface'"):
        convert_checkpoint(folder, tmp_path / "other", to="mesh-tf")
    assert not (tmp_path / "other").exists()


def only_head(tensors):
    tensors[HEAD] = tensors.pop(WTE)


def both(tensors):
    tensors[HEAD] = tensors[WTE].copy()


@pytest.mark.parametrize(
    "change, tied, noted",
    [(both, None, False), (both, False, False), (only_head, None, False), (only_head, True, False),
     (lambda tensors: None, False, True)],
    ids=["both", "both, untied in word", "head alone", "head alone, tied", "no head, untied in word"],
)  # fmt: skip
def test_a_shared_table_under_either_name(tmp_path, caplog, change, tied, noted):
    folder = write(tmp_path / "m", change, tie_word_embeddings=tied)
    with caplog.at_level(logging.WARNING), open_checkpoint(folder) as found, open_checkpoint(HUGGING_FACE) as right:
        assert found.params == right.params and found.names() == right.names()
        for name in right.names():
            np.testing.assert_array_equal(found.read(name), right.read(name))
    assert ("tie_word_embeddings is false, but there is no lm_head.weight" in caplog.text) == noted


def test_a_head_alone_that_is_said_to_be_another_table(tmp_path):
    with pytest.raises(CheckpointError, match="1 missing: transformer.wte.weight"):
        open_checkpoint(write(tmp_path / "m", only_head, tie_word_embeddings=False))
