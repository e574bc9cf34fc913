"""The command `gpt-neo-sampling`.

Results go to stdout, everything else to stderr. A bad value is one line and
exit status 2, a failure on the way one line and exit status 1.
"""

import argparse
import collections
import dataclasses
import functools
import json
import logging
import os
import re
import sys

from gpt_neo_sampling._compat import tf
from gpt_neo_sampling.checkpoint import MAX_SHARD_SIZE, convert_checkpoint
from gpt_neo_sampling.cluster import cluster_from_environment, parse_cluster, serve
from gpt_neo_sampling.export import CONTROLS, DEFAULT_TOP_K, export_saved_model
from gpt_neo_sampling.generate import Interrupted, InvalidDistributionError, TextGenerator
from gpt_neo_sampling.inspection import DEFAULT_COUNT, plot, plot_format, table, terminal_style, to_json, token_text
from gpt_neo_sampling.models.utils import DEFAULT_ALPHA
from gpt_neo_sampling.options import SAMPLING
from gpt_neo_sampling.program import DTYPES
from gpt_neo_sampling.prompts_file import generate_file
from gpt_neo_sampling.request import DEFAULT_NEW_TOKENS

PROGRAM = "gpt-neo-sampling"


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line; argparse would print its usage before it."""
        self.exit(2, f"{PROGRAM}: error: {message} (see {self.prog} --help)\n")


def _parser():
    parser = _Parser(prog=PROGRAM, description="Sample text from GPT-Neo models in mesh-tensorflow.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, help, description):
        return commands.add_parser(name, help=help, description=description, allow_abbrev=False)

    def add_model_options(parser):
        parser.add_argument("--model", metavar="PATH", help="folder of a GPT-Neo mesh-TF checkpoint or of a Hugging "
                            "Face GPT-Neo, or GPT-Neo's JSON config (default: the small model that comes with the "
                            "package)")  # fmt: skip
        parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="what weights are held in and "
                            "activations computed in; bfloat16 takes half the memory and rounds more "
                            "(default: %(default)s)")  # fmt: skip

    def add_mesh_options(parser):
        add = parser.add_argument_group("mesh", "where the work is done; what comes out is the same").add_argument
        add("--mesh-shape", metavar="x:2,y:2", help="axes of the mesh and their sizes (default: one device)")
        add("--layout", metavar="batch:x,vocab:y", help="which dimension is split along which axis, of "
            "batch, vocab, heads, embd, memory_length, intermediate_expanded, embed_sequence")  # fmt: skip
        add("--devices", metavar="cpu:0,cpu:1", help="a device for each processor of the mesh, the last axis "
            "fastest; auto: the GPUs that are there; in a cluster as worker:1/cpu:0 (default: "
            "TensorFlow's choice of one, in a cluster the first CPU of each process)")  # fmt: skip
        add("--cluster", metavar="host:port,host:port", help="processes started with serve "
            "(default: those of TF_CONFIG, if it is set)")  # fmt: skip

    def add_sampling_options(parser):
        """Those that say how a token is drawn, in the order of application."""
        add = parser.add_argument_group(
            "sampling", "in the order of application; each defaults to the model's own, and else changes nothing "
            "(docs/sampling.md shows what they do)"
        ).add_argument  # fmt: skip
        add("--repetition-penalty", type=float, metavar="F", help="above 1: tokens that stand there already get less "
            "likely, the prompt's too")  # fmt: skip
        add("--presence-penalty", type=float, metavar="X", help="taken from the logits of new tokens that stand there")
        add("--frequency-penalty", type=float, metavar="X", help="the same, for each time that they do")
        add("--no-repeat-ngram-size", type=int, metavar="N", help="no sequence of N tokens comes twice; 0 is off")
        add("--logit-bias", nargs="+", metavar="ID=X", help="what is added to the logits of tokens")
        add("--bad-words-ids", type=int, nargs="+", metavar="ID", help="tokens that are never drawn")
        add("--eos-token-id", type=int, nargs="+", metavar="ID", help="tokens that end a continuation, -1 for none")
        add("--min-new-tokens", type=int, metavar="N", help="no end before there are so many")
        add("--greedy", action="store_true", help="the likeliest token each time, as with --temperature 0")
        add("--temperature", type=float, metavar="T", help="larger is more random, 0 takes the likeliest token "
            "(default: 0.9; with --entmax 1.0)")  # fmt: skip
        add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens alone; 0 is off")
        add("--top-p", type=float, metavar="P", help="from the fewest tokens that have probability P together")
        add("--min-p", type=float, metavar="P", help="from tokens at least P times as likely as the likeliest")
        add("--typical-p", type=float, metavar="P", help="from the fewest tokens with probability P whose information "
            "is nearest the mean")  # fmt: skip
        add("--epsilon-cutoff", type=float, metavar="P", help="from tokens of at least this probability")
        add("--eta-cutoff", type=float, metavar="P", help="the same, less where the distribution is flat")
        add("--entmax", "--entmax-alpha", dest="entmax_alpha", type=float, nargs="?", const=DEFAULT_ALPHA,
            metavar="ALPHA", help="entmax in place of softmax: only likelier tokens, the fewer the larger ALPHA, "
            "from 1 (softmax) to 2 (sparsemax) (default with the option alone: %(const)s)")  # fmt: skip

    generate = command(
        "generate", "continue prompts", "Continue prompts. The text goes to stdout, the prompts and notes to stderr."
    )
    add_model_options(generate)
    add = generate.add_argument
    prompts = generate.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", nargs="+", action="extend", metavar="TEXT", help="texts to continue")
    prompts.add_argument("--prompt-ids", nargs="+", action="extend", metavar='"1 2 3"', help="the same as token ids")
    prompts.add_argument("--prompts-file", metavar="IN.jsonl", help='a prompt a line, as {"prompt": "Emma"} or '
                         '{"prompt_ids": [1, 2, 3]}, with an "id" and options of its own if wanted')  # fmt: skip
    add("--output", metavar="OUT.jsonl", help="where the samples of --prompts-file go, a JSON object a prompt; the "
        "same command goes on where it was stopped")  # fmt: skip
    add("--max-new-tokens", type=int, metavar="N", help=f"longest continuation, in tokens (default: the model's own, "
        f"or else {DEFAULT_NEW_TOKENS})")  # fmt: skip
    add("--seed", type=int, metavar="S", help="same seed, same text (default: a fresh one, named on stderr)")
    add("--num-samples", "--num-return-sequences", type=int, default=1, metavar="N",
        help="continuations of each prompt (default: 1)")  # fmt: skip
    add("--stop-strings", nargs="+", metavar="TEXT", help="texts that end a continuation, which stops ahead of them")
    add("--logprobs", action="store_true", help="with --json or --output: the log-probability of each new token, by "
        "the model alone and as it was drawn")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object in place of the text")
    add_sampling_options(generate)
    add_mesh_options(generate)
    score = command(
        "score",
        "tell how likely a model finds texts",
        "Tell how likely a model finds texts: a line each, with its perplexity, the sum of its tokens' "
        "log-probabilities (in nats, each given those before it) and their number.",
    )
    add_model_options(score)
    add = score.add_argument
    texts = score.add_mutually_exclusive_group(required=True)
    texts.add_argument("--text", nargs="+", action="extend", metavar="TEXT", help="texts to score")
    texts.add_argument("--text-ids", nargs="+", action="extend", metavar='"1 2 3"', help="the same as token ids")
    texts.add_argument("--file", metavar="PATH", help="a text file, scored as one text; see --stride")
    add("--stride", type=int, metavar="N", help="read texts longer than the model's context in windows of its length "
        "that begin N tokens apart, each token scored in the first that has it")  # fmt: skip
    add("--add-start-token", action="store_true", help="read each text behind the model's first token, so that the "
        "text's own first token is scored too (default: it is left out)")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object, with each token's log-probability")
    add_mesh_options(score)
    inspect = command(
        "inspect",
        "show what each sampling option does to the next token",
        "Show the distribution of the next token, and what each step of sampling makes of it.",
    )
    add_model_options(inspect)
    add = inspect.add_argument
    prompt = inspect.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the text ahead of the token")
    prompt.add_argument("--prompt-ids", metavar='"1 2 3"', help="the same as token ids")
    add("--continuation", metavar="TEXT", default="", help="new text that stands behind the prompt already, for the "
        "options that look at new tokens alone")  # fmt: skip
    add("--show", type=int, default=DEFAULT_COUNT, metavar="N", help="tokens to show (default: %(default)s)")
    add("--plot", metavar="FILE", help="draw it too: a file whose suffix says the format, such as .png or .svg")
    add("--json", action="store_true", help="print one JSON object in place of the table")
    add_sampling_options(inspect)
    add_mesh_options(inspect)
    export = command(
        "export",
        "write a model as a SavedModel",
        "Write a model as a SavedModel, which runs with TensorFlow alone. Nothing goes to stdout.",
    )
    add_model_options(export)
    add = export.add_argument
    add("--output", metavar="DIR", required=True, help="folder to write: a new or an empty one")
    add("--batch", type=int, required=True, metavar="N", help="rows of a request")
    add("--length", type=int, required=True, metavar="N", help="longest row, prompt and new tokens")
    add("--prompt-length", type=int, metavar="N", help="longest prompt; shorter ones take as long (default: --length)")
    add("--max-top-k", type=int, default=DEFAULT_TOP_K, metavar="K",
        help="largest K that a request may ask for (default: %(default)s)")  # fmt: skip
    add("--controls", nargs="+", choices=CONTROLS, default=(), metavar="NAME", help="what else may be asked for, of "
        f"{', '.join(CONTROLS)}; each costs time in every step")  # fmt: skip
    convert = command(
        "convert",
        "write a model in the other format",
        "Write a model in the other format. Weights keep every bit in float32.",
    )
    convert.add_argument("source", metavar="SOURCE", help="what generate --model takes")
    convert.add_argument("destination", metavar="DEST", help="a folder that is new or empty")
    convert.add_argument("--to", choices=("mesh-tf", "huggingface"), help="default: the one that SOURCE is not")
    convert.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                         help="of the weights (default: %(default)s; float16 for huggingface alone)")  # fmt: skip
    convert.add_argument("--max-shard-size", metavar="SIZE", default=MAX_SHARD_SIZE, help="most that one file of "
                         "huggingface holds, counted in float32 (default: %(default)s)")  # fmt: skip
    serve = command(
        "serve",
        "lend this machine's devices to a cluster",
        "Serve this process's devices to a mesh of several processes, until it is ended.",
    )
    serve.add_argument("--cluster", metavar="host:port,host:port", help="all processes (default: those of TF_CONFIG)")
    serve.add_argument("--task", metavar="worker:1", help="which of them this is, from 0 (default: TF_CONFIG's)")
    serve.add_argument("--cpus", type=int, default=1, metavar="N", help="CPU devices to offer (default: 1)")
    return parser


def _cluster(args, task=None):
    if args.cluster is not None:
        return parse_cluster(args.cluster, task)
    cluster = cluster_from_environment()
    if cluster is not None and task is not None:
        return dataclasses.replace(cluster, task=task).checked()
    return cluster


def _serve(args):
    cluster = _cluster(args, args.task)
    if cluster is None:
        raise ValueError("serve needs a cluster: --cluster host:port,host:port, or TF_CONFIG")
    if cluster.task is None:
        raise ValueError(f"serve needs --task, one of {', '.join(cluster.addresses)}")
    if args.cpus < 1:
        raise ValueError(f"--cpus {args.cpus}: at least 1 is needed")
    note = f"serving {cluster.task} at {cluster.addresses[cluster.task]}"
    serve(cluster, args.cpus, started=lambda: print(note, file=sys.stderr, flush=True))


def _convert(args):
    convert_checkpoint(args.source, args.destination, to=args.to, dtype=args.dtype, max_shard_size=args.max_shard_size)


def _ids(text, option="--prompt-ids"):
    words = re.split(r"[\s,]+", text.strip())
    try:
        return [int(w) for w in words if w]
    except ValueError:
        raise ValueError(f"{option} {text!r}: whole numbers with spaces between them are needed") from None


def _prompts(args):
    return args.prompt if args.prompt is not None else [_ids(text) for text in args.prompt_ids]


def _inspect(args):
    if args.show < 1:
        raise ValueError(f"--show {args.show}: at least 1 is needed")
    if args.plot is not None:
        plot_format(args.plot)  # what is wrong with it is said ahead of the work
    prompt = args.prompt if args.prompt is not None else _ids(args.prompt_ids)
    generator = _generator(args)
    steps = generator.inspect(prompt, args.continuation, **_sampling(args))
    text = functools.partial(token_text, generator.tokenizer)
    shown = _prompt_text(prompt, generator.tokenizer) + args.continuation
    if args.json:
        found = to_json(steps, text if generator.tokenizer else None, args.show)
        _write(json.dumps({"prompt_tokens": generator.encode(prompt), **found}) + "\n")
    else:
        sys.stderr.write(shown + "\n\n")
        sys.stderr.flush()
        _write(table(steps, text, count=args.show, **terminal_style(sys.stdout)))
    if args.plot is not None:
        title = f"Next token after “{shown if len(shown) < 60 else '…' + shown[-60:]}”"
        plot(steps, text, args.plot, title=title, count=args.show)
        print(f"wrote {args.plot}", file=sys.stderr)


def _sampling(args):
    """The options of `add_sampling_options`, as those of `GenerationOptions`."""
    options = {name: getattr(args, name) for name in SAMPLING}
    return dict(
        options,
        no_repeat_ngram_size=args.no_repeat_ngram_size,
        logit_bias=_biases(args.logit_bias or ()),
        bad_words_ids=[[i] for i in args.bad_words_ids or ()],
        eos_token_id=args.eos_token_id,
        do_sample=False if args.greedy else None,
    )


def _biases(texts):
    biases = {}
    for text in texts:
        token, _, value = text.partition("=")
        try:
            token, value = int(token), float(value)
        except ValueError:
            raise ValueError(f"--logit-bias {text!r}: a token's id and a number are needed, as in 13=-2.5") from None
        if token in biases:
            raise ValueError(f"--logit-bias has token {token} twice")
        biases[token] = value
    return biases


def _generator(args):
    return TextGenerator.from_pretrained(
        args.model,
        dtype=args.dtype,
        mesh_shape=args.mesh_shape,
        layout=args.layout,
        devices=args.devices,
        cluster=_cluster(args),
    )


def _generate(args):
    if (args.output is None) != (args.prompts_file is None):
        raise ValueError("--prompts-file and --output need each other")
    if args.output is not None and args.json:
        raise ValueError("--json is for stdout; --output is JSON without it")
    if args.logprobs and not args.json and args.output is None:
        raise ValueError("--logprobs is for --json and --output alone")
    generator = _generator(args)
    options = dict(
        max_new_tokens=args.max_new_tokens,
        stop_strings=args.stop_strings,
        num_return_sequences=args.num_samples,
        return_logprobs=args.logprobs,
        **_sampling(args),
    )
    if args.output is not None:
        _generate_file(args, generator, options)
        return
    prompts = _prompts(args)
    seed = args.seed
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
    request = generator.check(prompts, seed=seed, **options)  # what is wrong is said alone
    if args.seed is None and not request.greedy:
        print(f"seed {seed}", file=sys.stderr)
    writer = (_JsonWriter if args.json else _TextWriter)(args, generator, prompts)
    streamer = None if generator.mesh.cluster else writer.on_token
    try:
        writer.finish(generator.generate(prompts, streamer=streamer, seed=seed, **options))
    except Interrupted as e:
        writer.finish(e.samples)
        raise


def _generate_file(args, generator, options):
    done = generate_file(generator, args.prompts_file, args.output, seed=args.seed, **options)
    if args.seed is None:
        print(f"seed {done.seed}", file=sys.stderr)
    print(f"{args.output}: {done.prompts} prompts, {done.written} of them done now", file=sys.stderr)


class _JsonWriter:
    """Prints all samples at the end."""

    def __init__(self, args, generator, prompts):
        del args, generator, prompts

    def on_token(self, *args):
        """Nothing; that there is a streamer makes Ctrl-C heard."""

    def finish(self, samples):
        _write(json.dumps({"samples": [s.as_dict() for s in samples if s is not None]}) + "\n")


class _TextWriter:
    """Prints samples in turn, each as its tokens come. In a terminal a prompt stands right before its continuation."""

    def __init__(self, args, generator, prompts):
        self._prompts = [_prompt_text(p, generator.tokenizer) for p in prompts for _ in range(args.num_samples)]
        self._pieces = collections.defaultdict(list)  # of samples whose turn has not come
        self._turn = 0
        self._in_sample = False

    def on_token(self, index, token, text, is_last):
        self._pieces[index].append((token if text is None else text, is_last))
        while self._pieces[self._turn]:
            self._print(*self._pieces[self._turn].pop(0))

    def _print(self, text, is_last):
        if isinstance(text, int):  # a token, of a model without a tokenizer
            text = f" {text}" if self._in_sample else str(text)
        if not self._in_sample:
            sys.stderr.write(self._prompts[self._turn])
            sys.stderr.flush()
        _write(text + "\n" * is_last)
        self._in_sample = not is_last
        self._turn += is_last

    def finish(self, samples):
        """Prints what is not printed yet, of samples that are None nothing more."""
        if self._in_sample:
            self._print("", is_last=True)
        while self._turn < len(samples):
            sample = samples[self._turn]
            if sample is None:
                self._turn += 1
            else:
                self._print(" ".join(map(str, sample.tokens)) if sample.text is None else sample.text, is_last=True)


def _prompt_text(prompt, tokenizer):
    if isinstance(prompt, str):
        return prompt
    return tokenizer.decode(prompt) if tokenizer else " ".join(map(str, prompt)) + " "


def _score(args):
    if args.file is not None:
        texts = [_read_text(args.file)]
    elif args.text is not None:
        texts = args.text
    else:
        texts = [_ids(text, "--text-ids") for text in args.text_ids]
    scores = _generator(args).score(texts, add_start_token=args.add_start_token, stride=args.stride)
    if args.json:
        _write(json.dumps({"scores": [dataclasses.asdict(s) for s in scores]}) + "\n")
        return
    for s in scores:
        n = len(s.logprobs) - s.logprobs.count(None)
        _write(f"perplexity {s.perplexity:.6g}  log-probability {s.sum_logprob:.6g}  tokens {n}\n")


def _read_text(path):
    try:
        with open(path, "rb") as file:
            return file.read().decode("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"--file {path}: {e}") from None


def _export(args):
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


def _write(text):
    sys.stdout.buffer.write(text.encode("utf-8", "replace"))
    sys.stdout.flush()


def main(argv=None):
    """Runs the command line and returns its exit status."""
    args = _parser().parse_args(argv)
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
        return 0
    except ValueError as e:
        status = 2
        message = e
    except (InvalidDistributionError, OSError) as e:
        if isinstance(e, BrokenPipeError):  # the reader has gone: nothing is left to say
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        status = 1
        message = e
    except KeyboardInterrupt:
        return 130
    print(f"{PROGRAM}: error: {' '.join(str(message).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
