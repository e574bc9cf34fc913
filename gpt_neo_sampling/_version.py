"""The version; `__init__` has it too."""

VERSION = "0.2.0.dev0"
