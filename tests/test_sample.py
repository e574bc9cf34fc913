"""sample.sample_autoregressive: the loop against a simulation in NumPy float64.

The loop is tested by itself, with models of a few lines whose logits are a
table's, and with the bundled model and GPT-Neo's checkpoints.
"""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import reference
from helpers_loop import (
    BATCH,
    BOS,
    DEFAULT_BOS,
    DEFAULT_STOP,
    INFINITE,
    INPUTS,
    LENGTH,
    NAN,
    NOTHING,
    PAD,
    PROMPTS,
    STOP,
    TABLE,
    TIES,
    VOCAB,
    Bigram,
    History,
    Input,
    bigram,
    bigram_logits,
    check,
    follow,
    history_logits,
    loops,
    prompts_of,
    token_at,
    weights_of,
)
from helpers_model import FLOAT32, checkpoint, config, random_weights, reference_config
from programs import MeshRunner, Program, dims

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling.models.utils import biasmask_attn_weights
from gpt_neo_sampling.sample import INVALID, sample_autoregressive

# --- Draws -------------------------------------------------------------------------

# For each option a value a row; rows 0 and 5 greedy.
MIXED = {
    "temperature": np.array([0, 0.9, 0.3, 1, 2, 0, 0.7, 1.5], np.float32),
    "top_k": np.array([40, 5, -1, 3, 0, 1, 50, 1], np.int32),
    "alpha": np.array([1.3, 1, 1.5, 2, 1.05, 1.7, 1.25, 1.9], np.float32),
    "seed": np.array([1, -5, 2**31 - 1, 0, 77, 1, 77, 3], np.int32),
    "stream": np.array([0, 3, 3, 12, -1, 5, 900000, 7], np.int32),
    "stop": np.array([STOP, STOP, -1, STOP, 500, 20, STOP, 30], np.int32),
    "max_steps": np.array([30, 7, 24, 9, 20, 0, 4, 1], np.int32),
    "bos": np.arange(10, 18, dtype=np.int32),
    "lengths": np.array([1, 3, 2, LENGTH, 0, 2, 11, 0], np.int32),
}
AS_ARGUMENT = {
    "temperature": "temperature",
    "top_k": "sampling_keep_top_k",
    "alpha": "entmax_alpha",
    "seed": "seed",
    "stream": "stream",
    "stop": "stop_at_token",
    "max_steps": "max_steps",
    "bos": "bos_id",
    "lengths": "prompt_lengths",
}
ALL_INPUTS = {AS_ARGUMENT[name]: Input(name) for name in INPUTS}
TENSOR_CASES = {
    "softmax": {**{name: of for name, of in ALL_INPUTS.items() if name != "entmax_alpha"}, "max_top_k": 50},
    "entmax": {**ALL_INPUTS, "max_top_k": 50, "sampling_use_entmax": True},
}


@functools.cache
def tensor_loops():
    """One graph that takes every option as a tensor [batch], for softmax and entmax."""
    return loops(TENSOR_CASES, Bigram())


def defaults(**options):
    """Inputs for tensor_loops that amount to no option, but for those given."""
    plain = dict(temperature=1, top_k=-1, alpha=1.3, seed=5, stream=np.arange(BATCH), stop=-1, max_steps=LENGTH,
                 bos=BOS, lengths=(PROMPTS != PAD).sum(1))  # fmt: skip
    return {**plain, **options}


def alpha_of(case, options):
    return options["alpha"] if case == "entmax" else None


@pytest.mark.parametrize("case", TENSOR_CASES)
@pytest.mark.parametrize("seed", range(3))
def test_mixed_requests_against_the_simulation(case, seed):
    options = {name: np.roll(values, seed) if name != "lengths" else values for name, values in MIXED.items()}
    out = tensor_loops()(PROMPTS, **options)[case]
    check(out, PROMPTS, bigram, **{**options, "alpha": alpha_of(case, options)}, at_least=30)


@pytest.mark.parametrize("case", TENSOR_CASES)
def test_one_request_of_each_kind_against_the_simulation(case):
    for changed in ({}, {"temperature": 0.5}, {"top_k": 5}, {"temperature": 0.7, "top_k": 9}, {"seed": -(2**31)},
                    {"alpha": 1.8, "top_k": 2}, {"stop": STOP}, {"max_steps": 5, "stop": STOP}):  # fmt: skip
        options = defaults(**changed)
        out = tensor_loops()(PROMPTS, **options)[case]
        check(out, PROMPTS, bigram, **{**options, "alpha": alpha_of(case, options)})


MISTAKES = {
    "temperature after entmax": lambda x, t, k, a: weights_of(x, 1, k, a) ** (1 / t),
    "top-k after entmax": lambda x, t, k, a: weights_of(x, t, None, a) * reference.top_k_keep(x, int(k)),
    "no temperature": lambda x, t, k, a: weights_of(x, 1, k, a),
    "no top-k": lambda x, t, k, a: weights_of(x, t, None, a),
    "one fewer in top-k": lambda x, t, k, a: weights_of(x, t, k - 1, a),
    "softmax": lambda x, t, k, a: weights_of(x, t, k, None),
    "alpha 1.3": lambda x, t, k, a: weights_of(x, t, k, 1.3),
}


@pytest.mark.slow
def test_the_simulation_sees_another_order_or_a_lost_option():
    found = {mistake: [] for mistake in MISTAKES}
    for temperature in (1.6, 20):
        options = defaults(temperature=temperature, top_k=6, alpha=1.6)
        out = tensor_loops()(PROMPTS, **options)["entmax"]
        check(out, PROMPTS, bigram, **options)
        for mistake, weights in MISTAKES.items():
            wrong, drawn, _ = follow(out, PROMPTS, bigram, **options, weights=weights)
            found[mistake].append(len(wrong))
            assert drawn > 100
    assert min(max(counts) for counts in found.values()) >= 4, found


def test_the_simulation_sees_other_uniforms():
    options = defaults(seed=11)
    out = tensor_loops()(PROMPTS, **options)["softmax"]
    del options["alpha"]
    check(out, PROMPTS, bigram, **options)
    for changed in ({"seed": 12}, {"stream": np.arange(BATCH) + 1}, {"seed": np.arange(BATCH), "stream": 11}):
        wrong, drawn, _ = follow(out, PROMPTS, bigram, **{**options, **changed})
        assert len(wrong) > 0.5 * drawn


NUMBER_CASES = {
    "default": {},
    "default entmax": {"sampling_use_entmax": True},
    "temperature 0": {"temperature": 0},
    "temperature 0.0, entmax": {"temperature": 0.0, "sampling_use_entmax": True},
    "top-k, temperature": {"sampling_keep_top_k": 4, "temperature": 0.5},
    "top-k, entmax, temperature": {
        "sampling_keep_top_k": 4, "sampling_use_entmax": True, "entmax_alpha": 1.6, "temperature": 1.7,
    },
    "entmax, alpha 1": {"sampling_use_entmax": True, "entmax_alpha": 1},
    "entmax, alpha 2": {"sampling_use_entmax": True, "entmax_alpha": 2.0},
    "top-k a tenth": {"sampling_keep_top_k": -2},
    "top-k of the vocabulary": {"sampling_keep_top_k": VOCAB},
    "top-k beyond it": {"sampling_keep_top_k": VOCAB + 1000},
    "all off": {"sampling_keep_top_k": -1, "stop_at_token": None, "max_steps": None},
    "max_steps 3": {"max_steps": 3},
    "max_steps 0": {"max_steps": 0, "temperature": 0},
    "stop": {"stop_at_token": STOP, "sampling_keep_top_k": 30},
    "slow": {"params": {"slow_sampling": True}, "stop_at_token": STOP, "sampling_keep_top_k": 30},
    "slow entmax": {"params": {"slow_sampling": True}, "sampling_use_entmax": True},
}  # fmt: skip


@functools.cache
def number_cases():
    """Each of NUMBER_CASES on PROMPTS at seed 5."""
    cases = {name: {"seed": 5, "bos_id": BOS, **options} for name, options in NUMBER_CASES.items()}
    return loops(cases, Bigram())(PROMPTS)


def simulated_options(options):
    """The keyword arguments of follow() for those of sample_autoregressive."""
    entmax = options.get("sampling_use_entmax", False)
    k = options.get("sampling_keep_top_k", -1)
    return {
        "seed": 5,
        "bos": BOS,
        "temperature": options.get("temperature", 1.0 if entmax else 0.9),
        "alpha": options.get("entmax_alpha", 1.3) if entmax else None,
        "top_k": {-1: None, -2: 19}.get(k, k),
        "stop": options.get("stop_at_token", DEFAULT_STOP),
        "max_steps": options.get("max_steps"),
    }


@pytest.mark.parametrize("case", NUMBER_CASES)
def test_python_numbers_against_the_simulation(case):
    options = NUMBER_CASES[case]
    at_least = {"max_steps 0": 0, "max_steps 3": 19}.get(case, 40)
    check(number_cases()[case], PROMPTS, bigram, at_least=at_least, **simulated_options(options))


def test_cases_that_must_agree():
    """Not only with the simulation, and for what it does not look at: that they differ."""
    out = number_cases()
    for a, b in [("default", "all off"), ("default", "top-k of the vocabulary"), ("default", "top-k beyond it"),
                 ("temperature 0", "temperature 0.0, entmax"), ("stop", "slow"),
                 ("default entmax", "slow entmax")]:  # fmt: skip
        assert np.array_equal(out[a], out[b]), (a, b)
    for a in ("temperature 0", "default entmax", "top-k, temperature", "top-k a tenth", "stop"):
        assert not np.array_equal(out[a], out["default"]), a
    for a in ("temperature 0", "entmax, alpha 1", "entmax, alpha 2", "top-k, entmax, temperature"):
        assert not np.array_equal(out[a], out["default entmax"]), a


def test_tensor_options_are_the_numbers_one_row_each():
    """A mixed request gives each row the tokens of the run with that row's options alone."""
    softmax = ["default", "temperature 0", "top-k, temperature", "stop", "all off", "max_steps 3", "max_steps 0",
               "top-k a tenth"]  # fmt: skip
    entmax = ["default entmax", "temperature 0.0, entmax", "top-k, entmax, temperature", "entmax, alpha 1",
              "entmax, alpha 2", "top-k, entmax, temperature", "default entmax", "entmax, alpha 2"]  # fmt: skip
    for kind, cases in (("softmax", softmax), ("entmax", entmax)):
        for shift in range(BATCH):
            of_row = [cases[(row + shift) % BATCH] for row in range(BATCH)]
            rows = [simulated_options(NUMBER_CASES[case]) for case in of_row]

            def values(name, absent, rows=rows):
                return np.array([absent if o[name] is None else o[name] for o in rows])

            out = tensor_loops()(
                PROMPTS,
                **defaults(
                    temperature=values("temperature", None).astype(np.float32),
                    top_k=values("top_k", -1),
                    alpha=values("alpha", 1.3),
                    stop=values("stop", -1),
                    max_steps=values("max_steps", LENGTH),
                ),
            )[kind]
            expected = [number_cases()[case][row] for row, case in enumerate(of_row)]
            assert np.array_equal(out, expected)


def test_scalar_tensors():
    """tf and mtf tensors without dims, where a number may stand."""

    def tensors(mesh, make):
        return dict(temperature=make(0.5, tf.float32), sampling_keep_top_k=make(6, tf.int32), max_top_k=6,
                    seed=make(5, tf.int32), stop_at_token=make(STOP, tf.int32), max_steps=make(20, tf.int32),
                    bos_id=make(BOS, tf.int32))  # fmt: skip

    def build(mesh, prompts):
        shape = mtf.Shape(dims(batch=BATCH, sequence=LENGTH))
        ids = mtf.import_tf_tensor(mesh, prompts, shape)
        other = {"vocab_dim": mtf.Dimension("vocab", VOCAB)}
        return [
            sample_autoregressive(ids, other, {}, model=Bigram(), **tensors(mesh, make))
            for make in (
                lambda value, dtype: tf.constant(value, dtype),
                lambda value, dtype: mtf.constant(mesh, value, dtype=dtype),
            )
        ]

    tf_tensor, mtf_tensor = Program(build, [(tf.int32, PROMPTS.shape)], {"table": TABLE})(PROMPTS)
    check(tf_tensor, PROMPTS, bigram, seed=5, bos=BOS, temperature=0.5, top_k=6, stop=STOP, max_steps=20)
    assert np.array_equal(tf_tensor, mtf_tensor)


@functools.cache
def ties():
    """What is drawn from TIES behind prompts of one token."""
    cases = {
        "number": {"temperature": 0},
        "tensor": {"temperature": Input("temperature")},
        "top-k": {"sampling_keep_top_k": 3, "seed": 5},
    }
    prompts = prompts_of([1] * BATCH)
    return prompts, loops(cases, Bigram(), table=TIES)(prompts, temperature=0.0)


def test_greedy_ties_go_to_the_lower_index():
    prompts, out = ties()
    for case in ("number", "tensor"):
        check(out[case], prompts, bigram_logits(TIES), temperature=0)
        for row in out[case]:
            for last, token in zip(row, row[1:]):
                assert TIES[last, token] == TIES[last].max() and np.all(TIES[last, :token] < TIES[last, token])
    assert all((row == row.max()).sum() > 1 for row in TIES)


def test_top_k_ties_go_to_the_lower_index():
    prompts, out = ties()
    check(out["top-k"], prompts, bigram_logits(TIES), seed=5, top_k=3)
    three = np.argsort(-TIES, axis=1, kind="stable")[:, :3]
    assert all(token in three[last] for row in out["top-k"] for last, token in zip(row, row[1:]))


def test_a_tensor_option_out_of_range_makes_the_row_invalid():
    """What cannot be refused when the graph is built: −1, for that row alone."""
    for kind, bad in (
        ("softmax", {"temperature": [1, -1, np.nan, 1, 1, -np.inf, 1, 1]}),
        ("softmax", {"top_k": [-1, 51, 191, -1, -1, 52, 50, -1]}),
        ("entmax", {"alpha": [1.3, 0.9, 2.1, 1.3, 1.3, np.nan, 1, 2]}),
    ):
        options = defaults(**{k: np.array(v) for k, v in bad.items()})
        out = tensor_loops()(PROMPTS, **options)[kind]
        lengths = options["lengths"]
        assert [out[r, lengths[r]] for r in (1, 2, 5)] == [INVALID] * 3
        good = tensor_loops()(PROMPTS, **defaults(**({"alpha": 1.3} if kind == "entmax" else {})))[kind]
        kept = [0, 3, 4] + ([] if kind == "entmax" else [7])
        assert np.array_equal(out[kept], good[kept])
        assert not np.any(out[kept] == INVALID)


# --- Seeds and streams ---------------------------------------------------------------


def test_batch_independence():
    """A row's tokens are the same in any company: the first 3 of 8, or any 3 with their streams."""
    cases = {"x": {"seed": 9, "stop_at_token": STOP, "sampling_use_entmax": True, "stream": Input("stream")}}
    prompts = prompts_of([4, 1, 2, 9, 3, 3, 7, 1])
    eight = loops(cases, Bigram())(prompts, stream=np.arange(8))["x"]
    three = loops(cases, Bigram(), batch=3)
    for rows in ([0, 1, 2], [6, 3, 4]):
        assert np.array_equal(three(prompts[rows], stream=np.array(rows))["x"], eight[rows])


def test_equal_prompts_differ_by_their_stream_alone():
    prompts = np.repeat(prompts_of([3]), BATCH, 0)
    options = defaults(lengths=3)
    rows = tensor_loops()(prompts, **options)["softmax"]
    assert len(np.unique(rows, axis=0)) == BATCH
    rows = tensor_loops()(prompts, **{**options, "stream": 4})["softmax"]
    assert len(np.unique(rows, axis=0)) == 1
    rows = tensor_loops()(prompts, **{**options, "stream": 4, "seed": np.arange(BATCH)})["softmax"]
    assert len(np.unique(rows, axis=0)) == BATCH


@functools.cache
def seed_runs():
    """Two runs of one graph, of rows that differ in their streams alone, but for a case."""
    cases = {
        "none": {},
        "none, slow": {"params": {"slow_sampling": True}},
        "none, one stream": {"stream": Input("stream")},
        "-1": {"seed": -1},
        "2**32 - 1": {"seed": 2**32 - 1},
    }
    prompts, run = np.repeat(prompts_of([3]), BATCH, 0), loops(cases, Bigram())
    return prompts, run(prompts, stream=0), run(prompts, stream=0)


def test_seeds():
    prompts, first, second = seed_runs()
    for name in first:
        same = np.array_equal(first[name], second[name])
        assert same == (not name.startswith("none")), name
        # within one run each of the rows and each of the steps has numbers of its own
        assert len(np.unique(first[name], axis=0)) == (1 if name == "none, one stream" else BATCH), name
    assert np.array_equal(first["-1"], first["2**32 - 1"])
    assert not np.array_equal(first["none"], first["none, slow"])
    check(first["-1"], prompts, bigram, seed=-1)


def test_a_fresh_seed_holds_for_the_whole_run():
    """Rows of equal streams and prompts stay equal, at every step, and rows of their own streams do not."""
    _, *runs = seed_runs()
    for out in runs:
        assert len(np.unique(out["none, one stream"], axis=0)) == 1
        assert len(np.unique(out["none, one stream"])) > 10
        assert len(np.unique(out["none"], axis=0)) == BATCH


# --- Where rows begin and end -----------------------------------------------------------


def test_an_empty_prompt_is_the_beginning_token():
    """At position 0, by number, by tensor, without prompts; by default 50256, which this vocabulary has not."""
    nothing = np.full((BATCH, LENGTH), PAD, np.int32)
    garbage = prompts_of([LENGTH] * BATCH)
    greedy = {"temperature": 0, "stop_at_token": None}
    cases = {
        "sampled": {"bos_id": BOS, "seed": 5, "stop_at_token": STOP},
        "number": {"bos_id": BOS, **greedy},
        "tensor": {"bos_id": Input("bos"), **greedy},
        "default": greedy,
        "no prompts": {"bos_id": BOS, "seed": 5, "stop_at_token": STOP, "has_partial_sequences": False},
        "lengths": {"bos_id": BOS, "prompt_lengths": Input("lengths"), **greedy},
        "no steps": {"bos_id": BOS, "max_steps": 0, **greedy},
        "removed": {"bos_id": BOS, "remove_partial_sequences": True, **greedy},
    }
    run = loops(cases, Bigram())
    bos = np.arange(10, 18)
    out = run(nothing, bos=bos, lengths=0)
    one_token = np.where(np.arange(LENGTH) == 0, BOS, PAD) * np.ones((BATCH, 1), int)
    as_prompt = run(one_token.astype(np.int32), bos=bos, lengths=1)
    for case in ("sampled", "no prompts"):
        assert np.array_equal(out[case], as_prompt["sampled"]), case
        check(out[case], nothing, bigram, seed=5, bos=BOS, stop=STOP)
    for case in ("number", "lengths"):
        assert np.array_equal(out[case], as_prompt["number"]), case
        check(out[case], nothing, bigram, temperature=0, bos=BOS, stop=-1)
    check(out["tensor"], nothing, bigram, temperature=0, bos=bos, stop=-1)
    assert out["default"].tolist() == [[INVALID] + [PAD] * (LENGTH - 1)] * BATCH
    assert out["no steps"].tolist() == one_token.tolist()
    assert np.array_equal(out["removed"][:, :-1], out["number"][:, 1:]) and np.all(out["removed"][:, -1] == PAD)
    out = run(garbage, bos=bos, lengths=0)  # what stands there is not a prompt
    assert np.array_equal(out["no prompts"], as_prompt["sampled"])
    assert np.array_equal(out["lengths"], as_prompt["number"])


def test_a_beginning_token_outside_the_vocabulary():
    """−1 where it would be written, in a row that is done; other rows are none the worse."""
    rest = {"temperature": 0, "stop_at_token": None, "prompt_lengths": Input("lengths")}
    inside = {"bos_id": BOS, **rest}
    cases = {
        "inside": inside,
        "tensor": {"bos_id": Input("bos"), **rest},
        "number": {"bos_id": VOCAB, **rest, "invalid_token": 5},
        "removed": {"bos_id": Input("bos"), **rest, "remove_partial_sequences": True},
        "inside, removed": {**inside, "remove_partial_sequences": True},
        "twice": {"bos_id": Input("bos"), **rest, "max_prompt_length": 4, "num_return_sequences": 2},
    }
    bos = np.array([BOS, BOS, -1, VOCAB, BOS, VOCAB, DEFAULT_STOP, 2**31 - 1])
    lengths = np.array([1, 0, 0, 0, 3, 2, 0, 1])
    out = loops(cases, Bigram())(prompts_of([3] * BATCH), bos=bos, lengths=lengths)
    outside = np.isin(np.arange(BATCH), [2, 3, 6])
    invalid = np.where(np.arange(LENGTH) == 0, INVALID, PAD)
    assert np.array_equal(out["tensor"], np.where(outside[:, None], invalid, out["inside"]))
    assert np.array_equal(out["removed"], np.where(outside[:, None], invalid, out["inside, removed"]))
    assert np.array_equal(out["twice"], np.repeat(out["tensor"], 2, 0))
    empty = (lengths == 0)[:, None]
    assert np.array_equal(out["number"], np.where(empty, np.where(invalid == INVALID, 5, PAD), out["inside"]))
    assert np.all(out["inside"] >= 0) and np.all(out["inside"][:, 5:] != PAD)


def test_finished_rows_hold_padding_while_others_go_on():
    out = number_cases()["stop"]
    prompt_lengths = np.maximum((PROMPTS != PAD).sum(1), 1)
    stopped = [r for r in range(BATCH) if STOP in out[r, prompt_lengths[r] :]]
    going = [r for r in range(BATCH) if r not in stopped and prompt_lengths[r] < LENGTH - 5]
    assert stopped and going
    for r in stopped:
        end = prompt_lengths[r] + np.argmax(out[r, prompt_lengths[r] :] == STOP)
        assert end < LENGTH - 2
        assert np.all(out[r, end + 1 :] == PAD)
        assert STOP not in out[r, prompt_lengths[r] : end]
    for r in going:
        assert PAD not in out[r].tolist()


NEVER_END_CASES = {
    "sampled": {"stop_at_token": STOP},
    "top-k": {"stop_at_token": STOP, "sampling_keep_top_k": 2},
    "greedy": {"stop_at_token": STOP, "temperature": 0},
    "entmax": {"stop_at_token": STOP, "sampling_use_entmax": True},
    "outside": {"stop_at_token": DEFAULT_STOP},
}


@functools.cache
def never_end(mesh_shape="", layout="", names=tuple(NEVER_END_CASES)):
    cases = {name: {"seed": 5, "bos_id": BOS, "never_end": True, **NEVER_END_CASES[name]} for name in names}
    return loops(cases, Bigram(), runner=MeshRunner(mesh_shape, layout))(PROMPTS)


@pytest.mark.parametrize("case", NEVER_END_CASES)
def test_never_end(case):
    out = never_end()[case]
    check(out, PROMPTS, bigram, **{**simulated_options(NEVER_END_CASES[case]), "never_end": True})
    assert (STOP in out) == (case == "outside")


def test_never_end_where_the_vocabulary_is_split():
    for case, tokens in never_end("x:2", "vocab:x", ("sampled", "greedy")).items():
        assert np.array_equal(tokens, never_end()[case])


def test_never_end_by_tensors():
    """A stop token a row; −1 is none."""
    stop = np.array([STOP, 20, -1, STOP, STOP, 40, 500, -1])
    out = loops({"x": {"seed": 5, "bos_id": BOS, "never_end": True, "stop_at_token": Input("stop")}}, Bigram())(
        PROMPTS, stop=stop
    )["x"]
    check(out, PROMPTS, bigram, seed=5, bos=BOS, stop=stop, never_end=True)
    assert [STOP in row for row in out[[0, 4]]] == [False, False] and STOP in out[[1, 2, 5, 6]]


def test_stop_tokens_of_the_prompt_do_not_count():
    prompts = prompts_of([4] * BATCH)
    prompts[:4, :4] = STOP
    prompts[4:, 3] = STOP
    out = tensor_loops()(prompts, **defaults(stop=STOP, lengths=4))["softmax"]
    check(out, prompts, bigram, temperature=1, seed=5, stop=STOP)
    assert np.array_equal(out[:, :4], prompts[:, :4])
    assert np.all(out[:, 4] != PAD)  # each went on


def test_prompt_lengths():
    """The padding id inside a prompt, its end too; what stands behind becomes padding."""
    prompts = prompts_of([LENGTH] * BATCH, seed=3)
    prompts[:, 1] = prompts[2:, 3] = PAD
    lengths = np.array([2, 3, 4, 5, 9, LENGTH, LENGTH - 1, 1])
    out = tensor_loops()(prompts, **defaults(lengths=lengths, max_steps=4))["softmax"]
    check(out, prompts, bigram, lengths=lengths, temperature=1, seed=5, max_steps=4)
    for row, n in enumerate(lengths):
        assert np.array_equal(out[row, :n], prompts[row, :n])
        assert np.all(out[row, n + 4 :] == PAD)
    none = tensor_loops()(prompts, **defaults(lengths=lengths, max_steps=0))["softmax"]
    assert np.array_equal(none, np.where(np.arange(LENGTH) < lengths[:, None], prompts, PAD))
    # without lengths, the tokens other than padding are counted
    gap = np.where(np.arange(LENGTH) < 6, prompts, PAD)
    out = loops({"counted": {"seed": 5, "max_steps": 2}}, Bigram())(gap)["counted"]
    check(out, gap, bigram, lengths=(gap != PAD).sum(1), seed=5, max_steps=2, at_least=16)


def test_prompts_that_fill_the_length():
    prompts = prompts_of([LENGTH] * BATCH)
    prompts[0] = STOP
    for kind, tokens in tensor_loops()(prompts, **defaults(stop=STOP, lengths=LENGTH)).items():
        assert np.array_equal(tokens, prompts), kind
    cases = {"slow": {"params": {"slow_sampling": True}}, "removed": {"remove_partial_sequences": True}}
    out = loops(cases, Bigram())(prompts)
    assert np.array_equal(out["slow"], prompts)
    assert np.all(out["removed"] == PAD)


def test_a_length_of_one():
    out = loops({"one": {"bos_id": BOS}}, Bigram(), length=1)(np.array([[3]] * 7 + [[PAD]], np.int32))["one"]
    assert out.ravel().tolist() == [3] * 7 + [BOS]


def test_remove_partial_sequences():
    cases = {
        "kept": {"seed": 5, "stop_at_token": STOP, "bos_id": BOS},
        "removed": {"seed": 5, "stop_at_token": STOP, "bos_id": BOS, "remove_partial_sequences": True},
    }
    padding = VOCAB + 5  # (test_two_batch_dims has one of the vocabulary)
    prompts = np.where(PROMPTS == PAD, padding, PROMPTS)
    out = loops(cases, Bigram(), padding_id=padding)(prompts)
    check(out["kept"], prompts, bigram, padding=padding, seed=5, stop=STOP, bos=BOS)
    for row, n in enumerate(np.maximum((PROMPTS != PAD).sum(1), 1)):
        assert out["removed"][row].tolist() == out["kept"][row, n:].tolist() + [padding] * n


def test_padding_outside_the_vocabulary():
    """Its id may not be drawn, so all of a row's tokens count, 0 among them."""
    prompts = prompts_of([1, 3, 5, LENGTH, 0, 2, 11, LENGTH - 1], padding=VOCAB)
    prompts[1, :3] = 0
    out = loops({"x": {"seed": 5, "stop_at_token": STOP, "bos_id": 0}}, Bigram(), padding_id=VOCAB)(prompts)["x"]
    check(out, prompts, bigram, padding=VOCAB, seed=5, stop=STOP, bos=0)
    ends = [row.tolist().index(VOCAB) for row in out if VOCAB in row]
    assert ends and all(np.all(row[row.tolist().index(VOCAB) :] == VOCAB) for row in out if VOCAB in row)


# --- No distribution --------------------------------------------------------------------


def test_invalid_rows():
    """NaN, +inf or nothing but −inf at one step of one row: −1 there and padding after."""
    cases = {
        "greedy": {"temperature": 0},
        "greedy tensor": {"temperature": Input("temperature")},
        "softmax": {"seed": 5},
        "top-k": {"seed": 5, "sampling_keep_top_k": 20},
        "entmax": {"seed": 5, "sampling_use_entmax": True},
        "slow": {"seed": 5, "params": {"slow_sampling": True}},
        "written as 7": {"seed": 5, "invalid_token": 7},
    }
    table = TABLE.copy()
    for token in (NAN, INFINITE, NOTHING):
        table[:, token] = -30  # never drawn, but
    for before, token in ((60, NAN), (61, INFINITE), (62, NOTHING)):
        table[before, token] = 100  # after this one, always
    prompts = prompts_of([4] * BATCH)
    prompts[1, 3], prompts[4, 3], prompts[6, 3] = NAN, INFINITE, NOTHING  # at the first step
    prompts[2, 3], prompts[3, 3], prompts[5, 3] = 60, 61, 62  # at the second
    run = loops(cases, Bigram(), table=table, spoiled=True)
    out = run(prompts, temperature=0.0)
    clean = prompts.copy()
    clean[[1, 2, 3, 4, 5, 6], 3] = 20
    harmless = run(clean, temperature=0.0)
    written = out.pop("written as 7")
    assert np.array_equal(written, np.where(out["softmax"] == INVALID, 7, out["softmax"]))
    for case, tokens in out.items():
        options = simulated_options(cases[case])
        if case == "greedy tensor":
            options["temperature"] = 0
        check(tokens, prompts, bigram_logits(table, spoil=True), **options)
        assert tokens[[1, 4, 6], 4].tolist() == [INVALID] * 3
        assert tokens[[2, 3, 5], 4].tolist() == [NAN, INFINITE, NOTHING]
        assert tokens[[2, 3, 5], 5].tolist() == [INVALID] * 3
        assert np.all(tokens[1, 5:] == PAD) and np.all(tokens[2, 6:] == PAD)
        assert np.array_equal(tokens[[0, 7]], harmless[case][[0, 7]])


# --- What the model is told -----------------------------------------------------------------


def test_the_context():
    model = Bigram()
    seen = {}

    def build(mesh, prompts):
        shape = mtf.Shape(dims(batch=BATCH, sequence=LENGTH))
        memory = mtf.Dimension("memory_length", 5)
        ids = mtf.import_tf_tensor(mesh, prompts, shape)
        seen.update(
            mesh=mesh,
            shape=shape,
            encoder_output=mtf.zeros(mesh, [shape[0], memory]),
            encoder_sequence_id=mtf.ones(mesh, [shape[0], memory], tf.int32),
            encoder_inputs=mtf.ones(mesh, [shape[0], memory], tf.int32),
            encoder_layer_outputs=[mtf.zeros(mesh, [shape[0], memory])],
            shared_params={"a": mtf.zeros(mesh, [])},
        )
        given = {k: seen[k] for k in seen if k not in ("mesh", "shape")}
        out = sample_autoregressive(
            ids, {"vocab_dim": mtf.Dimension("vocab", VOCAB)}, {}, model=model, seed=1, bos_id=BOS, **given
        )
        first = model.contexts[0]
        assert first.inputs.shape == ids.shape
        mtf_layers = [first.get_position(), dataclasses.replace(first, sequence_id=ids).nonpadding]
        return (
            out, first.inputs, first.initial_position, first.position, first.write_priority, first.read_priority,
            *mtf_layers,
        )  # fmt: skip

    run = Program(build, [(tf.int32, PROMPTS.shape)], {"table": TABLE})
    out, inputs, initial, position, write_priority, read_priority, first_position, nonpadding = run(PROMPTS)
    lengths = np.maximum((PROMPTS != PAD).sum(1), 1)
    at = np.arange(LENGTH)
    assert np.array_equal(initial, lengths)
    assert np.array_equal(inputs, np.where((at == 0) & (PROMPTS == PAD), BOS, PROMPTS))
    assert np.array_equal(position, at) and np.array_equal(first_position, at)
    assert nonpadding.dtype == np.float32 and np.array_equal(nonpadding, PROMPTS != PAD)
    assert np.array_equal(write_priority, np.where(at > lengths[:, None], at, 0))
    assert np.array_equal(read_priority, write_priority)

    first, *steps = model.contexts
    assert first.mode == "first_part" and first.position_is_default and not first.states
    assert steps and all(c.mode == "incremental" and not c.position_is_default for c in steps)
    batch_dim, length_dim = seen["shape"]
    for c in model.contexts:
        assert (c.mesh, c.batch_dims, c.length_dim) == (seen["mesh"], [batch_dim], length_dim)
        assert c.variable_dtype.master_dtype == c.activation_dtype == tf.float32
        assert c.train is False and c.num_microbatches == 1 and c.layer_index == 0
        assert c.cache == {} and c.layer_outputs == [] and not c.losses
        assert c.model is None and c.beam_dim is None and c.subsequence_id is None
        for name in ("encoder_output", "encoder_sequence_id", "encoder_inputs"):
            assert getattr(c, name).shape == seen[name].shape
        assert c.encoder_length_dim == seen["encoder_output"].shape[1]
        assert [t.shape for t in c.encoder_layer_outputs] == [seen["encoder_output"].shape]
        assert list(c.shared_params) == ["a"]
        assert c.sequence_id is None and c.nonpadding is None and hasattr(c, "write_priority")
        assert c.initial_position.shape.dims == [batch_dim]
        assert c.new_states == [] and c.constant_states == []
    for c in steps:
        assert c.position.shape.dims == c.read_priority.shape.dims == [batch_dim]
        assert c.position.dtype == tf.int32 and c.inputs.shape == seen["shape"]
        assert c.states == [] and c.get_position() is c.position
    check(out, PROMPTS, bigram, seed=1, bos=BOS)


def test_slow_sampling_gives_no_context():
    model = Bigram()
    loops({"slow": {"params": {"slow_sampling": True}}}, model)
    assert model.contexts and all(c is None for c in model.contexts)


def test_the_model_gets_what_it_was_given():
    """Features, config and dtype as they came; a missing config key is None."""
    calls = []

    def model(mtf_features, other_features, params, mesh, variable_dtype, context=None):
        calls.append((list(mtf_features), other_features["token"], params["absent"], params["n"], variable_dtype))
        assert tf.get_variable_scope().name == "gpt2"
        return Bigram()(mtf_features, other_features, params, mesh, variable_dtype, context)

    variable_dtype = mtf.VariableDType(tf.float32, tf.float32, tf.float32)

    def build(mesh):
        ids = mtf.zeros(mesh, dims(batch=2, sequence=3), tf.int32)
        other = {"vocab_dim": mtf.Dimension("vocab", VOCAB), "token": "x"}
        return sample_autoregressive(ids, other, {"n": 4}, model=model, variable_dtype=variable_dtype, bos_id=BOS)

    Program(build, weights={"table": TABLE})()
    assert calls and all(call == (["inputs"], "x", None, 4, variable_dtype) for call in calls)


PROBES = {
    # token = value at the step that writes position p of a row whose prompt has n tokens
    "position": (lambda c, ids: c.position, lambda p, n, row: p),
    "initial_position": (lambda c, ids: c.initial_position, lambda p, n, row: n),
    "read_priority": (lambda c, ids: c.read_priority, lambda p, n, row: p if p > n else 0),
    "write_priority": (lambda c, ids: token_at(c.write_priority, c.position), lambda p, n, row: p if p > n else 0),
    "inputs": (lambda c, ids: token_at(c.inputs, c.position - 1) + 1, lambda p, n, row: row[p - 1] + 1),
    "ids": (lambda c, ids: token_at(ids, c.position - 1) + 1, lambda p, n, row: row[p - 1] + 1),
    "room": (lambda c, ids: token_at(ids, c.position) + 3, lambda p, n, row: PAD + 3),
}


def test_what_a_step_is_told():
    """Values inside the loop, made visible as the tokens that a greedy step draws."""

    def probe(value_of):
        def model(mtf_features, other_features, params, mesh, variable_dtype, context=None):
            ids, vocab_dim = mtf_features["inputs"], other_features["vocab_dim"]
            if context.mode == "first_part":
                return mtf.zeros(mesh, ids.shape + vocab_dim), None, None
            logits = mtf.one_hot(value_of(context, ids), vocab_dim, dtype=tf.float32)
            return mtf.reshape(logits, [ids.shape[0], mtf.Dimension("sequence", 1), vocab_dim]), None, None

        return model

    cases = {
        name: {"model": probe(value_of), "temperature": 0, "bos_id": BOS} for name, (value_of, _) in PROBES.items()
    }

    def build(mesh, prompts):
        ids = mtf.import_tf_tensor(mesh, prompts, dims(batch=BATCH, sequence=LENGTH))
        other = {"vocab_dim": mtf.Dimension("vocab", VOCAB)}
        return {name: sample_autoregressive(ids, other, {}, **options) for name, options in cases.items()}

    out = Program(build, [(tf.int32, PROMPTS.shape)])(PROMPTS)
    for name, (_, expected_of) in PROBES.items():
        for prompt, row in zip(PROMPTS, out[name]):
            expected = prompt[prompt != PAD].tolist() or [BOS]
            n = len(expected)
            for p in range(n, LENGTH):
                expected.append(expected_of(p, n, expected))
            assert row.tolist() == expected, name


def test_logits_in_any_order():
    """Their dims may stand in any order; a step's may have other names, and others of size 1 beside them."""

    def counting(arranged):
        def model(mtf_features, other_features, params, mesh, variable_dtype, context=None):
            ids, vocab_dim = mtf_features["inputs"], other_features["vocab_dim"]
            if context is not None and context.mode == "incremental":
                ids = mtf.reshape(token_at(ids, context.position - 1), [ids.shape[0], mtf.Dimension("sequence", 1)])
            return arranged(mtf.one_hot(ids + 1, vocab_dim)), None, None

        return model

    def renamed(x):
        return mtf.rename_dimension(x, "batch", "rows")

    def turned(x):
        return mtf.transpose(x, mtf.Shape(x.shape.dims[::-1]))

    cases = {
        "plain": (lambda x: x, {}),
        "turned": (turned, {}),
        "one more": (lambda x: mtf.reshape(x, [mtf.Dimension("one", 1), *x.shape.dims]), {}),
        "slow, turned": (turned, {"slow_sampling": True}),
        "other names": (renamed, {}),
        "other names, turned": (lambda x: turned(renamed(x)), {}),
    }

    def build(mesh, prompts):
        ids = mtf.import_tf_tensor(mesh, prompts, dims(batch=BATCH, sequence=LENGTH))
        other, options = {"vocab_dim": mtf.Dimension("vocab", VOCAB)}, {"temperature": 0, "bos_id": BOS}
        return {
            name: sample_autoregressive(ids, other, params, model=counting(arranged), **options)
            for name, (arranged, params) in cases.items()
        }

    out = Program(build, [(tf.int32, PROMPTS.shape)])(PROMPTS)
    ends = (PROMPTS != PAD).sum(1)
    (row,) = np.flatnonzero(ends == 1)[:1]
    first = PROMPTS[row, 0]
    assert out["plain"][row].tolist() == list(range(first, first + LENGTH))
    for name in cases:
        np.testing.assert_array_equal(out[name], out["plain"], name)


def encoder_offset(mesh, shape):
    """[batch]: 3 · row, as a sum over a dim of its own that a layout may split."""
    inner = mtf.Dimension("inner", 2)
    half = mtf.broadcast(mtf.range(mesh, shape[0], tf.int32), [shape[0], inner])
    return mtf.reduce_sum(half + mtf.range(mesh, inner, tf.int32) * half, reduced_dim=inner)


STATE_CASES = {
    "states": {"model": History()},
    "constant state": {"model": History(constant_state=True)},
    "encoder output": {"model": History(encoder=True), "encoder_output": encoder_offset},
}


def check_states(out, **options):
    for case, tokens in out.items():
        for row in range(BATCH):  # the encoder's offset is a row's own
            offset = {
                "states": lambda tokens: 0,
                "constant state": lambda tokens: tokens[0],
                "encoder output": lambda tokens, row=row: 3 * row,
                "all": lambda tokens, row=row: tokens[0] + 3 * row,
            }[case]
            check(tokens[row : row + 1], PROMPTS[row : row + 1], history_logits(offset), at_least=0,
                  **{"seed": 5, "bos": BOS, "stream": row, **options})  # fmt: skip
        assert (tokens != PAD).sum() > 100


def state_loops(cases):
    cases = {name: {"seed": 5, "bos_id": BOS, **options} for name, options in cases.items()}
    return loops(cases, History())(PROMPTS)


def test_states():
    out = state_loops(STATE_CASES)
    check_states(out)
    assert not np.array_equal(out["states"], out["constant state"])


def test_two_batch_dims():
    """Rows are counted in row-major order; the loop is the same."""

    def build(mesh, prompts):
        shape = mtf.Shape(dims(outer=2, batch=4, sequence=LENGTH))
        ids = mtf.import_tf_tensor(mesh, tf.reshape(prompts, shape.to_integer_list), shape)
        other = {"vocab_dim": mtf.Dimension("vocab", VOCAB)}
        options = {"seed": 5, "bos_id": BOS, "stop_at_token": STOP, "model": Bigram()}
        return [
            sample_autoregressive(ids, other, {}, **options, **more)
            for more in (
                {"sampling_use_entmax": True, "temperature": np.linspace(0, 1.4, 8, dtype=np.float32).reshape(2, 4)},
                {"sampling_keep_top_k": 3, "remove_partial_sequences": True},
            )
        ]

    run = Program(build, [(tf.int32, PROMPTS.shape)], {"table": TABLE})
    entmax, removed = (x.reshape(BATCH, LENGTH) for x in run(PROMPTS))
    check(entmax, PROMPTS, bigram, seed=5, bos=BOS, stop=STOP, alpha=1.3,
          temperature=np.linspace(0, 1.4, 8, dtype=np.float32))  # fmt: skip
    kept = []
    for row, prompt in zip(removed, PROMPTS):
        prompt = prompt[prompt != PAD].tolist() or [BOS]
        assert row[LENGTH - len(prompt) :].tolist() == [PAD] * len(prompt)
        kept.append([*prompt, *row[: LENGTH - len(prompt)]])
    check(np.array(kept, np.int32), PROMPTS, bigram, seed=5, bos=BOS, stop=STOP, top_k=3)


def test_logits_of_two_batch_dims():
    """A model may give them as one, in their order, or in another order; never one of them as another."""

    def model(arranged):
        def call(mtf_features, other_features, params, mesh, variable_dtype, context=None):
            ids, vocab_dim = mtf_features["inputs"], other_features["vocab_dim"]
            if context.mode == "incremental":
                ids = token_at(ids, context.position - 1)
            logits = mtf.one_hot(ids + 1, vocab_dim)
            return arranged(logits) if context.mode == "incremental" else logits, None, None

        return call

    outer, batch, vocab = dims(outer=2, batch=4, vocab=VOCAB)
    (rows,) = dims(rows=8)
    arrangements = {
        "plain": lambda x: x,
        "one": lambda x: mtf.reshape(x, [rows, vocab]),
        "turned": lambda x: mtf.transpose(x, mtf.Shape([batch, vocab, outer])),
        "the first renamed": lambda x: mtf.rename_dimension(x, "outer", "rows"),
    }

    def loop(ids, arranged):
        return sample_autoregressive(ids, {"vocab_dim": vocab}, {}, model=model(arranged), temperature=0, bos_id=BOS)

    def build(mesh, prompts):
        ids = mtf.import_tf_tensor(mesh, tf.reshape(prompts, [2, 4, LENGTH]), dims(outer=2, batch=4, sequence=LENGTH))
        return [loop(ids, arranged) for arranged in arrangements.values()]

    plain, *others = Program(build, [(tf.int32, PROMPTS.shape)])(PROMPTS)
    assert len(others) == 3
    for found in others:
        np.testing.assert_array_equal(found, plain)

    def moved(x):
        return mtf.rename_dimension(arrangements["turned"](x), "outer", "rows")

    with tf.Graph().as_default():
        ids = mtf.zeros(mtf.Mesh(mtf.Graph(), "mesh"), dims(outer=2, batch=4, sequence=LENGTH), tf.int32)
        with pytest.raises(ValueError, match=r"logits are \[batch=4, vocab=\d+, rows=2\]; \[outer=2, batch=4, vocab="):
            loop(ids, moved)


# --- Layouts -----------------------------------------------------------------------------------

MESH_CASES = {
    **{name: TENSOR_CASES[name] for name in ("softmax", "entmax")},
    "slow": {"seed": 5, "bos_id": BOS, "stop_at_token": STOP, "params": {"slow_sampling": True}},
    "greedy": {"temperature": 0, "bos_id": BOS, "remove_partial_sequences": True},
}


@functools.cache
def mesh_case(names, mesh_shape="", layout=""):
    cases = {name: MESH_CASES[name] for name in names}
    return loops(cases, Bigram(), runner=MeshRunner(mesh_shape, layout))(PROMPTS, **MIXED)


@pytest.mark.parametrize(
    "mesh_shape, layout, names",
    [
        ("x:2,y:2", "batch:x,vocab:y", ("softmax",)),
        pytest.param("x:2,y:2", "batch:x,vocab:y", ("entmax", "slow", "greedy"), marks=pytest.mark.slow),
        pytest.param("x:4", "vocab:x", ("entmax",), marks=pytest.mark.slow),
        pytest.param("x:2", "table_row:x", ("softmax", "slow", "greedy"), marks=pytest.mark.slow),
    ],
)
def test_layouts(mesh_shape, layout, names):
    single = tensor_loops()(PROMPTS, **MIXED)
    if "slow" in names:
        single |= mesh_case(("slow", "greedy"))
    for case, tokens in mesh_case(names, mesh_shape, layout).items():
        assert np.array_equal(tokens, single[case]), case
        assert len(np.unique(tokens)) > 15


@pytest.mark.parametrize(
    "mesh_shape, layout",
    [
        ("x:2", "sequence:x,table_row:x,inner:x"),
        pytest.param("x:2,y:2", "batch:x,vocab:y", marks=pytest.mark.slow),
    ],
)
def test_states_on_layouts(mesh_shape, layout):
    """A model's states, constant states and encoder may leave it as unfinished sums.

    The encoder's is first needed inside a loop, then in another, and at last outside both.
    """

    def build(mesh, prompts):
        shape = mtf.Shape(dims(batch=BATCH, sequence=LENGTH))
        ids, other = mtf.import_tf_tensor(mesh, prompts, shape), {"vocab_dim": mtf.Dimension("vocab", VOCAB)}
        encoder_output = encoder_offset(mesh, shape)
        options = {
            "model": History(constant_state=True, encoder=True),
            "encoder_output": encoder_output,
            "seed": 5,
            "bos_id": BOS,
        }
        return [sample_autoregressive(ids, other, {}, **options, **more) for more in ({}, {"temperature": 0})] + [
            encoder_output
        ]

    run = Program(build, [(tf.int32, PROMPTS.shape)], {"table": TABLE}, MeshRunner(mesh_shape, layout))
    sampled, greedy, encoder_output = run(PROMPTS)
    check_states({"all": sampled})
    check_states({"all": greedy}, temperature=0)
    assert encoder_output.tolist() == [3 * row for row in range(BATCH)]


@pytest.mark.parametrize(
    "mesh_shape, layout",
    [("x:2", "batch:x"), pytest.param("x:2,y:2", "batch:x,vocab:y", marks=pytest.mark.slow)],
)
def test_a_fresh_seed_is_one_for_all_devices(mesh_shape, layout):
    """Each device draws for its own rows and its part of the vocabulary, with equal numbers."""
    prompts = np.repeat(prompts_of([2]), BATCH, 0)
    run = loops({"x": {"stream": Input("stream")}}, Bigram(), runner=MeshRunner(mesh_shape, layout))
    first, second = run(prompts, stream=3)["x"], run(prompts, stream=3)["x"]
    assert len(np.unique(first, axis=0)) == 1 and first.min() >= 0
    assert not np.array_equal(first, second)


# --- The bundled model ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["padding_outside", "rotary", *(pytest.param(name, marks=pytest.mark.slow) for name in ("global", "local"))]
)
def test_greedy_tokens_of_the_checkpoints(name):
    params, weights, golden = checkpoint(name)
    options = {"temperature": 0, "stop_at_token": None, "max_steps": 20}
    cases = {"fast": options, "slow": {**options, "params": {"slow_sampling": True}}}
    batch, length = golden["prompts"].shape
    out = loops(cases, batch=batch, length=length, weights=weights, **params)(golden["prompts"])
    assert np.array_equal(out["fast"], golden["greedy_fast"])
    assert np.array_equal(out["slow"], golden["greedy_slow"])


NEO_CASES = {
    "softmax": {"temperature": 0.9},
    "top-k": {"temperature": 0.9, "sampling_keep_top_k": 10},
    "entmax": {"temperature": 0.9, "sampling_use_entmax": True, "entmax_alpha": 1.4},
    "entmax, top-k": {"temperature": 0.9, "sampling_use_entmax": True, "sampling_keep_top_k": 10},
}


NEO_OPTIONS = {"seed": 3, "bos_id": BOS, "stop_at_token": STOP}
FURTHER = ("top-k", "entmax")


def neo_params(vocab=127, padding=PAD):
    """A model of both kinds of attention, of a vocabulary that no layout splits, or of one that a layout may."""
    return config(["global", "local"], n_head=2, n_embd=8, n_vocab=vocab, n_ctx=24, local_attention_radius=3) | {
        "padding_id": padding
    }


def neo_prompts(batch=4, padding=PAD):
    return prompts_of([5, 9, 2, 0][:batch], 24, 127, padding)


@functools.cache
def neo(case, slow=False, mesh_shape="", layout="", batch=4, **params):
    """Tokens that the model of neo_params(**params) draws."""
    params = neo_params(**params) | {"slow_sampling": slow}
    cases = {case: {**NEO_OPTIONS, **NEO_CASES[case]}}
    runner, weights = MeshRunner(mesh_shape, layout), random_weights(params)
    run = loops(cases, batch=batch, length=24, weights=weights, runner=runner, **params)
    return run(neo_prompts(batch, params["padding_id"]))[case]


@pytest.mark.parametrize(
    "case, params",
    [
        ("entmax, top-k", {}),
        pytest.param("softmax", {}, marks=pytest.mark.slow),
        pytest.param("top-k", {"padding": 127}, marks=pytest.mark.slow),
    ],
)
def test_cached_and_slow_sampling_draw_the_same(case, params):
    assert np.array_equal(neo(case, **params), neo(case, slow=True, **params))


KNOWN = {
    "prompt": {"max_prompt_length": 10},
    "memory": {"max_length": 18},
    "both": {"max_prompt_length": 10, "max_length": 18, "remove_partial_sequences": True},
    "too short": {"max_prompt_length": 4, "max_length": 18},
}


@pytest.mark.parametrize(
    "mesh_shape, layout, names",
    [
        ("", "", ("both", "too short")),
        pytest.param("", "", ("prompt", "memory"), marks=pytest.mark.slow),
        pytest.param("x:2,y:2", "batch:x,memory_length:y,embd:y", ("too short",), marks=pytest.mark.slow),
    ],
)
def test_known_lengths_change_no_token(mesh_shape, layout, names):
    """Prompts of 9 at most and 9 new tokens: shorter first pass, shorter memory, the same tokens."""
    prompts, lengths = neo_prompts(), [5, 9, 2, 1]
    whole = np.where(np.arange(24) < np.array(lengths)[:, None] + 9, neo("softmax"), PAD)
    cases = {name: {**NEO_OPTIONS, **NEO_CASES["softmax"], "max_steps": 9, **KNOWN[name]} for name in names}
    options = dict(batch=4, length=24, weights=random_weights(neo_params()), **neo_params())
    for name, tokens in loops(cases, runner=MeshRunner(mesh_shape, layout), **options)(prompts).items():
        if name == "both":  # the prompts are removed
            for row, n in enumerate(lengths):
                assert np.all(tokens[row, 24 - n :] == PAD)
            tokens = np.array([[*prompts[row, :n], *tokens[row, : 24 - n]] for row, n in enumerate(lengths)])
            tokens[3, 0] = BOS
        for row, n in enumerate(lengths):
            if name == "too short" and n > 4:  # a prompt that is longer than was said draws nothing, and is not lost
                assert tokens[row].tolist() == [*prompts[row, :n], INVALID, *[PAD] * (23 - n)]
            else:
                np.testing.assert_array_equal(tokens[row], whole[row], f"{name} {row}")


def test_only_what_was_asked_for_is_cut():
    """A memory that has 3 positions ahead of the 6 of the ids, as GPT-Neo's num_mem_kv makes it."""
    seen = {}

    def build(mesh):
        sequence, memory = dims(sequence=6, memory_length=9)
        ids = mtf.ones(mesh, [mtf.Dimension("batch", 1), sequence], tf.int32)
        other = {
            "vocab_dim": mtf.Dimension("vocab", VOCAB),
            "memory_length_dim": memory,
            "attn_bias": biasmask_attn_weights(mesh, sequence, memory, FLOAT32),
        }

        def recorded(name):
            def model(mtf_features, other_features, *args, **kwargs):
                seen.setdefault(name, other_features)
                return Bigram()(mtf_features, other_features, *args, **kwargs)

            return model

        for name, options in (("whole", {}), ("cut", {"max_length": 4})):
            sample_autoregressive(ids, other, {}, model=recorded(name), **options)
        return {name: features["attn_bias"] for name, features in seen.items()}

    bias = Program(build, weights={"table": TABLE})()
    whole = np.where(np.arange(9) > np.arange(6)[:, None] + 3, np.float32(-1e10), 0)
    np.testing.assert_array_equal(bias["whole"], whole)
    np.testing.assert_array_equal(bias["cut"], whole[:4, :7])
    assert [seen[name]["memory_length_dim"].size for name in ("whole", "cut")] == [9, 7]


def test_a_row_ends_at_max_length():
    """Prompts as long, or longer, come back as they are, what stands behind max_length too."""
    prompts = prompts_of([3, 7, 8, 12, LENGTH, 1, 2, 8])
    out = loops({"cut": {"max_length": 8, "stop_at_token": None, "seed": 4}}, Bigram())(prompts)["cut"]
    for row, n in enumerate([3, 7, 8, 12, LENGTH, 1, 2, 8]):
        np.testing.assert_array_equal(out[row, :n], prompts[row, :n])
        assert np.all(out[row, n:8] != PAD) and np.all(out[row, max(n, 8) :] == PAD)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case in FURTHER else case for case in NEO_CASES]
)
def test_sampled_tokens_of_the_model_against_the_simulation(case):
    """Forward pass, distribution and draw, all in float64 NumPy."""
    params, weights = neo_params(), random_weights(neo_params())

    def logits_of(row):
        return reference.gpt_neo_forward(weights, np.array([row]), **reference_config(params))[0, -1]

    options = {**simulated_options(NEO_CASES[case]), "seed": 3, "stop": STOP}
    check(neo(case), neo_prompts(), logits_of, margin=1e-4, at_least=50, **options)


@pytest.mark.slow  # (test_matrix.py has the bundled model on meshes too)
@pytest.mark.parametrize(
    "mesh_shape, layout, case, slow",
    [
        ("x:2,y:2", "batch:x,heads:y,vocab:y,intermediate_expanded:y", "top-k", False),
        ("x:2,y:2", "batch:x,heads:y,vocab:y,intermediate_expanded:y", "softmax", True),
        ("x:2,y:2", "batch:x,memory_length:y,embd:y", "entmax", False),
        ("x:2", "vocab:x,embed_sequence:x,heads:x", "entmax, top-k", False),
        ("all:2", "batch:all", "softmax", False),
    ],
)
def test_the_bundled_model_on_layouts(mesh_shape, layout, case, slow):
    options = {"slow": slow, **({"vocab": 128} if "vocab" in layout else {})}
    single, split = neo(case, **options), neo(case, mesh_shape=mesh_shape, layout=layout, **options)
    assert np.array_equal(single, split)
    assert single.min() >= 0 and len(np.unique(single)) > 10


def test_the_bundled_model_in_other_company():
    """A row of a batch of 4 and the same row of a batch of 2."""
    assert np.array_equal(neo("softmax", batch=2), neo("softmax")[:2])


# --- TensorFlow 1's control flow -----------------------------------------------------------------------


def control_flow_cases():
    """{name: tokens}; run here and, in the test below, with TensorFlow 2's behaviour off."""
    out = mesh_case(("softmax",)) | mesh_case(("entmax",), "x:2", "vocab:x")
    out |= state_loops({"states": STATE_CASES["states"]})
    out["model"] = neo("entmax, top-k")
    return {name: tokens.tolist() for name, tokens in out.items()}


def while_operations():
    """The operation types that a loop lowers to."""
    with tf.Graph().as_default() as graph:
        tf.while_loop(lambda i: i < 3, lambda i: i + 1, [tf.constant(0)])
        return {op.type for op in graph.get_operations()}


V1 = """
import json, sys
import tensorflow.compat.v1 as tf1
tf1.disable_v2_behavior()
import test_sample
assert not tf1.control_flow_v2_enabled() and "Enter" in test_sample.while_operations()
json.dump(test_sample.control_flow_cases(), sys.stdout)
"""


@pytest.mark.slow
def test_control_flow_of_tensorflow_1():
    tests = pathlib.Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", V1], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Enter" not in while_operations()  # here the other kind is built
    assert json.loads(done.stdout) == control_flow_cases()


# --- What is refused --------------------------------------------------------------------------------------

REFUSED = [
    ({"temperature": -0.1}, r"temperature=-0\.1; a finite number of at least 0"),
    ({"temperature": float("nan")}, r"temperature=nan"),
    ({"temperature": float("inf")}, r"temperature=inf"),
    ({"temperature": np.ones(3, np.float32)}, r"temperature has shape \[3\]"),
    ({"max_steps": -1}, r"max_steps=-1; 0 or more"),
    ({"max_steps": np.ones([2, 2], np.int32)}, r"max_steps has shape"),
    ({"never_end": True, "stop_at_token": None}, r"never_end=True .* stop_at_token is None"),
    ({"sampling_keep_top_k": 0}, r"sampling_keep_top_k=0; .* -1 \(off\) or -2"),
    ({"sampling_keep_top_k": -3}, r"sampling_keep_top_k=-3"),
    ({"sampling_keep_top_k": 2.5}, r"sampling_keep_top_k=2\.5"),
    ({"sampling_keep_top_k": np.array([1, 2])}, r"top-k: .* max_top_k"),
    ({"sampling_keep_top_k": np.array([1, 2, 3]), "max_top_k": 3}, r"top_k has shape \[3\]"),
    ({"sampling_keep_top_k": np.array([1, 2]), "max_top_k": 0}, r"max_top_k"),
    ({"entmax_alpha": 1.5}, "entmax_alpha is given, but entmax is not used"),
    (
        {"has_partial_sequences": False, "prompt_lengths": [1, 2]},
        "prompt_lengths are given with has_",
    ),
    ({"sampling_use_entmax": True, "entmax_alpha": 0.99}, r"entmax_alpha=0\.99; a number from 1 to 2"),
    ({"sampling_use_entmax": True, "entmax_alpha": 2.01}, r"entmax_alpha=2\.01"),
    ({"sampling_use_entmax": True, "entmax_alpha": float("nan")}, r"entmax_alpha=nan"),
    ({"seed": 2**32}, r"seed=4294967296 is out of range"),
    ({"seed": -(2**31) - 1}, r"seed=-2147483649 is out of range"),
    ({"seed": np.array([1, 2, 3])}, r"seed has shape \[3\]"),
    ({"stream": np.array([1, 2, 3])}, r"stream has shape \[3\]"),
    ({"prompt_lengths": np.array([1, 2, 3])}, r"prompt_lengths has shape \[3\]"),
    ({"bos_id": np.array([1, 2, 3])}, r"bos_id has shape \[3\]"),
    ({"max_length": 0}, r"max_length=0; a whole number from 1 to 4"),
    ({"max_length": 5}, r"max_length=5; a whole number from 1 to 4"),
    ({"max_prompt_length": 3, "max_length": 2}, r"max_prompt_length=3; a whole number from 1 to 2"),
    ({"stop_at_token": np.array([1, 2, 3])}, r"stop_at_token has shape \[3\]"),
    ({"bos_id": VOCAB}, "bos_id=192 stands for an empty prompt, and is outside the vocabulary; 0 to 191 are"),
    ({"bos_id": np.array([BOS, -1])}, "bos_id=-1 stands for an empty prompt"),
    ({"bos_id": DEFAULT_BOS, "has_partial_sequences": False}, "bos_id=50256 stands for an empty prompt"),
    ({"bos_id": DEFAULT_BOS, "prompt_lengths": [1, 0]}, "bos_id=50256 stands for an empty prompt"),
    ({"invalid_token": 0.5}, r"invalid_token=0\.5; a whole number of 32 bits is needed"),
    ({"invalid_token": 2**31}, "invalid_token=2147483648; a whole number of 32 bits is needed"),
]
# True and False are not numbers, alone or in a list
REFUSED += [
    ({"sampling_use_entmax": "alpha" in name, name: value}, rf"(?i){name.removeprefix('sampling_keep_')}.*number")
    for name in ("temperature", "entmax_alpha", "seed", "stream", "max_steps", "prompt_lengths", "stop_at_token",
                 "bos_id", "sampling_keep_top_k", "top_p", "repetition_penalty", "min_new_tokens")
    for value in (True, np.array([False, True]))
    if not (name == "sampling_keep_top_k" and value is not True)
] + [
    ({name: True}, f"{name}=True; a whole number")
    for name in ("max_length", "max_prompt_length", "num_return_sequences", "invalid_token")
]  # fmt: skip


@pytest.mark.parametrize("options, message", REFUSED)
def test_a_bad_option(options, message):
    def build(mesh):
        ids, other = mtf.zeros(mesh, dims(batch=2, sequence=4), tf.int32), {"vocab_dim": mtf.Dimension("vocab", VOCAB)}
        return sample_autoregressive(ids, other, {}, model=Bigram(), **{"bos_id": BOS, **options})

    with pytest.raises(ValueError, match=message):
        Program(build)


def test_a_beginning_token_that_is_not_needed():
    """The default is outside this vocabulary; so are the default stop token and the padding."""

    def build(mesh, fed):
        shape, other = mtf.Shape(dims(batch=2, sequence=4)), {"vocab_dim": mtf.Dimension("vocab", VOCAB)}
        known, fed = (mtf.import_tf_tensor(mesh, x, shape) for x in ([[5, VOCAB, VOCAB, VOCAB]] * 2, fed))
        options = {"model": Bigram(), "temperature": 0}
        return [
            sample_autoregressive(known, other, {"padding_id": VOCAB}, **options),
            sample_autoregressive(fed, other, {}, prompt_lengths=[1, 1], **options),
        ]

    known, with_lengths = Program(build, [(tf.int32, [2, 4])], {"table": TABLE})([[5, 0, 0, 0]] * 2)
    check(known, np.array([[5] + [VOCAB] * 3] * 2, np.int32), bigram, padding=VOCAB, temperature=0, at_least=6)
    assert np.array_equal(known, with_lengths)


def test_options_at_the_end_of_their_range():
    cases = {
        "hot": {"seed": -(2**31), "temperature": 1e30},
        "hot above": {"seed": 2**31, "temperature": 1e30},  # the same 32 bits
        "cold": {"seed": 1, "temperature": 1e-30},
        "greedy": {"temperature": 0},
    }
    out = loops({name: {"bos_id": BOS, **options} for name, options in cases.items()}, Bigram())(PROMPTS)
    assert np.array_equal(out["hot"], out["hot above"])
    assert np.array_equal(out["cold"], out["greedy"])
    check(out["hot"], PROMPTS, bigram, seed=-(2**31), temperature=1e30, bos=BOS)


def test_jit_compile():
    """On one device the tokens are as without; a mesh of two is refused."""
    vocab_dim = mtf.Dimension("vocab", VOCAB)

    def model(features, other_features, params, mesh, variable_dtype, context=None):
        return mtf.one_hot(features["inputs"] * 5, vocab_dim, on_value=2.0), None, None

    def build(mesh, ids):
        ids = mtf.import_tf_tensor(mesh, ids, dims(batch=2, length=12))
        options = {"model": model, "stop_at_token": STOP, "temperature": 0.5, "bos_id": BOS, "seed": 3}
        features, params = {"vocab_dim": vocab_dim}, {"slow_sampling": True}
        jit, plain = (sample_autoregressive(ids, features, params, jit_compile=c, **options) for c in (True, False))
        return jit, plain

    ids = np.array([[5, 3] + [PAD] * 10, [7] + [PAD] * 11], np.int32)
    jit, plain = MeshRunner()(build, ids)
    assert (plain[:, 2:] != PAD).any()
    np.testing.assert_array_equal(jit, plain)
    with pytest.raises(ValueError, match="compiled: the mesh has 2 processors; a program is compiled for one"):
        MeshRunner("x:2", "batch:x")(build, ids)
