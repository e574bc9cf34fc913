"""What the command's arguments mean, and what is wrong with them whatever the model: none of it takes TensorFlow."""

import argparse
import dataclasses
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from gpt_neo_sampling.checkpoint.hub import check_revision
from gpt_neo_sampling.cli.argument_parser import unescaped
from gpt_neo_sampling.generation.options import SAMPLING, GenerationOptions, check_alone
from gpt_neo_sampling.inspection import plot_format
from gpt_neo_sampling.mesh.cluster import MOST_CPUS, Cluster, cluster_from_environment, parse_cluster
from gpt_neo_sampling.mesh.devices import check_description
from gpt_neo_sampling.sampling.controls import TOKEN_SETS, check_int

_TEXTS = {"generate": "prompt", "inspect": "prompt", "score": "text"}
_OTHERS = {"generate": ("prompt_ids", "prompts_file"), "inspect": ("prompt_ids",), "score": ("text_ids", "file")}


def _check_texts(args: argparse.Namespace) -> None:
    """Looks whether there is a text, and of one kind."""
    name = _TEXTS[args.command]
    plain = _plain(args)
    given = [n for n in (name, *_OTHERS[args.command]) if getattr(args, n) is not None]
    if plain and given:
        raise ValueError(f"{plain[0]!r}: not allowed with --{given[0].replace('_', '-')}")
    if plain.count("-") > 1:
        raise ValueError("- is given more than once, but stdin can be read once")
    if not plain and not given and not asks_for_prompts(args):
        options = ", ".join("--" + n.replace("_", "-") for n in (name, *_OTHERS[args.command]))
        on_terminal = "; where stdin and stderr are a terminal, it is asked for" if args.command == "generate" else ""
        raise ValueError(f"a {name} is needed: as a plain argument, - for stdin, or by one of {options}{on_terminal}")


def _plain(args: argparse.Namespace) -> list[str]:
    """The texts without an option before them."""
    return [args.plain] if isinstance(args.plain, str) else list(args.plain or ())


def take_texts(args: argparse.Namespace) -> None:
    """Puts texts without an option before them where the option has its own, with stdin in place of -; with --escape,
    reads the escapes of the others. For arguments that were checked; raises ValueError if stdin cannot be read."""
    if args.command not in _TEXTS:
        return
    name, plain, is_one = _TEXTS[args.command], _plain(args), args.command == "inspect"
    read = unescaped if args.escape else str
    if plain:
        texts = [re.sub(r"\r?\n\Z", "", stdin_text()) if text == "-" else read(text) for text in plain]
        args.plain = None
        setattr(args, name, texts[0] if is_one else texts)
    elif (given := getattr(args, name)) is not None:
        setattr(args, name, read(given) if is_one else list(map(read, given)))
    if is_one:
        args.continuation = read(args.continuation)


def asks_for_prompts(args: argparse.Namespace) -> bool:
    """Whether the command is one that asks for prompts on a terminal."""
    if args.command != "generate" or args.output is not None:
        return False
    is_given = args.plain or any(v is not None for v in (args.prompt, args.prompt_ids, args.prompts_file))
    return not is_given and all(file is not None and file.isatty() for file in (sys.stdin, sys.stderr))


def stdin_text() -> str:
    """All of stdin. Raises ValueError if it cannot be read as UTF-8."""
    if sys.stdin is None:
        raise ValueError("stdin is closed, but - is to be read from it")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"stdin: {e}") from None


def notes(args: argparse.Namespace) -> Iterator[str]:
    """What may have been meant otherwise."""
    for name, what in (("prompt_ids", "prompts"), ("text_ids", "texts")):
        given = getattr(args, name, None)
        if isinstance(given, list) and len(given) > 1 and all(text.strip().isdecimal() for text in given):
            option, ids = "--" + name.replace("_", "-"), " ".join(map(str.strip, given))
            one = what.removesuffix("s")
            yield f'{option} {ids} is {len(given)} {what} of one id each; one {one} of these ids is {option} "{ids}"'


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for what is wrong whatever the model is."""
    if "revision" in args:
        check_revision(args.source if args.command == "convert" else args.model, args.revision)
    if "mesh_shape" in args:
        check_description(args.mesh_shape, args.layout, args.devices, cluster_of(args))
    if args.command in _TEXTS:
        _check_texts(args)
    if args.command in _CHECKS:
        _CHECKS[args.command](args)


def _check_generate(args: argparse.Namespace) -> None:
    if (args.output is None) != (args.prompts_file is None):
        raise ValueError("--prompts-file and --output need each other")
    if args.output is not None and args.json:
        raise ValueError("--json is for stdout; --output is always JSON")
    if args.output is not None and args.stream is not None:
        raise ValueError("--stream is not for --prompts-file, where each line has streams of its own")
    for name, value in (
        ("--logprobs", args.return_logprobs),
        ("--top-logprobs", args.top_logprobs),
        ("--prompt-logprobs", args.return_prompt_logprobs),
    ):
        if value and not args.json and args.output is None:
            raise ValueError(f"{name} needs --json or --output")
    prompts_of(args)
    check_alone(GenerationOptions(**generation_of(args)))


def _check_score(args: argparse.Namespace) -> None:
    for text in args.text_ids or ():
        ids_of(text, "--text-ids")


def _check_inspect(args: argparse.Namespace) -> None:
    check_int("--show", args.show, 1)
    if args.plot is not None:
        plot_format(args.plot)
    if args.prompt_ids is not None:
        ids_of(args.prompt_ids)
    check_alone(GenerationOptions(**sampling_of(args)))


def _check_serve(args: argparse.Namespace) -> None:
    cluster = cluster_of(args, args.task)
    if cluster is None:
        raise ValueError("serve needs a cluster: --cluster host:port,host:port, or TF_CONFIG")
    if cluster.task is None:
        raise ValueError(f"serve needs --task, one of {', '.join(cluster.addresses)}")
    check_int("--cpus", args.cpus, 1, MOST_CPUS)


_CHECKS = {"generate": _check_generate, "score": _check_score, "inspect": _check_inspect, "serve": _check_serve}


def prompts_of(args: argparse.Namespace) -> list[Any]:
    """The prompts of generate: texts, or lists of ids; empty where a file has them, and where they are asked for."""
    return args.prompt if args.prompt is not None else [ids_of(text) for text in args.prompt_ids or ()]


def prompt_of(args: argparse.Namespace) -> Any:
    """The prompt of inspect: a text, or a list of ids."""
    return args.prompt if args.prompt is not None else ids_of(args.prompt_ids)


def generation_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options of generate as those of `GenerationOptions`."""
    return dict(
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        stream=args.stream,
        stop_strings=args.stop_strings,
        num_return_sequences=args.num_return_sequences,
        return_logprobs=args.return_logprobs,
        top_logprobs=args.top_logprobs,
        return_prompt_logprobs=args.return_prompt_logprobs,
        **sampling_of(args),
    )


def cluster_of(args: argparse.Namespace, task: str | None = None) -> Cluster | None:
    if args.cluster is not None:
        return parse_cluster(args.cluster, task)
    cluster = cluster_from_environment()
    if cluster is not None and task is not None:
        return dataclasses.replace(cluster, task=task).checked()
    return cluster


def _int(text: str) -> int:
    """An int of ASCII digits only; int() would accept 1_0."""
    if not re.fullmatch(r"-?[0-9]+", text):
        raise ValueError
    return int(text)


def ids_of(text: str, option: str = "--prompt-ids") -> list[int]:
    words = re.split(r"[\s,]+", text.strip())
    try:
        return [_int(w) for w in words if w]
    except ValueError:
        raise ValueError(f"{option} {text!r}: whole numbers separated by spaces are needed") from None


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the group "sampling", as those of `GenerationOptions`."""
    options = {name: getattr(args, name) for name in (*SAMPLING, *TOKEN_SETS, "no_repeat_ngram_size", "bad_words")}
    words, decay = args.bad_words_ids, args.exponential_decay_length_penalty
    return dict(
        options,
        exponential_decay_length_penalty=None if decay is None else _decay(decay),
        sequence_bias=None if args.sequence_bias is None else _sequence_biases(args.sequence_bias),
        logit_bias=_biases(args.logit_bias or ()),
        bad_words_ids=None if words is None else [ids_of(text, "--bad-words-ids") for text in words],
        eos_token_id=args.eos_token_id,
        do_sample=None if args.do_sample is None else args.do_sample == "true",
    )


def _decay(text: str) -> tuple[float, float]:
    try:
        start, factor = map(float, text.split(","))
    except ValueError:
        raise ValueError(
            f"--exponential-decay-length-penalty {text!r}: a number of tokens and a factor are needed, as in 20,1.05"
        ) from None
    return start, factor


def _sequence_biases(texts: Sequence[str]) -> dict[tuple[int, ...], float]:
    biases: dict[tuple[int, ...], float] = {}
    for text in texts:
        left, _, right = text.partition("=")
        try:
            ids, value = tuple(ids_of(left)), float(right)
        except ValueError:
            ids, value = (), 0.0
        if not ids:
            raise ValueError(f'--sequence-bias {text!r}: ids and a number are needed, as in "12 17=-2.5"')
        if ids in biases:
            raise ValueError(f"--sequence-bias has {left!r} twice")
        biases[ids] = value
    return biases


def _biases(texts: Sequence[str]) -> dict[int, float]:
    biases: dict[int, float] = {}
    for text in texts:
        left, _, right = text.partition("=")
        try:
            token, value = _int(left), float(right)
        except ValueError:
            raise ValueError(f"--logit-bias {text!r}: a token's id and a number are needed, as in 13=-2.5") from None
        if token in biases:
            raise ValueError(f"--logit-bias has token {token} twice")
        biases[token] = value
    return biases
