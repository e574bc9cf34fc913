"""What the command does, once its arguments are known. This imports TensorFlow."""

import argparse
import collections
import dataclasses
import functools
import os
import re
import sys
from collections.abc import Callable, Sequence

from gpt_neo_sampling import _json
from gpt_neo_sampling._compat import tf
from gpt_neo_sampling._types import Prompt, Tokenizer
from gpt_neo_sampling.checkpoint import convert_checkpoint
from gpt_neo_sampling.checkpoint.tokenizer import decoded
from gpt_neo_sampling.cli.arguments import cluster_of, generation_of, ids_of, prompt_of, prompts_of, sampling_of
from gpt_neo_sampling.cli.echo import Echo
from gpt_neo_sampling.generation.export import export_saved_model
from gpt_neo_sampling.generation.generator import Interrupted, InvalidDistributionError, Sample, TextGenerator
from gpt_neo_sampling.generation.prompts_file import generate_file
from gpt_neo_sampling.inspection import plot, table, terminal_style, to_json, token_text
from gpt_neo_sampling.mesh.cluster import serve


def run(args: argparse.Namespace, echo: Echo | None = None) -> tuple[int, object]:
    """Does what is asked for. Returns (exit status, error or None).

    echo: of the first prompt, where it is on a terminal already.
    """
    tf.get_logger().setLevel("ERROR")
    commands: dict[str, Callable[[argparse.Namespace], None]] = {
        "generate": functools.partial(_generate, echo=echo),
        "score": _score,
        "inspect": _inspect,
        "export": _export,
        "convert": _convert,
        "serve": _serve,
    }
    try:
        commands[args.command](args)
        return 0, None
    except (ValueError, InvalidDistributionError) as e:
        return 2, e
    except BrokenPipeError:
        raise
    except tf.errors.ResourceExhaustedError as e:
        found = re.search(r"(OOM when|Out of memory)[^\n]*", e.message)
        return 1, f"a device does not have enough memory. {found[0] if found else e.message}"
    except (OSError, tf.errors.OpError) as e:
        return 1, e
    except MemoryError as e:
        return 1, f"there is not enough memory. {e}"


def _serve(args: argparse.Namespace) -> None:
    cluster = cluster_of(args, args.task)
    assert cluster is not None and cluster.task is not None, "as checked"
    note = f"serving {cluster.task} at {cluster.addresses[cluster.task]}"
    serve(cluster, args.cpus, started=lambda: print(note, file=sys.stderr, flush=True))


def _convert(args: argparse.Namespace) -> None:
    convert_checkpoint(
        args.source,
        args.destination,
        revision=args.revision,
        to=args.to,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
    )


def _inspect(args: argparse.Namespace) -> None:
    prompt = prompt_of(args)
    generator = _generator(args)
    steps = generator.inspect(prompt, args.continuation, **sampling_of(args))
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


def _generator(args: argparse.Namespace, jit_compile: bool = False) -> TextGenerator:
    return TextGenerator.from_pretrained(
        args.model,
        revision=args.revision,
        dtype=args.dtype,
        jit_compile=jit_compile,
        mesh_shape=args.mesh_shape,
        layout=args.layout,
        devices=args.devices,
        cluster=cluster_of(args),
    )


def _generate(args: argparse.Namespace, echo: Echo | None) -> None:
    if echo:
        echo.status("loading the model …")
    generator = _generator(args, args.jit_compile)
    options = generation_of(args)
    if args.output is not None:
        done = generate_file(generator, args.prompts_file, args.output, seed=args.seed, **options)
        if args.seed is None:
            print(f"seed {done.seed}", file=sys.stderr)
        print(f"{args.output}: {done.prompts} prompts, {done.written} of them done now", file=sys.stderr)
        return
    prompts = prompts_of(args)
    seed = int.from_bytes(os.urandom(4), "little") if args.seed is None else args.seed
    request = generator.check(prompts, seed=seed, **options)  # an error is then the only output
    shown_seed = f"seed {seed}\n" if args.seed is None and not request.greedy else ""
    if echo:
        echo.status("building the graph …")
    else:
        sys.stderr.write(shown_seed)
    writer = _JsonWriter() if args.json else _TextWriter(generator, prompts, request.num_return_sequences, echo)
    streamer = None if generator.mesh.cluster else writer.on_token
    try:
        writer.finish(generator.generate(prompts, streamer=streamer, seed=seed, **options))
    except (Interrupted, InvalidDistributionError) as e:
        writer.finish(e.samples)
        raise
    finally:
        if echo:
            echo.end()
            sys.stderr.write(shown_seed)


class _JsonWriter:
    """Prints all samples at the end, with null for missing ones."""

    def on_token(self, *args: object) -> None:
        """Does nothing, but a streamer lets Ctrl-C take effect within a step."""

    def finish(self, samples: Sequence[Sample | None]) -> None:
        _write(_json.dumps({"samples": [s and s.as_dict() for s in samples]}) + "\n")


class _TextWriter:
    """Prints samples in turn, each as its tokens come. In a terminal the prompt appears right before them; `echo`
    has printed the first one there."""

    def __init__(
        self, generator: TextGenerator, prompts: Sequence[Prompt], n_samples: int, echo: Echo | None = None
    ) -> None:
        self._echo = echo
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
            if self._echo and self._turn == 0:
                self._echo.ready()
            else:
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
        texts = [ids_of(text, "--text-ids") for text in args.text_ids]
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
        revision=args.revision,
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
