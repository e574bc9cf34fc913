"""Each control beside transformers' own: 1,000 random rows, the same logits and ids in both. What differs, a line each.

    .venv-bench/bin/python benchmarks/transformers_agreement.py

A control "agrees" where both leave the same tokens and their logits differ by rounding alone. transformers computes in
float32, so a token whose border lies within rounding may go either way; such rows are counted.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))

import numpy as np
import torch
import transformers
from programs import MeshRunner, dims
from transformers import generation as theirs

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling.sampling.controls import History, SamplingOptions
from gpt_neo_sampling.sampling.next_token import mask_steps, token_steps

ROWS, VOCAB, LENGTH, PROMPT = 1000, 512, 24, 10
STOPS = [3, 7]
LOW = np.finfo(np.float32).min


def rows(seed=0):
    """Logits [ROWS, VOCAB], of sure rows and others; ids [ROWS, LENGTH] of eight tokens."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((ROWS, VOCAB)) * rng.choice([0.5, 1, 3, 6], (ROWS, 1))
    return logits.astype(np.float32), rng.integers(0, 8, (ROWS, LENGTH)).astype(np.int32)


def near(row, ids):
    return sorted({(row * 7 + int(ids[-1]) * k) % VOCAB for k in range(1, 40)})


SEQUENCES = {(4,): 0.5, (90,): -2.0, (3, 4): 1.0, (4, 4): -1.5, (5, 3, 44): 2.5, (1, 2, 3, 45): -9.0, (6, 45): 3.0}
WORDS = [[12], [3, 8], [4, 4, 5], [6, 5, 2], [5, 5], [3]]
CASES = {  # ours, and theirs
    "sequence_bias": (
        dict(sequence_bias=SEQUENCES),
        theirs.SequenceBiasLogitsProcessor([[list(k), v] for k, v in SEQUENCES.items()]),
    ),
    "bad_words_ids": (
        dict(bad_words_ids=[w for w in WORDS if w != [3]]),
        theirs.NoBadWordsLogitsProcessor(WORDS, STOPS),
    ),
    "repetition_penalty": (dict(repetition_penalty=1.3), theirs.RepetitionPenaltyLogitsProcessor(1.3)),
    "no_repeat_ngram_size": (dict(no_repeat_ngram_size=3), theirs.NoRepeatNGramLogitsProcessor(3)),
    "min_length": (dict(min_length=LENGTH + 1), theirs.MinLengthLogitsProcessor(LENGTH + 1, STOPS)),
    "min_new_tokens": (dict(min_new_tokens=15), theirs.MinNewTokensLengthLogitsProcessor(PROMPT, 15, STOPS)),
    "prefix_allowed_tokens_fn": (dict(prefix_allowed_tokens_fn=near), theirs.PrefixConstrainedLogitsProcessor(near, 1)),
    "forced_eos_token_id": (dict(forced_eos_token_id=STOPS), theirs.ForcedEOSTokenLogitsProcessor(LENGTH + 1, STOPS)),
    "exponential_decay_length_penalty": (
        dict(exponential_decay_length_penalty=(5, 1.1)),
        theirs.ExponentialDecayLengthPenalty((5, 1.1), STOPS, PROMPT),
    ),
    "suppress_tokens": (dict(suppress_tokens=[4, 90]), theirs.SuppressTokensLogitsProcessor([4, 90])),
    "begin_suppress_tokens": (
        dict(begin_suppress_tokens=[4, 90]),
        theirs.SuppressTokensAtBeginLogitsProcessor([4, 90], LENGTH),
    ),
    "temperature": (dict(temperature=0.7), theirs.TemperatureLogitsWarper(0.7)),
    "top_k": (dict(top_k=40), theirs.TopKLogitsWarper(40)),
    **{
        f"{name}, min_tokens_to_keep {n}": (
            {name: value, **({"min_tokens_to_keep": n} if n > 1 else {})},
            warper(value, min_tokens_to_keep=n),
        )
        for n in (1, 5)
        for name, value, warper in [
            ("top_p", 0.8, theirs.TopPLogitsWarper),
            ("min_p", 0.1, theirs.MinPLogitsWarper),
            ("typical_p", 0.6, theirs.TypicalLogitsWarper),
            ("epsilon_cutoff", 0.01, theirs.EpsilonLogitsWarper),
            ("eta_cutoff", 0.02, theirs.EtaLogitsWarper),
        ]
    },
    "top_h": (dict(top_h=0.5), theirs.TopHLogitsWarper(0.5)),
}


def ours(options, logits, ids):
    """The logits after all steps, −inf for what is masked; without the temperature's shift."""
    options = {"temperature": 1, "stop_tokens": tuple(STOPS), **options}
    temperature = options["temperature"]
    begin = LENGTH if "begin_suppress_tokens" in options else PROMPT

    def build(mesh, x, ids):
        batch, vocab, length = dims(batch=ROWS, vocab=VOCAB, length=LENGTH)
        x = mtf.import_tf_tensor(mesh, x, mtf.Shape([batch, vocab]))
        ids = mtf.import_tf_tensor(mesh, ids, mtf.Shape([batch, length]))
        filled = lambda n: mtf.constant(mesh, n, mtf.Shape([batch]), tf.int32)  # noqa: E731
        history = History(ids, filled(LENGTH), filled(begin), filled(LENGTH + 1))
        given = SamplingOptions(**options)
        for _, step in token_steps(given, history):
            x = step(x, vocab)
        x = x / temperature
        for _, step in mask_steps(given):
            x = step(x, vocab)
        return x

    found = MeshRunner()(build, logits, ids)
    return np.where(found <= LOW, -np.inf, found)


def compared(name):
    options, processor = CASES[name]
    logits, ids = rows()
    mine = ours(options, logits, ids)
    other = processor(torch.tensor(ids, dtype=torch.int64), torch.tensor(logits)).numpy()
    other = np.where(other <= LOW, -np.inf, other)
    kept = np.isfinite(mine)
    differ = (kept != np.isfinite(other)).any(1)
    both = kept & np.isfinite(other)
    off = np.abs(np.where(both, mine, 0) - np.where(both, other, 0)).max()
    changed = (mine != logits).any(1).sum()
    return changed, int(differ.sum()), off


def main():
    print(f"transformers {transformers.__version__}, torch {torch.__version__}; {ROWS} rows of {VOCAB} tokens")
    print(f"{'control':40} {'rows changed':>12} {'other tokens':>12} {'largest difference':>18}")
    status = 0
    for name in CASES:
        changed, differ, off = compared(name)
        print(f"{name:40} {changed:12} {differ:12} {off:18.2g}", flush=True)
        status |= differ > ROWS // 200 or off > 1e-4 or not changed
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
