"""JSON that every reader accepts, without Infinity and NaN."""

import json

import numpy as np
from helpers_checkpoint import spoiled
from test_cli import main

from gpt_neo_sampling import _json


def refuse(name):
    raise AssertionError(f"{name} is no JSON")


def test_null_in_place_of_what_json_has_not():
    inf, nan = float("inf"), float("nan")
    value = {"a": [1.5, inf, (-inf, nan, None, True)], "b": {"c": np.float64(nan), "d": "Infinity"}}
    assert json.loads(_json.dumps(value), parse_constant=refuse) == {
        "a": [1.5, None, [None, None, None, True]],
        "b": {"c": None, "d": "Infinity"},
    }


def test_a_perplexity_beyond_any_number_is_null(capfd, tmp_path):
    """A model whose logits lie so far apart that exp(−mean log-probability) overflows."""
    folder = spoiled(tmp_path / "m", "wte", slice(None), 1e4 * np.random.default_rng(0).standard_normal((127, 32)))
    status, out, _ = main(capfd, "score", "--json", "--text-ids", "5 17 101", "--model", folder)
    (score,) = json.loads(out, parse_constant=refuse)["scores"]
    assert status == 0 and score["perplexity"] is None and score["sum_logprob"] <= 0
