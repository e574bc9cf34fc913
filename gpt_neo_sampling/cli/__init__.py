"""The command."""

PROGRAM = "gpt-neo-sampling"
