"""The old path of `sampling.masks`."""

from gpt_neo_sampling.sampling.masks import *  # noqa: F403
