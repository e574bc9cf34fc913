"""The next-token distribution, step by step: as a table, as JSON, as a picture.

Plain data in, text and files out. A chain is a list of `ChainStep`: the model's own
distribution, the distribution after each sampling step, and last the one that
tokens are drawn from.
"""

from gpt_neo_sampling.inspection.picture import plot, plot_format
from gpt_neo_sampling.inspection.steps import DEFAULT_COUNT, ChainStep, likeliest, ranks, to_json, token_text
from gpt_neo_sampling.inspection.terminal import table, terminal_style

__all__ = [
    "DEFAULT_COUNT",
    "ChainStep",
    "likeliest",
    "plot",
    "plot_format",
    "ranks",
    "table",
    "terminal_style",
    "to_json",
    "token_text",
]
