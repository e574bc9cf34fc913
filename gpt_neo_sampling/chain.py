"""The old path of `sampling.next_token`."""

from gpt_neo_sampling.sampling.next_token import *  # noqa: F403
