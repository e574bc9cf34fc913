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


def test_bad_words_as_texts():
    """As they stand, with their white space, and behind a space unless they begin with one."""
    demo = TextGenerator.from_pretrained()

    def banned(*words):
        of = demo.check([[5]], bad_words=words).sequences["bad_words_ids"]
        found = []
        for row, token in enumerate(of.last):
            for i in of.members[row][of.members[row] < len(of.lengths)] if token >= 0 else ():
                found.append(demo.tokenizer.decode([*of.before[i, : of.lengths[i]][::-1], token]))
        return sorted(found)

    assert banned("he") == [" he", "he"]
    assert banned(" he") == [" he"]
    assert banned("\n", ",\n") == ["\n", " ,\n", ",\n"]
