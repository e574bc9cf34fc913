"""`python -m gpt_neo_sampling.cli`: the command."""

import sys

from gpt_neo_sampling.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
