"""Numbers that several modules share: what the original's sampling was set to, and a bound of ours."""

SOFTMAX_TEMPERATURE = 0.9  # its default,
ENTMAX_TEMPERATURE = 1.0  # and what it sampled entmax at, whatever it was given
DEFAULT_ALPHA = 1.3  # of entmax

MOST_TO_KEEP = 100  # the largest min_tokens_to_keep
