"""The old path of `sampling.penalties`."""

from gpt_neo_sampling.sampling.penalties import *  # noqa: F403
