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

    def banned(**options):
        last = tiny.check([[5]], **options).sequences["bad_words_ids"].last
        return [token for token in last.tolist() if token >= 0]

    assert banned(bad_words_ids=[[1], [7]]) == [7]
    assert banned(bad_words_ids=[[1], [7], [7, 1]], eos_token_id=[7, 9]) == [1]  # whose second word ends with 1
    assert banned(bad_words_ids=[[1]], eos_token_id=-1) == [1]
    assert banned(bad_words_ids=np.array([[7, 9]])) == banned(bad_words_ids=[np.array([7, 9])]) == [9]
    assert np.isneginf(tiny.check([[5]], logit_bias={1: -np.inf}).arrays["logit_bias"][1])  # by name it is
