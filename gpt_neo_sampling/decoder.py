"""The old path of `models.decoding_context`."""

from gpt_neo_sampling.models.decoding_context import *  # noqa: F403
