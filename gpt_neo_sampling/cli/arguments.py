"""What the command's arguments mean, and what is wrong with them whatever the model: none of it takes TensorFlow."""

import argparse
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from gpt_neo_sampling.checkpoint.hub import check_revision
from gpt_neo_sampling.generation.options import SAMPLING, GenerationOptions, check_alone
from gpt_neo_sampling.inspection import plot_format
from gpt_neo_sampling.mesh.cluster import MOST_CPUS, Cluster, cluster_from_environment, parse_cluster
from gpt_neo_sampling.mesh.devices import check_description
from gpt_neo_sampling.sampling.controls import check_int


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for what is wrong whatever the model is."""
    if "revision" in args:
        check_revision(args.source if args.command == "convert" else args.model, args.revision)
    if "mesh_shape" in args:
        check_description(args.mesh_shape, args.layout, args.devices, cluster_of(args))
    if args.command in _CHECKS:
        _CHECKS[args.command](args)


def _check_generate(args: argparse.Namespace) -> None:
    if (args.output is None) != (args.prompts_file is None):
        raise ValueError("--prompts-file and --output need each other")
    if args.output is not None and args.json:
        raise ValueError("--json is for stdout; --output is always JSON")
    if args.logprobs and not args.json and args.output is None:
        raise ValueError("--logprobs needs --json or --output")
    prompts_of(args)
    check_alone(GenerationOptions(seed=args.seed, **generation_of(args)))


def _check_score(args: argparse.Namespace) -> None:
    for text in args.text_ids or ():
        ids_of(text, "--text-ids")


def _check_inspect(args: argparse.Namespace) -> None:
    check_int("--show", args.show, 1)
    if args.plot is not None:
        plot_format(args.plot)
    prompt_of(args)
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
    """The prompts of generate: texts, or lists of ids; empty where a file has them."""
    return args.prompt if args.prompt is not None else [ids_of(text) for text in args.prompt_ids or ()]


def prompt_of(args: argparse.Namespace) -> Any:
    """The prompt of inspect: a text, or a list of ids."""
    return args.prompt if args.prompt is not None else ids_of(args.prompt_ids)


def generation_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options of generate, but for the seed, as those of `GenerationOptions`."""
    return dict(
        max_new_tokens=args.max_new_tokens,
        stop_strings=args.stop_strings,
        num_return_sequences=args.num_return_sequences,
        return_logprobs=args.logprobs,
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
    options = {name: getattr(args, name) for name in SAMPLING}
    return dict(
        options,
        no_repeat_ngram_size=args.no_repeat_ngram_size,
        logit_bias=_biases(args.logit_bias or ()),
        bad_words_ids=None if args.bad_words_ids is None else [[i] for i in args.bad_words_ids],
        eos_token_id=args.eos_token_id,
        do_sample=False if args.greedy else None,
    )


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
