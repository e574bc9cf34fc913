"""What the command does, once its arguments are known. This imports TensorFlow."""

import argparse
import collections
import dataclasses
import functools
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

from gpt_neo_sampling import _json
from gpt_neo_sampling._compat import tf
from gpt_neo_sampling._types import Prompt, Tokenizer
from gpt_neo_sampling.checkpoint import convert_checkpoint
from gpt_neo_sampling.checkpoint.tokenizer import decoded
from gpt_neo_sampling.cli.arguments import (
    asks_for_prompts,
    check,
    cluster_of,
    generation_of,
    ids_of,
    prompt_of,
    prompts_of,
    sampling_of,
    stdin_text,
)
from gpt_neo_sampling.cli.echo import Echo
from gpt_neo_sampling.cli.repl import converse
from gpt_neo_sampling.generation.export import export_saved_model
from gpt_neo_sampling.generation.generator import Interrupted, InvalidDistributionError, Sample, TextGenerator
from gpt_neo_sampling.generation.prompts_file import generate_file
from gpt_neo_sampling.inspection import DEFAULT_COUNT, ChainStep, plot, table, terminal_style, to_json, token_text
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
    return _outcome(functools.partial(commands[args.command], args))


def _outcome(action: Callable[[], None]) -> tuple[int, object]:
    """Does something. Returns (exit status, error or None)."""
    try:
        action()
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
    shown = _prompt_text(prompt, generator.tokenizer) + args.continuation
    if not args.json:
        sys.stderr.write(shown + "\n\n")
        sys.stderr.flush()
    _write_steps(generator, prompt, steps, args.show, args.json)
    if args.plot is not None:
        title = f"Next token after “{shown if len(shown) < 60 else '…' + shown[-60:]}”"
        plot(steps, functools.partial(token_text, generator.tokenizer), args.plot, title=title, count=args.show)
        print(f"wrote {args.plot}", file=sys.stderr)


def _write_steps(generator: TextGenerator, prompt: Prompt, steps: list[ChainStep], count: int, as_json: bool) -> None:
    text = functools.partial(token_text, generator.tokenizer)
    if as_json:
        chain = to_json(steps, text if generator.tokenizer else None, count)
        _write(_json.dumps({"prompt_tokens": generator.encode(prompt), **chain}) + "\n")
    else:
        _write(table(steps, text, count=count, **terminal_style(sys.stdout)))


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
    if asks_for_prompts(args):
        if echo:
            echo.ready()
        name = "the bundled model" if args.model is None else args.model
        what = "prompts" if generator.tokenizer else "prompts of token ids"
        print(f"{name} continues {what}; /help lists what else there is, Ctrl-D ends", file=sys.stderr)
        converse(args, _Answers(generator))
        return
    if args.output is not None:
        options = generation_of(args)
        del options["stream"]
        done = generate_file(generator, args.prompts_file, args.output, **options)
        if args.seed is None:
            print(f"seed {done.seed}", file=sys.stderr)
        print(f"{args.output}: {done.prompts} prompts, {done.written} of them done now", file=sys.stderr)
        return
    _answer(generator, prompts_of(args), args, _seed_of(args), echo)


def _seed_of(args: argparse.Namespace) -> int:
    """The one that is set, or a fresh one."""
    return int.from_bytes(os.urandom(4), "little") if args.seed is None else args.seed


def _answer(
    generator: TextGenerator,
    prompts: Sequence[Prompt],
    args: argparse.Namespace,
    seed: int,
    echo: Echo | None,
    shown: Sequence[str] | None = None,
) -> None:
    """Prints what follows the prompts; shown: what is printed of them, if not all."""
    options = {**generation_of(args), "seed": seed}
    request = generator.check(prompts, **options)  # an error is then the only output
    shown_seed = f"seed {seed}\n" if args.seed is None and not request.greedy else ""
    if echo:
        echo.status("building the graph …")
    else:
        sys.stderr.write(shown_seed)
    if shown is None:
        shown = [_prompt_text(p, generator.tokenizer) for p in prompts]
    writer = _JsonWriter() if args.json else _TextWriter(shown, request.num_return_sequences, echo)
    streamer = None if generator.mesh.cluster else writer.on_token
    try:
        writer.finish(generator.generate(prompts, streamer=streamer, **options))
    except (Interrupted, InvalidDistributionError) as e:
        writer.finish(e.samples)
        raise
    finally:
        if echo:
            echo.end()
            sys.stderr.write(shown_seed)


class _Answers:
    """What is asked for on a terminal, with the arguments as they are set at the time: `repl.Model`."""

    def __init__(self, generator: TextGenerator) -> None:
        self._generator = generator
        self.last_seed: int | None = None

    def check(self, args: argparse.Namespace) -> None:
        check(args)
        self._generator.check([[0]], **generation_of(args))

    def answer(self, prompt: str, args: argparse.Namespace) -> None:
        given = self._prompt(prompt)
        self.last_seed = _seed_of(args)
        _answer(self._generator, [given], args, self.last_seed, None if args.json else Echo("", sys.stderr), shown=[""])

    def inspect(self, prompt: str, args: argparse.Namespace) -> None:
        given = self._prompt(prompt)
        steps = self._generator.inspect(given, **sampling_of(args))
        _write_steps(self._generator, given, steps, DEFAULT_COUNT, args.json)

    def error(self, action: Callable[[], None]) -> object:
        return _outcome(action)[1]

    def _prompt(self, text: str) -> Prompt:
        return text if self._generator.tokenizer else ids_of(text, "a prompt")


class _JsonWriter:
    """Prints all samples at the end, with null for missing ones."""

    def on_token(self, *args: object) -> None:
        """Does nothing, but a streamer lets Ctrl-C take effect within a step."""

    def finish(self, samples: Sequence[Sample | None]) -> None:
        _write(_json.dumps({"samples": [s and s.as_dict() for s in samples]}) + "\n")


class _TextWriter:
    """Prints samples in turn, each as its tokens come.

    Where prompts and text go to the same place, a prompt appears right before each of its samples; on a terminal,
    where it has several, once, and each sample has a heading. Otherwise it appears once. `echo` has printed the first.
    """

    def __init__(self, prompts: Sequence[str], n_samples: int, echo: Echo | None = None) -> None:
        self._prompts, self._n_samples, self._echo = prompts, n_samples, echo
        self._headings = n_samples > 1 and sys.stdout.isatty()
        self._repeats = not self._headings and _go_to_one_place(sys.stdout, sys.stderr)
        self._shown = -1  # the last prompt that was
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
            self._begin(*divmod(self._turn, self._n_samples))
        _write(text + "\n" * is_last)
        self._in_sample = not is_last
        self._turn += is_last

    def _begin(self, prompt: int, number: int) -> None:
        """Prints what stands ahead of a prompt's sample of this number."""
        if self._repeats or self._shown != prompt:
            text = self._prompts[prompt]
            if self._echo and self._shown < 0 and prompt == 0:
                self._echo.ready()
            else:
                sys.stderr.write(text)
            if not self._repeats and text and not text.endswith("\n"):
                sys.stderr.write("\n")
            sys.stderr.flush()
            self._shown = prompt
        if self._headings:
            heading = f"--- sample {number + 1} of {self._n_samples} ---"
            _write((f"\x1b[2m{heading}\x1b[0m" if terminal_style(sys.stdout)["colour"] else heading) + "\n")

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


def _go_to_one_place(*files: TextIO) -> bool:
    """Whether what is written to two files appears in one place, as on a terminal."""
    try:
        return os.path.samestat(*(os.fstat(file.fileno()) for file in files))
    except OSError:  # of files that are in memory
        return files[0] is files[1]


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
    if path == "-":
        return stdin_text()
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
