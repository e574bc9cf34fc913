"""The controls of sample_autoregressive in the loop, against a simulation in NumPy float64 and on layouts.

tests/test_masks.py and tests/test_penalties.py hold each control by itself.
"""

import dataclasses
import functools
import inspect
import pathlib
import re

import numpy as np
import pytest
import reference
from helpers_loop import BATCH, LENGTH, STOP, VOCAB, Bigram, bigram, follow, loops, prompts_of, weights_of
from helpers_model import reference_config
from programs import MeshRunner
from scipy import stats

from gpt_neo_sampling import GenerationOptions, TextGenerator, sample_autoregressive
from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling.arguments import parser
from gpt_neo_sampling.chain import ROW_VALUES, SamplingOptions
from gpt_neo_sampling.mtf_ops import host_call
from gpt_neo_sampling.options import SAMPLING

PROMPT = 5
PROMPTS = prompts_of([PROMPT] * BATCH)
BIAS = np.where(np.arange(VOCAB) % 7 == 3, -np.inf, np.linspace(-1, 1, VOCAB)).astype(np.float32)


def favour_even(logits, ids, position):
    """A user's own processor: ids get likelier where they are even, the more the further on."""
    at = mtf.range(logits.mesh, logits.shape[-1], tf.int32)
    even = mtf.cast(mtf.equal(mtf.mod(at, mtf.constant(logits.mesh, 2, dtype=tf.int32)), 0), tf.float32)
    return logits + 0.1 * mtf.cast(position, tf.float32) * even


def last_token_again(logits, ids, position):
    """One that looks at the ids: the last token is never drawn twice running."""
    last = mtf.gather(ids, position - 1, ids.shape[-1])
    return logits - 1e9 * mtf.one_hot(last, logits.shape[-1])


def counted(row, begin=0):
    return reference.token_counts([row[begin:]], VOCAB)[0]


def penalised(options, logits, row):
    """What the steps ahead of the temperature make of float64 logits behind the tokens of `row`."""
    x = logits.astype(np.float64)
    for processor in options.get("logits_processors", ()):
        if processor is favour_even:
            x = x + 0.1 * len(row) * (np.arange(VOCAB) % 2 == 0)
        else:
            x = np.where(np.arange(VOCAB) == row[-1], -np.inf, x)
    x = reference.repetition_penalty(x, counted(row), options.get("repetition_penalty", 1))
    new = counted(row, PROMPT)
    x = x - options.get("presence_penalty", 0) * (new > 0) - options.get("frequency_penalty", 0) * new
    if "no_repeat_ngram_size" in options:
        x = np.where(reference.no_repeat_ngram_keep([row], options["no_repeat_ngram_size"], VOCAB)[0], x, -np.inf)
    x = x + options.get("logit_bias", 0)
    stops = options.get("stop_at_token", [])
    if len(row) - PROMPT < options.get("min_new_tokens", 0) or options.get("never_end"):
        x = np.where(np.isin(np.arange(VOCAB), stops), -np.inf, x)
    return x


MASKS = {
    "top_p": reference.top_p_keep,
    "min_p": reference.min_p_keep,
    "typical_p": reference.typical_p_keep,
    "epsilon_cutoff": reference.epsilon_keep,
    "eta_cutoff": reference.eta_keep,
}


def weights(options):
    """weights_of with the masks behind top-k."""

    def of(x, temperature, top_k, alpha):
        z = (x - x.max()) / temperature
        if top_k is not None and 1 <= top_k < len(z):
            z = np.where(reference.top_k_keep(z, int(top_k)), z, -np.inf)
        for name, keep in MASKS.items():
            if name in options:
                z = np.where(keep(z[np.newaxis], options[name])[0][0], z, -np.inf)
        return weights_of(z, 1, None, alpha)

    return of


SETTINGS = {
    "repetition": dict(repetition_penalty=1.5),
    "presence": dict(presence_penalty=1.5),
    "frequency": dict(frequency_penalty=-0.7),
    "n-grams": dict(no_repeat_ngram_size=2, temperature=0.2),
    "bias": dict(logit_bias=BIAS),
    "min_new_tokens": dict(stop_at_token=[STOP, 20, 21], min_new_tokens=9),
    "never_end": dict(stop_at_token=[STOP, 20], never_end=True),
    "processors": dict(logits_processors=(favour_even, last_token_again)),
    "top_p": dict(top_p=0.6),
    "min_p": dict(min_p=0.2),
    "typical_p": dict(typical_p=0.5),
    "epsilon": dict(epsilon_cutoff=0.02),
    "eta": dict(eta_cutoff=0.05),
    "top_k, top_p": dict(sampling_keep_top_k=30, top_p=0.7),
    "all, softmax": dict(
        logits_processors=(favour_even,), repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2,
        no_repeat_ngram_size=3, logit_bias=BIAS, stop_at_token=[STOP, 40], min_new_tokens=4, temperature=1.3,
        sampling_keep_top_k=100, top_p=0.95, min_p=0.01, typical_p=0.9, epsilon_cutoff=1e-3, eta_cutoff=2e-3,
    ),
    "all, entmax": dict(
        repetition_penalty=0.8, presence_penalty=-0.3, logit_bias=BIAS, temperature=2.0, sampling_use_entmax=True,
        entmax_alpha=1.4, sampling_keep_top_k=150, top_p=0.97, min_p=0.02,
    ),
    "greedy": dict(repetition_penalty=1.5, no_repeat_ngram_size=2, logit_bias=BIAS, temperature=0, top_p=0.5),
}  # fmt: skip
NUMBERS = ("repetition_penalty", "presence_penalty", "frequency_penalty", *MASKS)


def fixed(options):
    return {"seed": 3, "stop_at_token": None, **options}


TOGETHER = ("n-grams", "processors", "top_k, top_p", "all, softmax", "all, entmax", "greedy")  # hold every control


@functools.cache
def tokens():
    return loops({name: fixed(options) for name, options in SETTINGS.items()}, Bigram())(PROMPTS)


def held_against_the_simulation(out, options, against=None):
    against = options if against is None else against
    stops = options.get("stop_at_token", [])
    return follow(
        out,
        PROMPTS,
        lambda row: penalised(against, bigram(row), row),
        temperature=options.get("temperature", 0.9),
        top_k=options.get("sampling_keep_top_k"),
        alpha=options.get("entmax_alpha"),
        seed=3,
        stop=stops,
        weights=weights(against),
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_against_the_simulation(name):
    wrong, drawn, excused = held_against_the_simulation(tokens()[name], SETTINGS[name])
    assert wrong == []
    assert drawn > 30 and excused <= drawn // 50


@pytest.mark.parametrize("name", [n for n in SETTINGS if n not in ("greedy", "processors") and "," not in n])
def test_the_simulation_sees_a_control_that_is_lost(name):
    without = {k: v for k, v in SETTINGS[name].items() if k in ("temperature", "stop_at_token")}
    assert held_against_the_simulation(tokens()[name], SETTINGS[name], without)[0]


@pytest.mark.parametrize("mesh_shape, layout", [("x:4", "vocab:x"), ("x:2,y:2", "batch:x,vocab:y"), ("x:3", "vocab:x")])
def test_layouts(mesh_shape, layout):
    cases = {name: fixed(SETTINGS[name]) for name in TOGETHER}
    split = loops(cases, Bigram(), runner=MeshRunner(mesh_shape, layout))(PROMPTS)
    assert {name: int((split[name] != tokens()[name]).sum()) for name in cases} == dict.fromkeys(cases, 0)


def test_a_value_for_each_row():
    """Rows of all settings of numbers in one batch, each with its own: tensors, as the numbers by themselves."""
    names = ["repetition", "presence", "frequency", "top_p", "min_p", "typical_p", "epsilon", "eta"]
    neutral = dict(zip(NUMBERS, (1, 0, 0, 1, 0, 1, 0, 0)), sampling_keep_top_k=0, entmax_alpha=1, temperature=0.9)
    columns = {key: [SETTINGS[name].get(key, value) for name in names] for key, value in neutral.items()}
    columns["temperature"][2] = 0  # one greedy row
    columns["sampling_keep_top_k"][3] = 9
    columns["entmax_alpha"][4] = 1.5
    columns["seed"] = [3, 3, 5, 3, 3, 4, 3, 3]
    columns["stream"] = [4, 4, 4, 0, 1, 2, 2**31 - 1, -5]
    columns["max_steps"] = [9, 9, 9, 1, 2, 9, 30, 9]
    columns["stop_at_token"] = [-1, -1, 20, -1, 21, 22, -1, -1]
    columns["min_new_tokens"] = [0, 0, 4, 0, 0, 0, 0, 0]
    whole = ("sampling_keep_top_k", "seed", "stream", "max_steps", "stop_at_token", "min_new_tokens")
    as_tensors = {k: np.array(v, np.int32 if k in whole else np.float32) for k, v in columns.items()}
    cases = {"mixed": dict(as_tensors, max_top_k=20, sampling_use_entmax=True)}
    for row in range(BATCH):
        cases[str(row)] = {k: v[row] for k, v in columns.items()}
        cases[str(row)].update(sampling_keep_top_k=columns["sampling_keep_top_k"][row] or -1, sampling_use_entmax=True)
    out = loops(cases, Bigram())(PROMPTS)
    assert np.array_equal(out["mixed"], [out[str(row)][row] for row in range(BATCH)])
    assert len(np.unique(out["mixed"], axis=0)) == BATCH


def test_a_tensor_value_out_of_range_makes_its_row_invalid():
    values = dict(zip(NUMBERS, (0, np.inf, np.nan, 1.1, -0.1, 1.5, 2, -1)))
    neutral = dict(zip(NUMBERS, (1, 0, 0, 1, 0, 1, 0, 0)))
    cases = {name: {name: np.array([bad] + [neutral[name]] * 7, np.float32)} for name, bad in values.items()}
    out = loops({name: fixed(options) for name, options in cases.items()}, Bigram())(PROMPTS)
    for name in cases:
        assert out[name][0, PROMPT] == -1 and not out[name][0, PROMPT + 1 :].any(), name
        assert (out[name][1:, PROMPT:] >= 0).all(), name


@pytest.mark.parametrize(
    "options",
    [dict(repetition_penalty=0), dict(presence_penalty=float("nan")), dict(no_repeat_ngram_size=0), dict(top_p=1.5),
     dict(min_p=-1), dict(typical_p=0), dict(epsilon_cutoff=1.0), dict(eta_cutoff=-0.5), dict(num_return_sequences=0),
     dict(logit_bias=np.full(VOCAB, np.nan, np.float32)), dict(logit_bias=np.zeros(3, np.float32))],
)  # fmt: skip
def test_a_number_out_of_range_is_named(options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        loops({"bad": fixed(options)}, Bigram())


# --- What came out ---------------------------------------------------------------------


def logprob_cases():
    return {
        "softmax": dict(temperature=0.7, repetition_penalty=1.3),
        "top_k": dict(sampling_keep_top_k=7),
        "top_p": dict(top_p=0.5, sampling_keep_top_k=40),
        "entmax": dict(sampling_use_entmax=True, entmax_alpha=1.6, temperature=1.5),
        "greedy": dict(temperature=0),
        "of rows": dict(temperature=np.array([0, 1] * 4, np.float32), max_top_k=9,
                        sampling_keep_top_k=np.array([0, 0, 9, 9] * 2, np.int32)),
    }  # fmt: skip


@pytest.mark.parametrize("runner", [MeshRunner(), MeshRunner("x:4", "vocab:x")], ids=str)
def test_log_probabilities(runner):
    cases = logprob_cases()
    out = loops({n: {**fixed(o), "return_logprobs": True} for n, o in cases.items()}, Bigram(), runner=runner)(PROMPTS)
    plain = loops({n: fixed(o) for n, o in cases.items()}, Bigram(), runner=runner)(PROMPTS)
    for name, options in cases.items():
        ids, logprobs, draw_logprobs = out[name]
        assert np.array_equal(ids, plain[name])
        assert not logprobs[:, :PROMPT].any() and not draw_logprobs[:, :PROMPT].any()
        for r in range(BATCH):
            own = {k: v[r] if isinstance(v, np.ndarray) else v for k, v in options.items()}
            for at in range(PROMPT, LENGTH):
                row = ids[r, :at].tolist()
                model, token = reference.softmax(bigram(row).astype(np.float64)), ids[r, at]
                np.testing.assert_allclose(logprobs[r, at], np.log(model[token]), atol=2e-5)
                temperature = own.get("temperature", 0.9)
                drawn = 1.0
                if temperature:
                    p = weights(own)(penalised(own, bigram(row), row), temperature, own.get("sampling_keep_top_k"),
                                     own.get("entmax_alpha"))  # fmt: skip
                    drawn = p[token] / p.sum()
                np.testing.assert_allclose(draw_logprobs[r, at], np.log(drawn), atol=2e-4 if "entmax" in name else 2e-5)


def test_log_probabilities_are_shifted_with_their_tokens():
    options = dict(fixed({}), return_logprobs=True, max_steps=6)
    cases = {"whole": options, "shifted": dict(options, remove_partial_sequences=True)}
    out = loops(cases, Bigram())(PROMPTS)
    for whole, shifted in zip(out["whole"], out["shifted"]):
        assert np.array_equal(shifted[:, :6], whole[:, PROMPT : PROMPT + 6]) and not shifted[:, 6:].any()


@pytest.mark.parametrize("runner", [MeshRunner(), MeshRunner("x:2,y:2", "batch:x,vocab:y")], ids=str)
def test_samples_of_a_prompt_share_its_first_pass(runner):
    model, n = Bigram(), 3
    temperatures, streams = np.linspace(0, 2, BATCH * n, dtype=np.float32), np.arange(BATCH * n, dtype=np.int32)
    each = fixed(dict(temperature=temperatures, stream=streams[::-1].copy()))
    shared = dict(each, num_return_sequences=n)
    cases = {"shared": shared, "slow": dict(shared, params={"slow_sampling": True})}
    out = loops(cases, model, runner=runner)(PROMPTS)
    first, step = model.contexts[:2]
    assert (first.mode, first.batch_dims[0].size) == ("first_part", BATCH)
    assert (step.mode, step.batch_dims[0].size) == ("incremental", BATCH * n)
    apart = loops({"apart": each}, Bigram(), batch=BATCH * n, runner=runner)(np.repeat(PROMPTS, n, 0))["apart"]
    assert np.array_equal(out["shared"], apart) and np.array_equal(out["slow"], apart)


def test_a_criterion_of_the_users_own_ends_rows():
    """Rows end at an even token; on the host likewise, which sees each token once."""
    seen = []

    def is_even(ids, position):
        last = mtf.gather(ids, position - 1, ids.shape[-1])
        return mtf.cast(mtf.equal(mtf.mod(last, mtf.constant(ids.mesh, 2, dtype=tf.int32)), 0), tf.float32)

    def on_host(ids, position):
        def look(ids, position):
            seen.append(position.copy())
            return (ids[np.arange(len(ids)), position - 1] % 2 == 0).astype(np.float32)

        return host_call(lambda last, *more: look(*more), [mtf.cast(position, tf.float32), ids, position])

    # (functions among the options of `loops` are called when the graph is built)
    criteria = {"mesh": lambda *_: is_even, "host": lambda *_: on_host, "none": None}
    cases = {name: fixed({"stopping_criteria": criterion}) for name, criterion in criteria.items()}
    out = loops(cases, Bigram(), runner=MeshRunner("x:2,y:2", "batch:x,vocab:y"))(PROMPTS)
    want = out["none"].copy()
    for row in want:
        row[PROMPT + int(np.argmax(row[PROMPT:] % 2 == 0)) + 1 :] = 0
    assert np.array_equal(out["mesh"], want) and np.array_equal(out["host"], want)
    assert [p.max() for p in seen] == list(range(PROMPT + 1, PROMPT + 1 + len(seen)))


# --- What is drawn, on the whole --------------------------------------------------------

DRAWN = {
    "plain": {},
    "temperature": dict(temperature=1.4),
    "top_k": dict(top_k=12),
    "top_p": dict(top_p=0.7),
    "min_p": dict(min_p=0.05),
    "typical_p": dict(typical_p=0.6),
    "epsilon": dict(epsilon_cutoff=0.004),
    "eta": dict(eta_cutoff=0.02),
    "entmax": dict(entmax_alpha=1.3, temperature=1.2),
    "repetition": dict(repetition_penalty=1.6),
    "bias": dict(logit_bias={262: 3.0, 290: -2.0}, bad_words_ids=[[256], [12]]),
    "all": dict(repetition_penalty=1.2, logit_bias={262: 2.0}, temperature=1.1, top_k=300, top_p=0.9, min_p=0.005,
                typical_p=0.85, epsilon_cutoff=1e-3, eta_cutoff=2e-3, entmax_alpha=1.2),
}  # fmt: skip
DRAWS, FALSE_ALARM = 2048, 1e-4  # of each chi-square, of which there are 12


@pytest.fixture(scope="module")
def demo():
    return TextGenerator.from_pretrained()


@pytest.mark.parametrize("name", DRAWN)
def test_the_bundled_models_tokens_follow_the_exact_distribution(demo, name):
    prompt = "She had no doubt that she"
    ids, options = demo.encode(prompt), DRAWN[name]
    weights = {name: demo.checkpoint.read(name) for name in demo.checkpoint.names()}
    params = demo.checkpoint.params
    params = {"padding_id": 0, **params, "attention_types": [[params["attention_types"], 1]]}
    p = exact(reference.gpt_neo_forward(weights, [ids], **reference_config(params))[0, -1], ids, **options)
    samples = demo.generate(prompt, max_new_tokens=1, num_return_sequences=DRAWS, seed=8, eos_token_id=-1, **options)
    counts = np.bincount([s.tokens[0] for s in samples], minlength=len(p))
    assert not counts[p == 0].any()
    often = p * DRAWS >= 5
    expected, seen = ([*x[often], x[~often].sum()] for x in (p * DRAWS, counts))
    if expected[-1] == 0:
        expected, seen = expected[:-1], seen[:-1]
    assert len(expected) > 3
    assert stats.chisquare(seen, expected).pvalue > FALSE_ALARM


def exact(logits, ids, repetition_penalty=1, logit_bias=(), bad_words_ids=(), temperature=None, top_k=None,
          entmax_alpha=None, **masks):  # fmt: skip
    """The distribution that is drawn from behind `ids`, in float64."""
    if repetition_penalty != 1:
        logits = reference.repetition_penalty(logits, reference.token_counts([ids], len(logits))[0], repetition_penalty)
    for token, bias in dict(logit_bias).items():
        logits[token] += bias
    for (token,) in bad_words_ids:
        logits[token] = -np.inf
    z = (logits - logits.max()) / (temperature or (0.9 if entmax_alpha is None else 1.0))
    if top_k is not None:
        z = np.where(reference.top_k_keep(z, top_k), z, -np.inf)
    for name, keep in MASKS.items():
        if name in masks:
            z = np.where(keep(z[np.newaxis], masks[name])[0][0], z, -np.inf)
    return reference.softmax(z) if entmax_alpha is None else reference.entmax(z, entmax_alpha)


@pytest.mark.parametrize("name", sorted({*SAMPLING, *ROW_VALUES}))
def test_a_control_is_in_every_place(name):
    """That CONTRIBUTING.md names."""
    loop = {"top_k": "sampling_keep_top_k"}.get(name, name)
    assert name in ROW_VALUES and name in SAMPLING and loop in inspect.signature(sample_autoregressive).parameters
    for options in (SamplingOptions, GenerationOptions):
        assert name in {field.name for field in dataclasses.fields(options)}
    assert re.search(rf"^ {{8}}{name} ", GenerationOptions.__doc__, re.MULTILINE)
    for command in ("generate", "inspect"):
        assert hasattr(parser().parse_args([command, "--prompt", "Emma"]), name)
    root = pathlib.Path(__file__).parents[1]
    readme, page = ((root / path).read_text(encoding="utf-8") for path in ("README.md", "docs/sampling.md"))
    option = {"entmax_alpha": "entmax"}.get(name, name.replace("_", "-"))
    assert re.search(rf"`--{option}\b", readme)
    assert f"| `{name}` |" in page and re.search(rf"^### .*\b{name}\b", page, re.MULTILINE)
