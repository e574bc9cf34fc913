"""The controls of sample_autoregressive in the loop, against a simulation in NumPy float64 and on layouts.

tests/sampling/test_masks.py and tests/sampling/test_penalties.py hold each control by itself.
"""

import dataclasses
import functools
import pathlib
import re

import numpy as np
import pytest
import reference
from helpers_loop import (
    BATCH,
    LENGTH,
    STOP,
    TABLE,
    VOCAB,
    Bigram,
    bigram,
    boundary_distance,
    follow,
    loops,
    prompts_of,
    uniforms,
    weights_of,
)
from helpers_model import reference_config
from programs import MeshRunner
from scipy import stats

from gpt_neo_sampling import TextGenerator, sample_autoregressive
from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling.mesh.ops import host_call
from gpt_neo_sampling.sampling.controls import CONTROLS, NUMBERS, ControlKeywords, Controls

slow = pytest.mark.slow

PROMPT = 5
PROMPTS = prompts_of([PROMPT] * BATCH)
BIAS = np.where(np.arange(VOCAB) % 7 == 3, -np.inf, np.linspace(-1, 1, VOCAB)).astype(np.float32)


def favour_even(logits, ids, position):
    """A user's logits processor: even ids become likelier, the more the later the position."""
    at = mtf.range(logits.mesh, logits.shape[-1], tf.int32)
    even = mtf.cast(mtf.equal(mtf.mod(at, mtf.constant(logits.mesh, 2, dtype=tf.int32)), 0), tf.float32)
    return logits + 0.1 * mtf.cast(position, tf.float32) * even


def last_token_again(logits, ids, position):
    """A logits processor that reads the ids: no token is drawn twice in a row."""
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
    x = reference.sequence_bias(x, row, options.get("sequence_bias", {}))
    x = reference.repetition_penalty(x, counted(row), options.get("repetition_penalty", 1))
    new = counted(row, PROMPT)
    x = x - options.get("presence_penalty", 0) * (new > 0) - options.get("frequency_penalty", 0) * new
    if "dry_multiplier" in options:
        names = {"dry_base": "base", "dry_allowed_length": "allowed_length", "dry_sequence_breakers": "breakers"}
        more = {own: options[name] for name, own in names.items() if name in options}
        x = reference.dry_penalty(x, row, options["dry_multiplier"], **more)
    if "no_repeat_ngram_size" in options:
        x = np.where(reference.no_repeat_ngram_keep([row], options["no_repeat_ngram_size"], VOCAB)[0], x, -np.inf)
    x = x + options.get("logit_bias", 0)
    x = reference.sequence_bias(x, row, {tuple(word): -np.inf for word in options.get("bad_words_ids", ())})
    stops, at = options.get("stop_at_token", []), np.arange(VOCAB)
    too_short = len(row) - PROMPT < options.get("min_new_tokens", 0) or len(row) < options.get("min_length", 0)
    if too_short:
        x = np.where(np.isin(at, stops), -np.inf, x)
    if "prefix_allowed_tokens_fn" in options:
        x = np.where(np.isin(at, successors(0, np.array(row))), x, -np.inf)
    x = np.where(np.isin(at, options.get("allowed_token_ids", at)), x, -np.inf)
    if len(row) == min(LENGTH, PROMPT + options.get("max_steps", LENGTH)) - 1 and "forced_eos_token_id" in options:
        x = reference.forced(x, options["forced_eos_token_id"])
    if "exponential_decay_length_penalty" in options:
        x = reference.exponential_decay(x, stops, len(row) - PROMPT, *options["exponential_decay_length_penalty"])
    x = np.where(np.isin(at, options.get("suppress_tokens", ())), -np.inf, x)
    if len(row) == PROMPT:
        x = np.where(np.isin(at, options.get("begin_suppress_tokens", ())), -np.inf, x)
    return np.where(np.isin(at, stops), -np.inf, x) if options.get("never_end") else x


def successors(_, ids):
    """A prefix_allowed_tokens_fn: a token's next 60, and behind five tokens more."""
    return [(int(ids[-1]) + i) % VOCAB for i in range(60 if len(ids) % 5 else 90)]


# what Bigram would often draw: the likeliest few after a token, one or two tokens ahead of it
OFTEN = [np.argsort(-TABLE[t])[:12] for t in range(VOCAB)]
PAIRS = {(t, int(n)): 6.0 - 12.0 * (n % 2) for t in range(0, VOCAB, 2) for n in OFTEN[t][:5]}
TRIPLES = [[t, int(n), int(m)] for t in range(0, VOCAB, 3) for n in OFTEN[t][:6] for m in OFTEN[n][:6]]


MASKS = {  # behind top-k
    "top_p": reference.top_p_keep,
    "min_p": reference.min_p_keep,
    "typical_p": reference.typical_p_keep,
    "epsilon_cutoff": reference.epsilon_keep,
    "eta_cutoff": reference.eta_keep,
}


AHEAD_OF_TOP_K = {"top_n_sigma": reference.top_n_sigma_keep, "top_h": reference.top_h_keep}


def weights(options):
    """weights_of with the masks."""

    def of(x, temperature, top_k, alpha):
        if "dynatemp_range" in options:
            width, exponent = options["dynatemp_range"], options.get("dynatemp_exponent", 1)
            temperature = reference.dynamic_temperature(x[np.newaxis], temperature, width, exponent)[0]
        z = (x - x.max()) / temperature
        for name, keep in AHEAD_OF_TOP_K.items():
            if name in options:
                z = np.where(keep(z[np.newaxis], options[name])[0][0], z, -np.inf)
        if top_k is not None and 1 <= top_k < len(z):
            z = np.where(reference.top_k_keep(z, int(top_k)), z, -np.inf)
        for name, keep in MASKS.items():
            if name in options:
                n = options.get("min_tokens_to_keep", 1)
                z = np.where(reference.at_least(keep, z[np.newaxis], options[name], n)[0][0], z, -np.inf)
        return weights_of(z, 1, None, alpha)

    return of


SETTINGS = {
    "penalties": dict(repetition_penalty=1.5, presence_penalty=1.5, frequency_penalty=-0.7, logit_bias=BIAS),
    "sequences": dict(
        sequence_bias={**PAIRS, (7,): 3.0, (9,): -3.0, (30, 7): -1.0, (5, 30, 7): 0.25}, repetition_penalty=1.2,
        bad_words_ids=[[11], [12, 13], *TRIPLES],
    ),
    "allowed, suppressed": dict(
        allowed_token_ids=list(range(0, VOCAB, 2)), suppress_tokens=[4, 20, 44],
        begin_suppress_tokens=list(range(0, VOCAB, 4)),
    ),
    "length": dict(
        stop_at_token=[20, 21], min_length=PROMPT + 4, max_steps=9, forced_eos_token_id=[50, 51],
        exponential_decay_length_penalty=(4, 1.3),
    ),
    "a function": dict(prefix_allowed_tokens_fn=successors),
    "dry": dict(dry_multiplier=0.3, dry_base=4.0, dry_allowed_length=1, dry_sequence_breakers=[1], temperature=0.2),
    "dynatemp": dict(dynatemp_range=0.7, dynatemp_exponent=1.5, temperature=0.8),
    "min_tokens_to_keep": dict(min_tokens_to_keep=3, top_p=0.9, typical_p=0.2),
    "n-grams": dict(no_repeat_ngram_size=2, temperature=0.2),
    "processors, min_new_tokens": dict(logits_processors=(favour_even, last_token_again),
                                       stop_at_token=[STOP, 20, 21], min_new_tokens=9),
    "never_end, typical_p": dict(stop_at_token=[STOP, 20], never_end=True, typical_p=0.5),
    "top_p, epsilon": dict(top_p=0.8, epsilon_cutoff=0.02),
    "top_n_sigma, min_p": dict(top_n_sigma=1.6, min_p=0.03),
    "top_h, top_k, eta": dict(top_h=0.6, sampling_keep_top_k=12, eta_cutoff=0.05),
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
OUT_OF_RANGE = {
    "dry_multiplier": -1, "dynatemp_range": -0.5, "xtc_probability": 1.5, "mirostat": 1,
    "repetition_penalty": 0, "presence_penalty": np.inf, "frequency_penalty": np.nan, "top_p": 1.1, "min_p": -0.1,
    "typical_p": 1.5, "epsilon_cutoff": 2, "eta_cutoff": -1, "top_n_sigma": -1, "top_h": 1.1,
}  # fmt: skip
NEUTRAL = {name: NUMBERS[name].neutral for name in OUT_OF_RANGE}


def fixed(options):
    return {"seed": 3, "stop_at_token": None, **options}


@functools.cache
def tokens():
    return loops({name: fixed(options) for name, options in SETTINGS.items()}, Bigram())(PROMPTS)


def held_against_the_simulation(out, options, against=None, rows=slice(None)):
    against = options if against is None else against
    return follow(
        out,
        PROMPTS[rows],
        lambda row: penalised(against, bigram(row), row),
        temperature=options.get("temperature", 0.9),
        top_k=against.get("sampling_keep_top_k"),
        alpha=options.get("entmax_alpha"),
        seed=options.get("seed", 3),
        stream=options.get("stream"),
        stop=options.get("stop_at_token", []),
        max_steps=options.get("max_steps"),
        weights=weights(against),
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_against_the_simulation(name):
    wrong, drawn, excused = held_against_the_simulation(tokens()[name], SETTINGS[name])
    assert wrong == []
    assert drawn > 30 and excused <= drawn // 50


SEEN = [
    (name, control)
    for name, options in SETTINGS.items()
    for control in options
    if not name.startswith(("all", "greedy")) and control not in ("temperature", "stop_at_token", "max_steps")
]


@slow
@pytest.mark.parametrize("name, control", SEEN)
def test_the_simulation_sees_a_control_that_is_lost(name, control):
    without = {k: v for k, v in SETTINGS[name].items() if k != control}
    assert held_against_the_simulation(tokens()[name], SETTINGS[name], without)[0]


@pytest.mark.parametrize(
    "mesh_shape, layout, names",
    [
        ("x:2", "vocab:x", ("all, softmax",)),
        pytest.param(
            "x:2,y:2", "batch:x,vocab:y", ("processors, min_new_tokens", "all, softmax", "all, entmax"), marks=slow
        ),
        pytest.param("x:3", "vocab:x", ("n-grams", "greedy", "top_n_sigma, min_p", "top_h, top_k, eta"), marks=slow),
        pytest.param(
            "x:2,y:2", "batch:x,vocab:y", ("sequences", "allowed, suppressed", "length", "a function"), marks=slow
        ),
    ],
)
def test_layouts(mesh_shape, layout, names):
    cases = {name: fixed(SETTINGS[name]) for name in names}
    split = loops(cases, Bigram(), runner=MeshRunner(mesh_shape, layout))(PROMPTS)
    assert {name: int((split[name] != tokens()[name]).sum()) for name in cases} == dict.fromkeys(cases, 0)


def test_a_value_for_each_row():
    """One batch with a row for each setting of numbers, passed as tensors."""
    own = [dict(repetition_penalty=1.5, top_n_sigma=2.0), dict(top_p=0.6, top_h=0.7), dict(min_p=0.2),
           dict(typical_p=0.5), dict(epsilon_cutoff=0.02), dict(eta_cutoff=0.05), dict(presence_penalty=1.5),
           dict(frequency_penalty=-0.7)]  # fmt: skip
    neutral = dict(NEUTRAL, sampling_keep_top_k=0, entmax_alpha=1, temperature=0.9)
    columns = {key: [options.get(key, value) for options in own] for key, value in neutral.items()}
    columns["temperature"][7] = 0  # one greedy row
    columns["sampling_keep_top_k"][1] = 9
    columns["entmax_alpha"][2] = 1.5
    columns["seed"] = [3, 3, 5, 3, 3, 4, 3, 3]
    columns["stream"] = [4, 0, 1, 2, 2**31 - 1, -5, 4, 4]
    columns["max_steps"] = [9, 1, 2, 9, 30, 9, 9, 9]
    columns["stop_at_token"] = [-1, -1, 21, 22, -1, -1, -1, 20]
    columns["min_new_tokens"] = [0, 0, 0, 0, 0, 0, 0, 4]
    whole = ("sampling_keep_top_k", "seed", "stream", "max_steps", "stop_at_token", "min_new_tokens")
    as_tensors = {k: np.array(v, np.int32 if k in whole else np.float32) for k, v in columns.items()}
    out = loops({"mixed": dict(as_tensors, max_top_k=20, sampling_use_entmax=True)}, Bigram())(PROMPTS)["mixed"]
    counts = []
    for row in range(BATCH):
        options = {key: column[row] for key, column in columns.items() if column[row] != neutral.get(key)}
        wrong, *more = held_against_the_simulation(out[[row]], options, rows=[row])
        assert wrong == [], row
        counts.append(more)
    drawn, excused = np.sum(counts, 0)
    assert drawn > 50 and not excused
    assert len(np.unique(out, axis=0)) == BATCH


def test_a_tensor_value_out_of_range_makes_its_row_invalid():
    columns = {name: np.full(len(OUT_OF_RANGE) + 1, NEUTRAL[name], NUMBERS[name].dtype) for name in OUT_OF_RANGE}
    for row, (name, value) in enumerate(OUT_OF_RANGE.items()):
        columns[name][row] = value
    prompts = prompts_of([PROMPT] * (len(OUT_OF_RANGE) + 1))
    out = loops({"bad": fixed(columns)}, Bigram(), batch=len(prompts))(prompts)["bad"]
    for row, name in enumerate(OUT_OF_RANGE):
        assert out[row, PROMPT] == -1 and not out[row, PROMPT + 1 :].any(), name
    assert (out[-1, PROMPT:] >= 0).all()


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


# --- Controls that draw, and that keep a state -----------------------------------------------

DRAWING = {
    "xtc": dict(xtc_probability=0.6, xtc_threshold=0.05, temperature=1.2),
    "xtc of rows": dict(
        xtc_probability=np.array([0, 1, 0.5, 0.5] * 2, np.float32),
        xtc_threshold=np.array([0.1] * 4 + [0.03] * 4, np.float32), min_p=0.001,
    ),
    "mirostat": dict(mirostat=2, mirostat_tau=2.0, mirostat_eta=0.4, temperature=1.3, stop_at_token=[STOP]),
    "mirostat of rows": dict(
        mirostat=np.array([2, 0] * 4, np.int32), mirostat_tau=np.array([1, 2, 3, 4] * 2, np.float32), mirostat_eta=0.2,
        repetition_penalty=1.2, temperature=np.array([1] * 6 + [0, 0], np.float32),
    ),
}  # fmt: skip


def follow_drawing(out, options):
    """(wrong tokens, tokens drawn, those too close to call) of controls that draw or keep a state."""
    wrong, drawn, excused = [], 0, 0
    for r in range(BATCH):
        own = {name: v[r] if isinstance(v, np.ndarray) else v for name, v in options.items()}
        row, mu = PROMPTS[r, :PROMPT].tolist(), 2 * own.get("mirostat_tau", 5)
        while len(row) < LENGTH:
            actual, step = int(out[r, len(row)]), len(row) - PROMPT
            x = penalised(own, bigram(row), row)
            if own.get("temperature") == 0:
                expected, close = int(np.argmax(x)), False
            else:
                z = weights({k: v for k, v in own.items() if k == "min_p"})
                with np.errstate(divide="ignore"):
                    z = np.log(z(x, own.get("temperature", 0.9), None, None))[np.newaxis]
                keep, clear = np.ones_like(z, bool), np.ones_like(z, bool)
                if own.get("xtc_probability"):
                    bits = reference.threefry2x32(3, r, step, 2**32 - 1)[0]
                    if float(reference.bits_to_uniform(bits)) < np.float32(own["xtc_probability"]):
                        keep, clear = reference.xtc_keep(z, own["xtc_threshold"])
                if own.get("mirostat"):
                    keep, clear = reference.mirostat_keep(z, mu)
                    clear = clear & (abs(z + mu * np.log(2)) > 1e-4)  # surprises are rounded to 2**-16
                p = reference.softmax(np.where(keep, z, -np.inf))[0]
                u = uniforms(3, r, step)
                expected = reference.two_level_draw(p, *u)
                close = not clear.all() or boundary_distance(p, *u) < 1e-5
                if own.get("mirostat") and p[actual] > 0:  # else it is wrong
                    mu -= own["mirostat_eta"] * (-np.log2(p[actual]) - own["mirostat_tau"])
            drawn += 1
            excused += close and actual != expected
            if actual != expected and not close:
                wrong.append((r, len(row), actual, expected))
            row.append(actual)
            if actual in options.get("stop_at_token", ()):
                break
        assert out[r].tolist() == row + [0] * (LENGTH - len(row))
    return wrong, drawn, excused


@functools.cache
def drawing(mesh_shape="", layout=""):
    cases = {name: fixed(options) for name, options in DRAWING.items()}
    return loops(cases, Bigram(), runner=MeshRunner(mesh_shape, layout))(PROMPTS)


@pytest.mark.parametrize("name", DRAWING)
def test_controls_that_draw_or_keep_a_state(name):
    wrong, drawn, excused = follow_drawing(drawing()[name], DRAWING[name])
    assert wrong == []
    assert drawn > 30 and excused <= drawn // 20


@slow
def test_controls_that_draw_or_keep_a_state_on_a_layout():
    for name, tokens in drawing("x:2,y:2", "batch:x,vocab:y").items():
        np.testing.assert_array_equal(tokens, drawing()[name], name)


@slow
@pytest.mark.parametrize("name", ["xtc", "mirostat"])
def test_the_simulation_sees_what_they_do(name):
    other = {**DRAWING[name], **({"xtc_probability": 0.3} if name == "xtc" else {"mirostat_eta": 0.3})}
    assert follow_drawing(drawing()[name], other)[0]


# --- What came out ---------------------------------------------------------------------


LOGPROB_CASES = {
    "softmax": dict(temperature=0.7, repetition_penalty=1.3),
    "top_k": dict(sampling_keep_top_k=7),
    "top_p": dict(top_p=0.5, sampling_keep_top_k=40),
    "entmax": dict(sampling_use_entmax=True, entmax_alpha=1.6, temperature=1.5),
    "greedy": dict(temperature=0),
    "of rows": dict(temperature=np.array([0, 1] * 4, np.float32), max_top_k=9,
                    sampling_keep_top_k=np.array([0, 0, 9, 9] * 2, np.int32)),
}  # fmt: skip


@functools.cache
def with_logprobs(mesh_shape, layout, names):
    cases = {name: {**fixed(LOGPROB_CASES[name]), "return_logprobs": True} for name in names}
    cases["shifted"] = {**cases["greedy"], "remove_partial_sequences": True, "max_steps": 6}
    return loops(cases, Bigram(), runner=MeshRunner(mesh_shape, layout))(PROMPTS)


@pytest.mark.parametrize(
    "mesh_shape, layout, names",
    [
        ("", "", ("softmax", "top_p", "entmax", "greedy", "of rows")),
        pytest.param("x:2", "vocab:x", tuple(LOGPROB_CASES), marks=slow),
    ],
)
def test_log_probabilities(mesh_shape, layout, names):
    out = with_logprobs(mesh_shape, layout, names)
    for name in names:
        options, (ids, logprobs, draw_logprobs) = LOGPROB_CASES[name], out[name]
        assert held_against_the_simulation(ids, options)[0] == []  # as without log-probabilities
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
    # they are shifted with their tokens
    for whole, shifted in zip(out["greedy"], out["shifted"]):
        assert np.array_equal(shifted[:, :6], whole[:, PROMPT : PROMPT + 6]) and not shifted[:, 6:].any()


@pytest.mark.parametrize(
    "runner", [MeshRunner(), pytest.param(MeshRunner("x:2,y:2", "batch:x,vocab:y"), marks=slow)], ids=str
)
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


@pytest.mark.parametrize(
    "runner",
    [MeshRunner("x:2", "batch:x"), pytest.param(MeshRunner("x:2,y:2", "batch:x,vocab:y"), marks=slow)],
    ids=str,
)
def test_a_criterion_of_the_users_own_ends_rows(runner):
    """Rows end at an even token, in the graph and through the host, which sees each token once."""
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
    criteria = {"mesh": lambda *_: is_even, "host": lambda *_: on_host}
    cases = {name: fixed({"stopping_criteria": criterion}) for name, criterion in criteria.items()}
    out = loops(cases, Bigram(), runner=runner)(PROMPTS)
    want = loops({"none": fixed({})}, Bigram())(PROMPTS)["none"]
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
    "xtc": dict(xtc_probability=0.4, xtc_threshold=0.03),
    "mirostat": dict(mirostat=2, mirostat_tau=2.5),
    "dynatemp": dict(dynatemp_range=0.6, temperature=0.8),
    "min_tokens_to_keep": dict(top_p=0.2, min_tokens_to_keep=6),
    "dry": dict(dry_multiplier=1.5, dry_allowed_length=1, dry_sequence_breakers=[]),
    "sequences": dict(sequence_bias={(284, 360): 2.0, (360, 284): -1.0, (262,): 1.0}, suppress_tokens=[290, 12],
                      allowed_token_ids=list(range(2, 2048))),
    "all": dict(repetition_penalty=1.2, logit_bias={262: 2.0, 290: -2.0}, bad_words_ids=[[256], [12]], temperature=1.1,
                top_k=300, top_p=0.9, min_p=0.005, typical_p=0.85, epsilon_cutoff=1e-3, eta_cutoff=2e-3,
                entmax_alpha=1.2),
}  # fmt: skip
DRAWS, FALSE_ALARM = 2048, 1e-4  # of each chi-square, of which there are 18
REQUESTS = [  # of a prompt for each of these settings
    ("plain", "top_k", "entmax"),
    *(
        pytest.param(*names, marks=slow)
        for names in [
            [("plain",)],
            [("temperature", "top_p", "min_p", "repetition")],
            [("typical_p", "epsilon", "eta")],
            [("all",)],
            [("xtc", "dynatemp", "min_tokens_to_keep")],
            [("mirostat",)],
            [("dry",)],
            [("sequences",)],
        ]
    ),
]


@pytest.fixture(scope="module")
def demo():
    return TextGenerator.from_pretrained()


@pytest.mark.parametrize("names", REQUESTS, ids=", ".join)
def test_the_bundled_models_tokens_follow_the_exact_distribution(demo, names):
    prompt = "She had no doubt that she"
    ids, options = demo.encode(prompt), dict(DRAWN[names[0]])
    if len(names) > 1:  # a value for each prompt, what changes nothing where a setting has none
        neutral = {"temperature": 0.9, "top_k": 0, "entmax_alpha": 1}
        neutral |= {name: NUMBERS[name].neutral for name in ("repetition_penalty", *MASKS)}
        neutral |= {"xtc_probability": 0, "dynatemp_range": 0, "min_tokens_to_keep": None, "xtc_threshold": None}
        used = {option for name in names for option in DRAWN[name]} | {"temperature"}
        options = {o: [DRAWN[name].get(o, neutral[o]) for name in names] for o in used}
    samples = demo.generate([prompt] * len(names), max_new_tokens=1, num_return_sequences=DRAWS, seed=8,
                            eos_token_id=-1, **options)  # fmt: skip
    weights = {name: demo.checkpoint.read(name) for name in demo.checkpoint.names()}
    params = demo.checkpoint.params
    params = {"padding_id": 0, **params, "attention_types": [[params["attention_types"], 1]]}
    logits = reference.gpt_neo_forward(weights, [ids], **reference_config(params))[0, -1]
    for first, name in enumerate(names):
        p = exact(logits.copy(), ids, **DRAWN[name])
        drawn = [s.tokens[0] for s in samples[first * DRAWS : (first + 1) * DRAWS]]
        counts = np.bincount(drawn, minlength=len(p))
        assert not counts[p == 0].any(), name
        often = p * DRAWS >= 5
        expected, seen = ([*x[often], x[~often].sum()] for x in (p * DRAWS, counts))
        if expected[-1] == 0:
            expected, seen = expected[:-1], seen[:-1]
        assert len(expected) > 3, name
        assert stats.chisquare(seen, expected).pvalue > FALSE_ALARM, name


def exact(logits, ids, repetition_penalty=1, logit_bias=(), bad_words_ids=(), temperature=None, top_k=None,
          entmax_alpha=None, xtc_probability=0, xtc_threshold=0.1, mirostat=0, mirostat_tau=5, dynatemp_range=0,
          min_tokens_to_keep=1, dry_multiplier=0, sequence_bias=None, suppress_tokens=(), allowed_token_ids=None,
          dry_allowed_length=2, dry_sequence_breakers=(), **masks):  # fmt: skip
    """The distribution that the token after `ids` is drawn from, in float64."""
    logits, entry = reference.sequence_bias(logits, ids, sequence_bias or {}), np.arange(len(logits))
    if repetition_penalty != 1:
        logits = reference.repetition_penalty(logits, reference.token_counts([ids], len(logits))[0], repetition_penalty)
    logits = reference.dry_penalty(logits, ids, dry_multiplier, allowed_length=dry_allowed_length)
    for token, bias in dict(logit_bias).items():
        logits[token] += bias
    for (token,) in bad_words_ids:
        logits[token] = -np.inf
    logits[
        np.isin(entry, suppress_tokens) | ~np.isin(entry, entry if allowed_token_ids is None else allowed_token_ids)
    ] = -np.inf
    temperature = temperature or (0.9 if entmax_alpha is None else 1.0)
    if dynatemp_range:
        temperature = reference.dynamic_temperature(logits[np.newaxis], temperature, dynatemp_range, 1)[0]
    z = (logits - logits.max()) / temperature
    if top_k is not None:
        z = np.where(reference.top_k_keep(z, top_k), z, -np.inf)
    for name, keep in MASKS.items():
        if name in masks:
            z = np.where(reference.at_least(keep, z[np.newaxis], masks[name], min_tokens_to_keep)[0][0], z, -np.inf)
    if mirostat:
        z = np.where(reference.mirostat_keep(z[np.newaxis], 2 * mirostat_tau)[0][0], z, -np.inf)
    if xtc_probability:
        cut = np.where(reference.xtc_keep(z[np.newaxis], xtc_threshold)[0][0], z, -np.inf)
        return xtc_probability * reference.softmax(cut) + (1 - xtc_probability) * reference.softmax(z)
    return reference.softmax(z) if entmax_alpha is None else reference.entmax(z, entmax_alpha)


def test_keywords_are_the_list():
    """What type checkers see of sample_autoregressive; the two others are GPT-Neo's own arguments."""
    fields = [field.name for field in dataclasses.fields(Controls)]
    assert list(ControlKeywords.__annotations__) == [name for name in fields if name not in ("temperature", "top_k")]
    with pytest.raises(TypeError, match="unknown keyword top_q; did you mean top_p\\?"):
        sample_autoregressive(None, {}, {}, top_q=0.5)


def test_the_guides_table_is_the_list():
    page = (pathlib.Path(__file__).parents[1] / "docs" / "sampling.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]
    found = {row[0].strip("`"): row for row in rows if len(row) == 5}
    for name, control in CONTROLS.items():
        assert found[name][1] == control.help
        if getattr(control, "neutral", None) is not None:
            assert found[name][3] == control.as_text(control.neutral)
        assert re.search(rf"^### .*\b{name}\b", page, re.MULTILINE)
    assert [name for name in found if name in CONTROLS] == list(CONTROLS)
