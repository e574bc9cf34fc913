"""What the original's sampling was set to."""

SOFTMAX_TEMPERATURE = 0.9  # its default,
ENTMAX_TEMPERATURE = 1.0  # and what it sampled entmax at, whatever it was given
DEFAULT_ALPHA = 1.3  # of entmax
