"""Prompts in, text out: a model on disk, its graphs and its session."""

import dataclasses
import functools
import logging
import numbers
import secrets

import numpy as np

from gpt_neo_sampling._compat import probe_devices, quiet_logging, tf
from gpt_neo_sampling.checkpoint import load_tokenizer, open_checkpoint
from gpt_neo_sampling.cluster import ClusterError
from gpt_neo_sampling.draws import padded_size
from gpt_neo_sampling.mesh import device_mesh, round_up
from gpt_neo_sampling.models import gpt2
from gpt_neo_sampling.models.utils import DEFAULT_ALPHA
from gpt_neo_sampling.program import (
    DEMO_FOLDER,
    ProgramKey,
    Request,
    add_variables,
    build,
    check_int,
    first_token_of,
    load_weights,
    stop_token_of,
    variable_dtype_of,
)
from gpt_neo_sampling.sample import INVALID, SamplingOptions

DEFAULT_NEW_TOKENS = 64
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


class InvalidDistributionError(ArithmeticError):
    """The model gave logits that no token can be drawn from (NaN, say)."""


class _Program:
    """One decode graph: placeholders for the request, and the tokens that come out."""

    def __init__(self, key, params, n_vocab, mesh_impl, variable_dtype):
        """n_vocab: entries of the vocabulary's dimension, padding included."""
        self.request = Request(
            ids=tf.placeholder(tf.int32, [key.batch, key.length]),
            prompt_lengths=tf.placeholder(tf.int32, [key.batch]),
            max_steps=tf.placeholder(tf.int32, [key.batch]),
            stream=tf.placeholder(tf.int32, [key.batch]),
            seed=tf.placeholder(tf.int32, []),
            stop_at_token=tf.placeholder(tf.int32, []),
            temperature=tf.placeholder(tf.float32, []),
            top_k=tf.placeholder(tf.int32, []),
            entmax_alpha=tf.placeholder(tf.float32, []),
        )
        self.tokens = build(key, self.request, params, n_vocab, mesh_impl, variable_dtype)


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

    def generate(
        self,
        prompts,
        *,
        max_new_tokens=None,
        do_sample=None,
        temperature=None,
        top_k=None,
        entmax_alpha=None,
        seed=None,
        num_return_sequences=1,
        eos_token_id=None,
        pad_token_id=None,
    ):
        """Continues prompts. Argument names are those of Hugging Face's `generate`.

        What is None is the model's own, if its generation_config.json names it
        (see `Checkpoint.generation_defaults`), and else as said here.

        Args:
          prompts: a str or a list of token ids, or a list of either. Strings
            need the model's tokenizer. An empty prompt stands for the model's
            first token (its bos_id, or else its eos_id).
          max_new_tokens: int, at least 1; None for 64 (or up to the model's
            max_length, prompt included). A row ends earlier at the stop token,
            and at the end of the context, with a warning.
          do_sample: False for greedy decoding, the likeliest token each time.
            None for True; a temperature, top_k or entmax_alpha that is given
            samples too, whatever the model's own is.
          temperature: larger is more random; 0 is greedy. None for 0.9 with
            softmax and 1.0 with entmax.
          top_k: draw from the k likeliest tokens alone; None for all.
          entmax_alpha: a number in [1, 2] for α-entmax in place of softmax;
            larger leaves fewer tokens to draw from. None for softmax.
          seed: int; the same seed and prompts give the same tokens. None for
            fresh ones.
          num_return_sequences: int, samples of each prompt.
          eos_token_id: the stop token; None for the model's own, −1 for none.
          pad_token_id: what fills the rows of a batch behind their tokens; it
            does not appear in what is returned. None for the model's own.

        Returns:
          a list of `Sample`, in the order of the prompts; the
          num_return_sequences of one prompt stand together.

        Raises:
          ValueError: for a value that is out of range; the message says what
            was given and what is allowed.
          InvalidDistributionError: if the model gives logits that are NaN.
          ClusterError: (an OSError) if a machine of the cluster is missing or lost.
        """
        prompts = self._encode_prompts(prompts)
        longest = max(len(p) for p in prompts)
        defaults = self.checkpoint.generation_defaults
        if do_sample is None:
            given = any(option is not None for option in (temperature, top_k, entmax_alpha))
            do_sample = given or defaults.get("do_sample", True)
        if do_sample and temperature is None:
            temperature = defaults.get("temperature")
        if top_k is None:
            top_k = defaults.get("top_k") or None  # Hugging Face's 0 is off
        if max_new_tokens is None:
            max_new_tokens = self._default_new_tokens(longest)
        check_int("max_new_tokens", max_new_tokens, 1)
        check_int("num_return_sequences", num_return_sequences, 1)
        n_vocab, n_ctx = self.params["n_vocab"], self.params["n_ctx"]
        if top_k is not None:
            check_int("top_k", top_k, 1)
        for name, value in (("temperature", temperature), ("entmax_alpha", entmax_alpha)):
            if value is not None and not isinstance(value, numbers.Real):
                raise ValueError(f"{name}={value!r}; a number is needed")
        if not do_sample:
            if temperature:
                raise ValueError(f"temperature={temperature} with do_sample=False, which is greedy; leave one out")
            temperature = 0
        use_entmax = entmax_alpha is not None
        if temperature is None:
            temperature = 1.0 if use_entmax else 0.9
        options = SamplingOptions(
            temperature=temperature, use_entmax=use_entmax, entmax_alpha=entmax_alpha if use_entmax else DEFAULT_ALPHA
        )
        options.check()
        if seed is None:
            seed = secrets.randbits(32)
        elif not isinstance(seed, numbers.Integral) or not -(2**31) <= seed < 2**32:
            raise ValueError(f"seed={seed!r}; a whole number from -2**31 to 2**32 - 1 is needed")
        stop_token = stop_token_of(self.checkpoint, eos_token_id)
        pad = self._padding(pad_token_id)

        if longest > n_ctx:
            raise ValueError(f"a prompt of {longest} tokens is longer than the context; at most {n_ctx} are allowed")
        if longest + max_new_tokens > n_ctx:
            log.warning(
                "%d prompt tokens and %d new ones pass the context's end; generation stops there, at %d",
                longest, max_new_tokens, n_ctx,
            )  # fmt: skip

        rows = [p for p in prompts for _ in range(num_return_sequences)]
        greedy = temperature == 0
        feeds = {
            "seed": np.array(int(seed) % 2**32, np.uint32).view(np.int32),
            "stop_at_token": stop_token,
            "temperature": temperature,
            "top_k": top_k if top_k is not None else 0,
            "entmax_alpha": options.entmax_alpha,
        }
        samples = []
        for begin in range(0, len(rows), MAX_BATCH):
            part = rows[begin : begin + MAX_BATCH]
            limits = [min(max_new_tokens, n_ctx - len(p)) for p in part]
            prompt_length, length = (
                round_up(_round_up_length(longest, n_ctx), self.mesh.parts("memory_length"))
                for longest in (max(map(len, part)), max(len(p) + n for p, n in zip(part, limits)))
            )
            key = ProgramKey(
                batch=round_up(_round_up_batch(len(part)), self.mesh.parts("batch")),
                prompt_length=prompt_length,
                length=length,
                greedy=greedy,
                use_entmax=use_entmax and not greedy,
                max_top_k=None if greedy else _round_up_top_k(top_k, n_vocab),
            )
            new_tokens = self._run(key, part, limits, begin, feeds, pad)
            for row, (prompt, new) in enumerate(zip(part, new_tokens), begin):
                samples.append(self._sample(row, prompt, new, stop_token))
        return samples

    def close(self):
        """Frees the weights and the graphs; the next `generate` makes them anew."""
        if self._session is not None:
            self._session.close()
        self._session, self._programs = None, {}

    # --- requests

    def _encode_prompts(self, prompts):
        """The prompts as lists of ids, none of them empty."""
        if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], numbers.Integral)):
            prompts = [prompts]
        if len(prompts) == 0:
            raise ValueError("no prompts; at least one is needed")
        return [self._encode_prompt(p) for p in prompts]

    def _encode_prompt(self, prompt):
        if isinstance(prompt, str):
            if self.tokenizer is None:
                name = self.checkpoint.tokenizer_name
                wanted = f" (its dataset's is {name}, which is not downloaded)" if name else ""
                raise ValueError(
                    f"{self.checkpoint.folder} has no tokenizer.json, nor vocab.json and merges.txt{wanted}; "
                    "give prompts as token ids"
                )
            ids = self.tokenizer.encode(prompt).ids
        else:
            ids = list(prompt)
        n_vocab = self.params["n_vocab"]
        for i in ids:
            if not isinstance(i, numbers.Integral) or not 0 <= i < n_vocab:
                raise ValueError(f"prompt id {i!r} is outside the vocabulary; 0 to {n_vocab - 1} are allowed")
        if not ids:
            first = first_token_of(self.checkpoint)
            if first is None:
                raise ValueError("an empty prompt, and the model names no first token (bos_id or eos_id)")
            ids = [first]
        return [int(i) for i in ids]

    def _default_new_tokens(self, longest):
        """For prompts of at most `longest` tokens."""
        defaults = self.checkpoint.generation_defaults
        if "max_new_tokens" in defaults or "max_length" not in defaults:
            return defaults.get("max_new_tokens", DEFAULT_NEW_TOKENS)
        if longest >= defaults["max_length"]:
            raise ValueError(
                f"a prompt of {longest} tokens leaves nothing of max_length={defaults['max_length']}, "
                "which the model's generation_config.json gives; give max_new_tokens"
            )
        return defaults["max_length"] - longest

    def _padding(self, pad_token_id):
        if pad_token_id is None:
            pad_token_id = self.checkpoint.generation_defaults.get("pad_token_id", 0)
        check_int("pad_token_id", pad_token_id, 0)
        return int(pad_token_id)

    def _sample(self, row, prompt, new, stop_token):
        new = new.tolist()
        if stop_token in new:
            new = new[: new.index(stop_token) + 1]
        if INVALID in new:
            raise InvalidDistributionError(
                f"sample {row}, step {new.index(INVALID)}: the model's logits are not a distribution (NaN or infinite)"
            )
        return Sample(prompt, new, self._decode(prompt, new))

    def _decode(self, prompt, new):
        if self.tokenizer is None:
            return None
        # Decoded behind its prompt: a character's bytes may lie on both sides.
        before, whole = self.tokenizer.decode(prompt), self.tokenizer.decode(prompt + new)
        return whole[len(before) :] if whole.startswith(before) else self.tokenizer.decode(new)

    # --- graphs

    def _run(self, key, prompts, limits, first_row, feeds, pad):
        """The new tokens of each prompt, arrays as long as its limit."""
        ids = np.full([key.batch, key.length], pad, np.int32)
        lengths = np.ones(key.batch, np.int32)  # rows that only fill the batch: one token, no step
        max_steps = np.zeros(key.batch, np.int32)
        for row, (prompt, limit) in enumerate(zip(prompts, limits)):
            ids[row, : len(prompt)] = prompt
            lengths[row], max_steps[row] = len(prompt), limit
        feeds = {
            **feeds,
            "ids": ids,
            "prompt_lengths": lengths,
            "max_steps": max_steps,
            "stream": np.arange(first_row, first_row + key.batch, dtype=np.int32),
        }
        try:
            program = self._program(key)
            feeds = {getattr(program.request, name): value for name, value in feeds.items()}
            out = self.mesh.run(self._session, program.tokens, feeds)
        except ClusterError:
            self.close()  # what the processes held is lost: the next request begins anew
            raise
        return [out[row, len(p) : len(p) + n] for row, (p, n) in enumerate(zip(prompts, limits))]

    def _program(self, key):
        """The graph for a key, built in the one tf.Graph that holds the weights."""
        if key in self._programs:
            return self._programs[key]
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
            self._programs[key] = _Program(key, *model)
        return self._programs[key]

    def _loaded_session(self, graph, weights):
        session = self.mesh.session(graph)
        try:
            load_weights(self.checkpoint, weights, self._mesh_impl, functools.partial(self.mesh.run, session))
        except BaseException:
            session.close()
            raise
        return session


def _round_up_batch(rows):
    return 1 << (rows - 1).bit_length()


def _round_up_length(length, n_ctx):
    """32, 48, 64, 96, 128, …: powers of two and the middles between them."""
    size = SHORTEST
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, n_ctx)


def _round_up_top_k(top_k, n_vocab):
    if top_k is None or top_k >= n_vocab:
        return None
    return next(k for k in (64, 1024, n_vocab) if top_k <= k)
