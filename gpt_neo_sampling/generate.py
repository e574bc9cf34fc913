"""Prompts in, text out: a model on disk, its graphs and its session."""

import contextlib
import dataclasses
import functools
import logging
import numbers

import numpy as np

from gpt_neo_sampling._compat import probe_devices, quiet_logging, tf
from gpt_neo_sampling.checkpoint import load_tokenizer, open_checkpoint
from gpt_neo_sampling.cluster import ClusterError
from gpt_neo_sampling.draws import padded_size
from gpt_neo_sampling.inspection import ChainStep
from gpt_neo_sampling.mesh import device_mesh, round_up
from gpt_neo_sampling.models import gpt2
from gpt_neo_sampling.options import ROW_OPTIONS, GenerationOptions
from gpt_neo_sampling.program import (
    DEMO_FOLDER,
    LOGIT_BIAS,
    NO_STOP_TOKEN,
    ProgramInputs,
    ProgramKey,
    add_variables,
    build,
    build_chain,
    first_token_of,
    load_weights,
    variable_dtype_of,
)
from gpt_neo_sampling.request import checked_request
from gpt_neo_sampling.sample import INVALID
from gpt_neo_sampling.score import ScoreKey, ScoreProgram, score_texts
from gpt_neo_sampling.streaming import TextStream, Watcher

MAX_BATCH = 32  # rows of a request that one graph takes; a larger one goes through in parts
MAX_PROGRAMS = 8  # graphs kept; one more, and all are dropped and the weights read again
SHORTEST = 32  # positions of the smallest graph

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Sample:
    """One continuation of one prompt."""

    prompt_tokens: list  # of int; an empty prompt is the model's first token
    tokens: list  # of int, new tokens only; ends with the stop token if one was drawn
    text: str | None  # of the new tokens, without special ones; None without a tokenizer
    finish_reason: str = "length"  # or "stop": a stop token, or a stop string, which the text ends ahead of
    logprobs: list | None = None  # of float, one a new token: natural logarithms of the model's own probabilities
    draw_logprobs: list | None = None  # and of those that the tokens were drawn with

    def as_dict(self):
        """For JSON: a dict of the fields, without what was not asked for."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None or name == "text"}


class InvalidDistributionError(ArithmeticError):
    """The model gave logits that no token can be drawn from (NaN, say). `sample`: its number in the request, if any."""

    def __init__(self, message, sample=None):
        super().__init__(message)
        self.sample = sample


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while a request was watched. `samples` are those that were finished, in order, None for the others."""

    def __init__(self, samples):
        super().__init__()
        self.samples = samples


class _Program:
    """A graph for requests of one kind: placeholders, and what comes out."""

    def __init__(self, key, kind, model):
        """kind: "run", "watched" (by a `Watcher` in each run) or "chain" (see `build_chain`); model: as for `build`."""
        _, n_vocab, *_ = model

        def option(name):
            return tf.placeholder(ROW_OPTIONS[name].dtype, [key.rows])

        options = {name: option(name) for name in sorted(key.steps - {LOGIT_BIAS})}
        if LOGIT_BIAS in key.steps:
            options[LOGIT_BIAS] = tf.placeholder(tf.float32, [n_vocab])
        self.inputs = ProgramInputs(
            ids=tf.placeholder(tf.int32, [key.batch, key.length]),
            prompt_lengths=tf.placeholder(tf.int32, [key.batch]),
            max_steps=tf.placeholder(tf.int32, [key.rows]),
            stream=option("stream"),
            seed=option("seed"),
            stop_tokens=[tf.placeholder(tf.int32, []) for _ in range(key.n_stop_tokens)],
            temperature=option("temperature"),
            options=options,
        )
        self.watcher = None  # of the run that is under way
        if kind == "chain":
            self.names, self.results = zip(*build_chain(key, self.inputs, *model))
        else:
            on_tokens = (lambda tokens, n_drawn: self.watcher(tokens, n_drawn)) if kind == "watched" else None
            self.results = build(key, self.inputs, *model, on_tokens=on_tokens)

    def feeds(self, key, request, prompts, numbers, limits):
        """What is fed for samples of these numbers of these prompts, ranges both, of these limits of new tokens."""
        to, n_vocab = self.inputs, self.inputs.options[LOGIT_BIAS].shape[0] if LOGIT_BIAS in key.steps else 0
        filling = key.batch - len(prompts)  # rows of one token, and no step
        ids = np.full([key.batch, key.length], request.pad_token, np.int32)
        part = [request.prompts[p] for p in prompts]
        for row, prompt in enumerate(part):
            ids[row, : len(prompt)] = prompt

        def for_rows(name):
            column = request.values[name][prompts.start : prompts.stop]
            return np.repeat(np.pad(column, (0, filling), mode="edge"), key.samples)

        stop_tokens = request.stop_tokens + [NO_STOP_TOKEN] * (key.n_stop_tokens - len(request.stop_tokens))
        feeds = {
            to.ids: ids,
            to.prompt_lengths: [len(p) for p in part] + [1] * filling,
            to.max_steps: np.repeat(limits + [0] * filling, key.samples),
            to.stream: for_rows("stream") + np.tile(np.arange(numbers.start, numbers.stop, dtype=np.int32), key.batch),
            to.seed: for_rows("seed"),
            to.temperature: for_rows("temperature"),
            **dict(zip(to.stop_tokens, stop_tokens)),
            **{placeholder: for_rows(name) for name, placeholder in to.options.items() if name != LOGIT_BIAS},
        }
        if n_vocab:
            feeds[to.options[LOGIT_BIAS]] = np.pad(request.logit_bias, (0, n_vocab - len(request.logit_bias)))
        return feeds


class TextGenerator:
    """A GPT-Neo that continues prompts.

    Made by `from_pretrained`. Holds one copy of the weights, and a graph for
    each size of request that it has met, rounded up to a few sizes; at most
    `MAX_PROGRAMS` of them, so that mixed requests do not grow its memory.
    """

    def __init__(self, checkpoint, tokenizer=None, mesh=None, dtype=None):
        """Takes a `Checkpoint`, a `tokenizers.Tokenizer` or None, a `mesh.DeviceMesh`, by default one CPU, and a dtype.

        See `from_pretrained`.
        """
        gpt2.check_params(checkpoint.params)
        self.checkpoint = checkpoint
        self.tokenizer = tokenizer
        self.params = dict(checkpoint.params, mode="predict")
        if checkpoint.ignored_generation_options:
            options = (f"{key}={value!r}" for key, value in checkpoint.ignored_generation_options.items())
            log.warning("the model's generation_config.json asks for what is not built and is left out: %s",
                        ", ".join(options))  # fmt: skip
        self.mesh = device_mesh() if mesh is None else mesh
        # memory is as long as the request, rounded up, and at most n_ctx
        sizes = dict(gpt2.splittable_dims(self.params), memory_length=self.params["n_ctx"])
        self.mesh.check(sizes, gpt2.TENSORS)
        vocab_parts = self.mesh.parts("vocab")
        self._variable_dtype = variable_dtype_of(dtype)
        self.dtype = self._variable_dtype.activation_dtype.name
        self._n_vocab = self.params["n_vocab"] if vocab_parts == 1 else padded_size(self.params["n_vocab"], vocab_parts)
        self._mesh_impl = self.mesh.impl()
        self._session = None
        self._programs = {}

    @classmethod
    def from_pretrained(cls, folder=None, *, dtype=None, mesh_shape=None, layout=None, devices=None, cluster=None):
        """Opens the model in a folder.

        Args:
          folder: a path of a folder with GPT-Neo's mesh-TF checkpoint and its
            JSON config, or with a Hugging Face GPT-Neo, or of a JSON config; None
            for the model that comes with the package. See `open_checkpoint`. A
            tokenizer that comes with the model is used: see `load_tokenizer`.
          dtype: "float32" or "bfloat16", a str or a tf.DType: what weights are
            held in and activations computed in. None is float32, whatever the
            folder stores. bfloat16 halves the memory and gives logits of 8
            significant bits; what is drawn from them is computed in float32
            either way.
          mesh_shape, layout, devices, cluster: see `mesh.device_mesh`; by default
            one CPU. They change where the work is done and not what comes out:
            a vocabulary that a layout does not divide is padded with entries
            that are never drawn, and a batch with rows that are dropped.

        Returns:
          a TextGenerator. The weights are read at the first `generate`.

        Raises:
          CheckpointError: (a ValueError) if the folder cannot be read as a model.
          MeshError: (a ValueError) if the mesh cannot be had, or the layout does
            not fit the model.
          ValueError: if the model has options that are not supported, or for
            another dtype.
        """
        mesh = device_mesh(mesh_shape, layout, devices, cluster)
        checkpoint = open_checkpoint(DEMO_FOLDER if folder is None else folder)
        return cls(checkpoint, load_tokenizer(checkpoint), mesh, dtype)

    def generate(self, prompts, *, streamer=None, **options):
        """Continues prompts. Argument names are those of Hugging Face's `generate`.

        Args:
          prompts: a str or a list of token ids, or a list of either. Strings
            need the model's tokenizer. An empty prompt stands for the model's
            first token (its bos_id, or else its eos_id).
          streamer: a function of (index, token, text, is_last), called for each new
            token as soon as it is drawn: which of the samples, the token's id, the
            text that it completes (whole characters alone; None without a tokenizer),
            and whether it is the sample's last.
          **options: see `GenerationOptions`.

        Returns:
          a list of `Sample`, in the order of the prompts; the
          num_return_sequences of one prompt stand together.

        Raises:
          TypeError: for an option that there is not.
          ValueError: for a value that is out of range; the message says what
            was given and what is allowed.
          InvalidDistributionError: if the model gives logits that are NaN.
          ClusterError: (an OSError) if a machine of the cluster is missing or lost.
          Interrupted: (a KeyboardInterrupt) at Ctrl-C, if there is a streamer.
        """
        request = self._request(prompts, GenerationOptions(**options))
        if streamer is not None and self.mesh.cluster is not None:
            raise ValueError("a streamer needs a mesh of this process's devices, not a cluster")
        for length, limit in zip(map(len, request.prompts), request.values["max_new_tokens"]):
            if length + limit > self.params["n_ctx"]:
                log.warning(
                    "%d prompt tokens and %d new ones pass the context's end; generation stops there, at %d",
                    length, limit, self.params["n_ctx"],
                )  # fmt: skip
                break
        n_samples = request.options.num_return_sequences
        samples = [None] * (len(request.prompts) * n_samples)
        at_once = min(n_samples, MAX_BATCH)
        try:
            for begin in range(0, len(request.prompts), MAX_BATCH // at_once):
                prompts = range(begin, min(begin + MAX_BATCH // at_once, len(request.prompts)))
                for first in range(0, n_samples, at_once):
                    part = range(first, min(first + at_once, n_samples))
                    self._run(request, prompts, part, samples, streamer)
        except KeyboardInterrupt:
            raise Interrupted(samples) from None
        return samples

    def check(self, prompts, **options):
        """The `request.Request` that `generate` would run; raises what it would for its arguments. No model is run."""
        return self._request(prompts, GenerationOptions(**options))

    def inspect(self, prompt, continuation=(), **options):
        """The distribution of the token behind a prompt, and what each option makes of it.

        Args:
          prompt: a str or a list of token ids.
          continuation: the same: new tokens that stand behind the prompt already,
            for the options that look at new ones alone.
          **options: see `GenerationOptions`; those that say how a token is drawn.

        Returns:
          a list of `ChainStep`: the model's own distribution, then that behind each
          step that the options ask for, the last what a token is drawn from
          ("softmax", "entmax"; "argmax" for greedy decoding, all of it on one token).

        Raises:
          as `generate`.
        """
        new = self.encode(continuation) if len(continuation) else []
        request = self._request([self.encode(prompt) + new], GenerationOptions(**options))
        key = self._key(request, request.prompts, [0], 1)
        with self._closed_if_lost():
            program = self._program(key, "chain")
            feeds = program.feeds(key, request, range(1), range(1), [len(new)])
            results = self.mesh.run(self._session, program.results, feeds)
        steps = [
            ChainStep(name, request.setting(name), p[0, : self.params["n_vocab"]])
            for name, p in zip(program.names, results)
        ]
        if np.isnan(steps[-1].probabilities).any():
            raise InvalidDistributionError("the model's logits are not a distribution (NaN or infinite)")
        return steps

    def score(self, texts, *, add_start_token=False, stride=None):
        """How likely the model finds texts, by its own distribution: no temperature, no masks.

        Args:
          texts: what `generate` takes as prompts; none empty.
          add_start_token: True to read each text behind the model's first token (its
            bos_id, or else its eos_id), which scores the text's first token too. That
            one is left out otherwise, as in transformers: nothing stands before it.
          stride: int from 1 to the context's length − 1, for texts longer than the
            context, start token included (None: an error). They are read in windows
            of the context's length that begin `stride` tokens apart, and each
            token is scored in the first that has it, behind at least context −
            stride others once the first window is full. Smaller is slower and
            shows the model more.

        Returns:
          a list of `TextScore`, in the order of the texts.

        Raises:
          ValueError: for a value that is out of range, or a text that is too short
            or too long.
          InvalidDistributionError: if the model gives logits that are NaN.
          ClusterError: (an OSError) if a machine of the cluster is missing or lost.
        """
        texts = [self._ids(text) for text in _listed(texts)]
        start = [self._first_token()] if add_start_token else []
        scores = score_texts(texts, self._logprobs, self.params["n_ctx"], start, stride)
        for i, score in enumerate(scores):
            if np.isnan(score.sum_logprob):
                raise InvalidDistributionError(f"text {i}: the model's logits are not a distribution (NaN or infinite)")
        return scores

    def close(self):
        """Frees the weights and the graphs; the next `generate` makes them anew."""
        if self._session is not None:
            self._session.close()
        self._session, self._programs = None, {}

    # --- requests

    def _encode_prompts(self, prompts):
        """The prompts as lists of ids, none of them empty."""
        return [self.encode(p) for p in _listed(prompts)]

    def encode(self, prompt):
        """The ids of a prompt, a str or ids, never none; errors as of `generate`."""
        return self._ids(prompt) or [self._first_token()]

    def _ids(self, text):
        if isinstance(text, str):
            if self.tokenizer is None:
                name = self.checkpoint.tokenizer_name
                wanted = f" (its dataset's is {name}, which is not downloaded)" if name else ""
                raise ValueError(
                    f"{self.checkpoint.folder} has no tokenizer.json, nor vocab.json and merges.txt{wanted}; "
                    "give token ids"
                )
            ids = self.tokenizer.encode(text).ids
        else:
            ids = list(text)
        n_vocab = self.params["n_vocab"]
        for i in ids:
            if not isinstance(i, numbers.Integral) or not 0 <= i < n_vocab:
                raise ValueError(f"token id {i!r} is outside the vocabulary; 0 to {n_vocab - 1} are allowed")
        return [int(i) for i in ids]

    def _first_token(self):
        first = first_token_of(self.checkpoint)
        if first is None:
            raise ValueError("the model's first token is needed, and it names none (bos_id or eos_id)")
        return first

    def _request(self, prompts, options):
        return checked_request(self._encode_prompts(prompts), options, self.checkpoint, self.tokenizer)

    def _sample(self, request, index, prompt, new, logprobs):
        """Sample number `index` of a request, of new ids up to its limit and their log-probabilities."""
        new = new.tolist()
        end = next((at + 1 for at, token in enumerate(new) if token in request.stop_tokens), None)
        reason = "length" if end is None else "stop"
        new = new[:end]
        if INVALID in new:
            raise InvalidDistributionError(
                f"sample {index}, step {new.index(INVALID)}: "
                "the model's logits are not a distribution (NaN or infinite)",
                index,
            )
        text = None
        if self.tokenizer is not None:
            stream, text = TextStream(self.tokenizer, prompt, request.stop_strings), ""
            for at, token in enumerate(new, 1):
                text += stream.push(token, is_last=at == len(new))
                if stream.stopped:
                    new, reason = new[:at], "stop"
                    break
        return Sample(prompt, new, text, reason, *(p[: len(new)].tolist() for p in logprobs))

    # --- graphs

    def _run(self, request, prompts, numbers, samples, streamer):
        """Fills in samples of these numbers of these prompts, ranges both."""
        part = [request.prompts[p] for p in prompts]
        wanted = request.values["max_new_tokens"][prompts.start : prompts.stop].tolist()
        limits = [min(n, self.params["n_ctx"] - len(p)) for p, n in zip(part, wanted)]
        indices = [p * request.options.num_return_sequences + n for p in prompts for n in numbers]
        rows = [(prompt, limit) for prompt, limit in zip(part, limits) for _ in numbers]
        watcher = None
        if self.mesh.cluster is None and (streamer is not None or request.stop_strings):
            watcher = self._watcher(request, indices, rows, streamer)
        key = self._key(request, part, limits, len(numbers))
        with self._closed_if_lost():
            program = self._program(key, "run" if watcher is None else "watched")
            program.watcher = watcher
            feeds = program.feeds(key, request, prompts, numbers, limits)
            run = functools.partial(self.mesh.run, self._session, program.results, feeds)
            results = run() if watcher is None else watcher.run(run)
        interrupted = watcher is not None and watcher.interrupted
        for row, (index, (prompt, limit)) in enumerate(zip(indices, rows)):
            if not interrupted or watcher.finished[row]:
                new, *logprobs = (r[row, len(prompt) : len(prompt) + limit] for r in results)
                samples[index] = self._sample(request, index, prompt, new, logprobs)
        if interrupted:
            raise KeyboardInterrupt

    def _logprobs(self, rows):
        """Of rows of ids, the log-probabilities of all but the first of each."""
        key = ScoreKey(
            batch=round_up(_round_up_power(len(rows)), self.mesh.parts("batch")),
            length=round_up(
                _round_up_length(max(map(len, rows)), self.params["n_ctx"]), self.mesh.parts("memory_length")
            ),
        )
        with self._closed_if_lost():
            program = self._program(key, "score")
            out = self.mesh.run(self._session, program.results, program.feeds(key, rows))
        return [logprobs[: len(row) - 1] for logprobs, row in zip(out, rows)]

    @contextlib.contextmanager
    def _closed_if_lost(self):
        try:
            yield
        except ClusterError:
            self.close()  # what the processes held is lost: the next request begins anew
            raise

    def _key(self, request, prompts, limits, n_samples):
        options, n_ctx, n_vocab = request.options, self.params["n_ctx"], self.params["n_vocab"]
        prompt_length, length = (
            round_up(_round_up_length(longest, n_ctx), self.mesh.parts("memory_length"))
            for longest in (max(map(len, prompts)), max(len(p) + n for p, n in zip(prompts, limits)))
        )
        steps = request.steps if request.logit_bias is None else request.steps | {LOGIT_BIAS}
        return ProgramKey(
            batch=round_up(_round_up_power(len(prompts)), self.mesh.parts("batch")),
            prompt_length=prompt_length,
            length=length,
            samples=n_samples,
            greedy=request.greedy,
            steps=steps,
            max_top_k=_round_up_top_k(request.values["top_k"].max(), n_vocab) if "top_k" in steps else None,
            n_stop_tokens=_round_up_power(max(1, len(request.stop_tokens))),
            no_repeat_ngram_size=options.no_repeat_ngram_size,
            logits_processors=tuple(options.logits_processors),
            return_logprobs=options.return_logprobs,
        )

    def _watcher(self, request, indices, rows, streamer):
        def on_token(row, *args):
            streamer(indices[row], *args)

        def text_of(prompt):
            return None if self.tokenizer is None else TextStream(self.tokenizer, prompt, request.stop_strings)

        rows = [(text_of(prompt), limit, request.stop_tokens) for prompt, limit in rows]
        return Watcher(rows, None if streamer is None else on_token)

    def _program(self, key, kind):
        """The graph for a key and a kind, built in the one tf.Graph that holds the weights."""
        if (key, kind) in self._programs:
            return self._programs[key, kind]
        if len(self._programs) >= MAX_PROGRAMS:
            self.close()  # nodes cannot be taken out of a graph, only the graph dropped
        first = self._session is None
        if first:
            probe_devices()
        graph = tf.Graph() if first else self._session.graph
        with graph.as_default(), quiet_logging(), self.mesh.place(), tf.variable_scope("", reuse=tf.AUTO_REUSE):
            model = self.params, self._n_vocab, self._mesh_impl, self._variable_dtype
            if first:
                self._session = self._loaded_session(graph, add_variables(*model))
            program = ScoreProgram(key, *model) if kind == "score" else _Program(key, kind, model)
            self._programs[key, kind] = program
        return self._programs[key, kind]

    def _loaded_session(self, graph, weights):
        session = self.mesh.session(graph)
        try:
            load_weights(self.checkpoint, weights, self._mesh_impl, functools.partial(self.mesh.run, session))
        except BaseException:
            session.close()
            raise
        return session


def _listed(texts):
    """Texts, strings or ids each, from one or a list of them."""
    if isinstance(texts, str) or (len(texts) > 0 and isinstance(texts[0], numbers.Integral)):
        texts = [texts]
    if len(texts) == 0:
        raise ValueError("no prompts or texts; at least one is needed")
    return texts


def _round_up_power(size):
    return 1 << (size - 1).bit_length()


def _round_up_length(length, n_ctx):
    """32, 48, 64, 96, 128, …: powers of two and the middles between them."""
    size = SHORTEST
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, n_ctx)


def _round_up_top_k(top_k, n_vocab):
    return next(k for k in (64, 1024, n_vocab) if top_k <= k)
