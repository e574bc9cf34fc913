"""How a request's options are resolved before a model runs."""

import numpy as np
import pytest
from conftest import DATA

from gpt_neo_sampling import TextGenerator


@pytest.fixture(scope="module")
def tiny():
    return TextGenerator.from_pretrained(DATA / "hf_gpt_neo_tiny")  # its stop token is 1


def test_a_stop_token_among_bad_words_is_not_banned(tiny):
    """As in transformers: the row could not end."""
    bias = tiny.check([[5]], bad_words_ids=[[1], [7]]).logit_bias
    assert np.isneginf(bias[7]) and bias[1] == 0
    bias = tiny.check([[5]], bad_words_ids=[[1], [7]], eos_token_id=[7, 9]).logit_bias
    assert np.isneginf(bias[1]) and bias[7] == 0
    assert np.isneginf(tiny.check([[5]], bad_words_ids=[[1]], eos_token_id=-1).logit_bias[1])
    assert np.isneginf(tiny.check([[5]], logit_bias={1: -np.inf}).logit_bias[1])  # by name it is
