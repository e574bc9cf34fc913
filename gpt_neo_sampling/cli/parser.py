"""What the command `gpt-neo-sampling` takes."""

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from gpt_neo_sampling._version import VERSION
from gpt_neo_sampling.checkpoint.base import EXAMPLE, one_line
from gpt_neo_sampling.checkpoint.convert import MAX_SHARD_SIZE
from gpt_neo_sampling.cli import PROGRAM
from gpt_neo_sampling.cli.argument_parser import CommandParser, Parser, unescaped
from gpt_neo_sampling.generation.options import DEFAULT_MAX_TOP_K, DTYPES, EXPORTABLE, ONLY_PYTHON, OPTIONS
from gpt_neo_sampling.inspection import DEFAULT_COUNT
from gpt_neo_sampling.sampling.controls import CONTROLS, Number, Tokens
from gpt_neo_sampling.sampling.defaults import DEFAULT_ALPHA


def _add_revision(parser: argparse.ArgumentParser, model: str) -> None:
    parser.add_argument("--revision", metavar="REV", help=f"branch, tag or commit, where {model} is a name on the hub "
                        "(default: its main branch)")  # fmt: skip


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", metavar="MODEL", help="folder of a GPT-Neo mesh-TF checkpoint or of a Hugging Face GPT-Neo, "
        f"GPT-Neo's JSON config, or a name on the Hugging Face hub such as {EXAMPLE}, which is fetched once "
        "(default: the small model that comes with the package)")  # fmt: skip
    _add_revision(parser, "--model")
    add("--dtype", choices=DTYPES, default=DTYPES[0], help="what weights are held in and activations computed in; "
        "bfloat16 takes half the memory and rounds more (default: %(default)s)")  # fmt: skip


def _add_mesh_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("mesh", "where the work is done; what comes out is the same").add_argument
    add("--mesh-shape", metavar="x:2,y:2", help="axes of the mesh and their sizes (default: one device)")
    add("--layout", metavar="batch:x,vocab:y", help="which dimension is split along which axis, of "
        "batch, vocab, heads, embd, memory_length, intermediate_expanded, embed_sequence")  # fmt: skip
    add("--devices", metavar="cpu:0,cpu:1", help="a device for each processor of the mesh, the last axis "
        "fastest; auto: all GPUs; in a cluster as worker:1/cpu:0 (default: "
        "TensorFlow's choice of one, in a cluster the first CPU of each process)")  # fmt: skip
    add("--cluster", metavar="host:port,host:port", help="processes started with serve "
        "(default: those of TF_CONFIG, if it is set)")  # fmt: skip


_LENGTHS_AND_SEEDS = ("max_new_tokens", "seed", "stream", "num_return_sequences", "stop_strings")
_ALIASES = {"entmax_alpha": ["--entmax"], "num_return_sequences": ["--num-samples"]}
_ESCAPES = "\\n is a newline, \\t a tab, \\r a carriage return, \\\\ a backslash; other backslashes stay"
# what the command adds to a sentence
_NOTES = {
    "stop_strings": f". {_ESCAPES}",
    "bad_words": f". {_ESCAPES}",
    "dry_sequence_breakers": f". Here they are texts. {_ESCAPES}",
}
_ARGUMENTS: dict[str, dict[str, Any]] = {  # of argparse, for options that are more than a number
    "no_repeat_ngram_size": {"type": int, "metavar": "N"},
    "logit_bias": {"nargs": "+", "action": "extend", "metavar": "ID=X"},
    "entmax_alpha": {"nargs": "?", "const": DEFAULT_ALPHA, "type": float, "metavar": "ALPHA"},
    "sequence_bias": {"nargs": "*", "action": "extend", "metavar": '"ID ID=X"'},
    "bad_words_ids": {"nargs": "*", "action": "extend", "metavar": '"ID ID"'},
    "dry_sequence_breakers": {"type": unescaped, "metavar": "TEXT"},
    "bad_words": {"type": unescaped, "nargs": "*", "action": "extend", "metavar": "TEXT"},
    "exponential_decay_length_penalty": {"metavar": "START,FACTOR"},
    "eos_token_id": {"type": int, "nargs": "+", "action": "extend", "metavar": "ID"},
    "stop_strings": {"type": unescaped, "nargs": "*", "action": "extend", "metavar": "TEXT"},
    "num_return_sequences": {"type": int, "metavar": "N"},
}


def _add_option(add: Callable[..., Any], name: str) -> None:
    """One of `GenerationOptions`, with its sentence."""
    option = OPTIONS[name]
    arguments = _ARGUMENTS.get(name)
    if isinstance(option, Tokens):
        arguments = {"type": int, "nargs": "*", "action": "extend", "metavar": "ID", **(arguments or {})}
    if isinstance(option, Number) and arguments is None:
        metavar = "N" if option.whole else "P" if option.most == 1 else "X"
        arguments = {"type": int if option.whole else float, "metavar": metavar}
    flags = ["--" + name.replace("_", "-"), *_ALIASES.get(name, ())]
    add(*flags, dest=name, help=option.help + _NOTES.get(name, ""), **(arguments or {}))


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Those that say how a token is drawn."""
    group = parser.add_argument_group(
        "sampling", "from --sequence-bias on in the order of application; each defaults to the model's own, and "
        "else changes nothing (docs/sampling.md shows what they do)"
    )  # fmt: skip
    greedy = group.add_mutually_exclusive_group()
    greedy.add_argument("--greedy", dest="do_sample", action="store_const", const="false",
        help="the likeliest token each time; what only sampling has is an error beside it, and unused with "
        "--temperature 0")  # fmt: skip
    greedy.add_argument("--do-sample", choices=("true", "false"), help="false is --greedy; true draws tokens also "
        "where the model says otherwise")  # fmt: skip
    for name in ("eos_token_id", "bad_words", *CONTROLS):
        if name not in ONLY_PYTHON:
            _add_option(group.add_argument, name)


def _add_plain(parser: argparse.ArgumentParser, what: str, option: str, nargs: str = "*") -> None:
    """Texts without an option before them; `arguments.take_texts` puts them where the option has its own."""
    parser.add_argument("plain", nargs=nargs, default=() if nargs == "*" else None, metavar=what,
        help=f"the same as {option}; - is read from stdin, without a newline at its end")  # fmt: skip
    parser.add_argument("-e", "--escape", action="store_true", help=f"texts have escapes too: {_ESCAPES}")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    _add_plain(parser, "PROMPT", "--prompt")
    _add_model_options(parser)
    add = parser.add_argument
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", nargs="+", action="extend", metavar="TEXT", help="texts to continue, as they are")
    prompts.add_argument("--prompt-ids", nargs="+", action="extend", metavar='"1 2 3"', help="the same as token ids")
    prompts.add_argument("--prompts-file", metavar="IN.jsonl", help='a prompt a line, as {"prompt": "Emma"} or '
                         '{"prompt_ids": [1, 2, 3]}, with an optional "id" and options of its own')  # fmt: skip
    add("--output", metavar="OUT.jsonl", help="where the samples of --prompts-file go, a JSON object a prompt; the "
        "same command goes on where it was stopped")  # fmt: skip
    for name in _LENGTHS_AND_SEEDS:
        _add_option(add, name)
    add("--logprobs", dest="return_logprobs", action="store_true", help="with --json or --output: the log-probability "
        "of each new token, by the model alone and as it was drawn")  # fmt: skip
    add("--top-logprobs", type=int, metavar="N", help="the same, and the rank of each new token and the N likeliest "
        "tokens")  # fmt: skip
    add("--prompt-logprobs", dest="return_prompt_logprobs", action="store_true", help="with --json or --output: the "
        "log-probability of each token of the prompt")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object in place of the text")
    add("--jit-compile", action="store_true", help="XLA compiles the decode loop, which takes "
        "seconds and then makes it faster: for some 500 steps and more")  # fmt: skip
    _add_sampling_options(parser)
    _add_mesh_options(parser)


def _add_score(parser: argparse.ArgumentParser) -> None:
    _add_plain(parser, "TEXT", "--text")
    _add_model_options(parser)
    add = parser.add_argument
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument("--text", nargs="+", action="extend", metavar="TEXT", help="texts to score")
    texts.add_argument("--text-ids", nargs="+", action="extend", metavar='"1 2 3"', help="the same as token ids")
    texts.add_argument("--file", metavar="PATH", help="a text file, scored as one text, - for stdin; see --stride")
    add("--stride", type=int, metavar="N", help="read texts longer than the model's context in windows of its length "
        "that begin N tokens apart, each token scored in the first that has it")  # fmt: skip
    add("--add-start-token", action="store_true", help="read each text after the model's first token, so that the "
        "text's own first token is scored too (default: it is left out)")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object, with each token's log-probability")
    _add_mesh_options(parser)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    _add_plain(parser, "PROMPT", "--prompt", "?")
    _add_model_options(parser)
    add = parser.add_argument
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="the text before the token")
    prompt.add_argument("--prompt-ids", metavar='"1 2 3"', help="the same as token ids")
    add("--continuation", metavar="TEXT", default="", help="new text that already follows the prompt, for the "
        "options that look at new tokens only")  # fmt: skip
    add("--show", type=int, default=DEFAULT_COUNT, metavar="N", help="tokens to show (default: %(default)s)")
    add("--plot", metavar="FILE", help="also draw a picture; the file's suffix is the format, such as .png or .svg")
    add("--json", action="store_true", help="print one JSON object in place of the table")
    _add_sampling_options(parser)
    _add_mesh_options(parser)


def _add_export(parser: argparse.ArgumentParser) -> None:
    _add_model_options(parser)
    add = parser.add_argument
    add("--output", metavar="DIR", required=True, help="folder to write: a new or an empty one")
    add("--batch", type=int, required=True, metavar="N", help="rows of a request")
    add("--length", type=int, required=True, metavar="N", help="longest row, prompt and new tokens")
    add("--prompt-length", type=int, metavar="N", help="longest prompt; shorter ones take as long (default: --length)")
    add("--max-top-k", type=int, default=DEFAULT_MAX_TOP_K, metavar="K",
        help="largest K that a request may ask for (default: %(default)s)")  # fmt: skip
    add("--controls", nargs="+", action="extend", choices=EXPORTABLE, default=[], metavar="NAME",
        help=f"what else may be asked for, of {', '.join(EXPORTABLE)}; each costs time in every step")  # fmt: skip


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="what generate --model takes")
    parser.add_argument("destination", metavar="DEST", help="a folder that is new or empty")
    _add_revision(parser, "SOURCE")
    parser.add_argument("--to", choices=("mesh-tf", "huggingface"), help="default: the one that SOURCE is not")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                        help="of the weights (default: %(default)s; float16 for huggingface only)")  # fmt: skip
    parser.add_argument("--max-shard-size", metavar="SIZE", help="most that one file of huggingface holds, "
                        f"counted in float32 (default: {MAX_SHARD_SIZE})")  # fmt: skip


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cluster", metavar="host:port,host:port", help="all processes (default: those of TF_CONFIG)")
    parser.add_argument("--task", metavar="worker:1", help="this process, counted from 0 (default: TF_CONFIG's)")
    parser.add_argument("--cpus", type=int, default=1, metavar="N", help="CPU devices to offer (default: 1)")


_COMMANDS = (  # name, line in the list of commands, description, what adds its arguments
    ("generate", "continue prompts",
     "Continue prompts. The text goes to stdout, the prompts and notes to stderr. On a terminal and without a prompt "
     "the command asks for one, again and again.", _add_generate),
    ("score", "tell how likely a model finds texts",
     "Tell how likely a model finds texts: a line each, with its perplexity, the sum of its tokens' "
     "log-probabilities (in nats, each given those before it) and their number.", _add_score),
    ("inspect", "show what each sampling option does to the next token",
     "Show the distribution of the next token, and what each step of sampling makes of it.", _add_inspect),
    ("export", "write a model as a SavedModel",
     "Write a model as a SavedModel, which runs with TensorFlow only. Nothing goes to stdout.", _add_export),
    ("convert", "write a model in the other format",
     "Write a model in the other format. Weights keep every bit in float32.", _add_convert),
    ("serve", "lend this machine's devices to a cluster",
     "Serve this process's devices to a mesh of several processes, until it is ended.", _add_serve),
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The argparse.ArgumentParser of the command and its subcommands."""
    top = Parser(prog=PROGRAM, description="Sample text from GPT-Neo models in mesh-tensorflow.")
    top.add_argument("--version", action="version", version=f"{PROGRAM} {VERSION}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=CommandParser)
    for name, line, description, add_arguments in _COMMANDS:
        add_arguments(commands.add_parser(name, help=line, description=description, allow_abbrev=False))
    return top


class _SettingParser(CommandParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(one_line(message))


def setting_parser() -> CommandParser:
    """The options of `generate` that say what is drawn, without its other arguments; errors are ValueErrors."""
    settings = _SettingParser(prog="/set", add_help=False, allow_abbrev=False)
    for name in _LENGTHS_AND_SEEDS:
        _add_option(settings.add_argument, name)
    _add_sampling_options(settings)
    return settings
