"""TextGenerator.score: log-probabilities of texts against float64, on one device and on meshes."""

import numpy as np
import pytest
import reference
from conftest import DATA
from helpers_checkpoint import spoiled
from helpers_model import checkpoint, reference_config

from gpt_neo_sampling import InvalidDistributionError, TextGenerator, TextScore
from gpt_neo_sampling._compat import mtf
from gpt_neo_sampling.generation import scoring

MESH_TF = DATA / "gpt_neo_checkpoints"
BOS = 1  # of the checkpoint "local": its eos_id


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def tiny():
    return TextGenerator.from_pretrained(MESH_TF / "local")


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def logprobs_of(logits, ids):
    """float64 [length − 1]: the log-probabilities of all ids but the first, from logits [length, vocab]."""
    return log_softmax(logits)[np.arange(len(ids) - 1), np.asarray(ids)[1:]]


def by_numpy(ids):
    """Log-probabilities from a forward pass in float64."""
    params, weights, _ = checkpoint("local")
    weights = {name: w.astype(np.float64) for name, w in weights.items()}
    return logprobs_of(reference.gpt_neo_forward(weights, np.array([ids]), **reference_config(params))[0], ids)


def texts_of(*lengths):
    return [np.random.default_rng(n).integers(2, 127, n).tolist() for n in lengths]


def assert_scores(got, texts, want):
    """`want`: for each text, the float64 log-probabilities of all but its first tokens."""
    assert len(got) == len(texts)
    for s, text, logprobs in zip(got, texts, want, strict=True):
        unscored = len(text) - len(logprobs)
        assert isinstance(s, TextScore) and s.tokens == list(text)
        assert s.logprobs[:unscored] == [None] * unscored
        np.testing.assert_allclose(s.logprobs[unscored:], logprobs, rtol=0, atol=1e-4)
        assert s.sum_logprob == pytest.approx(logprobs.sum(), abs=1e-3)
        assert s.perplexity == pytest.approx(np.exp(-logprobs.mean()), rel=1e-4)


@pytest.mark.parametrize("name", ["local", "hf_gpt_neo_tiny", *map(slow, ["global", "padding_outside", "rotary"])])
def test_golden_logits(name):
    folder = DATA / name if name.startswith("hf") else MESH_TF / name
    golden = np.load(folder / "golden.npz")
    texts = golden["logits_ids" if name.startswith("hf") else "ids"].tolist()
    got = TextGenerator.from_pretrained(folder).score(texts)
    assert_scores(got, texts, [logprobs_of(x, ids) for x, ids in zip(golden["logits"], texts, strict=True)])


@pytest.mark.parametrize(
    "mesh_shape, layout",
    [("x:2", "vocab:x"), slow("x:2,y:2", "batch:x,vocab:y"), slow("x:2,y:2", "heads:x,vocab:x,memory_length:y")],
)
def test_on_meshes(mesh_shape, layout):
    """Texts of several lengths; a vocabulary of 127 that the mesh pads."""
    texts = texts_of(5, 2, 40, 17, 33)
    devices = [f"cpu:{i}" for i in range(mtf.convert_to_shape(mesh_shape).size)]
    got = TextGenerator.from_pretrained(MESH_TF / "local", mesh_shape=mesh_shape, layout=layout, devices=devices).score(
        texts
    )
    assert_scores(got, texts, map(by_numpy, texts))


def test_texts_in_parts(tiny, monkeypatch):
    """More texts than one pass takes, in no order of length."""
    texts = texts_of(3, 40, 2, 11, 48, 12, 7)
    whole = tiny.score(texts)
    assert_scores(whole, texts, map(by_numpy, texts))
    sizes = []
    logprobs = tiny._logprobs
    monkeypatch.setattr(tiny, "_logprobs", lambda rows: sizes.append(list(map(len, rows))) or logprobs(rows))
    monkeypatch.setattr(scoring, "MAX_POSITIONS", 48)
    for part, one in zip(tiny.score(texts), whole, strict=True):
        np.testing.assert_allclose(part.logprobs[1:], one.logprobs[1:], rtol=0, atol=1e-5)
    assert sizes == [[48], [40], [12, 11, 7, 3], [2]]


def test_start_token(tiny):
    """It precedes the text, whose first token is then scored; it is not scored itself."""
    texts = texts_of(1, 9)
    assert_scores(tiny.score(texts, add_start_token=True), texts, [by_numpy([BOS, *text]) for text in texts])


@pytest.mark.parametrize("stride", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 47)), 20])
def test_windows(tiny, stride):
    """As is usual with transformers: windows of the context's 48 tokens, each scoring only its new ones."""
    (text,) = texts_of(48 + 30)
    want, scored_to = [], 1
    for begin in range(0, len(text), stride):
        end = min(begin + 48, len(text))
        want.extend(by_numpy(text[begin:end])[scored_to - end :])
        scored_to = end
        if end == len(text):
            break
    got = tiny.score([text, text[:20]], stride=stride)
    assert_scores(got, [text, text[:20]], [np.array(want), by_numpy(text[:20])])


@pytest.mark.slow
def test_strings():
    demo = TextGenerator.from_pretrained()
    text = "The family of Dashwood had long been settled in Sussex."
    (score,) = demo.score(text)
    shuffled, by_ids = demo.score(["Sussex long of in The settled been had Dashwood family.", score.tokens])
    assert demo.tokenizer.decode(score.tokens) == text
    np.testing.assert_allclose(by_ids.logprobs[1:], score.logprobs[1:], rtol=0, atol=1e-5)
    assert score.perplexity < shuffled.perplexity / 2


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "at least one is needed"),
        ([[5, 6], []], {}, "text 1 has 0 tokens; at least 2"),
        ([[5]], {}, "text 0 has 1 tokens; at least 2"),
        ([[]], dict(add_start_token=True), "text 0 has 0 tokens; at least 2 are needed, or 1 with"),
        ([[5] * 49], {}, "text 0 has 49 tokens, more than the context, 48; give a stride"),
        ([[5] * 48], dict(add_start_token=True), "give a stride"),
        ([[5, 6]], dict(stride=0), "stride=0; a whole number from 1 to 47"),
        ([[5, 6]], dict(stride=48), "stride=48"),
        ([[5, 127]], {}, "token id 127 is outside the vocabulary"),
        (["words"], {}, "no tokenizer.json"),
    ],
)
def test_bad_requests_are_named(tiny, texts, options, message):
    with pytest.raises(ValueError) as error:
        tiny.score(texts, **options)
    assert message in str(error.value)


def test_nan_names_its_text(tmp_path):
    # which the graph for shorter texts does not read
    generator = TextGenerator.from_pretrained(spoiled(tmp_path / "model", "wpe", 40, np.nan))
    assert np.isfinite(generator.score([[5] * 6])[0].sum_logprob)
    with pytest.raises(InvalidDistributionError, match="text 0: .*the weight wpe holds NaN"):
        generator.score([[5] * 45])
