"""The command `gpt-neo-sampling`.

Results go to stdout, everything else to stderr. Errors are one line: with exit
status 2 for a bad value or a model whose logits are not a distribution, and with 1
for any other failure.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from gpt_neo_sampling import _json
from gpt_neo_sampling._compat import tf
from gpt_neo_sampling._types import Prompt, Tokenizer
from gpt_neo_sampling.checkpoint import convert_checkpoint
from gpt_neo_sampling.checkpoint.base import one_line
from gpt_neo_sampling.checkpoint.tokenizer import decoded
from gpt_neo_sampling.cli.parser import PROGRAM, parser
from gpt_neo_sampling.generation.export import export_saved_model
from gpt_neo_sampling.generation.generator import Interrupted, InvalidDistributionError, Sample, TextGenerator
from gpt_neo_sampling.generation.options import SAMPLING
from gpt_neo_sampling.generation.prompts_file import generate_file
from gpt_neo_sampling.inspection import plot, plot_format, table, terminal_style, to_json, token_text
from gpt_neo_sampling.mesh.cluster import MOST_CPUS, Cluster, cluster_from_environment, parse_cluster, serve
from gpt_neo_sampling.sampling.controls import check_int


def _cluster(args: argparse.Namespace, task: str | None = None) -> Cluster | None:
    if args.cluster is not None:
        return parse_cluster(args.cluster, task)
    cluster = cluster_from_environment()
    if cluster is not None and task is not None:
        return dataclasses.replace(cluster, task=task).checked()
    return cluster


def _serve(args: argparse.Namespace) -> None:
    cluster = _cluster(args, args.task)
    if cluster is None:
        raise ValueError("serve needs a cluster: --cluster host:port,host:port, or TF_CONFIG")
    if cluster.task is None:
        raise ValueError(f"serve needs --task, one of {', '.join(cluster.addresses)}")
    check_int("--cpus", args.cpus, 1, MOST_CPUS)
    note = f"serving {cluster.task} at {cluster.addresses[cluster.task]}"
    serve(cluster, args.cpus, started=lambda: print(note, file=sys.stderr, flush=True))


def _convert(args: argparse.Namespace) -> None:
    convert_checkpoint(args.source, args.destination, to=args.to, dtype=args.dtype, max_shard_size=args.max_shard_size)


def _int(text: str) -> int:
    """An int of ASCII digits only; int() would accept 1_0."""
    if not re.fullmatch(r"-?[0-9]+", text):
        raise ValueError
    return int(text)


def _ids(text: str, option: str = "--prompt-ids") -> list[int]:
    words = re.split(r"[\s,]+", text.strip())
    try:
        return [_int(w) for w in words if w]
    except ValueError:
        raise ValueError(f"{option} {text!r}: whole numbers separated by spaces are needed") from None


def _inspect(args: argparse.Namespace) -> None:
    check_int("--show", args.show, 1)
    if args.plot is not None:
        plot_format(args.plot)  # reports a bad path before the work begins
    prompt = args.prompt if args.prompt is not None else _ids(args.prompt_ids)
    generator = _generator(args)
    steps = generator.inspect(prompt, args.continuation, **_sampling(args))
    text = functools.partial(token_text, generator.tokenizer)
    shown = _prompt_text(prompt, generator.tokenizer) + args.continuation
    if args.json:
        chain = to_json(steps, text if generator.tokenizer else None, args.show)
        _write(_json.dumps({"prompt_tokens": generator.encode(prompt), **chain}) + "\n")
    else:
        sys.stderr.write(shown + "\n\n")
        sys.stderr.flush()
        _write(table(steps, text, count=args.show, **terminal_style(sys.stdout)))
    if args.plot is not None:
        title = f"Next token after “{shown if len(shown) < 60 else '…' + shown[-60:]}”"
        plot(steps, text, args.plot, title=title, count=args.show)
        print(f"wrote {args.plot}", file=sys.stderr)


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `_add_sampling_options`, as those of `GenerationOptions`."""
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


def _generator(args: argparse.Namespace) -> TextGenerator:
    return TextGenerator.from_pretrained(
        args.model,
        dtype=args.dtype,
        mesh_shape=args.mesh_shape,
        layout=args.layout,
        devices=args.devices,
        cluster=_cluster(args),
    )


def _generate(args: argparse.Namespace) -> None:
    if (args.output is None) != (args.prompts_file is None):
        raise ValueError("--prompts-file and --output need each other")
    if args.output is not None and args.json:
        raise ValueError("--json is for stdout; --output is always JSON")
    if args.logprobs and not args.json and args.output is None:
        raise ValueError("--logprobs needs --json or --output")
    generator = _generator(args)
    options = dict(
        max_new_tokens=args.max_new_tokens,
        stop_strings=args.stop_strings,
        num_return_sequences=args.num_return_sequences,
        return_logprobs=args.logprobs,
        **_sampling(args),
    )
    if args.output is not None:
        done = generate_file(generator, args.prompts_file, args.output, seed=args.seed, **options)
        if args.seed is None:
            print(f"seed {done.seed}", file=sys.stderr)
        print(f"{args.output}: {done.prompts} prompts, {done.written} of them done now", file=sys.stderr)
        return
    prompts = args.prompt if args.prompt is not None else [_ids(text) for text in args.prompt_ids]
    seed = args.seed
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
    request = generator.check(prompts, seed=seed, **options)  # an error is then the only output
    if args.seed is None and not request.greedy:
        print(f"seed {seed}", file=sys.stderr)
    writer = _JsonWriter() if args.json else _TextWriter(generator, prompts, request.num_return_sequences)
    streamer = None if generator.mesh.cluster else writer.on_token
    try:
        writer.finish(generator.generate(prompts, streamer=streamer, seed=seed, **options))
    except (Interrupted, InvalidDistributionError) as e:
        writer.finish(e.samples)
        raise


class _JsonWriter:
    """Prints all samples at the end, with null for missing ones."""

    def on_token(self, *args: object) -> None:
        """Does nothing, but a streamer lets Ctrl-C take effect within a step."""

    def finish(self, samples: Sequence[Sample | None]) -> None:
        _write(_json.dumps({"samples": [s and s.as_dict() for s in samples]}) + "\n")


class _TextWriter:
    """Prints samples in turn, each as its tokens come. In a terminal the prompt appears right before them."""

    def __init__(self, generator: TextGenerator, prompts: Sequence[Prompt], n_samples: int) -> None:
        self._prompts = [_prompt_text(p, generator.tokenizer) for p in prompts for _ in range(n_samples)]
        # not printed yet, by sample
        self._pieces: dict[int, list[tuple[int | str, bool]]] = collections.defaultdict(list)
        self._turn = 0
        self._in_sample = False

    def on_token(self, index: int, token: int, text: str | None, is_last: bool) -> None:
        self._pieces[index].append((token if text is None else text, is_last))
        while self._pieces[self._turn]:
            self._print(*self._pieces[self._turn].pop(0))

    def _print(self, text: int | str, is_last: bool) -> None:
        if isinstance(text, int):  # a token id, without a tokenizer
            text = f" {text}" if self._in_sample else str(text)
        if not self._in_sample:
            sys.stderr.write(self._prompts[self._turn])
            sys.stderr.flush()
        _write(text + "\n" * is_last)
        self._in_sample = not is_last
        self._turn += is_last

    def finish(self, samples: Sequence[Sample | None]) -> None:
        """Prints the rest, but nothing more of samples that are None."""
        if self._in_sample:
            self._print("", is_last=True)
        while self._turn < len(samples):
            sample = samples[self._turn]
            if sample is None:
                self._turn += 1
            else:
                self._print(" ".join(map(str, sample.tokens)) if sample.text is None else sample.text, is_last=True)


def _prompt_text(prompt: Prompt, tokenizer: Tokenizer | None) -> str:
    if isinstance(prompt, str):
        return prompt
    return decoded(tokenizer, prompt) if tokenizer else " ".join(map(str, prompt)) + " "


def _score(args: argparse.Namespace) -> None:
    if args.file is not None:
        texts: Sequence[Prompt] = [_read_text(args.file)]
    elif args.text is not None:
        texts = args.text
    else:
        texts = [_ids(text, "--text-ids") for text in args.text_ids]
    scores = _generator(args).score(texts, add_start_token=args.add_start_token, stride=args.stride)
    if args.json:
        _write(_json.dumps({"scores": [dataclasses.asdict(s) for s in scores]}) + "\n")
        return
    for s in scores:
        n = len(s.logprobs) - s.logprobs.count(None)
        _write(f"perplexity {s.perplexity:.6g}  log-probability {s.sum_logprob:.6g}  tokens {n}\n")


def _read_text(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return file.read().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"--file {path}: {e}") from None


def _export(args: argparse.Namespace) -> None:
    export_saved_model(
        args.output,
        args.model,
        batch=args.batch,
        length=args.length,
        prompt_length=args.prompt_length,
        max_top_k=args.max_top_k,
        controls=args.controls,
        dtype=args.dtype,
    )
    print(f"wrote {args.output}", file=sys.stderr)


def _write(text: str) -> None:
    try:
        sys.stdout.buffer.write(text.encode("utf-8", "replace"))
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as e:
        raise OSError(f"stdout cannot be written: {e.strerror}") from None


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
    with contextlib.suppress(OSError):  # if stderr cannot be written, the status has to do
        if message is not None:
            print(f"{PROGRAM}: error: {one_line(message)}", file=sys.stderr)
    for file in filter(None, (sys.stdout, sys.stderr)):
        try:
            file.flush()
        except OSError:  # at exit Python would try again, and print a message of its own
            os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
            status = status or 1
    return status


def _run(argv: Sequence[str] | None) -> tuple[int, object]:
    """(exit status, error or None)."""
    args = parser().parse_args(argv)
    if sys.stdout is None and args.command in ("generate", "score", "inspect") and not getattr(args, "output", None):
        return 1, "stdout is closed, but the result goes there"
    logging.basicConfig(level=logging.WARNING, format="note: %(message)s", stream=sys.stderr)
    tf.get_logger().setLevel("ERROR")
    try:
        commands = {
            "generate": _generate,
            "score": _score,
            "inspect": _inspect,
            "export": _export,
            "convert": _convert,
            "serve": _serve,
        }
        commands[args.command](args)
        return 0, None
    except (ValueError, InvalidDistributionError) as e:
        return 2, e
    except BrokenPipeError:
        raise
    except (OSError, tf.errors.OpError) as e:
        return 1, e
    except MemoryError as e:
        return 1, f"there is not enough memory. {e}"
    except KeyboardInterrupt:
        return 130, None


if __name__ == "__main__":
    sys.exit(main())
