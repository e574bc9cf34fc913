"""The command `gpt-neo-sampling`.

Results go to stdout, everything else to stderr. Errors are one line: with exit
status 2 for a bad value or a model whose logits are not a distribution, and with 1
for any other failure. Ctrl-C ends it in a line too, with 130.

TensorFlow takes seconds to import: what needs it is imported once the arguments are known to be right.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gpt_neo_sampling.cli import PROGRAM

if TYPE_CHECKING:
    import argparse

    from gpt_neo_sampling.cli.echo import Echo


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    if sys.stderr is None:  # closed: print would use stdout instead
        sys.stderr = open(os.devnull, "w")
    try:
        status, message = _run(argv)
    except SystemExit as e:  # from argparse
        status, message = int(e.code or 0), None
    except BrokenPipeError:  # nobody reads the output any more
        status, message = 1, None
    except KeyboardInterrupt as e:
        status, message = 130, ": ".join(["interrupted", *map(str, e.args)])
    with contextlib.suppress(OSError):  # if stderr cannot be written, the status has to do
        if message is not None:
            print(f"{PROGRAM}: {message}", file=sys.stderr)
    for file in filter(None, (sys.stdout, sys.stderr)):
        try:
            file.flush()
        except OSError:  # at exit Python would try again, and print a message of its own
            os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
            status = status or 1
    return status


def _run(argv: Sequence[str] | None) -> tuple[int, str | None]:
    """(exit status, what to say about it)."""
    import logging

    from gpt_neo_sampling.checkpoint.base import one_line
    from gpt_neo_sampling.cli.argument_parser import COMPLETION
    from gpt_neo_sampling.cli.parser import parser

    command_line = parser()
    if COMPLETION in os.environ:
        _complete(command_line)
    args = command_line.parse_args(argv)
    from gpt_neo_sampling.cli import arguments

    if sys.stdout is None and args.command in ("generate", "score", "inspect") and not getattr(args, "output", None):
        return 1, "error: stdout is closed, but the result goes there"
    logging.basicConfig(level=logging.WARNING, format="note: %(message)s", stream=sys.stderr)
    logging.getLogger("huggingface_hub").propagate = False  # it writes to stderr by itself
    echo = None
    try:
        arguments.check(args)
        for note in arguments.notes(args):
            logging.getLogger(__name__).warning(one_line(note))
        arguments.take_texts(args)
        echo = _echo(args)
        from gpt_neo_sampling.cli import commands

        status, error = commands.run(args, echo)
    except ValueError as e:
        status, error = 2, e
    finally:
        if echo:
            echo.end()
    return status, None if error is None else f"error: {one_line(error)}"


def _complete(command_line: argparse.ArgumentParser) -> None:
    """Answers a shell that asks what may come next, and ends the process."""
    try:
        import argcomplete
    except ImportError:
        sys.exit(1)
    argcomplete.autocomplete(command_line)


def _echo(args: argparse.Namespace) -> Echo | None:
    """The first prompt on a terminal, if there is one yet, before the seconds that TensorFlow takes."""
    from gpt_neo_sampling.cli.arguments import asks_for_prompts
    from gpt_neo_sampling.cli.echo import Echo

    if args.command != "generate" or args.json or not sys.stderr.isatty():
        return None
    if args.prompt is None and not asks_for_prompts(args):
        return None
    echo = Echo(args.prompt[0] if args.prompt else "", sys.stderr)
    echo.status("importing TensorFlow …")
    return echo


if __name__ == "__main__":
    sys.exit(main())
